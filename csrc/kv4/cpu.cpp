#include <cstring>

#include "core/registry.h"
#include "cpu/parallel.h"
#include "kv4/kernels.h"
#include "kv4/params.h"

#define TSL_BODY "kv4/cpu.inl"
#include "cpu/foreach_isa.h"

namespace tessella::kv4 {

using Body = void(const Params&, const msm::Task&, int64_t head, float* scratch);

static constexpr Kernel<Body> kTable[] = {
#define X(isa) {"kv4." #isa ".codes", Isa::isa, "codes", &isa::kv4_codes},
    TSL_KV4_CODES(X)
#undef X
#define X(isa) {"kv4." #isa ".tile", Isa::isa, "tile", &isa::kv4_tile},
        TSL_KV4_TILE(X)
#undef X
#define X(isa) {"kv4." #isa ".bf16", Isa::isa, "bf16", &isa::kv4_bf16},
            TSL_KV4_BF16(X)
#undef X
};

// Rows up to which codes are multiplied as they are: a block that is decoded once pays off beyond.
constexpr int kMostCodeRows = 32;

void run_cpu(const Params& p) {
  const bool bf16 = p.dtype == DType::kBF16 && has_bf16(env().best_isa);
  const Kernel<Body>& few = select("kv4", kTable, "codes");
  const Kernel<Body>& many = select("kv4", kTable, bf16 ? "bf16" : "tile");
  if (std::strcmp(many.tile, "bf16") == 0 && !has_bf16(many.isa))
    throw std::runtime_error("TESSELLA_FORCE: this CPU cannot run '" + std::string(many.name) +
                             "'");
  const msm::Header& h = p.plan.header();
  parallel_in_order(h.tasks * p.J, msm::plan_work(p), size_t(scratch_floats(p.D)),
                    [&](int64_t i, float* scratch) {
                      const msm::Task& t = p.plan.tasks()[i / p.J];
                      (t.rows <= kMostCodeRows ? few : many).run(p, t, i % p.J, scratch);
                    });
  msm::merge_partials(p);
}

}  // namespace tessella::kv4
