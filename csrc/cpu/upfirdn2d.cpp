// upfirdn2d. An axis has up / gcd(up, down) phases: the outputs of one phase see the same taps, and their
// inputs are `step` apart, so neither inserted zeros nor dropped outputs cost anything. An output row is made
// at once: the weighted input rows are summed into a padded row (a separable filter needs one, any other
// filter one per filter row), and the taps along x run over that. In memory [N, H, W, C] the innermost loop
// is over channels.
#include <numeric>

#include "fir.h"

namespace fastgen {
namespace {

struct Phase {
  int64_t start, first, count;  // input of its first output (may lie outside), first tap, number of taps
};

struct Axis {
  int64_t up, out, step;
  std::vector<Phase> phases;

  Axis(int64_t out, int64_t up, int64_t down, int64_t pad, int64_t taps) : up(up), out(out) {
    const int64_t count = up / std::gcd(up, down);
    step = count * down / up;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t origin = r * down - pad;  // of the first tap, in the upsampled image
      const int64_t first = ((-origin) % up + up) % up;
      phases.push_back({(origin + first) / up, first, first < taps ? ceil_div(taps - first, up) : 0});
    }
  }
  int64_t outputs(int64_t phase) const { return ceil_div(out - phase, static_cast<int64_t>(phases.size())); }
};

struct Job {
  const void* x;
  void* out;
  const void* filter;
  const Axis *ax, *ay;
  int64_t height, width, channels;  // of the input; channels is 1 in memory [N, C, H, W], and N counts planes
};

// to[m] (+)= sum over taps k of weights[k * stride] * from[m * step + k]; `count` and `fixed_step` 0: not
// known
template <int count, int fixed_step, bool add, class T>
FASTGEN_INLINE void slide(const T* from, const T* weights, int64_t stride, int64_t step, T* __restrict__ to,
                          int64_t n) {
  T w[count];
  for (int k = 0; k < count; ++k) w[k] = weights[k * stride];
  for (int64_t m = 0; m < n; ++m) {
    T sum = add ? to[m] : T(0);
    for (int k = 0; k < count; ++k) sum += w[k] * from[m * (fixed_step ? fixed_step : step) + k];
    to[m] = sum;
  }
}

template <int step_, class T>
FASTGEN_INLINE void slide_any(const T* from, const T* weights, int64_t count, int64_t stride, int64_t step,
                              bool add, T* to, int64_t n) {
  if (!add && count == 2) return slide<2, step_, false>(from, weights, stride, step, to, n);
  if (!add && count == 4) return slide<4, step_, false>(from, weights, stride, step, to, n);
  if (!add) std::fill(to, to + n, T(0));
  for (; count >= 4; count -= 4, from += 4, weights += 4 * stride) {
    slide<4, step_, true>(from, weights, stride, step, to, n);
  }
  for (; count > 0; --count, ++from, weights += stride)
    slide<1, step_, true>(from, weights, stride, step, to, n);
}

// to[c] = sum over taps k of weights[k * stride] * from[k * channels + c]
template <int count, bool add, class T>
FASTGEN_INLINE void mix(const T* from, const T* weights, int64_t stride, int64_t channels,
                        T* __restrict__ to) {
  for (int64_t c = 0; c < channels; ++c) {
    T sum = add ? to[c] : T(0);
    for (int k = 0; k < count; ++k) sum += weights[k * stride] * from[k * channels + c];
    to[c] = sum;
  }
}

template <class T>
FASTGEN_INLINE void mix_any(const T* from, const T* weights, int64_t count, int64_t stride, int64_t channels,
                            bool add, T* to) {
  if (!add && count == 2) return mix<2, false>(from, weights, stride, channels, to);
  if (!add && count == 4) return mix<4, false>(from, weights, stride, channels, to);
  if (!add) std::fill(to, to + channels, T(0));
  for (int64_t k = 0; k < count; ++k) {
    mix<1, true>(from + k * channels, weights + k * stride, stride, channels, to);
  }
}

// Output rows [begin, end), counted over images (and channels, where those are outermost).
template <class S>
FASTGEN_INLINE void run_rows(const Job& job, int64_t begin, int64_t end) {
  using T = accumulator_t<S>;
  const Axis &ax = *job.ax, &ay = *job.ay;
  const Filter<T>& filter = *static_cast<const Filter<T>*>(job.filter);
  const bool separable = !filter.y.empty();
  const int64_t channels = job.channels, in_row = job.width * channels, out_row = ax.out * channels;
  const int64_t phases = static_cast<int64_t>(ax.phases.size());

  // A padded row reaches from the first to the last input that any output sees.
  int64_t lead = 0, length = job.width;
  for (int64_t r = 0; r < phases; ++r) {
    const Phase& phase = ax.phases[r];
    lead = std::max(lead, -phase.start);
    length = std::max(length, phase.start + (ax.outputs(r) - 1) * ax.step + phase.count);
  }
  const int64_t row = (lead + length) * channels;
  std::vector<T> padded(row * (separable ? 1 : filter.rows), T(0));
  std::vector<T> result(channels == 1 ? phases * ax.outputs(0)
                                      : channels);  // phase after phase; or one pixel
  std::vector<const S*> rows(filter.rows);
  std::vector<T> weights(filter.rows);
  std::vector<const T*> taps(filter.rows);  // the filter row that belongs to each padded row

  for (int64_t i = begin; i < end; ++i) {
    const int64_t image = i / ay.out, oy = i % ay.out;
    const S* x = static_cast<const S*>(job.x) + image * job.height * in_row;
    S* out = static_cast<S*>(job.out) + i * out_row;

    const Phase& phase_y = ay.phases[oy % ay.phases.size()];
    const int64_t top = phase_y.start + oy / static_cast<int64_t>(ay.phases.size()) * ay.step;
    int64_t count = 0;
    for (int64_t k = 0; k < phase_y.count; ++k) {
      if (top + k < 0 || top + k >= job.height) continue;
      const int64_t tap = phase_y.first + k * ay.up;
      rows[count] = x + (top + k) * in_row;
      if (separable) {
        weights[count] = filter.y[tap];
      } else {
        weights[count] = T(1);
        taps[count] = filter.x.data() + tap * filter.columns;
      }
      ++count;
    }
    if (separable) {
      sum_rows(rows.data(), weights.data(), count, padded.data() + lead * channels, in_row);
      taps[0] = filter.x.data();
      count = 1;
    } else {
      for (int64_t k = 0; k < count; ++k) {
        sum_rows(&rows[k], &weights[k], 1, padded.data() + k * row + lead * channels, in_row);
      }
    }

    if (channels == 1) {
      if (!count) std::fill(result.begin(), result.end(), T(0));
      for (int64_t r = 0; r < phases && count; ++r) {
        const Phase& phase = ax.phases[r];
        const int64_t n = ax.outputs(r);
        T* to = result.data() + r * ax.outputs(0);
        for (int64_t k = 0; k < count; ++k) {
          const T* from = padded.data() + k * row + lead + phase.start;
          const T* w = taps[k] + phase.first;
          if (ax.step == 1) {
            slide_any<1>(from, w, phase.count, ax.up, 1, k > 0, to, n);
          } else if (ax.step == 2) {
            slide_any<2>(from, w, phase.count, ax.up, 2, k > 0, to, n);
          } else {
            slide_any<0>(from, w, phase.count, ax.up, ax.step, k > 0, to, n);
          }
        }
      }
      if (phases == 1) {
        for (int64_t ox = 0; ox < ax.out; ++ox) out[ox] = static_cast<S>(result[ox]);
      } else if (phases == 2) {
        const T *even = result.data(), *odd = even + ax.outputs(0);
        for (int64_t m = 0; m < ax.outputs(1); ++m) {
          out[2 * m] = static_cast<S>(even[m]);
          out[2 * m + 1] = static_cast<S>(odd[m]);
        }
        if (ax.out % 2) out[ax.out - 1] = static_cast<S>(even[ax.out / 2]);
      } else {
        for (int64_t ox = 0; ox < ax.out; ++ox) {
          out[ox] = static_cast<S>(result[ox % phases * ax.outputs(0) + ox / phases]);
        }
      }
    } else {
      for (int64_t ox = 0; ox < ax.out; ++ox, out += channels) {
        const Phase& phase = ax.phases[ox % phases];
        const int64_t left = lead + phase.start + ox / phases * ax.step;
        T* to = result.data();
        if constexpr (std::is_same_v<S, T>) to = out;
        if (!count) std::fill(to, to + channels, T(0));
        for (int64_t k = 0; k < count; ++k) {
          mix_any(padded.data() + k * row + left * channels, taps[k] + phase.first, phase.count, ax.up,
                  channels, k > 0, to);
        }
        if constexpr (!std::is_same_v<S, T>) {
          for (int64_t c = 0; c < channels; ++c) out[c] = static_cast<S>(to[c]);
        }
      }
    }
  }
}

FASTGEN_RUN(run_rows)

Tensor upfirdn2d_cpu(const Tensor& x, const std::optional<Tensor>& f, const std::vector<int64_t>& up,
                     const std::vector<int64_t>& down, const std::vector<int64_t>& padding, bool flip_filter,
                     double gain) {
  const bool channels_last = is_channels_last(x);
  const Tensor dense = channels_last ? x : torch::stable::contiguous(x);
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  const int64_t columns = f ? f->size(f->dim() - 1) : 1, rows = f ? f->size(0) : 1;
  const int64_t out_w = (W * up[0] + padding[0] + padding[1] - columns) / down[0] + 1;
  const int64_t out_h = (H * up[1] + padding[2] + padding[3] - rows) / down[1] + 1;
  Tensor out =
      empty(x, {N, C, out_h, out_w}, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (!out.numel()) return out;

  const Axis ax(out_w, up[0], down[0], padding[0], columns), ay(out_h, up[1], down[1], padding[2], rows);
  const int64_t images = channels_last ? N : N * C, channels = channels_last ? C : 1;
  dispatch("upfirdn2d", x.scalar_type(), [&](auto zero) {
    const auto filter = read_filter<accumulator_t<decltype(zero)>>("upfirdn2d", f, flip_filter, gain);
    const Job job{dense.const_data_ptr(), out.mutable_data_ptr(), &filter, &ax, &ay, H, W, channels};
    parallel_for(images * out_h, out_w * channels,
                 [&](int64_t begin, int64_t end) { run(zero, job, begin, end); });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("upfirdn2d", TORCH_BOX(&upfirdn2d_cpu));
}

}  // namespace fastgen
