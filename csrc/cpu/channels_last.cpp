// x times a scale for each sample and channel, in memory [N, H, W, C]: what a modulated convolution reads.
#include "workspace.h"

namespace fastgen {
namespace {

constexpr int64_t tile = 32;  // pixels whose lines stay in the first-level cache while channels go by

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
    constexpr int64_t some = 16;
    for (int64_t c0 = 0; c0 < C; c0 += some) {
      const int64_t here = std::min(some, C - c0);
      T values[some][tile];
      for (int64_t c = 0; c < here; ++c) {
        const S* from = x + (c0 + c) * job.pixels + first;
        for (int64_t p = 0; p < count; ++p) values[c][p] = static_cast<T>(from[p]) * scale[c0 + c];
      }
      for (int64_t p = 0; p < count; ++p) {
        for (int64_t c = 0; c < here; ++c) out[p * C + c0 + c] = static_cast<S>(values[c][p]);
      }
    }
  }
}

#define FASTGEN_FOR(S)                                                          \
  FASTGEN_SIMD static void run(S, const Job& job, int64_t begin, int64_t end) { \
    scale_tiles<S>(job, begin, end);                                            \
  }
FASTGEN_FOR(float)
FASTGEN_FOR(double)
FASTGEN_FOR(BFloat16)
FASTGEN_FOR(Half)
#undef FASTGEN_FOR

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
