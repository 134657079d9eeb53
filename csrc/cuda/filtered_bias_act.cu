// What follows a modulated convolution, in one pass over its result, and the gradient of that.
#include "filtered_bias_act.h"

namespace fastgen {
namespace {

template <class S>
struct Call {
  using T = accumulator_t<S>;
  const Launch& on;
  const Tensor& x;
  Job<S> job;
  std::vector<Tensor> sums;

  // Tiles of outputs, the first of which may begin above and left of the image.
  void cut(int tile_y, int tile_x) {
    job.shift_y = tile_y > 1 ? static_cast<int>(job.top & 1) : 0;
    job.shift_x = tile_x > 1 ? static_cast<int>(job.left & 1) : 0;
    job.tiles_y = ceil_div(job.out_h + job.shift_y, tile_y);
    job.tiles_x = ceil_div(job.out_w + job.shift_x, tile_x);
  }

  template <int taps, int tile_y, int tile_x, int width>
  void forward() {
    cut(tile_y, tile_x);
    job.run = job.contiguous ? static_cast<int>(std::min<int64_t>(job.tiles_x, 32)) : 1;
    const int64_t columns = ceil_div(job.tiles_x, job.run) * job.run;
    job.count = x.size(0) * job.tiles_y * columns * (job.channels / width);
    on.run(filtered_bias_act_kernel<S, taps, tile_y, tile_x, width>, ceil_div(job.count, threads), threads, 0,
           job);
  }

  template <int taps, int tile, int width>
  void backward() {
    cut(tile, tile);
    job.lanes = 1;
    while (job.lanes < 32 && job.lanes * width < job.channels) job.lanes *= 2;
    const int64_t images = x.size(0), tiles = job.tiles_y * job.tiles_x, groups = threads / job.lanes;
    // Up to four tiles a thread, where enough blocks for any GPU are left.
    job.steps = static_cast<int>(std::clamp<int64_t>(images * tiles / (groups * busy), 1, 4));
    job.blocks = ceil_div(tiles, groups * job.steps);
    for (T** to : {&job.d_scale, &job.d_bias}) {
      sums.push_back(on.empty(x, std::vector<int64_t>{images, job.blocks, job.channels}, wide<T>));
      *to = mutable_data<T>(sums.back());
    }
    on.run(filtered_bias_act_bwd_kernel<S, taps, tile, width>, images * job.blocks, threads, 0, job);
  }

  void run(bool differentiate, bool aligned) {
    if constexpr (!std::is_same_v<S, double>) {
      constexpr int width = widest<S>;
      const bool lines = job.act == Activation::linear || job.act == Activation::lrelu;
      const int taps = std::max(job.f.rows, job.f.columns);
      if (aligned && lines && taps <= 4 && job.channels % width == 0) {
        if (job.act == Activation::linear) job.alpha = 1;
        if (differentiate) return taps == 1 ? backward<1, 2, width>() : backward<4, 2, width>();
        return taps == 1 ? forward<1, 2, 2, width>() : forward<4, 16 / width, 2, width>();  // 32 sums
      }
    }
    differentiate ? backward<0, 1, 1>() : forward<0, 1, 1, 1>();
  }
};

struct Parameters {
  const std::vector<Tensor>& x;
  const std::optional<Tensor>& f;
  const std::vector<int64_t>& padding;
  bool flip_filter;
  double fir_gain;
  const std::optional<Tensor>&scale, &noise, &b, &next;
  const std::string& act;
  double alpha, gain, clamp;
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The result; or, for dy, the gradients of the filtered image, scale, noise and bias.
template <class S>
Gradients apply(const Launch& on, const Tensor* dy, const Parameters& p, bool contiguous) {
  using T = accumulator_t<S>;
  const char* op = on.op();
  const int64_t count = static_cast<int64_t>(p.x.size()), up = count == 4 ? 2 : 1;
  const Tensor& x = p.x[0];
  const int64_t N = x.size(0), C = x.size(1);
  Job<S> job{};
  int64_t heights[2] = {}, widths[2] = {};
  std::vector<Tensor> keep;
  bool aligned = true;
  const auto channels_last = [&](const Tensor& image) {
    keep.push_back(torch::stable::contiguous(image, MemoryFormat::ChannelsLast));
    aligned &= is_aligned(keep.back());
    return data<S>(keep.back());
  };
  for (int64_t i = 0; i < count; ++i) {
    const Tensor& image = p.x[i];
    const int64_t y = i / up, column = i % up;
    if (column == 0) job.height += heights[y] = image.size(2);
    if (y == 0) job.width += widths[column] = image.size(3);
    FASTGEN_CHECK(image.dim() == 4 && image.scalar_type() == x.scalar_type() && image.size(0) == N &&
                      image.size(1) == C && image.size(2) == heights[y] && image.size(3) == widths[column],
                  op, ": x must be images of one batch, of matching sizes");
    const int64_t row = widths[column] * C;
    job.x[y][column] = {channels_last(image), heights[y] * row, row, C};
  }
  // Even rows and columns come first: there are as many, or one more.
  for (const int64_t* sizes : {heights, widths}) {
    const int64_t more = sizes[0] - sizes[1];
    FASTGEN_CHECK(count == 1 || more == 0 || more == 1, op, ": x must be four phases of an image");
  }
  if (count == 1) {
    const Phase<S> whole = job.x[0][0];
    for (int i : {0, 1}) {
      for (int j : {0, 1})
        job.x[i][j] = {whole.pixels + i * whole.row + j * C, whole.image, 2 * whole.row, 2 * C};
    }
  }
  Tensor taps = x;
  job.f = taps_of<T>(op, p.f, p.flip_filter, p.fir_gain, taps);
  FASTGEN_CHECK(p.padding.size() == 4, op, ": padding must have 4 elements");
  job.channels = C;
  job.left = p.padding[0];
  job.top = p.padding[2];
  job.out_w = job.width + p.padding[0] + p.padding[1] - job.f.columns + 1;
  job.out_h = job.height + p.padding[2] + p.padding[3] - job.f.rows + 1;
  FASTGEN_CHECK(job.out_w > 0 && job.out_h > 0, op, ": x, padded, must be at least as large as f");
  job.act = activation_of(p.act);
  job.alpha = static_cast<T>(p.alpha);
  job.gain = static_cast<T>(p.gain);
  job.clamp = static_cast<T>(p.clamp);
  job.contiguous = contiguous;

  Tensor out = on.empty(x, std::vector<int64_t>{N, C, job.out_h, job.out_w}, x.scalar_type(),
                        contiguous ? MemoryFormat::Contiguous : MemoryFormat::ChannelsLast);
  const auto numbers = [&](const Tensor& x) {
    Tensor y = torch::stable::contiguous(torch::stable::to(x, wide<T>));
    keep.push_back(is_aligned(y) ? y : torch::stable::clone(y));
    return data<T>(keep.back());
  };
  const auto rows = [&](const char* name, const std::optional<Tensor>& x) -> const T* {
    FASTGEN_CHECK(!x || (x->dim() == 2 && x->size(0) == N && x->size(1) == C), op, ": ", name,
                  " must have shape [N, C]");
    return x ? numbers(*x) : nullptr;
  };
  FASTGEN_CHECK(!p.b || (p.b->dim() == 1 && p.b->size(0) == C), op, ": b must have ", C, " elements");
  job.bias = p.b ? numbers(*p.b) : nullptr;
  job.scale = rows("scale", p.scale);
  job.next = rows("next", p.next);
  if (p.noise) {
    const Tensor& noise = *p.noise;
    FASTGEN_CHECK(noise.dim() == 4 && noise.scalar_type() == wide<T>, op,
                  ": noise must have four dimensions, and be float32 (float64 for float64)");
    for (int64_t i = 0; i < 4; ++i) {
      FASTGEN_CHECK(noise.size(i) == 1 || noise.size(i) == out.size(i), op,
                    ": noise must broadcast to the result");
      job.noise_strides[i] = noise.size(i) == 1 ? 0 : noise.stride(i);
    }
    job.noise = data<T>(noise);
  }
  job.out = mutable_data<S>(out);
  Call<S> call{on, x, job, {}};
  if (!dy) {
    if (out.numel()) call.run(false, aligned);
    return {out, out, out, out};
  }

  check_like(op, out, "dy", *dy);
  call.job.dy = channels_last(*dy);
  call.job.full = p.noise && p.noise->size(1) != 1;
  Tensor d_noise =
      on.empty(x, std::vector<int64_t>{p.noise ? N : 0, call.job.full ? C : 1, job.out_h, job.out_w}, wide<T>,
               MemoryFormat::ChannelsLast);
  call.job.d_noise = p.noise ? mutable_data<T>(d_noise) : nullptr;
  if (!C) torch::stable::zero_(d_noise);
  call.run(true, aligned);
  const int64_t blocks[] = {1}, images[] = {0, 1};
  return {out, torch::stable::sum(call.sums[0], blocks), d_noise, torch::stable::sum(call.sums[1], images)};
}

Gradients dispatched(const Tensor* dy, const Parameters& p, bool contiguous) {
  const char* op = "filtered_bias_act";
  FASTGEN_CHECK(p.x.size() == 1 || p.x.size() == 4, op, ": x must be 1 or 4 tensors, got ", p.x.size());
  const Launch on(op, p.x[0]);
  std::optional<Gradients> result;
  dispatch(op, p.x[0].scalar_type(),
           [&](auto zero) { result = apply<decltype(zero)>(on, dy, p, contiguous); });
  return *result;
}

Tensor filtered_bias_act_cuda(const std::vector<Tensor>& x, const std::optional<Tensor>& f,
                              const std::vector<int64_t>& padding, bool flip_filter, double fir_gain,
                              const std::optional<Tensor>& scale, const std::optional<Tensor>& noise,
                              const std::optional<Tensor>& b, const std::string& act, double alpha,
                              double gain, double clamp, const std::optional<Tensor>& next, bool contiguous) {
  const Parameters p{x, f, padding, flip_filter, fir_gain, scale, noise, b, next, act, alpha, gain, clamp};
  return std::get<0>(dispatched(nullptr, p, contiguous));
}

Gradients filtered_bias_act_bwd_cuda(const Tensor& dy, const std::vector<Tensor>& x,
                                     const std::optional<Tensor>& f, const std::vector<int64_t>& padding,
                                     bool flip_filter, double fir_gain, const std::optional<Tensor>& scale,
                                     const std::optional<Tensor>& noise, const std::optional<Tensor>& b,
                                     const std::string& act, double alpha, double gain, double clamp) {
  const std::optional<Tensor> next;
  const Parameters p{x, f, padding, flip_filter, fir_gain, scale, noise, b, next, act, alpha, gain, clamp};
  return dispatched(&dy, p, false);
}

}  // namespace

FASTGEN_KERNELS(m) {
  FASTGEN_OP(m, "filtered_bias_act", filtered_bias_act_cuda)
  FASTGEN_OP(m, "filtered_bias_act_bwd", filtered_bias_act_bwd_cuda)
}

}  // namespace fastgen
