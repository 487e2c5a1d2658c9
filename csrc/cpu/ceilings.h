// What this CPU can do at most, measured: memory read rate, and 8-bit dot products.
#pragma once
#include "cpu/isa.h"

namespace tessella {

struct CpuCeilings {
  double read_bytes_per_us;
  double macs_per_us;  // multiply-adds with the dot product of `isa`
};

// Runs for about half a second on its own threads.
CpuCeilings measure_ceilings(int threads, Isa isa);

}  // namespace tessella
