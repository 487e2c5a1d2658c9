// Threads: torch's own pool, whatever torch.set_num_threads says.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

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

// Memory of the calling thread, 64-byte aligned, kept for its next task.
inline float* thread_scratch(size_t floats) {
  static thread_local std::unique_ptr<float[]> memory;
  static thread_local size_t have = 0;
  if (have < floats) {
    memory.reset();
    memory.reset(new float[floats + 16]);  // unset: most tasks touch little of it
    have = floats;
  }
  const auto at = reinterpret_cast<uintptr_t>(memory.get());
  return memory.get() + ((64 - at % 64) % 64) / sizeof(float);
}

// Run f(task, scratch) for every task, begun in this order, each by whichever thread is free.
template <class F>
void parallel_in_order(int64_t tasks, int64_t total_work, size_t scratch_floats, const F& f) {
  std::atomic<int64_t> next{0};
  auto drain = [&](int64_t, int64_t) {
    float* scratch = thread_scratch(scratch_floats);
    for (int64_t i = next++; i < tasks; i = next++) f(i, scratch);
  };
  const int64_t threads = std::min<int64_t>(
      {tasks, int64_t(torch::stable::get_num_threads()), 1 + total_work / kWorkPerThread});
  if (threads <= 1)
    drain(0, 1);
  else
    torch::stable::parallel_for(0, threads, 1, drain);
}

}  // namespace tessella
