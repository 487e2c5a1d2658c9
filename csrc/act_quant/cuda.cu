// act_quant and its fused producers on CUDA: a thread block, or a cluster of them, per token; a
// thread owns vectors of 8 channels.
//
// 16 neighbouring threads own a block of 128 channels, so its largest magnitude, sum of squares and
// code sum are shuffles among them and its codes are stored as one 128-byte line. `held` keeps the
// token in registers from its load to its codes, so memory is read once: 2 K bytes an operand in, K
// (INT8) or K/2 (INT4) out. `reread` serves the rest: permuted, unaligned and very long tokens.
//
// A channel costs about 5 instructions: half the magnitude search (packed pairs), multiply, round
// (adding 1.5 * 2^23 leaves the integer in the low mantissa bits), half a byte permute, a quarter
// of a dot product for the code sums. README.md has the ladder.
//
// Sums of squares are added in one order whatever the launch: within a vector, over its block, over
// the blocks by lane and then across lanes. So a token's codes depend on that token alone.
//
// Every thread waits for the previous grid before anything else and then lets the next one start,
// whose weights may be fetched meanwhile (cuda/dependent.cuh).
#include <stdexcept>

#include "act_quant/params.h"
#include "core/env.h"
#include "cuda/dependent.cuh"
#include "cuda/device.h"
#include "cuda/vec8.cuh"

namespace tessella::act_quant {

constexpr int kBlock = 128, kOwners = kBlock / kVec, kMostThreads = 512;
constexpr int kMostParts = 8, kMostHeldBlocks = 256;

// --- the producers' arithmetic, rounded to T after each of torch's ops

template <class T>
__device__ inline Vec add(const Vec& x, const Vec& residual) {
  return zip<T>(x, residual, [](PairOf<T> a, PairOf<T> b) { return __hadd2(a, b); });
}
template <class T>
__device__ inline float squares(const Vec& h) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kVec / 2; ++i) {
    const float2 x = Pair<T>::floats(pair<T>(h, i));
    sum = fmaf(x.y, x.y, fmaf(x.x, x.x, sum));
  }
  return sum;
}
template <class T>
__device__ inline Vec norm(const Vec& h, const Vec& weight, float by) {
  return zip<T>(h, weight, [by](PairOf<T> a, PairOf<T> w) {
    const float2 x = Pair<T>::floats(a);
    return __hmul2(Pair<T>::rounded(x.x * by, x.y * by), w);
  });
}
// Exponential and quotient to about 2 ulp: far below the rounding to T that follows.
__device__ inline float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }
template <class T>
__device__ inline Vec silu_mul(const Vec& gate, const Vec& up) {
  return zip<T>(gate, up, [](PairOf<T> g, PairOf<T> u) {
    const float2 x = Pair<T>::floats(g);
    return __hmul2(Pair<T>::rounded(silu(x.x), silu(x.y)), u);
  });
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

// What a thread needs to know of its token, which `parts` thread blocks share.
struct Token {
  int64_t m, B, B8;
  int parts, part;
  bool per_block;
  Scale scale8, scale4;  // of the two classes, unless per block

  __device__ Token(const Params& p, int of)
      : m(blockIdx.x / of),
        B(p.Kp / kBlock),
        B8(p.K8 / kBlock),
        parts(of),
        part(int(blockIdx.x % of)),
        per_block(p.granularity == Granularity::kBlock) {}

  // Whether the parts have anything to tell each other: then they are a cluster.
  __device__ bool joined(Source source) const {
    return parts > 1 && (source == Source::kRmsNorm || !per_block);
  }
};

// `value` into this word of every part's shared memory, by the first lanes of a warp.
__device__ inline void tell(const Token& t, uint32_t* word, uint32_t value) {
  const int lane = threadIdx.x % 32;
  if (t.parts > 1) {
    if (lane < t.parts) ptx::peer_store(word, uint32_t(lane), value);
  } else if (lane == 0) {
    *word = value;
  }
}
// What all threads of the token told is there for all of them.
__device__ inline void meet(const Token& t) {
  if (t.parts > 1) {
    ptx::cluster_publish();
    ptx::cluster_await();
  } else {
    __syncthreads();
  }
}

// Largest magnitudes of the two classes over the token -> scales. All threads take part.
__device__ inline void share_scales(const Params& p, Token& t, const uint32_t (&mine)[2]) {
  __shared__ uint32_t most[2][kMostParts * kMostThreads / 32];
  const int warps = int(blockDim.x / 32), lane = threadIdx.x % 32;
  const int own = t.part * warps + int(threadIdx.x / 32);
  uint32_t all[2] = {0, 0};
#pragma unroll
  for (int c = 0; c < 2; ++c) tell(t, &most[c][own], __reduce_max_sync(~0u, mine[c]));
  meet(t);
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    for (int i = lane; i < t.parts * warps; i += 32) all[c] = max(all[c], most[c][i]);
    all[c] = __reduce_max_sync(~0u, all[c]);
  }
  if (t.B8 > 0) t.scale8 = make_scale(all[0], 127.f);
  if (t.B8 < t.B) t.scale4 = make_scale(all[1], 7.f);
  if (threadIdx.x == 0 && t.part == 0) {
    const bool token = p.granularity == Granularity::kToken;
    p.scales[t.m] = (token && t.B8 == 0 ? t.scale4 : t.scale8).scale;
    if (!token) p.scales[p.M + t.m] = t.scale4.scale;
  }
}

// 1 / rms of the token, from the sums of its blocks.
__device__ inline float inverse_rms(const Params& p, const Token& t, const float* of_block) {
  float sum = 0.f;
  for (int64_t b = threadIdx.x % 32; b < t.B; b += 32) sum += of_block[b];
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  return 1.f / sqrtf(sum / float(p.K) + p.eps);
}
// The sum of squares of a block, by one of its owners; the order is the same in every launch.
__device__ inline float owners_add(float v) {
  for (int d = kOwners / 2; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  return v;
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

// The token's vectors of this thread, loaded once; all loads are under way before the first use.
template <class T, Source kSource, int kHeld>
struct Held {
  static constexpr bool kTwo = kSource != Source::kPlain;

  const Params& p;
  const Token& t;
  Vec v[kHeld], other[kHeld];

  __device__ int index(int j) const {
    return (t.part * kHeld + j) * int(blockDim.x) + int(threadIdx.x);
  }
  __device__ bool there(int j) const { return index(j) < int(p.K / kVec); }
  __device__ const uint4* row(const void* base, int64_t stride) const {
    return reinterpret_cast<const uint4*>(static_cast<const T*>(base) + t.m * stride);
  }
  __device__ void load(Vec (&to)[kHeld], const uint4* from) const {
#pragma unroll
    for (int j = 0; j < kHeld; ++j)
      to[j].bits = there(j) ? from[index(j)] : make_uint4(0, 0, 0, 0);
  }
  __device__ void store(void* base) const {
    auto* to = reinterpret_cast<uint4*>(static_cast<T*>(base) + t.m * p.K);
#pragma unroll
    for (int j = 0; j < kHeld; ++j)
      if (there(j)) to[index(j)] = v[j].bits;
  }

  __device__ void produce() {
    load(v, row(p.x, p.stride));
    if constexpr (kSource == Source::kSiluMul) {
      load(other, row(p.other, p.other_stride));
#pragma unroll
      for (int j = 0; j < kHeld; ++j) v[j] = silu_mul<T>(v[j], other[j]);
    }
    if constexpr (kSource == Source::kRmsNorm) {
      if (p.other != nullptr) load(other, row(p.other, p.other_stride));
      Vec weight[kHeld];
      load(weight, static_cast<const uint4*>(p.weight));
      if (p.other != nullptr) {
#pragma unroll
        for (int j = 0; j < kHeld; ++j) v[j] = add<T>(v[j], other[j]);
        store(p.h);
      }
      normalise(weight);
      if (p.y != nullptr) store(p.y);
    }
  }
  __device__ void normalise(const Vec (&weight)[kHeld]) {
    __shared__ float of_block[kMostHeldBlocks];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const float sum = owners_add(squares<T>(v[j]));
      const int b = index(j) / kOwners;
      const int peer = int(threadIdx.x) % kOwners;  // an owner tells one part each
      if (b >= t.B || peer >= t.parts) continue;
      if (t.parts > 1)
        ptx::peer_store(reinterpret_cast<uint32_t*>(of_block + b), uint32_t(peer),
                        __float_as_uint(sum));
      else
        of_block[b] = sum;
    }
    meet(t);
    const float by = inverse_rms(p, t, of_block);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) v[j] = norm<T>(v[j], weight[j], by);
  }
};

template <class T, Source kSource, int kHeld>
__global__ __launch_bounds__(kMostThreads) void held(const Params p, const int parts) {
  Token t(p, parts);
  const bool joined = t.joined(kSource);
  if (joined) ptx::cluster_publish();  // this part has started
  ptx::wait_for_previous_grid();
  ptx::allow_next_grid();
  Held<T, kSource, kHeld> of{p, t, {}, {}};
  if (joined) ptx::cluster_await();
  of.produce();
  if (!t.per_block) {
    uint32_t mine[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const bool int4 = of.index(j) / kOwners >= t.B8;
      const uint32_t bits = magnitude<T>(of.v[j]);
      mine[0] = max(mine[0], int4 ? 0 : bits);
      mine[1] = max(mine[1], int4 ? bits : 0);
    }
    share_scales(p, t, mine);
  }
#pragma unroll
  for (int j = 0; j < kHeld; ++j) emit<T>(p, t, of.index(j), of.v[j]);
}

// A token read channel by channel, as often as needed.
template <class T, Source kSource>
struct Reread {
  const Params& p;
  const Token& t;
  float by = 0.f;

  __device__ uint16_t channel(const void* base, int64_t stride, int64_t k) const {
    return static_cast<const uint16_t*>(base)[t.m * stride + k];
  }
  // 8 channels from k0 on, permuted if asked for.
  __device__ Vec gather(const void* base, int64_t stride, int64_t k0, const int32_t* perm) const {
    uint32_t w[kVec / 2] = {};
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      if (k0 + i < p.K)
        w[i / 2] |= uint32_t(channel(base, stride, perm ? perm[k0 + i] : k0 + i)) << (i % 2 * 16);
    return {make_uint4(w[0], w[1], w[2], w[3])};
  }
  __device__ void scatter(void* base, int64_t k0, const Vec& v) const {
    auto* to = static_cast<uint16_t*>(base) + t.m * p.K;
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      if (k0 + i < p.K) to[k0 + i] = uint16_t(v.word(i / 2) >> (i % 2 * 16));
  }
  __device__ Vec sum(int64_t k0, const int32_t* perm) const {
    const Vec x = gather(p.x, p.stride, k0, perm);
    return p.other ? add<T>(x, gather(p.other, p.other_stride, k0, perm)) : x;
  }
  // What is quantised.
  __device__ Vec value(int64_t k0, const int32_t* perm) const {
    if constexpr (kSource == Source::kRmsNorm)
      return norm<T>(sum(k0, perm), gather(p.weight, 0, k0, perm), by);
    const Vec x = gather(p.x, p.stride, k0, perm);
    if constexpr (kSource == Source::kSiluMul)
      return silu_mul<T>(x, gather(p.other, p.other_stride, k0, perm));
    return x;
  }
  // Stores the sum and the norm, and finds the root mean square.
  __device__ void normalise(float* of_block) {
    const int64_t vectors = t.B * kOwners, trips = ceil_div(vectors, blockDim.x);
    for (int64_t j = 0; j < trips; ++j) {  // whole warps, for the shuffles
      const int64_t i = j * blockDim.x + threadIdx.x;
      const Vec h = sum(i * kVec, nullptr);
      if (p.other) scatter(p.h, i * kVec, h);
      const float of = owners_add(squares<T>(h));
      if (i < vectors && i % kOwners == 0) of_block[i / kOwners] = of;
    }
    __syncthreads();
    by = inverse_rms(p, t, of_block);
    if (p.y != nullptr)
      for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x)
        scatter(p.y, i * kVec, value(i * kVec, nullptr));
  }
};

template <class T, Source kSource>
__global__ __launch_bounds__(kMostThreads) void reread(const Params p) {
  extern __shared__ float of_block[];
  Token t(p, 1);
  ptx::wait_for_previous_grid();
  ptx::allow_next_grid();
  Reread<T, kSource> of{p, t};
  if constexpr (kSource == Source::kRmsNorm) of.normalise(of_block);
  const int64_t vectors = t.B * kOwners, trips = ceil_div(vectors, blockDim.x);
  if (!t.per_block) {
    uint32_t mine[2] = {0, 0};
    for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x) {
      const uint32_t bits = magnitude<T>(of.value(i * kVec, p.perm));
      const bool int4 = i / kOwners >= t.B8;
      mine[0] = max(mine[0], int4 ? 0 : bits);
      mine[1] = max(mine[1], int4 ? bits : 0);
    }
    share_scales(p, t, mine);
  }
  for (int64_t j = 0; j < trips; ++j) {
    const int64_t i = j * blockDim.x + threadIdx.x;
    emit<T>(p, t, i, of.value(i * kVec, p.perm));
  }
}

// --- launch

// How a token is spread: over `parts` thread blocks of `threads`, `held` vectors a thread.
struct Shape {
  int parts, threads, held;
};

// Few tokens: one vector a thread, and where that is too much for a thread block, several blocks,
// so that they finish soonest. Many: more vectors a thread, down to where about 16 warps on each
// multiprocessor are left.
static Shape shape_of(const Params& p, bool clusters) {
  constexpr int64_t kSms = 132;
  const int64_t vectors = p.Kp / kVec, few = p.source == Source::kSiluMul ? 256 : 1024;
  int parts = 1;
  while (clusters && vectors > few && parts < kMostParts && 2 * parts * p.M <= 2 * kSms &&
         vectors >= 2 * parts * 128)
    parts *= 2;
  const int64_t each = ceil_div(vectors, parts), most = p.source == Source::kPlain ? 4 : 2;
  int threads = int(round_up(each, 32));
  while (threads > kMostThreads ||
         (threads > 64 && each <= most * threads && p.M * parts * threads > kSms * 1024))
    threads = int(round_up(threads / 2, 32));
  const int64_t held = ceil_div(each, threads);
  return {parts, threads, int(held == 3 ? 4 : held > 4 ? 8 : held)};
}

static bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether all operands can be read as whole, aligned vectors of 16 bytes.
static bool whole_vectors(const Params& p) {
  return p.perm == nullptr && p.K % kVec == 0 && aligned(p.x) && aligned(p.other) &&
         (p.M == 1 || (p.stride % kVec == 0 && p.other_stride % kVec == 0)) && aligned(p.weight) && aligned(p.h) &&
         aligned(p.y) && p.Kp / kBlock <= kMostHeldBlocks;
}

template <class T, Source kSource>
static int launch_source(const Params& p, cuda::Launch l) {
  const bool hopper = cuda::this_device().arch >= 90;
  l.programmatic = hopper && env().programmatic;
  if (!whole_vectors(p)) {
    const int64_t wanted = round_up(p.Kp / kVec, 32);
    l.grid = dim3(unsigned(p.M));
    l.threads = unsigned(wanted < kMostThreads ? wanted : kMostThreads);
    l.smem = kSource == Source::kRmsNorm ? size_t(p.Kp / kBlock) * sizeof(float) : 0;
    return cuda::launch(l, reread<T, kSource>, p);
  }
  const Shape s = shape_of(p, hopper);
  const bool alone = kSource != Source::kRmsNorm && p.granularity == Granularity::kBlock;
  l.grid = dim3(unsigned(p.M * s.parts));
  l.threads = unsigned(s.threads);
  l.cluster = alone ? 1u : unsigned(s.parts);
  switch (s.held) {
    case 1:
      return cuda::launch(l, held<T, kSource, 1>, p, s.parts);
    case 2:
      return cuda::launch(l, held<T, kSource, 2>, p, s.parts);
    case 4:
      return cuda::launch(l, held<T, kSource, 4>, p, s.parts);
    default:
      return cuda::launch(l, held<T, kSource, 8>, p, s.parts);
  }
}

template <class T>
static int launch_type(const Params& p, const cuda::Launch& l) {
  if (p.source == Source::kRmsNorm) return launch_source<T, Source::kRmsNorm>(p, l);
  if (p.source == Source::kSiluMul) return launch_source<T, Source::kSiluMul>(p, l);
  return launch_source<T, Source::kPlain>(p, l);
}

int run_cuda(const Params& p, void* stream) {
  if (!env().error.empty()) throw std::runtime_error(env().error);
  cuda::Launch l{};
  l.stream = static_cast<cudaStream_t>(stream);
  return p.dtype == DType::kBF16 ? launch_type<__nv_bfloat16>(p, l) : launch_type<__half>(p, l);
}

}  // namespace tessella::act_quant
