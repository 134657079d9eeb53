// sample_triplane and its first two derivatives, image by image. Planes whose channels lie together are read
// where they are; others from a channels-last copy or, for few points, pixel by pixel. triplane.h does the
// rest.
#include "triplane.h"
#include "triplane_arguments.h"

namespace fastgen {
namespace {

// Coordinates [N, M, 3] to [N, 3, M].
template <class T>
Buffer<T> read_points(const Tensor& x) {
  const int64_t N = x.size(0), M = x.size(1);
  Buffer<T> points(N * 3 * M, false);
  dispatch("sample_triplane", x.scalar_type(), [&](auto stored) {
    const auto* from = data<decltype(stored)>(x);
    const int64_t sn = x.stride(0), sm = x.stride(1), sk = x.stride(2);
    parallel_for(N * 3 * M, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin, n; i < end; i += n) {
        const int64_t row = i / M, m = i % M;
        n = std::min(M - m, end - i);
        const auto* at = from + row / 3 * sn + row % 3 * sk + m * sm;
        for (int64_t j = 0; j < n; ++j) points[i + j] = static_cast<T>(at[j * sm]);
      }
    });
  });
  return points;
}

template <class T>
void write_points(const Buffer<T>& points, const Tensor& to) {
  const int64_t N = to.size(0), M = to.size(1);
  dispatch("sample_triplane", to.scalar_type(), [&](auto stored) {
    using D = decltype(stored);
    D* x = mutable_data<D>(to);
    for (int64_t n = 0; n < N; ++n) {
      parallel_for(M, 3, [&](int64_t begin, int64_t end) {
        for (int64_t i = 3 * begin; i < 3 * end; ++i)
          x[n * 3 * M + i] = static_cast<D>(points[(n * 3 + i % 3) * M + i / 3]);
      });
    }
  });
}

// Planes of image n.
template <class S>
Table<S> table_of(const Tensor& x, int64_t n, S* data) {
  const int64_t channel = x.size(2) > 1 ? x.stride(2) : 1;
  const bool whole = channel == 1 && x.size(2) % lanes<accumulator_t<std::remove_const_t<S>>> == 0;
  return {data + n * x.stride(0), x.stride(1), channel, x.stride(3), x.stride(4), whole};
}
template <class S>
Table<S> packed(int64_t H, int64_t W, int64_t padded, S* data) {
  return {data, H * W * padded, 1, W * padded, padded, true};
}

// Copies planes [3, C, H, W]; some pixels at a time, which stay in the first-level cache.
template <class From, class To>
void copy_planes(const Table<From>& from, const Table<To>& to, int64_t C, int64_t H, int64_t W) {
  parallel_for(3 * H, W * C, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const From* x = from.data + i / H * from.plane + i % H * from.row;
      To* y = to.data + i / H * to.plane + i % H * to.row;
      for (int64_t w0 = 0; w0 < W; w0 += 16) {
        const int64_t w1 = std::min(w0 + 16, W);
        for (int64_t c = 0; c < C; ++c) {
          for (int64_t w = w0; w < w1; ++w)
            y[w * to.column + c * to.channel] = static_cast<To>(x[w * from.column + c * from.channel]);
        }
      }
    }
  });
}

// Planes as the kernels read them.
template <class S>
class Readable {
 public:
  Readable(const Tensor& x, const Job<S>& job)
      : x_(x),
        copies_(!table_of(x, 0, data<S>(x)).whole && 12 * job.M >= job.H * job.W),
        copy_(copies_ ? 3 * job.H * job.W * job.padded : 0, job.C != job.padded) {}

  Table<const S> image(const Job<S>& job, int64_t n) const {
    const Table<const S> table = table_of(x_, n, data<S>(x_));
    if (!copies_) return table;
    copy_planes(table, packed(job.H, job.W, job.padded, copy_.get()), job.C, job.H, job.W);
    return packed<const S>(job.H, job.W, job.padded, copy_.get());
  }

 private:
  const Tensor& x_;
  bool copies_;
  Buffer<S> copy_;
};

// What a call gives, but for the planes: image by image, as the kernels take it.
template <class S>
struct Call {
  using T = accumulator_t<S>;
  Job<S> job;
  Buffer<S> zeros;
  Buffer<T> points;

  Call(const Tensor& planes, const Tensor& coordinates, const std::vector<double>& projection, bool mean)
      : job(make_job(planes, coordinates, projection, mean)),
        zeros(job.padded),
        points(read_points<T>(coordinates)) {
    job.zeros = zeros.get();
  }

  void select(int64_t n, const Tensor* dy = nullptr) {
    job.points = points.get() + n * 3 * job.M;
    if (dy) job.dy = data<S>(*dy) + n * dy->numel() / dy->size(0);
  }

 private:
  static Job<S> make_job(const Tensor& planes, const Tensor& coordinates,
                         const std::vector<double>& projection, bool mean) {
    Job<S> job{};
    job.H = planes.size(3);
    job.W = planes.size(4);
    job.C = planes.size(2);
    job.padded = round_up(job.C, lanes<T>);
    job.M = coordinates.size(1);
    job.mean = mean;
    for (int64_t i = 0; i < 18; ++i) job.matrix[i] = static_cast<T>(projection[i]);
    return job;
  }
};

// As coordinates, or where that is not needed empty.
Tensor empty_points(const Tensor& coordinates, bool needed) {
  return empty(
      coordinates,
      needed ? std::vector<int64_t>{coordinates.size(0), coordinates.size(1), 3} : std::vector<int64_t>{0},
      MemoryFormat::Contiguous);
}

template <class S>
void gather_image(const Job<S>& job, const std::vector<Source<S>>& sources, S* out) {
  parallel_for(job.M, 12 * job.C, [&](int64_t begin, int64_t end) { gather(job, sources, begin, end, out); });
}

template <class S>
void differentiate_image(const Job<S>& job, const Table<const S>& table, const Table<const S>& mixed,
                         accumulator_t<S>* out) {
  parallel_for(job.M, 12 * job.C,
               [&](int64_t begin, int64_t end) { differentiate(job, table, mixed, begin, end, out); });
}

// Gradients of planes. A thread owns some channels and rows of a plane and goes through all points, so that
// no two add to one number, and the order of a sum does not depend on threads.
template <class S>
class Gradient {
  using T = accumulator_t<S>;

 public:
  Gradient(const Tensor& planes, const Job<S>& job)
      : to(torch::stable::empty_like(planes)),
        direct_(std::is_same_v<S, T> && table_of(to, 0, data<S>(to)).whole),
        sums_(direct_ ? 0 : 3 * job.H * job.W * job.padded, false) {
    if (direct_) clear(mutable_data<S>(to), to.numel());
  }

  void add(const Job<S>& job, int64_t n) const {
    const Table<S> given = table_of(to, n, mutable_data<S>(to));
    Table<T> table = packed(job.H, job.W, job.padded, sums_.get());
    if constexpr (std::is_same_v<S, T>) table = direct_ ? given : table;
    if (!direct_) clear(sums_.get(), 3 * table.plane);
    const int64_t vectors = job.padded / lanes<T>, threads = torch::stable::get_num_threads();
    const int64_t bands = std::min(job.H, ceil_div(2 * threads, std::max<int64_t>(1, 3 * vectors)));
    torch::stable::parallel_for(0, 3 * bands * vectors, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t plane = i / vectors / bands, band = i / vectors % bands;
        scatter(job, table, plane, i % vectors * lanes<T>, band * job.H / bands, (band + 1) * job.H / bands);
      }
    });
    if (!direct_) copy_planes(table, given, job.C, job.H, job.W);
  }

  Tensor to;

 private:
  template <class X>
  static void clear(X* x, int64_t n) {
    parallel_for(n, 1, [&](int64_t begin, int64_t end) { std::fill(x + begin, x + end, X(0)); });
  }
  bool direct_;
  Buffer<T> sums_;
};

Tensor sample_triplane_cpu(const Tensor& planes, const Tensor& coordinates,
                           const std::vector<double>& projection, bool mean) {
  check(planes, coordinates, projection);
  Tensor out = empty(planes, samples_shape(planes, coordinates, mean), MemoryFormat::Contiguous);
  dispatch("sample_triplane", planes.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    const int64_t N = planes.size(0);
    Call<S> call(planes, coordinates, projection, mean);
    const Job<S>& job = call.job;
    const Readable<S> x(planes, job);
    for (int64_t n = 0; n < N && out.numel(); ++n) {
      call.select(n);
      gather_image(job, {{x.image(job, n), false}}, mutable_data<S>(out) + n * out.numel() / N);
    }
  });
  return out;
}

// Gradients that are not needed have shape [0].
std::tuple<Tensor, Tensor> sample_triplane_bwd_cpu(const Tensor& dy, const Tensor& planes,
                                                   const Tensor& coordinates,
                                                   const std::vector<double>& projection, bool mean,
                                                   bool need_planes, bool need_coordinates) {
  check(planes, coordinates, projection);
  check_like("dy", dy, samples_shape(planes, coordinates, mean), planes.scalar_type(), planes);
  const Tensor g = torch::stable::contiguous(dy);
  Tensor dplanes = empty(planes, {0}, MemoryFormat::Contiguous);
  Tensor dcoordinates = empty_points(coordinates, need_coordinates);
  dispatch("sample_triplane_bwd", planes.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using T = accumulator_t<S>;
    Call<S> call(planes, coordinates, projection, mean);
    Job<S>& job = call.job;
    const Buffer<T> sums(need_coordinates ? coordinates.numel() : 0, false);
    std::optional<Readable<S>> x;
    std::optional<Gradient<S>> gradient;
    if (need_coordinates) x.emplace(planes, job);
    if (need_planes) gradient.emplace(planes, job);
    for (int64_t n = 0; n < planes.size(0); ++n) {
      call.select(n, &g);
      if (x) differentiate_image(job, x->image(job, n), {}, sums.get() + n * 3 * job.M);
      if (gradient) gradient->add(job, n);
    }
    if (gradient) dplanes = gradient->to;
    if (x) write_points(sums, dcoordinates);
  });
  return {dplanes, dcoordinates};
}

// The gradients of sum(ddplanes * dplanes) + sum(ddcoordinates * dcoordinates) in what bwd takes.
std::tuple<Tensor, Tensor, Tensor> sample_triplane_bwd2_cpu(
    const std::optional<Tensor>& ddplanes, const std::optional<Tensor>& ddcoordinates, const Tensor& dy,
    const Tensor& planes, const Tensor& coordinates, const std::vector<double>& projection, bool mean,
    bool need_dy, bool need_planes, bool need_coordinates) {
  check(planes, coordinates, projection);
  check_bwd2(ddplanes, ddcoordinates, dy, planes, coordinates, mean, need_planes);
  const Tensor g = torch::stable::contiguous(dy);
  Tensor ddy = empty(planes, need_dy ? sizes(dy) : std::vector<int64_t>{0}, MemoryFormat::Contiguous);
  Tensor dplanes = empty(planes, {0}, MemoryFormat::Contiguous);
  Tensor dcoordinates = empty_points(coordinates, need_coordinates);
  dispatch("sample_triplane_bwd2", planes.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using T = accumulator_t<S>;
    Call<S> call(planes, coordinates, projection, mean);
    Job<S>& job = call.job;
    const Buffer<T> sums(need_coordinates ? coordinates.numel() : 0, false);
    std::optional<Buffer<T>> directions;
    std::optional<Readable<S>> x, ddx;
    std::optional<Gradient<S>> gradient;
    if (ddcoordinates) directions.emplace(read_points<T>(*ddcoordinates));
    if (ddcoordinates && (need_dy || need_coordinates)) x.emplace(planes, job);
    if (ddplanes && (need_dy || need_coordinates)) ddx.emplace(*ddplanes, job);
    if (need_planes) gradient.emplace(planes, job);
    for (int64_t n = 0; n < planes.size(0); ++n) {
      call.select(n, &g);
      job.directions = directions ? directions->get() + n * 3 * job.M : nullptr;
      const Table<const S> table = x ? x->image(job, n) : Table<const S>{},
                           change = ddx ? ddx->image(job, n) : Table<const S>{};
      std::vector<Source<S>> sources;
      if (ddx) sources.push_back({change, false});
      if (x) sources.push_back({table, true});
      if (need_dy) gather_image(job, sources, mutable_data<S>(ddy) + n * ddy.numel() / planes.size(0));
      if (need_coordinates) differentiate_image(job, change, table, sums.get() + n * 3 * job.M);
      if (gradient) gradient->add(job, n);
    }
    if (gradient) dplanes = gradient->to;
    if (need_coordinates) write_points(sums, dcoordinates);
  });
  return {ddy, dplanes, dcoordinates};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("sample_triplane", TORCH_BOX(&sample_triplane_cpu));
  m.impl("sample_triplane_bwd", TORCH_BOX(&sample_triplane_bwd_cpu));
  m.impl("sample_triplane_bwd2", TORCH_BOX(&sample_triplane_bwd2_cpu));
}

}  // namespace fastgen
