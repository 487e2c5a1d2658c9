// Launch of the Hopper body; compiled for sm_90a only.
#include <cuda_runtime.h>

#include "kv4/sm90.cuh"

#include "core/env.h"
#include "cuda/device.h"
#include "cuda/tensor_map.h"
#include "kv4/kernels.h"

namespace tessella::kv4 {

// Of an SM's 228 KB, and what the system keeps of each block.
constexpr int kSharedBytes = 228 << 10, kReservedBytes = 1 << 10;

// Queries and row numbers of 8 rows.
constexpr int room_of(int D) { return 32 * D + 608; }

// The pages of a stage and the ring's stages, for `blocks` blocks on an SM; false if they do not
// fit.
static bool lay_out(sm90::Args& a, int room, int blocks) {
  a.log_pages = 0;
  while (2 * a.Z << a.log_pages <= sm90::kStageKeys) ++a.log_pages;
  a.pitch = int(round_up(a.bytes, 1024));
  const int left = kSharedBytes / blocks - kReservedBytes - room;
  a.stage_bytes = a.pitch << a.log_pages;
  a.stage_keys = int(a.Z) << a.log_pages;
  a.stages = left / (a.stage_bytes + 16);
  return a.Z <= sm90::kStageKeys && a.bytes % 128 == 0 && a.bytes / 128 <= 256 &&
         a.stages > sm90::kLag;
}

template <class S>
static int launch(const Params& p, cudaStream_t stream) {
  using Room = msm::dev::Room<S>;
  constexpr int kRoom = room_of(S::kD);
  static_assert(kRoom == Room::kQ + Room::kNumbers + Room::kRows * Room::kRow && kRoom % 16 == 0,
                "as attend has it, and barriers follow");
  sm90::Args a(p);
  if (!lay_out(a, kRoom, S::kBlocks)) return int(cudaErrorInvalidValue);
  CUtensorMap map;
  // pages [P * J][bytes / 128][128]
  const int64_t rows = a.bytes / 128;
  const int made =
      cuda::tensor_map<3>(&map, p.pages, 1, {128, rows, p.P * p.J}, {128, int(rows), 1});
  if (made != 0) return made;
  const int64_t zg = p.Z / msm::dev::kGroup, whole = int64_t{1} << 32;
  a.page_groups = zg == 1 ? 0 : uint32_t((whole + zg - 1) / zg);
  const int bytes = a.stages * (a.stage_bytes + 16) + kRoom;
  const cudaError_t attribute =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(&sm90::attend<S>),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (attribute != cudaSuccess) return int(attribute);
  const unsigned blocks = msm::dev::blocks_of(p, cuda::this_device().sms * S::kBlocks * 4);
  const cuda::Launch l{dim3(blocks), sm90::kThreads, size_t(bytes), 1, env().programmatic, stream};
  return blocks > 0 ? cuda::launch(l, &sm90::attend<S>, map, a) : 0;
}

bool sm90_takes(const Params& p) {
  const bool head = p.D == 64 || p.D == 128 || p.D == 256;
  const bool codes = p.page.k_bits == p.page.v_bits && p.page.k_bits >= 4 && p.page.groups() == 1 &&
                     !p.page.channel;
  if (!head || !codes || cuda::this_device().arch != 90) return false;
  sm90::Args a(p);
  // the copy engine counts pages in 32 bits
  return lay_out(a, room_of(int(p.D)), p.D > 128 ? 2 : 4) && p.P > 0 &&
         p.P * p.J < int64_t{1} << 31 && p.T * p.H < int64_t{1} << 31 &&
         reinterpret_cast<uintptr_t>(p.pages) % 16 == 0;
}

int run_sm90(const Params& p, void* stream) {
  auto* const s = static_cast<cudaStream_t>(stream);
#define X(kBits, kHead) \
  if (p.page.k_bits == kBits && p.D == kHead) return launch<sm90::Few<kBits, kHead>>(p, s);
  TSL_KV4_SM90_SHAPES(X)
#undef X
  return int(cudaErrorInvalidValue);
}

}  // namespace tessella::kv4
