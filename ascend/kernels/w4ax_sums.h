// From the cube's int32 sums to results, on the vector cores: zero points, scales, bias.
//
// With P = sum (q - 8) c of a block and C = sum c of its codes, all in int32, exactly:
//   channel, groups  sum (q - z) c            = P + (8 - z) C
//   twolevel         sum (q s1 + a - 128) c   = s1 P + (8 s1 + a - 128) C
// Float scales follow in fp32, as late as the scheme allows: those of a group or of a block of
// activations after every block, those of a feature and of a token at the end.
#pragma once
#include "w4ax_problem.h"

namespace tessella::ascend {

template <class Out>  // half or bfloat16_t
class GemmSums {
 public:
  __aicore__ inline void Init(const GemmArgs& args, Problem* problem, TPipe* pipe,
                              const LocalTensor<uint8_t>& scratch) {
    p_ = problem;
    const GemmTiling& t = p_->t;
    sub_ = GetSubBlockIdx();
    from_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(
        args.workspace + int64_t(t.at_sums) * 512 + int64_t(p_->core) * 2 * kSlotBytes));
    code_sums_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(args.sums));
    scales_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(args.scales));
    w_.SetGlobalBuffer(reinterpret_cast<__gm__ uint8_t*>(args.w));
    bias_.SetGlobalBuffer(reinterpret_cast<__gm__ Out*>(args.bias));
    out_gm_.SetGlobalBuffer(reinterpret_cast<__gm__ Out*>(args.out));
    pipe->InitBuffer(in_, 1, t.rows * t.n_tile * 2);
    pipe->InitBuffer(rows_, 2, kSumRows * 512);
    pipe->InitBuffer(out_, 1, t.tokens * t.n_tile);
    pipe->InitBuffer(total_, t.tokens * t.n_tile * 2);
    pipe->InitBuffer(small_, 4096 + 8 * 256 + 512 + 512);
    LocalTensor<float> small = small_.Get<float>(1792);
    spread_ = small;
    for (int32_t i = 0; i < 4; ++i) column_[i] = small[1024 + i * 64];
    halves_ = small[1280].ReinterpretCast<half>();
    code_sum_ = small[1536].ReinterpretCast<int32_t>();
    tmp_ = scratch.ReinterpretCast<int32_t>();
  }

  __aicore__ inline void Process(const Unit& unit, int32_t index) {
    const GemmTiling& t = p_->t;
    u_ = unit;
    half_ = unit.columns / 2;
    strides_ = half_ / 8;
    panel_ = unit.n_tile * (t.n_tile / 64) + (unit.columns == 128 ? sub_ : 0);
    column0_ = unit.columns == 128 ? 0 : sub_ * 32;
    panel_at_ = int64_t(panel_) * t.panel_bytes;
    padded_ = CeilDiv(unit.tokens, 8) * 8;
    count_ = unit.tokens * half_;
    CrossCoreWaitFlag(kReady);
    const int32_t products = t.grouped ? unit.end - unit.first : 1;
    for (int32_t i = 0; i < products; ++i) {
      const int32_t at = index % 2 * (kSlotBytes / 4) + i * t.rows * t.n_tile;
      LocalTensor<int32_t> x = in_.AllocTensor<int32_t>();
      Fetch(x, at);
      if (i == products - 1 && index + 2 < p_->units) CrossCoreSetFlag<2, PIPE_MTE2>(kTaken);
      in_.EnQue(x);
      x = in_.DeQue<int32_t>();
      Combine(x);
      Correct(x, unit.first + i);
      Collect(x, unit.first + i, unit.first + i == 0);
      in_.FreeTensor(x);
    }
    if (unit.last) Finish();
  }

 private:
  static constexpr int32_t kSumRows = 16;  // rows of code sums that are fetched together

  __aicore__ inline LocalTensor<int32_t> Total() { return total_.Get<int32_t>(); }
  __aicore__ inline LocalTensor<float> TotalF() { return total_.Get<float>(); }
  __aicore__ inline bool IntegerTotal() const {
    return p_->t.scheme != kGroup && p_->t.per_block == 0;
  }

  // My columns of a product's rows, compact.
  __aicore__ inline void Fetch(const LocalTensor<int32_t>& x, int32_t at) {
    const GemmTiling& t = p_->t;
    DataCopy(x, from_[at + sub_ * half_], Blocks(u_.rows, half_ / 8, (t.n_tile - half_) / 8, 0));
  }

  // Strides of tokens x my columns, against a row for all tokens or a number for each of them.
  __aicore__ inline BinaryRepeatParams PerColumn() {
    return Strides(1, 1, 1, strides_, strides_, 0);
  }
  __aicore__ inline BinaryRepeatParams PerToken() {
    return Strides(1, 1, 0, strides_, strides_, 1);
  }

  // P of what the cube summed: of the two INT4 rows of a token, or of weights times 16.
  __aicore__ inline void Combine(const LocalTensor<int32_t>& x) {
    const GemmTiling& t = p_->t;
    const int32_t four = 4;
    if (t.mode == kSplit) {
      ShiftLeft(x, x, four, count_);
      Barrier();
      Add(x, x, x[count_], count_);
      Barrier();
      Sub(x, x, x[2 * count_], half_, u_.tokens, PerColumn());
      Barrier();
    } else if (t.mode == kWiden && t.scheme != kTwoLevel) {
      ShiftRight(x, x, four, count_);
      Barrier();
    }
  }

  // Fetches one row of `n` elements of 1, 2 or 4 bytes of the packed weights.
  __aicore__ inline LocalTensor<uint8_t> Row(int64_t at, int32_t bytes) {
    LocalTensor<uint8_t> row = rows_.AllocTensor<uint8_t>();
    DataCopy(row, w_[at], bytes);
    rows_.EnQue(row);
    return rows_.DeQue<uint8_t>();
  }

  // A row of bytes of the weights as int32, in column_[i].
  __aicore__ inline LocalTensor<int32_t> ByteRow(int64_t at, int32_t i) {
    LocalTensor<uint8_t> row = Row(at, half_);
    LocalTensor<int32_t> d = column_[i].ReinterpretCast<int32_t>();
    Cast(halves_, row, RoundMode::CAST_NONE, half_);
    Barrier();
    rows_.FreeTensor(row);
    Cast(d, halves_, RoundMode::CAST_RINT, half_);
    Barrier();
    return d;
  }

  // Code sums of blocks first..end-1 of my tokens, added up, each spread over a block of 32 bytes.
  __aicore__ inline void CodeSums(int32_t first, int32_t end) {
    const GemmTiling& t = p_->t;
    const int32_t zero = 0;
    Duplicate(code_sum_, zero, padded_);
    for (int32_t b = first; b < end; b += kSumRows) {
      const int32_t n = Least(kSumRows, end - b);
      LocalTensor<int32_t> s = rows_.AllocTensor<int32_t>();
      DataCopyPadExtParams<int32_t> pad;
      pad.isPad = true;
      pad.leftPadding = 0;
      pad.rightPadding = padded_ - u_.tokens;
      pad.paddingValue = 0;
      DataCopyPad(s, code_sums_[int64_t(b) * t.M + u_.m_tile * t.tokens],
                  Bytes(n, u_.tokens * 4, int64_t(t.M - u_.tokens) * 4, 0), pad);
      rows_.EnQue(s);
      s = rows_.DeQue<int32_t>();
      for (int32_t i = 0; i < n; ++i) {
        Barrier();
        Add(code_sum_, code_sum_, s[i * padded_], padded_);
      }
      Barrier();
      rows_.FreeTensor(s);
    }
    Spread(spread_.ReinterpretCast<int32_t>(), code_sum_);
  }

  template <class T>
  __aicore__ inline void Spread(const LocalTensor<T>& d, const LocalTensor<T>& x) {
    BrcbRepeatParams each;
    each.dstBlkStride = 1;
    each.dstRepStride = 8;
    Brcb(d, x, padded_ / 8, each);
    Barrier();
  }

  // Zero points, in integers.
  __aicore__ inline void Correct(const LocalTensor<int32_t>& x, int32_t block) {
    const GemmTiling& t = p_->t;
    if (t.scheme == kTwoLevel && t.mode == kWiden) return;  // the bytes had them already
    CodeSums(t.grouped ? block : 0, t.grouped ? block + 1 : t.blocks);
    const int64_t at = panel_at_ + int64_t(block) * t.block_bytes + 4096;
    const int32_t minus_one = -1, eight = 8, offset = -128;
    LocalTensor<int32_t> by;  // per feature, what a code sum counts
    if (t.scheme == kTwoLevel) {
      LocalTensor<int32_t> s1 = ByteRow(at + column0_, 0);
      by = ByteRow(at + 64 + column0_, 1);
      LocalTensor<int32_t> eights = column_[2].ReinterpretCast<int32_t>();
      Mul(x, x, s1, half_, u_.tokens, PerColumn());
      Muls(eights, s1, eight, half_);
      Adds(by, by, offset, half_);
      Barrier();
      Add(by, by, eights, half_);
    } else {
      const int64_t zeros = t.scheme == kGroup ? at + 128 : panel_at_ + t.panel_bytes - 64;
      by = ByteRow(zeros + column0_, 1);
      Muls(by, by, minus_one, half_);
      Barrier();
      Adds(by, by, eight, half_);
    }
    Barrier();
    Mul(tmp_, by, spread_.ReinterpretCast<int32_t>(), half_, u_.tokens,
        Strides(1, 1, 0, strides_, 0, 1));
    Barrier();
    Add(x, x, tmp_, count_);
    Barrier();
  }

  // Into the tile's totals: integers as long as only scales of features and tokens are missing.
  __aicore__ inline void Collect(const LocalTensor<int32_t>& x, int32_t block, bool first) {
    const GemmTiling& t = p_->t;
    if (IntegerTotal()) {
      const int32_t zero = 0;
      if (first)
        Adds(Total(), x, zero, count_);
      else
        Add(Total(), Total(), x, count_);
      Barrier();
      return;
    }
    LocalTensor<float> f = tmp_.ReinterpretCast<float>();
    Cast(f, x, RoundMode::CAST_RINT, count_);
    Barrier();
    if (t.scheme == kGroup) {
      const int64_t at = panel_at_ + int64_t(block) * t.block_bytes + 4096 + column0_ * 2;
      LocalTensor<uint8_t> row = Row(at, half_ * 2);
      Cast(column_[0], row.ReinterpretCast<half>(), RoundMode::CAST_NONE, half_);
      Barrier();
      rows_.FreeTensor(row);
      Mul(f, f, column_[0], half_, u_.tokens, PerColumn());
      Barrier();
    }
    if (t.per_block != 0) TokenScales(f, block);
    const float zero = 0.0f;
    if (first)
      Adds(TotalF(), f, zero, count_);
    else
      Add(TotalF(), TotalF(), f, count_);
    Barrier();
  }

  // f *= the scale of each token in this row of `scales`.
  __aicore__ inline void TokenScales(const LocalTensor<float>& f, int32_t scale_row) {
    const GemmTiling& t = p_->t;
    LocalTensor<float> s = rows_.AllocTensor<float>();
    DataCopyPadExtParams<float> pad;
    pad.isPad = true;
    pad.leftPadding = 0;
    pad.rightPadding = padded_ - u_.tokens;
    pad.paddingValue = 0.0f;
    DataCopyPad(s, scales_[int64_t(scale_row) * t.M + u_.m_tile * t.tokens],
                Bytes(1, u_.tokens * 4, 0, 0), pad);
    rows_.EnQue(s);
    s = rows_.DeQue<float>();
    Spread(spread_, s);
    rows_.FreeTensor(s);
    Mul(f, f, spread_, half_, u_.tokens, PerToken());
    Barrier();
  }

  // Scales of features and tokens, bias, rounding; only rows and features that exist are stored.
  __aicore__ inline void Finish() {
    const GemmTiling& t = p_->t;
    LocalTensor<float> f = tmp_.ReinterpretCast<float>();
    if (IntegerTotal()) {
      Cast(f, Total(), RoundMode::CAST_RINT, count_);
    } else {
      const float zero = 0.0f;
      Adds(f, TotalF(), zero, count_);
    }
    Barrier();
    if (t.scheme != kGroup) {
      LocalTensor<uint8_t> row = Row(panel_at_ + t.panel_bytes - t.tail + column0_ * 4, half_ * 4);
      Mul(f, f, row.ReinterpretCast<float>(), half_, u_.tokens, PerColumn());
      Barrier();
      rows_.FreeTensor(row);
    }
    if (t.per_block == 0) TokenScales(f, t.scale_row);
    const int32_t n0 = panel_ * 64 + column0_, columns = Least(half_, t.N - n0);
    if (columns <= 0) return;
    if (t.has_bias != 0) AddBias(f, n0, columns);
    LocalTensor<Out> y = out_.template AllocTensor<Out>();
    Cast(y, f, RoundMode::CAST_RINT, count_);
    Barrier();  // the next unit writes there
    out_.EnQue(y);
    y = out_.template DeQue<Out>();
    DataCopyPad(out_gm_[int64_t(u_.m_tile) * t.tokens * t.N + n0], y,
                Bytes(u_.tokens, columns * 2, half_ / 16 - CeilDiv(columns, 16),
                      int64_t(t.N - columns) * 2));
    out_.FreeTensor(y);
  }

  __aicore__ inline void AddBias(const LocalTensor<float>& f, int32_t n0, int32_t columns) {
    LocalTensor<Out> b = rows_.template AllocTensor<Out>();
    DataCopyPadExtParams<Out> pad;
    pad.isPad = false;
    DataCopyPad(b, bias_[n0], Bytes(1, columns * 2, 0, 0), pad);
    rows_.EnQue(b);
    b = rows_.template DeQue<Out>();
    Cast(column_[0], b, RoundMode::CAST_NONE, columns);
    Barrier();
    rows_.FreeTensor(b);
    Add(f, f, column_[0], columns, u_.tokens, PerColumn());
    Barrier();
  }

  Problem* p_;
  Unit u_;
  int32_t sub_, half_, strides_, panel_, column0_, padded_, count_;
  int64_t panel_at_;
  GlobalTensor<int32_t> from_, code_sums_;
  GlobalTensor<float> scales_;
  GlobalTensor<uint8_t> w_;
  GlobalTensor<Out> bias_, out_gm_;
  TQue<TPosition::VECIN, 1> in_;
  TQue<TPosition::VECIN, 2> rows_;
  TQue<TPosition::VECOUT, 1> out_;
  TBuf<TPosition::VECCALC> total_, small_;
  LocalTensor<float> spread_, column_[4];
  LocalTensor<half> halves_;
  LocalTensor<int32_t> code_sum_, tmp_;
};

}  // namespace tessella::ascend
