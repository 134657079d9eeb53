// bias_act and its first two derivatives. Any dense layout: the channel of the element at memory position i
// is (i / inner) % channels, where inner is the stride of the channel dimension.
#include "activate.h"

namespace fastgen {
namespace {

constexpr int64_t block = 1024;  // elements staged in the first-level cache

struct Job {
  const void *x, *dy, *ddx;  // ddx null: order 1; dy null too: order 0
  void* out;
  const void* bias;  // in the accumulating type: one number a channel, or a whole pattern; null for none
  int64_t inner, channels, pattern;
  Act act;
};

// `x` in the accumulating type: itself, or converted into `buffer`.
template <class S, class T>
FASTGEN_INLINE const T* load(const S* x, T* buffer, int64_t n) {
  if constexpr (std::is_same_v<S, T>) {
    return x;
  } else {
    for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<T>(x[i]);
    return buffer;
  }
}

template <class S>
FASTGEN_INLINE void run_blocks(const Job& job, int64_t begin, int64_t end) {
  using T = accumulator_t<S>;
  T value_buffer[block], gradient_buffer[block], second_buffer[block];
  const auto* x = static_cast<const S*>(job.x);
  const auto* dy = static_cast<const S*>(job.dy);
  const auto* ddx = static_cast<const S*>(job.ddx);
  const auto* bias = static_cast<const T*>(job.bias);
  auto* out = static_cast<S*>(job.out);

  for (int64_t i = begin, n; i < end; i += n) {
    n = std::min(block, end - i);
    const T* v;
    if (!bias) {
      v = load<S, T>(x + i, value_buffer, n);
    } else if (job.pattern) {
      const int64_t from = i % job.pattern;
      n = std::min(n, job.pattern - from);
      for (int64_t j = 0; j < n; ++j) value_buffer[j] = static_cast<T>(x[i + j]) + bias[from + j];
      v = value_buffer;
    } else {
      const int64_t row = i / job.inner;
      n = std::min(n, (row + 1) * job.inner - i);
      const T b = bias[row % job.channels];
      for (int64_t j = 0; j < n; ++j) value_buffer[j] = static_cast<T>(x[i + j]) + b;
      v = value_buffer;
    }

    T* to = value_buffer;
    if constexpr (std::is_same_v<S, T>) to = out + i;
    if (!dy) {
      map_any<0, T>(v, nullptr, to, n, job.act);
    } else {
      const T* g = load<S, T>(dy + i, gradient_buffer, n);
      if (!ddx) {
        map_any<1, T>(v, g, to, n, job.act);
      } else {
        const T* h = load<S, T>(ddx + i, second_buffer, n);
        for (int64_t j = 0; j < n; ++j) gradient_buffer[j] = g[j] * h[j];
        map_any<2, T>(v, gradient_buffer, to, n, job.act);
      }
    }
    if constexpr (!std::is_same_v<S, T>) {
      for (int64_t j = 0; j < n; ++j) out[i + j] = static_cast<S>(to[j]);
    }
  }
}

FASTGEN_RUN(run_blocks)

Tensor apply(const Tensor* ddx, const Tensor* dy, const Tensor& x, const std::optional<Tensor>& b,
             int64_t dim, const std::string& act, double alpha, double gain, double clamp) {
  Tensor out = torch::stable::empty_like(x);
  const int64_t count = x.numel();
  check_arguments(ddx, dy, x, b, dim);
  if (!count) return out;
  const Tensor dense_x = with_layout_of(out, x);
  const Tensor dense_dy = dy ? with_layout_of(out, *dy) : x;
  const Tensor dense_ddx = ddx ? with_layout_of(out, *ddx) : x;

  Job job{dense_x.const_data_ptr(),
          dy ? dense_dy.const_data_ptr() : nullptr,
          ddx ? dense_ddx.const_data_ptr() : nullptr,
          out.mutable_data_ptr(),
          nullptr,
          1,
          1,
          0,
          {activation_of(act), alpha, gain, clamp}};
  dispatch("bias_act", x.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using T = accumulator_t<S>;
    std::vector<T> bias;
    if (b) {
      bias = host_vector<T>("bias_act", *b);
      job.channels = x.size(dim);
      job.inner = job.channels == 1 ? count : out.stride(dim);
      if (job.inner < 64) {  // short runs: repeat the numbers until the pattern fills a block
        std::vector<T> pattern;
        while (static_cast<int64_t>(pattern.size()) < block) {
          for (T value : bias) pattern.insert(pattern.end(), job.inner, value);
        }
        bias.swap(pattern);
        job.pattern = static_cast<int64_t>(bias.size());
      }
      job.bias = bias.data();
    }
    parallel_for(count, 1, [&](int64_t begin, int64_t end) { run(zero, job, begin, end); });
  });
  return out;
}

Tensor bias_act_cpu(const Tensor& x, const std::optional<Tensor>& b, int64_t dim, const std::string& act,
                    double alpha, double gain, double clamp) {
  return apply(nullptr, nullptr, x, b, dim, act, alpha, gain, clamp);
}

Tensor bias_act_bwd_cpu(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& b, int64_t dim,
                        const std::string& act, double alpha, double gain, double clamp) {
  return apply(nullptr, &dy, x, b, dim, act, alpha, gain, clamp);
}

Tensor bias_act_bwd2_cpu(const Tensor& ddx, const Tensor& dy, const Tensor& x, const std::optional<Tensor>& b,
                         int64_t dim, const std::string& act, double alpha, double gain, double clamp) {
  return apply(&ddx, &dy, x, b, dim, act, alpha, gain, clamp);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("bias_act", TORCH_BOX(&bias_act_cpu));
  m.impl("bias_act_bwd", TORCH_BOX(&bias_act_bwd_cpu));
  m.impl("bias_act_bwd2", TORCH_BOX(&bias_act_bwd2_cpu));
}

}  // namespace fastgen
