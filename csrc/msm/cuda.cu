// msm on CUDA: which body runs, the merge of split keys, and the append.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "core/env.h"
#include "cuda/device.h"
#include "msm/kernels.h"
#include "msm/sm80.cuh"
#include "msm/sm80_fp8.cuh"

namespace tessella::msm {

int gpu_sms() { return cuda::this_device().sms; }

// --- merge

namespace dev {

// A row by kTeam warps: `parts` parts from partial row `part0` on, `step` rows apart. A warp takes
// every kTeam-th part, four channels a lane, several at once, since what it waits for is the way to
// memory. It has a reference of its own until the team joins. kHalves: of a row of 256 channels at
// most.
template <int kTeam, int kHalves>
__device__ inline void merge_row(const Batch& p, int64_t j, int64_t place, int64_t head,
                                 int64_t part0, int64_t step, int parts) {
  constexpr int kAtOnce = (kTeam > 1 ? 8 : 4) / kHalves;
  __shared__ float4 totals[kWarps][kHalves][32];
  __shared__ float tops[kWarps], sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, D = int(p.D);
  const int own = warp % kTeam, team = warp - own, thread = own * 32 + lane;
  const auto meet = [] { kTeam == kWarps ? __syncthreads() : __syncwarp(); };
  const float* lse = p.partial_lse + j * p.partial_rows + part0;
  const float* from = p.partial + (j * p.partial_rows + part0) * D + 4 * lane;
  float4 o[kHalves] = {};
  float top = -kInf, sum = 0.f;
  for (int first = own; first < parts; first += kTeam * kAtOnce) {
    float4 v[kAtOnce][kHalves] = {};
    float x[kAtOnce], high = top;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = first + kTeam * k;
      x[k] = i < parts ? lse[i * step] : -kInf;
#pragma unroll
      for (int c = 0; c < kHalves; ++c)
        if (i < parts && 4 * lane + 128 * c < D)
          v[k][c] = *reinterpret_cast<const float4*>(from + i * step * D + 128 * c);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) high = fmaxf(high, x[k]);
    const float keep = top == high ? 1.f : __expf(top - high);
    top = high;
    sum *= keep;
#pragma unroll
    for (int c = 0; c < kHalves; ++c)
      o[c] = make_float4(o[c].x * keep, o[c].y * keep, o[c].z * keep, o[c].w * keep);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const float share = x[k] == -kInf ? 0.f : __expf(x[k] - top);
      sum += share;
#pragma unroll
      for (int c = 0; c < kHalves; ++c) {
        o[c].x += share * v[k][c].x;
        o[c].y += share * v[k][c].y;
        o[c].z += share * v[k][c].z;
        o[c].w += share * v[k][c].w;
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kHalves; ++c) totals[warp][c][lane] = o[c];
  if (lane == 0) tops[warp] = top, sums[warp] = sum;
  meet();
  top = p.sinks ? p.sinks[head] : -kInf;
  for (int w = 0; w < kTeam; ++w) top = fmaxf(top, tops[team + w]);
  sum = p.sinks && top != -kInf ? __expf(p.sinks[head] - top) : 0.f;
  float share[kTeam];
#pragma unroll
  for (int w = 0; w < kTeam; ++w) {  // a sum that is not a number stays so
    const float its = sums[team + w], reference = tops[team + w];
    share[w] = reference == -kInf && its == 0.f ? 0.f : __expf(reference - top);
    sum += share[w] * its;
  }
  const bool nan = sum != sum;
  const float by = nan || sum > 0.f ? 1.f / sum : 0.f;
  for (int d = thread; d < D; d += 32 * kTeam) {
    float x = 0.f;
#pragma unroll
    for (int w = 0; w < kTeam; ++w)
      x += share[w] * reinterpret_cast<const float*>(&totals[team + w][d / 128][0])[d % 128];
    store_float(p.out, place * D + d, p.dtype, x * by);
  }
  if (thread == 0 && p.lse) p.lse[place] = nan ? sum : sum == 0.f ? -kInf : top + __logf(sum);
  meet();
}

// A team takes a row at a time; `rows` of a merge lie next to each other, later ones are a round
// further on. The plan and the lengths are read before the wait: the grid ahead is the attention,
// which waited for whatever wrote them.
template <int kTeam, int kHalves>
__global__ __launch_bounds__(kThreads, kTeam > 1 ? 4 : 8) void merge(const Batch p, int rows) {
  const int64_t G = p.H / p.J, teams = int64_t{gridDim.x} * (kWarps / kTeam);
  int64_t i = int64_t{blockIdx.x} * (kWarps / kTeam) + threadIdx.x / (32 * kTeam);
  if (p.plan.words == nullptr) {
    ptx::wait_for_previous_grid();
    ptx::allow_next_grid();
    for (const int64_t all = p.T * G; i < all * p.J; i += teams) {
      const int64_t row = i / p.J, j = i % p.J, head = j * G + row % G,
                    place = row / G * p.H + head;
      merge_row<kTeam, kHalves>(p, j, place, head, row, all, int(p.uniform.parts));
    }
    return;
  }
  bool waits = true;
  const unsigned J = unsigned(p.J);
  const int64_t items = int64_t{p.plan.header().merges} * J * rows;
  for (; i < items; i += teams) {
    const unsigned item = unsigned(i), r0 = item % rows, j = item / rows % J;
    const Merge m = p.plan.merges()[item / rows / J];
    const int64_t first = p.cu_q[m.request];
    if (waits) ptx::wait_for_previous_grid();
    if (waits) ptx::allow_next_grid();
    waits = false;
    for (int r = int(r0); r < m.rows; r += rows) {
      const int64_t row = m.row0 + r, head = j * G + row % G,
                    place = (first + row / G) * p.H + head;
      merge_row<kTeam, kHalves>(p, j, place, head, m.partial + r, m.rows, m.parts);
    }
  }
  if (waits) ptx::wait_for_previous_grid();
  if (waits) ptx::allow_next_grid();
}

template <int kTeam, int kHalves>
static int merge_by(const Batch& p, int rows, bool programmatic, cudaStream_t stream) {
  const int64_t items = p.plan.words != nullptr
                            ? (p.plan_words - kHeaderWords) / kMergeWords * p.J * rows
                            : p.T * p.H;
  const int64_t blocks = ceil_div(items, kWarps / kTeam);
  const int64_t most = int64_t{gpu_sms()} * (kTeam > 1 ? 4 : 8);
  const unsigned grid = unsigned(blocks < most ? blocks : most);
  const cuda::Launch l{dim3(grid), unsigned(kThreads), 0, 1, programmatic, stream};
  return grid > 0 ? cuda::launch(l, &merge<kTeam, kHalves>, p, rows) : 0;
}

int launch_merge(const Batch& p, bool programmatic, cudaStream_t stream) {
  if (p.partial_rows == 0) return 0;
  const int64_t usual = ceil_div(p.T, p.B) * (p.H / p.J);
  const int rows = int(usual < 4 ? 4 : usual < 128 ? usual : 128);
  // many rows: a warp each, else a block, so that all of the GPU is busy for few
  if (rows >= 16 && p.D <= 128) return merge_by<1, 1>(p, rows, programmatic, stream);
  if (rows >= 16) return merge_by<1, 2>(p, rows, programmatic, stream);
  if (p.D <= 128) return merge_by<kWarps, 1>(p, rows, programmatic, stream);
  return merge_by<kWarps, 2>(p, rows, programmatic, stream);
}

template <class S>
static int go(const Params& p, Part part, Turn turn, cudaStream_t stream) {
  const bool pdl = env().programmatic && cuda::this_device().arch >= 90;
  return launch<S>(p, part, S::stage_bytes(p), gpu_sms(), pdl, stream, turn);
}

template <DType kType, int kHead>
static int run_head(const Params& p, Part part, Turn turn, cudaStream_t stream) {
  const int rows = rows_at_once(p, part);
  if (p.D != kHead) return go<Plain<kType, kHead, 2, false>>(p, part, turn, stream);
  if constexpr (kHead == 128)
    if (rows <= 8 && turn == Turn::kBeside)
      return go<Plain<kType, kHead, 1, true, 3>>(p, part, turn, stream);
  if (rows <= 8) return go<Plain<kType, kHead, 1, true>>(p, part, turn, stream);
  if (rows <= 16 || kHead > 128) return go<Plain<kType, kHead, 2, true>>(p, part, turn, stream);
  return go<Plain<kType, kHead, (kHead > 128 ? 2 : 4), true>>(p, part, turn, stream);
}

template <int kHead>
static int run_eights(const Params& p, Part part, Turn turn, cudaStream_t stream) {
  if (p.D != kHead) return go<Eights<kHead, 2, false>>(p, part, turn, stream);
  if (rows_at_once(p, part) <= 8) return go<Eights<kHead, 1, true>>(p, part, turn, stream);
  return go<Eights<kHead, (kHead > 128 ? 2 : 4), true>>(p, part, turn, stream);
}

template <int kHead>
static int run_pages(const Params& p, Part part, Turn turn, cudaStream_t stream) {
  if (p.page_dtype == DType::kE4M3) return run_eights<kHead>(p, part, turn, stream);
  return p.dtype == DType::kBF16 ? run_head<DType::kBF16, kHead>(p, part, turn, stream)
                                 : run_head<DType::kF16, kHead>(p, part, turn, stream);
}

static int run_plain(const Params& p, Part part, Turn turn, cudaStream_t stream) {
  if (p.D <= 64) return run_pages<64>(p, part, turn, stream);
  if (p.D <= 128) return run_pages<128>(p, part, turn, stream);
  return run_pages<256>(p, part, turn, stream);
}

}  // namespace dev

// Which of Hopper's bodies a batch is for, as far as that can be told without its lengths: one that
// divides evenly is taken for what it looks like. Any body may be given any tile.
struct Bodies {
  bool t128;   // for tiles of 64 rows and more
  bool t64;    // for all tasks; without either, plain
  bool mixed;  // small tasks run beside large ones
};
static Bodies choose_bodies(const Params& p, bool programmatic, const std::string& forced) {
  const int64_t G = p.H / p.J, usual = ceil_div(p.T, p.B) * G;
  const bool planned = p.plan.words != nullptr, even = p.T % p.B == 0;
  const int64_t most = even ? usual : (p.T - p.B + 1) * G;  // rows of a request
  Bodies b{};
  b.t128 = planned ? most > 64 : p.uniform.tile > 64;
  if (!forced.empty()) b.t128 = forced == "msm.sm90.t128";
  b.t64 = !b.t128 && (planned ? most : usual) > 16;
  if (!forced.empty()) b.t64 = forced == "msm.sm90.t64";
  // a tile for each request: nothing small is beside them
  b.mixed = b.t128 && programmatic && planned && p.B > 1 && !(even && usual <= 128);
  return b;
}

static int run_rest(const Params& p, const Bodies& b, bool programmatic, cudaStream_t stream) {
  if constexpr (kHasSm90)
    if (b.t64) return run_sm90(p, 64, Turn::kAlone, programmatic, stream);
  return dev::run_plain(p, b.t128 ? Part::kSmall : Part::kAll,
                        b.mixed ? Turn::kBeside : Turn::kAlone, stream);
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
  const Bodies b = may ? choose_bodies(p, pdl, must ? forced : "") : Bodies{};
  int error = 0;
  if constexpr (kHasSm90)
    if (b.t128) error = run_sm90(p, 128, b.mixed ? Turn::kFirst : Turn::kAlone, pdl, stream);
  const bool done = b.t128 && p.plan.words == nullptr && p.uniform.tile >= kBigTile;
  if (error == 0 && !done) error = run_rest(p, b, pdl, s);
  if constexpr (kHasSm90)
    if (error == 0 && b.mixed) error = run_sm90(p, 128, Turn::kAfter, pdl, stream);
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
