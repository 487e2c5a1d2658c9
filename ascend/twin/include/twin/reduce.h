// Reductions: of a repeat, of each block of 32 bytes, of pairs, of a whole tensor. Sums are added
// as a tree of pairs, each sum rounded to the type.
#pragma once
#include "twin/vector.h"

namespace twin {

template <class T>
T tree_sum(std::vector<T> x) {
  while (x.size() > 1) {
    std::vector<T> next;
    for (size_t i = 0; i + 1 < x.size(); i += 2) next.push_back(T(float(x[i]) + float(x[i + 1])));
    if (x.size() % 2) next.push_back(x.back());
    x = std::move(next);
  }
  return x.empty() ? T(0.f) : x[0];
}

template <class T>
size_t best_of(const std::vector<T>& x, bool largest) {
  size_t best = 0;
  for (size_t i = 1; i < x.size(); ++i)
    if (largest ? float(x[i]) > float(x[best]) : float(x[i]) < float(x[best])) best = i;
  return best;
}

// Calls f(op, repeat, its active elements).
template <class T, class F>
void reduce_repeats(const char* name, const Operand<T>& src, const Lanes& l, F f) {
  float_type<T>(name);
  const Operand<T> x = checked(src, name);
  count_vector(l);
  core().issue(kV, name, [=](Op& op) {
    T in[256];
    for (int64_t r = 0; r < l.repeats; ++r) {
      load_lanes(op, x, r, l, in);
      std::vector<T> active;
      for (int64_t i = 0; i < l.per_repeat; ++i)
        if (l.of(r)[size_t(i)]) active.push_back(in[i]);
      f(op, r, active);
    }
  });
}

template <class T>
void whole_best(const char* name, const AscendC::LocalTensor<T>& d, const Operand<T>& x,
                const Lanes& l, int64_t dst_rep, AscendC::ReduceOrder order, bool largest) {
  const Ref to = d.ref();
  aligned(to, int64_t(sizeof(T)), name);
  reduce_repeats<T>(name, x, l, [=](Op& op, int64_t r, const std::vector<T>& v) {
    using O = AscendC::ReduceOrder;
    const size_t best = best_of(v, largest);
    const int64_t size = int64_t(sizeof(T));
    const bool both = order == O::ORDER_VALUE_INDEX || order == O::ORDER_INDEX_VALUE;
    const Ref at = to + r * dst_rep * size * (both ? 2 : 1);
    T index;
    std::memset(&index, 0, sizeof(T));
    std::memcpy(&index, &best, sizeof(T));  // the bits of an unsigned integer
    if (order == O::ORDER_ONLY_VALUE) return store_one<T>(op, at, v[best]);
    if (order == O::ORDER_ONLY_INDEX) return store_one<T>(op, at, index);
    store_one<T>(op, at, order == O::ORDER_VALUE_INDEX ? v[best] : index);
    store_one<T>(op, at + size, order == O::ORDER_VALUE_INDEX ? index : v[best]);
  });
}

template <class T, class F>
void block_reduce(const char* name, const AscendC::LocalTensor<T>& d, const Operand<T>& x,
                  const Lanes& l, int64_t dst_rep, int64_t group, F f) {
  const Ref to = d.ref();
  aligned(to, int64_t(sizeof(T)), name);
  const int64_t results = l.per_repeat / group, size = int64_t(sizeof(T));
  reduce_repeats<T>(name, x, l, [=](Op& op, int64_t r, const std::vector<T>& v) {
    for (int64_t i = 0; i < results && i * group < int64_t(v.size()); ++i) {
      const auto from = v.begin() + i * group;
      const auto end = v.begin() + std::min<int64_t>(int64_t(v.size()), (i + 1) * group);
      store_one<T>(op, to + (r * dst_rep * results + i) * size, f(std::vector<T>(from, end)));
    }
  });
}

template <class T, class F>
void reduce_all(const char* name, const AscendC::LocalTensor<T>& d,
                const AscendC::LocalTensor<T>& x, const AscendC::LocalTensor<T>& work,
                int64_t count, F f) {
  const Ref to = d.ref(), scratch = work.ref();
  aligned(scratch, 32, name);
  const Lanes l = count_lanes(count, lanes_of(kBits<T>));
  const Operand<T> from = checked(contiguous(x, l.per_repeat), name);
  float_type<T>(name);
  count_vector(l);
  core().issue(kV, name, [=](Op& op) {
    op.write(scratch, std::min<int64_t>(int64_t(scratch.end - scratch.addr), l.repeats * 32));
    std::vector<T> all, some;
    for (int64_t r = 0; r < l.repeats; ++r) {
      T in[256];
      load_lanes(op, from, r, l, in);
      some.assign(in, in + l.of(r).count());
      all.insert(all.end(), some.begin(), some.end());
    }
    store_one<T>(op, to, f(all));
  });
}

}  // namespace twin

namespace AscendC {

template <class T>
void WholeReduceMax(const LocalTensor<T>& d, const LocalTensor<T>& x, int32_t mask,
                    twin::U8 repeats, twin::U16 dst_rep, twin::U16 src_blk, twin::U8 src_rep,
                    ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX) {
  twin::whole_best<T>("WholeReduceMax", d, {x.ref(), src_blk, src_rep},
                      twin::lanes_for<T>(uint64_t(mask), repeats), dst_rep, order, true);
}

template <class T>
void WholeReduceMin(const LocalTensor<T>& d, const LocalTensor<T>& x, int32_t mask,
                    twin::U8 repeats, twin::U16 dst_rep, twin::U16 src_blk, twin::U8 src_rep,
                    ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX) {
  twin::whole_best<T>("WholeReduceMin", d, {x.ref(), src_blk, src_rep},
                      twin::lanes_for<T>(uint64_t(mask), repeats), dst_rep, order, false);
}

template <class T>
void WholeReduceSum(const LocalTensor<T>& d, const LocalTensor<T>& x, int32_t mask,
                    twin::U8 repeats, twin::U16 dst_rep, twin::U16 src_blk, twin::U8 src_rep) {
  const twin::Ref to = d.ref();
  const int64_t step = dst_rep * int64_t(sizeof(T));
  twin::reduce_repeats<T>("WholeReduceSum", {x.ref(), src_blk, src_rep},
                          twin::lanes_for<T>(uint64_t(mask), repeats),
                          [=](twin::Op& op, int64_t r, const std::vector<T>& v) {
                            twin::store_one<T>(op, to + r * step, twin::tree_sum(v));
                          });
}

template <class T>
void BlockReduceMax(const LocalTensor<T>& d, const LocalTensor<T>& x, twin::U8 repeats,
                    int32_t mask, twin::U16 dst_rep, twin::U16 src_blk, twin::U8 src_rep) {
  twin::block_reduce<T>("BlockReduceMax", d, {x.ref(), src_blk, src_rep},
                        twin::lanes_for<T>(uint64_t(mask), repeats), dst_rep, 32 / sizeof(T),
                        [](const std::vector<T>& v) { return v[twin::best_of(v, true)]; });
}

template <class T>
void BlockReduceSum(const LocalTensor<T>& d, const LocalTensor<T>& x, twin::U8 repeats,
                    int32_t mask, twin::U16 dst_rep, twin::U16 src_blk, twin::U8 src_rep) {
  twin::block_reduce<T>("BlockReduceSum", d, {x.ref(), src_blk, src_rep},
                        twin::lanes_for<T>(uint64_t(mask), repeats), dst_rep, 32 / sizeof(T),
                        [](const std::vector<T>& v) { return twin::tree_sum(v); });
}

template <class T>
void PairReduceSum(const LocalTensor<T>& d, const LocalTensor<T>& x, twin::U8 repeats, int32_t mask,
                   twin::U16 dst_rep, twin::U16 src_blk, twin::U8 src_rep) {
  twin::block_reduce<T>("PairReduceSum", d, {x.ref(), src_blk, src_rep},
                        twin::lanes_for<T>(uint64_t(mask), repeats), dst_rep, 2,
                        [](const std::vector<T>& v) { return twin::tree_sum(v); });
}

template <class T>
void ReduceMax(const LocalTensor<T>& d, const LocalTensor<T>& x, const LocalTensor<T>& work,
               int32_t count, bool index = false) {
  if (index) throw twin::Finding("field", "ReduceMax: the index is not emulated");
  twin::reduce_all("ReduceMax", d, x, work, count,
                   [](const std::vector<T>& v) { return v[twin::best_of(v, true)]; });
}

template <class T>
void ReduceSum(const LocalTensor<T>& d, const LocalTensor<T>& x, const LocalTensor<T>& work,
               int32_t count) {
  twin::reduce_all("ReduceSum", d, x, work, count,
                   [](const std::vector<T>& v) { return twin::tree_sum(v); });
}

}  // namespace AscendC
