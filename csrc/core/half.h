// fp16, bf16 and E4M3 <-> fp32 in plain integer arithmetic, for code that may not use F16C.
// Conversions to 16 bits round to nearest, ties to even, as torch does; NaN stays NaN.
#pragma once
#include <cstdint>
#include <cstring>

namespace tessella {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
struct E4M3 {  // no infinities; 448 is the largest, 0x7f and 0xff are NaN
  uint8_t bits;
};

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float to_float(float x) { return x; }
inline float to_float(BF16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
inline float to_float(F16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
  if (rest >= 0x7c00u << 13) return bits_to_float(sign | 0x7f800000 | rest);  // inf, NaN
  // scaling by 2^112 re-biases the exponent and normalises subnormals in one exact multiply
  const float magnitude = bits_to_float(rest) * bits_to_float(0x77800000);
  return bits_to_float(sign | float_to_bits(magnitude));
}

inline float to_float(E4M3 x) {
  const uint32_t sign = uint32_t(x.bits & 0x80) << 24, rest = x.bits & 0x7f;
  if (rest == 0x7f) return bits_to_float(sign | 0x7fc00000);
  // as for fp16: 2^120
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 20) * bits_to_float(0x7b800000)));
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline BF16 from_float<BF16>(float x) {
  const uint32_t u = float_to_bits(x);
  if ((u & 0x7fffffff) > 0x7f800000) return {uint16_t((u >> 16) | 0x40)};
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <>
inline F16 from_float<F16>(float x) {
  const uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (a >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to 65536 or more
  if (a < 0x38800000) {  // subnormal: adding 0.5 lets the FPU shift and round the mantissa
    const float shifted = bits_to_float(a) + 0.5f;
    return {uint16_t(sign | (float_to_bits(shifted) - 0x3f000000))};
  }
  return {uint16_t(sign | ((a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13))};
}
template <>
inline E4M3 from_float<E4M3>(float x) {  // what is too large becomes 448
  const uint32_t u = float_to_bits(x), sign = (u >> 24) & 0x80, a = u & 0x7fffffff;
  if (a > 0x7f800000) return {uint8_t(sign | 0x7f)};
  if (a >= 0x43e00000) return {uint8_t(sign | 0x7e)};
  if (a < 0x3c800000) {  // subnormal: the sum's unit is 2^-9
    const float shifted = bits_to_float(a) + 16384.f;
    return {uint8_t(sign | (float_to_bits(shifted) - 0x46800000))};
  }
  return {uint8_t(sign | ((a - 0x3c000000 + 0x7ffff + ((a >> 20) & 1)) >> 20))};
}

}  // namespace tessella
