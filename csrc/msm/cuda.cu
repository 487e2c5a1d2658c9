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

// One row of a merge by a block: `parts` parts from partial row `part0` on, `step` rows apart. A
// warp takes every fourth part, four channels a lane, several at once, since what it waits for is
// the way to memory. A warp has a reference of its own until the four are joined. kHalves: of a row
// of 256 channels at most.
template <int kHalves>
__device__ inline void merge_row(const Batch& p, int64_t j, int64_t place, int64_t head,
                                 int64_t part0, int64_t step, int parts) {
  constexpr int kAtOnce = 8 / kHalves;
  __shared__ float4 totals[kWarps][kHalves][32];
  __shared__ float tops[kWarps], sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, D = int(p.D);
  const float* lse = p.partial_lse + j * p.partial_rows + part0;
  const float* from = p.partial + (j * p.partial_rows + part0) * D + 4 * lane;
  float4 o[kHalves] = {};
  float top = -kInf, sum = 0.f;
  for (int first = warp; first < parts; first += kWarps * kAtOnce) {
    float4 v[kAtOnce][kHalves] = {};
    float x[kAtOnce], high = top;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = first + kWarps * k;
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
  __syncthreads();
  top = p.sinks ? p.sinks[head] : -kInf;
  for (int w = 0; w < kWarps; ++w) top = fmaxf(top, tops[w]);
  sum = p.sinks && top != -kInf ? __expf(p.sinks[head] - top) : 0.f;
  float share[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {  // a sum that is not a number stays so
    share[w] = tops[w] == -kInf && sums[w] == 0.f ? 0.f : __expf(tops[w] - top);
    sum += share[w] * sums[w];
  }
  const bool nan = sum != sum;
  const float by = nan || sum > 0.f ? 1.f / sum : 0.f;
  for (int d = threadIdx.x; d < D; d += kThreads) {
    float x = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w)
      x += share[w] * reinterpret_cast<const float*>(&totals[w][d / 128][0])[d % 128];
    store_float(p.out, place * D + d, p.dtype, x * by);
  }
  if (threadIdx.x == 0 && p.lse) p.lse[place] = nan ? sum : sum == 0.f ? -kInf : top + __logf(sum);
  __syncthreads();
}

// A block takes a row of 4 that lie next to each other, so that all of the GPU is busy for few.
template <int kHalves>
__global__ __launch_bounds__(kThreads) void merge(const Batch p) {
  const int64_t G = p.H / p.J;
  if (p.plan.words == nullptr) {
    ptx::wait_for_previous_grid();
    ptx::allow_next_grid();
    const int64_t rows = p.T * G;
    for (int64_t i = blockIdx.x; i < rows * p.J; i += gridDim.x) {
      const int64_t row = i / p.J, j = i % p.J, head = j * G + row % G;
      merge_row<kHalves>(p, j, row / G * p.H + head, head, row, rows, int(p.uniform.parts));
    }
    return;
  }
  // rows of a merge: every fourth by each of four blocks. The previous grid is that of the parts,
  // which waited before it let this one start: the plan and the batch are older, hence complete
  const unsigned J = unsigned(p.J), items = unsigned(p.plan.header().merges) * J * 4;
  unsigned i = blockIdx.x;
  Merge m{};
  int64_t first = 0;
  auto look = [&] {
    if (i >= items) return;
    m = p.plan.merges()[i / 4 / J];
    first = p.cu_q[m.request];
  };
  look();
  ptx::wait_for_previous_grid();
  ptx::allow_next_grid();
  while (i < items) {
    const int64_t j = i / 4 % J;
    for (int r = int(i % 4); r < m.rows; r += 4) {
      const int64_t row = m.row0 + r, head = j * G + row % G;
      merge_row<kHalves>(p, j, (first + row / G) * p.H + head, head, m.partial + r, m.rows,
                         m.parts);
    }
    i += gridDim.x;
    look();
  }
}

int launch_merge(const Batch& p, bool programmatic, cudaStream_t stream) {
  if (p.partial_rows == 0) return 0;
  const int64_t items =
      p.plan.words != nullptr ? (p.plan_words - kHeaderWords) / kMergeWords * p.J * 4 : p.T * p.H;
  const int64_t most = int64_t{gpu_sms()} * 4;
  const cuda::Launch l{
      dim3(unsigned(items < most ? items : most)), unsigned(kThreads), 0, 1, programmatic, stream};
  if (items == 0) return 0;
  return p.D <= 128 ? cuda::launch(l, &merge<1>, p) : cuda::launch(l, &merge<2>, p);
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

// Whether a batch has tiles of 64 rows or more, as far as that can be told without its lengths: one
// of equally long requests is taken for what it looks like.
static bool has_big_tiles(const Params& p) {
  if (p.plan.words == nullptr) return p.uniform.tile >= kBigTile;
  if (p.B == 0) return false;
  const int64_t G = p.H / p.J, small = kBigTile / 2;
  return p.T * G > small * p.B || (p.T % p.B != 0 && (p.T - p.B + 1) * G > small);
}

int run_cuda(const Params& p, void* stream) {
  if (!env().error.empty()) throw std::runtime_error(env().error);
  if (cuda::this_device().arch < 80)
    throw std::runtime_error("tessella::msm_attn: needs a GPU of compute capability 8.0 or later");
  auto* const s = static_cast<cudaStream_t>(stream);
  const bool pdl = env().programmatic && cuda::this_device().arch >= 90;
  const std::string forced = env().force.empty() ? "" : forced_kernel("msm");
  const bool must = forced == "msm.sm90.t128";
  bool may = false;
  if constexpr (kHasSm90) may = forced != "msm.sm80.plain" && sm90_takes(p);
  if (must && !may)
    throw std::runtime_error("TESSELLA_FORCE: '" + forced + "' cannot run this problem or GPU");
  Part rest = Part::kAll;
  int error = 0;
  const bool big = may && (must || has_big_tiles(p));
  const bool mixed = big && pdl && p.plan.words != nullptr && p.B > 1;
  if constexpr (kHasSm90)
    if (big) {
      error = run_sm90(p, mixed ? Turn::kFirst : Turn::kAlone, stream);
      rest = Part::kSmall;
    }
  const bool done = rest == Part::kSmall && p.plan.words == nullptr && p.uniform.tile >= kBigTile;
  const Turn turn = mixed ? Turn::kBeside : Turn::kAlone;
  if (error == 0 && !done) error = dev::run_plain(p, rest, turn, s);
  if constexpr (kHasSm90)
    if (error == 0 && mixed) error = run_sm90(p, Turn::kAfter, stream);
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
