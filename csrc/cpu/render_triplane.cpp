// The renderer, image by image. Nothing larger than the planes is kept: they are copied channels-last, with a
// border of zeros, so that a sample's features are a weighted sum of 3 x 4 rows. rays.h does the rest.
#include "rays.h"

namespace fastgen {
namespace {

// planes [3, F, H, W] of an image, anywhere in `whole`, to the table.
template <class S, class T>
void fill_table(const S* planes, const Tensor& whole, const Decoder<T>& decoder, T* table) {
  const int64_t stride = decoder.feature_stride, F = decoder.F, H = whole.size(3), W = whole.size(4);
  const int64_t sp = whole.stride(1), sf = whole.stride(2), sy = whole.stride(3), sx = whole.stride(4);
  parallel_for(3 * (H + 3), (W + 3) * stride, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i / (H + 3), y = i % (H + 3) - 1;
      T* to = table + i * (W + 3) * stride;
      std::fill(to, to + (W + 3) * stride, T(0));
      if (y < 0 || y >= H) continue;
      // Some pixels at a time: what is written stays in the first-level cache.
      for (int64_t x0 = 0; x0 < W; x0 += 16) {
        const int64_t x1 = std::min(x0 + 16, W);
        const S* from = planes + p * sp + y * sy;
        if (sf == 1) {
          for (int64_t x = x0; x < x1; ++x) {
            for (int64_t f = 0; f < F; ++f) to[(x + 1) * stride + f] = static_cast<T>(from[x * sx + f]);
          }
          continue;
        }
        for (int64_t f = 0; f < F; ++f) {
          for (int64_t x = x0; x < x1; ++x) to[(x + 1) * stride + f] = static_cast<T>(from[f * sf + x * sx]);
        }
      }
    }
  });
}

// The sum of some tables.
template <class S, class T>
void read_table(const std::vector<Buffer<T>>& tables, const Decoder<T>& decoder, int64_t H, int64_t W,
                S* planes) {
  const int64_t stride = decoder.feature_stride, F = decoder.F;
  parallel_for(3 * H, W * stride, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i / H, y = i % H, from = ((p * (H + 3) + y + 1) * (W + 3) + 1) * stride;
      for (int64_t x0 = 0; x0 < W; x0 += 16) {
        const int64_t x1 = std::min(x0 + 16, W);
        for (int64_t f = 0; f < F; ++f) {
          S* to = planes + ((p * F + f) * H + y) * W;
          for (int64_t x = x0; x < x1; ++x) {
            T value = 0;
            for (const auto& table : tables) value += table[from + x * stride + f];
            to[x] = static_cast<S>(value);
          }
        }
      }
    }
  });
}

template <class T>
Scene<T> make_scene(const Decoder<T>& decoder, const Tensor& planes, const std::vector<double>& projection,
                    bool white_back) {
  Scene<T> scene{decoder, nullptr, nullptr, nullptr, planes.size(3), planes.size(4), {}, {}, white_back};
  for (int64_t i = 0; i < 6; ++i) {
    const double size = (i % 2 ? scene.H : scene.W) / 2.0;
    scene.centre[i] = static_cast<T>(size + 0.5);  // column -1, the first of the border, has index 0
    for (int64_t j = 0; j < 3; ++j)
      scene.projection[3 * i + j] = static_cast<T>(projection[3 * i + j] * size);
  }
  return scene;
}

// Makes the scene that of image n; rays are contiguous.
template <class P, class T>
void load_image(Scene<T>& scene, const Buffer<T>& table, const Tensor& planes, const Tensor& ray_origins,
                const Tensor& ray_directions, int64_t n) {
  const int64_t numbers = 3 * ray_origins.size(1);
  fill_table(data<P>(planes) + n * planes.stride(0), planes, scene.decoder, table.get());
  scene.table = table.get();
  scene.origins = data<T>(ray_origins) + n * numbers;
  scene.directions = data<T>(ray_directions) + n * numbers;
}

template <class Body>
void dispatch_wide(const Tensor& x, const Body& body) {
  FASTGEN_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                "render_triplane: rays and depths must be float32 or float64");
  return x.scalar_type() == ScalarType::Float ? body(float()) : body(double());
}

bool has_shape(const Tensor& x, std::initializer_list<int64_t> shape) {
  bool same = x.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (int64_t size : shape) same = same && x.size(i++) == size;
  return same;
}

// What the kernels would otherwise read out of bounds.
void check_scene(const Tensor& planes, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
                 const Tensor& ray_origins, const Tensor& ray_directions, const Tensor& depths,
                 const std::vector<double>& projection) {
  FASTGEN_CHECK(depths.dim() == 3 && depths.size(2) > 0, "render_triplane: depths must be [N, R, S], S > 0");
  const int64_t N = depths.size(0), R = depths.size(1);
  FASTGEN_CHECK(planes.dim() == 5 && planes.size(0) == N && planes.size(1) == 3,
                "render_triplane: planes must be [N, 3, F, H, W]");
  const int64_t F = planes.size(2), D = b1.numel(), O = b2.numel();
  FASTGEN_CHECK(has_shape(w1, {D, F}) && has_shape(w2, {O, D}) && O > 1,
                "render_triplane: the decoder must be [D, F], [D], [1 + C, D], [1 + C]");
  FASTGEN_CHECK(has_shape(ray_origins, {N, R, 3}) && has_shape(ray_directions, {N, R, 3}),
                "render_triplane: rays must be [N, R, 3]");
  FASTGEN_CHECK(projection.size() == 18, "render_triplane: projection must be 18 numbers");
  for (const Tensor* x : {&ray_origins, &ray_directions})
    FASTGEN_CHECK(x->scalar_type() == depths.scalar_type(),
                  "render_triplane: rays and depths must have one dtype");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> render_triplane_cpu(
    const Tensor& planes, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
    const Tensor& ray_origins, const Tensor& ray_directions, const Tensor& depths,
    const std::optional<Tensor>& u_fine, const std::vector<double>& projection, bool white_back) {
  using torch::stable::contiguous;
  const int64_t N = depths.size(0), R = depths.size(1), S = depths.size(2), C = w2.size(0) - 1;
  const int64_t K = u_fine ? u_fine->size(2) : 0, all = S + K;
  const auto format = MemoryFormat::Contiguous;
  const Tensor o = contiguous(ray_origins), d = contiguous(ray_directions), coarse = contiguous(depths),
               u = u_fine ? contiguous(*u_fine) : depths;
  check_scene(planes, w1, b1, w2, b2, o, d, coarse, projection);
  FASTGEN_CHECK(!K || S >= 4, "render_triplane: depths must have at least 4 samples where u_fine is given");
  FASTGEN_CHECK(!u_fine || (has_shape(u, {N, R, K}) && u.scalar_type() == depths.scalar_type()),
                "render_triplane: u_fine must be [N, R, K], with the dtype of depths");
  Tensor features = empty(planes, {N, R, C}, format), depth = empty(depths, {N, R, 1}, format),
         weight = empty(depths, {N, R, 1}, format), kept = empty(depths, {N, R, all}, format);
  if (!kept.numel()) return {features, depth, weight, kept};

  dispatch_wide(depths, [&](auto zero) {
    using T = decltype(zero);
    const Decoder<T> decoder(w1, b1, w2, b2);
    Scene<T> scene = make_scene<T>(decoder, planes, projection, white_back);
    const Buffer<T> table(3 * scene.plane(), false);
    const bool narrow = planes.scalar_type() != depths.scalar_type();
    const Buffer<T> wide(narrow ? R * C : 0, false);
    for (int64_t n = 0; n < N; ++n) {
      dispatch("render_triplane", planes.scalar_type(), [&](auto stored) {
        using P = decltype(stored);
        load_image<P>(scene, table, planes, o, d, n);
        P* narrow_to = mutable_data<P>(features) + n * R * C;
        T* to = narrow ? wide.get() : static_cast<T*>(static_cast<void*>(narrow_to));
        const Outputs<T> out{to, mutable_data<T>(depth) + n * R, mutable_data<T>(weight) + n * R,
                             mutable_data<T>(kept) + n * R * all};
        parallel_for(R, all * 4096, [&](int64_t begin, int64_t end) {
          render(scene, data<T>(coarse) + n * R * S, S, K ? data<T>(u) + n * R * K : nullptr, K, out, begin,
                 end);
          if (narrow) {
            for (int64_t i = begin * C; i < end * C; ++i) narrow_to[i] = static_cast<P>(to[i]);
          }
        });
      });
    }
    // Mean depths within the range of all; rays that meet nothing are farthest away.
    T *mean = mutable_data<T>(depth), least = INFINITY, most = -INFINITY;
    const T *sum = data<T>(weight), *sorted = data<T>(kept);
    for (int64_t i = 0; i < N * R; ++i) {
      const T last = sorted[(i + 1) * all - 1];
      least = last == last ? std::min(least, sorted[i * all]) : last;
      most = last == last ? std::max(most, last) : last;
      if (last != last) break;
    }
    for (int64_t i = 0; i < N * R; ++i) {
      const T value = mean[i] / sum[i];
      mean[i] = value == value ? std::min(std::max(value, least), most) : most;
    }
  });
  return {features, depth, weight, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> render_triplane_bwd_cpu(
    const Tensor& df, const Tensor& dd, const Tensor& dw, const Tensor& planes, const Tensor& w1,
    const Tensor& b1, const Tensor& w2, const Tensor& b2, const Tensor& ray_origins,
    const Tensor& ray_directions, const Tensor& depths, const std::vector<double>& projection,
    bool white_back) {
  using torch::stable::contiguous;
  const int64_t N = depths.size(0), R = depths.size(1), samples = depths.size(2), C = w2.size(0) - 1;
  const auto format = MemoryFormat::Contiguous;
  const Tensor o = contiguous(ray_origins), d = contiguous(ray_directions), sorted = contiguous(depths),
               dfc = contiguous(df), ddc = contiguous(dd), dwc = contiguous(dw);
  check_scene(planes, w1, b1, w2, b2, o, d, sorted, projection);
  FASTGEN_CHECK(has_shape(dfc, {N, R, C}) && dfc.scalar_type() == planes.scalar_type(),
                "render_triplane_bwd: df must be [N, R, C], with the dtype of planes");
  for (const Tensor* x : {&ddc, &dwc})
    FASTGEN_CHECK(has_shape(*x, {N, R, 1}) && x->scalar_type() == depths.scalar_type(),
                  "render_triplane_bwd: dd and dw must be [N, R, 1], with the dtype of depths");
  Tensor d_planes = empty(planes, {N, 3, planes.size(2), planes.size(3), planes.size(4)}, format);
  std::vector<Tensor> grads;
  for (const Tensor* p : {&w1, &b1, &w2, &b2}) {
    std::vector<int64_t> shape;
    for (int64_t i = 0; i < p->dim(); ++i) shape.push_back(p->size(i));
    grads.push_back(empty(*p, shape, format));
  }

  dispatch_wide(depths, [&](auto zero) {
    using T = decltype(zero);
    const Decoder<T> decoder(w1, b1, w2, b2);
    Scene<T> scene = make_scene<T>(decoder, planes, projection, white_back);
    const Buffer<T> table(3 * scene.plane(), false);
    // A table of gradients for each thread, so that none waits for another; but not without end.
    const int64_t room = (int64_t(512) << 20) / (3 * scene.plane() * int64_t(sizeof(T)));
    const int64_t parts =
        std::max<int64_t>(1, std::min<int64_t>({torch::stable::get_num_threads(), room, R}));
    std::vector<Buffer<T>> tables;
    for (int64_t i = 0; i < parts; ++i) tables.emplace_back(3 * scene.plane(), false);
    const int64_t hidden = decoder.hidden, outputs = decoder.outputs, n1 = hidden * decoder.features;
    const int64_t size = n1 + hidden + outputs * hidden + outputs;
    const Buffer<T> sums(parts * size);
    const bool narrow = planes.scalar_type() != depths.scalar_type();
    const Buffer<T> wide(narrow ? R * C : 0, false);
    for (int64_t n = 0; n < N; ++n) {
      dispatch("render_triplane", planes.scalar_type(), [&](auto stored) {
        using P = decltype(stored);
        load_image<P>(scene, table, planes, o, d, n);
        const P* given = data<P>(dfc) + n * R * C;
        const T* from = narrow ? wide.get() : static_cast<const T*>(static_cast<const void*>(given));
        if (narrow) std::transform(given, given + R * C, wide.get(), [](P v) { return static_cast<T>(v); });
        torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            T *to = &sums[i * size], *own = tables[i].get();
            std::fill(own, own + 3 * scene.plane(), T(0));
            const Gradients<T> gradients{from,
                                         data<T>(ddc) + n * R,
                                         data<T>(dwc) + n * R,
                                         own,
                                         to,
                                         to + n1,
                                         to + n1 + hidden,
                                         to + n1 + hidden + outputs * hidden};
            differentiate(scene, data<T>(sorted) + n * R * samples, samples, gradients, i * R / parts,
                          (i + 1) * R / parts);
          }
        });
        read_table(tables, decoder, scene.H, scene.W, mutable_data<P>(d_planes) + n * d_planes.numel() / N);
      });
    }
    for (int64_t i = 1; i < parts; ++i) {
      for (int64_t j = 0; j < size; ++j) sums[j] += sums[i * size + j];
    }
    const auto write = [&](Tensor& to, auto value) {
      dispatch("render_triplane", to.scalar_type(), [&](auto stored) {
        using P = decltype(stored);
        P* p = mutable_data<P>(to);
        for (int64_t i = 0; i < to.numel(); ++i) p[i] = static_cast<P>(value(i));
      });
    };
    const int64_t F = decoder.F, D = decoder.D;
    const auto output = [&](int64_t row) { return row ? row - 1 : C; };  // density comes first outside
    write(grads[0], [&](int64_t i) { return sums[i / F * decoder.features + i % F]; });
    write(grads[1], [&](int64_t i) { return sums[n1 + i]; });
    write(grads[2], [&](int64_t i) { return sums[n1 + hidden + output(i / D) * hidden + i % D]; });
    write(grads[3], [&](int64_t i) { return sums[n1 + hidden + outputs * hidden + output(i)]; });
  });
  return {d_planes, grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("render_triplane", TORCH_BOX(&render_triplane_cpu));
  m.impl("render_triplane_bwd", TORCH_BOX(&render_triplane_bwd_cpu));
}

}  // namespace fastgen
