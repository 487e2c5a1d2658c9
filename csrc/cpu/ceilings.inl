// Loops whose only work is reading memory, or dot products in registers.

// Sum of the 64-byte-aligned buffer's words; 8 loads in flight, the rest is the prefetchers' work.
inline int32_t read_all(const uint8_t* p, size_t bytes) {
  VI sum[8];
  for (VI& s : sum) s = zero_i();
  constexpr size_t kStep = 8 * kLanes * 4;
  for (size_t i = 0; i + kStep <= bytes; i += kStep)
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sum[j] = add(sum[j], load_i(p + i + size_t(j) * kLanes * 4));
  for (int j = 1; j < 8; ++j) sum[0] = add(sum[0], sum[j]);
  return reduce_add(sum[0]);
}

// `rounds` times 8 dot products in each of 8 chains, which never wait for each other; returns the
// multiply-adds done. `data` are 8 vectors: the chains must differ, and be opaque, or the compiler
// would do fewer.
inline double dot_all(int64_t rounds, const uint8_t* data, int32_t* sink) {
  Dot d[8];
  VI acc[8];
  for (VI& a : acc) a = zero_i();
  for (int64_t i = 0; i < rounds; ++i) {
    VI w[2], x[4];
    for (int j = 0; j < 2; ++j) w[j] = load_i(data + (i % 2 + j) * kLanes * 4);
    for (int j = 0; j < 4; ++j) x[j] = load_i(data + (i % 2 + 3 + j) * kLanes * 4);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) dot_begin(d[j], acc[j]);
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k)
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) dot(d[j], w[j / 4], x[j % 4]);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) acc[j] = dot_end(d[j]);
  }
  for (int j = 1; j < 8; ++j) acc[0] = add(acc[0], acc[j]);
  *sink = reduce_add(acc[0]);
  return double(rounds) * 64 * kLanes * 4;
}
