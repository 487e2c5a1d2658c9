// Pipes, flags and barriers of one core, in program order or in a random legal one.
#include <algorithm>

#include "machine.h"

namespace twin {

static int key_of(int from, int to, int id) { return (id * 8 + from) * 8 + to; }

static std::string flag_name(int key) {
  const int id = key >> 6;
  return std::string(pipe_name(key >> 3 & 7)) + "_" + pipe_name(key & 7) +
         (id >= 100 ? " of a queue" : " " + std::to_string(id));
}

Core::Core(Machine& m, int index_, bool aic_, int block_, int sub_)
    : machine(m),
      index(index_),
      block(block_),
      sub(sub_),
      aic(aic_),
      mode_(m.config.mode),
      random_(m.config.seed * 7919 + uint64_t(index_)) {
  if (counting()) return;
  for (int i = 0; i < kLocal; ++i) {
    if (aic != (i != kUB)) continue;
    mem[size_t(i)].data.assign(size_t(mem_bytes(i)), 0xa5);
    mem[size_t(i)].shadow.resize(mem_bytes(i), 4, false, mode_ == Mode::kStrict);
  }
}

std::string Core::label() const {
  return "block " + std::to_string(block) + (aic ? " AIC" : " AIV " + std::to_string(sub));
}

void Core::fail(const char* rule, const std::string& text) const { throw Finding(rule, text); }

void Core::join(Clock& into, const Clock& from) const {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}

// What has happened once everything issued to this pipe so far is complete.
Clock Core::snapshot(Pipe pipe) const {
  Clock c = clock_[size_t(pipe)];
  join(c, clock_[kS]);
  c[size_t(self(pipe))] = seq_[size_t(pipe)];
  return c;
}

Op Core::begin(Pipe pipe, const char* name) {
  if (mode_ == Mode::kStrict) {
    ++seq_[size_t(pipe)];
    if (pipe == kS)
      clock_[kS][size_t(self(kS))] = seq_[kS];
    else
      join(clock_[size_t(pipe)], clock_[kS]);
  }
  return Op(*this, pipe, name);
}

void Core::enqueue(Item item) {
  queue_[size_t(item.pipe)].push_back(std::move(item));
  size_t pending = 0;
  for (const auto& q : queue_) pending += q.size();
  for (uint64_t n = random_() % 3 + (pending > 48 ? 8 : 0); n > 0; --n)
    if (!step()) break;
}

bool Core::run_head(int pipe) {
  auto& queue = queue_[size_t(pipe)];
  if (queue.front().kind == 2) {
    const auto flag = flags_.find(queue.front().key);
    if (flag == flags_.end()) return false;
    flags_.erase(flag);
    queue.pop_front();
    return true;
  }
  const Item item = std::move(queue.front());
  queue.pop_front();
  if (item.kind == 0) {
    Op op = begin(item.pipe, item.name);
    item.body(op);
  } else if (item.kind == 1) {
    if (!flags_.emplace(item.key, Clock{}).second)
      fail("flag", flag_name(item.key) + " may be set twice before it is waited for");
  } else {
    deliver_cross(item.mode, item.pipe, item.key);
  }
  return true;
}

bool Core::step() {
  const int first = int(random_() % kPipes);
  for (int i = 0; i < kPipes; ++i) {
    const int pipe = (first + i) % kPipes;
    if (!queue_[size_t(pipe)].empty() && run_head(pipe)) return true;
  }
  return false;
}

void Core::drain() {
  while (step()) {
  }
  for (const auto& q : queue_)
    if (!q.empty())
      fail("deadlock", "pipe " + std::string(pipe_name(q.front().pipe)) + " waits for flag " +
                           flag_name(q.front().key) + ", which nothing sets");
}

void Core::set_flag(Pipe from, Pipe to, int id) {
  const int key = key_of(from, to, id);
  if (counting()) return;
  if (mode_ == Mode::kRandom && from != kS) return enqueue({1, from, "SetFlag", {}, key});
  if (!flags_.emplace(key, snapshot(from)).second)
    fail("flag", flag_name(key) + " is set twice without a wait between");
}

void Core::wait_flag(Pipe from, Pipe to, int id) {
  const int key = key_of(from, to, id);
  if (counting()) return;
  if (mode_ == Mode::kRandom) {
    if (to != kS) return enqueue({2, to, "WaitFlag", {}, key});
    while (flags_.count(key) == 0)
      if (!step()) fail("deadlock", "the scalar unit waits for flag " + flag_name(key));
    flags_.erase(key);
    return;
  }
  const auto flag = flags_.find(key);
  if (flag == flags_.end()) fail("flag", flag_name(key) + " is waited for and was not set");
  join(clock_[size_t(to)], flag->second);
  flags_.erase(flag);
}

void Core::barrier(Pipe pipe) {
  if (counting()) return;
  clock_[size_t(pipe)][size_t(self(pipe))] = seq_[size_t(pipe)];
}

void Core::barrier_all() {
  if (counting()) return;
  if (mode_ == Mode::kRandom) return drain();
  for (int p = 0; p < kPipes; ++p) join(clock_[kS], snapshot(Pipe(p)));
}

void Core::set_cross(int mode, Pipe pipe, int id) {
  if (mode < 0 || mode > 2) fail("field", "CrossCoreSetFlag: mode " + std::to_string(mode));
  if (id < 0 || id > 10)
    fail("field", "CrossCoreSetFlag: flag id " + std::to_string(id) + " is not in 0..10");
  if (mode_ == Mode::kRandom && pipe != kS)
    return enqueue({3, pipe, "CrossCoreSetFlag", {}, id, mode});
  deliver_cross(mode, pipe, id);
}

// A flag arrives when all members of the setting side have set it: all cores of a kind (mode 0),
// the two AIVs of a block (1), or one side of a block (2).
void Core::deliver_cross(int mode, Pipe pipe, int id) {
  std::vector<Core*> members, receivers;
  for (auto& c : machine.cores) {
    const bool mate = c->block == block;
    if (c->aic == aic && (mode == 0 || mate)) members.push_back(c.get());
    if (mode == 2 ? mate && c->aic != aic : c->aic == aic && (mode == 0 || mate))
      receivers.push_back(c.get());
  }
  if (receivers.empty()) fail("flag", "CrossCoreSetFlag: this launch has no core to receive it");
  const int group = mode == 0 ? int(aic) : 2 * block + int(aic);
  auto& sets = machine.cross_sets[(group * 4 + mode) * 16 + id];
  sets.resize(members.size());
  const size_t me = size_t(std::find(members.begin(), members.end(), this) - members.begin());
  sets[me].push_back(snapshot(pipe));
  if (sets[me].size() > 15)
    fail("flag", "cross-core flag " + std::to_string(id) + " is set 16 times");
  if (std::any_of(sets.begin(), sets.end(), [](const auto& s) { return s.empty(); })) return;
  Clock all = sets[0].front();
  for (auto& s : sets) {
    join(all, s.front());
    s.pop_front();
  }
  for (Core* c : receivers) {
    c->cross_[id].push_back(all);
    if (c->cross_[id].size() > 15)
      fail("flag", "the counter of cross-core flag " + std::to_string(id) + " passes 15");
  }
}

void Core::wait_cross(int id) {
  if (id < 0 || id > 10)
    fail("field", "CrossCoreWaitFlag: flag id " + std::to_string(id) + " is not in 0..10");
  ++stats.cross_core_waits;
  if (mode_ == Mode::kRandom)
    while (cross_[id].empty() && step()) {
    }
  machine.wait_until(
      *this, [this, id] { return !cross_[id].empty(); }, "cross-core flag " + std::to_string(id));
  join(clock_[kS], cross_[id].front());
  cross_[id].pop_front();
}

void Core::sync_all(bool vectors_only) {
  if (vectors_only && aic) fail("flag", "SyncAll of vector cores was called on a cube core");
  barrier_all();
  const int which = vectors_only ? 1 : 0;
  int expected = 0;
  for (auto& c : machine.cores) expected += !vectors_only || !c->aic;
  join(machine.barrier_clock[which], clock_[kS]);
  const uint32_t generation = machine.generation[which];
  if (++machine.arrived[which] == expected) {
    machine.arrived[which] = 0;
    ++machine.generation[which];
    machine.released_clock[which] = machine.barrier_clock[which];
  }
  machine.wait_until(
      *this, [this, which, generation] { return machine.generation[which] != generation; },
      "SyncAll");
  if (mode_ == Mode::kStrict) join(clock_[kS], machine.released_clock[which]);
}

void Core::release() {
  for (const auto& slot : slots)
    if (slot->state != Slot::kFree)
      fail("queue", std::string("a tensor of a ") + slot->position + " queue was never freed");
  slots.clear();
  used.fill(0);
  buffers = 0;
}

void Core::finish() {
  if (mode_ == Mode::kRandom) drain();
  for (const auto& [key, clock] : flags_)
    if ((key >> 6) < 100) fail("flag", flag_name(key) + " was set and never waited for");
  release();
}

}  // namespace twin
