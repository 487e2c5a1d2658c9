// A host emulator of the part of AscendC that the kernels in ascend/kernels use, under the name of
// the official header, so that the same sources build with CANN. Written from AscendC's public
// documentation; docs/ascend.md says what it checks and what it cannot.
#pragma once
#include "twin/cast.h"
#include "twin/copy.h"
#include "twin/cube.h"
#include "twin/fixpipe.h"
#include "twin/pipe.h"
#include "twin/reduce.h"
#include "twin/sync.h"
#include "twin/vector.h"

#define __aicore__
#define __global__
#define __gm__
#define KERNEL_TASK_TYPE_DEFAULT(kind) AscendC::CheckKernelType(kind)
#define ASCEND_IS_AIC (twin::core().aic)
#define ASCEND_IS_AIV (!twin::core().aic)

using GM_ADDR = uint8_t*;
