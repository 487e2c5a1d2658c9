// A test is a function with a name; it throws when something is wrong.
#pragma once
#include <cmath>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel_operator.h"

namespace twin_tests {

using namespace AscendC;

struct Test {
  const char* name;
  void (*run)();
};
std::vector<Test>& tests();

struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

[[noreturn]] inline void complain(const std::string& what) { throw std::runtime_error(what); }

inline void expect(bool ok, const std::string& what) {
  if (!ok) complain(what);
}

template <class T>
std::string show(T x) {
  return std::to_string(double(float(x)));
}

// Equal, or both NaN.
template <class T>
void expect_equal(const std::vector<T>& got, const std::vector<T>& want, const std::string& what) {
  expect(got.size() == want.size(), what + ": another number of elements");
  for (size_t i = 0; i < got.size(); ++i)
    if (std::memcmp(&got[i], &want[i], sizeof(T)) != 0)
      complain(what + ": element " + std::to_string(i) + " is " + show(got[i]) + ", expected " +
               show(want[i]));
}

template <class T>
twin::Buffer in(std::vector<T>& v) {
  return {reinterpret_cast<uint8_t*>(v.data()), int64_t(v.size() * sizeof(T)), true};
}
template <class T>
twin::Buffer out(std::vector<T>& v) {
  return {reinterpret_cast<uint8_t*>(v.data()), int64_t(v.size() * sizeof(T)), false};
}

template <class T>
GlobalTensor<T> global(std::vector<T>& v) {
  GlobalTensor<T> t;
  t.SetGlobalBuffer(v.data(), v.size());
  return t;
}

inline twin::Config config(twin::Kind kind, twin::Mode mode = twin::Mode::kStrict,
                           uint64_t seed = 0) {
  twin::Config c;
  c.kind = kind;
  c.mode = mode;
  c.seed = seed;
  return c;
}

// Runs in strict and in several random orders; nothing may be found.
inline void run_clean(twin::Kind kind, const std::vector<twin::Buffer>& buffers,
                      const std::function<void()>& kernel, int blocks = 1) {
  for (int seed = -1; seed < 4; ++seed) {
    twin::Config c = config(kind, seed < 0 ? twin::Mode::kStrict : twin::Mode::kRandom,
                            uint64_t(seed < 0 ? 0 : seed));
    c.blocks = blocks;
    const twin::Report r = twin::launch(c, buffers, kernel);
    expect(r.finding.empty(), "unexpected finding: " + r.finding);
  }
}

// Runs in strict order (or in this one) and must find this rule broken, in these words.
inline void run_broken(const std::string& rule, const std::string& words, twin::Config c,
                       const std::vector<twin::Buffer>& buffers,
                       const std::function<void()>& kernel) {
  const twin::Report r = twin::launch(c, buffers, kernel);
  expect(!r.finding.empty(), "expected a finding of rule " + rule);
  expect(r.rule == rule, "expected rule " + rule + ", got: " + r.finding);
  expect(r.finding.find(words) != std::string::npos, "expected '" + words + "' in: " + r.finding);
}

// UB to and from global memory through flags, around one vector body.
template <class A, class D, class F>
std::vector<D> through_ub(const std::vector<A>& a, size_t results, F body) {
  std::vector<A> x = a;
  std::vector<D> y(results);
  run_clean(twin::Kind::kVector, {in(x), out(y)}, [&] {
    TPipe pipe;
    TQue<TPosition::VECIN, 1> qi;
    TQue<TPosition::VECOUT, 1> qo;
    TBuf<TPosition::VECCALC> tmp;
    pipe.InitBuffer(qi, 1, uint32_t((x.size() * sizeof(A) + 31) / 32 * 32));
    pipe.InitBuffer(qo, 1, uint32_t((results * sizeof(D) + 31) / 32 * 32));
    pipe.InitBuffer(tmp, 16384);
    LocalTensor<A> i = qi.AllocTensor<A>();
    DataCopyPadExtParams<A> pad;
    DataCopyPad(i, global(x), DataCopyExtParams(1, int64_t(x.size() * sizeof(A)), 0, 0, 0), pad);
    qi.EnQue(i);
    i = qi.DeQue<A>();
    LocalTensor<D> o = qo.AllocTensor<D>();
    body(o, i, tmp);
    qo.EnQue(o);
    o = qo.DeQue<D>();
    DataCopyPad(global(y), o, DataCopyExtParams(1, int64_t(results * sizeof(D)), 0, 0, 0));
    qi.FreeTensor(i);
    qo.FreeTensor(o);
  });
  return y;
}

inline uint32_t scramble(uint32_t i) { return i * 2654435761u >> 7; }

template <class T>
std::vector<T> numbers(size_t n, int low, int high) {
  std::vector<T> v;
  for (size_t i = 0; i < n; ++i)
    v.push_back(T(float(low + int(scramble(uint32_t(i) + 1) % uint32_t(high - low + 1)))));
  return v;
}

}  // namespace twin_tests

#define TEST(NAME)                                                   \
  static void NAME();                                                \
  static const twin_tests::Register NAME##_registered(#NAME, &NAME); \
  static void NAME()
