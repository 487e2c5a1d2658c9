// act_quant on CUDA: one thread block per token, 8 channels a thread, 16 threads a 128-channel
// block.
//
// A half-warp owns a block of 128 channels at a time, so the block's largest magnitude and code
// sum are half-warp shuffles and its codes are stored as one 128-byte line. The row is read twice:
// the second read hits L1. Bytes moved: 2 K read and K (INT8) or K/2 (INT4) written a token, so the
// kernel is memory-bound from a few hundred tokens up and launch-bound below.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "act_quant/params.h"

namespace tessella::act_quant {

constexpr int kBlock = 128, kVec = 8, kOwners = kBlock / kVec;

__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

// 8 channels from k0 of a row as fp32; channels past K are 0.
template <class T, bool kVector>
__device__ void load(const Params& p, const T* row, int64_t k0, float (&x)[kVec]) {
  if constexpr (kVector) {
    union {
      uint4 bits;
      T values[kVec];
    } v;
    v.bits = make_uint4(0, 0, 0, 0);
    if (k0 < p.K) v.bits = *reinterpret_cast<const uint4*>(row + k0);
    for (int i = 0; i < kVec; ++i) x[i] = to_float(v.values[i]);
  } else {
    for (int i = 0; i < kVec; ++i)
      x[i] = k0 + i < p.K ? to_float(row[p.perm ? p.perm[k0 + i] : k0 + i]) : 0.f;
  }
}

__device__ inline uint32_t magnitude(const float (&x)[kVec]) {
  uint32_t most = 0;
  for (int i = 0; i < kVec; ++i) most = max(most, __float_as_uint(x[i]) & 0x7fffffffu);
  return most;
}

// Over the 16 lanes that own a block; every lane gets the result.
__device__ inline uint32_t owners_max(uint32_t v) {
  for (int d = kOwners / 2; d > 0; d /= 2) v = max(v, __shfl_xor_sync(~0u, v, d));
  return v;
}
__device__ inline int owners_sum(int v) {
  for (int d = kOwners / 2; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  return v;
}

// Quantises 8 channels; returns the sum of their codes.
__device__ inline int quantise(const float (&x)[kVec], float inverse, int (&q)[kVec]) {
  int sum = 0;
  for (int i = 0; i < kVec; ++i) {
    // inverse 0 asks for zeros, also where x is inf or NaN
    q[i] = inverse == 0.f ? 0 : __float2int_rn(__fmul_rn(x[i], inverse));
    sum += q[i];
  }
  return sum;
}

__device__ inline void store8(int8_t* to, const int (&q)[kVec]) {
  uint32_t w[2] = {0, 0};
  for (int i = 0; i < kVec; ++i) w[i / 4] |= (uint32_t(q[i]) & 255u) << (i % 4 * 8);
  *reinterpret_cast<uint2*>(to) = make_uint2(w[0], w[1]);
}
__device__ inline void store4(uint8_t* to, const int (&q)[kVec]) {
  uint32_t w = 0;
  for (int i = 0; i < kVec; ++i) w |= (uint32_t(q[i]) & 15u) << (i * 4);
  *reinterpret_cast<uint32_t*>(to) = w;
}

__device__ inline Scale exact_scale(uint32_t amax_bits, float qmax) {
  const Scale s = make_scale(amax_bits, qmax);
  if (s.inverse == 0.f) return s;
  const float amax = __uint_as_float(amax_bits);
  return {__fdiv_rn(amax, qmax), __fdiv_rn(qmax, amax)};
}

template <class T, bool kVector>
__global__ void quantise_rows(const Params p) {
  const int64_t m = blockIdx.x, B = p.Kp / kBlock, B8 = p.K8 / kBlock;
  const T* row = static_cast<const T*>(p.x) + m * p.stride;
  const int lane = threadIdx.x % kOwners, owner = threadIdx.x / kOwners;
  const int owners = blockDim.x / kOwners;
  // All 32 lanes of a warp must reach the shuffles, so the trip count is the same for both halves.
  const int64_t trips = ceil_div(B, owners);
  const bool per_block = p.granularity == Granularity::kBlock;
  __shared__ uint32_t most[2];
  Scale scale[2] = {};
  float x[kVec];
  if (!per_block) {
    if (threadIdx.x < 2) most[threadIdx.x] = 0;
    __syncthreads();
    uint32_t mine[2] = {0, 0};
    for (int64_t i = 0; i < trips; ++i) {
      const int64_t b = i * owners + owner;
      if (b >= B) continue;
      load<T, kVector>(p, row, b * kBlock + lane * kVec, x);
      uint32_t& c = mine[b >= B8];
      c = max(c, magnitude(x));
    }
    for (int c = 0; c < 2; ++c) {
      const uint32_t v = __reduce_max_sync(~0u, mine[c]);
      if (threadIdx.x % 32 == 0 && v > 0) atomicMax(&most[c], v);
    }
    __syncthreads();
    scale[0] = exact_scale(most[0], 127.f);
    scale[1] = exact_scale(most[1], 7.f);
    if (threadIdx.x == 0) {
      const bool token = p.granularity == Granularity::kToken;
      p.scales[m] = scale[token && B8 == 0].scale;
      if (!token) p.scales[p.M + m] = scale[1].scale;
    }
  }
  for (int64_t i = 0; i < trips; ++i) {
    const int64_t b = i * owners + owner;
    const bool live = b < B, int4 = b >= B8;
    for (float& v : x) v = 0.f;
    if (live) load<T, kVector>(p, row, b * kBlock + lane * kVec, x);
    Scale s = scale[int4];
    if (per_block) s = exact_scale(owners_max(magnitude(x)), int4 ? 7.f : 127.f);
    int q[kVec];
    const int sum = owners_sum(quantise(x, s.inverse, q));
    if (!live) continue;
    if (int4)
      store4(p.codes4 + ((b - B8) * p.M + m) * (kBlock / 2) + lane * (kVec / 2), q);
    else
      store8(p.codes8 + (b * p.M + m) * kBlock + lane * kVec, q);
    if (lane == 0) {
      p.sums[b * p.M + m] = sum;
      if (per_block) p.scales[b * p.M + m] = s.scale;
    }
  }
}

template <class T>
static void launch(const Params& p, cudaStream_t stream) {
  // 16-byte loads need whole vectors in every row, all of them aligned
  const bool vector = p.perm == nullptr && p.K % kVec == 0 && p.stride % kVec == 0 &&
                      reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  const int64_t wanted = round_up(p.Kp / kVec, 32);
  const int threads = int(wanted < 512 ? wanted : 512);
  auto* kernel = vector ? &quantise_rows<T, true> : &quantise_rows<T, false>;
  kernel<<<unsigned(p.M), threads, 0, stream>>>(p);
}

int run_cuda(const Params& p, void* stream) {
  if (p.dtype == DType::kBF16) launch<__nv_bfloat16>(p, static_cast<cudaStream_t>(stream));
  if (p.dtype == DType::kF16) launch<__half>(p, static_cast<cudaStream_t>(stream));
  return int(cudaGetLastError());
}

}  // namespace tessella::act_quant
