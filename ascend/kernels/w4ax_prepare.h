// Activations into the order of the cube's fractals, in the workspace, before any product.
//
// A byte of the weights holds channels j and j + 32 of 64 (csrc/layout/w4_cube.h), so the bytes of
// the activations must too. INT8 codes c become two INT4 rows: c = 16 hi + lo with hi in -8..7,
// the high nibble as it stands, and lo in 0..15, stored as lo - 8; a last row of -8 gives the sum
// of the weights that takes the -8 out again. No weight is ever widened.
//
//   workspace [tile][64 channels][row][32 bytes]; rows: hi of the tokens, lo of the tokens, -8
//
// Only rows that exist are written, and the cube reads no others.
#pragma once
#include "w4ax_problem.h"

namespace tessella::ascend {

class Prepare {
 public:
  __aicore__ inline void Init(const GemmArgs& args, Problem* problem, TPipe* pipe,
                              const LocalTensor<uint8_t>& scratch) {
    p_ = problem;
    codes8_.SetGlobalBuffer(reinterpret_cast<__gm__ int8_t*>(args.codes8));
    codes4_.SetGlobalBuffer(reinterpret_cast<__gm__ int8_t*>(args.codes4));
    to_.SetGlobalBuffer(reinterpret_cast<__gm__ int8_t*>(args.workspace));
    pipe->InitBuffer(in_, 2, 8192);
    pipe->InitBuffer(out_, 2, 8192 + 64);
    pipe->InitBuffer(masks_, 6 * 256);
    scratch_ = scratch;
  }

  // Every vector core takes blocks of tiles in turn.
  __aicore__ inline void Process() {
    const GemmTiling& t = p_->t;
    const uint16_t bits[6] = {0xf0f0, 0x0f0f, 0x8888, 0x7777, 0x0808, 0xf7f7};
    for (int32_t i = 0; i < 6; ++i) Duplicate(Mask(i), bits[i], 128);
    Barrier();
    const int32_t step = t.cores * 2;
    for (int32_t i = GetBlockIdx(); i < t.m_tiles * t.blocks; i += step) {
      const int32_t tile = i / t.blocks, block = i % t.blocks;
      const int32_t tokens = Least(t.tokens, t.M - tile * t.tokens);
      const int64_t token = int64_t(block) * t.M + tile * t.tokens;
      const int64_t at = (int64_t(tile) * t.blocks + block) * 2 * t.rows * 32;
      if (t.mode == kSplit)
        Split(token, tokens, at);
      else
        Pair(token, tokens, at);
    }
  }

 private:
  __aicore__ inline LocalTensor<uint16_t> Mask(int32_t i) {
    return masks_.Get<uint16_t>(6 * 128)[i * 128];
  }

  // d = a & mask, over n contiguous words of 16 bits.
  __aicore__ inline void AndMask(const LocalTensor<uint16_t>& d, const LocalTensor<uint16_t>& a,
                                 int32_t mask, int32_t n) {
    const int32_t whole = n / 128;
    if (whole > 0) And(d, a, Mask(mask), 128, whole, Strides(1, 1, 1, 8, 8, 0));
    if (n % 128 > 0)
      And(d[whole * 128], a[whole * 128], Mask(mask), n % 128, 1, Strides(1, 1, 1, 8, 8, 0));
  }

  // d ^= bit in every nibble or byte, given the mask of the bit and its complement.
  __aicore__ inline void Flip(const LocalTensor<uint16_t>& d, const LocalTensor<uint16_t>& tmp,
                              int32_t bit, int32_t others, int32_t n) {
    Not(tmp, d, n);
    Barrier();
    AndMask(tmp, tmp, bit, n);
    AndMask(d, d, others, n);
    Barrier();
    Or(d, d, tmp, n);
    Barrier();
  }

  __aicore__ inline void Split(int64_t token, int32_t tokens, int64_t at) {
    const GemmTiling& t = p_->t;
    LocalTensor<int8_t> in = in_.AllocTensor<int8_t>();
    DataCopy(in, codes8_[token * 128], tokens * 128);
    in_.EnQue(in);
    in = in_.DeQue<int8_t>();
    LocalTensor<uint16_t> x = in.ReinterpretCast<uint16_t>();
    LocalTensor<uint16_t> s = scratch_.ReinterpretCast<uint16_t>();
    LocalTensor<uint16_t> high = s, low = s[4096], tmp = s[8192];
    AndMask(high, x, 0, tokens * 64);
    AndMask(low, x, 1, tokens * 64);
    Barrier();
    in_.FreeTensor(in);
    LocalTensor<int8_t> out = out_.AllocTensor<int8_t>();
    LocalTensor<uint16_t> hi = out.ReinterpretCast<uint16_t>();
    LocalTensor<uint16_t> lo = hi[2 * tokens * 16];
    const uint16_t four = 4;
    for (int32_t k = 0; k < 2; ++k)  // 64 channels each: blocks 2k and 2k + 1 of 32 bytes
      for (int32_t i = 0; i < tokens; i += 8) {
        const int32_t lanes = Least(8, tokens - i) * 16, a = i * 64 + k * 32, b = a + 16;
        const int32_t d = (k * tokens + i) * 16;
        ShiftRight(tmp[d], high[a], four, lanes, 1, Strides(1, 4, 8, 8));
        ShiftLeft(tmp[4096 + d], low[b], four, lanes, 1, Strides(1, 4, 8, 8));
        Barrier();
        Or(hi[d], tmp[d], high[b], lanes, 1, Strides(1, 1, 4, 8, 8, 8));
        Or(lo[d], tmp[4096 + d], low[a], lanes, 1, Strides(1, 1, 4, 8, 8, 8));
      }
    Barrier();
    Flip(lo, tmp, 2, 3, 2 * tokens * 16);
    const uint16_t minus_eight = 0x8888;
    Duplicate(lo[2 * tokens * 16], minus_eight, 32);
    out_.EnQue(out);
    out = out_.DeQue<int8_t>();
    DataCopy(to_[at], out, Blocks(2, tokens, 0, t.rows - tokens));
    DataCopy(to_[at + tokens * 32], out[2 * tokens * 32], Blocks(2, tokens, 0, t.rows - tokens));
    DataCopy(to_[at + 2 * tokens * 32], out[4 * tokens * 32], Blocks(2, 1, 0, t.rows - 1));
    out_.FreeTensor(out);
  }

  // INT4 codes, channels 2i and 2i + 1 in a byte, to channels j and j + 32 in a byte.
  __aicore__ inline void Pair(int64_t token, int32_t tokens, int64_t at) {
    const GemmTiling& t = p_->t;
    LocalTensor<int8_t> in = in_.AllocTensor<int8_t>();
    DataCopy(in, codes4_[token * 64], tokens * 64);
    in_.EnQue(in);
    in = in_.DeQue<int8_t>();
    LocalTensor<half> x = scratch_.ReinterpretCast<half>();  // [tokens][128]
    LocalTensor<half> y = x[128 * 128];                      // [2][tokens][32]
    Cast(x, in.ReinterpretCast<int4b_t>(), RoundMode::CAST_NONE, tokens * 128);
    Barrier();
    in_.FreeTensor(in);
    const half sixteen = static_cast<half>(16.0f), eight = static_cast<half>(8.0f);
    for (int32_t k = 0; k < 2; ++k)
      for (int32_t j = 0; j < 2; ++j)
        for (int32_t i = 0; i < tokens; i += 8) {
          const int32_t lanes = Least(8, tokens - i) * 16;
          const int32_t a = i * 128 + (4 * k + j) * 16, b = a + 32;
          const int32_t d = (k * tokens + i) * 32 + j * 16;
          Muls(y[d], x[b], sixteen, lanes, 1, Strides(2, 8, 8, 8));
          Barrier();
          Add(y[d], y[d], x[a], lanes, 1, Strides(2, 2, 8, 8, 8, 8));
        }
    Barrier();
    Adds(y, y, eight, 2 * tokens * 32);
    Barrier();
    LocalTensor<int8_t> out = out_.AllocTensor<int8_t>();
    Cast(out, y, RoundMode::CAST_RINT, 2 * tokens * 32);
    Barrier();
    Flip(out.ReinterpretCast<uint16_t>(), x.ReinterpretCast<uint16_t>(), 4, 5, tokens * 32);
    out_.EnQue(out);
    out = out_.DeQue<int8_t>();
    DataCopy(to_[at], out, Blocks(2, tokens, 0, t.rows - tokens));
    out_.FreeTensor(out);
  }

  Problem* p_;
  GlobalTensor<int8_t> codes8_, codes4_, to_;
  TQue<TPosition::VECIN, 2> in_;
  TQue<TPosition::VECOUT, 2> out_;
  TBuf<TPosition::VECCALC> masks_;
  LocalTensor<uint8_t> scratch_;
};

}  // namespace tessella::ascend
