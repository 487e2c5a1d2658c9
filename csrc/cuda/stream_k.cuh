// Stream-K: the K blocks of some tiles in equal, contiguous shares, one for each thread block of a
// grid, whatever the number of tiles. Osama et al., "Stream-K: work-centric parallel decomposition
// for dense matrix-matrix multiplication on the GPU", PPoPP 2023.
//
// A share starts with the rest of a tile, at most one, whose sums are left in a slot of a scratch
// buffer, and ends with the start of a tile, at most one, to which the sums that others left are
// added in order of K. Whoever waits is waited for by nobody that it waits for: it waits for blocks
// with a smaller index, which were started before it, so it does not matter how many run at a time.
//
// A slot's flag is up when it equals `nonce`, a random number of the launch: the buffer need not be
// cleared. Who has seen a flag takes it down, for the next replay of a graph.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace tessella {

struct StreamK {
  int tiles, blocks;  // how many tiles, and the blocks of K of each
  int grid;           // thread blocks
  int share, longer;  // blocks of a thread block; the first `longer` ranks have one more
  uint64_t nonce;
  uint64_t* flags;  // [grid]
  uint4* slots;     // [grid][sums of a thread block]

  // Rank of a thread block: the last one has the first share.
  __device__ int rank() const { return grid - 1 - int(blockIdx.x); }
  // First of a rank's blocks, counted over all tiles.
  __device__ int begin(int rank) const { return rank * share + min(rank, longer); }
  __device__ int owner(int at) const {
    const int in_longer = longer * (share + 1);
    return at < in_longer ? at / (share + 1) : longer + (at - in_longer) / share;
  }

#ifdef __CUDACC__
  // By the first kThreads threads of a block: leaves its sums. `signal` follows, by another warp.
  template <int kThreads, class Sum, int kSums>
  __device__ void leave(const Sum (&sum)[kSums], int rank, int barrier) const {
    uint4* to = slots + int64_t{rank} * (kThreads * kSums / 4) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kSums / 4; ++i)
      __stcg(to + i * kThreads, make_uint4(bits(sum[4 * i]), bits(sum[4 * i + 1]),
                                           bits(sum[4 * i + 2]), bits(sum[4 * i + 3])));
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(kThreads + 32) : "memory");
  }
  // By the warp that does: waits for those who leave their sums, and raises the flag.
  template <int kThreads>
  __device__ void signal(int rank, int barrier) const {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads + 32) : "memory");
    if (threadIdx.x % 32 == 0)
      asm volatile("st.release.gpu.global.b64 [%0], %1;" ::"l"(flags + rank), "l"(nonce)
                   : "memory");
  }

  // By the first kThreads threads of a block, with the sums of the start of a tile: adds the rest.
  // A tile has at most kThreads parts.
  template <int kThreads, class Sum, int kSums>
  __device__ void add_rest(Sum (&sum)[kSums], int tile, int rank, int barrier) const {
    const int last = owner((tile + 1) * blocks - 1), other = rank + 1 + int(threadIdx.x);
    if (other <= last) {
      uint64_t flag;
      do {
        asm volatile("ld.acquire.gpu.global.b64 %0, [%1];"
                     : "=l"(flag)
                     : "l"(flags + other)
                     : "memory");
      } while (flag != nonce);
      flags[other] = 0;
    }
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
#pragma unroll 1
    for (int part = rank + 1; part <= last; ++part) {
      const uint4* from = slots + int64_t{part} * (kThreads * kSums / 4) + threadIdx.x;
#pragma unroll
      for (int i = 0; i < kSums / 4; ++i) {
        const uint4 v = __ldcg(from + i * kThreads);
        add(sum[4 * i], v.x);
        add(sum[4 * i + 1], v.y);
        add(sum[4 * i + 2], v.z);
        add(sum[4 * i + 3], v.w);
      }
    }
  }

 private:
  static __device__ uint32_t bits(int32_t x) { return uint32_t(x); }
  static __device__ uint32_t bits(float x) { return __float_as_uint(x); }
  static __device__ void add(int32_t& sum, uint32_t x) { sum += int32_t(x); }
  static __device__ void add(float& sum, uint32_t x) { sum += __uint_as_float(x); }
#endif
};

}  // namespace tessella
