// msm: matmul - softmax - matmul over a paged cache of plain numbers.
//
//   out[i] = sum_c exp(s[i,c] - lse[i]) v[c],  s[i,c] = cap(scale q[i] . k[c]),  over visible keys
//   c lse[i] = log(sum_c exp(s[i,c]) + exp(sink)),  cap(x) = softcap tanh(x / softcap)
//
// Token i of a request is at position kv_len - q_len + i. A row that sees no key gives 0 and -inf.
#pragma once
#include "core/hd.h"
#include "msm/plan.h"

namespace tessella::msm {

// How a batch is cut without a plan, where only the device knows its lengths: tiles of `tile` rows,
// each in `parts` parts of `keys` keys.
struct Uniform {
  int64_t tile, parts, keys;
};

// Tasks of a plan by the rows of their tile.
enum class Part { kAll, kBig, kSmall };

// Large and small tasks of a mixed batch are three launches that run at the same time, the first
// and the last of which share their tasks: kFirst on most multiprocessors, kBeside on the others,
// kAfter where kBeside has ended. Each may begin when the one before has begun, so none but the
// first waits for what ran before; each ends after the one before has ended (cuda/dependent.cuh).
enum class Turn { kAlone, kFirst, kBeside, kAfter };

// What any source of keys and values shares.
struct Batch {
  const void* q;  // [T][H][D] of `dtype`, strides in elements
  int64_t q_token, q_head;
  const int32_t* block_table;  // [B][table_stride]
  int64_t table_stride;
  const int32_t *cu_q, *kv_len;  // [B + 1], [B]
  const int32_t* mask;           // [B] of Mask, or null: causal
  const uint64_t* tree_bits;     // [..][tree_words]
  const int32_t* tree_row;       // [B]
  int64_t tree_words;
  const float* sinks;  // [H] or null
  float scale, softcap;
  int64_t window;
  int64_t B, T, H, J, D, Z, P;
  DType dtype;                   // of q and out
  void* out;                     // [T][H][D]
  float* lse;                    // [T][H] or null
  PlanView plan;                 // on CUDA: null, or in device memory
  float *partial, *partial_lse;  // [J][partial_rows][D] and [J][partial_rows]
  int64_t partial_rows;          // that there is room for
  // on CUDA only
  int32_t* counter;  // one word of scratch
  int64_t plan_words;
  Uniform uniform;  // without a plan
  bool debug;       // stop at a page outside the cache

  TSL_HD Mask mask_of(int64_t b) const { return mask ? Mask(mask[b]) : Mask::kCausal; }
};

constexpr int64_t kMostValues = 512;  // of a row: Batch::D of any source

// Rows of a request whose keys were split: parts weighted by exp(lse), sinks added, into out and
// lse.
void merge_partials(const Batch& p);

// Floats of scratch that a body needs for head dim D.
constexpr int64_t scratch_floats(int64_t D) { return 528 * D + 24 * 128 * 2 + 16 * 128 + 256; }

// Multiply-adds of a whole plan, about: whether threads are worth waking.
int64_t plan_work(const Batch& p);

struct Params : Batch {
  const void* pages;  // [P][J][2][Z][D] of page_dtype
  DType page_dtype;
};

void run_cpu(const Params& p);

// Multiprocessors of the current GPU.
int gpu_sms();

// Launches on a cudaStream_t; the result is a cudaError_t.
int run_cuda(const Params& p, void* stream);

// Hopper's bodies, for tiles of up to 64 and 128 `rows`; whether they take this problem. Of a plan
// the first runs all tasks, alone, the second those of large tiles.
bool sm90_takes(const Params& p);
int run_sm90(const Params& p, int rows, Turn turn, bool programmatic, void* stream);

struct AppendParams {
  const void *k, *v;  // [T][J][D] of `dtype`, strides in elements
  int64_t k_token, k_head, v_token, v_head;
  const int64_t* slots;    // [T]; outside 0..P*Z-1: skipped
  const float *cos, *sin;  // [T][R / 2] or null
  int64_t T, J, D, Z, P, R;
  DType dtype;
  bool debug;  // stop at a slot outside the cache
};

// Key or value [D] of token t and kv head j in fp32, the key rotated.
void read_key(const AppendParams& p, int64_t t, int64_t j, float* k);
void read_value(const AppendParams& p, int64_t t, int64_t j, float* v);

// Keys, rotated, and values into pages [P][J][2][Z][D] of page_dtype.
void append_cpu(const AppendParams& p, void* pages, DType page_dtype);
int append_cuda(const AppendParams& p, void* pages, DType page_dtype, void* stream);

}  // namespace tessella::msm
