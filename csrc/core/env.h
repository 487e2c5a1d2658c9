// The environment variables that steer kernel choice, read once and cached.
//
//   TESSELLA_CPU_ISA=avx2              the best instruction set to use (a cap, for tests)
//   TESSELLA_FORCE=w4ax_gemm.avx2.wide one kernel per family, comma-separated
//   TESSELLA_PDL=0                     no programmatic dependent launch on Hopper
//   TESSELLA_DEBUG=1                   appends raise on a slot outside the cache
//   TESSELLA_LOG=plan                  print each new problem and the plan chosen for it, once
#pragma once
#include <string>

#include "cpu/isa.h"

namespace tessella {

struct Env {
  Isa best_isa;           // the best one that this CPU has and the cap allows
  std::string capped_by;  // TESSELLA_CPU_ISA, or empty
  std::vector<std::string> force;
  bool log_plan = false;
  bool programmatic = true;
  bool debug = false;
  std::string error;  // what is wrong with a variable, naming the valid values
};

const Env& env();

// Read the variables again. Returns the error text, empty if all is well. Not to be called while
// another thread runs an op.
const std::string& refresh_env();

// Print `line` to stderr if TESSELLA_LOG=plan and it was not printed before.
void log_plan(const std::string& line);

// The kernel name that TESSELLA_FORCE gives for this family, or an empty string.
std::string forced_kernel(const std::string& family);

}  // namespace tessella
