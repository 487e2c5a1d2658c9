// Body of act_quant, compiled once per instruction set (cpu/foreach_isa.h).
// A row is converted to fp32 in a scratch row (normed, multiplied or permuted on the way), then its
// largest magnitudes are found block by block and it is quantised, while it is in L1 or L2.

namespace aq {

using act_quant::make_scale;
using act_quant::Params;
using act_quant::Scale;
using act_quant::Source;

constexpr int kBlock = 128;

template <class T>
VF rounded(VF x) {  // to T and back, as between two torch ops
  T t[kLanes];
  store_x(t, x);
  return load_x(t);
}
template <>
inline VF rounded<float>(VF x) {
  return x;
}

// e^x to about 1 ulp for x in -87..88 (clamped there): 2^n times a polynomial on |r| <= ln(2)/2.
inline VF exp_f(VF x) {
  x = min(max(x, set1_f(-87.f)), set1_f(88.f));
  const VI n = round_to_i(mul(x, set1_f(1.44269504f)));
  const VF nf = to_f(n);
  VF r = fma(nf, set1_f(-0.693359375f), x);
  r = fma(nf, set1_f(2.12194440e-4f), r);
  VF p = set1_f(1.9875691e-4f);
  for (const float c : {1.3981999e-3f, 8.3334519e-3f, 4.1665796e-2f, 1.6666666e-1f, 0.5f})
    p = fma(p, r, set1_f(c));
  p = add(fma(p, mul(r, r), r), set1_f(1.f));
  return mul(p, pow2(n));
}

// Over 0..K in whole vectors, then one by one with scalar conversions: `wide` handles
// kLanes channels from k, `single` one.
template <class Wide, class Single>
inline void over(int64_t K, const Wide& wide, const Single& single) {
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) wide(k);
  for (; k < K; ++k) single(k);
}

template <class T>
float round1(float x) {
  return to_float(from_float<T>(x));
}

template <class T>
void load_row(const T* row, int64_t K, float* out) {
  over(
      K, [&](int64_t k) { store_f(out + k, load_x(row + k)); },
      [&](int64_t k) { out[k] = to_float(row[k]); });
}

template <class T>
void rms_norm_row(const Params& p, int64_t m, float* out) {
  const T* row = static_cast<const T*>(p.x) + m * p.stride;
  const T* weight = static_cast<const T*>(p.weight);
  load_row(row, p.K, out);
  if (p.other != nullptr) {
    const T* other = static_cast<const T*>(p.other) + m * p.other_stride;
    T* h = static_cast<T*>(p.h) + m * p.K;
    over(
        p.K,
        [&](int64_t k) {
          store_x(h + k, add(load_f(out + k), load_x(other + k)));
          store_f(out + k, load_x(h + k));
        },
        [&](int64_t k) {
          h[k] = from_float<T>(out[k] + to_float(other[k]));
          out[k] = to_float(h[k]);
        });
  }
  VF squares = zero_f();
  float rest = 0.f;
  over(
      p.K, [&](int64_t k) { squares = fma(load_f(out + k), load_f(out + k), squares); },
      [&](int64_t k) { rest += out[k] * out[k]; });
  const float mean = (reduce_add(squares) + rest) / float(p.K);
  const float by = 1.f / __builtin_sqrtf(mean + p.eps);
  over(
      p.K,
      [&](int64_t k) {
        const VF n = rounded<T>(mul(load_f(out + k), set1_f(by)));
        store_f(out + k, rounded<T>(mul(n, load_x(weight + k))));
      },
      [&](int64_t k) { out[k] = round1<T>(round1<T>(out[k] * by) * to_float(weight[k])); });
}

template <class T>
void silu_mul_row(const Params& p, int64_t m, float* out) {
  const T* gate = static_cast<const T*>(p.x) + m * p.stride;
  const T* up = static_cast<const T*>(p.other) + m * p.other_stride;
  const auto silu = [](VF g) { return div(g, add(set1_f(1.f), exp_f(mul(g, set1_f(-1.f))))); };
  over(
      p.K,
      [&](int64_t k) {
        const VF s = rounded<T>(silu(load_x(gate + k)));
        store_f(out + k, rounded<T>(mul(s, load_x(up + k))));
      },
      [&](int64_t k) {
        float s[kLanes];
        store_f(s, silu(set1_f(to_float(gate[k]))));
        out[k] = round1<T>(round1<T>(s[0]) * to_float(up[k]));
      });
}

// The row in fp32, padded with zeros to whole blocks. `spare` [K] is scratch for permutations.
template <class T>
void source_row(const Params& p, int64_t m, float* out, float* spare) {
  float* first = p.perm ? spare : out;
  if (p.source == Source::kPlain) load_row(static_cast<const T*>(p.x) + p.row(m), p.K, first);
  if (p.source == Source::kRmsNorm) rms_norm_row<T>(p, m, first);
  if (p.source == Source::kSiluMul) silu_mul_row<T>(p, m, first);
  if (p.y != nullptr) {
    T* y = static_cast<T*>(p.y) + m * p.K;
    over(
        p.K, [&](int64_t k) { store_x(y + k, load_f(first + k)); },
        [&](int64_t k) { y[k] = from_float<T>(first[k]); });
  }
  if (p.perm != nullptr)
    for (int64_t k = 0; k < p.K; ++k) out[k] = spare[p.perm[k]];
  for (int64_t k = p.K; k < p.Kp; ++k) out[k] = 0.f;
}

inline uint32_t block_magnitude(const float* x) {
  VI most = zero_i();
  for (int i = 0; i < kBlock; i += kLanes) most = max_i(most, abs_bits(load_f(x + i)));
  return uint32_t(reduce_max(most));
}

// inverse is 0 where the codes must be 0; x may then be inf or NaN, and is not looked at.
inline int32_t quantise_block(const float* x, float inverse, int8_t* codes) {
  if (inverse == 0.f) {
    __builtin_memset(codes, 0, kBlock);
    return 0;
  }
  VI sum = zero_i();
  for (int i = 0; i < kBlock; i += kLanes) {
    const VI q = round_to_i(mul(load_f(x + i), set1_f(inverse)));
    sum = add(sum, q);
    store_i8(codes + i, q);
  }
  return reduce_add(sum);
}

inline void pack_int4(const int8_t* codes, uint8_t* out) {
  for (int i = 0; i < kBlock / 2; ++i)
    out[i] = uint8_t((codes[2 * i] & 15) | (codes[2 * i + 1] & 15) << 4);
}

// x [Kp] -> codes, sums and scales of token m; amax [Kp/128] is scratch.
inline void quantise_row(const Params& p, int64_t m, const float* x, uint32_t* amax) {
  const int64_t B = p.Kp / kBlock, B8 = p.K8 / kBlock;
  uint32_t of_class[2] = {0, 0};
  for (int64_t b = 0; b < B; ++b) {
    amax[b] = block_magnitude(x + b * kBlock);
    uint32_t& c = of_class[b >= B8];
    c = amax[b] > c ? amax[b] : c;
  }
  const float qmax[2] = {127.f, 7.f};
  Scale s[2];
  for (int c = 0; c < 2; ++c) s[c] = make_scale(of_class[c], qmax[c]);
  if (p.granularity == Granularity::kToken) {
    p.scales[m] = s[B8 == 0].scale;
  } else if (p.granularity == Granularity::kClass) {
    p.scales[m] = s[0].scale;
    p.scales[p.M + m] = s[1].scale;
  }
  int8_t unpacked[kBlock];
  for (int64_t b = 0; b < B; ++b) {
    const bool int4 = b >= B8;
    Scale t = s[int4];
    if (p.granularity == Granularity::kBlock) {
      t = make_scale(amax[b], qmax[int4]);
      p.scales[b * p.M + m] = t.scale;
    }
    int8_t* codes = int4 ? unpacked : p.codes8 + (b * p.M + m) * kBlock;
    p.sums[b * p.M + m] = quantise_block(x + b * kBlock, t.inverse, codes);
    if (int4) pack_int4(codes, p.codes4 + ((b - B8) * p.M + m) * (kBlock / 2));
  }
}

}  // namespace aq

// Rows m0..m1-1; x and spare [Kp], amax [Kp/128] are scratch.
inline void act_quant_rows(const act_quant::Params& p, int64_t m0, int64_t m1, float* x,
                           float* spare, uint32_t* amax) {
  for (int64_t m = m0; m < m1; ++m) {
    if (p.dtype == DType::kBF16) aq::source_row<BF16>(p, m, x, spare);
    if (p.dtype == DType::kF16) aq::source_row<F16>(p, m, x, spare);
    if (p.dtype == DType::kF32) aq::source_row<float>(p, m, x, spare);
    aq::quantise_row(p, m, x, amax);
  }
}
