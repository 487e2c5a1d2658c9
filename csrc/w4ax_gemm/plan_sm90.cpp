#include "w4ax_gemm/plan_sm90.h"

#include <algorithm>

namespace tessella::w4ax_gemm {

Sm90Size sm90_size(const std::string& name) {
  for (const Sm90Named& tile : kSm90Tiles)
    if (name == tile.name) return tile.size;
  return {};
}

Sm90Plan plan_sm90_with(const GpuProblem& problem, const Sm90Cut& cut) {
  const int tokens = cut.size.tokens;
  const Sm90Tile tile{cut.size, problem.scheme, problem.wide};
  Sm90Plan p{};
  p.size = cut.size;
  p.wide = problem.wide;
  p.split = cut.split;
  const int64_t blocks = problem.Kp / 128;
  if (!tile.splits(cut.split) || cut.split > blocks || !tile.has_body() ||
      (cut.halves && (cut.split > 1 || !tile.halves())) ||
      (cut.stream && (cut.split > 1 || cut.halves)) ||
      ((cut.stream || problem.wide) && !tile.has_variants()))
    return p;
  const int64_t units = ceil_div(problem.N, tile.features) * ceil_div(problem.M, tokens);
  const int64_t at_once = int64_t{problem.sms} * tile.blocks_per_sm();
  p.whole = int(cut.halves ? units / at_once * at_once : units);
  p.tiles = int(2 * units) - p.whole;
  p.grid = cut.split > 1 ? p.tiles * cut.split : int(std::min<int64_t>(p.tiles, at_once));
  if (cut.stream) {
    // with one whole wave or more, the remainder and one wave are dealt out: parts of a tile stay
    // large then, and few
    p.stream = int(units < 2 * at_once ? units : units % at_once + at_once);
    p.grid = int(std::min(at_once, p.stream * blocks));
    if (p.stream * blocks > 1 << 30) return p;
  }
  // Few blocks per SM get deeper rings: what counts is the bytes in flight.
  const int resident = std::min(tile.blocks_per_sm(), int(ceil_div(p.grid, problem.sms)));
  const int room = kSm90SmemPerSm / std::max(resident, 1) - kSm90SmemReserved;
  const int stage = tile.act_bytes() + tile.weight_bytes();
  const int least = tile.least_stages(cut.split);
  const int64_t loads = ceil_div(ceil_div(blocks, cut.split), tile.chunk());
  p.stages = std::min({(room - tile.smem_bytes(0, cut.split)) / stage, kSm90MostStages,
                       int(std::max<int64_t>(least, loads))});
  if (p.stages < least) p.stages = 0;
  p.smem = tile.smem_bytes(p.stages, cut.split);
  return p;
}

// Clusters of `split` blocks that run at once. Those of more than 2 do not fill every part of the
// chip: of 132 SMs about 120 are of use to them, to 6 blocks fewer than 114.
static int64_t clusters_at_once(int sms, int split, int blocks_per_sm) {
  const int useful = split == 6 ? sms - sms / 5 : split > 2 ? sms - sms / 11 : sms;
  return int64_t{useful} * blocks_per_sm / split;
}

// Few tokens: reading the weights is all there is, so what counts is that every SM reads at once.
static int split_of_small(const GpuProblem& problem, const Sm90Size& size) {
  const Sm90Plan whole = plan_sm90_with(problem, {size});
  const Sm90Tile tile{size, problem.scheme};
  for (int split : {8, 4, 2})
    if (whole.tiles <= clusters_at_once(problem.sms, split, 2) &&
        problem.Kp / 128 >= int64_t{tile.chunk()} * split &&
        plan_sm90_with(problem, {size, split}).stages > 0)
      return split;
  return 1;
}

// What a large tile costs in us, fitted to measurements on an H200.
struct Cost {
  double block;  // 128 channels of one tile
  double store;  // its results
  double join;   // adding up the parts of K
  double half;   // `block` of half a tile
  double meet;   // leaving a part of K in memory, and adding up what others left
};
static Cost cost_of(Scheme scheme, const Sm90Size& size) {
  const bool group = scheme == Scheme::kGroup;
  if (size == Sm90Size{64, 192}) return {0.33, 0.66, 1.7, 0, 0};
  if (size == Sm90Size{128, 192}) return {0.496, 1.2, 4.6, 0.4, 0};
  if (size.tokens == 64) return {group ? 0.42 : 0.23, 0.57, 1.55, 0, 4.8};
  if (size.tokens == 128) return {group ? 0.52 : 0.349, 0.93, 2.7, group ? 0.45 : 0.3, 5.8};
  return {0.62, 2.3, 0, 0.382, 9.5};
}

// Estimated time of a plan with a large tile in us; only the order of such estimates matters.
static double estimate(const GpuProblem& problem, const Sm90Plan& p) {
  constexpr double kStreamDoubt = 1.05;  // what must be gained on paper
  constexpr double kLaunch = 2.35, kL2BytesPerUs = 8.6e6, kReadBytesPerUs = 5.3e6;
  const Sm90Tile tile{p.size, problem.scheme};
  const int64_t blocks = problem.Kp / 128, halves = p.tiles - p.whole;
  const Cost cost = cost_of(problem.scheme, p.size);
  const double each = double(ceil_div(blocks, p.split)) * cost.block + cost.store;
  const int64_t at_once = clusters_at_once(problem.sms, p.split, 1);
  double waves = double(ceil_div(p.whole, at_once)) * (each + (p.split > 1 ? cost.join : 0)) +
                 double(ceil_div(halves, at_once)) * (double(blocks) * cost.half + cost.store / 2);
  if (p.stream > 0) {
    const double blocks_each = double(p.tiles) * double(blocks) / p.grid;
    waves = kStreamDoubt * (blocks_each * cost.block + cost.meet) +
            double(ceil_div(p.tiles, at_once)) * cost.store;
  }
  const double loads = double(blocks) / tile.chunk() *
                       (p.tiles * tile.weight_bytes() + (p.whole + halves / 2.) * tile.act_bytes());
  const double read = double(problem.N * problem.Kp / 2);
  return kLaunch + std::max({waves, loads / kL2BytesPerUs, read / kReadBytesPerUs});
}

Sm90Plan plan_sm90(const GpuProblem& problem, const Sm90Size& only) {
  Sm90Plan best{};
  double least = 0;
  const bool any = only == Sm90Size{};
  for (const auto& [name, t] : kSm90Tiles) {
    if (any ? t.tokens > 8 && t.tokens / 2 >= problem.M : !(t == only)) continue;
    if (!Sm90Tile{t, problem.scheme}.large()) {
      if (any && t.tokens < problem.M) continue;
      return plan_sm90_with(problem, {t, split_of_small(problem, t)});
    }
    for (const Sm90Cut& cut :
         {Sm90Cut{t}, {t, 1, true}, {t, 2}, {t, 3}, {t, 4}, {t, 6}, {t, 8}, {t, 1, false, true}}) {
      const Sm90Plan p = plan_sm90_with(problem, cut);
      // parts of K are there to fill one wave; more waves of them would only be joined more often
      if (p.stages == 0 || (cut.split > 1 && p.tiles > clusters_at_once(problem.sms, cut.split, 1)))
        continue;
      // Shares of K are kernels of their own. Their blocks read from all over K, so activations
      // had better fit L2.
      if (p.stream > 0 && (!any || problem.M * problem.Kp > 16 << 20)) continue;
      const double us = estimate(problem, p);
      if (best.stages == 0 || us < least) best = p, least = us;
    }
  }
  return best;
}

Sm90Plan plan_sm90_probe(const GpuProblem& problem, const Sm90Size& only) {
  GpuProblem coded = problem;
  coded.wide = false;
  Sm90Plan best{};
  double least = 0;
  for (const auto& [name, t] : kSm90Tiles) {
    if (t.tokens < 64 || t.features != 128) continue;
    if (only == Sm90Size{} ? t.tokens > 64 && t.tokens / 2 >= problem.M : !(t == only)) continue;
    const Sm90Plan p = plan_sm90(coded, t);
    const double us = estimate(coded, p);
    if (best.stages == 0 || us < least) best = p, least = us;
  }
  if (best.stages == 0) return best;
  return plan_sm90_with(problem, {best.size, best.split, best.whole < best.tiles});
}

std::string kernel_name(const Sm90Plan& plan) {
  for (const Sm90Named& tile : kSm90Tiles)
    if (plan.size == tile.size) return (plan.stream > 0 ? "s" : "t") + std::string(tile.name);
  return "";
}

std::string to_string(const GpuProblem& problem, const Sm90Plan& plan) {
  return "w4ax_gemm M=" + std::to_string(problem.M) + " N=" + std::to_string(problem.N) +
         " K=" + std::to_string(problem.Kp) + " sms=" + std::to_string(problem.sms) + " -> tile " +
         kernel_name(plan) + ", split " + std::to_string(plan.split) + ", " +
         std::to_string(plan.stages) + " stages, " + std::to_string(plan.grid) + " blocks for " +
         std::to_string(plan.tiles) + " tiles" +
         (plan.stream > 0 ? ", " + std::to_string(plan.stream) + " of them by shares of K" : "") +
         (plan.whole < plan.tiles
              ? ", the last " + std::to_string(plan.tiles - plan.whole) + " of them halves"
              : "") +
         (plan.wide ? ", weights widened" : "");
}

}  // namespace tessella::w4ax_gemm
