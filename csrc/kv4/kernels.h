// Compiled bodies of kv4; names are kv4.<isa>.<tile>.
//   codes  multiplies codes: INT8 queries by K codes, INT8 probabilities by V codes
//   tile   decodes blocks to fp32, then as msm
//   bf16   decodes blocks to bf16, then as msm
//   plain  any GPU from sm_80: decodes in registers, fp16 products (sm80.cuh)
//   few    Hopper: 8 rows at a time, one scale a token of 4 or 8 bits (sm90.cuh)
#pragma once
#include "core/build.h"
#include "cpu/isa.h"

#define TSL_KV4_CODES(X) TSL_FOR_EACH_ISA(X)
#define TSL_KV4_TILE(X) TSL_FOR_EACH_ISA(X)
#define TSL_KV4_BF16(X) TSL_FOR_EACH_BF16_ISA(X)
#define TSL_KV4_SM80(X) TSL_IF_CUDA(X(plain))
#define TSL_KV4_SM90(X) TSL_IF_SM90(X(few))
// Bits and head dims that the Hopper body is compiled for.
#define TSL_KV4_SM90_SHAPES(X) X(4, 64) X(4, 128) X(4, 256) X(8, 64) X(8, 128) X(8, 256)
