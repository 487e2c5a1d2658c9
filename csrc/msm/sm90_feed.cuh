// The feeding warpgroup of the Hopper bodies (sm90.cuh): what a tile and a task are, the warp that
// takes tasks and gathers queries, its helper, and the warps that bring keys and values.
#pragma once
#include "cuda/async.cuh"
#include "msm/tasks.cuh"

namespace tessella::msm::sm90 {

// Quotients of n by d for n d < 2^32.
struct Divider {
  int d;
  uint32_t by;
  static Divider make(int64_t d) {
    const uint64_t whole = uint64_t{1} << 32;
    return {int(d), d > 1 ? uint32_t((whole + uint64_t(d) - 1) / uint64_t(d)) : 0};
  }
  __device__ __forceinline__ int of(int n) const { return d > 1 ? int(__umulhi(n, by)) : n; }
  __device__ __forceinline__ int rest(int n) const { return n - of(n) * d; }
};

struct Args : Batch {
  int box;    // keys of a copy, a power of two: divides Z and the block of keys
  int first;  // items that thread blocks begin with; the counter hands out the others
  Turn turn;
  Divider group, page;  // H / J and Z
};

// kMath: warpgroups that multiply.
template <DType kT, int kDim, int kMath>
struct Tile {
  static constexpr DType kType = kT;
  static constexpr int kD = kDim, kGroups = kMath, kTile = 64 * kMath;
  static constexpr int kThreads = 128 * (1 + kMath);
  static constexpr int kBlocks = kMath == 1 && kDim <= 128 ? 2 : 1;  // of a multiprocessor
  static constexpr int kKeys = kMath == 1 || kDim > 128 ? 64 : 128;
  // bytes of an atom's rows
  static constexpr int kRow = kDim % 64 == 0 ? 128 : kDim % 32 == 0 ? 64 : 32;
  static constexpr int kChunk = kRow / 2, kPieces = kRow / 16;
  static constexpr int kStages = kMath == 1 ? (kDim > 96   ? 3
                                               : kDim > 80 ? 4
                                               : kDim > 64 ? 5
                                                           : 6)
                                            : (kDim > 96   ? 2
                                               : kDim > 64 ? 3
                                                           : 4);
  static constexpr int kQueries = kMath == 1 || kDim > 128 ? 1 : 2;
  static constexpr bool kTrade = kMath == 2 || kBlocks == 2;  // registers are not enough for all
  static constexpr int kFeedRegisters = kMath == 1 ? 56 : 40;
  static constexpr int kMathRegisters = kMath == 1 ? 200 : 232;
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
    ptx::barrier_init(s.work_empty(lane), 32 * (3 + 4 * T::kGroups));  // lanes that read it
  }
  if (lane < T::kQueries) {
    ptx::barrier_init(s.query_full(lane), 2);
    ptx::barrier_init(s.query_empty(lane), 4 * T::kGroups);
  }
  if (lane < T::kStages) {
    ptx::barrier_init(s.key_full(lane), 1);
    ptx::barrier_init(s.key_empty(lane), 4 * T::kGroups);
    ptx::barrier_init(s.value_full(lane), 1);
    ptx::barrier_init(s.value_empty(lane), 4 * T::kGroups);
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
  const Keys first = keys_of_token(a, w.mask, w.hist, a.group.of(t.row0), t.kv_begin, end);
  const Keys last =
      keys_of_token(a, w.mask, w.hist, a.group.of(t.row0 + t.rows - 1), t.kv_begin, end);
  w.lo = first.lo;
  w.hi = max(last.hi, w.lo);
  w.inner_lo = last.lo;
  w.inner_hi = w.mask == int(Mask::kTree) ? min(first.hi, w.hist) : first.hi;
  w.key0 = w.lo & -a.box;
  w.blocks = w.hi > w.lo ? (w.hi - w.key0 + T::kKeys - 1) / T::kKeys : 0;
  w.unused = 0;
  return w;
}

// Brings what a first task is looked up in, as far as 1024 requests, into L2 at once: else each
// would be waited for in turn.
__device__ inline void prefetch_lookups(const Args& a) {
  const int line = threadIdx.x % 32 * 32;
  const auto bring = [line](const int32_t* from, int64_t count) {
    if (from != nullptr && line < count) ptx::prefetch(from + line);
  };
  bring(a.plan.words, a.plan_words);
  bring(a.cu_q, a.B + 1);
  bring(a.kv_len, a.B);
  bring(a.mask, a.B);
  bring(a.mask ? a.tree_row : nullptr, a.B);
}

// Half of a task's queries into a buffer: the first or the last 16 of every 32 packed rows. Lane i
// knows where the i-th of them is; a row's pieces are copied by neighbouring lanes. What is left of
// 16 rows is zeros, further rows of the tile are nobody's and whatever was there.
template <class T>
__device__ void gather_queries(const Args& a, const Shared<T>& s, const Work& w,
                               const Ring<T::kQueries>& queries, int half) {
  constexpr int kVectors = T::kD / 8;
  const int lane = threadIdx.x % 32;
  const uint32_t to = s.queries + queries.stage * T::kQueryBytes;
  const auto* const q = static_cast<const uint16_t*>(a.q);
  ptx::barrier_wait(s.query_empty(queries.stage), queries.parity ^ 1);
#pragma unroll 1
  for (int first = 16 * half; first < w.rows; first += 32) {
    int64_t at = -1;
    if (lane < 16 && first + lane < w.rows) {
      const int packed = w.row0 + first + lane, token = a.group.of(packed);
      at = (w.token0 + token) * a.q_token +
           (w.head * a.group.d + packed - token * a.group.d) * a.q_head;
      if (w.mask == int(Mask::kTree))
        ptx::prefetch(a.tree_bits + (int64_t{w.tree} + token) * a.tree_words);
    }
#pragma unroll 4
    for (int i = lane; i < 16 * kVectors; i += 32) {
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
  if (lane == 0) ptx::barrier_arrive(s.query_full(queries.stage));
}

// The second half of every task's queries.
template <class T>
__device__ void help_gather(const Args& a, const Shared<T>& s) {
  Ring<2> tasks;
  Ring<T::kQueries> queries;
  Work w;
#pragma unroll 1
  for (; read_work(s, tasks, w); tasks.next(), queries.next()) {
    gather_queries(a, s, w, queries, 1);
    ptx::barrier_arrive(s.work_empty(tasks.stage));
  }
}

// Items are the tasks of all heads, and once again where a task may have more rows than a tile.

// The i-th task of all heads, in sections of heads where many share keys: what runs at a time
// should find them in L2, yet each section fill the GPU more than once.
__device__ __forceinline__ void find_item(const Args& a, int i, int tasks, int* task, int* head) {
  const int J = int(a.J);
  if (a.counter == nullptr) {
    *task = int(unsigned(i) / unsigned(J));
    *head = i - *task * J;
    return;
  }
  const int section = min(J, (2 * a.first + tasks - 1) / max(tasks, 1));
  const int in = i / (tasks * section) * section, heads = min(section, J - in);
  const int rest = i - in * tasks;
  *task = rest / heads;
  *head = in + rest % heads;
}

// The item after i, in lane 0. Many tasks are taken from a counter. A few for each block go round
// by turns, to and fro, so that who has the longest of one round has the shortest of the next: then
// no counter has to be zeroed, and the launch can overlap the last one.
__device__ __forceinline__ int after(const Args& a, int i) {
  const int grid = int(gridDim.x), own = int(blockIdx.x);
  if (a.counter != nullptr) return threadIdx.x % 32 == 0 ? a.first + atomicAdd(a.counter, 1) : 0;
  const int round = i / grid + 1;
  return round * grid + (round % 2 ? grid - 1 - own : own);
}

// The next item of this block that is one, from `i` on. False at the end.
template <class T>
__device__ bool take_work(const Args& a, const dev::TaskRange& range, int& i, Work& w) {
  const int tasks = int(range.last - range.first), all = tasks * int(a.J);
  for (; i < all * (128 / T::kTile); i = __shfl_sync(~0u, after(a, i), 0)) {
    int task, head;
    Task t;
    const int skip = i < all ? 0 : T::kTile;  // rows
    find_item(a, i < all ? i : i - all, tasks, &task, &head);
    if (!dev::find_task(a, range.first + task, &t) || t.rows <= skip) continue;
    t.row0 += skip;
    t.rows = min(t.rows - skip, T::kTile);
    if (t.partial >= 0) t.partial += skip;
    w = make_work<T>(a, t, head);
    return true;
  }
  w.blocks = -1;
  return false;
}

template <class T>
__device__ void schedule(const Args& a, const Shared<T>& s) {
  const int lane = threadIdx.x % 32;
  const dev::TaskRange range = dev::task_range(a, T::kGroups == 1 ? Part::kAll : Part::kBig);
  Ring<2> ring;
  Ring<T::kQueries> queries;
  int i = blockIdx.x;
  if (a.turn == Turn::kAfter) i = __shfl_sync(~0u, after(a, i), 0);
#pragma unroll 1
  for (;;) {
    Work w{};
    const bool more = take_work<T>(a, range, i, w);
    ptx::barrier_wait(s.work_empty(ring.stage), ring.parity ^ 1);
    if (lane == 0) {  // alone, since racecheck sees no order between lanes and another's arrival
      const uint4* const from = reinterpret_cast<const uint4*>(&w);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32_t words[4] = {from[k].x, from[k].y, from[k].z, from[k].w};
        ptx::store_shared16(s.work + ring.stage * 64 + k * 16, words);
      }
      ptx::barrier_arrive(s.work_full(ring.stage));
    }
    __syncwarp();
    if (!more) return;
    const int next = after(a, i);  // asked for early
    ring.next();
    gather_queries(a, s, w, queries, 0);
    queries.next();
    i = __shfl_sync(~0u, next, 0);
  }
}

// --- the warps that bring keys and values

// kPart: 0 keys, 1 values.
template <class T, int kPart>
__device__ void load_pages(const Args& a, const Shared<T>& s, const CUtensorMap* map) {
  const int lane = threadIdx.x % 32, shift = 31 - __clz(a.box), boxes = T::kKeys >> shift;
  const int box_bytes = a.box * T::kD * 2;
  // keys that one task reads need not stay
  const uint64_t policy = ptx::keep_in_l2(a.counter != nullptr);
  Ring<2> tasks;
  Ring<T::kStages> ring;
  Work w;
#pragma unroll 1
  for (; read_work(s, tasks, w); tasks.next()) {
    const int32_t* const table = a.block_table + w.request * a.table_stride;
    int key = w.key0 + (w.blocks - 1) * T::kKeys + lane * a.box;
    int page = w.blocks > 0 && lane < boxes && key < w.hi ? table[a.page.of(key)] : 0;
#pragma unroll 1
    for (int n = w.blocks - 1; n >= 0; --n, key -= T::kKeys, ring.next()) {
      if (a.debug && (page < 0 || page >= a.P)) __trap();
      const int left = w.hi - w.key0 - n * T::kKeys;
      const int count = min(boxes, (left + a.box - 1) >> shift);
      const int group =
          (((page * int(a.J) + w.head) * 2 + kPart) * a.page.d + a.page.rest(key)) / 8;
      const uint32_t full = kPart ? s.value_full(ring.stage) : s.key_full(ring.stage);
      const uint32_t to = (kPart ? s.values : s.keys) + ring.stage * T::kBlockBytes;
      if (n > 0 && lane < boxes) page = table[a.page.of(key - T::kKeys)];
      ptx::barrier_wait(kPart ? s.value_empty(ring.stage) : s.key_empty(ring.stage),
                        ring.parity ^ 1);
      if (lane == 0) ptx::barrier_arrive_expect(full, count * box_bytes);
      __syncwarp();
      if (lane < count) ptx::copy_box(to + lane * box_bytes, map, 0, 0, 0, group, full, policy);
    }
    ptx::barrier_arrive(s.work_empty(tasks.stage));
  }
}

}  // namespace tessella::msm::sm90
