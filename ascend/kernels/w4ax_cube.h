// The cube core of w4ax_gemm: sums of products of codes, exact in int32.
//
// Operands travel in chunks of 256 bytes of K per row, double-buffered in L1 and again in L0. T is
// int4b_t (weights as they are packed) or int8_t (weights widened by the vector cores).
#pragma once
#include "w4ax_problem.h"

namespace tessella::ascend {

template <class T>
struct IsByte {
  static constexpr bool value = false;
};
template <>
struct IsByte<int8_t> {
  static constexpr bool value = true;
};

template <class T>
class GemmCube {
 public:
  static constexpr bool kBytes = IsByte<T>::value;
  static constexpr int32_t kBlockBytes = kBytes ? 128 : 64;  // of a row's block of 128 channels
  static constexpr int32_t kColumns = kBlockBytes / 32;      // of fractals
  static constexpr int32_t kChunk = kChunkRowBytes / kBlockBytes;

  __aicore__ inline void Init(const GemmArgs& args, TPipe* pipe) {
    p_.Init(args);
    const GemmTiling& t = p_.t;
    codes_.SetGlobalBuffer(reinterpret_cast<__gm__ int8_t*>(args.codes8));
    prepared_.SetGlobalBuffer(reinterpret_cast<__gm__ int8_t*>(args.workspace));
    w_.SetGlobalBuffer(reinterpret_cast<__gm__ int8_t*>(args.w));
    ring_.SetGlobalBuffer(
        reinterpret_cast<__gm__ int8_t*>(args.workspace + int64_t(t.at_ring) * 512 +
                                         int64_t(p_.core) * t.ring * t.n_tile * kChunkRowBytes));
    sums_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(
        args.workspace + int64_t(t.at_sums) * 512 + int64_t(p_.core) * 2 * kSlotBytes));
    pipe->InitBuffer(a1_, 2, t.rows * kChunkRowBytes);
    pipe->InitBuffer(b1_, 2, t.n_tile * kChunkRowBytes);
    pipe->InitBuffer(a2_, 2, t.rows * kChunkRowBytes);
    pipe->InitBuffer(b2_, 2, t.n_tile * kChunkRowBytes);
    pipe->InitBuffer(c_, 2, kSlotBytes);
  }

  __aicore__ inline void Process() {
    if (p_.units == 0) return;
    if (!kBytes) CrossCoreWaitFlag(kPrepared);
    const int32_t chunks = p_.Chunks(kChunk);
    int32_t chunk = 0;
    for (int32_t u = 0; u < p_.units; ++u) {
      const Unit unit = p_.At(u);
      LocalTensor<int32_t> c = c_.template AllocTensor<int32_t>();
      for (int32_t b = unit.first; b < unit.end; b += kChunk, ++chunk) {
        const int32_t blocks = Least(kChunk, unit.end - b);
        Load(unit, b, blocks, chunk, chunk + p_.t.ring < chunks);
        ToL0(unit, blocks);
        Multiply(c, unit, b, blocks);
      }
      c_.EnQue(c);
      if (u >= 2) CrossCoreWaitFlag(kTaken);
      Store(unit, u % 2);
      CrossCoreSetFlag<2, PIPE_FIX>(kReady);
    }
  }

 private:
  // Global memory to L1, as columns of fractals: rows and features that exist, and no others.
  __aicore__ inline void Load(const Unit& unit, int32_t block, int32_t blocks, int32_t chunk,
                              bool give_back) {
    const GemmTiling& t = p_.t;
    LocalTensor<int8_t> a = a1_.template AllocTensor<int8_t>();
    if (kBytes) {
      Nd2NzParams nz;
      nz.ndNum = 1;
      nz.nValue = unit.tokens;
      nz.dValue = 128;
      nz.srcNdMatrixStride = 0;
      nz.srcDValue = 128;
      nz.dstNzC0Stride = t.rows;
      nz.dstNzNStride = 1;
      nz.dstNzMatrixStride = 0;
      for (int32_t i = 0; i < blocks; ++i) {
        const int64_t token = int64_t(block + i) * t.M + unit.m_tile * t.tokens;
        DataCopy(a[i * t.rows * 128], codes_[token * 128], nz);
      }
    } else {
      const int64_t column = (int64_t(unit.m_tile) * t.blocks + block) * kColumns;
      DataCopy(a, prepared_[column * t.rows * 32],
               Blocks(blocks * kColumns, unit.rows, t.rows - unit.rows, t.rows - unit.rows));
    }
    a1_.EnQue(a);
    LocalTensor<int8_t> b = b1_.template AllocTensor<int8_t>();
    if (kBytes) {
      CrossCoreWaitFlag(kWide);
      const int64_t slot = int64_t(chunk % t.ring) * t.n_tile * kChunkRowBytes;
      DataCopy(b, ring_[slot], unit.columns * blocks * kBlockBytes);
      if (give_back) CrossCoreSetFlag<2, PIPE_MTE2>(kWideTaken);
    } else {
      for (int32_t i = 0; i < unit.columns / 64; ++i) {
        const int64_t panel = unit.n_tile * (t.n_tile / 64) + i;
        DataCopy(b[i * blocks * 4096], w_[panel * t.panel_bytes + int64_t(block) * t.block_bytes],
                 Blocks(blocks, 128, (t.block_bytes - 4096) / 32, 0));
      }
    }
    b1_.EnQue(b);
  }

  // L1 to L0A (zZ: rows of fractals, for each product apart) and to L0B (nZ).
  __aicore__ inline void ToL0(const Unit& unit, int32_t blocks) {
    const GemmTiling& t = p_.t;
    LocalTensor<int8_t> a1 = a1_.template DeQue<int8_t>();
    LocalTensor<T> a2 = a2_.template AllocTensor<T>(), from_a = a1.template ReinterpretCast<T>();
    const int32_t products = t.grouped ? blocks : 1;
    const int32_t columns = blocks * kColumns / products, fractals = t.rows / 16;
    LoadData2DParams load;
    load.repeatTimes = columns;
    load.srcStride = fractals;
    for (int32_t i = 0; i < products; ++i)
      for (int32_t r = 0; r < CeilDiv(unit.rows, 16); ++r) {
        load.startIndex = i * columns * fractals + r;
        LoadData(a2[(i * fractals + r) * columns * kPerFractal], from_a, load);
      }
    a2_.EnQue(a2);
    a1_.FreeTensor(a1);

    LocalTensor<int8_t> b1 = b1_.template DeQue<int8_t>();
    LocalTensor<T> b2 = b2_.template AllocTensor<T>(), from_b = b1.template ReinterpretCast<T>();
    LoadData2DParams whole;
    whole.srcStride = 1;
    if (kBytes || unit.columns == 64) {
      whole.repeatTimes = blocks * kColumns * (unit.columns / 16);
      LoadData(b2, from_b, whole);
    } else {
      whole.repeatTimes = 4;
      for (int32_t panel = 0; panel < unit.columns / 64; ++panel)
        for (int32_t k = 0; k < blocks * kColumns; ++k) {
          whole.startIndex = (panel * blocks * kColumns + k) * 4;
          LoadData(b2[(k * (unit.columns / 16) + panel * 4) * kPerFractal], from_b, whole);
        }
    }
    b2_.EnQue(b2);
    b1_.FreeTensor(b1);
  }

  __aicore__ inline void Multiply(const LocalTensor<int32_t>& c, const Unit& unit, int32_t block,
                                  int32_t blocks) {
    const GemmTiling& t = p_.t;
    LocalTensor<T> a = a2_.template DeQue<T>();
    LocalTensor<T> b = b2_.template DeQue<T>();
    MmadParams mmad;
    mmad.m = unit.rows < 2 ? 2 : unit.rows;  // 1 would be another instruction, with its own layout
    mmad.n = unit.columns;
    mmad.k = t.grouped ? 128 : blocks * 128;
    mmad.cmatrixInitVal = t.grouped || block == unit.first;
    mmad.cmatrixSource = false;
    const int32_t products = t.grouped ? blocks : 1;
    for (int32_t i = 0; i < products; ++i) {
      const int32_t slot = t.grouped ? block + i - unit.first : 0;
      Mmad(c[slot * t.rows * t.n_tile], a[i * t.rows * 128], b[i * unit.columns * 128], mmad);
      PipeBarrier<PIPE_M>();
    }
    a2_.FreeTensor(a);
    b2_.FreeTensor(b);
  }

  __aicore__ inline void Store(const Unit& unit, int32_t slot) {
    const GemmTiling& t = p_.t;
    LocalTensor<int32_t> c = c_.template DeQue<int32_t>();
    FixpipeParamsV220 fix;
    fix.nSize = unit.columns;
    fix.mSize = unit.rows;
    fix.srcStride = CeilDiv(unit.rows < 2 ? 2 : unit.rows, 16) * 16;
    fix.dstStride = t.n_tile;
    fix.quantPre = QuantMode_t::NoQuant;
    fix.ndNum = 1;
    const int32_t products = t.grouped ? unit.end - unit.first : 1;
    for (int32_t i = 0; i < products; ++i) {
      const int32_t at = i * t.rows * t.n_tile;
      Fixpipe<int32_t, int32_t, CFG_ROW_MAJOR>(sums_[slot * (kSlotBytes / 4) + at], c[at], fix);
    }
    c_.FreeTensor(c);
  }

  static constexpr int32_t kPerFractal = kBytes ? 512 : 1024;  // elements

  Problem p_;
  GlobalTensor<int8_t> codes_, prepared_, w_, ring_;
  GlobalTensor<int32_t> sums_;
  TQue<TPosition::A1, 2> a1_;
  TQue<TPosition::B1, 2> b1_;
  TQue<TPosition::A2, 2> a2_;
  TQue<TPosition::B2, 2> b2_;
  TQue<TPosition::CO1, 2> c_;
};

}  // namespace tessella::ascend
