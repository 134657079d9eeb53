// Samples of three planes and their derivatives, for some points of an image at a time; the formulas are
// those of fastgen/ops/grid_sample.py. A pixel's channels are read as whole vectors, and what lies outside is
// a row of zeros.
#pragma once
#include <cmath>

#include "simd.h"

namespace fastgen {
namespace {

constexpr int64_t block = 64;  // points whose positions are found together

// Planes of an image [3, C, H, W], by their strides.
template <class S>
struct Table {
  S* data = nullptr;
  int64_t plane = 0, channel = 0, row = 0, column = 0;
  bool whole = false;  // a pixel's channels are whole vectors
};

template <class S>
struct Job {
  using T = accumulator_t<S>;
  int64_t H, W, C, padded, M;  // padded: C, to whole vectors
  bool mean;
  T matrix[18];
  const T* points;      // of an image [3, M]
  const T* directions;  // the same of what the coordinates are changed by; or null
  const S* dy;          // of an image [3, M, C], or [M, C] for the mean
  const S* zeros;       // [padded]

  const S* gradient(int64_t p, int64_t m) const { return dy + ((mean ? 0 : p * M) + m) * C; }
  T share() const { return mean ? T(1) / 3 : T(1); }
};

// Where some points are on one plane.
template <class T>
struct Positions {
  int32_t column[block], row[block];  // of the upper left pixel, from -2 to W and H
  T a[block], b[block];               // fractions
  T qu[block], qv[block];             // directions, in pixels
  T weight[4][block];
};

// to = the matrix's row times points [begin, begin + n). A zero selects: it makes no NaN of what it leaves
// out. Products and sums stand in loops apart, here and below: contracted to one operation they would round
// otherwise than the reference does, and find another pixel at times.
template <class T>
FASTGEN_INLINE void project(const T* row, const T* points, int64_t M, int64_t begin, int64_t n,
                            T* __restrict__ to) {
  T product[block];
  std::fill(to, to + n, T(0));
  for (int64_t k = 0; k < 3; ++k) {
    if (row[k] == 0) continue;
    const T* from = points + k * M + begin;
    for (int64_t s = 0; s < n; ++s) product[s] = from[s] * row[k];
    for (int64_t s = 0; s < n; ++s) to[s] += product[s];
  }
}

// x in [-1, 1] to the pixel before it and the fraction.
template <class T>
FASTGEN_INLINE void split(int64_t size, int64_t n, T* __restrict__ x, int32_t* __restrict__ pixel) {
  const T limit = static_cast<T>(size);
  for (int64_t s = 0; s < n; ++s) x[s] = (x[s] + 1) * limit;
  for (int64_t s = 0; s < n; ++s) {
    const T u = (x[s] - 1) / 2;
    T whole = std::floor(u);
    x[s] = u - whole;
    whole = whole >= -2 ? whole : T(-2);  // NaN lies outside; its fraction, and so its weights, stay NaN
    pixel[s] = static_cast<int32_t>(whole <= limit ? whole : limit);
  }
}

template <class S, class T>
FASTGEN_INLINE void find(const Job<S>& job, int64_t p, int64_t begin, int64_t n, Positions<T>& at) {
  project(job.matrix + 6 * p, job.points, job.M, begin, n, at.a);
  project(job.matrix + 6 * p + 3, job.points, job.M, begin, n, at.b);
  split(job.W, n, at.a, at.column);
  split(job.H, n, at.b, at.row);
  if (!job.directions) return;
  project(job.matrix + 6 * p, job.directions, job.M, begin, n, at.qu);
  project(job.matrix + 6 * p + 3, job.directions, job.M, begin, n, at.qv);
  const T x = static_cast<T>(job.W) / 2, y = static_cast<T>(job.H) / 2;
  for (int64_t s = 0; s < n; ++s) {
    at.qu[s] *= x;
    at.qv[s] *= y;
  }
}

// The corners' weights in a sample, or in its derivative along the directions.
template <class T>
FASTGEN_INLINE void weigh(bool slope, int64_t n, Positions<T>& at) {
  for (int64_t s = 0; s < n; ++s) {
    const T a = at.a[s], b = at.b[s];
    if (slope) {
      const T u = at.qu[s], v = at.qv[s];
      at.weight[0][s] = (b - 1) * u + (a - 1) * v;
      at.weight[1][s] = (1 - b) * u - a * v;
      at.weight[2][s] = (1 - a) * v - b * u;
      at.weight[3][s] = b * u + a * v;
    } else {
      at.weight[0][s] = (1 - a) * (1 - b);
      at.weight[1][s] = a * (1 - b);
      at.weight[2][s] = (1 - a) * b;
      at.weight[3][s] = a * b;
    }
  }
}

// The corners of point s that lie in the image's rows [top, bottom); others are `none`.
template <class S, class X, class T>
FASTGEN_INLINE void corners(const Job<S>& job, const Table<X>& table, int64_t p, const Positions<T>& at,
                            int64_t s, int64_t top, int64_t bottom, X* none, X** to) {
  const int64_t i = at.column[s], j = at.row[s];
  const bool left = i >= 0 && i < job.W, right = i >= -1 && i < job.W - 1;
  const bool above = j >= top && j < bottom, below = j >= top - 1 && j < bottom - 1;
  const int64_t offset = p * table.plane + j * table.row + i * table.column;
  to[0] = left && above ? table.data + offset : none;
  to[1] = right && above ? table.data + (offset + table.column) : none;
  to[2] = left && below ? table.data + (offset + table.row) : none;
  to[3] = right && below ? table.data + (offset + table.row + table.column) : none;
}

// Rows of pixels whose channels cannot be read as whole vectors are copied to `rows` first.
template <class S>
struct Rows {
  std::vector<S> copies;
  bool direct;

  Rows(const Job<S>& job, const Table<const S>& table) : copies(12 * job.padded), direct(table.whole) {}

  FASTGEN_INLINE void prepare(const Job<S>& job, const Table<const S>& table, const S** at, int64_t count) {
    if (direct) return;
    for (int64_t k = 0; k < count; ++k) {
      if (at[k] == job.zeros) continue;
      S* to = copies.data() + k * job.padded;
      for (int64_t c = 0; c < job.C; ++c) to[c] = at[k][c * table.channel];
      at[k] = to;
    }
  }
};

template <int count, class S, class T>
FASTGEN_INLINE Vec<T> weighted(const S* const* at, const T* weight, int64_t c) {
  Vec<T> sums[2]{};
#pragma GCC unroll 12
  for (int k = 0; k < count; ++k) sums[k & 1] += weight[k] * widen(at[k] + c);
  return sums[0] + sums[1];
}

// Tables to sum samples of: the planes, or for second derivatives up to two.
template <class S>
struct Source {
  Table<const S> table;
  bool slope;
};

// out [3, M, C] or [M, C]: samples at points [begin, end).
template <int count, class S>
FASTGEN_INLINE void gather_rows(const Job<S>& job, const std::vector<Source<S>>& sources, int64_t begin,
                                int64_t end, S* out) {
  using T = accumulator_t<S>;
  const int64_t planes = count / 4, n_sources = static_cast<int64_t>(sources.size());
  const T share = job.share();
  Positions<T> at;
  std::vector<const S*> corner(2 * block * count);
  std::vector<T> weight(2 * block * count);
  std::vector<Rows<S>> rows;
  for (const auto& source : sources) rows.emplace_back(job, source.table);
  std::vector<S> last(job.padded);
  for (int64_t first = begin, n; first < end; first += n) {
    n = std::min(block, end - first);
    for (int64_t plane = 0; plane < 3; plane += planes) {
      for (int64_t p = 0; p < planes; ++p) {
        find(job, plane + p, first, n, at);
        for (int64_t i = 0; i < n_sources; ++i) {
          weigh(sources[i].slope, n, at);
          for (int64_t s = 0; s < n; ++s) {
            const int64_t to = (i * block + s) * count + 4 * p;
            corners(job, sources[i].table, plane + p, at, s, 0, job.H, job.zeros, &corner[to]);
            for (int64_t k = 0; k < 4; ++k) weight[to + k] = at.weight[k][s];
          }
        }
      }
      for (int64_t s = 0; s < n; ++s) {
        for (int64_t i = 0; i < n_sources; ++i) {
          const S** here = &corner[(i * block + s) * count];
          rows[i].prepare(job, sources[i].table, here, count);
        }
        S* row = out + (plane * job.M + first + s) * job.C;
        S* to = job.C == job.padded ? row : last.data();
        for (int64_t c = 0; c < job.padded; c += lanes<T>) {
          Vec<T> sums = weighted<count>(&corner[s * count], &weight[s * count], c);
          if (n_sources > 1)
            sums += weighted<count>(&corner[(block + s) * count], &weight[(block + s) * count], c);
          narrow(to + c, sums * share);
        }
        if (to != row) std::copy(to, to + job.C, row);
      }
    }
  }
}

template <class S>
FASTGEN_INLINE void gather_any(const Job<S>& job, const std::vector<Source<S>>& sources, int64_t begin,
                               int64_t end, S* out) {
  return job.mean ? gather_rows<12>(job, sources, begin, end, out)
                  : gather_rows<4>(job, sources, begin, end, out);
}

// The corners' products with the gradient, summed over channels: dots[4][block].
template <class S, class T>
FASTGEN_INLINE void multiply_corners(const Job<S>& job, const Table<const S>& table, int64_t p, int64_t first,
                                     int64_t n, const Positions<T>& at, Rows<S>& rows, S* last,
                                     T (*dots)[block]) {
  const S* corner[block][4];
  for (int64_t s = 0; s < n; ++s) corners(job, table, p, at, s, 0, job.H, job.zeros, corner[s]);
  for (int64_t s = 0; s < n; ++s) {
    rows.prepare(job, table, corner[s], 4);
    const S* g = job.gradient(p, first + s);
    if (job.C != job.padded) {
      std::copy(g, g + job.C, last);
      g = last;
    }
    Vec<T> sums[4]{};
    for (int64_t c = 0; c < job.padded; c += lanes<T>) {
      const Vec<T> v = widen(g + c);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sums[k] += v * widen(corner[s][k] + c);
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) dots[k][s] = sum<T>(sums[k]);
  }
}

// out [3, M]: gradients of points [begin, end): of samples of `table`, and of slopes of `mixed`.
template <class S>
FASTGEN_INLINE void differentiate_any(const Job<S>& job, const Table<const S>& table,
                                      const Table<const S>& mixed, int64_t begin, int64_t end,
                                      accumulator_t<S>* out) {
  using T = accumulator_t<S>;
  Positions<T> at;
  T dots[4][block], du[block], dv[block];
  Rows<S> rows(job, table), mixed_rows(job, mixed);
  std::vector<S> last(job.padded);
  const T x = job.share() * static_cast<T>(job.W) / 2, y = job.share() * static_cast<T>(job.H) / 2;
  for (int64_t first = begin, n; first < end; first += n) {
    n = std::min(block, end - first);
    for (int64_t k = 0; k < 3; ++k) std::fill(out + k * job.M + first, out + k * job.M + first + n, T(0));
    for (int64_t p = 0; p < 3; ++p) {
      find(job, p, first, n, at);
      std::fill(du, du + n, T(0));
      std::fill(dv, dv + n, T(0));
      if (table.data) {
        multiply_corners(job, table, p, first, n, at, rows, last.data(), dots);
        for (int64_t s = 0; s < n; ++s) {
          const T a = at.a[s], b = at.b[s];
          du[s] = (1 - b) * (dots[1][s] - dots[0][s]) + b * (dots[3][s] - dots[2][s]);
          dv[s] = (1 - a) * (dots[2][s] - dots[0][s]) + a * (dots[3][s] - dots[1][s]);
        }
      }
      if (mixed.data) {
        multiply_corners(job, mixed, p, first, n, at, mixed_rows, last.data(), dots);
        for (int64_t s = 0; s < n; ++s) {
          const T second = dots[0][s] - dots[1][s] - dots[2][s] + dots[3][s];
          du[s] += second * at.qv[s];
          dv[s] += second * at.qu[s];
        }
      }
      for (int64_t k = 0; k < 6; ++k) {
        const T scale = job.matrix[6 * p + k] * (k < 3 ? x : y), *from = k < 3 ? du : dv;
        T* to = out + k % 3 * job.M + first;
        if (job.matrix[6 * p + k] == 0) continue;
        for (int64_t s = 0; s < n; ++s) to[s] += scale * from[s];
      }
    }
  }
}

// Adds the gradients of channels [c, c + lanes) of rows [top, bottom) of plane p: all its points, in order.
template <class S>
FASTGEN_INLINE void scatter_any(const Job<S>& job, const Table<accumulator_t<S>>& table, int64_t p, int64_t c,
                                int64_t top, int64_t bottom) {
  using T = accumulator_t<S>;
  Positions<T> at;
  T* corner[block][4];
  S last[lanes<T>]{};
  const int64_t here = std::min(lanes<T>, job.C - c);
  const T share = job.share();
  for (int64_t first = 0, n; first < job.M; first += n) {
    n = std::min(block, job.M - first);
    find(job, p, first, n, at);
    weigh(job.directions, n, at);
    for (int64_t s = 0; s < n; ++s)
      corners(job, table, p, at, s, top, bottom, static_cast<T*>(nullptr), corner[s]);
    for (int64_t s = 0; s < n; ++s) {
      const S* g = job.gradient(p, first + s) + c;
      if (here < lanes<T>) {
        std::copy(g, g + here, last);
        g = last;
      }
      const Vec<T> v = share * widen(g);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        T* to = corner[s][k];
        if (to) store(to + c, load(to + c) + at.weight[k][s] * v);
      }
    }
  }
}

// Each compiled once for every instruction set.
#define FASTGEN_FOR(S)                                                                                     \
  FASTGEN_SIMD void gather(const Job<S>& job, const std::vector<Source<S>>& sources, int64_t begin,        \
                           int64_t end, S* out) {                                                          \
    gather_any<S>(job, sources, begin, end, out);                                                          \
  }                                                                                                        \
  FASTGEN_SIMD void differentiate(const Job<S>& job, const Table<const S>& table,                          \
                                  const Table<const S>& mixed, int64_t begin, int64_t end,                 \
                                  accumulator_t<S>* out) {                                                 \
    differentiate_any<S>(job, table, mixed, begin, end, out);                                              \
  }                                                                                                        \
  FASTGEN_SIMD void scatter(const Job<S>& job, const Table<accumulator_t<S>>& table, int64_t p, int64_t c, \
                            int64_t top, int64_t bottom) {                                                 \
    scatter_any<S>(job, table, p, c, top, bottom);                                                         \
  }
FASTGEN_FOR(float)
FASTGEN_FOR(double)
FASTGEN_FOR(BFloat16)
FASTGEN_FOR(Half)
#undef FASTGEN_FOR

}  // namespace
}  // namespace fastgen
