// Small pieces that the kernels share: parameter structs from variables, and waiting.
#pragma once
#include "kernel_operator.h"

namespace tessella::ascend {

using namespace AscendC;

// A flag between two pipes, set and waited for at once.
template <HardEvent kEvent>
__aicore__ inline void Sync() {
  const event_t id = static_cast<event_t>(GetTPipePtr()->FetchEventID(kEvent));
  SetFlag<kEvent>(id);
  WaitFlag<kEvent>(id);
}

__aicore__ inline void Barrier() { PipeBarrier<PIPE_V>(); }

__aicore__ inline int32_t CeilDiv(int32_t a, int32_t b) { return (a + b - 1) / b; }
__aicore__ inline int32_t Least(int32_t a, int32_t b) { return a < b ? a : b; }

__aicore__ inline DataCopyParams Blocks(int32_t count, int32_t len, int32_t src, int32_t dst) {
  DataCopyParams p;
  p.blockCount = count;
  p.blockLen = len;
  p.srcStride = src;
  p.dstStride = dst;
  return p;
}

__aicore__ inline DataCopyExtParams Bytes(int32_t count, int32_t len, int64_t src, int64_t dst) {
  DataCopyExtParams p;
  p.blockCount = count;
  p.blockLen = len;
  p.srcStride = src;
  p.dstStride = dst;
  p.rsv = 0;
  return p;
}

// Strides of operands in blocks of 32 bytes: inside a repeat, and from repeat to repeat.
__aicore__ inline BinaryRepeatParams Strides(int32_t dst_blk, int32_t a_blk, int32_t b_blk,
                                             int32_t dst_rep, int32_t a_rep, int32_t b_rep) {
  BinaryRepeatParams p;
  p.dstBlkStride = dst_blk;
  p.src0BlkStride = a_blk;
  p.src1BlkStride = b_blk;
  p.dstRepStride = dst_rep;
  p.src0RepStride = a_rep;
  p.src1RepStride = b_rep;
  return p;
}

__aicore__ inline UnaryRepeatParams Strides(int32_t dst_blk, int32_t src_blk, int32_t dst_rep,
                                            int32_t src_rep) {
  UnaryRepeatParams p;
  p.dstBlkStride = dst_blk;
  p.srcBlkStride = src_blk;
  p.dstRepStride = dst_rep;
  p.srcRepStride = src_rep;
  return p;
}

}  // namespace tessella::ascend
