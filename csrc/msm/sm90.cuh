// msm on Hopper: tiles of up to 128 packed rows against 16-bit pages, on wgmma.
//
// A thread block is three warpgroups. Two multiply, 64 rows each; the first feeds them: one warp
// brings keys and values by the copy engine, a box for each page or part of one, and one takes
// tasks from a counter and gathers the queries. Shared memory holds every operand in atoms of 8
// rows under the widest swizzle that divides a head: [rows/8][D/E][8][E], so that a box of any
// number of rows is one piece and lies as its neighbours do.
//
// A math warpgroup multiplies block n's queries and keys while it still has to multiply block
// n+1's probabilities and values, and computes the softmax of the one during the products of the
// other; a pair of named barriers has the two warpgroups take turns, so that one's softmax runs
// during the other's products (FlashAttention-3, NeurIPS 2024, sections 3.1 and 3.2). Blocks go
// from the last visible key to the first, hence masks come first, and only where a block is cut.
#pragma once
#include "cuda/wgmma16.cuh"
#include "msm/sm90_feed.cuh"

namespace tessella::msm::sm90 {

template <class T>
struct Math {
  using Scores = float[T::kScores];
  using Sums = float[T::kSums];
  using Probabilities = uint32_t[T::kKeys / 4];

  const Args& a;
  const Shared<T>& s;
  const int group = threadIdx.x / 128 - 1, thread = threadIdx.x % 128, lane = threadIdx.x % 32;
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
  __device__ void await_turn() const { ptx::named_barrier(1 + group, 256); }
  __device__ void give_turn() const { ptx::named_barrier_arrive(2 - group, 256); }
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
    const int G = int(a.H / a.J), key0 = w.key0 + n * T::kKeys;
    const bool tree = w.mask == int(Mask::kTree) && key0 + T::kKeys > w.hist;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(group * 64 + r + 8 * h, w.rows - 1), token = (w.row0 + row) / G;
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
      const int first = w.hist - key0 - 2 * c;
#pragma unroll
      for (int i = 0; i < T::kKeys / 4; ++i) {
        const int at = i / 2 * 8 + i % 2;
        float& y = x[i / 2 * 4 + 2 * h + i % 2];
        if (at >= first && at < hi && !(bits[(at - first) / 64] >> (at - first) % 64 & 1))
          y = -INFINITY;
      }
    }
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
    const int G = int(a.H / a.J);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = group * 64 + r + 8 * h, packed = w.row0 + row;
      const bool there = row < w.rows;
      const int head = w.head * G + packed % G;
      const int64_t at = (int64_t{w.token0} + packed / G) * a.H + head;
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
    if (group == 1) give_turn();
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
__global__ __launch_bounds__(kThreads, 1) void attend(const __grid_constant__ CUtensorMap map,
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
    ptx::fewer_registers<40>();
    if (warp == 0) load_pages<T, 0>(a, s, &map);
    if (warp == 1) schedule<T>(a, s);
    if (warp == 2) load_pages<T, 1>(a, s, &map);
  } else {
    ptx::more_registers<232>();
    Math<T>{a, s}.run();
  }
}

}  // namespace tessella::msm::sm90
