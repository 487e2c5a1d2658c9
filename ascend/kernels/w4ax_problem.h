// What the cube core and the vector cores of w4ax_gemm both know: arguments, tiling, tasks.
#pragma once
#include "../tiling/w4ax_gemm.h"
#include "blocks.h"

namespace tessella::ascend {

// Flags between the cores of a block.
constexpr uint16_t kPrepared = 0;  // activations are in the workspace
constexpr uint16_t kReady = 1;     // sums of a unit are in its slot
constexpr uint16_t kTaken = 2;     // and have been read
constexpr uint16_t kWide = 3;      // a chunk of widened weights is in the ring
constexpr uint16_t kWideTaken = 4;

struct GemmArgs {
  GM_ADDR codes8, codes4, sums, scales, w, bias, out, workspace, tiling;
};

// A task is an output tile; it is done in units of blocks whose sums leave the cube together.
struct Unit {
  int32_t m_tile, n_tile;  // index of the tile
  int32_t tokens, rows;    // that exist
  int32_t columns;         // 64 or 128
  int32_t first, end;      // blocks
  bool last;               // of its tile
};

class Problem {
 public:
  __aicore__ inline void Init(const GemmArgs& args) {
    table_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(args.tiling));
    int32_t* to = reinterpret_cast<int32_t*>(&t);
    for (int32_t i = 0; i < kGemmHeader; ++i) to[i] = table_.GetValue(i);
    core = GetBlockIdx();
    if ASCEND_IS_AIV {
      core /= 2;
    }
    first_ = table_.GetValue(t.tasks_at + core);
    tasks = table_.GetValue(t.tasks_at + core + 1) - first_;
    units_per_task = CeilDiv(t.blocks, t.unit_blocks);
    units = tasks * units_per_task;
  }

  __aicore__ inline Unit At(int32_t u) {
    Unit unit;
    const int32_t at = t.tasks_at + t.cores + 1 + 2 * (first_ + u / units_per_task);
    const int32_t part = u % units_per_task;
    unit.m_tile = table_.GetValue(at);
    unit.n_tile = table_.GetValue(at + 1);
    unit.tokens = Least(t.tokens, t.M - unit.m_tile * t.tokens);
    unit.rows = t.mode == kSplit ? 2 * unit.tokens + 1 : unit.tokens;
    const int32_t panels = CeilDiv(t.N, 64) - unit.n_tile * (t.n_tile / 64);
    unit.columns = Least(t.n_tile, panels * 64);
    unit.first = part * t.unit_blocks;
    unit.end = Least(t.blocks, unit.first + t.unit_blocks);
    unit.last = part == units_per_task - 1;
    return unit;
  }

  // Chunks of weights that a core's tasks need in all, `chunk` blocks each.
  __aicore__ inline int32_t Chunks(int32_t chunk) const {
    const int32_t full = CeilDiv(t.unit_blocks, chunk);
    const int32_t rest = t.blocks - (units_per_task - 1) * t.unit_blocks;
    return tasks * ((units_per_task - 1) * full + CeilDiv(rest, chunk));
  }

  GemmTiling t;
  int32_t core, tasks, units_per_task, units;

 private:
  GlobalTensor<int32_t> table_;
  int32_t first_;
};

}  // namespace tessella::ascend
