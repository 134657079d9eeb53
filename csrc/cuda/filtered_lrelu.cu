// filtered_lrelu and its gradient, each in one kernel: a block makes a tile of results, and what is between
// them and the inputs is in its shared memory. Filters of six taps a factor, in the factors of StyleGAN3's
// layers, have code of their own, whose sums are in registers; all others have loops.
#include <limits>

#include "fir.h"

namespace fastgen {
namespace {

// Result o is the sum of c[k] z[o down + k - pad], where z has the samples with up - 1 zeros between them.
struct Axis {
  int up, down, taps;
  int64_t pad, in, out;
};

// Part of an axis. The first tap of the first result made of it that falls on a sample falls on `begin`.
struct Span {
  int64_t begin;
  int count, tap;
};

// The samples that `count` results see, at most.
__host__ __device__ inline int64_t reach(const Axis& axis, int64_t count) {
  return ((count - 1) * axis.down + axis.taps - 1) / axis.up + 1;
}

__device__ __forceinline__ Span samples(const Axis& axis, const Span& results) {
  const int64_t origin = results.begin * axis.down - axis.pad, rest = origin % axis.up;
  const int tap = static_cast<int>(rest > 0 ? axis.up - rest : -rest);
  return {(origin + tap) / axis.up, static_cast<int>(reach(axis, results.count)), tap};
}

struct Step {
  Axis x, y;
};

// From x to the upsampled image, from dy to there (for the gradient), and from there to the result.
struct Job {
  Step first, second, last;
  int64_t channels;  // 1 in memory [N, C, H, W], and images then are planes
  int64_t images, biases;
  int64_t tiles_x, tiles_y;
  int block_x, block_y, block_c;
};

template <class S>
struct Arguments {
  using T = accumulator_t<S>;
  const S *x, *dy, *b;
  S* out;
  Taps<T> first, second, last;
  T positive, negative, clamp;  // what values above and below zero are multiplied by
  bool clamps;

  __device__ __forceinline__ T activated(T v) const {
    v *= v > 0 ? positive : negative;
    v = v < -clamp ? -clamp : v;
    return v > clamp ? clamp : v;
  }
  // The gradient of v for that of its activation.
  __device__ __forceinline__ T gradient(T v, T g) const {
    const T factor = v > 0 ? positive : negative, y = v * factor;
    return !clamps || (y > -clamp && y < clamp) ? factor * g : T(0);
  }
};

// The tile of results that a block makes.
struct Tile {
  int64_t c, image;
  Span x, y;

  __device__ __forceinline__ explicit Tile(const Job& job) {
    int64_t rest = blockIdx.x;
    c = split_off(rest, ceil_div(job.channels, job.block_c)) * job.block_c;
    x = {split_off(rest, job.tiles_x) * job.block_x, job.block_x, 0};
    y = {split_off(rest, job.tiles_y) * job.block_y, job.block_y, 0};
    image = rest;
  }
};

template <class S>
__device__ __forceinline__ const S* biases_of(const S* b, const Job& job, const Tile& tile) {
  return b ? b + tile.image * job.channels % job.biases : nullptr;
}

// Samples and their bias, to [y, x, c]; zeros where there are none.
template <class S>
__device__ __forceinline__ void load_tile(const S* in, const S* b, const Step& step, const Span& y,
                                          const Span& x, const Job& job, const Tile& tile,
                                          accumulator_t<S>* to) {
  using T = accumulator_t<S>;
  for (int k = threadIdx.x; k < y.count * x.count * job.block_c; k += threads) {
    const int64_t c = tile.c + k % job.block_c, column = x.begin + k / job.block_c % x.count;
    const int64_t row = y.begin + k / job.block_c / x.count;
    T v = 0;
    if (c < job.channels && column >= 0 && column < step.x.in && row >= 0 && row < step.y.in) {
      v = static_cast<T>(in[((tile.image * step.y.in + row) * step.x.in + column) * job.channels + c]);
      if (b) v += static_cast<T>(b[c]);
    }
    to[k] = v;
  }
  __syncthreads();
}

// The sum over the taps for result `at` of an axis: term(tap, sample) are the summands.
template <class T, class Term>
__device__ __forceinline__ T sum_of(const Axis& axis, const Span& in, int at, const Term& term) {
  const int origin = at * axis.down - in.tap;
  int sample = (origin + axis.up - 1) / axis.up;
  T sum = 0;
  for (int tap = sample * axis.up - origin; tap < axis.taps; tap += axis.up, ++sample)
    sum += term(tap, sample);
  return sum;
}

// A step for one tile, filtered along x and then along y, or both at once; write(k, y, x, c, sum) takes the
// results.
template <class T, class Write>
__device__ __forceinline__ void resample(const Step& step, const Taps<T>& f, const T* from, const Span& in_y,
                                         const Span& in_x, T* between, int height, int width, int channels,
                                         const Write& write) {
  const bool separable = !f.f || f.separable;
  const auto tap_of = [&](int k) { return f.f ? f.f[f.flip ? k : f.rows - 1 - k] : T(1); };
  if (separable) {
    for (int k = threadIdx.x; k < in_y.count * width * channels; k += threads) {
      const int c = k % channels, x = k / channels % width, y = k / channels / width;
      between[k] = sum_of<T>(step.x, in_x, x, [&](int tap, int sample) {
        return tap_of(tap) * from[(y * in_x.count + sample) * channels + c];
      });
    }
    __syncthreads();
  }
  for (int k = threadIdx.x; k < height * width * channels; k += threads) {
    const int c = k % channels, x = k / channels % width, y = k / channels / width;
    const T sum = sum_of<T>(step.y, in_y, y, [&](int ky, int row) {
      if (separable) return tap_of(ky) * f.gain * between[(row * width + x) * channels + c];
      return sum_of<T>(step.x, in_x, x, [&](int kx, int column) {
        return f.at(ky, kx) * from[(row * in_x.count + column) * channels + c];
      });
    });
    write(k, y, x, c, sum);
  }
  __syncthreads();
}

// Shared, in elements of all channels: inputs, what is filtered along x only, and the upsampled image.
struct Sizes {
  int64_t inputs, between, middle;

  __host__ __device__ Sizes(const Job& job, bool backward) {
    const int64_t height = reach(job.last.y, job.block_y), width = reach(job.last.x, job.block_x);
    middle = height * width * job.block_c;
    between = height * job.block_x * job.block_c;
    inputs = 0;
    for (const Step* step : {&job.first, &job.second}) {
      if (step == &job.second && !backward) continue;
      const int64_t rows = reach(step->y, height) * job.block_c;
      if (rows * reach(step->x, width) > inputs) inputs = rows * reach(step->x, width);
      if (rows * width > between) between = rows * width;
    }
  }
};

template <class S, bool backward>
__global__ void __launch_bounds__(threads) filtered_lrelu_kernel(Arguments<S> a, Job job) {
  using T = accumulator_t<S>;
  const Sizes sizes(job, backward);
  T* const inputs = shared_memory<T>();
  T* const between = inputs + sizes.inputs;
  T* const middle = between + sizes.between;
  const Tile tile(job);
  const Span middle_y = samples(job.last.y, tile.y), middle_x = samples(job.last.x, tile.x);
  const int channels = job.block_c;

  {
    const Span y = samples(job.first.y, middle_y), x = samples(job.first.x, middle_x);
    load_tile(a.x, biases_of(a.b, job, tile), job.first, y, x, job, tile, inputs);
    resample(job.first, a.first, inputs, y, x, between, middle_y.count, middle_x.count, channels,
             [&](int k, int, int, int, T sum) { middle[k] = backward ? sum : a.activated(sum); });
  }
  if (backward) {
    const Span y = samples(job.second.y, middle_y), x = samples(job.second.x, middle_x);
    load_tile<S>(a.dy, nullptr, job.second, y, x, job, tile, inputs);
    resample(job.second, a.second, inputs, y, x, between, middle_y.count, middle_x.count, channels,
             [&](int k, int, int, int, T sum) { middle[k] = a.gradient(middle[k], sum); });
  }
  const int64_t height = job.last.y.out, width = job.last.x.out;
  resample(job.last, a.last, middle, middle_y, middle_x, between, job.block_y, job.block_x, channels,
           [&](int, int y, int x, int c, T sum) {
             if (tile.y.begin + y >= height || tile.x.begin + x >= width || tile.c + c >= job.channels)
               return;
             const int64_t row = tile.image * height + tile.y.begin + y;
             a.out[(row * width + tile.x.begin + x) * job.channels + tile.c + c] = static_cast<S>(sum);
           });
}

// From here on: filters of six taps a factor. Columns are upsampled from memory to shared memory; rows from
// there to there, activated and downsampled, in registers; columns of that are downsampled to memory. A
// thread makes a strip of results from one window of samples. Lanes are side by side along columns and, for
// rows, in rows of an odd number of pixels: banks do not collide.

constexpr int lobes = 6;
constexpr int column_strip = 16;  // of upsampled rows
constexpr int result_strip = 8;   // of rows of results

// Results along x of a strip; `step` is the factor to the results.
template <int step>
constexpr int row_strip = 32 / step;

__host__ __device__ constexpr int pitch_of(int64_t count, int channels) {
  return static_cast<int>(count | 1) * channels;
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

template <int n, class T>
__device__ __forceinline__ void share_taps(const Taps<T>& f, T gain, T* shared) {
  for (int k = threadIdx.x; k < n; k += threads) shared[k] = f.f[f.flip ? k : n - 1 - k] * gain;
}

// body(i) with i < n known when compiling.
template <int n, class Body>
__device__ __forceinline__ void with_constant(int i, const Body& body) {
  if constexpr (n > 1) {
    if (i < n - 1) return with_constant<n - 1>(i, body);
  }
  body(std::integral_constant<int, n - 1>());
}

template <int up, int channels, class S>
__device__ __forceinline__ void upsample_columns(const S* in, const S* b, const Step& step, const Span& rows,
                                                 int64_t left, int columns, const Job& job, const Tile& tile,
                                                 const accumulator_t<S>* shared, accumulator_t<S>* to,
                                                 int pitch) {
  using T = accumulator_t<S>;
  constexpr int window = column_strip / up + lobes;
  T taps[lobes * up];
  read_taps(shared, taps);
  const Span y = samples(step.y, rows);
  // Strips begin where tap 0 falls on a sample.
  const int lead = y.tap ? up - y.tap : 0;
  const int64_t top = y.begin - (y.tap > 0);
  const int strips = static_cast<int>(ceil_div(rows.count + lead, column_strip));
  const int width = columns * channels;
  const int64_t stride = step.x.in * job.channels;
  for (int k = threadIdx.x; k < width * strips; k += threads) {
    const int q = k % width, strip = k / width;
    const int64_t x = left + q / channels, c = tile.c + q % channels;
    const int64_t row = top + strip * (column_strip / up);
    T samples[window];
    // Of the window, in the image: from `begin` to `end`.
    int begin = 0, end = 0;
    int64_t at = 0;
    T bias = 0;
    if (x >= 0 && x < step.x.in && c < job.channels && row > -window) {
      begin = row < 0 ? static_cast<int>(-row) : 0;
      end = step.y.in - row < window ? static_cast<int>(step.y.in - row) : window;
      at = ((tile.image * step.y.in + row) * step.x.in + x) * job.channels + c;
      if (b) bias = static_cast<T>(b[c]);
    }
#pragma unroll
    for (int i = 0; i < window; ++i) {
      samples[i] = i >= begin && i < end ? static_cast<T>(in[at + i * stride]) + bias : T(0);
    }
#pragma unroll
    for (int r = 0; r < column_strip; ++r) {
      const T v = upsampled<up>(taps, samples, r, 0);
      const int y = strip * column_strip - lead + r;
      if (y >= 0 && y < rows.count) to[y * pitch + q] = v;
    }
  }
}

// Shared, in elements: taps, columns of x and of dy upsampled, and downsampled rows.
struct Pitches {
  int x, dy, out, rows, taps;

  __host__ __device__ Pitches(const Job& job, int channels, bool backward) {
    const int64_t width = reach(job.last.x, job.block_x);
    x = pitch_of(reach(job.first.x, width), channels);
    dy = backward ? pitch_of(reach(job.second.x, width), channels) : 0;
    out = pitch_of(job.block_x, channels);
    rows = static_cast<int>(reach(job.last.y, job.block_y));
    taps = backward ? job.first.x.taps + job.second.x.taps : job.first.x.taps + job.last.x.taps;
  }
  __host__ __device__ int64_t size() const { return taps + static_cast<int64_t>(rows) * (x + dy + out); }
};

template <class S, int up, int down, bool backward, int channels>
__global__ void __launch_bounds__(threads, 2) filtered_lrelu_strips_kernel(Arguments<S> a, Job job) {
  using T = accumulator_t<S>;
  constexpr int step = backward ? up : down, strip = row_strip<step>;
  constexpr int fine = (strip + lobes - 1) * step;  // what a strip of results sees
  const Pitches pitch(job, channels, backward);
  T* const first_taps = shared_memory<T>();
  T* const other_taps = first_taps + lobes * up;
  T* const columns = other_taps + lobes * down;
  T* const gradients = columns + pitch.rows * pitch.x;
  T* const rows = gradients + pitch.rows * pitch.dy;
  Tile tile(job);
  // In whole strips, but none that is all outside.
  const auto cut = [](Span& part, int64_t size, int strip) {
    const int64_t left = ceil_div(size - part.begin, strip) * strip;
    if (left < part.count) part.count = static_cast<int>(left);
  };
  cut(tile.x, job.last.x.out, strip);
  cut(tile.y, job.last.y.out, result_strip);
  const Span fine_x = samples(job.last.x, tile.x), fine_y = samples(job.last.y, tile.y);
  const Span x = samples(job.first.x, fine_x);

  share_taps<lobes * up>(a.first, T(up), first_taps);
  share_taps<lobes * down>(backward ? a.second : a.last, T(1), other_taps);
  __syncthreads();
  upsample_columns<up, channels>(a.x, biases_of(a.b, job, tile), job.first, fine_y, x.begin, x.count, job,
                                 tile, first_taps, columns, pitch.x);
  int phase = x.tap;
  if constexpr (backward) {
    const Span dy = samples(job.second.x, fine_x);
    upsample_columns<down, channels, S>(a.dy, nullptr, job.second, fine_y, dy.begin, dy.count, job, tile,
                                        other_taps, gradients, pitch.dy);
    phase = dy.tap;
  }
  __syncthreads();

  T last_taps[lobes * step];
  {
    T up_taps[lobes * up], down_taps[lobes * down];
    read_taps(first_taps, up_taps);
    read_taps(other_taps, down_taps);
#pragma unroll
    for (int i = 0; i < lobes * step; ++i) {
      if constexpr (backward) last_taps[i] = up_taps[lobes * step - 1 - i];
      if constexpr (!backward) last_taps[i] = down_taps[i];
    }
    with_constant<backward ? down : up>(phase, [&](auto constant) {
      // Of the gradient's tiles that of x is always this one.
      constexpr int phase_x = backward ? up - 1 : decltype(constant)::value;
      constexpr int phase_dy = decltype(constant)::value;
      for (int k = threadIdx.x; k < channels * fine_y.count * (tile.x.count / strip); k += threads) {
        const int c = k % channels, row = k / channels % fine_y.count, i = k / channels / fine_y.count;
        T v[(fine + up - 2) / up + lobes], g[(fine + down - 2) / down + lobes];
        const T* from = columns + row * pitch.x + i * (strip * step / up) * channels + c;
#pragma unroll
        for (int j = 0; j < static_cast<int>(sizeof(v) / sizeof(T)); ++j) v[j] = from[j * channels];
        if constexpr (backward) {
          from = gradients + row * pitch.dy + i * (strip * step / down) * channels + c;
#pragma unroll
          for (int j = 0; j < static_cast<int>(sizeof(g) / sizeof(T)); ++j) g[j] = from[j * channels];
        }
        T sums[strip] = {};
#pragma unroll
        for (int at = 0; at < fine; ++at) {
          const T value = upsampled<up>(up_taps, v, at, phase_x);
          if constexpr (backward) {
            add_to<step>(sums, last_taps, at, a.gradient(value, upsampled<down>(down_taps, g, at, phase_dy)));
          } else {
            add_to<step>(sums, last_taps, at, a.activated(value));
          }
        }
        T* to = rows + row * pitch.out + i * strip * channels + c;
#pragma unroll
        for (int r = 0; r < strip; ++r) to[r * channels] = sums[r];
      }
    });
  }
  __syncthreads();

  const int width = tile.x.count * channels;
  for (int k = threadIdx.x; k < width * (tile.y.count / result_strip); k += threads) {
    const int q = k % width, first = k / width * result_strip;
    const T* from = rows + first * step * pitch.out + q;
    T sums[result_strip] = {};
#pragma unroll
    for (int at = 0; at < (result_strip + lobes - 1) * step; ++at) {
      add_to<step>(sums, last_taps, at, from[at * pitch.out]);
    }
    const int64_t column = tile.x.begin + q / channels, c = tile.c + q % channels, row = tile.y.begin + first;
    if (column >= job.last.x.out || c >= job.channels) continue;
    S* to = a.out + ((tile.image * job.last.y.out + row) * job.last.x.out + column) * job.channels + c;
    const int64_t stride = job.last.x.out * job.channels;
#pragma unroll
    for (int r = 0; r < result_strip; ++r) {
      if (row + r < job.last.y.out) to[r * stride] = static_cast<S>(sums[r]);
    }
  }
}

// Shared memory: what leaves room for more blocks, and what a block has on every card.
constexpr int64_t little = 48 << 10, most = 96 << 10;

template <class S, bool backward>
struct Call {
  const Launch& on;
  Arguments<S> arguments;
  Job job;

  void launch(void (*kernel)(Arguments<S>, Job), int64_t bytes) {
    job.tiles_x = ceil_div(job.last.x.out, job.block_x);
    job.tiles_y = ceil_div(job.last.y.out, job.block_y);
    const int64_t blocks = job.images * job.tiles_y * job.tiles_x * ceil_div(job.channels, job.block_c);
    on.run(kernel, blocks, threads, bytes, arguments, job);
  }

  template <int up, int down, int channels>
  void run_strips() {
    constexpr int step = backward ? up : down, strip = row_strip<step>;
    const auto bytes = [&] {
      return Pitches(job, channels, backward).size() * static_cast<int64_t>(sizeof(float));
    };
    const auto round_up = [](int64_t size) {
      return static_cast<int>(ceil_div(size, result_strip)) * result_strip;
    };
    job.block_c = channels;
    job.block_x = channels > 1 || job.last.x.out <= strip ? strip : 2 * strip;
    // As high as there are threads for the strips of rows; then tiles of one height.
    const int strips = job.block_x / strip * channels;
    job.block_y = (threads / (strips * step) - (lobes - 1)) / result_strip * result_strip;
    while (job.block_y > result_strip && bytes() > little) job.block_y -= result_strip;
    job.block_y = round_up(ceil_div(job.last.y.out, ceil_div(job.last.y.out, job.block_y)));
    launch(filtered_lrelu_strips_kernel<S, up, down, backward, channels>, bytes());
  }

  template <int up, int down>
  bool run_strips() {
    const Taps<accumulator_t<S>>&fu = arguments.first, &fd = backward ? arguments.second : arguments.last;
    if (!fu.separable || !fd.separable || fu.rows != lobes * up || fd.rows != lobes * down) return false;
    if (job.channels == 1) {
      run_strips<up, down, 1>();
    } else {
      run_strips<up, down, 4>();
    }
    return true;
  }

  void run(int up, int down) {
    if constexpr (!std::is_same_v<S, double>) {
      if (up == 2 && down == 2 && run_strips<2, 2>()) return;
      if (up == 4 && down == 2 && run_strips<4, 2>()) return;
    }
    const auto bytes = [&] {
      const Sizes sizes(job, backward);
      return (sizes.inputs + sizes.between + sizes.middle) * static_cast<int64_t>(sizeof(accumulator_t<S>));
    };
    job.block_c = static_cast<int>(std::min<int64_t>(job.channels, 4));
    job.block_x = static_cast<int>(std::min<int64_t>(job.last.x.out, 32 / job.block_c));
    job.block_y = static_cast<int>(std::min<int64_t>(job.last.y.out, 32 / job.block_c));
    // Small tiles make much anew.
    while (bytes() > (job.block_x * job.block_y * job.block_c > 64 ? little : most)) {
      int& side = job.block_c > 1 ? job.block_c : job.block_y > job.block_x ? job.block_y : job.block_x;
      FASTGEN_CHECK(side > 1, on.op(), ": filters are too large for a kernel: one result takes ", bytes(),
                    " bytes of shared memory, and there are ", most);
      side = (side + 1) / 2;
    }
    launch(filtered_lrelu_kernel<S, backward>, bytes());
  }
};

template <bool backward>
Tensor apply(const Tensor* dy, const Tensor& x, const std::optional<Tensor>& fu,
             const std::optional<Tensor>& fd, const std::optional<Tensor>& b, int64_t up, int64_t down,
             const std::vector<int64_t>& padding, double gain, double slope, double clamp, bool flip_filter) {
  const char* op = "filtered_lrelu";
  const Launch on(op, x);
  FASTGEN_CHECK(x.dim() == 4, op, ": x must have 4 dimensions, got ", x.dim());
  FASTGEN_CHECK(up > 0 && down > 0 && padding.size() == 4, op, ": up, down or padding is not valid");
  for (int64_t value : {up, down, padding[0], padding[1], padding[2], padding[3]}) {
    FASTGEN_CHECK(std::abs(value) < (1 << 30), op, ": up, down or padding is too large: ", value);
  }
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  for (const auto* f : {&fu, &fd}) {
    FASTGEN_CHECK(!*f || (*f)->dim() == 1 || (*f)->dim() == 2, op, ": filters must have 1 or 2 dimensions");
    FASTGEN_CHECK(!*f || (*f)->is_cpu() == x.is_cpu(), op, ": filters must be on x's device");
  }
  FASTGEN_CHECK(!b || (b->dim() == 1 && b->size(0) == C && b->is_cpu() == x.is_cpu()), op,
                ": b must have C elements");

  Job job{};
  const auto axis = [&](int i, int64_t size, Axis Step::* at) {
    const auto taps = [&](const std::optional<Tensor>& f) { return f ? f->size(i ? 0 : f->dim() - 1) : 1; };
    const int64_t u = taps(fu), d = taps(fd), before = padding[2 * i];
    const int64_t between = size * up + before + padding[2 * i + 1] - u + 1;
    FASTGEN_CHECK(between >= d && u > 0 && d > 0, op, ": x must be as large as the filters, got ", size);
    const int64_t out = (between - d) / down + 1;
    const auto make = [](int64_t up, int64_t down, int64_t taps, int64_t pad, int64_t in, int64_t out) {
      return Axis{static_cast<int>(up), static_cast<int>(down), static_cast<int>(taps), pad, in, out};
    };
    job.first.*at = make(up, 1, u, before, size, between);
    job.second.*at = make(down, 1, d, d - 1, out, between);
    job.last.*at =
        backward ? make(1, up, u, u - 1 - before, between, size) : make(1, down, d, 0, between, out);
    return out;
  };
  const int64_t width = axis(0, W, &Step::x), height = axis(1, H, &Step::y);
  if (dy) {
    FASTGEN_CHECK(dy->dim() == 4 && dy->size(0) == N && dy->size(1) == C && dy->size(2) == height &&
                      dy->size(3) == width && dy->scalar_type() == x.scalar_type() &&
                      dy->is_cpu() == x.is_cpu(),
                  op, ": dy must have the shape and dtype of the result");
  }
  const bool channels_last = is_channels_last(x);
  const MemoryFormat format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  const auto laid_out = [&](const Tensor& tensor) {
    if (channels_last ? is_channels_last(tensor) : tensor.is_contiguous()) return tensor;
    Tensor copy = on.empty(x, {N, C, tensor.size(2), tensor.size(3)}, x.scalar_type(), format);
    return torch::stable::copy_(copy, tensor);
  };
  Tensor out = on.empty(x, {N, C, job.last.y.out, job.last.x.out}, x.scalar_type(), format);
  if (!out.numel()) return out;
  const Tensor source = laid_out(x), gradient = dy ? laid_out(*dy) : source;
  const Tensor biases = b ? torch::stable::contiguous(torch::stable::to(*b, x.scalar_type())) : x;
  job.channels = channels_last ? C : 1;
  job.images = channels_last ? N : N * C;
  job.biases = C;

  dispatch(op, x.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using T = accumulator_t<S>;
    Tensor keep_up = x, keep_down = x;
    Arguments<S> arguments{data<S>(source), data<S>(gradient), b ? data<S>(biases) : nullptr,
                           mutable_data<S>(out)};
    arguments.first = taps_of<T>(op, fu, flip_filter, static_cast<double>(up * up), keep_up);
    arguments.last = taps_of<T>(op, fd, flip_filter, 1, keep_down);
    if (backward) {
      arguments.second = arguments.last;
      arguments.last = arguments.first;
      arguments.second.flip = arguments.last.flip = !flip_filter;
    }
    arguments.positive = static_cast<T>(gain);
    arguments.negative = static_cast<T>(gain * slope);
    arguments.clamps = clamp >= 0;
    arguments.clamp = clamp >= 0 ? static_cast<T>(clamp) : std::numeric_limits<T>::infinity();
    Call<S, backward>{on, arguments, job}.run(static_cast<int>(up), static_cast<int>(down));
  });
  return out;
}

Tensor filtered_lrelu_cuda(const Tensor& x, const std::optional<Tensor>& fu, const std::optional<Tensor>& fd,
                           const std::optional<Tensor>& b, int64_t up, int64_t down,
                           const std::vector<int64_t>& padding, double gain, double slope, double clamp,
                           bool flip_filter) {
  return apply<false>(nullptr, x, fu, fd, b, up, down, padding, gain, slope, clamp, flip_filter);
}

Tensor filtered_lrelu_bwd_cuda(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& fu,
                               const std::optional<Tensor>& fd, const std::optional<Tensor>& b, int64_t up,
                               int64_t down, const std::vector<int64_t>& padding, double gain, double slope,
                               double clamp, bool flip_filter) {
  return apply<true>(&dy, x, fu, fd, b, up, down, padding, gain, slope, clamp, flip_filter);
}

}  // namespace

FASTGEN_KERNELS(m) {
  m.impl("filtered_lrelu", TORCH_BOX(&filtered_lrelu_cuda));
  m.impl("filtered_lrelu_bwd", TORCH_BOX(&filtered_lrelu_bwd_cuda));
}

}  // namespace fastgen
