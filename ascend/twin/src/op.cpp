// Checks of a memory access: bounds, order, initialisation.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace twin {

void Shadow::resize(int64_t bytes, int granule_, bool initialised, bool stamps) {
  granule = granule_;
  known.assign(size_t(bytes), initialised ? 1 : 0);
  const size_t n = stamps ? size_t((bytes + granule - 1) / granule) : 0;
  for (std::vector<Stamp>* v : {&write, &read[0], &read[1]}) v->assign(n, {});
}

void Op::fail(const char* rule, const std::string& text) const {
  throw Finding(rule, std::string(name_) + " on pipe " + pipe_name(pipe_) + ": " + text);
}

static std::string where(const Ref& r) {
  return std::string(mem_name(r.mem)) + " address " + std::to_string(r.addr);
}

bool Op::ordered(const Stamp& s, const Ref&) const {
  if (s.who == 0) return true;
  if (int(s.who) - 1 == core_.self(pipe_) && core_.machine.config.auto_barrier) return true;
  return core_.clock_[size_t(pipe_)][s.who - 1] >= s.seq;
}

void Op::stamp(Shadow& shadow, const Ref& r, int64_t at, int64_t n, bool write) {
  if (shadow.write.empty()) return;
  const Stamp now{uint32_t(core_.self(pipe_) + 1), core_.seq_[size_t(pipe_)]};
  const auto check = [&](const Stamp& s, const char* what) {
    if ((s.who == now.who && s.seq == now.seq) || ordered(s, r)) return;
    const int who = int(s.who) - 1, other = who / kPipes;
    const bool far = other != core_.index;
    const char* rule = far && write && what[0] == 'w' ? "overlap" : "hazard";
    fail(rule,
         std::string(write ? "writes " : "reads ") + where(r) + " that " + what + " by pipe " +
             pipe_name(who % kPipes) +
             (far ? " of " + core_.machine.cores[size_t(other)]->label() : std::string()) +
             (who == core_.self(pipe_) ? " without a barrier between" : " without a flag between"));
  };
  for (int64_t g = at / shadow.granule; g <= (at + n - 1) / shadow.granule; ++g) {
    check(shadow.write[size_t(g)], "was written");
    Stamp *a = &shadow.read[0][size_t(g)], *b = &shadow.read[1][size_t(g)];
    if (write) {
      check(*a, "is read");
      check(*b, "is read");
      shadow.write[size_t(g)] = now;
      *a = *b = Stamp{};
    } else if (a->who == now.who || ordered(*a, r)) {
      *a = now;
    } else {
      *b = now;
    }
  }
}

uint8_t* Op::touch(const Ref& r, int64_t n, bool write) {
  static uint8_t nothing[1];
  if (n == 0) return nothing;
  if (n < 0 || r.addr + uint64_t(n) > r.end)
    fail("bounds", std::string(write ? "writes " : "reads ") + std::to_string(n) + " bytes at " +
                       where(r) + ", " + std::to_string(int64_t(r.addr + uint64_t(n) - r.end)) +
                       " past the end of the tensor");
  if (r.mem != kGM) {
    Space& space = core_.mem[size_t(r.mem)];
    if (r.addr + uint64_t(n) > space.data.size())
      fail("bounds", where(r) + " lies outside of the buffer, or on the other kind of core");
    stamp(space.shadow, r, int64_t(r.addr), n, write);
    return space.data.data() + r.addr;
  }
  int64_t at = 0;
  Buffer* b = core_.machine.find(r.addr, at);
  if (b == nullptr || !b->real || at + n > b->bytes)
    fail("bounds",
         std::string(write ? "writes" : "reads") + " global memory outside of every argument");
  stamp(core_.machine.shadow(b), r, at, n, write);
  return b->data + at;
}

uint8_t* Op::known(const Ref& r) {
  if (r.mem != kGM) return core_.mem[size_t(r.mem)].shadow.known.data() + r.addr;
  int64_t at = 0;
  Buffer* b = core_.machine.find(r.addr, at);
  return core_.machine.shadow(b).known.data() + at;
}

const uint8_t* Op::read(const Ref& r, int64_t n) {
  const uint8_t* p = touch(r, n, false);
  if (n > 0) {
    const uint8_t* k = known(r);
    for (int64_t i = 0; i < n; ++i)
      if (!k[i]) fail("uninitialised", "reads " + where(r + i) + ", which nothing has written");
  }
  return p;
}

uint8_t* Op::write(const Ref& r, int64_t n) {
  uint8_t* p = touch(r, n, true);
  if (n > 0) std::memset(known(r), 1, size_t(n));
  return p;
}

void Op::move(const Ref& to, const Ref& from, int64_t n) {
  if (n == 0) return;
  const uint8_t* s = to.mem == kGM ? read(from, n) : touch(from, n, false);
  uint8_t* d = touch(to, n, true);
  std::memmove(d, s, size_t(n));
  std::memmove(known(to), known(from), size_t(n));
}

}  // namespace twin
