// Resampling row by row, with a leaky ReLU at the end of it.
//
// Columns are kept in phases: with `phases` of them, column i of a row is number i / phases of phase i %
// phases, and the phases lie one after the other. If the upsampled image has P = lcm(up, down), x has P / up
// and the result P / down: then a filter along x adds, for each phase of its result, contiguous pieces of its
// input, whatever up and down are; and so it does in memory [N, H, W, C], where a column is a run of
// channels. So one routine does all the arithmetic: a weighted sum of shifted rows.
#pragma once
#include <limits>

#include "fir.h"
#include "simd.h"

namespace fastgen {
namespace {

template <class T>
struct Tap {
  int64_t offset;
  T weight;
};

constexpr int64_t block = 1024;  // numbers that stay in the first-level cache between sum and activation

template <int vectors, class T>
FASTGEN_INLINE void sum_vectors(const T* from, const Tap<T>* taps, int64_t count, T* to) {
  Vec<T> sums[vectors] = {};
  for (int64_t k = 0; k < count; ++k) {
    const T* row = from + taps[k].offset;
    const T weight = taps[k].weight;
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sums[v] += weight * load(row + v * lanes<T>);
  }
  for (int v = 0; v < vectors; ++v) store(to + v * lanes<T>, sums[v]);
}

// to[i] = sum over taps of weight * from[offset + i], i < n. May read, but not write, a vector beyond.
template <class T>
FASTGEN_INLINE void sum_taps(const T* from, const Tap<T>* taps, int64_t count, T* to, int64_t n) {
  constexpr int64_t one = lanes<T>;
  if (n < one) {
    T sums[one];
    sum_vectors<1>(from, taps, count, sums);
    std::copy(sums, sums + n, to);
    return;
  }
  int64_t i = 0;
  for (; i + 8 * one <= n; i += 8 * one) sum_vectors<8>(from + i, taps, count, to + i);
  if (i + 4 * one <= n) {
    sum_vectors<4>(from + i, taps, count, to + i);
    i += 4 * one;
  }
  if (i + 2 * one <= n) {
    sum_vectors<2>(from + i, taps, count, to + i);
    i += 2 * one;
  }
  // The last vector may make some numbers again.
  for (; i < n; i += one) {
    i = std::min(i, n - one);
    sum_vectors<1>(from + i, taps, count, to + i);
  }
}

// clamp(lrelu(v) gain) and its derivative; comparisons are such that NaN stays NaN.
template <class T>
struct LeakyRelu {
  T slope, gain, clamp;  // clamp negative: none

  FASTGEN_INLINE void value(T* row, int64_t n) const {
    const T high = clamp < 0 ? std::numeric_limits<T>::infinity() : clamp;
    for (int64_t i = 0; i < n; ++i) {
      T y = (row[i] > 0 ? row[i] : row[i] * slope) * gain;
      y = y < -high ? -high : y;
      row[i] = y > high ? high : y;
    }
  }
  // Multiplies dy by the derivative at v. A value on the bound counts as clamped.
  FASTGEN_INLINE void derivative(const T* __restrict__ v, T* __restrict__ dy, int64_t n) const {
    const T above = gain, below = slope * gain;
    if (clamp < 0) {
      for (int64_t i = 0; i < n; ++i) dy[i] *= v[i] > 0 ? above : below;
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const T y = (v[i] > 0 ? v[i] : v[i] * slope) * gain, dx = dy[i] * (v[i] > 0 ? above : below);
        dy[i] = y > -clamp && y < clamp ? dx : T(0);
      }
    }
  }
};

// The sum; with act its activation; with v too the sum times the activation's derivative at v.
template <class T>
FASTGEN_INLINE void sum_and_activate(const T* from, const Tap<T>* taps, int64_t count, T* to, int64_t n,
                                     const LeakyRelu<T>* act, const T* v) {
  if (!act) return sum_taps(from, taps, count, to, n);
  for (int64_t i = 0; i < n; i += block) {
    const int64_t m = std::min(block, n - i);
    sum_taps(from + i, taps, count, to + i, m);
    if (v) {
      act->derivative(v + i, to + i, m);
    } else {
      act->value(to + i, m);
    }
  }
}

// Columns of a row in phases; `length` columns of memory each, `lead` of them before the first.
struct Layout {
  int64_t columns, phases, channels, lead, length;
  int64_t start(int64_t phase) const { return (phase * length + lead) * channels; }
  int64_t in(int64_t phase) const { return ceil_div(columns - phase, phases); }
  int64_t size() const { return phases * length * channels; }
};

// Between memory and a row; `stride` from column to column in memory, where `channels` lie side by side.
template <class S, class T>
FASTGEN_INLINE void read_row(const S* from, int64_t stride, int64_t channels, const T* bias,
                             const Layout& layout, T* to) {
  for (int64_t r = 0; r < layout.phases; ++r) {
    const S* x = from + r * stride;
    T* row = to + layout.start(r);
    const int64_t n = layout.in(r), step = layout.phases * stride;
    if (layout.channels > 1) {
      for (int64_t i = 0; i < n; ++i, x += step, row += layout.channels) {
        for (int64_t c = 0; c < channels; ++c) row[c] = static_cast<T>(x[c]) + bias[c];
      }
    } else if (step == 1) {
      for (int64_t i = 0; i < n; ++i) row[i] = static_cast<T>(x[i]) + *bias;
    } else {
      for (int64_t i = 0; i < n; ++i) row[i] = static_cast<T>(x[i * step]) + *bias;
    }
  }
}
template <class S, class T>
FASTGEN_INLINE void write_row(const T* from, const Layout& layout, S* to, int64_t stride, int64_t channels) {
  for (int64_t r = 0; r < layout.phases; ++r) {
    S* out = to + r * stride;
    const T* row = from + layout.start(r);
    const int64_t n = layout.in(r), step = layout.phases * stride;
    if (layout.channels > 1) {
      for (int64_t i = 0; i < n; ++i, out += step, row += layout.channels) {
        for (int64_t c = 0; c < channels; ++c) out[c] = static_cast<S>(row[c]);
      }
    } else if (step == 1) {
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<S>(row[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) out[i * step] = static_cast<S>(row[i]);
    }
  }
}

// Out of line, since they are compiled once for every instruction set.
#define FASTGEN_FOR(T)                                                                      \
  FASTGEN_SIMD void sum(const T* from, const Tap<T>* taps, int64_t count, T* to, int64_t n, \
                        const LeakyRelu<T>* act, const T* v) {                              \
    sum_and_activate(from, taps, count, to, n, act, v);                                     \
  }
FASTGEN_FOR(float)
FASTGEN_FOR(double)
#undef FASTGEN_FOR
#define FASTGEN_FOR(S)                                                                                  \
  FASTGEN_SIMD void read(const S* from, int64_t stride, int64_t channels, const accumulator_t<S>* bias, \
                         const Layout& layout, accumulator_t<S>* to) {                                  \
    read_row<S>(from, stride, channels, bias, layout, to);                                              \
  }                                                                                                     \
  FASTGEN_SIMD void write(const accumulator_t<S>* from, const Layout& layout, S* to, int64_t stride,    \
                          int64_t channels) {                                                           \
    write_row<S>(from, layout, to, stride, channels);                                                   \
  }
FASTGEN_FOR(float)
FASTGEN_FOR(double)
FASTGEN_FOR(BFloat16)
FASTGEN_FOR(Half)
#undef FASTGEN_FOR

// upfirdn2d along one axis: out[o] = sum_k c[k] z[o down + k], z[j] = in[(j - pad) / up] where that is whole.
struct Axis {
  int64_t in, out, up, down, pad, taps;

  // out[o] sees in[from + i] with the tap first + i up, for i < count.
  struct Window {
    int64_t from, first, count;
  };
  Window window(int64_t o) const {
    const int64_t origin = o * down - pad, first = ((-origin) % up + up) % up;
    return {(origin + first) / up, first, first < taps ? ceil_div(taps - first, up) : 0};
  }
  int64_t most() const { return ceil_div(taps, up); }

  // The gradient's way through it, with the filter reversed.
  Axis transposed() const { return {out, in, down, up, taps - 1 - pad, taps}; }
};

int64_t floor_div(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -ceil_div(-a, b);
}

// What a step wants to know, once for all threads.
template <class T>
struct Step {
  const Filter<T>& filter;
  Axis x, y;
  Layout in, out;
  bool separable, columns_first;
  std::vector<Axis::Window> rows;  // of each row of the result
  // Taps along x for each phase of the result; those of a filter that isn't separable are row after row.
  std::vector<std::vector<Tap<T>>> taps;
  std::vector<int64_t> lengths;  // of the phases, in numbers

  // `out` is laid out for the step that comes next, `in` as this one needs it.
  Step(const Filter<T>& filter, const Axis& x, const Axis& y, int64_t in_phases, const Layout& out)
      : filter(filter),
        x(x),
        y(y),
        in{x.in, in_phases, out.channels, 0, 0},
        out(out),
        separable(!filter.y.empty()),
        columns_first(separable && x.down == 1) {
    int64_t least = 0, most = ceil_div(x.in, in_phases);
    for (int64_t r = 0; r < out.phases; ++r) {
      const Axis::Window window = x.window(r);
      if (!window.count || !out.in(r)) continue;
      least = std::min(least, floor_div(window.from, in_phases));
      most = std::max(most, floor_div(window.from + window.count - 1, in_phases) + out.in(r));
    }
    in.lead = -least;
    in.length = most - least;
    for (int64_t o = 0; o < y.out; ++o) rows.push_back(y.window(o));
    for (int64_t r = 0; r < out.phases; ++r) lengths.push_back(out.in(r) * out.channels);
    taps.resize(out.phases * (separable ? 1 : filter.rows));
    for (int64_t r = 0; r < static_cast<int64_t>(taps.size()); ++r) {
      const Axis::Window window = x.window(r % out.phases);
      for (int64_t k = 0; k < window.count; ++k) {
        const int64_t column = floor_div(window.from + k, in_phases);
        const int64_t phase = window.from + k - column * in_phases;
        taps[r].push_back({in.start(phase) + column * in.channels,
                           filter.x[r / out.phases * filter.columns + window.first + k * x.up]});
      }
    }
  }
};

// A step at work: keeps the last rows of its input, as many as a row of the result sees.
template <class T>
class Rows {
 public:
  explicit Rows(const Step<T>& step)
      : step_(step),
        capacity_(step.y.most()),
        stride_(round_up((step.columns_first ? step.out : step.in).size(), lanes<T>)),
        rows_(capacity_ * stride_ + slack),
        line_(round_up(step.in.size(), lanes<T>) + slack) {}

  void restart() { next_ = slot_ = 0; }

  // Calls make(row, memory) for each row that row o of the result sees and that isn't here yet.
  template <class Make>
  void prepare(int64_t o, const Make& make) {
    const Axis::Window window = step_.rows[o];
    if (next_ < window.from) {
      next_ = window.from;
      slot_ = next_ % capacity_;
    }
    for (const int64_t end = std::min(step_.y.in, window.from + window.count); next_ < end; ++next_) {
      T* row = rows_.get() + slot_ * stride_;
      if (++slot_ == capacity_) slot_ = 0;
      if (step_.columns_first) {
        make(next_, line_.get());
        along_x(line_.get(), row);
      } else {
        make(next_, row);
      }
    }
  }

  // Row o of the result, activated as `sum` says; only steps that come before the activation are given act.
  void result(int64_t o, T* to, const LeakyRelu<T>* act = nullptr, const T* v = nullptr) {
    const Axis::Window window = step_.rows[o];
    const int64_t first = std::max<int64_t>(0, -window.from);
    const int64_t last = std::min(window.count, step_.y.in - window.from);
    // Calls body(tap, offset of the row) for each row.
    const auto each = [&](const auto& body) {
      int64_t slot = slot_ - (next_ - window.from - first);
      if (slot < 0) slot += capacity_;
      for (int64_t k = first; k < last; ++k) {
        body(window.first + k * step_.y.up, slot * stride_);
        if (++slot == capacity_) slot = 0;
      }
    };
    taps_.clear();
    if (step_.separable) {
      each([&](int64_t tap, int64_t row) { taps_.push_back({row, step_.filter.y[tap]}); });
      if (step_.columns_first) return add(rows_.get(), taps_, to, step_.out.size(), act, v);
      add(rows_.get(), taps_, line_.get(), step_.in.size());
      return along_x(line_.get(), to);
    }
    for (int64_t r = 0; r < step_.out.phases; ++r) {
      taps_.clear();
      each([&](int64_t tap, int64_t row) {
        for (const Tap<T>& x : step_.taps[tap * step_.out.phases + r])
          taps_.push_back({row + x.offset, x.weight});
      });
      const int64_t start = step_.out.start(r);
      add(rows_.get(), taps_, to + start, step_.lengths[r], act, v ? v + start : nullptr);
    }
  }

 private:
  static void add(const T* from, const std::vector<Tap<T>>& taps, T* to, int64_t n,
                  const LeakyRelu<T>* act = nullptr, const T* v = nullptr) {
    sum(from, taps.data(), static_cast<int64_t>(taps.size()), to, n, act, v);
  }
  void along_x(const T* from, T* to) const {
    for (int64_t r = 0; r < step_.out.phases; ++r)
      add(from, step_.taps[r], to + step_.out.start(r), step_.lengths[r]);
  }

  static constexpr int64_t slack = lanes<T>;  // a whole vector may be read from the last number on
  const Step<T>& step_;
  int64_t capacity_, stride_;
  int64_t next_ = 0, slot_ = 0;  // of the input: the next row to come, and where it goes
  Buffer<T> rows_, line_;        // what no one writes is padding, and stays zero
  std::vector<Tap<T>> taps_;
};

}  // namespace
}  // namespace fastgen
