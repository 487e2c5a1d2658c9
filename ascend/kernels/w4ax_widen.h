// Packed weights to bytes on the vector cores, one chunk ahead of the cube core.
//
// Each vector core of a block widens half of a chunk's features into the ring in the workspace.
// Channels 32 apart share a byte (csrc/layout/w4_cube.h), so low and high nibbles, masked on words
// of 16 bits, are fractals of 16 features x 32 channels as they stand: three instructions for 512
// weights, and no cast. They are 16 (q - 8); the sums are divided by 16 afterwards, exactly.
// Two-level weights become the byte q s1 + a - 128 in half precision, in which it is exact.
#pragma once
#include "w4ax_problem.h"

namespace tessella::ascend {

class Widen {
 public:
  static constexpr int32_t kChunk = kChunkRowBytes / 128;

  __aicore__ inline void Init(const GemmArgs& args, Problem* problem, TPipe* pipe,
                              const LocalTensor<uint8_t>& scratch) {
    p_ = problem;
    const GemmTiling& t = p_->t;
    w_.SetGlobalBuffer(reinterpret_cast<__gm__ int8_t*>(args.w));
    to_.SetGlobalBuffer(
        reinterpret_cast<__gm__ int8_t*>(args.workspace + int64_t(t.at_ring) * 512 +
                                         int64_t(p_->core) * t.ring * t.n_tile * kChunkRowBytes));
    pipe->InitBuffer(in_, 2, 8192 + kChunk * 128);
    pipe->InitBuffer(out_, 2, 16384);
    pipe->InitBuffer(mask_, 256);
    scratch_ = scratch;
    const uint16_t high = 0xf0f0;
    Duplicate(mask_.Get<uint16_t>(128), high, 128);
    Barrier();
  }

  // All chunks of a unit.
  __aicore__ inline void Process(const Unit& unit) {
    for (int32_t b = unit.first; b < unit.end; b += kChunk, ++chunk_) {
      if (chunk_ >= p_->t.ring) CrossCoreWaitFlag(kWideTaken);
      Chunk(unit, b, Least(kChunk, unit.end - b));
      CrossCoreSetFlag<2, PIPE_MTE3>(kWide);
    }
  }

 private:
  __aicore__ inline void Chunk(const Unit& unit, int32_t block, int32_t blocks) {
    const GemmTiling& t = p_->t;
    const int32_t sub = GetSubBlockIdx(), fractals = unit.columns / 32;  // of mine: 2 or 4
    const int32_t panel = unit.n_tile * (t.n_tile / 64) + (unit.columns == 128 ? sub : 0);
    const int32_t half_at = unit.columns == 128 ? 0 : sub;
    const int64_t from = int64_t(panel) * t.panel_bytes + int64_t(block) * t.block_bytes;
    LocalTensor<int8_t> in = in_.AllocTensor<int8_t>();
    for (int32_t i = 0; i < blocks; ++i) {
      const int64_t at = from + int64_t(i) * t.block_bytes;
      DataCopy(in[i * 2 * fractals * 512], w_[at + half_at * 1024],
               Blocks(2, fractals * 16, (4 - fractals) * 16, 0));
      if (t.scheme == kTwoLevel) {  // s1 and a of my features
        const int32_t bytes = fractals * 16, rows = 8192 + i * 128;
        DataCopy(in[rows], w_[at + 4096 + half_at * 32], bytes);
        DataCopy(in[rows + 64], w_[at + 4160 + half_at * 32], bytes);
      }
    }
    in_.EnQue(in);
    in = in_.DeQue<int8_t>();
    LocalTensor<int8_t> out = out_.AllocTensor<int8_t>();
    Nibbles(out.ReinterpretCast<uint16_t>(), in.ReinterpretCast<uint16_t>(), blocks * 2,
            fractals * 256);
    if (t.scheme == kTwoLevel)
      for (int32_t i = 0; i < blocks; ++i)
        Bytes(out[i * 4 * fractals * 512], in[8192 + i * 128].ReinterpretCast<uint8_t>(), fractals);
    in_.FreeTensor(in);
    out_.EnQue(out);
    out = out_.DeQue<int8_t>();
    const int32_t all = unit.columns / 16;  // fractals in a column of the chunk
    const int64_t slot = int64_t(chunk_ % t.ring) * t.n_tile * kChunkRowBytes;
    DataCopy(to_[slot + sub * fractals * 512], out,
             Blocks(blocks * 4, fractals * 16, 0, (all - fractals) * 16));
    out_.FreeTensor(out);
  }

  // Columns of 64 channels, `words` of 16 bits each, to two columns of 32 channels.
  __aicore__ inline void Nibbles(const LocalTensor<uint16_t>& out, const LocalTensor<uint16_t>& in,
                                 int32_t columns, int32_t words) {
    LocalTensor<uint16_t> low = scratch_.ReinterpretCast<uint16_t>();
    LocalTensor<uint16_t> mask = mask_.Get<uint16_t>(128);
    const uint16_t four = 4;
    Barrier();  // results of the last unit may still be read from there
    ShiftLeft(low, in, four, columns * words);
    Barrier();
    for (int32_t i = 0; i < columns; ++i) {
      const auto strides = Strides(1, 1, 1, 8, 8, 0);
      And(out[2 * i * words], low[i * words], mask, 128, words / 128, strides);
      And(out[(2 * i + 1) * words], in[i * words], mask, 128, words / 128, strides);
    }
    Barrier();
  }

  // 16 (q - 8) to q s1 + a - 128, for the four columns of a block, in place.
  __aicore__ inline void Bytes(const LocalTensor<int8_t>& x, const LocalTensor<uint8_t>& rows,
                               int32_t fractals) {
    const int32_t features = fractals * 16;
    LocalTensor<half> s = scratch_.ReinterpretCast<half>();
    LocalTensor<half> h = s;                        // [features][32]
    LocalTensor<half> s1 = s[2048], a = s[2112];    // [features]
    LocalTensor<half> s1b = s[2176], ab = s[3200];  // [features][16]
    const half eight = static_cast<half>(8.0f), sixteenth = static_cast<half>(0.0625f);
    const half offset = static_cast<half>(-128.0f);
    Cast(s1, rows, RoundMode::CAST_NONE, features);
    Cast(a, rows[64], RoundMode::CAST_NONE, features);
    Barrier();
    Adds(a, a, offset, features);
    Muls(h, s1, eight, features);
    Barrier();
    Add(a, a, h, features);
    Muls(s1, s1, sixteenth, features);
    Barrier();
    BrcbRepeatParams each;
    each.dstBlkStride = 1;
    each.dstRepStride = 8;
    Brcb(s1b, s1, features / 8, each);
    Brcb(ab, a, features / 8, each);
    for (int32_t c = 0; c < 4; ++c) {
      Barrier();
      Cast(h, x[c * features * 32], RoundMode::CAST_NONE, features * 32);
      Barrier();
      const auto strides = Strides(2, 2, 1, 16, 16, 8);  // 8 features a repeat, 16 channels of each
      for (int32_t i = 0; i < 2; ++i) Mul(h[i * 16], h[i * 16], s1b, 128, features / 8, strides);
      Barrier();
      for (int32_t i = 0; i < 2; ++i) Add(h[i * 16], h[i * 16], ab, 128, features / 8, strides);
      Barrier();
      Cast(x[c * features * 32], h, RoundMode::CAST_RINT, features * 32);
    }
    Barrier();
  }

  Problem* p_;
  GlobalTensor<int8_t> w_, to_;
  TQue<TPosition::VECIN, 2> in_;
  TQue<TPosition::VECOUT, 2> out_;
  TBuf<TPosition::VECCALC> mask_;
  LocalTensor<uint8_t> scratch_;
  int32_t chunk_ = 0;
};

}  // namespace tessella::ascend
