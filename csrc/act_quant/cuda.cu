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
// of a dot product for the code sums. With few tokens the time is that of one thread block's
// instructions, so the common case (all INT8, one scale) is compiled for itself (kPure), and rows
// are counted in 32 bits. README.md has the ladder.
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
  float even = 0.f, odd = 0.f;
#pragma unroll
  for (int i = 0; i < kVec / 2; ++i) {
    const float2 x = Pair<T>::floats(pair<T>(h, i));
    even = fmaf(x.x, x.x, even);
    odd = fmaf(x.y, x.y, odd);
  }
  return even + odd;
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
// Sums of a block's codes stay below 2^15, so one warp-wide sum serves both blocks of a warp.
__device__ inline int owners_sum(int v) {
  const bool high = threadIdx.x & kOwners;
  const int both = int(__reduce_add_sync(~0u, high ? uint32_t(v) << 16 : uint32_t(v)));
  const int low = int16_t(both);
  return high ? (both - low) >> 16 : low;
}

// Has the parameters fetched, which are cold in every launch, while the previous grid still runs.
__device__ inline void fetch_parameters(const Params& p) {
  asm volatile("" ::"l"(p.x), "l"(p.sums), "l"(p.Kp), "l"(p.other), "l"(p.y), "f"(p.eps));
}

// What a thread needs to know of its token, which a power of two of thread blocks share.
struct Token {
  uint32_t m, M;
  int B, B8, parts, part;
  bool per_block;
  Scale scale8{}, scale4{};  // of the two classes, unless per block

  __device__ Token(const Params& p, int parts_log2)
      : m(blockIdx.x >> parts_log2),
        M(uint32_t(p.M)),
        B(int(p.Kp / kBlock)),
        B8(int(p.K8 / kBlock)),
        parts(1 << parts_log2),
        part(int(blockIdx.x) & (parts - 1)),
        per_block(p.granularity == Granularity::kBlock) {}

  // Whether the parts have anything to tell each other: then they are a cluster.
  __device__ bool joined(Source source) const {
    return parts > 1 && (source == Source::kRmsNorm || !per_block);
  }
  __device__ uint32_t row(int b) const { return uint32_t(b) * M + m; }
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

// The largest magnitude over the token, from each thread's; `most` is shared and used once.
__device__ inline uint32_t token_max(const Token& t, uint32_t mine,
                                     uint32_t (&most)[kMostParts * kMostThreads / 32]) {
  const int warps = int(blockDim.x / 32), lane = threadIdx.x % 32;
  tell(t, &most[t.part * warps + int(threadIdx.x / 32)], __reduce_max_sync(~0u, mine));
  meet(t);
  uint32_t all = 0;
  for (int i = lane; i < t.parts * warps; i += 32) all = max(all, most[i]);
  return __reduce_max_sync(~0u, all);
}

// The same for both classes -> scales. All threads take part.
__device__ inline void share_scales(const Params& p, Token& t, const uint32_t (&mine)[2]) {
  __shared__ uint32_t most[2][kMostParts * kMostThreads / 32];
  if (t.B8 > 0) t.scale8 = make_scale(token_max(t, mine[0], most[0]), 127.f);
  if (t.B8 < t.B) t.scale4 = make_scale(token_max(t, mine[1], most[1]), 7.f);
  if (threadIdx.x == 0 && t.part == 0) {
    const bool token = p.granularity == Granularity::kToken;
    p.scales[t.m] = (token && t.B8 == 0 ? t.scale4 : t.scale8).scale;
    if (!token) p.scales[t.M + t.m] = t.scale4.scale;
  }
}

// 1 / rms of the token, from the sums of its blocks.
__device__ inline float inverse_rms(const Params& p, const Token& t, float share,
                                    const float* of_block) {
  float sum = 0.f;
  for (int b = threadIdx.x % 32; b < t.B; b += 32) sum += of_block[b];
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  return rsqrtf(sum * share + p.eps);
}
// The sum of squares of a block, by one of its owners; the order is the same in every launch.
__device__ inline float owners_add(float v) {
  for (int d = kOwners / 2; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  return v;
}

// Quantises and stores vector `i` of the token. All threads of a warp take part.
template <class T>
__device__ inline void emit(const Params& p, const Token& t, int i, const Vec& v) {
  const int b = i / kOwners, lane = i % kOwners;
  const bool int4 = b >= t.B8;
  Scale s = int4 ? t.scale4 : t.scale8;
  if (t.per_block) s = make_scale(owners_max(magnitude<T>(v)), int4 ? 7.f : 127.f);
  const Codes q = quantise<T>(v, s.inverse);
  const int sum = owners_sum(sum_codes(q));
  if (b >= t.B) return;
  if (int4)
    reinterpret_cast<uint32_t*>(p.codes4)[int64_t{t.row(b - t.B8)} * kOwners + lane] = nibbles(q);
  else
    reinterpret_cast<uint2*>(p.codes8)[int64_t{t.row(b)} * kOwners + lane] = {q.lo, q.hi};
  if (lane == 0) {
    p.sums[t.row(b)] = sum;
    if (t.per_block) p.scales[t.row(b)] = s.scale;
  }
}

// The token's vectors of this thread, loaded once; all loads are under way before the first use.
template <class T, Source kSource, int kHeld>
struct Held {
  static constexpr bool kTwo = kSource != Source::kPlain;

  const Params& p;
  const Token& t;
  const uint4 *first, *second;  // this thread's first vectors
  float share;                  // of a channel in the mean
  Vec v[kHeld], other[kHeld], weight[kHeld];

  // What can be done while the previous grid still runs: addresses, and the norm's weight.
  __device__ Held(const Params& params, const Token& token)
      : p(params),
        t(token),
        first(row(p.x, p.stride)),
        second(kSource == Source::kPlain ? nullptr : row(p.other, p.other_stride)),
        share(1.f / float(p.K)) {
    asm volatile("" : "+l"(first), "+l"(second), "+f"(share));
    if constexpr (kSource == Source::kRmsNorm)
      load(weight, static_cast<const uint4*>(p.weight) + index(0));
  }
  __device__ int index(int j) const {
    return (t.part * kHeld + j) * int(blockDim.x) + int(threadIdx.x);
  }
  __device__ bool there(int j) const { return index(j) < int(p.K) / kVec; }
  __device__ const uint4* row(const void* base, int64_t stride) const {
    return reinterpret_cast<const uint4*>(static_cast<const T*>(base) + int64_t{t.m} * stride) +
           index(0);
  }
  __device__ void load(Vec (&to)[kHeld], const uint4* from) const {
#pragma unroll
    for (int j = 0; j < kHeld; ++j)
      to[j].bits = there(j) ? from[j * int(blockDim.x)] : make_uint4(0, 0, 0, 0);
  }
  __device__ void store(void* base) const {
    auto* to = reinterpret_cast<uint4*>(static_cast<T*>(base) + int64_t{t.m} * p.K);
#pragma unroll
    for (int j = 0; j < kHeld; ++j)
      if (there(j)) to[index(j)] = v[j].bits;
  }

  __device__ void produce() {
    load(v, first);
    if constexpr (kSource == Source::kSiluMul) {
      load(other, second);
#pragma unroll
      for (int j = 0; j < kHeld; ++j) v[j] = silu_mul<T>(v[j], other[j]);
    }
    if constexpr (kSource == Source::kRmsNorm) {
      if (p.other != nullptr) {
        load(other, second);
#pragma unroll
        for (int j = 0; j < kHeld; ++j) v[j] = add<T>(v[j], other[j]);
        store(p.h);
      }
      normalise();
      if (p.y != nullptr) store(p.y);
    }
  }
  __device__ void normalise() {
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
    const float by = inverse_rms(p, t, share, of_block);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) v[j] = norm<T>(v[j], weight[j], by);
  }
};

// All channels INT8 with one scale.
template <class T, class H, int kHeld>
__device__ inline void quantise_pure(const Params& p, const Token& t, const H& of) {
  __shared__ uint32_t most[kMostParts * kMostThreads / 32];
  uint32_t mine = 0;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) mine = max(mine, magnitude<T>(of.v[j]));
  const uint32_t amax = token_max(t, mine, most);
  const bool fits = amax >= kTinyBits && amax < kInfBits;
  const float inverse = fits ? 127.f / __uint_as_float(amax) : 0.f;
  if (threadIdx.x == 0 && t.part == 0) {
    p.scales[t.m] = make_scale(amax, 127.f).scale;
    if (p.granularity == Granularity::kClass) p.scales[t.M + t.m] = 0.f;  // of no INT4 channels
  }
  const int i = of.index(0), lane = i % kOwners, blocks = int(blockDim.x) / kOwners;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const int b = i / kOwners + j * blocks;
    const Codes q = quantise<T>(of.v[j], inverse);
    const int sum = owners_sum(sum_codes(q));
    if (b >= t.B) continue;
    reinterpret_cast<uint2*>(p.codes8)[int64_t{t.row(b)} * kOwners + lane] = {q.lo, q.hi};
    if (lane == 0) p.sums[t.row(b)] = sum;
  }
}

template <class T, class H, int kHeld>
__device__ inline void quantise_any(const Params& p, Token& t, const H& of) {
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

template <class T, Source kSource, int kHeld, bool kPure>
__global__ __launch_bounds__(kMostThreads) void held(const Params p, const int parts_log2) {
  Token t(p, parts_log2);
  const bool joined = t.joined(kSource);
  fetch_parameters(p);
  if (joined) ptx::cluster_publish();  // this part has started
  Held<T, kSource, kHeld> of(p, t);
  ptx::wait_for_previous_grid();
  ptx::allow_next_grid();
  if (joined) ptx::cluster_await();
  of.produce();
  if constexpr (kPure)
    quantise_pure<T, Held<T, kSource, kHeld>, kHeld>(p, t, of);
  else
    quantise_any<T, Held<T, kSource, kHeld>, kHeld>(p, t, of);
}

// A token read channel by channel, as often as needed.
template <class T, Source kSource>
struct Reread {
  const Params& p;
  const Token& t;
  float by = 0.f;

  __device__ uint16_t channel(const void* base, int64_t stride, int64_t k) const {
    return static_cast<const uint16_t*>(base)[int64_t{t.m} * stride + k];
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
    auto* to = static_cast<uint16_t*>(base) + int64_t{t.m} * p.K;
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
    const int64_t vectors = int64_t{t.B} * kOwners, trips = ceil_div(vectors, blockDim.x);
    for (int64_t j = 0; j < trips; ++j) {  // whole warps, for the shuffles
      const int64_t i = j * blockDim.x + threadIdx.x;
      const Vec h = sum(i * kVec, nullptr);
      if (p.other) scatter(p.h, i * kVec, h);
      const float of = owners_add(squares<T>(h));
      if (i < vectors && i % kOwners == 0) of_block[i / kOwners] = of;
    }
    __syncthreads();
    by = inverse_rms(p, t, 1.f / float(p.K), of_block);
    if (p.y != nullptr)
      for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x)
        scatter(p.y, i * kVec, value(i * kVec, nullptr));
  }
};

template <class T, Source kSource>
__global__ __launch_bounds__(kMostThreads) void reread(const Params p) {
  extern __shared__ float of_block[];
  Token t(p, 0);
  fetch_parameters(p);
  ptx::wait_for_previous_grid();
  ptx::allow_next_grid();
  Reread<T, kSource> of{p, t};
  if constexpr (kSource == Source::kRmsNorm) of.normalise(of_block);
  const int vectors = t.B * kOwners, trips = (vectors + int(blockDim.x) - 1) / int(blockDim.x);
  if (!t.per_block) {
    uint32_t mine[2] = {0, 0};
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
      const uint32_t bits = magnitude<T>(of.value(int64_t{i} * kVec, p.perm));
      const bool int4 = i / kOwners >= t.B8;
      mine[0] = max(mine[0], int4 ? 0 : bits);
      mine[1] = max(mine[1], int4 ? bits : 0);
    }
    share_scales(p, t, mine);
  }
  for (int j = 0; j < trips; ++j) {
    const int i = j * int(blockDim.x) + int(threadIdx.x);
    emit<T>(p, t, i, of.value(int64_t{i} * kVec, p.perm));
  }
}

// --- launch

// How a token is spread: over 2^parts_log2 thread blocks of `threads`, `held` vectors a thread.
struct Shape {
  int parts_log2, threads, held;
};

// Few tokens: one vector a thread, and where that is too much for a thread block, several blocks,
// so that they finish soonest. Many: more vectors a thread, down to where about 16 warps on each
// multiprocessor are left.
static Shape shape_of(const Params& p, bool clusters) {
  constexpr int64_t kSms = 132;
  const int64_t vectors = p.Kp / kVec, few = p.source == Source::kSiluMul ? 256 : 1024;
  int log2 = 0;
  while (clusters && vectors > few && 2 << log2 <= kMostParts && (p.M << log2) <= kSms &&
         vectors >= int64_t{256} << log2)
    ++log2;
  const int64_t parts = int64_t{1} << log2;
  const int64_t each = ceil_div(vectors, parts);
  const int64_t most = p.source == Source::kPlain ? 4 : p.source == Source::kSiluMul ? 2 : 1;
  int threads = int(round_up(each, 32));
  const bool gate = p.source == Source::kSiluMul;
  while (threads > kMostThreads || (gate && threads > 256 && each <= 2 * threads) ||
         (threads > 64 && each <= most * threads && p.M * parts * threads > kSms * 1024))
    threads = int(round_up(threads / 2, 32));
  const int64_t held = ceil_div(each, threads);
  return {log2, threads, int(held == 3 ? 4 : held > 4 ? 8 : held)};
}

// Whether all operands can be read as whole, aligned vectors of 16 bytes.
static bool whole_vectors(const Params& p) {
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  return p.perm == nullptr && p.K % kVec == 0 && aligned(p.x) && aligned(p.other) &&
         (p.M == 1 || (p.stride % kVec == 0 && p.other_stride % kVec == 0)) && aligned(p.weight) &&
         aligned(p.h) && aligned(p.y) && p.Kp / kBlock <= kMostHeldBlocks;
}

template <class T, Source kSource, bool kPure>
static int launch_held(const Params& p, const Shape& s, const cuda::Launch& l) {
  switch (s.held) {
    case 1:
      return cuda::launch(l, held<T, kSource, 1, kPure>, p, s.parts_log2);
    case 2:
      return cuda::launch(l, held<T, kSource, 2, kPure>, p, s.parts_log2);
    case 4:
      return cuda::launch(l, held<T, kSource, 4, kPure>, p, s.parts_log2);
    default:
      return cuda::launch(l, held<T, kSource, 8, kPure>, p, s.parts_log2);
  }
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
  l.grid = dim3(unsigned(p.M) << s.parts_log2);
  l.threads = unsigned(s.threads);
  l.cluster = alone ? 1u : 1u << s.parts_log2;
  const bool pure = p.K8 == p.Kp && p.granularity != Granularity::kBlock;
  return pure ? launch_held<T, kSource, true>(p, s, l) : launch_held<T, kSource, false>(p, s, l);
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
