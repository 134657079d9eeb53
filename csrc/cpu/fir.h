// FIR filters as correlations, and weighted sums of rows, which they are made of.
#pragma once
#include <cmath>

#include "common.h"

namespace fastgen {

template <class T>
struct Filter {
  int64_t rows = 1, columns = 1;
  std::vector<T> y;  // separable: weights along y and x; otherwise empty, and x holds the whole filter
  std::vector<T> x;
};

// As a correlation, with the gain in it. A filter of rank one is taken apart if that is exact to rounding.
template <class T>
Filter<T> read_filter(const char* op, const std::optional<Tensor>& f, bool flip, double gain) {
  Filter<T> filter;
  if (!f) {
    filter.y = {T(1)};
    filter.x = {static_cast<T>(gain)};
    return filter;
  }
  FASTGEN_CHECK((f->dim() == 1 || f->dim() == 2) && f->numel() > 0, op,
                ": f must have 1 or 2 dimensions and at least one tap");
  std::vector<double> taps = host_vector<double>(op, *f);
  if (!flip) std::reverse(taps.begin(), taps.end());
  const int64_t columns = f->size(f->dim() - 1), rows = f->dim() == 1 ? columns : f->size(0);
  filter.rows = rows;
  filter.columns = columns;
  std::vector<double> x(taps), y(taps);
  bool separable = f->dim() == 1;
  if (!separable) {
    const auto magnitude = [](double a, double b) { return std::abs(a) < std::abs(b); };
    const int64_t top = std::max_element(taps.begin(), taps.end(), magnitude) - taps.begin();
    const double largest = taps[top];
    x.assign(taps.begin() + top / columns * columns, taps.begin() + (top / columns + 1) * columns);
    y.resize(rows);
    for (int64_t i = 0; i < rows; ++i) y[i] = largest != 0 ? taps[i * columns + top % columns] / largest : 0;
    separable = true;
    const double tolerance = std::is_same_v<T, double> ? 1e-16 : 6e-8;  // half a unit of rounding
    for (int64_t i = 0; i < rows * columns; ++i) {
      separable &= std::abs(taps[i] - y[i / columns] * x[i % columns]) <= tolerance * std::abs(largest);
    }
  }
  if (!separable) x = taps;
  for (double tap : x) filter.x.push_back(static_cast<T>(tap * gain));
  if (separable) filter.y.assign(y.begin(), y.end());
  return filter;
}

// to[i] (+)= sum over `count` rows of weight * row[i]
template <int count, bool add, class S, class T>
FASTGEN_INLINE void sum_some_rows(const S* const* rows, const T* weights, T* __restrict__ to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    T sum = add ? to[i] : T(0);
    for (int k = 0; k < count; ++k) sum += weights[k] * static_cast<T>(rows[k][i]);
    to[i] = sum;
  }
}

template <class S, class T>
FASTGEN_INLINE void sum_rows(const S* const* rows, const T* weights, int64_t count, T* to, int64_t n) {
  switch (count) {
    case 0:
      return std::fill(to, to + n, T(0)), void();
    case 1:
      return sum_some_rows<1, false>(rows, weights, to, n);
    case 2:
      return sum_some_rows<2, false>(rows, weights, to, n);
    case 3:
      return sum_some_rows<3, false>(rows, weights, to, n);
    default:
      sum_some_rows<4, false>(rows, weights, to, n);
  }
  for (int64_t k = 4; k < count; ++k) sum_some_rows<1, true>(rows + k, weights + k, to, n);
}

}  // namespace fastgen
