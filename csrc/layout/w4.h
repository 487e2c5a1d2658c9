// The bits of packed W4 weights on CPU: panels of 64 out features, one sequential stream.
//
//   real = (q - z) * s            channel: s fp32 [N], z [N]; groups: s fp16 [N, Kp/G], z [N, Kp/G]
//   real = (q * s1 + a - 128) * s0        two-level: s0 fp32 [N], s1 and a uint8 [N, Kp/128]
//
// A panel holds out features n0..n0+63, then the next panel follows:
//
//   for each block of 128 channels
//     16 steps of 8 channels: 256 bytes, byte 4 * (n - n0) + k % 4,
//                             low nibble channels 0..3 of the step, high nibble channels 4..7
//     scale rows, group g of the block after group:  s fp16 [128/G][64]  |  s1 uint8 [1][64]
//     zero rows:                                     z uint8 [128/G][64] |  a  uint8 [1][64]
//   tail of the panel: s fp32 [64] (channel, two-level), then z uint8 [64] (channel)
//
// One 64-byte load is then 16 out features x 8 channels, and its two nibbles are unsigned operands
// of VPDPBUSD / VPMADDUBSW, whose signed operand is the same 4 activation codes in every lane.
// The layout does not depend on the instruction set. Features past N and channels past K are 0.
#pragma once
#include "core/hd.h"

namespace tessella::layout {

struct Slot {
  int64_t byte;
  int shift;  // 0 or 4
};

struct W4Panel {
  static constexpr int kVersion = 1;
  static constexpr int kN = 64, kBlockK = 128, kStepK = 8;
  static constexpr int kStepBytes = kN * kStepK / 2, kCodeBytes = kN * kBlockK / 2;

  Scheme scheme;
  int64_t N, Kp;  // Kp: K rounded up to whole blocks
  int64_t G;      // group size; kBlockK for the channel scheme, which has no rows

  TSL_HD constexpr int rows() const { return scheme == Scheme::kChannel ? 0 : int(kBlockK / G); }
  TSL_HD constexpr int scale_bytes() const { return scheme == Scheme::kTwoLevel ? 1 : 2; }
  TSL_HD constexpr int64_t block_bytes() const {
    return kCodeBytes + rows() * kN * (scale_bytes() + 1);
  }
  TSL_HD constexpr int64_t tail_bytes() const {
    return scheme == Scheme::kChannel ? kN * 5 : scheme == Scheme::kTwoLevel ? kN * 4 : 0;
  }
  TSL_HD constexpr int64_t panels() const { return ceil_div(N, kN); }
  TSL_HD constexpr int64_t blocks() const { return Kp / kBlockK; }
  TSL_HD constexpr int64_t panel_bytes() const { return blocks() * block_bytes() + tail_bytes(); }
  TSL_HD constexpr int64_t bytes() const { return panels() * panel_bytes(); }

  // Where block b of panel p starts, and what lies in it.
  TSL_HD constexpr int64_t block(int64_t p, int64_t b) const {
    return p * panel_bytes() + b * block_bytes();
  }
  TSL_HD constexpr int64_t scale_row(int64_t r) const {
    return kCodeBytes + r * kN * scale_bytes();
  }
  TSL_HD constexpr int64_t zero_row(int64_t r) const { return scale_row(rows()) + r * kN; }

  TSL_HD constexpr Slot code(int64_t n, int64_t k) const {
    const int64_t in = k % kBlockK;
    return {block(n / kN, k / kBlockK) + in / kStepK * kStepBytes + n % kN * 4 + in % 4,
            int(in % kStepK / 4 * 4)};
  }
  // First byte of the group's scale (fp16 or uint8) and of its zero.
  TSL_HD constexpr int64_t group_scale(int64_t n, int64_t g) const {
    const int64_t k = g * G;
    return block(n / kN, k / kBlockK) + scale_row(k % kBlockK / G) + n % kN * scale_bytes();
  }
  TSL_HD constexpr int64_t group_zero(int64_t n, int64_t g) const {
    const int64_t k = g * G;
    return block(n / kN, k / kBlockK) + zero_row(k % kBlockK / G) + n % kN;
  }
  TSL_HD constexpr int64_t channel_scale(int64_t n) const {
    return (n / kN + 1) * panel_bytes() - tail_bytes() + n % kN * 4;
  }
  TSL_HD constexpr int64_t channel_zero(int64_t n) const {
    return (n / kN + 1) * panel_bytes() - kN + n % kN;
  }
};

// Compile-time proof: codes, scales and zeros of a panel fill its bytes exactly once each.
template <class Panel>
constexpr bool fills_panel(Scheme scheme, int64_t G) {
  constexpr int64_t kMost = W4Panel::kCodeBytes + 4 * W4Panel::kN * 3 + W4Panel::kN * 5;
  const Panel w{W4Panel{scheme, W4Panel::kN, W4Panel::kBlockK, G}};
  uint8_t seen[kMost] = {};  // bit 0, 1: low and high nibble
  for (int64_t n = 0; n < w.N; ++n) {
    for (int64_t k = 0; k < w.Kp; ++k) {
      const Slot s = w.code(n, k);
      const uint8_t bit = s.shift == 0 ? 1 : 2;
      if (s.byte < 0 || s.byte >= w.bytes() || (seen[s.byte] & bit)) return false;
      seen[s.byte] |= bit;
    }
    for (int64_t g = 0; g < w.rows(); ++g) {
      for (int i = 0; i < w.scale_bytes(); ++i) seen[w.group_scale(n, g) + i] += 3;
      seen[w.group_zero(n, g)] += 3;
    }
    if (w.tail_bytes() > 0)
      for (int i = 0; i < 4; ++i) seen[w.channel_scale(n) + i] += 3;
    if (scheme == Scheme::kChannel) seen[w.channel_zero(n)] += 3;
  }
  for (int64_t i = 0; i < w.bytes(); ++i)
    if (seen[i] != 3) return false;
  return w.bytes() % 64 == 0;
}
static_assert(fills_panel<W4Panel>(Scheme::kChannel, 128), "channel: a byte twice or never");
static_assert(fills_panel<W4Panel>(Scheme::kGroup, 128), "g128: a byte twice or never");
static_assert(fills_panel<W4Panel>(Scheme::kGroup, 64), "g64: a byte twice or never");
static_assert(fills_panel<W4Panel>(Scheme::kGroup, 32), "g32: a byte twice or never");
static_assert(fills_panel<W4Panel>(Scheme::kTwoLevel, 128), "twolevel: a byte twice or never");

}  // namespace tessella::layout
