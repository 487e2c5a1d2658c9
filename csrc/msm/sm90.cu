// Launches of the Hopper body; compiled for sm_90a only.
#include <cuda_runtime.h>

#include "msm/sm90.cuh"

#include "cuda/dependent.cuh"
#include "cuda/device.h"
#include "cuda/tensor_map.h"
#include "msm/kernels.h"

namespace tessella::msm {

template <class T>
static int launch(const Params& p, Part part, bool programmatic, cudaStream_t stream) {
  sm90::Args a{p, T::kKeys, part, sm90::Divider::make(p.H / p.J), sm90::Divider::make(p.Z)};
  while (a.Z % a.box != 0) a.box /= 2;
  // pages [P * J * 2 * Z / 8][8][D], a box of some keys of one page as the kernel lays them
  const int64_t groups = p.P * p.J * 2 * p.Z / 8, row = p.D * 2;
  CUtensorMap map;
  const int made = cuda::tensor_map<4>(&map, p.pages, 2, {T::kChunk, 8, p.D / T::kChunk, groups},
                                       {row, T::kRow, 8 * row},
                                       {T::kChunk, 8, int(p.D) / T::kChunk, a.box / 8}, T::kRow);
  if (made != 0) return made;
  constexpr int kBytes = sm90::Shared<T>::bytes();
  const cudaError_t attribute =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(&sm90::attend<T>),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (attribute != cudaSuccess) return int(attribute);
  // a tile or two for each request, which are few tasks for a block, need no counter
  if (T::kGroups == 1 || (p.T % p.B == 0 && p.T * (p.H / p.J) <= T::kTile * p.B))
    a.counter = nullptr;
  if (a.counter != nullptr) {
    const cudaError_t zeroed = cudaMemsetAsync(a.counter, 0, sizeof(int), stream);
    if (zeroed != cudaSuccess) return int(zeroed);
    programmatic = false;  // it follows a memset
  }
  const unsigned blocks = unsigned(cuda::this_device().sms * T::kBlocks);
  const cuda::Launch l{dim3(blocks), T::kThreads, size_t(kBytes), 1, programmatic, stream};
  return cuda::launch(l, &sm90::attend<T>, map, a);
}

template <DType kType, int kMath>
static int launch(const Params& p, Part part, bool programmatic, cudaStream_t stream) {
#define X(kD) \
  if (p.D == kD) return launch<sm90::Tile<kType, kD, kMath>>(p, part, programmatic, stream);
  TSL_MSM_SM90_DIMS(X)
#undef X
  return int(cudaErrorInvalidValue);
}

// Packed rows by H / J and keys by Z, see Divider.
static bool small_quotients(const Params& p) {
  const int64_t G = p.H / p.J, most = int64_t{1} << 32;
  return p.T * G < most / G && p.table_stride * p.Z < most / p.Z;
}

bool sm90_takes(const Params& p) {
  bool compiled = false;
#define X(kD) compiled = compiled || p.D == kD;
  TSL_MSM_SM90_DIMS(X)
#undef X
  // the copy engine counts groups of 8 keys in 32 bits, and 16-byte pieces of aligned rows
  return compiled && cuda::this_device().arch == 90 && p.page_dtype == p.dtype &&
         p.dtype != DType::kF32 && p.P * p.J * 2 * p.Z / 8 < int64_t{1} << 31 && p.P > 0 &&
         p.T * p.H < int64_t{1} << 31 && small_quotients(p) && p.q_token % 8 == 0 &&
         p.q_head % 8 == 0 && reinterpret_cast<uintptr_t>(p.q) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(p.pages) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
}

template <int kMath>
static int launch(const Params& p, Part part, bool programmatic, void* stream) {
  auto* const s = static_cast<cudaStream_t>(stream);
  return p.dtype == DType::kBF16 ? launch<DType::kBF16, kMath>(p, part, programmatic, s)
                                 : launch<DType::kF16, kMath>(p, part, programmatic, s);
}

int run_sm90(const Params& p, int rows, Part part, bool programmatic, void* stream) {
  return rows > 64 ? launch<2>(p, part, programmatic, stream)
                   : launch<1>(p, part, programmatic, stream);
}

}  // namespace tessella::msm
