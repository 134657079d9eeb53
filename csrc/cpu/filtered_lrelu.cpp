// filtered_lrelu and its gradient, row by row: of the upsampled image only as many rows exist as the filter
// of the next step sees.
#include <numeric>

#include "rows.h"

namespace fastgen {
namespace {

// A tensor in memory [N, C, H, W] or [N, H, W, C].
template <class S>
struct Image {
  S* data;
  int64_t strides[4];

  Image(S* data, const Tensor& x) : data(data) {
    for (int i = 0; i < 4; ++i) strides[i] = x.stride(i);
  }
  S* row(int64_t image, int64_t channel, int64_t y) const {
    return data + image * strides[0] + channel * strides[1] + y * strides[2];
  }
};

// x itself, if its channels (or columns) lie side by side.
Tensor readable(const Tensor& x, bool channels_last) {
  const int64_t dim = channels_last ? 1 : 3;
  if (x.stride(dim) == 1 || x.size(dim) == 1) return x;
  Tensor copy = empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)},
                      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  return torch::stable::copy_(copy, x);
}

struct Arguments {
  const std::optional<Tensor>&fu, &fd, &b;
  int64_t up, down;
  const std::vector<int64_t>& padding;
  double gain, slope, clamp;
  bool flip_filter;
};

// The axes from x to the upsampled image and from there to the result.
struct Axes {
  Axis up, down;

  Axes(const Arguments& a, int64_t size, bool along_x) {
    const auto taps = [&](const std::optional<Tensor>& f) {
      return !f ? 1 : f->size(along_x ? f->dim() - 1 : 0);
    };
    const int64_t before = a.padding[along_x ? 0 : 2], after = a.padding[along_x ? 1 : 3];
    const int64_t fu = taps(a.fu), fd = taps(a.fd), between = size * a.up + before + after - fu + 1;
    FASTGEN_CHECK(between >= fd && fu > 0 && fd > 0,
                  "filtered_lrelu: x must be as large as the filters, got ", size);
    up = {size, between, a.up, 1, before, fu};
    down = {between, (between - fd) / a.down + 1, 1, a.down, 0, fd};
  }
};

// dy null: the result for x; otherwise the gradient of x for that of the result.
Tensor apply(const Tensor* dy, const Tensor& x, const Arguments& a) {
  const char* op = "filtered_lrelu";
  // The public function has checked these already; the raw op must not read out of bounds either.
  FASTGEN_CHECK(x.dim() == 4, op, ": x must have 4 dimensions, got ", x.dim());
  FASTGEN_CHECK(a.up > 0 && a.down > 0 && a.padding.size() == 4, op, ": up, down or padding is not valid");
  for (const auto* f : {&a.fu, &a.fd})
    FASTGEN_CHECK(!*f || (*f)->dim() == 1 || (*f)->dim() == 2, op, ": filters must have 1 or 2 dimensions");
  const bool channels_last = is_channels_last(x);
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  const Axes ax(a, W, true), ay(a, H, false);
  if (dy) {
    FASTGEN_CHECK(dy->dim() == 4 && dy->size(0) == N && dy->size(1) == C && dy->size(2) == ay.down.out &&
                      dy->size(3) == ax.down.out && dy->scalar_type() == x.scalar_type(),
                  op, ": dy must have the shape and dtype of the result");
  }
  FASTGEN_CHECK(!a.b || (a.b->dim() == 1 && a.b->size(0) == C), op, ": b must have C elements");
  const int64_t out_h = dy ? H : ay.down.out, out_w = dy ? W : ax.down.out;
  Tensor out =
      empty(x, {N, C, out_h, out_w}, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (!out.numel()) return out;
  const Tensor source = readable(x, channels_last), gradient = dy ? readable(*dy, channels_last) : source;

  dispatch(op, x.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using T = accumulator_t<S>;
    const int64_t phases = std::lcm(a.up, a.down);
    const double up_gain = static_cast<double>(a.up * a.up);
    const LeakyRelu<T> act{static_cast<T>(a.slope), static_cast<T>(a.gain), static_cast<T>(a.clamp)};
    std::vector<T> bias(C, T(0));
    if (a.b) bias = host_vector<T>(op, *a.b);
    const std::vector<T> no_bias(C, T(0));

    // Blocks of channels, whose rows stay in the second-level cache.
    int64_t channels = 1;
    if (channels_last) {
      const int64_t rows = ay.up.most() + (dy ? ay.down.taps + ay.up.taps : ay.down.taps);
      const int64_t block =
          std::max<int64_t>(16, (1 << 20) / (ax.up.out * rows * static_cast<int64_t>(sizeof(T))));
      channels = C <= block ? C : round_up(ceil_div(C, ceil_div(C, block)), 16);
    }
    const int64_t blocks = ceil_div(C, channels);

    // From the last step to the first: each lays out its input.
    const Image<const S> in(data<S>(source), source), dz(data<S>(gradient), gradient);
    const Image<S> to(mutable_data<S>(out), out);
    const int64_t out_phases = phases / (dy ? a.up : a.down);
    const Layout out_layout{out_w, out_phases, channels, 0, ceil_div(out_w, out_phases)};
    const Filter<T> fu = read_filter<T>(op, a.fu, a.flip_filter, up_gain),
                    fd = read_filter<T>(op, a.fd, a.flip_filter, 1);
    // Of the gradient; it goes the way back.
    const Filter<T> fu_reversed = read_filter<T>(op, a.fu, !a.flip_filter, up_gain),
                    fd_reversed = read_filter<T>(op, a.fd, !a.flip_filter, 1);
    const Step<T> last = dy ? Step<T>(fu_reversed, ax.up.transposed(), ay.up.transposed(), phases, out_layout)
                            : Step<T>(fd, ax.down, ay.down, phases, out_layout);
    const Step<T> first(fu, ax.up, ay.up, phases / a.up, last.in);
    const Step<T> second(fd_reversed, ax.down.transposed(), ay.down.transposed(), phases / a.down, last.in);
    const bool direct = out_phases == 1 && channels == (channels_last ? C : 1);
    parallel_for(N * blocks * out_h, ax.up.out * channels * 8, [&](int64_t begin, int64_t end) {
      Rows<T> up(first), down(last);
      std::optional<Rows<T>> up_gradient;
      if (dy) up_gradient.emplace(second);
      Buffer<T> values(last.in.size() + lanes<T>), line(out_layout.size() + lanes<T>);
      int64_t y = begin % out_h, image = 0, channel = 0, count = 0;
      for (int64_t i = begin; i < end; ++i, ++y) {
        if (y == out_h) y = 0;
        if (i == begin || y == 0) {
          image = i / out_h / blocks;
          channel = i / out_h % blocks * channels;
          count = std::min(channels, C - channel);
          up.restart();
          down.restart();
          if (dy) up_gradient->restart();
        }
        down.prepare(y, [&](int64_t z, T* row) {
          up.prepare(z, [&](int64_t j, T* row) {
            read(in.row(image, channel, j), in.strides[3], count, bias.data() + channel, first.in, row);
          });
          if (!dy) return up.result(z, row, &act);
          up.result(z, values.get());
          up_gradient->prepare(z, [&](int64_t j, T* row) {
            read(dz.row(image, channel, j), dz.strides[3], count, no_bias.data(), second.in, row);
          });
          up_gradient->result(z, row, &act, values.get());
        });
        S* row = to.row(image, channel, y);
        if constexpr (std::is_same_v<S, T>) {
          if (direct) {
            down.result(y, row);
            continue;
          }
        }
        down.result(y, line.get());
        write(line.get(), out_layout, row, to.strides[3], count);
      }
    });
  });
  return out;
}

Tensor filtered_lrelu_cpu(const Tensor& x, const std::optional<Tensor>& fu, const std::optional<Tensor>& fd,
                          const std::optional<Tensor>& b, int64_t up, int64_t down,
                          const std::vector<int64_t>& padding, double gain, double slope, double clamp,
                          bool flip_filter) {
  return apply(nullptr, x, {fu, fd, b, up, down, padding, gain, slope, clamp, flip_filter});
}

Tensor filtered_lrelu_bwd_cpu(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& fu,
                              const std::optional<Tensor>& fd, const std::optional<Tensor>& b, int64_t up,
                              int64_t down, const std::vector<int64_t>& padding, double gain, double slope,
                              double clamp, bool flip_filter) {
  return apply(&dy, x, {fu, fd, b, up, down, padding, gain, slope, clamp, flip_filter});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("filtered_lrelu", TORCH_BOX(&filtered_lrelu_cpu));
  m.impl("filtered_lrelu_bwd", TORCH_BOX(&filtered_lrelu_bwd_cpu));
}

}  // namespace fastgen
