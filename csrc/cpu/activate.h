// Activations of whole rows.
#pragma once
#include "activations.h"

namespace fastgen {

struct Act {
  Activation act;
  double alpha, gain, clamp;  // clamp < 0: none
};

template <Activation A, int order, class T>
FASTGEN_INLINE void map(const T* v, const T* g, T* out, int64_t n, const Act& act) {
  const T alpha = static_cast<T>(act.alpha), gain = static_cast<T>(act.gain),
          clamp = static_cast<T>(act.clamp);
  for (int64_t i = 0; i < n; ++i)
    out[i] = activate<A, order, T>(v[i], order ? g[i] : T(0), alpha, gain, clamp);
}

template <int order, class T>
FASTGEN_INLINE void map_any(const T* v, const T* g, T* out, int64_t n, const Act& act) {
  switch (act.act) {
    case Activation::linear:
      return map<Activation::linear, order>(v, g, out, n, act);
    case Activation::relu:
      return map<Activation::relu, order>(v, g, out, n, act);
    case Activation::lrelu:
      return map<Activation::lrelu, order>(v, g, out, n, act);
    case Activation::tanh:
      return map<Activation::tanh, order>(v, g, out, n, act);
    case Activation::sigmoid:
      return map<Activation::sigmoid, order>(v, g, out, n, act);
    case Activation::elu:
      return map<Activation::elu, order>(v, g, out, n, act);
    case Activation::selu:
      return map<Activation::selu, order>(v, g, out, n, act);
    case Activation::softplus:
      return map<Activation::softplus, order>(v, g, out, n, act);
    case Activation::swish:
      return map<Activation::swish, order>(v, g, out, n, act);
  }
}

}  // namespace fastgen
