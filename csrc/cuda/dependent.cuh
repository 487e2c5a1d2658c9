// Programmatic dependent launch, and clusters that share a token: launches that may start before
// the kernel ahead of them has ended. Compiles for every GPU; before sm_90 it does nothing.
//
// Rules, which every kernel launched with `programmatic` keeps:
//   1. every thread block waits (wait_for_previous_grid), also one that has nothing to do, before
//      it reads anything but weights and before it writes anything;
//   2. it lets the next grid start (allow_next_grid) only after that wait.
// msm's launches in turns (msm/params.h) are the exception: two grids beside the first one wait for
// it at their end. And a grid may read ahead of its wait what a grid before its predecessor wrote.
// csrc/act_quant/README.md says why that is enough for chains of any length.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace tessella::ptx {

// Returns when all grids this one depends on have finished and their writes are visible.
__device__ __forceinline__ void wait_for_previous_grid() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets a dependent grid start early. Only after wait_for_previous_grid: then everything older than
// this grid is complete when the dependent one runs.
__device__ __forceinline__ void allow_next_grid() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// All threads of the cluster arrive, then wait; what they wrote before is visible to all after.
__device__ __forceinline__ void cluster_publish() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_await() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// `value` into the same word of shared memory of the cluster's block `rank`.
__device__ __forceinline__ void peer_store(uint32_t* own, uint32_t rank, uint32_t value) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(own));
  asm volatile(
      "{\n"
      ".reg .u32 peer;\n"
      "mapa.shared::cluster.u32 peer, %0, %1;\n"
      "st.shared::cluster.u32 [peer], %2;\n"
      "}\n" ::"r"(address),
      "r"(rank), "r"(value)
      : "memory");
#endif
}

}  // namespace tessella::ptx

namespace tessella::cuda {

struct Launch {
  dim3 grid;
  unsigned threads;
  size_t smem = 0;
  unsigned cluster = 1;  // thread blocks along x of a cluster
  bool programmatic = false;
  cudaStream_t stream = nullptr;
};

// Launches kernel(arguments...); returns a cudaError_t.
template <class... Args>
int launch(const Launch& l, void (*kernel)(Args...), const Args&... arguments) {
  cudaLaunchAttribute attributes[2];
  unsigned n = 0;
  if (l.cluster > 1) {
    attributes[n].id = cudaLaunchAttributeClusterDimension;
    attributes[n++].val.clusterDim = {l.cluster, 1, 1};
  }
  if (l.programmatic) {
    attributes[n].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[n++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = l.grid;
  config.blockDim = dim3(l.threads);
  config.dynamicSmemBytes = l.smem;
  config.stream = l.stream;
  config.attrs = attributes;
  config.numAttrs = n;
  return int(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace tessella::cuda
