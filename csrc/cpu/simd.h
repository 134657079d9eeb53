// Vectors of 64 bytes, and small matrix products of them. A vector is one register with AVX-512, two with
// AVX2, four with SSE. Everything is to be inlined into a FASTGEN_SIMD function.
#pragma once
#include <cmath>
#include <memory>
#include <new>

#include "common.h"

namespace fastgen {

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(64)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int64_t lanes = 64 / sizeof(T);

template <class T>
FASTGEN_INLINE Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class T>
FASTGEN_INLINE void store(T* to, const Vec<T>& v) {
  std::memcpy(to, &v, sizeof v);
}
template <class T>
FASTGEN_INLINE T sum(const Vec<T>& v) {
  T total = 0;
  for (int64_t i = 0; i < lanes<T>; ++i) total += v[i];
  return total;
}

constexpr int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

// Memory on cache lines, uninitialised or zero.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n, bool zero = true) : values_(allocate(n)) {
    if (zero) std::fill(values_.get(), values_.get() + n, T(0));
  }
  T* get() const { return values_.get(); }
  T& operator[](int64_t i) const { return values_.get()[i]; }

 private:
  static constexpr std::align_val_t line{64};
  static T* allocate(int64_t n) {
    return static_cast<T*>(::operator new(std::max<int64_t>(n, 1) * sizeof(T), line));
  }
  struct Free {
    void operator()(T* p) const { ::operator delete(p, line); }
  };
  std::unique_ptr<T, Free> values_;
};

// e^x, to 2 units in the last place from -87 to 88, beyond them as there; NaN stays. Polynomials are fitted
// in Chebyshev nodes.
FASTGEN_INLINE Vec<float> exponential(Vec<float> x) {
  using Bits = Vec<uint32_t>;
  const Vec<float> least = Vec<float>{} - 87.0f, most = Vec<float>{} + 88.0f;
  x = x < least ? least : x;
  x = x > most ? most : x;
  const Vec<float> shift = Vec<float>{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to integers
  const Vec<float> shifted = x * 1.44269504f + shift, n = shifted - shift;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Vec<float> p = Vec<float>{} + 0.00139485808f;
  p = p * r + 0.00837512889f;
  p = p * r + 0.0416662183f;
  p = p * r + 0.166664155f;
  p = p * r + 0.500000011f;
  p = p * r + 1.00000004f;
  p = p * r + 1.0f;
  // The integer stands in the lowest bits of the shifted sum.
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127 << 23);
  Vec<float> scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}
FASTGEN_INLINE Vec<double> exponential(Vec<double> x) {
  for (int64_t i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// log(1 + e) for e in [0, 1], to 1e-7.
FASTGEN_INLINE Vec<float> log1p_unit(Vec<float> e) {
  Vec<float> p = Vec<float>{} - 0.00325637848f;
  p = p * e + 0.0199071609f;
  p = p * e - 0.0570642008f;
  p = p * e + 0.106142647f;
  p = p * e - 0.153118631f;
  p = p * e + 0.196781173f;
  p = p * e - 0.249545589f;
  p = p * e + 0.33330004f;
  p = p * e - 0.49999904f;
  p = p * e + 1.0f;
  return p * e;
}
FASTGEN_INLINE Vec<double> log1p_unit(Vec<double> x) {
  for (int64_t i = 0; i < lanes<double>; ++i) x[i] = std::log1p(x[i]);
  return x;
}

template <class V>
FASTGEN_INLINE V softplus(V x) {
  const V zero{}, positive = x > zero ? x : zero;  // NaN fails the comparison, and is in the other term
  return positive + log1p_unit(exponential(x > zero ? -x : x));
}
template <class V>
FASTGEN_INLINE V sigmoid(V x) {
  return 1 / (1 + exponential(-x));
}

// The memory of a matrix's rows: small strides are compile-time constants below, which saves registers.
constexpr int64_t row_stride(int64_t n) {
  return n <= 32 ? 32 : n <= 64 ? 64 : round_up(n, 16);
}

// A product is made in tiles of `tile_rows` rows.
constexpr int tile_rows = 12;

template <class T>
struct Product {
  const T* a;  // [rows, k] with a stride of row_stride
  int64_t a_stride, k;
  const T* b;  // [k, columns], contiguous; columns a multiple of the lanes
  int64_t columns;
  const T* bias;  // [columns], or null
  T* out;         // [rows, columns]
  int64_t out_stride;
};

template <int stride, int vectors, class T>
FASTGEN_INLINE void multiply_tile(const Product<T>& p, int64_t row, int64_t column) {
  const int64_t a_stride = stride ? stride : p.a_stride;
  const T *a = p.a + row * a_stride, *b = p.b + column;
  Vec<T> sums[tile_rows][vectors];
  for (int v = 0; v < vectors; ++v) {
    const Vec<T> start = p.bias ? load(p.bias + column + v * lanes<T>) : Vec<T>{};
#pragma GCC unroll 12
    for (int i = 0; i < tile_rows; ++i) sums[i][v] = start;
  }
  for (int64_t j = 0; j < p.k; ++j, b += p.columns) {
    Vec<T> values[vectors];
    for (int v = 0; v < vectors; ++v) values[v] = load(b + v * lanes<T>);
#pragma GCC unroll 12
    for (int i = 0; i < tile_rows; ++i) {
      const T value = a[i * a_stride + j];
      for (int v = 0; v < vectors; ++v) sums[i][v] += value * values[v];
    }
  }
  T* out = p.out + row * p.out_stride + column;
#pragma GCC unroll 12
  for (int i = 0; i < tile_rows; ++i) {
    for (int v = 0; v < vectors; ++v) store(out + i * p.out_stride + v * lanes<T>, sums[i][v]);
  }
}

template <int stride, class T>
FASTGEN_INLINE void multiply_rows(const Product<T>& p, int64_t rows) {
  for (int64_t row = 0; row < rows; row += tile_rows) {
    int64_t column = 0;
    for (; column + 2 * lanes<T> <= p.columns; column += 2 * lanes<T>)
      multiply_tile<stride, 2>(p, row, column);
    if (column < p.columns) multiply_tile<stride, 1>(p, row, column);
  }
}

// out = a b + bias; rows are rounded up to whole tiles.
template <class T>
FASTGEN_INLINE void multiply_any(const Product<T>& p, int64_t rows) {
  switch (p.a_stride) {
    case 32:
      return multiply_rows<32>(p, rows);
    case 64:
      return multiply_rows<64>(p, rows);
    default:
      return multiply_rows<0>(p, rows);
  }
}

// c [n, columns] += transposed a [m, n] times b [m, columns]; n a multiple of 8, columns of the lanes.
template <int vectors, class T>
FASTGEN_INLINE void add_outer_tile(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t m,
                                   T* c, int64_t columns) {
  Vec<T> sums[8][vectors] = {};
  for (int64_t j = 0; j < m; ++j) {
    Vec<T> row[vectors];
    for (int v = 0; v < vectors; ++v) row[v] = load(b + j * b_stride + v * lanes<T>);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const T value = a[j * a_stride + i];
      for (int v = 0; v < vectors; ++v) sums[i][v] += value * row[v];
    }
  }
  for (int i = 0; i < 8; ++i) {
    for (int v = 0; v < vectors; ++v) {
      T* to = c + i * columns + v * lanes<T>;
      store(to, load(to) + sums[i][v]);
    }
  }
}

template <class T>
FASTGEN_INLINE void add_outer_any(const T* a, int64_t a_stride, int64_t n, const T* b, int64_t b_stride,
                                  int64_t m, T* c, int64_t columns) {
  for (int64_t i = 0; i < n; i += 8) {
    int64_t column = 0;
    for (; column + 2 * lanes<T> <= columns; column += 2 * lanes<T>)
      add_outer_tile<2>(a + i, a_stride, b + column, b_stride, m, c + i * columns + column, columns);
    if (column < columns)
      add_outer_tile<1>(a + i, a_stride, b + column, b_stride, m, c + i * columns + column, columns);
  }
}

// Out of line, since they are long and compiled once for every instruction set.
#define FASTGEN_FOR(T)                                                                                      \
  [[maybe_unused]] FASTGEN_SIMD static void multiply(const Product<T>& p, int64_t rows) {                   \
    multiply_any<T>(p, rows);                                                                               \
  }                                                                                                         \
  [[maybe_unused]] FASTGEN_SIMD static void add_outer(const T* a, int64_t a_stride, int64_t n, const T* b,  \
                                                      int64_t b_stride, int64_t m, T* c, int64_t columns) { \
    add_outer_any<T>(a, a_stride, n, b, b_stride, m, c, columns);                                           \
  }
FASTGEN_FOR(float)
FASTGEN_FOR(double)
#undef FASTGEN_FOR

}  // namespace fastgen
