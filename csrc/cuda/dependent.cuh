// Programmatic dependent launch, and clusters that share a token: launches that may start before
// the kernel ahead of them has ended. Compiles for every GPU; before sm_90 it does nothing.
//
// Rules, which every kernel launched with `programmatic` keeps:
//   1. every thread block waits (wait_for_previous_grid), also one that has nothing to do, before
//      it reads anything but weights and before it writes anything;
//   2. it lets the next grid start (allow_next_grid) only after that wait.
// Ahead of the wait operands may be brought to L2 (fetch_to_l2), where writes land as well.
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

// --- a cluster's blocks send each other words, each kind of them once

// Completes when `bytes` have been sent to it. By one thread, before mailboxes_open.
__device__ __forceinline__ void mailbox_expect(uint64_t* mailbox, uint32_t bytes) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(mailbox));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
               : "memory");
#endif
}
// By all threads of the cluster, and then the other; after it they may send and read.
__device__ __forceinline__ void mailboxes_open() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
__device__ __forceinline__ void mailboxes_await() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// `value` into the same word of shared memory of the cluster's block `rank`, and 4 bytes to the
// account of its mailbox. A barrier of the cluster would do too, but its release waits for all
// that was stored to memory.
__device__ __forceinline__ void peer_send(uint32_t* own, uint32_t rank, uint32_t value,
                                          uint64_t* mailbox) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(own));
  const uint32_t account = static_cast<uint32_t>(__cvta_generic_to_shared(mailbox));
  asm volatile(
      "{\n"
      ".reg .u32 word, box;\n"
      "mapa.shared::cluster.u32 word, %0, %2;\n"
      "mapa.shared::cluster.u32 box, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [word], %3, [box];\n"
      "}\n" ::"r"(address),
      "r"(account), "r"(rank), "r"(value)
      : "memory");
#endif
}
// Until all that was announced to this block has come.
__device__ __forceinline__ void mailbox_await(uint64_t* mailbox) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(mailbox));
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(at)
      : "memory");
#endif
}

// Has `bytes` (a multiple of 16, as the address is) brought to L2. Reads nothing.
__device__ __forceinline__ void fetch_to_l2(const void* from, uint32_t bytes) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
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
