// Pages of E4M3 numbers as a source of sm80.cuh: they become fp16 in registers, which holds each of
// them exactly. Layout as that of 16-bit pages, so a scale, where a cache needs one, belongs into
// the queries and the results.
#pragma once
#include "msm/sm80.cuh"

namespace tessella::msm::dev {

// kExact: the head dim is kHead, else less or equal.
template <int kHead, int kEights, bool kExact>
struct Eights : Numbers<kHead, kEights, kExact, 1> {
  using Base = Numbers<kHead, kEights, kExact, 1>;
  using Base::Base, Base::dim, Base::kD, Base::kKeep, Base::kTiles, Base::p, Base::q;
  static constexpr DType kType = DType::kF16;
  static constexpr int kStages = kHead > 128 ? 4 : 5, kBlocks = kHead > 128 ? 1 : 2;

  // --- how channels lie in fragments: a word is four channels of a key
  __device__ int channel_of(int k, int c, int e) const { return 16 * k + 4 * c + e; }
  __device__ int channel_out(int m, int half, int r) const { return 16 * m + 2 * r + half; }

  __device__ RowNumbers query(char*, const Rows&, int, float (&x)[kD / 32]) const {
    const int exponent = into_half_range(x);
    const float factor = exp2f(float(exponent)) * p.scale * kLog2e;
    return {factor, 0.f, factor};
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
