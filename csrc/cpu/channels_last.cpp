// x times a scale for each sample and channel, in memory [N, H, W, C]: what a modulated convolution reads.
#include "simd.h"

namespace fastgen {
namespace {

constexpr int64_t tile = 64;  // pixels whose lines stay in the first-level cache while channels go by

struct Job {
  const void* x;
  void* out;
  const void* scale;  // [N, C] in the accumulating type
  int64_t channels, pixels;
  bool transposed;  // x is in memory [N, C, H, W]
};

// Tiles [begin, end) of all images.
template <class S>
FASTGEN_INLINE void scale_tiles(const Job& job, int64_t begin, int64_t end) {
  using T = accumulator_t<S>;
  const int64_t C = job.channels, tiles = ceil_div(job.pixels, tile);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / tiles, first = i % tiles * tile, count = std::min(tile, job.pixels - first);
    const T* scale = static_cast<const T*>(job.scale) + n * C;
    const S* x = static_cast<const S*>(job.x) + n * C * job.pixels;
    S* out = static_cast<S*>(job.out) + (n * job.pixels + first) * C;
    if (!job.transposed) {
      x += first * C;
      for (int64_t p = 0; p < count; ++p) {
        for (int64_t c = 0; c < C; ++c)
          out[p * C + c] = static_cast<S>(static_cast<T>(x[p * C + c]) * scale[c]);
      }
      continue;
    }
    constexpr int64_t side = lanes<T>;
    for (int64_t c = 0; c < C; c += side) {
      for (int64_t p = 0; p < count; p += side) {
        const S* from = x + c * job.pixels + first + p;
        S* to = out + p * C + c;
        if (c + side <= C && p + side <= count) {
          Vec<T> square[side];
          for (int64_t k = 0; k < side; ++k) square[k] = widen(from + k * job.pixels) * scale[c + k];
          transpose<T>(square);
          for (int64_t k = 0; k < side; ++k) narrow(to + k * C, square[k]);
          continue;
        }
        for (int64_t k = 0; k < std::min(side, count - p); ++k) {
          for (int64_t j = 0; j < std::min(side, C - c); ++j)
            to[k * C + j] = static_cast<S>(static_cast<T>(from[j * job.pixels + k]) * scale[c + j]);
        }
      }
    }
  }
}

FASTGEN_RUN(scale_tiles)

Tensor channels_last_cpu(const Tensor& x, const std::optional<Tensor>& scale) {
  const char* op = "channels_last";
  FASTGEN_CHECK(x.dim() == 4, op, ": x must have 4 dimensions, got ", x.dim());
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  FASTGEN_CHECK(!scale || (scale->dim() == 2 && scale->size(0) == N && scale->size(1) == C), op,
                ": scale must have shape [N=", N, ", C=", C, "]");
  Tensor out = workspace::empty(x, {N, C, H, W}, MemoryFormat::ChannelsLast);
  if (!out.numel()) return out;
  const Tensor dense = is_channels_last(x) ? x : torch::stable::contiguous(x);
  dispatch(op, x.scalar_type(), [&](auto zero) {
    using T = accumulator_t<decltype(zero)>;
    const std::vector<T> factors = scale ? host_vector<T>(op, *scale) : std::vector<T>(N * C, T(1));
    const Job job{dense.const_data_ptr(), out.mutable_data_ptr(), factors.data(), C, H * W,
                  !is_channels_last(x)};
    parallel_for(N * ceil_div(H * W, tile), tile * C,
                 [&](int64_t begin, int64_t end) { run(zero, job, begin, end); });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("channels_last", TORCH_BOX(&channels_last_cpu));
}

}  // namespace fastgen
