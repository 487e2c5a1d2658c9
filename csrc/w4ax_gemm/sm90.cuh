// w4ax_gemm on Hopper: y^T = w a^T with the weights as wgmma's 64-row register operand.
//
// A thread block computes 64 features per math warpgroup x kTokens tokens. Per block of 128
// channels a stage of the ring holds each warpgroup's packed weights (one contiguous copy) and the
// tokens' codes (a swizzled box). A math thread takes its 64 codes with two 128-bit loads, widens
// them to fragment registers (layout/w4_frag.h: 5 operations for 8 two-level codes) and issues 4
// wgmma, while those of the stage before still run.
//
// Warps beside the math ones: loaders that feed the ring, and one that adds up the tokens' code
// sums. u8 weights leave a zero point in the integer sum (128 for two-level bytes, z for channel
// codes) times that sum, and both are exact. g128 subtracts z in the registers instead and adds its
// integer sums to fp32 totals every 128 channels.
//
// The loader fetches weights before it waits for the previous grid, and nothing else touches memory
// before that wait (programmatic dependent launch).
#pragma once
#include "cuda/float.cuh"
#include "cuda/w4_decode.cuh"
#include "cuda/wgmma.cuh"
#include "w4ax_gemm/sm90_parts.cuh"

namespace tessella::w4ax_gemm::sm90 {

// The number of this thread's warp. The compiler sees that the warp agrees about it, and keeps what
// depends on it, and loops behind its branches, in uniform registers.
__device__ inline int warp_index() { return __shfl_sync(0xffffffff, int(threadIdx.x / 32), 0); }

// --- loaders

// At a stage's barrier: the weights, the activations.
constexpr int kStageArrivals = 2;

// One thread: the weights' copies, the activations' or both. Each announces its bytes on its own.
template <class T, bool kWeights, bool kActs>
struct Loader {
  const Args& a;
  const Place& at;
  const Shared<T>& s;
  const CUtensorMap* map;
  const CUtensorMap* half_map;

  __device__ void weights(const Work& w, int b, int stage) const {
    const uint32_t full = s.full + stage * 8, to = s.weights + stage * T::kWeightBytes;
    const uint32_t bytes = min(T::kChunk, w.b1 - b) * T::kBlockBytes;
    const uint8_t* from = a.w + w.panel * a.panel_bytes + b * T::kBlockBytes;
    // the last tile may have warpgroups without a panel
    const int panels = T::kWarpgroups == 1 ? 1 : min(T::kWarpgroups, a.panels - w.panel);
    ptx::barrier_arrive_expect(full, panels * bytes);
#pragma unroll
    for (int i = 0; i < T::kWarpgroups; ++i)
      if (i < panels)
        ptx::copy_bulk(to + i * (T::kWeightBytes / T::kWarpgroups), from + i * a.panel_bytes, bytes,
                       full);
  }
  __device__ void acts(const Work& w, int b, int stage) const {
    const uint32_t full = s.full + stage * 8, to = s.acts + stage * T::kActBytes;
    ptx::barrier_arrive_expect(full, w.half ? T::kActBytes / 2 : T::kActBytes);
    ptx::copy_box(to, w.half ? half_map : map, 0, w.m0, b, full);
  }
  // The first stage, while the block is still being set up: its weights, and its activations
  // unless the previous grid may still be writing them.
  __device__ void start() const {
    ptx::barrier_init(s.full, kStageArrivals);
    ptx::barrier_init_fence();
    const Work w = Items<T>(a, at).take();
    weights(w, w.b0, 0);
    if (!a.programmatic) acts(w, w.b0, 0);
  }
  // The rest: weights for the whole ring before the wait for the previous grid.
  __device__ void run() const {
    int early = 1;
    if (a.programmatic) {
      const Work w = Items<T>(a, at).take();
      if (kWeights)
#pragma unroll 1
        for (int b = w.b0 + T::kChunk; early < a.stages && b < w.b1; b += T::kChunk)
          weights(w, b, early++);
      ptx::wait_for_previous_grid();
      if (kWeights && kActs)
#pragma unroll 1
        for (int i = 0; i < early; ++i) acts(w, w.b0 + i * T::kChunk, i);
      if (!kWeights) early = 0;
    }
    Ring ring;
#pragma unroll 1
    for (int i = 0; i < early; ++i) ring.next(a.stages);
#pragma unroll 1
    for (Items<T> items(a, at); items.more();) {
      const Work w = items.take();
#pragma unroll 1
      for (int b = w.b0 + early * T::kChunk; b < w.b1; b += T::kChunk, ring.next(a.stages)) {
        ptx::barrier_wait(s.empty + ring.stage * 8, ring.parity ^ 1);
        if (kWeights) weights(w, b, ring.stage);
        if (kActs) acts(w, b, ring.stage);
      }
      early = 0;
    }
  }
};

// --- token sums and scales, by one warp

// Lanes for tokens and, where these are fewer, for every kStep-th block: what counts is the loads
// in flight, for the products do not wait long.
template <class T>
struct TokenLanes {
  static constexpr int kEach = T::kTokens < 32 ? 1 : T::kTokens / 32;
  static constexpr int kStep = T::kTokens < 32 ? 32 / T::kTokens : 1;
  static constexpr int kAhead = kEach <= 2 ? 16 : kEach == 4 ? 8 : 2;  // as registers allow

  const Args& a;
  int lane = threadIdx.x % 32, token = lane % T::kTokens;

  __device__ explicit TokenLanes(const Args& args) : a(args) {}

  // Sums of this lane's tokens; all of them exist if `kInside`.
  template <bool kInside>
  __device__ void add(const Work& w, int32_t (&sum)[kEach]) const {
    const int tokens = int(a.M - w.m0) - token;
    const int32_t* from = a.sums + w.m0 + token;
#pragma unroll 1
    for (int b = w.b0 + lane / T::kTokens; b < w.b1; b += kAhead * kStep) {
      int32_t v[kAhead][kEach];
#pragma unroll
      for (int u = 0; u < kAhead; ++u)
#pragma unroll
        for (int i = 0; i < kEach; ++i)
          v[u][i] = b + u * kStep < w.b1 && (kInside || 32 * i < tokens)
                        ? from[(b + u * kStep) * a.M + 32 * i]
                        : 0;
#pragma unroll
      for (int u = 0; u < kAhead; ++u)
#pragma unroll
        for (int i = 0; i < kEach; ++i) sum[i] += v[u][i];
    }
#pragma unroll
    for (int step = 16; step >= T::kTokens; step /= 2)
      sum[0] += __shfl_down_sync(0xffffffff, sum[0], step);
  }
};

template <class T>
__device__ void token_warp(const Args& a, const Place& at, const Shared<T>& s) {
  using Lanes = TokenLanes<T>;
  const Lanes lanes(a);
  ptx::wait_for_previous_grid();
  ptx::allow_next_grid();
  uint32_t parity = 1;
#pragma unroll 1
  for (Items<T> items(a, at); items.more(); parity ^= 1) {
    const Work w = items.take();
    int32_t sum[Lanes::kEach] = {};
    if (!T::kGroup) {
      if (w.m0 + T::kTokens <= a.M)
        lanes.template add<true>(w, sum);
      else
        lanes.template add<false>(w, sum);
    }
    float scale[Lanes::kEach] = {};
#pragma unroll
    for (int i = 0; i < Lanes::kEach; ++i)
      if (const int64_t m = w.m0 + lanes.lane + 32 * i; m < a.M) scale[i] = a.scales[m];
    ptx::barrier_wait(s.token_empty, parity);
#pragma unroll
    for (int i = 0; i < Lanes::kEach; ++i)
      if (const int t = lanes.lane + 32 * i; t < T::kTokens) {
        ptx::store_shared4(s.sums + t * 4, uint32_t(sum[i]));
        ptx::store_shared4(s.scales + t * 4, __float_as_uint(scale[i]));
      }
    ptx::barrier_arrive(s.token_full);
  }
}

// --- math

// One math thread: features `n` and `n` + 8, in fragments row r and column c.
template <class T>
struct Math {
  using Total = std::conditional_t<T::kGroup, float, int32_t>;

  const Args& a;
  const Place& at;
  const Shared<T>& s;
  const CUtensorMap* out;
  int warpgroup = warp_index() / 4, thread = threadIdx.x % 128, warp = warp_index() % 4;
  int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  Ring ring;
  uint32_t token_parity = 0;

  __device__ Math(const Args& args, const Place& place, const Shared<T>& shared,
                  const CUtensorMap* result)
      : a(args), at(place), s(shared), out(result) {}

  // This thread has read all it needs of a stage. One lane for its warp would be no faster.
  __device__ void release(int stage) const { ptx::barrier_arrive(s.empty + stage * 8); }
  __device__ int before(int stage) const { return stage == 0 ? a.stages - 1 : stage - 1; }

  // This thread's 64 codes of block `i` of a stage, with what belongs to their groups. Where blocks
  // share an SM and its registers, the second half is read while the first is decoded.
  static constexpr bool kLate = T::kTile.short_of_registers();
  struct Packed {
    uint4 codes[2];
    uint32_t meta, zeros, second;
  };
  __device__ Packed load(int stage, int i) const {
    const uint32_t from =
        s.weights + stage * T::kWeightBytes + (warpgroup * T::kChunk + i) * T::kBlockBytes;
    const uint32_t pair = warp * 8 + r;
    Packed p;
    if constexpr (T::kWide) {  // decode() loads, once wgmma has done with the registers
      p.meta = from + thread * 16;
      return p;
    }
    p.codes[0] = ptx::load_shared16(from + thread * 16);
    p.second = from + 2048 + thread * 16;
    if (!kLate) p.codes[1] = ptx::load_shared16(p.second);
    if constexpr (T::kScheme != Scheme::kChannel)
      p.meta = ptx::load_shared4(from + 4096 + pair * 4);
    if constexpr (T::kGroup) p.zeros = ptx::load_shared2(from + 4096 + 128 + pair * 2);
    return p;
  }

  // Fragment registers of 128 channels.
  using Fragments = uint32_t[4][4];
  __device__ void decode(const Packed& p, Fragments& f) const {
    if constexpr (T::kWide)
      load_widened(p.meta, f);
    else
      decode_codes(p, f);
  }
  __device__ void load_widened(uint32_t from, Fragments& f) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 v = ptx::load_shared16(from + i * 2048);
      f[i][0] = v.x, f[i][1] = v.y, f[i][2] = v.z, f[i][3] = v.w;
    }
  }
  __device__ void decode_codes(const Packed& p, Fragments& f) const {
    const uint4 second = kLate ? ptx::load_shared16(p.second) : p.codes[1];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 v = i == 0 ? p.codes[0] : second;
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int h = j % 2;
        uint32_t (&to)[4] = f[i * 2 + j / 2];
        if constexpr (T::kScheme == Scheme::kChannel)
          ptx::codes_u8(words[j], to[h], to[h + 2]);
        else if constexpr (T::kGroup)
          ptx::codes_s8(words[j], ptx::repeat_byte(p.zeros, h), to[h], to[h + 2]);
        else
          ptx::two_level_u8(words[j], ptx::byte_of(p.meta, 2 * h),
                            ptx::repeat_byte(p.meta, 2 * h + 1), to[h], to[h + 2]);
      }
    }
  }

  // Integer sums over block `i` of a stage; `add` false starts them from zero.
  template <int kAcc>
  __device__ void multiply(int32_t (&acc)[kAcc], Fragments& f, int stage, int i, bool add) const {
    const uint64_t x =
        ptx::swizzled_rows(s.acts + stage * T::kActBytes + i * (T::kActBytes / T::kChunk));
    ptx::settle(f);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k)
      ptx::Wgmma<2 * kAcc, T::kGroup>::run(acc, f[k], x + 2 * k, k > 0 || add);
    ptx::wgmma_commit();
  }

  // Channel and two-level: a block's products run on while the next one is decoded into the other
  // registers, and its codes are read before the wait for the products before. Everything in the
  // loops is unconditional, or ptxas serialises all wgmma.
  __device__ Packed first_of_stage() const {
    ptx::barrier_wait(s.full + ring.stage * 8, ring.parity);
    return load(ring.stage, 0);
  }
  // Other tiles are short of registers for that, and widened weights are read when they are needed.
  static constexpr bool kEarly = T::kWarpgroups == 2 && T::kTokens <= 128 && !T::kWide;
  // One load. Where codes are read early, `ahead` has those of its first block, and then the next
  // load's.
  template <bool kMore, int kFragments, int kAcc>
  __device__ void step(int32_t (&acc)[kAcc], Fragments (&f)[2], Packed& ahead, bool first) {
    const int stage = ring.stage;
    Packed p = kEarly ? ahead : first_of_stage();
#pragma unroll
    for (int i = 0; i < T::kChunk; ++i) {
      Fragments& g = f[(kFragments + i) % 2];
      decode(p, g);
      if (i + 1 < T::kChunk) p = load(stage, i + 1);
      multiply(acc, g, stage, i, true);
      if (i + 1 == T::kChunk) ring.next(a.stages);
      if (i + 1 == T::kChunk && kMore) ahead = first_of_stage();
      ptx::wgmma_wait<1>();
      if (i == 0 && !first) release(before(stage));
    }
  }
  // Loads of an even number of blocks, so that the fragments' registers alternate.
  static constexpr int kTurn = T::kChunk == 1 ? 2 : 1;
  template <bool kMore, int kAcc>
  __device__ void turn(int32_t (&acc)[kAcc], Fragments (&f)[2], Packed& ahead, bool first) {
    step<kMore || (kEarly && kTurn == 2), 0>(acc, f, ahead, first);
    if constexpr (kTurn == 2) step<kMore, 1>(acc, f, ahead, false);
  }
  template <int kAcc>
  __device__ void sum_loads(int loads, int32_t (&acc)[kAcc]) {
    Fragments f[2];
    Packed ahead;
    if (kEarly) ahead = first_of_stage();
    int i = 0;
#pragma unroll 1
    for (; i + kTurn + kEarly <= loads; i += kTurn) turn<kEarly>(acc, f, ahead, i == 0);
    if constexpr (kEarly) {
      if (i + 1 < loads || kTurn == 1)
        turn<false>(acc, f, ahead, i == 0);
      else
        step<false, 0>(acc, f, ahead, i == 0);
    } else if constexpr (kTurn == 2) {
      ptx::wgmma_wait<0>();
      if (i < loads) step<false, 0>(acc, f, ahead, i == 0);
    }
    ptx::wgmma_wait<0>();
    release(before(ring.stage));
  }
  // The last load, with fewer blocks than others.
  template <int kAcc>
  __device__ void sum_rest(int blocks, int32_t (&acc)[kAcc]) {
    Fragments f;
    ptx::barrier_wait(s.full + ring.stage * 8, ring.parity);
#pragma unroll 1
    for (int i = 0; i < blocks; ++i) {
      decode(load(ring.stage, i), f);
      multiply(acc, f, ring.stage, i, true);
      ptx::wgmma_wait<0>();
    }
    release(ring.stage);
    ring.next(a.stages);
  }
  template <int kAcc>
  __device__ void sum_blocks(const Work& w, int32_t (&acc)[kAcc]) {
#pragma unroll
    for (int i = 0; i < kAcc; ++i) acc[i] = 0;
    const int blocks = w.b1 - w.b0;
    if (blocks >= T::kChunk) sum_loads(blocks / T::kChunk, acc);
    if (T::kChunk > 1 && blocks % T::kChunk > 0) sum_rest(blocks % T::kChunk, acc);
  }

  // g128: the sums of each block become fp32 at once, at best while the other warpgroup multiplies.
  // The next block's codes are read, and may be decoded, while this one's products run.
  struct Group {
    Fragments f;
    float scale[2];
    int stage, i;
  };
  // The block at `ring` and `i`.
  __device__ void take(Group& g, int i) const {
    ptx::barrier_wait(s.full + ring.stage * 8, ring.parity);
    const Packed p = load(ring.stage, i);
    g.stage = ring.stage;
    g.i = i;
    g.scale[0] = half_bits(p.meta & 0xffff);
    g.scale[1] = half_bits(p.meta >> 16);
    decode(p, g.f);
  }
  template <bool kMore, int kAcc>
  __device__ void group_step(float (&total)[kAcc], int32_t (&acc)[kAcc], Group& g, Group& next) {
    multiply(acc, g.f, g.stage, g.i, false);
    const bool last = !kMore || g.i + 1 == T::kChunk;  // of its stage
    if (last) ring.next(a.stages);
    if constexpr (kMore) take(next, last ? 0 : g.i + 1);
    ptx::wgmma_wait<0>();
    if (last) release(g.stage);
#pragma unroll
    for (int j = 0; j < kAcc; ++j) total[j] += float(acc[j]) * g.scale[j / 2 % 2];
  }
  template <int kAcc>
  __device__ void sum_blocks(const Work& w, float (&total)[kAcc]) {
    int32_t acc[kAcc];
    Group g[2];
#pragma unroll
    for (int i = 0; i < kAcc; ++i) total[i] = 0.f, acc[i] = 0;
    take(g[0], 0);
    int b = w.b0;
#pragma unroll 1
    for (; b + 2 < w.b1; b += 2) {
      group_step<true>(total, acc, g[0], g[1]);
      group_step<true>(total, acc, g[1], g[0]);
    }
    if (b + 1 < w.b1) {
      group_step<true>(total, acc, g[0], g[1]);
      group_step<false>(total, acc, g[1], g[0]);
    } else {
      group_step<false>(total, acc, g[0], g[1]);
    }
  }

  // What belongs to this thread's two features.
  struct Features {
    float scale[2], bias[2];
    int32_t zero[2];
  };
  __device__ Features features(const Work& w) const {
    Features f;
    const int panel = min(w.panel + warpgroup, a.panels - 1), in = warp * 16 + r;
    const uint8_t* tail = a.w + (panel + 1) * a.panel_bytes;
    if constexpr (T::kScheme == Scheme::kChannel) tail -= 64;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int n = panel * 64 + in + 8 * h;
      f.scale[h] = 1.f;
      if constexpr (!T::kGroup)
        f.scale[h] = *reinterpret_cast<const float*>(tail - 256 + (in + 8 * h) * 4);
      f.zero[h] = T::kScheme == Scheme::kChannel ? tail[in + 8 * h] : 128;
      f.bias[h] = a.bias && n < a.N ? load_float(a.bias, n, a.dtype) : 0.f;
    }
    return f;
  }

  // Takes the zero points out of this part's sums.
  __device__ void fold_zeros(Features& f, Total (&total)[T::kAcc]) const {
    if constexpr (!T::kGroup) {
#pragma unroll
      for (int j = 0; j < T::kColumns; ++j) {
        const uint2 sum = ptx::load_shared8(s.sums + (j * 8 + 2 * c) * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          total[4 * j + i] -= f.zero[i / 2] * int32_t(i % 2 ? sum.y : sum.x);
      }
      f.zero[0] = f.zero[1] = 0;
    }
  }

  // Scales and code sums of this thread's two tokens of column `j`.
  struct Tokens {
    uint2 scale, sum;
  };
  __device__ Tokens tokens(int j) const {
    const uint32_t at_token = (j * 8 + 2 * c) * 4;
    Tokens t{ptx::load_shared8(s.scales + at_token), make_uint2(0, 0)};
    if constexpr (!T::kGroup) t.sum = ptx::load_shared8(s.sums + at_token);
    return t;
  }

  // Results of 8 tokens into shared memory, where a token is a row of 64 features, whose 16-byte
  // pieces are swizzled as the copy engine expects it.
  __device__ void stage_column(const Features& f, const Tokens& of, uint32_t to,
                               const Total (&total)[4]) const {
    float y[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      Total t = total[e];
      if constexpr (!T::kGroup) t -= f.zero[e / 2] * int32_t(e % 2 ? of.sum.y : of.sum.x);
      y[e] = float(t) * (__uint_as_float(e % 2 ? of.scale.y : of.scale.x) * f.scale[e / 2]) +
             f.bias[e / 2];
    }
    const uint32_t row = lane % 8, piece = warp * 2 + lane / 8 % 2;
    ptx::store_transposed(to + row * 128 + (piece ^ row) * 16, pack2(y[0], y[1], a.dtype),
                          pack2(y[2], y[3], a.dtype));
  }

  // `rows` staged rows to tokens from m0 on, as far as there are tokens and features. Unlike
  // copies, these stores need not be waited for at the end.
  __device__ void store(const Work& w, int64_t m0, int rows, uint32_t from) const {
    const int n = (w.panel + warpgroup) * 64;
    ptx::named_barrier(T::kGroupBarrier + warpgroup, 128);
    auto* out16 = static_cast<uint16_t*>(a.out);
    if (a.vector) {
      const int piece = thread % 8;
      if (n + piece * 8 >= a.N) return;
#pragma unroll 4
      for (int t = thread / 8; t < rows && m0 + t < a.M; t += 16)
        *reinterpret_cast<uint4*>(out16 + (m0 + t) * a.N + n + piece * 8) =
            ptx::load_shared16(from + t * 128 + (piece ^ t % 8) * 16);
      return;
    }
    const int feature = thread % 64;  // rows that are no multiple of 16 bytes
    if (n + feature >= a.N) return;
    for (int t = thread / 64; t < rows && m0 + t < a.M; t += 2)
      out16[(m0 + t) * a.N + n + feature] = uint16_t(
          ptx::load_shared2(from + t * 128 + (feature / 8 ^ t % 8) * 16 + feature % 8 * 2));
  }
  // The same for one of several lots, by a copy that goes on behind the next ones: a warp waits for
  // the others' rows and starts it, which takes that warp 200 cycles.
  __device__ void send(const Work& w, int64_t m0, int rows, uint32_t from, int sender) const {
    const int n = (w.panel + warpgroup) * 64,
              barrier = T::kLotBarrier + warpgroup * T::kLots + sender;
    if (!a.vector) return store(w, m0, rows, from);
    ptx::fence_for_copies();
    if (warp != sender) return ptx::named_barrier_arrive(barrier, 128);
    ptx::named_barrier(barrier, 128);
    if (lane == 0 && n < a.N) ptx::store_box(out, n, int(m0), from);
    if (lane == 0) ptx::store_commit();
  }

  template <int kSplit>
  __device__ void finish_parts(const Work& w, Features& f, Total (&total)[T::kAcc]) const {
    using P = Parts<T, Total, kSplit>;
    constexpr int kRows = 8 * P::kOwned;
    P parts{s, at.part};
    const int first = at.part * kRows, columns = parts.columns_of(at.part);
    const uint32_t staging = s.staging + warpgroup * T::kBuffers * T::kStagingBytes;
    fold_zeros(f, total);
    ptx::cluster_wait();
    parts.give(total);
    if (parts.owns()) {
      Total sum[P::kOwned][4];
      parts.take(sum);
#pragma unroll
      for (int j = 0; j < P::kOwned; ++j)
        if (j < columns)
          stage_column(f, tokens(at.part * P::kOwned + j), staging + j * 1024, sum[j]);
    }
    ptx::cluster_arrive();
    if (parts.owns()) store(w, w.m0 + first, 8 * columns, staging);
  }

  // A tile of kTokens: a token tile or half of one.
  template <int kTokens>
  __device__ void tile(const Work& w) {
    Total total[kTokens / 2];
    // the first stage is there, so the previous grid is done: everything may be read now
    ptx::barrier_wait(s.full + ring.stage * 8, ring.parity);
    Features f = features(w);
    sum_blocks(w, total);
    ptx::barrier_wait(s.token_full, token_parity);
    token_parity ^= 1;
    if constexpr (T::kTile.splits(2) && kTokens == T::kTokens)
      if (a.split > 1) {
        if (a.split == 2) return finish_parts<2>(w, f, total);
        if (a.split == 4) return finish_parts<4>(w, f, total);
        if constexpr (T::kTile.splits(3))
          if (a.split == 3) return finish_parts<3>(w, f, total);
        if constexpr (T::kTile.splits(6))
          if (a.split == 6) return finish_parts<6>(w, f, total);
        return finish_parts<8>(w, f, total);
      }
    if constexpr (T::kStream) {
      if (w.b1 - w.b0 < a.blocks) fold_zeros(f, total);
      if (w.b0 > 0) {
        a.stream.template leave<T::kMath>(total, at.cluster, T::kLeaveBarrier);
        ptx::barrier_arrive(s.token_empty);
        return;
      }
      if (w.b1 < a.blocks)
        a.stream.template add_rest<T::kMath>(total, w.tile, at.cluster, T::kMathBarrier);
    }
    constexpr int kColumnsEach = T::kStaged / 8;
    ptx::store_wait_read<0>();
    ptx::named_barrier(T::kGroupBarrier + warpgroup, 128);
#pragma unroll
    for (int pass = 0; pass < kTokens / T::kStaged; ++pass) {
      const uint32_t staging =
          s.staging + (warpgroup * T::kBuffers + pass % T::kBuffers) * T::kStagingBytes;
      if (pass >= T::kBuffers) {
        if (warp == pass - T::kBuffers) ptx::store_wait_read<0>();
        ptx::named_barrier(T::kGroupBarrier + warpgroup, 128);
      }
      Tokens of[kColumnsEach];  // all loads first: they would wait for one another's stores
#pragma unroll
      for (int i = 0; i < kColumnsEach; ++i) of[i] = tokens(pass * kColumnsEach + i);
#pragma unroll
      for (int i = 0; i < kColumnsEach; ++i) {
        const int j = pass * kColumnsEach + i;
        const Total four[4] = {total[4 * j], total[4 * j + 1], total[4 * j + 2], total[4 * j + 3]};
        stage_column(f, of[i], staging + i * 1024, four);
      }
      const int64_t m0 = w.m0 + pass * T::kStaged;
      if constexpr (T::kTile.sends(1))
        send(w, m0, T::kStaged, staging, pass);
      else
        store(w, m0, T::kStaged, staging);
    }
    ptx::barrier_arrive(s.token_empty);
  }

  __device__ void run() {
#pragma unroll 1
    for (Items<T> items(a, at); items.more();) {
      const Work w = items.take();
      if constexpr (T::kTile.halves() && !T::kStream)
        if (w.half) {
          tile<T::kTokens / 2>(w);
          continue;
        }
      tile<T::kTokens>(w);
    }
    ptx::store_wait_read<0>();  // copies still read shared memory, which ends with this block
  }
};

// By one thread of each warp, which has some of the barriers: one takes 60 cycles.
template <class T>
__device__ void init_barriers(const Args& a, const Shared<T>& s, int part, int warp) {
  constexpr int kWarps = T::kThreads / 32;
#pragma unroll 1
  for (int i = warp; i < a.stages; i += kWarps) {
    if (i > 0) ptx::barrier_init(s.full + i * 8, kStageArrivals);
    ptx::barrier_init(s.empty + i * 8, T::kMath);
  }
  if (warp == kWarps - 1) {
    ptx::barrier_init(s.token_full, 32);
    ptx::barrier_init(s.token_empty, T::kMath);
    ptx::barrier_init(s.reduced, 1);
    if (const int columns = min(a.owned, T::kColumns - part * a.owned); a.split > 1 && columns > 0)
      ptx::barrier_arrive_expect(s.reduced, (a.split - 1) * columns * T::kTile.column_bytes());
  }
  ptx::barrier_init_fence();
}

template <class T>
__global__ __launch_bounds__(T::kThreads,
                             T::kBlocksPerSm) void gemm(const __grid_constant__ CUtensorMap map,
                                                        const __grid_constant__ CUtensorMap half,
                                                        const __grid_constant__ CUtensorMap out,
                                                        const __grid_constant__ Args a) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const Shared<T> s(ptx::shared_address(shared_memory), a);
  const Place at = Place::of<T>(a);
  constexpr int kMathWarps = T::kMath / 32, kWarps = T::kThreads / 32;
  constexpr bool kTwoLoaders = T::kTile.two_loaders();
  const int warp = warp_index();
  const bool first_lane = threadIdx.x % 32 == 0;
  if (first_lane) {
    if (warp == kMathWarps + 1) ptx::prefetch_map(&map);
    if (warp == kMathWarps) Loader<T, true, !kTwoLoaders>{a, at, s, &map, &half}.start();
    init_barriers(a, s, at.part, (warp + kWarps - kMathWarps) % kWarps);
  }
  __syncthreads();
  if (a.split > 1) ptx::cluster_arrive();  // started, barriers ready
  if (warp < kMathWarps) {
    if constexpr (T::kTile.moves_registers()) ptx::more_registers<T::kTile.math_registers()>();
    Math<T>(a, at, s, &out).run();
  } else {
    if constexpr (T::kTile.moves_registers()) ptx::fewer_registers<T::kTile.loader_registers()>();
    if (warp == kMathWarps && first_lane)
      Loader<T, true, !kTwoLoaders>{a, at, s, &map, &half}.run();
    if constexpr (kTwoLoaders)
      if (warp == kMathWarps + 2 && first_lane) Loader<T, false, true>{a, at, s, &map, &half}.run();
    if (warp == kMathWarps + 1) token_warp(a, at, s);
    if constexpr (T::kStream)
      if (warp == kMathWarps + 3 && Items<T>(a, at).take().b0 > 0)
        a.stream.template signal<T::kMath>(at.cluster, T::kLeaveBarrier);
    if (a.split > 1) {
      ptx::cluster_wait();
      ptx::cluster_arrive();
    }
  }
  if (a.split > 1) ptx::cluster_wait();
}

}  // namespace tessella::w4ax_gemm::sm90
