// act_quant: per-token symmetric dynamic quantisation of activations into ActBlocks.
//
//   amax = max |x| over what shares a scale;  scale = amax / qmax;  code = rne(x * (qmax / amax))
//
// with qmax 127 (INT8) or 7 (INT4), each step one fp32 rounding, so that every backend gives the
// same codes. amax < 2^-100: scale 0, codes 0. An inf or NaN: scale NaN, codes 0.
#pragma once
#include "core/hd.h"

namespace tessella::act_quant {

// What is quantised. The fused producers round where the same model in torch would (to the dtype
// after each of its ops), so fusing changes nothing but speed.
enum class Source {
  kPlain,    // x
  kRmsNorm,  // weight * norm(h), h = x + residual; norm(h) = h / sqrt(mean(h^2) + eps)
  kSiluMul,  // silu(x) * other
};

struct Params {
  const void* x;        // [M][K], rows `stride` elements apart
  const int32_t* perm;  // [K] or null: channel k is the source's channel perm[k]
  int8_t* codes8;       // [K8/128][M][128]
  uint8_t* codes4;      // [(Kp-K8)/128][M][64]
  int32_t* sums;        // [Kp/128][M]
  float* scales;        // [M] | [2][M] | [Kp/128][M]
  int64_t M, K, Kp, K8, stride;
  // CPU, plain source: where not 0, x is [tokens][groups][K], groups `group_stride` elements apart,
  // and rows are quantised in the order of groups: row m is token m % tokens of group m / tokens.
  int64_t tokens, group_stride;
  DType dtype;
  Granularity granularity;

  Source source;
  const void* other;   // residual (or null), or the factor `up`: [M][K], rows other_stride apart
  const void* weight;  // RMS norm: [K]
  void* h;             // RMS norm with residual: x + residual, [M][K]
  void* y;             // RMS norm: what is quantised, as `dtype`, [M][K]; or null
  int64_t other_stride;
  float eps;

  // Where row m of x starts.
  int64_t row(int64_t m) const {
    return tokens == 0 ? m * stride : m % tokens * stride + m / tokens * group_stride;
  }
};

constexpr uint32_t kTinyBits = (127u - 100u) << 23;  // 2^-100
constexpr uint32_t kInfBits = 0x7f800000u;

// Scale and inverse scale from the largest magnitude, given as the bits of a non-negative fp32:
// as integers these order like the numbers, with inf and NaN above all, so a plain integer maximum
// finds non-finite input too.
struct Scale {
  float scale, inverse;
};
TSL_HD inline Scale make_scale(uint32_t amax_bits, float qmax) {
  union {
    uint32_t u;
    float f;
  } amax{amax_bits}, nan{0x7fc00000u};
  if (amax_bits >= kInfBits) return {nan.f, 0.f};
  if (amax_bits < kTinyBits) return {0.f, 0.f};
  return {amax.f / qmax, qmax / amax.f};
}

// CPU: torch threads over tokens. Throws std::runtime_error on a bad TESSELLA_FORCE.
void run_cpu(const Params& p);

// Runs on the CUDA stream `stream`; returns a cudaError_t as int.
int run_cuda(const Params& p, void* stream);

}  // namespace tessella::act_quant
