// Kernels of act_quant and its fused producers: a thread block, or a cluster of them, per token; a
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
// instructions, so the common case (all INT8, one scale) is compiled for itself, with one thread
// block a token and with several (Kind). README.md has the ladder.
//
// Sums of squares are added in one order whatever the launch: within a vector, over its block, over
// the blocks by lane and then across lanes. So a token's codes depend on that token alone.
//
// Every thread waits for the previous grid before it reads or writes anything but the norm's
// weight, and then lets the next one start (cuda/dependent.cuh). Ahead of the wait the residual is
// also brought to L2, where later writes to it would land as well: nothing is read yet.
#pragma once
#include "act_quant/params.h"
#include "cuda/dependent.cuh"
#include "cuda/vec8.cuh"

namespace tessella::act_quant {

constexpr int kBlock = 128, kOwners = kBlock / kVec, kMostThreads = 512;
constexpr int kMostParts = 8, kMostHeldBlocks = 256, kQuarters = 4;

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

// What of a launch is the same for all tokens, found on the host.
struct Extent {
  int parts_log2;  // a token is shared by 2^parts_log2 thread blocks
  uint32_t vectors, blocks, blocks8;
  float share;       // of a channel in the mean
  bool fetch_ahead;  // the residual, into L2
};

// What a thread needs to know of its token.
struct Token {
  uint32_t m, M, vectors, B, B8;
  int parts, part;
  float share;
  bool per_block;
  uint64_t* mail;            // the mailboxes of the parts' exchanges
  Scale scale8{}, scale4{};  // of the two classes, unless per block

  __device__ Token(const Params& p, const Extent& e, int parts_log2, uint64_t* mailboxes)
      : m(blockIdx.x >> parts_log2),
        M(uint32_t(p.M)),
        vectors(e.vectors),
        B(e.blocks),
        B8(e.blocks8),
        parts(1 << parts_log2),
        part(int(blockIdx.x) & (parts - 1)),
        share(e.share),
        per_block(p.granularity == Granularity::kBlock),
        mail(mailboxes) {}

  // Whether the parts have anything to tell each other: then they are a cluster.
  __device__ bool joined(Source source) const {
    return parts > 1 && (source == Source::kRmsNorm || !per_block);
  }
  __device__ uint32_t row(uint32_t b) const { return b * M + m; }
  __device__ int words() const { return parts * int(blockDim.x / 32); }  // one a warp
};

// The exchanges of a token's parts: sums of squares, and the largest magnitude of each class.
enum Mail { kSquares, kMost8, kMost4, kMails };

__device__ inline void expect_mail(const Token& t) {
  if (threadIdx.x == 0) {
    ptx::mailbox_expect(&t.mail[kSquares], t.B * kQuarters * sizeof(float));
    ptx::mailbox_expect(&t.mail[kMost8], t.words() * sizeof(uint32_t));
    ptx::mailbox_expect(&t.mail[kMost4], t.words() * sizeof(uint32_t));
  }
  ptx::mailboxes_open();
}
// What all threads of the token told is there for all of them.
__device__ inline void meet(const Token& t, Mail mail) {
  if (t.parts > 1)
    ptx::mailbox_await(&t.mail[mail]);
  else
    __syncthreads();
}

// The largest magnitude over the token, from each thread's; `most` is shared and used once.
__device__ inline uint32_t token_max(const Token& t, uint32_t mine, Mail mail,
                                     uint32_t (&most)[kMostParts * kMostThreads / 32]) {
  const int warps = int(blockDim.x / 32), lane = threadIdx.x % 32;
  const uint32_t of_warp = __reduce_max_sync(~0u, mine);
  uint32_t* const word = &most[t.part * warps + int(threadIdx.x / 32)];
  if (t.parts > 1) {
    if (lane < t.parts) ptx::peer_send(word, uint32_t(lane), of_warp, &t.mail[mail]);
  } else if (lane == 0) {
    *word = of_warp;
  }
  meet(t, mail);
  uint32_t all = 0;
  const int trips = t.parts > 1 ? kMostParts * kMostThreads / 32 / 32 : 1;
#pragma unroll
  for (int i = lane; i < 32 * trips; i += 32) {
    const uint32_t of_other = most[i];
    all = max(all, i < t.words() ? of_other : 0);
  }
  return __reduce_max_sync(~0u, all);
}

// The same for both classes -> scales. All threads take part.
__device__ inline void share_scales(const Params& p, Token& t, const uint32_t (&mine)[2]) {
  __shared__ uint32_t most[2][kMostParts * kMostThreads / 32];
  if (t.B8 > 0) t.scale8 = make_scale(token_max(t, mine[0], kMost8, most[0]), 127.f);
  if (t.B8 < t.B) t.scale4 = make_scale(token_max(t, mine[1], kMost4, most[1]), 7.f);
  if (threadIdx.x == 0 && t.part == 0) {
    const bool token = p.granularity == Granularity::kToken;
    p.scales[t.m] = (token && t.B8 == 0 ? t.scale4 : t.scale8).scale;
    if (!token) p.scales[t.M + t.m] = t.scale4.scale;
  }
}

// A block's sum of squares in two halves: over the threads with the same number modulo 4, and then
// over those four. Between the halves lies a thread block's barrier, or nothing.
__device__ inline float quarter(float v) {
  for (int d = kOwners / 2; d >= kQuarters; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  return v;
}
__device__ inline float whole(const float4& of) { return (of.x + of.z) + (of.y + of.w); }

// 1 / rms of the token, from the sums of its blocks b = lane, lane + 32, ... in that order.
__device__ inline float inverse_rms(const Params& p, const Token& t, float sum) {
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  return rsqrtf(sum * t.share + p.eps);
}

// Quantises and stores vector `i` of the token. All threads of a warp take part.
template <class T>
__device__ inline void emit(const Params& p, const Token& t, uint32_t i, const Vec& v) {
  const uint32_t b = i / kOwners, lane = i % kOwners;
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
  Vec v[kHeld], other[kHeld], weight[kHeld];

  // What can be done while the previous grid still runs: addresses, and the norm's weight.
  __device__ Held(const Params& params, const Token& token)
      : p(params),
        t(token),
        first(row(p.x, p.stride)),
        second(kSource == Source::kPlain ? nullptr : row(p.other, p.other_stride)) {
    asm volatile("" : "+l"(first), "+l"(second));
    if constexpr (kSource == Source::kRmsNorm)
      load(weight, static_cast<const uint4*>(p.weight) + index(0));
  }
  __device__ uint32_t index(int j) const {
    return uint32_t(t.part * kHeld + j) * blockDim.x + threadIdx.x;
  }
  __device__ bool there(int j) const { return index(j) < t.vectors; }
  __device__ const uint4* row(const void* base, int64_t stride) const {
    return reinterpret_cast<const uint4*>(static_cast<const T*>(base) + int64_t{t.m} * stride) +
           index(0);
  }
  __device__ void load(Vec (&to)[kHeld], const uint4* from) const {
    __builtin_assume(__isGlobal(from));
#pragma unroll
    for (int j = 0; j < kHeld; ++j)
      to[j].bits = there(j) ? from[j * blockDim.x] : make_uint4(0, 0, 0, 0);
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
    __shared__ float4 of_block[kMostHeldBlocks];
    const uint32_t lane = threadIdx.x % kOwners;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const float sum = quarter(squares<T>(v[j]));
      const uint32_t b = index(j) / kOwners;
      float* const word = reinterpret_cast<float*>(of_block + b) + lane % kQuarters;
      if (t.parts == 1) {
        if (lane < kQuarters) *word = sum;
      } else if (b < t.B) {
        for (uint32_t peer = lane / kQuarters; peer < t.parts; peer += kOwners / kQuarters)
          ptx::peer_send(reinterpret_cast<uint32_t*>(word), peer, __float_as_uint(sum),
                         &t.mail[kSquares]);
      }
    }
    meet(t, kSquares);
    float sum = 0.f;
    const int trips = t.parts > 1 ? kMostHeldBlocks / 32 : kHeld;
#pragma unroll
    for (int j = 0; j < trips; ++j) {
      const uint32_t b = threadIdx.x % 32 + 32 * j;
      const float block = whole(of_block[b]);
      sum += b < t.B ? block : 0.f;
    }
    const float by = inverse_rms(p, t, sum);
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
  const uint32_t amax = token_max(t, mine, kMost8, most);
  const bool fits = amax >= kTinyBits && amax < kInfBits;
  const float inverse = fits ? 127.f / __uint_as_float(amax) : 0.f;
  const uint32_t lane = threadIdx.x % kOwners;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const uint32_t b = of.index(j) / kOwners;
    const Codes q = quantise<T>(of.v[j], inverse);
    if (b < t.B)
      reinterpret_cast<uint2*>(p.codes8)[int64_t{t.row(b)} * kOwners + lane] = {q.lo, q.hi};
    const int sum = owners_sum(sum_codes(q));
    if (b < t.B && lane == 0) p.sums[t.row(b)] = sum;
  }
  // last: a division more, while the codes are on their way
  if (threadIdx.x == 0 && t.part == 0) {
    p.scales[t.m] = make_scale(amax, 127.f).scale;
    if (p.granularity == Granularity::kClass) p.scales[t.M + t.m] = 0.f;  // of no INT4 channels
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

// What a kernel is compiled for: anything; all INT8 with one scale; and that in one thread block.
enum class Kind { kAny, kPure, kAlone };

// How many of the largest thread blocks a multiprocessor shall have room for. Told so, the compiler
// takes the registers that this leaves and starts all loads before the first use; not told (0), it
// saves registers and loads again behind that use. The norm's loads are early either way.
template <Source kSource, int kHeld>
constexpr int kResident = kSource == Source::kRmsNorm                 ? 0
                          : kSource == Source::kSiluMul && kHeld == 4 ? 2
                                                                      : 1;

template <class T, Source kSource, int kHeld, Kind kKind>
__global__ __launch_bounds__(kMostThreads, kResident<kSource, kHeld>) void held(const Params p,
                                                                                const Extent e) {
  __shared__ uint64_t mailboxes[kMails];
  Token t(p, e, kKind == Kind::kAlone ? 0 : e.parts_log2, mailboxes);
  if constexpr (kKind == Kind::kPure) __builtin_assume(t.parts > 1);
  const bool joined = t.joined(kSource);
  fetch_parameters(p);
  if (joined) expect_mail(t);
  Held<T, kSource, kHeld> of(p, t);
  if constexpr (kSource == Source::kRmsNorm)
    if (e.fetch_ahead && threadIdx.x == 0 && t.part == 0)
      ptx::fetch_to_l2(of.second, t.vectors * uint32_t(sizeof(uint4)));
  ptx::wait_for_previous_grid();
  ptx::allow_next_grid();
  if (joined) ptx::mailboxes_await();
  of.produce();
  if constexpr (kKind == Kind::kAny)
    quantise_any<T, Held<T, kSource, kHeld>, kHeld>(p, t, of);
  else
    quantise_pure<T, Held<T, kSource, kHeld>, kHeld>(p, t, of);
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
      float of = quarter(squares<T>(h));
      for (int d = kQuarters / 2; d > 0; d /= 2) of += __shfl_xor_sync(~0u, of, d);
      if (i < vectors && i % kOwners == 0) of_block[i / kOwners] = of;
    }
    __syncthreads();
    float sum = 0.f;
    for (int b = threadIdx.x % 32; b < t.B; b += 32) sum += of_block[b];
    by = inverse_rms(p, t, sum);
    if (p.y != nullptr)
      for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x)
        scatter(p.y, i * kVec, value(i * kVec, nullptr));
  }
};

template <class T, Source kSource>
__global__ __launch_bounds__(kMostThreads, 1) void reread(const Params p, const Extent e) {
  extern __shared__ float of_block[];
  Token t(p, e, 0, nullptr);
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

}  // namespace tessella::act_quant
