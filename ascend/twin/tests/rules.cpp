// Every rule with a kernel that breaks it: the twin must notice, and say what and where.
#include "check.h"

namespace twin_tests {
namespace {

using Tmp = TBuf<TPosition::VECCALC>;
using In = TQue<TPosition::VECIN, 2>;
using Out = TQue<TPosition::VECOUT, 2>;

std::vector<float> gx(256, 1.f), gy(256);

// A vector kernel with 1 KiB buffers in UB.
void broken(const char* rule, const char* words,
            const std::function<void(TPipe&, In&, Out&, LocalTensor<float>)>& body,
            twin::Config c = config(twin::Kind::kVector)) {
  run_broken(rule, words, c, {in(gx), in(gy)}, [&] {
    TPipe pipe;
    In qi;
    Out qo;
    Tmp tmp;
    pipe.InitBuffer(qi, 2, 1024);
    pipe.InitBuffer(qo, 2, 1024);
    pipe.InitBuffer(tmp, 1024);
    body(pipe, qi, qo, tmp.Get<float>());
  });
}

void mte2_to_v() {
  SetFlag<HardEvent::MTE2_V>(0);
  WaitFlag<HardEvent::MTE2_V>(0);
}

TEST(missing_flag_before_use) {
  broken("hazard", "Adds on pipe V: reads UB address 4096 that was written by pipe MTE2",
         [](TPipe&, In&, Out&, LocalTensor<float> t) {
           DataCopy(t, global(gx), 64);
           Adds(t[64], t, 1.f, 64);
         });
}

TEST(missing_flag_before_store) {
  broken("hazard", "pipe MTE3: reads UB", [](TPipe&, In&, Out&, LocalTensor<float> t) {
    Duplicate(t, 1.f, 64);
    DataCopy(global(gy), t, 64);
  });
}

TEST(missing_flag_before_the_buffer_is_filled_again) {
  broken("hazard", "pipe MTE2: writes UB address 4096 that is read by pipe V",
         [](TPipe&, In&, Out&, LocalTensor<float> t) {
           DataCopy(t, global(gx), 64);
           mte2_to_v();
           Adds(t[64], t, 1.f, 64);
           PipeBarrier<PIPE_MTE2>();
           DataCopy(t, global(gx), 64);
         });
}

TEST(missing_barrier_inside_a_pipe) {
  const auto body = [](TPipe&, In&, Out&, LocalTensor<float> t) {
    Duplicate(t, 1.f, 64);
    Adds(t, t, 1.f, 64);
  };
  broken("hazard", "by pipe V without a barrier", body);
  twin::Config automatic = config(twin::Kind::kVector);
  automatic.auto_barrier = true;  // as the compiler does it by default
  const twin::Report r = twin::launch(automatic, {in(gx), in(gy)}, [&] {
    TPipe pipe;
    Tmp tmp;
    pipe.InitBuffer(tmp, 256);
    Duplicate(tmp.Get<float>(), 1.f, 64);
    Adds(tmp.Get<float>(), tmp.Get<float>(), 1.f, 64);
  });
  expect(r.finding.empty(), r.finding);
}

TEST(scalar_reads_before_the_vector_unit_is_done) {
  broken("hazard", "GetValue on pipe S", [](TPipe&, In&, Out&, LocalTensor<float> t) {
    Duplicate(t, 1.f, 64);
    (void)t.GetValue(0);
  });
}

TEST(flag_set_twice) {
  broken("flag", "MTE2_V 3 is set twice", [](TPipe&, In&, Out&, LocalTensor<float>) {
    SetFlag<HardEvent::MTE2_V>(3);
    SetFlag<HardEvent::MTE2_V>(3);
  });
}

TEST(flag_never_set) {
  broken("flag", "V_MTE3 1 is waited for and was not set",
         [](TPipe&, In&, Out&, LocalTensor<float>) { WaitFlag<HardEvent::V_MTE3>(1); });
  broken(
      "deadlock", "waits for flag V_MTE3 1",
      [](TPipe&, In&, Out&, LocalTensor<float>) { WaitFlag<HardEvent::V_MTE3>(1); },
      config(twin::Kind::kVector, twin::Mode::kRandom));
}

TEST(flag_never_waited_for) {
  broken("flag", "V_S 0 was set and never waited for",
         [](TPipe&, In&, Out&, LocalTensor<float>) { SetFlag<HardEvent::V_S>(0); });
}

TEST(event_ids_run_out) {
  broken("capacity", "all 8 ids", [](TPipe& p, In&, Out&, LocalTensor<float>) {
    for (int i = 0; i < 9; ++i) p.AllocEventID<HardEvent::MTE2_V>();
  });
  broken("flag", "not allocated",
         [](TPipe& p, In&, Out&, LocalTensor<float>) { p.ReleaseEventID<HardEvent::MTE2_V>(2); });
  broken("field", "not in 0..7",
         [](TPipe&, In&, Out&, LocalTensor<float>) { SetFlag<HardEvent::MTE2_V>(8); });
}

TEST(overflow_of_a_buffer) {
  broken("bounds", "past the end of the tensor",
         [](TPipe&, In&, Out&, LocalTensor<float> t) { Duplicate(t[192], 1.f, 65); });
  broken("bounds", "past the end of the tensor",
         [](TPipe&, In&, Out&, LocalTensor<float> t) { DataCopy(t[192], global(gx), 72); });
  broken("bounds", "more elements than the buffer has",
         [](TPipe& p, In&, Out&, LocalTensor<float>) {
           Tmp t;
           p.InitBuffer(t, 64);
           t.Get<float>(17);
         });
}

TEST(overflow_of_global_memory) {
  broken("bounds", "global memory outside of every argument",
         [](TPipe&, In&, Out&, LocalTensor<float> t) {
           GlobalTensor<float> g;
           g.SetGlobalBuffer(gx.data());
           DataCopy(t, g[200], 64);
         });
  broken("bounds", "past the end of the tensor",
         [](TPipe&, In&, Out&, LocalTensor<float> t) { DataCopy(t, global(gx)[200], 64); });
}

TEST(overflow_of_the_unified_buffer) {
  broken("capacity", "UB has 196608 bytes", [](TPipe& p, In&, Out&, LocalTensor<float>) {
    Tmp t;
    p.InitBuffer(t, 192 * 1024);
  });
}

TEST(capacity_of_every_cube_buffer) {
  const auto one = [](auto buffer, uint32_t kib) {
    for (const uint32_t more : {0u, 32u})
      if (more == 0) {
        run_clean(twin::Kind::kCube, {in(gx)}, [&] {
          TPipe pipe;
          auto b = buffer;
          pipe.InitBuffer(b, kib * 1024);
        });
      } else {
        run_broken("capacity", "asked for", config(twin::Kind::kCube), {in(gx)}, [&] {
          TPipe pipe;
          auto b = buffer;
          pipe.InitBuffer(b, kib * 1024 + more);
        });
      }
  };
  one(TBuf<TPosition::A1>(), 512);
  one(TBuf<TPosition::A2>(), 64);
  one(TBuf<TPosition::B2>(), 64);
  one(TBuf<TPosition::CO1>(), 128);
  one(TBuf<TPosition::C2>(), 1);
  one(TBuf<TPosition::C2PIPE2GM>(), 7);
}

TEST(too_many_buffers) {
  broken("capacity", "at most 8 buffers", [](TPipe& p, In&, Out&, LocalTensor<float>) {
    In q;
    p.InitBuffer(q, 9, 32);
  });
  broken("capacity", "at most 64 buffers", [](TPipe& p, In&, Out&, LocalTensor<float>) {
    for (int i = 0; i < 64; ++i) {
      Tmp t;
      p.InitBuffer(t, 32);
    }
  });
}

TEST(misaligned_copy) {
  broken("align", "not whole blocks of 32",
         [](TPipe&, In&, Out&, LocalTensor<float> t) { DataCopy(t, global(gx), 63); });
  broken("align", "not a multiple of 32",
         [](TPipe&, In&, Out&, LocalTensor<float> t) { DataCopy(t[1], global(gx), 64); });
  broken("align", "Adds: UB address",
         [](TPipe&, In&, Out&, LocalTensor<float> t) { Adds(t, t[3], 1.f, 8); });
  broken("align", "odd element",
         [](TPipe&, In&, Out&, LocalTensor<float> t) { t.ReinterpretCast<int4b_t>()[1]; });
}

TEST(wrong_stride_leaves_the_buffer) {
  broken("bounds", "past the end of the tensor", [](TPipe&, In&, Out&, LocalTensor<float> t) {
    Duplicate(t, 1.f, 256);
    PipeBarrier<PIPE_V>();
    Adds(t, t, 1.f, 64, 4, UnaryRepeatParams(1, 1, 8, 9));
  });
}

TEST(wrong_stride_reads_what_nothing_wrote) {
  broken("uninitialised", "nothing has written", [](TPipe&, In&, Out&, LocalTensor<float> t) {
    DataCopy(t, global(gx), DataCopyParams(4, 4, 0, 1));  // rows of 4 blocks, one block apart
    mte2_to_v();
    Adds(t, t, 1.f, 128);
  });
}

TEST(uninitialised_global_memory) {
  std::vector<float> space(64);
  run_broken("uninitialised", "which nothing has written", config(twin::Kind::kVector),
             {out(space), in(gy)}, [&] {
               TPipe pipe;
               Tmp tmp;
               pipe.InitBuffer(tmp, 256);
               LocalTensor<float> t = tmp.Get<float>();
               DataCopy(t, global(space), 64);
               mte2_to_v();
               Adds(t, t, 1.f, 64);
             });
}

TEST(double_free) {
  broken("queue", "after FreeTensor", [](TPipe&, In& q, Out&, LocalTensor<float>) {
    LocalTensor<float> t = q.AllocTensor<float>();
    q.FreeTensor(t);
    q.FreeTensor(t);
  });
}

TEST(use_after_free) {
  broken("queue", "after FreeTensor", [](TPipe&, In& q, Out&, LocalTensor<float>) {
    LocalTensor<float> t = q.AllocTensor<float>();
    q.FreeTensor(t);
    q.AllocTensor<float>();
    DataCopy(t, global(gx), 64);
  });
}

TEST(queue_discipline) {
  broken("queue", "nothing is in the VECIN queue",
         [](TPipe&, In& q, Out&, LocalTensor<float>) { q.DeQue<float>(); });
  broken("queue", "all 2 buffers", [](TPipe&, In& q, Out&, LocalTensor<float>) {
    for (int i = 0; i < 3; ++i) q.AllocTensor<float>();
  });
  broken("queue", "of another queue", [](TPipe&, In& q, Out& o, LocalTensor<float>) {
    LocalTensor<float> t = q.AllocTensor<float>();
    o.EnQue(t);
  });
  broken("queue", "not just allocated", [](TPipe&, In& q, Out&, LocalTensor<float>) {
    LocalTensor<float> t = q.AllocTensor<float>();
    q.EnQue(t);
    q.EnQue(t);
  });
  broken("queue", "still in the queue", [](TPipe&, In& q, Out&, LocalTensor<float>) {
    LocalTensor<float> t = q.AllocTensor<float>();
    q.EnQue(t);
    q.FreeTensor(t);
  });
  broken("queue", "never freed",
         [](TPipe&, In& q, Out&, LocalTensor<float>) { q.AllocTensor<float>(); });
  broken("queue", "its depth", [](TPipe& p, In&, Out&, LocalTensor<float>) {
    TQue<TPosition::VECIN, 1> q;
    p.InitBuffer(q, 2, 32);
    for (int i = 0; i < 2; ++i) {
      LocalTensor<float> t = q.AllocTensor<float>();
      q.EnQue(t);
    }
  });
  broken("queue", "no buffer was given", [](TPipe&, In&, Out&, LocalTensor<float>) {
    DataCopy(LocalTensor<float>(), global(gx), 64);
  });
}

TEST(field_widths) {
  broken("field", "256 is not in 0..255", [](TPipe&, In&, Out&, LocalTensor<float> t) {
    Adds(t, t, 1.f, 64, 256, UnaryRepeatParams());
  });
  broken("field", "4096 is not in 1..4095", [](TPipe&, In&, Out&, LocalTensor<float>) {
    DataCopyParams p;
    p.blockCount = 4096;
  });
  broken("field", "65536 is not in 0..65535", [](TPipe&, In&, Out&, LocalTensor<float>) {
    Nd2NzParams p;
    p.srcNdMatrixStride = 65536;
  });
  broken("field", "-1 is not in", [](TPipe&, In&, Out&, LocalTensor<float>) {
    DataCopyExtParams p;
    p.dstStride = -1;
  });
  broken("field", "mask 65 is not in 1..64", [](TPipe&, In&, Out&, LocalTensor<float> t) {
    Adds(t, t, 1.f, 65, 1, UnaryRepeatParams());
  });
  broken("field", "over no element",
         [](TPipe&, In&, Out&, LocalTensor<float> t) { Adds(t, t, 1.f, 0); });
  broken("field", "flag id 11",
         [](TPipe&, In&, Out&, LocalTensor<float>) { CrossCoreSetFlag<0, PIPE_MTE3>(11); });
}

TEST(types_that_an_instruction_does_not_have) {
  broken("type", "Add does not take int8_t", [](TPipe&, In&, Out&, LocalTensor<float> t) {
    LocalTensor<int8_t> b = t.ReinterpretCast<int8_t>();
    Add(b, b, b, 32);
  });
  broken("type", "And does not take int32_t", [](TPipe&, In&, Out&, LocalTensor<float> t) {
    LocalTensor<int32_t> b = t.ReinterpretCast<int32_t>();
    And(b, b, b, 32);
  });
  broken("type", "WholeReduceMax does not take int32_t",
         [](TPipe&, In&, Out&, LocalTensor<float> t) {
           LocalTensor<int32_t> b = t.ReinterpretCast<int32_t>();
           WholeReduceMax(b, b, 64, 1, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
         });
  broken("type", "Mul does not take bfloat16_t", [](TPipe&, In&, Out&, LocalTensor<float> t) {
    LocalTensor<bfloat16_t> b = t.ReinterpretCast<bfloat16_t>();
    Mul(b, b, b, 32);
  });
  broken("type", "launched as",
         [](TPipe&, In&, Out&, LocalTensor<float>) { CheckKernelType(KERNEL_TYPE_MIX_AIC_1_2); });
}

TEST(integer_overflow) {
  broken("overflow", "does not fit", [](TPipe&, In&, Out&, LocalTensor<float> t) {
    LocalTensor<int16_t> b = t.ReinterpretCast<int16_t>();
    Duplicate(b, int16_t(300), 64);
    PipeBarrier<PIPE_V>();
    Mul(b, b, b, 64);
  });
}

TEST(an_exception_outside_of_a_kernel) {
  bool thrown = false;
  try {
    PipeBarrier<PIPE_V>();
  } catch (const twin::Finding& f) {
    thrown = f.rule == "type";
  }
  expect(thrown, "calls outside of a launch are refused");
}

}  // namespace
}  // namespace twin_tests
