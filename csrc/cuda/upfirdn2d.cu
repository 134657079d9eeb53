// upfirdn2d. One thread makes one output and meets only the taps that fall on samples, never an inserted
// zero. The filter is read through the cache: every thread of a warp wants the same tap, or one of two. A
// separable filter takes two passes, with the sums between them kept in the accumulating type.
#include "launch.h"

namespace fastgen {
namespace {

struct Axis {
  int up, down, pad, taps;
};

struct Job {
  int64_t count, channels;  // channels is 1 in memory [N, C, H, W], and planes then counts N * C
  int64_t height, width, out_height, out_width;
  Axis x, y;
  bool flip;
  double gain;
};

// The first tap that falls on a sample of output `o`, and the index of that sample.
template <class Index>
__device__ __forceinline__ void first_tap(const Axis& axis, Index o, int& tap, Index& sample) {
  const Index origin = o * axis.down - axis.pad;
  Index rest = origin % axis.up;
  if (rest < 0) rest += axis.up;
  tap = rest ? axis.up - static_cast<int>(rest) : 0;
  sample = (origin + tap) / axis.up;
}

// up_, down_, taps_: the same on both axes, where known when compiling; else 0.
template <class In, class Out, class Index, int up_, int down_, int taps_>
__global__ void __launch_bounds__(threads)
    upfirdn2d_kernel(const In* __restrict__ in, const accumulator_t<Out>* __restrict__ filter,
                     Out* __restrict__ out, Job job) {
  using T = accumulator_t<Out>;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (item >= job.count) return;
  Axis ax = job.x, ay = job.y;
  if constexpr (taps_ != 0) {
    ax.up = ay.up = up_;
    ax.down = ay.down = down_;
    ax.taps = ay.taps = taps_;
  }

  const Index channels = static_cast<Index>(job.channels), width = static_cast<Index>(job.width);
  const Index height = static_cast<Index>(job.height);
  Index rest = static_cast<Index>(item);
  const Index c = rest % channels;
  rest /= channels;
  const Index ox = rest % static_cast<Index>(job.out_width);
  rest /= static_cast<Index>(job.out_width);
  const Index oy = rest % static_cast<Index>(job.out_height);
  const Index plane = rest / static_cast<Index>(job.out_height);
  const In* base = in + plane * height * width * channels + c;

  int tap_x, tap_y;
  Index left, top;
  first_tap(ax, ox, tap_x, left);
  first_tap(ay, oy, tap_y, top);
  T sum = 0;
#pragma unroll(taps_ ? taps_ : 1)
  for (int ky = tap_y; ky < ay.taps; ky += ay.up, ++top) {
    if (top < 0 || top >= height) continue;
    const T* taps = filter + (job.flip ? ky : ay.taps - 1 - ky) * ax.taps;
    const In* row = base + top * width * channels;
    Index sample = left;
#pragma unroll(taps_ ? taps_ : 1)
    for (int kx = tap_x; kx < ax.taps; kx += ax.up, ++sample) {
      if (sample < 0 || sample >= width) continue;
      sum += taps[job.flip ? kx : ax.taps - 1 - kx] * static_cast<T>(row[sample * channels]);
    }
  }
  out[item] = static_cast<Out>(sum * static_cast<T>(job.gain));
}

template <class In, class Out, int up_ = 0, int down_ = 0, int taps_ = 0>
void launch(const Launch& on, const Tensor& in, const Tensor& filter, Tensor& out, const Job& job) {
  using T = accumulator_t<Out>;
  const int64_t reach_x = job.out_width * job.x.down + job.x.taps + std::abs(job.x.pad);
  const int64_t reach_y = job.out_height * job.y.down + job.y.taps + std::abs(job.y.pad);
  const bool small = std::max({job.count, in.numel(), reach_x, reach_y}) <= 0x7fffffff;
  const auto kernel = small ? upfirdn2d_kernel<In, Out, int32_t, up_, down_, taps_>
                            : upfirdn2d_kernel<In, Out, int64_t, up_, down_, taps_>;
  kernel<<<Launch::blocks(job.count), threads, 0, on.stream()>>>(data<In>(in), data<T>(filter),
                                                                 mutable_data<Out>(out), job);
  Launch::check("upfirdn2d");
}

// The resamplings of StyleGAN have their own code: filters of 4 x 4 taps at full, double and half the size.
template <class S>
void launch_2d(const Launch& on, const Tensor& in, const Tensor& filter, Tensor& out, const Job& job) {
  const Axis &x = job.x, &y = job.y;
  if (!std::is_same_v<S, double> && x.taps == 4 && y.taps == 4 && x.up == y.up && x.down == y.down) {
    if (x.up == 1 && x.down == 1) return launch<S, S, 1, 1, 4>(on, in, filter, out, job);
    if (x.up == 2 && x.down == 1) return launch<S, S, 2, 1, 4>(on, in, filter, out, job);
    if (x.up == 1 && x.down == 2) return launch<S, S, 1, 2, 4>(on, in, filter, out, job);
  }
  launch<S, S>(on, in, filter, out, job);
}

Tensor upfirdn2d_cuda(const Tensor& x, const std::optional<Tensor>& f, const std::vector<int64_t>& up,
                      const std::vector<int64_t>& down, const std::vector<int64_t>& padding, bool flip_filter,
                      double gain) {
  const Launch on(x);
  const bool channels_last = is_channels_last(x);
  const MemoryFormat format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  const Tensor in = channels_last ? x : torch::stable::contiguous(x);
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor filter = f ? torch::stable::contiguous(torch::stable::to(*f, wide))
                          : torch::stable::full({1, 1}, 1.0, wide, std::nullopt, x.device());
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  const int64_t columns = filter.size(filter.dim() - 1), rows = filter.size(0);
  const int64_t out_w = (W * up[0] + padding[0] + padding[1] - columns) / down[0] + 1;
  const int64_t out_h = (H * up[1] + padding[2] + padding[3] - rows) / down[1] + 1;
  Tensor out = empty(x, {N, C, out_h, out_w}, format);
  if (!out.numel()) return out;

  const auto axis = [](int64_t up, int64_t down, int64_t pad, int64_t taps) {
    for (int64_t value : {up, down, pad, taps}) {
      FASTGEN_CHECK(std::abs(value) < (1 << 30),
                    "upfirdn2d: up, down, padding or filter is too large: ", value);
    }
    return Axis{static_cast<int>(up), static_cast<int>(down), static_cast<int>(pad), static_cast<int>(taps)};
  };
  const Axis ax = axis(up[0], down[0], padding[0], columns), ay = axis(up[1], down[1], padding[2], rows);
  const Axis none{1, 1, 0, 1};
  const int64_t channels = channels_last ? C : 1;

  if (filter.dim() == 2) {
    const Job job{out.numel(), channels, H, W, out_h, out_w, ax, ay, flip_filter, gain};
    dispatch("upfirdn2d", x.scalar_type(),
             [&](auto zero) { launch_2d<decltype(zero)>(on, in, filter, out, job); });
    return out;
  }
  Tensor between = torch::stable::empty(std::vector<int64_t>{N, C, H, out_w}, wide, std::nullopt, x.device(),
                                        std::nullopt, format);
  const Job along_x{between.numel(), channels, H, W, H, out_w, ax, none, flip_filter, 1.0};
  const Job along_y{out.numel(), channels, H, out_w, out_h, out_w, none, ay, flip_filter, gain};
  dispatch("upfirdn2d", x.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    launch<S, accumulator_t<S>>(on, in, filter, between, along_x);
    launch<accumulator_t<S>, S>(on, between, filter, out, along_y);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CUDA, m) {
  m.impl("upfirdn2d", TORCH_BOX(&upfirdn2d_cuda));
}

}  // namespace fastgen
