// Vectors of 8 channels in a 16-bit float type: what a thread loads with 128 bits.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace tessella {

constexpr int kVec = 8;

// 8 channels as they came, in words of two.
struct Vec {
  uint4 bits;

  __device__ uint32_t word(int i) const {
    return i == 0 ? bits.x : i == 1 ? bits.y : i == 2 ? bits.z : bits.w;
  }
};

template <class T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  // Two instructions; the library's conversion takes three.
  __device__ static float2 floats(type x) {
    uint32_t w;
    memcpy(&w, &x, 4);
    return {__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u)};
  }
  __device__ static type rounded(float x, float y) { return __floats2bfloat162_rn(x, y); }
};
template <>
struct Pair<__half> {
  using type = __half2;
  __device__ static float2 floats(type x) { return __half22float2(x); }
  __device__ static type rounded(float x, float y) { return __floats2half2_rn(x, y); }
};

template <class T>
using PairOf = typename Pair<T>::type;

template <class T>
__device__ inline PairOf<T> pair_of(uint32_t w) {
  PairOf<T> x;
  memcpy(&x, &w, 4);
  return x;
}
template <class T>
__device__ inline PairOf<T> pair(const Vec& v, int i) {
  return pair_of<T>(v.word(i));
}
template <class X>
__device__ inline uint32_t word_of(X x) {
  uint32_t w;
  memcpy(&w, &x, 4);
  return w;
}

// f(pair, pair) -> pair on all pairs of two vectors.
template <class T, class F>
__device__ inline Vec zip(const Vec& a, const Vec& b, const F& f) {
  uint32_t w[kVec / 2];
#pragma unroll
  for (int i = 0; i < kVec / 2; ++i) w[i] = word_of(f(pair<T>(a, i), pair<T>(b, i)));
  return {make_uint4(w[0], w[1], w[2], w[3])};
}

__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

// Bits of the largest magnitude as fp32; NaN wins over all.
template <class T>
__device__ inline uint32_t magnitude(const Vec& v) {
  auto most = __habs2(pair<T>(v, 0));
#pragma unroll
  for (int i = 1; i < kVec / 2; ++i) most = __hmax2_nan(most, __habs2(pair<T>(v, i)));
  return __float_as_uint(to_float(__hmax_nan(most.x, most.y)));
}

// Codes of 8 channels, a byte each.
struct Codes {
  uint32_t lo, hi;
};
template <class T>
__device__ inline Codes quantise(const Vec& v, float inverse) {
  if (inverse == 0.f) return {0, 0};  // also where a channel is inf or NaN
  uint32_t q[kVec];
#pragma unroll
  for (int i = 0; i < kVec / 2; ++i) {
    const float2 x = Pair<T>::floats(pair<T>(v, i));
    q[2 * i] = __float_as_uint(__fadd_rn(__fmul_rn(x.x, inverse), 12582912.f));
    q[2 * i + 1] = __float_as_uint(__fadd_rn(__fmul_rn(x.y, inverse), 12582912.f));
  }
  auto bytes = [&](int i) {
    return __byte_perm(__byte_perm(q[i], q[i + 1], 0x0040), __byte_perm(q[i + 2], q[i + 3], 0x0040),
                       0x5410);
  };
  return {bytes(0), bytes(4)};
}
__device__ inline int sum_codes(Codes c) {
  return __dp4a(int(c.lo), 0x01010101, __dp4a(int(c.hi), 0x01010101, 0));
}
// The low nibbles of 8 bytes, first in the lowest.
__device__ inline uint32_t nibbles(Codes c) {
  const uint32_t lo = c.lo & 0x0f0f0f0f, hi = c.hi & 0x0f0f0f0f;
  return __byte_perm(lo | lo >> 4, hi | hi >> 4, 0x6420);
}

}  // namespace tessella
