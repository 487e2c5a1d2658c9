// Launches of the kernels on a 910B.
#pragma once
#include "launch.h"

namespace tessella::ascend {

struct Cores {
  int32_t cube, vector;
};
Cores npu_cores();

// Pointers are on the device; `stream` is an aclrtStream. They throw on a failed launch.
void npu_gemm(const GemmCall& call, int32_t cores, void* workspace, void* tiling, void* stream);
void npu_quant(const QuantCall& call, int32_t cores, void* tiling, void* stream);

}  // namespace tessella::ascend
