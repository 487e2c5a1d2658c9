// What this build contains.
#pragma once

#ifdef TESSELLA_WITH_CUDA
#define TSL_IF_CUDA(...) __VA_ARGS__
#else
#define TSL_IF_CUDA(...)
#endif

namespace tessella {

constexpr bool kHasCuda = false TSL_IF_CUDA(|| true);

}  // namespace tessella
