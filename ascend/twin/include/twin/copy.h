// Data movement between global memory and UB or L1: DataCopy, DataCopyPad, ND to NZ.
#pragma once
#include "twin/tensor.h"

namespace twin {

inline void aligned(const Ref& r, int64_t to, const char* what) {
  if (r.addr % uint64_t(to) != 0)
    throw Finding("align", std::string(what) + ": " + mem_name(r.mem) + " address " +
                               std::to_string(r.addr) + " is not a multiple of " +
                               std::to_string(to));
}

inline void whole_blocks(int64_t bytes, const char* what) {
  if (bytes % 32 != 0)
    throw Finding("align", std::string(what) + ": " + std::to_string(bytes) +
                               " bytes are not whole blocks of 32");
}

struct Route {
  Pipe pipe;
  int path;
};

// Which unit moves data between two memories, and what it counts as.
inline Route route(int from, int to) {
  if (from == kGM && to == kUB) return {kMTE2, kGmToUb};
  if (from == kGM && to == kL1) return {kMTE2, kGmToL1};
  if (from == kUB && to == kGM) return {kMTE3, kUbToGm};
  if (from == kUB && to == kUB) return {kV, -1};
  if (from == kL1 && to == kBT) return {kMTE1, -1};
  if (from == kL1 && to == kFB) return {kFIX, -1};
  throw Finding("path", std::string("no unit copies from ") + mem_name(from) + " to " +
                            mem_name(to) + " on this architecture");
}

struct Bursts {
  int64_t count, bytes, from_step, to_step;
};

inline void copy_bursts(const Ref& to, const Ref& from, const Bursts& b, const char* name) {
  const Route way = route(from.mem, to.mem);
  if (way.path >= 0) core().stats.bytes[size_t(way.path)] += b.count * b.bytes;
  if (way.pipe == kV) core().stats.vector_repeats += b.count * ((b.bytes + 255) / 256);
  core().issue(way.pipe, name, [=](Op& op) {
    for (int64_t i = 0; i < b.count; ++i)
      op.move(to + i * b.to_step, from + i * b.from_step, b.bytes);
  });
}

// Adds to global memory where SetAtomicAdd is in force.
template <class T>
void add_bursts(const Ref& to, const Ref& from, const Bursts& b, const char* name) {
  core().stats.bytes[kUbToGm] += b.count * b.bytes;
  core().issue(kMTE3, name, [=](Op& op) {
    for (int64_t i = 0; i < b.count; ++i)
      for (int64_t j = 0; j < b.bytes; j += int64_t(sizeof(T))) {
        const Ref at = to + (i * b.to_step + j);
        int64_t ignored = 0;
        T sum;
        std::memcpy(&sum, find_buffer(at.addr, ignored)->data + ignored, sizeof(T));
        const T x = load_one<T>(op, from + (i * b.from_step + j));
        if constexpr (std::is_integral_v<T> || std::is_same_v<T, float>)
          sum = T(sum + x);
        else
          sum = T(float(sum) + float(x));
        int64_t at_byte = 0;
        std::memcpy(find_buffer(at.addr, at_byte)->data + at_byte, &sum, sizeof(T));
        std::memset(op.known(at), 1, sizeof(T));
      }
  });
}

template <class T>
void copy_to_gm(const Ref& to, const Ref& from, const Bursts& b, const char* name) {
  if (core().atomic == Atomic::kAdd && !core().counting())
    add_bursts<T>(to, from, b, name);
  else
    copy_bursts(to, from, b, name);
}

}  // namespace twin

namespace AscendC {

template <class T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, uint32_t count) {
  const int64_t n = twin::bytes_of<T>(count);
  twin::whole_blocks(n, "DataCopy");
  twin::aligned(dst.ref(), 32, "DataCopy");
  twin::copy_bursts(dst.ref(), src.ref(), {1, n, 0, 0}, "DataCopy");
}

template <class T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyParams& p) {
  twin::aligned(dst.ref(), 32, "DataCopy");
  const int64_t n = p.blockLen * 32;
  twin::copy_bursts(dst.ref(), src.ref(),
                    {p.blockCount, n, n + p.srcStride * 32, n + p.dstStride * 32}, "DataCopy");
}

template <class T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count) {
  const int64_t n = twin::bytes_of<T>(count);
  twin::whole_blocks(n, "DataCopy");
  twin::aligned(src.ref(), 32, "DataCopy");
  twin::copy_to_gm<T>(dst.ref(), src.ref(), {1, n, 0, 0}, "DataCopy");
}

template <class T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& p) {
  twin::aligned(src.ref(), 32, "DataCopy");
  const int64_t n = p.blockLen * 32;
  twin::copy_to_gm<T>(dst.ref(), src.ref(),
                      {p.blockCount, n, n + p.srcStride * 32, n + p.dstStride * 32}, "DataCopy");
}

template <class T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& p) {
  twin::aligned(dst.ref(), 32, "DataCopy");
  twin::aligned(src.ref(), 32, "DataCopy");
  // to the tables of bias and scales a block counts 64 and 128 bytes
  const int64_t unit = dst.ref().mem == twin::kBT ? 64 : dst.ref().mem == twin::kFB ? 128 : 32;
  const int64_t n = p.blockLen * unit;
  twin::copy_bursts(dst.ref(), src.ref(),
                    {p.blockCount, n, n + p.srcStride * 32, n + p.dstStride * 32}, "DataCopy");
}

template <class T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count) {
  const int64_t n = twin::bytes_of<T>(count);
  twin::whole_blocks(n, "DataCopy");
  twin::aligned(dst.ref(), 32, "DataCopy");
  twin::aligned(src.ref(), 32, "DataCopy");
  twin::copy_bursts(dst.ref(), src.ref(), {1, n, 0, 0}, "DataCopy");
}

// Rows of a matrix [nValue][dValue] become columns of blocks: [dValue / C0][nValue][C0], C0 being
// 32 bytes. The rest of the last C0 is filled with zeros; rows past nValue are left as they are.
template <class T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const Nd2NzParams& p) {
  twin::aligned(dst.ref(), 32, "DataCopy ND to NZ");
  const twin::Ref to = dst.ref(), from = src.ref();
  if (to.mem != twin::kL1) throw twin::Finding("path", "DataCopy ND to NZ: only from GM to L1");
  const int64_t row = p.dValue * int64_t(sizeof(T)), full = (row + 31) / 32;
  twin::core().stats.bytes[twin::kGmToL1] += p.ndNum * p.nValue * row;
  twin::core().issue(twin::kMTE2, "DataCopy ND to NZ", [=](twin::Op& op) {
    for (int64_t i = 0; i < p.ndNum; ++i)
      for (int64_t n = 0; n < p.nValue; ++n)
        for (int64_t c = 0; c < full; ++c) {
          const int64_t bytes = std::min<int64_t>(32, row - c * 32);
          const int64_t at = i * p.srcNdMatrixStride + n * p.srcDValue;
          const twin::Ref block = to + (i * p.dstNzMatrixStride * int64_t(sizeof(T)) +
                                        (c * p.dstNzC0Stride + n * p.dstNzNStride) * 32);
          op.move(block, from + (at * int64_t(sizeof(T)) + c * 32), bytes);
          if (bytes < 32) std::memset(op.write(block + bytes, 32 - bytes), 0, size_t(32 - bytes));
        }
  });
}

// Rows of any length; in UB each starts at a new block of 32 bytes. What is between the end of a
// row and its block is padding: the value, or what the twin calls uninitialised.
template <class T>
void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyExtParams& p,
                 const DataCopyPadExtParams<T>& pad) {
  twin::aligned(dst.ref(), 32, "DataCopyPad");
  const twin::Ref to = dst.ref(), from = src.ref();
  if (to.mem != twin::kUB) throw twin::Finding("path", "DataCopyPad: only to UB");
  const int64_t size = int64_t(sizeof(T)), left = pad.isPad ? pad.leftPadding * size : 0;
  const int64_t right = pad.isPad ? pad.rightPadding * size : 0;
  if (left > 32 || right > 32)
    throw twin::Finding("field", "DataCopyPad: padding of more than 32 bytes on a side");
  const int64_t step = (left + p.blockLen + right + 31) / 32 * 32 + p.dstStride * 32;
  twin::core().stats.bytes[twin::kGmToUb] += p.blockCount * int64_t(p.blockLen);
  twin::core().issue(twin::kMTE2, "DataCopyPad", [=](twin::Op& op) {
    for (int64_t i = 0; i < p.blockCount; ++i) {
      const twin::Ref row = to + i * step;
      for (int64_t b = 0; b < left; b += size) twin::store_one<T>(op, row + b, pad.paddingValue);
      op.move(row + left, from + i * (int64_t(p.blockLen) + p.srcStride), p.blockLen);
      const int64_t end = left + p.blockLen;
      for (int64_t b = 0; b < right; b += size)
        twin::store_one<T>(op, row + (end + b), pad.paddingValue);
      const int64_t rest = (32 - (end + right) % 32) % 32;
      std::memset(op.touch(row + (end + right), rest, true), 0xa5, size_t(rest));
      if (rest > 0) std::memset(op.known(row + (end + right)), 0, size_t(rest));
    }
  });
}

template <class T>
void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src,
                 const DataCopyExtParams& p) {
  twin::aligned(src.ref(), 32, "DataCopyPad");
  if (src.ref().mem != twin::kUB) throw twin::Finding("path", "DataCopyPad: only from UB");
  const int64_t n = p.blockLen, row = (n + 31) / 32 * 32;
  twin::copy_to_gm<T>(dst.ref(), src.ref(),
                      {p.blockCount, n, row + p.srcStride * 32, n + int64_t(p.dstStride)},
                      "DataCopyPad");
}

}  // namespace AscendC
