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

// A tensor of elements of `element` bytes (1 or 2), innermost size first, with the bytes from one
// index of each further dimension to the next, in boxes under the swizzle of `row` bytes (128, 64
// or 32), which the innermost size of a box has. Returns a cudaError_t.
template <int kDims>
int tensor_map(CUtensorMap* map, const void* data, int element, const int64_t (&sizes)[kDims],
               const int64_t (&bytes)[kDims - 1], const int (&box_sizes)[kDims], int row) {
  EncodeTiled* const encode = tensor_map_encoder();
  if (encode == nullptr) return int(cudaErrorNotSupported);
  cuuint64_t dims[kDims], strides[kDims];
  cuuint32_t box[kDims], steps[kDims];
  for (int i = 0; i < kDims; ++i) {
    dims[i] = cuuint64_t(sizes[i]);
    strides[i] = i + 1 < kDims ? cuuint64_t(bytes[i]) : 0;  // the last one is not read
    box[i] = cuuint32_t(box_sizes[i]);
    steps[i] = 1;
  }
  const CUtensorMapDataType type =
      element == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
  const CUtensorMapSwizzle swizzle = row == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : row == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                 : CU_TENSOR_MAP_SWIZZLE_32B;
  const CUresult made =
      encode(map, type, kDims, const_cast<void*>(data), dims, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? 0 : int(cudaErrorInvalidValue);
}

// A contiguous tensor in boxes whose rows of 128 bytes lie under the 128-byte swizzle.
template <int kDims>
int tensor_map(CUtensorMap* map, const void* data, int element, const int64_t (&sizes)[kDims],
               const int (&box_sizes)[kDims]) {
  int64_t bytes[kDims - 1], stride = element;
  for (int i = 0; i + 1 < kDims; ++i) bytes[i] = stride *= sizes[i];
  return tensor_map(map, data, element, sizes, bytes, box_sizes, 128);
}

}  // namespace tessella::cuda
