// Body of kv4, compiled once per instruction set; the engine around it is that of msm.
//
// Few rows ("codes"): queries become INT8, so that a score is a dot product of bytes, and so do a
// chunk's probabilities, already multiplied by the scales of V. Zeros leave the sums as
// z * sum(q) and sum(p z), in fp32. Many rows ("tile", "bf16"): a block is decoded once, then
// multiplied as plain numbers are.
#include "msm/cpu.inl"

namespace coded {

using attn::kInf;
using attn::kMostRows;
using attn::quantise_row;
using attn::Rows;
using attn::State;
using kv4::Fold;
using kv4::Params;
using kv4::Places;
using layout::KvPage;
using msm::Task;

constexpr int kBlock = 256;  // keys: their codes and those of the next stay in the caches
constexpr int kChunk = 64;   // keys that share a scale of the probabilities
constexpr int kMostGroups = 16;

inline const F16* halves(const uint8_t* p) { return reinterpret_cast<const F16*>(p); }

// x [D] -> x[block] @ fold[row][j][block]; `room` [D].
inline void apply(const Fold& fold, int64_t row, const Rows& rows, float* x, float* room) {
  if (!fold.at) return;
  const int64_t D = rows.p.D, m = fold.m;
  const float* f = fold.at + (row * rows.p.J + rows.j) * D * m;
  for (int64_t d = 0; d < D; d += kLanes) store_f(room + d, zero_f());
  for (int64_t i = 0; i < D; ++i) {
    const VF xi = set1_f(x[i]);
    const int64_t base = i / m * m;
    for (int64_t c = 0; c < m; c += kLanes)
      store_f(room + base + c, fma(xi, load_f(f + i * m + c), load_f(room + base + c)));
  }
  for (int64_t d = 0; d < D; d += kLanes) store_f(x + d, load_f(room + d));
}

// Changes a query row to the space of the codes; returns q . mean. `room` [D].
inline float change_query(const Params& p, const Rows& rows, float* q, float* room) {
  const int64_t row = p.factor_row(rows.t.request);
  float bias = 0.f;
  if (p.k_mean) {
    VF sum = zero_f();
    const float* mean = p.k_mean + (row * p.J + rows.j) * p.D;
    for (int64_t d = 0; d < p.D; d += kLanes) sum = fma(load_f(q + d), load_f(mean + d), sum);
    bias = reduce_add(sum);
  }
  apply(p.q_fold, row, rows, q, room);
  return bias;
}

// First key whose page is not full, with keys coded per channel: from there they are in the tail.
inline int64_t tail_begin(const Params& p, const Rows& rows) {
  const int64_t kv = p.kv_len[rows.t.request];
  return p.page.channel ? kv / p.Z * p.Z : kv;
}
inline void load_tail(const Params& p, const Rows& rows, int64_t pos, float* to) {
  const int64_t row = p.tail_row[rows.t.request];
  attn::load_row(p.k_tail, ((row * p.J + rows.j) * p.Z + pos % p.Z) * p.D, p.tail_dtype, p.D, to);
}

inline VI code_bits(VI x, int shift, int bits) {
  return bit_and(shift_right(x, shift), set1_i((1 << bits) - 1));
}

// Decoded blocks for the engine of msm.
template <class M>
struct Decoded {
  using Work = attn::Work<M>;
  const Params& p;

  float query(const Rows& rows, float* q) const { return change_query(p, rows, q, q + p.D); }
  void result(const Rows& rows, float* o, float* room) const {
    apply(p.o_fold, p.factor_row(rows.t.request), rows, o, room);
  }

  bool ahead(const Rows&, int64_t, const char**) const { return false; }

  void load(const Rows& rows, int64_t key0, int n, Work& w) const {
    const int64_t tail = tail_begin(p, rows);
    for (int c = 0; c < n; c += 16) {
      const uint8_t* blob = p.blob(rows.t.request, key0 + c, rows.j);
      const int64_t t0 = (key0 + c) % p.Z;
      if (key0 + c >= tail)
        load_tail_keys(rows, key0 + c, c, w);
      else
        for (int i = 0; i < 16; i += kLanes) load_keys(blob, t0 + i, c + i, w);
      for (int i = 0; i < 16 && c + i < n; i += 4) load_quad(blob, t0 + i, n - c - i, c + i, w);
    }
  }

  // kLanes tokens from t0 of the page, which become columns.
  void load_keys(const uint8_t* blob, int64_t t0, int column, Work& w) const {
    const int64_t n = 8 / p.page.k_bits;
    const F16 *scales = halves(blob + p.page.k_scales()), *zeros = halves(blob + p.page.k_zeros());
    const uint8_t* codes = blob + t0 / 16 * p.page.k_group_bytes() + t0 % 16 * 4;
    VF s = zero_f(), sz = zero_f(), even = zero_f();
    for (int64_t d = 0; d < p.D; ++d) {
      if (p.page.channel) {
        s = set1_f(to_float(scales[d]));
        sz = mul(s, set1_f(-to_float(zeros[d])));
      } else if (d % p.page.G == 0) {
        s = load_x(scales + d / p.page.G * p.Z + t0);
        sz = sub(zero_f(), mul(s, load_x(zeros + d / p.page.G * p.Z + t0)));
      }
      const VI x = load_i(codes + d / (4 * n) * 64);
      const int shift = int(d % 4 * 8 + d / 4 % n * p.page.k_bits);
      const VF f = fma(to_f(code_bits(x, shift, p.page.k_bits)), s, sz);
      if constexpr (M::kPair == 1) {
        store_f(w.kt + d * attn::kKeys + column, f);
      } else {
        if (d % 2 == 1) store_i(w.kt + (d - 1) * attn::kKeys + column * 2, pair(even, f));
        even = f;
      }
    }
  }

  // Two numbers of each lane as bf16, rounded to nearest.
  static VI pair(VF a, VF b) {
    const VI half = set1_i(0x8000);
    return bit_or(shift_right(add(to_bits(a), half), 16),
                  bit_and(add(to_bits(b), half), set1_i(int32_t(0xffff0000u))));
  }

  void load_tail_keys(const Rows& rows, int64_t pos, int column, Work& w) const {
    for (int i = 0; i < 16; ++i) {
      load_tail(p, rows, pos + i, w.row);
      for (int64_t d = 0; d < p.D; ++d) {
        using E = typename M::E;
        w.kt[d / M::kPair * M::kPair * attn::kKeys + (column + i) * M::kPair + d % M::kPair] =
            from_float<E>(w.row[d]);
      }
    }
  }

  // Four tokens from t0 of the page, `valid` of them real, which become rows of v.
  void load_quad(const uint8_t* blob, int64_t t0, int valid, int row, Work& w) const {
    const int64_t n = 8 / p.page.v_bits;
    const F16 *scales = halves(blob + p.page.v_scales()), *zeros = halves(blob + p.page.v_zeros());
    const uint8_t* codes = blob + p.page.v_codes() + t0 / 4 * p.page.v_quad_bytes();
    VF s[4] = {zero_f(), zero_f(), zero_f(), zero_f()}, sz[4] = {s[0], s[0], s[0], s[0]};
    for (int64_t d = 0; d < p.D; d += kLanes) {
      if (d % p.page.G == 0)
        for (int i = 0; i < 4; ++i) {
          const int64_t at = d / p.page.G * p.Z + t0 + i;
          s[i] = set1_f(i < valid ? to_float(scales[at]) : 0.f);
          sz[i] = set1_f(i < valid ? -to_float(zeros[at]) * to_float(scales[at]) : 0.f);
        }
      const VI x = load_i(codes + d / (16 * n) * 64 + d % 16 * 4);
      const int shift = int(d / 16 % n * p.page.v_bits);
      VF f[4];
      for (int i = 0; i < 4; ++i)
        f[i] = fma(to_f(code_bits(x, shift + 8 * i, p.page.v_bits)), s[i], sz[i]);
      if constexpr (M::kPair == 1) {
        for (int i = 0; i < 4; ++i) store_f(w.v + (row + i) * p.D + d, f[i]);
      } else {
        for (int i = 0; i < 4; i += 2) store_i(w.v + (row + i) * p.D + d * 2, pair(f[i], f[i + 1]));
      }
    }
  }
};

// --- products of codes

// How codes of kBits lie in a byte, and how they are multiplied.
template <int kB>
struct Bits {
  static constexpr int kBits = kB;
  // where dot() cannot take whole bytes, an 8-bit code is two nibbles
  static constexpr bool kNibbles = kB == 8 && !kWideBytes;
  static constexpr int kTake = kNibbles ? 4 : kB;                   // bits of an operand
  static constexpr int kParts = 8 / kTake;                          // operands of a byte
  static constexpr int kCodes = 8 / kB;                             // codes of a byte
  static constexpr int kMostP = kB == 8 && kWideBytes ? 127 : 255;  // of a probability

  static VI part(VI x, int i) {
    if constexpr (kTake == 8) return x;
    return bit_and(shift_right(x, i * kTake), set1_i(kTake == 4 ? 0x0f0f0f0f : 0x03030303));
  }
};

// Sixteen tokens: the page they lie in, and the first one's place there.
struct Group {
  const uint8_t* blob;
  int64_t t;

  const uint8_t* keys(const Places& at) const { return blob + t / 16 * at.k_group; }
  const uint8_t* values(const Places& at) const { return blob + at.v_codes + t / 4 * at.v_quad; }
};

// A task's memory and state.
struct Work {
  const Places in;
  float* o;                                 // totals [rows][Dv]
  float* s;                                 // scores, then probabilities [4][kBlock]
  float* q;                                 // [rows][D], as changed
  int8_t* q8;                               // [rows][D]
  uint8_t* p8;                              // [groups][4][kChunk]
  float *vs, *vz;                           // [groups][kBlock]: scales and zeros of V
  float *q_scale, *bias, *page_bias, *nan;  // [rows]
  float *q_sum, *lost;  // [rows][groups]: sums of q8; what zeros of V take off the totals
  float p_scale[kMostGroups][4];
  Group here[kBlock / 16 + 1], next[kBlock / 16 + 1];  // of this block and of the next
  int coming = 0;                                      // groups of the next
  State st;

  Work(float* at, const Params& p, int64_t rows) : in(p.page) {
    auto take = [&](int64_t floats) {
      float* here = at;
      at += round_up(floats, 16);
      return here;
    };
    const int64_t groups = in.groups;
    o = take(rows * in.Dv);
    s = take(4 * kBlock);
    q = take(rows * p.D);
    q8 = reinterpret_cast<int8_t*>(take(rows * p.D / 4));
    p8 = reinterpret_cast<uint8_t*>(take(groups * kChunk));
    vs = take(groups * kBlock);
    vz = take(groups * kBlock);
    q_scale = take(rows);
    bias = take(rows);
    page_bias = take(rows);
    nan = take(rows);
    q_sum = take(rows * groups);
    lost = take(rows * groups);
    __builtin_memset(o, 0, size_t(rows * in.Dv) * sizeof(float));
    __builtin_memset(lost, 0, size_t(rows * groups) * sizeof(float));
    __builtin_memset(nan, 0, size_t(rows) * sizeof(float));
  }
};

// Dot products of `channels` channels, kVecs vectors of kLanes tokens: code[v] points at the
// vector's first bytes of the first step. On the way a line at `ahead` is fetched for each one
// read.
template <class B, int kRows, int kVecs>
inline void score(const uint8_t* const (&code)[kVecs], const uint8_t* const (&ahead)[kVecs],
                  const int8_t* q8, int64_t D, int channels, VI (&acc)[kRows][kVecs]) {
  constexpr int kStep = 4 * B::kCodes, kSteps = 32 / kStep;  // dot() sums up to 32 channels
  Dot low[kRows][kVecs], high[B::kNibbles ? kRows : 1][B::kNibbles ? kVecs : 1];
  for (int c = 0; c < channels; c += 32) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        dot_begin(low[r][v], acc[r][v]);
        if constexpr (B::kNibbles) dot_begin(high[r][v], zero_i());
      }
    const int steps = channels - c < 32 ? (channels - c) / kStep : kSteps;
#pragma GCC unroll 4
    for (int k = 0; k < steps; ++k) {
      VI x[kVecs];
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        x[v] = load_i(code[v] + (c / kStep + k) * 64);
        prefetch_l2(ahead[v] + (c / kStep + k) * 64);
      }
#pragma GCC unroll 4
      for (int i = 0; i < B::kCodes; ++i)
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const VI q = codes4(q8 + r * D + c + k * kStep + i * 4);
#pragma GCC unroll 2
          for (int v = 0; v < kVecs; ++v) {
            dot(low[r][v], B::part(x[v], i), q);
            if constexpr (B::kNibbles) dot(high[r][v], B::part(x[v], 1), q);
          }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        acc[r][v] = dot_end(low[r][v]);
        if constexpr (B::kNibbles) acc[r][v] = add(acc[r][v], mul(dot_end(high[r][v]), set1_i(16)));
      }
  }
}

// Where kLanes tokens of K lie, and the values of the same tokens.
struct Keys {
  const uint8_t *code, *ahead;
  const F16 *scales, *zeros;  // of the vector's first token, groups Z apart; or of the page
};
// Tokens from column c of the block.
inline Keys keys_at(const Params& p, const Work& w, int c) {
  const Group& g = w.here[c / 16];
  const int64_t row = p.page.channel ? 0 : g.t + c % 16;
  return {g.keys(w.in) + c % 16 * 4, g.values(w.in) + c % 16 * 4,
          halves(g.blob + w.in.k_scales) + row, halves(g.blob + w.in.k_zeros) + row};
}

// Scores of kVecs vectors of tokens for kRows rows from r0, into w.s at column c.
template <class B, int kRows, int kVecs>
__attribute__((noinline)) void score_keys(const Params& p, const Keys (&keys)[kVecs], Work& w,
                                          int r0, int c) {
  VF total[kRows][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) total[r][v] = zero_f();
  const int64_t D = p.D, groups = p.page.channel ? 1 : w.in.groups, G = D / groups;
  for (int64_t g = 0; g < groups; ++g) {
    VI acc[kRows][kVecs];
    const uint8_t *code[kVecs], *ahead[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      code[v] = keys[v].code + g * G / (4 * B::kCodes) * 64;
      ahead[v] = keys[v].ahead + g * G / (4 * B::kCodes) * 64;
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[r][v] = zero_i();
    }
    score<B, kRows, kVecs>(code, ahead, w.q8 + r0 * D + g * G, D, int(G), acc);
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      VF s = set1_f(1.f), z = zero_f();
      if (!p.page.channel) {
        s = load_x(keys[v].scales + g * p.Z);
        z = load_x(keys[v].zeros + g * p.Z);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const float sum = p.page.channel ? 0.f : -w.q_sum[(r0 + r) * groups + g];
        total[r][v] = fma(fma(z, set1_f(sum), to_f(acc[r][v])), s, total[r][v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v)
      store_f(w.s + r * kBlock + c + v * kLanes,
              fma(total[r][v], set1_f(w.q_scale[r0 + r]), set1_f(w.page_bias[r0 + r])));
}

// Queries times the scales of a page whose keys are scaled per channel.
inline void enter_page(const Params& p, const Keys& keys, Work& w, int r0, int rows, float* room) {
  for (int r = r0; r < r0 + rows; ++r) {
    for (int64_t d = 0; d < p.D; d += kLanes)
      store_f(room + d, mul(load_f(w.q + r * p.D + d), load_x(keys.scales + d)));
    float sums[kMostGroups];
    w.q_scale[r] = quantise_row(room, p.D, w.in.G, w.q8 + r * p.D, sums);
    VF bias = zero_f();  // of the codes: their rounding then meets c - z, which is centred
    for (int64_t d = 0; d < p.D; d += kLanes)
      bias = fma(load_i8(w.q8 + r * p.D + d), load_x(keys.zeros + d), bias);
    w.page_bias[r] = -reduce_add(bias) * w.q_scale[r];
  }
}

// Scores against keys that are not coded yet.
inline void score_tail(const Params& p, const Rows& rows, Work& w, int r0, int count, int64_t pos,
                       int c, float* room) {
  load_tail(p, rows, pos, room);
  for (int r = 0; r < count; ++r) {
    VF sum = zero_f();
    for (int64_t d = 0; d < p.D; d += kLanes)
      sum = fma(load_f(w.q + (r0 + r) * p.D + d), load_f(room + d), sum);
    w.s[r * kBlock + c] = reduce_add(sum);
  }
}

// The n keys from key0 for kRows rows from r0.
template <class B, int kRows>
inline void score_block(const Params& p, const Rows& rows, Work& w, int r0, int64_t key0, int n,
                        float* room) {
  constexpr int kVecs = kLanes == 1 ? 1 : 2, kTokens = kVecs * kLanes;
  const int64_t tail = tail_begin(p, rows);
  const int coded = int(key0 + n <= tail ? n : tail > key0 ? tail - key0 : 0);
  const uint8_t* page = nullptr;
  for (int c = 0; c < coded; c += kTokens) {
    Keys keys[kVecs];
    // 32 tokens may be two groups, of which the second may not exist
    const bool second = kTokens <= 16 || c + kLanes < coded;
    for (int v = 0; v < kVecs; ++v) keys[v] = keys_at(p, w, second ? c + v * kLanes : c);
    if (!p.page.channel) {
      score_keys<B, kRows, kVecs>(p, keys, w, r0, c);
      continue;
    }
    for (int v = 0; v < (second ? kVecs : 1); ++v) {
      const Keys one[1] = {keys[v]};
      if (w.here[(c + v * kLanes) / 16].blob != page) {
        page = w.here[(c + v * kLanes) / 16].blob;
        enter_page(p, keys[v], w, r0, kRows, room);
      }
      score_keys<B, kRows, 1>(p, one, w, r0, c + v * kLanes);
    }
  }
  for (int c = coded; c < n; ++c) score_tail(p, rows, w, r0, kRows, key0 + c, c, room);
}

// Scores w.s of row r -> probabilities; false where the row has seen nothing or only NaN.
inline bool softmax(const Rows& rows, Work& w, int r0, int r, int64_t key0, int n) {
  State& st = w.st;
  float* s = w.s + r * kBlock;
  const int row = r0 + r, columns = int(round_up(n, 16));
  const float scale = rows.p.scale;
  const float most = attn::make_scores(rows, row, key0, n, s, scale, w.bias[row] * scale);
  if (most != most || st.m[row] != st.m[row]) {
    st.m[row] = st.l[row] = w.nan[row] = __builtin_nanf("");
    st.keep[row] = 1.f;
    return false;
  }
  if (!attn::advance(st, row, most)) return false;
  const VF m = set1_f(st.m[row]);
  VF sum = zero_f();
  for (int c = 0; c < columns; c += kLanes) {
    const VF e = attn::exp2_f<false>(sub(load_f(s + c), m));
    sum = add(sum, e);
    store_f(s + c, e);
  }
  for (int c = columns; c < int(round_up(n, kChunk)); ++c) s[c] = 0.f;
  st.l[row] += reduce_add(sum);
  return true;
}

// Probabilities of a chunk times the scales of V -> bytes, for every group of channels.
template <class B>
inline void quantise_chunk([[maybe_unused]] const Params& p, Work& w, int r0, int r, int c) {
  const int64_t groups = w.in.groups;
  for (int64_t g = 0; g < groups; ++g) {
    const float *s = w.s + r * kBlock + c, *vs = w.vs + g * kBlock + c, *vz = w.vz + g * kBlock + c;
    VF most = zero_f(), sum = zero_f();
    for (int t = 0; t < kChunk; t += kLanes) {
      const VF x = mul(load_f(s + t), load_f(vs + t));
      most = max(most, x);
      sum = add(sum, x);  // finds a NaN, over which max passes
    }
    const float top = reduce_max(most), whole = reduce_add(sum);
    const float by = top > 1e-30f ? float(B::kMostP) / top : 0.f;
    w.p_scale[g][r] = top > 1e-30f ? top / float(B::kMostP) : 0.f;
    if (whole != whole) w.nan[r0 + r] = whole;
    uint8_t* p8 = w.p8 + (g * 4 + r) * kChunk;
    VF lost = zero_f();
    for (int t = 0; t < kChunk; t += kLanes) {
      const VI x = round_to_i(mul(mul(load_f(s + t), load_f(vs + t)), set1_f(by)));
      lost = fma(to_f(x), load_f(vz + t), lost);
      store_u8(p8 + t, x);
    }
    w.lost[(r0 + r) * groups + g] += w.p_scale[g][r] * reduce_add(lost);
  }
}

// Up to 64 keys whose values are added up, and as many of the next block's, fetched on the way:
// `lines` lines for each four keys and call.
struct Chunk {
  const uint8_t *values[kChunk / 16], *ahead[kChunk / 16];
  int count = 0, lines = 0;
};

// Adds p . V of a chunk to the totals, kLoads vectors of codes from byte `at` of each four tokens.
// With kOne all their channels are of one group.
template <class B, int kRows, int kLoads, bool kOne>
__attribute__((noinline)) void weigh([[maybe_unused]] const Params& p, const Chunk& chunk, Work& w,
                                     int r0, int64_t at) {
  VI acc[kRows][kLoads][B::kParts];
  const int64_t first = at / 64 * (16 * B::kCodes) + at % 64 / 4;  // channel of part 0
  constexpr int kGroups = kOne ? 1 : B::kCodes;
  const uint8_t* p8[kGroups];
  const float* p_scale[kGroups];
  for (int i = 0; i < kGroups; ++i) {
    const int64_t group = w.in.group(first + 16 * i);
    p8[i] = w.p8 + group * 4 * kChunk;
    p_scale[i] = w.p_scale[group];
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int l = 0; l < kLoads; ++l)
#pragma GCC unroll 4
      for (int i = 0; i < B::kParts; ++i) acc[r][l][i] = zero_i();
  const int64_t quad = w.in.v_quad;
  const uint8_t* const* codes = chunk.values;
  for (int g = 0; g < chunk.count; ++g) {
    Dot d[kRows][kLoads][B::kParts];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int l = 0; l < kLoads; ++l)
#pragma GCC unroll 4
        for (int i = 0; i < B::kParts; ++i) dot_begin(d[r][l][i], acc[r][l][i]);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      VI x[kLoads];
      const int64_t line = (at / (kLoads * kLanes * 4) * 4 + k) * chunk.lines;
      for (int l = 0; l < chunk.lines; ++l) prefetch_l2(chunk.ahead[g] + (line + l) * 64);
#pragma GCC unroll 2
      for (int l = 0; l < kLoads; ++l) x[l] = load_i(codes[g] + k * quad + at + l * kLanes * 4);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        VI q = zero_i();
#pragma GCC unroll 4
        for (int i = 0; i < B::kParts; ++i) {
          if (!kOne || i == 0)
            q = codes4(
                reinterpret_cast<const int8_t*>(p8[i % kGroups] + r * kChunk + g * 16 + k * 4));
#pragma GCC unroll 2
          for (int l = 0; l < kLoads; ++l) {
            if constexpr (B::kMostP == 127)
              dot(d[r][l][i], B::part(x[l], i), q);  // V is the unsigned operand
            else
              dot(d[r][l][i], q, B::part(x[l], i));
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int l = 0; l < kLoads; ++l)
#pragma GCC unroll 4
        for (int i = 0; i < B::kParts; ++i) acc[r][l][i] = dot_end(d[r][l][i]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int l = 0; l < kLoads; ++l)
#pragma GCC unroll 4
      for (int i = 0; i < B::kCodes; ++i) {
        const int64_t channel = first + (kLanes == 16 ? l * 16 * B::kCodes : l * kLanes) + 16 * i;
        VI sum = acc[r][l][i];
        if constexpr (B::kNibbles) sum = add(sum, mul(acc[r][l][1], set1_i(16)));
        float* o = w.o + (r0 + r) * w.in.Dv + channel;
        const float by = p_scale[kOne ? 0 : i][r];
        store_f(o, fma(to_f(sum), set1_f(by), load_f(o)));
      }
}

// One chunk of keys, all channels.
template <class B, int kRows>
inline void weigh_chunk(const Params& p, Chunk& chunk, Work& w, int r0) {
  const int64_t span = 16 * B::kCodes, bytes = w.in.Dv / span * 64;
  const bool whole = w.in.groups == 1;
  constexpr int64_t kStep = kLanes * 4;
  const int64_t key_lines = r0 > 0 ? 0 : w.in.k_group / 64;
  int64_t at = 0;
  if constexpr (kLanes == 16 && B::kParts <= 2)
    if (whole || w.in.G % (2 * span) == 0) {
      chunk.lines = int(ceil_div(key_lines * 128, bytes * 4));
      for (; at + 128 <= bytes; at += 128) weigh<B, kRows, 2, true>(p, chunk, w, r0, at);
    }
  chunk.lines = kLanes == 16 ? int(ceil_div(key_lines * 64, bytes * 4)) : 0;
  for (; at < bytes; at += kStep) {
    if (whole || w.in.G % span == 0)
      weigh<B, kRows, 1, true>(p, chunk, w, r0, at);
    else
      weigh<B, kRows, 1, false>(p, chunk, w, r0, at);
  }
}

// Scales and zeros of the values of a block, 0 past its n keys.
inline void load_v_rows(const Params& p, Work& w, int n) {
  for (int64_t g = 0; g < w.in.groups; ++g)
    for (int c = 0; c < int(round_up(n, kChunk)); c += 16) {
      const Group& group = w.here[c / 16];
      float *s = w.vs + g * kBlock + c, *z = w.vz + g * kBlock + c;
      const int64_t at = g * p.Z + group.t;
      for (int t = 0; t < 16; t += kLanes) {
        store_f(s + t, c < n ? load_x(halves(group.blob + w.in.v_scales) + at + t) : zero_f());
        store_f(z + t, c < n ? load_x(halves(group.blob + w.in.v_zeros) + at + t) : zero_f());
      }
      for (int t = n - c > 0 ? n - c : 16; t < 16; ++t) s[t] = z[t] = 0.f;
    }
}

template <class B, int kRows>
inline void weigh_block(const Params& p, Work& w, int r0, int n) {
  for (int c = 0; c < n; c += kChunk) {
    Chunk chunk;
    for (int t = c; t < c + kChunk && t < n; t += 16) {
      chunk.values[chunk.count] = w.here[t / 16].values(w.in);
      const int ahead = t / 16 < w.coming ? t / 16 : w.coming - 1;
      chunk.ahead[chunk.count] = ahead < 0 ? chunk.values[0] : w.next[ahead].keys(w.in);
      ++chunk.count;
    }
    for (int r = 0; r < kRows; ++r) quantise_chunk<B>(p, w, r0, r, c);
    weigh_chunk<B, kRows>(p, chunk, w, r0);
  }
}

// Finds the groups of up to kBlock keys from key0; fetches their scales and zeros.
inline int find_groups(const Params& p, const Rows& rows, const Work& w, int64_t key0,
                       Group* groups) {
  int count = 0;
  int64_t t = key0 % p.Z;
  for (int64_t pos = key0; pos < rows.t.kv_end && count < kBlock / 16; pos += 16, t += 16) {
    if (t >= p.Z) t = 0;
    Group& g = groups[count++];
    g = {t > 0 && count > 1 ? groups[count - 2].blob : p.blob(rows.t.request, pos, rows.j), t};
    const int64_t row = p.page.channel ? 0 : t * 2;
    prefetch_l2(g.blob + w.in.k_scales + row);
    prefetch_l2(g.blob + w.in.k_zeros + row);
    prefetch_l2(g.blob + w.in.v_scales + t * 2);
    prefetch_l2(g.blob + w.in.v_zeros + t * 2);
  }
  return count;
}

// A block of n keys for kRows rows from r0.
template <int kRows>
inline void block(const Params& p, const Rows& rows, Work& w, int r0, int64_t key0, int n,
                  float* room) {
  if (p.page.k_bits == 8) score_block<Bits<8>, kRows>(p, rows, w, r0, key0, n, room);
  if (p.page.k_bits == 4) score_block<Bits<4>, kRows>(p, rows, w, r0, key0, n, room);
  if (p.page.k_bits == 2) score_block<Bits<2>, kRows>(p, rows, w, r0, key0, n, room);
  for (int r = 0; r < kRows; ++r) {
    const int row = r0 + r;
    if (!softmax(rows, w, r0, r, key0, n))
      for (int c = 0; c < int(round_up(n, kChunk)); ++c) w.s[r * kBlock + c] = 0.f;
    if (const float keep = w.st.keep[row]; keep != 1.f) {
      float* o = w.o + row * w.in.Dv;
      for (int64_t d = 0; d < w.in.Dv; d += kLanes)
        store_f(o + d, mul(load_f(o + d), set1_f(keep)));
      for (int64_t g = 0; g < w.in.groups; ++g) w.lost[row * w.in.groups + g] *= keep;
    }
  }
  if (p.page.v_bits == 8) weigh_block<Bits<8>, kRows>(p, w, r0, n);
  if (p.page.v_bits == 4) weigh_block<Bits<4>, kRows>(p, w, r0, n);
  if (p.page.v_bits == 2) weigh_block<Bits<2>, kRows>(p, w, r0, n);
}

inline void run_task(const Params& p, const Task& t, int64_t j, float* memory) {
  const Rows rows(p, t, j);
  float* room = memory;
  Work w(memory + 2 * 256, p, t.rows);
  w.st.begin(t.rows);
  const int64_t groups = w.in.groups, Dv = w.in.Dv;
  for (int r = 0; r < t.rows; ++r) {
    float* q = w.q + r * p.D;
    rows.load_q(r, q);
    w.bias[r] = change_query(p, rows, q, room);
    w.page_bias[r] = 0.f;
    w.q_scale[r] = quantise_row(q, p.D, w.in.G, w.q8 + r * p.D, w.q_sum + r * groups);
  }
  w.coming = find_groups(p, rows, w, t.kv_begin, w.next);
  for (int64_t key0 = t.kv_begin; key0 < t.kv_end; key0 += kBlock) {
    const int n = int(t.kv_end - key0 < kBlock ? t.kv_end - key0 : kBlock);
    for (int i = 0; i < w.coming; ++i) w.here[i] = w.next[i];
    w.coming = find_groups(p, rows, w, key0 + kBlock, w.next);
    load_v_rows(p, w, n);
    int r = 0;
    for (; r + 4 <= t.rows; r += 4) block<4>(p, rows, w, r, key0, n, room);
    for (; r + 2 <= t.rows; r += 2) block<2>(p, rows, w, r, key0, n, room);
    for (; r < t.rows; ++r) block<1>(p, rows, w, r, key0, n, room);
  }
  for (int r = 0; r < t.rows; ++r) {
    float* o = w.o + r * Dv;
    for (int64_t d = 0; d < p.D; d += kLanes)
      store_f(o + d, sub(load_f(o + d), set1_f(w.lost[r * groups + d / w.in.G] + w.nan[r])));
    apply(p.o_fold, p.factor_row(t.request), rows, o, room);
    attn::finish_row(rows, w.st, r, o);
  }
}

}  // namespace coded

inline void kv4_codes(const kv4::Params& p, const msm::Task& t, int64_t j, float* scratch) {
  coded::run_task(p, t, j, scratch);
}
inline void kv4_tile(const kv4::Params& p, const msm::Task& t, int64_t j, float* scratch) {
  attn::run_task<attn::Fp32Math>(p, coded::Decoded<attn::Fp32Math>{p}, t, j, scratch);
}
inline void kv4_bf16(const kv4::Params& p, const msm::Task& t, int64_t j, float* scratch) {
  attn::run_task<attn::Bf16Math>(p, coded::Decoded<attn::Bf16Math>{p}, t, j, scratch);
}
