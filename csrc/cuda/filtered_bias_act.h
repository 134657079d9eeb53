// The kernels of filtered_bias_act and of its gradient. Images are in memory [N, H, W, C]. Either a thread
// makes a tile of pixels, 16 bytes of channels of each, under a filter of few taps; or a thread makes one
// number.
#pragma once
#include "activations.h"
#include "fir.h"

namespace fastgen {
namespace {

template <class T>
constexpr ScalarType wide = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// Pixels of an image whose row and column have the parities of one of four, as they are in memory: phases
// that came as tensors of their own, or every other pixel of a whole image.
template <class S>
struct Phase {
  const S* pixels;
  int64_t image, row, column;  // elements to the next one
};

template <class S>
struct Job {
  using T = accumulator_t<S>;
  Phase<S> x[2][2];
  Taps<T> f;
  const T *scale, *noise, *bias, *next;  // or null
  int64_t noise_strides[4];
  Activation act;
  T alpha, gain, clamp;
  int64_t channels, height, width, out_h, out_w, top, left;
  S* out;  // the result, or the gradient of the filtered image
  bool contiguous;
  int shift_y, shift_x;  // of the first tile, so that all see a pixel of even row and column first
  int64_t tiles_y, tiles_x, count;
  int run;  // threads along a row, before those along channels
  // Backward: sums over the pixels of a block, of g t and of g, in rows [images, blocks] of channels.
  const S* dy;
  T *d_scale, *d_bias, *d_noise;
  bool full;         // d_noise has channels
  int lanes, steps;  // threads along channels; tiles a thread takes
  int64_t blocks;    // an image
};

// A thread's channels in the accumulating type, or what stands for none.
template <class T, int width>
__device__ __forceinline__ void load_row(const T* from, int64_t at, T none, T (&to)[width]) {
  constexpr int step = width % widest<T> ? 1 : widest<T>;
#pragma unroll
  for (int k = 0; k < width; k += step) {
    Pack<T, step> pack;
    if (from) pack = *reinterpret_cast<const Pack<T, step>*>(from + at + k);
#pragma unroll
    for (int j = 0; j < step; ++j) to[k + j] = from ? pack.values[j] : none;
  }
}

// t of a tile whose window begins at row y and column x. With taps = 0 it is one pixel under any filter.
template <int taps, class S, int tile_y, int tile_x, int width, class T>
__device__ __forceinline__ void filter(const Job<S>& job, const T* weights, int64_t n, int64_t y, int64_t x,
                                       int64_t c, T (&t)[tile_y][tile_x][width]) {
  const auto read = [&](const Phase<S>& phase, int64_t r, int64_t q, T(&v)[width]) {
    if (r < 0 || r >= job.height || q < 0 || q >= job.width) return false;
    load<S, width>(phase.pixels + n * phase.image + (r >> 1) * phase.row + (q >> 1) * phase.column + c, v);
    return true;
  };
  if constexpr (taps > 0) {
    filter_tile<1, 1, taps>(
        [&](int i, int j, T(&v)[width]) { return read(job.x[i % 2][j % 2], y + i, x + j, v); }, weights,
        job.f.rows, job.f.columns, t);
  } else {
    for (int i = 0; i < job.f.rows; ++i) {
      for (int j = 0; j < job.f.columns; ++j) {
        T v[width];
        if (!read(job.x[(y + i) & 1][(x + j) & 1], y + i, x + j, v)) continue;
        const T weight = job.f.at(i, j);
#pragma unroll
        for (int k = 0; k < width; ++k) t[0][0][k] += weight * v[k];
      }
    }
  }
}

// A thread's place: its channels, and a tile of pixels.
template <class T, int width>
struct Place {
  int64_t n, c;
  T scale[width], bias[width];

  template <class S>
  __device__ __forceinline__ void read(const Job<S>& job) {
    load_row<T, width>(job.scale, n * job.channels + c, T(1), scale);
    load_row<T, width>(job.bias, c, T(0), bias);
  }

  // t scale + noise + b
  template <class S>
  __device__ __forceinline__ void shift(const Job<S>& job, int64_t y, int64_t x, const T (&t)[width],
                                        T (&v)[width]) const {
    const int64_t* strides = job.noise_strides;
    const T* noise = job.noise ? job.noise + n * strides[0] + y * strides[2] + x * strides[3] : nullptr;
    const T z = noise && !strides[1] ? *noise : T(0);
#pragma unroll
    for (int k = 0; k < width; ++k) v[k] = t[k] * scale[k] + (bias[k] + z);
    if (!noise || !strides[1]) return;
#pragma unroll
    for (int k = 0; k < width; ++k) v[k] += noise[(c + k) * strides[1]];
  }
};

template <Activation A, int order, class T, int width, class S>
__device__ __forceinline__ void map(T (&v)[width], const T (&g)[width], const Job<S>& job) {
#pragma unroll
  for (int k = 0; k < width; ++k) v[k] = activate<A, order, T>(v[k], g[k], job.alpha, job.gain, job.clamp);
}

// Where tiles are made it is lrelu, of alpha 1 if linear.
template <bool any, int order, class T, int width, class S>
__device__ __forceinline__ void activate_all(T (&v)[width], const T (&g)[width], const Job<S>& job) {
  if constexpr (!any) return map<Activation::lrelu, order>(v, g, job);
  with_activation(job.act, [&](auto is) { map<is.value, order>(v, g, job); });
}

template <class S, int taps, int tile_y, int tile_x, int width>
__global__ void __launch_bounds__(threads, 2) filtered_bias_act_kernel(const Job<S> job) {
  using T = accumulator_t<S>;
  __shared__ T weights[taps ? taps * taps : 1];
  if constexpr (taps > 0) share<taps>(job.f, weights);
  int64_t rest = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (rest >= job.count) return;
  Place<T, width> at;
  const int64_t lane = split_off(rest, job.run);
  at.c = split_off(rest, job.channels / width) * width;
  const int64_t ox =
      (split_off(rest, ceil_div(job.tiles_x, job.run)) * job.run + lane) * tile_x - job.shift_x;
  const int64_t oy = split_off(rest, job.tiles_y) * tile_y - job.shift_y;
  at.n = rest;

  T t[tile_y][tile_x][width] = {};
  filter<taps>(job, weights, at.n, oy - job.top, ox - job.left, at.c, t);
  T next[width];
  at.read(job);
  load_row<T, width>(job.next, at.n * job.channels + at.c, T(1), next);

  const int64_t plane = job.out_h * job.out_w;
#pragma unroll
  for (int i = 0; i < tile_y; ++i) {
    if (oy + i < 0 || oy + i >= job.out_h) continue;
#pragma unroll
    for (int j = 0; j < tile_x; ++j) {
      if (ox + j < 0 || ox + j >= job.out_w) continue;
      T v[width];
      at.shift(job, oy + i, ox + j, t[i][j], v);
      activate_all<taps == 0, 0>(v, v, job);
#pragma unroll
      for (int k = 0; k < width; ++k) v[k] *= next[k];
      const int64_t pixel = (oy + i) * job.out_w + ox + j;
      if (!job.contiguous) {
        store<S, width>(job.out + (at.n * plane + pixel) * job.channels + at.c, v);
        continue;
      }
      S* out = job.out + (at.n * job.channels + at.c) * plane + pixel;
#pragma unroll
      for (int k = 0; k < width; ++k) out[k * plane] = static_cast<S>(v[k]);
    }
  }
}

// A block takes some tiles of pixels with all their channels, `lanes` threads a tile.
template <class S, int taps, int tile, int width>
__global__ void __launch_bounds__(threads, 2) filtered_bias_act_bwd_kernel(const Job<S> job) {
  using T = accumulator_t<S>;
  constexpr int apart = threads + 4;  // of other banks
  __shared__ T weights[taps ? taps * taps : 1];
  __shared__ T sums[2 * width * apart];
  if constexpr (taps > 0) share<taps>(job.f, weights);
  const int lane = threadIdx.x % job.lanes, group = threadIdx.x / job.lanes, groups = threads / job.lanes;
  int64_t image = blockIdx.x;
  const int64_t first = split_off(image, job.blocks) * job.steps * groups + group;
  Place<T, width> at;
  at.n = image;

  for (int64_t chunk = 0; chunk < job.channels; chunk += job.lanes * width) {
    const bool known = chunk + lane * width < job.channels;
    at.c = known ? chunk + lane * width : 0;
    T d_scale[width] = {}, d_bias[width] = {};
    for (int step = 0; step < job.steps; ++step) {
      int64_t row = first + step * groups;
      const bool there = known && row < job.tiles_y * job.tiles_x;
      const int64_t ox = split_off(row, job.tiles_x) * tile - job.shift_x, oy = row * tile - job.shift_y;
      T t[tile][tile][width] = {};
      if (there) filter<taps>(job, weights, at.n, oy - job.top, ox - job.left, at.c, t);
      at.read(job);  // not before the loop: it would keep registers from the filter
#pragma unroll
      for (int i = 0; i < tile; ++i) {
#pragma unroll
        for (int j = 0; j < tile; ++j) {
          const int64_t y = oy + i, x = ox + j;
          const bool inside = y >= 0 && y < job.out_h && x >= 0 && x < job.out_w;
          const int64_t pixel = (at.n * job.out_h + y) * job.out_w + x, pack = pixel * job.channels + at.c;
          T sum = 0;
          if (there && inside) {
            T v[width], g[width];
            load<S, width>(job.dy + pack, g);
            at.shift(job, y, x, t[i][j], v);
            activate_all<taps == 0, 1>(v, g, job);
#pragma unroll
            for (int k = 0; k < width; ++k) {
              d_scale[k] += v[k] * t[i][j][k];
              d_bias[k] += v[k];
              sum += v[k];
              if (job.full) job.d_noise[pack + k] = v[k];
              v[k] *= at.scale[k];
            }
            store<S, width>(job.out + pack, v);
          }
          if (!job.d_noise || job.full) continue;
          for (int m = 1; m < job.lanes; m *= 2) sum += __shfl_xor_sync(0xffffffff, sum, m);
          if (there && inside && lane == 0) job.d_noise[pixel] = chunk ? job.d_noise[pixel] + sum : sum;
        }
      }
    }

#pragma unroll
    for (int k = 0; k < width; ++k) {
      sums[k * apart + threadIdx.x] = d_scale[k];
      sums[(width + k) * apart + threadIdx.x] = d_bias[k];
    }
    __syncthreads();
    for (int item = threadIdx.x; item < 2 * width * job.lanes; item += threads) {
      const int k = item / job.lanes, of = item % job.lanes;
      const int64_t c = chunk + of * width + k % width;
      if (c >= job.channels) continue;
      T sum = 0;
      for (int from = of; from < threads; from += job.lanes) sum += sums[k * apart + from];
      (k < width ? job.d_scale : job.d_bias)[static_cast<int64_t>(blockIdx.x) * job.channels + c] = sum;
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace fastgen
