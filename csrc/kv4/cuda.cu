// kv4 on CUDA: which body runs, and the append.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "core/env.h"
#include "cuda/device.h"
#include "kv4/kernels.h"
#include "kv4/sm80.cuh"

namespace tessella::kv4 {

using msm::Part;

static bool pdl() { return env().programmatic && cuda::this_device().arch >= 90; }

namespace dev {

template <int kBits, int kHead>
static int run_coded(const Laid& p, cudaStream_t stream) {
  const int rows = msm::dev::rows_at_once(p, Part::kAll), sms = msm::gpu_sms();
  auto go = [&](auto* source) {
    using S = std::remove_pointer_t<decltype(source)>;
    return msm::dev::launch<S>(p, Part::kAll, p.stage(), sms, pdl(), stream);
  };
  if constexpr (kBits == 0) {
    return go(static_cast<Coded<kBits, kHead, 2>*>(nullptr));
  } else {
    if (rows <= 8) return go(static_cast<Coded<kBits, kHead, 1>*>(nullptr));
    return go(static_cast<Coded<kBits, kHead, (kHead > 128 ? 2 : 4)>*>(nullptr));
  }
}

template <int kBits>
static int run_bits(const Laid& p, cudaStream_t stream) {
  if (p.D <= 64) return run_coded<kBits, 64>(p, stream);
  if (p.D <= 128) return run_coded<kBits, 128>(p, stream);
  return run_coded<kBits, 256>(p, stream);
}

}  // namespace dev

int run_cuda(const Params& p, void* stream) {
  if (!env().error.empty()) throw std::runtime_error(env().error);
  if (cuda::this_device().arch < 80)
    throw std::runtime_error("tessella::kv4_attn: needs a GPU of compute capability 8.0 or later");
  auto* const s = static_cast<cudaStream_t>(stream);
  const std::string forced = env().force.empty() ? "" : forced_kernel("kv4");
  const bool must = forced == "kv4.sm90.few";
  bool may = false;
  if constexpr (kHasSm90) may = forced != "kv4.sm80.plain" && sm90_takes(p);
  if (must && !may)
    throw std::runtime_error("TESSELLA_FORCE: '" + forced + "' cannot run this problem or GPU");
  if constexpr (kHasSm90)
    if (may && (must || msm::dev::rows_at_once(p, Part::kAll) <= 8)) {
      const int error = run_sm90(p, stream);
      return error != 0 ? error : msm::dev::launch_merge(p, pdl(), s);
    }
  const bool exact = p.D == 64 || p.D == 128 || p.D == 256;
  const bool same =
      exact && p.page.k_bits == p.page.v_bits && p.page.groups() == 1 && !p.page.channel;
  const dev::Laid laid(p);
  const int bits = same ? p.page.k_bits : 0;
  const int error = bits == 4   ? dev::run_bits<4>(laid, s)
                    : bits == 8 ? dev::run_bits<8>(laid, s)
                                : dev::run_bits<0>(laid, s);
  return error != 0 ? error : msm::dev::launch_merge(p, pdl(), s);
}

// --- append

namespace dev {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kMost = 256, kColumns = 64;

// A group's scale and zero, as the reference makes them: every step rounded by itself.
struct Quantiser {
  float inv, zero, top;
  uint16_t s, z;
  bool flat;

  __device__ uint8_t operator()(float x) const {
    if (flat) return 0;
    const float y = __fadd_rn(__fmul_rn(x, inv), zero);
    return uint8_t(rintf(fminf(fmaxf(y, 0.f), top)));
  }
};

__device__ inline Quantiser make(float lo, float hi, bool bad, int bits) {
  Quantiser q{};
  q.top = float((1 << bits) - 1);
  const float range = __fsub_rn(hi, lo);
  const __half s = __float2half_rn(__fdiv_rn(range, q.top));
  const float width = __half2float(s);
  q.s = __half_as_ushort(s);
  if (bad || isinf(width)) {
    q.s = 0x7e00;  // NaN
    q.flat = true;
  } else if (range <= fmaxf(fabsf(lo), fabsf(hi)) * 0x1p-10f || width == 0.f) {
    const float c = __fmul_rn(0.5f, __fadd_rn(lo, hi));
    q.s = __half_as_ushort(__float2half_rn(fabsf(c)));
    q.z = __half_as_ushort(__float2half_rn(c > 0.f ? -1.f : c < 0.f ? 1.f : 0.f));
    q.flat = true;
  } else {
    q.inv = __frcp_rn(width);
    const __half z = __float2half_rn(__fmul_rn(-lo, q.inv));
    q.z = __half_as_ushort(z);
    q.zero = __half2float(z);
  }
  return q;
}

// A key or value of token t and head j, changed as its codec wants it, in the lanes of a warp.
__device__ inline void load_row(const AppendParams& p, bool key, int64_t t, int64_t j, float* room,
                                float (&x)[kMost / 32]) {
  const int lane = threadIdx.x % 32, half = int(p.R) / 2;
  const int64_t from = key ? t * p.k_token + j * p.k_head : t * p.v_token + j * p.v_head;
  const int64_t row = (p.rows ? p.rows[t] : 0) * p.J + j;
#pragma unroll
  for (int i = 0; i < kMost / 32; ++i) {
    const int d = lane + 32 * i;
    x[i] = 0.f;
    if (d >= p.D) continue;
    x[i] =
        key ? msm::dev::rotated(p, from, t, d, half) : msm::dev::load_any(p.v, from + d, p.dtype);
    if (key && p.k_mean) x[i] = __fsub_rn(x[i], p.k_mean[row * p.D + d]);
  }
  apply(key ? p.k_fold : p.v_fold, row, p.D, room, x);
}

// Codes of a token [D] in shared memory -> the bytes of its page.
__device__ inline void store_codes(const layout::KvPage& page, bool key, uint8_t* blob, int64_t t,
                                   const uint8_t* codes, int first, int channels) {
  const int lane = threadIdx.x % 32, bits = key ? page.k_bits : page.v_bits, n = 8 / bits;
  if (key) {
    for (int w = lane; w < channels / 4 / n * 4; w += 32) {  // bytes
      uint8_t byte = 0;
      for (int i = 0; i < n; ++i) byte |= codes[w / 4 * 4 * n + i * 4 + w % 4] << (i * bits);
      blob[page.k_code(t, first + w / 4 * 4 * n + w % 4).byte] = byte;
    }
    return;
  }
  for (int w = lane; w < int(page.Dv()) / n; w += 32) {
    uint8_t byte = 0;
    const int d = w / 16 * 16 * n + w % 16;
    for (int i = 0; i < n; ++i)
      if (d + 16 * i < channels) byte |= codes[d + 16 * i] << (i * bits);
    if (d < channels) blob[page.v_code(t, d).byte] = byte;
  }
}

// A row with scales per group of channels.
__device__ inline void code_row(const layout::KvPage& page, bool key, uint8_t* blob, int64_t t,
                                const float* x, uint8_t* codes) {
  const int lane = threadIdx.x % 32, bits = key ? page.k_bits : page.v_bits;
  for (int g = 0; g < int(page.groups()); ++g) {
    float lo = __int_as_float(0x7f800000), hi = -lo;
    bool bad = false;
    for (int d = lane; d < int(page.G); d += 32) {
      const float v = x[g * page.G + d];
      lo = fminf(lo, v);
      hi = fmaxf(hi, v);
      bad |= !isfinite(v);
    }
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      lo = fminf(lo, __shfl_xor_sync(~0u, lo, by));
      hi = fmaxf(hi, __shfl_xor_sync(~0u, hi, by));
    }
    const Quantiser q = make(lo, hi, __any_sync(~0u, bad), bits);
    for (int d = lane; d < int(page.G); d += 32) codes[g * page.G + d] = q(x[g * page.G + d]);
    if (lane == 0) {
      const int64_t at = key ? page.k_row(t, g * page.G) : page.v_row(t, g * page.G);
      uint8_t* s = blob + (key ? page.k_scales() : page.v_scales()) + at;
      uint8_t* z = blob + (key ? page.k_zeros() : page.v_zeros()) + at;
      *reinterpret_cast<uint16_t*>(s) = q.s;
      *reinterpret_cast<uint16_t*>(z) = q.z;
    }
  }
  __syncwarp();
  store_codes(page, key, blob, t, codes, 0, int(page.D));
  __syncwarp();
}

__device__ inline void put_row(const float (&x)[kMost / 32], float* to) {
#pragma unroll
  for (int i = 0; i < kMost / 32; ++i) to[threadIdx.x % 32 + 32 * i] = x[i];
  __syncwarp();
}

// A warp takes one token and kv head.
__global__ __launch_bounds__(kThreads) void append(const AppendParams p) {
  __shared__ float rooms[kWarps][kMost];
  __shared__ uint8_t all_codes[kWarps][kMost];
  ptx::wait_for_previous_grid();
  ptx::allow_next_grid();
  const int warp = threadIdx.x / 32;
  const int64_t i = int64_t{blockIdx.x} * kWarps + warp;
  if (i >= p.T * p.J) return;
  const int64_t t = i / p.J, j = i % p.J, slot = p.slots[t];
  if (p.debug && (slot < -1 || slot >= p.P * p.Z)) __trap();
  if (slot < 0 || slot >= p.P * p.Z) return;
  uint8_t* blob = p.pages + (slot / p.Z * p.J + j) * p.page.bytes();
  float x[kMost / 32], *room = rooms[warp];
  for (int key = p.page.channel ? 0 : 1; key >= 0; --key) {
    load_row(p, key == 1, t, j, room, x);
    __syncwarp();
    put_row(x, room);
    code_row(p.page, key == 1, blob, slot % p.Z, room, all_codes[warp]);
  }
}

// --- keys per channel: they wait in a tail until their page is full

__device__ inline float as_tail(float x, DType t) {
  if (t == DType::kBF16) return __bfloat162float(__float2bfloat16_rn(x));
  return t == DType::kF16 ? __half2float(__float2half_rn(x)) : x;
}
__device__ inline bool takes(const AppendParams& p, int64_t t) {
  return p.slots[t] >= 0 && p.slots[t] < p.P * p.Z;
}

// A block takes a token that fills a page, and a kv head: keys of this call, the others from the
// tail, which is written only by the next kernel.
__global__ __launch_bounds__(kThreads) void code_pages(const AppendParams p) {
  extern __shared__ float keys[];  // [Z][kColumns]
  __shared__ float rooms[kWarps][kMost];
  __shared__ int from[kMost];  // token of this call that brings a key of the page, or -1
  ptx::wait_for_previous_grid();
  ptx::allow_next_grid();
  const int64_t t = blockIdx.x / p.J, j = blockIdx.x % p.J, slot = p.slots[t];
  const int Z = int(p.Z), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (!takes(p, t) || slot % Z != Z - 1) return;
  for (int o = threadIdx.x; o < Z; o += kThreads) from[o] = -1;
  __syncthreads();
  for (int64_t u = threadIdx.x; u <= t; u += kThreads)
    if (p.slots[u] / Z == slot / Z && p.slots[u] >= 0) atomicMax(&from[p.slots[u] % Z], int(u));
  __syncthreads();
  uint8_t* blob = p.pages + (slot / Z * p.J + j) * p.page.bytes();
  const int64_t tail = (p.tail_row[t] * p.J + j) * Z * p.D;
  auto* codes = reinterpret_cast<uint8_t*>(keys + Z * kColumns);  // [Z][kColumns]
  for (int first = 0; first < int(p.D); first += kColumns) {
    const int channels = p.D - first < kColumns ? int(p.D) - first : kColumns;
    for (int o = warp; o < Z; o += kWarps) {
      float x[kMost / 32];
      const int u = from[o];
      if (u >= 0) {
        load_row(p, true, u, j, rooms[warp], x);
        __syncwarp();
        put_row(x, rooms[warp]);
      }
      for (int c = lane; c < channels; c += 32)
        keys[o * kColumns + c] =
            u >= 0 ? as_tail(rooms[warp][first + c], p.tail_dtype)
                   : msm::dev::load_any(p.k_tail, tail + o * p.D + first + c, p.tail_dtype);
      __syncwarp();
    }
    __syncthreads();
    for (int c = threadIdx.x; c < channels; c += kThreads) {
      float lo = __int_as_float(0x7f800000), hi = -lo;
      bool bad = false;
      for (int o = 0; o < Z; ++o) {
        lo = fminf(lo, keys[o * kColumns + c]);
        hi = fmaxf(hi, keys[o * kColumns + c]);
        bad |= !isfinite(keys[o * kColumns + c]);
      }
      const Quantiser q = make(lo, hi, bad, p.page.k_bits);
      for (int o = 0; o < Z; ++o) codes[o * kColumns + c] = q(keys[o * kColumns + c]);
      reinterpret_cast<uint16_t*>(blob + p.page.k_scales())[first + c] = q.s;
      reinterpret_cast<uint16_t*>(blob + p.page.k_zeros())[first + c] = q.z;
    }
    __syncthreads();
    for (int o = warp; o < Z; o += kWarps)
      store_codes(p.page, true, blob, o, codes + o * kColumns, first, channels);
    __syncthreads();
  }
}

// A warp takes a row of the tail and a kv head: the last key of the call for each place.
__global__ __launch_bounds__(kThreads) void fill_tail(const AppendParams p, int64_t tails) {
  __shared__ float rooms[kWarps][kMost];
  __shared__ uint8_t done[kWarps][kMost];
  ptx::wait_for_previous_grid();
  ptx::allow_next_grid();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, Z = int(p.Z);
  const int64_t i = int64_t{blockIdx.x} * kWarps + warp;
  if (i >= tails * p.J) return;
  const int64_t row = i / p.J, j = i % p.J;
  for (int o = lane; o < Z; o += 32) done[warp][o] = 0;
  __syncwarp();
  int left = Z;
  for (int64_t t0 = (p.T - 1) / 32 * 32; t0 >= 0 && left > 0; t0 -= 32) {
    const bool mine = t0 + lane < p.T && p.tail_row[t0 + lane] == row && takes(p, t0 + lane);
    unsigned found = __ballot_sync(~0u, mine);
    while (found != 0) {
      const int at = 31 - __clz(found);
      found ^= 1u << at;
      const int o = int(p.slots[t0 + at] % Z);
      if (done[warp][o]) continue;
      float x[kMost / 32];
      load_row(p, true, t0 + at, j, rooms[warp], x);
      const int64_t to = ((row * p.J + j) * Z + o) * p.D;
#pragma unroll
      for (int c = 0; c < kMost / 32; ++c)
        if (lane + 32 * c < p.D)
          msm::dev::store_any(p.k_tail, to + lane + 32 * c, p.tail_dtype, x[c]);
      __syncwarp();
      if (lane == 0) done[warp][o] = 1;
      __syncwarp();
      --left;
    }
  }
}

}  // namespace dev

int append_cuda(const AppendParams& p, void* stream) {
  auto* const s = static_cast<cudaStream_t>(stream);
  const auto threads = unsigned(dev::kThreads);
  const int64_t items = p.T * p.J;
  if (items == 0) return 0;
  const cuda::Launch rows{dim3(unsigned(ceil_div(items, dev::kWarps))), threads, 0, 1, pdl(), s};
  const int error = cuda::launch(rows, &dev::append, p);
  if (error != 0 || !p.page.channel) return error;
  const size_t smem = size_t(p.Z) * dev::kColumns * 5;
  const cudaError_t set =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(&dev::code_pages),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, int(smem));
  if (set != cudaSuccess) return int(set);
  const cuda::Launch pages{dim3(unsigned(items)), threads, smem, 1, pdl(), s};
  const int paged = cuda::launch(pages, &dev::code_pages, p);
  if (paged != 0) return paged;
  const cuda::Launch tails{
      dim3(unsigned(ceil_div(p.tail_rows * p.J, dev::kWarps))), threads, 0, 1, pdl(), s};
  return cuda::launch(tails, &dev::fill_tail, p, p.tail_rows);
}

}  // namespace tessella::kv4
