// Feeding the math warpgroups of sm90.cuh: tasks, queries, keys and values into shared memory.
#pragma once
#include "cuda/async.cuh"
#include "cuda/float.cuh"
#include "cuda/fragment.cuh"
#include "msm/sm80.cuh"

namespace tessella::msm::sm90 {

using dev::kLog2e;

struct Args : Batch {
  int box;  // keys of a copy: divides Z and the block of keys
};

constexpr int kTile = 128, kThreads = 384;
// softcap tanh(y), of 2 log2(e) y.
__device__ __forceinline__ float capped(float y, float softcap) {
  return softcap *
         (1.f - __fdividef(2.f, 1.f + ptx::exp2_fast(y)));  // tanh = 1 - 2 / (1 + exp(2 y))
}

template <DType kT, int kDim>
struct Tile {
  static constexpr DType kType = kT;
  static constexpr int kD = kDim, kKeys = kDim > 128 ? 64 : 128;
  static constexpr int kRow = kDim % 64 == 0   ? 128
                              : kDim % 32 == 0 ? 64
                                               : 32;  // bytes of an atom's
  static constexpr int kChunk = kRow / 2, kPieces = kRow / 16;
  static constexpr int kStages = kDim > 96 ? 2 : kDim > 64 ? 3 : 4;
  static constexpr int kQueries = kDim > 128 ? 1 : 2;
  static constexpr int kGroup = 16 * kDim;  // bytes of 8 rows
  static constexpr int kQueryBytes = kTile * kDim * 2, kBlockBytes = kKeys * kDim * 2;
  static constexpr int kSums = kDim / 2, kScores = kKeys / 2;  // registers a thread
  // From an operand's start to its k-th 16 channels, in units of 16 bytes.
  __device__ static constexpr int step(int k) {
    return (k / (kChunk / 16) * 8 * kRow + k % (kChunk / 16) * 32) / 16;
  }
  // Where the 16-byte piece `i` of a row lies, in bytes.
  __device__ static constexpr int piece(int row, int i) {
    return row / 8 * kGroup + i / kPieces * 8 * kRow + row % 8 * kRow +
           (i % kPieces ^ (row % 8 * kRow / 128 & (kPieces - 1))) * 16;
  }
};

// A task of one kv head, as the scheduling warp leaves it for the others.
struct Work {
  int token0, row0, rows, head;  // of the request's first token, of the tile
  int hist, lo, hi, blocks;      // keys before the first query; keys that any row may see
  int inner_lo, inner_hi;        // keys that all rows see
  int key0;                      // of block 0
  int mask, request, partial, tree, unused;
};
static_assert(sizeof(Work) == 64, "four vectors");

template <class T>
struct Shared {
  uint32_t queries, keys, values, work, barriers;
  __device__ explicit Shared(uint32_t base)
      : queries(base),
        keys(queries + T::kQueries * T::kQueryBytes),
        values(keys + T::kStages * T::kBlockBytes),
        work(values + T::kStages * T::kBlockBytes),
        barriers(work + 2 * sizeof(Work)) {}
  static constexpr int bytes() {
    return T::kQueries * T::kQueryBytes + 2 * T::kStages * T::kBlockBytes + 2 * int(sizeof(Work)) +
           8 * (4 + 2 * T::kQueries + 4 * T::kStages);
  }
  __device__ uint32_t work_full(int i) const { return barriers + i * 8; }
  __device__ uint32_t work_empty(int i) const { return barriers + 16 + i * 8; }
  __device__ uint32_t query_full(int i) const { return barriers + 32 + i * 8; }
  __device__ uint32_t query_empty(int i) const { return query_full(T::kQueries + i); }
  __device__ uint32_t key_full(int i) const { return query_full(2 * T::kQueries + i); }
  __device__ uint32_t key_empty(int i) const { return key_full(T::kStages + i); }
  __device__ uint32_t value_full(int i) const { return key_full(2 * T::kStages + i); }
  __device__ uint32_t value_empty(int i) const { return key_full(3 * T::kStages + i); }
};

// By one warp.
template <class T>
__device__ void init_barriers(const Shared<T>& s) {
  const int lane = threadIdx.x % 32;
  if (lane < 2) {
    ptx::barrier_init(s.work_full(lane), 1);
    ptx::barrier_init(s.work_empty(lane), 10);  // warps that read it
  }
  if (lane < T::kQueries) {
    ptx::barrier_init(s.query_full(lane), 1);
    ptx::barrier_init(s.query_empty(lane), 8);
  }
  if (lane < T::kStages) {
    ptx::barrier_init(s.key_full(lane), 1);
    ptx::barrier_init(s.key_empty(lane), 8);
    ptx::barrier_init(s.value_full(lane), 1);
    ptx::barrier_init(s.value_empty(lane), 8);
  }
  ptx::barrier_init_fence();
}

template <int kStages>
struct Ring {
  int stage = 0, parity = 0;
  __device__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// The next task for every role; false at the end.
template <class T>
__device__ Work load_work(const Shared<T>& s, int stage) {
  Work w;
  uint4* const to = reinterpret_cast<uint4*>(&w);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = ptx::load_shared16(s.work + stage * 64 + i * 16);
  return w;
}
template <class T>
__device__ bool read_work(const Shared<T>& s, const Ring<2>& ring, Work& w) {
  ptx::barrier_wait(s.work_full(ring.stage), ring.parity);
  w = load_work(s, ring.stage);
  return w.blocks >= 0;
}

// --- the scheduling warp

// Keys [lo, hi) that row `row` of a request may see, beside its tree.
struct Keys {
  int lo, hi;
};
__device__ __forceinline__ Keys keys_of_token(const Batch& a, int mask, int hist, int token,
                                              int begin, int end) {
  if (mask == int(Mask::kCausal) || mask == int(Mask::kWindow)) end = min(end, hist + token + 1);
  if (mask == int(Mask::kWindow)) begin = max(begin, hist + token + 1 - int(a.window));
  return {begin, end};
}

// Task t for kv head `head`.
template <class T>
__device__ Work make_work(const Args& a, const Task& t, int head) {
  const int G = int(a.H / a.J);
  Work w;
  w.head = head;
  w.request = t.request;
  w.token0 = a.cu_q[t.request];
  w.row0 = t.row0;
  w.rows = t.rows;
  w.partial = t.partial;
  w.mask = a.mask ? a.mask[t.request] : int(Mask::kCausal);
  w.tree = w.mask == int(Mask::kTree) ? a.tree_row[t.request] : 0;
  const int kv_len = a.kv_len[t.request];
  w.hist = kv_len - (a.cu_q[t.request + 1] - w.token0);
  const int end = min(t.kv_end, kv_len);
  const Keys first = keys_of_token(a, w.mask, w.hist, t.row0 / G, t.kv_begin, end);
  const Keys last = keys_of_token(a, w.mask, w.hist, (t.row0 + t.rows - 1) / G, t.kv_begin, end);
  w.lo = first.lo;
  w.hi = max(last.hi, w.lo);
  w.inner_lo = last.lo;
  w.inner_hi = w.mask == int(Mask::kTree) ? min(first.hi, w.hist) : first.hi;
  w.key0 = w.lo / a.box * a.box;
  w.blocks = w.hi > w.lo ? (w.hi - w.key0 + T::kKeys - 1) / T::kKeys : 0;
  w.unused = 0;
  return w;
}

// A task's queries, 128 packed rows, zeros where there are fewer. Lane i knows where rows i, i +
// 32,
// .. are; a row's pieces are copied by neighbouring lanes.
template <class T>
__device__ void gather_queries(const Args& a, const Work& w, uint32_t to) {
  constexpr int kVectors = T::kD / 8;
  const int lane = threadIdx.x % 32, G = int(a.H / a.J);
  const auto* const q = static_cast<const uint16_t*>(a.q);
#pragma unroll 1
  for (int first = 0; first < kTile; first += 32) {
    const int packed = w.row0 + first + lane;
    int64_t at = -1;
    if (first + lane < w.rows)
      at = (w.token0 + packed / G) * a.q_token + (w.head * G + packed % G) * a.q_head;
#pragma unroll 4
    for (int i = lane; i < 32 * kVectors; i += 32) {
      const int row = i / kVectors, vector = i % kVectors;
      const int64_t from = __shfl_sync(~0u, at, row);
      ptx::copy16(to + T::piece(first + row, vector), q + (from < 0 ? 0 : from + vector * 8),
                  from >= 0);
    }
  }
  ptx::copies_commit();
  ptx::copies_wait<0>();
  ptx::fence_for_copies();
  __syncwarp();
}

// The i-th task of all heads, in sections of heads: what runs at a time should share keys in L2,
// yet each section fill the GPU more than once.
__device__ __forceinline__ void find_item(const Args& a, int i, int tasks, int* task, int* head) {
  const int J = int(a.J), section = min(J, (2 * int(gridDim.x) + tasks - 1) / max(tasks, 1));
  const int in = i / (tasks * section) * section, heads = min(section, J - in);
  const int rest = i - in * tasks;
  *task = rest / heads;
  *head = in + rest % heads;
}

// The next item of this block: the first is its own, then whichever nobody took. False at the end.
template <class T>
__device__ bool take_work(const Args& a, int tasks, int& i, Work& w) {
  const int total = tasks * int(a.J);
  while (i < total) {
    int task, head;
    find_item(a, i, tasks, &task, &head);
    Task t;
    if (dev::find_task(a, task, &t)) {
      w = make_work<T>(a, t, head);
      return true;
    }
    int taken = 0;
    if (threadIdx.x % 32 == 0) taken = atomicAdd(a.counter, 1);
    i = int(gridDim.x) + __shfl_sync(~0u, taken, 0);
  }
  w.blocks = -1;
  return false;
}

template <class T>
__device__ void schedule(const Args& a, const Shared<T>& s) {
  const int lane = threadIdx.x % 32, tasks = int(dev::task_range(a, Part::kBig).last);
  Ring<2> ring;
  Ring<T::kQueries> queries;
  int i = blockIdx.x;
#pragma unroll 1
  for (;;) {
    Work w{};
    const bool more = take_work<T>(a, tasks, i, w);
    ptx::barrier_wait(s.work_empty(ring.stage), ring.parity ^ 1);
    if (lane < 4) {
      const uint4* const from = reinterpret_cast<const uint4*>(&w);
      const uint4 v = lane == 0 ? from[0] : lane == 1 ? from[1] : lane == 2 ? from[2] : from[3];
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
      ptx::store_shared16(s.work + ring.stage * 64 + lane * 16, words);
    }
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(s.work_full(ring.stage));
    if (!more) return;
    int taken = 0;
    if (lane == 0) taken = atomicAdd(a.counter, 1);
    ring.next();
    ptx::barrier_wait(s.query_empty(queries.stage), queries.parity ^ 1);
    gather_queries<T>(a, w, s.queries + queries.stage * T::kQueryBytes);
    if (lane == 0) ptx::barrier_arrive(s.query_full(queries.stage));
    queries.next();
    i = int(gridDim.x) + __shfl_sync(~0u, taken, 0);
  }
}

// --- the warps that bring keys and values

// kPart: 0 keys, 1 values.
template <class T, int kPart>
__device__ void load_pages(const Args& a, const Shared<T>& s, const CUtensorMap* map) {
  const int lane = threadIdx.x % 32, boxes = T::kKeys / a.box, Z = int(a.Z);
  const int box_bytes = a.box * T::kD * 2;
  Ring<2> tasks;
  Ring<T::kStages> ring;
  Work w;
#pragma unroll 1
  for (; read_work(s, tasks, w); tasks.next()) {
    const int32_t* const table = a.block_table + w.request * a.table_stride;
    int key = w.key0 + (w.blocks - 1) * T::kKeys + lane * a.box;
    int page = lane < boxes && key < w.hi ? table[key / Z] : 0;
#pragma unroll 1
    for (int n = w.blocks - 1; n >= 0; --n, key -= T::kKeys, ring.next()) {
      if (a.debug && (page < 0 || page >= a.P)) __trap();
      const int left = w.hi - w.key0 - n * T::kKeys, count = min(boxes, (left + a.box - 1) / a.box);
      const int group = (((page * int(a.J) + w.head) * 2 + kPart) * Z + key % Z) / 8;
      const uint32_t full = kPart ? s.value_full(ring.stage) : s.key_full(ring.stage);
      const uint32_t to = (kPart ? s.values : s.keys) + ring.stage * T::kBlockBytes;
      if (n > 0 && lane < boxes) page = table[(key - T::kKeys) / Z];
      ptx::barrier_wait(kPart ? s.value_empty(ring.stage) : s.key_empty(ring.stage),
                        ring.parity ^ 1);
      if (lane == 0) ptx::barrier_arrive_expect(full, count * box_bytes);
      __syncwarp();
      if (lane < count) ptx::copy_box(to + lane * box_bytes, map, 0, 0, 0, group, full);
    }
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(s.work_empty(tasks.stage));
  }
}

// --- the end of a row

// What a row's weighted values are to be multiplied with, and its log-sum-exp to base e.
struct Total {
  float by, lse;
};
// Of the highest score, to base 2, and the sum of all exponentials against it.
__device__ __forceinline__ Total add_sink(const Args& a, const Work& w, int head, float top,
                                          float sum) {
  float share = 1.f;
  if (a.sinks && w.partial < 0 && a.sinks[head] != -INFINITY) {
    const float sink = a.sinks[head] * kLog2e, higher = fmaxf(top, sink);
    share = exp2f(top - higher);  // what the sums count beside the sink
    sum = sum * share + exp2f(sink - higher);
    top = higher;
  }
  return {sum == 0.f ? 0.f : share / sum, sum == 0.f ? -INFINITY : (top + log2f(sum)) / kLog2e};
}

}  // namespace tessella::msm::sm90
