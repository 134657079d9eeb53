// filtered_lrelu with separable filters of six taps a factor. Columns are upsampled from memory to shared
// memory; rows from there to there, activated and downsampled, in registers; columns of that are downsampled
// to memory. A thread makes a strip of results from one window of samples. Lanes are side by side along
// columns and, for rows, in rows of an odd number of pixels: banks do not collide.
#pragma once
#include "filtered_lrelu.h"

namespace fastgen {
namespace {

constexpr int lobes = 6;
constexpr int column_strip = 16;  // of upsampled rows
constexpr int result_strip = 8;   // of rows of results

// Results along x of a strip and of a tile; `step` is the factor to the results.
template <int step>
constexpr int row_strip = 32 / step;
template <int step, int channels>
constexpr int tile_width = row_strip<step> * (channels > 1 ? 1 : 2);

// Samples that `count` upsampled values see.
constexpr int seen(int count, int up) {
  return (count + up - 2) / up + lobes;
}

// Value `at` of a strip, whose first value has tap `phase` on its first sample.
template <int up, int n, class T>
__device__ __forceinline__ T upsampled(const T (&taps)[lobes * up], const T (&in)[n], int at, int phase) {
  const int sample = (at - phase + up - 1) / up, tap = sample * up + phase - at;
  T sum = 0;
#pragma unroll
  for (int i = 0; i < lobes; ++i) sum += taps[tap + i * up] * in[sample + i];
  return sum;
}

// Value `at` of those that a strip of results sees, to their sums.
template <int step, int n, class T>
__device__ __forceinline__ void add_to(T (&sums)[n], const T (&taps)[lobes * step], int at, T v) {
#pragma unroll
  for (int r = 0; r < n; ++r) {
    const int tap = at - r * step;
    if (tap >= 0 && tap < lobes * step) sums[r] += taps[tap] * v;
  }
}

template <int n, class T>
__device__ __forceinline__ void read_taps(const T* shared, T (&taps)[n]) {
  static_assert(n % 4 == 0);
#pragma unroll
  for (int i = 0; i < n; i += 4) {
    T four[4];
    load<T, 4>(shared + i, four);
#pragma unroll
    for (int j = 0; j < 4; ++j) taps[i + j] = four[j];
  }
}

template <int channels, int n, class T>
__device__ __forceinline__ void read_row(const T* from, T (&to)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) to[i] = from[i * channels];
}

template <int n, class T>
__device__ __forceinline__ void share_taps(const Taps<T>& f, T gain, T* shared) {
  const int k = threadIdx.x;
  if (k < n) shared[k] = f.f[f.flip ? k : n - 1 - k] * gain;
}

// body(i) with i < n known when compiling.
template <int n, class Body>
__device__ __forceinline__ void with_constant(int i, const Body& body) {
  if constexpr (n > 1) {
    if (i < n - 1) return with_constant<n - 1>(i, body);
  }
  body(std::integral_constant<int, n - 1>());
}

// Rows of a buffer that strips of `count` upsampled rows fill, the first of which begins up to up - 1 rows
// early.
__host__ __device__ inline int filled_rows(int64_t count, int up) {
  return static_cast<int>(ceil_div(count + up - 1, column_strip)) * column_strip;
}

// Columns of a tile upsampled along y, to rows from the one on that is returned.
template <int up, int channels, int pitch, class S>
__device__ __forceinline__ int upsample_columns(const S* in, const S* b, const Step& step, const Span& rows,
                                                const Span& columns, const Job& job, const Tile& tile,
                                                const accumulator_t<S>* shared, accumulator_t<S>* to) {
  using T = accumulator_t<S>;
  constexpr int window = column_strip / up + lobes;
  T taps[lobes * up];
  read_taps(shared, taps);
  // Strips begin where tap 0 falls on a sample.
  const Span y = samples(step.y, rows);
  const int lead = y.tap ? up - y.tap : 0;
  const int64_t top = y.begin - (lead > 0);
  const int width = columns.count * channels;
  const int items = static_cast<int>(ceil_div(rows.count + lead, column_strip)) * width;
  const int64_t stride = step.x.in * job.channels;
  const S* const image = in + tile.image * step.y.in * stride;
  for (int k = threadIdx.x; k < items; k += threads) {
    const int q = k % width, strip = k / width;
    const int64_t x = columns.begin + q / channels, c = tile.c + q % channels;
    const int64_t row = top + strip * (column_strip / up);
    // Of the window, in the image: from `begin` to `end`.
    int begin = 0, end = 0;
    T bias = 0;
    if (x >= 0 && x < step.x.in && c < job.channels && row > -window) {
      begin = row < 0 ? static_cast<int>(-row) : 0;
      end = step.y.in - row < window ? static_cast<int>(step.y.in - row) : window;
      if (b) bias = static_cast<T>(b[c]);
    }
    const S* from = image + row * stride + x * job.channels + c;
    T v[window];
    if (end - begin == window) {
#pragma unroll
      for (int i = 0; i < window; ++i, from += stride) v[i] = static_cast<T>(*from) + bias;
    } else {
#pragma unroll
      for (int i = 0; i < window; ++i, from += stride) {
        v[i] = i >= begin && i < end ? static_cast<T>(*from) + bias : T(0);
      }
    }
    T* const rows = to + strip * column_strip * pitch + q;
#pragma unroll
    for (int r = 0; r < column_strip; ++r) rows[r * pitch] = upsampled<up>(taps, v, r, 0);
  }
  return lead;
}

// Shared, in elements: taps, columns of x and of dy upsampled, and downsampled rows.
template <int up, int down, bool backward, int channels>
struct Sizes {
  static constexpr int step = backward ? up : down, width = (tile_width<step, channels> + lobes - 1) * step;
  static constexpr int pitch_x = (seen(width, up) | 1) * channels;
  static constexpr int pitch_dy = backward ? (seen(width, down) | 1) * channels : 0;
  static constexpr int pitch_out = (tile_width<step, channels> | 1) * channels;
  static constexpr int taps = lobes * (up + down);
  int x, dy, out;

  __host__ __device__ explicit Sizes(int height) {
    const int rows = (height + lobes - 1) * step;
    x = pitch_x * filled_rows(rows, up);
    dy = pitch_dy * filled_rows(rows, down);
    out = pitch_out * rows;
  }
  __host__ __device__ int total() const { return taps + x + dy + out; }
};

// The numbers that are known when compiling, so that divisions are by constants.
template <int up, int down, bool backward>
__host__ __device__ __forceinline__ void set_known(Job& job) {
  for (Axis Step::* axis : {&Step::x, &Step::y}) {
    Axis &first = job.first.*axis, &second = job.second.*axis, &last = job.last.*axis;
    first.up = up, first.down = 1, first.taps = lobes * up;
    second.up = down, second.down = 1, second.taps = lobes * down;
    last.up = 1, last.down = backward ? up : down, last.taps = lobes * last.down;
  }
}

template <class S, int up, int down, int channels, bool backward>
__global__ void __launch_bounds__(threads, backward ? 2 : 3)
    filtered_lrelu_strips_kernel(Arguments<S> a, Job job) {
  using T = accumulator_t<S>;
  constexpr int step = backward ? up : down, strip = row_strip<step>;
  constexpr int fine = (strip + lobes - 1) * step;  // what a strip of results sees
  set_known<up, down, backward>(job);
  using Buffers = Sizes<up, down, backward, channels>;
  const Buffers sizes(job.block_y);
  T* const first_taps = shared_memory<T>();
  T* const other_taps = first_taps + lobes * up;
  T* columns = first_taps + Buffers::taps;
  T* gradients = columns + sizes.x;
  T* const rows = gradients + sizes.dy;
  Tile tile(job);
  // In whole strips, but none that is all outside.
  const auto cut = [](Span& part, int64_t size, int strip) {
    const int64_t left = ceil_div(size - part.begin, strip) * strip;
    if (left < part.count) part.count = static_cast<int>(left);
  };
  cut(tile.x, job.last.x.out, strip);
  cut(tile.y, job.last.y.out, result_strip);
  const Span fine_x = samples(job.last.x, tile.x), fine_y = samples(job.last.y, tile.y);
  const Span x = samples(job.first.x, fine_x), dy = samples(job.second.x, fine_x);

  share_taps<lobes * up>(a.first, T(up), first_taps);
  share_taps<lobes * down>(backward ? a.second : a.last, T(1), other_taps);
  __syncthreads();
  columns += Buffers::pitch_x *
             upsample_columns<up, channels, Buffers::pitch_x>(a.x, biases_of(a.b, job, tile), job.first,
                                                              fine_y, x, job, tile, first_taps, columns);
  if constexpr (backward) {
    gradients +=
        Buffers::pitch_dy * upsample_columns<down, channels, Buffers::pitch_dy, S>(
                                a.dy, nullptr, job.second, fine_y, dy, job, tile, other_taps, gradients);
  }
  __syncthreads();

  T up_taps[lobes * up], down_taps[lobes * down], last_taps[lobes * step];
  read_taps(first_taps, up_taps);
  read_taps(other_taps, down_taps);
#pragma unroll
  for (int i = 0; i < lobes * step; ++i) {
    last_taps[i] = backward ? up_taps[lobes * up - 1 - i] : down_taps[i];
  }
  with_constant<backward ? down : up>(backward ? dy.tap : x.tap, [&](auto phase) {
    constexpr int phase_x = backward ? up - 1 : phase();  // for the gradient it is always this one
    for (int k = threadIdx.x; k < channels * fine_y.count * (tile.x.count / strip); k += threads) {
      const int c = k % channels, row = k / channels % fine_y.count, i = k / channels / fine_y.count;
      T v[seen(fine, up)];
      read_row<channels>(columns + row * Buffers::pitch_x + i * (strip * step / up) * channels + c, v);
      [[maybe_unused]] T g[seen(fine, down)];
      if constexpr (backward) {
        read_row<channels>(gradients + row * Buffers::pitch_dy + i * (strip * step / down) * channels + c, g);
      }
      T sums[strip] = {};
#pragma unroll
      for (int at = 0; at < fine; ++at) {
        T value = upsampled<up>(up_taps, v, at, phase_x);
        if constexpr (backward) {
          value = a.gradient(value, upsampled<down>(down_taps, g, at, phase()));
        } else {
          value = a.activated(value);
        }
        add_to<step>(sums, last_taps, at, value);
      }
      T* to = rows + row * Buffers::pitch_out + i * strip * channels + c;
#pragma unroll
      for (int r = 0; r < strip; ++r) to[r * channels] = sums[r];
    }
  });
  __syncthreads();

  const int width = tile.x.count * channels;
  const int64_t stride = job.last.x.out * job.channels;
  for (int k = threadIdx.x; k < width * (tile.y.count / result_strip); k += threads) {
    const int q = k % width, first = k / width * result_strip;
    const T* from = rows + first * step * Buffers::pitch_out + q;
    T sums[result_strip] = {};
#pragma unroll
    for (int at = 0; at < (result_strip + lobes - 1) * step; ++at) {
      add_to<step>(sums, last_taps, at, from[at * Buffers::pitch_out]);
    }
    const int64_t x = tile.x.begin + q / channels, c = tile.c + q % channels, y = tile.y.begin + first;
    if (x >= job.last.x.out || c >= job.channels) continue;
    const int left = job.last.y.out - y < result_strip ? static_cast<int>(job.last.y.out - y) : result_strip;
    S* to = a.out + (tile.image * job.last.y.out + y) * stride + x * job.channels + c;
#pragma unroll
    for (int r = 0; r < result_strip; ++r, to += stride) {
      if (r < left) *to = static_cast<S>(sums[r]);
    }
  }
}

template <class S, bool backward, int up, int down, int channels>
void run_strips(const Launch& on, const Arguments<S>& arguments, Job job) {
  constexpr int step = backward ? up : down, strips = tile_width<step, channels> / row_strip<step> * channels;
  const auto bytes = [](int height) {
    return Sizes<up, down, backward, channels>(height).total() * static_cast<int64_t>(sizeof(float));
  };
  // As high as there are threads for the strips of rows; then tiles of one height.
  int height = (threads / (strips * step) - (lobes - 1)) / result_strip * result_strip;
  while (height > result_strip && bytes(height) > little_memory) height -= result_strip;
  const int64_t tiles = ceil_div(job.last.y.out, height);
  job.block_c = channels;
  job.block_x = tile_width<step, channels>;
  job.block_y = static_cast<int>(ceil_div(ceil_div(job.last.y.out, tiles), result_strip)) * result_strip;
  launch(on, filtered_lrelu_strips_kernel<S, up, down, channels, backward>, bytes(job.block_y), arguments,
         job);
}

template <class S, bool backward, int up, int down>
bool run_strips(const Launch& on, const Arguments<S>& arguments, const Job& job) {
  const Taps<accumulator_t<S>>&fu = arguments.first, &fd = backward ? arguments.second : arguments.last;
  if (job.first.x.up != up || job.second.x.up != down) return false;
  if (!fu.separable || !fd.separable || fu.rows != lobes * up || fd.rows != lobes * down) return false;
  const auto run =
      job.channels == 1 ? run_strips<S, backward, up, down, 1> : run_strips<S, backward, up, down, 4>;
  run(on, arguments, job);
  return true;
}

}  // namespace
}  // namespace fastgen
