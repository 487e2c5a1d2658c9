// Coded pages as a source of msm/sm80.cuh: codes become fp16 in registers.
//
// A code c in the low bits of 0x6400 is the fp16 number 1024 + c, so two codes take one operation
// and one more to centre them (W4A16 practice, e.g. "Who Says Elephants Can't Run", Kim et al.
// 2022). The layout of pages needs no shuffling: a 32-bit word of K is one token's channels, and of
// V four tokens of a channel, as fragments want them. With one scale a token (kFold) scales and
// zeros never meet a code: they go to the scores and the probabilities, in fp32.
#pragma once
#include "kv4/params.h"
#include "msm/sm80.cuh"

namespace tessella::kv4::dev {

using msm::dev::kGroup;
using msm::dev::kLog2e;
using msm::dev::Lane;
using msm::dev::Room;
using msm::dev::RowNumbers;
using msm::dev::Rows;

// Params with the numbers of the page that kernels need, in bytes.
struct Laid : Params {
  explicit Laid(const Params& p)
      : Params(p),
        k_group(int(p.page.k_group_bytes())),
        v_quad(int(p.page.v_quad_bytes())),
        v_codes(int(p.page.v_codes())),
        k_scales(int(p.page.k_scales())),
        k_zeros(int(p.page.k_zeros())),
        v_scales(int(p.page.v_scales())),
        v_zeros(int(p.page.v_zeros())),
        groups(int(p.page.groups())),
        k_room(int(ceil_div(p.D * p.page.k_bits, 128) * 256)),
        k_numbers(p.page.channel ? int(p.D) * 2 : groups * 32),
        bytes(p.page.bytes()) {}

  int k_group, v_quad, v_codes, k_scales, k_zeros, v_scales, v_zeros, groups;
  int k_room;     // of 16 keys in a stage: whole steps of four lanes
  int k_numbers;  // of their scales, and of their zeros
  int64_t bytes;

  // Places in a stage.
  TSL_HD int values() const { return k_room; }
  TSL_HD int value_stride() const { return v_quad + 32; }  // lanes of four quads, no bank twice
  TSL_HD int key_scales() const { return k_room + 4 * value_stride(); }
  TSL_HD int key_zeros() const { return key_scales() + k_numbers; }
  TSL_HD int value_scales() const { return key_zeros() + k_numbers; }
  TSL_HD int value_zeros() const { return value_scales() + groups * 32; }
  TSL_HD int stage() const { return value_zeros() + groups * 32; }
};

__device__ __forceinline__ uint32_t sub2(uint32_t a, uint32_t b) {
  const __half2 d = __hsub2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&d);
}
__device__ __forceinline__ uint32_t mul2(uint32_t a, uint32_t b) {
  const __half2 d = __hmul2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&d);
}
__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  const __half2 d = __hfma2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b),
                            *reinterpret_cast<__half2*>(&c));
  return *reinterpret_cast<const uint32_t*>(&d);
}

// Codes of kBits in a word; `part` of a byte. The middle of their range is subtracted, or nothing.
template <int kBits>
struct Codes {
  static constexpr int kParts = 8 / kBits, kMiddle = 1 << (kBits - 1);

  // Bytes 0 and 2 of the word, or 1 and 3, as two fp16 numbers less `kLess`.
  template <int kLess>
  static __device__ __forceinline__ uint32_t pair(uint32_t word, int part, bool odd) {
    constexpr uint32_t kMagic = 0x64006400u;
    if constexpr (kBits == 8) {
      return sub2(__byte_perm(word, kMagic, odd ? 0x7371 : 0x7270), (0x6400u + kLess) * 0x10001u);
    } else if constexpr (kBits == 4) {
      const uint32_t w = odd ? word >> 8 : word;
      if (part == 0)
        return sub2(ptx::mask_or(w, 0x000f000fu, kMagic), (0x6400u + kLess) * 0x10001u);
      // 1024 + 16 c, of which a sixteenth is 64 + c
      constexpr uint32_t kOffset = kLess == 0 ? 0xd400d400u : 0xd480d480u;  // -64, -72
      return fma2(ptx::mask_or(w, 0x00f000f0u, kMagic), 0x2c002c00u, kOffset);
    } else {
      const uint32_t w = word >> (2 * part + (odd ? 8 : 0));
      return sub2(ptx::mask_or(w, 0x00030003u, kMagic), (0x6400u + kLess) * 0x10001u);
    }
  }
};

// x [block] @ fold of the request's row; x lies in the lanes, `room` holds kD numbers.
template <int kNumbers>
__device__ inline void apply(const Fold& fold, int64_t at, int64_t D, float* room,
                             float (&x)[kNumbers]) {
  if (fold.at == nullptr) return;
  const int lane = threadIdx.x % 32, m = int(fold.m);
  const float* f = fold.at + at * D * m;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kNumbers; ++i) room[lane + 32 * i] = x[i];
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kNumbers; ++i) {
    const int d = lane + 32 * i, base = d / m * m;
    float sum = 0.f;
    if (d < D)
#pragma unroll 8
      for (int e = 0; e < m; ++e) sum += room[base + e] * f[int64_t{base + e} * m + (d - base)];
    x[i] = sum;
  }
}

__device__ inline float sum_of_warp(float x) {
#pragma unroll
  for (int by = 1; by < 32; by *= 2) x += __shfl_xor_sync(~0u, x, by);
  return x;
}

// kBits of keys and values, 0: any, with scales of any shape; else one scale a token.
template <int kBits, int kHead, int kEights>
struct Coded {
  using Problem = Laid;
  static constexpr DType kType = DType::kF16;
  static constexpr bool kFold = kBits > 0;
  static constexpr int kD = kHead, kTiles = kEights;
  static constexpr int kStages = kBits == 4 ? (kHead > 128 ? 4 : 5) : 3;
  static constexpr int kBlocks = kEights > 2 ? 2 : kFold&& kHead <= 128 && kEights == 1 ? 4 : 2;
  static constexpr bool kKeep = kD * kTiles < 512;

  const Laid& p;
  uint2 q[kKeep ? kD / 16 : 1][kKeep ? kTiles : 1];

  __device__ explicit Coded(const Laid& problem) : p(problem) {}

  __device__ int k_bits() const { return kFold ? kBits : p.page.k_bits; }
  __device__ int v_bits() const { return kFold ? kBits : p.page.v_bits; }

  // --- how channels and keys lie in fragments
  static __device__ int key(const Lane& at, int half) { return 2 * at.r + half; }
  __device__ int channel_of(int k, int c, int e) const {
    const int n = 8 / k_bits();
    return 4 * n * (4 * (k / n) + c) + 4 * (k % n) + e % 2 * 2 + e / 2;
  }
  __device__ int channel_out(int m, int half, int r) const {
    const int bits = v_bits();
    if (bits == 8) return 16 * m + 2 * r + half;
    if (bits == 4) return m / 2 * 32 + 16 * half + 2 * r + m % 2;
    return m / 4 * 64 + m % 2 * 32 + 16 * half + 2 * r + m / 2 % 2;
  }

  // --- queries and results
  __device__ RowNumbers query(char* ring, const Rows& rows, int warp, float (&x)[kD / 32]) const {
    const int lane = threadIdx.x % 32;
    const int64_t at = p.factor_row(rows.request) * p.J + rows.j;
    float bias = 0.f;
    if (p.k_mean != nullptr) {
#pragma unroll
      for (int i = 0; i < kD / 32; ++i)
        if (lane + 32 * i < p.D) bias += x[i] * p.k_mean[at * p.D + lane + 32 * i];
      bias = sum_of_warp(bias);
    }
    apply(p.q_fold, at, p.D, reinterpret_cast<float*>(ring) + warp * kD, x);
    const int exponent = into_half_range(x);
    const float scale = p.scale * kLog2e;
    const float factor = exp2f(float(exponent)) * scale;
    return {factor, bias * scale, factor};
  }
  __device__ void result(float* room, const Rows& rows, int warp, float (&x)[kD / 32]) const {
    apply(p.o_fold, p.factor_row(rows.request) * p.J + rows.j, p.D, room + warp * kD, x);
  }
  __device__ void keep_queries(const uint2* fragments) {
    if constexpr (kKeep) {
#pragma unroll
      for (int k = 0; k < kD / 16; ++k)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
          q[k][n] = fragments[(k * kTiles + n) * 32 + threadIdx.x % 32];
    }
  }
  __device__ __forceinline__ uint2 query_at(const uint2* fragments, int k, int n) const {
    if constexpr (kKeep) return q[k][n];
    return fragments[(k * kTiles + n) * 32 + threadIdx.x % 32];
  }

  // --- copies
  __device__ bool uses_ring() const { return p.q_fold.at != nullptr; }
  __device__ int dim() const { return kFold ? kD : int(p.D); }

  // `rows` rows of `cols` pieces of 16 bytes that lie one after another, `skip` bytes between them.
  __device__ void copy_rows(uint32_t to, const uint8_t* from, int rows, int cols, int skip) const {
    for (int i = threadIdx.x % 32; i < rows * cols; i += 32)
      ptx::copy16(to + i * 16 + i / cols * skip, from + i * 16);
  }
  template <int kPieces, int kCols>
  __device__ __forceinline__ void copy_fixed(uint32_t to, const uint8_t* from) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kPieces / 32; ++k) {
      const int i = lane + 32 * k;
      ptx::copy16(to + i * 16 + i / kCols * 32, from + i * 16);
    }
  }
  __device__ __forceinline__ void copy(uint32_t stage, int page, int in, const Rows& rows,
                                       int) const {
    const int lane = threadIdx.x % 32, t = in * kGroup;
    const uint8_t* blob = p.pages + (int64_t{page} * p.J + rows.j) * p.bytes;
    const uint8_t* keys = blob + in * p.k_group;
    const uint8_t* values = blob + p.v_codes + in * 4 * p.v_quad;
    if constexpr (kFold) {
      constexpr int kPieces = kHead * kBits / 8;
      copy_fixed<kPieces, 1 << 20>(stage, keys);
      copy_fixed<kPieces, (kPieces > 4 ? kPieces / 4 : 1)>(stage + p.values(), values);
    } else {
      copy_rows(stage, keys, 1, p.k_group / 16, 0);
      copy_rows(stage + p.values(), values, 4, p.v_quad / 16, 32);
    }
    const int g = lane / 8, part = lane / 2 % 4, half = lane % 2 * 16;
    if (kFold) {
      if (lane < 8) {
        const int from = part == 0   ? p.k_scales
                         : part == 1 ? p.k_zeros
                         : part == 2 ? p.v_scales
                                     : p.v_zeros;
        ptx::copy16(stage + p.key_scales() + lane * 16, blob + from + t * 2 + half);
      }
      return;
    }
    for (int at = g; at < p.groups; at += 4) {
      if (part < 2 && p.page.channel) continue;
      const int from = part == 0   ? p.k_scales
                       : part == 1 ? p.k_zeros
                       : part == 2 ? p.v_scales
                                   : p.v_zeros;
      const int to = part == 0   ? p.key_scales()
                     : part == 1 ? p.key_zeros()
                     : part == 2 ? p.value_scales()
                                 : p.value_zeros();
      ptx::copy16(stage + to + at * 32 + half, blob + from + (at * int(p.Z) + t) * 2 + half);
    }
    if (p.page.channel) {
      for (int i = lane; i < int(p.D) / 8; i += 32) {
        ptx::copy16(stage + p.key_scales() + i * 16, blob + p.k_scales + i * 16);
        ptx::copy16(stage + p.key_zeros() + i * 16, blob + p.k_zeros + i * 16);
      }
    }
  }

  // --- scores
  // Codes -> numbers: pairs of channels ch and ch + 2 of the tokens 2 r and 2 r + 1.
  __device__ void real_keys(uint32_t stage, int ch, bool odd, const Lane& at, uint32_t& first,
                            uint32_t& second) const {
    const uint32_t s = stage + p.key_scales(), z = stage + p.key_zeros();
    if (ch >= p.D) {
      first = second = 0;
      return;
    }
    if (p.page.channel) {
      const uint2 sv = ptx::load_shared8(s + ch * 2), zv = ptx::load_shared8(z + ch * 2);
      const int pick = odd ? 0x7632 : 0x5410;
      const uint32_t s2 = __byte_perm(sv.x, sv.y, pick), z2 = __byte_perm(zv.x, zv.y, pick);
      first = mul2(sub2(first, z2), s2);
      second = mul2(sub2(second, z2), s2);
      return;
    }
    const int where = ch / int(p.page.G) * 32 + at.r * 4;
    const uint32_t sv = ptx::load_shared4(s + where), zv = ptx::load_shared4(z + where);
    first = mul2(sub2(first, __byte_perm(zv, 0, 0x1010)), __byte_perm(sv, 0, 0x1010));
    second = mul2(sub2(second, __byte_perm(zv, 0, 0x3232)), __byte_perm(sv, 0, 0x3232));
  }

  template <int kB>
  __device__ __forceinline__ void score_codes(uint32_t stage, const uint2* fragments,
                                              float (&x)[kTiles][4]) const {
    using C = Codes<kB>;
    const Lane at;
    const uint32_t from = stage + at.c * 64 + at.r * 8;
    float y[kTiles][4] = {};  // a second chain of sums
#pragma unroll
    for (int i = 0; i < kD / 16 / C::kParts; ++i) {
      if (!kFold && i * 16 * C::kParts >= dim()) break;
      const uint2 w = ptx::load_shared8(from + i * 256);
#pragma unroll
      for (int part = 0; part < C::kParts; ++part) {
        constexpr int kLess = kFold ? C::kMiddle : 0;
        uint32_t a[4];
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          a[2 * odd] = C::template pair<kLess>(w.x, part, odd);
          a[2 * odd + 1] = C::template pair<kLess>(w.y, part, odd);
          if (!kFold)
            real_keys(stage, 4 * C::kParts * (4 * i + at.c) + 4 * part, odd, at, a[2 * odd],
                      a[2 * odd + 1]);
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const uint2 b = query_at(fragments, i * C::kParts + part, n);
          ptx::F16Product::multiply((i + part) % 2 && kTiles < 4 ? y[n] : x[n], a, b.x, b.y);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] += kTiles < 4 ? y[n][i] : 0.f;
  }

  // Keys that are not coded yet: a page per channel is coded when it is full.
  __device__ bool score_tail(const uint2* fragments, const Rows& rows, int key0,
                             float (&x)[kTiles][4]) const {
    const int Z = int(p.Z), kv = int(p.kv_len[rows.request]);
    if (kFold || !p.page.channel || key0 < kv / Z * Z) return false;
    const Lane at;
    const int64_t row = (int64_t{p.tail_row[rows.request]} * p.J + rows.j) * Z;
    for (int k = 0; k < kD / 16; ++k) {
      uint32_t a[4];
      for (int i = 0; i < 4; ++i) {
        float v[2];
        for (int e = 0; e < 2; ++e) {
          const int key = key0 + 2 * at.r + i % 2, ch = channel_of(k, at.c, i / 2 * 2 + e);
          const bool there = key < kv && ch < p.D;
          const int64_t from = (row + key % Z) * p.D + ch;
          v[e] = !there                        ? 0.f
                 : p.tail_dtype == DType::kF32 ? static_cast<const float*>(p.k_tail)[from]
                                               : load_float(p.k_tail, from, p.tail_dtype);
        }
        a[i] = pack2(v[0], v[1], kType);
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const uint2 b = fragments[(k * kTiles + n) * 32 + at.lane];
        ptx::F16Product::multiply(x[n], a, b.x, b.y);
      }
    }
    return true;
  }

  __device__ void score(uint32_t stage, const uint2* fragments, const Rows& rows, int key0,
                        float (&x)[kTiles][4]) const {
    if constexpr (kFold) {
      score_codes<kBits>(stage, fragments, x);
    } else {
      if (score_tail(fragments, rows, key0, x)) return;
      if (p.page.k_bits == 8) score_codes<8>(stage, fragments, x);
      if (p.page.k_bits == 4) score_codes<4>(stage, fragments, x);
      if (p.page.k_bits == 2) score_codes<2>(stage, fragments, x);
    }
  }

  __device__ bool scale_scores(uint32_t stage, const Room<Coded>& room, float (&x)[kTiles][4],
                               float (&over)[2]) const {
    const Lane at;
    float s[2] = {1.f, 1.f}, z[2] = {0.f, 0.f};
    bool up = false;
    if constexpr (kFold) {
      const uint32_t from = stage + p.key_scales() + at.r * 4;
      const uint32_t sv = ptx::load_shared4(from), zv = ptx::load_shared4(from + 32);
      const uint32_t vs = ptx::load_shared4(from + 64);
      constexpr float kMiddle = float(1 << (kFold ? kBits - 1 : 0));
      s[0] = half_bits(sv & 0xffff), s[1] = half_bits(sv >> 16);
      z[0] = half_bits(zv & 0xffff) - kMiddle, z[1] = half_bits(zv >> 16) - kMiddle;
      // probabilities times the scales of V must stay in the range of fp16
      for (int h = 0; h < 2; ++h) {
        const float v = half_bits(h ? vs >> 16 : vs & 0xffff);
        if (v > 128.f) over[h] = log2f(v) - 7.f, up = true;
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int row = n * 8 + 2 * at.c;
      const float2 by = *reinterpret_cast<const float2*>(room.scale + row);
      const float2 sum = *reinterpret_cast<const float2*>(room.sum + row);
      const float2 bias = *reinterpret_cast<const float2*>(room.bias + row);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float b = i % 2 ? by.y : by.x, t = i % 2 ? sum.y : sum.x;
        x[n][i] = (b * x[n][i] - z[i / 2] * t) * s[i / 2] + (i % 2 ? bias.y : bias.x);
      }
    }
    return up;
  }

  // --- totals
  __device__ void weights(uint32_t stage, const float (&x)[kTiles][4], float (&lost)[kTiles][2],
                          uint32_t (&w)[kTiles][2]) const {
    const Lane at;
    float s[2] = {1.f, 1.f}, z[2] = {0.f, 0.f};
    if constexpr (kFold) {
      const uint32_t from = stage + p.value_scales() + at.r * 4;
      const uint32_t sv = ptx::load_shared4(from), zv = ptx::load_shared4(from + 32);
      constexpr float kMiddle = float(1 << (kFold ? kBits - 1 : 0));
      s[0] = half_bits(sv & 0xffff), s[1] = half_bits(sv >> 16);
      z[0] = half_bits(zv & 0xffff) - kMiddle, z[1] = half_bits(zv >> 16) - kMiddle;
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // what is not seen may have any scale
        const float a = x[n][2 * h] > 0.f ? x[n][2 * h] * s[h] : 0.f;
        const float b = x[n][2 * h + 1] > 0.f ? x[n][2 * h + 1] * s[h] : 0.f;
        w[n][h] = pack2(a, b, DType::kF16);
        if constexpr (kFold) {  // zeros by the probabilities as they were rounded
          lost[n][0] += a > 0.f || a != a ? half_bits(w[n][h] & 0xffff) * z[h] : 0.f;
          lost[n][1] += b > 0.f || b != b ? half_bits(w[n][h] >> 16) * z[h] : 0.f;
        }
      }
  }

  // Codes -> numbers of the tokens 4 c.. of a channel: pairs {0, 2} and {1, 3}.
  __device__ void real_values(uint32_t stage, int channel, int there, const Lane& at,
                              uint32_t& even, uint32_t& odd) const {
    int g = channel / int(p.page.G);
    g = g < p.groups ? g : p.groups - 1;
    const int where = g * 32 + at.c * 8;
    uint2 s = ptx::load_shared8(stage + p.value_scales() + where);
    uint2 z = ptx::load_shared8(stage + p.value_zeros() + where);
    for (int i = 0; i < 4; ++i)
      if (4 * at.c + i >= there) {  // may be anything
        const uint32_t keep = i % 2 ? 0x0000ffffu : 0xffff0000u;
        (i < 2 ? s.x : s.y) &= keep;
        (i < 2 ? z.x : z.y) &= keep;
      }
    even = mul2(sub2(even, __byte_perm(z.x, z.y, 0x5410)), __byte_perm(s.x, s.y, 0x5410));
    odd = mul2(sub2(odd, __byte_perm(z.x, z.y, 0x7632)), __byte_perm(s.x, s.y, 0x7632));
  }

  template <int kB>
  __device__ void weigh_codes(uint32_t stage, const uint32_t (&w)[kTiles][2], int there,
                              float (&o)[kD / 16][kTiles][4]) const {
    using C = Codes<kB>;
    constexpr int kLess = kFold ? C::kMiddle : 0, kM = C::kParts == 1 ? 1 : C::kParts;
    const Lane at;
    const uint32_t from = stage + p.values() + at.c * p.value_stride() + at.r * 8;
#pragma unroll
    for (int s = 0; s < kD / 16 / kM; ++s) {
      if (!kFold && s * 16 * kM >= dim()) break;
      const uint2 v = ptx::load_shared8(from + s * 64);
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        // rows r and r + 8 of this product: words and parts of a byte
        const uint32_t one = kB == 8 || i / (kM / 2 > 0 ? kM / 2 : 1) == 0 ? v.x : v.y;
        const uint32_t two = kB == 8 ? v.y : one;
        const int part = kB == 8 ? 0 : 2 * (i % (kM / 2 > 0 ? kM / 2 : 1));
        uint32_t a[4];
        a[0] = C::template pair<kLess>(one, part, false);
        a[1] = C::template pair<kLess>(two, kB == 8 ? 0 : part + 1, false);
        a[2] = C::template pair<kLess>(one, part, true);
        a[3] = C::template pair<kLess>(two, kB == 8 ? 0 : part + 1, true);
        if (!kFold) {
          const int m = s * kM + i;
          real_values(stage, channel_out(m, 0, at.r), there, at, a[0], a[2]);
          real_values(stage, channel_out(m, 1, at.r), there, at, a[1], a[3]);
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
          ptx::F16Product::multiply(o[s * kM + i][n], a, w[n][0], w[n][1]);
      }
    }
  }
  __device__ void weigh(uint32_t stage, const uint32_t (&w)[kTiles][2], int there,
                        float (&o)[kD / 16][kTiles][4]) const {
    if constexpr (kFold) {
      weigh_codes<kBits>(stage, w, there, o);
    } else {
      if (p.page.v_bits == 8) weigh_codes<8>(stage, w, there, o);
      if (p.page.v_bits == 4) weigh_codes<4>(stage, w, there, o);
      if (p.page.v_bits == 2) weigh_codes<2>(stage, w, there, o);
    }
  }
};

}  // namespace tessella::kv4::dev
