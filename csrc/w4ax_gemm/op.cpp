// Torch entries of w4ax_gemm, w4ax_linear, w4ax_grouped, w4_pack and w4_unpack.
#include <tuple>

#include "act_quant/check.h"
#include "core/build.h"
#include "core/env.h"
#include "core/stream.h"
#include "cpu/pages.h"
#include "w4ax_gemm/check.h"
#include "w4ax_gemm/plan.h"

namespace tessella::w4ax_gemm {

// Runs f(stream) for CUDA tensors on the device of `like`.
template <class F>
static void on_gpu(const char* op, const Tensor& like, const F& f) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  check_launch(op, f(current_stream(like.get_device_index())));
}

// Runs p, whose operands have been set, into out; `like` is any tensor of their device.
static void run([[maybe_unused]] const char* op, Params& p, const Tensor& like, const Tensor& out) {
  if (p.M == 0) return;
  p.out = out.mutable_data_ptr();
  if (out.is_cuda()) {
    [[maybe_unused]] Tensor kept = out;
    [[maybe_unused]] const Scratch scratch = [&](int64_t bytes) {
      kept = torch::stable::new_empty(out, {bytes}, ScalarType::Byte);
      return kept.mutable_data_ptr();
    };
    TSL_IF_CUDA(on_gpu(op, out, [&](void* stream) { return run_cuda(p, scratch, stream); });)
    return;
  }
  // scratch: INT4 codes as bytes, and code sums of groups smaller than a block
  Tensor x4 = like, sums = like;
  if (const int64_t rows = (p.panel.Kp - p.K8) / 128 * p.M; rows > 0) {
    x4 = torch::stable::new_empty(like, {rows * 128}, ScalarType::Char);
    p.x4 = x4.mutable_data_ptr<int8_t>();
    widen_int4(p.codes4, rows, const_cast<int8_t*>(p.x4));
  }
  if (p.panel.G < 128) {
    sums = torch::stable::new_empty(like, {p.panel.Kp / p.panel.G * p.M}, ScalarType::Int);
    sum_groups(p, sums.mutable_data_ptr<int32_t>());
    p.sums = sums.const_data_ptr<int32_t>();
  }
  const Problem problem{p.M / p.groups.count, p.columns, p.panel.Kp,
                        int(torch::stable::get_num_threads())};
  const Plan chosen = plan(problem, env().best_isa);
  if (env().log_plan) log_plan(to_string(problem, chosen));
  run_cpu(p, chosen);
}

static Tensor w4ax_gemm(const Tensor& codes8, const Tensor& codes4, const Tensor& sums,
                        const Tensor& scales, const Tensor& w, const std::string& scheme, int64_t N,
                        const std::string& granularity, const std::optional<Tensor>& bias,
                        ScalarType dtype) {
  Params p =
      check("w4ax_gemm", codes8, codes4, sums, scales, w, scheme, N, granularity, bias, dtype);
  Tensor out = torch::stable::new_empty(codes8, {p.M, N}, dtype);
  run("w4ax_gemm", p, codes8, out);
  return out;
}

static void w4ax_gemm_out(const Tensor& codes8, const Tensor& codes4, const Tensor& sums,
                          const Tensor& scales, const Tensor& w, const std::string& scheme,
                          int64_t N, const std::string& granularity,
                          const std::optional<Tensor>& bias, const Tensor& out) {
  Params p = check("w4ax_gemm_out", codes8, codes4, sums, scales, w, scheme, N, granularity, bias,
                   out.scalar_type());
  check_tensor(Arg{"w4ax_gemm_out", "out"}, out, out.scalar_type(), {p.M, N}, w);
  run("w4ax_gemm_out", p, codes8, out);
}

// For measuring: two-level weights as they are packed, or widened, in the same tiles (README.md).
static Tensor w4ax_gemm_probe(const Tensor& codes8, const Tensor& codes4, const Tensor& sums,
                              const Tensor& scales, const Tensor& w, int64_t N, bool wide) {
  const char* op = "_w4ax_gemm_probe";
  if (!w.is_cuda()) refuse(Arg{op, "w"}, "a tensor on cuda", describe(w));
  const ScalarType dtype = ScalarType::BFloat16;
  Params p =
      check(op, codes8, codes4, sums, scales, w, "twolevel", N, "token", std::nullopt, dtype, wide);
  Tensor out = torch::stable::new_empty(codes8, {p.M, N}, dtype);
  p.out = out.mutable_data_ptr();
  if (p.M == 0) return out;
  TSL_IF_CUDA(on_gpu(op, out, [&](void* stream) { return run_probe(p, wide, stream); });)
  return out;
}

// The codes of x in one buffer, whose parts start at multiples of 128 bytes: what ActBlocks hold,
// made and used within one call.
static Tensor quantise(const char* op, act_quant::Params& q, const Tensor& x) {
  const int64_t B = q.Kp / 128, B8 = q.K8 / 128;
  const int64_t rows = scale_rows(q.granularity, B);
  const int64_t ints = round_up(B * q.M, 32) * 4, at4 = B8 * q.M * 128;
  const int64_t at_sums = at4 + round_up((B - B8) * q.M * 64, 128), at_scales = at_sums + ints;
  Tensor buffer = torch::stable::new_empty(x, {at_scales + rows * q.M * 4}, ScalarType::Byte);
  auto* base = buffer.mutable_data_ptr<uint8_t>();
  q.codes8 = reinterpret_cast<int8_t*>(base);
  q.codes4 = base + at4;
  q.sums = reinterpret_cast<int32_t*>(base + at_sums);
  q.scales = reinterpret_cast<float*>(base + at_scales);
  act_quant::launch(op, q, x);
  return buffer;
}

// Quantises x as q says, and multiplies the codes as p says.
static Tensor linear(const char* op, act_quant::Params& q, Params& p, const Tensor& x,
                     const Tensor& out) {
  if (p.M == 0) return out;
  const Tensor buffer = quantise(op, q, x);
  p.x8 = q.codes8;
  p.codes4 = q.codes4;
  p.sums = q.sums;
  p.scales = q.scales;
  run(op, p, buffer, out);
  return out;
}

static Params params_of(const act_quant::Params& q) {
  Params p{};
  p.M = q.M;
  p.K8 = q.K8;
  p.dtype = q.dtype;
  p.granularity = q.granularity;
  return p;
}

static Tensor w4ax_linear(const Tensor& x, const Tensor& w, const std::string& scheme, int64_t N,
                          int64_t k8, const std::string& granularity,
                          const std::optional<Tensor>& perm, const std::optional<Tensor>& bias) {
  const char* op = "w4ax_linear";
  act_quant::Params q = act_quant::check(op, x, k8, granularity, perm);
  Params p = params_of(q);
  check_weight(op, p, w, scheme, N, q.Kp, bias, x.scalar_type(), x);
  return linear(op, q, p, x, torch::stable::new_empty(x, {p.M, N}, x.scalar_type()));
}

static Tensor w4ax_grouped(const Tensor& x, const Tensor& w, const std::string& scheme, int64_t N,
                           int64_t features, int64_t first, int64_t stride, int64_t k8,
                           const std::string& granularity, const std::optional<Tensor>& perm) {
  const char* op = "w4ax_grouped";
  act_quant::Params q = act_quant::check(op, x, k8, granularity, perm, true);
  Params p = params_of(q);
  check_weight(op, p, w, scheme, N, q.Kp, std::nullopt, x.scalar_type(), x);
  const int64_t T = x.size(0), G = x.size(1);
  check_groups(op, p, G, features, first, stride);
  return linear(op, q, p, x, torch::stable::new_empty(x, {T, G, features}, x.scalar_type()));
}

// Two-level bytes q * s1 + a must not pass 255; only a malformed weight can.
static void check_two_level(const layout::W4Panel& panel, const Canonical& c) {
  const auto* s1 = static_cast<const uint8_t*>(c.group_scales);
  for (int64_t n = 0; n < panel.N; ++n)
    for (int64_t g = 0; g < panel.Kp / 128; ++g) {
      const int64_t i = n * (panel.Kp / 128) + g;
      if (15 * s1[i] + c.zeros[i] <= 255) continue;
      int most = 0;
      for (int64_t k = 0; k < 64; ++k) {
        const uint8_t byte = c.codes[n * panel.Kp / 2 + g * 64 + k];
        most = std::max({most, byte & 15, byte >> 4});
      }
      if (most * s1[i] + c.zeros[i] > 255)
        refuse(Arg{"w4_pack", "group_scales"},
               "q * s1 + a <= 255 (row " + std::to_string(n) + ", group " + std::to_string(g) + ")",
               int64_t{most} * s1[i] + c.zeros[i]);
    }
}

static Tensor w4_pack(const Tensor& codes, const std::optional<Tensor>& channel_scales,
                      const std::optional<Tensor>& group_scales, const Tensor& zeros,
                      const std::string& scheme, int64_t K) {
  const char* op = "w4_pack";
  if (codes.dim() != 2) refuse(Arg{op, "codes"}, "[N, Kp/2]", describe(codes));
  const int64_t N = codes.size(0), Kp = round_up(K, 128);
  const layout::W4Panel panel = check_scheme(op, scheme, N, Kp);
  check_tensor(Arg{op, "codes"}, codes, ScalarType::Byte, {N, Kp / 2}, codes);
  Canonical c{codes.mutable_data_ptr<uint8_t>(), nullptr, nullptr, nullptr};
  const bool two = panel.scheme == Scheme::kTwoLevel, channel = panel.scheme == Scheme::kChannel;
  if (channel)
    check_tensor(Arg{op, "zeros"}, zeros, ScalarType::Byte, {N}, codes);
  else
    check_tensor(Arg{op, "zeros"}, zeros, ScalarType::Byte, {N, Kp / panel.G}, codes);
  c.zeros = zeros.mutable_data_ptr<uint8_t>();
  if (two || channel) {
    if (!channel_scales) refuse(Arg{op, "channel_scales"}, "a tensor for this scheme", "None");
    check_tensor(Arg{op, "channel_scales"}, *channel_scales, ScalarType::Float, {N}, codes);
    c.channel_scales = channel_scales->mutable_data_ptr<float>();
  }
  if (!channel) {
    if (!group_scales) refuse(Arg{op, "group_scales"}, "a tensor for this scheme", "None");
    check_tensor(Arg{op, "group_scales"}, *group_scales, two ? ScalarType::Byte : ScalarType::Half,
                 {N, Kp / panel.G}, codes);
    c.group_scales = group_scales->mutable_data_ptr();
  }
  if (two && !codes.is_cuda()) check_two_level(panel, c);  // on CUDA it would synchronise
  Tensor out = torch::stable::new_empty(codes, {panel.bytes()}, ScalarType::Byte);
  auto* to = out.mutable_data_ptr<uint8_t>();
  if (codes.is_cuda()) {
    TSL_IF_CUDA(on_gpu(op, out, [&](void* stream) { return pack_cuda(c, panel, to, stream); });)
  } else {
    advise_huge_pages(to, size_t(panel.bytes()));
    pack_panels(c, panel, to);
  }
  return out;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> w4_unpack(const Tensor& w,
                                                            const std::string& scheme, int64_t N,
                                                            int64_t K) {
  const int64_t Kp = round_up(K, 128);
  const layout::W4Panel panel = check_scheme("w4_unpack", scheme, N, Kp);
  check_tensor(Arg{"w4_unpack", "w"}, w, ScalarType::Byte, {panel.bytes()}, w);
  const bool two = panel.scheme == Scheme::kTwoLevel, channel = panel.scheme == Scheme::kChannel;
  auto make = [&](torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType dtype) {
    return torch::stable::new_empty(w, shape, dtype);
  };
  // a field that the scheme does not have is an empty tensor
  Tensor codes = make({N, Kp / 2}, ScalarType::Byte);
  Tensor channel_scales =
      channel || two ? make({N}, ScalarType::Float) : make({0}, ScalarType::Float);
  Tensor group_scales = channel
                            ? make({0}, ScalarType::Half)
                            : make({N, Kp / panel.G}, two ? ScalarType::Byte : ScalarType::Half);
  Tensor zeros = channel ? make({N}, ScalarType::Byte) : make({N, Kp / panel.G}, ScalarType::Byte);
  const Canonical c{codes.mutable_data_ptr<uint8_t>(), channel_scales.mutable_data_ptr<float>(),
                    group_scales.mutable_data_ptr(), zeros.mutable_data_ptr<uint8_t>()};
  const auto* from = w.const_data_ptr<uint8_t>();
  if (w.is_cuda()) {
    TSL_IF_CUDA(on_gpu("w4_unpack", w, [&](void* s) { return unpack_cuda(from, panel, c, s); });)
  } else {
    unpack_panels(from, panel, c);
  }
  return {codes, channel_scales, group_scales, zeros};
}

STABLE_TORCH_LIBRARY_IMPL(tessella, CPU, m) {
  m.impl("w4ax_gemm", TORCH_BOX(&w4ax_gemm));
  m.impl("w4ax_gemm_out", TORCH_BOX(&w4ax_gemm_out));
  m.impl("_w4ax_gemm_probe", TORCH_BOX(&w4ax_gemm_probe));  // says that it is for CUDA
  m.impl("w4ax_linear", TORCH_BOX(&w4ax_linear));
  m.impl("w4ax_grouped", TORCH_BOX(&w4ax_grouped));  // on CUDA the reference: one product a group
  m.impl("w4_pack", TORCH_BOX(&w4_pack));
  m.impl("w4_unpack", TORCH_BOX(&w4_unpack));
}
TSL_IF_CUDA(STABLE_TORCH_LIBRARY_IMPL(tessella, CUDA, m) {
  m.impl("w4ax_gemm", TORCH_BOX(&w4ax_gemm));
  m.impl("w4ax_gemm_out", TORCH_BOX(&w4ax_gemm_out));
  m.impl("_w4ax_gemm_probe", TORCH_BOX(&w4ax_gemm_probe));
  m.impl("w4ax_linear", TORCH_BOX(&w4ax_linear));
  m.impl("w4_pack", TORCH_BOX(&w4_pack));
  m.impl("w4_unpack", TORCH_BOX(&w4_unpack));
})

}  // namespace tessella::w4ax_gemm
