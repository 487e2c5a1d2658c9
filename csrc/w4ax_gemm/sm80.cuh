// w4ax_gemm for any GPU from sm_80 and for every case: schemes, precisions, granularities.
//
// A warp owns 16 features x 32 tokens and walks all of K with mma.sync m16n8k32. Weights become s8
// with their zero inside, q - z or q s1 + a - 128, so no sums are needed. Integer sums run over all
// of K, or up to where a weight group or an activation scale ends; then they enter fp32 totals.
// Activations are read from global memory, 4 bytes a lane: right before fast.
#pragma once
#include "cuda/float.cuh"
#include "cuda/mma.cuh"
#include "cuda/w4_decode.cuh"
#include "layout/w4_frag.h"
#include "w4ax_gemm/params.h"

namespace tessella::w4ax_gemm::sm80 {

constexpr int kSubtiles = 4, kTokens = 8 * kSubtiles, kThreads = 128;

// One thread's place: features n and n + 8, and its lane's row and column in fragments.
struct Lane {
  int64_t panel, n, m0;
  int r, c;
};

// Fragment registers of 32 channels from k on: words of features n and n + 8.
__device__ inline void decode(const Params& p, const layout::W4Frag& w, const Lane& at, int64_t k,
                              const uint32_t (&words)[2], uint32_t (&a)[4]) {
  for (int h = 0; h < 2; ++h) {
    const int64_t n = at.n + 8 * h, g = k / w.G;
    if (w.scheme == Scheme::kTwoLevel) {
      const uint8_t* s = p.w + w.group_scale(n, g);
      ptx::two_level_u8(words[h], s[0], s[1] * ptx::kOnes, a[h], a[h + 2]);
      a[h] ^= ptx::kSigns;
      a[h + 2] ^= ptx::kSigns;
    } else {
      const bool channel = w.scheme == Scheme::kChannel;
      const uint32_t z = p.w[channel ? w.channel_zero(n) : w.group_zero(n, g)];
      ptx::codes_s8(words[h], z * ptx::kOnes, a[h], a[h + 2]);
    }
  }
}

// 4 codes of token m from channel `in` of block b on.
__device__ inline uint32_t activations(const Params& p, int64_t b, int64_t m, int64_t in) {
  if (m >= p.M) return 0;
  const int64_t B8 = p.K8 / 128;
  if (b < B8) return *reinterpret_cast<const uint32_t*>(p.x8 + (b * p.M + m) * 128 + in);
  const uint8_t* codes = p.codes4 + ((b - B8) * p.M + m) * 64 + in / 2;
  return ptx::signed_nibbles(*reinterpret_cast<const uint16_t*>(codes));
}

// Scale of token m in block b, where it is not one for the whole token.
__device__ inline float block_scale(const Params& p, int64_t b, int64_t m) {
  if (p.granularity == Granularity::kToken || m >= p.M) return 1.f;
  const int64_t row = p.granularity == Granularity::kBlock ? b : b >= p.K8 / 128;
  return p.scales[row * p.M + m];
}

__device__ inline void flush(const Params& p, const layout::W4Frag& w, const Lane& at, int64_t k,
                             int32_t (&acc)[kSubtiles][4], float (&total)[kSubtiles][4]) {
  float s[2] = {1.f, 1.f};
  if (w.scheme == Scheme::kGroup)
    for (int h = 0; h < 2; ++h)
      s[h] =
          half_bits(*reinterpret_cast<const uint16_t*>(p.w + w.group_scale(at.n + 8 * h, k / w.G)));
#pragma unroll
  for (int t = 0; t < kSubtiles; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t m = at.m0 + 8 * t + 2 * at.c + i % 2;
      total[t][i] += float(acc[t][i]) * (s[i / 2] * block_scale(p, k / 128, m));
      acc[t][i] = 0;
    }
}

__device__ inline void store(const Params& p, const layout::W4Frag& w, const Lane& at,
                             const float (&total)[kSubtiles][4]) {
#pragma unroll
  for (int t = 0; t < kSubtiles; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t m = at.m0 + 8 * t + 2 * at.c + i % 2, n = at.n + i / 2 * 8;
      if (m >= p.M || n >= w.N) continue;
      float s = p.granularity == Granularity::kToken ? p.scales[m] : 1.f;
      if (w.scheme != Scheme::kGroup)
        s *= *reinterpret_cast<const float*>(p.w + w.channel_scale(n));
      const float bias = p.bias ? load_float(p.bias, n, p.dtype) : 0.f;
      store_float(p.out, m * w.N + n, p.dtype, total[t][i] * s + bias);
    }
}

// kFloat: integer sums end before K does.
template <bool kFloat>
__global__ __launch_bounds__(kThreads) void gemm(const Params p) {
  const layout::W4Frag w(p.panel);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Lane at{blockIdx.x, int64_t{blockIdx.x} * 64 + warp * 16 + lane / 4,
                int64_t{blockIdx.y} * kTokens, lane / 4, lane % 4};
  int32_t acc[kSubtiles][4] = {};
  float total[kSubtiles][4] = {};
  for (int64_t b = 0; b < w.blocks(); ++b) {
    const auto* codes = reinterpret_cast<const uint4*>(p.w + w.block(at.panel, b)) + threadIdx.x;
    const uint4 v[2] = {codes[0], codes[w.kRowBytes / 16]};
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint4 u = v[step / 2];
      const uint32_t words[2] = {step % 2 ? u.z : u.x, step % 2 ? u.w : u.y};
      const int64_t k = b * 128 + step * 32;
      uint32_t a[4];
      decode(p, w, at, k, words, a);
#pragma unroll
      for (int t = 0; t < kSubtiles; ++t) {
        const int64_t m = at.m0 + 8 * t + at.r, in = step * 32 + 4 * at.c;
        const uint32_t x[2] = {activations(p, b, m, in), activations(p, b, m, in + 16)};
        ptx::mma_m16n8k32(acc[t], a, x);
      }
      if (kFloat && (k + 32) % (w.scheme == Scheme::kGroup ? w.G : 128) == 0)
        flush(p, w, at, k, acc, total);
    }
  }
  if (!kFloat)
    for (int t = 0; t < kSubtiles; ++t)
      for (int i = 0; i < 4; ++i) total[t][i] = float(acc[t][i]);
  store(p, w, at, total);
}

inline void run(const Params& p, cudaStream_t stream) {
  const dim3 grid(unsigned(p.panel.panels()), unsigned(ceil_div(p.M, kTokens)));
  const bool whole = p.panel.scheme != Scheme::kGroup && p.granularity == Granularity::kToken;
  auto* kernel = whole ? &gemm<false> : &gemm<true>;
  kernel<<<grid, kThreads, 0, stream>>>(p);
}

}  // namespace tessella::w4ax_gemm::sm80
