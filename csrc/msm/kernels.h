// Compiled bodies of msm; names are msm.<isa>.<tile>.
//   tile  multiplies in fp32
//   bf16  multiplies in bf16 (VDPBF16PS), for bf16 queries and pages
#pragma once
#include "core/build.h"
#include "cpu/isa.h"

#define TSL_MSM_TILE(X) TSL_FOR_EACH_ISA(X)
#define TSL_MSM_BF16(X) TSL_FOR_EACH_BF16_ISA(X)
