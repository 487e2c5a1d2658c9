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
#include "msm/sm90_feed.cuh"

namespace tessella::msm::sm90 {

using dev::kLog2e;

// softcap tanh(y), of 2 log2(e) y: tanh(y) = 1 - 2 / (1 + exp(2 y)).
__device__ __forceinline__ float capped(float y, float softcap) {
  return softcap * (1.f - __fdividef(2.f, 1.f + ptx::exp2_fast(y)));
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
      ptx::barrier_arrive(s.work_empty(tasks.stage));
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
  if (a.turn != Turn::kAfter) ptx::wait_for_previous_grid();
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
  if (a.turn == Turn::kAfter) ptx::wait_for_previous_grid();
}

}  // namespace tessella::msm::sm90
