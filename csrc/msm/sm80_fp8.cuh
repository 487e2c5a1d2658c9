// Pages of E4M3 numbers as a source of sm80.cuh: they become fp16 in registers, which holds each of
// them exactly. Layout as that of 16-bit pages, so a scale, where a cache needs one, belongs into
// the queries and the results.
#pragma once
#include "msm/sm80.cuh"

namespace tessella::msm::dev {

// kExact: the head dim is kHead, else less or equal.
template <int kHead, int kEights, bool kExact>
struct Eights {
  using Problem = Params;
  static constexpr DType kType = DType::kF16;
  static constexpr int kD = kHead, kTiles = kEights, kStages = kHead > 128 ? 4 : 5;
  static constexpr int kBlocks = kHead > 128 ? 1 : 2;
  static constexpr bool kKeep = kD * kTiles < 512;  // queries stay in registers

  const Params& p;
  uint2 q[kKeep ? kD / 16 : 1][kKeep ? kTiles : 1];

  __device__ explicit Eights(const Params& problem) : p(problem) {}
  static int stage_bytes(const Params& p) { return 2 * kGroup * int(p.D + 16); }

  // --- how channels and keys lie in fragments: a word is four channels of a key
  static __device__ int key(const Lane& at, int half) { return at.r + 8 * half; }
  __device__ int channel_of(int k, int c, int e) const { return 16 * k + 4 * c + e; }
  __device__ int channel_out(int m, int half, int r) const { return 16 * m + 2 * r + half; }

  __device__ RowNumbers query(char*, const Rows&, int, float (&x)[kD / 32]) const {
    const int exponent = into_half_range(x);
    const float factor = exp2f(float(exponent)) * p.scale * kLog2e;
    return {factor, 0.f, factor};
  }
  __device__ void result(float*, const Rows&, int, float (&)[kD / 32]) const {}
  __device__ void keep_queries(const uint2* fragments) {
    if constexpr (kKeep)
      for (int k = 0; k < kD / 16; ++k)
        for (int n = 0; n < kTiles; ++n)
          q[k][n] = fragments[(k * kTiles + n) * 32 + threadIdx.x % 32];
  }

  __device__ int dim() const { return kExact ? kD : int(p.D); }
  __device__ bool uses_ring() const { return false; }

  // --- a stage: 16 keys, then 16 values, each in a row of D + 16 bytes
  template <bool kWhole>
  __device__ __forceinline__ void copy_rows(uint32_t to, const char* from, int there) const {
    const int lane = threadIdx.x % 32, cols = dim() / 16;
#pragma unroll
    for (int k = 0; k < kD / 32; ++k) {
      const int i = lane + 32 * k, row = i / cols;
      if (!kExact && i >= kGroup * cols) break;
      if (kWhole)
        ptx::copy16(to + i * 16 + row * 16, from + i * 16);
      else
        ptx::copy16(to + i * 16 + row * 16, from + i * 16, row < there);
    }
  }
  __device__ __forceinline__ void copy(uint32_t stage, int page, int in, const Rows& rows,
                                       int there) const {
    const int64_t at = (int64_t{page} * p.J + rows.j) * 2 * p.Z + in * kGroup;
    const char* from = static_cast<const char*>(p.pages) + at * dim();
    const uint32_t half = kGroup * uint32_t(dim() + 16);
    const char* values = from + p.Z * dim();
    if (there >= kGroup) {
      copy_rows<true>(stage, from, there);
      copy_rows<true>(stage + half, values, there);
    } else {
      copy_rows<false>(stage, from, there);
      copy_rows<false>(stage + half, values, there);
    }
  }

  __device__ __forceinline__ void score(uint32_t stage, const uint2* fragments, const Rows&, int,
                                        float (&x)[kTiles][4]) const {
    const Lane at;
    const uint32_t stride = dim() + 16, from = stage + at.r * stride + at.c * 4;
    float y[kTiles][4] = {};  // a second chain of sums
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      if (!kExact && 16 * k >= dim()) break;
      const uint32_t one = ptx::load_shared4(from + 16 * k);
      const uint32_t two = ptx::load_shared4(from + 8 * stride + 16 * k);
      const uint32_t a[4] = {halves_of_e4m3(one), halves_of_e4m3(two), halves_of_e4m3(one >> 16),
                             halves_of_e4m3(two >> 16)};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const uint2 b =
            kKeep ? q[kKeep ? k : 0][kKeep ? n : 0] : fragments[(k * kTiles + n) * 32 + at.lane];
        ptx::F16Product::multiply(k % 2 && kTiles < 4 ? y[n] : x[n], a, b.x, b.y);
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] += kTiles < 4 ? y[n][i] : 0.f;
  }
  __device__ bool scale_scores(uint32_t, const Room<Eights>& room, float (&x)[kTiles][4],
                               float (&)[2]) const {
    const Lane at;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float2 by = *reinterpret_cast<const float2*>(room.scale + n * 8 + 2 * at.c);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] *= i % 2 ? by.y : by.x;
    }
    return false;
  }
  __device__ void weights(uint32_t, const float (&x)[kTiles][4], float (&)[kTiles][2],
                          uint32_t (&w)[kTiles][2]) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      w[n][0] = pack2(x[n][0], x[n][1], kType);
      w[n][1] = pack2(x[n][2], x[n][3], kType);
    }
  }
  // Transposed as 16-bit words: each has two channels of a key, and a lane two keys of them.
  __device__ void weigh(uint32_t stage, const uint32_t (&w)[kTiles][2], int,
                        float (&o)[kD / 16][kTiles][4]) const {
    const int lane = threadIdx.x % 32;
    const uint32_t stride = dim() + 16, from = stage + (kGroup + lane % 16) * stride;
#pragma unroll
    for (int m = 0; m < kD / 16; m += 2) {
      if (!kExact && 16 * m >= dim()) break;
      // the second pair of matrices is of the next 16 channels, or, where there are none, no matter
      uint32_t v[4];
      ptx::load_transposed(v, from + 16 * m + (kExact || 16 * m + 16 < dim() ? lane / 16 * 16 : 0));
#pragma unroll
      for (int i = 0; i < 2 && m + i < kD / 16; ++i) {
        if (!kExact && 16 * (m + i) >= dim()) break;
        const uint32_t one = __byte_perm(v[2 * i], 0, 0x3120);
        const uint32_t two = __byte_perm(v[2 * i + 1], 0, 0x3120);
        const uint32_t a[4] = {halves_of_e4m3(one), halves_of_e4m3(one >> 16), halves_of_e4m3(two),
                               halves_of_e4m3(two >> 16)};
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
          ptx::F16Product::multiply(o[m + i][n], a, w[n][0], w[n][1]);
      }
    }
  }
};

}  // namespace tessella::msm::dev
