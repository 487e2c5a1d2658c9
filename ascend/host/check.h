// What the Ascend kernels take, of what w4ax_gemm and act_quant are on every device.
#pragma once
#include "core/check.h"
#include "launch.h"
#include "w4ax_gemm/check.h"

namespace tessella::ascend {

inline GemmDtype check_dtype(const Arg& arg, DType dtype) {
  if (dtype == DType::kF32) refuse(arg, "bfloat16 or float16 on ascend", "float32");
  return dtype == DType::kBF16 ? kBF16 : kF16;
}

inline GemmScheme check_scheme(const char* op, const layout::W4Panel& panel,
                               const std::string& scheme) {
  if (panel.scheme == Scheme::kGroup && panel.G != 128)
    refuse(Arg{op, "scheme"}, "channel, g128 or twolevel on ascend", "'" + scheme + "'");
  return panel.scheme == Scheme::kChannel ? kChannel
         : panel.scheme == Scheme::kGroup ? kGroup
                                          : kTwoLevel;
}

// The longest token that act_quant can permute.
inline void check_perm_k(const char* op, int64_t K) {
  if (K > kQuantMostPermK)
    refuse(Arg{op, "perm"},
           "none for more than " + std::to_string(kQuantMostPermK) + " channels on ascend",
           "K=" + std::to_string(K));
}

// From checked parameters; `mode` is empty for the planner's choice.
inline GemmProblem gemm_problem(const char* op, const w4ax_gemm::Params& p,
                                const std::string& scheme, int64_t cores, const std::string& mode) {
  const layout::W4Panel& panel = p.panel;
  if (p.K8 != 0 && p.K8 != panel.Kp)
    refuse(Arg{op, "codes8"}, "activations of one precision on ascend",
           "K8=" + std::to_string(p.K8) + " of " + std::to_string(panel.Kp));
  if (cores < 1 || cores > 64) refuse(Arg{op, "cores"}, "1..64", cores);
  GemmProblem g{};
  g.M = p.M;
  g.N = panel.N;
  g.Kp = panel.Kp;
  g.scheme = check_scheme(op, panel, scheme);
  g.dtype = check_dtype(Arg{op, "dtype"}, p.dtype);
  g.int8 = p.K8 > 0;
  g.per_block = p.granularity == Granularity::kBlock;
  g.scale_row = p.granularity == Granularity::kClass && !g.int8 ? 1 : 0;
  g.has_bias = p.bias != nullptr;
  g.cores = int32_t(cores);
  g.mode = mode;
  return g;
}

}  // namespace tessella::ascend
