// Attention for any GPU from sm_80: every tile, mask and head dim, over any source of keys.
//
// Keys are the rows of the matrix products, so that a group of 8 query rows is one operand and no
// work is wasted on 16: S^T = K Q^T and O^T = V^T P^T, m16n8k16. What S^T leaves in the lanes is,
// after one transpose of 8 x 8 in registers, the operand P^T. A warp walks groups of 16 keys of its
// own, in a ring of its own in shared memory that asynchronous copies fill; warps meet only at the
// end of a task. Scores live in base 2; a row's reference is raised only when a score exceeds it by
// 2^8, so that the usual step has no reduction across lanes, one vote apart.
#pragma once
#include <cuda_fp8.h>

#include <type_traits>

#include "cuda/async.cuh"
#include "cuda/dependent.cuh"
#include "cuda/float.cuh"
#include "cuda/fragment.cuh"
#include "msm/tasks.cuh"

namespace tessella::msm::dev {

// --- the body

// Where things lie in a block's shared memory.
template <class S>
struct Room {
  static constexpr int kRows = 8 * S::kTiles;
  static constexpr int kQ = S::kD / 16 * S::kTiles * 32 * 8;     // fragments of the queries
  static constexpr int kRow = (S::kD + 8) * 2;                   // bytes of a query row
  static constexpr int kNumbers = kRows * (3 + 3 * kWarps) * 4;  // of rows
  static constexpr int kTotals = 2 * kRows * (S::kD + 4) * 4;    // totals, at the end

  static int bytes(int stage_bytes) {
    const int ring = kWarps * S::kStages * stage_bytes;
    return kQ + kNumbers + kRows * kRow + (ring > kTotals ? ring : kTotals);
  }

  __device__ explicit Room(char* at)
      : q(reinterpret_cast<uint2*>(at)),
        scale(reinterpret_cast<float*>(at + kQ)),
        sum(scale + kRows),
        bias(sum + kRows),
        most(bias + kRows),
        total(most + kWarps * kRows),
        lost(total + kWarps * kRows),
        rows(at + kQ + kNumbers),
        ring(rows + kRows * kRow) {}

  uint2* q;
  float *scale, *sum, *bias;   // [kRows]: factor of the row's products, sum of the row, bias
  float *most, *total, *lost;  // [kWarps][kRows]
  char *rows, *ring;
  __device__ float* totals(int slot) const {
    return reinterpret_cast<float*>(ring) + slot * kRows * (S::kD + 4);
  }
};

// A warp's running state for its keys.
template <class S>
struct State {
  static constexpr int kTiles = S::kTiles, kM = S::kD / 16;
  float o[kM][kTiles][4];  // totals: channels by rows
  float most[kTiles][2], total[kTiles][2], lost[kTiles][2];
};

template <class S>
__device__ inline void begin_state(State<S>& st) {
#pragma unroll
  for (int n = 0; n < S::kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      st.most[n][e] = -kInf;
      st.total[n][e] = st.lost[n][e] = 0.f;
    }
#pragma unroll
    for (int m = 0; m < State<S>::kM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) st.o[m][n][i] = 0.f;
  }
}

// Raises the rows' references to the scores x; `over` is added to a key's scores for this.
template <class S>
__device__ inline void raise(State<S>& st, const float (&x)[S::kTiles][4], const float (&over)[2]) {
#pragma unroll
  for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float top = fmaxf(x[n][e] + over[0], x[n][2 + e] + over[1]);
#pragma unroll
      for (int by = 4; by < 32; by *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, by));
      top = fmaxf(top, st.most[n][e]);
      const float keep = top == st.most[n][e] ? 1.f : ptx::exp2_fast(st.most[n][e] - top);
      st.most[n][e] = top;
      st.total[n][e] *= keep;
      st.lost[n][e] *= keep;
#pragma unroll
      for (int m = 0; m < State<S>::kM; ++m) {
        st.o[m][n][e] *= keep;
        st.o[m][n][2 + e] *= keep;
      }
    }
}

__device__ __forceinline__ float cap(float x, float softcap) {  // x and the result in base 2
  return softcap * kLog2e * tanhf(x * (kLn2 / softcap));
}

// Lane's place in fragments.
struct Lane {
  __device__ Lane() : lane(int(threadIdx.x) % 32), r(lane / 4), c(lane % 4) {}
  int lane, r, c;
};

// 16 keys from key0, whose copies have come to `stage`.
template <class S>
__device__ __forceinline__ void step(const S& source, const Room<S>& room, const Rows& rows,
                                     State<S>& st, int row0, int count, int key0, bool whole,
                                     uint32_t stage) {
  const Lane at;
  float x[S::kTiles][4] = {};
  source.score(stage, room.q, rows, key0, x);
  float over[2] = {0.f, 0.f};
  bool up = source.scale_scores(stage, room, x, over);
  if (rows.p.softcap > 0.f)
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] = cap(x[n][i], rows.p.softcap);
  if (!whole)
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = n * 8 + 2 * at.c + i % 2, key = key0 + S::key(at, i / 2);
        if (row >= count || !rows.sees(row0 + row, key)) x[n][i] = -kInf;
      }
#pragma unroll
  for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) up |= x[n][i] > st.most[n][i % 2] + kSlack;
  if (__any_sync(~0u, up)) raise(st, x, over);
#pragma unroll
  for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float most = st.most[n][i % 2];
      const float e = ptx::exp2_fast(x[n][i] - (most == -kInf ? 0.f : most));
      st.total[n][i % 2] += e;
      x[n][i] = e;
    }
  uint32_t p[S::kTiles][2];
  source.weights(stage, x, st.lost, p);
#pragma unroll
  for (int n = 0; n < S::kTiles; ++n) {
    p[n][0] = ptx::transpose(p[n][0]);
    p[n][1] = ptx::transpose(p[n][1]);
  }
  source.weigh(stage, p, rows.kv_end - key0, st.o);
}

// All keys of rows row0.. of the task that this warp takes: every fourth group.
template <class S>
struct Walk {
  const S& source;
  const Setup& setup;
  const Rows& rows;
  int begin, end, warp;  // keys
  uint32_t ring;         // of this warp
  int pages = 0;         // lane i: of this warp's group 32 k + i
  int next = 0;          // stage that is filled next

  __device__ int key(int i) const { return begin + (i * kWarps + warp) * kGroup; }
  __device__ int count() const {
    const int groups = (end - begin + kGroup - 1) / kGroup;
    return (groups - warp + kWarps - 1) / kWarps;
  }
  __device__ uint32_t stage(int i) const { return ring + i * setup.stage_bytes; }
  __device__ void find_pages(int i) {
    const int key = this->key(i + int(threadIdx.x) % 32);
    if (key < end)
      pages = rows.p.block_table[rows.request * rows.p.table_stride + setup.page_of(key / kGroup)];
    if (rows.p.debug && key < end && unsigned(pages) >= rows.p.P) __trap();
  }
  // Starts the copies of group i, if there is one.
  __device__ __forceinline__ void fetch(int i, int n) {
    if (i < n) {
      if (i % 32 == 0) find_pages(i);
      const int page = __shfl_sync(~0u, pages, i % 32), from = key(i), group = from / kGroup;
      const int in = group - setup.page_of(group) * (int(rows.p.Z) / kGroup);
      source.copy(stage(next), page, in, rows, end - from);
    }
    ptx::copies_commit();
    next = next == S::kStages - 1 ? 0 : next + 1;
  }
};

// What a source says of a query row: the factor of its products, what is added to its scores, and
// the factor of the sum of its numbers.
struct RowNumbers {
  float scale, bias, unit;
};

// Rows of a group: query -> fragments in shared memory.
template <class S>
__device__ inline void load_queries(const S& source, const Room<S>& room, const Rows& rows,
                                    int row0, int count, int warp) {
  const int lane = threadIdx.x % 32;
  const int D = int(rows.p.D);
  for (int r = warp; r < Room<S>::kRows; r += kWarps) {
    uint16_t* to = reinterpret_cast<uint16_t*>(room.rows + r * Room<S>::kRow);
    if (r >= count) {
#pragma unroll
      for (int i = 0; i < S::kD / 32; ++i) to[lane + 32 * i] = 0;
      if (lane == 0) room.scale[r] = room.sum[r] = room.bias[r] = 0.f;
      continue;
    }
    float x[S::kD / 32];
    const int64_t from =
        (rows.first + rows.token(row0 + r)) * rows.p.q_token + rows.head(row0 + r) * rows.p.q_head;
#pragma unroll
    for (int i = 0; i < S::kD / 32; ++i) {
      const int d = lane + 32 * i;
      x[i] = d < D ? load_float(rows.p.q, from + d, rows.p.dtype) : 0.f;
    }
    const RowNumbers n = source.query(room.ring, rows, warp, x);
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < S::kD / 32; ++i) {
      const uint32_t bits = pack2(x[i], 0.f, S::kType);
      to[lane + 32 * i] = uint16_t(bits);
      sum += S::kType == DType::kF16 ? half_bits(bits & 0xffff) : 0.f;
    }
#pragma unroll
    for (int by = 1; by < 32; by *= 2) sum += __shfl_xor_sync(~0u, sum, by);
    if (lane == 0) {
      room.scale[r] = n.scale;
      room.sum[r] = sum * n.unit;
      room.bias[r] = n.bias;
    }
  }
}

// Fragment order; channels past D are zero.
template <class S>
__device__ inline void order_queries(const S& source, const Room<S>& room) {
  const int total = S::kD / 16 * S::kTiles * 32, D = int(source.p.D);
  for (int i = threadIdx.x % kThreads; i < total; i += kThreads) {
    const int lane = i % 32, n = i / 32 % S::kTiles, k = i / 32 / S::kTiles;
    const auto* row =
        reinterpret_cast<const uint16_t*>(room.rows + (n * 8 + lane / 4) * Room<S>::kRow);
    uint32_t v[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int d = source.channel_of(k, lane % 4, e);
      v[e] = d < D ? row[d] : 0;
    }
    room.q[i] = make_uint2(v[0] | v[1] << 16, v[2] | v[3] << 16);
  }
}

// Totals of all warps -> room.totals(1), as if one warp had seen all keys; sums -> row numbers.
template <class S>
__device__ inline void join_warps(const S& source, const Room<S>& room, State<S>& st, int warp,
                                  int barrier) {
  constexpr int kRows = Room<S>::kRows, kStride = S::kD + 4;
  const Lane at;
#pragma unroll
  for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int by = 4; by < 32; by *= 2) {
        st.total[n][e] += __shfl_xor_sync(~0u, st.total[n][e], by);
        st.lost[n][e] += __shfl_xor_sync(~0u, st.lost[n][e], by);
      }
      const int i = warp * kRows + n * 8 + 2 * at.c + e;
      if (at.r == 0) {
        room.most[i] = st.most[n][e];
        room.total[i] = st.total[n][e];
        room.lost[i] = st.lost[n][e];
      }
    }
  ptx::named_barrier(barrier, kThreads);
#pragma unroll
  for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = n * 8 + 2 * at.c + e;
      float top = -kInf;
      for (int w = 0; w < kWarps; ++w) top = fmaxf(top, room.most[w * kRows + row]);
      const float keep = top == -kInf ? 1.f : ptx::exp2_fast(st.most[n][e] - top);
#pragma unroll
      for (int m = 0; m < State<S>::kM; ++m) {
        st.o[m][n][e] *= keep;
        st.o[m][n][2 + e] *= keep;
      }
    }
  // 2 and 3 -> 0 and 1, then 1 -> 0, always in this order
  for (int round = 2; round >= 0; --round) {
    const bool writes = round > 0 ? warp / round == 1 && warp < 2 * round : warp == 0;
    const bool adds = round > 0 && warp < round;
    float* to = room.totals(round > 0 ? warp % round : 1);
#pragma unroll
    for (int pass = 0; pass < 2; ++pass) {
      if (pass == 0 ? writes : adds)
#pragma unroll
        for (int m = 0; m < State<S>::kM; ++m)
#pragma unroll
          for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int channel = source.channel_out(m, i / 2, at.r);
              if (channel >= S::kD) continue;
              float* cell = to + (n * 8 + 2 * at.c + i % 2) * kStride + channel;
              if (pass == 0)
                *cell = st.o[m][n][i];
              else
                st.o[m][n][i] += *cell;
            }
      ptx::named_barrier(barrier, kThreads);
    }
  }
}

// Totals -> the result, or a partial result with its log of the sum.
template <class S>
__device__ inline void finish(const S& source, const Room<S>& room, const Rows& rows, const Task& t,
                              int row0, int count, int warp) {
  constexpr int kRows = Room<S>::kRows;
  const Batch& p = rows.p;
  const int lane = threadIdx.x % 32, D = int(p.D);
  for (int r = warp; r < count; r += kWarps) {
    float m = -kInf, l = 0.f, lost = 0.f;
    for (int w = 0; w < kWarps; ++w) m = fmaxf(m, room.most[w * kRows + r]);
    for (int w = 0; w < kWarps; ++w) {
      const float share = m == -kInf ? 1.f : ptx::exp2_fast(room.most[w * kRows + r] - m);
      l += room.total[w * kRows + r] * share;
      lost += room.lost[w * kRows + r] * share;
    }
    const int row = row0 + r;
    float by = l > 0.f || l != l ? 1.f / l : 0.f;
    if (t.partial < 0 && p.sinks) {
      const float sink = p.sinks[rows.head(row)] * kLog2e, top = fmaxf(m, sink);
      const float share = m == -kInf && l == l ? 0.f : exp2f(m - top);
      l = l * share + exp2f(sink - top);
      by = share / l;
      m = top;
    }
    const float lse = l == 0.f ? -kInf : l != l ? l : (m + log2f(l)) * kLn2;
    float* o = room.totals(1) + r * (S::kD + 4);
    float x[S::kD / 32];
#pragma unroll
    for (int i = 0; i < S::kD / 32; ++i) {
      const int d = lane + 32 * i;
      x[i] = d < D ? (o[d] - lost) * by : 0.f;
    }
    source.result(room.totals(0), rows, warp, x);
    const int64_t part = rows.j * p.partial_rows + t.partial + (row - t.row0);
    if (lane == 0 && t.partial >= 0) p.partial_lse[part] = lse;
    if (lane == 0 && t.partial < 0 && p.lse) p.lse[rows.place(row)] = lse;
#pragma unroll
    for (int i = 0; i < S::kD / 32; ++i) {
      const int d = lane + 32 * i;
      if (d >= D) continue;
      if (t.partial >= 0)
        p.partial[part * D + d] = x[i];
      else
        store_float(p.out, rows.place(row) * D + d, p.dtype, x[i]);
    }
  }
}

// One task and kv head by kThreads threads, which `barrier` is for.
template <class S>
__device__ inline void run_task(const S& source, const Setup& setup, const Task& t, int64_t j,
                                char* memory, int barrier) {
  constexpr int kRows = Room<S>::kRows;
  const int warp = int(threadIdx.x) % kThreads / 32;
  const Room<S> room(memory);
  Rows rows(source.p, t, j);
  rows.row0 = 0;  // rows count from the request's first
  for (int row0 = t.row0; row0 < t.row0 + t.rows; row0 += kRows) {
    const int count = t.row0 + t.rows - row0 < kRows ? t.row0 + t.rows - row0 : kRows;
    const int seen_end = rows.end(row0 + count - 1), seen_begin = rows.begin(row0) / 16 * 16;
    const int begin = seen_begin > t.kv_begin ? seen_begin : t.kv_begin;
    Walk<S> walk{source,
                 setup,
                 rows,
                 begin,
                 seen_end,
                 warp,
                 ptx::shared_address(room.ring) + warp * S::kStages * setup.stage_bytes};
    const int n = seen_end > begin ? walk.count() : 0;
    // NOTE: factors of the queries are applied in the ring, before the first copies then
    const bool early = !source.uses_ring();
    for (int i = 0; early && i < S::kStages - 1; ++i) walk.fetch(i, n);
    load_queries(source, room, rows, row0, count, warp);
    ptx::named_barrier(barrier, kThreads);
    for (int i = 0; !early && i < S::kStages - 1; ++i) walk.fetch(i, n);
    order_queries(source, room);
    ptx::named_barrier(barrier, kThreads);
    S mine = source;
    mine.keep_queries(room.q);
    State<S> st;
    begin_state(st);
    const int all_begin = rows.begin(row0 + count - 1), all_end = rows.all_end(row0);
    for (int i = 0, at = 0; i < n; ++i) {
      ptx::copies_wait<S::kStages - 2>();
      ptx::warp_barrier();
      walk.fetch(i + S::kStages - 1, n);
      const int key = walk.key(i);
      const bool whole = key >= all_begin && key + kGroup <= all_end;
      step(mine, room, rows, st, row0, count, key, whole, walk.stage(at));
      at = at == S::kStages - 1 ? 0 : at + 1;
    }
    ptx::copies_wait<0>();
    ptx::named_barrier(barrier, kThreads);
    join_warps(source, room, st, warp, barrier);
    finish(source, room, rows, t, row0, count, warp);
    ptx::named_barrier(barrier, kThreads);
  }
}

// Item i is kv head i % J of task i / J, from the first task of the launch's part.
template <class S>
__global__ __launch_bounds__(kThreads, S::kBlocks) void attend(const typename S::Problem p,
                                                               const Setup setup) {
  extern __shared__ __align__(128) char memory[];
  if (setup.turn == Turn::kAlone) ptx::wait_for_previous_grid();
  ptx::allow_next_grid();
  const S source(p);
  const TaskRange range = task_range(p, setup.part);
  for (int64_t i = blockIdx.x; i < (range.last - range.first) * p.J; i += gridDim.x) {
    Task task;
    if (!find_task(p, range.first + i / p.J, &task)) break;
    run_task(source, setup, task, i % p.J, memory, 1);
  }
  // one block is enough to hold the end of the launch back, and the others give way
  if (setup.turn != Turn::kAlone && blockIdx.x == gridDim.x - 1) ptx::wait_for_previous_grid();
}

// --- pages of plain numbers

// What sources of numbers of kBytes share: queries in registers, and the way into a stage.
template <int kHead, int kEights, bool kExact, int kBytes>
struct Numbers {
  using Problem = Params;
  static constexpr int kD = kHead, kTiles = kEights;
  static constexpr bool kKeep = kD * kTiles < 512;  // queries stay in registers

  const Params& p;
  uint2 q[kKeep ? kD / 16 : 1][kKeep ? kTiles : 1];

  __device__ explicit Numbers(const Params& problem) : p(problem) {}
  static int stage_bytes(const Params& p) { return 2 * kGroup * int(p.D * kBytes + 16); }

  static __device__ int key(const Lane& at, int half) { return at.r + 8 * half; }
  __device__ void result(float*, const Rows&, int, float (&)[kD / 32]) const {}
  __device__ void keep_queries(const uint2* fragments) {
    if constexpr (kKeep)
      for (int k = 0; k < kD / 16; ++k)
        for (int n = 0; n < kTiles; ++n)
          q[k][n] = fragments[(k * kTiles + n) * 32 + threadIdx.x % 32];
  }

  __device__ int dim() const { return kExact ? kD : int(p.D); }
  __device__ bool uses_ring() const { return false; }

  // --- a stage: 16 keys, then 16 values, each in a row of its numbers and 16 bytes
  template <bool kWhole>
  __device__ __forceinline__ void copy_rows(uint32_t to, const char* from, int there) const {
    const int lane = threadIdx.x % 32, cols = dim() * kBytes / 16;
#pragma unroll
    for (int k = 0; k < kD * kBytes / 32; ++k) {
      const int i = lane + 32 * k, row = i / cols;
      if (!kExact && i >= kGroup * cols) break;
      if (kWhole)
        ptx::copy16(to + i * 16 + row * 16, from + i * 16);
      else
        ptx::copy16(to + i * 16 + row * 16, from + i * 16, row < there);
    }
  }
  __device__ __forceinline__ void copy(uint32_t stage, int page, int in, const Rows& rows,
                                       int there) const {
    const int64_t at = (int64_t{page} * p.J + rows.j) * 2 * p.Z + in * kGroup;
    const char* from = static_cast<const char*>(p.pages) + at * dim() * kBytes;
    const uint32_t half = kGroup * uint32_t(dim() * kBytes + 16);
    const char* values = from + p.Z * dim() * kBytes;
    if (there >= kGroup) {
      copy_rows<true>(stage, from, there);
      copy_rows<true>(stage + half, values, there);
    } else {
      copy_rows<false>(stage, from, there);
      copy_rows<false>(stage + half, values, there);
    }
  }
};

// kExact: the head dim is kHead, else less or equal. kMost: blocks a multiprocessor; three read
// faster where only some multiprocessors read.
template <DType kNumbers, int kHead, int kEights, bool kExact, int kMost = 2>
struct Plain : Numbers<kHead, kEights, kExact, 2> {
  using Base = Numbers<kHead, kEights, kExact, 2>;
  using Base::Base, Base::dim, Base::kD, Base::kKeep, Base::kTiles, Base::p, Base::q;
  static constexpr DType kType = kNumbers;
  static constexpr int kStages = kMost > 2 || kHead* kEights > 256 ? 2 : 3;
  static constexpr int kBlocks = kHead > 128 ? 1 : kMost;
  using Product = std::conditional_t<kType == DType::kBF16, ptx::Bf16Product, ptx::F16Product>;

  // --- how channels lie in fragments
  __device__ int channel_of(int k, int c, int e) const {
    return 16 * k + e / 2 * 8 + 2 * c + e % 2;
  }
  __device__ int channel_out(int m, int half, int r) const { return 16 * m + 8 * half + r; }

  __device__ RowNumbers query(char*, const Rows&, int, float (&)[kD / 32]) const {
    return {1.f, 0.f, 1.f};
  }

  __device__ __forceinline__ void score(uint32_t stage, const uint2* fragments, const Rows&, int,
                                        float (&x)[kTiles][4]) const {
    const int lane = threadIdx.x % 32;
    const uint32_t from = stage + lane % 16 * (dim() * 2 + 16) + lane / 16 * 16;
    float y[kTiles][4] = {};  // a second chain of sums
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      if (!kExact && 16 * k >= dim()) break;
      uint32_t a[4];
      ptx::load_matrices(a, from + k * 32);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const uint2 b =
            kKeep ? q[kKeep ? k : 0][kKeep ? n : 0] : fragments[(k * kTiles + n) * 32 + lane];
        Product::multiply(k % 2 && kTiles < 4 ? y[n] : x[n], a, b.x, b.y);
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] += kTiles < 4 ? y[n][i] : 0.f;
  }
  __device__ bool scale_scores(uint32_t, const Room<Plain>&, float (&x)[kTiles][4],
                               float (&)[2]) const {
    const float by = p.scale * kLog2e;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] *= by;
    return false;
  }
  __device__ void weights(uint32_t, const float (&x)[kTiles][4], float (&)[kTiles][2],
                          uint32_t (&w)[kTiles][2]) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      w[n][0] = pack2(x[n][0], x[n][1], kType);
      w[n][1] = pack2(x[n][2], x[n][3], kType);
    }
  }
  __device__ void weigh(uint32_t stage, const uint32_t (&w)[kTiles][2], int,
                        float (&o)[kD / 16][kTiles][4]) const {
    const int lane = threadIdx.x % 32;
    const uint32_t stride = dim() * 2 + 16;
    const uint32_t from = stage + (kGroup + lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 16;
#pragma unroll
    for (int m = 0; m < kD / 16; ++m) {
      if (!kExact && 16 * m >= dim()) break;
      uint32_t a[4];
      ptx::load_transposed(a, from + m * 32);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) Product::multiply(o[m][n], a, w[n][0], w[n][1]);
    }
  }
};

// --- appends

__device__ inline float load_any(const void* from, int64_t i, DType t) {
  return t == DType::kF32 ? static_cast<const float*>(from)[i] : load_float(from, i, t);
}
__device__ inline void store_any(void* to, int64_t i, DType t, float x) {
  if (t == DType::kE4M3) {  // what is too large becomes 448
    static_cast<uint8_t*>(to)[i] = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
    return;
  }
  if (t == DType::kF32)
    static_cast<float*>(to)[i] = x;
  else
    store_float(to, i, t, x);
}

// Channel d of the key at element `from` of k, rotated: every product and sum rounded by itself.
__device__ inline float rotated(const AppendParams& p, int64_t from, int64_t t, int d, int half) {
  const float x = load_any(p.k, from + d, p.dtype);
  if (d >= 2 * half) return x;
  const int i = d < half ? d : d - half;
  const float cos = p.cos[t * half + i], sin = p.sin[t * half + i];
  const float y = load_any(p.k, from + (d < half ? d + half : i), p.dtype);
  const float turned = __fmul_rn(y, sin);
  return d < half ? __fsub_rn(__fmul_rn(x, cos), turned) : __fadd_rn(__fmul_rn(x, cos), turned);
}

// --- launches

// How many rows at a time suit this batch: 8, 16 or 32.
inline int rows_at_once(const Batch& p, Part part) {
  const int64_t G = p.H / p.J;
  const int64_t rows = part == Part::kSmall ? G : ceil_div(p.T, p.B > 0 ? p.B : 1) * G;
  return rows <= 8 ? 8 : rows <= 16 ? 16 : 32;
}

// Thread blocks for the tasks of a batch: the hardware hands them out in order, longest first;
// beyond `most` they loop.
inline unsigned blocks_of(const Batch& p, int64_t most) {
  const int64_t rows = p.T * (p.H / p.J);
  const int64_t tasks = p.plan.words != nullptr
                            ? (p.plan_words - kHeaderWords) / kTaskWords
                            : (rows / p.uniform.tile + (p.B < p.T ? p.B : p.T)) * p.uniform.parts;
  return unsigned(tasks * p.J < most ? tasks * p.J : most);
}

template <class S>
int launch(const typename S::Problem& p, Part part, int stage_bytes, int sms, bool programmatic,
           cudaStream_t stream, Turn turn = Turn::kAlone) {
  const int bytes = Room<S>::bytes(stage_bytes);
  auto* kernel = &attend<S>;
  const cudaError_t error = cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return int(error);
  const uint64_t zg = uint64_t(p.Z / 16), whole = uint64_t{1} << 32;
  const Setup setup{part, turn, stage_bytes, zg == 1 ? 0 : uint32_t((whole + zg - 1) / zg)};
  const unsigned blocks = blocks_of(p, int64_t{sms} * S::kBlocks * 4);
  const cuda::Launch l{dim3(blocks), unsigned(kThreads), size_t(bytes), 1, programmatic, stream};
  return blocks > 0 ? cuda::launch(l, kernel, p, setup) : 0;
}

// The merge of split keys (msm/cuda.cu), after the launches above.
int launch_merge(const Batch& p, bool programmatic, cudaStream_t stream);

}  // namespace tessella::msm::dev
