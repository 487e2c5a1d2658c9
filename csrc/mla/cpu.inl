// Body of mla, compiled once per instruction set; masks, softmax state and results are those of
// msm.
//
// A block of latents is brought into two orders, once for all heads of a token (and all tokens of
// a tile): channels along the depth, for the scores, and keys along the depth, for the totals. Both
// come from one read of the page. Panels of 64 columns lie one after another, so that a product
// walks memory in order.
//
// "codes": queries and probabilities become INT8 and both products are dot products of bytes;
// "tile", "bf16": codes are brought to fp32 or bf16, in which they are exact. In either case the
// scales of the tokens multiply scores and probabilities, never latents.
#include "msm/cpu.inl"

namespace latent {

using attn::kInf;
using attn::kMostRows;
using attn::kSubRows;
using attn::Product;
using attn::Rows;
using attn::State;
using layout::MlaPage;
using mla::Params;
using msm::Task;

constexpr int kPanel = 64;       // columns that lie together
constexpr int kPlainKeys = 128;  // of a block of plain numbers
constexpr int kCodeKeys = 256;   // of a block of codes

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

// What a task needs whatever it multiplies. Arrays end at a multiple of 16 keys.
struct Shared {
  const Params& p;
  const Rows rows;
  State st;
  float scale[kCodeKeys], weight[kCodeKeys];  // of the latents: for scores, and for probabilities
  float rope_scale[kCodeKeys];

  Shared(const Params& params, const Task& t) : p(params), rows(params, t, 0) { st.begin(t.rows); }

  // Scales of n keys. A NaN spoils scores, and so what sees it; as a weight it is 0, so that
  // what does not see it stays whole.
  void load_scales(int64_t key0, int n) {
    for (int c = 0; c < n; c += 16) {
      const uint8_t* blob = p.blob(rows.t.request, key0 + c);
      const int64_t t = (key0 + c) % p.Z;
      for (int i = 0; i < 16; ++i) {
        const bool real = c + i < n;
        const float s = p.page.scaled() && real ? to_float(halves(blob + p.page.scale(t))[i]) : 0.f;
        scale[c + i] = p.page.scaled() ? s : 1.f;
        weight[c + i] = s == s ? s : 0.f;
        rope_scale[c + i] = !p.page.rope_scaled() ? 1.f
                            : real                ? to_float(halves(blob + p.page.rope_scale(t))[i])
                                                  : 0.f;
      }
    }
  }

  void load_rope_query(int r, float* to) const {
    attn::load_row(p.q_rope,
                   (rows.first + rows.token(r)) * p.rope_token + rows.head(r) * p.rope_head,
                   p.dtype, p.page.R, to);
  }

  // s = by * scale * s + rope_scale * rope, over the columns of a row.
  void add_rope(float* s, const float* rope, float by, int columns) const {
    const VF q = set1_f(by);
    for (int c = 0; c < columns; c += kLanes) {
      VF x = mul(mul(load_f(s + c), q), load_f(scale + c));
      if (rope) x = fma(load_f(rope + c), load_f(rope_scale + c), x);
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

// One panel after another: columns [0, columns) of c, and b's panels `panel` elements apart.
template <class M>
inline void multiply_panels(Product<M> t, int rows, int columns, int64_t panel) {
  for (int n = 0; n < columns; n += kPanel, t.b += panel, t.c += kPanel)
    attn::multiply_all<M>(t, rows, columns - n < kPanel ? columns - n : kPanel);
}

// --- plain products

template <class M>
struct Plain : Shared {
  using E = typename M::E;
  static constexpr int kBlock = kPlainKeys;
  const int64_t L, R, W;
  const bool folded;        // no scales: latents and rope are one product
  float *o, *s, *s2, *row;  // totals [rows][L]; scores of latents and of rope [kSubRows][kBlock]
  E *q, *room;              // [rows][W]; 16 rows of W
  E *kt, *v;                // [keys/64][W/pair][64][pair]; [L/64][keys/pair][64][pair]
  E* probability;           // [kSubRows][kBlock]

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
    s = take(kSubRows * kBlock);
    s2 = take(kSubRows * kBlock);
    row = take(W);
    q = reinterpret_cast<E*>(take(t.rows * W));
    room = reinterpret_cast<E*>(take(16 * W));
    kt = reinterpret_cast<E*>(take(W * kBlock));
    v = reinterpret_cast<E*>(take(L * kBlock));
    probability = reinterpret_cast<E*>(take(kSubRows * kBlock));
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
    for (int i = 0; i < 16; i += kLanes) {
      E* to = kt + (c + i) / kPanel * (W * kPanel) + (c + i) % kPanel * M::kPair;
      for (int64_t d = 0; d < n; d += M::kPair * kLanes)
        transpose(part.at + i * part.stride + d, part.stride * int64_t(sizeof(E)),
                  to + (d0 + d) * kPanel, kPanel * 4);
    }
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

  void load(int64_t key0, int n) {
    for (int c = 0; c < n; c += 16) {
      const uint8_t* blob = p.blob(rows.t.request, key0 + c);
      const int64_t t = (key0 + c) % p.Z;
      const Part part = latents(blob, t);
      transpose_in(part, L, 0, c);
      weave_in(part, n - c < 16 ? n - c : 16, c);
      if (R > 0) transpose_in(ropes(blob, t), R, L, c);
    }
    if (!folded) load_scales(key0, n);
  }

  // Scores of `count` rows from r0.
  void score(int r0, int count, int n) {
    const int columns = int(round_up(n, 16));
    Product<M> t{q + r0 * W, W, kt, kPanel * M::kPair, int(folded ? W : L), s, kBlock, nullptr};
    multiply_panels<M>(t, count, columns, W * kPanel);
    if (folded) return;
    if (R > 0) {
      t.a += L;
      t.b += L * kPanel;
      t.depth = int(R);
      t.c = s2;
      multiply_panels<M>(t, count, columns, W * kPanel);
    }
    for (int r = 0; r < count; ++r)
      add_rope(s + r * kBlock, R > 0 ? s2 + r * kBlock : nullptr, 1.f, columns);
  }

  void weigh(int r0, int count, int64_t key0, int n) {
    const int columns = int(round_up(n, 16));
    for (int r = 0; r < count; ++r) {
      float* x = s + r * kBlock;
      E* to = probability + r * kBlock;
      const bool seen = softmax<M::kPair == 1>(r0 + r, key0, n, x);
      for (int c = 0; c < columns; c += kLanes) {
        const VF e = seen ? load_f(x + c) : zero_f();
        M::store_p(to + c, folded || !p.page.scaled() ? e : mul(e, load_f(weight + c)));
      }
    }
    multiply_panels<M>({probability, kBlock, v, kPanel * M::kPair, int(round_up(n, M::kPair)),
                        o + r0 * L, L, st.keep + r0},
                       count, int(L), kBlock * kPanel);
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
      const int n = int(t.kv_end - key0 < kBlock ? t.kv_end - key0 : kBlock);
      load(key0, n);
      for (int r0 = 0; r0 < t.rows; r0 += kSubRows) {
        const int count = t.rows - r0 < kSubRows ? t.rows - r0 : kSubRows;
        score(r0, count, n);
        weigh(r0, count, key0, n);
      }
    }
    for (int r = 0; r < t.rows; ++r) attn::finish_row(rows, st, r, o + r * L);
  }
};

// --- products of codes

// c[r][n] = sum_k a[r][k] b[k][n] + start[r], or keep[r] c[r][n] + by[r] sum_k a[r][k] b[k][n].
struct CodeProduct {
  const uint8_t* a;  // [rows][lda]
  int64_t lda;
  const uint8_t* b;  // [depth/4][64][4]
  int depth;
  float* c;
  int64_t ldc;
  const int32_t* start;    // scores: b is unsigned, a signed; else null
  const float *keep, *by;  // totals: a is unsigned, b signed
};

template <bool kScores, int kRows, int kVecs>
__attribute__((noinline)) void multiply_codes(const CodeProduct& t) {
  VI acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[r][v] = kScores ? set1_i(t.start[r]) : zero_i();
  const uint8_t* b = t.b;
  for (int k0 = 0; k0 < t.depth; k0 += 32) {  // dot() sums up to 32 codes
    const int end = t.depth - k0 < 32 ? t.depth : k0 + 32;
    Dot d[kRows][kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) dot_begin(d[r][v], acc[r][v]);
    for (int k = k0; k < end; k += 4, b += kPanel * 4) {
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

template <bool kScores, int kVecs, int... kRows>
inline void code_rows(const CodeProduct& all, int rows) {
  int r = 0;
  auto cover = [&](auto count) {
    constexpr int kR = decltype(count)::value;
    for (; r + kR <= rows; r += kR) {
      CodeProduct t = all;
      t.a += r * t.lda;
      t.c += r * t.ldc;
      if constexpr (kScores) {
        t.start += r;
      } else {
        t.keep += r;
        t.by += r;
      }
      multiply_codes<kScores, kR, kVecs>(t);
    }
  };
  (cover(Const<kRows>{}), ...);
}

// Up to 64 columns, a multiple of 16.
template <bool kScores>
inline void code_panel(CodeProduct t, int rows, int columns) {
  constexpr int kVecs = kLanes == 16 ? 4 : 2;
  int n = 0;
  auto step = [&](int by) {
    n += by;
    t.b += by * 4;
    t.c += by;
  };
  for (; n + kVecs * kLanes <= columns; step(kVecs * kLanes)) {
    if constexpr (kLanes == 16)
      code_rows<kScores, kVecs, 6, 4, 2, 1>(t, rows);
    else
      code_rows<kScores, kVecs, 2, 1>(t, rows);
  }
  for (; n < columns; step(kLanes)) code_rows<kScores, 1, 4, 1>(t, rows);
}

template <class M>
struct Codes : Shared {
  using E = typename M::E;
  static constexpr int kBlock = kCodeKeys;
  const int64_t L, R;
  const int bias;            // of codes as the scores take them
  float *o, *s, *s2, *row;   // totals [rows][L], channels woven; scores [kSubRows][kBlock]
  E *q_rope, *rope, *room;   // [rows][R], [keys/64][R/pair][64][pair], 16 rows of R
  uint8_t *q8, *p8;          // [rows][L], [kSubRows][kBlock]
  uint8_t *kt, *v, *tokens;  // [keys/64][L/4][64][4], [L/64][keys/4][64][4], [16][L]
  float q_scale[kMostRows], p_scale[kSubRows];
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
    s = take(kSubRows * kBlock);
    s2 = take(kSubRows * kBlock);
    row = take(L + R);
    q_rope = reinterpret_cast<E*>(take(t.rows * R));
    rope = reinterpret_cast<E*>(take(R * kBlock));
    room = reinterpret_cast<E*>(take(16 * R));
    q8 = bytes(t.rows * L);
    p8 = bytes(kSubRows * kBlock);
    kt = bytes(L * kBlock);
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
    for (int i = 0; i < 16; i += kLanes) {
      E* to = rope + (c + i) / kPanel * (R * kPanel) + (c + i) % kPanel * M::kPair;
      for (int64_t d = 0; d < R; d += M::kPair * kLanes)
        transpose(at + i * R + d, R * int64_t(sizeof(E)), to + d * kPanel, kPanel * 4);
    }
  }

  void load(int64_t key0, int n) {
    const VI biases = set1_i(int32_t(uint32_t(bias) * 0x01010101u));
    for (int c = 0; c < n; c += 16) {
      const uint8_t* blob = p.blob(rows.t.request, key0 + c);
      const int64_t t = (key0 + c) % p.Z;
      unpack(blob + p.page.latent(t, 0).byte);
      for (int i = 0; i < 16; i += kLanes) {
        uint8_t* to = kt + (c + i) / kPanel * (L * kPanel) + (c + i) % kPanel * 4;
        for (int64_t d = 0; d < L; d += 4 * kLanes)
          transpose(tokens + i * L + d, L, to + d * kPanel, kPanel * 4);
      }
      for (int i = 0; i < 16; i += 4) {
        for (int64_t d = 0; d < L; d += 4 * kLanes) {
          VI x[4];
          for (int k = 0; k < 4; ++k) x[k] = sub_bytes(load_i(tokens + (i + k) * L + d), biases);
          weave(x, v + d / kPanel * (kBlock * kPanel) + (c + i) * kPanel + d % kPanel * 4);
        }
      }
      if (R > 0) load_rope(blob + p.page.rope_at(t, 0), c);
    }
    load_scales(key0, n);
  }

  void score(int r0, int count, int n) {
    const int columns = int(round_up(n, 16));
    for (int c = 0; c < columns; c += kPanel)
      code_panel<true>(
          {q8 + r0 * L, L, kt + c * L, int(L), s + c, kBlock, start + r0, nullptr, nullptr}, count,
          columns - c < kPanel ? columns - c : kPanel);
    if (R > 0)
      multiply_panels<M>({q_rope + r0 * R, R, rope, kPanel * M::kPair, int(R), s2, kBlock, nullptr},
                         count, columns, R * kPanel);
    for (int r = 0; r < count; ++r)
      add_rope(s + r * kBlock, R > 0 ? s2 + r * kBlock : nullptr, q_scale[r0 + r], columns);
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

  void weigh(int r0, int count, int64_t key0, int n) {
    const int columns = int(round_up(n, 16));
    for (int r = 0; r < count; ++r) {
      if (softmax<false>(r0 + r, key0, n, s + r * kBlock)) {
        quantise(r, columns);
      } else {
        p_scale[r] = 0.f;
        __builtin_memset(p8 + r * kBlock, 0, size_t(columns));
      }
    }
    for (int64_t d = 0; d < L; d += kPanel)
      code_panel<false>(
          {p8, kBlock, v + d * kBlock, columns, o + r0 * L + d, L, nullptr, st.keep + r0, p_scale},
          count, kPanel);
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
      const int n = int(t.kv_end - key0 < kBlock ? t.kv_end - key0 : kBlock);
      load(key0, n);
      for (int r0 = 0; r0 < t.rows; r0 += kSubRows) {
        const int count = t.rows - r0 < kSubRows ? t.rows - r0 : kSubRows;
        score(r0, count, n);
        weigh(r0, count, key0, n);
      }
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
