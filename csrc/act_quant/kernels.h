// Compiled bodies of act_quant; names are act_quant.<isa or cuda>.
#pragma once
#include "cpu/isa.h"

#define TSL_ACT_QUANT_CPU(X) TSL_FOR_EACH_ISA(X)

#ifdef TESSELLA_WITH_CUDA
#define TSL_ACT_QUANT_CUDA(X) X(cuda)
#else
#define TSL_ACT_QUANT_CUDA(X)
#endif
