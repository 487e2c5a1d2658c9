// Launches of the kernels: the same calls run on a 910B (npu.cpp) or on the twin (twin.cpp).
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../tiling/plan.h"

namespace tessella::ascend {

struct GemmCall {
  GemmProblem problem;
  const void *codes8, *codes4, *sums, *scales, *w, *bias;
  void* out;
};

struct QuantCall {
  QuantProblem problem;
  const void *x, *perm;
  void *codes8, *codes4, *sums, *scales;
};

// How the twin executes: strict program order with all checks, or a random legal order.
struct TwinOptions {
  int64_t seed = -1;  // -1: strict
  bool count = false;
};

// Each returns what the twin found wrong, or an empty text. With `counts`, they count
// instructions and bytes of every core and execute nothing; pointers are not used then.
std::string twin_gemm(const GemmCall& call, const TwinOptions& options,
                      std::vector<int64_t>* counts);
std::string twin_quant(const QuantCall& call, const TwinOptions& options,
                       std::vector<int64_t>* counts);

}  // namespace tessella::ascend
