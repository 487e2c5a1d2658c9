// Body of act_quant, compiled once per instruction set (cpu/foreach_isa.h).
// A row is converted to fp32 in a scratch row (and permuted there), its largest magnitudes are
// found block by block on the way, then the scratch row, which is still in cache, is quantised.

namespace aq {

using act_quant::make_scale;
using act_quant::Params;
using act_quant::Scale;

constexpr int kBlock = 128;

// Converts one block of a row; returns the bits of its largest magnitude.
template <class T>
uint32_t load_block(const Params& p, const T* row, int64_t k0, float* out) {
  const int64_t n = p.K - k0 < kBlock ? p.K - k0 : kBlock;
  VI most = zero_i();
  int64_t i = 0;
  if (p.perm == nullptr) {
    for (; i + kLanes <= n; i += kLanes) {
      const VF x = load_x(row + k0 + i);
      store_f(out + i, x);
      most = max_i(most, abs_bits(x));
    }
  }
  uint32_t bits = uint32_t(reduce_max(most));
  for (; i < n; ++i) {
    out[i] = to_float(row[p.perm ? p.perm[k0 + i] : k0 + i]);
    const uint32_t b = float_to_bits(out[i]) & 0x7fffffff;
    bits = b > bits ? b : bits;
  }
  for (; i < kBlock; ++i) out[i] = 0.f;
  return bits;
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

template <class T>
void quantise_row(const Params& p, int64_t m, float* x, uint32_t* amax) {
  const T* row = static_cast<const T*>(p.x) + m * p.stride;
  const int64_t B = p.Kp / kBlock, B8 = p.K8 / kBlock;
  uint32_t of_class[2] = {0, 0};
  for (int64_t b = 0; b < B; ++b) {
    amax[b] = load_block(p, row, b * kBlock, x + b * kBlock);
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

// Rows m0..m1-1; x [Kp] and amax [Kp/128] are scratch.
inline void act_quant_rows(const act_quant::Params& p, int64_t m0, int64_t m1, float* x,
                           uint32_t* amax) {
  for (int64_t m = m0; m < m1; ++m) {
    if (p.dtype == DType::kBF16) aq::quantise_row<BF16>(p, m, x, amax);
    if (p.dtype == DType::kF16) aq::quantise_row<F16>(p, m, x, amax);
    if (p.dtype == DType::kF32) aq::quantise_row<float>(p, m, x, amax);
  }
}
