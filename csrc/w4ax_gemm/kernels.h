// Compiled bodies of w4ax_gemm; names are w4ax_gemm.<isa>.<tile>.
//   gemv    few tokens: weights are decoded in registers, one pass over the stream
//   skinny  a few more: as gemv, with more tokens against fewer features in a register tile
//   wide    many: a 64 x 128 block of weights is decoded once into L1, then multiplied
//   t<M>   Hopper: tiles of M tokens (sm90.cuh)
//   s<M>   the same, with K dealt out to all SMs in equal shares (cuda/stream_k.cuh)
//   plain  any GPU from sm_80, every case (sm80.cuh)
#pragma once
#include "core/build.h"
#include "cpu/isa.h"

#define TSL_W4AX_GEMM_GEMV(X) TSL_FOR_EACH_ISA(X)
#define TSL_W4AX_GEMM_SKINNY(X) TSL_FOR_EACH_ISA(X)
#define TSL_W4AX_GEMM_WIDE(X) TSL_FOR_EACH_ISA(X)

#define TSL_W4AX_GEMM_SM90_TILES(X) X(8) X(16) X(32) X(64) X(128) X(256)
#define TSL_W4AX_GEMM_SM90_STREAMS(X) X(64) X(128) X(256)
#define TSL_W4AX_GEMM_SM90_WIDE(X) X(64) X(128) X(256)  // for _w4ax_gemm_probe
#define TSL_W4AX_GEMM_SM90(X) TSL_IF_SM90(TSL_W4AX_GEMM_SM90_TILES(X))
#define TSL_W4AX_GEMM_SM90_S(X) TSL_IF_SM90(TSL_W4AX_GEMM_SM90_STREAMS(X))
#define TSL_W4AX_GEMM_SM80(X) TSL_IF_CUDA(X(plain))
