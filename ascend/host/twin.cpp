// The kernels on the twin: what they may touch, and the launch.
#include <cstring>

#include "launch.h"
#include "twin/machine.h"

extern "C" void tessella_w4ax_gemm(uint8_t* codes8, uint8_t* codes4, uint8_t* sums, uint8_t* scales,
                                   uint8_t* w, uint8_t* bias, uint8_t* out, uint8_t* workspace,
                                   uint8_t* tiling);
extern "C" void tessella_act_quant(uint8_t* x, uint8_t* codes8, uint8_t* codes4, uint8_t* sums,
                                   uint8_t* scales, uint8_t* perm, uint8_t* tiling);

namespace tessella::ascend {

// The arguments of a launch as buffers of the twin, or as bare address ranges for counting.
class Arguments {
 public:
  explicit Arguments(bool count) : count_(count) {}

  uint8_t* add(const void* data, int64_t bytes, bool initialised) {
    uint8_t* p = static_cast<uint8_t*>(const_cast<void*>(data));
    if (count_) p = twin::fake_address(int64_t(buffers.size()));
    if (bytes > 0) buffers.push_back({p, bytes, initialised, !count_});
    return p;
  }
  uint8_t* plan(std::vector<int32_t>& plan) {
    auto* p = reinterpret_cast<uint8_t*>(plan.data());
    buffers.push_back({p, int64_t(plan.size()) * 4, true, true});
    return p;
  }

  std::vector<twin::Buffer> buffers;

 private:
  bool count_;
};

static std::string run(twin::Kind kind, int32_t cores, const TwinOptions& options,
                       const Arguments& args, std::vector<int64_t>* counts,
                       const std::function<void()>& kernel) {
  twin::Config config;
  config.kind = kind;
  config.blocks = cores;
  config.mode = options.count      ? twin::Mode::kCount
                : options.seed < 0 ? twin::Mode::kStrict
                                   : twin::Mode::kRandom;
  config.seed = options.seed < 0 ? 0 : uint64_t(options.seed);
  const twin::Report report = twin::launch(config, args.buffers, kernel);
  if (counts != nullptr)
    for (const twin::Stats& s : report.cores) {
      counts->insert(counts->end(), s.instructions.begin(), s.instructions.end());
      counts->insert(counts->end(), s.bytes.begin(), s.bytes.end());
      counts->insert(counts->end(), s.cube_fractals.begin(), s.cube_fractals.end());
      counts->push_back(s.vector_repeats);
      counts->push_back(s.cross_core_waits);
    }
  return report.finding;
}

std::string twin_gemm(const GemmCall& call, const TwinOptions& options,
                      std::vector<int64_t>* counts) {
  const GemmProblem& p = call.problem;
  std::vector<int32_t> plan = plan_gemm(p);
  GemmTiling t;
  std::memcpy(&t, plan.data(), sizeof t);
  const int64_t scale_rows = p.per_block ? t.blocks : p.scale_row + 1;
  std::vector<uint8_t> workspace(options.count ? 0 : size_t(t.workspace) * 512);
  Arguments a(options.count);
  uint8_t* codes8 = a.add(call.codes8, p.int8 ? p.M * p.Kp : 0, true);
  uint8_t* codes4 = a.add(call.codes4, p.int8 ? 0 : p.M * p.Kp / 2, true);
  uint8_t* sums = a.add(call.sums, t.blocks * p.M * 4, true);
  uint8_t* scales = a.add(call.scales, scale_rows * p.M * 4, true);
  uint8_t* w = a.add(call.w, (p.N + 63) / 64 * t.panel_bytes, true);
  uint8_t* bias = a.add(call.bias, p.has_bias ? p.N * 2 : 0, true);
  uint8_t* out = a.add(call.out, p.M * p.N * 2, false);
  uint8_t* space = a.add(workspace.data(), int64_t(t.workspace) * 512, false);
  uint8_t* tiling = a.plan(plan);
  return run(twin::Kind::kMix, t.cores, options, a, counts, [=] {
    tessella_w4ax_gemm(codes8, codes4, sums, scales, w, bias, out, space, tiling);
  });
}

std::string twin_quant(const QuantCall& call, const TwinOptions& options,
                       std::vector<int64_t>* counts) {
  const QuantProblem& p = call.problem;
  std::vector<int32_t> plan = plan_quant(p);
  QuantTiling t;
  std::memcpy(&t, plan.data(), sizeof t);
  Arguments a(options.count);
  uint8_t* x = a.add(call.x, ((p.M - 1) * p.stride + p.K) * 2, true);
  uint8_t* codes8 = a.add(call.codes8, t.blocks8 * p.M * 128, false);
  uint8_t* codes4 = a.add(call.codes4, (t.blocks - t.blocks8) * p.M * 64, false);
  uint8_t* sums = a.add(call.sums, t.blocks * p.M * 4, false);
  uint8_t* scales = a.add(call.scales, p.scale_rows * p.M * 4, false);
  uint8_t* perm = a.add(call.perm, p.has_perm ? p.K * 4 : 0, true);
  uint8_t* tiling = a.plan(plan);
  return run(twin::Kind::kVector, t.cores, options, a, counts,
             [=] { tessella_act_quant(x, codes8, codes4, sums, scales, perm, tiling); });
}

}  // namespace tessella::ascend
