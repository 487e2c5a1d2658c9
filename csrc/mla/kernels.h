// Compiled bodies of mla; names are mla.<isa>.<tile>.
//   codes  multiplies codes: INT8 queries by latent codes, INT8 probabilities by the same
//   tile   brings blocks to fp32, then multiplies those
//   bf16   brings blocks to bf16, then multiplies those
#pragma once
#include "core/build.h"
#include "cpu/isa.h"

#define TSL_MLA_CODES(X) TSL_FOR_EACH_ISA(X)
#define TSL_MLA_TILE(X) TSL_FOR_EACH_ISA(X)
#define TSL_MLA_BF16(X) TSL_FOR_EACH_BF16_ISA(X)
