// sample_triplane and its first two derivatives; the formulas are those of fastgen/ops/grid_sample.py. A
// block first finds where its points are on the planes, in shared memory; then a thread takes a point and 16
// bytes of channels, or one channel where those do not lie together. Three planes unrolled would hide no more
// latency than the blocks that then have no registers.
#include "triplane_arguments.h"
#include "triplane_gradient.h"

namespace fastgen {
namespace {

// out: samples of p and slopes of x; p may have no data.
template <class S, bool sloped, int width>
__global__ void __launch_bounds__(threads, 2)
    sample_triplane_kernel(Table<const S> p, Table<const S> x, S* __restrict__ out,
                           const __grid_constant__ Job<accumulator_t<S>> job, int lanes) {
  using T = accumulator_t<S>;
  const int per = threads / lanes, s = threadIdx.x / lanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * per;
  const Places<T> places(job, first, per);
  int64_t n = first + s;
  if (s >= per || n >= job.N * job.M) return;
  const int64_t m = split_off(n, job.M);
  for (int64_t c = threadIdx.x % lanes * width; c < job.C; c += lanes * width) {
    T sums[width] = {};
#pragma unroll 1
    for (int plane = 0; plane < 3; ++plane) {
      const Place<T> at = places.at[3 * s + plane];
      const auto add_up = [&](const Table<const S>& table, const Slope<T>& slope, bool sloping) {
        visit_corners<width>(job, table, n, plane, c, at, [&](int k, const T(&v)[width]) {
          const T weight = weigh(at, slope, sloping, k % 2, k / 2);
#pragma unroll
          for (int j = 0; j < width; ++j) sums[j] += weight * v[j];
        });
      };
      if (!sloped || p.data) add_up(p, {}, false);
      if (sloped) add_up(x, places.slopes[3 * s + plane], true);
      if (!job.mean) {
        store<S, width>(out + job.row(n, plane, m) * job.C + c, sums);
#pragma unroll
        for (int j = 0; j < width; ++j) sums[j] = 0;
      }
    }
    if (!job.mean) continue;
    T mean[width];
#pragma unroll
    for (int j = 0; j < width; ++j) mean[j] = sums[j] * job.share();
    store<S, width>(out + (first + s) * job.C + c, mean);
  }
}

// out [N, M, 3]: the points' gradients, of samples of p and slopes of x; p may have no data. `lanes`, a power
// of two within a warp, are a point's threads.
template <class S, bool sloped, int width>
__global__ void __launch_bounds__(threads, 2)
    sample_triplane_bwd_points_kernel(Table<const S> p, Table<const S> x, const S* __restrict__ dy,
                                      accumulator_t<S>* __restrict__ out,
                                      const __grid_constant__ Job<accumulator_t<S>> job, int lanes) {
  using T = accumulator_t<S>;
  const int per = threads / lanes, s = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * per, point = first + s;
  const Places<T> places(job, first, per);
  const bool given = point < job.N * job.M;
  T sums[3] = {};
  if (given) {
    int64_t n = point;
    const int64_t m = split_off(n, job.M);
    const T to_x = job.share() * static_cast<T>(job.W) / 2, to_y = job.share() * static_cast<T>(job.H) / 2;
#pragma unroll 1
    for (int plane = 0; plane < 3; ++plane) {
      const Place<T> at = places.at[3 * s + plane];
      const S* const g = dy + job.row(n, plane, m) * job.C;
      T dots[4] = {}, mixed = 0;
#pragma unroll 1
      for (int64_t c = lane * width; c < job.C; c += lanes * width) {
        T v[width];
        load<S, width>(g + c, v);
        if (!sloped || p.data) {
          visit_corners<width>(job, p, n, plane, c, at, [&](int k, const T(&pixel)[width]) {
#pragma unroll
            for (int j = 0; j < width; ++j) dots[k] += v[j] * pixel[j];
          });
        }
        if (sloped) {
          visit_corners<width>(job, x, n, plane, c, at, [&](int k, const T(&pixel)[width]) {
#pragma unroll
            for (int j = 0; j < width; ++j) mixed += (k == 0 || k == 3 ? v[j] : -v[j]) * pixel[j];
          });
        }
      }
      T du = (1 - at.b) * (dots[1] - dots[0]) + at.b * (dots[3] - dots[2]);
      T dv = (1 - at.a) * (dots[2] - dots[0]) + at.a * (dots[3] - dots[1]);
      if (sloped) {
        const Slope<T> slope = places.slopes[3 * s + plane];
        du += mixed * slope.v;
        dv += mixed * slope.u;
      }
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        const T u = job.matrix[6 * plane + k], v = job.matrix[6 * plane + 3 + k];
        if (u != 0) sums[k] += u * to_x * du;
        if (v != 0) sums[k] += v * to_y * dv;
      }
    }
  }
  for (int apart = lanes / 2; apart; apart /= 2) {
#pragma unroll
    for (int k = 0; k < 3; ++k) sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], apart);
  }
  if (!given || lane) return;
  for (int k = 0; k < 3; ++k) out[3 * point + k] = sums[k];
}

template <class S>
bool has_packs(const Tensor& x) {
  bool whole = x.stride(2) == 1 && is_aligned(x);
  for (int i : {0, 1, 3, 4}) whole &= x.stride(i) % widest<S> == 0;
  return whole && x.size(2) % widest<S> == 0;
}

template <class S>
struct Call {
  using T = accumulator_t<S>;
  static constexpr ScalarType wide = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const Launch& on;
  Tensor points, directions;
  Job<T> job;

  Call(const Launch& on, const Tensor& planes, const Tensor& coordinates,
       const std::vector<double>& projection, bool mean,
       const std::optional<Tensor>& ddcoordinates = std::nullopt)
      : on(on), points(widened(coordinates)), directions(ddcoordinates ? widened(*ddcoordinates) : points) {
    job = {planes.size(0),
           planes.size(2),
           coordinates.size(1),
           static_cast<int>(planes.size(3)),
           static_cast<int>(planes.size(4)),
           mean};
    for (int i = 0; i < 18; ++i) job.matrix[i] = static_cast<T>(projection[i]);
    job.points = data<T>(points);
    job.directions = ddcoordinates ? data<T>(directions) : nullptr;
  }

  static Tensor widened(const Tensor& x) { return torch::stable::contiguous(torch::stable::to(x, wide)); }

  // Samples of p, which may be null, and with directions slopes of x.
  void sample(const Tensor* p, const Tensor& x, Tensor& out) const {
    if (!out.numel()) return;
    const bool packs = has_packs<S>(x) && (!p || has_packs<S>(*p));
    const int lanes = static_cast<int>(std::min<int64_t>(threads, job.C / (packs ? widest<S> : 1)));
    const auto kernel = job.directions ? packs ? sample_triplane_kernel<S, true, widest<S>>
                                               : sample_triplane_kernel<S, true, 1>
                        : packs        ? sample_triplane_kernel<S, false, widest<S>>
                                       : sample_triplane_kernel<S, false, 1>;
    run_on_points(kernel, threads / lanes, table(p), table(&x), mutable_data<S>(out), job, lanes);
  }

  // The points' gradients in these, in the coordinates' dtype.
  Tensor differentiate(const Tensor* p, const Tensor& x, const Tensor& dy, ScalarType type) const {
    const Tensor out = on.empty(x, std::vector<int64_t>{job.N, job.M, 3}, wide);
    const bool packs = has_packs<S>(x) && (!p || has_packs<S>(*p)) && is_aligned(dy);
    int lanes = 1;
    while (lanes < 32 && lanes * (packs ? widest<S> : 1) < job.C) lanes *= 2;
    const auto kernel = job.directions ? packs ? sample_triplane_bwd_points_kernel<S, true, widest<S>>
                                               : sample_triplane_bwd_points_kernel<S, true, 1>
                        : packs        ? sample_triplane_bwd_points_kernel<S, false, widest<S>>
                                       : sample_triplane_bwd_points_kernel<S, false, 1>;
    run_on_points(kernel, threads / lanes, table(p), table(&x), data<S>(dy), mutable_data<T>(out), job,
                  lanes);
    return torch::stable::to(out, type);
  }

  // The gradient of planes in samples, or with directions in slopes.
  Tensor gather_gradient(const Tensor& dy, const Tensor& planes) const {
    Tensor out = on.empty_like(planes);
    if (!out.numel()) return out;
    if (is_deterministic()) {
      collect(dy, out);
      return out;
    }
    const bool direct = out.scalar_type() == wide && out.stride(2) == 1;
    Tensor sums = out;
    if (direct) {
      torch::stable::zero_(sums);
    } else {
      sums = torch::stable::permute(
          on.zeros(out, std::vector<int64_t>{job.N, 3, int64_t(job.H), int64_t(job.W), job.C}, wide),
          {0, 1, 4, 2, 3});
    }
    on.run(sample_triplane_bwd_kernel<S>, job.N * ceil_div(job.M, threads) * 3, threads, 0, data<S>(dy),
           table<T>(sums), job);
    return direct ? out : torch::stable::copy_(out, sums);
  }

 private:
  template <class X>
  static Table<X> table(const Tensor& x) {
    return {mutable_data<X>(x), x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4)};
  }
  static Table<const S> table(const Tensor* x) {
    if (!x) return {};
    return {data<S>(*x), x->stride(0), x->stride(1), x->stride(2), x->stride(3), x->stride(4)};
  }

  template <class Kernel, class... A>
  void run_on_points(Kernel kernel, int per, const A&... arguments) const {
    on.run(kernel, ceil_div(job.N * job.M, per), threads, Places<T>::bytes(per), arguments...);
  }

  void collect(const Tensor& dy, Tensor& out) const {
    const int64_t count = job.N * 3 * job.M;
    const Tensor keys = on.empty(dy, std::vector<int64_t>{count}, ScalarType::Long);
    on.run(sample_triplane_keys_kernel<T>, ceil_div(count, threads), threads, 0, mutable_data<int64_t>(keys),
           job);
    const auto [sorted, order] = sort(keys);
    const int lanes = static_cast<int>(std::min<int64_t>(threads, job.C));
    on.run(sample_triplane_bwd_ordered_kernel<S>, ceil_div(job.N * 3 * job.H * job.W, threads / lanes),
           threads, 0, data<S>(dy), data<int64_t>(sorted), data<int64_t>(order), table<S>(out), job, lanes);
  }
};

Tensor sample_triplane_cuda(const Tensor& planes, const Tensor& coordinates,
                            const std::vector<double>& projection, bool mean) {
  const Launch on("sample_triplane", planes);
  check(planes, coordinates, projection);
  Tensor out = on.empty(planes, samples_shape(planes, coordinates, mean), planes.scalar_type());
  dispatch(on.op(), planes.scalar_type(), [&](auto zero) {
    Call<decltype(zero)>(on, planes, coordinates, projection, mean).sample(&planes, planes, out);
  });
  return out;
}

// Gradients that are not needed have shape [0].
std::tuple<Tensor, Tensor> sample_triplane_bwd_cuda(const Tensor& dy, const Tensor& planes,
                                                    const Tensor& coordinates,
                                                    const std::vector<double>& projection, bool mean,
                                                    bool need_planes, bool need_coordinates) {
  const Launch on("sample_triplane_bwd", planes);
  check(planes, coordinates, projection);
  check_like("dy", dy, samples_shape(planes, coordinates, mean), planes.scalar_type(), planes);
  const Tensor g = torch::stable::contiguous(dy);
  Tensor dplanes = on.empty(planes, std::vector<int64_t>{0}, planes.scalar_type());
  Tensor dcoordinates = on.empty(coordinates, std::vector<int64_t>{0}, coordinates.scalar_type());
  dispatch(on.op(), planes.scalar_type(), [&](auto zero) {
    const Call<decltype(zero)> call(on, planes, coordinates, projection, mean);
    if (need_coordinates) dcoordinates = call.differentiate(&planes, planes, g, coordinates.scalar_type());
    if (need_planes) dplanes = call.gather_gradient(g, planes);
  });
  return {dplanes, dcoordinates};
}

// The gradients of sum(ddplanes * dplanes) + sum(ddcoordinates * dcoordinates) in what bwd takes.
std::tuple<Tensor, Tensor, Tensor> sample_triplane_bwd2_cuda(
    const std::optional<Tensor>& ddplanes, const std::optional<Tensor>& ddcoordinates, const Tensor& dy,
    const Tensor& planes, const Tensor& coordinates, const std::vector<double>& projection, bool mean,
    bool need_dy, bool need_planes, bool need_coordinates) {
  const Launch on("sample_triplane_bwd2", planes);
  check(planes, coordinates, projection);
  check_bwd2(ddplanes, ddcoordinates, dy, planes, coordinates, mean, need_planes);
  const ScalarType type = planes.scalar_type();
  const Tensor g = torch::stable::contiguous(dy);
  const Tensor* p = ddplanes ? &*ddplanes : nullptr;
  Tensor ddy = on.empty(planes, need_dy ? sizes(dy) : std::vector<int64_t>{0}, type);
  Tensor dplanes = on.empty(planes, std::vector<int64_t>{0}, type);
  Tensor dcoordinates = on.empty(coordinates, std::vector<int64_t>{0}, coordinates.scalar_type());
  dispatch(on.op(), type, [&](auto zero) {
    const Call<decltype(zero)> call(on, planes, coordinates, projection, mean, ddcoordinates);
    if (need_dy) call.sample(p, planes, ddy);
    if (need_coordinates) dcoordinates = call.differentiate(p, planes, g, coordinates.scalar_type());
    if (need_planes) dplanes = call.gather_gradient(g, planes);
  });
  return {ddy, dplanes, dcoordinates};
}

}  // namespace

FASTGEN_KERNELS(m) {
  FASTGEN_OP(m, "sample_triplane", sample_triplane_cuda)
  FASTGEN_OP(m, "sample_triplane_bwd", sample_triplane_bwd_cuda)
  FASTGEN_OP(m, "sample_triplane_bwd2", sample_triplane_bwd2_cuda)
}

}  // namespace fastgen
