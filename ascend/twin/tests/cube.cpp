// The cube unit: layouts of L0A, L0B and L0C, products of every type, Fixpipe.
#include <algorithm>

#include "check.h"

namespace twin_tests {
namespace {

template <class T>
struct Sum {
  using type = float;
};
template <>
struct Sum<int8_t> {
  using type = int32_t;
};
template <>
struct Sum<int4b_t> {
  using type = int32_t;
};

// Sizes of a product, and what of them is padded.
template <class T>
struct Shape {
  static constexpr int kC0 = 256 / twin::kBits<T>;
  using C = typename Sum<T>::type;
  using Store = std::conditional_t<twin::kBits<T> == 4, uint8_t, T>;
  int m, n, k;

  int row() const { return k * twin::kBits<T> / 8 / int(sizeof(Store)); }
  int mp() const { return (m + 15) / 16 * 16; }
  int np() const { return (n + 15) / 16 * 16; }
  int kb() const { return (k + kC0 - 1) / kC0; }
};

template <class T>
std::vector<typename Shape<T>::Store> stored(const std::vector<float>& v, int64_t elements) {
  using Store = typename Shape<T>::Store;
  std::vector<Store> s(size_t(twin::bytes_of<T>(elements)) / sizeof(Store));
  for (size_t i = 0; i < size_t(elements); ++i) {
    if constexpr (twin::kBits<T> == 4)
      s[i / 2] = uint8_t(s[i / 2] | (int(v[i]) & 15) << (i % 2 * 4));
    else
      s[i] = T(v[i]);
  }
  return s;
}

template <class T, class Queue>
void load_rows(Queue& queue, std::vector<typename Shape<T>::Store>& from, int rows, int padded,
               int row) {
  using Store = typename Shape<T>::Store;
  LocalTensor<Store> t = queue.template AllocTensor<Store>();
  Nd2NzParams p;
  p.ndNum = 1;
  p.nValue = rows;
  p.dValue = row;
  p.srcDValue = row;
  p.dstNzC0Stride = padded;
  DataCopy(t, global(from), p);
  queue.EnQue(t);
}

template <class T>
void product_kernel(const Shape<T>& s, std::vector<typename Shape<T>::Store>& ga,
                    std::vector<typename Shape<T>::Store>& gb,
                    std::vector<typename Shape<T>::C>& y) {
  using C = typename Shape<T>::C;
  using Store = typename Shape<T>::Store;
  TPipe pipe;
  TQue<TPosition::A1, 1> a1;
  TQue<TPosition::B1, 1> b1;
  TQue<TPosition::A2, 1> a2;
  TQue<TPosition::B2, 1> b2;
  TQue<TPosition::CO1, 1> c;
  pipe.InitBuffer(a1, 1, uint32_t(s.mp() * s.kb() * 32));
  pipe.InitBuffer(b1, 1, uint32_t(s.np() * s.kb() * 32));
  pipe.InitBuffer(a2, 1, uint32_t(s.mp() * s.kb() * 32));
  pipe.InitBuffer(b2, 1, uint32_t(s.np() * s.kb() * 32));
  pipe.InitBuffer(c, 1, uint32_t(s.mp() * s.np() * 4));
  load_rows<T>(a1, ga, s.m, s.mp(), s.row());
  load_rows<T>(b1, gb, s.n, s.np(), s.row());
  LocalTensor<Store> ta1 = a1.template DeQue<Store>(), tb1 = b1.template DeQue<Store>();
  LocalTensor<T> ta = a2.template AllocTensor<T>(), tb = b2.template AllocTensor<T>();
  LoadData2DParams p;
  p.repeatTimes = s.kb();
  p.srcStride = s.mp() / 16;
  for (int i = 0; i < s.mp() / 16; ++i) {
    p.startIndex = i;
    LoadData(ta[uint32_t(i * s.kb() * 16 * s.kC0)], ta1.template ReinterpretCast<T>(), p);
  }
  p.startIndex = 0;
  p.srcStride = 1;
  p.repeatTimes = s.kb() * s.np() / 16;
  LoadData(tb, tb1.template ReinterpretCast<T>(), p);
  a2.EnQue(ta);
  b2.EnQue(tb);
  ta = a2.template DeQue<T>();
  tb = b2.template DeQue<T>();
  LocalTensor<C> tc = c.template AllocTensor<C>();
  MmadParams mm;
  mm.m = s.m;
  mm.n = s.n;
  mm.k = s.k;
  Mmad(tc, ta, tb, mm);
  c.EnQue(tc);
  tc = c.template DeQue<C>();
  FixpipeParamsV220 f;
  f.nSize = s.n;
  f.mSize = s.m;
  f.srcStride = s.mp();
  f.dstStride = s.n;
  Fixpipe<C, C, CFG_ROW_MAJOR>(global(y), tc, f);
  a1.FreeTensor(ta1);
  b1.FreeTensor(tb1);
  a2.FreeTensor(ta);
  b2.FreeTensor(tb);
  c.FreeTensor(tc);
}

// a [m][k] and b [n][k] as numbers; c = a b^T through GM -> L1 (NZ) -> L0 -> L0C -> GM.
template <class T>
void check_product(int m, int n, int k) {
  const Shape<T> s{m, n, k};
  const int low = twin::kBits<T> == 4 ? -8 : -50, high = twin::kBits<T> == 4 ? 7 : 50;
  const std::vector<float> a = numbers<float>(size_t(m * k), low, high);
  std::vector<float> b = numbers<float>(size_t(n * k), low, high);
  std::reverse(b.begin(), b.end());
  auto ga = stored<T>(a, m * k), gb = stored<T>(b, n * k);
  std::vector<typename Shape<T>::C> y(size_t(m * n));
  run_clean(twin::Kind::kCube, {in(ga), in(gb), out(y)}, [&] { product_kernel<T>(s, ga, gb, y); });
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      double sum = 0;
      for (int x = 0; x < k; ++x) sum += double(a[size_t(i * k + x)]) * b[size_t(j * k + x)];
      expect(double(y[size_t(i * n + j)]) == sum,
             "c[" + std::to_string(i) + "][" + std::to_string(j) + "]");
    }
}

TEST(mmad_s8) { check_product<int8_t>(5, 16, 64), check_product<int8_t>(33, 48, 40); }
TEST(mmad_s4) { check_product<int4b_t>(5, 16, 64), check_product<int4b_t>(20, 32, 192); }
TEST(mmad_f16) { check_product<half>(17, 32, 48); }
TEST(mmad_bf16) { check_product<bfloat16_t>(17, 32, 48); }
TEST(mmad_f32) { check_product<float>(17, 16, 24); }

// One L0C fractal with numbers, made by a product with a unit matrix, then out through Fixpipe.
template <class T>
std::vector<T> through_fixpipe(std::vector<int8_t> rows, QuantMode_t mode, uint64_t scale,
                               std::vector<uint64_t> scales = {}) {
  std::vector<int8_t> unit(16 * 32);
  for (size_t i = 0; i < 16; ++i) unit[i * 32 + i] = 100;
  rows.resize(16 * 32);
  std::vector<T> y(256);
  std::vector<twin::Buffer> buffers = {in(rows), in(unit), out(y)};
  if (!scales.empty()) buffers.push_back(in(scales));
  run_clean(twin::Kind::kCube, buffers, [&] {
    TPipe pipe;
    TBuf<TPosition::A1> l1;
    TBuf<TPosition::A2> l0a;
    TBuf<TPosition::B2> l0b;
    TBuf<TPosition::CO1> l0c;
    pipe.InitBuffer(l1, 2048);
    pipe.InitBuffer(l0a, 512);
    pipe.InitBuffer(l0b, 512);
    pipe.InitBuffer(l0c, 1024);
    LocalTensor<int8_t> t = l1.Get<int8_t>();
    DataCopy(t, global(rows), 512);
    DataCopy(t[512], global(unit), 512);
    LocalTensor<uint64_t> ts = l1.GetWithOffset<uint64_t>(16, 1024);
    if (!scales.empty()) DataCopy(ts, global(scales), 16);
    SetFlag<HardEvent::MTE2_MTE1>(0);
    WaitFlag<HardEvent::MTE2_MTE1>(0);
    LoadData2DParams p;
    p.repeatTimes = 1;
    LoadData(l0a.Get<int8_t>(), t, p);
    LoadData(l0b.Get<int8_t>(), t[512], p);
    SetFlag<HardEvent::MTE1_M>(0);
    WaitFlag<HardEvent::MTE1_M>(0);
    MmadParams mm;
    mm.m = mm.n = 16;
    mm.k = 32;
    Mmad(l0c.Get<int32_t>(), l0a.Get<int8_t>(), l0b.Get<int8_t>(), mm);
    SetFlag<HardEvent::M_FIX>(0);
    WaitFlag<HardEvent::M_FIX>(0);
    SetFlag<HardEvent::MTE2_FIX>(0);
    WaitFlag<HardEvent::MTE2_FIX>(0);
    FixpipeParamsV220 f;
    f.nSize = f.mSize = f.srcStride = f.dstStride = 16;
    f.quantPre = mode;
    f.deqScalar = scale;
    if (scales.empty())
      Fixpipe<T, int32_t, CFG_ROW_MAJOR>(global(y), l0c.Get<int32_t>(), f);
    else
      Fixpipe<T, int32_t, CFG_ROW_MAJOR>(global(y), l0c.Get<int32_t>(), ts, f);
  });
  return y;
}

uint64_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

TEST(fixpipe_keeps_10_bits_of_a_scale) {
  std::vector<int8_t> rows(32);
  rows[0] = 7;
  // 1 + 2^-10 survives, 1 + 2^-10 + 2^-11 loses its last bit
  const float ten = 1.f + 1.f / 1024, eleven = ten + 1.f / 2048;
  const float want = 700.f * ten;
  expect(float(through_fixpipe<half>(rows, DEQF16, bits_of(ten))[0]) == float(half(want)), "ten");
  expect(float(through_fixpipe<half>(rows, DEQF16, bits_of(eleven))[0]) == float(half(want)),
         "the 11th bit of the mantissa must be dropped");
  expect(twin::fixpipe_scale(bits_of(eleven)) == ten, "fixpipe_scale");
}

TEST(fixpipe_scales_per_channel_and_saturates) {
  std::vector<int8_t> rows(32);
  std::vector<uint64_t> scales;
  for (int i = 0; i < 16; ++i) {
    rows[size_t(i)] = int8_t(i + 1);
    scales.push_back(bits_of(0.25f * float(i + 1)));
  }
  const std::vector<int8_t> y = through_fixpipe<int8_t>(rows, VREQ8, 0, scales);
  for (int i = 0; i < 16; ++i) {
    const float x = 25.f * float((i + 1) * (i + 1));
    expect(y[size_t(i)] == (x > 127 ? 127 : int(x)), "channel " + std::to_string(i));
  }
}

TEST(fixpipe_has_no_int32_to_bf16) {
  std::vector<bfloat16_t> y(256);
  run_broken("type", "makes no bfloat16_t of int32_t", config(twin::Kind::kCube), {out(y)}, [&] {
    TPipe pipe;
    TBuf<TPosition::CO1> c;
    pipe.InitBuffer(c, 1024);
    FixpipeParamsV220 f;
    f.nSize = f.mSize = f.srcStride = f.dstStride = 16;
    f.quantPre = F322BF16;
    Fixpipe<bfloat16_t, int32_t, CFG_ROW_MAJOR>(global(y), c.Get<int32_t>(), f);
  });
}

// L1 bytes 0..2047 loaded with `body`, read back as the rows of one product with a unit matrix.
TEST(load_transposed_squares_of_int8) {
  std::vector<int8_t> x = numbers<int8_t>(1024, -128, 127);
  run_clean(twin::Kind::kCube, {in(x)}, [&] {
    TPipe pipe;
    TBuf<TPosition::A1> l1;
    TBuf<TPosition::B2> l0;
    pipe.InitBuffer(l1, 1024);
    pipe.InitBuffer(l0, 2048);
    DataCopy(l1.Get<int8_t>(), global(x), 1024);
    SetFlag<HardEvent::MTE2_MTE1>(0);
    WaitFlag<HardEvent::MTE2_MTE1>(0);
    LoadData2dTransposeParams p;
    p.repeatTimes = 1;
    p.dstFracGap = 1;
    LoadDataWithTranspose(l0.Get<int8_t>(), l1.Get<int8_t>(), p);
    PipeBarrier<PIPE_ALL>();
    for (uint32_t r = 0; r < 32; ++r)
      for (uint32_t c = 0; c < 32; ++c)
        expect(l0.Get<int8_t>().GetValue(c / 16 * 1024 + c % 16 * 32 + r) == x[r * 32 + c],
               "element");
  });
}

TEST(load_transposes_a_fractal_of_b16) {
  std::vector<half> x = numbers<half>(256, -99, 99);
  run_clean(twin::Kind::kCube, {in(x)}, [&] {
    TPipe pipe;
    TBuf<TPosition::A1> l1;
    TBuf<TPosition::A2> l0;
    pipe.InitBuffer(l1, 512);
    pipe.InitBuffer(l0, 512);
    DataCopy(l1.Get<half>(), global(x), 256);
    SetFlag<HardEvent::MTE2_MTE1>(0);
    WaitFlag<HardEvent::MTE2_MTE1>(0);
    LoadData2DParams p;
    p.repeatTimes = 1;
    p.ifTranspose = true;
    LoadData(l0.Get<half>(), l1.Get<half>(), p);
    PipeBarrier<PIPE_ALL>();
    for (uint32_t e = 0; e < 256; ++e)
      expect(float(l0.Get<half>().GetValue(e % 16 * 16 + e / 16)) == float(x[e]), "element");
  });
}

// With m = 1 the left operand is 1 x k, contiguous: its second 32 bytes follow the first.
TEST(one_row_is_a_product_with_a_vector) {
  std::vector<int8_t> a = numbers<int8_t>(1024, -9, 9), b = numbers<int8_t>(1024, -9, 9);
  std::vector<int32_t> y(32);
  run_clean(twin::Kind::kCube, {in(a), in(b), in(y)}, [&] {
    TPipe pipe;
    TBuf<TPosition::A1> l1;
    TBuf<TPosition::A2> l0a;
    TBuf<TPosition::B2> l0b;
    TBuf<TPosition::CO1> l0c;
    pipe.InitBuffer(l1, 2048);
    pipe.InitBuffer(l0a, 1024);
    pipe.InitBuffer(l0b, 1024);
    pipe.InitBuffer(l0c, 2048);
    LocalTensor<int8_t> t = l1.Get<int8_t>();
    DataCopy(t, global(a), 1024);
    DataCopy(t[1024], global(b), 1024);
    SetFlag<HardEvent::MTE2_MTE1>(0);
    WaitFlag<HardEvent::MTE2_MTE1>(0);
    LoadData2DParams p;
    p.repeatTimes = 2;
    p.srcStride = 1;
    LoadData(l0a.Get<int8_t>(), t, p);
    LoadData(l0b.Get<int8_t>(), t[1024], p);
    SetFlag<HardEvent::MTE1_M>(0);
    WaitFlag<HardEvent::MTE1_M>(0);
    for (int m = 1; m <= 2; ++m) {
      MmadParams mm;
      mm.m = m;
      mm.n = 16;
      mm.k = 64;
      Mmad(l0c.Get<int32_t>()[uint32_t(m - 1) * 256], l0a.Get<int8_t>(), l0b.Get<int8_t>(), mm);
    }
    SetFlag<HardEvent::M_FIX>(0);
    WaitFlag<HardEvent::M_FIX>(0);
    FixpipeParamsV220 f;
    f.nSize = f.srcStride = f.dstStride = 16;
    f.mSize = 1;
    for (uint32_t i = 0; i < 2; ++i)
      Fixpipe<int32_t, int32_t, CFG_ROW_MAJOR>(global(y)[i * 16], l0c.Get<int32_t>()[i * 256], f);
  });
  for (size_t n = 0; n < 16; ++n) {
    int32_t vector = 0, matrix = 0;
    for (size_t k = 0; k < 64; ++k) {
      const int8_t w = b[k / 32 * 512 + n * 32 + k % 32];
      vector += a[k] * w;                      // contiguous
      matrix += a[k / 32 * 512 + k % 32] * w;  // the first row of each fractal
    }
    expect(y[n] == vector, "m = 1 reads contiguously");
    expect(y[16 + n] == matrix, "m = 2 reads rows of fractals");
  }
}

TEST(bias_starts_the_sums) {
  std::vector<int8_t> ones(1024, 1);
  std::vector<int32_t> bias = numbers<int32_t>(16, -500, 500), y(256);
  run_clean(twin::Kind::kCube, {in(ones), in(bias), out(y)}, [&] {
    TPipe pipe;
    TBuf<TPosition::A1> l1;
    TBuf<TPosition::C2> bt;
    TBuf<TPosition::A2> l0a;
    TBuf<TPosition::B2> l0b;
    TBuf<TPosition::CO1> l0c;
    pipe.InitBuffer(l1, 1024);
    pipe.InitBuffer(bt, 64);
    pipe.InitBuffer(l0a, 512);
    pipe.InitBuffer(l0b, 512);
    pipe.InitBuffer(l0c, 1024);
    LocalTensor<int8_t> t = l1.Get<int8_t>();
    DataCopy(t, global(ones), 512);
    LocalTensor<int32_t> tb = l1.GetWithOffset<int32_t>(16, 512);
    DataCopy(tb, global(bias), 16);
    SetFlag<HardEvent::MTE2_MTE1>(0);
    WaitFlag<HardEvent::MTE2_MTE1>(0);
    LoadData2DParams p;
    p.repeatTimes = 1;
    LoadData(l0a.Get<int8_t>(), t, p);
    LoadData(l0b.Get<int8_t>(), t, p);
    DataCopy(bt.Get<int32_t>(), tb, DataCopyParams(1, 1, 0, 0));
    SetFlag<HardEvent::MTE1_M>(0);
    WaitFlag<HardEvent::MTE1_M>(0);
    MmadParams mm;
    mm.m = mm.n = 16;
    mm.k = 32;
    mm.cmatrixInitVal = false;
    mm.cmatrixSource = true;
    Mmad(l0c.Get<int32_t>(), l0a.Get<int8_t>(), l0b.Get<int8_t>(), bt.Get<int32_t>(), mm);
    SetFlag<HardEvent::M_FIX>(0);
    WaitFlag<HardEvent::M_FIX>(0);
    FixpipeParamsV220 f;
    f.nSize = f.mSize = f.srcStride = f.dstStride = 16;
    Fixpipe<int32_t, int32_t, CFG_ROW_MAJOR>(global(y), l0c.Get<int32_t>(), f);
  });
  for (size_t i = 0; i < 256; ++i) expect(y[i] == 32 + bias[i % 16], "sum");
}

}  // namespace
}  // namespace twin_tests
