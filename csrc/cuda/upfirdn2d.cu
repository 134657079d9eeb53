// upfirdn2d, in one of three ways. Small filters: a thread makes a tile of outputs in registers, 16 bytes of
// channels at a time in memory [N, H, W, C]. Separable ones: a block makes a tile of outputs, filtered along
// x and then along y in shared memory. Any other: a thread makes one output. None of them meets an inserted
// zero.
#include "fir.h"

namespace fastgen {
namespace {

struct Job {
  int64_t channels;  // 1 in memory [N, C, H, W], and images then are planes
  int64_t images;
  Axis x, y;
  int64_t count;  // tiles, or outputs
  int64_t tiles_x, tiles_y;
  int shift_x, shift_y;  // of the first tile, so that tiles begin where a tap falls on a sample
  int block_x, block_y, block_c;
};

template <class S, int up, int down, int taps, int tile_y, int tile_x, int width>
__global__ void __launch_bounds__(threads, 2)
    upfirdn2d_tile_kernel(const S* __restrict__ in, Taps<accumulator_t<S>> f, S* __restrict__ out, Job job) {
  using T = accumulator_t<S>;
  __shared__ T weights[taps * taps];
  share<taps>(f, weights);
  int64_t rest = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (rest >= job.count) return;
  const int64_t c = split_off(rest, job.channels / width) * width;
  const int64_t ox = split_off(rest, job.tiles_x) * tile_x - job.shift_x;
  const int64_t oy = split_off(rest, job.tiles_y) * tile_y - job.shift_y;
  // Exact, by the choice of shifts.
  const int64_t left = (ox * down - job.x.pad) / up, top = (oy * down - job.y.pad) / up;
  const S* image = in + rest * job.y.in * job.x.in * job.channels + c;

  T sums[tile_y][tile_x][width] = {};
  filter_tile<up, down, taps>(
      [&](int i, int j, T(&v)[width]) {
        const int64_t y = top + i, x = left + j;
        if (y < 0 || y >= job.y.in || x < 0 || x >= job.x.in) return false;
        load<S, width>(image + (y * job.x.in + x) * job.channels, v);
        return true;
      },
      weights, f.rows, f.columns, sums);

#pragma unroll
  for (int y = 0; y < tile_y; ++y) {
    if (oy + y < 0 || oy + y >= job.y.out) continue;
#pragma unroll
    for (int x = 0; x < tile_x; ++x) {
      if (ox + x < 0 || ox + x >= job.x.out) continue;
      const int64_t pixel = (rest * job.y.out + oy + y) * job.x.out + ox + x;
      store<S, width>(out + pixel * job.channels + c, sums[y][x]);
    }
  }
}

// Shared: the inputs, the same filtered along x, and the taps.
template <class S>
__global__ void __launch_bounds__(threads, 2)
    upfirdn2d_separable_kernel(const S* __restrict__ in, Taps<accumulator_t<S>> f, S* __restrict__ out,
                               Job job) {
  using T = accumulator_t<S>;
  const int width = static_cast<int>(job.x.reach(job.block_x));
  const int height = static_cast<int>(job.y.reach(job.block_y));
  T* const inputs = shared_memory<T>();
  T* const between = inputs + height * width * job.block_c;
  T* const taps = between + height * job.block_x * job.block_c;
  int64_t rest = blockIdx.x;
  const int64_t first_c = split_off(rest, ceil_div(job.channels, job.block_c)) * job.block_c;
  const int64_t ox = split_off(rest, job.tiles_x) * job.block_x;
  const int64_t oy = split_off(rest, job.tiles_y) * job.block_y;
  int tap;
  int64_t left, top;
  job.x.first(ox, tap, left);
  job.y.first(oy, tap, top);

  for (int k = threadIdx.x; k < f.rows; k += threads) taps[k] = f.f[f.flip ? k : f.rows - 1 - k];
  for (int k = threadIdx.x; k < height * width * job.block_c; k += threads) {
    const int64_t c = first_c + k % job.block_c, x = left + k / job.block_c % width;
    const int64_t y = top + k / job.block_c / width;
    const bool there = c < job.channels && x >= 0 && x < job.x.in && y >= 0 && y < job.y.in;
    inputs[k] = there ? static_cast<T>(in[((rest * job.y.in + y) * job.x.in + x) * job.channels + c]) : T(0);
  }
  __syncthreads();

  for (int k = threadIdx.x; k < height * job.block_x * job.block_c; k += threads) {
    const int c = k % job.block_c, x = k / job.block_c % job.block_x, y = k / job.block_c / job.block_x;
    int64_t sample;
    job.x.first(ox + x, tap, sample);
    const T* from = inputs + (y * width + static_cast<int>(sample - left)) * job.block_c + c;
    T sum = 0;
    for (; tap < f.rows; tap += job.x.up, from += job.block_c) sum += taps[tap] * *from;
    between[k] = sum;
  }
  __syncthreads();

  for (int k = threadIdx.x; k < job.block_y * job.block_x * job.block_c; k += threads) {
    const int c = k % job.block_c, x = k / job.block_c % job.block_x, y = k / job.block_c / job.block_x;
    if (first_c + c >= job.channels || ox + x >= job.x.out || oy + y >= job.y.out) continue;
    int64_t sample;
    job.y.first(oy + y, tap, sample);
    const T* from = between + (static_cast<int>(sample - top) * job.block_x + x) * job.block_c + c;
    T sum = 0;
    for (; tap < f.rows; tap += job.y.up, from += job.block_x * job.block_c) sum += taps[tap] * *from;
    out[((rest * job.y.out + oy + y) * job.x.out + ox + x) * job.channels + first_c + c] =
        static_cast<S>(sum * f.gain);
  }
}

template <class S>
__global__ void __launch_bounds__(threads, 2)
    upfirdn2d_kernel(const S* __restrict__ in, Taps<accumulator_t<S>> f, S* __restrict__ out, Job job) {
  using T = accumulator_t<S>;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (item >= job.count) return;
  int64_t rest = item;
  const int64_t c = split_off(rest, job.channels);
  const int64_t ox = split_off(rest, job.x.out), oy = split_off(rest, job.y.out);
  const S* image = in + rest * job.y.in * job.x.in * job.channels + c;
  int first_x, ky;
  int64_t left, y;
  job.x.first(ox, first_x, left);
  job.y.first(oy, ky, y);
  T sum = 0;
  for (; ky < f.rows; ky += job.y.up, ++y) {
    if (y < 0 || y >= job.y.in) continue;
    int64_t x = left;
    for (int kx = first_x; kx < f.columns; kx += job.x.up, ++x) {
      if (x >= 0 && x < job.x.in) {
        sum += f.at(ky, kx) * static_cast<T>(image[(y * job.x.in + x) * job.channels]);
      }
    }
  }
  out[item] = static_cast<S>(sum);
}

template <class S>
struct Call {
  using T = accumulator_t<S>;
  const Launch& on;
  const S* in;
  Taps<T> f;
  S* out;
  Job job;

  template <int up, int down, int taps, int tile, int width>
  void run_tiles() {
    const auto shift = [](const Axis& axis) {
      int shift = 0;
      while ((static_cast<int64_t>(shift) * down + axis.pad) % up) ++shift;
      return shift;
    };
    // Wider than high: rows are what a warp reads.
    constexpr int tile_y = tile, tile_x = up > 2 ? tile : 2;
    job.shift_x = shift(job.x);
    job.shift_y = shift(job.y);
    job.tiles_x = ceil_div(job.x.out + job.shift_x, tile_x);
    job.tiles_y = ceil_div(job.y.out + job.shift_y, tile_y);
    job.count = job.images * job.tiles_y * job.tiles_x * (job.channels / width);
    on.run(upfirdn2d_tile_kernel<S, up, down, taps, tile_y, tile_x, width>, ceil_div(job.count, threads),
           threads, 0, in, f, out, job);
  }

  // Whole packs of channels, where there are such; four rows of sixteen bytes' channels are as many sums as a
  // thread has registers for, with filters of the higher factors half of it.
  template <int up, int down, int taps, int tile>
  void run_tiles_of_any_width(bool aligned) {
    constexpr int width = up > 2 ? widest<S> / 2 : widest<S>;
    if (aligned && job.channels % width == 0) return run_tiles<up, down, taps, tile, width>();
    run_tiles<up, down, taps, tile, 1>();
  }

  bool run_small(bool aligned) {
    const Axis &x = job.x, &y = job.y;
    const int most = std::max(f.rows, f.columns);
    if (x.up != y.up || x.down != y.down || most > 8) return false;
    const auto is = [&](int up, int down) { return x.up == up && x.down == down; };
    if constexpr (!std::is_same_v<S, double>) {  // which registers are too few for
      if (most <= 4) {
        if (is(1, 1)) return run_tiles_of_any_width<1, 1, 4, 4>(aligned), true;
        if (is(2, 1)) return run_tiles_of_any_width<2, 1, 4, 4>(aligned), true;
        if (is(1, 2)) return run_tiles_of_any_width<1, 2, 4, 2>(aligned), true;
      }
      if (is(3, 1)) return run_tiles_of_any_width<3, 1, 8, 3>(aligned), true;
      if (is(4, 1)) return run_tiles_of_any_width<4, 1, 8, 4>(aligned), true;
      if (is(1, 3)) return run_tiles_of_any_width<1, 3, 8, 1>(aligned), true;
      if (is(1, 4)) return run_tiles_of_any_width<1, 4, 8, 1>(aligned), true;
    }
    return false;
  }

  bool run_separable() {
    if (!f.separable) return false;
    job.block_c = static_cast<int>(std::min<int64_t>(job.channels, 16));
    job.block_x = job.channels == 1 ? 32 : 8;
    job.block_y = 16;
    const auto bytes = [&] {
      return (job.y.reach(job.block_y) * (job.x.reach(job.block_x) + job.block_x) * job.block_c + f.rows) *
             static_cast<int64_t>(sizeof(T));
    };
    while (bytes() > 48 << 10) {
      int& side = job.block_y > job.block_x ? job.block_y : job.block_x > 1 ? job.block_x : job.block_c;
      if (side == 1) return false;
      side = (side + 1) / 2;
    }
    job.tiles_x = ceil_div(job.x.out, job.block_x);
    job.tiles_y = ceil_div(job.y.out, job.block_y);
    const int64_t blocks = job.images * job.tiles_y * job.tiles_x * ceil_div(job.channels, job.block_c);
    on.run(upfirdn2d_separable_kernel<S>, blocks, threads, bytes(), in, f, out, job);
    return true;
  }

  void run(bool aligned) {
    if (run_small(aligned) || run_separable()) return;
    job.count = job.images * job.y.out * job.x.out * job.channels;
    on.run(upfirdn2d_kernel<S>, ceil_div(job.count, threads), threads, 0, in, f, out, job);
  }
};

Tensor upfirdn2d_cuda(const Tensor& x, const std::optional<Tensor>& f, const std::vector<int64_t>& up,
                      const std::vector<int64_t>& down, const std::vector<int64_t>& padding, bool flip_filter,
                      double gain) {
  const char* op = "upfirdn2d";
  const Launch on(op, x);
  FASTGEN_CHECK(x.dim() == 4 && up.size() == 2 && down.size() == 2 && padding.size() == 4, op,
                ": x, up, down or padding has a wrong number of dimensions");
  const bool channels_last = is_channels_last(x);
  const MemoryFormat format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  const Tensor in = channels_last ? x : torch::stable::contiguous(x);
  const int64_t N = x.size(0), C = x.size(1);
  const auto axis = [&](int i, int64_t size, int64_t taps) {
    for (int64_t value : {up[i], down[i], padding[2 * i], taps}) {
      FASTGEN_CHECK(std::abs(value) < (1 << 30), op, ": up, down, padding or f is too large: ", value);
    }
    FASTGEN_CHECK(up[i] > 0 && down[i] > 0, op, ": up and down must be at least 1");
    const int64_t last = size * up[i] + padding[2 * i] + padding[2 * i + 1] - taps;
    FASTGEN_CHECK(last >= 0, op, ": x, upsampled and padded, must be at least as large as f");
    const int64_t out = last / down[i] + 1;
    return Axis{static_cast<int>(up[i]),
                static_cast<int>(down[i]),
                static_cast<int>(taps),
                padding[2 * i],
                size,
                out};
  };
  Job job{};
  job.channels = channels_last ? C : 1;
  job.images = channels_last ? N : N * C;
  job.x = axis(0, x.size(3), f ? f->size(f->dim() - 1) : 1);
  job.y = axis(1, x.size(2), f ? f->size(0) : 1);
  Tensor out = on.empty(x, std::vector<int64_t>{N, C, job.y.out, job.x.out}, x.scalar_type(), format);
  if (!out.numel()) return out;
  dispatch(op, x.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    Tensor keep = out;
    const auto taps = taps_of<accumulator_t<S>>(op, f, flip_filter, gain, keep);
    Call<S>{on, data<S>(in), taps, mutable_data<S>(out), job}.run(is_aligned(in));
  });
  return out;
}

}  // namespace

FASTGEN_KERNELS(m) {
  FASTGEN_OP(m, "upfirdn2d", upfirdn2d_cuda)
}

}  // namespace fastgen
