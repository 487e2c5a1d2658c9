// w4ax_gemm: y = dequant(a) @ dequant(w)^T (+ bias), a in ActBlocks, w in 4-bit panels.
//
// With q the weight codes, c the activation codes, sa and s the scales, per 128-channel block:
//   channel   y[m,n] = sa s[n] (sum_k q c - z[n] sum_k c)
//   groups    y[m,n] = sa sum_g s[n,g] (sum_k q c - z[n,g] sum_k c)
//   twolevel  y[m,n] = sa s0[n] (sum_k (q s1[n,g] + a[n,g]) c - 128 sum_k c)
// Products are summed in int32, exactly: zero points are folded through sums of the activation
// *codes* (QServe sums the raw activations instead, which loses accuracy with outliers). sa is per
// token, or leaves the sum per precision class or per block.
#pragma once
#include <functional>

#include "layout/act.h"
#include "layout/w4.h"

namespace tessella::w4ax_gemm {

// Which rows meet which panels. A plain product has one group. Of a grouped one (w4ax_grouped) rows
// g * M / count.. are the tokens of group g; they meet `panels` panels from first + g * step on,
// and the results lie behind one another in a row of out.
struct Groups {
  int64_t count, panels, first, step;
};

struct Params {
  const int8_t* x8;       // [K8/128][M][128]
  const int8_t* x4;       // [(Kp-K8)/128][M][128]: INT4 codes widened to bytes by the caller
  const uint8_t* codes4;  // [(Kp-K8)/128][M][64], as ActBlocks have them; CUDA reads these
  const int32_t* sums;    // [Kp/G][M]: sums of the codes of each weight group (channel: each block)
  const float* scales;    // [M] | [2][M] | [Kp/128][M]
  const uint8_t* w;       // panels, layout/w4.h (CPU) or layout/w4_frag.h (CUDA)
  const void* bias;       // [N] of `dtype`, or null
  void* out;              // [M][N] of `dtype`; grouped: [M / count][columns]
  int64_t M, K8;
  layout::W4Panel panel;  // N, Kp, G, scheme
  DType dtype;
  Granularity granularity;
  Groups groups;    // CPU
  int64_t columns;  // of out

  const int8_t* x(int64_t block) const {
    const int64_t B8 = K8 / 128;
    return block < B8 ? x8 + block * M * 128 : x4 + (block - B8) * M * 128;
  }
};

// Largest Kp for which int32 cannot overflow: 255 * 128 * Kp < 2^31 (two-level, the widest).
constexpr int64_t kMostKp = 65536;

struct Plan;
// CPU: torch threads over (panel, row chunk). Throws std::runtime_error on a bad TESSELLA_FORCE.
void run_cpu(const Params& p, const Plan& plan);

// CUDA: these run on the stream `stream` and return a cudaError_t as int; `sums` are per block.
// They throw std::runtime_error when TESSELLA_FORCE names a kernel that cannot run this problem.
// `scratch` gives device memory that lasts until the work is done.
using Scratch = std::function<void*(int64_t bytes)>;
int run_cuda(const Params& p, const Scratch& scratch, void* stream);
struct Sm90Plan;
// _w4ax_gemm_probe, with the plan of plan_sm90_probe; `wide` says that the weights are widened.
int run_probe(const Params& p, bool wide, void* stream);
int run_sm90(const Params& p, const Sm90Plan& plan, bool programmatic, void* scratch, void* stream);

// x4 [blocks][M][128] from codes4 [blocks][M][64]; sums [Kp/G][M] for groups smaller than a block.
void widen_int4(const uint8_t* codes4, int64_t rows, int8_t* out);
void sum_groups(const Params& p, int32_t* sums);

// Pack (canonical -> panels) and its inverse; tensors as in tessella.formats.W4Weight.
struct Canonical {
  uint8_t* codes;         // [N][Kp/2], even channel in the low nibble
  float* channel_scales;  // [N] or null
  void* group_scales;     // uint16 or uint8 [N][Kp/G], or null
  uint8_t* zeros;         // [N] or [N][Kp/G]
};
void pack_panels(const Canonical& c, const layout::W4Panel& panel, uint8_t* out);
void unpack_panels(const uint8_t* w, const layout::W4Panel& panel, const Canonical& c);
int pack_cuda(const Canonical& c, const layout::W4Panel& panel, uint8_t* out, void* stream);
int unpack_cuda(const uint8_t* w, const layout::W4Panel& panel, const Canonical& c, void* stream);

}  // namespace tessella::w4ax_gemm
