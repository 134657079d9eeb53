// What the kernels of filtered_lrelu share: axes, tiles, the activation.
#pragma once
#include <cmath>

#include "fir.h"

namespace fastgen {
namespace {

// Part of an axis. The first tap of the first result made of it that falls on a sample falls on `begin`.
struct Span {
  int64_t begin;
  int count, tap;
};

__device__ __forceinline__ Span samples(const Axis& axis, const Span& results) {
  Span span;
  axis.first(results.begin, span.tap, span.begin);
  span.count = static_cast<int>(axis.reach(results.count));
  return span;
}

struct Step {
  Axis x, y;
};

// From x to the upsampled image, from dy to there (for the gradient), and from there to the result.
struct Job {
  Step first, second, last;
  int64_t channels;  // 1 in memory [N, C, H, W], and images then are planes
  int64_t images, biases;
  int64_t tiles_c, tiles_x, tiles_y;
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
    return std::abs(v) > clamp ? std::copysign(clamp, v) : v;
  }
  // The gradient of v for that of its activation.
  __device__ __forceinline__ T gradient(T v, T g) const {
    const T factor = v > 0 ? positive : negative, y = v * factor;
    return !clamps || std::abs(y) < clamp ? factor * g : T(0);
  }
};

// The tile of results that a block makes.
struct Tile {
  int64_t c, image;
  Span x, y;

  __device__ __forceinline__ explicit Tile(const Job& job) {
    int64_t rest = blockIdx.x;
    c = split_off(rest, job.tiles_c) * job.block_c;
    x = {split_off(rest, job.tiles_x) * job.block_x, job.block_x, 0};
    y = {split_off(rest, job.tiles_y) * job.block_y, job.block_y, 0};
    image = rest;
  }
};

template <class S>
__device__ __forceinline__ const S* biases_of(const S* b, const Job& job, const Tile& tile) {
  int64_t first = tile.image * job.channels;
  return b ? b + split_off(first, job.biases) : nullptr;
}

// Shared memory of a block: what leaves room for others, and what there is on every card.
constexpr int64_t little_memory = 48 << 10, most_memory = 96 << 10;

template <class S>
void launch(const Launch& on, void (*kernel)(Arguments<S>, Job), int64_t bytes, const Arguments<S>& arguments,
            Job job) {
  job.tiles_c = ceil_div(job.channels, job.block_c);
  job.tiles_x = ceil_div(job.last.x.out, job.block_x);
  job.tiles_y = ceil_div(job.last.y.out, job.block_y);
  on.run(kernel, job.images * job.tiles_y * job.tiles_x * job.tiles_c, threads, bytes, arguments, job);
}

}  // namespace
}  // namespace fastgen
