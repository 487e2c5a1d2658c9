// 4-bit codes to bytes: fragment registers from one word of layout/w4_frag.h (8 codes).
#pragma once
#include <cstdint>

namespace tessella::ptx {

constexpr uint32_t kNibbles = 0x0f0f0f0fu, kSigns = 0x80808080u, kOnes = 0x01010101u;

// Byte `i` of x, as a number and in all four bytes.
__device__ __forceinline__ uint32_t byte_of(uint32_t x, int i) {
  return __byte_perm(x, 0, 0x4440 + i);
}
__device__ __forceinline__ uint32_t repeat_byte(uint32_t x, int i) {
  return __byte_perm(x, 0, 0x1111 * i);
}

// u8 codes 0..15: 3 operations.
__device__ __forceinline__ void codes_u8(uint32_t word, uint32_t& low, uint32_t& high) {
  low = word & kNibbles;
  high = word >> 4 & kNibbles;
}

// u8 q * s1 + a with s1 a number and a in all four bytes; no byte passes 255, so none carries.
// 5 operations.
__device__ __forceinline__ void two_level_u8(uint32_t word, uint32_t s1, uint32_t a, uint32_t& low,
                                             uint32_t& high) {
  low = (word & kNibbles) * s1 + a;
  high = (word >> 4 & kNibbles) * s1 + a;
}

// s8 q - z with z in all four bytes: the set sign bits lend, so no byte borrows from the next.
__device__ __forceinline__ uint32_t minus_zero(uint32_t q, uint32_t z) {
  return ((q | kSigns) - z) ^ kSigns;
}
__device__ __forceinline__ void codes_s8(uint32_t word, uint32_t z, uint32_t& low, uint32_t& high) {
  low = minus_zero(word & kNibbles, z);
  high = minus_zero(word >> 4 & kNibbles, z);
}

// 4 s8 bytes from 4 two's-complement nibbles (16 bits, first in the lowest).
__device__ __forceinline__ uint32_t signed_nibbles(uint32_t x) {
  const uint32_t spread = (x & 0xfu) | (x & 0xf0u) << 4 | (x & 0xf00u) << 8 | (x & 0xf000u) << 12;
  return minus_zero(spread ^ 0x08080808u, 0x08080808u);
}

}  // namespace tessella::ptx
