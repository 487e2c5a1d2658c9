#include "msm/plan.h"

#include <algorithm>

namespace tessella::msm {

constexpr int64_t kTiles[] = {16, 32, 64, 128};
// What a task costs beside its keys, in keys: starting it and writing its rows.
constexpr int64_t kTaskKeys = 64;
// Keys a row that a part has at least: what it leaves to the merge is half of what it reads then.
constexpr int64_t kKeysPerRow = 4;
// Parts that a worker should have at least to choose from: two even out the ends.
constexpr int64_t kTasksPerUnit = 2;

int64_t tile_rows(int64_t rows) {
  for (int64_t tile : kTiles)
    if (rows <= tile) return tile;
  return kTiles[3];
}

Range visible_keys(const Problem& p, int64_t b, int64_t row0, int64_t rows) {
  const int64_t G = p.H / p.J, kv = p.kv_len[b], hist = kv - (p.cu_q[b + 1] - p.cu_q[b]);
  const Mask mask = p.mask ? Mask(p.mask[b]) : Mask::kCausal;
  Range range{0, kv};
  if (mask == Mask::kCausal || mask == Mask::kWindow) range.end = hist + (row0 + rows - 1) / G + 1;
  // whole groups of 16 keys, as pages are coded
  if (mask == Mask::kWindow)
    range.begin = std::max<int64_t>(0, hist + row0 / G - p.window + 1) / 16 * 16;
  return range;
}

static int64_t cost(int64_t tile, int64_t keys) { return tile * (keys + kTaskKeys); }

namespace {
struct Tile {
  int64_t request, tile, row0, rows;
  Range keys;
};
}  // namespace

static std::vector<Tile> make_tiles(const Problem& p) {
  std::vector<Tile> tiles;
  tiles.reserve(size_t(p.B));
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t rows = int64_t(p.cu_q[b + 1] - p.cu_q[b]) * (p.H / p.J), tile = tile_rows(rows);
    for (int64_t row0 = 0; row0 < rows; row0 += tile) {
      const int64_t here = std::min(tile, rows - row0);
      tiles.push_back({b, tile, row0, here, visible_keys(p, b, row0, here)});
    }
  }
  return tiles;
}

// Keys of the longest part of a tile.
static int64_t part_keys(const Problem& p, const Tile& t, int64_t budget) {
  if (p.split > 0) return p.split;
  const int64_t keys = t.keys.end - t.keys.begin,
                least = std::max(kSplitUnit, kKeysPerRow * t.tile);
  if (cost(t.tile, keys) <= budget || keys <= least) return std::max<int64_t>(keys, 1);
  const int64_t most = std::max(least, budget / t.tile / kSplitUnit * kSplitUnit);
  return round_up(ceil_div(keys, ceil_div(keys, most)), kSplitUnit);
}

std::vector<int32_t> plan(const Problem& p) {
  const std::vector<Tile> tiles = make_tiles(p);
  int64_t total = 0;
  for (const Tile& t : tiles) total += cost(t.tile, t.keys.end - t.keys.begin) * p.J;
  // one worker has nobody to share with
  const int64_t budget = p.units > 1 ? total / (p.units * kTasksPerUnit) : total + 1;
  std::vector<Task> tasks;
  std::vector<Merge> merges;
  tasks.reserve(tiles.size());
  int64_t partial_rows = 0;
  for (const Tile& t : tiles) {
    const int64_t step = part_keys(p, t, budget);
    // a fixed split cuts at its multiples, wherever the visible keys begin
    int64_t at = p.split > 0 ? t.keys.begin / step * step : t.keys.begin;
    const int64_t parts = std::max<int64_t>(1, ceil_div(t.keys.end - at, step));
    if (parts > 1)
      merges.push_back({int32_t(t.request), int32_t(t.row0), int32_t(t.rows), int32_t(partial_rows),
                        int32_t(parts)});
    for (int64_t i = 0; i < parts; ++i, at += step) {
      const int64_t begin = std::max(at, t.keys.begin), end = std::min(at + step, t.keys.end);
      const int64_t c = std::min<int64_t>(cost(t.tile, end - begin), INT32_MAX);
      tasks.push_back({int32_t(t.request), int32_t(t.tile), int32_t(t.row0), int32_t(t.rows),
                       int32_t(begin), int32_t(std::max(begin, end)),
                       parts > 1 ? int32_t(partial_rows) : -1, int32_t(c)});
      if (parts > 1) partial_rows += t.rows;
    }
  }
  const auto big = [](const Task& t) { return t.tile >= kBigTile; };
  std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) {
    return big(a) != big(b) ? big(a) : a.cost > b.cost;
  });
  const size_t used =
      kHeaderWords + tasks.size() * kTaskWords + merges.size() * size_t{kMergeWords};
  const size_t words = std::max(used, size_t(partial_rows));
  std::vector<int32_t> out(words);
  Header h{};
  h.magic = kMagic;
  h.words = int32_t(words);
  h.B = int32_t(p.B);
  h.T = p.cu_q[p.B];
  h.H = p.H;
  h.J = p.J;
  h.tasks = int32_t(tasks.size());
  h.merges = int32_t(merges.size());
  h.partial_rows = int32_t(partial_rows);
  h.units = p.units;
  h.split = int32_t(p.split);
  h.window = int32_t(p.window);
  h.big = int32_t(std::count_if(tasks.begin(), tasks.end(), big));
  auto copy = [to = reinterpret_cast<char*>(out.data())](const void* from, size_t bytes) mutable {
    std::copy_n(static_cast<const char*>(from), bytes, to);
    to += bytes;
  };
  copy(&h, sizeof(h));
  copy(tasks.data(), tasks.size() * sizeof(Task));
  copy(merges.data(), merges.size() * sizeof(Merge));
  return out;
}

int64_t uniform_split(int64_t B, int J, int64_t max_kv_len, int units) {
  const int64_t parts = std::max<int64_t>(1, ceil_div(units, std::max<int64_t>(1, B * J)));
  return round_up(std::max<int64_t>(1, ceil_div(max_kv_len, parts)), kSplitUnit);
}

// A task must be one that this problem can have: else it would read or write out of bounds.
static bool task_fits(const Problem& p, const Task& t, const Header& h) {
  if (t.request < 0 || t.request >= p.B || t.rows < 1 || t.row0 < 0 || t.rows > 128) return false;
  const int64_t rows = int64_t(p.cu_q[t.request + 1] - p.cu_q[t.request]) * (p.H / p.J);
  return int64_t{t.row0} + t.rows <= rows && t.kv_begin >= 0 && t.kv_begin <= t.kv_end &&
         t.kv_end <= p.kv_len[t.request] && t.partial >= -1 &&
         (t.partial < 0 || int64_t{t.partial} + t.rows <= h.partial_rows);
}

static bool merge_fits(const Problem& p, const Merge& m, const Header& h) {
  if (m.request < 0 || m.request >= p.B || m.rows < 1 || m.row0 < 0 || m.parts < 1) return false;
  const int64_t rows = int64_t(p.cu_q[m.request + 1] - p.cu_q[m.request]) * (p.H / p.J);
  return int64_t{m.row0} + m.rows <= rows && m.partial >= 0 &&
         m.partial + int64_t{m.parts} * m.rows <= h.partial_rows;
}

std::string plan_error(const Problem& p, const int32_t* words, int64_t count) {
  if (count < kHeaderWords) return "too short for a header";
  const PlanView view{words};
  const Header& h = view.header();
  if (h.magic != kMagic) return "not a plan of this version";
  if (h.tasks < 0 || h.merges < 0 || h.partial_rows < 0 || h.words > count ||
      h.words < kHeaderWords + int64_t{h.tasks} * kTaskWords + int64_t{h.merges} * kMergeWords)
    return "its length does not fit its header";
  if (h.B != p.B || h.T != p.cu_q[p.B] || h.H != p.H || h.J != p.J)
    return "made for B=" + std::to_string(h.B) + " T=" + std::to_string(h.T) +
           " H=" + std::to_string(h.H) + " J=" + std::to_string(h.J);
  int64_t pairs = 0, rows = 0;
  for (int32_t i = 0; i < h.tasks; ++i) {
    const Task& t = view.tasks()[i];
    if (!task_fits(p, t, h)) return "task " + std::to_string(i) + " does not fit the batch";
    pairs += int64_t{t.rows} * (t.kv_end - t.kv_begin);
    rows += t.partial < 0 ? t.rows : 0;
  }
  for (int32_t i = 0; i < h.merges; ++i) {
    if (!merge_fits(p, view.merges()[i], h))
      return "merge " + std::to_string(i) + " does not fit the batch";
    rows += view.merges()[i].rows;
  }
  int64_t want = 0;
  for (const Tile& t : make_tiles(p)) want += t.rows * (t.keys.end - t.keys.begin);
  if (pairs < want || rows != h.T * int64_t{h.H / h.J})
    return "it covers other rows or keys than this batch has";
  return "";
}

std::string to_string(const PlanView& plan) {
  const Header& h = plan.header();
  int count[4] = {};
  int64_t most = 0, total = 0;
  for (int32_t i = 0; i < h.tasks; ++i) {
    const Task& t = plan.tasks()[i];
    for (int k = 0; k < 4; ++k) count[k] += t.tile == kTiles[k];
    most = std::max<int64_t>(most, t.cost);
    total += t.cost;
  }
  std::string text = "msm B=" + std::to_string(h.B) + " T=" + std::to_string(h.T) +
                     " H=" + std::to_string(h.H) + " J=" + std::to_string(h.J) +
                     " units=" + std::to_string(h.units) + " -> " + std::to_string(h.tasks) +
                     " tasks x " + std::to_string(h.J) + " heads (";
  for (int k = 0; k < 4; ++k)
    text +=
        (k ? ", " : "") + std::to_string(count[k]) + " of " + std::to_string(kTiles[k]) + " rows";
  return text + "), " + std::to_string(h.merges) + " merges; longest " + std::to_string(most) +
         " of " + std::to_string(total);
}

}  // namespace tessella::msm
