// The vocabulary of the CPU bodies on AVX512-VNNI: 16 lanes. Same names in every vec_*.h;
// included by foreach_isa.h inside this set's region and namespace.

constexpr int kLanes = 16;
constexpr bool kWideBytes = true;  // dot() takes any unsigned byte, not only nibbles

using VI = __m512i;
using VF = __m512;

inline VI zero_i() { return _mm512_setzero_si512(); }
inline VI set1_i(int32_t x) { return _mm512_set1_epi32(x); }
inline VI load_i(const void* p) { return _mm512_loadu_si512(p); }
inline void store_i(void* p, VI x) { _mm512_storeu_si512(p, x); }
inline VI add(VI a, VI b) { return _mm512_add_epi32(a, b); }
inline VI sub(VI a, VI b) { return _mm512_sub_epi32(a, b); }
inline VI mul(VI a, VI b) { return _mm512_mullo_epi32(a, b); }
inline VI max_i(VI a, VI b) { return _mm512_max_epi32(a, b); }
inline int32_t reduce_max(VI a) { return _mm512_reduce_max_epi32(a); }
inline int32_t reduce_add(VI a) { return _mm512_reduce_add_epi32(a); }
// Low 16 bits of a lane of a (whose high 16 are zero) times the signed low 16 bits of b.
inline VI mul16(VI a, VI b) { return _mm512_madd_epi16(a, b); }
inline VI load_u8(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline VF zero_f() { return _mm512_setzero_ps(); }
inline VF set1_f(float x) { return _mm512_set1_ps(x); }
inline VF load_f(const float* p) { return _mm512_loadu_ps(p); }
inline void store_f(float* p, VF x) { _mm512_storeu_ps(p, x); }
inline VF add(VF a, VF b) { return _mm512_add_ps(a, b); }
inline VF mul(VF a, VF b) { return _mm512_mul_ps(a, b); }
inline VF div(VF a, VF b) { return _mm512_div_ps(a, b); }
inline VF min(VF a, VF b) { return _mm512_min_ps(a, b); }
inline VF max(VF a, VF b) { return _mm512_max_ps(a, b); }
inline float reduce_add(VF a) { return _mm512_reduce_add_ps(a); }
inline float reduce_max(VF a) { return _mm512_reduce_max_ps(a); }
inline VF sub(VF a, VF b) { return _mm512_sub_ps(a, b); }
inline VI to_bits(VF x) { return _mm512_castps_si512(x); }
inline VF from_bits(VI x) { return _mm512_castsi512_ps(x); }
inline VI shift_right(VI x, int by) { return _mm512_srli_epi32(x, by); }  // zeros come in
inline VI shift_left(VI x, int by) { return _mm512_slli_epi32(x, by); }
inline VI bit_and(VI a, VI b) { return _mm512_and_si512(a, b); }
inline VI bit_or(VI a, VI b) { return _mm512_or_si512(a, b); }
inline VF fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
inline VF to_f(VI x) { return _mm512_cvtepi32_ps(x); }
inline VI round_to_i(VF x) { return _mm512_cvtps_epi32(x); }  // to nearest, ties to even
inline VF pow2(VI e) {                                        // 2^e, -126 <= e <= 127
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(e, set1_i(127)), 23));
}
inline VI abs_bits(VF x) {
  return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}

inline __m256i load16(const void* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline VF load_x(const float* p) { return load_f(p); }
inline VF load_x(const F16* p) { return _mm512_cvtph_ps(load16(p)); }
inline VF load_x(const BF16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load16(p)), 16));
}
inline void store_x(float* p, VF x) { store_f(p, x); }
inline void store_x(F16* p, VF x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_x(BF16* p, VF x) {
  const VI u = _mm512_castps_si512(x);
  const VI odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), set1_i(1));
  const VI even = _mm512_srli_epi32(add(u, add(odd, set1_i(0x7fff))), 16);
  const VI nan = _mm512_or_si512(_mm512_srli_epi32(u, 16), set1_i(0x40));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(even, is_nan, nan)));
}
inline void store_i8(int8_t* p, VI x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
inline VF load_i8(const int8_t* p) {
  return to_f(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void store_u8(uint8_t* p, VI x) {  // lanes in 0..255
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
inline void store_i16(void* p, VI x) {  // the low 16 bits of each lane
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
}

// dst[j][i] = src[i][j] for kLanes x kLanes 32-bit words; strides in bytes.
inline void transpose(const void* src, int64_t src_stride, void* dst, int64_t dst_stride) {
  VI r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = load_i(static_cast<const char*>(src) + i * src_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  char* to = static_cast<char*>(dst);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    store_i(to + i * dst_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    store_i(to + (i + 8) * dst_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    store_i(to + (i + 4) * dst_stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
    store_i(to + (i + 12) * dst_stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
  }
}

// --- codes
// 4 activation codes in every lane.
inline VI codes4(const int8_t* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}
// Of kLanes features x 8 channels of packed weights, channels 0..3 and 4..7.
inline VI low_nibbles(VI w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
inline VI high_nibbles(VI w) { return low_nibbles(_mm512_srli_epi32(w, 4)); }
// 32 bytes -> their low nibbles, then their high ones.
inline void split_nibbles(const uint8_t* from, uint8_t* to) {
  const __m256i x = load16(from), mask = _mm256_set1_epi8(15);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_and_si256(x, mask));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32),
                      _mm256_and_si256(_mm256_srli_epi16(x, 4), mask));
}
// A byte of each lane's four, wrapping.
inline VI sub_bytes(VI a, VI b) { return _mm512_sub_epi8(a, b); }
// Byte i of four rows side by side: 4 vectors, whose lane at place p is of byte woven(p).
inline void weave(const VI (&row)[4], uint8_t* to) {
  const VI a = _mm512_unpacklo_epi8(row[0], row[1]), b = _mm512_unpackhi_epi8(row[0], row[1]);
  const VI c = _mm512_unpacklo_epi8(row[2], row[3]), d = _mm512_unpackhi_epi8(row[2], row[3]);
  store_i(to, _mm512_unpacklo_epi16(a, c));
  store_i(to + 64, _mm512_unpackhi_epi16(a, c));
  store_i(to + 128, _mm512_unpacklo_epi16(b, d));
  store_i(to + 192, _mm512_unpackhi_epi16(b, d));
}
constexpr int woven(int place) { return place % 16 / 4 * 16 + place / 16 * 4 + place % 4; }
// Bytes q * s1 + a of nibbles q, where lane n of s1 and a is one feature's: level 2 of two-level.
struct Widen {
  VI s1, a;
};
inline Widen widen_scales(const uint8_t* s1, const uint8_t* a) {
  const VI s = load_u8(s1), b = load_u8(a);
  return {_mm512_or_si512(s, _mm512_slli_epi32(s, 16)), mul(b, set1_i(0x01010101))};
}
inline VI widen(VI q, const Widen& w) { return _mm512_add_epi8(_mm512_mullo_epi16(q, w.s1), w.a); }

// A running dot product of unsigned weight bytes and signed codes. NOTE: gcc 12 copies every
// accumulator of a _mm512_dpbusd_epi32 tile each iteration; the tied asm operand prevents it.
struct Dot {
  VI acc;
};
inline void dot_begin(Dot& d, VI acc) { d.acc = acc; }
inline void dot(Dot& d, VI w, VI x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(d.acc) : "v"(w), "v"(x));
}
inline VI dot_end(const Dot& d) { return d.acc; }
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// Into L2 only: a fetch that waits for memory then holds none of L1's few miss buffers.
inline void prefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// --- bf16 pairs
// acc += the two products of each lane's pair of bf16. The body that uses it is only run where
// the CPU has it (isa.h); asm, since this region does not enable it.
inline void dot_bf16(VF& acc, VI a, VI b) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}
// kLanes pairs (a[i], b[i]).
inline VI pairs_bf16(const BF16* a, const BF16* b) {
  const VI index = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                    39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  return _mm512_permutex2var_epi16(_mm512_castsi256_si512(load16(a)), index,
                                   _mm512_castsi256_si512(load16(b)));
}
