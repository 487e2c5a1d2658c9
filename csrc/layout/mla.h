// The bits of a page of Z latents: compressed keys and values (rank L) with their rotary keys (R).
//
//   latents      [Z][L]: plain numbers of 32 or 16 bits; signed INT8; or 4-bit codes q + 8, where
//                of each 64 channels byte i (of 32) holds channel i in its low and 32 + i in its
//                high bits
//   rope         [Z][R]: plain numbers of 32 or 16 bits, or signed INT8
//   scales       fp16 [Z], with coded latents: real = q * scale
//   rope scales  fp16 [Z], with INT8 rope
//
// Codes are symmetric and share one scale a token, so that the scale leaves both products: it
// multiplies the token's column of the scores, and the token's probability before it weighs the
// latent. A token's codes lie in one row: an append writes rows, and half a row of nibbles is 32
// neighbouring channels after one mask or shift. Z is a multiple of 16, so every part starts at a
// multiple of 32 bytes and the page has a multiple of Z bytes.
#pragma once
#include "layout/w4.h"

namespace tessella::layout {

struct MlaPage {
  static constexpr int kVersion = 1;

  int latent_bits, rope_bits;  // 32, 16, 8 or 4; 32, 16 or 8
  int64_t Z, L, R;             // L a multiple of 64, R of 32

  TSL_HD constexpr int64_t latent_row() const { return L * latent_bits / 8; }
  TSL_HD constexpr int64_t rope_row() const { return R * rope_bits / 8; }
  TSL_HD constexpr bool scaled() const { return latent_bits <= 8; }
  TSL_HD constexpr bool rope_scaled() const { return rope_bits == 8 && R > 0; }

  TSL_HD constexpr int64_t rope() const { return Z * latent_row(); }
  TSL_HD constexpr int64_t scales() const { return rope() + Z * rope_row(); }
  TSL_HD constexpr int64_t rope_scales() const { return scales() + (scaled() ? 2 * Z : 0); }
  TSL_HD constexpr int64_t bytes() const { return rope_scales() + (rope_scaled() ? 2 * Z : 0); }

  // First byte of a number, and for 4 bits where in it.
  TSL_HD constexpr Slot latent(int64_t t, int64_t d) const {
    if (latent_bits == 4) return {t * latent_row() + d / 64 * 32 + d % 32, int(d % 64 / 32) * 4};
    return {t * latent_row() + d * latent_bits / 8, 0};
  }
  TSL_HD constexpr int64_t rope_at(int64_t t, int64_t d) const {
    return rope() + t * rope_row() + d * rope_bits / 8;
  }
  TSL_HD constexpr int64_t scale(int64_t t) const { return scales() + 2 * t; }
  TSL_HD constexpr int64_t rope_scale(int64_t t) const { return rope_scales() + 2 * t; }
};

// Compile-time proof: every bit of a page is used exactly once.
constexpr bool fills_latent_page(int latent_bits, int rope_bits, int64_t L, int64_t R) {
  const MlaPage p{latent_bits, rope_bits, 16, L, R};
  uint8_t seen[16 * (128 * 4 + 32 * 4 + 4)] = {};
  if (p.bytes() > int64_t(sizeof(seen)) || p.bytes() % p.Z != 0 || p.rope() % 32 != 0) return false;
  for (int64_t t = 0; t < p.Z; ++t) {
    for (int64_t d = 0; d < L; ++d) {
      const Slot s = p.latent(t, d);
      for (int i = 0; i < (latent_bits + 7) / 8; ++i) {
        const int mask = latent_bits == 4 ? 15 << s.shift : 255;
        if (s.byte + i >= p.rope() || (seen[s.byte + i] & mask)) return false;
        seen[s.byte + i] |= uint8_t(mask);
      }
    }
    for (int64_t d = 0; d < R; ++d)
      for (int i = 0; i < rope_bits / 8; ++i)
        if (p.rope_at(t, d) + i >= p.scales() || seen[p.rope_at(t, d) + i]++) return false;
    for (int i = 0; i < 2; ++i) {
      if (p.scaled() && (p.scale(t) + i >= p.rope_scales() || seen[p.scale(t) + i]++)) return false;
      if (p.rope_scaled() && seen[p.rope_scale(t) + i]++) return false;
    }
  }
  for (int64_t i = 0; i < p.bytes(); ++i)
    if (seen[i] == 0) return false;
  return true;
}
static_assert(fills_latent_page(4, 16, 128, 32) && fills_latent_page(4, 8, 64, 32), "4 bit");
static_assert(fills_latent_page(8, 16, 64, 32) && fills_latent_page(8, 8, 128, 0), "8 bit");
static_assert(fills_latent_page(16, 16, 64, 32) && fills_latent_page(32, 32, 64, 0), "plain");

}  // namespace tessella::layout
