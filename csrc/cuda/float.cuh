// fp32 and the 16-bit float types, by our own DType.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/hd.h"

namespace tessella {

__device__ __forceinline__ float half_bits(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ __forceinline__ float load_float(const void* p, int64_t i, DType t) {
  if (t == DType::kBF16) return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
  return __half2float(static_cast<const __half*>(p)[i]);
}

__device__ __forceinline__ void store_float(void* p, int64_t i, DType t, float x) {
  if (t == DType::kBF16)
    static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(x);
  else
    static_cast<__half*>(p)[i] = __float2half_rn(x);
}

// Two E4M3 numbers in the low half of a register as two fp16 numbers.
__device__ __forceinline__ uint32_t halves_of_e4m3(uint32_t two) {
  uint32_t h;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
  asm("{\n.reg .b16 t;\ncvt.u16.u32 t, %1;\ncvt.rn.f16x2.e4m3x2 %0, t;\n}\n" : "=r"(h) : "r"(two));
#else
  // the exponent's bias is 8 less, which a multiplication mends, for subnormal numbers too
  const uint32_t wide = __byte_perm(two, 0, 0x4140);  // bytes 0 and 1 into bytes 0 and 2
  const uint32_t rest = (wide & 0x007f007f) << 7, sign = (wide & 0x00800080) << 8;
  const __half2 x = __hmul2(*reinterpret_cast<const __half2*>(&rest), __float2half2_rn(256.f));
  const uint32_t nan = __vcmpeq2(rest, 0x3f803f80u) & 0x7e007e00u;
  h = *reinterpret_cast<const uint32_t*>(&x) | nan | sign;
#endif
  return h;
}

// A row in the lanes of a warp is multiplied by the power of two that brings it into the range of
// fp16; returns what was taken out as an exponent. Not finite anywhere: NaN everywhere.
template <int kNumbers>
__device__ inline int into_half_range(float (&x)[kNumbers]) {
  float most = 0.f, whole = 0.f;
#pragma unroll
  for (int i = 0; i < kNumbers; ++i) {
    most = fmaxf(most, fabsf(x[i]));
    whole += x[i] * 0.f;
  }
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    most = fmaxf(most, __shfl_xor_sync(~0u, most, by));
    whole += __shfl_xor_sync(~0u, whole, by);
  }
  const int exponent = most > 1e-30f ? ilogbf(most) - 8 : 0;
  const float by = whole == whole ? exp2f(float(-exponent)) : whole;
#pragma unroll
  for (int i = 0; i < kNumbers; ++i) x[i] *= by;
  return exponent;
}

// Two results in one register, `low` in the low half.
__device__ __forceinline__ uint32_t pack2(float low, float high, DType t) {
  if (t == DType::kBF16) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

}  // namespace tessella
