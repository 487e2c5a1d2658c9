// msm on CUDA: which body runs, the merge of split keys, and the append.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "core/env.h"
#include "cuda/device.h"
#include "msm/kernels.h"
#include "msm/sm80.cuh"

namespace tessella::msm {

int gpu_sms() { return cuda::this_device().sms; }

// --- merge

namespace dev {

// A row by kTeam warps: `parts` parts from partial row `part0` on, `step` rows apart. A warp takes
// every kTeam-th part, four channels a lane.
template <int kTeam>
__device__ inline void merge_row(const Batch& p, int64_t j, int64_t place, int64_t head,
                                 int64_t part0, int64_t step, int parts) {
  __shared__ float4 totals[kWarps][2][32];
  __shared__ float sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, D = int(p.D);
  const int own = warp % kTeam, first = warp - own, thread = own * 32 + lane;
  const auto meet = [] { kTeam == kWarps ? __syncthreads() : __syncwarp(); };
  const float* lse = p.partial_lse + j * p.partial_rows + part0;
  float top = p.sinks ? p.sinks[head] : -kInf, nan = 0.f;
  for (int i = lane; i < parts; i += 32) {
    const float x = lse[i * step];
    top = fmaxf(top, x);
    nan += x != x ? 1.f : 0.f;
  }
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    top = fmaxf(top, __shfl_xor_sync(~0u, top, by));
    nan += __shfl_xor_sync(~0u, nan, by);
  }
  const float* from = p.partial + (j * p.partial_rows + part0) * D + 4 * lane;
  float4 o[2] = {};
  float sum = 0.f;
#pragma unroll 4
  for (int i = own; i < parts; i += kTeam) {
    const float share = top == -kInf ? 0.f : __expf(lse[i * step] - top);
    sum += share;
#pragma unroll
    for (int c = 0; c < 2; ++c)
      if (4 * lane + 128 * c < D) {
        const float4 v = *reinterpret_cast<const float4*>(from + i * step * D + 128 * c);
        o[c].x += share * v.x;
        o[c].y += share * v.y;
        o[c].z += share * v.z;
        o[c].w += share * v.w;
      }
  }
  totals[warp][0][lane] = o[0];
  totals[warp][1][lane] = o[1];
  if (lane == 0) sums[warp] = sum;
  meet();
  sum = p.sinks && top != -kInf ? __expf(p.sinks[head] - top) : 0.f;
  for (int w = 0; w < kTeam; ++w) sum += sums[first + w];
  const float none = nan > 0.f ? __int_as_float(0x7fffffff) : 0.f;
  const float by = nan > 0.f ? none : sum > 0.f ? 1.f / sum : 0.f;
  for (int d = thread; d < D; d += 32 * kTeam) {
    float x = 0.f;
    for (int w = 0; w < kTeam; ++w)
      x += reinterpret_cast<const float*>(&totals[first + w][d / 128][0])[d % 128];
    store_float(p.out, place * D + d, p.dtype, x * by);
  }
  if (thread == 0 && p.lse)
    p.lse[place] = nan > 0.f ? none : sum == 0.f ? -kInf : top + __logf(sum);
  meet();
}

// A team takes a row at a time; `rows` of a merge lie next to each other, later ones are a round
// further on. The plan and the lengths are read before the wait: the grid ahead is the attention,
// which waited for whatever wrote them.
template <int kTeam>
__global__ __launch_bounds__(kThreads, 8) void merge(const Batch p, int rows) {
  const int64_t G = p.H / p.J, teams = int64_t{gridDim.x} * (kWarps / kTeam);
  int64_t i = int64_t{blockIdx.x} * (kWarps / kTeam) + threadIdx.x / (32 * kTeam);
  if (p.plan.words == nullptr) {
    ptx::wait_for_previous_grid();
    ptx::allow_next_grid();
    for (const int64_t all = p.T * G; i < all * p.J; i += teams) {
      const int64_t row = i / p.J, j = i % p.J, head = j * G + row % G;
      merge_row<kTeam>(p, j, row / G * p.H + head, head, row, all, int(p.uniform.parts));
    }
    return;
  }
  bool waits = true;
  const int64_t items = int64_t{p.plan.header().merges} * p.J * rows;
  for (; i < items; i += teams) {
    const Merge m = p.plan.merges()[i / rows / p.J];
    const int64_t j = i / rows % p.J, first = p.cu_q[m.request];
    if (waits) ptx::wait_for_previous_grid();
    if (waits) ptx::allow_next_grid();
    waits = false;
    for (int r = int(i % rows); r < m.rows; r += rows) {
      const int64_t row = m.row0 + r, head = j * G + row % G;
      merge_row<kTeam>(p, j, (first + row / G) * p.H + head, head, m.partial + r, m.rows, m.parts);
    }
  }
  if (waits) ptx::wait_for_previous_grid();
  if (waits) ptx::allow_next_grid();
}

int launch_merge(const Batch& p, bool programmatic, cudaStream_t stream) {
  if (p.partial_rows == 0) return 0;
  const int64_t usual = ceil_div(p.T, p.B) * (p.H / p.J);
  const int rows = int(usual < 4 ? 4 : usual < 128 ? usual : 128);
  const bool many = rows >= 16;  // then a warp each, else a block
  const int64_t items = p.plan.words != nullptr
                            ? (p.plan_words - kHeaderWords) / kMergeWords * p.J * rows
                            : p.T * p.H;
  const int64_t blocks = ceil_div(items, many ? kWarps : 1), most = int64_t{gpu_sms()} * 8;
  const cuda::Launch l{dim3(unsigned(blocks < most ? blocks : most)),
                       unsigned(kThreads),
                       0,
                       1,
                       programmatic,
                       stream};
  return items > 0 ? cuda::launch(l, many ? &merge<1> : &merge<kWarps>, p, rows) : 0;
}

template <class S>
static int go(const Params& p, Part part, cudaStream_t stream) {
  const bool pdl = env().programmatic && cuda::this_device().arch >= 90;
  return launch<S>(p, part, S::stage_bytes(p), gpu_sms(), pdl, stream);
}

template <DType kType, int kHead>
static int run_head(const Params& p, Part part, cudaStream_t stream) {
  const int rows = rows_at_once(p, part);
  if (p.D != kHead) return go<Plain<kType, kHead, 2, false>>(p, part, stream);
  if (rows <= 8) return go<Plain<kType, kHead, 1, true>>(p, part, stream);
  if (rows <= 16 || kHead > 128) return go<Plain<kType, kHead, 2, true>>(p, part, stream);
  return go<Plain<kType, kHead, (kHead > 128 ? 2 : 4), true>>(p, part, stream);
}

template <DType kType>
static int run_plain(const Params& p, Part part, cudaStream_t stream) {
  if (p.D <= 64) return run_head<kType, 64>(p, part, stream);
  if (p.D <= 128) return run_head<kType, 128>(p, part, stream);
  return run_head<kType, 256>(p, part, stream);
}

}  // namespace dev

// Which of Hopper's bodies a batch is for, as far as that can be told without its lengths: one that
// divides evenly is taken for what it looks like. Any body may be given any tile.
struct Bodies {
  bool t128, t64;  // tiles of 64 rows and more, and what then is left; else plain
};
static Bodies choose_bodies(const Params& p) {
  if (p.B == 0) return {false, false};
  const int64_t G = p.H / p.J, usual = ceil_div(p.T, p.B) * G;
  const int64_t most = p.T % p.B == 0 ? usual : (p.T - p.B + 1) * G;  // rows of a request
  const bool t128 = p.plan.words != nullptr ? most > 64 : p.uniform.tile > 64;
  return {t128, t128 || p.plan.words == nullptr ? usual > 16 && usual <= 64 : most > 16};
}

static int run_rest(const Params& p, bool t64, Part part, bool pdl, cudaStream_t stream) {
  if constexpr (kHasSm90)
    if (t64) return run_sm90(p, 64, part, pdl, stream);
  return p.dtype == DType::kBF16 ? dev::run_plain<DType::kBF16>(p, part, stream)
                                 : dev::run_plain<DType::kF16>(p, part, stream);
}

int run_cuda(const Params& p, void* stream) {
  if (!env().error.empty()) throw std::runtime_error(env().error);
  if (cuda::this_device().arch < 80)
    throw std::runtime_error("tessella::msm_attn: needs a GPU of compute capability 8.0 or later");
  auto* const s = static_cast<cudaStream_t>(stream);
  const bool pdl = env().programmatic && cuda::this_device().arch >= 90;
  const std::string forced = env().force.empty() ? "" : forced_kernel("msm");
  const bool must = forced == "msm.sm90.t128" || forced == "msm.sm90.t64";
  bool may = false;
  if constexpr (kHasSm90) may = forced != "msm.sm80.plain" && sm90_takes(p);
  if (must && !may)
    throw std::runtime_error("TESSELLA_FORCE: '" + forced + "' cannot run this problem or GPU");
  Bodies bodies = may ? choose_bodies(p) : Bodies{false, false};
  if (must) bodies = {forced == "msm.sm90.t128", forced == "msm.sm90.t64"};
  int error = 0;
  if constexpr (kHasSm90)
    if (bodies.t128) error = run_sm90(p, 128, Part::kBig, pdl, s);
  const bool done = bodies.t128 && p.plan.words == nullptr && p.uniform.tile >= kBigTile;
  if (error == 0 && !done)
    error = run_rest(p, bodies.t64, bodies.t128 ? Part::kSmall : Part::kAll, pdl, s);
  return error != 0 ? error : dev::launch_merge(p, pdl, s);
}

// --- append

namespace dev {

// A warp takes one token and kv head: key, rotated, and value into their slot.
__global__ __launch_bounds__(kThreads) void append(const AppendParams p, void* pages,
                                                   DType page_dtype) {
  ptx::wait_for_previous_grid();
  ptx::allow_next_grid();
  const int lane = threadIdx.x % 32, D = int(p.D), half = int(p.R) / 2;
  const int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (i >= p.T * p.J) return;
  const int64_t t = i / p.J, j = i % p.J, slot = p.slots[t];
  if (p.debug && (slot < -1 || slot >= p.P * p.Z)) __trap();
  if (slot < 0 || slot >= p.P * p.Z) return;
  const int64_t to = ((slot / p.Z * p.J + j) * 2 * p.Z + slot % p.Z) * D;
  const int64_t k = t * p.k_token + j * p.k_head, v = t * p.v_token + j * p.v_head;
  for (int d = lane; d < D; d += 32) {
    store_any(pages, to + d, page_dtype, rotated(p, k, t, d, half));
    store_any(pages, to + p.Z * D + d, page_dtype, load_any(p.v, v + d, p.dtype));
  }
}

}  // namespace dev

int append_cuda(const AppendParams& p, void* pages, DType page_dtype, void* stream) {
  const int64_t blocks = ceil_div(p.T * p.J, dev::kWarps);
  const bool pdl = env().programmatic && cuda::this_device().arch >= 90;
  const cuda::Launch l{dim3(unsigned(blocks)),           unsigned(dev::kThreads), 0, 1, pdl,
                       static_cast<cudaStream_t>(stream)};
  return blocks > 0 ? cuda::launch(l, &dev::append, p, pages, page_dtype) : 0;
}

}  // namespace tessella::msm
