// Torch entries of mla_decode and mla_append.
#include <tuple>

#include "core/env.h"
#include "mla/check.h"

namespace tessella::mla {

using msm::BatchArgs;

static void run(const char* op, const Tensor& q, const BatchArgs& a, Params& p) {
  if (p.T == 0) return;
  std::vector<int32_t> own;
  msm::choose_plan(op, a, p, own);
  if (env().log_plan) log_plan(to_string(p.plan));
  const Tensor partials = msm::make_partials(q, p);
  run_cpu(p);
}

static std::tuple<Tensor, Tensor> mla_decode(
    const Tensor& q, const Tensor& q_rope, const Tensor& pages, const std::string& codec, int64_t Z,
    const Tensor& block_table, const Tensor& cu_q, const Tensor& kv_len, const OptTensor& mask,
    const OptTensor& tree_bits, const OptTensor& tree_row, double scale, int64_t window,
    double softcap, const OptTensor& sinks, const OptTensor& plan, int64_t max_kv_len, bool lse) {
  const BatchArgs a{block_table, cu_q,   kv_len,  mask,  tree_bits, tree_row,
                    scale,       window, softcap, sinks, plan,      max_kv_len};
  Params p = check("mla_decode", q, q_rope, pages, codec, Z, a);
  Tensor out = torch::stable::new_empty(q, {p.T, p.H, p.D}, q.scalar_type());
  Tensor sums = torch::stable::new_empty(q, {lse ? p.T : 0, p.H}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = lse ? sums.mutable_data_ptr<float>() : nullptr;
  run("mla_decode", q, a, p);
  return {out, sums};
}

static void mla_decode_out(const Tensor& q, const Tensor& q_rope, const Tensor& pages,
                           const std::string& codec, int64_t Z, const Tensor& block_table,
                           const Tensor& cu_q, const Tensor& kv_len, const OptTensor& mask,
                           const OptTensor& tree_bits, const OptTensor& tree_row, double scale,
                           int64_t window, double softcap, const OptTensor& sinks,
                           const OptTensor& plan, int64_t max_kv_len, const Tensor& out,
                           const OptTensor& lse) {
  const BatchArgs a{block_table, cu_q,   kv_len,  mask,  tree_bits, tree_row,
                    scale,       window, softcap, sinks, plan,      max_kv_len};
  Params p = check("mla_decode_out", q, q_rope, pages, codec, Z, a);
  msm::check_out("mla_decode_out", q, out, lse, p);
  run("mla_decode_out", q, a, p);
}

static void mla_append(const Tensor& latent, const Tensor& rope, const Tensor& slots,
                       const OptTensor& cos, const OptTensor& sin, const std::string& codec,
                       int64_t Z, const Tensor& pages) {
  append_cpu(
      check_append("mla_append", latent, rope, slots, cos, sin, codec, Z, pages, env().debug));
}

STABLE_TORCH_LIBRARY_IMPL(tessella, CPU, m) {
  m.impl("mla_decode", TORCH_BOX(&mla_decode));
  m.impl("mla_decode_out", TORCH_BOX(&mla_decode_out));
  m.impl("mla_append", TORCH_BOX(&mla_append));
}

}  // namespace tessella::mla
