// Small matrix products: blocks of rows, with sums held in registers.
#pragma once
#include "simd.h"

namespace fastgen {

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
  FASTGEN_SIMD static void multiply(const Product<T>& p, int64_t rows) {                                    \
    multiply_any<T>(p, rows);                                                                               \
  }                                                                                                         \
  FASTGEN_SIMD static void add_outer(const T* a, int64_t a_stride, int64_t n, const T* b, int64_t b_stride, \
                                     int64_t m, T* c, int64_t columns) {                                    \
    add_outer_any<T>(a, a_stride, n, b, b_stride, m, c, columns);                                           \
  }
FASTGEN_FOR(float)
FASTGEN_FOR(double)
#undef FASTGEN_FOR

}  // namespace fastgen
