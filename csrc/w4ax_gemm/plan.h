// Planner of w4ax_gemm on CPU: a pure function from problem to tile and work split.
#pragma once
#include <string>

#include "core/hd.h"
#include "cpu/isa.h"

namespace tessella::w4ax_gemm {

struct Problem {
  int64_t M, N, Kp;
  int threads;
};

struct Plan {
  const char* tile;    // kernels.h
  int64_t chunk_rows;  // tokens of one task; a task is one panel of 64 features x these tokens
  int64_t tasks;
  int64_t task_work;  // multiply-adds of one task
};

// Most rows a task may have: its totals (256 bytes a row) live on the stack, and with the codes of
// these rows should stay in L2.
constexpr int64_t kMostChunkRows = 256;

Plan plan(const Problem& problem, Isa isa);
std::string to_string(const Problem& problem, const Plan& plan);

}  // namespace tessella::w4ax_gemm
