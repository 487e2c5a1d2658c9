// Torch arguments of attention and of appends -> params; shared by every source and device.
#pragma once
#include <optional>

#include "core/build.h"
#include "core/check.h"
#include "core/env.h"
#include "core/stream.h"
#include "msm/params.h"

namespace tessella::msm {

using OptTensor = std::optional<Tensor>;

// Runs f(stream) for CUDA tensors on the device of `like`.
template <class F>
void on_gpu(const char* op, const Tensor& like, const F& f) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  check_launch(op, f(current_stream(like.get_device_index())));
}

// The arguments that every attention op has, as its schema orders them.
struct BatchArgs {
  const Tensor &block_table, &cu_q, &kv_len;
  const OptTensor &mask, &tree_bits, &tree_row;
  double scale;
  int64_t window;
  double softcap;
  const OptTensor &sinks, &plan;
  int64_t max_kv_len;
};

inline const int32_t* check_ints(const Arg& arg, const Tensor& t, int64_t n, const Tensor& beside) {
  check_tensor(arg, t, ScalarType::Int, {n}, beside);
  return t.const_data_ptr<int32_t>();
}

// Whether `pages` (its page ids, its J kv heads of Z tokens) fit; throws naming what does not.
inline void check_shapes(const char* op, const Tensor& q, Batch& p) {
  if (q.dim() != 3 || q.stride(2) != 1)
    refuse(Arg{op, "q"}, "[T, H, D] with unit stride along D", describe(q));
  p.dtype = check_float(Arg{op, "q"}, q.scalar_type());
  p.q = q.const_data_ptr();
  p.T = q.size(0);
  p.H = q.size(1);
  p.q_token = q.stride(0);
  p.q_head = q.stride(1);
  if (q.size(2) != p.D)
    refuse(Arg{op, "q"}, "head dim " + std::to_string(p.D) + " as the cache has", q.size(2));
  if (p.D % 16 != 0 || p.D < 16 || p.D > 256)
    refuse(Arg{op, "q"}, "a head dim that is a multiple of 16 in 16..256", p.D);
  if (p.Z % 16 != 0 || p.Z < 16 || p.Z > 256)
    refuse(Arg{op, "pages"}, "a multiple of 16 in 16..256 tokens a page", p.Z);
  if (p.J < 1 || p.H < 1 || p.H % p.J != 0)
    refuse(Arg{op, "q"}, "H a multiple of the cache's " + std::to_string(p.J) + " kv heads", p.H);
}

inline void check_tree(const char* op, const BatchArgs& a, const Tensor& q, Batch& p) {
  if (!a.tree_bits && !a.tree_row) return;
  if (!a.tree_bits || a.tree_bits->dim() != 2)
    refuse(Arg{op, "tree_bits"}, "int64 [N, W] together with tree_row",
           a.tree_bits ? describe(*a.tree_bits) : "None");
  if (!a.tree_row) refuse(Arg{op, "tree_row"}, "int32 [B] together with tree_bits", "None");
  check_tensor(Arg{op, "tree_bits"}, *a.tree_bits, ScalarType::Long,
               {a.tree_bits->size(0), a.tree_bits->size(1)}, q);
  p.tree_bits = reinterpret_cast<const uint64_t*>(a.tree_bits->const_data_ptr<int64_t>());
  p.tree_words = a.tree_bits->size(1);
  p.tree_row = check_ints(Arg{op, "tree_row"}, *a.tree_row, p.B, q);
}

inline std::string of_request(int64_t b) { return " of request " + std::to_string(b); }

inline void check_request(const char* op, const BatchArgs& a, const Batch& p, int64_t b) {
  const int64_t q_len = p.cu_q[b + 1] - p.cu_q[b], kv = p.kv_len[b], pages = ceil_div(kv, p.Z);
  if (q_len < 0) refuse(Arg{op, "cu_q"}, "non-decreasing offsets", q_len);
  if (kv < 0 || pages > p.table_stride || (a.max_kv_len > 0 && kv > a.max_kv_len))
    refuse(Arg{op, "kv_len"},
           "0.." + std::to_string(a.max_kv_len > 0 ? a.max_kv_len : p.table_stride * p.Z) +
               of_request(b),
           kv);
  const int32_t kind = p.mask ? p.mask[b] : int32_t(Mask::kCausal);
  if (kind < 0 || kind > int32_t(Mask::kTree))
    refuse(Arg{op, "mask"}, "0 full, 1 causal, 2 window or 3 tree" + of_request(b), kind);
  const Mask mask = Mask(kind);
  if (mask != Mask::kFull && kv < q_len)
    refuse(Arg{op, "kv_len"},
           "at least the " + std::to_string(q_len) + " query tokens" + of_request(b), kv);
  if (mask == Mask::kWindow && p.window < 1)
    refuse(Arg{op, "window"}, "at least 1 for the mask" + of_request(b), p.window);
  if (mask == Mask::kTree) {
    if (!p.tree_bits) refuse(Arg{op, "tree_bits"}, "bits for the tree" + of_request(b), "None");
    if (q_len > 64 * p.tree_words)
      refuse(Arg{op, "tree_bits"},
             "at least " + std::to_string(q_len) + " bits a row" + of_request(b),
             64 * p.tree_words);
    if (p.tree_row[b] < 0 || p.tree_row[b] + q_len > a.tree_bits->size(0))
      refuse(Arg{op, "tree_row"},
             "0.." + std::to_string(a.tree_bits->size(0) - q_len) + of_request(b), p.tree_row[b]);
  }
  for (int64_t i = 0; i < pages; ++i) {
    const int32_t page = p.block_table[b * p.table_stride + i];
    if (page < 0 || page >= p.P)
      refuse(
          Arg{op, "block_table"},
          "pages 0.." + std::to_string(p.P - 1) + " in entry " + std::to_string(i) + of_request(b),
          page);
  }
}

// What can be said of a batch whose lengths and pages only the device can read.
inline void check_on_gpu(const char* op, const BatchArgs& a, Batch& p) {
  if (p.dtype == DType::kF32) refuse(Arg{op, "q"}, "bfloat16 or float16 on cuda", "float32");
  if (a.max_kv_len > p.table_stride * p.Z)
    refuse(Arg{op, "max_kv_len"},
           "at most the " + std::to_string(p.table_stride * p.Z) + " tokens of a block table's row",
           a.max_kv_len);
  p.debug = env().debug;
}

// Fills and checks what concerns the requests of a batch whose queries and P, J, Z, D are set.
inline void check_requests(const char* op, const Tensor& q, const BatchArgs& a, Batch& p) {
  if (a.block_table.dim() != 2)
    refuse(Arg{op, "block_table"}, "int32 [B, most]", describe(a.block_table));
  p.B = a.block_table.size(0);
  p.table_stride = a.block_table.size(1);
  check_tensor(Arg{op, "block_table"}, a.block_table, ScalarType::Int, {p.B, p.table_stride}, q);
  p.block_table = a.block_table.const_data_ptr<int32_t>();
  p.cu_q = check_ints(Arg{op, "cu_q"}, a.cu_q, p.B + 1, q);
  p.kv_len = check_ints(Arg{op, "kv_len"}, a.kv_len, p.B, q);
  if (a.mask) p.mask = check_ints(Arg{op, "mask"}, *a.mask, p.B, q);
  check_tree(op, a, q, p);
  if (a.sinks) {
    check_tensor(Arg{op, "sinks"}, *a.sinks, ScalarType::Float, {p.H}, q);
    p.sinks = a.sinks->const_data_ptr<float>();
  }
  p.scale = float(a.scale);
  p.softcap = float(a.softcap);
  p.window = a.window;
  if (!(p.softcap >= 0.f)) refuse(Arg{op, "softcap"}, "0 (none) or more", "a negative number");
  if (q.is_cuda()) return check_on_gpu(op, a, p);
  if (p.cu_q[0] != 0) refuse(Arg{op, "cu_q"}, "0 as the first offset", p.cu_q[0]);
  for (int64_t b = 0; b < p.B; ++b) check_request(op, a, p, b);
  if (p.cu_q[p.B] != p.T)
    refuse(Arg{op, "cu_q"}, "T=" + std::to_string(p.T) + " as the last offset", p.cu_q[p.B]);
}

// Fills and checks a batch whose P, J, Z, D are set: every value is looked at before any work.
inline void check_batch(const char* op, const Tensor& q, const BatchArgs& a, Batch& p) {
  check_shapes(op, q, p);
  check_requests(op, q, a, p);
}

inline Problem problem_of(const Batch& p, int units) {
  return {p.cu_q, p.kv_len, p.mask, p.B, int(p.H), int(p.J), p.window, units, 0};
}

// Rows of a task where none was planned: as many as a request of this batch has, about.
inline int64_t usual_rows(const Batch& p) {
  return ceil_div(p.T, std::max<int64_t>(p.B, 1)) * (p.H / p.J);
}

// On CUDA: the caller's plan, unread, or a split that follows from the longest cache alone.
inline void choose_plan_on_gpu(const char* op, const BatchArgs& a, Batch& p, int sms) {
  const int64_t rows = p.T * (p.H / p.J);
  if (a.plan) {
    const Tensor& t = *a.plan;
    if (t.dim() != 1 || t.scalar_type() != ScalarType::Int || !t.is_contiguous() || !t.is_cuda() ||
        t.numel() < kHeaderWords)
      refuse(Arg{op, "plan"}, "contiguous int32 [words] on cuda", describe(t));
    p.plan = {t.const_data_ptr<int32_t>()};
    p.plan_words = p.partial_rows = t.numel();
    return;
  }
  const int64_t most = p.table_stride * p.Z;
  const int64_t longest = std::max<int64_t>(a.max_kv_len > 0 ? a.max_kv_len : most, 1);
  const int64_t tile = tile_rows(usual_rows(p));
  const int64_t tiles = std::max<int64_t>(p.B, ceil_div(rows, tile));
  p.uniform = {tile, 1, uniform_split(tiles, int(p.J), longest, 2 * sms)};
  p.uniform.parts = ceil_div(longest, p.uniform.keys);
  p.partial_rows = p.uniform.parts > 1 ? p.uniform.parts * rows : 0;
}

// The caller's plan, or one made into `own` with a split that follows from the longest cache alone.
inline void choose_plan(const char* op, const BatchArgs& a, Batch& p, std::vector<int32_t>& own) {
  Problem problem = problem_of(p, int(torch::stable::get_num_threads()));
  if (a.plan) {
    const Tensor& t = *a.plan;
    if (t.dim() != 1 || t.scalar_type() != ScalarType::Int || !t.is_contiguous() || t.is_cuda())
      refuse(Arg{op, "plan"}, "contiguous int32 [words] on cpu", describe(t));
    p.plan = {t.const_data_ptr<int32_t>()};
    const std::string error = plan_error(problem, p.plan.words, t.numel());
    if (!error.empty()) refuse(Arg{op, "plan"}, "a plan for this batch", error);
    p.partial_rows = p.plan.header().partial_rows;
    return;
  }
  int64_t longest = a.max_kv_len;
  if (longest <= 0)
    for (int64_t b = 0; b < p.B; ++b) longest = std::max<int64_t>(longest, p.kv_len[b]);
  problem.split = uniform_split(p.B, problem.J, std::max<int64_t>(longest, 1), problem.units);
  own = plan(problem);
  p.plan = {own.data()};
  p.partial_rows = p.plan.header().partial_rows;
}

// Room for partial results, none where nothing is split, and for a counter.
inline Tensor make_partials(const Tensor& q, Batch& p) {
  const int64_t rows = p.J * p.partial_rows;
  Tensor t = torch::stable::new_empty(q, {rows * (p.D + 1) + 1}, ScalarType::Float);
  p.partial = t.mutable_data_ptr<float>();
  p.partial_lse = p.partial + rows * p.D;
  p.counter = reinterpret_cast<int32_t*>(p.partial_lse + rows);
  return t;
}

inline void check_out(const char* op, const Tensor& q, const Tensor& out, const OptTensor& lse,
                      Batch& p) {
  check_tensor(Arg{op, "out"}, out, q.scalar_type(), {p.T, p.H, p.D}, q);
  p.out = out.mutable_data_ptr();
  if (lse) {
    check_tensor(Arg{op, "lse"}, *lse, ScalarType::Float, {p.T, p.H}, q);
    p.lse = lse->mutable_data_ptr<float>();
  }
}

inline void check_rows(const Arg& arg, const Tensor& t, const AppendParams& p, int64_t* token,
                       int64_t* head) {
  if (t.dim() != 3 || t.size(0) != p.T || t.size(1) != p.J || t.size(2) != p.D ||
      t.stride(2) != 1 || check_float(arg, t.scalar_type()) != p.dtype)
    refuse(arg,
           "[T, J, D] = [" + std::to_string(p.T) + ", " + std::to_string(p.J) + ", " +
               std::to_string(p.D) + "] of k's dtype with unit stride along D",
           describe(t));
  *token = t.stride(0);
  *head = t.stride(1);
}

// Keys, values, slots and rotation of an append into a cache whose P, J, Z, D are set. In debug
// mode a slot past the cache raises.
inline void check_append(const char* op, const Tensor& k, const Tensor& v, const Tensor& slots,
                         const OptTensor& cos, const OptTensor& sin, bool debug, AppendParams& p) {
  p.T = k.dim() == 3 ? k.size(0) : 0;
  p.dtype = check_float(Arg{op, "k"}, k.scalar_type());
  check_rows(Arg{op, "k"}, k, p, &p.k_token, &p.k_head);
  check_rows(Arg{op, "v"}, v, p, &p.v_token, &p.v_head);
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  check_tensor(Arg{op, "slots"}, slots, ScalarType::Long, {p.T}, k);
  p.slots = slots.const_data_ptr<int64_t>();
  if (cos.has_value() != sin.has_value())
    refuse(Arg{op, cos ? "sin" : "cos"}, "both cos and sin, or neither", "None");
  if (cos) {
    p.R = cos->dim() == 2 ? 2 * cos->size(1) : 0;
    if (p.R > p.D)
      refuse(Arg{op, "cos"}, "[T, R/2] with R <= D=" + std::to_string(p.D), describe(*cos));
    check_tensor(Arg{op, "cos"}, *cos, ScalarType::Float, {p.T, p.R / 2}, k);
    check_tensor(Arg{op, "sin"}, *sin, ScalarType::Float, {p.T, p.R / 2}, k);
    p.cos = cos->const_data_ptr<float>();
    p.sin = sin->const_data_ptr<float>();
  }
  p.debug = debug;
  for (int64_t t = 0; debug && !k.is_cuda() && t < p.T; ++t)
    if (p.slots[t] < -1 || p.slots[t] >= p.P * p.Z)
      refuse(Arg{op, "slots"},
             "-1.." + std::to_string(p.P * p.Z - 1) + " for token " + std::to_string(t),
             p.slots[t]);
}

}  // namespace tessella::msm
