// The cube unit: fractals from L1 into L0A (zZ) and L0B (nZ), and their product in L0C (Nz).
//
// A fractal is 16 rows of 32 bytes. In L0A fractals lie row by row of A; in L0B, whose 16 "rows"
// are columns of B, those of the first 32 bytes of K come first. L0C holds [n / 16][m][16].
#pragma once
#include "twin/copy.h"

namespace twin {

// What the product does with undefined operands: it computes with them, and whatever they reached
// is undefined in turn. Rows of padding are no error until somebody stores them.
template <class T>
struct Matrix {
  std::vector<float> f;
  std::vector<int32_t> i;
  std::vector<uint8_t> known;
  int64_t rows, k;

  void read(Op& op, const Ref& base, const std::vector<int64_t>& row_at, int64_t k_, int64_t step);
};

// Element j of a row: byte offset inside the row's 32 bytes of its K block.
template <class T>
void decode(const uint8_t* p, int64_t n, float* f, int32_t* i) {
  for (int64_t j = 0; j < n; ++j) {
    if constexpr (kBits<T> == 4) {
      const int8_t both = int8_t(p[j / 2]);
      i[j] = j % 2 == 0 ? int8_t(uint8_t(both) << 4) >> 4 : both >> 4;
    } else {
      T x;
      std::memcpy(&x, p + j * int64_t(sizeof(T)), sizeof(T));
      if constexpr (kFloat<T>)
        f[j] = float(x);
      else
        i[j] = int32_t(x);
    }
  }
}

template <class T>
void Matrix<T>::read(Op& op, const Ref& base, const std::vector<int64_t>& row_at, int64_t k_,
                     int64_t step) {
  constexpr int64_t kC0 = 32 * 8 / kBits<T>;
  rows = int64_t(row_at.size());
  k = k_;
  (kFloat<T> ? void(f.assign(size_t(rows * k), 0)) : void(i.assign(size_t(rows * k), 0)));
  known.assign(size_t(rows), 1);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c * kC0 < k; ++c) {
      const int64_t n = std::min(kC0, k - c * kC0), bytes = bytes_of<T>(n);
      const Ref at = base + (row_at[size_t(r)] + c * step);
      const uint8_t* p = op.touch(at, bytes, false);
      const uint8_t* init = op.known(at);
      for (int64_t b = 0; b < bytes; ++b) known[size_t(r)] &= init[b];
      decode<T>(p, n, f.data() + r * k + c * kC0, i.data() + r * k + c * kC0);
    }
}

template <class T>
constexpr CubeType cube_type() {
  return kBits<T> == 4 ? kCubeS4 : kBits<T> == 8 ? kCubeS8 : kBits<T> == 16 ? kCubeF16 : kCubeF32;
}

template <class C, class A, class B>
constexpr bool kMmadTypes =
    std::is_same_v<A, B> &&
    (std::is_same_v<C, int32_t> ? std::is_same_v<A, int8_t> || std::is_same_v<A, int4b_t>
                                : std::is_same_v<C, float> && kFloat<A>);

// c[m][n] = (first ? 0 or bias : c) + a b, with 16 x 16 fractals of c.
template <class C, class T>
void multiply(Op& op, const Ref& c, const Ref* bias, const Matrix<T>& a, const Matrix<T>& b,
              bool accumulate) {
  const int64_t m_all = (a.rows + 15) / 16 * 16;
  for (int64_t n = 0; n < b.rows; ++n)
    for (int64_t m = 0; m < a.rows; ++m) {
      const Ref at = c + ((n / 16 * m_all + m) * 16 + n % 16) * 4;
      C sum{};
      uint8_t known = a.known[size_t(m)] & b.known[size_t(n)];
      if (accumulate || bias != nullptr) {
        const Ref from = accumulate ? at : *bias + n * 4;
        std::memcpy(&sum, op.touch(from, 4, false), 4);
        known &= op.known(from)[0];
      }
      if constexpr (kFloat<T>) {
        for (int64_t k = 0; k < a.k; ++k)
          sum += a.f[size_t(m * a.k + k)] * b.f[size_t(n * b.k + k)];
      } else {
        const int32_t *x = &a.i[size_t(m * a.k)], *y = &b.i[size_t(n * b.k)];
        int32_t s = 0;
        for (int64_t k = 0; k < a.k; ++k) s += x[k] * y[k];
        if (__builtin_add_overflow(sum, s, &sum)) op.fail("overflow", "a sum leaves int32");
      }
      std::memcpy(op.touch(at, 4, true), &sum, 4);
      std::memset(op.known(at), known, 4);
    }
}

}  // namespace twin

namespace AscendC {

template <class T>
void LoadData(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LoadData2DParams& p) {
  const twin::Ref to = dst.ref(), from = src.ref();
  if (from.mem != twin::kL1 || (to.mem != twin::kL0A && to.mem != twin::kL0B))
    throw twin::Finding("path", "LoadData: only from L1 to L0A or L0B");
  twin::aligned(to, 512, "LoadData");
  twin::aligned(from, 32, "LoadData");
  if (p.ifTranspose && twin::kBits<T> != 16)
    throw twin::Finding("type", "LoadData: ifTranspose works on 16-bit types only");
  twin::core().stats.bytes[twin::kL1ToL0] += p.repeatTimes * 512;
  twin::core().issue(twin::kMTE1, "LoadData", [=](twin::Op& op) {
    for (int64_t i = 0; i < p.repeatTimes; ++i) {
      const twin::Ref f = from + (p.startIndex + i * p.srcStride) * 512;
      const twin::Ref t = to + i * (p.dstGap + 1) * 512;
      if (!p.ifTranspose) {
        op.move(t, f, 512);
      } else {
        for (int64_t e = 0; e < 256; ++e) op.move(t + (e % 16 * 16 + e / 16) * 2, f + e * 2, 2);
      }
    }
  });
}

// A square of 64 x 64 int4, 32 x 32 int8 or 16 x 16 b16, which is one or more fractals on top of
// each other, is transposed, and leaves as as many fractals.
template <class T>
void LoadDataWithTranspose(const LocalTensor<T>& dst, const LocalTensor<T>& src,
                           const LoadData2dTransposeParams& p) {
  const twin::Ref to = dst.ref(), from = src.ref();
  constexpr int64_t kSide = 32 * 8 / twin::kBits<T> < 16 ? 16 : 32 * 8 / twin::kBits<T>;
  constexpr int64_t kFractals = kSide * kSide * twin::kBits<T> / 8 / 512;
  if (from.mem != twin::kL1 || (to.mem != twin::kL0A && to.mem != twin::kL0B))
    throw twin::Finding("path", "LoadDataWithTranspose: only from L1 to L0A or L0B");
  if (twin::kBits<T> == 4 && to.mem != twin::kL0B)
    throw twin::Finding("path", "LoadDataWithTranspose: int4b_t goes to L0B only");
  if (twin::kBits<T> == 32) throw twin::Finding("type", "LoadDataWithTranspose: 32-bit types");
  twin::aligned(to, 512, "LoadDataWithTranspose");
  twin::core().stats.bytes[twin::kL1ToL0] += p.repeatTimes * kFractals * 512;
  twin::core().issue(twin::kMTE1, "LoadDataWithTranspose", [=](twin::Op& op) {
    for (int64_t i = 0; i < p.repeatTimes; ++i) {
      const twin::Ref f = from + (p.startIndex + i * p.srcStride) * kFractals * 512;
      const twin::Ref t = to + i * (p.dstGap + 1) * 512;
      for (int64_t row = 0; row < kSide; ++row)
        for (int64_t col = 0; col < kSide; ++col) {
          // element (row, col) of the square goes to row `col` of the result
          const twin::Ref a = f + (row * kSide + col) * twin::kBits<T> / 8;
          const twin::Ref b = t + (col / 16 * (p.dstFracGap + 1) * 512 +
                                   (col % 16 * kSide + row) * twin::kBits<T> / 8);
          if constexpr (twin::kBits<T> == 4) {
            const uint8_t x = *op.read(a, 1) >> (col % 2 * 4) & 15;
            uint8_t* y = op.write(b, 1);
            *y = uint8_t(row % 2 == 0 ? (*y & 0xf0) | x : (*y & 0x0f) | x << 4);
          } else {
            op.move(b, a, int64_t(sizeof(T)));
          }
        }
    }
  });
}

template <class C, class A, class B>
void MmadImpl(const LocalTensor<C>& c, const LocalTensor<A>& a, const LocalTensor<B>& b,
              const twin::Ref* bias, const MmadParams& p) {
  if constexpr (!twin::kMmadTypes<C, A, B>) {
    throw twin::Finding("type", std::string("Mmad: no product of ") + twin::type_name<A>() +
                                    " and " + twin::type_name<B>() + " into " +
                                    twin::type_name<C>());
  } else {
    const twin::Ref rc = c.ref(), ra = a.ref(), rb = b.ref();
    if (rc.mem != twin::kL0C || ra.mem != twin::kL0A || rb.mem != twin::kL0B)
      throw twin::Finding("path", "Mmad: operands are not in L0C, L0A and L0B");
    for (const twin::Ref& r : {ra, rb}) twin::aligned(r, 512, "Mmad");
    if (p.m * p.n * p.k == 0) return;
    if (twin::kBits<A> == 4 && p.k % 2 != 0)
      throw twin::Finding("field", "Mmad: k of int4b_t operands is odd");
    constexpr int64_t kC0 = 32 * 8 / twin::kBits<A>;
    const int64_t m = p.m, n = p.n, k = p.k, kb = (k + kC0 - 1) / kC0;
    twin::core().stats.cube_fractals[twin::cube_type<A>()] +=
        ((m + 15) / 16) * ((n + 15) / 16) * kb;
    const bool has_bias = bias != nullptr, accumulate = !p.cmatrixInitVal && !has_bias;
    const twin::Ref rbias = has_bias ? *bias : rc;
    twin::core().issue(twin::kM, "Mmad", [=](twin::Op& op) {
      std::vector<int64_t> rows_a, rows_b;
      // m == 1 is a product with a vector: A is 1 x K, contiguous, not a row of a fractal
      for (int64_t i = 0; i < m; ++i)
        rows_a.push_back(m == 1 ? 0 : i / 16 * kb * 512 + i % 16 * 32);
      const int64_t n_all = (n + 15) / 16;
      for (int64_t i = 0; i < n; ++i) rows_b.push_back(i / 16 * 512 + i % 16 * 32);
      twin::Matrix<A> x;
      twin::Matrix<B> y;
      x.read(op, ra, rows_a, k, m == 1 ? 32 : 512);
      y.read(op, rb, rows_b, k, n_all * 512);
      // large products are in order; small ones need a barrier before the next on the same c
      if (((m + 15) / 16) * n_all >= 10) op.core().barrier(twin::kM);
      twin::multiply<C, A>(op, rc, has_bias ? &rbias : nullptr, x, y, accumulate);
    });
  }
}

template <class C, class A, class B>
void Mmad(const LocalTensor<C>& c, const LocalTensor<A>& a, const LocalTensor<B>& b,
          const MmadParams& p) {
  if (p.cmatrixSource && !p.cmatrixInitVal)
    throw twin::Finding("field", "Mmad: cmatrixSource asks for a bias, use the form with one");
  MmadImpl(c, a, b, nullptr, p);
}

template <class C, class A, class B, class V>
void Mmad(const LocalTensor<C>& c, const LocalTensor<A>& a, const LocalTensor<B>& b,
          const LocalTensor<V>& bias, const MmadParams& p) {
  static_assert(std::is_same_v<C, V>, "the bias has the type of the result");
  const twin::Ref r = bias.ref();
  if (r.mem != twin::kBT) throw twin::Finding("path", "Mmad: the bias is not in the bias table");
  MmadImpl(c, a, b, &r, p);
}

}  // namespace AscendC
