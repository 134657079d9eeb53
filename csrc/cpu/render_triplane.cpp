// The renderer, some rays at a time: gather features, first layer, densities; from these the weights along a
// ray, finer depths, and the same again; then colours, of the samples that count. The formulas are those of
// fastgen/ops/_march.py. Nothing larger than the planes is kept: they are copied channels-last, with a border
// of zeros, one image after another, so that a sample's features are a weighted sum of 3 x 4 rows.
#include <cmath>

#include "simd.h"

namespace fastgen {
namespace {

constexpr int64_t least_samples = 96;  // rays are taken together until they have as many

template <class T>
int64_t padded(int64_t n) {
  return round_up(n, 16);
}

// The decoder in the layouts that products want: what is summed over is the row, and rows are padded by
// zeros.
template <class T>
struct Decoder {
  int64_t F, D, C;                                       // features, hidden, colours
  int64_t features, hidden, colours, outputs;            // the same, padded; outputs: C + 1, padded
  int64_t feature_stride, hidden_stride, output_stride;  // of samples' rows
  Buffer<T> w1t, b1, w2t, b2, sigma_row;                 // [F, hidden], [hidden], [D, colours], ...
  Buffer<T> w1, w2;                                      // [D, features]; [C + 1, hidden], density last
  T sigma_bias;
  T negligible;  // a weight of a colour below this changes no digit of a sum of colours

  Decoder(const Tensor& w1_, const Tensor& b1_, const Tensor& w2_, const Tensor& b2_)
      : F(w1_.size(1)),
        D(w1_.size(0)),
        C(w2_.size(0) - 1),
        features(padded<T>(F)),
        hidden(padded<T>(D)),
        colours(padded<T>(C)),
        outputs(padded<T>(C + 1)),
        feature_stride(row_stride(features)),
        hidden_stride(row_stride(hidden)),
        output_stride(row_stride(outputs)),
        w1t(F * hidden),
        b1(hidden),
        w2t(D * colours),
        b2(colours),
        sigma_row(hidden),
        w1(D * features),
        w2((C + 1) * hidden) {
    const char* op = "render_triplane";
    const auto v1 = host_vector<T>(op, w1_), c1 = host_vector<T>(op, b1_), v2 = host_vector<T>(op, w2_),
               c2 = host_vector<T>(op, b2_);
    for (int64_t d = 0; d < D; ++d) {
      b1[d] = c1[d];
      sigma_row[d] = v2[d];
      for (int64_t f = 0; f < F; ++f) w1t[f * hidden + d] = w1[d * features + f] = v1[d * F + f];
      for (int64_t c = 0; c < C; ++c) w2t[d * colours + c] = w2[c * hidden + d] = v2[(c + 1) * D + d];
      w2[C * hidden + d] = v2[d];
    }
    for (int64_t c = 0; c < C; ++c) b2[c] = c2[c + 1];
    sigma_bias = c2[0];
    // Zero times a colour that is not finite is NaN, and has to be seen.
    const auto finite = [](T v) { return std::isfinite(v); };
    const bool safe = std::all_of(v2.begin(), v2.end(), finite) && std::all_of(c2.begin(), c2.end(), finite);
    negligible = !safe ? T(-1) : std::is_same_v<T, float> ? T(9.3e-10) : T(0);
  }
};

template <class T>
struct Scene {
  const Decoder<T>& decoder;
  const T *table, *origins, *directions;  // of one image: [3, H + 3, W + 3, feature_stride]; [R, 3]
  int64_t H, W;
  T projection[18], centre[6];  // world to pixels of the table
  bool white_back;

  int64_t plane() const { return (H + 3) * (W + 3) * decoder.feature_stride; }
};

// Rows of the table and their weights, for the samples of one ray.
template <class T>
struct Corners {
  std::vector<int64_t> row;  // [3, samples]: the upper left one
  std::vector<T> weight;     // [3, 4, samples]
  int64_t samples;

  explicit Corners(int64_t samples) : row(3 * samples), weight(12 * samples), samples(samples) {}
};

template <class T>
FASTGEN_INLINE void find_corners(const Scene<T>& scene, int64_t ray, const T* depths, int64_t n,
                                 Corners<T>& corners) {
  const T *o = scene.origins + 3 * ray, *d = scene.directions + 3 * ray;
  const T right = static_cast<T>(scene.W + 1), bottom = static_cast<T>(scene.H + 1);
  const int64_t stride = scene.decoder.feature_stride, line = (scene.W + 3) * stride;
  for (int64_t p = 0; p < 3; ++p) {
    const T *mx = scene.projection + 6 * p, *my = mx + 3;
    const T x0 = o[0] * mx[0] + o[1] * mx[1] + o[2] * mx[2] + scene.centre[2 * p];
    const T y0 = o[0] * my[0] + o[1] * my[1] + o[2] * my[2] + scene.centre[2 * p + 1];
    const T dx = d[0] * mx[0] + d[1] * mx[1] + d[2] * mx[2], dy = d[0] * my[0] + d[1] * my[1] + d[2] * my[2];
    int64_t* __restrict__ row = corners.row.data() + p * corners.samples;
    T* __restrict__ w = corners.weight.data() + 4 * p * corners.samples;
    for (int64_t s = 0; s < n; ++s) {
      T x = x0 + dx * depths[s], y = y0 + dy * depths[s];
      x = x < 0 ? 0 : x;  // NaN stays
      x = x > right ? right : x;
      y = y < 0 ? 0 : y;
      y = y > bottom ? bottom : y;
      const int32_t i = x >= 0 ? static_cast<int32_t>(x) : 0, j = y >= 0 ? static_cast<int32_t>(y) : 0;
      x -= static_cast<T>(i);
      y = (y - static_cast<T>(j)) / 3;  // the mean over planes
      row[s] = p * scene.plane() + j * line + i * stride;
      const T above = T(1) / 3 - y;
      w[s] = above - above * x;
      w[s + corners.samples] = above * x;
      w[s + 2 * corners.samples] = y - y * x;
      w[s + 3 * corners.samples] = y * x;
    }
  }
}

// x[s] = features of the samples of one ray, rows of feature_stride.
template <class T>
FASTGEN_INLINE void gather(const Scene<T>& scene, const Corners<T>& corners, int64_t n, T* x) {
  const Decoder<T>& decoder = scene.decoder;
  const int64_t stride = decoder.feature_stride, line = (scene.W + 3) * stride, m = corners.samples;
  for (int64_t s = 0; s < n; ++s, x += stride) {
    for (int64_t f = 0; f < decoder.features; f += lanes<T>) {
      Vec<T> sums[3];
#pragma GCC unroll 3
      for (int p = 0; p < 3; ++p) {
        const T* at = scene.table + corners.row[p * m + s] + f;
        const T* w = corners.weight.data() + 4 * p * m + s;
        sums[p] = w[0] * load(at) + w[m] * load(at + stride);
        sums[p] += w[2 * m] * load(at + line) + w[3 * m] * load(at + line + stride);
      }
      store(x + f, sums[0] + sums[1] + sums[2]);
    }
  }
}

// h = softplus(x w1 + b1) and sigma, of `rows` rows.
template <class T>
FASTGEN_INLINE void first_layer(const Decoder<T>& decoder, const T* x, int64_t rows, T* h, T* sigma) {
  const int64_t stride = decoder.hidden_stride;
  multiply(
      {x, decoder.feature_stride, decoder.F, decoder.w1t.get(), decoder.hidden, decoder.b1.get(), h, stride},
      rows);
  for (int64_t i = 0; i < rows; ++i) {
    Vec<T> sums{};
    for (int64_t d = 0; d < decoder.hidden; d += lanes<T>) {
      const Vec<T> v = softplus(load(h + i * stride + d));
      store(h + i * stride + d, v);
      sums += v * load(decoder.sigma_row.get() + d);
    }
    sigma[i] = sum<T>(sums) + decoder.sigma_bias;
  }
}

// gate = colours before the sigmoid, of `rows` rows.
template <class T>
FASTGEN_INLINE void second_layer(const Decoder<T>& decoder, const T* h, int64_t rows, T* gate) {
  multiply({h, decoder.hidden_stride, decoder.D, decoder.w2t.get(), decoder.colours, decoder.b2.get(), gate,
            decoder.output_stride},
           rows);
}

// What marching along one ray needs; arrays of n - 1 intervals or n samples, padded.
template <class T>
struct March {
  Buffer<T> alpha, keep, light, weight, ends;
  explicit March(int64_t n)
      : alpha(padded<T>(n)),
        keep(padded<T>(n)),
        light(padded<T>(n)),
        weight(padded<T>(n)),
        ends(padded<T>(n)) {}
};

// alpha, keep + 1e-10, light, weight of intervals and their ends' halves. t and sigma are padded.
template <class T>
FASTGEN_INLINE void march(const T* sigma, const T* t, int64_t n, March<T>& m) {
  for (int64_t i = 0; i < n - 1; i += lanes<T>) {
    const Vec<T> density = softplus((load(sigma + i) + load(sigma + i + 1)) / 2 - 1);
    const Vec<T> keep = exponential(-density * (load(t + i + 1) - load(t + i)));
    store(m.alpha.get() + i, 1 - keep);
    store(m.keep.get() + i, keep + T(1e-10));
  }
  T light = 1, before = 0;
  for (int64_t i = 0; i < n - 1; ++i) {
    m.light[i] = light;
    const T weight = m.alpha[i] * light;
    m.weight[i] = weight;
    m.ends[i] = (before + weight) / 2;
    before = weight;
    light *= m.keep[i];
  }
  m.ends[n - 1] = before / 2;
}

// NaN is largest, as torch.sort has it.
template <class T>
bool before(T a, T b) {
  return a < b || (b != b && a == a);
}

// Depths drawn by u [count] from the weights of march between depths t [n]; sorted. cdf: room for n.
template <class T>
FASTGEN_INLINE void importance(const T* weight, const T* t, int64_t n, const T* u, int64_t count, T* cdf,
                               T* fine) {
  const int64_t bins = n - 3;
  double total = 0, running = 0;
  for (int64_t i = 0; i < bins; ++i) {
    const auto larger = [](T a, T b) { return a > b || a != a ? a : b; };
    const T pdf = (larger(weight[i + 1], weight[i]) + larger(weight[i + 2], weight[i + 1])) / 2 + T(0.01001);
    cdf[i + 1] = pdf;
    total += pdf;
  }
  cdf[0] = 0;
  for (int64_t i = 1; i <= bins; ++i) {
    running += cdf[i] / static_cast<T>(total);
    cdf[i] = static_cast<T>(running);
  }
  const auto edge = [&](int64_t i) { return (t[i] + t[i + 1]) / 2; };
  for (int64_t k = 0; k < count; ++k) {
    int64_t above = std::upper_bound(cdf, cdf + bins + 1, u[k]) - cdf;
    const int64_t below = std::max<int64_t>(above - 1, 0);
    above = std::min(above, bins);
    T width = cdf[above] - cdf[below];
    width = width < T(1e-5) ? T(1) : width;
    fine[k] = edge(below) + (u[k] - cdf[below]) / width * (edge(above) - edge(below));
  }
  if (!std::is_sorted(fine, fine + count, before<T>)) std::sort(fine, fine + count, before<T>);
}

template <class T>
struct Outputs {
  T *features, *total, *weight, *kept;  // of one image
};

// Rays [begin, end) of an image. u null: a single pass.
template <class T>
FASTGEN_INLINE void render_rays(const Scene<T>& scene, const T* coarse, int64_t S, const T* u, int64_t K,
                                const Outputs<T>& out, int64_t begin, int64_t end) {
  const Decoder<T>& decoder = scene.decoder;
  const int64_t all = S + K, most = std::max(S, K), group = ceil_div(least_samples, all);
  const int64_t hs = decoder.hidden_stride, C = decoder.C;
  const auto rows = [&](int64_t n) { return round_up(group * n, tile_rows) + tile_rows; };
  Buffer<T> x(rows(most) * decoder.feature_stride), h0(rows(S) * hs), h1(rows(K) * hs), sigma0(rows(S) + 16),
      sigma1(rows(K) + 16), v0(rows(S)), v1(rows(K)), fine(group * K + 16), t(padded<T>(all) + 16),
      sigma(padded<T>(all) + 16), cdf(S + 1), gate(tile_rows * decoder.output_stride),
      sums(group * decoder.colours);
  std::vector<int64_t> order(all);
  Corners<T> corners(most);
  March<T> m(all);

  for (int64_t first = begin; first < end; first += group) {
    const int64_t count = std::min(group, end - first);
    for (int64_t g = 0; g < count; ++g) {
      find_corners(scene, first + g, coarse + (first + g) * S, S, corners);
      gather(scene, corners, S, x.get() + g * S * decoder.feature_stride);
    }
    first_layer(decoder, x.get(), count * S, h0.get(), sigma0.get());
    if (K) {
      for (int64_t g = 0; g < count; ++g) {
        const T* depths = coarse + (first + g) * S;
        std::copy(depths, depths + S, t.get());
        std::copy(&sigma0[g * S], &sigma0[g * S] + S, sigma.get());
        march(sigma.get(), t.get(), S, m);
        importance(m.weight.get(), depths, S, u + (first + g) * K, K, cdf.get(), &fine[g * K]);
        find_corners(scene, first + g, &fine[g * K], K, corners);
        gather(scene, corners, K, x.get() + g * K * decoder.feature_stride);
      }
      first_layer(decoder, x.get(), count * K, h1.get(), sigma1.get());
    }

    for (int64_t g = 0; g < count; ++g) {
      const T *t0 = coarse + (first + g) * S, *t1 = &fine[g * K];
      for (int64_t i = 0, a = 0, b = 0; i < all; ++i) {
        const bool second = a == S || (b < K && before(t1[b], t0[a]));
        order[i] = second ? S + b : a;
        t[i] = second ? t1[b] : t0[a];
        sigma[i] = second ? sigma1[g * K + b] : sigma0[g * S + a];
        ++(second ? b : a);
      }
      march(sigma.get(), t.get(), all, m);
      T weight = 0, total = 0;
      for (int64_t i = 0; i < all; ++i) {
        const T v = m.ends[i];
        total += v * t[i];
        weight += v;
        (order[i] < S ? v0[g * S + order[i]] : v1[g * K + order[i] - S]) = v;
      }
      out.weight[first + g] = weight;
      out.total[first + g] = total;
      std::copy(t.get(), t.get() + all, out.kept + (first + g) * all);
    }

    std::fill(sums.get(), sums.get() + group * decoder.colours, T(0));
    for (int pass = 0; pass < 2; ++pass) {
      const int64_t samples = pass ? K : S;
      const T *h = (pass ? h1 : h0).get(), *v = (pass ? v1 : v0).get();
      for (int64_t i = 0; i < count * samples; i += tile_rows) {
        const int64_t n = std::min<int64_t>(tile_rows, count * samples - i);
        bool counts = false;
        for (int64_t j = 0; j < n; ++j) counts |= !(v[i + j] <= decoder.negligible);
        if (!counts) continue;
        second_layer(decoder, h + i * hs, n, gate.get());
        for (int64_t j = 0; j < n; ++j) {
          T* to = &sums[(i + j) / samples * decoder.colours];
          for (int64_t c = 0; c < decoder.colours; c += lanes<T>)
            store(to + c, load(to + c) + v[i + j] * sigmoid(load(&gate[j * decoder.output_stride + c])));
        }
      }
    }
    // 2 (sum v (1.002 gate - 0.001) + [white_back] (1 - W)) - 1
    const T slope = scene.white_back ? T(-2.002) : T(-0.002), constant = scene.white_back ? T(1) : T(-1);
    for (int64_t g = 0; g < count; ++g) {
      const T rest = slope * out.weight[first + g] + constant;
      T* to = out.features + (first + g) * C;
      for (int64_t c = 0; c < C; ++c) to[c] = T(2.004) * sums[g * decoder.colours + c] + rest;
    }
  }
}

// to += the sum of n rows, summed apart first: sums of sums round less.
template <class T>
FASTGEN_INLINE void add_rows(const T* rows, int64_t stride, int64_t n, int64_t columns, T* to) {
  for (int64_t c = 0; c < columns; c += lanes<T>) {
    Vec<T> sums{};
    for (int64_t i = 0; i < n; ++i) sums += load(rows + i * stride + c);
    store(to + c, load(to + c) + sums);
  }
}

template <class T>
struct Gradients {
  const T *features, *depth, *weight;  // given, of one image: [R, C], [R], [R]
  T *table, *w1, *b1, *w2, *b2;        // added to: as Scene::table, Decoder::w1, ...; density last
};

// Adds the gradients of rays [begin, end) of an image, at their sorted depths [R, n].
template <class T>
FASTGEN_INLINE void differentiate_rays(const Scene<T>& scene, const T* depths, int64_t n,
                                       const Gradients<T>& d, int64_t begin, int64_t end) {
  const Decoder<T>& decoder = scene.decoder;
  const int64_t group = ceil_div(least_samples, n), C = decoder.C;
  const int64_t fs = decoder.feature_stride, hs = decoder.hidden_stride, os = decoder.output_stride;
  const int64_t rows = round_up(group * n, tile_rows) + tile_rows;
  Buffer<T> x(rows * fs), h(rows * hs), gate(rows * os), dh(rows * hs), sigma(rows + 16),
      one(padded<T>(n) + 16), t(padded<T>(n) + 16), g(decoder.colours), q(padded<T>(n)),
      ds(padded<T>(n) + 16);
  std::vector<Corners<T>> corners(group, Corners<T>(n));
  March<T> m(n);

  for (int64_t first = begin; first < end; first += group) {
    const int64_t count = std::min(group, end - first), samples = count * n;
    for (int64_t k = 0; k < count; ++k) {
      find_corners(scene, first + k, depths + (first + k) * n, n, corners[k]);
      gather(scene, corners[k], n, x.get() + k * n * fs);
    }
    first_layer(decoder, x.get(), samples, h.get(), sigma.get());
    second_layer(decoder, h.get(), samples, gate.get());

    for (int64_t k = 0; k < count; ++k) {
      const int64_t ray = first + k;
      std::copy(depths + ray * n, depths + (ray + 1) * n, t.get());
      std::copy(&sigma[k * n], &sigma[k * n] + n, one.get());
      march(one.get(), t.get(), n, m);
      T g_sum = 0, weight = 0, total = 0;
      for (int64_t c = 0; c < C; ++c) g_sum += g[c] = 2 * d.features[ray * C + c];
      T* gates = &gate[k * n * os];
      for (int64_t i = 0; i < n; ++i) {
        Vec<T> products{};
        for (int64_t c = 0; c < decoder.colours; c += lanes<T>) {
          const Vec<T> s = sigmoid(load(gates + i * os + c));
          store(gates + i * os + c, s);
          products += s * load(&g[c]);
        }
        q[i] = sum<T>(products) * T(1.002);
        weight += m.ends[i];
        total += m.ends[i] * t[i];
      }
      const T depth = total / weight,
              constant = d.weight[ray] - (scene.white_back ? T(1.001) : T(0.001)) * g_sum;
      // Where the depth is NaN, nothing depends on the weights.
      const bool seen = depth == depth;
      const T d_depth = seen ? d.depth[ray] / weight : T(0);
      T after = 0, next = 0;
      for (int64_t i = n - 2; i >= 0; --i) {
        const T middle = (t[i] + t[i + 1]) / 2;
        const T d_weight = (q[i] + q[i + 1]) / 2 + constant + d_depth * (middle - (seen ? depth : T(0)));
        const T d_alpha = d_weight * m.light[i] - after / m.keep[i];
        after += d_weight * m.weight[i];
        // So far without the slope of softplus, which is a vector's work.
        ds[i] = d_alpha * (t[i + 1] - t[i]) * (1 - m.alpha[i]);
      }
      for (int64_t i = 0; i < n - 1; i += lanes<T>)
        store(&ds[i], load(&ds[i]) * sigmoid((load(&one[i]) + load(&one[i + 1])) / 2 - 1));
      for (int64_t i = 0; i < n; ++i) {
        T* row = gates + i * os;
        const T v = m.ends[i] * T(1.002);
        for (int64_t c = 0; c < decoder.colours; c += lanes<T>) {
          const Vec<T> s = load(row + c);
          store(row + c, (s - s * s) * v * load(&g[c]));
        }
        const T here = i < n - 1 ? ds[i] : T(0);
        row[C] = (next + here) / 2;
        next = here;
      }
      add_rows(gates, os, n, decoder.outputs, d.b2);
    }

    add_outer(gate.get(), os, decoder.outputs, h.get(), hs, samples, d.w2, decoder.hidden);
    multiply({gate.get(), os, C + 1, decoder.w2.get(), decoder.hidden, nullptr, dh.get(), hs}, samples);
    for (int64_t i = 0; i < samples; ++i) {
      for (int64_t c = 0; c < decoder.hidden; c += lanes<T>) {
        // The derivative of softplus is 1 - exp(-softplus).
        const Vec<T> v = load(&dh[i * hs + c]) * (1 - exponential(-load(&h[i * hs + c])));
        store(&dh[i * hs + c], v);
      }
    }
    add_rows(dh.get(), hs, samples, decoder.hidden, d.b1);
    add_outer(dh.get(), hs, decoder.hidden, x.get(), fs, samples, d.w1, decoder.features);
    multiply({dh.get(), hs, decoder.D, decoder.w1.get(), decoder.features, nullptr, x.get(), fs}, samples);

    const int64_t line = (scene.W + 3) * fs;
    for (int64_t k = 0; k < count; ++k) {
      const T* w = corners[k].weight.data();
      for (int64_t i = 0; i < n; ++i) {
        const T* from = &x[(k * n + i) * fs];
        for (int p = 0; p < 3; ++p) {
          T* at = d.table + corners[k].row[p * n + i];
          for (int corner = 0; corner < 4; ++corner) {
            T* to = at + (corner & 1) * fs + (corner >> 1) * line;
            const T share = w[(4 * p + corner) * n + i];
            for (int64_t c = 0; c < decoder.features; c += lanes<T>)
              store(to + c, load(to + c) + share * load(from + c));
          }
        }
      }
    }
  }
}

#define FASTGEN_FOR(T)                                                                                      \
  FASTGEN_SIMD void render(const Scene<T>& scene, const T* coarse, int64_t S, const T* u, int64_t K,        \
                           const Outputs<T>& out, int64_t begin, int64_t end) {                             \
    render_rays<T>(scene, coarse, S, u, K, out, begin, end);                                                \
  }                                                                                                         \
  FASTGEN_SIMD void differentiate(const Scene<T>& scene, const T* depths, int64_t n, const Gradients<T>& d, \
                                  int64_t begin, int64_t end) {                                             \
    differentiate_rays<T>(scene, depths, n, d, begin, end);                                                 \
  }
FASTGEN_FOR(float)
FASTGEN_FOR(double)
#undef FASTGEN_FOR

// planes [3, F, H, W] of an image to the table, or back.
template <class S, class T>
void fill_table(const S* planes, const Decoder<T>& decoder, int64_t H, int64_t W, T* table) {
  const int64_t stride = decoder.feature_stride, F = decoder.F;
  parallel_for(3 * (H + 3), (W + 3) * stride, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i / (H + 3), y = i % (H + 3) - 1;
      T* to = table + i * (W + 3) * stride;
      std::fill(to, to + (W + 3) * stride, T(0));
      if (y < 0 || y >= H) continue;
      // Some pixels at a time: what is written stays in the first-level cache.
      for (int64_t x0 = 0; x0 < W; x0 += 16) {
        const int64_t x1 = std::min(x0 + 16, W);
        for (int64_t f = 0; f < F; ++f) {
          const S* from = planes + ((p * F + f) * H + y) * W;
          for (int64_t x = x0; x < x1; ++x) to[(x + 1) * stride + f] = static_cast<T>(from[x]);
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
      for (int64_t x = 0; x < W; ++x) {
        for (int64_t f = 0; f < F; ++f) {
          T value = 0;
          for (const auto& table : tables) value += table[from + x * stride + f];
          planes[((p * F + f) * H + y) * W + x] = static_cast<S>(value);
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
  const Tensor dense = contiguous(planes), o = contiguous(ray_origins), d = contiguous(ray_directions),
               coarse = contiguous(depths), u = u_fine ? contiguous(*u_fine) : depths;
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
        const int64_t image = 3 * decoder.F * scene.H * scene.W;
        fill_table(data<P>(dense) + n * image, decoder, scene.H, scene.W, table.get());
        scene.table = table.get();
        scene.origins = data<T>(o) + n * R * 3;
        scene.directions = data<T>(d) + n * R * 3;
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
  const Tensor dense = contiguous(planes), o = contiguous(ray_origins), d = contiguous(ray_directions),
               sorted = contiguous(depths), dfc = contiguous(df), ddc = contiguous(dd), dwc = contiguous(dw);
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
    const Buffer<T> wide(R * C, false);
    for (int64_t n = 0; n < N; ++n) {
      dispatch("render_triplane", planes.scalar_type(), [&](auto stored) {
        using P = decltype(stored);
        const int64_t image = 3 * decoder.F * scene.H * scene.W;
        fill_table(data<P>(dense) + n * image, decoder, scene.H, scene.W, table.get());
        scene.table = table.get();
        scene.origins = data<T>(o) + n * R * 3;
        scene.directions = data<T>(d) + n * R * 3;
        const P* from = data<P>(dfc) + n * R * C;
        for (int64_t i = 0; i < R * C; ++i) wide[i] = static_cast<T>(from[i]);
        torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            T *to = &sums[i * size], *own = tables[i].get();
            std::fill(own, own + 3 * scene.plane(), T(0));
            const Gradients<T> gradients{wide.get(),
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
        read_table(tables, decoder, scene.H, scene.W, mutable_data<P>(d_planes) + n * image);
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
