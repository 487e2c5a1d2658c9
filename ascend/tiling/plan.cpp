#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace tessella::ascend {

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Up to here an INT8 token's two INT4 rows, and the row of corrections, fit the largest tile once.
static constexpr int64_t kMostSplitTokens = 63;

static GemmMode choose_mode(const GemmProblem& p) {
  if (p.mode.empty()) return !p.int8 ? kDirect : p.M <= kMostSplitTokens ? kSplit : kWiden;
  if (p.mode == "direct" && !p.int8) return kDirect;
  if (p.mode == "split" && p.int8) return kSplit;
  if (p.mode == "widen" && p.int8) return kWiden;
  throw std::runtime_error("mode: expected " + std::string(p.int8 ? "split or widen" : "direct") +
                           " for these activations, got '" + p.mode + "'");
}

// Order of tiles: strips of n tiles, walked up and down along m. What cores work on at a time then
// shares tokens and weights about evenly, so that both stay in L2 for their neighbours.
static std::vector<int32_t> order_tiles(const GemmTiling& t) {
  const double a = double(t.tokens) * (t.mode == kWiden ? 128 : 64), b = double(t.n_tile) * 64;
  const auto strip = int32_t(std::clamp(std::sqrt(t.cores * a / b), 1.0, double(t.n_tiles)));
  std::vector<int32_t> order;
  bool down = true;
  for (int32_t n0 = 0; n0 < t.n_tiles; n0 += strip, down = !down)
    for (int32_t i = 0; i < t.m_tiles; ++i)
      for (int32_t n = n0; n < std::min(t.n_tiles, n0 + strip); ++n) {
        order.push_back(down ? i : t.m_tiles - 1 - i);
        order.push_back(n);
      }
  return order;
}

// The tile: the fewest rows that hold all tokens, or the most; then the width that leaves the
// fewest columns to the busiest core.
static void choose_tile(const GemmProblem& p, GemmTiling& t) {
  for (const int32_t rows : {16, 32, 64, 128}) {
    t.rows = rows;
    t.tokens = t.mode == kSplit ? (rows - 1) / 2 : rows;
    if (t.tokens >= p.M) break;
  }
  t.m_tiles = int32_t(ceil_div(p.M, t.tokens));
  int64_t best = INT64_MAX;
  for (const int32_t width : {128, 64}) {
    const int64_t n_tiles = ceil_div(p.N, width);
    const int64_t columns = ceil_div(n_tiles * t.m_tiles, p.cores) * width;
    if (columns >= best) continue;
    best = columns;
    t.n_tile = width;
    t.n_tiles = int32_t(n_tiles);
  }
}

static void choose_units(GemmTiling& t) {
  t.grouped = t.per_block || t.scheme == kGroup || (t.scheme == kTwoLevel && t.mode != kWiden);
  t.unit_blocks = t.blocks;
  if (!t.grouped) return;
  const int32_t chunk = t.mode == kWiden ? 2 : 4;
  int32_t most = kSlotBytes / (t.rows * t.n_tile * 4);
  if (most > chunk) most -= most % chunk;
  t.unit_blocks = std::min(t.blocks, most);
}

static void lay_out_workspace(GemmTiling& t) {
  const int64_t prepared = t.mode == kWiden ? 0 : int64_t(t.m_tiles) * t.blocks * 2 * t.rows * 32;
  t.ring = t.mode == kWiden ? 4 : 0;
  t.at_sums = int32_t(ceil_div(prepared, 512));
  t.at_ring = t.at_sums + t.cores * (2 * kSlotBytes / 512);
  t.workspace = t.at_ring + t.cores * t.ring * t.n_tile * kChunkRowBytes / 512;
}

std::vector<int32_t> plan_gemm(const GemmProblem& p) {
  GemmTiling t{};
  t.M = int32_t(p.M);
  t.N = int32_t(p.N);
  t.blocks = int32_t(p.Kp / 128);
  t.mode = choose_mode(p);
  t.scheme = p.scheme;
  t.dtype = p.dtype;
  t.per_block = p.per_block;
  t.scale_row = p.scale_row;
  t.has_bias = p.has_bias;
  const int32_t row_bytes = p.scheme == kChannel ? 0 : p.scheme == kGroup ? 192 : 128;
  t.block_bytes = 4096 + row_bytes;
  t.tail = p.scheme == kChannel ? 320 : p.scheme == kTwoLevel ? 256 : 0;
  t.panel_bytes = t.blocks * t.block_bytes + t.tail;
  choose_tile(p, t);
  const int32_t tasks = t.m_tiles * t.n_tiles;
  t.cores = std::min(p.cores, tasks);
  choose_units(t);
  lay_out_workspace(t);
  t.tasks_at = kGemmHeader;

  std::vector<int32_t> plan(size_t(kGemmHeader + t.cores + 1 + 2 * tasks));
  std::memcpy(plan.data(), &t, sizeof t);
  const std::vector<int32_t> order = order_tiles(t);
  int32_t *first = plan.data() + kGemmHeader, *to = first + t.cores + 1, n = 0;
  for (int32_t core = 0; core < t.cores; ++core) {
    first[core] = n;
    for (int32_t i = core; i < tasks; i += t.cores, ++n) {
      to[2 * n] = order[size_t(2 * i)];
      to[2 * n + 1] = order[size_t(2 * i + 1)];
    }
  }
  first[t.cores] = n;
  return plan;
}

std::vector<int32_t> plan_quant(const QuantProblem& p) {
  QuantTiling t{};
  t.M = int32_t(p.M);
  t.K = int32_t(p.K);
  t.blocks = int32_t(ceil_div(p.K, 128));
  t.blocks8 = int32_t(p.K8 / 128);
  t.per_block = p.per_block;
  t.scale_rows = int32_t(p.scale_rows);
  t.dtype = p.dtype;
  t.stride = int32_t(p.stride);
  t.cores = int32_t(std::min<int64_t>(p.cores, p.M));
  t.has_perm = p.has_perm;
  t.piece = std::min(t.blocks, p.has_perm ? kQuantPermPiece : kQuantPiece);
  std::vector<int32_t> plan(static_cast<size_t>(kQuantHeader));
  std::memcpy(plan.data(), &t, sizeof t);
  return plan;
}

}  // namespace tessella::ascend
