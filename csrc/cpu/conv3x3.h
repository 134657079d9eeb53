// What conv3x3 and the gradient of its weight share: tiles, and the transform of inputs. Floats are read and
// written here; the mathematics is in conv3x3.cpp.
#pragma once
#include <array>
#include <atomic>

#include "simd.h"

namespace fastgen {
namespace {

using Floats = Vec<float>;
constexpr int64_t lane = lanes<float>;
constexpr int64_t panel = 2 * lane;  // columns of the weights that stand together
constexpr int64_t tile_rows = 12;    // of a product's sums that are held in registers

struct Job {
  const float* x;  // [N, H, W, I]
  const float* weight;
  std::array<int64_t, 4> weight_strides;
  float* u;              // transformed weights: [row][panel][place in the row][I][column of the panel]
  float* out;            // [N, H, W, O]
  const float* outside;  // zeros
  int64_t height, width, in, out_channels;
  int64_t columns;                  // O in whole vectors
  int64_t tiles_y, tiles_x, tiles;  // of an image, and of all
  int64_t block, v_stride;          // tiles worked at once, a multiple of tile_rows; floats between their V
  std::atomic<bool>* finite;

  int64_t panels() const { return ceil_div(columns, panel); }
  int64_t panel_width(int64_t p) const { return std::min(panel, columns - p * panel); }
  float* panel_weights(int64_t row, int64_t p) const { return u + 4 * in * (row * columns + p * panel); }
};

struct Place {
  int64_t n, y, x;  // image, and its tile

  Place(const Job& job, int64_t tile)
      : n(tile / (job.tiles_y * job.tiles_x)), y(tile / job.tiles_x % job.tiles_y), x(tile % job.tiles_x) {}
  FASTGEN_INLINE void advance(const Job& job) {
    if (++x < job.tiles_x) return;
    x = 0;
    if (++y < job.tiles_y) return;
    y = 0;
    ++n;
  }
};

// The first n floats, and zeros.
FASTGEN_INLINE Floats load_some(const float* from, int64_t n) {
  Floats v{};
  std::memcpy(&v, from, n * sizeof(float));
  return v;
}
FASTGEN_INLINE void store_some(float* to, const Floats& v, int64_t n) {
  std::memcpy(to, &v, n * sizeof(float));
}

// v[k] = (B' d B)[row][k] of up to 16 channels, for the two rows of d that the row of B' takes.
template <int row, bool whole>
FASTGEN_INLINE void transform_channels(const float* const (*from)[4], int64_t i, int64_t n, float* v,
                                       int64_t step) {
  Floats d[4];
  for (int k = 0; k < 4; ++k) {
    const Floats a = whole ? load(from[0][k] + i) : load_some(from[0][k] + i, n);
    const Floats b = whole ? load(from[1][k] + i) : load_some(from[1][k] + i, n);
    d[k] = row == 0 ? a + b : a - b;
  }
  store(v + i, d[0] - d[2]);
  store(v + i + step, d[1] + d[2]);
  store(v + i + 2 * step, d[2] - d[1]);
  store(v + i + 3 * step, d[1] - d[3]);
}

// The same for tiles [first, first + count).
template <int row>
FASTGEN_INLINE void transform_row(const Job& job, int64_t first, int64_t count, float* v) {
  constexpr int upper = row == 1 ? 2 : row == 2 ? 0 : 1, lower = row == 1 ? 1 : row == 3 ? 3 : 2;
  const int64_t step = job.block * job.v_stride, whole = job.in / lane * lane;
  Place at(job, first);
  for (int64_t t = 0; t < count; ++t, v += job.v_stride, at.advance(job)) {
    const float* from[2][4];
    for (int r = 0; r < 2; ++r) {
      const int64_t y = 2 * at.y - 1 + (r ? lower : upper), x = 2 * at.x - 1;
      const int64_t line = ((at.n * job.height + y) * job.width + x) * job.in;
      for (int k = 0; k < 4; ++k) {
        const bool inside = y >= 0 && y < job.height && x + k >= 0 && x + k < job.width;
        from[r][k] = inside ? job.x + line + k * job.in : job.outside;
      }
    }
    for (int64_t i = 0; i < whole; i += lane) transform_channels<row, true>(from, i, lane, v, step);
    if (whole < job.in) transform_channels<row, false>(from, whole, job.in - whole, v, step);
  }
}
[[maybe_unused]] FASTGEN_SIMD void transform_inputs(const Job& job, int row, int64_t first, int64_t count,
                                                    float* v) {
  switch (row) {
    case 0:
      return transform_row<0>(job, first, count, v);
    case 1:
      return transform_row<1>(job, first, count, v);
    case 2:
      return transform_row<2>(job, first, count, v);
    default:
      return transform_row<3>(job, first, count, v);
  }
}

[[maybe_unused]] bool many_registers() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

}  // namespace
}  // namespace fastgen
