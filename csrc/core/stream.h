// The one place that knows that CUDA may be absent: the current stream, and launch errors.
//
// libtorch's CUDA shims are declared weak: on a CPU-only torch they stay null and this library
// still loads; on a CUDA torch they resolve through libtorch.so.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace tessella {

// PyTorch's current stream of this CUDA device, as a cudaStream_t.
inline void* current_stream(int32_t device) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr)
    throw std::runtime_error("tessella: a CUDA tensor, but this torch was built without CUDA");
  if (aoti_torch_get_current_cuda_stream(device, &stream) != 0)
    throw std::runtime_error("tessella: torch gave no current stream for CUDA device " +
                             std::to_string(device));
  return stream;
}

inline void check_launch(const char* op, int cuda_error) {
  if (cuda_error != 0)
    throw std::runtime_error(std::string("tessella::") + op + ": launch failed, CUDA error " +
                             std::to_string(cuda_error));
}

}  // namespace tessella
