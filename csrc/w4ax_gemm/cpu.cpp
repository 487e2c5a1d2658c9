#include "core/registry.h"
#include "cpu/parallel.h"
#include "w4ax_gemm/kernels.h"
#include "w4ax_gemm/params.h"
#include "w4ax_gemm/plan.h"

#define TSL_BODY "w4ax_gemm/cpu.inl"
#include "cpu/foreach_isa.h"

namespace tessella::w4ax_gemm {

using Tasks = void(const Params&, int64_t chunk_rows, int64_t begin, int64_t end);

static constexpr Kernel<Tasks> kTable[] = {
#define X(isa) {"w4ax_gemm." #isa ".gemv", Isa::isa, "gemv", &isa::w4ax_gemm_gemv},
    TSL_W4AX_GEMM_GEMV(X)
#undef X
#define X(isa) {"w4ax_gemm." #isa ".skinny", Isa::isa, "skinny", &isa::w4ax_gemm_skinny},
        TSL_W4AX_GEMM_SKINNY(X)
#undef X
#define X(isa) {"w4ax_gemm." #isa ".wide", Isa::isa, "wide", &isa::w4ax_gemm_wide},
            TSL_W4AX_GEMM_WIDE(X)
#undef X
};

void run_cpu(const Params& p, const Plan& plan) {
  const Kernel<Tasks>& kernel = select("w4ax_gemm", kTable, plan.tile);
  parallel_for(plan.tasks, plan.task_work,
               [&](int64_t begin, int64_t end) { kernel.run(p, plan.chunk_rows, begin, end); });
}

void widen_int4(const uint8_t* codes4, int64_t rows, int8_t* out) {
  parallel_for(rows, 128, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * 64; i < end * 64; ++i) {
      out[2 * i] = int8_t(codes4[i] << 4) >> 4;
      out[2 * i + 1] = int8_t(codes4[i]) >> 4;
    }
  });
}

void sum_groups(const Params& p, int32_t* sums) {
  const int64_t G = p.panel.G, groups = p.panel.Kp / G;
  parallel_for(groups, p.M * G, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g)
      for (int64_t m = 0; m < p.M; ++m) {
        const int8_t* x = p.x(g * G / 128) + m * 128 + g * G % 128;
        int32_t sum = 0;
        for (int64_t k = 0; k < G; ++k) sum += x[k];
        sums[g * p.M + m] = sum;
      }
  });
}

}  // namespace tessella::w4ax_gemm
