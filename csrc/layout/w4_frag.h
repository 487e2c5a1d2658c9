// The bits of packed W4 weights on CUDA: the same panels of 64 out features as on CPU (layout/w4.h:
// the same sizes, tails and formulas), with codes in the order of tensor-core fragments.
//
// A panel's block of 128 channels is 64 x 128 codes in 4096 bytes. Both wgmma m64k32 (four warps)
// and mma.sync m16k32 (each warp alone) give thread t = 32 warp + 4 r + c of 128 the features
// 16 warp + r and 16 warp + r + 8, and of 32 channels those at 4c..4c+3 and 16 + 4c..16 + 4c+3.
//
//   2 rows of 2048 bytes; in row i, thread t owns bytes 16 t..16 t + 15, one 128-bit load;
//   of its four words, word 2 j + h holds step 2 i + j (32 channels each), feature r + 8 h:
//     byte b: low nibble channel 4 c + b, high nibble channel 16 + 4 c + b
//
// so (word & 0x0f0f0f0f) and (word >> 4 & 0x0f0f0f0f) are fragment registers as they stand.
// Scales follow: a thread wants those of features r and r + 8, so they are neighbours.
//   twolevel: 32 words, word 8 warp + r = s1[r] | a[r] << 8 | s1[r + 8] << 16 | a[r + 8] << 24
//   groups, for each of the 128/G groups: 32 words, word 8 warp + r = s[r] | s[r + 8] << 16;
//   then for each group 32 halfwords, halfword 8 warp + r = z[r] | z[r + 8] << 8
#pragma once
#include "layout/w4.h"

namespace tessella::layout {

struct W4Frag : W4Panel {
  static constexpr int kVersion = 1, kRowBytes = 2048;

  TSL_HD constexpr W4Frag(const W4Panel& panel) : W4Panel(panel) {}

  // Position of feature n among those that share a lane: 2 * (8 warp + r) + h.
  TSL_HD static constexpr int64_t pair(int64_t n) {
    const int64_t in = n % kN;
    return (in / 16 * 8 + in % 8) * 2 + in / 8 % 2;
  }
  TSL_HD constexpr Slot code(int64_t n, int64_t k) const {
    const int64_t step = k % kBlockK / 32, in = k % 32;
    const int64_t thread = pair(n) / 2 * 4 + in % 16 / 4, word = step % 2 * 2 + pair(n) % 2;
    return {block(n / kN, k / kBlockK) + step / 2 * kRowBytes + thread * 16 + word * 4 + in % 4,
            int(in / 16 * 4)};
  }
  TSL_HD constexpr int64_t group_scale(int64_t n, int64_t g) const {
    const int64_t k = g * G, start = block(n / kN, k / kBlockK) + kCodeBytes;
    return start + k % kBlockK / G * kN * 2 + pair(n) * 2;
  }
  TSL_HD constexpr int64_t group_zero(int64_t n, int64_t g) const {
    if (scheme == Scheme::kTwoLevel) return group_scale(n, g) + 1;
    const int64_t k = g * G;
    return block(n / kN, k / kBlockK) + zero_row(k % kBlockK / G) + pair(n);
  }
};

static_assert(fills_panel<W4Frag>(Scheme::kChannel, 128), "channel: a byte twice or never");
static_assert(fills_panel<W4Frag>(Scheme::kGroup, 128), "g128: a byte twice or never");
static_assert(fills_panel<W4Frag>(Scheme::kGroup, 64), "g64: a byte twice or never");
static_assert(fills_panel<W4Frag>(Scheme::kGroup, 32), "g32: a byte twice or never");
static_assert(fills_panel<W4Frag>(Scheme::kTwoLevel, 128), "twolevel: a byte twice or never");

}  // namespace tessella::layout
