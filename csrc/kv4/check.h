// Torch arguments of the kv4 family -> params; shared by the entries of every device.
#pragma once
#include "kv4/params.h"
#include "msm/check.h"

namespace tessella::kv4 {

using msm::OptTensor;

// "k4v4", "k8v4-g64", "k4v4-g32-channel"... for head dim D; see tessella.formats_kv.KVCodec.
inline layout::KvPage check_codec(const char* op, const std::string& name, int64_t Z, int64_t D) {
  const Arg arg{op, "codec"};
  layout::KvPage page{0, 0, Z, D, D, false};
  auto fail = [&] {
    refuse(arg, "k{8,4,2}v{8,4,2}, optionally -g<channels> and -channel", "'" + name + "'");
  };
  auto bits = [&](char c) { return c == '8' || c == '4' || c == '2' ? c - '0' : 0; };
  if (name.size() < 4 || name[0] != 'k' || name[2] != 'v') fail();
  page.k_bits = bits(name[1]);
  page.v_bits = bits(name[3]);
  if (!page.k_bits || !page.v_bits) fail();
  std::string rest = name.substr(4);
  if (rest.compare(0, 2, "-g") == 0) {
    size_t at = 2;
    for (page.G = 0; at < rest.size() && at < 5 && rest[at] >= '0' && rest[at] <= '9'; ++at)
      page.G = page.G * 10 + (rest[at] - '0');
    rest = rest.substr(at);
  }
  page.channel = rest == "-channel";
  if (!rest.empty() && !page.channel) fail();
  if (D % 16 != 0 || D < 16 || D > 256)
    refuse(Arg{op, "q"}, "a head dim that is a multiple of 16 in 16..256", D);
  if (Z % 16 != 0 || Z < 16 || Z > 256)
    refuse(Arg{op, "Z"}, "a multiple of 16 in 16..256 tokens a page", Z);
  if (page.G < 16 || page.G % 16 != 0 || D % page.G != 0)
    refuse(arg, "groups of a multiple of 16 channels that divide D=" + std::to_string(D),
           "'" + name + "'");
  return page;
}

// Pages uint8 [P, J, page_bytes] of this codec.
inline void check_pages(const char* op, const Tensor& pages, const layout::KvPage& page,
                        const Tensor& beside) {
  if (pages.dim() != 3) refuse(Arg{op, "pages"}, "uint8 [P, J, page_bytes]", describe(pages));
  check_tensor(Arg{op, "pages"}, pages, ScalarType::Byte,
               {pages.size(0), pages.size(1), page.bytes()}, beside);
}

// Rows of the per-sequence tensors: F is that of whichever is given, -1 for none.
struct FactorRows {
  int64_t F = -1;

  void same(const Arg& arg, int64_t rows) {
    if (F >= 0 && F != rows) refuse(arg, std::to_string(F) + " rows as the other factors", rows);
    F = rows;
  }
};

inline const float* check_mean(const Arg& arg, const OptTensor& t, int64_t J, int64_t D,
                               const Tensor& beside, FactorRows& rows) {
  if (!t) return nullptr;
  if (t->dim() != 3) refuse(arg, "float32 [F, J, D]", describe(*t));
  check_tensor(arg, *t, ScalarType::Float, {t->size(0), J, D}, beside);
  rows.same(arg, t->size(0));
  return t->const_data_ptr<float>();
}

inline Fold check_fold(const Arg& arg, const OptTensor& t, int64_t J, int64_t D,
                       const Tensor& beside, FactorRows& rows) {
  if (!t) return {nullptr, 0};
  const int64_t m = t->dim() == 5 ? t->size(4) : 0;
  if (m < 16 || m % 16 != 0 || D % m != 0)
    refuse(arg, "float32 [F, J, D/m, m, m], m a multiple of 16 that divides D", describe(*t));
  check_tensor(arg, *t, ScalarType::Float, {t->size(0), J, D / m, m, m}, beside);
  rows.same(arg, t->size(0));
  return {t->const_data_ptr<float>(), m};
}

// Which row each of n requests or tokens uses: every value below `count`.
inline const int32_t* check_row_index(const Arg& arg, const OptTensor& t, int64_t n, int64_t count,
                                      const Tensor& beside) {
  if (!t) return nullptr;
  const int32_t* at = msm::check_ints(arg, *t, n, beside);
  for (int64_t i = 0; i < n && !beside.is_cuda(); ++i)
    if (at[i] < 0 || at[i] >= count)
      refuse(arg, "rows 0.." + std::to_string(count - 1) + " in entry " + std::to_string(i), at[i]);
  return at;
}

inline const int32_t* check_factor_rows(const char* op, const OptTensor& t, int64_t n,
                                        const FactorRows& rows, const Tensor& beside) {
  if (rows.F == 0) refuse(Arg{op, "rows"}, "factors of at least one sequence", "none");
  return rows.F < 0 ? nullptr : check_row_index(Arg{op, "rows"}, t, n, rows.F, beside);
}

// The tail that goes with keys per channel: [S, J, Z, D], and the row of each of n users.
template <class P>
void check_tail(const char* op, const OptTensor& tail, const OptTensor& row, int64_t n,
                const Tensor& beside, P& p) {
  if (!p.page.channel) {
    if (tail) refuse(Arg{op, "k_tail"}, "None for keys that are not coded per channel", "a tensor");
    return;
  }
  if (!tail || tail->dim() != 4)
    refuse(Arg{op, "k_tail"}, "[S, J, Z, D] for keys per channel", tail ? describe(*tail) : "None");
  if (!row) refuse(Arg{op, "tail_row"}, "int32 rows of k_tail", "None");
  p.tail_dtype = check_float(Arg{op, "k_tail"}, tail->scalar_type());
  check_tensor(Arg{op, "k_tail"}, *tail, tail->scalar_type(), {tail->size(0), p.J, p.Z, p.D},
               beside);
  p.tail_row = check_row_index(Arg{op, "tail_row"}, row, n, tail->size(0), beside);
  p.tail_rows = tail->size(0);
  p.k_tail = tail->mutable_data_ptr();
}

}  // namespace tessella::kv4
