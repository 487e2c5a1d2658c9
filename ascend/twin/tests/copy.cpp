// Data movement: strides, pads, ND to NZ, paths.
#include "check.h"

namespace twin_tests {
namespace {

TEST(data_copy_strides_are_gaps_in_blocks) {
  std::vector<int16_t> x = numbers<int16_t>(160, -99, 99), y(96);
  run_clean(twin::Kind::kVector, {in(x), out(y)}, [&] {
    TPipe pipe;
    TBuf<TPosition::VECCALC> b;
    pipe.InitBuffer(b, 512);
    LocalTensor<int16_t> t = b.Get<int16_t>();
    // 3 bursts of one block, 2 blocks apart in memory, one block apart in UB
    DataCopy(t, global(x), DataCopyParams(3, 1, 2, 1));
    SetFlag<HardEvent::MTE2_MTE3>(0);
    WaitFlag<HardEvent::MTE2_MTE3>(0);
    DataCopy(global(y), t, DataCopyParams(3, 1, 1, 1));
  });
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 16; ++j)
      expect(y[size_t(i * 32 + j)] == x[size_t(i * 48 + j)], "burst " + std::to_string(i));
}

TEST(data_copy_pad_fills_rows_and_leaves_the_rest_unknown) {
  std::vector<int32_t> x = numbers<int32_t>(20, 1, 1000), y(16);
  run_clean(twin::Kind::kVector, {in(x), out(y)}, [&] {
    TPipe pipe;
    TBuf<TPosition::VECCALC> b;
    pipe.InitBuffer(b, 64);
    LocalTensor<int32_t> t = b.Get<int32_t>();
    // two rows of 5 numbers, 5 apart; one -7 on the left, two on the right: 8 numbers, a block
    DataCopyPadExtParams<int32_t> pad(true, 1, 2, -7);
    DataCopyPad(t, global(x), DataCopyExtParams(2, 20, 20, 0, 0), pad);
    SetFlag<HardEvent::MTE2_MTE3>(0);
    WaitFlag<HardEvent::MTE2_MTE3>(0);
    DataCopy(global(y), t, 16);
  });
  for (int r = 0; r < 2; ++r)
    for (int j = 0; j < 8; ++j) {
      const int32_t want = j == 0 || j > 5 ? -7 : x[size_t(r * 10 + j - 1)];
      expect(y[size_t(r * 8 + j)] == want, "row " + std::to_string(r));
    }
  run_broken("uninitialised", "nothing has written", config(twin::Kind::kVector), {in(x), out(y)},
             [&] {
               TPipe pipe;
               TBuf<TPosition::VECCALC> b;
               pipe.InitBuffer(b, 64);
               LocalTensor<int32_t> t = b.Get<int32_t>();
               DataCopyPadExtParams<int32_t> pad;
               DataCopyPad(t, global(x), DataCopyExtParams(1, 20, 0, 0, 0), pad);
               SetFlag<HardEvent::MTE2_MTE3>(0);
               WaitFlag<HardEvent::MTE2_MTE3>(0);
               DataCopy(global(y), t, 8);
             });
}

TEST(data_copy_pad_to_memory_drops_the_padding) {
  std::vector<uint8_t> x(64), y(30, 9);
  for (size_t i = 0; i < 64; ++i) x[i] = uint8_t(i);
  run_clean(twin::Kind::kVector, {in(x), in(y)}, [&] {
    TPipe pipe;
    TBuf<TPosition::VECCALC> b;
    pipe.InitBuffer(b, 64);
    LocalTensor<uint8_t> t = b.Get<uint8_t>();
    DataCopy(t, global(x), 64);
    SetFlag<HardEvent::MTE2_MTE3>(0);
    WaitFlag<HardEvent::MTE2_MTE3>(0);
    DataCopyPad(global(y), t, DataCopyExtParams(2, 7, 0, 5, 0));
  });
  for (int i = 0; i < 30; ++i) {
    const int want = i < 7 ? i : i >= 12 && i < 19 ? 32 + i - 12 : 9;
    expect(y[size_t(i)] == want, "byte " + std::to_string(i));
  }
}

TEST(nd_to_nz_puts_columns_of_32_bytes_one_after_another) {
  // 3 rows of 40 bytes, 50 apart: two columns, the second filled up with zeros; 16 rows of room
  std::vector<int8_t> x = numbers<int8_t>(150, -128, 127), y(1024);
  run_clean(twin::Kind::kCube, {in(x), in(y)}, [&] {
    TPipe pipe;
    TQue<TPosition::A1, 1> q;
    TQue<TPosition::A2, 1> q2;
    pipe.InitBuffer(q, 1, 1024);
    pipe.InitBuffer(q2, 1, 1024);
    LocalTensor<int8_t> t = q.AllocTensor<int8_t>();
    Nd2NzParams p;
    p.ndNum = 1;
    p.nValue = 3;
    p.dValue = 40;
    p.srcDValue = 50;
    p.dstNzC0Stride = 16;
    p.dstNzNStride = 1;
    DataCopy(t, global(x), p);
    SetFlag<HardEvent::MTE2_S>(0);
    WaitFlag<HardEvent::MTE2_S>(0);
    for (uint32_t c = 0; c < 2; ++c)
      for (uint32_t r = 0; r < 3; ++r)
        for (uint32_t j = 0; j < 32; ++j) {
          const uint32_t k = c * 32 + j;
          const int8_t want = k < 40 ? x[r * 50 + k] : int8_t(0);
          expect(t.GetValue((c * 16 + r) * 32 + j) == want, "element " + std::to_string(k));
        }
    q.FreeTensor(t);
  });
}

TEST(a_copy_that_no_unit_does_is_refused) {
  std::vector<int8_t> x(64);
  run_broken("path", "on an AIV", config(twin::Kind::kVector), {in(x)}, [&] {
    TPipe pipe;
    TBuf<TPosition::A1> b;
    pipe.InitBuffer(b, 64);
  });
  run_broken("path", "no unit copies from L1 to GM", config(twin::Kind::kCube), {in(x)}, [&] {
    TPipe pipe;
    TBuf<TPosition::A1> b;
    pipe.InitBuffer(b, 64);
    DataCopy(global(x), b.Get<int8_t>(), 64);
  });
}

TEST(atomic_add_sums_into_memory) {
  std::vector<float> x = {1, 2, 3, 4, 5, 6, 7, 8}, y(8, 10.f);
  const twin::Config c = config(twin::Kind::kVector);
  const twin::Report r = twin::launch(c, {in(x), in(y)}, [&] {
    TPipe pipe;
    TBuf<TPosition::VECCALC> b;
    pipe.InitBuffer(b, 32);
    LocalTensor<float> t = b.Get<float>();
    DataCopy(t, global(x), 8);
    SetFlag<HardEvent::MTE2_MTE3>(0);
    WaitFlag<HardEvent::MTE2_MTE3>(0);
    SetAtomicAdd<float>();
    DataCopy(global(y), t, 8);
    DataCopy(global(y), t, 8);
    SetAtomicNone();
  });
  expect(r.finding.empty(), r.finding);
  for (int i = 0; i < 8; ++i) expect(y[size_t(i)] == 10.f + 2 * x[size_t(i)], "sum");
}

}  // namespace
}  // namespace twin_tests
