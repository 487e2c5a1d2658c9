// Compiles one body for every instruction set of isa.h.
//
//   #define TSL_BODY "w4ax_gemm/cpu.inl"
//   #include "cpu/foreach_isa.h"
//
// The body lands in namespaces tessella::avx512vnni, ::avxvnni, ::avx2 and ::scalar, each with that
// set's vocabulary (vec_*.h) around it. Include every std and torch header before this one: inside
// a target region nothing may be compiled but our own bodies, or the linker could pick an AVX copy
// of some inline function for all CPUs.
#include "core/half.h"
#include "core/hd.h"
#include "cpu/isa.h"

#if TSL_X86
#include <immintrin.h>

// gcc 12 warns about its own _mm512_undefined_*() in every intrinsic that uses one
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
namespace tessella::avx512vnni {
#include "cpu/vec_avx512.h"
#include TSL_BODY
}  // namespace tessella::avx512vnni
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")
namespace tessella::avxvnni {
#define TSL_AVX_VNNI 1
#include "cpu/vec_avx2.h"
#include TSL_BODY
#undef TSL_AVX_VNNI
}  // namespace tessella::avxvnni
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace tessella::avx2 {
#define TSL_AVX_VNNI 0
#include "cpu/vec_avx2.h"
#include TSL_BODY
#undef TSL_AVX_VNNI
}  // namespace tessella::avx2
#pragma GCC pop_options
#pragma GCC diagnostic pop
#endif

namespace tessella::scalar {
#include "cpu/vec_scalar.h"
#include TSL_BODY
}  // namespace tessella::scalar
#undef TSL_BODY
