// filtered_lrelu with any filters.
#pragma once
#include "filtered_lrelu.h"

namespace fastgen {
namespace {

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

template <class T>
__host__ __device__ inline int count_of(const Taps<T>& f) {
  return f.separable ? f.rows : f.rows * f.columns;
}

// A step for one tile, filtered along x and then along y, or both at once; write(k, y, x, c, sum) takes the
// results.
template <class T, class Write>
__device__ __forceinline__ void resample(const Step& step, const Taps<T>& f, T* taps, const T* from,
                                         const Span& in_y, const Span& in_x, T* between, int height,
                                         int width, int channels, const Write& write) {
  const bool separable = !f.f || f.separable;
  const int count = count_of(f);
  for (int k = threadIdx.x; k < count; k += threads) taps[k] = f.f ? f.f[f.flip ? k : count - 1 - k] : T(1);
  __syncthreads();
  if (separable) {
    for (int k = threadIdx.x; k < in_y.count * width * channels; k += threads) {
      const int c = k % channels, x = k / channels % width, y = k / channels / width;
      const T* row = from + y * in_x.count * channels + c;
      between[k] =
          sum_of<T>(step.x, in_x, x, [&](int tap, int sample) { return taps[tap] * row[sample * channels]; });
    }
    __syncthreads();
  }
  for (int k = threadIdx.x; k < height * width * channels; k += threads) {
    const int c = k % channels, x = k / channels % width, y = k / channels / width;
    T sum;
    if (separable) {
      const T* column = between + x * channels + c;
      sum = sum_of<T>(step.y, in_y, y,
                      [&](int tap, int sample) { return taps[tap] * column[sample * width * channels]; });
    } else {
      sum = sum_of<T>(step.y, in_y, y, [&](int ky, int sample) {
        const T *some = taps + ky * f.columns, *row = from + sample * in_x.count * channels + c;
        return sum_of<T>(step.x, in_x, x,
                         [&](int tap, int sample) { return some[tap] * row[sample * channels]; });
      });
    }
    write(k, y, x, c, sum * f.gain);
  }
  __syncthreads();
}

// Shared, in elements: inputs, what is filtered along x only, and the upsampled image; and a step's taps.
struct LoopSizes {
  int64_t inputs, between, middle, taps;

  template <class S>
  __host__ __device__ LoopSizes(const Arguments<S>& a, const Job& job, bool backward) {
    taps = 0;
    for (const auto* f : {&a.first, &a.second, &a.last}) {
      if (count_of(*f) > taps) taps = count_of(*f);
    }
    const int64_t height = job.last.y.reach(job.block_y), width = job.last.x.reach(job.block_x);
    middle = height * width * job.block_c;
    between = height * job.block_x * job.block_c;
    inputs = 0;
    for (const Step* step : {&job.first, &job.second}) {
      if (step == &job.second && !backward) continue;
      const int64_t rows = step->y.reach(height) * job.block_c;
      if (rows * step->x.reach(width) > inputs) inputs = rows * step->x.reach(width);
      if (rows * width > between) between = rows * width;
    }
  }
  __host__ __device__ int64_t total() const { return inputs + between + middle + taps; }
};

template <class S, bool backward>
__global__ void __launch_bounds__(threads, 2) filtered_lrelu_loops_kernel(Arguments<S> a, Job job) {
  using T = accumulator_t<S>;
  const LoopSizes sizes(a, job, backward);
  T* const inputs = shared_memory<T>();
  T* const between = inputs + sizes.inputs;
  T* const middle = between + sizes.between;
  T* const taps = middle + sizes.middle;
  const Tile tile(job);
  const Span middle_y = samples(job.last.y, tile.y), middle_x = samples(job.last.x, tile.x);
  const int channels = job.block_c;

  {
    const Span y = samples(job.first.y, middle_y), x = samples(job.first.x, middle_x);
    load_tile(a.x, biases_of(a.b, job, tile), job.first, y, x, job, tile, inputs);
    resample(job.first, a.first, taps, inputs, y, x, between, middle_y.count, middle_x.count, channels,
             [&](int k, int, int, int, T sum) { middle[k] = backward ? sum : a.activated(sum); });
  }
  if (backward) {
    const Span y = samples(job.second.y, middle_y), x = samples(job.second.x, middle_x);
    load_tile<S>(a.dy, nullptr, job.second, y, x, job, tile, inputs);
    resample(job.second, a.second, taps, inputs, y, x, between, middle_y.count, middle_x.count, channels,
             [&](int k, int, int, int, T sum) { middle[k] = a.gradient(middle[k], sum); });
  }
  const int64_t height = job.last.y.out, width = job.last.x.out;
  resample(job.last, a.last, taps, middle, middle_y, middle_x, between, job.block_y, job.block_x, channels,
           [&](int, int y, int x, int c, T sum) {
             if (tile.y.begin + y >= height || tile.x.begin + x >= width || tile.c + c >= job.channels)
               return;
             const int64_t row = tile.image * height + tile.y.begin + y;
             a.out[(row * width + tile.x.begin + x) * job.channels + tile.c + c] = static_cast<S>(sum);
           });
}

template <class S, bool backward>
void run_loops(const Launch& on, const Arguments<S>& arguments, Job job) {
  const auto bytes = [&] {
    return LoopSizes(arguments, job, backward).total() * static_cast<int64_t>(sizeof(accumulator_t<S>));
  };
  job.block_c = static_cast<int>(std::min<int64_t>(job.channels, 4));
  job.block_x = static_cast<int>(std::min<int64_t>(job.last.x.out, 32 / job.block_c));
  job.block_y = static_cast<int>(std::min<int64_t>(job.last.y.out, 32 / job.block_c));
  // Small tiles make much anew.
  while (bytes() > (job.block_x * job.block_y * job.block_c > 64 ? little_memory : most_memory)) {
    int& side = job.block_c > 1 ? job.block_c : job.block_y > job.block_x ? job.block_y : job.block_x;
    FASTGEN_CHECK(side > 1, on.op(), ": filters are too large: one result takes ", bytes(),
                  " bytes of a block's memory, of ", most_memory);
    side = (side + 1) / 2;
  }
  launch(on, filtered_lrelu_loops_kernel<S, backward>, bytes(), arguments, job);
}

}  // namespace
}  // namespace fastgen
