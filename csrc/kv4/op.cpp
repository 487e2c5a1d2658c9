// Torch entries of kv4_attn and kv4_append.
#include <tuple>

#include "core/env.h"
#include "kv4/check.h"

namespace tessella::kv4 {

using msm::BatchArgs;

// What is particular to coded pages, as the schema orders it.
struct CodedArgs {
  const OptTensor &k_mean, &q_fold, &o_fold, &rows, &k_tail, &tail_row;
};

static Params check(const char* op, const Tensor& q, const Tensor& pages, const std::string& codec,
                    int64_t Z, const BatchArgs& a, const CodedArgs& c) {
  Params p{};
  if (q.dim() != 3) refuse(Arg{op, "q"}, "[T, H, D] with unit stride along D", describe(q));
  p.Z = Z;
  p.D = q.size(2);
  p.page = check_codec(op, codec, Z, p.D);
  check_pages(op, pages, p.page, q);
  p.P = pages.size(0);
  p.J = pages.size(1);
  p.pages = pages.const_data_ptr<uint8_t>();
  msm::check_batch(op, q, a, p);
  FactorRows rows;
  p.k_mean = check_mean(Arg{op, "k_mean"}, c.k_mean, p.J, p.D, q, rows);
  p.q_fold = check_fold(Arg{op, "q_fold"}, c.q_fold, p.J, p.D, q, rows);
  p.o_fold = check_fold(Arg{op, "o_fold"}, c.o_fold, p.J, p.D, q, rows);
  p.rows = check_factor_rows(op, c.rows, p.B, rows, q);
  check_tail(op, c.k_tail, c.tail_row, p.B, q, p);
  return p;
}

static void run(const char* op, const Tensor& q, const BatchArgs& a, Params& p) {
  if (p.T == 0) return;
  if (q.is_cuda()) {
    TSL_IF_CUDA(msm::choose_plan_on_gpu(op, a, p, msm::gpu_sms());
                const Tensor partials = msm::make_partials(q, p);
                msm::on_gpu(op, q, [&](void* stream) { return run_cuda(p, stream); });)
    return;
  }
  std::vector<int32_t> own;
  msm::choose_plan(op, a, p, own);
  if (env().log_plan) log_plan(to_string(p.plan));
  const Tensor partials = msm::make_partials(q, p);
  run_cpu(p);
}

static std::tuple<Tensor, Tensor> kv4_attn(
    const Tensor& q, const Tensor& pages, const std::string& codec, int64_t Z,
    const Tensor& block_table, const Tensor& cu_q, const Tensor& kv_len, const OptTensor& mask,
    const OptTensor& tree_bits, const OptTensor& tree_row, double scale, int64_t window,
    double softcap, const OptTensor& sinks, const OptTensor& plan, int64_t max_kv_len,
    const OptTensor& k_mean, const OptTensor& q_fold, const OptTensor& o_fold,
    const OptTensor& rows, const OptTensor& k_tail, const OptTensor& tail_row, bool lse) {
  const BatchArgs a{block_table, cu_q,   kv_len,  mask,  tree_bits, tree_row,
                    scale,       window, softcap, sinks, plan,      max_kv_len};
  Params p =
      check("kv4_attn", q, pages, codec, Z, a, {k_mean, q_fold, o_fold, rows, k_tail, tail_row});
  Tensor out = torch::stable::new_empty(q, {p.T, p.H, p.D}, q.scalar_type());
  Tensor sums = torch::stable::new_empty(q, {lse ? p.T : 0, p.H}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = lse ? sums.mutable_data_ptr<float>() : nullptr;
  run("kv4_attn", q, a, p);
  return {out, sums};
}

static void kv4_attn_out(const Tensor& q, const Tensor& pages, const std::string& codec, int64_t Z,
                         const Tensor& block_table, const Tensor& cu_q, const Tensor& kv_len,
                         const OptTensor& mask, const OptTensor& tree_bits,
                         const OptTensor& tree_row, double scale, int64_t window, double softcap,
                         const OptTensor& sinks, const OptTensor& plan, int64_t max_kv_len,
                         const OptTensor& k_mean, const OptTensor& q_fold, const OptTensor& o_fold,
                         const OptTensor& rows, const OptTensor& k_tail, const OptTensor& tail_row,
                         const Tensor& out, const OptTensor& lse) {
  const BatchArgs a{block_table, cu_q,   kv_len,  mask,  tree_bits, tree_row,
                    scale,       window, softcap, sinks, plan,      max_kv_len};
  Params p = check("kv4_attn_out", q, pages, codec, Z, a,
                   {k_mean, q_fold, o_fold, rows, k_tail, tail_row});
  msm::check_out("kv4_attn_out", q, out, lse, p);
  run("kv4_attn_out", q, a, p);
}

static void kv4_append(const Tensor& k, const Tensor& v, const Tensor& slots, const OptTensor& cos,
                       const OptTensor& sin, const std::string& codec, int64_t Z,
                       const OptTensor& k_mean, const OptTensor& k_fold, const OptTensor& v_fold,
                       const OptTensor& rows, const Tensor& pages, const OptTensor& k_tail,
                       const OptTensor& tail_row) {
  const char* op = "kv4_append";
  AppendParams p{};
  if (k.dim() != 3) refuse(Arg{op, "k"}, "[T, J, D] with unit stride along D", describe(k));
  p.Z = Z;
  p.D = k.size(2);
  p.page = check_codec(op, codec, Z, p.D);
  check_pages(op, pages, p.page, k);
  p.P = pages.size(0);
  p.J = pages.size(1);
  p.pages = pages.mutable_data_ptr<uint8_t>();
  msm::check_append(op, k, v, slots, cos, sin, env().debug, p);
  FactorRows count;
  p.k_mean = check_mean(Arg{op, "k_mean"}, k_mean, p.J, p.D, k, count);
  p.k_fold = check_fold(Arg{op, "k_fold"}, k_fold, p.J, p.D, k, count);
  p.v_fold = check_fold(Arg{op, "v_fold"}, v_fold, p.J, p.D, k, count);
  p.rows = check_factor_rows(op, rows, p.T, count, k);
  check_tail(op, k_tail, tail_row, p.T, k, p);
  if (k.is_cuda()) {
    TSL_IF_CUDA(msm::on_gpu(op, k, [&](void* stream) { return append_cuda(p, stream); });)
    return;
  }
  append_cpu(p);
}

STABLE_TORCH_LIBRARY_IMPL(tessella, CPU, m) {
  m.impl("kv4_attn", TORCH_BOX(&kv4_attn));
  m.impl("kv4_attn_out", TORCH_BOX(&kv4_attn_out));
  m.impl("kv4_append", TORCH_BOX(&kv4_append));
}
TSL_IF_CUDA(STABLE_TORCH_LIBRARY_IMPL(tessella, CUDA, m) {
  m.impl("kv4_attn", TORCH_BOX(&kv4_attn));
  m.impl("kv4_attn_out", TORCH_BOX(&kv4_attn_out));
  m.impl("kv4_append", TORCH_BOX(&kv4_append));
})

}  // namespace tessella::kv4
