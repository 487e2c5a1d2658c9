// Torch entry of the twin: the Ascend kernels on CPU tensors, under names of their own, so that
// nothing runs on an emulator unasked. Everything but the launch is what a 910B would run.
#include <tuple>

#include "check.h"
#include "pack.h"

namespace tessella::ascend {

static Tensor make(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                   ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

static void raise(const char* op, const std::string& finding) {
  if (!finding.empty())
    throw std::runtime_error(std::string("ascend twin: ") + op + ": " + finding);
}

static Tensor w4ax_gemm_twin(const Tensor& codes8, const Tensor& codes4, const Tensor& sums,
                             const Tensor& scales, const Tensor& w, const std::string& scheme,
                             int64_t N, const std::string& granularity,
                             const std::optional<Tensor>& bias, ScalarType dtype, int64_t cores,
                             const std::string& mode, int64_t seed) {
  const char* op = "w4ax_gemm";
  const w4ax_gemm::Params p =
      w4ax_gemm::check(op, codes8, codes4, sums, scales, w, scheme, N, granularity, bias, dtype);
  GemmCall call{};
  call.problem = gemm_problem(op, p, scheme, cores, mode);
  Tensor out = make(codes8, {p.M, N}, dtype);
  if (p.M == 0) return out;
  call.codes8 = p.x8;
  call.codes4 = codes4.const_data_ptr<uint8_t>();
  call.sums = p.sums;
  call.scales = p.scales;
  call.w = p.w;
  call.bias = p.bias;
  call.out = out.mutable_data_ptr();
  raise(op, twin_gemm(call, TwinOptions{seed, false}, nullptr));
  return out;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> act_quant_twin(const Tensor& x, int64_t k8,
                                                                 const std::string& granularity,
                                                                 const std::optional<Tensor>& perm,
                                                                 int64_t cores, int64_t seed) {
  const char* op = "act_quant";
  const Granularity g = check_granularity(op, granularity);
  if (x.dim() != 2 || x.size(1) == 0) refuse(Arg{op, "x"}, "[M, K] with K >= 1", describe(x));
  QuantCall call{};
  QuantProblem& p = call.problem;
  p.dtype = check_dtype(Arg{op, "x"}, check_float(Arg{op, "x"}, x.scalar_type()));
  p.M = x.size(0);
  p.K = x.size(1);
  const int64_t Kp = round_up(p.K, 128), B = Kp / 128;
  p.K8 = k8 < 0 ? Kp : k8;
  if (p.K8 > Kp || p.K8 % 128 != 0)
    refuse(Arg{op, "k8"}, "a multiple of 128 in 0.." + std::to_string(Kp) + ", or -1 for all", k8);
  check_one_precision(op, g, p.K8, Kp);
  if (p.K > 1 && x.stride(1) != 1)
    refuse(Arg{op, "x"}, "unit stride along K", "stride " + std::to_string(x.stride(1)));
  p.per_block = g == Granularity::kBlock;
  p.scale_rows = scale_rows(g, B);
  p.stride = p.M > 1 ? x.stride(0) : p.K;
  p.cores = int32_t(cores);
  if (perm.has_value()) {
    check_tensor(Arg{op, "perm"}, *perm, ScalarType::Int, {p.K}, x);
    check_perm_k(op, p.K);
    p.has_perm = true;
    call.perm = perm->const_data_ptr<int32_t>();
  }
  const int64_t B8 = p.K8 / 128;
  Tensor codes8 = make(x, {B8, p.M, 128}, ScalarType::Char);
  Tensor codes4 = make(x, {B - B8, p.M, 64}, ScalarType::Byte);
  Tensor sums = make(x, {B, p.M}, ScalarType::Int);
  Tensor scales = g == Granularity::kToken ? make(x, {p.M}, ScalarType::Float)
                                           : make(x, {p.scale_rows, p.M}, ScalarType::Float);
  if (p.M > 0) {
    call.x = x.const_data_ptr();
    call.codes8 = codes8.mutable_data_ptr();
    call.codes4 = codes4.mutable_data_ptr();
    call.sums = sums.mutable_data_ptr();
    call.scales = scales.mutable_data_ptr();
    raise(op, twin_quant(call, TwinOptions{seed, false}, nullptr));
  }
  return {codes8, codes4, sums, scales};
}

static w4ax_gemm::Canonical fields(const Tensor& codes, const Tensor& channel_scales,
                                   const Tensor& group_scales, const Tensor& zeros) {
  return {codes.mutable_data_ptr<uint8_t>(), static_cast<float*>(channel_scales.mutable_data_ptr()),
          group_scales.mutable_data_ptr(), zeros.mutable_data_ptr<uint8_t>()};
}

// Tensors are those that w4_unpack returns: of the scheme, or empty.
static Tensor w4_pack_cube(const Tensor& codes, const Tensor& channel_scales,
                           const Tensor& group_scales, const Tensor& zeros,
                           const std::string& scheme) {
  const char* op = "w4_pack";
  const int64_t N = codes.size(0), Kp = codes.size(1) * 2;
  const layout::W4Panel panel = w4ax_gemm::check_scheme(op, scheme, N, Kp);
  check_scheme(op, panel, scheme);
  check_tensor(Arg{op, "codes"}, codes, ScalarType::Byte, {N, Kp / 2}, codes);
  Tensor out = make(codes, {panel.bytes()}, ScalarType::Byte);
  pack_cube(fields(codes, channel_scales, group_scales, zeros), panel,
            out.mutable_data_ptr<uint8_t>());
  return out;
}

static void w4_unpack_cube(const Tensor& w, const Tensor& codes, const Tensor& channel_scales,
                           const Tensor& group_scales, const Tensor& zeros,
                           const std::string& scheme) {
  const int64_t N = codes.size(0), Kp = codes.size(1) * 2;
  const layout::W4Panel panel = w4ax_gemm::check_scheme("w4_unpack", scheme, N, Kp);
  check_tensor(Arg{"w4_unpack", "w"}, w, ScalarType::Byte, {panel.bytes()}, codes);
  unpack_cube(w.const_data_ptr<uint8_t>(), panel,
              fields(codes, channel_scales, group_scales, zeros));
}

static GemmProblem problem_of(int64_t M, int64_t N, int64_t K, const std::string& scheme, bool int8,
                              bool per_block, int64_t cores, const std::string& mode) {
  const int64_t Kp = round_up(K, 128);
  const layout::W4Panel panel = w4ax_gemm::check_scheme("plan", scheme, N, Kp);
  return {M,         N,
          Kp,        check_scheme("plan", panel, scheme),
          kBF16,     int8,
          per_block, 0,
          false,     int32_t(cores),
          mode};
}

template <class T>
static Tensor to_tensor(const Tensor& like, const std::vector<T>& v, ScalarType dtype) {
  Tensor t = make(like, {int64_t(v.size())}, dtype);
  std::memcpy(t.mutable_data_ptr(), v.data(), v.size() * sizeof(T));
  return t;
}

// The plan as the kernel reads it (`like` gives the device).
static Tensor gemm_plan(const Tensor& like, int64_t M, int64_t N, int64_t K,
                        const std::string& scheme, bool int8, bool per_block, int64_t cores,
                        const std::string& mode) {
  return to_tensor(like, plan_gemm(problem_of(M, N, K, scheme, int8, per_block, cores, mode)),
                   ScalarType::Int);
}

// What every core does, by counting its instructions: int64 per core, core by core.
static Tensor gemm_counts(const Tensor& like, int64_t M, int64_t N, int64_t K,
                          const std::string& scheme, bool int8, bool per_block, int64_t cores,
                          const std::string& mode) {
  GemmCall call{};
  call.problem = problem_of(M, N, K, scheme, int8, per_block, cores, mode);
  std::vector<int64_t> counts;
  raise("gemm_counts", twin_gemm(call, TwinOptions{-1, true}, &counts));
  return to_tensor(like, counts, ScalarType::Long);
}

STABLE_TORCH_LIBRARY(tessella_ascend, m) {
  m.def(
      "w4ax_gemm(Tensor codes8, Tensor codes4, Tensor sums, Tensor scales, Tensor w, str scheme,"
      " int N, str granularity, Tensor? bias, ScalarType dtype, int cores, str mode, int seed)"
      " -> Tensor");
  m.def(
      "act_quant(Tensor x, int k8, str granularity, Tensor? perm, int cores, int seed)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "w4_pack(Tensor codes, Tensor channel_scales, Tensor group_scales, Tensor zeros,"
      " str scheme) -> Tensor");
  m.def(
      "w4_unpack(Tensor w, Tensor(a!) codes, Tensor(b!) channel_scales, Tensor(c!) group_scales,"
      " Tensor(d!) zeros, str scheme) -> ()");
  m.def(
      "gemm_plan(Tensor like, int M, int N, int K, str scheme, bool int8, bool per_block,"
      " int cores, str mode) -> Tensor");
  m.def(
      "gemm_counts(Tensor like, int M, int N, int K, str scheme, bool int8, bool per_block,"
      " int cores, str mode) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tessella_ascend, CPU, m) {
  m.impl("w4ax_gemm", TORCH_BOX(&w4ax_gemm_twin));
  m.impl("act_quant", TORCH_BOX(&act_quant_twin));
  m.impl("w4_pack", TORCH_BOX(&w4_pack_cube));
  m.impl("w4_unpack", TORCH_BOX(&w4_unpack_cube));
  m.impl("gemm_plan", TORCH_BOX(&gemm_plan));
  m.impl("gemm_counts", TORCH_BOX(&gemm_counts));
}

}  // namespace tessella::ascend
