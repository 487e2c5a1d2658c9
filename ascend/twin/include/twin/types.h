// Element types of AscendC, with the arithmetic that the vector unit does on them: one rounding
// to the type after every operation.
#pragma once
#include <cstdint>
#include <type_traits>

#include "core/half.h"

struct half {
  uint16_t bits;

  half() = default;
  half(float x) : bits(tessella::from_float<tessella::F16>(x).bits) {}
  operator float() const { return tessella::to_float(tessella::F16{bits}); }
};

struct bfloat16_t {
  uint16_t bits;

  bfloat16_t() = default;
  explicit bfloat16_t(float x) : bits(tessella::from_float<tessella::BF16>(x).bits) {}
  explicit operator float() const { return tessella::to_float(tessella::BF16{bits}); }
};

namespace AscendC {

// Two in a byte, the first in the low nibble. Only a name for the type of a tensor.
struct int4b_t {
  int8_t value;
};

}  // namespace AscendC

namespace twin {

using AscendC::int4b_t;

template <class T>
constexpr int kBits = 8 * int(sizeof(T));
template <>
inline constexpr int kBits<int4b_t> = 4;

// Bytes of n elements.
template <class T>
constexpr int64_t bytes_of(int64_t n) {
  return n * kBits<T> / 8;
}

template <class T>
constexpr bool kFloat =
    std::is_same_v<T, half> || std::is_same_v<T, float> || std::is_same_v<T, bfloat16_t>;

template <class T>
const char* type_name() {
  if (std::is_same_v<T, int4b_t>) return "int4b_t";
  if (std::is_same_v<T, half>) return "half";
  if (std::is_same_v<T, bfloat16_t>) return "bfloat16_t";
  if (std::is_same_v<T, float>) return "float";
  if (std::is_same_v<T, int8_t>) return "int8_t";
  if (std::is_same_v<T, uint8_t>) return "uint8_t";
  if (std::is_same_v<T, int16_t>) return "int16_t";
  if (std::is_same_v<T, uint16_t>) return "uint16_t";
  if (std::is_same_v<T, int32_t>) return "int32_t";
  if (std::is_same_v<T, uint32_t>) return "uint32_t";
  return std::is_integral_v<T> ? "int64_t" : "another type";
}

}  // namespace twin
