// mla_append: latents and rotated rope keys -> rows of their pages.
//
// In fp32, each step rounded once, so that the codes are those of the reference:
//   s = fp16(max |x| / qmax);  q = clamp(rne(x * (1 / s)), -qmax, qmax)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/half.h"
#include "cpu/parallel.h"
#include "mla/params.h"

namespace tessella::mla {

template <class T>
static void read_row(const void* from, int64_t at, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(static_cast<const T*>(from)[at + i]);
}

static void read(DType dtype, const void* from, int64_t at, int64_t n, float* to) {
  if (dtype == DType::kBF16) read_row<BF16>(from, at, n, to);
  if (dtype == DType::kF16) read_row<F16>(from, at, n, to);
  if (dtype == DType::kF32) read_row<float>(from, at, n, to);
}

template <class T>
static void write_row(const float* from, int64_t n, uint8_t* to) {
  for (int64_t i = 0; i < n; ++i) {
    const T x = from_float<T>(from[i]);
    std::memcpy(to + i * sizeof(T), &x, sizeof(T));
  }
}

static void write(DType dtype, const float* from, int64_t n, uint8_t* to) {
  if (dtype == DType::kBF16) write_row<BF16>(from, n, to);
  if (dtype == DType::kF16) write_row<F16>(from, n, to);
  if (dtype == DType::kF32) write_row<float>(from, n, to);
}

// x [n] -> codes in -qmax..qmax; the scale is NaN where something is not finite or s overflows.
static F16 quantise(const float* x, int64_t n, int qmax, int8_t* codes) {
  float most = 0.f, nan = 0.f;
  for (int64_t i = 0; i < n; ++i) {
    most = std::max(most, std::fabs(x[i]));
    nan += x[i] * 0.f;  // NaN where x is an infinity or NaN
  }
  F16 s = from_float<F16>(most / float(qmax));
  const float real = to_float(s);
  if (nan != nan || std::isinf(real)) s = from_float<F16>(std::numeric_limits<float>::quiet_NaN());
  if (nan != nan || std::isinf(real) || real == 0.f) {
    std::memset(codes, 0, size_t(n));
    return s;
  }
  const float inv = 1.f / real, top = float(qmax);
  for (int64_t i = 0; i < n; ++i) {
    const float y = std::min(std::max(x[i] * inv, -top), top);
    codes[i] = int8_t((y + 12582912.f) - 12582912.f);  // to nearest, ties to even
  }
  return s;
}

static void put_half(uint8_t* at, F16 x) { std::memcpy(at, &x, 2); }

// Interleaved pairs (x[2i], x[2i + 1]), as DeepSeek's rope keys lie.
static void rotate(const float* cos, const float* sin, int64_t R, float* x) {
  for (int64_t i = 0; i < R / 2; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cos[i] - b * sin[i];
    x[2 * i + 1] = b * cos[i] + a * sin[i];
  }
}

static void append_latent(const AppendParams& p, uint8_t* blob, int64_t t, const float* x) {
  const layout::MlaPage& page = p.page;
  uint8_t* row = blob + page.latent(t, 0).byte;
  if (!page.scaled()) return write(p.latent_dtype, x, page.L, row);
  int8_t codes[kMostRank];
  put_half(blob + page.scale(t), quantise(x, page.L, page.latent_bits == 4 ? 7 : 127, codes));
  if (page.latent_bits == 8) {
    std::memcpy(row, codes, size_t(page.L));
    return;
  }
  for (int64_t d = 0; d < page.L; d += 64)
    for (int64_t i = 0; i < 32; ++i)
      row[d / 2 + i] = uint8_t((codes[d + i] + 8) | (codes[d + 32 + i] + 8) << 4);
}

static void append_rope(const AppendParams& p, uint8_t* blob, int64_t t, const float* x) {
  const layout::MlaPage& page = p.page;
  uint8_t* row = blob + page.rope_at(t, 0);
  if (!page.rope_scaled()) return write(p.rope_dtype, x, page.R, row);
  int8_t codes[kMostRope];
  put_half(blob + page.rope_scale(t), quantise(x, page.R, 127, codes));
  std::memcpy(row, codes, size_t(page.R));
}

void append_cpu(const AppendParams& p) {
  const int64_t L = p.page.L, R = p.page.R, Z = p.page.Z;
  parallel_for(p.T, (L + R) * 8, [&](int64_t begin, int64_t end) {
    float x[kMostRank];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t slot = p.slots[t];
      if (slot < 0 || slot >= p.P * Z) continue;
      uint8_t* blob = p.pages + slot / Z * p.page.bytes();
      read(p.dtype, p.latent, t * p.latent_token, L, x);
      append_latent(p, blob, slot % Z, x);
      read(p.dtype, p.rope, t * p.rope_token, R, x);
      if (p.cos) rotate(p.cos + t * (R / 2), p.sin + t * (R / 2), R, x);
      append_rope(p, blob, slot % Z, x);
    }
  });
}

}  // namespace tessella::mla
