#include <cmath>
#include <cstring>
#include <limits>

#include "core/registry.h"
#include "cpu/parallel.h"
#include "msm/kernels.h"
#include "msm/params.h"

#define TSL_BODY "msm/cpu.inl"
#include "cpu/foreach_isa.h"

namespace tessella::msm {

using Body = void(const Params&, const Task&, int64_t head, float* scratch);

static constexpr Kernel<Body> kTable[] = {
#define X(isa) {"msm." #isa ".tile", Isa::isa, "tile", &isa::msm_tile},
    TSL_MSM_TILE(X)
#undef X
#define X(isa) {"msm." #isa ".bf16", Isa::isa, "bf16", &isa::msm_bf16},
        TSL_MSM_BF16(X)
#undef X
};

void run_cpu(const Params& p) {
  const bool bf16 =
      p.dtype == DType::kBF16 && p.page_dtype == DType::kBF16 && has_bf16(env().best_isa);
  const Kernel<Body>& kernel = select("msm", kTable, bf16 ? "bf16" : "tile");
  if (std::strcmp(kernel.tile, "bf16") == 0 && !has_bf16(kernel.isa))
    throw std::runtime_error("TESSELLA_FORCE: this CPU cannot run '" + std::string(kernel.name) +
                             "'");
  const Header& h = p.plan.header();
  parallel_in_order(
      h.tasks * p.J, plan_work(p), size_t(scratch_floats(p.D)),
      [&](int64_t i, float* scratch) { kernel.run(p, p.plan.tasks()[i / p.J], i % p.J, scratch); });
  merge_partials(p);
}

int64_t plan_work(const Batch& p) {
  int64_t work = 0;
  for (int32_t i = 0; i < p.plan.header().tasks; ++i) work += p.plan.tasks()[i].cost;
  return work * p.J * p.D * 2;
}

template <class T>
static void store(const Batch& p, int64_t at, const float* o) {
  for (int64_t d = 0; d < p.D; ++d) static_cast<T*>(p.out)[at * p.D + d] = from_float<T>(o[d]);
}

// One row of a merge: o [D] is scratch.
static void merge_row(const Batch& p, const Merge& m, int64_t j, int64_t r, float* o) {
  const int64_t G = p.H / p.J, first = p.cu_q[m.request], row = m.row0 + r;
  const int64_t token = first + row / G, head = j * G + row % G;
  const int64_t part0 = j * p.partial_rows + m.partial + r;
  const float none = -std::numeric_limits<float>::infinity();
  float top = p.sinks ? p.sinks[head] : none, sum = 0.f;
  for (int64_t i = 0; i < m.parts; ++i) {
    const float lse = p.partial_lse[part0 + i * m.rows];
    top = lse > top || lse != lse ? lse : top;
  }
  for (int64_t d = 0; d < p.D; ++d) o[d] = 0.f;
  if (p.sinks && top != none) sum = std::exp(p.sinks[head] - top);
  for (int64_t i = 0; i < m.parts && top != none; ++i) {
    const int64_t at = part0 + i * m.rows;
    const float share = std::exp(p.partial_lse[at] - top);
    sum += share;
    if (share != 0.f)
      for (int64_t d = 0; d < p.D; ++d) o[d] += share * p.partial[at * p.D + d];
  }
  if (sum != 0.f)
    for (int64_t d = 0; d < p.D; ++d) o[d] /= sum;
  const int64_t at = token * p.H + head;
  if (p.lse) p.lse[at] = sum == 0.f ? none : top + std::log(sum);
  if (p.dtype == DType::kBF16) store<BF16>(p, at, o);
  if (p.dtype == DType::kF16) store<F16>(p, at, o);
  if (p.dtype == DType::kF32) store<float>(p, at, o);
}

void merge_partials(const Batch& p) {
  const Header& h = p.plan.header();
  if (h.merges == 0) return;
  parallel_for(h.merges * p.J, 16 * p.D * 8, [&](int64_t begin, int64_t end) {
    float o[kMostValues];
    for (int64_t i = begin; i < end; ++i) {
      const Merge& m = p.plan.merges()[i / p.J];
      for (int64_t r = 0; r < m.rows; ++r) merge_row(p, m, i % p.J, r, o);
    }
  });
}

}  // namespace tessella::msm
