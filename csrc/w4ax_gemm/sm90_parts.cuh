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
  static constexpr int kOwners = T::kTile.owners(kSplit), kOwned = T::kTile.owned(kSplit);
  static constexpr int kColumnBytes = T::kTile.column_bytes();
  static constexpr int kLast = T::kColumns - (kOwners - 1) * kOwned;  // columns of the last owner
  // Pushes from registers take longer than one copy from about 16 KB on, so large tiles gather the
  // sums in the ring, which is done with; the second half while the first is on its way.
  static constexpr bool kGather = T::kTile.large();
  static constexpr int kPieces = kGather && kOwned >= 4 ? 2 : 1, kPiece = kOwned / kPieces;
  static_assert(kOwned % kPieces == 0);

  const Shared<T>& s;
  const int part;
  Total own[kOwned][4];

  // Where this thread's sums for an owner's column `j` come from another part, or leave for it.
  static __device__ uint32_t slot(uint32_t base, int other, int mine, int j) {
    if constexpr (kSplit == 2 && T::kTile.dense(2))
      other = 0;
    else if constexpr (T::kTile.dense(kSplit))
      other -= other > mine;
    return base + (other * kOwned + j) * kColumnBytes + threadIdx.x * 16;
  }
  __device__ bool owns() const { return part < kOwners; }
  __device__ static int columns_of(int owner) { return owner == kOwners - 1 ? kLast : kOwned; }

  // Keeps the sums of this block's own columns and gives the owners theirs.
  __device__ void give(const Total (&total)[T::kAcc]) {
    if (kGather) ptx::named_barrier(T::kMathBarrier, T::kMath);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
      for (int owner = 0; owner < kOwners; ++owner)
#pragma unroll
        for (int i = 0; i < kPiece; ++i) {
          const int j = piece * kPiece + i, at = (owner * kOwned + j) * 4;
          if (at >= T::kAcc) continue;
          const uint32_t sums[4] = {bits(total[at]), bits(total[at + 1]), bits(total[at + 2]),
                                    bits(total[at + 3])};
          if (owner == part) {
#pragma unroll
            for (int e = 0; e < 4; ++e) own[j][e] = total[at + e];
          } else if (kGather) {
            ptx::store_shared16(slot(s.acts, owner, part, j), sums);
          } else {
            ptx::peer_push(ptx::peer_address(slot(s.reduce, part, owner, j), owner), sums,
                           ptx::peer_address(s.reduced, owner));
          }
        }
      if (!kGather) continue;
      ptx::fence_for_copies();
      ptx::named_barrier(T::kMathBarrier, T::kMath);
      const int owner = threadIdx.x / 32, j = piece * kPiece, mine = threadIdx.x * 16;
      const int columns = min(kPiece, columns_of(owner) - j);
      if (threadIdx.x % 32 == 0 && owner != part && owner < kOwners && columns > 0)
        ptx::peer_copy(ptx::peer_address(slot(s.reduce, part, owner, j) - mine, owner),
                       slot(s.acts, owner, part, j) - mine, columns * kColumnBytes,
                       ptx::peer_address(s.reduced, owner));
    }
  }

  // All parts' sums, in order of the parts; of the last owner's missing columns, anything.
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
          const uint4 v = ptx::load_shared16(slot(s.reduce, from, part, j));
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
