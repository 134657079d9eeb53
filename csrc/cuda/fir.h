// FIR filters in kernels: taps as a correlation, and a tile of results from a window of inputs.
#pragma once
#include "launch.h"

namespace fastgen {

// Result o is the sum of c[k] z[o down + k - pad], where z has the samples with up - 1 zeros between them.
struct Axis {
  int up, down, taps;
  int64_t pad, in, out;

  // The first tap that falls on a sample, of result `o`, and the index of that sample.
  __device__ __forceinline__ void first(int64_t o, int& tap, int64_t& sample) const {
    const int64_t origin = o * down - pad, rest = origin % up;
    tap = static_cast<int>(rest > 0 ? up - rest : -rest);
    sample = (origin + tap) / up;
  }

  // The samples that `count` results see, at most.
  __host__ __device__ int64_t reach(int64_t count) const { return ((count - 1) * down + taps - 1) / up + 1; }
};

// f as the ops have it: [taps], [rows, columns], or null for the identity.
template <class T>
struct Taps {
  const T* f;
  int rows, columns;
  bool separable, flip;
  T gain;

  // The weight of input (y, x) of a window.
  __device__ __forceinline__ T at(int y, int x) const {
    if (!f) return gain;
    y = flip ? y : rows - 1 - y;
    x = flip ? x : columns - 1 - x;
    return gain * (separable ? f[y] * f[x] : f[static_cast<int64_t>(y) * columns + x]);
  }
};

// `f`, in the accumulating type where the kernel is; `keep` holds what the pointer is into.
template <class T>
Taps<T> taps_of(const char* op, const std::optional<Tensor>& f, bool flip, double gain, Tensor& keep) {
  Taps<T> taps{nullptr, 1, 1, false, flip, static_cast<T>(gain)};
  if (!f) return taps;
  FASTGEN_CHECK((f->dim() == 1 || f->dim() == 2) && f->numel() > 0, op,
                ": f must have 1 or 2 dimensions and at least one tap");
  FASTGEN_CHECK(f->numel() < (1 << 30), op, ": f has too many taps");
  const ScalarType wide = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  keep = torch::stable::contiguous(torch::stable::to(*f, wide));
  taps.f = data<T>(keep);
  taps.separable = f->dim() == 1;
  taps.rows = static_cast<int>(f->size(0));
  taps.columns = static_cast<int>(f->size(f->dim() - 1));
  return taps;
}

// Of `most` x `most` taps at most, to the memory of a block.
template <int most, class T>
__device__ __forceinline__ void share(const Taps<T>& taps, T* shared) {
  for (int k = threadIdx.x; k < most * most; k += blockDim.x) {
    const int y = k / most, x = k % most;
    shared[k] = y < taps.rows && x < taps.columns ? taps.at(y, x) : T(0);
  }
  __syncthreads();
}

// Output j of a tile sees, of input i of its window, tap i up - j down: known when compiling, where the first
// tap of output 0 falls on input 0.
template <int up, int down, int taps, int tile>
constexpr int window = ((tile - 1) * down + taps - 1) / up + 1;

// sums[y][x] of `width` channels each; read(i, j, v) gives input (i, j) of the window, or false if there is
// none.
template <int up, int down, int taps, int tile_y, int tile_x, int width, class T, class Read>
__device__ __forceinline__ void filter_tile(const Read& read, const T* weights, int rows, int columns,
                                            T (&sums)[tile_y][tile_x][width]) {
#pragma unroll
  for (int i = 0; i < window<up, down, taps, tile_y>; ++i) {
#pragma unroll
    for (int j = 0; j < window<up, down, taps, tile_x>; ++j) {
      T v[width];
      if (!read(i, j, v)) continue;
#pragma unroll
      for (int y = 0; y < tile_y; ++y) {
        const int ky = i * up - y * down;
        if (ky < 0 || ky >= taps || ky >= rows) continue;
#pragma unroll
        for (int x = 0; x < tile_x; ++x) {
          const int kx = j * up - x * down;
          if (kx < 0 || kx >= taps || kx >= columns) continue;
#pragma unroll
          for (int c = 0; c < width; ++c) sums[y][x][c] += weights[ky * taps + kx] * v[c];
        }
      }
    }
  }
}

}  // namespace fastgen
