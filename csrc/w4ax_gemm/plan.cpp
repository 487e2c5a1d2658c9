#include "w4ax_gemm/plan.h"

#include <algorithm>

namespace tessella::w4ax_gemm {

// Tokens up to which decoding the weights again for each register tile beats decoding them once
// into L1. Results do not depend on the choice: every tile does the same sums in the same order.
struct Limits {
  int64_t gemv, skinny;
};

static Limits limits(Isa isa) {
  switch (isa_lanes(isa)) {
    case 16:
      return {6, 24};
    case 8:
      return {2, 8};
    default:
      return {4, 4};
  }
}

Plan plan(const Problem& problem, Isa isa) {
  const Limits most = limits(isa);
  Plan p;
  p.tile = problem.M <= most.gemv ? "gemv" : problem.M <= most.skinny ? "skinny" : "wide";
  const int64_t panels = ceil_div(problem.N, 64);
  // Equal chunks, and enough tasks for the threads when there are few panels.
  int64_t chunks = ceil_div(std::max<int64_t>(problem.M, 1), kMostChunkRows);
  while (panels * chunks < 2 * problem.threads && problem.M / (chunks * 2) >= 16) chunks *= 2;
  p.chunk_rows = std::max<int64_t>(1, ceil_div(problem.M, chunks));
  p.tasks = panels * ceil_div(problem.M, p.chunk_rows);
  p.task_work = 64 * problem.Kp * p.chunk_rows;
  return p;
}

std::string to_string(const Problem& problem, const Plan& plan) {
  return "w4ax_gemm M=" + std::to_string(problem.M) + " N=" + std::to_string(problem.N) +
         " K=" + std::to_string(problem.Kp) + " threads=" + std::to_string(problem.threads) +
         " -> tile " + plan.tile + ", " + std::to_string(plan.tasks) + " tasks of " +
         std::to_string(plan.chunk_rows) + " tokens x 64 features";
}

}  // namespace tessella::w4ax_gemm
