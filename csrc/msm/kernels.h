// Compiled bodies of msm; names are msm.<isa>.<tile>.
//   tile  multiplies in fp32
//   bf16  multiplies in bf16 (VDPBF16PS), for bf16 queries and pages
//   plain  any GPU from sm_80: every tile, mask and head dim (sm80.cuh)
//   t64    Hopper: 17 to 64 rows of each request over 16-bit pages (sm90.cuh)
//   t128   Hopper: tiles of 64 and 128 rows over 16-bit pages (sm90.cuh)
#pragma once
#include "core/build.h"
#include "cpu/isa.h"

#define TSL_MSM_TILE(X) TSL_FOR_EACH_ISA(X)
#define TSL_MSM_BF16(X) TSL_FOR_EACH_BF16_ISA(X)
#define TSL_MSM_SM80(X) TSL_IF_CUDA(X(plain))
#define TSL_MSM_SM90(X) TSL_IF_SM90(X(t64) X(t128))
// Head dims that the Hopper body is compiled for.
#define TSL_MSM_SM90_DIMS(X) X(64) X(80) X(96) X(128) X(256)
