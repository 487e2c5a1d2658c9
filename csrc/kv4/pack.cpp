// kv4_append: keys (rotated, mean subtracted, folded) and values -> codes in their pages.
//
// In fp32, each step rounded once, so that the codes are those of the reference:
//   s = fp16((hi - lo) / qmax);  inv = 1 / s;  z = fp16(-lo * inv);  q = rne(x * inv + z)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/half.h"
#include "cpu/parallel.h"
#include "kv4/params.h"

namespace tessella::kv4 {

using layout::Slot;

struct Quantiser {
  F16 s, z;
  float inv, zero, qmax;
  bool flat;  // code 0 for all

  uint8_t operator()(float x) const {
    if (flat) return 0;
    const float y = x * inv + zero;
    const float bounded = std::min(std::max(y, 0.f), qmax);
    return uint8_t((bounded + 12582912.f) - 12582912.f);  // to nearest, ties to even
  }
};

// A group's range is a constant where it is 2^-10 of its magnitude or less: s = |c|, z = -sign(c).
static Quantiser make(const float* x, int64_t n, int64_t step, int bits) {
  float lo = x[0], hi = x[0], nan = 0.f;
  for (int64_t i = 0; i < n; ++i) {
    const float v = x[i * step];
    lo = std::min(lo, v);
    hi = std::max(hi, v);
    nan += v * 0.f;  // NaN where v is an infinity or NaN
  }
  Quantiser q{};
  q.qmax = float((1 << bits) - 1);
  q.s = from_float<F16>((hi - lo) / q.qmax);
  const float s = to_float(q.s);
  if (nan != nan || std::isinf(s)) {
    q.s = from_float<F16>(std::numeric_limits<float>::quiet_NaN());
    q.z = from_float<F16>(0.f);
    q.flat = true;
  } else if (hi - lo <= std::max(std::fabs(lo), std::fabs(hi)) * 0x1p-10f || s == 0.f) {
    const float c = 0.5f * (lo + hi);
    q.s = from_float<F16>(std::fabs(c));
    q.z = from_float<F16>(c > 0.f ? -1.f : c < 0.f ? 1.f : 0.f);
    q.flat = true;
  } else {
    q.inv = 1.f / s;
    q.z = from_float<F16>(-lo * q.inv);
    q.zero = to_float(q.z);
  }
  return q;
}

static void put(uint8_t* blob, const Slot& at, int bits, uint8_t code) {
  const int mask = ((1 << bits) - 1) << at.shift;
  blob[at.byte] = uint8_t((blob[at.byte] & ~mask) | code << at.shift);
}

static void put_half(uint8_t* at, F16 x) { std::memcpy(at, &x, 2); }

static void code_value(const layout::KvPage& page, uint8_t* blob, int64_t t, const float* v) {
  for (int64_t g = 0; g < page.groups(); ++g) {
    const Quantiser q = make(v + g * page.G, page.G, 1, page.v_bits);
    put_half(blob + page.v_scales() + page.v_row(t, g * page.G), q.s);
    put_half(blob + page.v_zeros() + page.v_row(t, g * page.G), q.z);
    for (int64_t d = g * page.G; d < (g + 1) * page.G; ++d)
      put(blob, page.v_code(t, d), page.v_bits, q(v[d]));
  }
}

static void code_key(const layout::KvPage& page, uint8_t* blob, int64_t t, const float* k) {
  for (int64_t g = 0; g < page.groups(); ++g) {
    const Quantiser q = make(k + g * page.G, page.G, 1, page.k_bits);
    put_half(blob + page.k_scales() + page.k_row(t, g * page.G), q.s);
    put_half(blob + page.k_zeros() + page.k_row(t, g * page.G), q.z);
    for (int64_t d = g * page.G; d < (g + 1) * page.G; ++d)
      put(blob, page.k_code(t, d), page.k_bits, q(k[d]));
  }
}

// All Z keys of a page, per channel.
static void code_page(const layout::KvPage& page, uint8_t* blob, const float* k) {
  for (int64_t d = 0; d < page.D; ++d) {
    const Quantiser q = make(k + d, page.Z, page.D, page.k_bits);
    put_half(blob + page.k_scales() + page.k_row(0, d), q.s);
    put_half(blob + page.k_zeros() + page.k_row(0, d), q.z);
    for (int64_t t = 0; t < page.Z; ++t)
      put(blob, page.k_code(t, d), page.k_bits, q(k[t * page.D + d]));
  }
}

// x [D] -> x[block] @ fold[row][j][block]
static void apply(const Fold& fold, int64_t row, int64_t j, const AppendParams& p, float* x) {
  if (!fold.at) return;
  float y[256] = {};
  const float* f = fold.at + (row * p.J + j) * p.D * fold.m;
  for (int64_t i = 0; i < p.D; ++i)
    for (int64_t c = 0; c < fold.m; ++c) y[i / fold.m * fold.m + c] += x[i] * f[i * fold.m + c];
  std::copy_n(y, p.D, x);
}

template <class T>
static void swap_tail(T* tail, int64_t at, const float* k, const AppendParams& p, float* whole) {
  for (int64_t d = 0; d < p.D; ++d) tail[at * p.D + d] = from_float<T>(k[d]);
  if (at == p.Z - 1)
    for (int64_t i = 0; i < p.Z * p.D; ++i) whole[i] = to_float(tail[i]);
}

// A key into the tail; the tail into its page once it is full. `whole` [Z][D].
static void append_tail(const AppendParams& p, int64_t t, int64_t j, uint8_t* blob, const float* k,
                        float* whole) {
  const int64_t at = p.slots[t] % p.Z, first = (p.tail_row[t] * p.J + j) * p.Z * p.D;
  if (p.tail_dtype == DType::kBF16)
    swap_tail(static_cast<BF16*>(p.k_tail) + first, at, k, p, whole);
  if (p.tail_dtype == DType::kF16) swap_tail(static_cast<F16*>(p.k_tail) + first, at, k, p, whole);
  if (p.tail_dtype == DType::kF32)
    swap_tail(static_cast<float*>(p.k_tail) + first, at, k, p, whole);
  if (at == p.Z - 1) code_page(p.page, blob, whole);
}

// NOTE: tokens of a head go one after another: with keys per channel their order matters.
void append_cpu(const AppendParams& p) {
  parallel_for(p.J, p.T * p.D * 64, [&](int64_t begin, int64_t end) {
    std::vector<float> whole(p.page.channel ? size_t(p.Z * p.D) : 0);
    float x[256];
    for (int64_t j = begin; j < end; ++j)
      for (int64_t t = 0; t < p.T; ++t) {
        const int64_t slot = p.slots[t];
        if (slot < 0 || slot >= p.P * p.Z) continue;
        uint8_t* blob = p.pages + (slot / p.Z * p.J + j) * p.page.bytes();
        const int64_t row = p.rows ? p.rows[t] : 0;
        msm::read_key(p, t, j, x);
        if (p.k_mean)
          for (int64_t d = 0; d < p.D; ++d) x[d] -= p.k_mean[(row * p.J + j) * p.D + d];
        apply(p.k_fold, row, j, p, x);
        if (p.page.channel)
          append_tail(p, t, j, blob, x, whole.data());
        else
          code_key(p.page, blob, slot % p.Z, x);
        msm::read_value(p, t, j, x);
        apply(p.v_fold, row, j, p, x);
        code_value(p.page, blob, slot % p.Z, x);
      }
  });
}

}  // namespace tessella::kv4
