// Marching along one ray: weights of its samples, and finer depths drawn from them. The formulas are those of
// fastgen/ops/_march.py.
#pragma once
#include "simd.h"

namespace fastgen {
namespace {

template <class V>
FASTGEN_INLINE V softplus(V x) {
  const V zero{}, positive = x > zero ? x : zero;  // NaN fails the comparison, and is in the other term
  return positive + log1p_unit(exponential(x > zero ? -x : x));
}
template <class V>
FASTGEN_INLINE V sigmoid(V x) {
  return 1 / (1 + exponential(-x));
}

constexpr int64_t padded(int64_t n) {
  return round_up(n, 16);
}

// What marching along one ray needs; arrays of n - 1 intervals or n samples, padded.
template <class T>
struct March {
  Buffer<T> alpha, keep, light, weight, ends;
  explicit March(int64_t n)
      : alpha(padded(n)), keep(padded(n)), light(padded(n)), weight(padded(n)), ends(padded(n)) {}
};

// alpha, keep + 1e-10, light, weight of intervals and their ends' halves. t and sigma are padded.
template <class T>
FASTGEN_INLINE void march(const T* sigma, const T* t, int64_t n, March<T>& m) {
  for (int64_t i = 0; i < n - 1; i += lanes<T>) {
    const Vec<T> density = softplus((load(sigma + i) + load(sigma + i + 1)) / 2 - 1);
    const Vec<T> keep = exponential(-density * (load(t + i + 1) - load(t + i)));
    store(m.alpha.get() + i, 1 - keep);
    store(m.keep.get() + i, keep + T(1e-10));
  }
  T light = 1, before = 0;
  for (int64_t i = 0; i < n - 1; ++i) {
    m.light[i] = light;
    const T weight = m.alpha[i] * light;
    m.weight[i] = weight;
    m.ends[i] = (before + weight) / 2;
    before = weight;
    light *= m.keep[i];
  }
  m.ends[n - 1] = before / 2;
}

// NaN is largest, as torch.sort has it.
template <class T>
bool before(T a, T b) {
  return a < b || (b != b && a == a);
}

// Depths drawn by u [count] from the weights of march between depths t [n]; sorted. cdf: room for n.
template <class T>
FASTGEN_INLINE void importance(const T* weight, const T* t, int64_t n, const T* u, int64_t count, T* cdf,
                               T* fine) {
  const int64_t bins = n - 3;
  double total = 0, running = 0;
  for (int64_t i = 0; i < bins; ++i) {
    const auto larger = [](T a, T b) { return a > b || a != a ? a : b; };
    const T pdf = (larger(weight[i + 1], weight[i]) + larger(weight[i + 2], weight[i + 1])) / 2 + T(0.01001);
    cdf[i + 1] = pdf;
    total += pdf;
  }
  cdf[0] = 0;
  for (int64_t i = 1; i <= bins; ++i) {
    running += cdf[i] / static_cast<T>(total);
    cdf[i] = static_cast<T>(running);
  }
  const auto edge = [&](int64_t i) { return (t[i] + t[i + 1]) / 2; };
  for (int64_t k = 0; k < count; ++k) {
    int64_t above = std::upper_bound(cdf, cdf + bins + 1, u[k]) - cdf;
    const int64_t below = std::max<int64_t>(above - 1, 0);
    above = std::min(above, bins);
    T width = cdf[above] - cdf[below];
    width = width < T(1e-5) ? T(1) : width;
    fine[k] = edge(below) + (u[k] - cdf[below]) / width * (edge(above) - edge(below));
  }
  if (!std::is_sorted(fine, fine + count, before<T>)) std::sort(fine, fine + count, before<T>);
}

}  // namespace
}  // namespace fastgen
