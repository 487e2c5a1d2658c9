// Launch of the Hopper bodies; compiled for sm_90a only.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <random>

#include "w4ax_gemm/sm90.cuh"

#include "cuda/tensor_map.h"
#include "w4ax_gemm/kernels.h"
#include "w4ax_gemm/params.h"

namespace tessella::w4ax_gemm {

using Kernel = void(const CUtensorMap, const CUtensorMap, const CUtensorMap, const sm90::Args);

template <int kTokens, int kFeatures, bool kStream>
static Kernel* kernel_of(Scheme scheme) {
  using sm90::Tile;
  if (scheme == Scheme::kChannel)
    return &sm90::gemm<Tile<Scheme::kChannel, kTokens, kFeatures, kStream>>;
  if (scheme == Scheme::kTwoLevel)
    return &sm90::gemm<Tile<Scheme::kTwoLevel, kTokens, kFeatures, kStream>>;
  if constexpr (Sm90Tile(kTokens, kFeatures, Scheme::kGroup).has_body())
    return &sm90::gemm<Tile<Scheme::kGroup, kTokens, kFeatures, kStream>>;
  return nullptr;
}

static Kernel* kernel_of(Scheme scheme, const Sm90Plan& plan) {
  if (plan.wide) {
#define X(name, kTokens, kFeatures)              \
  if (plan.size == Sm90Size{kTokens, kFeatures}) \
    return &sm90::gemm<sm90::Tile<Scheme::kTwoLevel, kTokens, kFeatures, false, true>>;
    TSL_W4AX_GEMM_SM90_WIDE(X)
#undef X
    return nullptr;
  }
#define X(name, kTokens, kFeatures)                                  \
  if (plan.size == Sm90Size{kTokens, kFeatures} && plan.stream == 0) \
    return kernel_of<kTokens, kFeatures, false>(scheme);
  TSL_W4AX_GEMM_SM90_TILES(X)
#undef X
#define X(name, kTokens, kFeatures)                                 \
  if (plan.size == Sm90Size{kTokens, kFeatures} && plan.stream > 0) \
    return kernel_of<kTokens, kFeatures, true>(scheme);
  TSL_W4AX_GEMM_SM90_STREAMS(X)
#undef X
  return nullptr;
}

// A number that no memory holds by chance.
static uint64_t new_nonce() {
  static std::atomic<uint64_t> state{std::random_device{}() * 0x100000001ull ^
                                     std::random_device{}()};
  uint64_t x = state.fetch_add(0x9e3779b97f4a7c15u);  // splitmix64
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

static sm90::Args arguments(const Params& p, const Sm90Plan& plan, bool programmatic,
                            void* scratch) {
  const Sm90Tile tile{plan.size, p.panel.scheme, plan.wide};
  sm90::Args a{};
  a.w = p.w;
  a.sums = p.sums;
  a.scales = p.scales;
  a.bias = p.bias;
  a.out = p.out;
  a.panel_bytes = p.panel.blocks() * tile.block_bytes() + p.panel.tail_bytes();
  a.M = p.M;
  a.N = int(p.panel.N);
  a.blocks = int(p.panel.blocks());
  a.panels = int(p.panel.panels());
  a.token_tiles = int(ceil_div(p.M, tile.tokens));
  a.feature_tiles = int(ceil_div(p.panel.N, tile.features));
  a.per_group = Divisor(uint32_t(8 * a.feature_tiles));
  a.last_rows = Divisor(uint32_t(std::max(1, a.token_tiles % 8)));
  a.tiles = plan.tiles;
  a.whole = plan.whole;
  a.stages = plan.stages;
  a.split = plan.split;
  a.owned = tile.owned(plan.split);
  a.share = a.blocks / plan.split;
  a.longer = a.blocks % plan.split;
  a.ring = tile.fixed_bytes();
  if (plan.stream > 0) {
    const int streamed = plan.stream * a.blocks;
    auto* slots = static_cast<uint8_t*>(scratch);
    auto* flags = reinterpret_cast<uint64_t*>(slots + int64_t{plan.grid} * tile.part_bytes());
    a.stream = {plan.stream,          a.blocks,    plan.grid, streamed / plan.grid,
                streamed % plan.grid, new_nonce(), flags,     reinterpret_cast<uint4*>(slots)};
  }
  a.programmatic = programmatic;
  a.dtype = p.dtype;
  a.vector = p.panel.N % 8 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  return a;
}

int run_sm90(const Params& p, const Sm90Plan& plan, bool programmatic, void* scratch,
             void* stream) {
  Kernel* kernel = kernel_of(p.panel.scheme, plan);
  const Sm90Tile tile{plan.size, p.panel.scheme, plan.wide};
  const sm90::Args args = arguments(p, plan, programmatic, scratch);
  // codes8 [K/128][M][128], a box of one load's codes of the tile's tokens; the result [M][N]
  CUtensorMap acts, half{}, out{};
  const int64_t sizes[] = {128, p.M, p.panel.blocks()};
  int error = cuda::tensor_map(&acts, p.x8, 1, sizes, {128, tile.tokens, tile.chunk()});
  if (error == 0 && plan.whole < plan.tiles)
    error = cuda::tensor_map(&half, p.x8, 1, sizes, {128, tile.tokens / 2, 1});
  if (error == 0 && args.vector && tile.sends(plan.split))
    error = cuda::tensor_map(&out, p.out, 2, {p.panel.N, p.M}, {64, tile.staged_tokens()});
  if (error != 0) return error;
  const cudaError_t attribute =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, plan.smem);
  if (attribute != cudaSuccess) return int(attribute);
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {unsigned(plan.split), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(plan.grid));
  config.blockDim = dim3(unsigned(tile.threads()));
  config.dynamicSmemBytes = size_t(plan.smem);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = programmatic ? 2 : 1;
  return int(cudaLaunchKernelEx(&config, kernel, acts, half, out, args));
}

}  // namespace tessella::w4ax_gemm
