// kv4: attention over coded pages, and the coding of what is appended to them.
//
//   real = (q - z) * s;   scores: sum_d q[d] (c[d] - z) s = s (q . c - z sum_d q[d])
//
// Codes enter the products as integers; scales, zeros and, where keys or values were changed before
// coding, the factors that undo it are applied to the queries, the scores and the totals. So
// nothing is rebuilt: with k' = (k - mean) A and q' = q A^-T it holds that q . k = q' . k' + q .
// mean, and with v' = v B the totals are sum p v = (sum p v') B^-1.
#pragma once
#include "layout/kv.h"
#include "msm/params.h"

namespace tessella::kv4 {

// A block-diagonal factor of each sequence and kv head: fp32 [F][J][D/m][m][m].
struct Fold {
  const float* at;  // or null
  int64_t m;
};

struct Params : msm::Batch {
  const uint8_t* pages;  // [P][J][page.bytes()]
  layout::KvPage page;
  const float* k_mean;  // [F][J][D] or null
  Fold q_fold, o_fold;
  const int32_t* rows;  // [B]: the sequence's row of the factors, or null: 0
  const void* k_tail;   // [S][J][Z][D] of tail_dtype: keys of the page that is not full
  DType tail_dtype;
  const int32_t* tail_row;  // [B]
  int64_t tail_rows;        // S

  const uint8_t* blob(int64_t request, int64_t pos, int64_t j) const {
    const int64_t index = block_table[request * table_stride + pos / Z];
    return pages + (index * J + j) * page.bytes();
  }
  TSL_HD int64_t factor_row(int64_t request) const { return rows ? rows[request] : 0; }
};

// The numbers of a page's layout, which would cost divisions each time.
struct Places {
  explicit Places(const layout::KvPage& page)
      : v_codes(page.v_codes()),
        k_scales(page.k_scales()),
        k_zeros(page.k_zeros()),
        v_scales(page.v_scales()),
        v_zeros(page.v_zeros()),
        k_group(page.k_group_bytes()),
        v_quad(page.v_quad_bytes()),
        groups(page.groups()),
        G(page.G),
        Dv(page.Dv()) {}

  int64_t v_codes, k_scales, k_zeros, v_scales, v_zeros, k_group, v_quad, groups, G, Dv;

  // Of a channel; those of the padding belong to the last one.
  int64_t group(int64_t channel) const {
    if (groups == 1) return 0;
    const int64_t g = channel / G;
    return g < groups ? g : groups - 1;
  }
};

void run_cpu(const Params& p);
int run_cuda(const Params& p, void* stream);

// Hopper's body for few rows, without the merge of split keys; whether it takes this problem.
bool sm90_takes(const Params& p);
int run_sm90(const Params& p, void* stream);

struct AppendParams : msm::AppendParams {
  uint8_t* pages;
  layout::KvPage page;
  const float* k_mean;
  Fold k_fold, v_fold;
  const int32_t* rows;  // [T] or null
  void* k_tail;
  DType tail_dtype;
  const int32_t* tail_row;  // [T]
  int64_t tail_rows;        // S
};

void append_cpu(const AppendParams& p);
int append_cuda(const AppendParams& p, void* stream);

// Floats of scratch that a body needs for head dim D.
constexpr int64_t scratch_floats(int64_t D) {
  return msm::scratch_floats(D) + 128 * (D + 128) + 128 * D / 4 + 16384;
}

}  // namespace tessella::kv4
