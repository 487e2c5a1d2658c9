// Body of mla, compiled once per instruction set; masks, softmax state and results are those of
// msm.
//
// Latents are brought into two orders, once for all heads of a token (and all tokens of a tile), in
// one read of the page. For the scores: channels along the depth, a few keys at a time, which are
// multiplied at once while they are in L1. For the totals: keys along the depth, a whole block,
// in panels of 64 channels, so that a product walks memory in order.
//
// "codes": queries and probabilities become INT8 and both products are dot products of bytes;
// "tile", "bf16": codes are brought to fp32 or bf16, in which they are exact. In either case the
// scales of the tokens multiply scores and probabilities, never latents.
#include "msm/cpu.inl"

namespace latent {

using attn::kInf;
using attn::kMostRows;
using attn::Product;
using attn::Rows;
using attn::State;
using layout::MlaPage;
using mla::Params;
using msm::Task;

constexpr int kPanel = 64;                        // columns that lie together
constexpr int kPlainKeys = 128;                   // of a block of plain numbers
constexpr int kCodeKeys = 256;                    // of a block of codes
constexpr int kGroupRows = kLanes == 16 ? 6 : 4;  // multiplied at a time, at most
constexpr int kFetchSteps = 8;                    // steps along the depth between two fetches

inline const F16* halves(const uint8_t* p) { return reinterpret_cast<const F16*>(p); }

// n plain numbers of any dtype, or INT8 codes, -> E.
template <class E>
inline void numbers(const uint8_t* from, int bits, DType dtype, int64_t n, E* to) {
  for (int64_t d = 0; d < n; d += kLanes) {
    VF x = zero_f();
    if (bits == 8) {
      x = load_i8(reinterpret_cast<const int8_t*>(from) + d);
    } else {
      if (dtype == DType::kBF16) x = load_x(reinterpret_cast<const BF16*>(from) + d);
      if (dtype == DType::kF16) x = load_x(reinterpret_cast<const F16*>(from) + d);
      if (dtype == DType::kF32) x = load_x(reinterpret_cast<const float*>(from) + d);
    }
    store_x(to + d, x);
  }
}

// 4-bit codes of a row -> E, without their bias.
template <class E>
inline void nibbles(const uint8_t* from, int64_t n, E* to) {
  uint8_t bytes[kPanel];
  for (int64_t d = 0; d < n; d += kPanel) {
    split_nibbles(from + d / 2, bytes);
    for (int i = 0; i < kPanel; i += kLanes)
      store_x(to + d + i, add(load_i8(reinterpret_cast<const int8_t*>(bytes) + i), set1_f(-8.f)));
  }
}

// The same for what the page stores as E already, which stays where it is.
template <class E>
inline bool stored_as([[maybe_unused]] int bits, [[maybe_unused]] DType dtype) {
  if constexpr (sizeof(E) == 4)
    return bits == 32;
  else
    return bits == 16 && dtype == DType::kBF16;
}

// The pages of the next block, fetched into L2 a few lines at a time while this one is multiplied.
class Fetch {
 public:
  // n keys from key0, over `calls` calls of some().
  void begin(const Params& p, const Task& t, int64_t key0, int n, int calls) {
    count_ = at_ = 0;
    int64_t lines = 0;
    for (int c = 0; c < n; c += 16) {
      const uint8_t* blob = p.blob(t.request, key0 + c);
      const int64_t row = (key0 + c) % p.Z;
      lines += add(blob + p.page.latent(row, 0).byte, 16 * p.page.latent_row());
      lines += add(blob + p.page.rope_at(row, 0), 16 * p.page.rope_row());
      if (p.page.scaled()) lines += add(blob + p.page.scale(row), 32);
    }
    per_call_ = int(ceil_div(lines, calls));
  }
  void some() {
    for (int left = per_call_; left > 0 && at_ < count_; --left) {
      Run& run = runs_[at_];
      prefetch_l2(run.next);
      run.next += 64;
      if (run.next >= run.end) ++at_;
    }
  }

 private:
  struct Run {
    const uint8_t *next, *end;
  };
  int64_t add(const uint8_t* at, int64_t bytes) {
    if (bytes == 0) return 0;
    runs_[count_++] = {at, at + bytes};
    return ceil_div(bytes, 64);
  }

  Run runs_[3 * kCodeKeys / 16];
  int count_ = 0, at_ = 0, per_call_ = 0;
};

// What a task needs whatever it multiplies. Arrays end at a multiple of 16 keys.
struct Shared {
  const Params& p;
  const Rows rows;
  State st;
  Fetch fetch;
  float scale[kCodeKeys], weight[kCodeKeys];  // of the latents: for scores, and for probabilities
  float rope_scale[kCodeKeys];

  Shared(const Params& params, const Task& t) : p(params), rows(params, t, 0) { st.begin(t.rows); }

  // Scales of n keys, 0 past them. A NaN spoils scores, and so what sees it; as a weight it is 0,
  // so that what does not see it stays whole.
  void load_scales(int64_t key0, int n) {
    for (int c = 0; c < n; c += 16) {
      const uint8_t* blob = p.blob(rows.t.request, key0 + c);
      const int64_t t = (key0 + c) % p.Z;
      for (int i = 0; i < 16; i += kLanes) {
        store_f(scale + c + i,
                p.page.scaled() ? load_x(halves(blob + p.page.scale(t)) + i) : one());
        store_f(rope_scale + c + i,
                p.page.rope_scaled() ? load_x(halves(blob + p.page.rope_scale(t)) + i) : one());
      }
    }
    for (int c = n; c < int(round_up(n, 16)); ++c) scale[c] = rope_scale[c] = 0.f;
    for (int c = 0; c < int(round_up(n, 16)); ++c)
      weight[c] = scale[c] == scale[c] ? scale[c] : 0.f;
  }
  static VF one() { return set1_f(1.f); }

  // Keys of the block at key0, of at most `most`; the next one's pages are fetched from now on.
  // Each row of the tile takes part in `steps` steps of the products, kFetchSteps to a fetch.
  int begin_block(int64_t key0, int most, int64_t steps) {
    const int64_t left = rows.t.kv_end - key0;
    if (left > most) {
      const int64_t after = left - most, groups = ceil_div(rows.t.rows, kGroupRows);
      fetch.begin(p, rows.t, key0 + most, int(after < most ? after : most),
                  int(groups * steps / kFetchSteps));
    }
    return int(left < most ? left : most);
  }

  void load_rope_query(int r, float* to) const {
    attn::load_row(p.q_rope,
                   (rows.first + rows.token(r)) * p.rope_token + rows.head(r) * p.rope_head,
                   p.dtype, p.page.R, to);
  }

  // s = by * scale * s + rope_scale * rope, over some columns of a row from key `key` of the block.
  void add_rope(float* s, const float* rope, float by, int key, int columns) const {
    const VF q = set1_f(by);
    for (int c = 0; c < columns; c += kLanes) {
      VF x = mul(mul(load_f(s + c), q), load_f(scale + key + c));
      if (rope) x = fma(load_f(rope + c), load_f(rope_scale + key + c), x);
      store_f(s + c, x);
    }
  }

  // Scores of row r of the tile -> probabilities; false where it has seen nothing, or NaN.
  template <bool kExact>
  bool softmax(int r, int64_t key0, int n, float* s) {
    const int columns = int(round_up(n, 16));
    const float most = attn::make_scores(rows, r, key0, n, s, p.scale, 0.f);
    if (most != most || st.m[r] != st.m[r]) {
      st.m[r] = st.l[r] = __builtin_nanf("");
      st.keep[r] = 1.f;
      return false;
    }
    if (!attn::advance(st, r, most)) return false;
    const VF m = set1_f(st.m[r]);
    VF sum = zero_f();
    for (int c = 0; c < columns; c += kLanes) {
      const VF e = attn::exp2_f<kExact>(sub(load_f(s + c), m));
      sum = add(sum, e);
      store_f(s + c, e);
    }
    st.l[r] += reduce_add(sum);
    return true;
  }
};

// Calls f(Const<n>, first row) over all rows in groups as even as the sizes kRows allow, largest
// size first: a group of one row would wait for its few sums in every step.
template <int kMost, int... kRows, class F>
inline void even_groups(int rows, const F& f) {
  for (int r = 0; r < rows;) {
    const int left = rows - r, want = int(ceil_div(left, ceil_div(left, kMost)));
    int taken = 0;
    auto take = [&](auto count) {
      constexpr int kR = decltype(count)::value;
      if (taken > 0 || kR > want) return;
      f(count, r);
      taken = kR;
    };
    (take(Const<kMost>{}), (take(Const<kRows>{}), ...));
    r += taken;
  }
}

// As attn::multiply, fetching on the way.
template <class M, int kRows, int kVecs>
__attribute__((noinline)) void multiply(const Product<M>& t, Fetch& fetch) {
  VF acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v)
      acc[r][v] = t.keep ? mul(set1_f(t.keep[r]), load_f(t.c + r * t.ldc + v * kLanes)) : zero_f();
  const typename M::E* b = t.b;
  for (int k0 = 0; k0 < t.depth; k0 += kFetchSteps * M::kPair) {
    const int end = t.depth - k0 < kFetchSteps * M::kPair ? t.depth : k0 + kFetchSteps * M::kPair;
    fetch.some();
    for (int k = k0; k < end; k += M::kPair, b += t.ldb) {
      typename M::Operand w[kVecs];
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) w[v] = M::load(b + v * kLanes * M::kPair);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const typename M::Operand x = M::spread(t.a + r * t.lda + k);
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) M::dot(acc[r][v], x, w[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) store_f(t.c + r * t.ldc + v * kLanes, acc[r][v]);
}

// All rows against up to kPanel columns, in whole vectors.
template <class M>
inline void multiply_panel(const Product<M>& all, int rows, int columns, Fetch& fetch) {
  constexpr int kVecs = kLanes == 16 ? 4 : kLanes == 8 ? 2 : 1;
  for (int n = 0; n < columns; n += kVecs * kLanes) {
    auto group = [&](auto count, int r) {
      Product<M> t = all;
      t.b += n * M::kPair;
      t.a += r * t.lda;
      t.c += r * t.ldc + n;
      if (t.keep) t.keep += r;
      multiply<M, decltype(count)::value, kVecs>(t, fetch);
    };
    if constexpr (kLanes == 16)
      even_groups<6, 5, 4, 3, 2, 1>(rows, group);
    else
      even_groups<4, 3, 2, 1>(rows, group);
  }
}

// --- plain products

template <class M>
struct Plain : Shared {
  using E = typename M::E;
  static constexpr int kBlock = kPlainKeys, kUnit = 64;
  const int64_t L, R, W;
  const bool folded;        // no scales: latents and rope are one product
  float *o, *s, *s2, *row;  // totals [rows][L]; scores [rows][kBlock], and of rope [rows][kUnit]
  E *q, *room;              // [rows][W]; 16 rows of W
  E *kt, *v;                // [W/pair][kUnit][pair]; [L/64][keys/pair][64][pair]
  E* probability;           // [rows][kBlock]

  Plain(const Params& params, const Task& t, float* at)
      : Shared(params, t),
        L(params.page.L),
        R(params.page.R),
        W(L + R),
        folded(!params.page.scaled() && !params.page.rope_scaled()) {
    auto take = [&](int64_t floats) {
      float* here = at;
      at += round_up(floats, 16);
      return here;
    };
    o = take(t.rows * L);
    s = take(t.rows * kBlock);
    s2 = take(t.rows * kUnit);
    row = take(W);
    q = reinterpret_cast<E*>(take(t.rows * W));
    room = reinterpret_cast<E*>(take(16 * W));
    kt = reinterpret_cast<E*>(take(W * kUnit));
    v = reinterpret_cast<E*>(take(L * kBlock));
    probability = reinterpret_cast<E*>(take(t.rows * kBlock));
  }

  // Sixteen tokens of one part of their page as E, rows `stride` apart.
  struct Part {
    const E* at;
    int64_t stride;
  };
  Part latents(const uint8_t* blob, int64_t t) const {
    const uint8_t* from = blob + p.page.latent(t, 0).byte;
    if (stored_as<E>(p.page.latent_bits, p.latent_dtype))
      return {reinterpret_cast<const E*>(from), L};
    for (int i = 0; i < 16; ++i, from += p.page.latent_row()) {
      if (p.page.latent_bits == 4)
        nibbles(from, L, room + i * W);
      else
        numbers(from, p.page.latent_bits, p.latent_dtype, L, room + i * W);
    }
    return {room, W};
  }
  Part ropes(const uint8_t* blob, int64_t t) const {
    const uint8_t* from = blob + p.page.rope_at(t, 0);
    if (stored_as<E>(p.page.rope_bits, p.rope_dtype)) return {reinterpret_cast<const E*>(from), R};
    for (int i = 0; i < 16; ++i, from += p.page.rope_row())
      numbers(from, p.page.rope_bits, p.rope_dtype, R, room + i * W + L);
    return {room + L, W};
  }

  // `n` channels of 16 tokens -> columns c.. of kt, from channel d0 on.
  void transpose_in(const Part& part, int64_t n, int64_t d0, int c) {
    for (int i = 0; i < 16; i += kLanes)
      for (int64_t d = 0; d < n; d += M::kPair * kLanes)
        transpose(part.at + i * part.stride + d, part.stride * int64_t(sizeof(E)),
                  kt + (d0 + d) * kUnit + (c + i) * M::kPair, kUnit * 4);
  }

  // Up to 16 tokens, which become rows c.. of v; an odd one has a neighbour of zeros.
  void weave_in(const Part& part, int valid, int c) {
    for (int i = 0; i < valid; i += M::kPair) {
      const E* a = part.at + i * part.stride;
      for (int64_t d = 0; d < L; d += kLanes) {
        E* to = v + d / kPanel * (kBlock * kPanel) + (c + i) * kPanel + d % kPanel * M::kPair;
        if constexpr (M::kPair == 2) {
          const bool two = i + 1 < valid;
          const VI both = pairs_bf16(a + d, two ? a + part.stride + d : a + d);
          store_i(to, two ? both : bit_and(both, set1_i(0xffff)));
        } else {
          store_f(to, load_f(a + d));
        }
      }
    }
  }

  // Brings n keys, and scores all rows.
  void score(int64_t key0, int n) {
    if (!folded) load_scales(key0, n);
    for (int c = 0; c < n; c += kUnit) {
      const int columns = int(round_up(n - c < kUnit ? n - c : kUnit, 16));
      for (int i = 0; i < columns; i += 16) load(key0, c, i, n);
      score_unit(c, columns);
    }
  }
  void load(int64_t key0, int c, int i, int n) {
    const uint8_t* blob = p.blob(rows.t.request, key0 + c + i);
    const int64_t t = (key0 + c + i) % p.Z;
    const Part part = latents(blob, t);
    transpose_in(part, L, 0, i);
    weave_in(part, n - c - i < 16 ? n - c - i : 16, c + i);
    if (R > 0) transpose_in(ropes(blob, t), R, L, i);
  }
  void score_unit(int c, int columns) {
    const int count = rows.t.rows;
    Product<M> t{q, W, kt, kUnit * M::kPair, int(folded ? W : L), s + c, kBlock, nullptr};
    multiply_panel<M>(t, count, columns, fetch);
    if (folded) return;
    if (R > 0) {
      t.a += L;
      t.b += L * kUnit;
      t.depth = int(R);
      t.c = s2;
      t.ldc = kUnit;
      multiply_panel<M>(t, count, columns, fetch);
    }
    for (int r = 0; r < count; ++r)
      add_rope(s + r * kBlock + c, R > 0 ? s2 + r * kUnit : nullptr, 1.f, c, columns);
  }

  void weigh(int64_t key0, int n) {
    const int columns = int(round_up(n, 16)), count = rows.t.rows;
    for (int r = 0; r < count; ++r) {
      float* x = s + r * kBlock;
      E* to = probability + r * kBlock;
      const bool seen = softmax<M::kPair == 1>(r, key0, n, x);
      for (int c = 0; c < columns; c += kLanes) {
        const VF e = seen ? load_f(x + c) : zero_f();
        M::store_p(to + c, p.page.scaled() ? mul(e, load_f(weight + c)) : e);
      }
    }
    const int depth = int(round_up(n, M::kPair));
    for (int64_t d = 0; d < L; d += kPanel)
      multiply_panel<M>(
          {probability, kBlock, v + d * kBlock, kPanel * M::kPair, depth, o + d, L, st.keep}, count,
          kPanel, fetch);
  }

  void run() {
    const Task& t = rows.t;
    for (int r = 0; r < t.rows; ++r) {
      rows.load_q(r, row);
      load_rope_query(r, row + L);
      for (int64_t d = 0; d < W; d += kLanes) store_x(q + r * W + d, load_f(row + d));
    }
    __builtin_memset(o, 0, size_t(t.rows * L) * sizeof(float));
    for (int64_t key0 = t.kv_begin; key0 < t.kv_end; key0 += kBlock) {
      const int n = begin_block(key0, kBlock, kBlock / kPanel * (W + L) / M::kPair);
      score(key0, n);
      weigh(key0, n);
    }
    for (int r = 0; r < t.rows; ++r) attn::finish_row(rows, st, r, o + r * L);
  }
};

// --- products of codes

// c[r][n] = sum_k a[r][k] b[k][n] + start[r], or keep[r] c[r][n] + by[r] sum_k a[r][k] b[k][n].
struct CodeProduct {
  const uint8_t* a;  // [rows][lda]
  int64_t lda;
  const uint8_t* b;  // [depth/4][columns][4], ldb bytes from one to the next
  int64_t ldb;
  int depth;
  float* c;
  int64_t ldc;
  const int32_t* start;    // scores: b is unsigned, a signed; else null
  const float *keep, *by;  // totals: a is unsigned, b signed
};

template <bool kScores, int kRows, int kVecs>
__attribute__((noinline)) void multiply_codes(const CodeProduct& t, Fetch& fetch) {
  VI acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[r][v] = kScores ? set1_i(t.start[r]) : zero_i();
  const uint8_t* b = t.b;
  for (int k0 = 0; k0 < t.depth; k0 += 32) {  // dot() sums up to 32 codes
    const int end = t.depth - k0 < 32 ? t.depth : k0 + 32;
    fetch.some();
    Dot d[kRows][kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) dot_begin(d[r][v], acc[r][v]);
    for (int k = k0; k < end; k += 4, b += t.ldb) {
      VI w[kVecs];
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) w[v] = load_i(b + v * kLanes * 4);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const VI x = codes4(reinterpret_cast<const int8_t*>(t.a + r * t.lda + k));
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) {
          if constexpr (kScores)
            dot(d[r][v], w[v], x);
          else
            dot(d[r][v], x, w[v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[r][v] = dot_end(d[r][v]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      float* c = t.c + r * t.ldc + v * kLanes;
      VF x = to_f(acc[r][v]);
      if constexpr (!kScores) x = fma(x, set1_f(t.by[r]), mul(set1_f(t.keep[r]), load_f(c)));
      store_f(c, x);
    }
}

// All rows against `columns` columns.
template <bool kScores>
inline void multiply_all_codes(const CodeProduct& all, int rows, int columns, Fetch& fetch) {
  constexpr int kVecs = kLanes == 16 ? 4 : kLanes == 8 ? 2 : 1;
  for (int n = 0; n < columns; n += kVecs * kLanes) {
    auto group = [&](auto count, int r) {
      CodeProduct t = all;
      t.a += r * t.lda;
      t.b += n * 4;
      t.c += r * t.ldc + n;
      if constexpr (kScores) {
        t.start += r;
      } else {
        t.keep += r;
        t.by += r;
      }
      multiply_codes<kScores, decltype(count)::value, kVecs>(t, fetch);
    };
    if constexpr (kLanes == 16)
      even_groups<6, 5, 4, 3, 2, 1>(rows, group);
    else
      even_groups<2, 1>(rows, group);
  }
}

template <class M>
struct Codes : Shared {
  using E = typename M::E;
  static constexpr int kBlock = kCodeKeys, kUnit = 64;
  const int64_t L, R;
  const int bias;  // of codes as the scores take them
  float *o, *s, *s2,
      *row;  // totals [rows][L], channels woven; scores [rows][kBlock], [rows][kUnit]
  E *q_rope, *rope, *room;   // [rows][R], [R/pair][kUnit][pair], 16 rows of R
  uint8_t *q8, *p8;          // [rows][L], [rows][kBlock]
  uint8_t *kt, *v, *tokens;  // [L/4][kUnit][4], [L/64][keys/4][64][4], [16][L]
  float q_scale[kMostRows], p_scale[kMostRows];
  int32_t start[kMostRows];  // what the bias takes off the scores

  Codes(const Params& params, const Task& t, float* at)
      : Shared(params, t),
        L(params.page.L),
        R(params.page.R),
        bias(params.page.latent_bits == 4 ? 8 : 128) {
    auto take = [&](int64_t floats) {
      float* here = at;
      at += round_up(floats, 16);
      return here;
    };
    auto bytes = [&](int64_t n) { return reinterpret_cast<uint8_t*>(take(n / 4)); };
    o = take(t.rows * L);
    s = take(t.rows * kBlock);
    s2 = take(t.rows * kUnit);
    row = take(L + R);
    q_rope = reinterpret_cast<E*>(take(t.rows * R));
    rope = reinterpret_cast<E*>(take(R * kUnit));
    room = reinterpret_cast<E*>(take(16 * R));
    q8 = bytes(t.rows * L);
    p8 = bytes(t.rows * kBlock);
    kt = bytes(L * kUnit);
    v = bytes(L * kBlock);
    tokens = bytes(16 * L);
  }

  // Codes of 16 tokens, with their bias.
  void unpack(const uint8_t* from) {
    const VI flip = set1_i(int32_t(0x80808080u));
    for (int i = 0; i < 16; ++i, from += p.page.latent_row()) {
      uint8_t* to = tokens + i * L;
      if (p.page.latent_bits == 4)
        for (int64_t d = 0; d < L; d += kPanel) split_nibbles(from + d / 2, to + d);
      else
        for (int64_t d = 0; d < L; d += 4 * kLanes)
          store_i(to + d, sub_bytes(load_i(from + d), flip));
    }
  }

  void load_rope(const uint8_t* from, int c) {
    const E* at = room;
    if (stored_as<E>(p.page.rope_bits, p.rope_dtype))
      at = reinterpret_cast<const E*>(from);
    else
      for (int i = 0; i < 16; ++i, from += p.page.rope_row())
        numbers(from, p.page.rope_bits, p.rope_dtype, R, room + i * R);
    for (int i = 0; i < 16; i += kLanes)
      for (int64_t d = 0; d < R; d += M::kPair * kLanes)
        transpose(at + i * R + d, R * int64_t(sizeof(E)), rope + d * kUnit + (c + i) * M::kPair,
                  kUnit * 4);
  }

  // 16 tokens, as columns at c % kUnit of the unit and as rows c.. of v.
  void load(const uint8_t* blob, int64_t t, int c) {
    const VI biases = set1_i(int32_t(uint32_t(bias) * 0x01010101u));
    unpack(blob + p.page.latent(t, 0).byte);
    for (int i = 0; i < 16; i += kLanes)
      for (int64_t d = 0; d < L; d += 4 * kLanes)
        transpose(tokens + i * L + d, L, kt + d * kUnit + (c % kUnit + i) * 4, kUnit * 4);
    for (int i = 0; i < 16; i += 4) {
      for (int64_t d = 0; d < L; d += 4 * kLanes) {
        VI x[4];
        for (int k = 0; k < 4; ++k) x[k] = sub_bytes(load_i(tokens + (i + k) * L + d), biases);
        weave(x, v + d / kPanel * (kBlock * kPanel) + (c + i) * kPanel + d % kPanel * 4);
      }
    }
    if (R > 0) load_rope(blob + p.page.rope_at(t, 0), c % kUnit);
  }

  // Brings n keys, and scores all rows.
  void score(int64_t key0, int n) {
    load_scales(key0, n);
    for (int c = 0; c < n; c += kUnit) {
      for (int i = c; i < c + kUnit && i < n; i += 16)
        load(p.blob(rows.t.request, key0 + i), (key0 + i) % p.Z, i);
      score_unit(c, int(round_up(n - c < kUnit ? n - c : kUnit, 16)));
    }
  }
  void score_unit(int c, int columns) {
    const int count = rows.t.rows;
    multiply_all_codes<true>({q8, L, kt, kUnit * 4, int(L), s + c, kBlock, start, nullptr, nullptr},
                             count, columns, fetch);
    if (R > 0)
      multiply_panel<M>({q_rope, R, rope, kUnit * M::kPair, int(R), s2, kUnit, nullptr}, count,
                        columns, fetch);
    for (int r = 0; r < count; ++r)
      add_rope(s + r * kBlock + c, R > 0 ? s2 + r * kUnit : nullptr, q_scale[r], c, columns);
  }
  // Probabilities of a row, times the scales of their tokens -> bytes.
  void quantise(int r, int columns) {
    float* x = s + r * kBlock;
    VF most = zero_f();
    for (int c = 0; c < columns; c += kLanes) {
      const VF y = mul(load_f(x + c), load_f(weight + c));
      most = max(most, y);
      store_f(x + c, y);
    }
    const float top = reduce_max(most);
    p_scale[r] = top > 1e-30f ? top / 255.f : 0.f;
    const VF by = set1_f(top > 1e-30f ? 255.f / top : 0.f);
    for (int c = 0; c < columns; c += kLanes)
      store_u8(p8 + r * kBlock + c, round_to_i(mul(load_f(x + c), by)));
  }

  void weigh(int64_t key0, int n) {
    const int columns = int(round_up(n, 16)), count = rows.t.rows;
    for (int r = 0; r < count; ++r) {
      if (softmax<false>(r, key0, n, s + r * kBlock)) {
        quantise(r, columns);
      } else {
        p_scale[r] = 0.f;
        __builtin_memset(p8 + r * kBlock, 0, size_t(columns));
      }
    }
    for (int64_t d = 0; d < L; d += kPanel)
      multiply_all_codes<false>(
          {p8, kBlock, v + d * kBlock, kPanel * 4, columns, o + d, L, nullptr, st.keep, p_scale},
          count, kPanel, fetch);
  }

  void load_queries(int64_t r) {
    float sum = 0.f;
    rows.load_q(int(r), row);
    q_scale[r] = attn::quantise_row(row, L, L, reinterpret_cast<int8_t*>(q8) + r * L, &sum);
    start[r] = -bias * int32_t(sum);
    load_rope_query(int(r), row);
    for (int64_t d = 0; d < R; d += kLanes) store_x(q_rope + r * R + d, load_f(row + d));
  }

  void run() {
    const Task& t = rows.t;
    for (int r = 0; r < t.rows; ++r) load_queries(r);
    __builtin_memset(o, 0, size_t(t.rows * L) * sizeof(float));
    for (int64_t key0 = t.kv_begin; key0 < t.kv_end; key0 += kBlock) {
      const int n = begin_block(key0, kBlock, kBlock / kPanel * 2 * L / 4);
      score(key0, n);
      weigh(key0, n);
    }
    for (int r = 0; r < t.rows; ++r) {
      const float* from = o + r * L;
      for (int64_t d = 0; d < L; d += 4 * kLanes)
        for (int i = 0; i < 4 * kLanes; ++i) row[d + woven(i)] = from[d + i];
      attn::finish_row(rows, st, r, row);
    }
  }
};

}  // namespace latent

inline void mla_tile(const mla::Params& p, const msm::Task& t, int64_t, float* scratch) {
  latent::Plain<attn::Fp32Math>(p, t, scratch).run();
}
inline void mla_bf16(const mla::Params& p, const msm::Task& t, int64_t, float* scratch) {
  latent::Plain<attn::Bf16Math>(p, t, scratch).run();
}
inline void mla_codes(const mla::Params& p, const msm::Task& t, int64_t j, float* scratch) {
  // whole bytes need dot products that take them
  if (p.page.latent_bits > (kWideBytes ? 8 : 4)) return mla_tile(p, t, j, scratch);
  if (p.bf16)
    latent::Codes<attn::Bf16Math>(p, t, scratch).run();
  else
    latent::Codes<attn::Fp32Math>(p, t, scratch).run();
}
