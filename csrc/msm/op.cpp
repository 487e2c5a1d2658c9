// Torch entries of msm_plan, msm_attn and msm_append.
#include <cstring>
#include <tuple>

#include "core/env.h"
#include "msm/check.h"

namespace tessella::msm {

static Tensor msm_plan(const Tensor& cu_q, const Tensor& kv_len, const OptTensor& mask, int64_t H,
                       int64_t J, int64_t window, int64_t units, int64_t split) {
  const char* op = "msm_plan";
  if (kv_len.dim() != 1) refuse(Arg{op, "kv_len"}, "int32 [B]", describe(kv_len));
  Problem p{};
  p.B = kv_len.size(0);
  p.cu_q = check_ints(Arg{op, "cu_q"}, cu_q, p.B + 1, kv_len);
  p.kv_len = check_ints(Arg{op, "kv_len"}, kv_len, p.B, kv_len);
  if (mask) p.mask = check_ints(Arg{op, "mask"}, *mask, p.B, kv_len);
  if (J < 1 || H < 1 || H % J != 0) refuse(Arg{op, "H"}, "a multiple of J", H);
  if (split < 0 || split % kSplitUnit != 0) refuse(Arg{op, "split"}, "a multiple of 256", split);
  if (p.cu_q[0] != 0) refuse(Arg{op, "cu_q"}, "0 as the first offset", p.cu_q[0]);
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t q_len = p.cu_q[b + 1] - p.cu_q[b];
    const int32_t kind = p.mask ? p.mask[b] : int32_t(Mask::kCausal);
    if (q_len < 0) refuse(Arg{op, "cu_q"}, "non-decreasing offsets", q_len);
    if (kind < 0 || kind > int32_t(Mask::kTree))
      refuse(Arg{op, "mask"}, "0 full, 1 causal, 2 window or 3 tree" + of_request(b), kind);
    if (Mask(kind) == Mask::kWindow && window < 1)
      refuse(Arg{op, "window"}, "at least 1 for the mask" + of_request(b), window);
    if (p.kv_len[b] < 0 || (Mask(kind) != Mask::kFull && p.kv_len[b] < q_len))
      refuse(Arg{op, "kv_len"},
             "at least the " + std::to_string(q_len) + " query tokens" + of_request(b),
             p.kv_len[b]);
  }
  p.H = int(H);
  p.J = int(J);
  p.window = window;
  p.units = units > 0 ? int(units) : int(torch::stable::get_num_threads());
  p.split = split;
  const std::vector<int32_t> words = plan(p);
  Tensor out = torch::stable::new_empty(kv_len, {int64_t(words.size())}, ScalarType::Int);
  std::memcpy(out.mutable_data_ptr<int32_t>(), words.data(), words.size() * sizeof(int32_t));
  return out;
}

static Params check(const char* op, const Tensor& q, const Tensor& pages, const BatchArgs& a) {
  Params p{};
  if (pages.dim() != 5) refuse(Arg{op, "pages"}, "[P, J, 2, Z, D]", describe(pages));
  p.P = pages.size(0);
  p.J = pages.size(1);
  p.Z = pages.size(3);
  p.D = pages.size(4);
  p.page_dtype = check_cached(Arg{op, "pages"}, pages.scalar_type());
  check_tensor(Arg{op, "pages"}, pages, pages.scalar_type(), {p.P, p.J, 2, p.Z, p.D}, q);
  p.pages = pages.const_data_ptr();
  check_batch(op, q, a, p);
  if (q.is_cuda() && p.page_dtype != p.dtype && p.page_dtype != DType::kE4M3)
    refuse(Arg{op, "pages"}, "pages of q's dtype or float8_e4m3fn on cuda",
           dtype_text(pages.scalar_type()));
  return p;
}

static void run(const char* op, const Tensor& q, const BatchArgs& a, Params& p) {
  if (p.T == 0) return;
  if (q.is_cuda()) {
    TSL_IF_CUDA(choose_plan_on_gpu(op, a, p, gpu_sms());
                const Tensor partials = make_partials(q, p);
                on_gpu(op, q, [&](void* stream) { return run_cuda(p, stream); });)
    return;
  }
  std::vector<int32_t> own;
  choose_plan(op, a, p, own);
  if (env().log_plan) log_plan(to_string(p.plan));
  const Tensor partials = make_partials(q, p);
  run_cpu(p);
}

static std::tuple<Tensor, Tensor> msm_attn(const Tensor& q, const Tensor& pages,
                                           const Tensor& block_table, const Tensor& cu_q,
                                           const Tensor& kv_len, const OptTensor& mask,
                                           const OptTensor& tree_bits, const OptTensor& tree_row,
                                           double scale, int64_t window, double softcap,
                                           const OptTensor& sinks, const OptTensor& plan,
                                           int64_t max_kv_len, bool lse) {
  const BatchArgs a{block_table, cu_q,   kv_len,  mask,  tree_bits, tree_row,
                    scale,       window, softcap, sinks, plan,      max_kv_len};
  Params p = check("msm_attn", q, pages, a);
  Tensor out = torch::stable::new_empty(q, {p.T, p.H, p.D}, q.scalar_type());
  Tensor sums = torch::stable::new_empty(q, {lse ? p.T : 0, p.H}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = lse ? sums.mutable_data_ptr<float>() : nullptr;
  run("msm_attn", q, a, p);
  return {out, sums};
}

static void msm_attn_out(const Tensor& q, const Tensor& pages, const Tensor& block_table,
                         const Tensor& cu_q, const Tensor& kv_len, const OptTensor& mask,
                         const OptTensor& tree_bits, const OptTensor& tree_row, double scale,
                         int64_t window, double softcap, const OptTensor& sinks,
                         const OptTensor& plan, int64_t max_kv_len, const Tensor& out,
                         const OptTensor& lse) {
  const BatchArgs a{block_table, cu_q,   kv_len,  mask,  tree_bits, tree_row,
                    scale,       window, softcap, sinks, plan,      max_kv_len};
  Params p = check("msm_attn_out", q, pages, a);
  check_out("msm_attn_out", q, out, lse, p);
  run("msm_attn_out", q, a, p);
}

static void msm_append(const Tensor& k, const Tensor& v, const Tensor& slots, const OptTensor& cos,
                       const OptTensor& sin, const Tensor& pages) {
  const char* op = "msm_append";
  AppendParams p{};
  if (pages.dim() != 5) refuse(Arg{op, "pages"}, "[P, J, 2, Z, D]", describe(pages));
  p.P = pages.size(0);
  p.J = pages.size(1);
  p.Z = pages.size(3);
  p.D = pages.size(4);
  if (p.D > 256) refuse(Arg{op, "pages"}, "a head dim of at most 256", p.D);
  const DType dtype = check_cached(Arg{op, "pages"}, pages.scalar_type());
  check_tensor(Arg{op, "pages"}, pages, pages.scalar_type(), {p.P, p.J, 2, p.Z, p.D}, k);
  check_append(op, k, v, slots, cos, sin, env().debug, p);
  if (k.is_cuda()) {
    TSL_IF_CUDA(on_gpu(op, k, [&](void* stream) {
                  return append_cuda(p, pages.mutable_data_ptr(), dtype, stream);
                });)
    return;
  }
  append_cpu(p, pages.mutable_data_ptr(), dtype);
}

STABLE_TORCH_LIBRARY_IMPL(tessella, CPU, m) {
  m.impl("msm_plan", TORCH_BOX(&msm_plan));
  m.impl("msm_attn", TORCH_BOX(&msm_attn));
  m.impl("msm_attn_out", TORCH_BOX(&msm_attn_out));
  m.impl("msm_append", TORCH_BOX(&msm_append));
}
TSL_IF_CUDA(STABLE_TORCH_LIBRARY_IMPL(tessella, CUDA, m) {
  m.impl("msm_attn", TORCH_BOX(&msm_attn));
  m.impl("msm_attn_out", TORCH_BOX(&msm_attn_out));
  m.impl("msm_append", TORCH_BOX(&msm_append));
})

}  // namespace tessella::msm
