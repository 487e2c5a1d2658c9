// w4ax_gemm on Ascend: y = dequant(a) @ dequant(w)^T (+ bias); csrc/w4ax_gemm/params.h has the
// formula, ascend/tiling/w4ax_gemm.h the three ways in which operands meet.
//
// A block is one cube core and two vector cores. The cube sums products of codes and leaves int32
// sums in the workspace; the vector cores take half of the columns each and do the rest.
#include "w4ax_cube.h"
#include "w4ax_prepare.h"
#include "w4ax_sums.h"
#include "w4ax_widen.h"

namespace tessella::ascend {

template <class Out>
__aicore__ inline void RunVector(const GemmArgs& args, Problem* p, TPipe* pipe) {
  TBuf<TPosition::VECCALC> scratch;
  pipe->InitBuffer(scratch, 32768);
  GemmSums<Out> sums;
  sums.Init(args, p, pipe, scratch.Get<uint8_t>());
  if (p->t.mode != kWiden) {
    for (int32_t u = 0; u < p->units; ++u) sums.Process(p->At(u), u);
    return;
  }
  Widen widen;
  widen.Init(args, p, pipe, scratch.Get<uint8_t>());
  for (int32_t u = 0; u <= p->units; ++u) {
    if (u < p->units) widen.Process(p->At(u));
    if (u > 0) sums.Process(p->At(u - 1), u - 1);
  }
}

__aicore__ inline void RunPrepare(const GemmArgs& args, Problem* p) {
  TPipe pipe;
  TBuf<TPosition::VECCALC> scratch;
  pipe.InitBuffer(scratch, 57344);
  Prepare prepare;
  prepare.Init(args, p, &pipe, scratch.Get<uint8_t>());
  prepare.Process();
  pipe.Destroy();
}

}  // namespace tessella::ascend

extern "C" __global__ __aicore__ void tessella_w4ax_gemm(GM_ADDR codes8, GM_ADDR codes4,
                                                         GM_ADDR sums, GM_ADDR scales, GM_ADDR w,
                                                         GM_ADDR bias, GM_ADDR out,
                                                         GM_ADDR workspace, GM_ADDR tiling) {
  using namespace tessella::ascend;
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);
  const GemmArgs args{codes8, codes4, sums, scales, w, bias, out, workspace, tiling};
  Problem p;
  p.Init(args);
  if ASCEND_IS_AIC {
    TPipe pipe;
    if (p.t.mode == kWiden) {
      GemmCube<int8_t> cube;
      cube.Init(args, &pipe);
      cube.Process();
    } else {
      GemmCube<int4b_t> cube;
      cube.Init(args, &pipe);
      cube.Process();
    }
  }
  if ASCEND_IS_AIV {
    if (p.t.mode != kWiden) {
      RunPrepare(args, &p);
      SyncAll();
      if (p.units > 0) CrossCoreSetFlag<2, PIPE_MTE3>(kPrepared);
    }
    if (p.units == 0) return;
    TPipe pipe;
    if (p.t.dtype == kBF16)
      RunVector<bfloat16_t>(args, &p, &pipe);
    else
      RunVector<half>(args, &p, &pipe);
  }
}
