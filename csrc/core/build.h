// What this build contains.
#pragma once

#ifdef TESSELLA_WITH_CUDA
#define TSL_IF_CUDA(...) __VA_ARGS__
#else
#define TSL_IF_CUDA(...)
#endif

#ifdef TESSELLA_WITH_SM90
#define TSL_IF_SM90(...) __VA_ARGS__
#else
#define TSL_IF_SM90(...)
#endif

namespace tessella {

constexpr bool kHasCuda = false TSL_IF_CUDA(|| true);
constexpr bool kHasSm90 = false TSL_IF_SM90(|| true);

}  // namespace tessella
