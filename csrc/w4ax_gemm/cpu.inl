// Body of w4ax_gemm, compiled once per instruction set (cpu/foreach_isa.h).
//
// A task is one panel of 64 out features x at most 256 tokens. It walks the panel's weight stream
// once, block of 128 channels by block. Where it does so byte after byte, the core's prefetchers
// follow, and do it better than instructions would (README.md). In a block, register tiles of kRows
// tokens x kVecs vectors of features sum q * c in int32 and then add to the task's totals, which
// stay in L1:
//   - int32 totals where one integer sum runs over all of K (channel, two-level), else fp32;
//   - zero points enter as the accumulators' start value, -z * (sum of the codes), or at the end.
// Every tile does the same sums in the same order, so a token's result depends neither on the tile
// nor on the other tokens nor on the threads.

namespace gemm {

using layout::W4Panel;
using w4ax_gemm::kMostChunkRows;
using w4ax_gemm::Params;

constexpr int kPanel = W4Panel::kN, kBlock = W4Panel::kBlockK;
constexpr int kScales = W4Panel::kCodeBytes;  // where a block's scale rows start
constexpr int kPrefetchBytes = 4096;          // one block ahead

// What a task keeps between blocks.
struct Task {
  // i: of the plan's tasks; m: its first token of its group. Arrays stay unset.
  Task(const Params& params, int64_t i, int64_t m, int64_t tokens, int64_t most)
      : p(params),
        panel(p.groups.first + i / p.groups.panels * p.groups.step + i % p.groups.panels),
        m0(i / p.groups.panels * tokens + m),
        rows(tokens - m < most ? tokens - m : most),
        at(m * p.columns + i * kPanel) {}

  const Params& p;
  int64_t panel, m0, rows, at;  // at: of its first result, in out
  const int groups = p.panel.scheme == Scheme::kGroup ? p.panel.rows() : 1;  // of a block
  const uint8_t* zeros = nullptr;                     // channel scheme: z [64]
  alignas(64) float totals[kMostChunkRows * kPanel];  // int32 or fp32, see Mode
  alignas(64) uint8_t bytes[kPanel * kBlock];         // wide: decoded block [k/4][n][4]
};

// How a block's integer sums become totals; all compile-time.
template <Scheme kS, bool kBlockScales, bool kDecoded>
struct Mode {
  static constexpr Scheme kScheme = kS;
  static constexpr bool kPerBlock = kBlockScales;  // activation scales per block
  static constexpr bool kWide = kDecoded;          // weights come from Task::bytes
  // two-level with its bytes q * s1 + a already formed, else s1 and a are applied to the sums
  static constexpr bool kFormed = kS == Scheme::kTwoLevel && kDecoded && kWideBytes;
  // Where every sum has zero points to take off: decoded bytes are q - z + 16, so that one start
  // value, -16 * (sum of the codes), serves all features.
  static constexpr bool kShifted =
      kDecoded && kWideBytes && (kS == Scheme::kGroup || (kS == Scheme::kChannel && kBlockScales));
  static constexpr bool kFloatTotals = kS == Scheme::kGroup || kBlockScales;
  // Zero points: where accumulators start, or subtracted from their sums. A group's lie behind its
  // codes, so whoever reads from memory takes them last.
  static constexpr bool kZeroFirst =
      !kShifted && ((kS == Scheme::kGroup && kDecoded) || (kS == Scheme::kChannel && kBlockScales));
  static constexpr bool kZeroLast = kS == Scheme::kGroup && !kDecoded;
};

// One register tile's view of a block.
struct Tile {
  const uint8_t* w;      // direct: the block's codes at the tile's first feature; wide: bytes
  const int8_t* x;       // codes of the tile's first token, rows 128 apart
  const int32_t* sums;   // of the tile's first token, group g at g * M
  const float* scales;   // per block: scale of the tile's first token
  const uint8_t* block;  // the block's start, for its scale and zero rows
  const uint8_t* zeros;  // channel scheme
  int groups;            // of the block
  int n;                 // first feature in the panel
  float* totals;         // of the tile's first token and feature, rows 64 apart
};

// 32 channels: kRows x kVecs dot products.
template <class M, int kRows, int kVecs>
inline void dot_32(const uint8_t* w, const int8_t* x_rows, VI (&acc)[kRows][kVecs]) {
  Dot d[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) dot_begin(d[r][v], acc[r][v]);
#pragma GCC unroll 8
  for (int k = 0; k < 32; k += 4) {  // one nibble half of a step at a time: fewer live vectors
    VI q[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      if constexpr (M::kWide) {
        q[v] = load_i(w + k / 4 * (kPanel * 4) + v * kLanes * 4);
      } else {
        const uint8_t* at = w + k / 8 * W4Panel::kStepBytes + v * kLanes * 4;
        if constexpr (kVecs * kLanes < kPanel)  // reads with gaps, which prefetchers do not follow
          if (k % 8 == 0 && v * kLanes * 4 % 64 == 0) prefetch(at + kPrefetchBytes);
        q[v] = k % 8 == 0 ? low_nibbles(load_i(at)) : high_nibbles(load_i(at));
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const VI x = codes4(x_rows + r * kBlock + k);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) dot(d[r][v], q[v], x);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[r][v] = dot_end(d[r][v]);
}

// Adds group g's sums to the totals.
template <class M, int kRows, int kVecs>
inline void flush(const Params& p, const Tile& t, int g, [[maybe_unused]] const uint8_t* zeros,
                  const VI (&acc)[kRows][kVecs]) {
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) {
    const int n = t.n + v * kLanes;
    [[maybe_unused]] VF s = zero_f();
    [[maybe_unused]] VI s1 = zero_i(), a = zero_i(), z = zero_i();
    if constexpr (M::kZeroLast) z = load_u8(zeros + n);
    if constexpr (M::kScheme == Scheme::kGroup)
      s = load_x(reinterpret_cast<const F16*>(t.block + kScales) + g * kPanel + n);
    if constexpr (M::kScheme == Scheme::kTwoLevel && !M::kFormed) {
      s1 = load_u8(t.block + kScales + n);
      a = load_u8(t.block + kScales + kPanel + n);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      VI sum = acc[r][v];
      if constexpr (M::kZeroLast) sum = sub(sum, mul16(z, set1_i(t.sums[g * p.M + r])));
      if constexpr (M::kScheme == Scheme::kTwoLevel && !M::kFormed) {
        const int32_t codes = t.sums[g * p.M + r];
        sum = add(mul(s1, sum), mul16(a, set1_i(codes)));
        if constexpr (M::kPerBlock) sum = sub(sum, set1_i(codes * 128));
      }
      float* total = t.totals + r * kPanel + v * kLanes;
      if constexpr (!M::kFloatTotals) {
        store_i(total, add(load_i(total), sum));
      } else {
        VF f = to_f(sum), by = s;
        if constexpr (M::kPerBlock) {
          by = set1_f(t.scales[r]);
          if constexpr (M::kScheme == Scheme::kGroup) f = mul(f, s);
        }
        store_f(total, fma(f, by, load_f(total)));
      }
    }
  }
}

// Group g of `size` channels; zeros: the group's row.
template <class M, int kRows, int kVecs>
__attribute__((always_inline)) inline void group(const Params& p, const Tile& t, int g, int size,
                                                 const uint8_t* zeros) {
  VI acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) {
    [[maybe_unused]] VI z = zero_i();
    if constexpr (M::kZeroFirst) z = load_u8(zeros + t.n + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      acc[r][v] = zero_i();
      if constexpr (M::kZeroFirst) acc[r][v] = mul16(z, set1_i(-t.sums[g * p.M + r]));
      if constexpr (M::kShifted) acc[r][v] = set1_i(-16 * t.sums[g * p.M + r]);
      if constexpr (M::kFormed && M::kPerBlock) acc[r][v] = set1_i(-128 * t.sums[r]);
    }
  }
  for (int k = g * size; k < (g + 1) * size; k += 32)
    dot_32<M, kRows, kVecs>(t.w + k * (M::kWide ? kPanel : kPanel / 2), t.x + k, acc);
  flush<M, kRows, kVecs>(p, t, g, zeros, acc);
}

template <class M, int kRows, int kVecs>
__attribute__((noinline)) void tile(const Params& p, const Tile& view) {
  const Tile t = view;  // a copy, which stores of totals cannot change: no reloads between them
  if constexpr (M::kScheme == Scheme::kGroup) {
    const uint8_t* zeros = t.block + kScales + t.groups * kPanel * 2;
    if (t.groups == 1) {  // its own code: numbers that the compiler knows
      group<M, kRows, kVecs>(p, t, 0, kBlock, t.block + kScales + kPanel * 2);
    } else {
      for (int g = 0; g < t.groups; ++g)
        group<M, kRows, kVecs>(p, t, g, kBlock / t.groups, zeros + g * kPanel);
    }
  } else {
    group<M, kRows, kVecs>(p, t, 0, kBlock, t.zeros);
  }
}

// Decodes a block into Task::bytes.
template <class M>
inline void decode(const Task& t, const uint8_t* block, uint8_t* out) {
  const W4Panel& panel = t.p.panel;
  const int groups = t.groups;
  constexpr int kVecs = kPanel / kLanes < 4 ? kPanel / kLanes : 4;
  const int steps = kBlock / W4Panel::kStepK / groups;
  for (int n = 0; n < kPanel; n += kVecs * kLanes) {
    [[maybe_unused]] Widen w[kVecs];
    if constexpr (M::kFormed)
      for (int v = 0; v < kVecs; ++v)
        w[v] = widen_scales(block + panel.scale_row(0) + n + v * kLanes,
                            block + panel.zero_row(0) + n + v * kLanes);
    for (int g = 0; g < groups; ++g) {
      [[maybe_unused]] VI shift[kVecs];  // 16 - z in each of a feature's bytes: 1..16, no borrows
      if constexpr (M::kShifted) {
        const uint8_t* zeros = M::kScheme == Scheme::kChannel ? t.zeros : block + panel.zero_row(g);
        for (int v = 0; v < kVecs; ++v)
          shift[v] =
              sub(set1_i(0x10101010), mul(load_u8(zeros + n + v * kLanes), set1_i(0x01010101)));
      }
      for (int step = g * steps; step < (g + 1) * steps; ++step)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          const int at = step * W4Panel::kStepBytes + (n + v * kLanes) * 4;
          const VI both = load_i(block + at);
          VI lo = low_nibbles(both), hi = high_nibbles(both);
          if constexpr (M::kFormed) {
            lo = widen(lo, w[v]);
            hi = widen(hi, w[v]);
          }
          if constexpr (M::kShifted) {
            lo = add(lo, shift[v]);
            hi = add(hi, shift[v]);
          }
          uint8_t* to = out + step * 2 * (kPanel * 4) + (n + v * kLanes) * 4;
          store_i(to, lo);
          store_i(to + kPanel * 4, hi);
        }
    }
  }
}

// One block for all of the task's tokens: exact cover by the row counts of the tile, largest first.
template <class M, int kVecs, int... kRows>
inline void block_rows(Task& t, int64_t b) {
  const Params& p = t.p;
  const uint8_t* block = p.w + p.panel.block(t.panel, b);
  if constexpr (M::kWide) decode<M>(t, block, t.bytes);
  const uint8_t* next = block;
  int64_t r = 0;
  auto rows = [&](auto count) {
    constexpr int kR = decltype(count)::value;
    for (; r + kR <= t.rows; r += kR) {
      if constexpr (M::kWide) {  // between two decodes prefetchers lose the track
        const uint8_t* until = block + p.panel.block_bytes() * (r + kR) / t.rows;
        for (; next < until; next += 64) prefetch(next + p.panel.block_bytes());
      }
      for (int n = 0; n < kPanel; n += kVecs * kLanes) {
        const uint8_t* w = M::kWide ? t.bytes : block;
        const int64_t m = t.m0 + r;
        const float* scales = M::kPerBlock ? p.scales + b * p.M + m : nullptr;
        const Tile view{w + n * 4,
                        p.x(b) + m * kBlock,
                        p.sums + b * t.groups * p.M + m,
                        scales,
                        block,
                        t.zeros,
                        t.groups,
                        n,
                        t.totals + r * kPanel + n};
        tile<M, kR, kVecs>(p, view);
      }
    }
  };
  (rows(Const<kRows>{}), ...);
}

// Sums over blocks b0..b1-1 of the codes of kLanes tokens, of which `rows` exist. Together, since
// each of a token's sums lies in a cache line of its own.
inline void sum_codes(const Params& p, int64_t b0, int64_t b1, int64_t m, int64_t rows,
                      int32_t* to) {
  if (rows >= kLanes) {
    VI sum = zero_i();
    for (int64_t b = b0; b < b1; ++b) sum = add(sum, load_i(p.sums + b * p.M + m));
    store_i(to, sum);
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      to[r] = 0;
      for (int64_t b = b0; b < b1; ++b) to[r] += p.sums[b * p.M + m + r];
    }
  }
}

// Totals of blocks b0..b1-1 -> y, times the activation scale; y is added to unless `first`.
template <class M>
inline void close_segment(Task& t, int64_t b0, int64_t b1, const float* scales, bool first,
                          float* y) {
  const Params& p = t.p;
  alignas(64) int32_t codes[kLanes] = {};
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t m = t.m0 + r;
    if constexpr (!M::kFloatTotals)
      if (r % kLanes == 0) sum_codes(p, b0, b1, m, t.rows - r, codes);
    for (int n = 0; n < kPanel; n += kLanes) {
      float* total = t.totals + r * kPanel + n;
      VF f;
      if constexpr (M::kFloatTotals) {
        f = load_f(total);
      } else {
        const VI z = M::kScheme == Scheme::kChannel ? load_u8(t.zeros + n) : set1_i(128);
        f = to_f(sub(load_i(total), mul(z, set1_i(codes[r % kLanes]))));
      }
      if constexpr (!M::kPerBlock) f = mul(f, set1_f(scales[m]));
      float* to = y + r * kPanel + n;
      store_f(to, first ? f : add(load_f(to), f));
    }
  }
}

// y [rows][64] -> out: times the channel scale, plus the bias.
template <class T, class M>
inline void store(const Task& t, const float* y) {
  const Params& p = t.p;
  const int64_t n0 = t.panel * kPanel, valid = p.panel.N - n0 < kPanel ? p.panel.N - n0 : kPanel;
  alignas(64) float scale[kPanel], bias[kPanel], row[kPanel];
  for (int n = 0; n < kPanel; ++n) {
    scale[n] = 1.f;
    bias[n] = p.bias && n < valid ? to_float(static_cast<const T*>(p.bias)[n0 + n]) : 0.f;
  }
  if constexpr (M::kScheme != Scheme::kGroup)
    __builtin_memcpy(scale, p.w + p.panel.channel_scale(n0), sizeof(scale));
  for (int64_t r = 0; r < t.rows; ++r) {
    T* to = static_cast<T*>(p.out) + t.at + r * p.columns;
    for (int n = 0; n < kPanel; n += kLanes) {
      const VF f = fma(load_f(y + r * kPanel + n), load_f(scale + n), load_f(bias + n));
      if (n + kLanes <= valid)
        store_x(to + n, f);
      else
        store_f(row + n, f);
    }
    for (int64_t n = valid / kLanes * kLanes; n < valid; ++n) to[n] = from_float<T>(row[n]);
  }
}

template <class M, int kVecs, int... kRows>
inline void run_task(Task& t) {
  const Params& p = t.p;
  const int64_t B = p.panel.blocks(), B8 = p.K8 / kBlock;
  const bool classes = p.granularity == Granularity::kClass;
  alignas(64) float y[kMostChunkRows * kPanel];
  bool first = true;
  for (int c = 0; c < 2; ++c) {  // a class is a run of blocks under one activation scale
    const int64_t b0 = classes && c == 1 ? B8 : 0, b1 = classes && c == 0 ? B8 : B;
    if (b0 == b1 || (!classes && c == 1)) continue;
    __builtin_memset(t.totals, 0, size_t(t.rows) * kPanel * sizeof(float));
    for (int64_t b = b0; b < b1; ++b) block_rows<M, kVecs, kRows...>(t, b);
    close_segment<M>(t, b0, b1, p.scales + c * p.M, first, y);
    first = false;
  }
  if (p.dtype == DType::kBF16) store<BF16, M>(t, y);
  if (p.dtype == DType::kF16) store<F16, M>(t, y);
  if (p.dtype == DType::kF32) store<float, M>(t, y);
}

template <bool kDecoded, int kVecs, int... kRows>
inline void run_tasks(const Params& p, int64_t chunk_rows, int64_t begin, int64_t end) {
  const int64_t tokens = p.M / p.groups.count, panels = p.groups.count * p.groups.panels;
  const bool per_block = p.granularity == Granularity::kBlock;
  for (int64_t i = begin; i < end; ++i) {
    // all panels for one chunk of tokens, whose codes then stay in L2, before the next chunk
    Task t(p, i % panels, i / panels * chunk_rows, tokens, chunk_rows);
    auto run = [&](auto scheme, auto blocks) {
      run_task<Mode<decltype(scheme)::value, decltype(blocks)::value, kDecoded>, kVecs, kRows...>(
          t);
    };
    auto with = [&](auto scheme) {
      per_block ? run(scheme, Const<true>{}) : run(scheme, Const<false>{});
    };
    if (p.panel.scheme == Scheme::kChannel) {
      t.zeros = p.w + p.panel.channel_zero(t.panel * kPanel);
      with(Const<Scheme::kChannel>{});
    } else if (p.panel.scheme == Scheme::kGroup) {
      with(Const<Scheme::kGroup>{});
    } else {
      with(Const<Scheme::kTwoLevel>{});
    }
  }
}

}  // namespace gemm

// Register tiles: vectors of features, then row counts. 32 zmm or 16 ymm registers hold the
// accumulators (AVX2: two each), the decoded weights and one broadcast. The wide tile of zmm is
// small: with 12 sums to add to its totals, the next tile's products hide that; with 24 they do
// not.
inline void w4ax_gemm_gemv(const w4ax_gemm::Params& p, int64_t chunk, int64_t i0, int64_t i1) {
  if constexpr (kLanes == 16)
    gemm::run_tasks<false, 4, 6, 5, 4, 3, 2, 1>(p, chunk, i0, i1);
  else if (kLanes == 8 && chunk == 1)
    gemm::run_tasks<false, 4, 1>(p, chunk, i0, i1);  // as many bytes in a row as registers allow
  else
    gemm::run_tasks<false, 2, 2, 1>(p, chunk, i0, i1);
}
inline void w4ax_gemm_skinny(const w4ax_gemm::Params& p, int64_t chunk, int64_t i0, int64_t i1) {
  if constexpr (kLanes == 16)
    gemm::run_tasks<false, 2, 12, 8, 4, 2, 1>(p, chunk, i0, i1);
  else
    gemm::run_tasks<false, 1, 4, 2, 1>(p, chunk, i0, i1);
}
inline void w4ax_gemm_wide(const w4ax_gemm::Params& p, int64_t chunk, int64_t i0, int64_t i1) {
  if constexpr (kLanes == 16)
    gemm::run_tasks<true, 2, 6, 4, 2, 1>(p, chunk, i0, i1);
  else
    gemm::run_tasks<true, 2, 4, 2, 1>(p, chunk, i0, i1);
}
