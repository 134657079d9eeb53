// The gradient of conv3x3's weight: with D = A dy A' of a tile's 2x2 gradients and its V = B' d B,
//
//     dw = G' [sum over tiles V * D] G,
//
// so at each of the 16 places stands a matrix product of [I, tiles] and [tiles, O]. A task makes some rows of
// the places for some output channels, over all tiles, whose sums stay in the second-level cache.
#include "conv3x3.h"

namespace fastgen {
namespace {

struct Task {
  int64_t row_begin, row_end, begin, width;  // output channels [begin, begin + width), in whole vectors
};

// d[k][tile] = (A dy A')[row][k] for the task's channels of tiles [first, first + count).
template <int row>
FASTGEN_INLINE void transform_row(const Job& job, const Task& task, int64_t first, int64_t count, float* d) {
  const int64_t step = job.block * task.width;
  Place at(job, first);
  for (int64_t t = 0; t < count; ++t, d += task.width, at.advance(job)) {
    const float* from[2][2];
    for (int r = 0; r < 2; ++r) {
      for (int k = 0; k < 2; ++k) {
        const int64_t y = 2 * at.y + r, x = 2 * at.x + k;
        const bool inside = y < job.height && x < job.width;
        const int64_t offset = ((at.n * job.height + y) * job.width + x) * job.out_channels + task.begin;
        from[r][k] = inside ? job.out + offset : job.outside;
      }
    }
    for (int64_t c = 0; c < task.width; c += lane) {
      const int64_t n = job.out_channels - task.begin - c;
      Floats sums[2];
      for (int k = 0; k < 2; ++k) {
        const Floats a = n >= lane ? load(from[0][k] + c) : load_some(from[0][k] + c, n);
        const Floats b = n >= lane ? load(from[1][k] + c) : load_some(from[1][k] + c, n);
        sums[k] = row == 0 ? a + b : row == 1 ? a - b : row == 2 ? a : -b;
      }
      store(d + c, sums[0]);
      store(d + c + step, sums[0] + sums[1]);
      store(d + c + 2 * step, sums[0] - sums[1]);
      store(d + c + 3 * step, -sums[1]);
    }
  }
}
FASTGEN_SIMD void transform_gradients(const Job& job, const Task& task, int row, int64_t first, int64_t count,
                                      float* d) {
  switch (row) {
    case 0:
      return transform_row<0>(job, task, first, count, d);
    case 1:
      return transform_row<1>(job, task, first, count, d);
    case 2:
      return transform_row<2>(job, task, first, count, d);
    default:
      return transform_row<3>(job, task, first, count, d);
  }
}

// c [rows, vectors] += transposed a [count, rows] times b [count, vectors].
template <class V, int rows, int vectors>
FASTGEN_INLINE void tile_outer(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                               int64_t count, float* c, int64_t c_stride) {
  constexpr int64_t n = sizeof(V) / sizeof(float);
  V sums[rows][vectors] = {};
  for (int64_t t = 0; t < count; ++t, a += a_stride, b += b_stride) {
    V values[vectors];
    for (int v = 0; v < vectors; ++v) std::memcpy(&values[v], b + v * n, sizeof(V));
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
      const float value = a[i];
      for (int v = 0; v < vectors; ++v) sums[i][v] += value * values[v];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i) {
    for (int v = 0; v < vectors; ++v) {
      V before;
      float* to = c + i * c_stride + v * n;
      std::memcpy(&before, to, sizeof(V));
      before += sums[i][v];
      std::memcpy(to, &before, sizeof(V));
    }
  }
}

// c [in, width] += transposed a [count, in] times b [count, width]; in is rounded up to tile_rows.
FASTGEN_SIMD void outer_large(const float* a, int64_t a_stride, int64_t in, const float* b, int64_t width,
                              int64_t count, float* c) {
  for (int64_t o = 0; o < width; o += panel) {
    for (int64_t i = 0; i < in; i += tile_rows) {
      if (o + panel <= width)
        tile_outer<Floats, 12, 2>(a + i, a_stride, b + o, width, count, c + i * width + o, width);
      else
        tile_outer<Floats, 12, 1>(a + i, a_stride, b + o, width, count, c + i * width + o, width);
    }
  }
}
FASTGEN_SIMD void outer_small(const float* a, int64_t a_stride, int64_t in, const float* b, int64_t width,
                              int64_t count, float* c) {
  typedef float Half __attribute__((vector_size(32)));
  for (int64_t o = 0; o < width; o += lane) {
    for (int64_t i = 0; i < in; i += 6)
      tile_outer<Half, 6, 2>(a + i, a_stride, b + o, width, count, c + i * width + o, width);
  }
}

// u [row][place in the row][I][columns], the sums of all tiles.
void run(const Job& job, const Task& task) {
  static const auto outer = many_registers() ? outer_large : outer_small;
  const int64_t in = round_up(job.in, tile_rows), v_step = job.block * job.v_stride;
  const Buffer<float> v(4 * v_step + tile_rows), d(4 * job.block * task.width, false);
  const Buffer<float> sums((task.row_end - task.row_begin) * 4 * in * task.width);
  for (int64_t first = 0; first < job.tiles; first += job.block) {
    const int64_t count = std::min(job.block, job.tiles - first);
    for (int64_t row = task.row_begin; row < task.row_end; ++row) {
      transform_inputs(job, static_cast<int>(row), first, count, v.get());
      transform_gradients(job, task, static_cast<int>(row), first, count, d.get());
      for (int64_t k = 0; k < 4; ++k) {
        outer(v.get() + k * v_step, job.v_stride, job.in, d.get() + k * job.block * task.width, task.width,
              count, sums.get() + ((row - task.row_begin) * 4 + k) * in * task.width);
      }
    }
  }
  for (int64_t k = task.row_begin * 4; k < task.row_end * 4; ++k) {
    for (int64_t i = 0; i < job.in; ++i) {
      const float* from = sums.get() + ((k - task.row_begin * 4) * in + i) * task.width;
      std::copy(from, from + task.width, job.u + (k * job.in + i) * job.columns + task.begin);
    }
  }
}

// dw = G' u G for input channel i.
FASTGEN_SIMD void transform_sums(const Job& job, int64_t i, float* dw) {
  for (int64_t o = 0; o < job.columns; o += lane) {
    Floats half[3][4], taps[9];
    for (int k = 0; k < 4; ++k) {
      Floats u[4];
      for (int row = 0; row < 4; ++row) u[row] = load(job.u + ((row * 4 + k) * job.in + i) * job.columns + o);
      half[0][k] = u[2] + 0.5f * (u[0] + u[1]);
      half[1][k] = 0.5f * (u[0] - u[1]);
      half[2][k] = u[3] + 0.5f * (u[0] + u[1]);
    }
    for (int r = 0; r < 3; ++r) {
      taps[3 * r] = half[r][0] + 0.5f * (half[r][1] + half[r][2]);
      taps[3 * r + 1] = 0.5f * (half[r][1] - half[r][2]);
      taps[3 * r + 2] = half[r][3] + 0.5f * (half[r][1] + half[r][2]);
    }
    const int64_t n = std::min(lane, job.out_channels - o);
    for (int64_t j = 0; j < n; ++j) {
      for (int t = 0; t < 9; ++t) dw[((o + j) * job.in + i) * 9 + t] = taps[t][j];
    }
  }
}

bool all_finite(const float* x, int64_t n) {
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * 0.0f;
  return sum == 0;
}

Tensor convolution_dw(const Tensor& dy, const Tensor& x, const Tensor& weight) {
  using torch::stable::detail::from;
  const std::vector<int64_t> ones{1, 1}, zeros{0, 0};
  const bool only_weight[3] = {false, true, false};
  std::array<StableIValue, 11> stack{from(dy),
                                     from(x),
                                     from(weight),
                                     from(std::optional<std::vector<int64_t>>()),
                                     from(ones),
                                     from(ones),
                                     from(ones),
                                     from(false),
                                     from(zeros),
                                     from(int64_t{1}),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(only_weight, 3))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, 3> gradients;
  for (int i = 0; i < 3; ++i) gradients[i] = torch::stable::detail::to<Tensor>(stack[i]);
  return gradients[1];
}

Tensor conv3x3_dw_cpu(const Tensor& dy, const Tensor& x) {
  FASTGEN_CHECK(x.scalar_type() == ScalarType::Float && dy.scalar_type() == ScalarType::Float,
                "conv3x3_dw: dy and x must be float32, got ", torch::headeronly::toString(dy.scalar_type()),
                " and ", torch::headeronly::toString(x.scalar_type()));
  FASTGEN_CHECK(x.dim() == 4 && dy.dim() == 4 && x.size(0) == dy.size(0) && x.size(2) == dy.size(2) &&
                    x.size(3) == dy.size(3) && dy.is_cpu(),
                "conv3x3_dw: dy must be [N, O, H, W] and x [N, I, H, W]");
  Job job{};
  job.in = x.size(1);
  job.height = x.size(2);
  job.width = x.size(3);
  job.out_channels = dy.size(1);
  Tensor dw = empty(x, {job.out_channels, job.in, 3, 3}, MemoryFormat::Contiguous);
  if (!x.numel() || !dy.numel()) return torch::stable::zero_(dw);
  const Tensor source = torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  const Tensor gradient = torch::stable::contiguous(dy, MemoryFormat::ChannelsLast);
  if (std::min(job.height, job.width) < 3)
    return torch::stable::copy_(dw, convolution_dw(gradient, source, dw));

  job.columns = round_up(job.out_channels, lane);
  job.tiles_y = ceil_div(job.height, 2);
  job.tiles_x = ceil_div(job.width, 2);
  job.tiles = x.size(0) * job.tiles_y * job.tiles_x;
  job.block = 48;
  job.v_stride = (round_up(job.in, lane) / lane | 1) * lane;
  const Buffer<float> u(16 * job.in * job.columns, false);
  const Buffer<float> outside(std::max(round_up(job.in, lane), job.columns));
  job.x = data<float>(source);
  job.out = const_cast<float*>(data<float>(gradient));
  job.u = u.get();
  job.outside = outside.get();

  // Sums of a task shall take 1 MB at most; fewer tasks read x and dy less often.
  const int64_t threads = torch::stable::get_num_threads();
  int64_t width = std::min<int64_t>(job.columns, 128), rows = 4;
  const auto tasks = [&] { return ceil_div(job.columns, width) * (4 / rows); };
  while (rows > 1 && (rows * 4 * job.in * width > 256 * 1024 || tasks() < threads)) rows /= 2;
  while (width > panel && tasks() < threads) width = round_up(width / 2, panel);
  parallel_for(tasks(), job.tiles * job.in, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % (4 / rows) * rows, first = i / (4 / rows) * width;
      run(job, {row, row + rows, first, std::min(width, job.columns - first)});
    }
  });
  float* out = mutable_data<float>(dw);
  parallel_for(job.in, 9 * job.columns, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) transform_sums(job, i, out);
  });
  return all_finite(out, dw.numel()) ? dw : torch::stable::copy_(dw, convolution_dw(gradient, source, dw));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("conv3x3_dw", TORCH_BOX(&conv3x3_dw_cpu));
}

}  // namespace fastgen
