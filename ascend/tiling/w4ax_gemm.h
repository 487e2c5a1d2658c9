// Tiling of w4ax_gemm on Ascend: which tile, which core does which tiles in which order, and where
// the workspace lies. A pure function; the kernel reads the result as 32-bit integers.
//
// SmoothGEMM (XY-Serve section 5): tiles come from a small fixed set and buffers on the core hold
// whole tiles; only rows that exist are read and written, so M is never padded in memory.
#pragma once
#include <cstdint>

namespace tessella::ascend {

// How 4-bit weights meet the activations on the cube unit.
enum GemmMode : int32_t {
  kSplit,   // INT8 activations as two INT4 rows: 16 hi + lo, on the s4 product
  kDirect,  // INT4 activations, on the s4 product
  kWiden,   // weights to bytes on the vector units, on the s8 product
};
enum GemmScheme : int32_t { kChannel, kGroup, kTwoLevel };
enum GemmDtype : int32_t { kBF16, kF16 };

struct GemmTiling {
  int32_t M, N, blocks;  // blocks of 128 channels
  int32_t mode, scheme, dtype;
  int32_t per_block;  // activation scales per block, not per token
  int32_t scale_row;  // row of `scales` that a token's scale is in
  int32_t has_bias;
  int32_t tokens, rows, n_tile;  // of a tile; rows: of the cube's product, a multiple of 16
  int32_t m_tiles, n_tiles;
  int32_t grouped;      // sums leave the cube after every block, not at the end
  int32_t unit_blocks;  // blocks whose sums leave the cube together
  int32_t ring;         // chunks of widened weights per core
  int32_t block_bytes, panel_bytes, tail;
  int32_t cores;
  int32_t at_sums, at_ring, workspace;  // offsets in units of 512 bytes, and the size
  int32_t tasks_at;  // index of the task table: first task of each core, then (m, n) pairs
};

constexpr int32_t kGemmHeader = sizeof(GemmTiling) / 4;
constexpr int32_t kSlotBytes = 65536;    // sums of a unit; two of them per core
constexpr int32_t kChunkRowBytes = 256;  // of K that travel together, per row of A or B

}  // namespace tessella::ascend
