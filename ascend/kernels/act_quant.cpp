// act_quant on Ascend: activations to INT8 and INT4 codes, scales, and sums of codes.
//
//   amax = max |x| over what shares a scale;  scale = amax / qmax;  code = rne(x * (qmax / amax))
//
// as csrc/act_quant/params.h has it, every step one fp32 rounding. A vector core takes tokens in
// turn, a token in pieces of blocks of 128 channels; with a permutation it holds the whole token.
// Magnitudes are compared as bits first: an infinity or a NaN becomes infinity, which is then the
// maximum. Codes go through int32, since fp32 rounds there in one step, and through half, the only
// way to int8 and int4.
#include "../tiling/act_quant.h"
#include "blocks.h"

namespace tessella::ascend {

struct QuantArgs {
  GM_ADDR x, codes8, codes4, sums, scales, perm;
};

// Blocks of one precision.
struct Part {
  int32_t first, end, row;  // row: of its scale
  bool int8;
};

template <class T>
class ActQuant {
 public:
  __aicore__ inline void Init(const QuantArgs& args, const QuantTiling& tiling, TPipe* pipe) {
    t_ = tiling;
    x_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(args.x));
    codes8_.SetGlobalBuffer(reinterpret_cast<__gm__ int8_t*>(args.codes8));
    codes4_.SetGlobalBuffer(reinterpret_cast<__gm__ int8_t*>(args.codes4));
    sums_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(args.sums));
    scales_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(args.scales));
    perm_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(args.perm));
    const int32_t piece = t_.piece;
    if (t_.has_perm != 0) {
      pipe->InitBuffer(row_, 1, CeilDiv(t_.K, 16) * 32);
      pipe->InitBuffer(in_, 1, piece * 512);  // of the permutation
    } else {
      pipe->InitBuffer(in_, 2, piece * 256);
    }
    pipe->InitBuffer(codes_, 2, piece * 128);
    pipe->InitBuffer(small_, 2, CeilDiv(piece, 8) * 256);
    pipe->InitBuffer(x_buf_, piece * 512);
    pipe->InitBuffer(work_buf_, piece * 512);
    pipe->InitBuffer(int_buf_, piece * 512);
    pipe->InitBuffer(vectors_, 10 * 256 + 4 * 2048);
    f_ = x_buf_.Get<float>(piece * 128);
    work_ = work_buf_.Get<float>(piece * 128);
    codes_int_ = int_buf_.Get<int32_t>(piece * 128);
    LocalTensor<float> v = vectors_.Get<float>(640 + 2048);
    amax_ = v;
    scale_ = v[64];
    inverse_ = v[128];
    qmax_ = v[192];
    ok_ = v[256];
    nan_ = v[320];
    bits_ = v[384].ReinterpretCast<uint8_t>();
    sign_ = v[448].ReinterpretCast<uint16_t>();
    spread_ = v[640];
    ok_spread_ = v[1152].ReinterpretCast<int32_t>();
    const int32_t nan = 0x7fc00000, magnitude = 0x7fffffff;
    Duplicate(nan_.ReinterpretCast<int32_t>(), nan, 64);
    Duplicate(sign_.ReinterpretCast<int32_t>(), magnitude, 64);
    Barrier();
  }

  __aicore__ inline void Process() {
    const Part eight{0, t_.blocks8, 0, true};
    const Part four{t_.blocks8, t_.blocks, t_.per_block != 0 ? 0 : t_.scale_rows - 1, false};
    for (int32_t m = GetBlockIdx(); m < t_.M; m += t_.cores) {
      if (t_.has_perm != 0) LoadRow(m);
      Quantise(m, eight);
      Quantise(m, four);
      if (t_.has_perm != 0) row_.FreeTensor(token_);
    }
  }

 private:
  __aicore__ inline void Quantise(int32_t m, const Part& part) {
    Barrier();  // the last part's numbers are still being read
    if (part.first == part.end) {
      if (t_.per_block == 0 && t_.scale_rows == 2) NoScale(m, part);
      return;
    }
    const float qmax = part.int8 ? 127.0f : 7.0f;
    Duplicate(qmax_, qmax, 64);
    const bool whole = part.end - part.first <= t_.piece;  // then it is read once
    if (t_.per_block == 0) {
      float most = 0.0f;
      for (int32_t b = part.first; b < part.end; b += t_.piece) {
        const int32_t n = Least(t_.piece, part.end - b);
        Load(m, b, n);
        Magnitudes(n);
        WholeReduceMax(inverse_, amax_, n, 1, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
        Sync<HardEvent::V_S>();
        const float here = inverse_.GetValue(0);
        Sync<HardEvent::S_V>();
        most = here > most ? here : most;
      }
      Duplicate(amax_, most, 64);
      Barrier();
      Scales();
    }
    for (int32_t b = part.first; b < part.end; b += t_.piece) {
      const int32_t n = Least(t_.piece, part.end - b);
      if (t_.per_block != 0 || !whole) Load(m, b, n);
      if (t_.per_block != 0) {
        Magnitudes(n);
        Scales();
      }
      Codes(n);
      Store(m, b, n, part);
      if (t_.per_block != 0)
        StoreSmall(scales_, scale_, m, b, n);
      else if (b == part.first)
        StoreSmall(scales_, scale_, m, part.row, 1);
    }
  }

  // A whole token, whose channels are then picked by the permutation.
  __aicore__ inline void LoadRow(int32_t m) {
    LocalTensor<T> row = row_.template AllocTensor<T>();
    DataCopyPadExtParams<T> pad;
    pad.isPad = false;
    DataCopyPad(row, x_[int64_t(m) * t_.stride], Bytes(1, t_.K * 2, 0, 0), pad);
    row_.EnQue(row);
    token_ = row_.template DeQue<T>();
  }

  // As Load, of channels perm[128 b].. of the token.
  __aicore__ inline void LoadPermuted(int32_t b, int32_t n) {
    const int32_t channels = Least(t_.K - b * 128, n * 128);
    LocalTensor<int32_t> perm = in_.template AllocTensor<int32_t>();
    DataCopyPadExtParams<int32_t> pad;
    pad.isPad = false;
    DataCopyPad(perm, perm_[b * 128], Bytes(1, channels * 4, 0, 0), pad);
    in_.EnQue(perm);
    perm = in_.template DeQue<int32_t>();
    LocalTensor<uint32_t> offsets = perm.ReinterpretCast<uint32_t>();
    const uint32_t one = 1;
    const uint16_t zero = 0;
    LocalTensor<uint16_t> picked = work_.ReinterpretCast<uint16_t>();
    Barrier();  // codes of the last piece may still be read from there
    Duplicate(picked, zero, n * 128);
    ShiftLeft(offsets, offsets, one, channels);  // bytes
    Barrier();
    Gather(picked, token_.template ReinterpretCast<uint16_t>(), offsets, static_cast<uint32_t>(0),
           static_cast<uint32_t>(channels));
    Barrier();
    Cast(f_, work_.ReinterpretCast<T>(), RoundMode::CAST_NONE, n * 128);
    Barrier();
    in_.FreeTensor(perm);
  }

  // Blocks b.. of a token as fp32 in f_; channels past K are 0.
  __aicore__ inline void Load(int32_t m, int32_t b, int32_t n) {
    if (t_.has_perm != 0) return LoadPermuted(b, n);
    const int32_t channels = Least(t_.K - b * 128, n * 128), whole = CeilDiv(channels, 16) * 16;
    LocalTensor<T> in = in_.template AllocTensor<T>();
    DataCopyPadExtParams<T> pad;
    pad.isPad = true;
    pad.leftPadding = 0;
    pad.rightPadding = whole - channels;
    pad.paddingValue = static_cast<T>(0.0f);
    DataCopyPad(in, x_[int64_t(m) * t_.stride + b * 128], Bytes(1, channels * 2, 0, 0), pad);
    in_.EnQue(in);
    in = in_.template DeQue<T>();
    Cast(f_, in, RoundMode::CAST_NONE, whole);
    const float zero = 0.0f;
    if (whole < n * 128) Duplicate(f_[whole], zero, n * 128 - whole);
    Barrier();
    in_.FreeTensor(in);
  }

  // amax_[i] = largest magnitude of block i, infinity if it has a number that is not finite.
  __aicore__ inline void Magnitudes(int32_t n) {
    LocalTensor<uint16_t> words = work_.ReinterpretCast<uint16_t>();
    And(words, f_.ReinterpretCast<uint16_t>(), sign_, 128, 2 * n, Strides(1, 1, 1, 8, 8, 0));
    Barrier();
    LocalTensor<int32_t> bits = work_.ReinterpretCast<int32_t>();
    const int32_t infinity = 0x7f800000;
    Mins(bits, bits, infinity, n * 128);
    const float zero = 0.0f;
    Duplicate(amax_, zero, 64);
    Barrier();
    Max(work_, work_, work_[64], 64, n, Strides(1, 1, 1, 16, 16, 16));
    Barrier();
    WholeReduceMax(amax_, work_, 64, n, 1, 1, 16, ReduceOrder::ORDER_ONLY_VALUE);
    Barrier();
  }

  // From amax_: scale_, the inverse spread over blocks of 32 bytes, and whether codes are not 0.
  __aicore__ inline void Scales() {
    const float tiny = 7.8886090522101181e-31f, zero = 0.0f, one = 1.0f;  // 2^-100
    LocalTensor<uint8_t> normal = bits_, finite = bits_[32];
    LocalTensor<float> infinity = work_;
    Duplicate(ok_, one, 64);
    const int32_t inf = 0x7f800000;
    Duplicate(infinity.ReinterpretCast<int32_t>(), inf, 64);
    CompareScalar(normal, amax_, tiny, CMPMODE::GE, 64);
    Barrier();
    Compare(finite, amax_, infinity, CMPMODE::LT, 64);
    Div(scale_, amax_, qmax_, 64);
    Div(inverse_, qmax_, amax_, 64);
    Barrier();
    Select(scale_, normal, scale_, zero, SELMODE::VSEL_TENSOR_SCALAR_MODE, 64);
    Select(inverse_, normal, inverse_, zero, SELMODE::VSEL_TENSOR_SCALAR_MODE, 64);
    Select(ok_, normal, ok_, zero, SELMODE::VSEL_TENSOR_SCALAR_MODE, 64);
    Barrier();
    Select(scale_, finite, scale_, nan_, SELMODE::VSEL_TENSOR_TENSOR_MODE, 64);
    Select(inverse_, finite, inverse_, zero, SELMODE::VSEL_TENSOR_SCALAR_MODE, 64);
    Select(ok_, finite, ok_, zero, SELMODE::VSEL_TENSOR_SCALAR_MODE, 64);
    Barrier();
    LocalTensor<int32_t> ok = ok_.ReinterpretCast<int32_t>();
    Cast(ok, ok_, RoundMode::CAST_RINT, 64);
    Barrier();
    Spread(spread_, inverse_, 64);
    Spread(ok_spread_, ok, 64);
    Barrier();
  }

  template <class S>
  __aicore__ inline void Spread(const LocalTensor<S>& d, const LocalTensor<S>& x, int32_t n) {
    BrcbRepeatParams each;
    each.dstBlkStride = 1;
    each.dstRepStride = 8;
    Brcb(d, x, CeilDiv(n, 8), each);
  }

  // f_ becomes codes, as numbers; their sums per block in inverse_, as int32.
  __aicore__ inline void Codes(int32_t n) {
    const auto per_block = Strides(1, 1, 0, 16, 16, 1);
    for (int32_t half_at = 0; half_at < 128; half_at += 64)
      Mul(f_[half_at], f_[half_at], spread_, 64, n, per_block);
    Barrier();
    Cast(codes_int_, f_, RoundMode::CAST_RINT, n * 128);
    Barrier();
    for (int32_t half_at = 0; half_at < 128; half_at += 64)
      Mul(codes_int_[half_at], codes_int_[half_at], ok_spread_, 64, n, per_block);
    Barrier();
    Cast(f_, codes_int_, RoundMode::CAST_RINT, n * 128);
    Barrier();
    Add(work_, f_, f_[64], 64, n, Strides(1, 1, 1, 16, 16, 16));
    const float zero = 0.0f;
    Duplicate(inverse_, zero, 64);
    Barrier();
    WholeReduceSum(inverse_, work_, 64, n, 1, 1, 16);
    Barrier();
    LocalTensor<int32_t> sums = inverse_.ReinterpretCast<int32_t>();
    Cast(sums, inverse_, RoundMode::CAST_RINT, 64);
    Barrier();
  }

  __aicore__ inline void Store(int32_t m, int32_t b, int32_t n, const Part& part) {
    LocalTensor<half> h = work_.ReinterpretCast<half>();
    Cast(h, f_, RoundMode::CAST_RINT, n * 128);
    Barrier();
    LocalTensor<int8_t> c = codes_.AllocTensor<int8_t>();
    if (part.int8)
      Cast(c, h, RoundMode::CAST_RINT, n * 128);
    else
      Cast(c.ReinterpretCast<int4b_t>(), h, RoundMode::CAST_RINT, n * 128);
    codes_.EnQue(c);
    c = codes_.DeQue<int8_t>();
    const int32_t bytes = part.int8 ? 128 : 64;
    const DataCopyExtParams rows = Bytes(n, bytes, 0, int64_t(t_.M - 1) * bytes);
    const int64_t row = (int64_t(b) - (part.int8 ? 0 : t_.blocks8)) * t_.M + m;
    if (part.int8)
      DataCopyPad(codes8_[row * 128], c, rows);
    else
      DataCopyPad(codes4_[row * 64], c, rows);
    codes_.FreeTensor(c);
    StoreSmall(sums_, inverse_.ReinterpretCast<int32_t>(), m, b, n);
  }

  // n numbers of 4 bytes, each to its own row of [rows][M].
  template <class S>
  __aicore__ inline void StoreSmall(const GlobalTensor<S>& to, const LocalTensor<S>& x, int32_t m,
                                    int32_t row, int32_t n) {
    LocalTensor<S> s = small_.template AllocTensor<S>();
    Spread(s, x, n);
    small_.EnQue(s);
    s = small_.template DeQue<S>();
    DataCopyPad(to[int64_t(row) * t_.M + m], s, Bytes(n, 4, 0, int64_t(t_.M - 1) * 4));
    small_.FreeTensor(s);
  }

  // A precision that no channel has: its scale is 0.
  __aicore__ inline void NoScale(int32_t m, const Part& part) {
    const float zero = 0.0f;
    Duplicate(scale_, zero, 64);
    Barrier();
    StoreSmall(scales_, scale_, m, part.row, 1);
    Barrier();
  }

  QuantTiling t_;
  GlobalTensor<T> x_;
  GlobalTensor<int8_t> codes8_, codes4_;
  GlobalTensor<int32_t> sums_;
  GlobalTensor<float> scales_;
  GlobalTensor<int32_t> perm_;
  TQue<TPosition::VECIN, 1> row_;
  TQue<TPosition::VECIN, 2> in_;
  LocalTensor<T> token_;
  TQue<TPosition::VECOUT, 2> codes_, small_;
  TBuf<TPosition::VECCALC> x_buf_, work_buf_, int_buf_, vectors_;
  LocalTensor<float> f_, work_, amax_, scale_, inverse_, qmax_, ok_, nan_, spread_;
  LocalTensor<int32_t> codes_int_, ok_spread_;
  LocalTensor<uint8_t> bits_;
  LocalTensor<uint16_t> sign_;
};

template <class T>
__aicore__ inline void RunQuant(const QuantArgs& args, const QuantTiling& t) {
  TPipe pipe;
  ActQuant<T> op;
  op.Init(args, t, &pipe);
  op.Process();
}

}  // namespace tessella::ascend

extern "C" __global__ __aicore__ void tessella_act_quant(GM_ADDR x, GM_ADDR codes8, GM_ADDR codes4,
                                                         GM_ADDR sums, GM_ADDR scales, GM_ADDR perm,
                                                         GM_ADDR tiling) {
  using namespace tessella::ascend;
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  GlobalTensor<int32_t> from;
  from.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(tiling));
  QuantTiling t;
  int32_t* to = reinterpret_cast<int32_t*>(&t);
  for (int32_t i = 0; i < kQuantHeader; ++i) to[i] = from.GetValue(i);
  const QuantArgs args{x, codes8, codes4, sums, scales, perm};
  if (t.dtype == 0)
    RunQuant<bfloat16_t>(args, t);
  else
    RunQuant<half>(args, t);
}
