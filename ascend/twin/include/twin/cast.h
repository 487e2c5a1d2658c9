// Cast, Compare and Select. A cast exists for the pairs of types of the 910B only (int4b_t to and
// from half), rounds as asked and saturates.
#pragma once
#include <limits>

#include "twin/vector.h"

namespace twin {

using AscendC::RoundMode;

// Is there an instruction from S to D? int32_t to half takes the scale of SetDeqScale.
template <class D, class S>
constexpr bool kCasts =
    std::is_same_v<S, half>         ? kOneOf<D, float, int32_t, int16_t, int8_t, uint8_t, int4b_t>
    : std::is_same_v<S, float>      ? kOneOf<D, float, half, bfloat16_t, int64_t, int32_t, int16_t>
    : std::is_same_v<S, bfloat16_t> ? kOneOf<D, float, int32_t>
    : std::is_same_v<S, int32_t>    ? kOneOf<D, float, half, int16_t, int64_t>
    : std::is_same_v<S, int16_t>    ? kOneOf<D, half, float>
    : std::is_same_v<S, int64_t> ? kOneOf<D, float, int32_t>
                                 : kOneOf<S, int4b_t, int8_t, uint8_t> && std::is_same_v<D, half>;

inline double rounded(double x, RoundMode mode) {
  switch (mode) {
    case RoundMode::CAST_FLOOR:
      return std::floor(x);
    case RoundMode::CAST_CEIL:
      return std::ceil(x);
    case RoundMode::CAST_TRUNC:
      return std::trunc(x);
    case RoundMode::CAST_ROUND:
      return std::round(x);
    default:
      return std::nearbyint(x);
  }
}

// fp32 to a 16-bit float: in units of its last place, in which rounding is that of integers.
template <class D>
D narrowed(float x, RoundMode mode) {
  if (mode == RoundMode::CAST_NONE || mode == RoundMode::CAST_RINT || !std::isfinite(x) || x == 0)
    return D(x);
  const int least = std::is_same_v<D, half> ? -24 : -133;
  const int digits = std::is_same_v<D, half> ? 11 : 8;
  int exponent;
  std::frexp(x, &exponent);
  const int unit = std::max(exponent - digits, least);
  return D(float(std::ldexp(rounded(std::ldexp(double(x), -unit), mode), unit)));
}

template <class D, class S>
typename Lane<D>::type cast_one(typename Lane<S>::type x, RoundMode mode, float deq) {
  if constexpr (std::is_same_v<D, int4b_t> || std::is_integral_v<D>) {
    using Limits = std::numeric_limits<typename Lane<D>::type>;
    const double least = std::is_same_v<D, int4b_t> ? -8 : double(Limits::min());
    const double most = std::is_same_v<D, int4b_t> ? 7 : double(Limits::max());
    double v;
    if constexpr (std::is_integral_v<S>)
      v = double(x);
    else
      v = rounded(double(float(x)), mode);
    if (std::isnan(v)) v = 0;
    if (v >= most) v = most;
    if (v <= least) v = least;
    if constexpr (std::is_same_v<D, int64_t>)
      return v >= 9.2e18 ? most : int64_t(v);
    else
      return typename Lane<D>::type(int64_t(v));
  } else if constexpr (std::is_same_v<D, S>) {
    return D(float(rounded(double(x), mode)));
  } else if constexpr (std::is_same_v<S, int32_t> && std::is_same_v<D, half>) {
    return half(float(x) * deq);
  } else if constexpr (std::is_same_v<S, int32_t> && std::is_same_v<D, float>) {
    float f = float(x);  // to nearest; the other modes step towards theirs
    if (mode == RoundMode::CAST_FLOOR && double(f) > x) f = std::nextafter(f, -INFINITY);
    if (mode == RoundMode::CAST_CEIL && double(f) < x) f = std::nextafter(f, INFINITY);
    if (mode == RoundMode::CAST_TRUNC && std::fabs(double(f)) > std::fabs(double(x)))
      f = std::nextafter(f, 0.f);
    return f;
  } else if constexpr (std::is_same_v<D, float>) {
    return float(x);
  } else {
    return narrowed<D>(float(x), mode);
  }
}

template <class D, class S>
void cast(const AscendC::LocalTensor<D>& d, const AscendC::LocalTensor<S>& s, RoundMode mode,
          const Lanes& l, const AscendC::UnaryRepeatParams& p, bool count) {
  if constexpr (!kCasts<D, S>) {
    throw Finding("type", std::string("Cast: no instruction from ") + type_name<S>() + " to " +
                              type_name<D>());
  } else {
    const float deq = core().deq_scale;
    const auto f = [mode, deq](Op&, typename Lane<S>::type x) {
      return cast_one<D, S>(x, mode, deq);
    };
    if (count)
      map_lanes("Cast", contiguous(d, l.per_repeat), contiguous(s, l.per_repeat), l, f);
    else
      map_lanes("Cast", Operand<D>{d.ref(), p.dstBlkStride, p.dstRepStride},
                Operand<S>{s.ref(), p.srcBlkStride, p.srcRepStride}, l, f);
  }
}

template <class T>
bool compares(AscendC::CMPMODE mode, T a, T b) {
  using M = AscendC::CMPMODE;
  const double x = double(float(a)), y = double(float(b));
  switch (mode) {
    case M::LT:
      return x < y;
    case M::GT:
      return x > y;
    case M::EQ:
      return x == y;
    case M::LE:
      return x <= y;
    case M::GE:
      return x >= y;
    default:
      return x != y;
  }
}

}  // namespace twin

namespace AscendC {

template <class D, class S>
void Cast(const LocalTensor<D>& d, const LocalTensor<S>& s, const RoundMode& mode, uint32_t count) {
  constexpr int kWide = std::max(twin::kBits<D>, twin::kBits<S>);
  twin::cast(d, s, mode, twin::count_lanes(count, twin::lanes_of(kWide)), {}, true);
}

template <class D, class S, bool kSetMask = true>
void Cast(const LocalTensor<D>& d, const LocalTensor<S>& s, const RoundMode& mode, uint64_t mask,
          twin::U8 repeats, const UnaryRepeatParams& p) {
  constexpr int kWide = std::max(twin::kBits<D>, twin::kBits<S>);
  twin::cast(d, s, mode, twin::mask_lanes(int64_t(mask), repeats, twin::lanes_of(kWide)), p, false);
}

inline void SetDeqScale(half scale) { twin::core().deq_scale = float(scale); }

// One bit a lane, the first in the lowest bit.
template <class T, class U, class F>
void CompareWith(const char* name, const LocalTensor<U>& d, const LocalTensor<T>& a, F second,
                 CMPMODE mode, uint32_t count) {
  static_assert(sizeof(U) == 1, "the result is a tensor of bytes");
  if (!twin::kOneOf<T, half, float> && !(twin::kOneOf<T, int32_t> && mode == CMPMODE::EQ))
    throw twin::Finding("type", std::string(name) + " does not take " + twin::type_name<T>());
  if (count * sizeof(T) % 256 != 0)
    throw twin::Finding("align", std::string(name) + ": not whole repeats of 256 bytes");
  const twin::Ref to = d.ref(), from = a.ref();
  twin::aligned(to, 32, name);
  twin::aligned(from, 32, name);
  twin::core().stats.vector_repeats += int64_t(count * sizeof(T) / 256);
  twin::core().issue(twin::kV, name, [=](twin::Op& op) {
    for (int64_t i = 0; i < int64_t(count); i += 8) {
      uint8_t bits = 0;
      for (int64_t j = 0; j < 8; ++j) {
        const T x = twin::load_one<T>(op, from + (i + j) * int64_t(sizeof(T)));
        bits = uint8_t(bits | twin::compares(mode, x, second(op, i + j)) << j);
      }
      twin::store_one<uint8_t>(op, to + i / 8, bits);
    }
  });
}

template <class T, class U>
void CompareScalar(const LocalTensor<U>& d, const LocalTensor<T>& a, const T& b, CMPMODE mode,
                   uint32_t count) {
  CompareWith("CompareScalar", d, a, [b](twin::Op&, int64_t) { return b; }, mode, count);
}

template <class T, class U>
void Compare(const LocalTensor<U>& d, const LocalTensor<T>& a, const LocalTensor<T>& b,
             CMPMODE mode, uint32_t count) {
  const twin::Ref r = b.ref();
  const auto second = [r](twin::Op& op, int64_t i) {
    return twin::load_one<T>(op, r + i * int64_t(sizeof(T)));
  };
  CompareWith("Compare", d, a, second, mode, count);
}

template <class T, class U, class F>
void SelectWith(const LocalTensor<T>& d, const LocalTensor<U>& bits, const LocalTensor<T>& a,
                F second, uint32_t count) {
  twin::float_type<T>("Select");
  const twin::Ref to = d.ref(), sel = bits.ref(), from = a.ref();
  for (const twin::Ref& r : {to, sel, from}) twin::aligned(r, 32, "Select");
  twin::count_vector(twin::count_lanes(count, twin::lanes_of(twin::kBits<T>)));
  twin::core().issue(twin::kV, "Select", [=](twin::Op& op) {
    for (int64_t i = 0; i < int64_t(count); ++i) {
      const bool first = twin::load_one<uint8_t>(op, sel + i / 8) >> (i % 8) & 1;
      const int64_t at = i * int64_t(sizeof(T));
      twin::store_one<T>(op, to + at, first ? twin::load_one<T>(op, from + at) : second(op, at));
    }
  });
}

// a where the bit is 1, else b.
template <class T, class U>
void Select(const LocalTensor<T>& d, const LocalTensor<U>& bits, const LocalTensor<T>& a, T b,
            SELMODE mode, uint32_t count) {
  if (mode != SELMODE::VSEL_TENSOR_SCALAR_MODE)
    throw twin::Finding("field", "Select: this form is VSEL_TENSOR_SCALAR_MODE");
  SelectWith(d, bits, a, [b](twin::Op&, int64_t) { return b; }, count);
}

template <class T, class U>
void Select(const LocalTensor<T>& d, const LocalTensor<U>& bits, const LocalTensor<T>& a,
            const LocalTensor<T>& b, SELMODE mode, uint32_t count) {
  if (mode != SELMODE::VSEL_TENSOR_TENSOR_MODE)
    throw twin::Finding("field", "Select: this form is VSEL_TENSOR_TENSOR_MODE");
  const twin::Ref r = b.ref();
  SelectWith(
      d, bits, a, [r](twin::Op& op, int64_t at) { return twin::load_one<T>(op, r + at); }, count);
}

}  // namespace AscendC
