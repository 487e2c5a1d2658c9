// The vocabulary of the CPU bodies on 256-bit vectors: 8 lanes; with TSL_AVX_VNNI the dot product
// is VPDPBUSD, else AVX2's VPMADDUBSW. Same names in every vec_*.h; included by foreach_isa.h
// inside this set's region and namespace.

constexpr int kLanes = 8;
constexpr bool kWideBytes = TSL_AVX_VNNI;  // VPMADDUBSW would saturate on bytes above 128

using VI = __m256i;
using VF = __m256;

inline VI zero_i() { return _mm256_setzero_si256(); }
inline VI set1_i(int32_t x) { return _mm256_set1_epi32(x); }
inline VI load_i(const void* p) { return _mm256_loadu_si256(static_cast<const VI*>(p)); }
inline void store_i(void* p, VI x) { _mm256_storeu_si256(static_cast<VI*>(p), x); }
inline VI add(VI a, VI b) { return _mm256_add_epi32(a, b); }
inline VI sub(VI a, VI b) { return _mm256_sub_epi32(a, b); }
inline VI mul(VI a, VI b) { return _mm256_mullo_epi32(a, b); }
inline VI max_i(VI a, VI b) { return _mm256_max_epi32(a, b); }
inline int32_t reduce_max(VI a) {
  __m128i x = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
inline int32_t reduce_add(VI a) {
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
// Low 16 bits of a lane of a (whose high 16 are zero) times the signed low 16 bits of b.
inline VI mul16(VI a, VI b) { return _mm256_madd_epi16(a, b); }
inline __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline VI load_u8(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

inline VF zero_f() { return _mm256_setzero_ps(); }
inline VF set1_f(float x) { return _mm256_set1_ps(x); }
inline VF load_f(const float* p) { return _mm256_loadu_ps(p); }
inline void store_f(float* p, VF x) { _mm256_storeu_ps(p, x); }
inline VF add(VF a, VF b) { return _mm256_add_ps(a, b); }
inline VF mul(VF a, VF b) { return _mm256_mul_ps(a, b); }
inline VF div(VF a, VF b) { return _mm256_div_ps(a, b); }
inline VF min(VF a, VF b) { return _mm256_min_ps(a, b); }
inline VF max(VF a, VF b) { return _mm256_max_ps(a, b); }
inline float reduce_add(VF a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline VF fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
inline float reduce_max(VF a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline VF sub(VF a, VF b) { return _mm256_sub_ps(a, b); }
inline VI to_bits(VF x) { return _mm256_castps_si256(x); }
inline VF from_bits(VI x) { return _mm256_castsi256_ps(x); }
inline VI shift_right(VI x, int by) { return _mm256_srli_epi32(x, by); }  // zeros come in
inline VI shift_left(VI x, int by) { return _mm256_slli_epi32(x, by); }
inline VI bit_and(VI a, VI b) { return _mm256_and_si256(a, b); }
inline VI bit_or(VI a, VI b) { return _mm256_or_si256(a, b); }
inline VF to_f(VI x) { return _mm256_cvtepi32_ps(x); }
inline VI round_to_i(VF x) { return _mm256_cvtps_epi32(x); }  // to nearest, ties to even
inline VF pow2(VI e) {                                        // 2^e, -126 <= e <= 127
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, set1_i(127)), 23));
}
inline VI abs_bits(VF x) {
  return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
}

inline VF load_x(const float* p) { return load_f(p); }
inline VF load_x(const F16* p) { return _mm256_cvtph_ps(load16(p)); }
inline VF load_x(const BF16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16));
}
// The low 16 bits of 8 lanes.
inline __m128i low16(VI x) {
  const VI packed = _mm256_packus_epi32(x, x);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
inline void store_x(float* p, VF x) { store_f(p, x); }
inline void store_x(F16* p, VF x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_x(BF16* p, VF x) {
  const VI u = _mm256_castps_si256(x);
  const VI odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), set1_i(1));
  const VI even = _mm256_srli_epi32(add(u, add(odd, set1_i(0x7fff))), 16);
  const VI nan = _mm256_or_si256(_mm256_srli_epi32(u, 16), set1_i(0x40));
  const VI is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), low16(_mm256_blendv_epi8(even, nan, is_nan)));
}
inline void store_i8(int8_t* p, VI x) {
  const __m128i h = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(h, h));
}
inline VF load_i8(const int8_t* p) {
  return to_f(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline void store_u8(uint8_t* p, VI x) {  // lanes in 0..255
  const __m128i h = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(h, h));
}
inline void store_i16(void* p, VI x) {  // the low 16 bits of each lane
  _mm_storeu_si128(static_cast<__m128i*>(p), low16(_mm256_and_si256(x, set1_i(0xffff))));
}

// dst[j][i] = src[i][j] for kLanes x kLanes 32-bit words; strides in bytes.
inline void transpose(const void* src, int64_t src_stride, void* dst, int64_t dst_stride) {
  VI r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = load_i(static_cast<const char*>(src) + i * src_stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  char* to = static_cast<char*>(dst);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    store_i(to + i * dst_stride, _mm256_permute2x128_si256(r[i], r[i + 4], 0x20));
    store_i(to + (i + 4) * dst_stride, _mm256_permute2x128_si256(r[i], r[i + 4], 0x31));
  }
}

// --- codes
// 4 activation codes in every lane.
inline VI codes4(const int8_t* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return _mm256_set1_epi32(x);
}
// Of kLanes features x 8 channels of packed weights, channels 0..3 and 4..7.
inline VI low_nibbles(VI w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
inline VI high_nibbles(VI w) { return low_nibbles(_mm256_srli_epi32(w, 4)); }
// 32 bytes -> their low nibbles, then their high ones.
inline void split_nibbles(const uint8_t* from, uint8_t* to) {
  const VI x = load_i(from);
  store_i(to, low_nibbles(x));
  store_i(to + 32, high_nibbles(x));
}
// A byte of each lane's four, wrapping.
inline VI sub_bytes(VI a, VI b) { return _mm256_sub_epi8(a, b); }
// Byte i of four rows side by side: 4 vectors, whose lane at place p is of byte woven(p).
inline void weave(const VI (&row)[4], uint8_t* to) {
  const VI a = _mm256_unpacklo_epi8(row[0], row[1]), b = _mm256_unpackhi_epi8(row[0], row[1]);
  const VI c = _mm256_unpacklo_epi8(row[2], row[3]), d = _mm256_unpackhi_epi8(row[2], row[3]);
  store_i(to, _mm256_unpacklo_epi16(a, c));
  store_i(to + 32, _mm256_unpackhi_epi16(a, c));
  store_i(to + 64, _mm256_unpacklo_epi16(b, d));
  store_i(to + 96, _mm256_unpackhi_epi16(b, d));
}
constexpr int woven(int place) { return place % 8 / 4 * 16 + place / 8 * 4 + place % 4; }
// Bytes q * s1 + a of nibbles q, where lane n of s1 and a is one feature's: level 2 of two-level.
struct Widen {
  VI s1, a;
};
inline Widen widen_scales(const uint8_t* s1, const uint8_t* a) {
  const VI s = load_u8(s1), b = load_u8(a);
  return {_mm256_or_si256(s, _mm256_slli_epi32(s, 16)), mul(b, set1_i(0x01010101))};
}
inline VI widen(VI q, const Widen& w) { return _mm256_add_epi8(_mm256_mullo_epi16(q, w.s1), w.a); }

// A running dot product of unsigned weight bytes and signed codes over at most 32 channels.
#if TSL_AVX_VNNI
struct Dot {
  VI acc;
};
inline void dot_begin(Dot& d, VI acc) { d.acc = acc; }
inline void dot(Dot& d, VI w, VI x) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(d.acc) : "x"(w), "x"(x));
}
inline VI dot_end(const Dot& d) { return d.acc; }
#else
// Pairs of products are summed in 16 bits: 15 * 128 * 2 = 3840 a step, so 8 steps (32 channels)
// stay below 2^15 and the widening to 32 bits is paid once in 8.
struct Dot {
  VI acc, pairs;
};
inline void dot_begin(Dot& d, VI acc) {
  d.acc = acc;
  d.pairs = zero_i();
}
inline void dot(Dot& d, VI w, VI x) {
  // NOTE: from intrinsics gcc 12 forms all products of a tile first, to add them in a tree, and
  // spills every one of them; one asm keeps the pair together.
  VI product;
  __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
          : "+x"(d.pairs), "=&x"(product)
          : "x"(w), "x"(x));
}
inline VI dot_end(const Dot& d) {
  return add(d.acc, _mm256_madd_epi16(d.pairs, _mm256_set1_epi16(1)));
}
#endif
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// Into L2 only: a fetch that waits for memory then holds none of L1's few miss buffers.
inline void prefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// --- bf16 pairs
// acc += the two products of each lane's pair of bf16.
inline void dot_bf16(VF& acc, VI a, VI b) {
  const VI high = set1_i(int32_t(0xffff0000u));
  acc = fma(from_bits(shift_left(a, 16)), from_bits(shift_left(b, 16)), acc);
  acc = fma(from_bits(bit_and(a, high)), from_bits(bit_and(b, high)), acc);
}
// kLanes pairs (a[i], b[i]).
inline VI pairs_bf16(const BF16* a, const BF16* b) {
  return bit_or(shift_right(to_bits(load_x(a)), 16), to_bits(load_x(b)));
}
