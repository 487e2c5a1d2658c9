// Planner of w4ax_gemm on Hopper: a pure function from problem to token tile, split and grid.
//
// A thread block computes `features` x `tokens` results over its part of K, with a ring of `stages`
// loads in flight. The blocks of a cluster split K between them and add their sums.
// Without a split the grid is persistent: a block takes tiles in turn, and those that would not
// fill a last wave may be cut in halves.
#pragma once
#include <algorithm>
#include <string>

#include "core/hd.h"
#include "w4ax_gemm/kernels.h"

namespace tessella::w4ax_gemm {

struct GpuProblem {
  int64_t M, N, Kp;
  Scheme scheme;
  int sms;
  bool wide = false;  // two-level weights as the bytes that are multiplied
};

// A tile's features and tokens, one of TSL_W4AX_GEMM_SM90_TILES.
struct Sm90Size {
  int tokens = 0, features = 0;

  bool operator==(const Sm90Size& other) const {
    return tokens == other.tokens && features == other.features;
  }
};

struct Sm90Named {
  const char* name;  // of the kernels, behind "t", and "s" for shares of K
  Sm90Size size;
};
inline constexpr Sm90Named kSm90Tiles[] = {
#define X(name, tokens, features) {#name, {tokens, features}},
    TSL_W4AX_GEMM_SM90_TILES(X)
#undef X
};
// The tile of a kernel's name, or no tokens.
Sm90Size sm90_size(const std::string& name);

struct Sm90Plan {
  Sm90Size size;
  int stages;  // ring depth
  int split;   // thread blocks of a cluster that split a tile's K: 1, 2, 3, 4, 6 or 8
  int tiles;   // of features x tokens
  int whole;   // of those, the ones before the last wave; the others have half of the tokens
  int stream;  // leading tiles whose K is dealt out in equal shares (cuda/stream_k.cuh)
  int grid;    // thread blocks
  int smem;    // bytes of shared memory of a thread block
  bool wide;   // as in the problem

  // Bytes of scratch memory: a part of a tile and its flag for each thread block.
  int64_t scratch_bytes(const struct Sm90Tile& tile) const;
};

constexpr int kSm90MostStages = 16;

// What a tile is made of; the kernel and the planner both follow these.
struct Sm90Tile {
  int tokens, features;
  Scheme scheme;
  bool wide = false;

  constexpr Sm90Tile(int t, int f, Scheme s, bool w = false)
      : tokens(t), features(f), scheme(s), wide(w) {}
  constexpr Sm90Tile(const Sm90Size& size, Scheme s, bool w = false)
      : Sm90Tile(size.tokens, size.features, s, w) {}

  constexpr int warpgroups() const { return features / 64; }
  // g128 keeps fp32 totals beside its integer sums; there is room for them up to 128 x 128.
  constexpr bool has_body() const {
    return scheme != Scheme::kGroup || (tokens <= 128 && features <= 128);
  }
  // K dealt out in equal shares; weights as the bytes that are multiplied.
  constexpr bool has_variants() const { return large() && warpgroups() == 2; }
  constexpr int math_threads() const { return 128 * warpgroups(); }
  // One block per SM then.
  constexpr bool large() const { return tokens >= 64; }
  constexpr bool short_of_registers() const { return !large(); }
  // Two loading threads, for weights and activations, and a whole warpgroup of helpers.
  constexpr bool two_loaders() const { return warpgroups() > 1; }
  constexpr int threads() const { return math_threads() + (two_loaders() ? 128 : 64); }
  // Math warps make good use of more registers than every thread can have: loaders leave theirs.
  constexpr bool moves_registers() const { return tokens >= 128; }
  constexpr int math_registers() const {
    return warpgroups() == 3 ? 152 : tokens == 256 ? 232 : 216;
  }
  constexpr int loader_registers() const {
    return warpgroups() == 3 ? 56 : tokens == 256 ? 40 : 72;
  }
  constexpr int blocks_per_sm() const { return large() ? 1 : tokens == 32 ? 3 : 4; }
  // Blocks of 128 channels of one load: a copy instruction costs its thread about 100 cycles, so
  // small tiles take several blocks with one.
  constexpr int chunk() const { return tokens <= 32 ? 4 : tokens == 64 ? 2 : 1; }
  constexpr int block_bytes() const {  // one panel's 128 channels, layout/w4_frag.h
    if (wide) return 8192;
    return 4096 + (scheme == Scheme::kTwoLevel ? 128 : scheme == Scheme::kGroup ? 192 : 0);
  }
  constexpr int weight_bytes() const { return chunk() * warpgroups() * block_bytes(); }
  constexpr int act_bytes() const { return chunk() * tokens * 128; }
  // Small tiles have several blocks per SM, and gain nothing from the finer steps of 3 and 6.
  constexpr bool splits(int parts) const {
    return parts == 1 || (tokens <= 128 && (parts == 2 || parts == 4 || parts == 8 ||
                                            (large() && (parts == 3 || parts == 6))));
  }
  constexpr bool halves() const { return tokens >= 128; }
  // Sums of a tile in a thread block's registers.
  constexpr int part_bytes() const { return tokens * features * 4; }
  // Of a split tile's 8-token columns, those that one block of the cluster adds up, the last such
  // block perhaps fewer; how many blocks do; and the sums of a column in all math threads.
  constexpr int columns() const { return tokens / 8; }
  constexpr int owned(int split) const { return int(ceil_div(columns(), split)); }
  constexpr int owners(int split) const { return int(ceil_div(columns(), owned(split))); }
  constexpr int column_bytes() const { return math_threads() * 16; }
  // Whether there is no room for a part's sums from itself, where their places are counted over the
  // other parts: of two that is free, of more it takes instructions, and 192 features need the
  // room.
  constexpr bool dense(int split) const {
    return split == 1 || (large() && (split == 2 || warpgroups() == 3));
  }
  // Room for an owner's columns from the parts.
  constexpr int reduce_bytes(int split) const {
    return (dense(split) ? split - 1 : split) * owned(split) * column_bytes();
  }
  // Large tiles gather the sums for the others where the ring was.
  constexpr int least_stages(int split) const {
    const int places = owners(split) - (dense(split) && owners(split) == split ? 1 : 0);
    const int gathered = large() ? places * owned(split) * column_bytes() : 0;
    return std::max(2, int(ceil_div(gathered, act_bytes() + weight_bytes())));
  }
  // Results pass through buffers of up to 64 tokens x 64 features of 2 bytes.
  constexpr int staged_tokens() const { return tokens < 64 ? tokens : 64; }
  constexpr int staging_buffers() const { return tokens == 256 && !wide ? 3 : tokens > 64 ? 2 : 1; }
  constexpr int staging_bytes() const {
    return warpgroups() * staging_buffers() * staged_tokens() * 128;
  }
  // Whether results leave as copies of staged tokens, behind which the next lot is staged.
  constexpr bool sends(int split) const { return split == 1 && tokens > staged_tokens(); }
  // Staged results, the tokens' sums and scales, barriers; the ring starts behind them, aligned.
  constexpr int fixed_bytes() const {
    const int barriers = (2 * kSm90MostStages + 3) * 8;
    return int(round_up(staging_bytes() + tokens * 8 + barriers, 1024));
  }
  constexpr int smem_bytes(int stages, int split) const {
    return fixed_bytes() + stages * (act_bytes() + weight_bytes()) + reduce_bytes(split);
  }
};

inline int64_t Sm90Plan::scratch_bytes(const Sm90Tile& tile) const {
  return stream == 0 ? 0 : int64_t{grid} * (tile.part_bytes() + 8);
}

constexpr int kSm90SmemPerSm = 228 * 1024, kSm90SmemReserved = 1024;  // the latter a block

// How a problem is cut.
struct Sm90Cut {
  Sm90Size size;
  int split = 1;
  bool halves = false;  // in the last wave
  bool stream = false;  // deal out what does not fill whole waves
};

// The plan with this cut; 0 stages if there is none.
Sm90Plan plan_sm90_with(const GpuProblem& problem, const Sm90Cut& cut);

// The plan of choice; with `only` among those of this tile.
Sm90Plan plan_sm90(const GpuProblem& problem, const Sm90Size& only = {});

// The plan that measures what decoding costs: the choice for two-level weights among tiles of 64
// tokens or more without shares of K, and the same cut for widened ones.
Sm90Plan plan_sm90_probe(const GpuProblem& problem, const Sm90Size& only = {});

// t<tile>, or s<tile> with shares of K.
std::string kernel_name(const Sm90Plan& plan);
std::string to_string(const GpuProblem& problem, const Sm90Plan& plan);

}  // namespace tessella::w4ax_gemm
