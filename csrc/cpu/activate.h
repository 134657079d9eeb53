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
  // Otherwise the function is compiled for the oldest processors alone.
  with_activation(act.act,
                  [&](auto is) __attribute__((always_inline)) { map<is.value, order>(v, g, out, n, act); });
}

}  // namespace fastgen
