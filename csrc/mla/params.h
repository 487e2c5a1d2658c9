// mla: attention in the space of latents (DeepSeek-V2, section 2.1; absorbed, equation 13 ff.).
//
//   s[i,c] = scale (q~[i] . latent[c] + q_rope[i] . rope[c]),  out[i] = sum_c softmax(s)[i,c]
//   latent[c]
//
// q~ = W_UK^T q of each head. One latent of rank L serves all heads as key and as value, so a page
// is read once. Batch::D is L: what q~ and out have; every query head belongs to the one kv head.
#pragma once
#include "layout/mla.h"
#include "msm/params.h"

namespace tessella::mla {

struct Params : msm::Batch {
  const void* q_rope;  // [T][H][R] of `dtype`, strides in elements
  int64_t rope_token, rope_head;
  const uint8_t* pages;  // [P][page.bytes()]
  layout::MlaPage page;
  DType latent_dtype, rope_dtype;  // of plain numbers
  bool bf16;                       // the kernel may multiply bf16

  const uint8_t* blob(int64_t request, int64_t pos) const {
    return pages + block_table[request * table_stride + pos / Z] * page.bytes();
  }
};

void run_cpu(const Params& p);

struct AppendParams {
  const void *latent, *rope;  // [T][L], [T][R] of `dtype`, strides in elements
  int64_t latent_token, rope_token;
  const int64_t* slots;    // [T]; outside 0..P*Z-1: skipped
  const float *cos, *sin;  // [T][R / 2] or null
  int64_t T, P;
  DType dtype;
  uint8_t* pages;
  layout::MlaPage page;
  DType latent_dtype, rope_dtype;
};

void append_cpu(const AppendParams& p);

constexpr int64_t kMostRank = 512, kMostRope = 128, kMostHeads = 128;

// Floats of scratch that a body needs.
constexpr int64_t scratch_floats(int64_t L, int64_t R) {
  const int64_t W = L + R;
  return 128 * (L + W)       // totals and queries
         + 128 * (256 + 32)  // scores
         + 128 * 256         // probabilities
         + 128 * L + 64 * W  // values, keys as columns, rows on their way
         + 1024;
}

}  // namespace tessella::mla
