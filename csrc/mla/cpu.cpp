#include <cstring>

#include "core/registry.h"
#include "cpu/parallel.h"
#include "mla/kernels.h"
#include "mla/params.h"

#define TSL_BODY "mla/cpu.inl"
#include "cpu/foreach_isa.h"

namespace tessella::mla {

using Body = void(const Params&, const msm::Task&, int64_t head, float* scratch);

static constexpr Kernel<Body> kTable[] = {
#define X(isa) {"mla." #isa ".codes", Isa::isa, "codes", &isa::mla_codes},
    TSL_MLA_CODES(X)
#undef X
#define X(isa) {"mla." #isa ".tile", Isa::isa, "tile", &isa::mla_tile},
        TSL_MLA_TILE(X)
#undef X
#define X(isa) {"mla." #isa ".bf16", Isa::isa, "bf16", &isa::mla_bf16},
            TSL_MLA_BF16(X)
#undef X
};

static const char* tile_of(const Params& p) {
  if (p.page.scaled()) return "codes";
  const bool bf16 = p.dtype == DType::kBF16 && p.latent_dtype == DType::kBF16 &&
                    p.page.latent_bits == 16 && has_bf16(env().best_isa);
  return bf16 ? "bf16" : "tile";
}

void run_cpu(const Params& problem) {
  const Kernel<Body>& kernel = select("mla", kTable, tile_of(problem));
  if (std::strcmp(kernel.tile, "bf16") == 0 && !has_bf16(kernel.isa))
    throw std::runtime_error("TESSELLA_FORCE: this CPU cannot run '" + std::string(kernel.name) +
                             "'");
  Params p = problem;
  p.bf16 = has_bf16(kernel.isa);
  const msm::Header& h = p.plan.header();
  parallel_in_order(
      h.tasks, msm::plan_work(p), size_t(scratch_floats(p.page.L, p.page.R)),
      [&](int64_t i, float* scratch) { kernel.run(p, p.plan.tasks()[i], 0, scratch); });
  msm::merge_partials(p);
}

}  // namespace tessella::mla
