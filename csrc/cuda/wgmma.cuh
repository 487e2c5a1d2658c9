// wgmma on bytes, sm_90a: d[64 x N] (+)= a[64 x 32] b[N x 32]^T, a in registers, b in shared
// memory.
//
// Thread t = 32 warp + 4 r + c of a warpgroup holds, with features (rows) R = 16 warp + r:
//   a: {R, 4c..}, {R+8, 4c..}, {R, 16+4c..}, {R+8, 16+4c..}
//   d[4 j + 2 h + e]: {R + 8 h, 8 j + 2 c + e}
#pragma once
#include <cstdint>

namespace tessella::ptx {

// Descriptor of rows of 128 bytes (K-major) under the 128-byte swizzle, 1024-byte aligned; the next
// 32 channels are 2 further (16-byte units).
__device__ __forceinline__ uint64_t swizzled_rows(uint32_t address) {
  constexpr uint64_t kLeading = 1ull << 16, kStride = 1024ull / 16 << 32, kSwizzle128 = 1ull << 62;
  return (address & 0x3ffff) >> 4 | kLeading | kStride | kSwizzle128;
}

// Has these registers computed here: the compiler may otherwise move that past wgmma_fence, and
// then it must serialise all wgmma.
__device__ __forceinline__ void settle(uint32_t (&f)[4][4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(f[i / 4][i % 4])::"memory");
}

// Before the first wgmma, and after registers it uses were written.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// wgmma<N, signed>(d, a, b, add): s8 weights, or u8 ones; add false starts from zero.
template <int kN, bool kSigned>
struct Wgmma;
// clang-format off
#define TSL_D4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define TSL_D16(i) TSL_D4(i), TSL_D4(i + 4), TSL_D4(i + 8), TSL_D4(i + 12)
#define TSL_WGMMA(kN, kSigned, A, REGS, A0, A1, A2, A3, B, P, ...)                              \
  template <>                                                                                   \
  struct Wgmma<kN, kSigned> {                                                                   \
    __device__ __forceinline__ static void run(int32_t (&d)[kN / 2], const uint32_t (&a)[4],     \
                                               uint64_t b, bool add) {                          \
      asm volatile(                                                                             \
          "{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                                        \
          "wgmma.mma_async.sync.aligned.m64n" #kN "k32.s32." A ".s8 {" REGS "}, "                \
          "{" A0 ", " A1 ", " A2 ", " A3 "}, " B ", p;\n}\n"                                    \
          : __VA_ARGS__                                                                         \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int32_t(add)));              \
    }                                                                                           \
  };
#define TSL_REGS_8 \
  "%0, %1, %2, %3"
TSL_WGMMA(8, false, "u8", TSL_REGS_8, "%4", "%5", "%6", "%7", "%8", "%9",
          TSL_D4(0))
TSL_WGMMA(8, true, "s8", TSL_REGS_8, "%4", "%5", "%6", "%7", "%8", "%9",
          TSL_D4(0))
#define TSL_REGS_16 \
  "%0, %1, %2, %3, %4, %5, %6, %7"
TSL_WGMMA(16, false, "u8", TSL_REGS_16, "%8", "%9", "%10", "%11", "%12", "%13",
          TSL_D4(0), TSL_D4(4))
TSL_WGMMA(16, true, "s8", TSL_REGS_16, "%8", "%9", "%10", "%11", "%12", "%13",
          TSL_D4(0), TSL_D4(4))
#define TSL_REGS_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
TSL_WGMMA(32, false, "u8", TSL_REGS_32, "%16", "%17", "%18", "%19", "%20", "%21",
          TSL_D16(0))
TSL_WGMMA(32, true, "s8", TSL_REGS_32, "%16", "%17", "%18", "%19", "%20", "%21",
          TSL_D16(0))
#define TSL_REGS_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
TSL_WGMMA(64, false, "u8", TSL_REGS_64, "%32", "%33", "%34", "%35", "%36", "%37",
          TSL_D16(0), TSL_D16(16))
TSL_WGMMA(64, true, "s8", TSL_REGS_64, "%32", "%33", "%34", "%35", "%36", "%37",
          TSL_D16(0), TSL_D16(16))
#define TSL_REGS_128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
TSL_WGMMA(128, false, "u8", TSL_REGS_128, "%64", "%65", "%66", "%67", "%68", "%69",
          TSL_D16(0), TSL_D16(16), TSL_D16(32), TSL_D16(48))
TSL_WGMMA(128, true, "s8", TSL_REGS_128, "%64", "%65", "%66", "%67", "%68", "%69",
          TSL_D16(0), TSL_D16(16), TSL_D16(32), TSL_D16(48))
#define TSL_REGS_256 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
TSL_WGMMA(256, false, "u8", TSL_REGS_256, "%128", "%129", "%130", "%131", "%132", "%133",
          TSL_D16(0), TSL_D16(16), TSL_D16(32), TSL_D16(48), TSL_D16(64), TSL_D16(80),
          TSL_D16(96), TSL_D16(112))
TSL_WGMMA(256, true, "s8", TSL_REGS_256, "%128", "%129", "%130", "%131", "%132", "%133",
          TSL_D16(0), TSL_D16(16), TSL_D16(32), TSL_D16(48), TSL_D16(64), TSL_D16(80),
          TSL_D16(96), TSL_D16(112))
#undef TSL_WGMMA
#undef TSL_D16
#undef TSL_D4
// clang-format on

}  // namespace tessella::ptx
