#include "machine.h"

#include <algorithm>

namespace twin {

static thread_local Core* current = nullptr;

Core& core() {
  if (current == nullptr) throw Finding("type", "AscendC was called outside of a kernel");
  return *current;
}

Buffer* find_buffer(uint64_t addr, int64_t& at) { return core().machine.find(addr, at); }

Kind launched_kind() { return core().machine.config.kind; }
int launched_blocks() { return core().machine.config.blocks; }

const char* pipe_name(int pipe) {
  static const char* const kNames[] = {"S", "V", "M", "MTE1", "MTE2", "MTE3", "FIX"};
  return kNames[pipe];
}

const char* mem_name(int mem) {
  static const char* const kNames[] = {"UB", "L1", "L0A", "L0B", "L0C", "BT", "FixBuf", "GM"};
  return kNames[mem];
}

int64_t mem_bytes(int mem) {
  static constexpr int64_t kKiB[] = {192, 512, 64, 64, 128, 1, 7};
  return kKiB[mem] * 1024;
}

uint8_t* fake_address(int64_t index) {
  return reinterpret_cast<uint8_t*>((uint64_t(index) + 1) << 44);
}

Machine::Machine(const Config& c, const std::vector<Buffer>& buffers)
    : config(c), buffers_(buffers), shadows_(buffers.size()), random_(c.seed) {
  for (size_t i = 0; i < buffers.size(); ++i)
    if (buffers[i].real)
      shadows_[i].resize(buffers[i].bytes, 1, buffers[i].initialised, config.mode == Mode::kStrict);
  for (int b = 0; b < config.blocks; ++b) {
    const auto add = [&](bool aic, int sub) {
      cores.push_back(std::make_unique<Core>(*this, int(cores.size()), aic, b, sub));
    };
    if (config.kind != Kind::kVector) add(true, 0);
    if (config.kind != Kind::kCube) add(false, 0);
    if (config.kind == Kind::kMix) add(false, 1);
  }
  for (auto& core : cores)
    for (Clock& clock : core->clock_) clock.assign(cores.size() * kPipes, 0);
  for (int i = 0; i < 2; ++i) barrier_clock[i].assign(cores.size() * kPipes, 0);
  state_.assign(cores.size(), 0);
  ready_.resize(cores.size());
  waits_.resize(cores.size());
}

Buffer* Machine::find(uint64_t addr, int64_t& at) {
  for (Buffer& b : buffers_) {
    const uint64_t start = reinterpret_cast<uint64_t>(b.data);
    if (addr >= start && addr < start + uint64_t(b.bytes)) {
      at = int64_t(addr - start);
      return &b;
    }
  }
  return nullptr;
}

bool Machine::runnable(int i) const {
  return state_[size_t(i)] == 0 || (state_[size_t(i)] == 1 && ready_[size_t(i)]());
}

void Machine::pass_on(int from) {
  const int n = int(cores.size());
  std::vector<int> can;
  for (int i = 1; i <= n; ++i)
    if (runnable((from + i) % n)) can.push_back((from + i) % n);
  if (!can.empty()) {
    running_ = config.mode == Mode::kRandom ? can[random_() % can.size()] : can[0];
  } else if (finding_.empty() &&
             std::any_of(state_.begin(), state_.end(), [](int s) { return s == 1; })) {
    rule_ = "deadlock";
    finding_ = "deadlock: every core waits";
    for (int i = 0; i < n; ++i)
      if (state_[size_t(i)] == 1)
        finding_ += "; " + cores[size_t(i)]->label() + " for " + waits_[size_t(i)];
    abort_ = true;
  }
  turn_.notify_all();
}

void Machine::wait_until(Core& core, const std::function<bool()>& ready, const std::string& what) {
  std::unique_lock<std::mutex> lock(mutex_);
  const size_t i = size_t(core.index);
  if (ready()) return;
  state_[i] = 1;
  ready_[i] = ready;
  waits_[i] = what;
  pass_on(core.index);
  turn_.wait(lock, [&] { return abort_ || running_ == core.index; });
  if (abort_) throw Aborted{};
  state_[i] = 0;
}

void Machine::thread_main(Core& core, const std::function<void()>& kernel) {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    turn_.wait(lock, [&] { return abort_ || running_ == core.index; });
    if (abort_) return;
  }
  current = &core;
  std::string finding, rule;
  try {
    kernel();
    core.finish();
  } catch (const Finding& f) {
    finding = core.label() + ": " + f.text;
    rule = f.rule;
  } catch (const Aborted&) {
  }
  current = nullptr;
  const std::lock_guard<std::mutex> lock(mutex_);
  state_[size_t(core.index)] = 2;
  if (!finding.empty() && finding_.empty()) {
    finding_ = finding;
    rule_ = rule;
    abort_ = true;
  }
  pass_on(core.index);
}

Report Machine::run(const std::function<void()>& kernel) {
  if (config.mode == Mode::kRandom) running_ = int(random_() % cores.size());
  std::vector<std::thread> threads;
  for (auto& core : cores)
    threads.emplace_back([this, &core, &kernel] { thread_main(*core, kernel); });
  for (std::thread& t : threads) t.join();
  Report report{finding_, rule_, {}};
  for (auto& core : cores) {
    report.cores.push_back(core->stats);
    if (!report.finding.empty()) continue;
    for (const auto& [id, sets] : core->cross_)
      if (!sets.empty()) {
        report.rule = "flag";
        report.finding = core->label() + ": flag: cross-core flag " + std::to_string(id) +
                         " was set and never waited for";
      }
  }
  for (const auto& [key, sets] : cross_sets)
    for (const auto& member : sets)
      if (!member.empty() && report.finding.empty()) {
        report.rule = "flag";
        report.finding = "flag: cross-core flag " + std::to_string(key & 15) +
                         " was set by some of its cores only";
      }
  return report;
}

Report launch(const Config& config, const std::vector<Buffer>& buffers,
              const std::function<void()>& kernel) {
  Machine machine(config, buffers);
  return machine.run(kernel);
}

}  // namespace twin
