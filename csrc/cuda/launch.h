// Where and how CUDA kernels are launched.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "common.h"

namespace fastgen {

constexpr int threads = 256;  // a block

extern const char* const build;  // in module.cpp: what this library was built with and for

// Makes x's device current while it lives, and knows the stream that PyTorch uses there.
class Launch {
 public:
  explicit Launch(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    FASTGEN_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) == TORCH_SUCCESS,
                  "no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

  // Enough blocks for one thread an item.
  static unsigned blocks(int64_t items) {
    const int64_t count = ceil_div(items, threads);
    FASTGEN_CHECK(count <= 0x7fffffff, "tensor too large for one launch: ", items, " items");
    return static_cast<unsigned>(count);
  }

  static void check(const char* op) {
    const cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) return;
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    FASTGEN_CHECK(false, op, ": CUDA kernel not launched: ", cudaGetErrorString(error), " (cuda:", device,
                  " has compute capability ", major, ".", minor, "; the library is built for ", build, ")");
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace fastgen
