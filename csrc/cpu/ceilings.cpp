#include "cpu/ceilings.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>

#include "cpu/pages.h"

#define TSL_BODY "cpu/ceilings.inl"
#include "cpu/foreach_isa.h"

namespace tessella {

struct Loops {
  Isa isa;
  int32_t (*read_all)(const uint8_t*, size_t);
  double (*dot_all)(int64_t, const uint8_t*, int32_t*);
};

static constexpr Loops kLoops[] = {
#define X(isa) {Isa::isa, &isa::read_all, &isa::dot_all},
    TSL_FOR_EACH_ISA(X)
#undef X
};

static double now_us() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double, std::micro>(Clock::now().time_since_epoch()).count();
}

// Time of f(thread) on all threads together.
template <class F>
static double time_threads(int threads, const F& f) {
  std::vector<std::thread> pool;
  const double start = now_us();
  for (int t = 1; t < threads; ++t) pool.emplace_back([&f, t] { f(t); });
  f(0);
  for (std::thread& t : pool) t.join();
  return now_us() - start;
}

CpuCeilings measure_ceilings(int threads, Isa isa) {
  const Loops* loops = &kLoops[0];
  for (const Loops& l : kLoops)
    if (l.isa == isa) loops = &l;
  constexpr size_t kBytes = size_t{256} << 20;  // a thread: well past any cache it has alone
  std::vector<std::unique_ptr<uint8_t[]>> buffers;
  for (int t = 0; t < threads; ++t) {
    buffers.emplace_back(new uint8_t[kBytes]);
    advise_huge_pages(buffers.back().get(), kBytes);
    std::memset(buffers.back().get(), t + 1, kBytes);
  }
  volatile int32_t sink = 0;
  CpuCeilings best{0, 0};
  for (int rep = 0; rep < 5; ++rep) {
    const double us = time_threads(
        threads, [&](int t) { sink = loops->read_all(buffers[size_t(t)].get(), kBytes); });
    best.read_bytes_per_us = std::max(best.read_bytes_per_us, double(kBytes) * threads / us);
  }
  const int64_t rounds = isa == Isa::scalar ? 100000 : 1000000;
  for (int rep = 0; rep < 3; ++rep) {
    const double us = time_threads(threads, [&](int t) {
      int32_t s = 0;
      loops->dot_all(rounds, buffers[size_t(t)].get(), &s);
      sink = s;
    });
    int32_t s = 0;
    const double macs_each = loops->dot_all(1, buffers[0].get(), &s) * double(rounds);
    best.macs_per_us = std::max(best.macs_per_us, macs_each * threads / us);
  }
  return best;
}

}  // namespace tessella
