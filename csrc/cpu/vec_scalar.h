// The vocabulary of the CPU bodies in plain C++: one lane, for any CPU. Same names in every
// vec_*.h; included by foreach_isa.h inside this set's namespace.

constexpr int kLanes = 1;
constexpr bool kWideBytes = true;  // dot() takes any unsigned byte, not only nibbles

struct VI {
  int32_t v;
};
struct VF {
  float v;
};

inline VI zero_i() { return {0}; }
inline VI set1_i(int32_t x) { return {x}; }
inline VI load_i(const void* p) {
  VI x;
  __builtin_memcpy(&x, p, 4);
  return x;
}
inline void store_i(void* p, VI x) { __builtin_memcpy(p, &x, 4); }
inline VI add(VI a, VI b) { return {a.v + b.v}; }
inline VI sub(VI a, VI b) { return {a.v - b.v}; }
inline VI mul(VI a, VI b) { return {a.v * b.v}; }
inline VI max_i(VI a, VI b) { return {a.v > b.v ? a.v : b.v}; }
inline int32_t reduce_max(VI a) { return a.v; }
inline int32_t reduce_add(VI a) { return a.v; }
// Low 16 bits of a (whose high 16 are zero) times the signed low 16 bits of b.
inline VI mul16(VI a, VI b) { return {int16_t(a.v) * int16_t(b.v)}; }
inline VI load_u8(const uint8_t* p) { return {*p}; }

inline VF zero_f() { return {0.f}; }
inline VF set1_f(float x) { return {x}; }
inline VF load_f(const float* p) { return {*p}; }
inline void store_f(float* p, VF x) { *p = x.v; }
inline VF add(VF a, VF b) { return {a.v + b.v}; }
inline VF mul(VF a, VF b) { return {a.v * b.v}; }
inline VF div(VF a, VF b) { return {a.v / b.v}; }
inline VF min(VF a, VF b) { return {a.v < b.v ? a.v : b.v}; }
inline VF max(VF a, VF b) { return {a.v > b.v ? a.v : b.v}; }
inline float reduce_add(VF a) { return a.v; }
inline VF fma(VF a, VF b, VF c) { return {a.v * b.v + c.v}; }  // rounds twice
inline float reduce_max(VF a) { return a.v; }
inline VF sub(VF a, VF b) { return {a.v - b.v}; }
inline VI to_bits(VF x) { return {int32_t(float_to_bits(x.v))}; }
inline VF from_bits(VI x) { return {bits_to_float(uint32_t(x.v))}; }
inline VI shift_right(VI x, int by) { return {int32_t(uint32_t(x.v) >> by)}; }  // zeros come in
inline VI shift_left(VI x, int by) { return {int32_t(uint32_t(x.v) << by)}; }
inline VI bit_and(VI a, VI b) { return {a.v & b.v}; }
inline VI bit_or(VI a, VI b) { return {a.v | b.v}; }
// dst[j][i] = src[i][j] for kLanes x kLanes 32-bit words: here one.
inline void transpose(const void* src, int64_t, void* dst, int64_t) { store_i(dst, load_i(src)); }
inline VF to_f(VI x) { return {float(x.v)}; }
// To nearest, ties to even: the sum's unit is 1, so the addition itself rounds (|x| < 2^22).
inline VI round_to_i(VF x) {
  return {int32_t(float_to_bits(x.v + 12582912.f) - float_to_bits(12582912.f))};
}
inline VF pow2(VI e) { return {bits_to_float(uint32_t(e.v + 127) << 23)}; }  // -126 <= e <= 127
inline VI abs_bits(VF x) { return {int32_t(float_to_bits(x.v) & 0x7fffffff)}; }

template <class T>
VF load_x(const T* p) {
  return {to_float(*p)};
}
template <class T>
void store_x(T* p, VF x) {
  *p = from_float<T>(x.v);
}
inline void store_i8(int8_t* p, VI x) { *p = int8_t(x.v); }
inline VF load_i8(const int8_t* p) { return {float(*p)}; }
inline void store_u8(uint8_t* p, VI x) { *p = uint8_t(x.v); }         // lanes in 0..255
inline void store_i16(void* p, VI x) { __builtin_memcpy(p, &x, 2); }  // the low 16 bits

// --- codes: the 4 bytes of a lane
inline VI codes4(const int8_t* p) { return load_i(p); }
inline VI low_nibbles(VI w) { return {int32_t(uint32_t(w.v) & 0x0f0f0f0f)}; }
inline VI high_nibbles(VI w) { return {int32_t(uint32_t(w.v) >> 4 & 0x0f0f0f0f)}; }
// 32 bytes -> their low nibbles, then their high ones.
inline void split_nibbles(const uint8_t* from, uint8_t* to) {
  for (int i = 0; i < 32; ++i) {
    to[i] = from[i] & 15;
    to[32 + i] = from[i] >> 4;
  }
}
// A byte of each lane's four, wrapping.
inline VI sub_bytes(VI a, VI b) {
  uint32_t x = 0;
  for (int i = 0; i < 32; i += 8) x |= (((uint32_t(a.v) >> i) - (uint32_t(b.v) >> i)) & 255) << i;
  return {int32_t(x)};
}
// Byte i of four rows side by side: 4 lanes, the one at place p of byte woven(p).
inline void weave(const VI (&row)[4], uint8_t* to) {
  for (int i = 0; i < 16; ++i) to[i] = uint8_t(uint32_t(row[i % 4].v) >> (i / 4 * 8));
}
constexpr int woven(int place) { return place; }
// Bytes q * s1 + a of nibbles q: no byte overflows, so one 32-bit multiply does all four.
struct Widen {
  uint32_t s1, a;
};
inline Widen widen_scales(const uint8_t* s1, const uint8_t* a) {
  return {*s1, uint32_t(*a) * 0x01010101u};
}
inline VI widen(VI q, const Widen& w) { return {int32_t(uint32_t(q.v) * w.s1 + w.a)}; }

struct Dot {
  int32_t acc;
};
inline void dot_begin(Dot& d, VI acc) { d.acc = acc.v; }
inline void dot(Dot& d, VI w, VI x) {
  for (int i = 0; i < 32; i += 8)
    d.acc += int32_t(uint8_t(uint32_t(w.v) >> i)) * int8_t(uint32_t(x.v) >> i);
}
inline VI dot_end(const Dot& d) { return {d.acc}; }
inline void prefetch(const void*) {}
inline void prefetch_l2(const void*) {}

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
