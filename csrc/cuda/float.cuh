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
