// wgmma on 16-bit floats, sm_90a: d[64 x N] (+)= a[64 x 16] b[16 x N] with fp32 sums.
//
// Thread t = 32 warp + 4 r + c of a warpgroup holds, with rows R = 16 warp + r:
//   a: {R, 2c..}, {R+8, 2c..}, {R, 8+2c..}, {R+8, 8+2c..}, two values each
//   d[4 j + 2 h + e]: {R + 8 h, 8 j + 2 c + e}
// so that the sums of one product, rounded, are the operand a of another.
#pragma once
#include <cstdint>

#include "core/hd.h"
#include "cuda/wgmma.cuh"

namespace tessella::ptx {

// Descriptor of an operand in atoms of 8 rows of kBytes (128, 64 or 32) under the swizzle of that
// width; an atom starts at a multiple of its size. `stride` is from the atom of 8 rows to that of
// the next 8; `leading`, for an operand read across its rows, from one atom to the next along them.
template <int kBytes>
__device__ __forceinline__ uint64_t swizzled_atoms(uint32_t address, int leading, int stride) {
  constexpr uint64_t kMode = kBytes == 128 ? 1 : kBytes == 64 ? 2 : 3;
  return (address & 0x3ffff) >> 4 | uint64_t(leading / 16) << 16 | uint64_t(stride / 16) << 32 |
         kMode << 62;
}

// Registers of an asynchronous product as they are here: no use of them moves across this point.
template <int kN>
__device__ __forceinline__ void hold(float (&d)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kN>
__device__ __forceinline__ void hold(uint32_t (&a)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// run(d, a, b, add): a and b in shared memory, rows of 16 channels along their rows of bytes; or a
// in registers and b the other way round, rows of N. add false starts from zero.
template <DType kType, int kN>
struct Wgmma16;
// clang-format off
#define TSL_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TSL_F16(i) TSL_F4(i), TSL_F4(i + 4), TSL_F4(i + 8), TSL_F4(i + 12)
#define TSL_F32(i) TSL_F16(i), TSL_F16(i + 16)
#define TSL_WGMMA16(kType, T, kN, REGS, I0, I1, I2, I3, I4, I5, ...)                              \
  template <>                                                                                     \
  struct Wgmma16<kType, kN> {                                                                     \
    __device__ __forceinline__ static void run(float (&d)[kN / 2], uint64_t a, uint64_t b,        \
                                               bool add) {                                        \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " I2 ", 0;\n"                                \
                   "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." T "." T " {" REGS "}, "      \
                   I0 ", " I1 ", p, 1, 1, 0, 0;\n}\n"                                             \
                   : __VA_ARGS__                                                                  \
                   : "l"(a), "l"(b), "r"(int32_t(add)));                                          \
    }                                                                                             \
    __device__ __forceinline__ static void run(float (&d)[kN / 2], const uint32_t* a, uint64_t b,  \
                                               bool add) {                                        \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " I5 ", 0;\n"                                \
                   "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." T "." T " {" REGS "}, "      \
                   "{" I0 ", " I1 ", " I2 ", " I3 "}, " I4 ", p, 1, 1, 1;\n}\n"                   \
                   : __VA_ARGS__                                                                  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int32_t(add)));      \
    }                                                                                             \
  };
#define TSL_WGMMA16_TYPES(...)                      \
  TSL_WGMMA16(DType::kBF16, "bf16", __VA_ARGS__) \
  TSL_WGMMA16(DType::kF16, "f16", __VA_ARGS__)
#define TSL_SUMS_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
TSL_WGMMA16_TYPES(64, TSL_SUMS_64, "%32", "%33", "%34", "%35", "%36", "%37",
                  TSL_F32(0))
#undef TSL_SUMS_64
#define TSL_SUMS_80 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39"
TSL_WGMMA16_TYPES(80, TSL_SUMS_80, "%40", "%41", "%42", "%43", "%44", "%45",
                  TSL_F32(0), TSL_F4(32), TSL_F4(36))
#undef TSL_SUMS_80
#define TSL_SUMS_96 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
TSL_WGMMA16_TYPES(96, TSL_SUMS_96, "%48", "%49", "%50", "%51", "%52", "%53",
                  TSL_F32(0), TSL_F16(32))
#undef TSL_SUMS_96
#define TSL_SUMS_128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
TSL_WGMMA16_TYPES(128, TSL_SUMS_128, "%64", "%65", "%66", "%67", "%68", "%69",
                  TSL_F32(0), TSL_F32(32))
#undef TSL_SUMS_128
#define TSL_SUMS_256 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
TSL_WGMMA16_TYPES(256, TSL_SUMS_256, "%128", "%129", "%130", "%131", "%132", "%133",
                  TSL_F32(0), TSL_F32(32), TSL_F32(64), TSL_F32(96))
#undef TSL_SUMS_256
#undef TSL_WGMMA16_TYPES
#undef TSL_WGMMA16
#undef TSL_F32
#undef TSL_F16
#undef TSL_F4
// clang-format on

}  // namespace tessella::ptx
