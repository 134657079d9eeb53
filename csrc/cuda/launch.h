// Where and how CUDA kernels are launched, and what they share.
#pragma once
#ifdef FASTGEN_CUDA_HOST
#include "host.h"
#else
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "common.h"
#endif

#include <exception>

// FASTGEN_KERNELS(m) { FASTGEN_OP(m, "bias_act", bias_act_cuda); ... } lists the kernels of a file. Loading
// the library does not register them: Python does, once it knows that they run on the devices that there are.
#define FASTGEN_OP(m, name, function)                      \
  {                                                        \
    struct Name {                                          \
      static const char* text() { return name; }           \
    };                                                     \
    m.impl(name, TORCH_BOX((&Op<Name, &function>::call))); \
  }
#define FASTGEN_KERNELS(m)                                             \
  static void add_kernels(torch::stable::detail::StableLibrary& m);    \
  static const bool listed = (kernels().push_back(add_kernels), true); \
  static void add_kernels(torch::stable::detail::StableLibrary& m)

namespace fastgen {

constexpr int threads = 256;  // a block
// So many blocks keep any GPU busy; on the CPU tests are to see what is done where there are more.
#ifdef FASTGEN_CUDA_HOST
constexpr int64_t busy = 1;
#else
constexpr int64_t busy = 512;
#endif

// In module.cpp: what this library was built with and for, and what it has.
extern const char* const build;
std::vector<void (*)(torch::stable::detail::StableLibrary&)>& kernels();

// An op on x's device, which is current while this lives, and on the stream that PyTorch uses there.
class Launch {
 public:
#ifdef FASTGEN_CUDA_HOST
  Launch(const char* op, const Tensor&) : op_(op) {}
#else
  Launch(const char* op, const Tensor& x) : op_(op), guard_(x.get_device_index()) {
    void* stream = nullptr;
    FASTGEN_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) == TORCH_SUCCESS, op,
                  ": no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }
#endif

  const char* op() const { return op_; }

  Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type,
               MemoryFormat format = MemoryFormat::Contiguous) const {
    return torch::stable::empty(shape, type, std::nullopt, like.device(), std::nullopt, format);
  }
  Tensor zeros(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) const {
    return torch::stable::new_zeros(like, shape, type);
  }
  Tensor empty_like(const Tensor& x) const { return torch::stable::empty_like(x); }

  // Runs a kernel in so many blocks of `count` threads with `shared` bytes of memory a block.
  template <class... P, class... A>
  void run(void (*kernel)(P...), int64_t blocks, int count, int64_t shared, const A&... arguments) const {
    FASTGEN_CHECK(blocks <= 0x7fffffff, op_, ": tensor too large for one launch: ", blocks, " blocks");
    if (!blocks) return;
#ifdef FASTGEN_CUDA_HOST
    host::run(blocks, count, shared, [&] { kernel(arguments...); });
#else
    if (shared > 47 << 10) {  // of 48 KiB a card may keep one
      check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
    }
    kernel<<<static_cast<unsigned>(blocks), count, shared, stream_>>>(arguments...);
    check(cudaGetLastError());
#endif
  }

 private:
  const char* op_;
#ifndef FASTGEN_CUDA_HOST
  void check(cudaError_t error) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or the next launch, whose ever, would find it
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    FASTGEN_CHECK(false, op_, ": CUDA kernel not launched: ", cudaGetErrorString(error), " (cuda:", device,
                  " has compute capability ", major, ".", minor, "; the library is built for ", build, ")");
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
#endif
};

// What the dispatcher calls: the kernel's function, of tensors that are all where the first one is. Errors
// name the op; PyTorch's do not say what the memory was for.
template <class Name, auto function, class F = decltype(function)>
struct Op;
template <class Name, auto function, class Result, class... A>
struct Op<Name, function, Result (*)(A...)> {
  static Result call(A... arguments) {
    try {
      const Tensor* first = nullptr;
      (check(arguments, first), ...);
      return function(arguments...);
    } catch (const std::exception& error) {
      const std::string said = error.what();
      if (said.find(Name::text()) != std::string::npos) throw;
      raise(Name::text(), ": ", said);
    }
  }

 private:
  template <class T>
  static void check(const T& argument, const Tensor*& first) {
    if constexpr (std::is_same_v<T, Tensor>) {
      if (!first) first = &argument;
      FASTGEN_CHECK(
          argument.is_cpu() == first->is_cpu() && argument.get_device_index() == first->get_device_index(),
          Name::text(), ": all tensors must be on one device");
    } else if constexpr (std::is_same_v<T, std::optional<Tensor>>) {
      if (argument) check(*argument, first);
    } else if constexpr (std::is_same_v<T, std::vector<Tensor>>) {
      for (const Tensor& x : argument) check(x, first);
    }
  }
};

// Does PyTorch want deterministic algorithms? The stable ABI has no such question; ops/_define.py has an op.
inline bool is_deterministic() {
  StableIValue answer[1];
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("fastgen::is_deterministic", "", answer, TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(answer[0]);
}

// The memory that a block shares, as long as the launch says.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#ifdef FASTGEN_CUDA_HOST
  return reinterpret_cast<T*>(host::block->shared);
#else
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
#endif
}

// Neighbours in global memory, read and written at once: 16 bytes, or one element where those are not
// aligned.
template <class S, int width>
struct alignas(sizeof(S) * width) Pack {
  S values[width];
};

template <class S>
constexpr int widest = 16 / sizeof(S);

template <class S, int width>
__device__ __forceinline__ void load(const S* from, accumulator_t<S> (&to)[width]) {
  const Pack<S, width> pack = *reinterpret_cast<const Pack<S, width>*>(from);
#pragma unroll
  for (int j = 0; j < width; ++j) to[j] = static_cast<accumulator_t<S>>(pack.values[j]);
}

template <class S, int width>
__device__ __forceinline__ void store(S* to, const accumulator_t<S> (&from)[width]) {
  Pack<S, width> pack;
#pragma unroll
  for (int j = 0; j < width; ++j) pack.values[j] = static_cast<S>(from[j]);
#ifndef FASTGEN_CUDA_HOST
  if constexpr (sizeof(pack) == 16) {  // nvcc splits a struct into its members, and does not always join them
    uint4 words;
    std::memcpy(&words, &pack, 16);
    __stwb(reinterpret_cast<uint4*>(to), words);
    return;
  }
#endif
  *reinterpret_cast<Pack<S, width>*>(to) = pack;
}

// The remainder of `at` by `size`; at is divided by it. 32-bit divisions are several times cheaper.
__device__ __forceinline__ int64_t split_off(int64_t& at, int64_t size) {
  const int64_t whole = at;
  if (whole <= 0x7fffffff && size <= 0x7fffffff) {
    at = static_cast<unsigned>(whole) / static_cast<unsigned>(size);
    return static_cast<unsigned>(whole) % static_cast<unsigned>(size);
  }
  at = whole / size;
  return whole % size;
}

inline bool is_aligned(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

}  // namespace fastgen
