// msm on Hopper: tiles of up to 64 or 128 packed rows against 16-bit pages, on wgmma.
//
// A thread block is two or three warpgroups. One or two multiply, 64 rows each; the first feeds
// them: a warp each brings keys and values by the copy engine, a box for each page or part of one,
// and one takes tasks and gathers the queries. Shared memory holds every operand in atoms of 8
// rows under the widest swizzle that divides a head: [rows/8][D/E][8][E], so that a box of any
// number of rows is one piece and lies as its neighbours do.
//
// A math warpgroup multiplies block n's queries and keys while it still has to multiply block
// n+1's probabilities and values, and computes the softmax of the one during the products of the
// other. Where there are two, a pair of named barriers has them take turns, so that one's softmax
// runs during the other's products (FlashAttention-3, NeurIPS 2024, sections 3.1 and 3.2). Blocks
// go from the last visible key to the first, hence masks come first, and only where a block is cut.
//
// With one math warpgroup, for few rows, reading is the limit: two thread blocks share a
// multiprocessor, so that one reads while the other begins or ends a task.
#pragma once
#include "cuda/async.cuh"
#include "cuda/float.cuh"
#include "cuda/fragment.cuh"
#include "cuda/wgmma16.cuh"
#include "msm/sm80.cuh"

namespace tessella::msm::sm90 {

using dev::kLog2e;

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
  int box;  // keys of a copy, a power of two: divides Z and the block of keys
  Part part;
  Divider group, page;  // H / J and Z
};

// softcap tanh(y), of 2 log2(e) y: tanh(y) = 1 - 2 / (1 + exp(2 y)).
__device__ __forceinline__ float capped(float y, float softcap) {
  return softcap * (1.f - __fdividef(2.f, 1.f + ptx::exp2_fast(y)));
}

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
    ptx::barrier_init(s.work_empty(lane), 3 + 4 * T::kGroups);  // warps that read it
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
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(s.work_empty(tasks.stage));
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
  const int section = min(J, (2 * int(gridDim.x) + tasks - 1) / max(tasks, 1));
  const int in = i / (tasks * section) * section, heads = min(section, J - in);
  const int rest = i - in * tasks;
  *task = rest / heads;
  *head = in + rest % heads;
}

// The item after i, in lane 0. Many tasks are taken from a counter. A few for each block go round
// by turns, to and fro, so that who has the longest of one round has the shortest of the next: then
// no counter has to be zeroed, and the launch can overlap the last one.
template <class T>
__device__ __forceinline__ int after(const Args& a, int i) {
  const int grid = int(gridDim.x), own = int(blockIdx.x);
  if (a.counter != nullptr) return threadIdx.x % 32 == 0 ? grid + atomicAdd(a.counter, 1) : 0;
  const int round = i / grid + 1;
  return round * grid + (round % 2 ? grid - 1 - own : own);
}

// The next item of this block that is one, from `i` on. False at the end.
template <class T>
__device__ bool take_work(const Args& a, const dev::TaskRange& range, int& i, Work& w) {
  const int tasks = int(range.last - range.first), all = tasks * int(a.J);
  for (; i < all * (128 / T::kTile); i = __shfl_sync(~0u, after<T>(a, i), 0)) {
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
  const dev::TaskRange range = dev::task_range(a, a.part);
  Ring<2> ring;
  Ring<T::kQueries> queries;
  int i = blockIdx.x;
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
    const int next = after<T>(a, i);  // asked for early
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

// --- the math warpgroups

template <class T>
struct Math {
  using Scores = float[T::kScores];
  using Sums = float[T::kSums];
  using Probabilities = uint32_t[T::kKeys / 4];

  const Args& a;
  const Shared<T>& s;
  const int group = T::kGroups == 1 ? 0 : threadIdx.x / 128 - 1;
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  const int r = thread / 32 * 16 + lane / 4, c = lane % 4;  // this thread: rows r and r + 8
  const bool plain = a.softcap == 0.f && a.scale > 0.f;     // scores are scaled in the exponent
  const float slope = plain ? a.scale * kLog2e : kLog2e;
  Ring<2> tasks{};
  Ring<T::kQueries> queries{};
  Ring<T::kStages> keys{}, values{};

  // The state of a tile's softmax, of this thread's two rows.
  struct Softmax {
    float top[2], sum[2], share[2];
  };
  // The warpgroups' products take turns.
  __device__ void await_turn() const {
    if (T::kGroups == 2) ptx::named_barrier(1 + group, 256);
  }
  __device__ void give_turn() const {
    if (T::kGroups == 2) ptx::named_barrier_arrive(2 - group, 256);
  }
  __device__ void release(uint32_t barrier) const {
    if (lane == 0) ptx::barrier_arrive(barrier);
  }

  __device__ void multiply_keys(Scores& x) const {
    const uint64_t q = ptx::swizzled_atoms<T::kRow>(
        s.queries + queries.stage * T::kQueryBytes + group * 8 * T::kGroup, 16, T::kGroup);
    const uint64_t k =
        ptx::swizzled_atoms<T::kRow>(s.keys + keys.stage * T::kBlockBytes, 16, T::kGroup);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < T::kD / 16; ++i)
      ptx::Wgmma16<T::kType, T::kKeys>::run(x, q + T::step(i), k + T::step(i), i > 0);
    ptx::wgmma_commit();
  }
  __device__ void multiply_values(Sums& o, const Probabilities& p) const {
    const uint64_t v = ptx::swizzled_atoms<T::kRow>(s.values + values.stage * T::kBlockBytes,
                                                    8 * T::kRow, T::kGroup);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < T::kKeys / 16; ++i)
      ptx::Wgmma16<T::kType, T::kD>::run(o, p + 4 * i, v + i * (2 * T::kGroup / 16), true);
    ptx::wgmma_commit();
  }

  // Values outside [lo, hi) are nobody's: 0 times what lies there need not be 0.
  __device__ void clear_values(int n) const {
    const Work w = load_work(s, tasks.stage);
    const int first = w.lo - w.key0 - n * T::kKeys, end = w.hi - w.key0 - n * T::kKeys;
    if (first <= 0 && end >= T::kKeys) return;
    const uint32_t zeros[4] = {};
#pragma unroll 1
    for (int i = thread; i < T::kKeys * T::kD / 8; i += 128) {
      const int row = i / (T::kD / 8);
      if (row < first || row >= end)
        ptx::store_shared16(
            s.values + values.stage * T::kBlockBytes + T::piece(row, i % (T::kD / 8)), zeros);
    }
    ptx::fence_for_copies();
    ptx::named_barrier(3 + group, 128);
  }

  // Hides what this thread's rows do not see of block n. The task is read again: it would take
  // registers during the blocks that are seen whole.
  __device__ void hide(Scores& x, int n) const {
    const Work w = load_work(s, tasks.stage);
    const int key0 = w.key0 + n * T::kKeys;
    const bool tree = w.mask == int(Mask::kTree) && key0 + T::kKeys > w.hist;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(group * 64 + r + 8 * h, w.rows - 1), token = a.group.of(w.row0 + row);
      const Keys keys = keys_of_token(a, w.mask, w.hist, token, w.lo, w.hi);
      const int lo = keys.lo - key0 - 2 * c, hi = keys.hi - key0 - 2 * c;
#pragma unroll
      for (int i = 0; i < T::kKeys / 4; ++i) {
        const int at = i / 2 * 8 + i % 2;
        float& y = x[i / 2 * 4 + 2 * h + i % 2];
        if (at < lo || at >= hi) y = -INFINITY;
      }
      if (!tree) continue;
      const uint64_t* const bits = a.tree_bits + (int64_t{w.tree} + token) * a.tree_words;
#pragma unroll
      for (int part = 0; part < T::kKeys / 64; ++part) {
        const uint64_t shown = tree_shows(bits, key0 + part * 64 - w.hist) >> 2 * c;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          float& y = x[(part * 16 + i) / 2 * 4 + 2 * h + i % 2];
          if (!(shown >> (i / 2 * 8 + i % 2) & 1)) y = -INFINITY;
        }
      }
    }
  }
  // Which of 64 keys a tree shows to the token of these bits; the first key is the tree's `node`,
  // less than 0 before the tree.
  __device__ uint64_t tree_shows(const uint64_t* bits, int node) const {
    const int first = node >> 6, by = node & 63;
    const uint64_t low = tree_word(bits, first);
    return by == 0 ? low : low >> by | tree_word(bits, first + 1) << (64 - by);
  }
  __device__ uint64_t tree_word(const uint64_t* bits, int i) const {
    return i < 0 ? ~uint64_t{0} : i < a.tree_words ? bits[i] : 0;
  }
  // Scales and caps the scores where the exponent cannot do it.
  __device__ void cap(Scores& x) const {
    if (a.softcap == 0.f) {
#pragma unroll
      for (int i = 0; i < T::kScores; ++i) x[i] *= a.scale;
      return;
    }
    const float in = 2.f * kLog2e * a.scale / a.softcap;
#pragma unroll
    for (int i = 0; i < T::kScores; ++i) x[i] = capped(x[i] * in, a.softcap);
  }

  // Scores to probabilities against the highest score so far; `share` is what the sums until now
  // count against it.
  __device__ void soften(Scores& x, Softmax& f) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = fmaxf(x[2 * h], x[2 * h + 1]);
#pragma unroll
      for (int i = 4; i < T::kScores; i += 4)
        top = fmaxf(top, fmaxf(x[i + 2 * h], x[i + 2 * h + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      top = fmaxf(top, f.top[h]);
      const float base = top == -INFINITY ? 0.f : top * slope;
      f.share[h] = ptx::exp2_fast(f.top[h] * slope - base);
      f.top[h] = top;
      float sum[2] = {};
#pragma unroll
      for (int i = 0; i < T::kScores; i += 4)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& y = x[i + 2 * h + e];
          y = ptx::exp2_fast(fmaf(y, slope, -base));
          sum[e] += y;
        }
      f.sum[h] = f.sum[h] * f.share[h] + (sum[0] + sum[1]);
    }
  }
  __device__ void pack(const Scores& x, Probabilities& p) const {
#pragma unroll
    for (int i = 0; i < T::kKeys / 4; ++i) p[i] = pack2(x[2 * i], x[2 * i + 1], T::kType);
    ptx::hold(p);
  }
  __device__ void rescale(Sums& o, const Softmax& f) const {
#pragma unroll
    for (int i = 0; i < T::kSums; ++i) o[i] *= f.share[i / 2 % 2];
    ptx::hold(o);
  }

  // Scores of block n, and the products of block n + 1, whose probabilities are `p`.
  __device__ void step(int n, bool last, bool cut, Scores& x, Sums& o, Probabilities& p,
                       Softmax& f) {
    ptx::barrier_wait(s.key_full(keys.stage), keys.parity);
    await_turn();
    multiply_keys(x);
    ptx::barrier_wait(s.value_full(values.stage), values.parity);
    if (last) clear_values(n + 1);
    multiply_values(o, p);
    give_turn();
    ptx::wgmma_wait<1>();
    ptx::hold(x);
    release(s.key_empty(keys.stage));
    keys.next();
    if (!plain) cap(x);
    if (cut) hide(x, n);
    soften(x, f);
    ptx::wgmma_wait<0>();
    ptx::hold(o);
    release(s.value_empty(values.stage));
    values.next();
    pack(x, p);
    rescale(o, f);
  }

  __device__ void tile(const Work& w, Sums& o, Softmax& f) {
    Scores x;
    Probabilities p;
    const int blocks = w.blocks;
    // blocks from `whole` on, as far as `cut`, hide nothing
    const int whole = (max(w.inner_lo - w.key0, 0) + T::kKeys - 1) / T::kKeys;
    const int cut = max(w.inner_hi - w.key0, 0) / T::kKeys;
    ptx::barrier_wait(s.query_full(queries.stage), queries.parity);
    if (blocks > 0) {
      ptx::barrier_wait(s.key_full(keys.stage), keys.parity);
      multiply_keys(x);
      ptx::wgmma_wait<0>();
      ptx::hold(x);
      release(s.key_empty(keys.stage));
      keys.next();
      if (!plain) cap(x);
      hide(x, blocks - 1);
      soften(x, f);
      pack(x, p);
    }
#pragma unroll 1
    for (int n = blocks - 2; n >= 0; --n)
      step(n, n == blocks - 2, n < whole || n >= cut, x, o, p, f);
    release(s.query_empty(queries.stage));
    queries.next();
    if (blocks == 0) return;
    ptx::barrier_wait(s.value_full(values.stage), values.parity);
    clear_values(0);
    multiply_values(o, p);
    ptx::wgmma_wait<0>();
    ptx::hold(o);
    release(s.value_empty(values.stage));
    values.next();
  }

  // Row h of this thread into the result: four lanes trade their pairs, so that each writes 16
  // bytes.
  __device__ void store_row(const Sums& o, int h, float by, uint16_t* to) const {
    constexpr int kWhole = T::kD / 32;
#pragma unroll
    for (int i = 0; i < kWhole; ++i) {
      uint32_t x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = (4 * i + j) * 4 + 2 * h;
        x[j] = pack2(o[at] * by, o[at + 1] * by, T::kType);
      }
#pragma unroll
      for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (j & bit) continue;
          const bool upper = c & bit;
          const uint32_t got = __shfl_xor_sync(~0u, upper ? x[j] : x[j + bit], bit);
          x[j] = upper ? got : x[j];
          x[j + bit] = upper ? x[j + bit] : got;
        }
      if (to) *reinterpret_cast<uint4*>(to + i * 32 + c * 8) = make_uint4(x[0], x[1], x[2], x[3]);
    }
#pragma unroll
    for (int j = 4 * kWhole; j < T::kD / 8; ++j) {
      const int at = j * 4 + 2 * h;
      const uint32_t x = pack2(o[at] * by, o[at + 1] * by, T::kType);
      if (to) *reinterpret_cast<uint32_t*>(to + j * 8 + c * 2) = x;
    }
  }
  __device__ void store_partial(const Sums& o, int h, float by, float* to) const {
#pragma unroll
    for (int j = 0; j < T::kD / 8; ++j) {
      const int at = j * 4 + 2 * h;
      *reinterpret_cast<float2*>(to + j * 8 + c * 2) = make_float2(o[at] * by, o[at + 1] * by);
    }
  }

  __device__ void finish(const Work& w, const Sums& o, const Softmax& f) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = group * 64 + r + 8 * h, packed = w.row0 + row, token = a.group.of(packed);
      const bool there = row < w.rows;
      const int head = w.head * a.group.d + packed - token * a.group.d;
      const int64_t at = (int64_t{w.token0} + token) * a.H + head;
      float sum = f.sum[h];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const Total total = add_sink(a, w, there ? head : 0, f.top[h] * slope, sum);
      store(w, o, h, total.by, at, row, there);
      if (there && c == 0 && w.partial >= 0)
        a.partial_lse[w.head * a.partial_rows + w.partial + row] = total.lse;
      else if (there && c == 0 && a.lse)
        a.lse[at] = total.lse;
    }
  }
  __device__ void store(const Work& w, const Sums& o, int h, float by, int64_t at, int row,
                        bool there) const {
    if (w.partial < 0) {
      store_row(o, h, by, there ? static_cast<uint16_t*>(a.out) + at * T::kD : nullptr);
    } else if (there) {
      const int64_t part = w.head * a.partial_rows + w.partial + row;
      store_partial(o, h, by, a.partial + part * T::kD);
    }
  }

  __device__ void run() {
    if (T::kGroups == 2 && group == 1) give_turn();
    Work w;
#pragma unroll 1
    for (; read_work(s, tasks, w); tasks.next()) {
      Sums o;
#pragma unroll
      for (int i = 0; i < T::kSums; ++i) o[i] = 0.f;
      Softmax f{{-INFINITY, -INFINITY}, {0.f, 0.f}, {1.f, 1.f}};
      tile(w, o, f);
      finish(load_work(s, tasks.stage), o, f);  // read again: registers are scarce
      __syncwarp();
      release(s.work_empty(tasks.stage));
    }
  }
};

template <class T>
__global__ __launch_bounds__(T::kThreads,
                             T::kBlocks) void attend(const __grid_constant__ CUtensorMap map,
                                                     const __grid_constant__ Args a) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const Shared<T> s(ptx::shared_address(shared_memory));
  const int warp = threadIdx.x / 32;
  if (warp == 0) init_barriers(s);
  if (warp == 1 && threadIdx.x % 32 == 0) ptx::prefetch_map(&map);
  ptx::wait_for_previous_grid();
  __syncthreads();
  ptx::allow_next_grid();
  if (warp < 4) {
    if constexpr (T::kTrade) ptx::fewer_registers<T::kFeedRegisters>();
    if (warp == 0) load_pages<T, 0>(a, s, &map);
    if (warp == 1) schedule<T>(a, s);
    if (warp == 2) load_pages<T, 1>(a, s, &map);
    if (warp == 3) {
      prefetch_lookups(a);
      help_gather<T>(a, s);
    }
  } else {
    if constexpr (T::kTrade) ptx::more_registers<T::kMathRegisters>();
    Math<T>{a, s}.run();
  }
}

}  // namespace tessella::msm::sm90
