// mma.sync on bytes, sm_80 and later.
#pragma once
#include <cstdint>

namespace tessella::ptx {

// d[16 x 8] += a[16 x 32] b[32 x 8], row by column, s8 operands. Lane 4 r + c holds
//   a: {r, 4c..}, {r+8, 4c..}, {r, 16+4c..}, {r+8, 16+4c..}   b: {4c.., r}, {16+4c.., r}
//   d: {r, 2c}, {r, 2c+1}, {r+8, 2c}, {r+8, 2c+1}
__device__ __forceinline__ void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace tessella::ptx
