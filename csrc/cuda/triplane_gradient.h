// Gradients of planes, summed in any order or in a fixed one.
//
// In any order: atomics, into an array whose channels lie together, so that a warp's are one piece of memory.
// A thread goes along points with one channel, and keeps the sums of the last four pixels in registers, one
// for each parity of column and row, until a point has another pixel there: consecutive points are samples of
// a ray, which meet a pixel one after the other. Of rays side by side few meet the same: 128 x 128 of them
// are two pixels apart on planes of 256 x 256. So a table of a block's pixels would find little more, and
// cost more.
//
// In a fixed order: points are sorted by cell, and a thread sums what a pixel gets from the cells around it,
// in order. Other fixed orders cost each pixel a look at all points, or do not keep NaN and small numbers, as
// sums of integers.
#pragma once
#include "triplane.h"

namespace fastgen {
namespace {

// Adds the planes' gradient to `to`. A block takes as many points of an image as it has threads, and of these
// each group of threads, one a channel, a run.
template <class S>
__global__ void __launch_bounds__(threads)
    sample_triplane_bwd_kernel(const S* __restrict__ dy, Table<accumulator_t<S>> to,
                               const __grid_constant__ Job<accumulator_t<S>> job) {
  using T = accumulator_t<S>;
  // Of a point's four pixels, by the parity of column and row; an offset below zero is outside.
  alignas(16) __shared__ T weights[threads][4];
  alignas(16) __shared__ int64_t offsets[threads][4];
  int64_t n = blockIdx.x;
  const int plane = static_cast<int>(split_off(n, 3));
  const int64_t first = split_off(n, ceil_div(job.M, threads)) * threads;
  const int here = job.M - first < threads ? static_cast<int>(job.M - first) : threads, t = threadIdx.x;
  if (t < here) {
    const Place<T> at = locate(job, n * job.M + first + t, plane);
    const Slope<T> slope = direct(job, n * job.M + first + t, plane);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const bool right = (at.column ^ k) & 1, below = (at.row ^ k / 2) & 1;
      const int x = at.column + right, y = at.row + below;
      const bool inside = x >= 0 && x < job.W && y >= 0 && y < job.H;
      weights[t][k] = weigh(at, slope, job.directions, right, below) * job.share();
      offsets[t][k] = inside ? y * to.row + x * to.column : -1;
    }
  }
  __syncthreads();

  const int lanes = job.C < threads ? static_cast<int>(job.C) : threads;
  const int groups = threads / lanes, run = (threads + groups - 1) / groups;
  const int begin = t / lanes * run, end = begin + run < here ? begin + run : here;
  if (begin >= end) return;
  for (int64_t c = t % lanes; c < job.C; c += lanes) {
    T* const pixels = to.data + (n * to.image + plane * to.plane + c * to.channel);
    const S* g = dy + job.row(n, plane, first + begin) * job.C + c;
    T sums[4] = {};
    int64_t held[4] = {-1, -1, -1, -1};
    S next = *g;
    for (int s = begin; s < end; ++s) {
      const T v = static_cast<T>(next);
      g += job.C;
      if (s + 1 < end) next = *g;  // while this one is added
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int64_t offset = offsets[s][k];
        if (offset != held[k]) {
          if (held[k] >= 0) atomicAdd(pixels + held[k], sums[k]);
          sums[k] = 0;
          held[k] = offset;
        }
        sums[k] += weights[s][k] * v;
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (held[k] >= 0) atomicAdd(pixels + held[k], sums[k]);
    }
  }
}

// The same in a fixed order: keys [N, 3, M], the points' cells, where the cell (-1, -1) of a plane is its
// first.
template <class T>
__global__ void __launch_bounds__(threads)
    sample_triplane_keys_kernel(int64_t* __restrict__ keys, const __grid_constant__ Job<T> job) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (item >= job.N * 3 * job.M) return;
  int64_t n = item;
  const int64_t m = split_off(n, job.M), table = n;
  const int plane = static_cast<int>(split_off(n, 3));
  const Place<T> at = locate(job, n * job.M + m, plane);
  const bool inside = at.column >= -1 && at.column < job.W && at.row >= -1 && at.row < job.H;
  const int64_t cell = (table * (job.H + int64_t(1)) + at.row + 1) * (job.W + int64_t(1)) + at.column + 1;
  keys[item] = inside ? cell : job.N * 3 * (job.H + int64_t(1)) * (job.W + int64_t(1));
}

// The number of keys below `key`.
__device__ inline int64_t count_below(const int64_t* keys, int64_t count, int64_t key) {
  int64_t low = 0;
  while (low < count) {
    const int64_t middle = (low + count) / 2;
    if (keys[middle] < key) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

// A thread makes a channel of a pixel. The cells around it are two pairs of neighbours in the order of keys.
template <class S>
__global__ void __launch_bounds__(threads, 2)
    sample_triplane_bwd_ordered_kernel(const S* __restrict__ dy, const int64_t* __restrict__ keys,
                                       const int64_t* __restrict__ order, Table<S> to,
                                       const __grid_constant__ Job<accumulator_t<S>> job, int lanes) {
  using T = accumulator_t<S>;
  __shared__ int64_t bounds[threads][2][2];
  const int per = threads / lanes, s = threadIdx.x / lanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * per, pixels = job.N * 3 * job.H * job.W;
  for (int k = threadIdx.x; k < 4 * per && first + k / 4 < pixels; k += threads) {
    int64_t table = first + k / 4;
    const int64_t x = split_off(table, job.W), y = split_off(table, job.H);
    const int64_t cell = (table * (job.H + 1) + y + k / 2 % 2) * (job.W + 1) + x;
    bounds[k / 4][k / 2 % 2][k % 2] = count_below(keys, job.N * 3 * job.M, cell + k % 2 * 2);
  }
  __syncthreads();
  int64_t table = first + s;
  if (s >= per || table >= pixels) return;
  const int64_t x = split_off(table, job.W), y = split_off(table, job.H), n = table / 3;
  const int plane = static_cast<int>(table % 3);
  for (int64_t c = threadIdx.x % lanes; c < job.C; c += lanes) {
    T sum = 0;
    for (int pair = 0; pair < 2; ++pair) {
      for (int64_t k = bounds[s][pair][0]; k < bounds[s][pair][1]; ++k) {
        const int64_t m = order[k] - table * job.M;
        const Place<T> at = locate(job, n * job.M + m, plane);
        const Slope<T> slope = direct(job, n * job.M + m, plane);
        const T v = job.share() * static_cast<T>(dy[job.row(n, plane, m) * job.C + c]);
        sum += weigh(at, slope, job.directions, at.column < x, at.row < y) * v;
      }
    }
    to.data[n * to.image + plane * to.plane + y * to.row + x * to.column + c * to.channel] =
        static_cast<S>(sum);
  }
}

// In ascending order, equals as they were; and where they were.
std::pair<Tensor, Tensor> sort(const Tensor& keys) {
  using torch::stable::detail::from;
  StableIValue stack[4] = {from(keys), from(std::optional<bool>(true)), from(int64_t(0)), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack, TORCH_ABI_VERSION));
  const Tensor sorted = torch::stable::detail::to<Tensor>(stack[0]);
  return {sorted, torch::stable::detail::to<Tensor>(stack[1])};
}

}  // namespace
}  // namespace fastgen
