// What every kernel file needs: checks, the dtype switch, memory layouts, threads. Indices are 64 bits wide.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __CUDACC__
#define FASTGEN_INLINE __host__ __device__ __forceinline__
#else
#define FASTGEN_INLINE [[gnu::always_inline]] inline
#endif

// A function with this mark is compiled for several instruction sets, and the loader picks one. What it calls
// must be FASTGEN_INLINE to be compiled along with it. The loader picks before a sanitizer's runtime has
// started: builds with one define FASTGEN_NO_CLONES.
#if defined(FASTGEN_NO_CLONES)
#define FASTGEN_SIMD
#elif defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define FASTGEN_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTGEN_SIMD __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define FASTGEN_SIMD
#endif

// Defines run(S(), job, begin, end) for each dtype S, as function<S>(job, begin, end) with that mark.
#define FASTGEN_RUN_ONE(S, function)                                            \
  FASTGEN_SIMD static void run(S, const Job& job, int64_t begin, int64_t end) { \
    function<S>(job, begin, end);                                               \
  }
#define FASTGEN_RUN(function)         \
  FASTGEN_RUN_ONE(float, function)    \
  FASTGEN_RUN_ONE(double, function)   \
  FASTGEN_RUN_ONE(BFloat16, function) \
  FASTGEN_RUN_ONE(Half, function)

// An exception that is a Python RuntimeError, of these words and no others.
#define FASTGEN_CHECK(ok, ...)       \
  do {                               \
    if (!(ok)) [[unlikely]]          \
      ::fastgen::raise(__VA_ARGS__); \
  } while (0)

namespace fastgen {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Words>
[[noreturn]] void raise(const Words&... words) {
  std::ostringstream text;
  (text << ... << words);
  throw std::runtime_error(text.str());
}

// Sums are formed in this type.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using accumulator_t = typename AccumulatorOf<T>::type;

// Calls body(T()) for the C++ type of `type`.
template <class Body>
void dispatch(const char* op, ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float:
      return body(float());
    case ScalarType::Double:
      return body(double());
    case ScalarType::BFloat16:
      return body(BFloat16());
    case ScalarType::Half:
      return body(Half());
    default:
      FASTGEN_CHECK(false, op, ": x must be float32, bfloat16, float16 or float64, got ",
                    torch::headeronly::toString(type));
  }
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Kernels read `other` where they read x: it must be as large, and of the same kind.
inline void check_like(const char* op, const Tensor& x, const char* name, const Tensor& other) {
  bool same = other.dim() == x.dim() && other.scalar_type() == x.scalar_type() &&
              other.is_cpu() == x.is_cpu() && other.get_device_index() == x.get_device_index();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = other.size(i) == x.size(i);
  FASTGEN_CHECK(same, op, ": ", name, " must have x's shape, dtype and device");
}

// `x` with the layout of `model`, which has the same shape: itself where it has that layout already.
inline Tensor with_layout_of(const Tensor& model, const Tensor& x) {
  bool same = true;
  for (int64_t i = 0; i < x.dim(); ++i) same &= x.size(i) < 2 || x.stride(i) == model.stride(i);
  if (same) return x;
  Tensor copy = torch::stable::empty_like(model);
  return torch::stable::copy_(copy, x);
}

// [N, C, H, W] stored as [N, H, W, C], and not also a plain contiguous tensor.
inline bool is_channels_last(const Tensor& x) {
  if (x.dim() != 4 || x.is_contiguous()) return false;
  int64_t expected = 1;
  for (int64_t i : {1, 3, 2, 0}) {
    if (x.size(i) > 1 && x.stride(i) != expected) return false;
    expected *= x.size(i);
  }
  return true;
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, MemoryFormat format) {
  return torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt, format);
}

// A small vector on the host, in the accumulating type, wherever and in whatever dtype it was.
template <class T>
std::vector<T> host_vector(const char* op, const Tensor& x) {
  std::vector<T> values(x.numel());
  Tensor contiguous = torch::stable::contiguous(x);
  dispatch(op, x.scalar_type(), [&](auto zero) {
    const auto* from = data<decltype(zero)>(contiguous);
    std::transform(from, from + values.size(), values.begin(),
                   [](auto value) { return static_cast<T>(value); });
  });
  return values;
}

FASTGEN_INLINE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Splits [0, count) over the threads. `cost` is the number of elements that one step touches.
template <class Body>
void parallel_for(int64_t count, int64_t cost, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, cost));
  torch::stable::parallel_for(0, count, grain, body);
}

}  // namespace fastgen
