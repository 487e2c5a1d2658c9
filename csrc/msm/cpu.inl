// Body of attention, compiled once per instruction set (cpu/foreach_isa.h): tiles of packed query
// rows against blocks of keys, with the running maximum and sum of the online softmax.
//
// A source brings a block of keys and values from its pages into the order in which they are
// multiplied; all else is the same for every source. In a block, a few rows at a time:
//   S = Q K^T   ->   P = exp2(S - max), and the row's sum   ->   O = keep * O + P V
// Both products are one micro kernel: a row operand broadcast from memory, times a column operand
// of kLanes columns; in bf16 both hold pairs along the depth. Scores live in base 2: exp2 is
// cheaper.

// As core/half.h's to_float.
inline VF load_x(const E4M3* p) {
  const VI u = load_u8(&p->bits), rest = bit_and(u, set1_i(0x7f));
  const VI nan = mul(shift_right(add(rest, set1_i(1)), 7), set1_i(0x7fc00000));
  const VF x = mul(from_bits(shift_left(rest, 20)), set1_f(0x1p120f));
  const VI sign = shift_left(shift_right(u, 7), 31);
  return from_bits(bit_or(bit_or(to_bits(x), nan), sign));
}

namespace attn {

using msm::Batch;
using msm::Mask;
using msm::Task;

constexpr int kKeys = 128;      // of a block
constexpr int kMostRows = 128;  // of a tile
constexpr int kSubRows = 24;    // scored at a time: their scores stay in L1
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kInf = __builtin_inff();

// How products are computed: kPair neighbours along the depth lie side by side.
struct Fp32Math {
  using E = float;
  using Operand = VF;
  static constexpr int kPair = 1;
  static VF load(const float* p) { return load_f(p); }
  static VF spread(const float* p) { return set1_f(*p); }
  static void dot(VF& acc, VF a, VF b) { acc = fma(a, b, acc); }
  static void store_p(float* p, VF x) { store_f(p, x); }
};
struct Bf16Math {
  using E = BF16;
  using Operand = VI;
  static constexpr int kPair = 2;
  static VI load(const BF16* p) { return load_i(p); }
  static VI spread(const BF16* p) { return codes4(reinterpret_cast<const int8_t*>(p)); }
  static void dot(VF& acc, VI a, VI b) { dot_bf16(acc, a, b); }
  // probabilities are neither negative nor huge: adding half a unit cannot overflow
  static void store_p(BF16* p, VF x) {
    store_i16(p, shift_right(add(to_bits(x), set1_i(0x8000)), 16));
  }
};

// 2^x, x <= 0 (0 below 2^-126), NaN for NaN; Taylor terms leave 1.2e-7 relative (kExact), or 4e-5.
template <bool kExact>
inline VF exp2_f(VF x) {
  x = max(set1_f(-127.f), x);  // in this order a NaN stays
  const VI n = round_to_i(x);
  const VF f = sub(x, to_f(n));
  VF y = set1_f(0.0096181291f);
  if constexpr (kExact) {
    y = fma(set1_f(0.00015403530f), f, set1_f(0.0013333558f));
    y = fma(y, f, set1_f(0.0096181291f));
  }
  y = fma(y, f, set1_f(0.0555041087f));
  y = fma(y, f, set1_f(0.2402265070f));
  y = fma(y, f, set1_f(0.6931471806f));
  return mul(fma(y, f, set1_f(1.f)), pow2(n));
}

// cap * tanh(x / cap), tanh from exp2 of a non-positive number.
inline VF softcap_f(VF x, float cap) {
  const VF y = mul(x, set1_f(1.f / cap));
  const VF a = from_bits(abs_bits(y));
  const VF e = exp2_f<true>(mul(a, set1_f(-2.f * kLog2e)));
  const VF t = div(sub(set1_f(1.f), e), add(set1_f(1.f), e));
  const VI sign = bit_and(to_bits(y), set1_i(int32_t(0x80000000u)));
  return mul(from_bits(bit_or(to_bits(t), sign)), set1_f(cap));
}

constexpr int kPieces = 4;  // fetched by one product, a line of each in every step

// c[r][n] = (keep ? keep[r] * c[r][n] : 0) + sum_k a[r][k] b[k][n] for kRows x kVecs vectors.
template <class M>
struct Product {
  const typename M::E* a;
  int64_t lda;
  const typename M::E* b;  // kPair rows of b together, ldb elements on the next kPair
  int64_t ldb;
  int depth;
  float* c;
  int64_t ldc;
  const float* keep;
  const char* const* ahead = nullptr;  // kPieces pieces of memory to fetch on the way, or null
};

template <class M, int kRows, int kVecs>
__attribute__((noinline)) void multiply(const Product<M>& t) {
  VF acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v)
      acc[r][v] = t.keep ? mul(set1_f(t.keep[r]), load_f(t.c + r * t.ldc + v * kLanes)) : zero_f();
  const typename M::E* b = t.b;
  for (int k = 0; k < t.depth; k += M::kPair, b += t.ldb) {
    if (t.ahead)
      for (int i = 0; i < kPieces; ++i) prefetch_l2(t.ahead[i] + k / M::kPair * 64);
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
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) store_f(t.c + r * t.ldc + v * kLanes, acc[r][v]);
}

template <class M, int kVecs, int... kRows>
inline void multiply_rows(const Product<M>& all, int rows) {
  int r = 0;
  auto cover = [&](auto count) {
    constexpr int kR = decltype(count)::value;
    for (; r + kR <= rows; r += kR) {
      Product<M> t = all;
      t.a += r * t.lda;
      t.c += r * t.ldc;
      if (t.keep) t.keep += r;
      if (r > 0) t.ahead = nullptr;
      multiply<M, kR, kVecs>(t);
    }
  };
  (cover(Const<kRows>{}), ...);
}

// Any rows, columns a multiple of 16. `ahead` has kPieces pieces for every 64 columns.
template <class M>
inline void multiply_all(Product<M> t, int rows, int columns) {
  constexpr int kVecs = kLanes == 16 ? 4 : 2;
  int n = 0;
  auto step = [&](int by) {
    n += by;
    t.b += by * M::kPair;
    t.c += by;
    if (t.ahead) t.ahead += kPieces;
  };
  for (; n + kVecs * kLanes <= columns; step(kVecs * kLanes)) {
    if constexpr (kLanes == 16)
      multiply_rows<M, kVecs, 6, 4, 2, 1>(t, rows);
    else
      multiply_rows<M, kVecs, 4, 2, 1>(t, rows);
  }
  for (; n < columns; step(kLanes)) multiply_rows<M, 1, 4, 1>(t, rows);
}

// Elements of a row of any dtype -> fp32.
inline void load_row(const void* from, int64_t at, DType dtype, int64_t D, float* to) {
  for (int64_t d = 0; d < D; d += kLanes) {
    VF x = zero_f();
    if (dtype == DType::kBF16) x = load_x(static_cast<const BF16*>(from) + at + d);
    if (dtype == DType::kF16) x = load_x(static_cast<const F16*>(from) + at + d);
    if (dtype == DType::kF32) x = load_x(static_cast<const float*>(from) + at + d);
    store_f(to + d, x);
  }
}

// x [D] -> INT8 codes and their scale (NaN where x is not finite), sums of each group's codes.
inline float quantise_row(const float* x, int64_t D, int64_t G, int8_t* codes, float* sums) {
  VI top = zero_i();
  for (int64_t d = 0; d < D; d += kLanes) top = max_i(top, abs_bits(load_f(x + d)));
  const float most = bits_to_float(uint32_t(reduce_max(top)));
  if (!(most < kInf)) {
    __builtin_memset(codes, 0, size_t(D));
    for (int64_t g = 0; g < D / G; ++g) sums[g] = 0.f;
    return __builtin_nanf("");
  }
  const VF by = set1_f(most > 1e-30f ? 127.f / most : 0.f);
  VI sum = zero_i();
  for (int64_t d = 0; d < D; d += kLanes) {
    const VI c = round_to_i(mul(load_f(x + d), by));
    sum = add(sum, c);
    store_i8(codes + d, c);
    if ((d + kLanes) % G == 0) {
      sums[d / G] = float(reduce_add(sum));
      sum = zero_i();
    }
  }
  return most > 1e-30f ? most / 127.f : 0.f;
}

// A tile's place in the batch.
struct Rows {
  Rows(const Batch& batch, const Task& task, int64_t head)
      : p(batch),
        t(task),
        j(head),
        G(batch.H / batch.J),
        mask(batch.mask_of(task.request)),
        first(batch.cu_q[task.request]),
        hist(batch.kv_len[task.request] - (batch.cu_q[task.request + 1] - first)) {}

  const Batch& p;
  const Task& t;
  int64_t j, G;
  Mask mask;
  int64_t first, hist;  // first token of the request; keys before its query tokens

  int64_t token(int r) const { return (t.row0 + r) / G; }
  int64_t head(int r) const { return j * G + (t.row0 + r) % G; }
  void load_q(int r, float* to) const {
    load_row(p.q, (first + token(r)) * p.q_token + head(r) * p.q_head, p.dtype, p.D, to);
  }
};

// The columns [a, b) of a block of n keys from key0 that a row sees, but for a tree's bits.
struct Seen {
  int a, b;
};
inline Seen seen(const Rows& rows, int r, int64_t key0, int n) {
  int64_t lo = key0, hi = key0 + n;
  const int64_t pos = rows.hist + rows.token(r);
  if (rows.mask == Mask::kCausal || rows.mask == Mask::kWindow) hi = pos + 1 < hi ? pos + 1 : hi;
  if (rows.mask == Mask::kWindow && pos - rows.p.window + 1 > lo) lo = pos - rows.p.window + 1;
  if (hi <= lo) return {0, 0};
  return {int(lo - key0), int(hi - key0)};
}

// Scores outside the row's keys -> -inf; `columns` is n rounded up to what is computed.
inline void hide(const Rows& rows, int r, int64_t key0, int n, int columns, float* s) {
  const Seen v = seen(rows, r, key0, n);
  for (int c = 0; c < v.a; ++c) s[c] = -kInf;
  for (int c = v.b; c < columns; ++c) s[c] = -kInf;
  if (rows.mask != Mask::kTree || key0 + n <= rows.hist) return;
  const Batch& p = rows.p;
  const uint64_t* bits = p.tree_bits + (p.tree_row[rows.t.request] + rows.token(r)) * p.tree_words;
  for (int c = key0 < rows.hist ? int(rows.hist - key0) : 0; c < n; ++c) {
    const int64_t node = key0 + c - rows.hist;
    if (!(bits[node / 64] >> (node % 64) & 1)) s[c] = -kInf;
  }
}

// What a row carries from block to block: maximum (base 2), sum, and the factor for its totals.
struct State {
  float m[kMostRows], l[kMostRows], keep[kMostRows];
  float bias[kMostRows];  // what all scores of the row lack, before the scale

  void begin(int rows) {
    for (int r = 0; r < rows; ++r) {
      m[r] = -kInf;
      l[r] = 0.f;
    }
  }
};

// s [columns]: the rest of the way from dot products to scores in base 2; returns their maximum.
inline float scale_scores(float* s, int columns, float by, float bias) {
  VF most = set1_f(-kInf);
  for (int c = 0; c < columns; c += kLanes) {
    const VF x = fma(load_f(s + c), set1_f(by), set1_f(bias));
    store_f(s + c, x);
    most = max(most, x);
  }
  return reduce_max(most);
}

// Dot products times `by` plus `bias` -> scores under the softcap.
inline void cap_scores(const Batch& p, float* s, int columns, float by, float bias) {
  for (int c = 0; c < columns; c += kLanes)
    store_f(s + c, softcap_f(fma(load_f(s + c), set1_f(by), set1_f(bias)), p.softcap));
}

// Dot products, times `by` plus `bias` the scaled scores of row r -> scores in base 2, -inf where
// hidden; returns their maximum, NaN if all that is seen is NaN.
inline float make_scores(const Rows& rows, int r, int64_t key0, int n, float* s, float by,
                         float bias) {
  const int columns = int(round_up(n, 16));
  if (rows.p.softcap > 0.f) {  // before hiding: its result is finite everywhere
    cap_scores(rows.p, s, columns, by, bias);
    by = 1.f;
    bias = 0.f;
  }
  hide(rows, r, key0, n, columns, s);
  const float most = scale_scores(s, columns, by * kLog2e, bias * kLog2e);
  if (most != -kInf) return most;
  VF sum = zero_f();  // the maximum passes over NaN
  for (int c = 0; c < columns; c += kLanes) sum = add(sum, load_f(s + c));
  const float nan = reduce_add(sum);
  return nan != nan ? nan : most;
}

// Takes the block's maximum into the state; false when the row has seen no key yet.
inline bool advance(State& st, int r, float block_max) {
  const float m = st.m[r] > block_max ? st.m[r] : block_max;
  st.keep[r] = 1.f;
  if (m == -kInf) return false;
  if (m > st.m[r]) {
    st.keep[r] = __builtin_exp2f(st.m[r] - m);
    st.l[r] *= st.keep[r];
    st.m[r] = m;
  }
  return true;
}

template <class M>
inline void softmax_row(const Rows& rows, State& st, int r, int64_t key0, int n, float* s,
                        typename M::E* out) {
  const int columns = int(round_up(n, 16));
  const float most = make_scores(rows, r, key0, n, s, rows.p.scale, st.bias[r] * rows.p.scale);
  if (most != most) {
    st.m[r] = st.l[r] = most;
    st.keep[r] = most;
  } else if (st.m[r] != st.m[r] || !advance(st, r, most)) {
    for (int c = 0; c < columns; c += kLanes) M::store_p(out + c, zero_f());
    return;
  }
  const VF m = set1_f(st.m[r]);
  VF sum = zero_f();
  for (int c = 0; c < columns; c += kLanes) {
    const VF e = exp2_f<M::kPair == 1>(sub(load_f(s + c), m));
    sum = add(sum, e);
    M::store_p(out + c, e);
  }
  st.l[r] += reduce_add(sum);
}

// Totals o of row r -> the result, or a partial result: divided by the sum; with its lse.
inline void finish_row(const Rows& rows, const State& st, int r, float* o) {
  const Batch& p = rows.p;
  const Task& t = rows.t;
  float m = st.m[r], l = st.l[r], by = l > 0.f || l != l ? 1.f / l : 0.f;
  if (t.partial < 0 && p.sinks) {
    const float sink = p.sinks[rows.head(r)] * kLog2e, top = m > sink ? m : sink;
    const float share = m == -kInf ? 0.f : __builtin_exp2f(m - top);
    l = l * share + __builtin_exp2f(sink - top);
    by = share / l;
    m = top;
  }
  const float lse = l == 0.f ? -kInf : (m + __builtin_log2f(l)) * kLn2;
  if (t.partial >= 0) {
    const int64_t at = rows.j * p.partial_rows + t.partial + r;
    for (int64_t d = 0; d < p.D; d += kLanes)
      store_f(p.partial + at * p.D + d, mul(load_f(o + d), set1_f(by)));
    p.partial_lse[at] = lse;
    return;
  }
  const int64_t at = (rows.first + rows.token(r)) * p.H + rows.head(r);
  if (p.lse) p.lse[at] = lse;
  for (int64_t d = 0; d < p.D; d += kLanes) {
    const VF x = mul(load_f(o + d), set1_f(by));
    if (p.dtype == DType::kBF16) store_x(static_cast<BF16*>(p.out) + at * p.D + d, x);
    if (p.dtype == DType::kF16) store_x(static_cast<F16*>(p.out) + at * p.D + d, x);
    if (p.dtype == DType::kF32) store_x(static_cast<float*>(p.out) + at * p.D + d, x);
  }
}

// A task's memory, carved from the thread's scratch (msm::kScratch* floats).
template <class M>
struct Work {
  using E = typename M::E;
  Work(float* at, int64_t D) {
    auto take = [&](int64_t floats) {
      float* here = at;
      at += round_up(floats, 16);
      return here;
    };
    o = take(kMostRows * D);
    s = take(kSubRows * kKeys);
    row = take(16 * D);
    q = reinterpret_cast<E*>(take(kMostRows * D));
    kt = reinterpret_cast<E*>(take((D + 16) * kKeys));
    v = reinterpret_cast<E*>(take(kKeys * D));
    p = reinterpret_cast<E*>(take(kSubRows * kKeys));
  }

  float *o, *s, *row;  // totals [rows][D], scores [kSubRows][kKeys], room for 16 rows
  E *q, *kt, *v, *p;   // [rows][D], [D/pair][kKeys][pair], [kKeys/pair][D][pair], [kSubRows][kKeys]
};

// One task and kv head. The source has ahead(rows, key0, pieces) to name memory to fetch,
// query(rows, float*) to change a query row, result(rows, o, room) to change a total back, and
// load(rows, key0, n, Work&) to bring keys and values.
template <class M, class Source>
inline void run_task(const Batch& p, const Source& source, const Task& t, int64_t j,
                     float* memory) {
  const Rows rows(p, t, j);
  Work<M> w(memory, p.D);
  State st;
  st.begin(t.rows);
  for (int r = 0; r < t.rows; ++r) {
    rows.load_q(r, w.row);
    st.bias[r] = source.query(rows, w.row);
    for (int64_t d = 0; d < p.D; d += kLanes) store_x(w.q + r * p.D + d, load_f(w.row + d));
  }
  __builtin_memset(w.o, 0, size_t(t.rows) * size_t(p.D) * sizeof(float));
  for (int64_t key0 = t.kv_begin; key0 < t.kv_end; key0 += kKeys) {
    const int n = int(t.kv_end - key0 < kKeys ? t.kv_end - key0 : kKeys);
    source.load(rows, key0, n, w);
    const char* pieces[4 * kPieces];
    const char* const* ahead =
        kLanes == 16 && p.D % 64 == 0 && p.D <= 128 && source.ahead(rows, key0 + kKeys, pieces)
            ? pieces
            : nullptr;
    for (int r0 = 0; r0 < t.rows; r0 += kSubRows) {
      const int count = t.rows - r0 < kSubRows ? t.rows - r0 : kSubRows;
      multiply_all<M>({w.q + r0 * p.D, p.D, w.kt, kKeys * M::kPair, int(p.D), w.s, kKeys, nullptr,
                       r0 == 0 ? ahead : nullptr},
                      count, int(round_up(n, 16)));
      for (int r = 0; r < count; ++r)
        softmax_row<M>(rows, st, r0 + r, key0, n, w.s + r * kKeys, w.p + r * kKeys);
      multiply_all<M>({w.p, kKeys, w.v, p.D * M::kPair, int(round_up(n, M::kPair)), w.o + r0 * p.D,
                       p.D, st.keep + r0, r0 == 0 && ahead ? ahead + 2 * kPieces : nullptr},
                      count, int(p.D));
    }
  }
  for (int r = 0; r < t.rows; ++r) {
    source.result(rows, w.o + r * p.D, w.row);
    finish_row(rows, st, r, w.o + r * p.D);
  }
}

// Pages [P][J][2][Z][D] of T.
template <class M, class T>
struct Plain {
  const msm::Params& p;

  float query(const Rows&, float*) const { return 0.f; }
  void result(const Rows&, float*, float*) const {}

  // Where the block from key0 lies, 16 keys or values a piece; false if it is not whole.
  bool ahead(const Rows& rows, int64_t key0, const char** pieces) const {
    static_assert(kKeys / 16 == 2 * kPieces, "keys, then values");
    if (M::kPair != 2 || key0 + kKeys > rows.t.kv_end) return false;
    for (int i = 0; i < kKeys / 16; ++i) {
      const T* k = keys(rows, key0 + 16 * i);
      pieces[i] = reinterpret_cast<const char*>(k);
      pieces[i + kKeys / 16] = reinterpret_cast<const char*>(k + p.Z * p.D);
    }
    return true;
  }

  const T* keys(const Rows& rows, int64_t pos) const {
    const int64_t page = p.block_table[rows.t.request * p.table_stride + pos / p.Z];
    return static_cast<const T*>(p.pages) + ((page * p.J + rows.j) * 2 * p.Z + pos % p.Z) * p.D;
  }

  void load(const Rows& rows, int64_t key0, int n, Work<M>& w) const {
    for (int c = 0; c < n; c += 16) {
      const T* k = keys(rows, key0 + c);
      const T* v = k + p.Z * p.D;
      const int valid = n - c < 16 ? n - c : 16;
      // the K part of the rest of the group may hold anything: its scores are hidden
      for (int i = 0; i < 16; i += kLanes) load_keys(k + i * p.D, c + i, w);
      load_values(v, valid, c, w);
    }
  }

  void load_keys(const T* k, int column, Work<M>& w) const {
    if constexpr (M::kPair == 2) {  // 2 kLanes channels a time; past D lies the page's next row
      for (int64_t d = 0; d < p.D; d += 2 * kLanes)
        transpose(k + d, p.D * 2, w.kt + d * kKeys + column * 2, kKeys * 4);
    } else {
      const float* from = w.row;
      if constexpr (sizeof(T) == 4) {
        from = k;
      } else {
        for (int i = 0; i < kLanes; ++i)
          for (int64_t d = 0; d < p.D; d += kLanes)
            store_f(w.row + i * p.D + d, load_x(k + i * p.D + d));
      }
      for (int64_t d = 0; d < p.D; d += kLanes)
        transpose(from + d, p.D * 4, w.kt + d * kKeys + column, kKeys * 4);
    }
  }

  void load_values(const T* v, int valid, int row, Work<M>& w) const {
    if constexpr (M::kPair == 2) {
      for (int i = 0; i < valid; i += 2)
        for (int64_t d = 0; d < p.D; d += kLanes) {
          const T* a = v + i * p.D + d;
          VI both = pairs_bf16(a, i + 1 < valid ? a + p.D : a);
          if (i + 1 == valid) both = bit_and(both, set1_i(0xffff));
          store_i(w.v + (row + i) * p.D + d * 2, both);
        }
    } else {
      for (int i = 0; i < valid; ++i)
        for (int64_t d = 0; d < p.D; d += kLanes)
          store_f(w.v + (row + i) * p.D + d, load_x(v + i * p.D + d));
    }
  }
};

}  // namespace attn

template <class M, class T>
inline void msm_run(const msm::Params& p, const msm::Task& t, int64_t j, float* scratch) {
  attn::run_task<M>(p, attn::Plain<M, T>{p}, t, j, scratch);
}
inline void msm_tile(const msm::Params& p, const msm::Task& t, int64_t j, float* scratch) {
  if (p.page_dtype == DType::kBF16) msm_run<attn::Fp32Math, BF16>(p, t, j, scratch);
  if (p.page_dtype == DType::kF16) msm_run<attn::Fp32Math, F16>(p, t, j, scratch);
  if (p.page_dtype == DType::kF32) msm_run<attn::Fp32Math, float>(p, t, j, scratch);
  if (p.page_dtype == DType::kE4M3) msm_run<attn::Fp32Math, E4M3>(p, t, j, scratch);
}
inline void msm_bf16(const msm::Params& p, const msm::Task& t, int64_t j, float* scratch) {
  if (p.page_dtype == DType::kBF16)
    msm_run<attn::Bf16Math, BF16>(p, t, j, scratch);
  else
    msm_tile(p, t, j, scratch);
}
