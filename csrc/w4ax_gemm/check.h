// Torch arguments of the w4ax_gemm family -> params; shared by the entries of every device.
#pragma once
#include <optional>

#include "core/check.h"
#include "w4ax_gemm/params.h"

namespace tessella::w4ax_gemm {

// Kp is not rounded here: ActBlocks are whole blocks, canonical weights are padded to them.
inline layout::W4Panel check_scheme(const char* op, const std::string& scheme, int64_t N,
                                    int64_t Kp) {
  layout::W4Panel p{Scheme::kGroup, N, Kp, 128};
  if (scheme == "channel") {
    p.scheme = Scheme::kChannel;
  } else if (scheme == "twolevel") {
    p.scheme = Scheme::kTwoLevel;
  } else if (scheme == "g32" || scheme == "g64") {
    p.G = scheme == "g32" ? 32 : 64;
  } else if (scheme != "g128") {
    refuse(Arg{op, "scheme"}, "one of channel, g32, g64, g128, twolevel", "'" + scheme + "'");
  }
  if (Kp < 128 || Kp > kMostKp)
    refuse(Arg{op, "K"}, "1.." + std::to_string(kMostKp) + " channels", Kp);
  if (N < 1) refuse(Arg{op, "N"}, "at least 1", N);
  return p;
}

// The weight and the bias, on the device of `like`, which has the result's dtype. Of a `wide`
// weight a code has a byte, and scales are those of channels alone.
inline void check_weight(const char* op, Params& p, const Tensor& w, const std::string& scheme,
                         int64_t N, int64_t Kp, const std::optional<Tensor>& bias, ScalarType dtype,
                         const Tensor& like, bool wide = false) {
  p.panel = check_scheme(op, scheme, N, Kp);
  const int64_t wide_panel = p.panel.blocks() * 2 * p.panel.kCodeBytes + p.panel.tail_bytes();
  const int64_t bytes = wide ? p.panel.panels() * wide_panel : p.panel.bytes();
  check_tensor(Arg{op, "w"}, w, ScalarType::Byte, {bytes}, like);
  if (bias.has_value()) {
    check_tensor(Arg{op, "bias"}, *bias, dtype, {N}, w);
    p.bias = bias->const_data_ptr();
  }
  p.w = w.const_data_ptr<uint8_t>();
  p.groups = {1, p.panel.panels(), 0, 0};
  p.columns = N;
}

// G groups of `features` out features each, the first one's from `first` on and the others'
// `stride` apart; all in whole panels.
inline void check_groups(const char* op, Params& p, int64_t G, int64_t features, int64_t first,
                         int64_t stride) {
  constexpr int64_t kN = layout::W4Panel::kN;
  const int64_t least[] = {kN, 0, 0}, given[] = {features, first, stride};
  const char* names[] = {"features", "first", "stride"};
  for (int i = 0; i < 3; ++i)
    if (given[i] < least[i] || given[i] % kN != 0)
      refuse(Arg{op, names[i]}, "a multiple of 64 from " + std::to_string(least[i]) + " on",
             given[i]);
  if (first > p.panel.N || features > p.panel.N || (G > 1 && stride > p.panel.N) ||
      first + (G - 1) * stride + features > p.panel.N)
    refuse(Arg{op, "N"},
           "at least first + (G - 1) * stride + features = " + std::to_string(first) + " + " +
               std::to_string(G - 1) + " * " + std::to_string(stride) + " + " +
               std::to_string(features),
           p.panel.N);
  p.groups = {G, features / kN, first / kN, stride / kN};
  p.columns = G * features;
}

inline Params check(const char* op, const Tensor& codes8, const Tensor& codes4, const Tensor& sums,
                    const Tensor& scales, const Tensor& w, const std::string& scheme, int64_t N,
                    const std::string& granularity, const std::optional<Tensor>& bias,
                    ScalarType dtype, bool wide = false) {
  Params p{};
  p.granularity = check_granularity(op, granularity);
  p.dtype = check_float(Arg{op, "dtype"}, dtype);
  if (w.is_cuda() && p.dtype == DType::kF32)
    refuse(Arg{op, "dtype"}, "bfloat16 or float16 on cuda", "float32");
  if (codes8.dim() != 3 || codes4.dim() != 3)
    refuse(Arg{op, codes8.dim() != 3 ? "codes8" : "codes4"}, "3 dimensions",
           describe(codes8.dim() != 3 ? codes8 : codes4));
  const int64_t B8 = codes8.size(0), B4 = codes4.size(0), B = B8 + B4;
  p.M = codes8.size(1);
  p.K8 = B8 * 128;
  check_tensor(Arg{op, "codes8"}, codes8, ScalarType::Char, {B8, p.M, 128}, w);
  check_tensor(Arg{op, "codes4"}, codes4, ScalarType::Byte, {B4, p.M, 64}, w);
  check_tensor(Arg{op, "sums"}, sums, ScalarType::Int, {B, p.M}, w);
  if (p.granularity == Granularity::kToken)
    check_tensor(Arg{op, "scales"}, scales, ScalarType::Float, {p.M}, w);
  else
    check_tensor(Arg{op, "scales"}, scales, ScalarType::Float, {scale_rows(p.granularity, B), p.M},
                 w);
  check_one_precision(op, p.granularity, p.K8, B * 128);
  check_weight(op, p, w, scheme, N, B * 128, bias, dtype, w, wide);
  p.codes4 = codes4.const_data_ptr<uint8_t>();
  p.x8 = codes8.const_data_ptr<int8_t>();
  p.sums = sums.const_data_ptr<int32_t>();
  p.scales = scales.const_data_ptr<float>();
  return p;
}

}  // namespace tessella::w4ax_gemm
