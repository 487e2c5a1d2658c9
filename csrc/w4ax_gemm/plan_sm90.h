// Planner of w4ax_gemm on Hopper: a pure function from problem to token tile, split and grid.
//
// A thread block computes 64 or 128 features x `tokens` tokens over its part of K, with a ring of
// `stages` loads in flight. The blocks of a cluster split K between them and add their sums.
// Without a split the grid is persistent: a block takes tiles in turn, and those that would not
// fill a last wave may be cut in halves.
#pragma once
#include <string>

#include "core/hd.h"

namespace tessella::w4ax_gemm {

struct GpuProblem {
  int64_t M, N, Kp;
  Scheme scheme;
  int sms;
  bool wide = false;  // two-level weights as the bytes that are multiplied
};

struct Sm90Plan {
  int tokens;  // token tile: 8, 16, 32, 64, 128 or 256
  int stages;  // ring depth
  int split;   // thread blocks of a cluster that split a tile's K: 1, 2, 4 or 8
  int tiles;   // of features x tokens
  int whole;   // of those, the ones before the last wave; the others have half of the tokens
  int stream;  // leading tiles whose K is dealt out in equal shares (cuda/stream_k.cuh)
  int grid;    // thread blocks
  int smem;    // bytes of shared memory of a thread block
  bool wide;   // as in the problem

  // Bytes of scratch memory: a part of a tile and its flag for each thread block.
  int64_t scratch_bytes(const struct Sm90Tile& tile) const;
};

// What a tile is made of; the kernel and the planner both follow these.
struct Sm90Tile {
  int tokens;
  Scheme scheme;
  bool wide = false;

  constexpr int warpgroups() const { return tokens <= 32 ? 1 : 2; }
  constexpr int features() const { return 64 * warpgroups(); }
  constexpr int math_threads() const { return 128 * warpgroups(); }
  // One block per SM then.
  constexpr bool large() const { return tokens >= 64; }
  // Math warps make good use of more registers than every thread can have: loaders leave theirs.
  constexpr bool moves_registers() const { return tokens >= 128; }
  constexpr int math_registers() const { return tokens == 256 ? 232 : 216; }
  constexpr int loader_registers() const { return tokens == 256 ? 40 : 72; }
  constexpr int threads() const { return math_threads() + (large() ? 128 : 64); }
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
  constexpr int most_split() const { return tokens <= 128 ? 8 : 1; }
  constexpr bool halves() const { return tokens >= 128; }
  // Blocks that end up with a part of a split tile, each with whole 8-token columns.
  constexpr int owners(int split) const { return split < tokens / 8 ? split : tokens / 8; }
  constexpr int reduce_bytes(int split) const {
    return split == 1 ? 0 : split * (tokens / 8 / owners(split)) * math_threads() * 16;
  }
  // Sums of a tile in a thread block's registers.
  constexpr int part_bytes() const { return tokens * features() * 4; }
  // A split needs room for the whole tile's sums where the activations were.
  constexpr int least_stages(int split) const {
    return split > 1 && large() ? int(ceil_div(tokens * features() * 4, act_bytes())) : 2;
  }
  // Results pass through buffers of up to 64 tokens x 64 features of 2 bytes.
  constexpr int staged_tokens() const { return tokens < 64 ? tokens : 64; }
  constexpr int staging_buffers() const { return tokens == 256 && !wide ? 3 : tokens > 64 ? 2 : 1; }
  constexpr int staging_bytes() const {
    return warpgroups() * staging_buffers() * staged_tokens() * 128;
  }
  // Whether results leave as copies of staged tokens, behind which the next lot is staged.
  constexpr bool sends(int split) const { return split == 1 && tokens > staged_tokens(); }
  constexpr int fixed_bytes(int split) const {
    return reduce_bytes(split) + staging_bytes() + tokens * 8 + 24;
  }
  constexpr int smem_bytes(int stages, int split) const {
    return stages * (act_bytes() + weight_bytes() + 16) + fixed_bytes(split);
  }
};

inline int64_t Sm90Plan::scratch_bytes(const Sm90Tile& tile) const {
  return stream == 0 ? 0 : int64_t{grid} * (tile.part_bytes() + 8);
}

constexpr int kSm90MostStages = 16;
constexpr int kSm90SmemPerSm = 228 * 1024, kSm90SmemReserved = 1024;  // the latter a block

// How a problem is cut.
struct Sm90Cut {
  int tokens, split = 1;
  bool halves = false;  // in the last wave
  bool stream = false;  // deal out what does not fill whole waves
};

// The plan with this cut; 0 stages if there is none.
Sm90Plan plan_sm90_with(const GpuProblem& problem, const Sm90Cut& cut);

// The plan of choice; with `tokens` > 0 among those of this token tile.
Sm90Plan plan_sm90(const GpuProblem& problem, int tokens = 0);

// The plan that measures what decoding costs: the choice for two-level weights among tiles of 64
// tokens or more without shares of K, and the same cut for widened ones.
Sm90Plan plan_sm90_probe(const GpuProblem& problem, int tokens = 0);

std::string to_string(const GpuProblem& problem, const Sm90Plan& plan);

}  // namespace tessella::w4ax_gemm
