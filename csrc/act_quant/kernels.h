// Compiled bodies of act_quant; names are act_quant.<isa or cuda>.
#pragma once
#include "core/build.h"
#include "cpu/isa.h"

#define TSL_ACT_QUANT_CPU(X) TSL_FOR_EACH_ISA(X)
#define TSL_ACT_QUANT_CUDA(X) TSL_IF_CUDA(X(cuda))
