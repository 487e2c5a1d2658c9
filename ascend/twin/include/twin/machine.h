// The emulated machine: cores with their buffers and pipes, and what is checked on every access.
//
// A kernel runs as one scalar program per core, which issues instructions to pipes. Strict mode
// executes an instruction where it is issued and checks with vector clocks that flags and barriers
// would have forced that order. Random mode keeps a queue per pipe and executes in any order that
// flags allow; a kernel must give the same result. Count mode executes nothing and only counts.
#pragma once
#include <array>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace twin {

enum Pipe : int { kS, kV, kM, kMTE1, kMTE2, kMTE3, kFIX, kPipes };
enum Mem : int { kUB, kL1, kL0A, kL0B, kL0C, kBT, kFB, kLocal, kGM = kLocal };
enum class Mode { kStrict, kRandom, kCount };
enum class Kind { kVector, kCube, kMix };  // cores of a block: one AIV, one AIC, one AIC + two AIV

const char* pipe_name(int pipe);
const char* mem_name(int mem);
int64_t mem_bytes(int mem);  // capacity, architecture 2201 (910B)

// A broken rule; its name is one of: align, bounds, capacity, deadlock, field, flag, hazard,
// overflow, overlap, path, queue, type, uninitialised.
struct Finding : std::exception {
  std::string rule, text;
  Finding(std::string rule_, std::string text_)
      : rule(std::move(rule_)), text(rule + ": " + text_) {}
  const char* what() const noexcept override { return text.c_str(); }
};

struct Config {
  Kind kind = Kind::kMix;
  int blocks = 1;
  Mode mode = Mode::kStrict;
  uint64_t seed = 0;
  bool auto_barrier = false;  // dependent instructions of one pipe need no PipeBarrier
};

// Global memory that a kernel may touch. Without `real` it is an address range for counting.
struct Buffer {
  uint8_t* data;
  int64_t bytes;
  bool initialised;
  bool real = true;
};

enum Path : int { kGmToUb, kGmToL1, kUbToGm, kL1ToL0, kL0cToGm, kPaths };
enum CubeType : int { kCubeS4, kCubeS8, kCubeF16, kCubeF32, kCubeTypes };

struct Stats {
  std::array<int64_t, kPipes> instructions{};
  std::array<int64_t, kPaths> bytes{};
  std::array<int64_t, kCubeTypes> cube_fractals{};  // 16 x 16 x 32 bytes each
  int64_t vector_repeats = 0;                       // of 256 bytes each
  int64_t cross_core_waits = 0;
};

using Clock = std::vector<uint32_t>;

struct Stamp {
  uint32_t who = 0, seq = 0;  // 1 + core * kPipes + pipe; 0: never
};

// What is known of each byte of a memory, and who touched it last.
struct Shadow {
  int granule = 1;  // bytes that share stamps
  std::vector<uint8_t> known;
  std::vector<Stamp> write, read[2];

  void resize(int64_t bytes, int granule_, bool initialised, bool stamps);
};

// An address, and the end of what it belongs to.
struct Ref {
  int mem;
  uint64_t addr, end;

  Ref operator+(int64_t bytes) const { return {mem, addr + uint64_t(bytes), end}; }
};

class Core;
class Machine;

// One instruction while it executes.
class Op {
 public:
  Op(Core& core, Pipe pipe, const char* name) : core_(core), pipe_(pipe), name_(name) {}

  // Checks bounds and hazards; returns the bytes.
  uint8_t* touch(const Ref& r, int64_t n, bool write);
  const uint8_t* read(const Ref& r, int64_t n);  // every byte must be initialised
  uint8_t* write(const Ref& r, int64_t n);       // and marks it so
  uint8_t* known(const Ref& r);
  void move(const Ref& to, const Ref& from, int64_t n);  // with what is known
  [[noreturn]] void fail(const char* rule, const std::string& text) const;
  Core& core() { return core_; }

 private:
  void stamp(Shadow& shadow, const Ref& r, int64_t at, int64_t n, bool write);
  bool ordered(const Stamp& s, const Ref& r) const;

  Core& core_;
  Pipe pipe_;
  const char* name_;
};

struct Space {
  std::vector<uint8_t> data;
  Shadow shadow;
};

// State of one buffer of a queue; tensors remember the generation they were taken from.
struct Slot {
  enum State { kFree, kAllocated, kQueued, kDequeued } state = kFree;
  uint32_t generation = 0;
  const char* position = "";
  bool returned = false;  // a flag of its last consumer is pending
  int id = 0;
};

enum class Atomic { kNone, kAdd };

class Core {
 public:
  Core(Machine& machine, int index, bool aic, int block, int sub);

  using Body = std::function<void(Op&)>;
  template <class F>
  void issue(Pipe pipe, const char* name, F&& body) {
    ++stats.instructions[size_t(pipe)];
    if (mode_ == Mode::kCount) return;
    if (mode_ == Mode::kRandom && pipe != kS) return enqueue({0, pipe, name, body});
    Op op = begin(pipe, name);
    body(op);
  }

  void set_flag(Pipe from, Pipe to, int id);
  void wait_flag(Pipe from, Pipe to, int id);
  void barrier(Pipe pipe);
  void barrier_all();
  void set_cross(int mode, Pipe pipe, int id);
  void wait_cross(int id);
  void sync_all(bool vectors_only);
  void finish();
  void release();  // all buffers and queues
  [[noreturn]] void fail(const char* rule, const std::string& text) const;
  std::string label() const;
  bool counting() const { return mode_ == Mode::kCount; }

  Machine& machine;
  const int index, block, sub;
  const bool aic;
  Stats stats;
  std::array<Space, kLocal> mem;
  std::array<int64_t, kLocal> used{};        // by TPipe
  std::vector<std::shared_ptr<Slot>> slots;  // of all queues
  int buffers = 0;
  std::map<int, int> events;  // pipe pair -> bits of the ids that are allocated
  uint64_t mask[2] = {~0ull, ~0ull};
  bool mask_counts = false;
  int64_t mask_count = 0;
  Atomic atomic = Atomic::kNone;
  float deq_scale = 1.f;
  int next_slot = 100;  // flag ids of queues lie above those of kernels

 private:
  friend class Op;
  friend class Machine;
  struct Item {
    int kind;  // 0 instruction, 1 set, 2 wait, 3 cross-core set
    Pipe pipe;
    const char* name;
    Body body;
    int key = 0, mode = 0;
  };

  Op begin(Pipe pipe, const char* name);
  void enqueue(Item item);
  bool step();              // random mode: executes one pending item of any pipe
  bool run_head(int pipe);  // false: it waits for a flag
  void drain();
  void deliver_cross(int mode, Pipe pipe, int id);
  Clock snapshot(Pipe pipe) const;
  void join(Clock& into, const Clock& from) const;
  int self(Pipe pipe) const { return index * kPipes + pipe; }

  Mode mode_;
  std::array<Clock, kPipes> clock_;
  std::array<uint32_t, kPipes> seq_{};
  std::map<int, Clock> flags_;
  std::array<std::deque<Item>, kPipes> queue_;
  std::map<int, std::deque<Clock>> cross_;
  std::mt19937_64 random_;
};

Core& core();  // the one whose program runs on this thread

// The argument of the running launch that an address lies in, or null; `at` is the offset in it.
Buffer* find_buffer(uint64_t addr, int64_t& at);
Kind launched_kind();
int launched_blocks();

struct Report {
  std::string finding;  // empty: none
  std::string rule;
  std::vector<Stats> cores;
};

// Runs `kernel` as the program of every core. Buffers are what it may touch in global memory.
Report launch(const Config& config, const std::vector<Buffer>& buffers,
              const std::function<void()>& kernel);

// Address of a range that counting uses in place of memory.
uint8_t* fake_address(int64_t index);

}  // namespace twin
