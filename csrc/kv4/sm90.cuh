// kv4 on Hopper: few packed rows against pages with one scale a token, in 4 or 8 bits.
//
// The copy engine brings whole pages of a kv head, codes and scales as they lie, into stages that
// the four warps of a block share: a warp takes 16 of a stage's 64 keys. Under the 128-byte swizzle
// no bank is met twice, whatever the layout of pages. A code in the low bits of an fp16 number is a
// subnormal one, c 2^-24 (or c 2^-20, one nibble further), and the tensor cores multiply those
// exactly: a mask is all it takes, and nothing is added that would have to leave the sums again.
// Zeros of V are one more row of V^T, whose product is what the totals have too much.
#pragma once
#include "kv4/sm80.cuh"

namespace tessella::kv4::sm90 {

using msm::Task;
using msm::dev::kGroup;
using msm::dev::kInf;
using msm::dev::kSlack;
using msm::dev::kThreads;
using msm::dev::kWarps;
using msm::dev::Lane;
using msm::dev::Room;
using msm::dev::RowNumbers;
using msm::dev::Rows;
using msm::dev::State;

constexpr int kStageKeys = kWarps * kGroup;
constexpr int kLag = 1;  // a stage is ordered so many stages after what was there has been read
constexpr float kUnit = 0x1p-24f;  // of a subnormal fp16 number

// What the host works out for a launch.
struct Args : dev::Laid {
  explicit Args(const Params& p) : dev::Laid(p) {}
  uint32_t page_groups;  // as msm::dev::Setup has it
  int log_pages;         // of the pages of a stage, which have 64 keys together, or fewer
  int pitch;             // bytes from page to page
  int stages, stage_bytes, stage_keys;
};

// Where a byte of a page lies under the swizzle.
__device__ __forceinline__ uint32_t swizzled(uint32_t at) { return at ^ (at >> 7 & 7) << 4; }

template <int kB, int kHead>
struct Few : dev::Coded<kB, kHead, 1> {
  using Base = dev::Coded<kB, kHead, 1>;
  using Base::kD;
  static constexpr int kBits = kB, kParts = 8 / kB;
  static constexpr int kSteps = kHead * kB / 128;  // of 16 keys, 4 x 64 bytes each
  static constexpr int kGroupBytes = 2 * kHead * kB, kQuad = kHead * kB / 2;
  static constexpr int kBlocks = kHead > 128 ? 2 : 4;
  // of the totals by which half of a product's rows they are
  static constexpr float kHigh = kB == 4 ? 16 * kUnit : kUnit;

  __device__ explicit Few(const Args& problem) : Base(problem) {}

  // Steps of four lanes: those of lanes 2 and 3 are two further, which the swizzle keeps apart.
  __device__ int channel_of(int k, int c, int e) const {
    const int i = k / kParts;
    const int step = c % 2 + i % 2 * 2 + c / 2 * 4 + i / 2 * 8;
    return 4 * kParts * step + 4 * (k % kParts) + e % 2 * 2 + e / 2;
  }
  __device__ RowNumbers query(char* ring, const Rows& rows, int warp, float (&x)[kD / 32]) const {
    RowNumbers n = Base::query(ring, rows, warp, x);
#pragma unroll
    for (int i = 0; i < kD / 32; ++i) x[i] *= 64.f;  // as large as fp16 allows: codes are small
    return {n.scale / 64.f / kUnit, n.bias, kUnit};
  }
  __device__ void keep_queries(const uint2* fragments) {
    Base::keep_queries(fragments);
#pragma unroll
    for (int k = 1; kB == 4 && k < kD / 16; k += 2) {  // what is multiplied by the high nibbles
      this->q[k][0].x = dev::mul2(this->q[k][0].x, 0x2c002c00u);
      this->q[k][0].y = dev::mul2(this->q[k][0].y, 0x2c002c00u);
    }
  }

  // Bytes 0 and 2 of the word, or 1 and 3, of which `part` is a nibble.
  static __device__ __forceinline__ uint32_t pair(uint32_t word, int part, bool odd) {
    const uint32_t w = odd ? word >> 8 : word;
    return w & (kB == 8 ? 0x00ff00ffu : part == 0 ? 0x000f000fu : 0x00f000f0u);
  }
};

// Where a warp's 16 keys of a stage lie, which are a group of the page at `page`.
template <class S>
struct Places {
  __device__ Places(const Args& p, int group, int page) {
    const Lane at;
    keys = page + swizzled(group * S::kGroupBytes + at.c % 2 * 64 + at.c / 2 * 256 + at.r * 8);
    values = page + swizzled(p.v_codes + (4 * group + at.c) * S::kQuad + at.r * 8);
    key_scales = page + swizzled(p.k_scales + group * 32 + at.r * 4);
    key_zeros = page + swizzled(p.k_zeros + group * 32 + at.r * 4);
    value_scales = page + swizzled(p.v_scales + group * 32 + at.r * 4);
    value_zeros = page + swizzled(p.v_zeros + group * 32 + at.c * 8);
  }
  uint32_t keys, values, key_scales, key_zeros, value_scales, value_zeros;

  // The i-th piece of a lane's keys or values; stages and pages start at multiples of 1024 bytes.
  __device__ __forceinline__ uint32_t key(uint32_t page, int i) const {
    return ((page + keys) ^ (i % 2 * 0x90 + i / 2 % 2 * 0x240)) + i / 4 * 1024;
  }
  __device__ __forceinline__ uint32_t value(uint32_t page, int i) const {
    return (page + values) ^
           ((i % 2 * 0x40) ^ (i / 2 % 2 * 0x90) ^ (i / 4 % 2 * 0x120) ^ (i / 8 % 2 * 0x240));
  }
};

// A lane's two rows: a key's product x stands for x by + shift, of which `base` is less the row's
// reference.
struct Pair {
  float by[2], sum[2], base[2];

  template <class S>
  __device__ void load(const Room<S>& room, bool capped) {
    const Lane at;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      by[e] = capped ? 1.f : room.scale[2 * at.c + e];
      sum[e] = room.sum[2 * at.c + e];
      base[e] = kInf;
    }
  }
  template <class S>
  __device__ static float shift(const Room<S>& room, bool capped, int e) {
    return capped ? 0.f : room.bias[2 * (threadIdx.x % 4) + e];
  }
};

// --- a step: 16 keys from key0, which lie in `page`

// What a step reads of its page. It is read at once where registers allow: then a warp waits for
// shared memory twice a step.
template <class S>
struct Read {
  static constexpr bool kAtOnce = S::kSteps <= 4;
  uint2 keys[kAtOnce ? S::kSteps : 1], values[kAtOnce ? S::kSteps : 1];
  uint32_t key_scales, key_zeros, value_scales;
  uint2 value_zeros;

  __device__ __forceinline__ Read(const Places<S>& at, uint32_t page) {
#pragma unroll
    for (int i = 0; kAtOnce && i < S::kSteps; ++i) keys[i] = ptx::load_shared8(at.key(page, i));
    key_zeros = ptx::load_shared4(page + at.key_zeros);
    key_scales = ptx::load_shared4(page + at.key_scales);
    value_scales = ptx::load_shared4(page + at.value_scales);
    value_zeros = ptx::load_shared8(page + at.value_zeros);
#pragma unroll
    for (int i = 0; kAtOnce && i < S::kSteps; ++i) values[i] = ptx::load_shared8(at.value(page, i));
  }
  __device__ __forceinline__ uint2 key(const Places<S>& at, uint32_t page, int i) const {
    return kAtOnce ? keys[kAtOnce ? i : 0] : ptx::load_shared8(at.key(page, i));
  }
  __device__ __forceinline__ uint2 value(const Places<S>& at, uint32_t page, int i) const {
    return kAtOnce ? values[kAtOnce ? i : 0] : ptx::load_shared8(at.value(page, i));
  }
  __device__ __forceinline__ float value_scale(int half) const {
    return half_bits(half ? value_scales >> 16 : value_scales & 0xffff);
  }
};

template <class S>
__device__ __forceinline__ void score(const S& s, const Places<S>& at, uint32_t page,
                                      const Read<S>& in, const Pair& row, float (&x)[4]) {
  float y[4] = {};  // a second chain of sums
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = 0.f;
#pragma unroll
  for (int i = 0; i < S::kSteps; ++i) {
    const uint2 w = in.key(at, page, i);
#pragma unroll
    for (int part = 0; part < S::kParts; ++part) {
      const uint32_t a[4] = {S::pair(w.x, part, false), S::pair(w.y, part, false),
                             S::pair(w.x, part, true), S::pair(w.y, part, true)};
      const int k = i * S::kParts + part;
      ptx::F16Product::multiply(k % 2 ? y : x, a, s.q[k][0].x, s.q[k][0].y);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float scale = half_bits(h ? in.key_scales >> 16 : in.key_scales & 0xffff);
    const float zero = half_bits(h ? in.key_zeros >> 16 : in.key_zeros & 0xffff);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int i = 2 * h + e;
      x[i] = fmaf(-zero, row.sum[e], x[i] + y[i]) * scale;
    }
  }
}

// Scores beyond a reference, or scales of V too large for fp16: raises what must be.
template <class S>
__device__ inline void raise(const Room<S>& room, bool capped, State<S>& st, Pair& row,
                             const float (&x)[4], float (&y)[4], const Read<S>& in) {
  float score[1][4], over[2], shift[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float v = in.value_scale(h);
    over[h] = v > 128.f ? log2f(v) - 7.f : 0.f;
    shift[h] = Pair::shift(room, capped, h);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    score[0][i] = y[i] == -kInf ? -kInf : fmaf(x[i], row.by[i % 2], shift[i % 2]);
  msm::dev::raise(st, score, over);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float most = st.most[0][i % 2];
    y[i] = most == -kInf ? (x[i] != x[i] ? x[i] : -kInf) : score[0][i] - most;
    if (i < 2) row.base[i] = most == -kInf ? kInf : shift[i] - most;
  }
}

template <class S>
__device__ __forceinline__ void weigh(const Places<S>& at, uint32_t page, const Read<S>& in,
                                      const uint32_t (&z)[2], uint32_t w0, uint32_t w1,
                                      State<S>& st) {
  const uint32_t zeros[4] = {z[0], z[0], z[1], z[1]};
  float lost[4] = {st.lost[0][0], st.lost[0][1], 0.f, 0.f};
  ptx::F16Product::multiply(lost, zeros, w0, w1);
  st.lost[0][0] = lost[0];
  st.lost[0][1] = lost[1];
  constexpr int kM = S::kParts;
#pragma unroll
  for (int i = 0; i < S::kD / 16 / kM; ++i) {
    const uint2 v = in.value(at, page, i);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      // rows r and r + 8 of the product: nibbles of a byte, or words
      const uint32_t one = m == 0 ? v.x : v.y, two = kM == 2 ? one : v.y;
      const uint32_t a[4] = {S::pair(one, 0, false), S::pair(two, kM - 1, false),
                             S::pair(one, 0, true), S::pair(two, kM - 1, true)};
      ptx::F16Product::multiply(st.o[i * kM + m][0], a, w0, w1);
    }
  }
}

// kWhole: every row sees every key, and no score is capped.
template <bool kWhole, class S>
__device__ __forceinline__ void step(const S& s, const Places<S>& at, const Room<S>& room,
                                     const Rows& rows, State<S>& st, Pair& row, int row0, int count,
                                     int key0, uint32_t page) {
  const Lane lane;
  const Read<S> in(at, page);
  float x[4], y[4];
  score(s, at, page, in, row, x);
  const bool capped = !kWhole && rows.p.softcap > 0.f;
  if (capped)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = 2 * lane.c + i % 2;
      x[i] = msm::dev::cap(fmaf(x[i], room.scale[r], room.bias[r]), rows.p.softcap);
    }
  const uint32_t large = 0x58005800u;  // 128, twice
  bool up = !__hble2(*reinterpret_cast<const __half2*>(&in.value_scales),
                     *reinterpret_cast<const __half2*>(&large));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    y[i] = fmaf(x[i], row.by[i % 2], row.base[i % 2]);
    if (!kWhole) {
      const int r = 2 * lane.c + i % 2;
      if (r >= count || !rows.sees(row0 + r, key0 + S::key(lane, i / 2))) y[i] = -kInf;
    }
    up |= y[i] > kSlack;
  }
  if (__any_sync(~0u, up)) raise(room, capped, st, row, x, y, in);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float e = ptx::exp2_fast(y[i]);
    st.total[0][i % 2] += e;
    y[i] = e * in.value_scale(i / 2);
    if (!kWhole && !(e > 0.f)) y[i] = 0.f;  // what is not seen may have any scale
  }
  const uint2 zv = in.value_zeros;
  uint32_t z[2] = {__byte_perm(zv.x, zv.y, 0x5410), __byte_perm(zv.x, zv.y, 0x7632)};
  if (!kWhole) {  // and any zero
    const int first = rows.begin(row0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = key0 + 4 * lane.c + i;
      if (key < first || key >= rows.kv_end) z[i % 2] &= i < 2 ? 0xffff0000u : 0x0000ffffu;
    }
  }
  const uint32_t w0 = ptx::transpose(pack2(y[0], y[1], DType::kF16));
  const uint32_t w1 = ptx::transpose(pack2(y[2], y[3], DType::kF16));
  weigh<S>(at, page, in, z, w0, w1, st);
}

// Takes from the totals what they have too much, so that they stay small.
template <class S>
__device__ inline void settle(State<S>& st) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
#pragma unroll
    for (int m = 0; m < State<S>::kM; ++m) {
      st.o[m][0][e] = fmaf(-kUnit, st.lost[0][e], st.o[m][0][e]);
      st.o[m][0][2 + e] = fmaf(-S::kHigh, st.lost[0][e], st.o[m][0][2 + e]);
    }
    st.lost[0][e] = 0.f;
  }
}

// --- pages

// The ring of a block: a stage is full when its pages have come, and empty when all warps have
// read it.
struct Stages {
  uint32_t at, barriers;
  int n;
  __device__ uint32_t full(int i) const { return barriers + 8 * i; }
  __device__ uint32_t empty(int i) const { return barriers + 8 * (n + i); }
};
struct Cursor {
  int slot = 0;
  uint32_t phase = 0;
  __device__ void next(int n) {
    if (++slot == n) slot = 0, phase ^= 1;
  }
};

// The pages of a task, and those stages of them that this warp orders: every fourth.
struct Pages {
  const Args& p;
  const CUtensorMap* map;
  const int32_t* table;  // of the request
  int head, warp;
  int first = 0, end = 0;  // pages
  int ids = 0;             // lane i: of the i-th page of this warp's stages, in turns of 32

  __device__ int page_of(int key) const {
    const int group = key / kGroup;
    return p.page_groups == 0 ? group : int(__umulhi(unsigned(group), p.page_groups));
  }
  __device__ void range(int begin_key, int end_key) {
    first = page_of(begin_key);
    end = end_key > begin_key ? page_of(end_key - 1) + 1 : first;
  }
  __device__ int count() const { return (end - first + (1 << p.log_pages) - 1) >> p.log_pages; }
  // Looks up 32 pages from this warp's stage t on.
  __device__ void look(int t) {
    const int lane = threadIdx.x % 32, in = lane & ((1 << p.log_pages) - 1);
    const int stage = (t + (lane >> p.log_pages)) * kWarps + warp;
    const int page = first + (stage << p.log_pages) + in;
    ids = page < end ? table[page] : 0;
    if (p.debug && page < end && unsigned(ids) >= p.P) __trap();
  }
  // Orders stage i, this warp's, into a slot once that is empty.
  __device__ __forceinline__ void fetch(const Stages& ring, int i, int slot, uint32_t phase) {
    const int lane = threadIdx.x % 32, turn = i / kWarps << p.log_pages;
    if (turn > 0 && turn % 32 == 0) look(i / kWarps);
    const int left = end - first - (i << p.log_pages);
    const int pages = min(1 << p.log_pages, left);
    const int id = __shfl_sync(~0u, ids, (turn + lane) % 32);
    ptx::barrier_wait(ring.empty(slot), phase);
    if (lane == 0) ptx::barrier_arrive_expect(ring.full(slot), pages * int(p.bytes));
    __syncwarp();
    if (lane < pages)
      ptx::copy_box(ring.at + slot * p.stage_bytes + lane * p.pitch, map, 0, 0,
                    id * int(p.J) + head, ring.full(slot));
  }
};

// --- tasks

// The keys [begin, end) of rows row0.., by this warp: `n` stages.
template <class S>
__device__ inline void walk(const S& s, const Args& p, const Room<S>& room, const Rows& rows,
                            State<S>& st, Pages& pages, const Stages& ring, Cursor& at, int row0,
                            int count, int begin, int end) {
  // a stage ahead is ordered a step late: the other warps have mostly read what was there
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = pages.count();
  const int in = pages.page_of(warp * kGroup);  // page of a stage that has this warp's keys
  const Places<S> places(p, warp - in * (int(p.Z) / kGroup), in * p.pitch);
  const bool mine = in < 1 << p.log_pages, capped = rows.p.softcap > 0.f;
  // from here on, this many keys, steps are whole
  const int whole = max(begin, rows.begin(row0 + count - 1));
  const int last = mine && !capped ? min(end, rows.all_end(row0)) - kGroup - whole : -1;
  Pair row;
  row.load(room, capped);
  Cursor old = at;
  int key = pages.first * int(p.Z) + warp * kGroup;
  for (int i = 0; i < n; ++i, key += p.stage_keys) {
    if (i >= kLag) {
      const int ahead = i - kLag + ring.n;
      if (ahead % kWarps == warp && ahead < n) pages.fetch(ring, ahead, old.slot, old.phase);
      old.next(ring.n);
    }
    ptx::barrier_wait(ring.full(at.slot), at.phase);
    const uint32_t page = ring.at + at.slot * p.stage_bytes;
    if (last >= 0 && unsigned(key - whole) <= unsigned(last))
      step<true>(s, places, room, rows, st, row, row0, count, key, page);
    else if (mine && key >= begin && key < end)
      step<false>(s, places, room, rows, st, row, row0, count, key, page);
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(ring.empty(at.slot));
    at.next(ring.n);
    if (i % 64 == 63) settle(st);
  }
  settle(st);
#pragma unroll
  for (int m = 0; m < State<S>::kM; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) st.o[m][0][i] *= i < 2 ? 1.f / kUnit : 1.f / S::kHigh;
}

template <class S>
__device__ inline void run_task(const Args& p, const CUtensorMap* map, const Task& t, int head,
                                const Room<S>& room, const Stages& ring, Cursor& at) {
  constexpr int kRows = Room<S>::kRows;
  const S source(p);
  const int warp = threadIdx.x / 32;
  Pages pages{p, map, p.block_table + t.request * p.table_stride, head, warp};
  // a guess that needs no length; only a window, or further rows, prove it wrong
  pages.range(t.kv_begin, t.kv_end);
  pages.look(0);
  Rows rows(p, t, head);
  rows.row0 = 0;  // rows count from the request's first
  for (int row0 = t.row0; row0 < t.row0 + t.rows; row0 += kRows) {
    const int count = t.row0 + t.rows - row0 < kRows ? t.row0 + t.rows - row0 : kRows;
    const int end = rows.end(row0 + count - 1), seen = rows.begin(row0) / kGroup * kGroup;
    const int begin = seen > t.kv_begin ? seen : t.kv_begin;
    const int guess = pages.first;
    pages.range(begin, end);
    if (row0 != t.row0 || pages.first != guess) pages.look(0);
    // NOTE: factors of the queries are applied in the ring, before the first pages then
    const bool early = !source.uses_ring();
    auto start = [&] {
      Cursor to = at;
      for (int i = 0; i < min(ring.n, pages.count()); ++i, to.next(ring.n))
        if (i % kWarps == warp) pages.fetch(ring, i, to.slot, to.phase ^ 1);
    };
    if (early) start();
    msm::dev::load_queries(source, room, rows, row0, count, warp);
    if (!early) ptx::fence_for_copies();
    ptx::named_barrier(1, kThreads);
    if (!early) start();
    msm::dev::order_queries(source, room);
    ptx::named_barrier(1, kThreads);
    S mine = source;
    mine.keep_queries(room.q);
    State<S> st;
    msm::dev::begin_state(st);
    walk(mine, p, room, rows, st, pages, ring, at, row0, count, begin, end);
    ptx::named_barrier(1, kThreads);
    msm::dev::join_warps(source, room, st, warp, 1);
    msm::dev::finish(source, room, rows, t, row0, count, warp);
    ptx::fence_for_copies();  // the ring held totals
    ptx::named_barrier(1, kThreads);
  }
}

// Item i is kv head i % J of task i / J.
template <class S>
__global__ __launch_bounds__(kThreads,
                             S::kBlocks) void attend(const __grid_constant__ CUtensorMap map,
                                                     const __grid_constant__ Args p) {
  extern __shared__ __align__(1024) char memory[];
  char* const after = memory + p.stages * p.stage_bytes;
  Room<S> room(after);
  room.ring = memory;
  const Stages ring{
      ptx::shared_address(memory),
      ptx::shared_address(after) + Room<S>::kQ + Room<S>::kNumbers + Room<S>::kRows * Room<S>::kRow,
      p.stages};
  if (threadIdx.x == 0) {
    ptx::prefetch_map(&map);
    for (int i = 0; i < p.stages; ++i) {
      ptx::barrier_init(ring.full(i), 1);
      ptx::barrier_init(ring.empty(i), kWarps);
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
  ptx::wait_for_previous_grid();
  ptx::allow_next_grid();
  const unsigned J = unsigned(p.J);
  unsigned item = blockIdx.x;
  Task task;
  bool found = msm::dev::find_task(p, item / J, &task);  // beside the header
  const msm::dev::TaskRange range = msm::dev::task_range(p, msm::Part::kAll);
  Cursor at;
  while (found && item < range.last * J) {
    run_task<S>(p, &map, task, int(item % J), room, ring, at);
    item += gridDim.x;
    found = item < range.last * J && msm::dev::find_task(p, item / J, &task);
  }
}

}  // namespace tessella::kv4::sm90
