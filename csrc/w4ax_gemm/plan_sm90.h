// Planner of w4ax_gemm on Hopper: a pure function from problem to token tile, split and grid.
//
// A thread block computes kFeatures features x `tokens` tokens over one share of K, a ring of
// `stages` blocks of 128 channels ahead. Blocks of a cluster either split K between them and add
// their exact integer sums (split), or take neighbouring features and read the activations once for
// all of them (share). Tiles beyond one per cluster are taken in turn (persistent grid).
#pragma once
#include <string>

#include "core/hd.h"

namespace tessella::w4ax_gemm {

struct GpuProblem {
  int64_t M, N, Kp;
  Scheme scheme;
  int sms;
};

struct Sm90Plan {
  int tokens;  // token tile: 8, 16, 32, 64, 128 or 256
  int stages;  // ring depth
  int split;   // thread blocks that share a tile's K: 1, 2, 4 or 8
  int share;   // thread blocks that share activations: 1 or 2
  int tiles;   // tiles of `share` blocks' features x `tokens`
  int grid;    // thread blocks
  int smem;    // bytes of shared memory of a thread block
};

// What a tile is made of; the kernel and the planner both follow these.
struct Sm90Tile {
  int tokens;
  Scheme scheme;

  constexpr int warpgroups() const { return tokens <= 32 ? 1 : 2; }
  constexpr int features() const { return 64 * warpgroups(); }
  constexpr int math_threads() const { return 128 * warpgroups(); }
  // Large tiles move registers from the warps beside the math ones, which takes a whole warpgroup.
  constexpr bool moves_registers() const { return tokens >= 128; }
  constexpr int threads() const { return math_threads() + (moves_registers() ? 128 : 64); }
  constexpr int block_bytes() const {  // one panel's 128 channels, layout/w4_frag.h
    return 4096 + (scheme == Scheme::kTwoLevel ? 128 : scheme == Scheme::kGroup ? 192 : 0);
  }
  constexpr int weight_bytes() const { return warpgroups() * block_bytes(); }
  constexpr int act_bytes() const { return tokens * 128; }
  constexpr int most_split() const { return tokens <= 128 ? 8 : 1; }
  // Blocks that end up with a part of a split tile, each with whole 8-token columns.
  constexpr int owners(int split) const { return split < tokens / 8 ? split : tokens / 8; }
  constexpr int reduce_bytes(int split) const {
    return split == 1 ? 0 : split * (tokens / 8 / owners(split)) * math_threads() * 16;
  }
  constexpr int staged_tokens() const { return tokens < 64 ? tokens : 64; }
  constexpr int staging_bytes() const { return warpgroups() * staged_tokens() * 128; }
  constexpr int blocks_per_sm() const { return tokens <= 32 ? 3 : tokens == 64 ? 2 : 1; }
  constexpr int fixed_bytes(int split) const {
    return reduce_bytes(split) + staging_bytes() + tokens * 8 + 16;
  }
  constexpr int smem_bytes(int stages, int split) const {
    return stages * (act_bytes() + weight_bytes() + 16) + fixed_bytes(split);
  }
};

constexpr int kSm90MostStages = 16;
constexpr int kSm90SmemPerSm = 227 * 1024, kSm90SmemReserved = 1024;

// The legal plan nearest to this tile, split and share; 0 stages if there is none.
Sm90Plan plan_sm90_with(const GpuProblem& problem, int tokens, int split, int share);

// The plan of choice; with `tokens` > 0 among those of this token tile.
Sm90Plan plan_sm90(const GpuProblem& problem, int tokens = 0);

std::string to_string(const GpuProblem& problem, const Sm90Plan& plan);

}  // namespace tessella::w4ax_gemm
