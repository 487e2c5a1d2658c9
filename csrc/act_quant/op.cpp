// Torch entries of act_quant and its fused producers, and their out variants: check -> params ->
// run.
#include <tuple>

#include "act_quant/check.h"

namespace tessella::act_quant {

using Blocks = std::tuple<Tensor, Tensor, Tensor, Tensor>;

static void run(const char* op, Params& p, const Tensor& x, const Blocks& out) {
  const auto& [codes8, codes4, sums, scales] = out;
  p.codes8 = codes8.mutable_data_ptr<int8_t>();
  p.codes4 = codes4.mutable_data_ptr<uint8_t>();
  p.sums = sums.mutable_data_ptr<int32_t>();
  p.scales = scales.mutable_data_ptr<float>();
  launch(op, p, x);
}

static Tensor make(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                   ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

static Blocks make_blocks(const Params& p, const Tensor& x) {
  const int64_t B = p.Kp / kBlock, B8 = p.K8 / kBlock, rows = scale_rows(p.granularity, B);
  return {make(x, {B8, p.M, kBlock}, ScalarType::Char),
          make(x, {B - B8, p.M, kBlock / 2}, ScalarType::Byte), make(x, {B, p.M}, ScalarType::Int),
          p.granularity == Granularity::kToken ? make(x, {p.M}, ScalarType::Float)
                                               : make(x, {rows, p.M}, ScalarType::Float)};
}

static Blocks act_quant(const Tensor& x, int64_t k8, const std::string& granularity,
                        const std::optional<Tensor>& perm) {
  Params p = check("act_quant", x, k8, granularity, perm);
  Blocks out = make_blocks(p, x);
  run("act_quant", p, x, out);
  return out;
}

// A second operand [M, K] like x, rows at any stride.
static void check_other(const Arg& arg, const Tensor& other, const Tensor& x, Params& p) {
  const bool fits = other.dim() == 2 && other.size(0) == p.M && other.size(1) == p.K &&
                    other.scalar_type() == x.scalar_type() && (p.K == 1 || other.stride(1) == 1) &&
                    other.device() == x.device();
  if (!fits) refuse(arg, "a tensor like x, " + describe(x), describe(other));
  p.other = other.const_data_ptr();
  p.other_stride = other.stride(0);
}

// Blocks of the caller, of exactly the shapes that make_blocks gives.
static void check_blocks(const char* op, const Params& p, const Tensor& x, const Blocks& out) {
  const auto& [codes8, codes4, sums, scales] = out;
  const int64_t B = p.Kp / kBlock, B8 = p.K8 / kBlock, rows = scale_rows(p.granularity, B);
  check_tensor(Arg{op, "codes8"}, codes8, ScalarType::Char, {B8, p.M, kBlock}, x);
  check_tensor(Arg{op, "codes4"}, codes4, ScalarType::Byte, {B - B8, p.M, kBlock / 2}, x);
  check_tensor(Arg{op, "sums"}, sums, ScalarType::Int, {B, p.M}, x);
  if (p.granularity == Granularity::kToken)
    check_tensor(Arg{op, "scales"}, scales, ScalarType::Float, {p.M}, x);
  else
    check_tensor(Arg{op, "scales"}, scales, ScalarType::Float, {rows, p.M}, x);
}

static void act_quant_out(const Tensor& x, int64_t k8, const std::string& granularity,
                          const std::optional<Tensor>& perm, const Tensor& codes8,
                          const Tensor& codes4, const Tensor& sums, const Tensor& scales) {
  const char* op = "act_quant_out";
  Params p = check(op, x, k8, granularity, perm);
  const Blocks out{codes8, codes4, sums, scales};
  check_blocks(op, p, x, out);
  run(op, p, x, out);
}

// Everything of rms_norm_quant but where its results go.
static Params check_rms_norm(const char* op, const Tensor& x, const Tensor& weight, double eps,
                             const std::optional<Tensor>& residual, int64_t k8,
                             const std::string& granularity, const std::optional<Tensor>& perm) {
  constexpr int64_t kMostK = 1 << 20;  // CUDA: a sum for each block in shared memory
  Params p = check(op, x, k8, granularity, perm);
  check_tensor(Arg{op, "weight"}, weight, x.scalar_type(), {p.K}, x);
  if (x.is_cuda() && p.K > kMostK)
    refuse(Arg{op, "x"}, "at most " + std::to_string(kMostK) + " channels on cuda", p.K);
  p.source = Source::kRmsNorm;
  p.weight = weight.const_data_ptr();
  p.eps = float(eps);
  if (residual.has_value()) check_other(Arg{op, "residual"}, *residual, x, p);
  return p;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rms_norm_quant(
    const Tensor& x, const Tensor& weight, double eps, const std::optional<Tensor>& residual,
    int64_t k8, const std::string& granularity, const std::optional<Tensor>& perm) {
  const char* op = "rms_norm_quant";
  Params p = check_rms_norm(op, x, weight, eps, residual, k8, granularity, perm);
  Tensor y = make(x, {p.M, p.K}, x.scalar_type()), h = make(x, {0}, x.scalar_type());
  p.y = y.mutable_data_ptr();
  if (residual.has_value()) {
    h = make(x, {p.M, p.K}, x.scalar_type());
    p.h = h.mutable_data_ptr();
  }
  Blocks out = make_blocks(p, x);
  run(op, p, x, out);
  const auto& [codes8, codes4, sums, scales] = out;
  return {codes8, codes4, sums, scales, y, h};
}

static void rms_norm_quant_out(const Tensor& x, const Tensor& weight, double eps,
                               const std::optional<Tensor>& residual, int64_t k8,
                               const std::string& granularity, const std::optional<Tensor>& perm,
                               const Tensor& codes8, const Tensor& codes4, const Tensor& sums,
                               const Tensor& scales, const std::optional<Tensor>& y,
                               const std::optional<Tensor>& h) {
  const char* op = "rms_norm_quant_out";
  Params p = check_rms_norm(op, x, weight, eps, residual, k8, granularity, perm);
  if (residual.has_value() != h.has_value())
    refuse(Arg{op, "h"},
           residual.has_value() ? "a tensor for x + residual" : "none without residual",
           h.has_value() ? "one" : "none");
  if (h.has_value()) {
    check_tensor(Arg{op, "h"}, *h, x.scalar_type(), {p.M, p.K}, x);
    p.h = h->mutable_data_ptr();
  }
  if (y.has_value()) {
    check_tensor(Arg{op, "y"}, *y, x.scalar_type(), {p.M, p.K}, x);
    p.y = y->mutable_data_ptr();
  }
  const Blocks out{codes8, codes4, sums, scales};
  check_blocks(op, p, x, out);
  run(op, p, x, out);
}

static Params check_silu_mul(const char* op, const Tensor& gate, const Tensor& up, int64_t k8,
                             const std::string& granularity, const std::optional<Tensor>& perm) {
  Params p = check(op, gate, k8, granularity, perm);
  p.source = Source::kSiluMul;
  check_other(Arg{op, "up"}, up, gate, p);
  return p;
}

static Blocks silu_mul_quant(const Tensor& gate, const Tensor& up, int64_t k8,
                             const std::string& granularity, const std::optional<Tensor>& perm) {
  const char* op = "silu_mul_quant";
  Params p = check_silu_mul(op, gate, up, k8, granularity, perm);
  Blocks out = make_blocks(p, gate);
  run(op, p, gate, out);
  return out;
}

static void silu_mul_quant_out(const Tensor& gate, const Tensor& up, int64_t k8,
                               const std::string& granularity, const std::optional<Tensor>& perm,
                               const Tensor& codes8, const Tensor& codes4, const Tensor& sums,
                               const Tensor& scales) {
  const char* op = "silu_mul_quant_out";
  Params p = check_silu_mul(op, gate, up, k8, granularity, perm);
  const Blocks out{codes8, codes4, sums, scales};
  check_blocks(op, p, gate, out);
  run(op, p, gate, out);
}

// Both devices have everything.
template <class Library>
static void implement(Library& m) {
  m.impl("act_quant", TORCH_BOX(&act_quant));
  m.impl("act_quant_out", TORCH_BOX(&act_quant_out));
  m.impl("rms_norm_quant", TORCH_BOX(&rms_norm_quant));
  m.impl("rms_norm_quant_out", TORCH_BOX(&rms_norm_quant_out));
  m.impl("silu_mul_quant", TORCH_BOX(&silu_mul_quant));
  m.impl("silu_mul_quant_out", TORCH_BOX(&silu_mul_quant_out));
}

STABLE_TORCH_LIBRARY_IMPL(tessella, CPU, m) { implement(m); }
TSL_IF_CUDA(STABLE_TORCH_LIBRARY_IMPL(tessella, CUDA, m) { implement(m); })

}  // namespace tessella::act_quant
