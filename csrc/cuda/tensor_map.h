// Tensor maps for the copy engine. The encoder lives in the driver, which is looked up at run time,
// so that this library loads where there is none.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace tessella::cuda {

using EncodeTiled = decltype(cuTensorMapEncodeTiled);

inline EncodeTiled* tensor_map_encoder() {
  static EncodeTiled* const encoder = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                         &result) != cudaSuccess)
      found = nullptr;
    return reinterpret_cast<EncodeTiled*>(found);
  }();
  return encoder;
}

// Bytes [sizes[2]][sizes[1]][sizes[0]], contiguous, in boxes whose rows of 128 bytes lie in
// shared memory under the 128-byte swizzle. Returns a cudaError_t.
inline int tensor_map_bytes3(CUtensorMap* map, const void* data, const int64_t (&sizes)[3],
                             const int (&box_sizes)[3]) {
  EncodeTiled* const encode = tensor_map_encoder();
  if (encode == nullptr) return int(cudaErrorNotSupported);
  const cuuint64_t dims[3] = {cuuint64_t(sizes[0]), cuuint64_t(sizes[1]), cuuint64_t(sizes[2])};
  const cuuint64_t strides[2] = {dims[0], dims[0] * dims[1]};
  const cuuint32_t box[3] = {cuuint32_t(box_sizes[0]), cuuint32_t(box_sizes[1]),
                             cuuint32_t(box_sizes[2])};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult made =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<void*>(data), dims, strides, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? 0 : int(cudaErrorInvalidValue);
}

}  // namespace tessella::cuda
