// Parameter structs of AscendC. A field refuses a value that its register does not hold.
#pragma once
#include <cstdint>
#include <string>

#include "twin/machine.h"
#include "twin/types.h"

namespace twin {

// A number of type T in kMin..kMax. Conversions on the device would wrap silently.
template <class T, int64_t kMax, int64_t kMin = 0>
class Field {
 public:
  Field() = default;
  template <class U, class = std::enable_if_t<std::is_arithmetic_v<U> || std::is_enum_v<U>>>
  Field(U x) : value_(T(x)) {
    if (int64_t(x) < kMin || int64_t(x) > kMax)
      throw Finding("field", std::to_string(int64_t(x)) + " is not in " + std::to_string(kMin) +
                                 ".." + std::to_string(kMax));
  }
  template <class U, int64_t kOtherMax, int64_t kOtherMin>
  Field(const Field<U, kOtherMax, kOtherMin>& x) : Field(U(x)) {}
  operator T() const { return value_; }

 private:
  T value_ = T(kMin > 0 ? kMin : 0);
};

using U8 = Field<uint8_t, 255>;
using U16 = Field<uint16_t, 65535>;
using U32 = Field<uint32_t, 4294967295>;

}  // namespace twin

enum pipe_t { PIPE_S, PIPE_V, PIPE_M, PIPE_MTE1, PIPE_MTE2, PIPE_MTE3, PIPE_FIX, PIPE_ALL };
using event_t = int32_t;
using TEventID = int32_t;

enum QuantMode_t {
  NoQuant,
  F322F16,
  F322BF16,
  DEQF16,
  VDEQF16,
  QF322B8_PRE,
  VQF322B8_PRE,
  REQ8,
  VREQ8,
};

namespace AscendC {

using twin::U16;
using twin::U32;
using twin::U8;

enum class TPosition { GM, A1, A2, B1, B2, C1, C2, CO1, CO2, VECIN, VECOUT, VECCALC, C2PIPE2GM };
using QuePosition = TPosition;

enum class RoundMode { CAST_NONE, CAST_RINT, CAST_FLOOR, CAST_CEIL, CAST_ROUND, CAST_TRUNC };
enum class CMPMODE { LT, GT, EQ, LE, GE, NE };
enum class SELMODE { VSEL_CMPMASK_SPR, VSEL_TENSOR_SCALAR_MODE, VSEL_TENSOR_TENSOR_MODE };
enum class ReduceOrder {
  ORDER_VALUE_INDEX,
  ORDER_INDEX_VALUE,
  ORDER_ONLY_VALUE,
  ORDER_ONLY_INDEX,
};
enum class MaskMode { NORMAL, COUNTER };

struct DataCopyParams {  // units of 32 bytes; a stride is the gap from an end to the next start
  twin::Field<uint16_t, 4095, 1> blockCount = 1;
  U16 blockLen = 0, srcStride = 0, dstStride = 0;
  DataCopyParams() = default;
  DataCopyParams(int64_t count, int64_t len, int64_t src, int64_t dst)
      : blockCount(count), blockLen(len), srcStride(src), dstStride(dst) {}
};

struct DataCopyExtParams {  // bytes; strides in UB in units of 32 bytes
  twin::Field<uint16_t, 4095, 1> blockCount = 1;
  twin::Field<uint32_t, 2097151> blockLen = 0;
  U32 srcStride = 0, dstStride = 0, rsv = 0;
  DataCopyExtParams() = default;
  DataCopyExtParams(int64_t count, int64_t len, int64_t src, int64_t dst, int64_t reserved)
      : blockCount(count), blockLen(len), srcStride(src), dstStride(dst), rsv(reserved) {}
};

template <class T>
struct DataCopyPadExtParams {
  bool isPad = false;
  U8 leftPadding = 0, rightPadding = 0;
  T paddingValue{};
  DataCopyPadExtParams() = default;
  DataCopyPadExtParams(bool pad, int64_t left, int64_t right, T value)
      : isPad(pad), leftPadding(left), rightPadding(right), paddingValue(value) {}
};

struct Nd2NzParams {  // elements; strides in the fractal matrix in units of 32 bytes
  twin::Field<uint16_t, 4095> ndNum = 0;
  twin::Field<uint16_t, 16384> nValue = 0;
  U16 dValue = 0, srcNdMatrixStride = 0;
  twin::Field<uint16_t, 65535, 1> srcDValue = 1;
  twin::Field<uint16_t, 16384, 1> dstNzC0Stride = 1, dstNzNStride = 1;
  U16 dstNzMatrixStride = 0;
};

struct LoadData2DParams {  // units of fractals, 512 bytes
  U16 startIndex = 0;
  U8 repeatTimes = 0;
  U16 srcStride = 0;
  U8 sid = 0;
  U16 dstGap = 0;
  bool ifTranspose = false;
  U8 addrMode = 0;
};

struct LoadData2dTransposeParams {  // source in squares, destination gaps in fractals
  U16 startIndex = 0;
  U8 repeatTimes = 0;
  U16 srcStride = 0, dstGap = 0, dstFracGap = 0;
  U8 addrMode = 0;
};

struct MmadParams {
  twin::Field<uint16_t, 4095> m = 0, n = 0, k = 0;
  bool isBias = false;
  int32_t fmOffset = 0;
  bool enSsparse = false, enWinogradA = false, enWinogradB = false;
  twin::Field<uint8_t, 3> unitFlag = 0;
  bool kDirectionAlign = false;
  bool cmatrixInitVal = true, cmatrixSource = false;
};

enum class CO2Layout : uint8_t { NZ, ROW_MAJOR };
struct FixpipeConfig {
  CO2Layout format;
};
constexpr FixpipeConfig CFG_NZ = {CO2Layout::NZ};
constexpr FixpipeConfig CFG_ROW_MAJOR = {CO2Layout::ROW_MAJOR};

struct FixpipeParamsV220 {
  twin::Field<uint16_t, 4095> nSize = 0;
  twin::Field<uint16_t, 8192> mSize = 0;
  U16 srcStride = 0;
  U32 dstStride = 0;
  QuantMode_t quantPre = NoQuant;
  uint64_t deqScalar = 0;
  U16 ndNum = 1, srcNdStride = 0, dstNdStride = 0;
  bool reluEn = false;
  twin::Field<uint8_t, 3> unitFlag = 0;
  bool isChannelSplit = false;
};

struct UnaryRepeatParams {
  U16 dstBlkStride = 1, srcBlkStride = 1;
  U8 dstRepStride = 8, srcRepStride = 8;
  UnaryRepeatParams() = default;
  UnaryRepeatParams(int64_t dst_blk, int64_t src_blk, int64_t dst_rep, int64_t src_rep)
      : dstBlkStride(dst_blk),
        srcBlkStride(src_blk),
        dstRepStride(dst_rep),
        srcRepStride(src_rep) {}
};

struct BinaryRepeatParams {
  U8 dstBlkStride = 1, src0BlkStride = 1, src1BlkStride = 1;
  U8 dstRepStride = 8, src0RepStride = 8, src1RepStride = 8;
  BinaryRepeatParams() = default;
  BinaryRepeatParams(int64_t dst_blk, int64_t src0_blk, int64_t src1_blk, int64_t dst_rep,
                     int64_t src0_rep, int64_t src1_rep)
      : dstBlkStride(dst_blk),
        src0BlkStride(src0_blk),
        src1BlkStride(src1_blk),
        dstRepStride(dst_rep),
        src0RepStride(src0_rep),
        src1RepStride(src1_rep) {}
};

struct CopyRepeatParams {
  U16 dstStride = 1, srcStride = 1, dstRepeatSize = 8, srcRepeatSize = 8;
  CopyRepeatParams() = default;
  CopyRepeatParams(int64_t dst, int64_t src, int64_t dst_rep, int64_t src_rep)
      : dstStride(dst), srcStride(src), dstRepeatSize(dst_rep), srcRepeatSize(src_rep) {}
};

struct BrcbRepeatParams {
  U16 dstBlkStride = 1, dstRepStride = 8;
  BrcbRepeatParams() = default;
  BrcbRepeatParams(int64_t blk, int64_t rep) : dstBlkStride(blk), dstRepStride(rep) {}
};

}  // namespace AscendC
