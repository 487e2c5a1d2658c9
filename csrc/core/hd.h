// The only header that everyone may include: host and device qualifier, and integer helpers.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define TSL_HD __host__ __device__
#elif defined(__CCE__)
#define TSL_HD __forceinline__[host, aicore]
#else
#define TSL_HD
#endif

namespace tessella {

TSL_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
TSL_HD constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Division of n < 2^31 by a number known on the host: what divides by it on a GPU takes a
// multiplication.
struct Divisor {
  uint32_t factor = 0;
  int shift = 0;

  Divisor() = default;
  constexpr explicit Divisor(uint32_t by) : shift(31) {
    while (shift < 62 && uint64_t{1} << (shift - 31) < by) ++shift;
    factor = uint32_t(((uint64_t{1} << shift) + by - 1) / by);
  }
  TSL_HD constexpr int divide(int n) const { return int(uint64_t{uint32_t(n)} * factor >> shift); }
};

static_assert(Divisor(1).divide(0x7fffffff) == 0x7fffffff && Divisor(3).divide(2) == 0);
static_assert(Divisor(3).divide(0x7fffffff) == 0x7fffffff / 3 && Divisor(7).divide(48) == 6);
static_assert(Divisor(0x7fffffff).divide(0x7ffffffe) == 0 && Divisor(641).divide(1281) == 1);

// A compile-time value as an argument, from which a generic lambda can read it back.
template <auto kValue>
struct Const {
  static constexpr auto value = kValue;
};

// Activations and results; our own list, so that kernels need no torch. kE4M3 is for caches only.
enum class DType { kBF16, kF16, kF32, kE4M3 };

// What shares an activation scale: a token, the INT8 or INT4 part of one, or a 128-channel block.
enum class Granularity { kToken, kClass, kBlock };

// Meaning of the weight scales; see layout/w4.h.
enum class Scheme { kChannel, kGroup, kTwoLevel };

}  // namespace tessella
