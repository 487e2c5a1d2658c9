// Threads: torch's own pool, whatever torch.set_num_threads says.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace tessella {

// Work below this many operations (multiply-adds, or elements converted) is not worth waking
// another thread for: a wake-up costs about 5 us, in which one core does this much.
constexpr int64_t kWorkPerThread = 1 << 18;

// Run f(begin, end) over parts of 0..tasks, each task being `work` operations.
template <class F>
void parallel_for(int64_t tasks, int64_t work, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, work));
  if (tasks <= grain) {
    if (tasks > 0) f(int64_t{0}, tasks);
    return;
  }
  torch::stable::parallel_for(0, tasks, grain, f);
}

}  // namespace tessella
