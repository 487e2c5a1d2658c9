// msm_append: keys, rotated, and values into pages of plain numbers.
#include <vector>

#include "core/half.h"
#include "cpu/parallel.h"
#include "msm/params.h"

namespace tessella::msm {

template <class T>
static void read_row(const void* from, int64_t at, int64_t D, float* to) {
  for (int64_t d = 0; d < D; ++d) to[d] = to_float(static_cast<const T*>(from)[at + d]);
}

static void read(const AppendParams& p, const void* from, int64_t at, float* to) {
  if (p.dtype == DType::kBF16) read_row<BF16>(from, at, p.D, to);
  if (p.dtype == DType::kF16) read_row<F16>(from, at, p.D, to);
  if (p.dtype == DType::kF32) read_row<float>(from, at, p.D, to);
}

// NOTE: compiled without contraction, so that each product and sum is rounded as torch rounds it.
void read_key(const AppendParams& p, int64_t t, int64_t j, float* k) {
  read(p, p.k, t * p.k_token + j * p.k_head, k);
  const int64_t half = p.R / 2;
  const float *cos = p.cos + t * half, *sin = p.sin + t * half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = k[i], b = k[i + half];
    k[i] = a * cos[i] - b * sin[i];
    k[i + half] = b * cos[i] + a * sin[i];
  }
}

void read_value(const AppendParams& p, int64_t t, int64_t j, float* v) {
  read(p, p.v, t * p.v_token + j * p.v_head, v);
}

template <class T>
static void append(const AppendParams& p, T* pages) {
  parallel_for(p.T, p.J * p.D * 4, [&](int64_t begin, int64_t end) {
    float x[256];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t slot = p.slots[t];
      if (slot < 0 || slot >= p.P * p.Z) continue;
      for (int64_t j = 0; j < p.J; ++j) {
        T* to = pages + ((slot / p.Z * p.J + j) * 2 * p.Z + slot % p.Z) * p.D;
        read_key(p, t, j, x);
        for (int64_t d = 0; d < p.D; ++d) to[d] = from_float<T>(x[d]);
        read_value(p, t, j, x);
        for (int64_t d = 0; d < p.D; ++d) to[p.Z * p.D + d] = from_float<T>(x[d]);
      }
    }
  });
}

void append_cpu(const AppendParams& p, void* pages, DType page_dtype) {
  if (page_dtype == DType::kBF16) append(p, static_cast<BF16*>(pages));
  if (page_dtype == DType::kF16) append(p, static_cast<F16*>(pages));
  if (page_dtype == DType::kF32) append(p, static_cast<float*>(pages));
  if (page_dtype == DType::kE4M3) append(p, static_cast<E4M3*>(pages));
}

}  // namespace tessella::msm
