// A family's table of compiled kernels, and the choice among them.
#pragma once
#include <stdexcept>
#include <string>

#include "core/env.h"

namespace tessella {

template <class Fn>
struct Kernel {
  const char* name;  // family.isa.tile
  Isa isa;
  const char* tile;  // what the family's planner calls it
  Fn* run;
};

// The kernel to run: the one TESSELLA_FORCE names, else the first row for `tile` on the best
// instruction set in use. Throws when the forced one cannot run on this CPU.
template <class Fn, size_t kRows>
const Kernel<Fn>& select(const char* family, const Kernel<Fn> (&table)[kRows], const char* tile) {
  if (!env().error.empty()) throw std::runtime_error(env().error);
  if (!env().force.empty()) {
    const std::string forced = forced_kernel(family);
    for (const Kernel<Fn>& k : table)
      if (forced == k.name) {
        if (isa_supported(k.isa)) return k;
        throw std::runtime_error("TESSELLA_FORCE: this CPU cannot run '" + forced + "'");
      }
  }
  for (const Kernel<Fn>& k : table)
    if (k.isa == env().best_isa && std::string(tile) == k.tile) return k;
  throw std::logic_error(std::string(family) + ": no kernel for tile '" + tile + "'");
}

}  // namespace tessella
