// A float32 3x3 convolution, stride 1, padding 1, by Winograd's F(2x2, 3x3) (Lavin and Gray 2016): the result
// is cut in 2x2 tiles, each made from 4x4 inputs d, and
//
//     y = A' [sum over channels (G w G') * (B' d B)] A,
//
//     B' = 1  0 -1  0     G =  1    0    0      A' = 1  1  1  0
//          0  1  1  0         1/2  1/2  1/2          0  1 -1 -1
//          0 -1  1  0         1/2 -1/2  1/2
//          0  1  0 -1          0    0    1
//
// takes 16 products a tile where the direct sum takes 36. At each of the 16 places the sum over channels is a
// matrix product of [tiles, I] and [I, O]. A block of tiles goes through row after row of the 4x4 places: the
// four [tiles, I] of a row, which two rows of inputs give, stay in the second-level cache while its weights
// stream by, and the outputs collect what the rows add to them. The middle rows come first, then the first
// and the last: so the sums in between are stored least often. Below, "row" counts in this order.
//
// The transforms spread an infinity or a NaN over its tile, and may overflow: where anything in the result is
// not finite, PyTorch's own convolution makes it anew.
#include "conv3x3.h"

namespace fastgen {
namespace {

// U = G w G' for input channel i of panel p.
FASTGEN_SIMD void transform_weights(const Job& job, int64_t p, int64_t i) {
  const int64_t width = job.panel_width(p), count = std::min(panel, job.out_channels - p * panel);
  const auto [so, si, sy, sx] = job.weight_strides;
  alignas(64) float taps[9][panel] = {};
  const float* from = job.weight + p * panel * so + i * si;
  for (int64_t o = 0; o < count; ++o, from += so) {
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) taps[t][o] = from[t / 3 * sy + t % 3 * sx];
  }
  for (int64_t c = 0; c < width; c += lane) {
    Floats half[4][3];
    for (int k = 0; k < 3; ++k) {
      const Floats a = load(taps[k] + c), b = load(taps[3 + k] + c), d = load(taps[6 + k] + c);
      half[0][k] = 0.5f * (a + d + b);
      half[1][k] = 0.5f * (a + d - b);
      half[2][k] = a;
      half[3][k] = d;
    }
    for (int row = 0; row < 4; ++row) {
      const Floats a = half[row][0], b = half[row][1], d = half[row][2];
      float* to = job.panel_weights(row, p) + i * width + c;
      const int64_t step = job.in * width;
      store(to, a);
      store(to + step, 0.5f * (a + d + b));
      store(to + 2 * step, 0.5f * (a + d - b));
      store(to + 3 * step, d);
    }
  }
}

// m = a b for `rows` rows of a, `stride` apart, and k rows of b. `next` is fetched meanwhile.
template <class V, int rows, int vectors>
FASTGEN_INLINE void tile_product(const float* a, int64_t stride, int64_t k, const float* b, int64_t width,
                                 float* m, const float* next) {
  constexpr int64_t n = sizeof(V) / sizeof(float);
  V sums[rows][vectors] = {};
  // Addresses of three rows each: the processor adds up to twice the stride on its own.
  const float* row[rows / 3];
#pragma GCC unroll 4
  for (int i = 0; i < rows / 3; ++i) row[i] = a + 3 * i * stride;
  for (int64_t j = 0; j < k; ++j, b += width, next += lane) {
    __builtin_prefetch(next, 0, 2);
    V values[vectors];
    for (int v = 0; v < vectors; ++v) std::memcpy(&values[v], b + v * n, sizeof(V));
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
      const float value = row[i / 3][i % 3 * stride];
      for (int v = 0; v < vectors; ++v) sums[i][v] += value * values[v];
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows / 3; ++i) ++row[i];
  }
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i) {
    for (int v = 0; v < vectors; ++v) std::memcpy(m + i * panel + v * n, &sums[i][v], sizeof(V));
  }
}

// m [rows, panel] = a [rows, k] times b [k, width]. The weights that follow b, of the next product, are
// fetched. The sums of a tile are 12 by 32, in 24 registers of AVX-512, or 6 by 16, in 12 of AVX2.
FASTGEN_SIMD void multiply_large(const float* a, int64_t stride, int64_t rows, int64_t k, const float* b,
                                 int64_t width, float* m) {
  for (int64_t i = 0; i < rows; i += 12) {
    const float* next = b + k * width + (i / 12 % 2) * k * lane;
    if (width == panel) {
      tile_product<Floats, 12, 2>(a + i * stride, stride, k, b, panel, m + i * panel, next);
    } else {
      tile_product<Floats, 12, 1>(a + i * stride, stride, k, b, lane, m + i * panel, next);
    }
  }
}
FASTGEN_SIMD void multiply_small(const float* a, int64_t stride, int64_t rows, int64_t k, const float* b,
                                 int64_t width, float* m) {
  // Longer vectors than a register are slow in long functions.
  typedef float Half __attribute__((vector_size(32)));
  for (int64_t c = 0; c < width; c += lane) {
    for (int64_t i = 0; i < rows; i += 6) {
      tile_product<Half, 6, 2>(a + i * stride, stride, k, b + c, width, m + i * panel + c,
                               b + k * width + c * k);
    }
  }
}

// Adds (A' m A)'s share of a row to y [tile][pixel][panel], and writes pixels that are complete.
template <int row>
FASTGEN_INLINE void add_row(const Job& job, int64_t p, int64_t first, int64_t count, const float* m,
                            float* y) {
  const int64_t width = job.panel_width(p), step = job.block * panel;
  Place at(job, first);
  Floats checked{};
  for (int64_t t = 0; t < count; ++t, m += panel, y += 4 * panel, at.advance(job)) {
    const int64_t line = 2 * at.y + (row == 3), column = 2 * at.x;
    float* out = job.out + ((at.n * job.height + line) * job.width + column) * job.out_channels + p * panel;
    for (int64_t c = 0; c < width; c += lane) {
      const Floats a = load(m + c), b = load(m + c + step), d = load(m + c + 2 * step),
                   e = load(m + c + 3 * step);
      const Floats sums[2] = {a + b + d, b - d - e};
      const int64_t n = job.out_channels - p * panel - c;
      for (int k = 0; k < 2; ++k) {
        float *upper = y + k * panel + c, *lower = upper + 2 * panel;
        // Pixels are fetched for writing one row ahead.
        if (row == 1) __builtin_prefetch(out + k * job.out_channels + c, 1, 2);
        if (row == 2) __builtin_prefetch(out + (job.width + k) * job.out_channels + c, 1, 2);
        if (row == 0) store(upper, sums[k]);
        if (row == 1) {
          const Floats before = load(upper);
          store(upper, before + sums[k]);
          store(lower, before - sums[k]);
        }
        if (row < 2 || line >= job.height || column + k >= job.width) continue;
        const Floats done = row == 2 ? load(upper) + sums[k] : load(lower) - sums[k];
        checked += done * 0.0f;
        if (n >= lane)
          store(out + k * job.out_channels + c, done);
        else
          store_some(out + k * job.out_channels + c, done, n);
      }
    }
  }
  // Infinity and NaN times zero are NaN.
  if (row >= 2 && sum<float>(checked) != 0) job.finite->store(false, std::memory_order_relaxed);
}
FASTGEN_SIMD void add_outputs(const Job& job, int row, int64_t p, int64_t first, int64_t count,
                              const float* m, float* y) {
  switch (row) {
    case 0:
      return add_row<0>(job, p, first, count, m, y);
    case 1:
      return add_row<1>(job, p, first, count, m, y);
    case 2:
      return add_row<2>(job, p, first, count, m, y);
    default:
      return add_row<3>(job, p, first, count, m, y);
  }
}

// What a block is worked in.
struct Scratch {
  Buffer<float> v, m, y;  // transformed inputs [place in the row][tile][v_stride], their products, outputs

  explicit Scratch(const Job& job)
      : v(4 * job.block * job.v_stride),
        m(4 * job.block * panel, false),
        y(job.panels() * job.block * 4 * panel, false) {}
};

// Tiles [first, first + count), in panels [begin, end).
void run_block(const Job& job, const Scratch& scratch, int64_t first, int64_t count, int64_t begin,
               int64_t end) {
  static const auto multiply = many_registers() ? multiply_large : multiply_small;
  const auto& [v, m, y] = scratch;
  const int64_t rows = round_up(count, tile_rows), v_step = job.block * job.v_stride;
  for (int row = 0; row < 4; ++row) {
    transform_inputs(job, row, first, count, v.get());
    for (int64_t p = begin; p < end; ++p) {
      const int64_t width = job.panel_width(p);
      const float* b = job.panel_weights(row, p);
      for (int64_t k = 0; k < 4; ++k) {
        multiply(v.get() + k * v_step, job.v_stride, rows, job.in, b + k * job.in * width, width,
                 m.get() + k * job.block * panel);
      }
      add_outputs(job, row, p, first, count, m.get(), y.get() + (p - begin) * job.block * 4 * panel);
    }
  }
}

Tensor convolution(const Tensor& x, const Tensor& weight) {
  using torch::stable::detail::from;
  const std::vector<int64_t> ones{1, 1}, zeros{0, 0};
  std::array<StableIValue, 9> stack{from(x),     from(weight), from(std::optional<Tensor>()),
                                    from(ones),  from(ones),   from(ones),
                                    from(false), from(zeros),  from(int64_t{1})};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor conv3x3_cpu(const Tensor& x, const Tensor& weight) {
  FASTGEN_CHECK(x.scalar_type() == ScalarType::Float && weight.scalar_type() == ScalarType::Float,
                "conv3x3: x and weight must be float32, got ", torch::headeronly::toString(x.scalar_type()),
                " and ", torch::headeronly::toString(weight.scalar_type()));
  FASTGEN_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 &&
                    weight.size(1) == x.size(1) && weight.is_cpu(),
                "conv3x3: x must be [N, I, H, W] and weight [O, I, 3, 3]");
  Job job{};
  const int64_t batch = x.size(0);
  job.in = x.size(1);
  job.height = x.size(2);
  job.width = x.size(3);
  job.out_channels = weight.size(0);
  Tensor out =
      workspace::empty(x, {batch, job.out_channels, job.height, job.width}, MemoryFormat::ChannelsLast);
  if (!out.numel()) return out;
  const Tensor source = torch::stable::contiguous(x, MemoryFormat::ChannelsLast);

  // Where most of a tile is outside, its taps that count may be small to the others, and so to their
  // rounding.
  if (job.in && std::min(job.height, job.width) < 3)
    return torch::stable::copy_(out, convolution(source, weight));

  job.columns = round_up(job.out_channels, lane);
  job.tiles_y = ceil_div(job.height, 2);
  job.tiles_x = ceil_div(job.width, 2);
  job.tiles = batch * job.tiles_y * job.tiles_x;
  // An odd number of cache lines, for rows a power of two apart would compete for few places.
  job.v_stride = (round_up(job.in, lane) / lane | 1) * lane;
  for (int i = 0; i < 4; ++i) job.weight_strides[i] = weight.stride(i);
  const Buffer<float> u(16 * job.in * job.columns, false), outside(round_up(job.in, lane));
  std::atomic<bool> finite(true);
  job.x = data<float>(source);
  job.weight = data<float>(weight);
  job.u = u.get();
  job.out = mutable_data<float>(out);
  job.outside = outside.get();
  job.finite = &finite;

  // In the order of memory, be it [O, I] or [I, O].
  const bool inputs_first = weight.stride(1) > weight.stride(0);
  parallel_for(job.panels() * job.in, 9 * panel, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      if (inputs_first)
        transform_weights(job, j % job.panels(), j / job.panels());
      else
        transform_weights(job, j / job.in, j % job.in);
    }
  });

  // A block's transformed inputs and outputs shall take 200 KB, but the weights be read for 36 tiles at
  // least. Threads share blocks evenly, or the panels of few blocks.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t fitting = 200 * 1024 / (4 * sizeof(float) * (job.v_stride + job.columns));
  int64_t blocks = ceil_div(job.tiles, std::clamp<int64_t>(fitting / tile_rows, 3, 16) * tile_rows);
  if (blocks > threads) blocks = round_up(blocks, threads);
  job.block = round_up(ceil_div(job.tiles, blocks), tile_rows);
  blocks = ceil_div(job.tiles, job.block);
  const int64_t slices = std::min(job.panels(), ceil_div(threads, blocks));
  parallel_for(blocks * slices, job.block * job.in, [&](int64_t begin, int64_t end) {
    const Scratch scratch(job);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / slices * job.block, slice = i % slices;
      run_block(job, scratch, first, std::min(job.block, job.tiles - first), slice * job.panels() / slices,
                (slice + 1) * job.panels() / slices);
    }
  });
  return finite ? out : torch::stable::copy_(out, convolution(source, weight));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3_cpu));
}

}  // namespace fastgen
