// w4ax_gemm on Hopper: y^T = w a^T with the weights as wgmma's 64-row register operand.
//
// A thread block computes 64 features per math warpgroup x kTokens tokens. Per block of 128
// channels a stage of the ring holds each warpgroup's packed weights (one contiguous copy) and the
// tokens' codes (a swizzled box). A math thread takes its 64 codes with two 128-bit loads, widens
// them to fragment registers (layout/w4_frag.h: 5 operations for 8 two-level codes) and issues 4
// wgmma, while those of the stage before still run.
//
// Warps beside the math ones: a loader that feeds the ring, and one that adds up the tokens' code
// sums. u8 weights leave a zero point in the integer sum (128 for two-level bytes, z for channel
// codes) times that sum, and both are exact. g128 subtracts z in the registers instead and adds its
// integer sums to fp32 totals every 128 channels.
//
// The loader fetches weights before it waits for the previous grid, and nothing else touches memory
// before that wait (programmatic dependent launch).
#pragma once
#include <type_traits>

#include "core/hd.h"
#include "cuda/async.cuh"
#include "cuda/float.cuh"
#include "cuda/w4_decode.cuh"
#include "cuda/wgmma.cuh"
#include "w4ax_gemm/plan_sm90.h"

namespace tessella::w4ax_gemm::sm90 {

struct Args {
  const uint8_t* w;
  const int32_t* sums;
  const float* scales;
  const void* bias;
  void* out;
  int64_t panel_bytes, M;
  int N, blocks, panels;
  int token_tiles, feature_tiles, tiles;  // feature tiles of `share` thread blocks
  int stages, split, share;
  DType dtype;
  bool vector;  // rows of the result are whole, aligned 16-byte vectors
};

template <Scheme kS, int kT>
struct Tile {
  static constexpr Scheme kScheme = kS;
  static constexpr int kTokens = kT;
  static constexpr Sm90Tile kTile{kT, kS};
  static constexpr int kWarpgroups = kTile.warpgroups(), kMath = kTile.math_threads();
  static constexpr int kThreads = kTile.threads(), kBlocksPerSm = kTile.blocks_per_sm();
  static constexpr int kBlockBytes = kTile.block_bytes(), kActBytes = kTile.act_bytes();
  static constexpr int kColumns = kT / 8, kAcc = kT / 2;  // 8-token columns; accumulators a thread
  static constexpr int kStaged = kTile.staged_tokens();
  static constexpr bool kGroup = kS == Scheme::kGroup;
};

// Shared memory, by address; offsets follow Sm90Tile::smem_bytes.
template <class T>
struct Shared {
  uint32_t acts, weights, reduce, staging, sums, scales, full, empty, token_full, token_empty;

  __device__ Shared(uint32_t base, const Args& a)
      : acts(base),
        weights(acts + a.stages * T::kActBytes),
        reduce(weights + a.stages * T::kWarpgroups * T::kBlockBytes),
        staging(reduce + (a.split == 1 ? 0 : reduce_bytes(a.split))),
        sums(staging + T::kWarpgroups * T::kStaged * 128),
        scales(sums + T::kTokens * 4),
        full(scales + T::kTokens * 4),
        empty(full + a.stages * 8),
        token_full(empty + a.stages * 8),
        token_empty(token_full + 8) {}
  // 8-token columns of an owner, as a power of two.
  __device__ static int owned_log2(int split) {
    return split < T::kColumns ? __ffs(T::kColumns / split) - 1 : 0;
  }
  __device__ static int reduce_bytes(int split) {
    return (split << owned_log2(split)) * T::kMath * 16;
  }
};

// This thread block's part of the work.
struct Place {
  int cluster, clusters, part, member;  // part: of K; member: of the features

  __device__ explicit Place(const Args& a) {
    const int size = a.split * a.share, rank = blockIdx.x % size;
    cluster = blockIdx.x / size;
    clusters = gridDim.x / size;
    part = rank / a.share;
    member = rank % a.share;
  }
};

struct Work {
  int m0, panel, b0, b1;  // first token, first panel, blocks of 128 channels

  // Groups of 8 token tiles go over all features before the next group: what is read at about the
  // same time stays small enough for L2.
  template <class T>
  __device__ static Work of(const Args& a, const Place& at, int tile) {
    const int per_group = 8 * a.feature_tiles, first = tile / per_group * 8;
    const int rows = min(8, a.token_tiles - first), in = tile % per_group;
    const int feature_tile = in / rows * a.share + at.member;
    return {(first + in % rows) * T::kTokens, feature_tile * T::kWarpgroups,
            int(int64_t{a.blocks} * at.part / a.split),
            int(int64_t{a.blocks} * (at.part + 1) / a.split)};
  }
};

// A position in the ring; parity flips on every round.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void next(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// --- loader

template <class T>
struct Loader {
  const Args& a;
  const Place& at;
  const Shared<T>& s;
  const CUtensorMap* map;

  __device__ void weights(const Work& w, int b, int stage) const {
    const int panels = min(T::kWarpgroups, max(0, a.panels - w.panel));
    const uint32_t full = s.full + stage * 8;
    ptx::barrier_arrive_expect(full, T::kActBytes + panels * T::kBlockBytes);
    for (int i = 0; i < panels; ++i)
      ptx::copy_bulk(s.weights + (stage * T::kWarpgroups + i) * T::kBlockBytes,
                     a.w + (w.panel + i) * a.panel_bytes + int64_t{b} * T::kBlockBytes,
                     T::kBlockBytes, full);
  }
  __device__ void acts(const Work& w, int b, int stage) const {
    const uint32_t full = s.full + stage * 8, to = s.acts + stage * T::kActBytes;
    if (a.share == 1) return ptx::copy_box(to, map, 0, w.m0, b, full);
    const int rows = T::kTokens / 2 * at.member;
    ptx::copy_box_to_pair(to + rows * 128, map, 0, w.m0 + rows, b, full);
  }
  __device__ void run() const {
    const Work first = Work::of<T>(a, at, at.cluster);
    const int early = min(a.stages, first.b1 - first.b0);
    for (int i = 0; i < early; ++i) weights(first, first.b0 + i, i);
    if (a.share > 1) ptx::cluster_wait();
    ptx::wait_for_previous_grid();
    Ring ring;
    for (int i = 0; i < early; ++i, ring.next(a.stages)) acts(first, first.b0 + i, i);
    int skip = early;
    for (int tile = at.cluster; tile < a.tiles; tile += at.clusters) {
      const Work w = Work::of<T>(a, at, tile);
      for (int b = w.b0 + skip; b < w.b1; ++b, ring.next(a.stages)) {
        ptx::barrier_wait(s.empty + ring.stage * 8, ring.parity ^ 1);
        weights(w, b, ring.stage);
        acts(w, b, ring.stage);
      }
      skip = 0;
    }
  }
};

// --- token sums and scales, by one warp

template <class T>
__device__ void token_warp(const Args& a, const Place& at, const Shared<T>& s) {
  constexpr int kEach = T::kTokens < 32 ? 1 : T::kTokens / 32;
  const int lane = threadIdx.x % 32;
  ptx::wait_for_previous_grid();
  ptx::allow_next_grid();
  uint32_t parity = 1;
  for (int tile = at.cluster; tile < a.tiles; tile += at.clusters, parity ^= 1) {
    const Work w = Work::of<T>(a, at, tile);
    int32_t sum[kEach] = {};
    float scale[kEach] = {};
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (const int64_t m = w.m0 + lane + 32 * i; m < a.M) scale[i] = a.scales[m];
    if (!T::kGroup) {
#pragma unroll 4
      for (int b = w.b0; b < w.b1; ++b)
#pragma unroll
        for (int i = 0; i < kEach; ++i)
          if (const int64_t m = w.m0 + lane + 32 * i; m < a.M) sum[i] += a.sums[b * a.M + m];
    }
    ptx::barrier_wait(s.token_empty, parity);
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (lane + 32 * i < T::kTokens) {
        ptx::store_shared4(s.sums + (lane + 32 * i) * 4, uint32_t(sum[i]));
        ptx::store_shared4(s.scales + (lane + 32 * i) * 4, __float_as_uint(scale[i]));
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
  int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128, warp = thread / 32;
  int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  Ring ring;
  uint32_t token_parity = 0;

  __device__ Math(const Args& args, const Place& place, const Shared<T>& shared)
      : a(args), at(place), s(shared) {}

  // This warp has read all it needs of a stage.
  __device__ void release(int stage) const {
    if (lane != 0) return;
    const uint32_t empty = s.empty + stage * 8;
    if (a.share == 1) return ptx::barrier_arrive(empty);
    for (int i = 0; i < 2; ++i) ptx::peer_arrive(empty, at.part * 2 + i);
  }

  // Fragment registers of the 128 channels in `stage`; for g128 also the scales of both features.
  __device__ void decode(int stage, uint32_t (&f)[4][4], float (&scale)[2]) const {
    const uint32_t from = s.weights + (stage * T::kWarpgroups + warpgroup) * T::kBlockBytes;
    const uint32_t pair = warp * 8 + r;
    uint32_t meta = 0, zeros = 0;
    if constexpr (T::kScheme != Scheme::kChannel) meta = ptx::load_shared4(from + 4096 + pair * 4);
    if constexpr (T::kGroup) {
      zeros = ptx::load_shared2(from + 4096 + 128 + pair * 2);
      scale[0] = half_bits(meta & 0xffff);
      scale[1] = half_bits(meta >> 16);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 v = ptx::load_shared16(from + i * 2048 + thread * 16);
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int h = j % 2;
        uint32_t (&to)[4] = f[i * 2 + j / 2];
        if constexpr (T::kScheme == Scheme::kChannel)
          ptx::codes_u8(words[j], to[h], to[h + 2]);
        else if constexpr (T::kGroup)
          ptx::codes_s8(words[j], ptx::repeat_byte(zeros, h), to[h], to[h + 2]);
        else
          ptx::two_level_u8(words[j], ptx::byte_of(meta, 2 * h), ptx::repeat_byte(meta, 2 * h + 1),
                            to[h], to[h + 2]);
      }
    }
  }

  // Integer sums over one stage; `add` false starts them from zero.
  __device__ void multiply(int32_t (&acc)[T::kAcc], uint32_t (&f)[4][4], bool add) const {
    const uint64_t x = ptx::swizzled_rows(s.acts + ring.stage * T::kActBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k)
      ptx::Wgmma<T::kTokens, T::kGroup>::run(acc, f[k], x + 2 * k, k > 0 || add);
    ptx::wgmma_commit();
  }

  // One stage of channel and two-level: its products run on while the next stage is decoded into
  // the other set of registers.
  __device__ void step(int32_t (&acc)[T::kAcc], uint32_t (&f)[4][4], bool first) {
    float unused[2];
    ptx::barrier_wait(s.full + ring.stage * 8, ring.parity);
    decode(ring.stage, f, unused);
    multiply(acc, f, !first);
    ptx::wgmma_wait<1>();
    if (!first) release(ring.stage == 0 ? a.stages - 1 : ring.stage - 1);
    ring.next(a.stages);
  }
  __device__ void sum_blocks(const Work& w, int32_t (&acc)[T::kAcc]) {
    uint32_t f[2][4][4];
    int b = w.b0;
    for (; b + 1 < w.b1; b += 2) {
      step(acc, f[0], b == w.b0);
      step(acc, f[1], false);
    }
    // a last odd stage in the loop, under a condition, would make ptxas serialise all wgmma
    ptx::wgmma_wait<0>();
    if (b < w.b1) {
      step(acc, f[0], b == w.b0);
      ptx::wgmma_wait<0>();
    }
    release(ring.stage == 0 ? a.stages - 1 : ring.stage - 1);
  }

  // g128: the sums of each stage become fp32 at once.
  __device__ void sum_blocks(const Work& w, float (&total)[T::kAcc]) {
    int32_t acc[T::kAcc];
    uint32_t f[4][4];
    float scale[2];
#pragma unroll
    for (int i = 0; i < T::kAcc; ++i) total[i] = 0.f;
    for (int b = w.b0; b < w.b1; ++b) {
      ptx::barrier_wait(s.full + ring.stage * 8, ring.parity);
      decode(ring.stage, f, scale);
      multiply(acc, f, false);
      ptx::wgmma_wait<0>();
      release(ring.stage);
      ring.next(a.stages);
#pragma unroll
      for (int i = 0; i < T::kAcc; ++i) total[i] += float(acc[i]) * scale[i / 2 % 2];
    }
  }

  // Adds up the parts of K: every block sends each owner its columns and sums up its own in order.
  // Peers' shared memory is live: all blocks have passed the barrier that cluster_wait ends.
  __device__ void add_parts(Total (&total)[T::kAcc], int owned) const {  // log2
    ptx::cluster_wait();
#pragma unroll
    for (int j = 0; j < T::kColumns; ++j) {
      const int owner = j >> owned;
      const int slot = ((at.part - owner << owned) + j) * T::kMath + threadIdx.x;
      if (owner != at.part)
        ptx::peer_store(ptx::peer_address(s.reduce + slot * 16, owner), bits(total[4 * j]),
                        bits(total[4 * j + 1]), bits(total[4 * j + 2]), bits(total[4 * j + 3]));
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
#pragma unroll
    for (int j = 0; j < T::kColumns; ++j) {
      if (j >> owned != at.part) continue;
      Total sum[4] = {};
      for (int part = 0; part < a.split; ++part) {
        const int slot = ((part - at.part << owned) + j) * T::kMath + threadIdx.x;
        const uint4 v = ptx::load_shared16(s.reduce + slot * 16);
        const uint32_t sent[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sum[i] += part == at.part ? total[4 * j + i] : from_bits(sent[i]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) total[4 * j + i] = sum[i];
    }
  }
  __device__ static uint32_t bits(int32_t x) { return uint32_t(x); }
  __device__ static uint32_t bits(float x) { return __float_as_uint(x); }
  __device__ static Total from_bits(uint32_t x) {
    if constexpr (T::kGroup) return __uint_as_float(x);
    return Total(x);
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

  // Takes the zero points out of the sums, and this block's part only: sums[token] covers that.
  __device__ void fold_zeros(const Features& f, Total (&total)[T::kAcc]) const {
    if constexpr (!T::kGroup) {
#pragma unroll
      for (int i = 0; i < T::kAcc; ++i) {
        const uint32_t token = i / 4 * 8 + 2 * c + i % 2;
        total[i] -= f.zero[i / 2 % 2] * int32_t(ptx::load_shared4(s.sums + token * 4));
      }
    }
  }

  // Results of columns from kStaged / 8 * pass on, into shared memory: there a token is a row of 64
  // features, whose 16-byte pieces are swizzled against bank conflicts.
  __device__ void stage(const Features& f, int pass, const Total (&total)[T::kAcc]) const {
    const uint32_t staging = s.staging + warpgroup * T::kStaged * 128;
    const uint32_t row = lane % 8, piece = warp * 2 + lane / 8 % 2;
#pragma unroll
    for (int i = 0; i < T::kStaged / 8; ++i) {
      const int j = pass * (T::kStaged / 8) + i;
      const uint32_t token = (j * 8 + 2 * c) * 4;
      const float s0 = __uint_as_float(ptx::load_shared4(s.scales + token));
      const float s1 = __uint_as_float(ptx::load_shared4(s.scales + token + 4));
      uint32_t rows[2];
#pragma unroll
      for (int h = 0; h < 2; ++h)
        rows[h] = pack2(float(total[4 * j + 2 * h]) * (s0 * f.scale[h]) + f.bias[h],
                        float(total[4 * j + 2 * h + 1]) * (s1 * f.scale[h]) + f.bias[h], a.dtype);
      ptx::store_transposed(staging + (i * 8 + row) * 128 + (piece ^ row) * 16, rows[0], rows[1]);
    }
  }

  // Staged rows to memory, as far as there are tokens and features and this block owns them.
  __device__ void store(const Work& w, int pass, int owned) const {
    const uint32_t staging = s.staging + warpgroup * T::kStaged * 128;
    const int n = (w.panel + warpgroup) * 64 + thread % 8 * 8;
    for (int t = thread / 8; t < T::kStaged; t += 16) {
      const int token = pass * T::kStaged + t;
      const int64_t m = w.m0 + token;
      if (m >= a.M || (a.split > 1 && token / 8 >> owned != at.part)) continue;
      const uint4 v = ptx::load_shared16(staging + t * 128 + (thread % 8 ^ t % 8) * 16);
      uint16_t* to = static_cast<uint16_t*>(a.out) + m * a.N + n;
      if (a.vector) {
        if (n < a.N) *reinterpret_cast<uint4*>(to) = v;
        continue;
      }
      const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (n + i < a.N) to[i] = uint16_t(pairs[i / 2] >> (i % 2 * 16));
    }
  }

  __device__ void tile(const Work& w) {
    Total total[T::kAcc];
    // the first stage is there, so the previous grid is done: everything may be read now
    ptx::barrier_wait(s.full + ring.stage * 8, ring.parity);
    const Features f = features(w);
    sum_blocks(w, total);
    ptx::barrier_wait(s.token_full, token_parity);
    token_parity ^= 1;
    fold_zeros(f, total);
    const int owned = Shared<T>::owned_log2(a.split);
    if constexpr (T::kTile.most_split() > 1)
      if (a.split > 1) add_parts(total, owned);
#pragma unroll
    for (int pass = 0; pass < T::kTokens / T::kStaged; ++pass) {
      stage(f, pass, total);
      ptx::named_barrier(1 + warpgroup, 128);
      store(w, pass, owned);
      ptx::named_barrier(1 + warpgroup, 128);
    }
    if (lane == 0) ptx::barrier_arrive(s.token_empty);
  }

  __device__ void run() {
    for (int t = at.cluster; t < a.tiles; t += at.clusters) tile(Work::of<T>(a, at, t));
  }
};

template <class T>
__device__ void init_barriers(const Args& a, const Shared<T>& s) {
  for (int i = 0; i < a.stages; ++i) {
    ptx::barrier_init(s.full + i * 8, 1);
    ptx::barrier_init(s.empty + i * 8, T::kMath / 32 * a.share);
  }
  ptx::barrier_init(s.token_full, 32);
  ptx::barrier_init(s.token_empty, T::kMath / 32);
  ptx::barrier_init_fence();
}

template <class T>
__global__ __launch_bounds__(T::kThreads,
                             T::kBlocksPerSm) void gemm(const __grid_constant__ CUtensorMap map,
                                                        const __grid_constant__ Args a) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const Shared<T> s(ptx::shared_address(shared_memory), a);
  const Place at(a);
  const int warp = threadIdx.x / 32;
  const bool loader = threadIdx.x == T::kMath;
  if (loader) {
    ptx::prefetch_map(&map);
    init_barriers(a, s);
  }
  __syncthreads();
  // started, barriers ready; waited for before a peer is used
  if (a.split * a.share > 1) ptx::cluster_arrive_relaxed();
  if (warp < T::kMath / 32) {
    if constexpr (T::kTile.moves_registers()) ptx::more_registers<232>();
    if (a.share > 1) ptx::cluster_wait();
    Math<T>(a, at, s).run();
  } else {
    if constexpr (T::kTile.moves_registers()) ptx::fewer_registers<40>();
    if (a.share > 1 && !loader) ptx::cluster_wait();
    if (loader) Loader<T>{a, at, s, &map}.run();
    if (warp == T::kMath / 32 + 1) token_warp(a, at, s);
    if (a.split > 1) {  // what the math threads do in add_parts
      ptx::cluster_wait();
      ptx::cluster_arrive();
      ptx::cluster_wait();
    }
  }
  if (a.share > 1) {  // a peer may still write here
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
  }
}

}  // namespace tessella::w4ax_gemm::sm90
