// Torch entries for NPU tensors (key PrivateUse1), through torch_npu's stream and task queue.
//
// Unlike the CPU and CUDA entries this one is not on the stable ABI: torch_npu offers its stream
// and queue to C++ of the same torch only. It is built where torch_npu is, for that torch.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstring>
#include <optional>
#include <tuple>

#include <torch_npu/csrc/core/npu/NPUStream.h>
#include <torch_npu/csrc/framework/OpCommand.h>
#include "npu.h"
#include "pack.h"

namespace tessella::ascend {

using at::Tensor;

[[noreturn]] static void refuse(const char* op, const char* arg, const std::string& expected,
                                const std::string& got) {
  TORCH_CHECK(false, "tessella::", op, ": ", arg, ": expected ", expected, ", got ", got);
}

static void check_tensor(const char* op, const char* arg, const Tensor& t, at::ScalarType dtype,
                         at::IntArrayRef shape, const Tensor& beside) {
  TORCH_CHECK(t.scalar_type() == dtype && t.sizes() == shape && t.is_contiguous() &&
                  t.device() == beside.device(),
              "tessella::", op, ": ", arg, ": expected contiguous ", dtype, " ", shape, " on ",
              beside.device(), ", got ", t.scalar_type(), " ", t.sizes(), " on ", t.device());
}

static GemmDtype check_dtype(const char* op, const char* arg, at::ScalarType t) {
  if (t == at::kBFloat16) return kBF16;
  if (t == at::kHalf) return kF16;
  refuse(op, arg, "bfloat16 or float16 on ascend", at::toString(t));
}

static layout::W4Panel panel_of(const char* op, const std::string& scheme, int64_t N, int64_t Kp) {
  layout::W4Panel p{Scheme::kGroup, N, Kp, 128};
  if (scheme == "channel")
    p.scheme = Scheme::kChannel;
  else if (scheme == "twolevel")
    p.scheme = Scheme::kTwoLevel;
  else if (scheme != "g128")
    refuse(op, "scheme", "channel, g128 or twolevel on ascend", scheme);
  if (N < 1 || Kp < 128 || Kp > w4ax_gemm::kMostKp)
    refuse(op, "w", "N >= 1 and K in 1..65536", std::to_string(N) + " x " + std::to_string(Kp));
  return p;
}

// The plan on the device. It is copied in stream order from pinned memory, without a wait.
static Tensor to_device(const std::vector<int32_t>& plan, const Tensor& like) {
  Tensor host = at::empty({int64_t(plan.size())}, at::TensorOptions().dtype(at::kInt));
  std::memcpy(host.data_ptr(), plan.data(), plan.size() * 4);
  return host.pin_memory().to(like.device(), /*non_blocking=*/true);
}

static Granularity granularity_of(const char* op, const std::string& name) {
  if (name == "token") return Granularity::kToken;
  if (name == "class") return Granularity::kClass;
  if (name == "block") return Granularity::kBlock;
  refuse(op, "granularity", "one of token, class, block", name);
}

static void gemm_into(const char* op, const Tensor& codes8, const Tensor& codes4,
                      const Tensor& sums, const Tensor& scales, const Tensor& w,
                      const std::string& scheme, int64_t N, const std::string& granularity,
                      const std::optional<Tensor>& bias, const Tensor& out) {
  const int64_t M = codes8.size(1), B8 = codes8.size(0), B = B8 + codes4.size(0), Kp = B * 128;
  const Granularity g = granularity_of(op, granularity);
  const layout::W4Panel panel = panel_of(op, scheme, N, Kp);
  if (B8 != 0 && B8 != B)
    refuse(op, "codes8", "activations of one precision on ascend",
           "K8=" + std::to_string(B8 * 128) + " of " + std::to_string(Kp));
  check_tensor(op, "codes8", codes8, at::kChar, {B8, M, 128}, w);
  check_tensor(op, "codes4", codes4, at::kByte, {B - B8, M, 64}, w);
  check_tensor(op, "sums", sums, at::kInt, {B, M}, w);
  check_tensor(op, "w", w, at::kByte, {panel.bytes()}, w);
  check_tensor(op, "out", out, out.scalar_type(), {M, N}, w);
  const int64_t rows = g == Granularity::kBlock ? B : g == Granularity::kClass ? 2 : 1;
  if (g == Granularity::kToken)
    check_tensor(op, "scales", scales, at::kFloat, {M}, w);
  else
    check_tensor(op, "scales", scales, at::kFloat, {rows, M}, w);
  if (bias) check_tensor(op, "bias", *bias, out.scalar_type(), {N}, w);
  GemmCall call{};
  GemmProblem& p = call.problem;
  p.M = M;
  p.N = N;
  p.Kp = Kp;
  p.scheme = panel.scheme == Scheme::kChannel ? kChannel
             : panel.scheme == Scheme::kGroup ? kGroup
                                              : kTwoLevel;
  p.dtype = check_dtype(op, "dtype", out.scalar_type());
  p.int8 = B8 > 0;
  p.per_block = g == Granularity::kBlock;
  p.scale_row = g == Granularity::kClass && !p.int8 ? 1 : 0;
  p.has_bias = bias.has_value();
  if (M == 0) return;
  p.cores = npu_cores().cube;
  const std::vector<int32_t> plan = plan_gemm(p);
  GemmTiling t;
  std::memcpy(&t, plan.data(), sizeof t);
  const Tensor tiling = to_device(plan, w);
  const Tensor space = at::empty({int64_t(t.workspace) * 512}, w.options());
  call.codes8 = codes8.data_ptr();
  call.codes4 = codes4.data_ptr();
  call.sums = sums.data_ptr();
  call.scales = scales.data_ptr();
  call.w = w.data_ptr();
  call.bias = bias ? bias->data_ptr() : nullptr;
  call.out = out.data_ptr();
  // the tensors are captured, so that their memory lives until the queue has launched the kernel
  const auto stream = c10_npu::getCurrentNPUStream().stream(false);
  at_npu::native::OpCommand::RunOpApi("tessella_w4ax_gemm", [=]() -> int {
    (void)codes8, (void)codes4, (void)sums, (void)scales, (void)w, (void)bias, (void)out;
    npu_gemm(call, t.cores, space.data_ptr(), tiling.data_ptr(), stream);
    return 0;
  });
}

static Tensor gemm(const Tensor& codes8, const Tensor& codes4, const Tensor& sums,
                   const Tensor& scales, const Tensor& w, std::string scheme, int64_t N,
                   std::string granularity, const std::optional<Tensor>& bias,
                   at::ScalarType dtype) {
  check_dtype("w4ax_gemm", "dtype", dtype);
  Tensor out = at::empty({codes8.size(1), N}, w.options().dtype(dtype));
  gemm_into("w4ax_gemm", codes8, codes4, sums, scales, w, scheme, N, granularity, bias, out);
  return out;
}

static void gemm_out(const Tensor& codes8, const Tensor& codes4, const Tensor& sums,
                     const Tensor& scales, const Tensor& w, std::string scheme, int64_t N,
                     std::string granularity, const std::optional<Tensor>& bias, Tensor out) {
  gemm_into("w4ax_gemm_out", codes8, codes4, sums, scales, w, scheme, N, granularity, bias, out);
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> quant(const Tensor& x, int64_t k8,
                                                        std::string granularity,
                                                        const std::optional<Tensor>& perm) {
  const char* op = "act_quant";

  TORCH_CHECK(x.dim() == 2 && x.size(1) > 0 && x.stride(1) == 1,
              "tessella::act_quant: x: expected [M, K] with unit stride along K, got ", x.sizes());
  QuantCall call{};
  QuantProblem& p = call.problem;
  p.dtype = check_dtype(op, "x", x.scalar_type());
  p.M = x.size(0);
  p.K = x.size(1);
  if (perm) {
    check_tensor(op, "perm", *perm, at::kInt, {p.K}, x);
    if (p.K > kQuantMostPermK)
      refuse(op, "perm", "none for more than " + std::to_string(kQuantMostPermK) + " channels",
             "K=" + std::to_string(p.K));
    p.has_perm = true;
    call.perm = perm->data_ptr();
  }
  const int64_t B = (p.K + 127) / 128;
  p.K8 = k8 < 0 ? B * 128 : k8;
  if (p.K8 > B * 128 || p.K8 % 128 != 0)
    refuse(op, "k8", "a multiple of 128 in 0.." + std::to_string(B * 128) + ", or -1 for all",
           std::to_string(k8));
  const Granularity g = granularity_of(op, granularity);
  if (g == Granularity::kToken && p.K8 > 0 && p.K8 < B * 128)
    refuse(op, "granularity", "'class' or 'block' with mixed precision", "'token'");
  p.per_block = g == Granularity::kBlock;
  p.scale_rows = p.per_block ? B : g == Granularity::kClass ? 2 : 1;
  p.stride = p.M > 1 ? x.stride(0) : p.K;
  const int64_t B8 = p.K8 / 128;
  const auto make = [&](at::IntArrayRef shape, at::ScalarType dtype) {
    return at::empty(shape, x.options().dtype(dtype));
  };
  Tensor codes8 = make({B8, p.M, 128}, at::kChar), codes4 = make({B - B8, p.M, 64}, at::kByte);
  Tensor sums = make({B, p.M}, at::kInt);
  Tensor scales =
      g == Granularity::kToken ? make({p.M}, at::kFloat) : make({p.scale_rows, p.M}, at::kFloat);
  if (p.M == 0) return {codes8, codes4, sums, scales};
  p.cores = npu_cores().vector;
  const std::vector<int32_t> plan = plan_quant(p);
  QuantTiling t;
  std::memcpy(&t, plan.data(), sizeof t);
  const Tensor tiling = to_device(plan, x);
  call.x = x.data_ptr();
  call.codes8 = codes8.data_ptr();
  call.codes4 = codes4.data_ptr();
  call.sums = sums.data_ptr();
  call.scales = scales.data_ptr();
  const auto stream = c10_npu::getCurrentNPUStream().stream(false);
  at_npu::native::OpCommand::RunOpApi("tessella_act_quant", [=]() -> int {
    (void)x, (void)perm, (void)codes8, (void)codes4, (void)sums, (void)scales;  // kept alive
    npu_quant(call, t.cores, tiling.data_ptr(), stream);
    return 0;
  });
  return {codes8, codes4, sums, scales};
}

// Packing happens once, when a model is loaded: on the host.
static Tensor pack(const Tensor& codes, const std::optional<Tensor>& channel_scales,
                   const std::optional<Tensor>& group_scales, const Tensor& zeros,
                   std::string scheme, int64_t K) {
  const int64_t N = codes.size(0);
  const layout::W4Panel panel = panel_of("w4_pack", scheme, N, (K + 127) / 128 * 128);
  check_tensor("w4_pack", "codes", codes, at::kByte, {N, panel.Kp / 2}, codes);
  const auto host = [](const std::optional<Tensor>& t) { return t ? t->cpu() : Tensor(); };
  const Tensor q = codes.cpu(), z = zeros.cpu(), s = host(channel_scales), g = host(group_scales);
  const auto data = [](const Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; };
  Tensor out = at::empty({panel.bytes()}, at::TensorOptions().dtype(at::kByte));
  pack_cube({static_cast<uint8_t*>(data(q)), static_cast<float*>(data(s)), data(g),
             static_cast<uint8_t*>(data(z))},
            panel, static_cast<uint8_t*>(out.data_ptr()));
  return out.to(codes.device());
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> unpack(const Tensor& w, std::string scheme,
                                                         int64_t N, int64_t K) {
  const layout::W4Panel panel = panel_of("w4_unpack", scheme, N, (K + 127) / 128 * 128);
  check_tensor("w4_unpack", "w", w, at::kByte, {panel.bytes()}, w);
  const bool channel = scheme == "channel", two = scheme == "twolevel";
  const int64_t G = panel.Kp / 128;
  const auto make = [](at::IntArrayRef shape, at::ScalarType dtype) {
    return at::empty(shape, at::TensorOptions().dtype(dtype));
  };
  Tensor q = make({N, panel.Kp / 2}, at::kByte);
  Tensor s = channel || two ? make({N}, at::kFloat) : make({0}, at::kFloat);
  Tensor g = channel ? make({0}, at::kHalf) : make({N, G}, two ? at::kByte : at::kHalf);
  Tensor z = channel ? make({N}, at::kByte) : make({N, G}, at::kByte);
  const Tensor from = w.cpu();
  unpack_cube(static_cast<const uint8_t*>(from.data_ptr()), panel,
              {static_cast<uint8_t*>(q.data_ptr()), static_cast<float*>(s.data_ptr()), g.data_ptr(),
               static_cast<uint8_t*>(z.data_ptr())});
  const auto device = w.device();
  return {q.to(device), s.to(device), g.to(device), z.to(device)};
}

}  // namespace tessella::ascend

TORCH_LIBRARY_IMPL(tessella, PrivateUse1, m) {
  m.impl("w4ax_gemm", tessella::ascend::gemm);
  m.impl("w4ax_gemm_out", tessella::ascend::gemm_out);
  m.impl("act_quant", tessella::ascend::quant);
  m.impl("w4_pack", tessella::ascend::pack);
  m.impl("w4_unpack", tessella::ascend::unpack);
}
