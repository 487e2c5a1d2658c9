// Planners of the Ascend kernels: pure functions, tested on any machine.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "act_quant.h"
#include "w4ax_gemm.h"

namespace tessella::ascend {

struct GemmProblem {
  int64_t M, N, Kp;
  GemmScheme scheme;
  GemmDtype dtype;
  bool int8;       // activations; else INT4
  bool per_block;  // activation scales
  int32_t scale_row;
  bool has_bias;
  int32_t cores;     // of the device: one cube core and two vector cores each
  std::string mode;  // split, direct, widen, or empty: the planner's choice
};

// The header (GemmTiling), the first task of each core, and the tasks as (m tile, n tile).
// Throws std::runtime_error for a mode that the activations do not have.
std::vector<int32_t> plan_gemm(const GemmProblem& problem);

struct QuantProblem {
  int64_t M, K, K8;
  int64_t scale_rows;
  bool per_block;
  GemmDtype dtype;
  int64_t stride;
  int32_t cores;  // vector cores
  bool has_perm;
};
std::vector<int32_t> plan_quant(const QuantProblem& problem);

}  // namespace tessella::ascend
