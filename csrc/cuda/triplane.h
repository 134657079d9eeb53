// Where points are on three planes, and the planes' pixels around them.
#pragma once
#include <cmath>

#include "launch.h"

namespace fastgen {
namespace {

template <class T>
struct Job {
  int64_t N, C, M;
  int H, W;
  bool mean;
  T matrix[18];
  const T* points;      // [N, M, 3]
  const T* directions;  // [N, M, 3]: what the coordinates are changed by; or null

  __device__ __forceinline__ int64_t row(int64_t n, int plane, int64_t m) const {  // of a sample
    return mean ? n * M + m : (n * 3 + plane) * M + m;
  }
  __device__ __forceinline__ T share() const { return mean ? T(1) / 3 : T(1); }
};

// Planes [N, 3, C, H, W], by their strides.
template <class S>
struct Table {
  S* data = nullptr;
  int64_t image = 0, plane = 0, channel = 0, row = 0, column = 0;
};

// A point on a plane: its cell's upper left pixel, from -2 to W and H, and the fractions.
template <class T>
struct alignas(sizeof(T) == 4 ? 16 : 8) Place {
  int column, row;
  T a, b;
};

// Its direction, in pixels.
template <class T>
struct Slope {
  T u, v;
};

// Not to be contracted to one operation: that rounds otherwise than the reference does, and finds another
// pixel at times.
__device__ __forceinline__ float multiply(float a, float b) {
  return __fmul_rn(a, b);
}
__device__ __forceinline__ double multiply(double a, double b) {
  return __dmul_rn(a, b);
}
__device__ __forceinline__ float add(float a, float b) {
  return __fadd_rn(a, b);
}
__device__ __forceinline__ double add(double a, double b) {
  return __dadd_rn(a, b);
}

// A zero selects: it makes no NaN of what it leaves out.
template <class T>
__device__ __forceinline__ T project(const T* row, const T* point) {
  T sum = 0;
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    if (row[k] != 0) sum = add(sum, multiply(point[k], row[k]));
  }
  return sum;
}

// x in [-1, 1] to the pixel before it and the fraction.
template <class T>
__device__ __forceinline__ int split(int size, T& x) {
  const T limit = static_cast<T>(size);
  const T u = multiply(add(multiply(add(x, T(1)), limit), T(-1)), T(0.5));
  T whole = std::floor(u);
  x = u - whole;
  whole = whole >= -2 ? whole : T(-2);  // NaN lies outside; its fraction, and so its weights, stay NaN
  return static_cast<int>(whole <= limit ? whole : limit);
}

template <class T>
__device__ __forceinline__ Place<T> locate(const Job<T>& job, int64_t point, int plane) {
  Place<T> place;
  place.a = project(job.matrix + 6 * plane, job.points + 3 * point);
  place.b = project(job.matrix + 6 * plane + 3, job.points + 3 * point);
  place.column = split(job.W, place.a);
  place.row = split(job.H, place.b);
  return place;
}

template <class T>
__device__ __forceinline__ Slope<T> direct(const Job<T>& job, int64_t point, int plane) {
  if (!job.directions) return {};
  return {project(job.matrix + 6 * plane, job.directions + 3 * point) * (static_cast<T>(job.W) / 2),
          project(job.matrix + 6 * plane + 3, job.directions + 3 * point) * (static_cast<T>(job.H) / 2)};
}

// The weight of a corner of the cell in a sample, or in its derivative along the direction.
template <class T>
__device__ __forceinline__ T weigh(const Place<T>& at, const Slope<T>& slope, bool sloped, bool right,
                                   bool below) {
  const T a = right ? at.a : 1 - at.a, b = below ? at.b : 1 - at.b;
  return sloped ? (right ? b : -b) * slope.u + (below ? a : -a) * slope.v : a * b;
}

// Where a block's points are: [per][3].
template <class T>
struct Places {
  Place<T>* at;
  Slope<T>* slopes;

  static int64_t bytes(int per) {
    return 3 * per * static_cast<int64_t>(sizeof(Place<T>) + sizeof(Slope<T>));
  }

  __device__ __forceinline__ Places(const Job<T>& job, int64_t first, int per)
      : at(shared_memory<Place<T>>()), slopes(reinterpret_cast<Slope<T>*>(at + 3 * per)) {
    for (int k = threadIdx.x; k < 3 * per && first + k / 3 < job.N * job.M; k += threads) {
      at[k] = locate(job, first + k / 3, k % 3);
      slopes[k] = direct(job, first + k / 3, k % 3);
    }
    __syncthreads();
  }
};

// visit(k, v) for the corners of a cell, 00, 01, 10 and 11: the channels from `c` on, zeros outside.
template <int width, class S, class T, class Visit>
__device__ __forceinline__ void visit_corners(const Job<T>& job, const Table<const S>& table, int64_t n,
                                              int plane, int64_t c, const Place<T>& at, const Visit& visit) {
  const S* corner = table.data + (n * table.image + plane * table.plane + at.row * table.row +
                                  at.column * table.column + c * table.channel);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int x = at.column + k % 2, y = at.row + k / 2;
    T v[width] = {};
    if (x >= 0 && x < job.W && y >= 0 && y < job.H) {
      load<S, width>(corner + (k % 2 * table.column + k / 2 * table.row), v);
    }
    visit(k, v);
  }
}

}  // namespace
}  // namespace fastgen
