// How a vector instruction walks its operands: repeats of 256 bytes, in blocks of 32 bytes, with
// strides between both, and a mask over the lanes of a repeat.
#pragma once
#include <bitset>

#include "twin/copy.h"

namespace twin {

struct Lanes {
  int64_t repeats, per_repeat;
  std::bitset<256> on, last;  // of every repeat, and of the last one

  const std::bitset<256>& of(int64_t r) const { return r + 1 == repeats ? last : on; }
};

// Lanes per repeat, given the widest element type.
constexpr int64_t lanes_of(int bits) { return 256 * 8 / (bits < 8 ? 8 : bits); }

inline std::bitset<256> first_lanes(int64_t n) {
  std::bitset<256> on;
  for (int64_t i = 0; i < n; ++i) on.set(size_t(i));
  return on;
}

// The first `count` elements.
inline Lanes count_lanes(int64_t count, int64_t per_repeat) {
  if (count <= 0) throw Finding("field", "a vector instruction over no element");
  Lanes l{(count + per_repeat - 1) / per_repeat, per_repeat, first_lanes(per_repeat), {}};
  l.last = first_lanes(count - (l.repeats - 1) * per_repeat);
  return l;
}

inline void check_repeats(int64_t repeats) {
  if (repeats < 0 || repeats > 255)
    throw Finding("field", "repeatTimes " + std::to_string(repeats) + " is not in 0..255");
}

// `mask` lanes of each of `repeats`.
inline Lanes mask_lanes(int64_t mask, int64_t repeats, int64_t per_repeat) {
  check_repeats(repeats);
  if (mask < 1 || mask > per_repeat)
    throw Finding("field",
                  "mask " + std::to_string(mask) + " is not in 1.." + std::to_string(per_repeat));
  const auto on = first_lanes(mask);
  return {repeats, per_repeat, on, on};
}

inline Lanes bit_lanes(const uint64_t mask[2], int64_t repeats, int64_t per_repeat) {
  check_repeats(repeats);
  std::bitset<256> on;
  for (int64_t i = 0; i < std::min<int64_t>(per_repeat, 128); ++i)
    if (mask[i / 64] >> (i % 64) & 1) on.set(size_t(i));
  if (mask[0] == 0 && mask[1] == 0) throw Finding("field", "a mask without a lane");
  return {repeats, per_repeat, on, on};
}

// What SetMaskCount, SetVectorMask and the like have left, for forms with isSetMask = false.
inline Lanes state_lanes(int64_t repeats, int64_t per_repeat) {
  const Core& c = core();
  if (c.mask_counts) return count_lanes(c.mask_count, per_repeat);
  return bit_lanes(c.mask, repeats, per_repeat);
}

template <class T>
struct Operand {
  Ref ref;
  int64_t blk = 1, rep = 8;  // strides in blocks of 32 bytes, 0: the same again

  static constexpr int64_t kPerBlock = 32 * 8 / kBits<T>;
  Ref at(int64_t r, int64_t lane) const {
    return ref + (r * rep * 32 + lane / kPerBlock * blk * 32 + lane % kPerBlock * kBits<T> / 8);
  }
};

// In count form elements are contiguous whatever their size.
template <class T>
Operand<T> contiguous(const AscendC::LocalTensor<T>& t, int64_t per_repeat) {
  return {t.ref(), 1, per_repeat * kBits<T> / 8 / 32};
}

template <class T>
Operand<T> checked(Operand<T> o, const char* name) {
  if (o.ref.mem != kUB) throw Finding("path", std::string(name) + ": an operand is not in UB");
  aligned(o.ref, 32, name);
  return o;
}

// Calls f(first, count) for every run of active lanes inside a block of `per_block`.
template <class F>
void each_run(const std::bitset<256>& on, int64_t lanes, int64_t per_block, const F& f) {
  for (int64_t i = 0; i < lanes;) {
    if (!on[size_t(i)]) {
      ++i;
      continue;
    }
    int64_t n = 1;
    while (i + n < lanes && (i + n) % per_block != 0 && on[size_t(i + n)]) ++n;
    f(i, n);
    i += n;
  }
}

template <class T>
struct Lane {
  using type = T;
};
template <>
struct Lane<int4b_t> {
  using type = int8_t;
};

template <class T>
void load_lanes(Op& op, const Operand<T>& o, int64_t r, const Lanes& l,
                typename Lane<T>::type* out) {
  each_run(l.of(r), l.per_repeat, Operand<T>::kPerBlock, [&](int64_t i, int64_t n) {
    if constexpr (kBits<T> == 4) {
      const uint8_t* p = op.read(o.at(r, i), (i % 2 + n + 1) / 2);
      for (int64_t j = 0; j < n; ++j) {
        const int8_t both = int8_t(p[(i % 2 + j) / 2]);
        out[i + j] = (i + j) % 2 == 0 ? int8_t(int8_t(uint8_t(both) << 4) >> 4) : int8_t(both >> 4);
      }
    } else {
      std::memcpy(out + i, op.read(o.at(r, i), n * int64_t(sizeof(T))), size_t(n) * sizeof(T));
    }
  });
}

template <class T>
void store_lanes(Op& op, const Operand<T>& o, int64_t r, const Lanes& l,
                 const typename Lane<T>::type* in) {
  each_run(l.of(r), l.per_repeat, Operand<T>::kPerBlock, [&](int64_t i, int64_t n) {
    if constexpr (kBits<T> == 4) {
      uint8_t* p = op.write(o.at(r, i), (i % 2 + n + 1) / 2);
      for (int64_t j = 0; j < n; ++j) {
        uint8_t& both = p[(i % 2 + j) / 2];
        const uint8_t x = uint8_t(in[i + j]) & 15;
        both = uint8_t((i + j) % 2 == 0 ? (both & 0xf0) | x : (both & 0x0f) | x << 4);
      }
    } else {
      std::memcpy(op.write(o.at(r, i), n * int64_t(sizeof(T))), in + i, size_t(n) * sizeof(T));
    }
  });
}

inline void count_vector(const Lanes& l) { core().stats.vector_repeats += l.repeats; }

// dst = f(a) or f(a, b), lane by lane, each repeat read before it is written.
template <class D, class A, class F>
void map_lanes(const char* name, const Operand<D>& dst, const Operand<A>& a, const Lanes& l, F f) {
  const Operand<D> d = checked(dst, name);
  const Operand<A> x = checked(a, name);
  count_vector(l);
  core().issue(kV, name, [=](Op& op) {
    typename Lane<A>::type in[256];
    typename Lane<D>::type out[256];
    for (int64_t r = 0; r < l.repeats; ++r) {
      load_lanes(op, x, r, l, in);
      for (int64_t i = 0; i < l.per_repeat; ++i)
        if (l.of(r)[size_t(i)]) out[i] = f(op, in[i]);
      store_lanes(op, d, r, l, out);
    }
  });
}

template <class D, class A, class B, class F>
void map_lanes(const char* name, const Operand<D>& dst, const Operand<A>& a, const Operand<B>& b,
               const Lanes& l, F f) {
  const Operand<D> d = checked(dst, name);
  const Operand<A> x = checked(a, name);
  const Operand<B> y = checked(b, name);
  count_vector(l);
  core().issue(kV, name, [=](Op& op) {
    A p[256];
    B q[256];
    D out[256];
    for (int64_t r = 0; r < l.repeats; ++r) {
      load_lanes(op, x, r, l, p);
      load_lanes(op, y, r, l, q);
      for (int64_t i = 0; i < l.per_repeat; ++i)
        if (l.of(r)[size_t(i)]) out[i] = f(op, p[i], q[i]);
      store_lanes(op, d, r, l, out);
    }
  });
}

}  // namespace twin
