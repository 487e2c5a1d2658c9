// The bits of packed W4 weights on Ascend 910B: the same panels of 64 out features as on CPU
// (layout/w4.h: the same sizes, scales, zeros and tails), with codes as fractals of the cube unit.
//
// A fractal is 16 features x 32 bytes, 64 channels of one feature being one row: as L0B wants B
// (nZ), so a block goes from global memory to the cube unit without being rearranged.
//
//   for each block of 128 channels, 2 x 4 fractals of 512 bytes: [64 channels][16 features];
//   in a fractal, row n % 16, byte j of 32: low nibble channel j, high nibble channel 32 + j
//
// Codes are stored as q - 8 in two's complement, which is what the cube multiplies. With channels
// 32 apart in a byte, the low and the high nibbles of a fractal are each, shifted and masked on
// whole words, a fractal of 16 features x 32 channels of bytes 16 (q - 8) for the INT8 product.
#pragma once
#include "layout/w4.h"

namespace tessella::layout {

struct W4Cube : W4Panel {
  static constexpr int kVersion = 1, kFractalBytes = 512, kFractalN = 16, kFractalK = 64;

  TSL_HD constexpr W4Cube(const W4Panel& panel) : W4Panel(panel) {}

  TSL_HD constexpr Slot code(int64_t n, int64_t k) const {
    const int64_t in = k % kBlockK, j = in % kFractalK;
    const int64_t fractal = in / kFractalK * (kN / kFractalN) + n % kN / kFractalN;
    return {block(n / kN, k / kBlockK) + fractal * kFractalBytes + n % kFractalN * 32 + j % 32,
            int(j / 32 * 4)};
  }
};

static_assert(fills_panel<W4Cube>(Scheme::kChannel, 128), "channel: a byte twice or never");
static_assert(fills_panel<W4Cube>(Scheme::kGroup, 128), "g128: a byte twice or never");
static_assert(fills_panel<W4Cube>(Scheme::kTwoLevel, 128), "twolevel: a byte twice or never");

}  // namespace tessella::layout
