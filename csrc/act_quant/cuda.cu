// act_quant and its fused producers on CUDA: which kernel a problem takes, and how it is launched.
#include <stdexcept>

#include "act_quant/sm80.cuh"
#include "core/env.h"
#include "cuda/device.h"

namespace tessella::act_quant {

constexpr int64_t kSms = 132;

// How a token is spread: over 2^parts_log2 thread blocks of `threads`, `held` vectors a thread.
struct Shape {
  int parts_log2, threads, held;
};

// The thread blocks of a token, as a power of two: several where one of a vector a thread is too
// much for a thread block, so that few tokens finish soonest.
static int parts_log2_of(const Params& p, int64_t vectors) {
  if (p.source == Source::kRmsNorm && vectors <= 1024) return vectors > 512 && p.M <= 16 ? 2 : 0;
  const bool gate = p.source == Source::kSiluMul;
  const int64_t few = gate ? 256 : 1024, most = p.source == Source::kPlain ? kSms / 2 : kSms;
  int log2 = 0;
  while (vectors > few && 2 << log2 <= kMostParts && (p.M << log2) <= most &&
         vectors >= int64_t{256} << log2)
    ++log2;
  return log2;
}

// Few tokens: one vector a thread. Many: more vectors a thread, down to where about 16 warps on
// each multiprocessor are left.
static Shape shape_of(const Params& p, bool clusters) {
  const int64_t vectors = p.Kp / kVec;
  const int log2 = clusters ? parts_log2_of(p, vectors) : 0;
  const int64_t parts = int64_t{1} << log2;
  const int64_t each = ceil_div(vectors, parts);
  const int64_t most = p.source == Source::kPlain ? 4 : p.source == Source::kSiluMul ? 2 : 1;
  int threads = int(round_up(each, 32));
  const bool halved = p.source == Source::kSiluMul
                          ? each <= 1024
                          : p.source == Source::kRmsNorm && p.M > kSms && p.M <= 4 * kSms;
  while (threads > kMostThreads || (halved && threads > 256 && each <= 1024) ||
         (threads > 64 && each <= most * threads && p.M * parts * threads > kSms * 1024))
    threads = int(round_up(threads / 2, 32));
  const int64_t held = ceil_div(each, threads);
  return {log2, threads, int(held == 3 ? 4 : held > 4 ? 8 : held)};
}

// Whether all operands can be read as whole, aligned vectors of 16 bytes.
static bool whole_vectors(const Params& p) {
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  return p.perm == nullptr && p.K % kVec == 0 && aligned(p.x) && aligned(p.other) &&
         (p.M == 1 || (p.stride % kVec == 0 && p.other_stride % kVec == 0)) && aligned(p.weight) &&
         aligned(p.h) && aligned(p.y) && p.Kp / kBlock <= kMostHeldBlocks;
}

template <class T, Source kSource, Kind kKind>
static int launch_held(const Params& p, const Extent& e, int held_vectors, const cuda::Launch& l) {
  switch (held_vectors) {
    case 1:
      return cuda::launch(l, held<T, kSource, 1, kKind>, p, e);
    case 2:
      return cuda::launch(l, held<T, kSource, 2, kKind>, p, e);
    case 4:
      return cuda::launch(l, held<T, kSource, 4, kKind>, p, e);
    default:
      return cuda::launch(l, held<T, kSource, 8, kKind>, p, e);
  }
}

template <class T, Source kSource>
static int launch_source(const Params& p, cuda::Launch l) {
  const bool hopper = cuda::this_device().arch >= 90;
  l.programmatic = hopper && env().programmatic;
  Extent e{.parts_log2 = 0,
           .vectors = uint32_t(p.K / kVec),
           .blocks = uint32_t(p.Kp / kBlock),
           .blocks8 = uint32_t(p.K8 / kBlock),
           .share = 1.f / float(p.K),
           .fetch_ahead = false};
  if (!whole_vectors(p)) {
    const int64_t wanted = round_up(p.Kp / kVec, 32);
    l.grid = dim3(unsigned(p.M));
    l.threads = unsigned(wanted < kMostThreads ? wanted : kMostThreads);
    l.smem = kSource == Source::kRmsNorm ? size_t(p.Kp / kBlock) * sizeof(float) : 0;
    return cuda::launch(l, reread<T, kSource>, p, e);
  }
  const Shape s = shape_of(p, hopper);
  const bool alone = kSource != Source::kRmsNorm && p.granularity == Granularity::kBlock;
  e.parts_log2 = s.parts_log2;
  e.fetch_ahead = p.other != nullptr && p.M <= kSms;
  l.grid = dim3(unsigned(p.M) << s.parts_log2);
  l.threads = unsigned(s.threads);
  l.cluster = alone ? 1u : 1u << s.parts_log2;
  if (p.K8 < p.Kp || p.granularity == Granularity::kBlock)
    return launch_held<T, kSource, Kind::kAny>(p, e, s.held, l);
  if (s.parts_log2 > 0) return launch_held<T, kSource, Kind::kPure>(p, e, s.held, l);
  return launch_held<T, kSource, Kind::kAlone>(p, e, s.held, l);
}

template <class T>
static int launch_type(const Params& p, const cuda::Launch& l) {
  if (p.source == Source::kRmsNorm) return launch_source<T, Source::kRmsNorm>(p, l);
  if (p.source == Source::kSiluMul) return launch_source<T, Source::kSiluMul>(p, l);
  return launch_source<T, Source::kPlain>(p, l);
}

int run_cuda(const Params& p, void* stream) {
  if (!env().error.empty()) throw std::runtime_error(env().error);
  cuda::Launch l{};
  l.stream = static_cast<cudaStream_t>(stream);
  return p.dtype == DType::kBF16 ? launch_type<__nv_bfloat16>(p, l) : launch_type<__half>(p, l);
}

}  // namespace tessella::act_quant
