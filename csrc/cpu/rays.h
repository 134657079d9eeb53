// Rendering and its gradient, for some rays of an image at a time: gather features, first layer, densities;
// from these the weights along a ray, finer depths, and the same again; then colours, of the samples that
// count.
#pragma once
#include "march.h"
#include "products.h"

namespace fastgen {

namespace {

constexpr int64_t least_samples = 96;  // rays are taken together until they have as many

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
        features(padded(F)),
        hidden(padded(D)),
        colours(padded(C)),
        outputs(padded(C + 1)),
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
      sigma1(rows(K) + 16), v0(rows(S)), v1(rows(K)), fine(group * K + 16), t(padded(all) + 16),
      sigma(padded(all) + 16), cdf(S + 1), gate(tile_rows * decoder.output_stride),
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
  Buffer<T> x(rows * fs), h(rows * hs), gate(rows * os), dh(rows * hs), sigma(rows + 16), one(padded(n) + 16),
      t(padded(n) + 16), g(decoder.colours), q(padded(n)), ds(padded(n) + 16);
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

}  // namespace
}  // namespace fastgen
