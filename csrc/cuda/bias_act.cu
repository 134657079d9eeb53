// bias_act and its first two derivatives. Any dense layout: the channel of the element at memory position i
// is (i / inner) % channels. A thread takes `width` neighbours: 16 bytes, or one element where tensors are
// unaligned.
#include "activations.h"
#include "launch.h"

namespace fastgen {
namespace {

template <class T>
struct Job {
  int64_t count, inner, channels;
  Activation act;
  T alpha, gain, clamp;
};

// The n elements from `from + i` on, and zeros.
template <class S, int width>
__device__ __forceinline__ void load_some(const S* from, int64_t i, int n, accumulator_t<S> (&to)[width]) {
  if (n == width) return load<S, width>(from + i, to);
#pragma unroll
  for (int j = 0; j < width; ++j) to[j] = j < n ? static_cast<accumulator_t<S>>(from[i + j]) : 0;
}

template <Activation A, int order, class T, int width>
__device__ __forceinline__ void map(T (&v)[width], const T (&g)[width], const Job<T>& job) {
#pragma unroll
  for (int j = 0; j < width; ++j) v[j] = activate<A, order, T>(v[j], g[j], job.alpha, job.gain, job.clamp);
}

template <class S, int order, int width>
__global__ void __launch_bounds__(threads, 2)
    bias_act_kernel(const S* __restrict__ x, const S* __restrict__ b, const S* __restrict__ dy,
                    const S* __restrict__ ddx, S* __restrict__ out, Job<accumulator_t<S>> job) {
  using T = accumulator_t<S>;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x) * width;
  if (i >= job.count) return;
  const int n = job.count - i < width ? static_cast<int>(job.count - i) : width;

  T v[width], g[width] = {};
  load_some<S, width>(x, i, n, v);
  if (b) {
    int64_t row, rest;
    if (job.count <= 0x7fffffff) {  // 32-bit divisions are several times cheaper
      const unsigned small = static_cast<unsigned>(i), inner = static_cast<unsigned>(job.inner);
      row = small / inner;
      rest = small % inner;
    } else {
      row = i / job.inner;
      rest = i % job.inner;
    }
    int64_t channel = row % job.channels;
#pragma unroll
    for (int j = 0; j < width; ++j) {
      if (rest == job.inner) {
        rest = 0;
        channel = channel + 1 == job.channels ? 0 : channel + 1;
      }
      v[j] += static_cast<T>(b[channel]);
      ++rest;
    }
  }
  if constexpr (order >= 1) load_some<S, width>(dy, i, n, g);
  if constexpr (order == 2) {
    T h[width];
    load_some<S, width>(ddx, i, n, h);
#pragma unroll
    for (int j = 0; j < width; ++j) g[j] *= h[j];
  }

  with_activation(job.act, [&](auto is) { map<is.value, order>(v, g, job); });

  if (n == width) return store<S, width>(out + i, v);
#pragma unroll
  for (int j = 0; j < width; ++j) {
    if (j < n) out[i + j] = static_cast<S>(v[j]);
  }
}

template <class S, int order, int width>
void launch(const Launch& on, const Tensor& x, const Tensor* b, const Tensor* dy, const Tensor* ddx,
            Tensor& out, const Job<accumulator_t<S>>& job) {
  on.run(bias_act_kernel<S, order, width>, ceil_div(ceil_div(job.count, width), threads), threads, 0,
         data<S>(x), b ? data<S>(*b) : nullptr, dy ? data<S>(*dy) : nullptr, ddx ? data<S>(*ddx) : nullptr,
         mutable_data<S>(out), job);
}

template <int order>
Tensor apply(const Tensor* ddx, const Tensor* dy, const Tensor& x, const std::optional<Tensor>& b,
             int64_t dim, const std::string& act, double alpha, double gain, double clamp) {
  const Launch on("bias_act", x);
  check_arguments(ddx, dy, x, b, dim);
  Tensor out = on.empty_like(x);
  const int64_t count = x.numel();
  if (!count) return out;
  const Tensor dense_x = with_layout_of(out, x);
  const Tensor dense_dy = dy ? with_layout_of(out, *dy) : x;
  const Tensor dense_ddx = ddx ? with_layout_of(out, *ddx) : x;
  const Tensor dense_b = b ? torch::stable::contiguous(*b) : x;
  if (dy) dy = &dense_dy;
  if (ddx) ddx = &dense_ddx;
  const bool aligned = is_aligned(dense_x) && (!dy || is_aligned(*dy)) && (!ddx || is_aligned(*ddx));
  const int64_t channels = b ? x.size(dim) : 1;
  const int64_t inner = channels == 1 ? count : out.stride(dim);

  dispatch("bias_act", x.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using T = accumulator_t<S>;
    const Job<T> job{count,
                     inner,
                     channels,
                     activation_of(act),
                     static_cast<T>(alpha),
                     static_cast<T>(gain),
                     static_cast<T>(clamp)};
    const auto run = aligned ? launch<S, order, widest<S>> : launch<S, order, 1>;
    run(on, dense_x, b ? &dense_b : nullptr, dy, ddx, out, job);
  });
  return out;
}

Tensor bias_act_cuda(const Tensor& x, const std::optional<Tensor>& b, int64_t dim, const std::string& act,
                     double alpha, double gain, double clamp) {
  return apply<0>(nullptr, nullptr, x, b, dim, act, alpha, gain, clamp);
}

Tensor bias_act_bwd_cuda(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& b, int64_t dim,
                         const std::string& act, double alpha, double gain, double clamp) {
  return apply<1>(nullptr, &dy, x, b, dim, act, alpha, gain, clamp);
}

Tensor bias_act_bwd2_cuda(const Tensor& ddx, const Tensor& dy, const Tensor& x,
                          const std::optional<Tensor>& b, int64_t dim, const std::string& act, double alpha,
                          double gain, double clamp) {
  return apply<2>(&ddx, &dy, x, b, dim, act, alpha, gain, clamp);
}

}  // namespace

FASTGEN_KERNELS(m) {
  FASTGEN_OP(m, "bias_act", bias_act_cuda)
  FASTGEN_OP(m, "bias_act_bwd", bias_act_bwd_cuda)
  FASTGEN_OP(m, "bias_act_bwd2", bias_act_bwd2_cuda)
}

}  // namespace fastgen
