#include "act_quant/params.h"

#include <memory>

#include "act_quant/kernels.h"
#include "core/registry.h"
#include "cpu/parallel.h"

#define TSL_BODY "act_quant/cpu.inl"
#include "cpu/foreach_isa.h"

namespace tessella::act_quant {

using Rows = void(const Params&, int64_t, int64_t, float*, float*, uint32_t*);

static constexpr Kernel<Rows> kTable[] = {
#define X(isa) {"act_quant." #isa, Isa::isa, "rows", &isa::act_quant_rows},
    TSL_ACT_QUANT_CPU(X)
#undef X
};

void run_cpu(const Params& p) {
  const Kernel<Rows>& kernel = select("act_quant", kTable, "rows");
  parallel_for(p.M, p.Kp, [&](int64_t begin, int64_t end) {
    const auto scratch = std::make_unique<float[]>(size_t(2 * p.Kp + p.Kp / 128));
    float* x = scratch.get();
    kernel.run(p, begin, end, x, x + p.Kp, reinterpret_cast<uint32_t*>(x + 2 * p.Kp));
  });
}

}  // namespace tessella::act_quant
