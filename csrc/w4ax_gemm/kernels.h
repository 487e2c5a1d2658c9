// Compiled bodies of w4ax_gemm; names are w4ax_gemm.<isa>.<tile>.
//   gemv    few tokens: weights are decoded in registers, one pass over the stream
//   skinny  a few more: as gemv, with more tokens against fewer features in a register tile
//   wide    many: a 64 x 128 block of weights is decoded once into L1, then multiplied
#pragma once
#include "cpu/isa.h"

#define TSL_W4AX_GEMM_GEMV(X) TSL_FOR_EACH_ISA(X)
#define TSL_W4AX_GEMM_SKINNY(X) TSL_FOR_EACH_ISA(X)
#define TSL_W4AX_GEMM_WIDE(X) TSL_FOR_EACH_ISA(X)
