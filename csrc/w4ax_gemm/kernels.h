// Compiled bodies of w4ax_gemm; names are w4ax_gemm.<isa>.<tile>.
//   gemv    few tokens: weights are decoded in registers, one pass over the stream
//   skinny  a few more: as gemv, with more tokens against fewer features in a register tile
//   wide    many: a 64 x 128 block of weights is decoded once into L1, then multiplied
//   t<M>   Hopper: tiles of M tokens and 64 or 128 features (sm90.cuh)
//   t<M>x192  the same, and 192 features
//   s<M>   t<M> with K dealt out to all SMs in equal shares (cuda/stream_k.cuh)
//   plain  any GPU from sm_80, every case (sm80.cuh)
#pragma once
#include "core/build.h"
#include "cpu/isa.h"

#define TSL_W4AX_GEMM_GEMV(X) TSL_FOR_EACH_ISA(X)
#define TSL_W4AX_GEMM_SKINNY(X) TSL_FOR_EACH_ISA(X)
#define TSL_W4AX_GEMM_WIDE(X) TSL_FOR_EACH_ISA(X)

// clang-format off
#define TSL_W4AX_GEMM_SM90_TILES(X)  /* name, tokens, features */ \
  X(8, 8, 64) X(16, 16, 64) X(32, 32, 64) \
  X(64, 64, 128) X(128, 128, 128) X(256, 256, 128) X(64x192, 64, 192) X(128x192, 128, 192)
#define TSL_W4AX_GEMM_SM90_STREAMS(X) X(64, 64, 128) X(128, 128, 128) X(256, 256, 128)
// clang-format on
#define TSL_W4AX_GEMM_SM90_WIDE(X) TSL_W4AX_GEMM_SM90_STREAMS(X)  // for _w4ax_gemm_probe
#define TSL_W4AX_GEMM_SM90(X) TSL_IF_SM90(TSL_W4AX_GEMM_SM90_TILES(X))
#define TSL_W4AX_GEMM_SM90_S(X) TSL_IF_SM90(TSL_W4AX_GEMM_SM90_STREAMS(X))
#define TSL_W4AX_GEMM_SM80(X) TSL_IF_CUDA(X(plain))
