#include "w4ax_gemm/plan_sm90.h"

#include <algorithm>

namespace tessella::w4ax_gemm {

Sm90Plan plan_sm90_with(const GpuProblem& problem, int tokens, int split) {
  const Sm90Tile tile{tokens, problem.scheme};
  Sm90Plan p{tokens, 0, split, 0, 0, 0};
  const int64_t blocks = problem.Kp / 128;
  const bool totals_fit = problem.scheme != Scheme::kGroup || tokens <= 128;
  if (split > tile.most_split() || split > blocks || !totals_fit) return p;
  p.tiles = int(ceil_div(problem.N, tile.features()) * ceil_div(problem.M, tokens));
  const int slots = problem.sms * tile.blocks_per_sm();
  p.grid = split > 1 ? p.tiles * split : std::min(p.tiles, slots);
  // Few blocks per SM get deeper rings: what counts is the bytes in flight.
  const int resident = std::min(tile.blocks_per_sm(), int(ceil_div(p.grid, problem.sms)));
  const int room = kSm90SmemPerSm / std::max(resident, 1) - kSm90SmemReserved;
  const int stage = tile.smem_bytes(1, 1) - tile.smem_bytes(0, 1);
  const int64_t loads = ceil_div(ceil_div(blocks, split), tile.chunk());
  p.stages = std::min({(room - tile.fixed_bytes(split)) / stage, kSm90MostStages,
                       int(std::max<int64_t>(2, loads))});
  if (p.stages < 2) p.stages = 0;
  p.smem = tile.smem_bytes(p.stages, split);
  return p;
}

// Estimated time of a plan in SM cycles; only the order of such estimates matters.
static double cost(const GpuProblem& problem, const Sm90Plan& p) {
  const Sm90Tile tile{p.tokens, problem.scheme};
  const double per_sm = tile.blocks_per_sm();
  const double ctas = double(p.tiles) * p.split;
  const double waves = ceil_div(int64_t(ctas), int64_t(problem.sms * per_sm));
  const double blocks = double(ceil_div(problem.Kp / 128, p.split));
  // one 128-channel block of one tile: tensor time, or bytes through L2
  const double tensor = tile.features() * tile.tokens / 32.0;
  const double bytes = double(tile.weight_bytes() + tile.act_bytes()) / tile.chunk();
  const double block = std::max(tensor, bytes / 40.0) + 40;
  const double busy = std::min(per_sm, std::max(1.0, ctas / problem.sms));
  const double epilogue = 1500 + p.tokens * 8.0 + (p.split > 1 ? 1200 + p.tokens * 8.0 : 0);
  return waves * (blocks * block * busy + epilogue);
}

Sm90Plan plan_sm90(const GpuProblem& problem, int tokens) {
  Sm90Plan best{};
  double least = 0;
  for (int t : {8, 16, 32, 64, 128, 256}) {
    if (tokens > 0 && t != tokens) continue;
    // a tile of twice the tokens there are would multiply mostly padding
    if (tokens == 0 && t > 8 && t / 2 >= problem.M) continue;
    if (tokens == 0 && t < 128 && t < problem.M) continue;
    for (int split : {1, 2, 4, 8}) {
      const Sm90Plan p = plan_sm90_with(problem, t, split);
      if (p.stages == 0) continue;
      const double c = cost(problem, p);
      if (best.stages == 0 || c < least) best = p, least = c;
    }
  }
  return best;
}

std::string to_string(const GpuProblem& problem, const Sm90Plan& plan) {
  return "w4ax_gemm M=" + std::to_string(problem.M) + " N=" + std::to_string(problem.N) +
         " K=" + std::to_string(problem.Kp) + " sms=" + std::to_string(problem.sms) + " -> tile t" +
         std::to_string(plan.tokens) + ", split " + std::to_string(plan.split) + ", " +
         std::to_string(plan.stages) + " stages, " + std::to_string(plan.grid) + " blocks for " +
         std::to_string(plan.tiles) + " tiles";
}

}  // namespace tessella::w4ax_gemm
