// act_quant on CUDA: a thread block per token; a thread owns vectors of 8 channels.
//
// 16 neighbouring threads own a block of 128 channels, so its largest magnitude and code sum are
// shuffles among them and its codes are stored as one 128-byte line. `held` keeps the token in
// registers between the search for its largest magnitude and the quantisation, so memory is read
// once: 2 K bytes in, K (INT8) or K/2 (INT4) out. `reread` serves the rest: permuted, unaligned and
// very long tokens.
//
// A channel costs about 5 instructions: half the magnitude search (packed pairs), multiply, round
// (adding 1.5 * 2^23 leaves the integer in the low mantissa bits), half a byte permute, a quarter
// of a dot product for the code sums. README.md has the ladder.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "act_quant/params.h"

namespace tessella::act_quant {

constexpr int kBlock = 128, kVec = 8, kOwners = kBlock / kVec, kMostThreads = 512;

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
  __device__ static float2 floats(type x) { return __bfloat1622float2(x); }
};
template <>
struct Pair<__half> {
  using type = __half2;
  __device__ static float2 floats(type x) { return __half22float2(x); }
};

template <class T>
__device__ inline typename Pair<T>::type pair(const Vec& v, int i) {
  typename Pair<T>::type x;
  const uint32_t w = v.word(i);
  memcpy(&x, &w, 4);
  return x;
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

// Over the 16 threads that own a block; each gets the result.
__device__ inline uint32_t owners_max(uint32_t v) {
  for (int d = kOwners / 2; d > 0; d /= 2) v = max(v, __shfl_xor_sync(~0u, v, d));
  return v;
}
__device__ inline int owners_sum(int v) {
  for (int d = kOwners / 2; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  return v;
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

// What a thread needs to know of its token.
struct Token {
  int64_t m, B, B8;
  bool per_block;
  Scale scale8, scale4;  // of the two classes, unless per block
};

__device__ inline Token make_token(const Params& p) {
  return {
      int64_t(blockIdx.x), p.Kp / kBlock, p.K8 / kBlock, p.granularity == Granularity::kBlock, {}};
}

// Largest magnitudes of the two classes over the thread block -> scales. All threads take part.
__device__ void share_scales(const Params& p, Token& t, const uint32_t (&mine)[2]) {
  __shared__ uint32_t most[2][kMostThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const uint32_t v = __reduce_max_sync(~0u, mine[c]);
    if (lane == 0) most[c][warp] = v;
  }
  __syncthreads();
  const bool used = lane < int(blockDim.x / 32);
  if (t.B8 > 0) t.scale8 = make_scale(__reduce_max_sync(~0u, used ? most[0][lane] : 0), 127.f);
  if (t.B8 < t.B) t.scale4 = make_scale(__reduce_max_sync(~0u, used ? most[1][lane] : 0), 7.f);
  if (threadIdx.x == 0) {
    const bool token = p.granularity == Granularity::kToken;
    p.scales[t.m] = (token && t.B8 == 0 ? t.scale4 : t.scale8).scale;
    if (!token) p.scales[p.M + t.m] = t.scale4.scale;
  }
}

// Quantises and stores vector `i` of the token. All threads of a warp take part.
template <class T>
__device__ inline void emit(const Params& p, const Token& t, int64_t i, const Vec& v) {
  const int64_t b = i / kOwners;
  const int lane = int(i % kOwners);
  const bool int4 = b >= t.B8;
  Scale s = int4 ? t.scale4 : t.scale8;
  if (t.per_block) s = make_scale(owners_max(magnitude<T>(v)), int4 ? 7.f : 127.f);
  const Codes q = quantise<T>(v, s.inverse);
  const int sum = owners_sum(sum_codes(q));
  if (b >= t.B) return;
  if (int4)
    reinterpret_cast<uint32_t*>(p.codes4)[((b - t.B8) * p.M + t.m) * kOwners + lane] = nibbles(q);
  else
    reinterpret_cast<uint2*>(p.codes8)[(b * p.M + t.m) * kOwners + lane] = make_uint2(q.lo, q.hi);
  if (lane == 0) {
    p.sums[b * p.M + t.m] = sum;
    if (t.per_block) p.scales[b * p.M + t.m] = s.scale;
  }
}

template <class T, int kHeld>
__global__ void held(const Params p) {
  Token t = make_token(p);
  const auto* row = reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) + t.m * p.stride);
  const int vectors = int(p.K / kVec);
  Vec v[kHeld];
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const int i = j * blockDim.x + threadIdx.x;
    v[j].bits = i < vectors ? row[i] : make_uint4(0, 0, 0, 0);
  }
  if (!t.per_block) {
    uint32_t mine[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const bool int4 = (j * blockDim.x + threadIdx.x) / kOwners >= t.B8;
      const uint32_t bits = magnitude<T>(v[j]);
      mine[0] = max(mine[0], int4 ? 0 : bits);
      mine[1] = max(mine[1], int4 ? bits : 0);
    }
    share_scales(p, t, mine);
  }
#pragma unroll
  for (int j = 0; j < kHeld; ++j) emit<T>(p, t, int64_t(j) * blockDim.x + threadIdx.x, v[j]);
}

template <class T>
__device__ inline Vec gather(const Params& p, const T* row, int64_t k0) {
  const auto* bits = reinterpret_cast<const uint16_t*>(row);
  uint32_t w[kVec / 2] = {};
#pragma unroll
  for (int i = 0; i < kVec; ++i)
    if (k0 + i < p.K) w[i / 2] |= uint32_t(bits[p.perm ? p.perm[k0 + i] : k0 + i]) << (i % 2 * 16);
  return {make_uint4(w[0], w[1], w[2], w[3])};
}

template <class T>
__global__ void reread(const Params p) {
  Token t = make_token(p);
  const T* row = static_cast<const T*>(p.x) + t.m * p.stride;
  const int64_t vectors = t.B * kOwners, trips = ceil_div(vectors, blockDim.x);
  if (!t.per_block) {
    uint32_t mine[2] = {0, 0};
    for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x) {
      const uint32_t bits = magnitude<T>(gather(p, row, i * kVec));
      const bool int4 = i / kOwners >= t.B8;
      mine[0] = max(mine[0], int4 ? 0 : bits);
      mine[1] = max(mine[1], int4 ? bits : 0);
    }
    share_scales(p, t, mine);
  }
  for (int64_t j = 0; j < trips; ++j) {
    const int64_t i = j * blockDim.x + threadIdx.x;
    emit<T>(p, t, i, gather(p, row, i * kVec));
  }
}

template <class T, int kHeld>
static void launch_held(const Params& p, int threads, cudaStream_t stream) {
  held<T, kHeld><<<unsigned(p.M), threads, 0, stream>>>(p);
}

template <class T>
static void launch(const Params& p, cudaStream_t stream) {
  const int64_t vectors = p.Kp / kVec;
  // 16-byte loads need whole vectors in every row, all of them aligned
  const bool whole = p.perm == nullptr && p.K % kVec == 0 && p.stride % kVec == 0 &&
                     reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  if (!whole || vectors > 8 * kMostThreads) {
    const int64_t wanted = round_up(vectors, 32);
    const int threads = int(wanted < kMostThreads ? wanted : kMostThreads);
    reread<T><<<unsigned(p.M), threads, 0, stream>>>(p);
    return;
  }
  // One vector a thread where tokens are few, so that they finish soonest; up to 8 where there are
  // enough tokens to fill the GPU (about 16 warps on each of its multiprocessors) with fewer
  // threads.
  int threads = int(round_up(vectors, 32));
  while (threads > kMostThreads ||
         (threads > 64 && vectors <= 4 * threads && p.M * threads > 132 * 1024))
    threads = int(round_up(threads / 2, 32));
  switch (ceil_div(vectors, threads)) {
    case 1:
      return launch_held<T, 1>(p, threads, stream);
    case 2:
      return launch_held<T, 2>(p, threads, stream);
    case 3:
    case 4:
      return launch_held<T, 4>(p, threads, stream);
    default:
      return launch_held<T, 8>(p, threads, stream);
  }
}

int run_cuda(const Params& p, void* stream) {
  if (p.dtype == DType::kBF16) launch<__nv_bfloat16>(p, static_cast<cudaStream_t>(stream));
  if (p.dtype == DType::kF16) launch<__half>(p, static_cast<cudaStream_t>(stream));
  return int(cudaGetLastError());
}

}  // namespace tessella::act_quant
