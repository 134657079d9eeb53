// filtered_lrelu and its gradient, each in one kernel: a block makes a tile of results, and what is between
// them and the inputs is in its shared memory. The factors of StyleGAN3's layers have code of their own,
// whose sums are in registers; all others have loops.
#include <limits>

#include "filtered_lrelu_loops.h"
#include "filtered_lrelu_strips.h"

namespace fastgen {
namespace {

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
    Tensor copy =
        on.empty(x, std::vector<int64_t>{N, C, tensor.size(2), tensor.size(3)}, x.scalar_type(), format);
    return torch::stable::copy_(copy, tensor);
  };
  Tensor out =
      on.empty(x, std::vector<int64_t>{N, C, job.last.y.out, job.last.x.out}, x.scalar_type(), format);
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
    arguments.second = arguments.last;
    if (backward) {
      arguments.last = arguments.first;
      arguments.second.flip = arguments.last.flip = !flip_filter;
    }
    arguments.positive = static_cast<T>(gain);
    arguments.negative = static_cast<T>(gain * slope);
    arguments.clamps = clamp >= 0;
    arguments.clamp = clamp >= 0 ? static_cast<T>(clamp) : std::numeric_limits<T>::infinity();
    if constexpr (!std::is_same_v<S, double>) {
      if (run_strips<S, backward, 2, 2>(on, arguments, job)) return;
      if (run_strips<S, backward, 4, 2>(on, arguments, job)) return;
    }
    run_loops<S, backward>(on, arguments, job);
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
  FASTGEN_OP(m, "filtered_lrelu", filtered_lrelu_cuda)
  FASTGEN_OP(m, "filtered_lrelu_bwd", filtered_lrelu_bwd_cuda)
}

}  // namespace fastgen
