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

// One row of a merge by a warp: `parts` parts from partial row `part0` on, `step` rows apart.
__device__ inline void merge_row(const Batch& p, int64_t j, int64_t place, int64_t head,
                                 int64_t part0, int64_t step, int parts) {
  const int lane = threadIdx.x % 32, D = int(p.D);
  const float* lse = p.partial_lse + j * p.partial_rows + part0;
  float top = p.sinks ? p.sinks[head] : -kInf, nan = 0.f;
  for (int i = lane; i < parts; i += 32) {
    top = fmaxf(top, lse[i * step]);
    nan += lse[i * step] != lse[i * step] ? 1.f : 0.f;
  }
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    top = fmaxf(top, __shfl_xor_sync(~0u, top, by));
    nan += __shfl_xor_sync(~0u, nan, by);
  }
  float sum = p.sinks && top != -kInf ? __expf(p.sinks[head] - top) : 0.f, o[8] = {};
  const float* from = p.partial + (j * p.partial_rows + part0) * D;
#pragma unroll 2
  for (int i = 0; i < parts; ++i) {
    const float share = top == -kInf ? 0.f : __expf(lse[i * step] - top);
    sum += share;
    if (share == 0.f) continue;
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (lane + 32 * c < D) o[c] += share * from[i * step * D + lane + 32 * c];
  }
  const float by = nan > 0.f                 ? __int_as_float(0x7fffffff)
                   : sum > 0.f || sum != sum ? 1.f / sum
                                             : 0.f;
#pragma unroll
  for (int c = 0; c < 8; ++c)
    if (lane + 32 * c < D) store_float(p.out, place * D + lane + 32 * c, p.dtype, o[c] * by);
  if (lane == 0 && p.lse) p.lse[place] = nan > 0.f ? by : sum == 0.f ? -kInf : top + __logf(sum);
}

__global__ __launch_bounds__(kThreads) void merge(const Batch p) {
  ptx::wait_for_previous_grid();
  ptx::allow_next_grid();
  const int warp = threadIdx.x / 32;
  const int64_t G = p.H / p.J;
  if (p.plan.words == nullptr) {
    const int64_t rows = p.T * G;
    for (int64_t i = int64_t{blockIdx.x} * kWarps + warp; i < rows * p.J; i += gridDim.x * kWarps) {
      const int64_t row = i / p.J, j = i % p.J, head = j * G + row % G;
      merge_row(p, j, row / G * p.H + head, head, row, rows, int(p.uniform.parts));
    }
    return;
  }
  const int merges = p.plan.header().merges;
  for (int64_t i = blockIdx.x; i < merges * p.J; i += gridDim.x) {
    const Merge m = p.plan.merges()[i / p.J];
    const int64_t j = i % p.J, first = p.cu_q[m.request];
    for (int r = warp; r < m.rows; r += kWarps) {
      const int64_t row = m.row0 + r, head = j * G + row % G;
      merge_row(p, j, (first + row / G) * p.H + head, head, m.partial + r, m.rows, m.parts);
    }
  }
}

int launch_merge(const Batch& p, bool programmatic, cudaStream_t stream) {
  if (p.partial_rows == 0) return 0;
  const int64_t items = p.plan.words != nullptr ? (p.plan_words - kHeaderWords) / kMergeWords * p.J
                                                : ceil_div(p.T * (p.H / p.J) * p.J, kWarps);
  const int64_t most = int64_t{gpu_sms()} * 8;
  const cuda::Launch l{
      dim3(unsigned(items < most ? items : most)), unsigned(kThreads), 0, 1, programmatic, stream};
  return items > 0 ? cuda::launch(l, &merge, p) : 0;
}

template <DType kType, int kHead>
static int run_plain(const Params& p, Part part, cudaStream_t stream) {
  const int rows = rows_at_once(p, part), sms = gpu_sms();
  const bool pdl = env().programmatic && cuda::this_device().arch >= 90;
  auto go = [&](auto* source) {
    using S = std::remove_pointer_t<decltype(source)>;
    return launch<S>(p, part, S::stage_bytes(p), sms, pdl, stream);
  };
  if (rows <= 8) return go(static_cast<Plain<kType, kHead, 1>*>(nullptr));
  if (rows <= 16 || kHead > 128) return go(static_cast<Plain<kType, kHead, 2>*>(nullptr));
  return go(static_cast<Plain<kType, kHead, (kHead > 128 ? 2 : 4)>*>(nullptr));
}

template <DType kType>
static int run_plain(const Params& p, Part part, cudaStream_t stream) {
  if (p.D <= 64) return run_plain<kType, 64>(p, part, stream);
  if (p.D <= 128) return run_plain<kType, 128>(p, part, stream);
  return run_plain<kType, 256>(p, part, stream);
}

}  // namespace dev

int run_cuda(const Params& p, void* stream) {
  if (!env().error.empty()) throw std::runtime_error(env().error);
  if (cuda::this_device().arch < 80)
    throw std::runtime_error("tessella::msm_attn: needs a GPU of compute capability 8.0 or later");
  auto* const s = static_cast<cudaStream_t>(stream);
  const bool pdl = env().programmatic && cuda::this_device().arch >= 90;
  const int error = p.dtype == DType::kBF16 ? dev::run_plain<DType::kBF16>(p, Part::kAll, s)
                                            : dev::run_plain<DType::kF16>(p, Part::kAll, s);
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
