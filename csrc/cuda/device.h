// What the planner wants to know about a GPU; asked once per device.
#pragma once
#include <cuda_runtime.h>

#include <array>

#include "core/tuned.h"

namespace tessella::cuda {

struct Device {
  int sms = 0;
  int arch = 0;       // 10 * major + minor
  uint64_t name = 0;  // tuned_name
};

// The current device.
inline const Device& this_device() {
  constexpr int kMost = 64;
  static const std::array<Device, kMost> devices = [] {
    std::array<Device, kMost> all{};
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
    for (int i = 0; i < count && i < kMost; ++i) {
      int major = 0, minor = 0;
      cudaDeviceGetAttribute(&all[i].sms, cudaDevAttrMultiProcessorCount, i);
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i);
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, i);
      all[i].arch = 10 * major + minor;
      cudaDeviceProp properties;
      if (cudaGetDeviceProperties(&properties, i) == cudaSuccess)
        all[i].name = tuned_name(properties.name);
    }
    return all;
  }();
  int i = 0;
  cudaGetDevice(&i);
  return devices[size_t(i) % kMost];
}

}  // namespace tessella::cuda
