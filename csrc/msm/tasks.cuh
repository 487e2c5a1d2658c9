// Tasks of a plan, or of a batch that is cut without one, as a GPU finds them; what their rows see.
#pragma once
#include "msm/params.h"

namespace tessella::msm::dev {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kGroup = 16;
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f, kInf = __builtin_inff();
constexpr float kSlack = 8.f;  // how far a score may exceed the row's reference, in base 2

// --- tasks

// First and one past the last task of a part; without a plan an upper bound.
struct TaskRange {
  int64_t first, last;
};
__device__ inline TaskRange task_range(const Batch& p, Part part) {
  if (p.plan.words != nullptr) {
    const Header& h = p.plan.header();
    const int64_t big = h.big, tasks = h.tasks;
    // one test of them all, so that no load waits for another
    if ((h.magic != kMagic) | (h.words > p.plan_words) | (h.B != p.B) | (h.T != p.T) |
        (h.H != p.H) | (h.J != p.J))
      __trap();  // not a plan for this batch: nothing sensible can be written
    return {part == Part::kSmall ? big : 0, part == Part::kBig ? big : tasks};
  }
  if (part != Part::kAll && (part == Part::kBig) != (p.uniform.tile >= kBigTile)) return {0, 0};
  const int64_t rows = p.T * (p.H / p.J), most = p.B < p.T ? p.B : p.T;
  return {0, (rows / p.uniform.tile + most) * p.uniform.parts};
}

__device__ inline Range keys_of(const Batch& p, int64_t b, int64_t row0, int64_t rows) {
  const int64_t G = p.H / p.J, kv = p.kv_len[b], hist = kv - (p.cu_q[b + 1] - p.cu_q[b]);
  const Mask mask = p.mask_of(b);
  Range range{0, kv};
  if (mask == Mask::kCausal || mask == Mask::kWindow) range.end = hist + (row0 + rows - 1) / G + 1;
  if (mask == Mask::kWindow) {
    const int64_t first = hist + row0 / G - p.window + 1;
    range.begin = first > 0 ? first / 16 * 16 : 0;
  }
  return range;
}

// Task i of the plan, or of the uniform cut; false past its end. All lanes of a warp call it.
__device__ inline bool find_task(const Batch& p, int64_t i, Task* task) {
  if (p.plan.words != nullptr) {
    *task = p.plan.tasks()[i];
    return true;
  }
  const int64_t G = p.H / p.J, tile = p.uniform.tile;
  const int64_t part = i % p.uniform.parts;
  int64_t left = i / p.uniform.parts;
  const int lane = threadIdx.x % 32;
  for (int64_t b0 = 0; b0 < p.B; b0 += 32) {
    const int64_t b = b0 + lane;
    const int rows = b < p.B ? int((p.cu_q[b + 1] - p.cu_q[b]) * G) : 0;
    const int tiles = int((rows + tile - 1) / tile);
    int before = tiles;  // inclusive sum over the lanes
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const int other = __shfl_up_sync(~0u, before, by);
      if (lane >= by) before += other;
    }
    const unsigned past = __ballot_sync(~0u, before > left);
    if (past == 0) {
      left -= __shfl_sync(~0u, before, 31);
      continue;
    }
    const int at = __ffs(past) - 1;
    const int in = int(left) - __shfl_sync(~0u, before - tiles, at);
    const int all = __shfl_sync(~0u, rows, at);
    const int row0 = in * int(tile), here = all - row0 < tile ? all - row0 : int(tile);
    const Range seen = keys_of(p, b0 + at, row0, here);
    int64_t begin = part * p.uniform.keys, end = begin + p.uniform.keys;
    if (end > seen.end || part == p.uniform.parts - 1) end = seen.end;
    if (begin < seen.begin) begin = seen.begin;
    const int64_t partial = part * p.T * G + p.cu_q[b0 + at] * G + row0;
    *task = {int32_t(b0 + at),
             int32_t(tile),
             row0,
             here,
             int32_t(begin),
             int32_t(end > begin ? end : begin),
             p.uniform.parts > 1 ? int32_t(partial) : -1,
             0};
    return true;
  }
  return false;
}

// The rows of a task in their batch.
struct Rows {
  __device__ Rows(const Batch& batch, const Task& t, int64_t head)
      : p(batch),
        request(t.request),
        row0(t.row0),
        G(int(unsigned(batch.H) / unsigned(batch.J))),  // 64-bit divisions take long
        kv_end(t.kv_end),
        j(head),
        mask(batch.mask_of(t.request)),
        first(batch.cu_q[t.request]),
        hist(batch.kv_len[t.request] - (batch.cu_q[t.request + 1] - first)) {}

  const Batch& p;
  int request, row0, G, kv_end;
  int64_t j;
  Mask mask;
  int first, hist;  // first token of the request; keys before its query tokens

  __device__ int token(int r) const { return (row0 + r) / G; }
  __device__ int64_t head(int r) const { return j * G + (row0 + r) % G; }
  __device__ int64_t place(int r) const { return int64_t{first + token(r)} * p.H + head(r); }

  // The keys [begin, end) that row r may see, a tree's tokens apart.
  __device__ int end(int r) const {
    if (mask != Mask::kCausal && mask != Mask::kWindow) return kv_end;
    const int pos = hist + token(r) + 1;
    return pos < kv_end ? pos : kv_end;
  }
  __device__ int begin(int r) const {
    const int64_t pos = hist + token(r) - p.window + 1;
    return mask == Mask::kWindow && pos > 0 ? int(pos) : 0;
  }
  // Keys before this one are seen by every row from r on.
  __device__ int all_end(int r) const {
    return mask == Mask::kTree && hist < kv_end ? hist : end(r);
  }
  __device__ bool sees(int r, int key) const {
    if (key >= end(r) || key < begin(r)) return false;
    if (mask != Mask::kTree || key < hist) return true;
    const int64_t row = p.tree_row[request] + token(r);
    const int node = key - hist;
    return p.tree_bits[row * p.tree_words + node / 64] >> (node % 64) & 1;
  }
};

// What the host works out for a launch.
struct Setup {
  Part part;
  Turn turn;
  int stage_bytes;       // of 16 keys and values in the ring
  uint32_t page_groups;  // 2^32 / (Z / 16), rounded up; 0 where a page is one group
  __device__ int page_of(int group) const {
    return page_groups == 0 ? group : int(__umulhi(unsigned(group), page_groups));
  }
};

}  // namespace tessella::msm::dev
