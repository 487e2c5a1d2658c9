// w4ax_gemm on CUDA: which body runs, and packing into its fragments.
//
// Packing moves whole words: a thread gathers the 8 codes of one 32-bit word, or scatters them.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "core/env.h"
#include "core/tuned.h"
#include "cuda/device.h"
#include "w4ax_gemm/kernels.h"
#include "w4ax_gemm/params.h"
#include "w4ax_gemm/plan_sm90.h"
#include "w4ax_gemm/sm80.cuh"

namespace tessella::w4ax_gemm {

using layout::W4Frag;

// A named Hopper body; 0 tokens for none.
struct Named {
  Sm90Size size;
  bool stream;
};
static Named hopper_body(const std::string& name) {
  const std::string family = "w4ax_gemm.sm90.";
  if (name.compare(0, family.size(), family) != 0) return {};
  return {sm90_size(name.substr(family.size() + 1)), name[family.size()] == 's'};
}

// Whole INT8 tokens, and weight groups no smaller than the 128 channels of an integer sum.
static bool hopper_takes(const Params& p) {
  return kHasSm90 && cuda::this_device().arch == 90 && p.K8 == p.panel.Kp &&
         p.granularity != Granularity::kBlock && p.panel.G == 128 && p.panel.N <= 1 << 30 &&
         p.M <= 1 << 30 && reinterpret_cast<uintptr_t>(p.w) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(p.x8) % 16 == 0;
}

// What was measured to be best for this problem, else what the planner says.
static Sm90Plan choose(const GpuProblem& problem) {
  constexpr uint64_t kFamily = tuned_name("w4ax_gemm");
  constexpr uint64_t kSchemes[] = {tuned_name("channel"), tuned_name("g128"),
                                   tuned_name("twolevel")};  // as Scheme counts them
  const TunedChoice* choice =
      tuned({cuda::this_device().name, kFamily, kSchemes[int(problem.scheme)], problem.N,
             problem.Kp, tuned_tokens(problem.M)});
  if (choice == nullptr) return plan_sm90(problem);
  const Named body = hopper_body(choice->kernel);
  const int split = choice->split;
  const bool known = body.size.tokens > 0;
  const Sm90Cut cut{body.size, split, false, body.stream};
  const Sm90Plan plan = known ? plan_sm90_with(problem, cut) : Sm90Plan{};
  if (plan.stages == 0)
    throw std::runtime_error(choice->source + ": '" + choice->kernel + "' with split " +
                             std::to_string(split) + " cannot run M=" + std::to_string(problem.M) +
                             " N=" + std::to_string(problem.N) +
                             " K=" + std::to_string(problem.Kp) +
                             "; `tessella tune` makes the table anew, TESSELLA_TUNE=0 ignores it");
  return plan;
}

int run_cuda(const Params& p, const Scratch& scratch, void* stream) {
  if (!env().error.empty()) throw std::runtime_error(env().error);
  const std::string forced = env().force.empty() ? "" : forced_kernel("w4ax_gemm");
  const Named body = hopper_body(forced);
  const bool plain = forced == "w4ax_gemm.sm80.plain";
  if (!plain && hopper_takes(p)) {
    const GpuProblem problem{p.M, p.panel.N, p.panel.Kp, p.panel.scheme, cuda::this_device().sms};
    const Sm90Plan plan = body.stream ? plan_sm90_with(problem, {body.size, 1, false, true})
                          : body.size.tokens > 0 ? plan_sm90(problem, body.size)
                                                 : choose(problem);
    if (plan.stages > 0) {
      if (env().log_plan) log_plan(to_string(problem, plan));
      const int64_t bytes = plan.scratch_bytes(Sm90Tile{plan.size, problem.scheme});
      void* const memory = bytes > 0 ? scratch(bytes) : nullptr;
      if constexpr (kHasSm90) return run_sm90(p, plan, env().programmatic, memory, stream);
    }
  }
  if (body.size.tokens > 0)
    throw std::runtime_error("TESSELLA_FORCE: '" + forced + "' cannot run this problem or GPU");
  if (cuda::this_device().arch < 80)
    throw std::runtime_error("tessella::w4ax_gemm: needs a GPU of compute capability 8.0 or later");
  sm80::run(p, static_cast<cudaStream_t>(stream));
  return int(cudaGetLastError());
}

int run_probe(const Params& p, bool wide, void* stream) {
  if (!env().error.empty()) throw std::runtime_error(env().error);
  if (!hopper_takes(p))
    throw std::runtime_error(
        "tessella::_w4ax_gemm_probe: needs a build with sm_90a, a GPU of compute capability 9.0, "
        "and activations that are all INT8");
  const std::string forced = env().force.empty() ? "" : forced_kernel("w4ax_gemm");
  const Named body = hopper_body(forced);
  const GpuProblem problem{p.M, p.panel.N, p.panel.Kp, p.panel.scheme, cuda::this_device().sms,
                           wide};
  const bool known = forced.empty() || (body.size.tokens > 0 && !body.stream);
  const Sm90Plan plan = known ? plan_sm90_probe(problem, body.size) : Sm90Plan{};
  if (plan.stages == 0)
    throw std::runtime_error("TESSELLA_FORCE: '" + forced + "' has no body for widened weights");
  if (env().log_plan) log_plan(to_string(problem, plan));
  if constexpr (kHasSm90) return run_sm90(p, plan, env().programmatic, nullptr, stream);
  return 0;
}

// --- packing

constexpr int kThreads = 256;

// Calls f(n, g) for the first padded feature n and each of its groups (channel: g = 0 only).
__device__ inline int64_t groups_of(const W4Frag& w) {
  return w.scheme == Scheme::kChannel ? 1 : w.Kp / w.G;
}

// Feature n's scales and zeros, between tensors and panels. Past N they are 0.
template <bool kPack>
__device__ void move_scales(const Canonical& c, const W4Frag& w, uint8_t* blob, int64_t n,
                            int64_t g) {
  const bool there = n < w.N, two = w.scheme == Scheme::kTwoLevel;
  const int64_t i = n * groups_of(w) + g;
  auto move = [&](auto* packed, auto* canonical) {
    using V = std::remove_reference_t<decltype(*packed)>;
    if (kPack)
      *packed = there ? *canonical : V{};
    else if (there)
      *canonical = *packed;
  };
  if (w.scheme != Scheme::kGroup && g == 0)
    move(reinterpret_cast<float*>(blob + w.channel_scale(n)), c.channel_scales + n);
  if (w.scheme == Scheme::kChannel) return move(blob + w.channel_zero(n), c.zeros + n);
  uint8_t* scale = blob + w.group_scale(n, g);
  if (two)
    move(scale, static_cast<uint8_t*>(c.group_scales) + i);
  else
    move(reinterpret_cast<uint16_t*>(scale), static_cast<uint16_t*>(c.group_scales) + i);
  move(blob + w.group_zero(n, g), c.zeros + i);
}

// A word of the panels: 4 codes from channel k in the low nibbles, 4 from k + 16 in the high ones.
template <bool kPack>
__device__ void move_codes(const Canonical& c, const W4Frag& w, uint8_t* blob, int64_t n,
                           int64_t i) {
  const int64_t k = i / 4 * 32 + i % 4 * 4;
  auto* word = reinterpret_cast<uint32_t*>(blob + w.code(n, k).byte);
  auto* codes = reinterpret_cast<uint16_t*>(c.codes + (n * w.Kp + k) / 2);
  uint32_t bytes = kPack ? 0 : *word, low = 0, high = 0;
  if (kPack && n < w.N) low = codes[0], high = codes[8 / sizeof(uint16_t)];
  for (int b = 0; b < 4; ++b) {
    if (kPack) {
      bytes |= (low >> 4 * b & 15) << 8 * b | (high >> 4 * b & 15) << (8 * b + 4);
    } else {
      low |= (bytes >> 8 * b & 15) << 4 * b;
      high |= (bytes >> (8 * b + 4) & 15) << 4 * b;
    }
  }
  if (kPack)
    *word = bytes;
  else if (n < w.N)
    codes[0] = uint16_t(low), codes[8 / sizeof(uint16_t)] = uint16_t(high);
}

template <bool kPack>
__global__ void move_panels(const Canonical c, const layout::W4Panel panel, uint8_t* blob) {
  const W4Frag w(panel);
  const int64_t words = w.Kp / 8, groups = groups_of(w), each = words + groups;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= w.panels() * W4Frag::kN * each) return;
  const int64_t n = i / each, in = i % each;
  if (in < words)
    move_codes<kPack>(c, w, blob, n, in);
  else
    move_scales<kPack>(c, w, blob, n, in - words);
}

template <bool kPack>
static int launch_move(const Canonical& c, const layout::W4Panel& panel, uint8_t* blob,
                       void* stream) {
  const int64_t groups = panel.scheme == Scheme::kChannel ? 1 : panel.Kp / panel.G;
  const int64_t work = panel.panels() * W4Frag::kN * (panel.Kp / 8 + groups);
  const unsigned blocks = unsigned(ceil_div(work, kThreads));
  move_panels<kPack><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(c, panel, blob);
  return int(cudaGetLastError());
}

int pack_cuda(const Canonical& c, const layout::W4Panel& panel, uint8_t* out, void* stream) {
  return launch_move<true>(c, panel, out, stream);
}
int unpack_cuda(const uint8_t* w, const layout::W4Panel& panel, const Canonical& c, void* stream) {
  return launch_move<false>(c, panel, const_cast<uint8_t*>(w), stream);
}

}  // namespace tessella::w4ax_gemm
