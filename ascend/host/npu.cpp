// Launches on a 910B: the tiling goes to the device, then the kernel that CANN compiled.
#include "npu.h"

#include <stdexcept>

#include <aclrtlaunch_tessella_act_quant.h>
#include <aclrtlaunch_tessella_w4ax_gemm.h>
#include <tiling/platform/platform_ascendc.h>

namespace tessella::ascend {

Cores npu_cores() {
  auto* platform = platform_ascendc::PlatformAscendCManager::GetInstance();
  if (platform == nullptr)
    throw std::runtime_error("tessella: CANN does not know this device; is it a 910B?");
  return {int32_t(platform->GetCoreNumAic()), int32_t(platform->GetCoreNumAiv())};
}

static void check(const char* op, uint32_t error) {
  if (error != 0)
    throw std::runtime_error(std::string("tessella::") + op + ": launch failed, error " +
                             std::to_string(error));
}

void npu_gemm(const GemmCall& c, int32_t cores, void* workspace, void* tiling, void* stream) {
  const auto p = [](const void* x) { return const_cast<void*>(x); };
  check("w4ax_gemm", ACLRT_LAUNCH_KERNEL(tessella_w4ax_gemm)(
                         uint32_t(cores), stream, p(c.codes8), p(c.codes4), p(c.sums), p(c.scales),
                         p(c.w), p(c.bias), c.out, workspace, tiling));
}

void npu_quant(const QuantCall& c, int32_t cores, void* tiling, void* stream) {
  check("act_quant", ACLRT_LAUNCH_KERNEL(tessella_act_quant)(
                         uint32_t(cores), stream, const_cast<void*>(c.x), c.codes8, c.codes4,
                         c.sums, c.scales, const_cast<void*>(c.perm), tiling));
}

}  // namespace tessella::ascend
