// Hopper bodies of w4ax_gemm: arguments, shared memory, and what a thread block works on.
//
// A block's items are parts of tiles: first its equal share of the K blocks of the `stream` leading
// tiles, then whole tiles in turn. Parts of one tile meet in cuda/stream_k.cuh; parts of a
// cluster's split meet in shared memory.
#pragma once
#include <type_traits>

#include "core/hd.h"
#include "cuda/async.cuh"
#include "cuda/stream_k.cuh"
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
  int token_tiles, feature_tiles;
  Divisor per_group, last_rows;  // tiles of 8 token tiles, and token tiles past the last 8
  int tiles, whole;              // tiles past the first `whole` have half of the tokens
  int stages;
  int split, owned;   // parts of K, and the 8-token columns that one adds up
  int share, longer;  // blocks of K of a part; the first `longer` parts have one more
  // Where the ring starts in shared memory. A number that the compiler does not know: where it
  // knows an address to be aligned it makes the next descriptor by setting bits of the last one in
  // place, and every wgmma waits for the one before to have read its own.
  int ring;
  StreamK stream;  // the leading tiles that are dealt out by K
  DType dtype;
  bool programmatic;  // the previous grid may still run
  bool vector;        // rows of the result are whole, aligned 16-byte vectors
};

template <Scheme kS, int kT, int kF, bool kStreamed = false, bool kBytes = false>
struct Tile {
  static constexpr Scheme kScheme = kS;
  static constexpr int kTokens = kT;
  static constexpr bool kWide = kBytes;  // weights are the bytes that are multiplied
  static constexpr Sm90Tile kTile{kT, kF, kS, kWide};
  static constexpr int kWarpgroups = kTile.warpgroups(), kMath = kTile.math_threads();
  static constexpr int kThreads = kTile.threads(), kBlocksPerSm = kTile.blocks_per_sm();
  static constexpr int kBlockBytes = kTile.block_bytes(), kChunk = kTile.chunk();
  // of a stage: kChunk blocks, [blocks][tokens][128] and [warpgroups][blocks][kBlockBytes]
  static constexpr int kActBytes = kTile.act_bytes(), kWeightBytes = kTile.weight_bytes();
  static constexpr int kColumns = kT / 8, kAcc = kT / 2;  // 8-token columns; accumulators a thread
  static constexpr int kStaged = kTile.staged_tokens(), kStagingBytes = kStaged * 128;
  static constexpr int kBuffers = kTile.staging_buffers();
  static constexpr bool kGroup = kS == Scheme::kGroup, kStream = kStreamed;
  // named barriers, 1 to 15: of a warpgroup, of its lots of results, of all math threads, and of
  // these and a warp that raises a flag
  static constexpr int kLots = kT / kStaged;
  static constexpr int kGroupBarrier = 1, kLotBarrier = kGroupBarrier + kWarpgroups;
  static constexpr int kMathBarrier = 14, kLeaveBarrier = 15;
  static_assert(kLotBarrier + kWarpgroups * kLots <= kMathBarrier);
};

// Shared memory, by address; offsets follow Sm90Tile::smem_bytes. What the ring's depth does not
// move comes first, so that its places are known here.
template <class T>
struct Shared {
  uint32_t staging, sums, scales, full, empty, token_full, token_empty, reduced, acts, weights,
      reduce;

  __device__ Shared(uint32_t base, const Args& a)
      : staging(base),
        sums(staging + T::kTile.staging_bytes()),
        scales(sums + T::kTokens * 4),
        full(scales + T::kTokens * 4),
        empty(full + kSm90MostStages * 8),
        token_full(empty + kSm90MostStages * 8),
        token_empty(token_full + 8),
        reduced(token_empty + 8),
        acts(base + a.ring),
        weights(acts + a.stages * T::kActBytes),
        reduce(weights + a.stages * T::kWeightBytes) {}
};

// This thread block's part of the work: its cluster's tiles, and its part of their K.
struct Place {
  int cluster, clusters, part;

  template <class T>
  static __device__ Place of(const Args& a) {
    if constexpr (T::kStream) return {a.stream.rank(), int(gridDim.x), 0};
    return {ptx::cluster_index(), ptx::cluster_count(), ptx::cluster_rank()};
  }
};

struct Work {
  int m0, panel, b0, b1;  // first token, first panel, blocks of 128 channels
  int tile;
  bool half;  // of a token tile

  // Groups of 8 token tiles go over all features before the next group: what is read at about the
  // same time stays small enough for L2.
  template <class T>
  __device__ static Work of(const Args& a, const Place& at, int tile) {
    const int past = tile - a.whole;
    const bool half = T::kTile.halves() && past >= 0;
    const int unit = half ? a.whole + past / 2 : tile;
    int row = 0, column = unit;
    if (a.token_tiles > 1) {
      const int group = a.per_group.divide(unit), in = unit - group * 8 * a.feature_tiles;
      const int rows = min(8, a.token_tiles - group * 8);
      column = rows == 8 ? in / 8 : a.last_rows.divide(in);
      row = group * 8 + in - column * rows;
    }
    const int m0 = row * T::kTokens + (half ? past % 2 * (T::kTokens / 2) : 0);
    return {m0,
            column * T::kWarpgroups,
            at.part * a.share + min(at.part, a.longer),
            (at.part + 1) * a.share + min(at.part + 1, a.longer),
            tile,
            half};
  }
};

// The items of a thread block, in order.
template <class T>
struct Items {
  const Args& a;
  const Place& at;
  int tile;               // the next whole one
  int next = 0, end = 0;  // streamed blocks to come

  __device__ Items(const Args& args, const Place& place) : a(args), at(place), tile(at.cluster) {
    if constexpr (!T::kStream) return;
    next = a.stream.begin(at.cluster);
    end = a.stream.begin(at.cluster + 1);
    tile += a.stream.tiles;
  }
  __device__ bool more() const { return (T::kStream && next < end) || tile < a.tiles; }
  __device__ Work take() {
    if (T::kStream && next < end) {
      const int t = next / a.blocks;
      Work w = Work::of<T>(a, at, t);
      w.b0 = next - t * a.blocks;
      w.b1 = min(a.blocks, w.b0 + end - next);
      next += w.b1 - w.b0;
      return w;
    }
    const Work w = Work::of<T>(a, at, tile);
    tile += at.clusters;
    return w;
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

}  // namespace tessella::w4ax_gemm::sm90
