// Torch arguments of the mla family -> params; shared by the entries of every device.
#pragma once
#include "mla/params.h"
#include "msm/check.h"

namespace tessella::mla {

using msm::OptTensor;

struct Codec {
  layout::MlaPage page;
  DType latent, rope;
};

// "int4", "int8", "bf16", "fp16", "fp32", optionally -r and the same but int4 for the rope part;
// see tessella.formats_mla.MLACodec.
inline Codec check_codec(const char* op, const std::string& name, int64_t Z, int64_t L, int64_t R) {
  struct Kind {
    const char* name;
    int bits;
    DType dtype;
  };
  constexpr Kind kKinds[] = {{"int4", 4, DType::kBF16},
                             {"int8", 8, DType::kBF16},
                             {"bf16", 16, DType::kBF16},
                             {"fp16", 16, DType::kF16},
                             {"fp32", 32, DType::kF32}};
  auto find = [&](const std::string& part) -> const Kind& {
    for (const Kind& k : kKinds)
      if (part == k.name) return k;
    refuse(Arg{op, "codec"}, "int4, int8, bf16, fp16 or fp32, optionally -r<rope part>",
           "'" + name + "'");
  };
  const Kind& latent = find(name.substr(0, 4));
  const bool own = name.size() > 4;
  if (own && name.compare(4, 2, "-r") != 0) find("");
  const Kind& rope = own ? find(name.substr(6)) : latent.bits <= 8 ? kKinds[2] : latent;
  if (rope.bits == 4) find("");
  if (L % 64 != 0 || L < 64 || L > kMostRank)
    refuse(Arg{op, "L"}, "a latent rank that is a multiple of 64 in 64..512", L);
  if (R % 32 != 0 || R < 0 || R > kMostRope)
    refuse(Arg{op, "R"}, "a rope dim that is a multiple of 32 in 0..128", R);
  if (Z % 16 != 0 || Z < 16 || Z > 256)
    refuse(Arg{op, "Z"}, "a multiple of 16 in 16..256 tokens a page", Z);
  return {{latent.bits, rope.bits, Z, L, R}, latent.dtype, rope.dtype};
}

// Pages uint8 [P, page_bytes] of this codec.
inline void check_pages(const char* op, const Tensor& pages, const layout::MlaPage& page,
                        const Tensor& beside) {
  if (pages.dim() != 2) refuse(Arg{op, "pages"}, "uint8 [P, page_bytes]", describe(pages));
  check_tensor(Arg{op, "pages"}, pages, ScalarType::Byte, {pages.size(0), page.bytes()}, beside);
}

// Queries [T, H, n] of one dtype with unit stride along n.
inline void check_queries(const char* op, const Tensor& q, const Tensor& q_rope) {
  if (q.dim() != 3 || q.stride(2) != 1)
    refuse(Arg{op, "q"}, "[T, H, L] with unit stride along L", describe(q));
  if (q_rope.dim() != 3 || q_rope.size(0) != q.size(0) || q_rope.size(1) != q.size(1) ||
      (q_rope.size(2) > 1 && q_rope.stride(2) != 1) || q_rope.scalar_type() != q.scalar_type() ||
      q_rope.device() != q.device())
    refuse(Arg{op, "q_rope"},
           "[T, H, R] beside q " + describe(q) + ", of its dtype with unit stride along R",
           describe(q_rope));
  if (q.size(1) < 1 || q.size(1) > kMostHeads) refuse(Arg{op, "q"}, "1..128 heads", q.size(1));
}

inline Params check(const char* op, const Tensor& q, const Tensor& q_rope, const Tensor& pages,
                    const std::string& codec, int64_t Z, const msm::BatchArgs& a) {
  check_queries(op, q, q_rope);
  Params p{};
  const Codec c = check_codec(op, codec, Z, q.size(2), q_rope.size(2));
  p.page = c.page;
  p.latent_dtype = c.latent;
  p.rope_dtype = c.rope;
  check_pages(op, pages, p.page, q);
  p.pages = pages.const_data_ptr<uint8_t>();
  p.P = pages.size(0);
  p.Z = Z;
  p.D = q.size(2);
  p.J = 1;
  p.T = q.size(0);
  p.H = q.size(1);
  p.dtype = check_float(Arg{op, "q"}, q.scalar_type());
  p.q = q.const_data_ptr();
  p.q_token = q.stride(0);
  p.q_head = q.stride(1);
  p.q_rope = q_rope.const_data_ptr();
  p.rope_token = q_rope.stride(0);
  p.rope_head = q_rope.stride(1);
  msm::check_requests(op, q, a, p);
  return p;
}

// A row per token, [T, n] of `beside`'s dtype.
inline int64_t check_rows(const Arg& arg, const Tensor& t, const Tensor& beside) {
  if (t.dim() != 2 || t.size(0) != beside.size(0) || (t.size(1) > 1 && t.stride(1) != 1) ||
      t.scalar_type() != beside.scalar_type() || t.device() != beside.device())
    refuse(arg, "[T, n] of latent's T and dtype with unit stride along n", describe(t));
  return t.stride(0);
}

inline AppendParams check_append(const char* op, const Tensor& latent, const Tensor& rope,
                                 const Tensor& slots, const OptTensor& cos, const OptTensor& sin,
                                 const std::string& codec, int64_t Z, const Tensor& pages,
                                 bool debug) {
  AppendParams p{};
  if (latent.dim() != 2) refuse(Arg{op, "latent"}, "[T, L]", describe(latent));
  p.latent_token = check_rows(Arg{op, "latent"}, latent, latent);
  p.rope_token = check_rows(Arg{op, "rope"}, rope, latent);
  const int64_t R = rope.size(1);
  const Codec c = check_codec(op, codec, Z, latent.size(1), R);
  p.page = c.page;
  p.latent_dtype = c.latent;
  p.rope_dtype = c.rope;
  p.T = latent.size(0);
  p.dtype = check_float(Arg{op, "latent"}, latent.scalar_type());
  p.latent = latent.const_data_ptr();
  p.rope = rope.const_data_ptr();
  check_pages(op, pages, p.page, latent);
  p.P = pages.size(0);
  p.pages = pages.mutable_data_ptr<uint8_t>();
  check_tensor(Arg{op, "slots"}, slots, ScalarType::Long, {p.T}, latent);
  p.slots = slots.const_data_ptr<int64_t>();
  if (cos.has_value() != sin.has_value())
    refuse(Arg{op, cos ? "sin" : "cos"}, "both cos and sin, or neither", "None");
  if (cos) {
    check_tensor(Arg{op, "cos"}, *cos, ScalarType::Float, {p.T, R / 2}, latent);
    check_tensor(Arg{op, "sin"}, *sin, ScalarType::Float, {p.T, R / 2}, latent);
    p.cos = cos->const_data_ptr<float>();
    p.sin = sin->const_data_ptr<float>();
  }
  for (int64_t t = 0; debug && t < p.T; ++t)
    if (p.slots[t] < -1 || p.slots[t] >= p.P * Z)
      refuse(Arg{op, "slots"},
             "-1.." + std::to_string(p.P * Z - 1) + " for token " + std::to_string(t), p.slots[t]);
  return p;
}

}  // namespace tessella::mla
