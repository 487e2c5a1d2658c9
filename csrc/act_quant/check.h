// Torch arguments of act_quant -> params, and its launch; shared with what quantises on its way.
#pragma once
#include <optional>

#include "act_quant/params.h"
#include "core/build.h"
#include "core/check.h"
#include "core/stream.h"

namespace tessella::act_quant {

constexpr int64_t kBlock = 128;

inline Params check(const char* op, const Tensor& x, int64_t k8, const std::string& granularity,
                    const std::optional<Tensor>& perm, bool grouped = false) {
  Params p{};
  const int64_t last = grouped ? 2 : 1;
  p.granularity = check_granularity(op, granularity);
  if (x.dim() != last + 1 || x.size(last) == 0 || (grouped && x.size(1) == 0))
    refuse(Arg{op, "x"}, grouped ? "[T, G, K] with G, K >= 1" : "[M, K] with K >= 1", describe(x));
  p.dtype = check_float(Arg{op, "x"}, x.scalar_type());
  if (x.is_cuda() && p.dtype == DType::kF32)
    refuse(Arg{op, "x"}, "bfloat16 or float16 on cuda", describe(x));
  p.M = grouped ? x.size(0) * x.size(1) : x.size(0);
  p.K = x.size(last);
  p.Kp = round_up(p.K, kBlock);
  p.K8 = k8 < 0 ? p.Kp : k8;
  if (p.K8 > p.Kp || p.K8 % kBlock != 0)
    refuse(Arg{op, "k8"}, "a multiple of 128 in 0.." + std::to_string(p.Kp) + ", or -1 for all",
           k8);
  check_one_precision(op, p.granularity, p.K8, p.Kp);
  constexpr int64_t kMostRows = int64_t{1} << 31;  // CUDA counts rows of codes in 32 bits
  if (x.is_cuda() && p.M * (p.Kp / kBlock) >= kMostRows)
    refuse(Arg{op, "x"}, "fewer than 2^31 blocks of 128 channels on cuda", describe(x));
  if (p.K > 1 && x.stride(last) != 1)
    refuse(Arg{op, "x"}, "unit stride along K", "stride " + std::to_string(x.stride(last)));
  p.stride = x.stride(0);
  if (grouped) {
    p.tokens = x.size(0);
    p.group_stride = x.stride(1);
  }
  p.x = x.const_data_ptr();
  if (perm.has_value()) {
    check_tensor(Arg{op, "perm"}, *perm, ScalarType::Int, {p.K}, x);
    p.perm = perm->const_data_ptr<int32_t>();
  }
  return p;
}

// Runs p, whose results have been set, on the device of x.
inline void launch(const char* op, const Params& p, const Tensor& x) {
  if (p.M == 0) return;
  if (!x.is_cuda()) return run_cpu(p);
  if constexpr (kHasCuda) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    check_launch(op, run_cuda(p, current_stream(x.get_device_index())));
  }
}

}  // namespace tessella::act_quant
