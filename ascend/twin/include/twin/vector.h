// Vector instructions of one and two operands, in the forms (count), (mask, repeats, strides) and
// (mask bits, repeats, strides).
#pragma once
#include <cmath>

#include "twin/lanes.h"

namespace twin {

template <class T, class... Ts>
constexpr bool kOneOf = (std::is_same_v<T, Ts> || ...);

template <class T>
void arithmetic_type(const char* name) {
  if (!kOneOf<T, half, float, int16_t, int32_t>)
    throw Finding("type", std::string(name) + " does not take " + type_name<T>());
}
template <class T>
void float_type(const char* name) {
  if (!kOneOf<T, half, float>)
    throw Finding("type", std::string(name) + " does not take " + type_name<T>());
}
template <class T>
void bits_type(const char* name) {
  if (!kOneOf<T, int16_t, uint16_t>)
    throw Finding("type", std::string(name) + " does not take " + type_name<T>());
}
template <class T>
void shift_type(const char* name) {
  if (!kOneOf<T, int16_t, uint16_t, int32_t, uint32_t>)
    throw Finding("type", std::string(name) + " does not take " + type_name<T>());
}

// A float result rounded to T; an integer one that must fit, since what the device makes of an
// overflow is not documented.
template <class T, class F>
T exact_or_rounded(Op& op, T a, T b, F f) {
  if constexpr (std::is_integral_v<T>) {
    const int64_t r = f(int64_t(a), int64_t(b));
    if (r != int64_t(T(r)))
      op.fail("overflow", "the result " + std::to_string(r) + " does not fit");
    return T(r);
  } else {
    return T(f(float(a), float(b)));
  }
}

template <class T>
T sum(Op& op, T a, T b) {
  return exact_or_rounded(op, a, b, [](auto x, auto y) { return x + y; });
}
template <class T>
T difference(Op& op, T a, T b) {
  return exact_or_rounded(op, a, b, [](auto x, auto y) { return x - y; });
}
template <class T>
T product(Op& op, T a, T b) {
  return exact_or_rounded(op, a, b, [](auto x, auto y) { return x * y; });
}

template <class T>
Lanes lanes_for(const uint64_t* mask, int64_t repeats) {
  return bit_lanes(mask, repeats, lanes_of(kBits<T>));
}
template <class T>
Lanes lanes_for(uint64_t mask, int64_t repeats) {
  return mask_lanes(int64_t(mask), repeats, lanes_of(kBits<T>));
}

}  // namespace twin

// A binary instruction NAME: `CHECK`<T> of its type, `EXPR` over op, a and b of type T.
#define TWIN_BINARY(NAME, CHECK, EXPR)                                                     \
  template <class T>                                                                       \
  void NAME##On(const LocalTensor<T>& d, const LocalTensor<T>& x, const LocalTensor<T>& y, \
                const twin::Lanes& l, const BinaryRepeatParams& p) {                       \
    twin::CHECK<T>(#NAME);                                                                 \
    twin::map_lanes(#NAME, twin::Operand<T>{d.ref(), p.dstBlkStride, p.dstRepStride},      \
                    twin::Operand<T>{x.ref(), p.src0BlkStride, p.src0RepStride},           \
                    twin::Operand<T>{y.ref(), p.src1BlkStride, p.src1RepStride}, l,        \
                    [](twin::Op& op, T a, T b) -> T {                                      \
                      (void)op;                                                            \
                      return EXPR;                                                         \
                    });                                                                    \
  }                                                                                        \
  template <class T>                                                                       \
  void NAME(const LocalTensor<T>& d, const LocalTensor<T>& x, const LocalTensor<T>& y,     \
            int32_t count) {                                                               \
    NAME##On(d, x, y, twin::count_lanes(count, twin::lanes_of(twin::kBits<T>)), {});       \
  }                                                                                        \
  template <class T, bool kSetMask = true>                                                 \
  void NAME(const LocalTensor<T>& d, const LocalTensor<T>& x, const LocalTensor<T>& y,     \
            uint64_t mask, twin::U8 repeats, const BinaryRepeatParams& p) {                \
    NAME##On(d, x, y,                                                                      \
             kSetMask ? twin::lanes_for<T>(mask, repeats)                                  \
                      : twin::state_lanes(repeats, twin::lanes_of(twin::kBits<T>)),        \
             p);                                                                           \
  }                                                                                        \
  template <class T, bool kSetMask = true>                                                 \
  void NAME(const LocalTensor<T>& d, const LocalTensor<T>& x, const LocalTensor<T>& y,     \
            uint64_t mask[], twin::U8 repeats, const BinaryRepeatParams& p) {              \
    NAME##On(d, x, y, twin::lanes_for<T>(mask, repeats), p);                               \
  }

// A unary instruction; with TWIN_SCALAR one with a scalar operand `s` of type T.
#define TWIN_UNARY(NAME, CHECK, EXPR)                                                          \
  template <class T>                                                                           \
  void NAME##On(const LocalTensor<T>& d, const LocalTensor<T>& x, const twin::Lanes& l,        \
                const UnaryRepeatParams& p) {                                                  \
    twin::CHECK<T>(#NAME);                                                                     \
    twin::map_lanes(#NAME, twin::Operand<T>{d.ref(), p.dstBlkStride, p.dstRepStride},          \
                    twin::Operand<T>{x.ref(), p.srcBlkStride, p.srcRepStride}, l,              \
                    [](twin::Op&, T a) -> T { return EXPR; });                                 \
  }                                                                                            \
  template <class T>                                                                           \
  void NAME(const LocalTensor<T>& d, const LocalTensor<T>& x, int32_t count) {                 \
    NAME##On(d, x, twin::count_lanes(count, twin::lanes_of(twin::kBits<T>)), {});              \
  }                                                                                            \
  template <class T, bool kSetMask = true>                                                     \
  void NAME(const LocalTensor<T>& d, const LocalTensor<T>& x, uint64_t mask, twin::U8 repeats, \
            const UnaryRepeatParams& p) {                                                      \
    NAME##On(d, x, twin::lanes_for<T>(mask, repeats), p);                                      \
  }

#define TWIN_SCALAR(NAME, CHECK, EXPR)                                                       \
  template <class T>                                                                         \
  void NAME##On(const LocalTensor<T>& d, const LocalTensor<T>& x, T s, const twin::Lanes& l, \
                const UnaryRepeatParams& p) {                                                \
    twin::CHECK<T>(#NAME);                                                                   \
    twin::map_lanes(#NAME, twin::Operand<T>{d.ref(), p.dstBlkStride, p.dstRepStride},        \
                    twin::Operand<T>{x.ref(), p.srcBlkStride, p.srcRepStride}, l,            \
                    [s](twin::Op& op, T a) -> T {                                            \
                      (void)op;                                                              \
                      return EXPR;                                                           \
                    });                                                                      \
  }                                                                                          \
  template <class T>                                                                         \
  void NAME(const LocalTensor<T>& d, const LocalTensor<T>& x, const T& s, int32_t count) {   \
    NAME##On(d, x, s, twin::count_lanes(count, twin::lanes_of(twin::kBits<T>)), {});         \
  }                                                                                          \
  template <class T, bool kSetMask = true>                                                   \
  void NAME(const LocalTensor<T>& d, const LocalTensor<T>& x, const T& s, uint64_t mask,     \
            twin::U8 repeats, const UnaryRepeatParams& p) {                                  \
    NAME##On(d, x, s, twin::lanes_for<T>(mask, repeats), p);                                 \
  }

namespace AscendC {

// clang-format off
TWIN_BINARY(Add, arithmetic_type, twin::sum(op, a, b))
TWIN_BINARY(Sub, arithmetic_type, twin::difference(op, a, b))
TWIN_BINARY(Mul, arithmetic_type, twin::product(op, a, b))
TWIN_BINARY(Div, float_type, T(float(a) / float(b)))
TWIN_BINARY(Max, arithmetic_type, a < b ? b : a)
TWIN_BINARY(Min, arithmetic_type, b < a ? b : a)
TWIN_BINARY(And, bits_type, T(a & b))
TWIN_BINARY(Or, bits_type, T(a | b))

TWIN_UNARY(Not, bits_type, T(~a))
TWIN_UNARY(Abs, float_type, T(std::fabs(float(a))))
TWIN_UNARY(Exp, float_type, T(std::exp(float(a))))
TWIN_UNARY(Ln, float_type, T(std::log(float(a))))
TWIN_UNARY(Sqrt, float_type, T(std::sqrt(float(a))))
TWIN_UNARY(Rsqrt, float_type, T(1.f / std::sqrt(float(a))))
TWIN_UNARY(Reciprocal, float_type, T(1.f / float(a)))
TWIN_UNARY(Relu, arithmetic_type, a < T(0) ? T(0) : a)

TWIN_SCALAR(Adds, arithmetic_type, twin::sum(op, a, s))
TWIN_SCALAR(Muls, arithmetic_type, twin::product(op, a, s))
TWIN_SCALAR(Maxs, arithmetic_type, a < s ? s : a)
TWIN_SCALAR(Mins, arithmetic_type, s < a ? s : a)
TWIN_SCALAR(ShiftLeft, shift_type, T(std::make_unsigned_t<T>(a) << int(s)))
TWIN_SCALAR(ShiftRight, shift_type, T(a >> int(s)))
// clang-format on

// d += x * s: the product is not rounded before the sum (a fused multiply-add).
template <class T, class U>
void Axpy(const LocalTensor<T>& d, const LocalTensor<U>& x, const U& s, int32_t count) {
  twin::float_type<T>("Axpy");
  const auto l = twin::count_lanes(count, twin::lanes_of(twin::kBits<T>));
  twin::map_lanes("Axpy", twin::contiguous(d, l.per_repeat), twin::contiguous(d, l.per_repeat),
                  twin::contiguous(x, l.per_repeat), l, [s](twin::Op&, T a, U b) -> T {
                    return T(std::fma(float(b), float(s), float(a)));
                  });
}

// d += x * y, fused.
template <class T, class U>
void MulAddDst(const LocalTensor<T>& d, const LocalTensor<U>& x, const LocalTensor<U>& y,
               int32_t count) {
  twin::float_type<T>("MulAddDst");
  const auto l = twin::count_lanes(count, twin::lanes_of(twin::kBits<T>));
  const twin::Operand<T> to = twin::checked(twin::contiguous(d, l.per_repeat), "MulAddDst");
  const twin::Operand<U> p = twin::checked(twin::contiguous(x, l.per_repeat), "MulAddDst");
  const twin::Operand<U> q = twin::checked(twin::contiguous(y, l.per_repeat), "MulAddDst");
  twin::count_vector(l);
  twin::core().issue(twin::kV, "MulAddDst", [=](twin::Op& op) {
    T acc[256];
    U a[256], b[256];
    for (int64_t r = 0; r < l.repeats; ++r) {
      twin::load_lanes(op, to, r, l, acc);
      twin::load_lanes(op, p, r, l, a);
      twin::load_lanes(op, q, r, l, b);
      for (int64_t i = 0; i < l.per_repeat; ++i)
        if (l.of(r)[size_t(i)]) acc[i] = T(std::fma(float(a[i]), float(b[i]), float(acc[i])));
      twin::store_lanes(op, to, r, l, acc);
    }
  });
}

template <class T>
void Duplicate(const LocalTensor<T>& d, const T& s, const twin::Lanes& l, int64_t blk,
               int64_t rep) {
  if (twin::kBits<T> < 16)
    throw twin::Finding("type", std::string("Duplicate does not take ") + twin::type_name<T>());
  const auto to = twin::checked(twin::Operand<T>{d.ref(), blk, rep}, "Duplicate");
  twin::count_vector(l);
  twin::core().issue(twin::kV, "Duplicate", [=](twin::Op& op) {
    T out[256];
    for (T& x : out) x = s;
    for (int64_t r = 0; r < l.repeats; ++r) twin::store_lanes(op, to, r, l, out);
  });
}
template <class T>
void Duplicate(const LocalTensor<T>& d, const T& s, int32_t count) {
  Duplicate(d, s, twin::count_lanes(count, twin::lanes_of(twin::kBits<T>)), 1, 8);
}
template <class T, bool kSetMask = true>
void Duplicate(const LocalTensor<T>& d, const T& s, uint64_t mask, twin::U8 repeats,
               twin::U16 dst_blk, twin::U8 dst_rep) {
  Duplicate(d, s, twin::lanes_for<T>(mask, repeats), dst_blk, dst_rep);
}

template <class T, bool kSetMask = true>
void Copy(const LocalTensor<T>& d, const LocalTensor<T>& x, uint64_t mask, twin::U8 repeats,
          const CopyRepeatParams& p) {
  if (twin::kBits<T> < 16)
    throw twin::Finding("type", std::string("Copy does not take ") + twin::type_name<T>());
  twin::map_lanes("Copy", twin::Operand<T>{d.ref(), p.dstStride, p.dstRepeatSize},
                  twin::Operand<T>{x.ref(), p.srcStride, p.srcRepeatSize},
                  twin::lanes_for<T>(mask, repeats), [](twin::Op&, T a) -> T { return a; });
}

// Each of 8 elements a repeat fills a block of 32 bytes.
template <class T>
void Brcb(const LocalTensor<T>& d, const LocalTensor<T>& x, twin::U8 repeats,
          const BrcbRepeatParams& p) {
  if (twin::kBits<T> != 16 && twin::kBits<T> != 32)
    throw twin::Finding("type", std::string("Brcb does not take ") + twin::type_name<T>());
  const twin::Ref to = d.ref(), from = x.ref();
  twin::aligned(to, 32, "Brcb");
  twin::aligned(from, 32, "Brcb");
  twin::core().stats.vector_repeats += repeats;
  twin::core().issue(twin::kV, "Brcb", [=](twin::Op& op) {
    for (int64_t r = 0; r < repeats; ++r)
      for (int64_t i = 0; i < 8; ++i) {
        const T v = twin::load_one<T>(op, from + (r * 8 + i) * int64_t(sizeof(T)));
        const twin::Ref block = to + (r * p.dstRepStride + i * p.dstBlkStride) * 32;
        for (int64_t b = 0; b < 32; b += int64_t(sizeof(T))) twin::store_one<T>(op, block + b, v);
      }
  });
}

// d[i] = x[(base + offset[i]) bytes].
template <class T>
void Gather(const LocalTensor<T>& d, const LocalTensor<T>& x, const LocalTensor<uint32_t>& offset,
            uint32_t base, uint32_t count) {
  if (twin::kBits<T> != 16 && twin::kBits<T> != 32)
    throw twin::Finding("type", std::string("Gather does not take ") + twin::type_name<T>());
  const twin::Ref to = d.ref(), from = x.ref(), at = offset.ref();
  for (const twin::Ref& r : {to, from, at}) twin::aligned(r, 32, "Gather");
  // one element of 32 bytes' worth of addresses a cycle, not a whole repeat
  twin::core().stats.vector_repeats += (count + 7) / 8;
  twin::core().issue(twin::kV, "Gather", [=](twin::Op& op) {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t o = twin::load_one<uint32_t>(op, at + i * 4) + base;
      if (o % sizeof(T) != 0) op.fail("align", "an offset is not a multiple of the element size");
      twin::store_one<T>(op, to + i * int64_t(sizeof(T)), twin::load_one<T>(op, from + o));
    }
  });
}

// A 16 x 16 matrix of 16-bit elements.
template <class T>
void Transpose(const LocalTensor<T>& d, const LocalTensor<T>& x) {
  if (twin::kBits<T> != 16)
    throw twin::Finding("type", std::string("Transpose does not take ") + twin::type_name<T>());
  const twin::Ref to = d.ref(), from = x.ref();
  twin::aligned(to, 32, "Transpose");
  twin::aligned(from, 32, "Transpose");
  twin::core().stats.vector_repeats += 2;
  twin::core().issue(twin::kV, "Transpose", [=](twin::Op& op) {
    T m[256];
    std::memcpy(m, op.read(from, 512), 512);
    for (int64_t i = 0; i < 256; ++i) twin::store_one<T>(op, to + i * 2, m[i % 16 * 16 + i / 16]);
  });
}

inline void SetMaskCount() { twin::core().mask_counts = true; }
inline void SetMaskNorm() { twin::core().mask_counts = false; }
inline void ResetMask() {
  twin::core().mask[0] = twin::core().mask[1] = ~0ull;
  twin::core().mask_counts = false;
}
template <class T, MaskMode kMode = MaskMode::NORMAL>
void SetVectorMask(uint64_t high, uint64_t low) {
  twin::core().mask[0] = low;
  twin::core().mask[1] = high;
  if (kMode == MaskMode::COUNTER) twin::core().mask_count = int64_t(low);
}

}  // namespace AscendC
