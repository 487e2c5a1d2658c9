// The end of a tile whose K is split over the blocks of a cluster: every block becomes the owner of
// some 8-token columns, and gets the others' sums for them through shared memory.
#pragma once
#include "cuda/async.cuh"
#include "w4ax_gemm/sm90_work.cuh"

namespace tessella::w4ax_gemm::sm90 {

// By one math thread. Peers' shared memory is live: all blocks meet before they use it and again
// before they leave. How many parts there are is known here, so that sums stay in registers.
template <class T, class Total, int kSplit>
struct Parts {
  static constexpr int kOwners = T::kTile.owners(kSplit), kOwned = T::kColumns / kOwners;
  static constexpr int kColumnBytes = T::kMath * 16;  // of all threads
  // Pushes from registers take longer than one copy from about 16 KB on, so large tiles gather the
  // sums in the ring, which is done with; the second half while the first is on its way.
  static constexpr bool kGather = T::kTile.large();
  static constexpr int kPieces = kGather && kOwned >= 4 ? 2 : 1, kPiece = kOwned / kPieces;

  const Shared<T>& s;
  const int part;
  Total own[kOwned][4];

  // Where this thread's sums for column `j` of its block's come from a part.
  __device__ uint32_t slot(int from, int j) const {
    return s.reduce + (from * kOwned + j) * kColumnBytes + threadIdx.x * 16;
  }
  __device__ bool owns() const { return part < kOwners; }

  // Keeps the sums of this block's own columns and gives the owners theirs.
  __device__ void give(const Total (&total)[T::kAcc]) {
    if (kGather) ptx::named_barrier(3, T::kMath);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
      for (int owner = 0; owner < kOwners; ++owner)
#pragma unroll
        for (int i = 0; i < kPiece; ++i) {
          const int j = piece * kPiece + i, at = (owner * kOwned + j) * 4;
          const uint32_t sums[4] = {bits(total[at]), bits(total[at + 1]), bits(total[at + 2]),
                                    bits(total[at + 3])};
          if (owner == part) {
#pragma unroll
            for (int e = 0; e < 4; ++e) own[j][e] = total[at + e];
          } else if (kGather) {
            ptx::store_shared16(s.acts + (owner * kOwned + j) * kColumnBytes + threadIdx.x * 16,
                                sums);
          } else {
            ptx::peer_push(ptx::peer_address(slot(part, j), owner), sums,
                           ptx::peer_address(s.reduced, owner));
          }
        }
      if (!kGather) continue;
      ptx::fence_for_copies();
      ptx::named_barrier(3, T::kMath);
      const int owner = threadIdx.x / 32, j = piece * kPiece;
      if (threadIdx.x % 32 == 0 && owner != part && owner < kOwners)
        ptx::peer_copy(ptx::peer_address(slot(part, j), owner) - threadIdx.x * 16,
                       s.acts + (owner * kOwned + j) * kColumnBytes, kPiece * kColumnBytes,
                       ptx::peer_address(s.reduced, owner));
    }
  }

  // All parts' sums, in order of the parts.
  __device__ void take(Total (&sum)[kOwned][4]) const {
    ptx::barrier_wait(s.reduced, 0);
#pragma unroll
    for (int j = 0; j < kOwned; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[j][e] = 0;
#pragma unroll
    for (int from = 0; from < kSplit; ++from)
#pragma unroll
      for (int j = 0; j < kOwned; ++j) {
        if (from == part) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[j][e] += own[j][e];
        } else {
          const uint4 v = ptx::load_shared16(slot(from, j));
          sum[j][0] += from_bits(v.x), sum[j][1] += from_bits(v.y);
          sum[j][2] += from_bits(v.z), sum[j][3] += from_bits(v.w);
        }
      }
  }

 private:
  __device__ static uint32_t bits(int32_t x) { return uint32_t(x); }
  __device__ static uint32_t bits(float x) { return __float_as_uint(x); }
  __device__ static Total from_bits(uint32_t x) {
    if constexpr (std::is_same_v<Total, float>) return __uint_as_float(x);
    return Total(x);
  }
};

}  // namespace tessella::w4ax_gemm::sm90
