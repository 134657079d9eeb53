// The activations of bias_act with their first two derivatives, for the host and the device.
#pragma once
#include <cmath>
#include <type_traits>

#include "common.h"

namespace fastgen {

enum class Activation { linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus, swish };

inline Activation activation_of(const std::string& name) {
  static const char* const names[] = {"linear", "relu", "lrelu",    "tanh", "sigmoid",
                                      "elu",    "selu", "softplus", "swish"};
  for (int i = 0; i < 9; ++i) {
    if (name == names[i]) return static_cast<Activation>(i);
  }
  FASTGEN_CHECK(false, "bias_act: unknown act '", name, "'");
}

// The public function has checked these already; the raw op must not read out of bounds either.
inline void check_arguments(const Tensor* ddx, const Tensor* dy, const Tensor& x,
                            const std::optional<Tensor>& b, int64_t dim) {
  if (dy) check_like("bias_act", x, "dy", *dy);
  if (ddx) check_like("bias_act", x, "ddx", *ddx);
  if (!b) return;
  FASTGEN_CHECK(dim >= 0 && dim < x.dim(), "bias_act: dim must be a dimension of x, got ", dim);
  FASTGEN_CHECK(b->dim() == 1 && b->size(0) == x.size(dim), "bias_act: b must have x.shape[dim] elements");
  FASTGEN_CHECK(b->scalar_type() == x.scalar_type() && b->is_cpu() == x.is_cpu(),
                "bias_act: b must have x's dtype and device");
}

namespace math {

FASTGEN_INLINE double exp(double x) {
  return ::exp(x);
}
FASTGEN_INLINE double expm1_of_negative(double x) {
  return ::expm1(x);
}
FASTGEN_INLINE double log1p_of_fraction(double x) {
  return ::log1p(x);
}

#if defined(__CUDACC__) || defined(FASTGEN_CUDA_HOST)

FASTGEN_INLINE float exp(float x) {
  return ::expf(x);
}
FASTGEN_INLINE float expm1_of_negative(float x) {
  return ::expm1f(x);
}
FASTGEN_INLINE float log1p_of_fraction(float x) {
  return ::log1pf(x);
}

#else

// Straight-line code that the compiler turns into vectors, good to about 2 ulp; NaN goes through. x = n ln 2
// + r with |r| <= ln 2 / 2; 2^n is made in two halves, so that the ends of the range overflow and underflow
// right.
struct Reduced {
  float r, scale1, scale2;
};

FASTGEN_INLINE float power_of_two(int32_t n) {
  const int32_t bits = (n + 127) << 23;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

FASTGEN_INLINE Reduced reduce(float x) {
  x = x < -104.f ? -104.f : x;
  x = x > 89.f ? 89.f : x;
  const float round = 12582912.f;  // 1.5 * 2^23: adding it leaves an integer
  const float n = (x * 1.44269504f + round) - round;
  const int32_t i = static_cast<int32_t>(n == n ? n : 0.f);
  const int32_t half = i >> 1;
  return {(x - n * 0.693359375f) + n * 2.12194440e-4f, power_of_two(half), power_of_two(i - half)};
}

// exp(r) - 1 for |r| <= ln 2 / 2: the Taylor series to r^7 / 7!, whose next term is below 2^-27.
FASTGEN_INLINE float expm1_series(float r) {
  float p = 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  return p * r * r + r;
}

FASTGEN_INLINE float exp(float x) {
  const Reduced e = reduce(x);
  return (expm1_series(e.r) + 1.f) * e.scale1 * e.scale2;
}

// For x <= 0: exact to the last bits near 0 too, as n is 0 there.
FASTGEN_INLINE float expm1_of_negative(float x) {
  const Reduced e = reduce(x);
  const float scale = e.scale1 * e.scale2;
  return expm1_series(e.r) * scale + (scale - 1.f);
}

// For 0 <= x <= 1: log(1 + x) = 2 atanh(f / (2 + f)), with 1 + x halved first where it is above sqrt 2.
FASTGEN_INLINE float log1p_of_fraction(float x) {
  const bool high = x > 0.41421356f;
  const float f = high ? (x - 1.f) * 0.5f : x;
  const float s = f / (2.f + f);
  const float q = s * s;
  float p = 1.f / 9;
  p = p * q + 1.f / 7;
  p = p * q + 1.f / 5;
  p = p * q + 1.f / 3;
  return (s + s) + (s + s) * q * p + (high ? 0.693147181f : 0.f);
}

#endif

}  // namespace math

template <class T>
FASTGEN_INLINE T sigmoid(T v) {
  return T(1) / (T(1) + math::exp(-v));
}

// The comparisons are such that NaN stays NaN.
template <Activation A, class T>
FASTGEN_INLINE T value(T v, T alpha) {
  constexpr T selu_scale = T(1.0507009873554804934), selu_alpha = T(1.6732632423543772848);
  if constexpr (A == Activation::linear) return v;
  if constexpr (A == Activation::relu) return v <= 0 ? T(0) : v;
  if constexpr (A == Activation::lrelu) return v > 0 ? v : v * alpha;
  if constexpr (A == Activation::tanh) {
    const T e = math::expm1_of_negative(v > 0 ? T(-2) * v : T(2) * v);
    const T t = e / (T(2) + e);
    return v > 0 ? -t : t;
  }
  if constexpr (A == Activation::sigmoid) return sigmoid(v);
  if constexpr (A == Activation::elu) return v > 0 ? v : math::expm1_of_negative(v > 0 ? T(0) : v);
  if constexpr (A == Activation::selu)
    return selu_scale * (v > 0 ? v : selu_alpha * math::expm1_of_negative(v > 0 ? T(0) : v));
  if constexpr (A == Activation::softplus) {  // linear above 20, as torch's
    const T tail = math::log1p_of_fraction(math::exp(v > 0 ? -v : v));
    return v > 20 ? v : (v < 0 ? T(0) : v) + tail;
  }
  if constexpr (A == Activation::swish) return v * sigmoid(v);
}

// At NaN that of relu, elu and selu is the positive side's, as torch has it (for the others, at times, NaN).
template <Activation A, class T>
FASTGEN_INLINE T first_derivative(T v, T alpha) {
  constexpr T selu_scale = T(1.0507009873554804934), selu_alpha = T(1.6732632423543772848);
  if constexpr (A == Activation::linear) return T(1);
  if constexpr (A == Activation::relu) return v <= 0 ? T(0) : T(1);
  if constexpr (A == Activation::lrelu) return v > 0 ? T(1) : alpha;
  if constexpr (A == Activation::tanh) {
    const T t = value<A>(v, alpha);
    return T(1) - t * t;
  }
  if constexpr (A == Activation::sigmoid) {
    const T s = sigmoid(v);
    return s * (T(1) - s);
  }
  if constexpr (A == Activation::elu) return v <= 0 ? math::exp(v) : T(1);
  if constexpr (A == Activation::selu) return selu_scale * (v <= 0 ? selu_alpha * math::exp(v) : T(1));
  if constexpr (A == Activation::softplus) return v > 20 ? T(1) : sigmoid(v);
  if constexpr (A == Activation::swish) {
    const T s = sigmoid(v);
    return s * (T(1) + v * (T(1) - s));
  }
}

template <Activation A, class T>
FASTGEN_INLINE T second_derivative(T v, T alpha) {
  constexpr T selu_scale = T(1.0507009873554804934), selu_alpha = T(1.6732632423543772848);
  if constexpr (A == Activation::tanh) {
    const T t = value<A>(v, alpha);
    return T(-2) * t * (T(1) - t * t);
  }
  if constexpr (A == Activation::sigmoid) {
    const T s = sigmoid(v);
    return s * (T(1) - s) * (T(1) - T(2) * s);
  }
  if constexpr (A == Activation::elu) return v >= 0 ? T(0) : math::exp(v);  // 0 at 0, as torch
  if constexpr (A == Activation::selu) return selu_scale * (v >= 0 ? T(0) : selu_alpha * math::exp(v));
  if constexpr (A == Activation::softplus) {
    const T s = sigmoid(v);
    return v > 20 ? T(0) : s * (T(1) - s);
  }
  if constexpr (A == Activation::swish) {
    const T s = sigmoid(v);
    return s * (T(1) - s) * (T(2) + v * (T(1) - T(2) * s));
  }
  return T(0);  // linear, relu, lrelu
}

// order 0: clamp(f(v) gain); 1: its derivative times g; 2: its second derivative times g. clamp < 0 means
// none; a value on the bound counts as clamped.
template <Activation A, int order, class T>
FASTGEN_INLINE T activate(T v, T g, T alpha, T gain, T clamp) {
  const T y = value<A>(v, alpha) * gain;
  if constexpr (order == 0) {
    const T low = y < -clamp ? -clamp : y;
    return clamp < 0 ? y : (low > clamp ? clamp : low);
  } else {
    const T d = order == 1 ? first_derivative<A>(v, alpha) : second_derivative<A>(v, alpha);
    const bool inside = clamp < 0 || (y > -clamp && y < clamp);
    return inside ? d * gain * g : T(0);
  }
}

template <Activation A>
using Is = std::integral_constant<Activation, A>;

// f of the activation, as a constant; of the device's functions in a kernel, which nvcc would warn of.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class F>
FASTGEN_INLINE void with_activation(Activation act, const F& f) {
  switch (act) {
    case Activation::linear:
      return f(Is<Activation::linear>{});
    case Activation::relu:
      return f(Is<Activation::relu>{});
    case Activation::lrelu:
      return f(Is<Activation::lrelu>{});
    case Activation::tanh:
      return f(Is<Activation::tanh>{});
    case Activation::sigmoid:
      return f(Is<Activation::sigmoid>{});
    case Activation::elu:
      return f(Is<Activation::elu>{});
    case Activation::selu:
      return f(Is<Activation::selu>{});
    case Activation::softplus:
      return f(Is<Activation::softplus>{});
    case Activation::swish:
      return f(Is<Activation::swish>{});
  }
}

}  // namespace fastgen
