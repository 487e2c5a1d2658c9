// Every kernel of this build by name: the lists that drive dispatch, tests and benches.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "act_quant/kernels.h"
#include "kv4/kernels.h"
#include "mla/kernels.h"
#include "msm/kernels.h"
#include "w4ax_gemm/kernels.h"

namespace tessella {

using Family = std::pair<std::string, std::vector<std::string>>;

inline std::vector<Family> families() {
  return {
      {"act_quant",
       {
#define X(isa) "act_quant." #isa,
           TSL_ACT_QUANT_CPU(X)
#undef X
#define X(name) "act_quant." #name,
               TSL_ACT_QUANT_CUDA(X)
#undef X
       }},
      {"kv4",
       {
#define X(isa) "kv4." #isa ".codes",
           TSL_KV4_CODES(X)
#undef X
#define X(isa) "kv4." #isa ".tile",
               TSL_KV4_TILE(X)
#undef X
#define X(isa) "kv4." #isa ".bf16",
                   TSL_KV4_BF16(X)
#undef X
#define X(tile) "kv4.sm80." #tile,
                       TSL_KV4_SM80(X)
#undef X
#define X(rows) "kv4.sm90." #rows,
                           TSL_KV4_SM90(X)
#undef X
       }},
      {"mla",
       {
#define X(isa) "mla." #isa ".codes",
           TSL_MLA_CODES(X)
#undef X
#define X(isa) "mla." #isa ".tile",
               TSL_MLA_TILE(X)
#undef X
#define X(isa) "mla." #isa ".bf16",
                   TSL_MLA_BF16(X)
#undef X
       }},
      {"msm",
       {
#define X(isa) "msm." #isa ".tile",
           TSL_MSM_TILE(X)
#undef X
#define X(isa) "msm." #isa ".bf16",
               TSL_MSM_BF16(X)
#undef X
#define X(tile) "msm.sm80." #tile,
                   TSL_MSM_SM80(X)
#undef X
#define X(tile) "msm.sm90." #tile,
                       TSL_MSM_SM90(X)
#undef X
       }},
      {"w4ax_gemm",
       {
#define X(isa) "w4ax_gemm." #isa ".gemv",
           TSL_W4AX_GEMM_GEMV(X)
#undef X
#define X(isa) "w4ax_gemm." #isa ".skinny",
               TSL_W4AX_GEMM_SKINNY(X)
#undef X
#define X(isa) "w4ax_gemm." #isa ".wide",
                   TSL_W4AX_GEMM_WIDE(X)
#undef X
#define X(name, tokens, features) "w4ax_gemm.sm90.t" #name,
                       TSL_W4AX_GEMM_SM90(X)
#undef X
#define X(name, tokens, features) "w4ax_gemm.sm90.s" #name,
                           TSL_W4AX_GEMM_SM90_S(X)
#undef X
#define X(tile) "w4ax_gemm.sm80." #tile,
                               TSL_W4AX_GEMM_SM80(X)
#undef X
       }},
  };
}

inline std::vector<std::string> all_kernels() {
  std::vector<std::string> names;
  for (const Family& f : families()) names.insert(names.end(), f.second.begin(), f.second.end());
  return names;
}

}  // namespace tessella
