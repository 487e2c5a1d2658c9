// The bits of a coded page of Z tokens and one kv head: keys, values, and their scales and zeros.
//
//   real = (q - z) * s, q of 8, 4 or 2 bits, n = 8 / bits codes to a byte, s and z fp16
//
//   K codes   for each 16 tokens: D/4n steps of 64 bytes: byte 4 * (t % 16) + d % 4 of step d / 4n,
//             code d / 4 % n of the byte (lowest bits first)
//   V codes   for each 4 tokens: Dv/16n steps of 64 bytes: byte 4 * (d % 16) + t % 4 of step d /
//   16n,
//             code d / 16 % n of the byte; Dv is D rounded up to whole steps
//   K scales, K zeros   [D/G][Z] per (token, group), or [D] per channel of the page (KIVI)
//   V scales, V zeros   [D/G][Z]
//
// Every part starts at a multiple of 16 bytes, and the page has a multiple of Z bytes. A 64-byte
// load is 16 tokens of K or 16 channels of V in 32-bit lanes, four channels or four tokens in each:
// one operand of a dot product of bytes. No two tokens share a byte, so writing one needs no
// reading.
#pragma once
#include "layout/w4.h"

namespace tessella::layout {

struct KvPage {
  static constexpr int kVersion = 1;

  int k_bits, v_bits;
  int64_t Z, D, G;  // G: channels of a group, D where there is one
  bool channel;     // keys are scaled per channel of the page

  TSL_HD constexpr int64_t groups() const { return D / G; }
  TSL_HD constexpr int64_t Dv() const { return round_up(D, 128 / v_bits); }
  TSL_HD constexpr int64_t k_group_bytes() const { return 16 * D * k_bits / 8; }  // of 16 tokens
  TSL_HD constexpr int64_t v_quad_bytes() const { return 4 * Dv() * v_bits / 8; }
  TSL_HD constexpr int64_t row_bytes() const { return groups() * Z * 2; }
  TSL_HD constexpr int64_t k_row_bytes() const { return channel ? D * 2 : row_bytes(); }

  TSL_HD constexpr int64_t v_codes() const { return round_up(Z / 16 * k_group_bytes(), 16); }
  TSL_HD constexpr int64_t k_scales() const { return v_codes() + Z / 4 * v_quad_bytes(); }
  TSL_HD constexpr int64_t k_zeros() const { return k_scales() + round_up(k_row_bytes(), 16); }
  TSL_HD constexpr int64_t v_scales() const { return k_zeros() + round_up(k_row_bytes(), 16); }
  TSL_HD constexpr int64_t v_zeros() const { return v_scales() + round_up(row_bytes(), 16); }
  TSL_HD constexpr int64_t bytes() const { return round_up(v_zeros() + row_bytes(), Z); }

  TSL_HD constexpr Slot k_code(int64_t t, int64_t d) const {
    const int64_t n = 8 / k_bits;
    return {t / 16 * k_group_bytes() + d / (4 * n) * 64 + t % 16 * 4 + d % 4,
            int(d / 4 % n) * k_bits};
  }
  TSL_HD constexpr Slot v_code(int64_t t, int64_t d) const {
    const int64_t n = 8 / v_bits;
    return {v_codes() + t / 4 * v_quad_bytes() + d / (16 * n) * 64 + d % 16 * 4 + t % 4,
            int(d / 16 % n) * v_bits};
  }
  // First byte of the fp16 numbers of token t and channel d, from the start of their part.
  TSL_HD constexpr int64_t k_row(int64_t t, int64_t d) const {
    return channel ? d * 2 : (d / G * Z + t) * 2;
  }
  TSL_HD constexpr int64_t v_row(int64_t t, int64_t d) const { return (d / G * Z + t) * 2; }
};

// Compile-time proof: no bit of a page is used twice, and none lies outside.
constexpr bool fills_page(int k_bits, int v_bits, int64_t D, int64_t G, bool channel) {
  const KvPage p{k_bits, v_bits, 16, D, G, channel};
  uint8_t seen[16 * 96 * 2 + 16 * 96 * 2 * 2] = {};
  if (p.bytes() > int64_t(sizeof(seen)) || p.bytes() % p.Z != 0) return false;
  for (int64_t t = 0; t < p.Z; ++t)
    for (int64_t d = 0; d < D; ++d) {
      const Slot k = p.k_code(t, d), v = p.v_code(t, d);
      const int k_mask = ((1 << k_bits) - 1) << k.shift, v_mask = ((1 << v_bits) - 1) << v.shift;
      if (k.byte >= p.v_codes() || (seen[k.byte] & k_mask)) return false;
      seen[k.byte] |= uint8_t(k_mask);
      if (v.byte < p.v_codes() || v.byte >= p.k_scales() || (seen[v.byte] & v_mask)) return false;
      seen[v.byte] |= uint8_t(v_mask);
    }
  const int64_t k_count = channel ? D : p.groups() * p.Z, v_count = p.groups() * p.Z;
  for (int64_t i = 0; i < 2 * k_count; ++i)
    if (seen[p.k_scales() + i]++ || seen[p.k_zeros() + i]++) return false;
  for (int64_t i = 0; i < 2 * v_count; ++i)
    if (seen[p.v_scales() + i]++ || seen[p.v_zeros() + i]++) return false;
  for (int64_t i = 0; i < p.v_codes(); ++i)
    if (seen[i] != 255) return false;
  return true;
}
static_assert(fills_page(4, 4, 64, 64, false) && fills_page(4, 4, 80, 80, false), "k4v4");
static_assert(fills_page(8, 8, 64, 64, false) && fills_page(8, 8, 80, 16, false), "k8v8");
static_assert(fills_page(2, 2, 64, 32, false) && fills_page(4, 2, 96, 32, false), "2 bit");
static_assert(fills_page(4, 4, 64, 64, true) && fills_page(2, 4, 96, 48, true), "channel");

}  // namespace tessella::layout
