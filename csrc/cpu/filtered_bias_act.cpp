// What follows a modulated convolution, in one pass over its result: filter, scale, noise, bias, activation,
// and the styles of the next. Memory is [N, H, W, C]. An output row is made at once. The input rows under the
// filter go into padded rows: their weighted sum into one, where the filter is separable, else each into its
// own. Taps along x are then shifts by whole pixels, so everything is sums of rows of numbers.
#include <limits>

#include "activate.h"
#include "fir.h"
#include "simd.h"

namespace fastgen {
namespace {

constexpr int64_t block = 1024;        // elements staged in the first-level cache
constexpr int64_t rows_of_a_step = 8;  // output rows of one image; their sums are kept in one place

struct Job {
  // Pixel (r, q) of the input is in image (r mod up, q mod up), at (r / up, q / up).
  std::vector<const void*> images;
  int64_t up, heights[2], widths[2], height, width;
  int64_t channels, out_h, out_w, left, top;
  const void* filter;
  const void *scale, *noise, *bias, *next;  // in the accumulating type; all but bias may be null
  int64_t noise_strides[4];
  Act act;
  void* out;
  bool contiguous;  // the result's memory is [N, C, H, W]
  // Backward, else null: for every step the sums over pixels of g t and of g, t being the filtered input; and
  // the noise's gradient, g or its sum over channels.
  const void* dy;
  double *d_scale, *d_bias;
  void* d_noise;
  bool d_noise_of_channels;
};

// The filtered row is the sum of taps[k] times the row at from[k]; or, if not null, taps[0] times `whole`.
template <class S, class T>
struct Row {
  std::vector<T> padded, taps;
  std::vector<const T*> from;
  std::vector<const S*> rows;
  const S* whole;
};

template <class S, class T>
FASTGEN_INLINE void read_row(const Job& job, int64_t n, int64_t oy, Row<S, T>& row) {
  const auto& filter = *static_cast<const Filter<T>*>(job.filter);
  const int64_t C = job.channels, up = job.up, length = (job.out_w + filter.columns - 1) * C;
  const auto image_row = [&](int64_t r, int64_t phase, int64_t column) {
    const int64_t y = r % up;
    return static_cast<const S*>(job.images[y * up + phase]) +
           ((n * job.heights[y] + r / up) * job.widths[phase] + column) * C;
  };
  row.from.clear();
  row.taps.clear();
  row.whole = nullptr;
  if (filter.rows * filter.columns == 1 && up == 1 && !job.left && !job.top && job.out_w == job.width &&
      job.out_h == job.height) {
    row.whole = image_row(oy, 0, 0);
    row.taps.push_back(filter.x[0] * (filter.y.empty() ? T(1) : filter.y[0]));
    return;
  }

  const bool separable = !filter.y.empty();
  const int64_t first = std::max<int64_t>(0, -job.left);
  const int64_t last = std::min(job.width, job.out_w + filter.columns - 1 - job.left);
  const auto sum_into = [&](T* to, int64_t r, const T* weights, int64_t count) {
    for (int64_t phase = 0; phase < up; ++phase) {
      int64_t q = first + ((phase - first) % up + up) % up;
      row.rows.clear();
      for (int64_t k = 0; k < count; ++k) row.rows.push_back(image_row(r + k, phase, q / up));
      const int64_t n = up == 1 ? std::max<int64_t>(0, last - first) * C : C;
      for (; q < last; q += up == 1 ? job.width : up) {
        sum_rows(row.rows.data(), weights, count, to + (q + job.left) * C, n);
        for (const S*& from : row.rows) from += C;
      }
    }
  };
  const int64_t begin = std::max<int64_t>(0, job.top - oy);
  const int64_t end = std::min(filter.rows, job.height + job.top - oy);
  if (separable) {
    sum_into(row.padded.data(), oy - job.top + begin, filter.y.data() + begin,
             std::max<int64_t>(0, end - begin));
    for (int64_t k = 0; k < filter.columns; ++k) {
      row.from.push_back(row.padded.data() + k * C);
      row.taps.push_back(filter.x[k]);
    }
    return;
  }
  const T one = 1;
  for (int64_t i = begin; i < end; ++i) {
    T* to = row.padded.data() + i * length;
    sum_into(to, oy - job.top + i, &one, 1);
    for (int64_t k = 0; k < filter.columns; ++k) {
      row.from.push_back(to + k * C);
      row.taps.push_back(filter.x[i * filter.columns + k]);
    }
  }
}

// Pixels v [n, C] to out [C, n], rows of which are `plane` apart.
template <class S, class T>
FASTGEN_INLINE void write_transposed(const T* v, int64_t C, int64_t n, S* out, int64_t plane) {
  constexpr int64_t side = lanes<T>;
  for (int64_t c = 0; c < C; c += side) {
    for (int64_t i = 0; i < n; i += side) {
      if (c + side <= C && i + side <= n) {
        Vec<T> square[side];
        for (int64_t k = 0; k < side; ++k) square[k] = load(v + (i + k) * C + c);
        transpose<T>(square);
        for (int64_t k = 0; k < side; ++k) narrow(out + (c + k) * plane + i, square[k]);
        continue;
      }
      for (int64_t k = c; k < std::min(C, c + side); ++k) {
        for (int64_t j = i; j < std::min(n, i + side); ++j) out[k * plane + j] = static_cast<S>(v[j * C + k]);
      }
    }
  }
}

// act(factor from scale + bias + noise) of whole vectors of channels, in registers from one memory to the
// other: for activations of at most two lines, and noise that is the same for all channels.
template <class From, class To, class T>
FASTGEN_INLINE void activate_pixels(const From* from, T factor, const T* scale, const T* bias, const T* noise,
                                    int64_t noise_step, To* to, int64_t pixels, int64_t C, const Act& act) {
  const Vec<T> slope = Vec<T>{} + static_cast<T>(act.act == Activation::linear ? 1 : act.alpha);
  const Vec<T> most = Vec<T>{} + (act.clamp < 0 ? std::numeric_limits<T>::infinity() : T(act.clamp));
  const T gain = static_cast<T>(act.gain);
  for (int64_t i = 0; i < pixels; ++i, from += C, to += C) {
    const T z = noise ? noise[i * noise_step] : T(0);
    for (int64_t c = 0; c < C; c += lanes<T>) {
      Vec<T> v = widen(from + c) * factor * load(scale + c) + (load(bias + c) + z);
      v = (v > Vec<T>{} ? v : v * slope) * gain;
      v = v < -most ? -most : v;
      narrow(to + c, v > most ? most : v);
    }
  }
}

template <class S>
FASTGEN_INLINE void run_steps(const Job& job, int64_t begin, int64_t end) {
  using T = accumulator_t<S>;
  const auto& filter = *static_cast<const Filter<T>*>(job.filter);
  const int64_t C = job.channels, least = job.contiguous ? 64 : 1;
  const int64_t pixels = std::max<int64_t>(least, block / std::max<int64_t>(1, C)), most = pixels * C;
  const int64_t steps = ceil_div(job.out_h, rows_of_a_step);
  Row<S, T> row;
  row.padded.assign((job.out_w + filter.columns - 1) * C * (filter.y.empty() ? filter.rows : 1), T(0));
  std::vector<T> ones(C, T(1)), filtered(most), value(most), gradient(most);
  std::vector<T> d_scale(C), d_bias(C);
  std::vector<const T*> from;
  const auto* bias = static_cast<const T*>(job.bias);
  const bool vectors = C % lanes<T> == 0 && !job.dy && !job.next && !job.noise_strides[1] &&
                       (job.act.act == Activation::linear || job.act.act == Activation::lrelu);

  for (int64_t step = begin; step < end; ++step) {
    const int64_t n = step / steps, top = step % steps * rows_of_a_step;
    const T* scale = job.scale ? static_cast<const T*>(job.scale) + n * C : ones.data();
    for (int64_t oy = top; oy < std::min(job.out_h, top + rows_of_a_step); ++oy) {
      read_row(job, n, oy, row);
      std::fill(d_scale.begin(), d_scale.end(), T(0));
      std::fill(d_bias.begin(), d_bias.end(), T(0));
      for (int64_t ox = 0; ox < job.out_w; ox += pixels) {
        const int64_t p = std::min(pixels, job.out_w - ox), size = p * C;
        const int64_t at = ((n * job.out_h + oy) * job.out_w + ox) * C;
        T *t = filtered.data(), *v = value.data();
        S* out = static_cast<S*>(job.out) + at;
        const S* whole = row.whole ? row.whole + ox * C : nullptr;
        const T* noise = nullptr;
        if (job.noise) {
          const int64_t* s = job.noise_strides;
          noise = static_cast<const T*>(job.noise) + n * s[0] + oy * s[2] + ox * s[3];
        }
        if (whole && !vectors) {
          sum_rows(&whole, row.taps.data(), 1, t, size);
        } else if (!whole) {
          from.clear();
          for (const T* x : row.from) from.push_back(x + ox * C);
          sum_rows(from.data(), row.taps.data(), static_cast<int64_t>(from.size()), t, size);
        }
        const auto finish = [&](auto* to) __attribute__((always_inline)) {
          const int64_t step = job.noise_strides[3];
          if (whole)
            activate_pixels(whole, row.taps[0], scale, bias, noise, step, to, p, C, job.act);
          else
            activate_pixels(t, T(1), scale, bias, noise, step, to, p, C, job.act);
        };
        const auto write_planes = [&]() __attribute__((always_inline)) {
          const int64_t plane = job.out_h * job.out_w;
          write_transposed(v, C, p, static_cast<S*>(job.out) + n * C * plane + oy * job.out_w + ox, plane);
        };
        if (vectors && job.contiguous) {
          finish(v);
          write_planes();
          continue;
        }
        if (vectors) {
          finish(out);
          continue;
        }

        for (int64_t i = 0; i < p; ++i) {
          const bool of_channels = noise && job.noise_strides[1];
          const T z = noise && !of_channels ? noise[i * job.noise_strides[3]] : T(0);
          for (int64_t c = 0; c < C; ++c) v[i * C + c] = t[i * C + c] * scale[c] + (bias[c] + z);
          for (int64_t c = 0; of_channels && c < C; ++c)
            v[i * C + c] += noise[i * job.noise_strides[3] + c * job.noise_strides[1]];
        }

        T* to = v;
        if constexpr (std::is_same_v<S, T>) to = job.contiguous ? v : out;
        if (!job.dy) {
          map_any<0, T>(v, nullptr, to, size, job.act);
          const T* next = job.next ? static_cast<const T*>(job.next) + n * C : nullptr;
          for (int64_t i = 0; next && i < p; ++i) {
            for (int64_t c = 0; c < C; ++c) to[i * C + c] *= next[c];
          }
        } else {
          T* g = gradient.data();
          const S* dy = static_cast<const S*>(job.dy) + at;
          for (int64_t i = 0; i < size; ++i) g[i] = static_cast<T>(dy[i]);
          map_any<1, T>(v, g, g, size, job.act);
          for (int64_t i = 0; i < p; ++i, g += C, t += C) {
            T* d_noise = nullptr;
            if (job.d_noise) {
              d_noise = static_cast<T*>(job.d_noise) + (job.d_noise_of_channels ? at + i * C : at / C + i);
            }
            if (d_noise && job.d_noise_of_channels) std::copy(g, g + C, d_noise);
            if (d_noise && !job.d_noise_of_channels) {
              T sum = 0;
              for (int64_t c = 0; c < C; ++c) sum += g[c];
              *d_noise = sum;
            }
            for (int64_t c = 0; c < C; ++c) {
              d_scale[c] += g[c] * t[c];
              d_bias[c] += g[c];
              to[i * C + c] = g[c] * scale[c];
            }
          }
        }
        if (job.contiguous) {
          write_planes();
        } else if constexpr (!std::is_same_v<S, T>) {
          for (int64_t i = 0; i < size; ++i) out[i] = static_cast<S>(to[i]);
        }
      }
      if (job.dy) {
        for (int64_t c = 0; c < C; ++c) {
          job.d_scale[step * C + c] += d_scale[c];
          job.d_bias[step * C + c] += d_bias[c];
        }
      }
    }
  }
}

FASTGEN_RUN(run_steps)

// x in memory [N, H, W, C].
Tensor channels_last(const Tensor& x) {
  return with_layout_of(empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, MemoryFormat::ChannelsLast),
                        x);
}

struct Parameters {
  const std::vector<Tensor>& x;
  const std::optional<Tensor>& f;
  const std::vector<int64_t>& padding;
  bool flip_filter;
  double fir_gain;
  const std::optional<Tensor>&scale, &noise, &b, &next;
  Act act;
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The result; or, for dy, the gradients of the filtered image, scale, noise and bias.
Gradients apply(const Tensor* dy, const Parameters& p, bool contiguous) {
  const char* op = "filtered_bias_act";
  const int64_t count = static_cast<int64_t>(p.x.size());
  FASTGEN_CHECK(count == 1 || count == 4, op, ": x must be 1 or 4 tensors, got ", count);
  const Tensor& x = p.x[0];
  Job job{};
  job.up = count == 4 ? 2 : 1;
  const int64_t N = x.size(0), C = x.size(1);
  std::vector<Tensor> images;
  for (int64_t i = 0; i < count; ++i) {
    const Tensor& image = p.x[i];
    const int64_t y = i / job.up, column = i % job.up;
    if (column == 0) job.height += job.heights[y] = image.size(2);
    if (y == 0) job.width += job.widths[column] = image.size(3);
    FASTGEN_CHECK(image.dim() == 4 && image.scalar_type() == x.scalar_type() && image.size(0) == N &&
                      image.size(1) == C && image.size(2) == job.heights[y] &&
                      image.size(3) == job.widths[column],
                  op, ": x must be images of one batch, of matching sizes");
    images.push_back(channels_last(image));
    job.images.push_back(images.back().const_data_ptr());
  }
  // Even rows and columns come first: there are as many, or one more.
  for (const int64_t* sizes : {job.heights, job.widths}) {
    const int64_t more = sizes[0] - sizes[1];
    FASTGEN_CHECK(count == 1 || more == 0 || more == 1, op, ": x must be four phases of an image");
  }
  const int64_t columns = p.f ? p.f->size(p.f->dim() - 1) : 1, rows = p.f ? p.f->size(0) : 1;
  FASTGEN_CHECK(p.padding.size() == 4, op, ": padding must have 4 elements");
  job.channels = C;
  job.left = p.padding[0];
  job.top = p.padding[2];
  job.out_w = job.width + p.padding[0] + p.padding[1] - columns + 1;
  job.out_h = job.height + p.padding[2] + p.padding[3] - rows + 1;
  FASTGEN_CHECK(job.out_w > 0 && job.out_h > 0, op, ": x, padded, must be at least as large as f");
  job.act = p.act;

  job.contiguous = contiguous;
  Tensor out = workspace::empty(x, {N, C, job.out_h, job.out_w},
                                contiguous ? MemoryFormat::Contiguous : MemoryFormat::ChannelsLast);
  Tensor d_scale = out, d_noise = out, d_bias = out;
  dispatch(op, x.scalar_type(), [&](auto zero) {
    using T = accumulator_t<decltype(zero)>;
    const ScalarType wide = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
    const auto make = [&](const std::vector<int64_t>& shape, MemoryFormat format) {
      return torch::stable::empty(shape, wide, std::nullopt, x.device(), std::nullopt, format);
    };
    const auto filter = read_filter<T>(op, p.f, p.flip_filter, p.fir_gain);
    std::vector<T> bias(C, T(0));
    if (p.b) {
      FASTGEN_CHECK(p.b->dim() == 1 && p.b->size(0) == C, op, ": b must have ", C, " elements");
      bias = host_vector<T>(op, *p.b);
    }
    const auto rows = [&](const char* name, const std::optional<Tensor>& rows) {
      FASTGEN_CHECK(!rows || (rows->dim() == 2 && rows->size(0) == N && rows->size(1) == C), op, ": ", name,
                    " must have shape [N, C]");
      return rows ? host_vector<T>(op, *rows) : std::vector<T>();
    };
    const std::vector<T> scale = rows("scale", p.scale), next = rows("next", p.next);
    if (p.noise) {
      const Tensor& noise = *p.noise;
      FASTGEN_CHECK(noise.dim() == 4 && noise.scalar_type() == wide, op,
                    ": noise must have four dimensions, and be float32 (float64 for float64)");
      for (int64_t i = 0; i < 4; ++i) {
        FASTGEN_CHECK(noise.size(i) == 1 || noise.size(i) == out.size(i), op,
                      ": noise must broadcast to the result");
        job.noise_strides[i] = noise.size(i) == 1 ? 0 : noise.stride(i);
      }
      job.noise = noise.const_data_ptr();
    }
    job.filter = &filter;
    job.bias = bias.data();
    job.scale = p.scale ? scale.data() : nullptr;
    job.next = p.next ? next.data() : nullptr;
    job.out = out.mutable_data_ptr();
    const int64_t steps = N * ceil_div(job.out_h, rows_of_a_step);
    std::vector<double> sums;
    Tensor dense_dy = out;
    if (dy) {
      check_like(op, out, "dy", *dy);
      dense_dy = channels_last(*dy);
      job.dy = dense_dy.const_data_ptr();
      sums.assign(2 * steps * C, 0);
      job.d_scale = sums.data();
      job.d_bias = sums.data() + steps * C;
      d_scale = make({N, C}, MemoryFormat::Contiguous);
      d_bias = make({C}, MemoryFormat::Contiguous);
      job.d_noise_of_channels = p.noise && p.noise->size(1) != 1;
      d_noise = make({p.noise ? N : 0, job.d_noise_of_channels ? C : 1, job.out_h, job.out_w},
                     MemoryFormat::ChannelsLast);
      job.d_noise = p.noise ? d_noise.mutable_data_ptr() : nullptr;
    }
    parallel_for(steps, rows_of_a_step * job.out_w * C,
                 [&](int64_t begin, int64_t end) { run(zero, job, begin, end); });
    if (!dy) return;
    for (int64_t c = 0; c < C; ++c) {
      double bias_sum = 0;
      for (int64_t n = 0; n < N; ++n) {
        double scale_sum = 0;
        for (int64_t step = n * steps / N; step < (n + 1) * steps / N; ++step) {
          scale_sum += job.d_scale[step * C + c];
          bias_sum += job.d_bias[step * C + c];
        }
        mutable_data<T>(d_scale)[n * C + c] = static_cast<T>(scale_sum);
      }
      mutable_data<T>(d_bias)[c] = static_cast<T>(bias_sum);
    }
  });
  return {out, d_scale, d_noise, d_bias};
}

Tensor filtered_bias_act_cpu(const std::vector<Tensor>& x, const std::optional<Tensor>& f,
                             const std::vector<int64_t>& padding, bool flip_filter, double fir_gain,
                             const std::optional<Tensor>& scale, const std::optional<Tensor>& noise,
                             const std::optional<Tensor>& b, const std::string& act, double alpha,
                             double gain, double clamp, const std::optional<Tensor>& next, bool contiguous) {
  const Act how{activation_of(act), alpha, gain, clamp};
  return std::get<0>(
      apply(nullptr, {x, f, padding, flip_filter, fir_gain, scale, noise, b, next, how}, contiguous));
}

Gradients filtered_bias_act_bwd_cpu(const Tensor& dy, const std::vector<Tensor>& x,
                                    const std::optional<Tensor>& f, const std::vector<int64_t>& padding,
                                    bool flip_filter, double fir_gain, const std::optional<Tensor>& scale,
                                    const std::optional<Tensor>& noise, const std::optional<Tensor>& b,
                                    const std::string& act, double alpha, double gain, double clamp) {
  const Act how{activation_of(act), alpha, gain, clamp};
  return apply(&dy, {x, f, padding, flip_filter, fir_gain, scale, noise, b, std::nullopt, how}, false);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("filtered_bias_act", TORCH_BOX(&filtered_bias_act_cpu));
  m.impl("filtered_bias_act_bwd", TORCH_BOX(&filtered_bias_act_bwd_cpu));
}

}  // namespace fastgen
