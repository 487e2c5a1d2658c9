// Vector instructions: values, rounding, masks, repeats and strides, casts, reductions.
#include "check.h"

namespace twin_tests {
namespace {

using Tmp = TBuf<TPosition::VECCALC>;

template <class T, class F, class G>
void check_binary(const std::vector<T>& both, F instruction, G value, const char* name) {
  const size_t n = both.size() / 2;
  const std::vector<T> y = through_ub<T, T>(
      both, n, [&](auto& d, auto& s, Tmp&) { instruction(d, s, s[uint32_t(n)], int32_t(n)); });
  for (size_t i = 0; i < n; ++i)
    if (!(float(y[i]) == float(T(value(both[i], both[n + i])))))
      complain(std::string(name) + " of element " + std::to_string(i));
}

#define CHECK_BINARY(NAME, T, EXPR, DATA)                                  \
  check_binary<T>(                                                         \
      DATA, [](auto& d, auto& x, auto y, int32_t n) { NAME(d, x, y, n); }, \
      [](auto a, auto b) { return EXPR; }, #NAME)

TEST(add_sub_mul_div_max_min) {
  const auto f = numbers<float>(256, -1000, 1000);
  const auto h = numbers<half>(512, 1, 300);
  const auto i = numbers<int32_t>(128, -30000, 30000);
  CHECK_BINARY(Add, float, a + b, f);
  CHECK_BINARY(Sub, float, a - b, f);
  CHECK_BINARY(Mul, float, a* b, f);
  CHECK_BINARY(Div, half, float(a) / float(b), h);
  CHECK_BINARY(Mul, half, float(a) * float(b), h);  // some become infinite
  CHECK_BINARY(Max, int32_t, a > b ? a : b, i);
  CHECK_BINARY(Min, float, a < b ? a : b, f);
  CHECK_BINARY(Mul, int32_t, a* b, i);
  CHECK_BINARY(And, uint16_t, a& b, numbers<uint16_t>(256, 0, 65535));
  CHECK_BINARY(Or, uint16_t, a | b, numbers<uint16_t>(256, 0, 65535));
}

TEST(half_is_rounded_after_every_instruction) {
  // 2048 + 1 is not a half: to nearest even it is 2048
  std::vector<half> x(32, half(1.f));
  x[0] = half(2048.f);
  const auto y =
      through_ub<half, half>(x, 16, [](auto& d, auto& s, Tmp&) { Add(d, s, s[16], 16); });
  expect(float(y[0]) == 2048.f && float(y[1]) == 2.f, "2048 + 1");
}

TEST(scalar_and_unary_forms) {
  const auto f = numbers<float>(64, -20, 20);
  const auto one = [&](auto body) { return through_ub<float, float>(f, 64, body); };
  const auto same = [&](const std::vector<float>& y, auto g, const char* what) {
    for (size_t i = 0; i < 64; ++i)
      expect(y[i] == g(f[i]) || (std::isnan(y[i]) && std::isnan(g(f[i]))), what);
  };
  same(
      one([](auto& d, auto& s, Tmp&) { Muls(d, s, 0.5f, 64); }), [](float x) { return x * 0.5f; },
      "Muls");
  same(
      one([](auto& d, auto& s, Tmp&) { Adds(d, s, 3.f, 64); }), [](float x) { return x + 3; },
      "Adds");
  same(
      one([](auto& d, auto& s, Tmp&) { Maxs(d, s, 3.f, 64); }),
      [](float x) { return x > 3 ? x : 3; }, "Maxs");
  same(
      one([](auto& d, auto& s, Tmp&) { Mins(d, s, 3.f, 64); }),
      [](float x) { return x < 3 ? x : 3; }, "Mins");
  same(
      one([](auto& d, auto& s, Tmp&) { Abs(d, s, 64); }), [](float x) { return std::fabs(x); },
      "Abs");
  same(
      one([](auto& d, auto& s, Tmp&) { Relu(d, s, 64); }), [](float x) { return x > 0 ? x : 0; },
      "Relu");
  same(
      one([](auto& d, auto& s, Tmp&) { Exp(d, s, 64); }), [](float x) { return std::exp(x); },
      "Exp");
  same(
      one([](auto& d, auto& s, Tmp&) { Ln(d, s, 64); }), [](float x) { return std::log(x); }, "Ln");
  same(
      one([](auto& d, auto& s, Tmp&) { Sqrt(d, s, 64); }), [](float x) { return std::sqrt(x); },
      "Sqrt");
  same(
      one([](auto& d, auto& s, Tmp&) { Rsqrt(d, s, 64); }),
      [](float x) { return 1 / std::sqrt(x); }, "Rsqrt");
  same(
      one([](auto& d, auto& s, Tmp&) { Reciprocal(d, s, 64); }), [](float x) { return 1 / x; },
      "Reciprocal");
  same(
      one([](auto& d, auto& s, Tmp&) {
        Adds(d, s, 1.f, 64);
        PipeBarrier<PIPE_V>();
        Axpy(d, s, 2.f, 64);
        PipeBarrier<PIPE_V>();
        MulAddDst(d, s, s, 64);
      }),
      [](float x) { return std::fma(x, x, std::fma(x, 2.f, x + 1)); }, "Axpy, MulAddDst");
}

TEST(shifts_and_not) {
  std::vector<uint16_t> x = numbers<uint16_t>(128, 0, 65535);
  const auto l = through_ub<uint16_t, uint16_t>(
      x, 128, [](auto& d, auto& s, Tmp&) { ShiftLeft(d, s, uint16_t(4), 128); });
  const auto r = through_ub<uint16_t, uint16_t>(
      x, 128, [](auto& d, auto& s, Tmp&) { ShiftRight(d, s, uint16_t(4), 128); });
  const auto n =
      through_ub<uint16_t, uint16_t>(x, 128, [](auto& d, auto& s, Tmp&) { Not(d, s, 128); });
  std::vector<int32_t> y = numbers<int32_t>(64, -100000, 100000);
  const auto a = through_ub<int32_t, int32_t>(
      y, 64, [](auto& d, auto& s, Tmp&) { ShiftRight(d, s, int32_t(3), 64); });
  for (size_t i = 0; i < 128; ++i)
    expect(l[i] == uint16_t(x[i] << 4) && r[i] == x[i] >> 4 && n[i] == uint16_t(~x[i]), "bits");
  for (size_t i = 0; i < 64; ++i) expect(a[i] == y[i] >> 3, "arithmetic shift");
}

TEST(masks_repeats_and_strides) {
  // 2 repeats of 3 + 8 lanes (a mask of 11): blocks 2 apart in the source, repeats 5 blocks apart
  const auto x = numbers<float>(128, -99, 99);
  const auto y = through_ub<float, float>(x, 128, [](auto& d, auto& s, Tmp&) {
    Duplicate(d, -1.f, 128);
    PipeBarrier<PIPE_V>();
    Muls(d, s, 2.f, 11, 2, UnaryRepeatParams(1, 2, 8, 5));
  });
  for (size_t i = 0; i < 128; ++i) {
    const size_t r = i / 64, lane = i % 64;
    const float want = lane < 11 ? 2 * x[r * 40 + lane / 8 * 16 + lane % 8] : -1.f;
    expect(y[i] == want, "element " + std::to_string(i));
  }
}

TEST(a_mask_of_bits) {
  const auto x = numbers<half>(256, -99, 99);
  const auto y = through_ub<half, half>(x, 128, [](auto& d, auto& s, Tmp&) {
    Duplicate(d, half(-1.f), 128);
    PipeBarrier<PIPE_V>();
    uint64_t mask[2] = {0x8000000000000005ull, 1};
    Add(d, s, s[128], mask, 1, BinaryRepeatParams());
  });
  for (size_t i = 0; i < 128; ++i) {
    const bool on = i == 0 || i == 2 || i == 63 || i == 64;
    expect(float(y[i]) == (on ? float(half(float(x[i]) + float(x[128 + i]))) : -1.f), "lane");
  }
}

TEST(the_mask_register_in_counter_mode) {
  const auto x = numbers<float>(256, -99, 99);
  const auto y = through_ub<float, float>(x, 128, [](auto& d, auto& s, Tmp&) {
    Duplicate(d, -1.f, 128);
    PipeBarrier<PIPE_V>();
    SetMaskCount();
    SetVectorMask<float, MaskMode::COUNTER>(0, 70);
    Add<float, false>(d, s, s[128], uint64_t(64), 1, BinaryRepeatParams());
    SetMaskNorm();
    ResetMask();
  });
  for (size_t i = 0; i < 128; ++i)
    expect(y[i] == (i < 70 ? x[i] + x[128 + i] : -1.f), "element " + std::to_string(i));
}

TEST(a_row_for_all_rows_and_a_number_for_each) {
  // 8 rows of 32: times a row of 32 (repeat stride 0), times a number per row (block stride 0)
  auto x = numbers<float>(256 + 32 + 8, -9, 9);
  const auto y = through_ub<float, float>(x, 256, [](auto& d, auto& s, Tmp& tmp) {
    LocalTensor<float> b = tmp.Get<float>();
    Brcb(b, s[288], 1, BrcbRepeatParams(1, 8));
    Mul(d, s, s[256], 32, 8, BinaryRepeatParams(1, 1, 1, 4, 4, 0));
    PipeBarrier<PIPE_V>();
    Mul(d, d, b, 32, 8, BinaryRepeatParams(1, 1, 0, 4, 4, 1));
  });
  for (size_t i = 0; i < 256; ++i)
    expect(y[i] == x[i] * x[256 + i % 32] * x[288 + i / 32], "element " + std::to_string(i));
}

TEST(copy_gather_transpose) {
  const auto x = numbers<uint16_t>(256, 0, 60000);
  const auto c = through_ub<uint16_t, uint16_t>(
      x, 64, [](auto& d, auto& s, Tmp&) { Copy(d, s, 64, 1, CopyRepeatParams(1, 3, 8, 8)); });
  for (size_t i = 0; i < 64; ++i) expect(c[i] == x[i / 16 * 48 + i % 16], "Copy");
  const auto t =
      through_ub<uint16_t, uint16_t>(x, 256, [](auto& d, auto& s, Tmp&) { Transpose(d, s); });
  for (size_t i = 0; i < 256; ++i) expect(t[i] == x[i % 16 * 16 + i / 16], "Transpose");
  const auto g = through_ub<uint16_t, uint16_t>(x, 64, [](auto& d, auto& s, Tmp& tmp) {
    LocalTensor<uint32_t> at = tmp.Get<uint32_t>();
    for (uint32_t i = 0; i < 64; ++i) at.SetValue(i, i * 37 % 120 * 2);
    SetFlag<HardEvent::S_V>(0);
    WaitFlag<HardEvent::S_V>(0);
    Gather(d, s, at, 6, 64);
  });
  for (size_t i = 0; i < 64; ++i) expect(g[i] == x[3 + i * 37 % 120], "Gather");
}

TEST(compare_and_select) {
  auto x = numbers<float>(128, -9, 9);
  x[3] = NAN;
  const auto y = through_ub<float, float>(x, 128, [](auto& d, auto& s, Tmp& tmp) {
    LocalTensor<uint8_t> bits = tmp.Get<uint8_t>();
    CompareScalar(bits, s, 2.f, CMPMODE::GE, 64);
    Compare(bits[32], s, s[64], CMPMODE::LT, 64);
    PipeBarrier<PIPE_V>();
    Select(d, bits, s, -5.f, SELMODE::VSEL_TENSOR_SCALAR_MODE, 64);
    Select(d[64], bits[32], s, s[64], SELMODE::VSEL_TENSOR_TENSOR_MODE, 64);
  });
  for (size_t i = 0; i < 64; ++i) {
    expect(y[i] == (x[i] >= 2 ? x[i] : -5.f), "CompareScalar");
    expect(y[64 + i] == (x[i] < x[64 + i] ? x[i] : x[64 + i]), "Compare");
  }
}

template <class D, class S>
std::vector<D> cast(std::vector<S> x, RoundMode mode) {
  const size_t n = x.size();
  return through_ub<S, D>(x, n, [&](auto& d, auto& s, Tmp&) { Cast(d, s, mode, uint32_t(n)); });
}

TEST(casts_round_as_asked) {
  using R = RoundMode;
  const std::vector<float> x = {2.5f, -2.5f, 3.5f, 0.49f, -0.5f, 7.f, 3e9f, NAN};
  const std::vector<int32_t> big = {2147483647, 0};
  const auto want = [&](R mode, std::vector<int32_t> w) {
    w.push_back(big[0]);
    w.push_back(0);
    expect_equal(cast<int32_t, float>(x, mode), w, "to int32");
  };
  want(R::CAST_RINT, {2, -2, 4, 0, 0, 7});
  want(R::CAST_FLOOR, {2, -3, 3, 0, -1, 7});
  want(R::CAST_CEIL, {3, -2, 4, 1, 0, 7});
  want(R::CAST_ROUND, {3, -3, 4, 0, -1, 7});
  want(R::CAST_TRUNC, {2, -2, 3, 0, 0, 7});
  // 1 + 2^-11 is half way between two halves
  const float mid = 1.f + 1.f / 2048;
  const std::vector<float> h = {mid, -mid, 1.f + 3.f / 2048, 65520.f};
  const auto halves = [&](R mode) { return cast<half, float>(h, mode); };
  expect(float(halves(R::CAST_RINT)[0]) == 1.f, "tie to even");
  expect(float(halves(R::CAST_RINT)[2]) == 1.f + 2.f / 1024, "tie to even, up");
  expect(std::isinf(float(halves(R::CAST_RINT)[3])), "65520 rounds to infinity");
  expect(float(halves(R::CAST_CEIL)[0]) == 1.f + 1.f / 1024, "up");
  expect(float(halves(R::CAST_FLOOR)[1]) == -1.f - 1.f / 1024, "down");
  expect(float(halves(R::CAST_TRUNC)[1]) == -1.f, "to zero");
  const auto bf = cast<bfloat16_t, float>({1.f + 1.f / 256, 1.f + 3.f / 256}, R::CAST_RINT);
  expect(float(bf[0]) == 1.f && float(bf[1]) == 1.f + 4.f / 256, "bf16 ties to even");
  const auto i = cast<float, int32_t>({16777217, -16777217}, R::CAST_FLOOR);
  expect(i[0] == 16777216.f && i[1] == -16777218.f, "int32 to fp32, down");
}

TEST(int4_casts_to_and_from_half_only) {
  std::vector<uint8_t> packed(64);
  for (size_t i = 0; i < 64; ++i) packed[i] = uint8_t(scramble(uint32_t(i)));
  const auto y = through_ub<uint8_t, half>(packed, 128, [](auto& d, auto& s, Tmp&) {
    Cast(d, s.template ReinterpretCast<int4b_t>(), RoundMode::CAST_NONE, 128);
  });
  for (size_t i = 0; i < 128; ++i) {
    const int q = packed[i / 2] >> (i % 2 * 4) & 15;
    expect(float(y[i]) == float(q >= 8 ? q - 16 : q), "the low nibble comes first");
  }
  const std::vector<half> x = {half(-9.f), half(8.f), half(2.5f), half(-1.5f),
                               half(7.4f), half(0.f), half(1.f),  half(-8.f)};
  std::vector<half> many = x;
  many.resize(64, half(3.f));
  const auto z = through_ub<half, uint8_t>(many, 32, [](auto& d, auto& s, Tmp&) {
    Cast(d.template ReinterpretCast<int4b_t>(), s, RoundMode::CAST_RINT, 64);
  });
  const int want[8] = {-8, 7, 2, -2, 7, 0, 1, -8};
  for (size_t i = 0; i < 8; ++i)
    expect((z[i / 2] >> (i % 2 * 4) & 15) == (want[i] & 15), "saturates and rounds");
  std::vector<int8_t> b(64);
  run_broken("type", "no instruction from int4b_t to int8_t", config(twin::Kind::kVector), {in(b)},
             [&] {
               TPipe pipe;
               Tmp t;
               pipe.InitBuffer(t, 128);
               Cast(t.Get<int8_t>(), t.Get<int4b_t>(), RoundMode::CAST_NONE, 64);
             });
}

TEST(int32_to_half_takes_a_scale) {
  const std::vector<int32_t> x = {1000, -3, 70000, 5, 0, 1, 2, 3};
  const auto y = through_ub<int32_t, half>(x, 8, [](auto& d, auto& s, Tmp&) {
    SetDeqScale(half(0.25f));
    Cast(d, s, RoundMode::CAST_NONE, 8);
    SetDeqScale(half(1.f));
  });
  for (size_t i = 0; i < 8; ++i) expect(float(y[i]) == float(half(float(x[i]) * 0.25f)), "scaled");
}

TEST(reductions) {
  const auto x = numbers<float>(192, -50, 50);
  const auto y = through_ub<float, float>(x, 40, [](auto& d, auto& s, Tmp& tmp) {
    Duplicate(d, 0.f, 40);
    PipeBarrier<PIPE_V>();
    WholeReduceMax(d, s, 64, 3, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
    WholeReduceMin(d[8], s, 40, 3, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
    WholeReduceSum(d[16], s, 64, 3, 1, 1, 8);
    LocalTensor<float> work = tmp.Get<float>();
    ReduceMax(d[24], s, work, 192);
    PipeBarrier<PIPE_V>();
    ReduceSum(d[25], s, work, 192);
    WholeReduceMax(d[26], s, 64, 1, 1, 1, 8);  // value and index
    BlockReduceSum(d[32], s, 1, 64, 1, 1, 8);
  });
  float most = -99, total = 0;
  size_t where = 0;
  for (size_t r = 0; r < 3; ++r) {
    float high = -99, low = 99, sum = 0;
    for (size_t i = 0; i < 64; ++i) {
      const float v = x[r * 64 + i];
      if (r == 0 && v > high) where = i;
      high = std::max(high, v);
      if (i < 40) low = std::min(low, v);
      sum += v;
    }
    expect(y[r] == high && y[8 + r] == low && y[16 + r] == sum, "of a repeat");
    most = std::max(most, high);
    total += sum;
  }
  expect(y[24] == most && y[25] == total, "of all");
  uint32_t index;
  std::memcpy(&index, &y[27], 4);
  expect(y[26] == y[0] && index == where, "value and index");
  for (size_t b = 0; b < 8; ++b) {
    float sum = 0;
    for (size_t i = 0; i < 8; ++i) sum += x[b * 8 + i];
    expect(y[32 + b] == sum, "of a block");
  }
  const auto p = through_ub<float, float>(
      x, 32, [](auto& d, auto& s, Tmp&) { PairReduceSum(d, s, 1, 64, 1, 1, 8); });
  for (size_t i = 0; i < 32; ++i) expect(p[i] == x[2 * i] + x[2 * i + 1], "of a pair");
  const auto m = through_ub<float, float>(
      x, 8, [](auto& d, auto& s, Tmp&) { BlockReduceMax(d, s, 1, 64, 1, 1, 8); });
  for (size_t b = 0; b < 8; ++b)
    expect(m[b] == *std::max_element(x.begin() + long(b) * 8, x.begin() + long(b) * 8 + 8), "max");
}

}  // namespace
}  // namespace twin_tests
