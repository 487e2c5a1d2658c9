// Launches of the Hopper body; compiled for sm_90a only.
#include <cuda_runtime.h>

#include "msm/sm90.cuh"

#include "cuda/dependent.cuh"
#include "cuda/device.h"
#include "cuda/tensor_map.h"
#include "msm/kernels.h"

namespace tessella::msm {

// Multiprocessors that leave large tasks to the others while there are small ones: a fifth, and as
// many more as cost no further round. Every query that is not some request's only one is counted as
// part of a large task; only the device knows which are, and kAfter makes up for a bad guess.
static int beside(const Params& p, int sms, int tile) {
  const int64_t tiles = ceil_div((p.T - p.B + 1) * (p.H / p.J), int64_t{tile});
  const int64_t items = tiles > 0 ? tiles * p.J : 1, rounds = ceil_div(items, sms - sms / 5);
  return sms - int(ceil_div(items, rounds));
}

template <class T>
static int launch(const Params& p, Turn turn, bool programmatic, cudaStream_t stream) {
  const int sms = cuda::this_device().sms;
  const int first = turn == Turn::kAlone ? sms * T::kBlocks : sms - beside(p, sms, T::kTile);
  sm90::Args a{p, T::kKeys, first, turn, sm90::Divider::make(p.H / p.J), sm90::Divider::make(p.Z)};
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
  if (turn == Turn::kAlone &&
      (T::kGroups == 1 || (p.T % p.B == 0 && p.T * (p.H / p.J) <= T::kTile * p.B)))
    a.counter = nullptr;
  const bool after = turn == Turn::kAfter;
  if (a.counter != nullptr && !after) {
    const cudaError_t zeroed = cudaMemsetAsync(a.counter, 0, sizeof(int), stream);
    if (zeroed != cudaSuccess) return int(zeroed);
    programmatic = false;  // it follows the memset
  }
  const cuda::Launch l{dim3(unsigned(after ? sms - first : first)),
                       T::kThreads,
                       size_t(kBytes),
                       1,
                       programmatic,
                       stream};
  return cuda::launch(l, &sm90::attend<T>, map, a);
}

template <DType kType, int kMath>
static int launch(const Params& p, Turn turn, bool programmatic, cudaStream_t stream) {
#define X(kD) \
  if (p.D == kD) return launch<sm90::Tile<kType, kD, kMath>>(p, turn, programmatic, stream);
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
static int launch(const Params& p, Turn turn, bool programmatic, void* stream) {
  auto* const s = static_cast<cudaStream_t>(stream);
  return p.dtype == DType::kBF16 ? launch<DType::kBF16, kMath>(p, turn, programmatic, s)
                                 : launch<DType::kF16, kMath>(p, turn, programmatic, s);
}

int run_sm90(const Params& p, int rows, Turn turn, bool programmatic, void* stream) {
  return rows > 64 ? launch<2>(p, turn, programmatic, stream)
                   : launch<1>(p, turn, programmatic, stream);
}

}  // namespace tessella::msm
