// Cores as threads of which one runs at a time, and what they share.
#pragma once
#include <condition_variable>
#include <mutex>
#include <thread>

#include "twin/machine.h"

namespace twin {

struct Aborted {};  // unwinds the other cores after a finding

class Machine {
 public:
  Machine(const Config& config, const std::vector<Buffer>& buffers);
  Report run(const std::function<void()>& kernel);

  // Lets other cores run until `ready`; a deadlock if none can.
  void wait_until(Core& core, const std::function<bool()>& ready, const std::string& what);

  Buffer* find(uint64_t addr, int64_t& at);
  Shadow& shadow(const Buffer* b) { return shadows_[size_t(b - buffers_.data())]; }

  const Config config;
  std::vector<std::unique_ptr<Core>> cores;
  std::map<int, std::vector<std::deque<Clock>>> cross_sets;  // mode, id, group -> per member
  int arrived[2] = {0, 0};
  uint32_t generation[2] = {0, 0};
  Clock barrier_clock[2], released_clock[2];

 private:
  void thread_main(Core& core, const std::function<void()>& kernel);
  void pass_on(int from);  // with the lock held
  bool runnable(int i) const;

  std::vector<Buffer> buffers_;
  std::vector<Shadow> shadows_;
  std::mutex mutex_;
  std::condition_variable turn_;
  int running_ = 0;
  bool abort_ = false;
  std::vector<int> state_;  // 0 ready, 1 blocked, 2 done
  std::vector<std::function<bool()>> ready_;
  std::vector<std::string> waits_;
  std::string finding_, rule_;
  std::mt19937_64 random_;
};

}  // namespace twin
