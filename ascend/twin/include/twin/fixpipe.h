// Fixpipe: results leave L0C, rounded or scaled on the way, as rows (ND) or as fractals (NZ).
#pragma once
#include <cmath>

#include "twin/cube.h"

namespace twin {

// The unit keeps sign, exponent and 10 bits of mantissa of a scale: bits 13 to 31 of the fp32.
inline float fixpipe_scale(uint64_t bits) {
  const uint32_t kept = uint32_t(bits) & 0xffffe000u;
  float f;
  std::memcpy(&f, &kept, 4);
  return f;
}

inline int8_t saturate_s8(float x) {
  return int8_t(std::fmin(127.f, std::fmax(-128.f, std::nearbyint(x))));
}

// One element of type S out of L0C as a T, by mode; `scale` is used by the modes that scale.
template <class T, class S>
T fixpipe_convert(S x, QuantMode_t mode, float scale) {
  if constexpr (std::is_same_v<T, S>)
    return x;
  else if constexpr (std::is_same_v<T, bfloat16_t>)
    return bfloat16_t(float(x));
  else if constexpr (std::is_same_v<T, half>)
    return mode == F322F16 ? half(float(x)) : half(float(x) * scale);
  else
    return T(saturate_s8(float(x) * scale));
}

template <class T, class S>
constexpr bool fixpipe_allows(QuantMode_t mode) {
  constexpr bool kInt = std::is_same_v<S, int32_t>;
  switch (mode) {
    case NoQuant:
      return std::is_same_v<T, S>;
    case F322F16:
      return !kInt && std::is_same_v<T, half>;
    case F322BF16:
      return !kInt && std::is_same_v<T, bfloat16_t>;
    case DEQF16:
    case VDEQF16:
      return kInt && std::is_same_v<T, half>;
    case REQ8:
    case VREQ8:
      return kInt && (std::is_same_v<T, int8_t> || std::is_same_v<T, uint8_t>);
    default:
      return !kInt && (std::is_same_v<T, int8_t> || std::is_same_v<T, uint8_t>);
  }
}

template <class T, class S>
void fixpipe(const Ref& to, const Ref& from, const Ref* scales, bool rows,
             const AscendC::FixpipeParamsV220& p) {
  if (from.mem != kL0C) throw Finding("path", "Fixpipe: the source is not in L0C");
  if (to.mem != kGM && to.mem != kL1)
    throw Finding("path", std::string("Fixpipe: no path to ") + mem_name(to.mem));
  if (!fixpipe_allows<T, S>(p.quantPre))
    throw Finding("type", std::string("Fixpipe: this mode makes no ") + type_name<T>() + " of " +
                              type_name<S>());
  if (p.srcStride % 16 != 0) throw Finding("field", "Fixpipe: srcStride is not a multiple of 16");
  if (p.ndNum > 1) throw Finding("field", "Fixpipe: more than one matrix is not emulated");
  if (!rows && p.nSize % 16 != 0) throw Finding("field", "Fixpipe: NZ needs whole fractals of n");
  aligned(from, 64, "Fixpipe");
  core().stats.bytes[kL0cToGm] += p.mSize * p.nSize * int64_t(sizeof(T));
  const bool per_channel = scales != nullptr;
  const Ref scale_at = per_channel ? *scales : from;
  core().issue(kFIX, "Fixpipe", [=](Op& op) {
    for (int64_t n = 0; n < p.nSize; ++n) {
      const uint64_t bits = per_channel ? load_one<uint64_t>(op, scale_at + n * 8) : p.deqScalar;
      const float scale = fixpipe_scale(bits);
      for (int64_t m = 0; m < p.mSize; ++m) {
        const S x = load_one<S>(op, from + ((n / 16 * p.srcStride + m) * 16 + n % 16) * 4);
        T y = fixpipe_convert<T, S>(x, p.quantPre, scale);
        if (p.reluEn && float(y) < 0) y = T(0.f);
        const int64_t at =
            rows ? (m * int64_t(p.dstStride) + n) * int64_t(sizeof(T))
                 : n / 16 * int64_t(p.dstStride) * 32 + (m * 16 + n % 16) * int64_t(sizeof(T));
        store_one<T>(op, to + at, y);
      }
    }
  });
}

}  // namespace twin

namespace AscendC {

template <class T, class U, const FixpipeConfig& kConfig = CFG_ROW_MAJOR, class D>
void FixpipeTo(const D& dst, const LocalTensor<U>& src, const twin::Ref* scales,
               const FixpipeParamsV220& p) {
  const bool vector = p.quantPre == VDEQF16 || p.quantPre == VREQ8 || p.quantPre == VQF322B8_PRE;
  if (vector != (scales != nullptr))
    throw twin::Finding("type", "Fixpipe: a tensor of scales goes with the modes per channel");
  twin::fixpipe<T, U>(dst.ref(), src.ref(), scales, kConfig.format == CO2Layout::ROW_MAJOR, p);
}

template <class T, class U, const FixpipeConfig& kConfig = CFG_ROW_MAJOR>
void Fixpipe(const GlobalTensor<T>& dst, const LocalTensor<U>& src, const FixpipeParamsV220& p) {
  FixpipeTo<T, U, kConfig>(dst, src, nullptr, p);
}

template <class T, class U, const FixpipeConfig& kConfig = CFG_ROW_MAJOR>
void Fixpipe(const LocalTensor<T>& dst, const LocalTensor<U>& src, const FixpipeParamsV220& p) {
  FixpipeTo<T, U, kConfig>(dst, src, nullptr, p);
}

template <class T, class U, const FixpipeConfig& kConfig = CFG_ROW_MAJOR>
void Fixpipe(const GlobalTensor<T>& dst, const LocalTensor<U>& src,
             const LocalTensor<uint64_t>& scales, const FixpipeParamsV220& p) {
  const twin::Ref r = scales.ref();
  if (r.mem != twin::kL1) throw twin::Finding("path", "Fixpipe: scales are not in L1");
  FixpipeTo<T, U, kConfig>(dst, src, &r, p);
}

}  // namespace AscendC
