// The bits of ActBlocks, the quantised activations: block-major on every device.
//
//   codes8 int8  [K8/128][M][128]       the first K8 channels (after the optional permutation)
//   codes4 uint8 [(Kp-K8)/128][M][64]   the rest, two's complement, even channel in the low nibble
//   sums   int32 [Kp/128][M]            sum of the codes of a block
//   scales fp32  [M] | [2][M] | [Kp/128][M]
#pragma once
#include "layout/w4.h"

namespace tessella::layout {

struct ActBlocks {
  static constexpr int kVersion = 1, kBlockK = 128;

  int64_t M, Kp, K8;

  // Where the code of (m, k) lies, in codes8 when k < K8 (shift 0, a whole byte), else in codes4.
  TSL_HD constexpr Slot code(int64_t m, int64_t k) const {
    const int64_t in = k % kBlockK;
    if (k < K8) return {(k / kBlockK * M + m) * kBlockK + in, 0};
    return {((k - K8) / kBlockK * M + m) * (kBlockK / 2) + in / 2, int(in % 2 * 4)};
  }
};

constexpr bool fills_act(int64_t M, int64_t Kp, int64_t K8) {
  const ActBlocks a{M, Kp, K8};
  uint8_t seen8[2 * 3 * 128] = {}, seen4[2 * 3 * 64] = {};
  for (int64_t m = 0; m < M; ++m)
    for (int64_t k = 0; k < Kp; ++k) {
      const Slot s = a.code(m, k);
      uint8_t& seen = k < K8 ? seen8[s.byte] : seen4[s.byte];
      const uint8_t bits = k < K8 ? 3 : s.shift == 0 ? 1 : 2;
      if (seen & bits) return false;
      seen |= bits;
    }
  for (int64_t i = 0; i < K8 * M; ++i)
    if (seen8[i] != 3) return false;
  for (int64_t i = 0; i < (Kp - K8) / 2 * M; ++i)
    if (seen4[i] != 3) return false;
  return true;
}
static_assert(fills_act(3, 256, 128), "two activation codes share bits");
static_assert(fills_act(3, 256, 0), "two activation codes share bits");

}  // namespace tessella::layout
