// Tiling of act_quant on Ascend: tokens are dealt to the vector cores in turn.
#pragma once
#include <cstdint>

namespace tessella::ascend {

struct QuantTiling {
  int32_t M, K, blocks, blocks8;  // the first blocks8 blocks of 128 channels are INT8
  int32_t per_block;              // scales; else one per token, or per token and precision
  int32_t scale_rows;             // 1, 2 (INT8, INT4), or as many as blocks
  int32_t dtype;                  // GemmDtype
  int32_t stride;                 // of a token, in elements
  int32_t cores;
  int32_t has_perm;
  int32_t piece;  // blocks of 128 channels that are on the core at a time
};

constexpr int32_t kQuantHeader = sizeof(QuantTiling) / 4;
constexpr int32_t kQuantPiece = 64, kQuantPermPiece = 32;
constexpr int32_t kQuantMostPermK = 45056;  // a permuted token is on the core as a whole

}  // namespace tessella::ascend
