// Vectors of 64 bytes: one register with AVX-512, two with AVX2, four with SSE. Everything is to be inlined
// into a FASTGEN_SIMD function.
#pragma once
#include <cmath>
#include <memory>

#include "workspace.h"

namespace fastgen {

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(64)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int64_t lanes = 64 / sizeof(T);

template <class T>
FASTGEN_INLINE Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class T>
FASTGEN_INLINE void store(T* to, const Vec<T>& v) {
  std::memcpy(to, &v, sizeof v);
}
// By halves: one after the other the lanes would wait for each other.
template <class T>
FASTGEN_INLINE T sum(const Vec<T>& v) {
  typedef T Half __attribute__((vector_size(32)));
  typedef T Quarter __attribute__((vector_size(16)));
  Half halves[2];
  std::memcpy(halves, &v, sizeof v);
  const Half half = halves[0] + halves[1];
  Quarter quarters[2];
  std::memcpy(quarters, &half, sizeof half);
  const Quarter q = quarters[0] + quarters[1];
  if constexpr (sizeof(T) == 8)
    return q[0] + q[1];
  else
    return (q[0] + q[2]) + (q[1] + q[3]);
}

template <class To, class From>
FASTGEN_INLINE To bit_cast(const From& from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// A vector of sums from numbers as they are stored, and back, rounded to the nearest.
template <class S>
FASTGEN_INLINE Vec<accumulator_t<S>> widen(const S* from) {
  if constexpr (std::is_same_v<S, accumulator_t<S>>) {
    return load(from);
  } else {
    typedef uint16_t Stored __attribute__((vector_size(32)));
    Stored stored;
    std::memcpy(&stored, from, sizeof stored);
    const auto bits = __builtin_convertvector(stored, Vec<uint32_t>);
    if constexpr (std::is_same_v<S, BFloat16>) {
      return bit_cast<Vec<float>>(bits << 16);
    } else {
      // Exponents move from the bias 15 to 127 by a product, which makes subnormal numbers normal as well.
      const Vec<uint32_t> size = (bits & 0x7fff) << 13;
      const Vec<float> scaled = bit_cast<Vec<float>>(size) * 0x1p112f;
      Vec<uint32_t> value = bit_cast<Vec<uint32_t>>(scaled);
      value = size >= (0x7c00 << 13) ? value | 0x7f800000 : value;
      return bit_cast<Vec<float>>(value | (bits & 0x8000) << 16);
    }
  }
}
template <class S>
FASTGEN_INLINE void narrow(S* to, const Vec<accumulator_t<S>>& v) {
  if constexpr (std::is_same_v<S, accumulator_t<S>>) {
    store(to, v);
  } else {
    typedef uint16_t Stored __attribute__((vector_size(32)));
    const Vec<uint32_t> bits = bit_cast<Vec<uint32_t>>(v), size = bits & 0x7fffffff;
    Vec<uint32_t> value;
    if constexpr (std::is_same_v<S, BFloat16>) {
      value = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
      value = size > 0x7f800000 ? Vec<uint32_t>{} + 0x7fc0 : value;
    } else {
      // Adding 0.5 rounds to multiples of 2^-24, the subnormal numbers; the others are rounded by hand.
      const Vec<float> shifted = bit_cast<Vec<float>>(size) + 0.5f;
      value = (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13;
      value = size < 0x38800000 ? bit_cast<Vec<uint32_t>>(shifted) - 0x3f000000 : value;
      value = size >= 0x477ff000 ? Vec<uint32_t>{} + 0x7c00 : value;
      value = size > 0x7f800000 ? Vec<uint32_t>{} + 0x7e00 : value;
      value |= bits >> 16 & 0x8000;
    }
    const Stored stored = __builtin_convertvector(value, Stored);
    std::memcpy(to, &stored, sizeof stored);
  }
}

// Exchanges the blocks off the diagonal, of s by s numbers, in a square of vectors; then smaller ones.
template <int s, class T>
FASTGEN_INLINE void transpose_blocks(Vec<T>* rows) {
  using Index = std::conditional_t<sizeof(T) == 4, Vec<int32_t>, Vec<int64_t>>;
  constexpr int n = lanes<T>;
  Index low, high;
  for (int j = 0; j < n; ++j) {
    low[j] = j & s ? n + j - s : j;
    high[j] = j & s ? n + j : j + s;
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    if (i & s) continue;
    const Vec<T> a = rows[i], b = rows[i + s];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + s] = __builtin_shuffle(a, b, high);
  }
  if constexpr (s > 1) transpose_blocks<s / 2, T>(rows);
}
// rows[i][j] to rows[j][i].
template <class T>
FASTGEN_INLINE void transpose(Vec<T>* rows) {
  transpose_blocks<lanes<T> / 2, T>(rows);
}

constexpr int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

// Memory on cache lines, uninitialised or zero.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n, bool zero = true)
      : values_(static_cast<T*>(workspace::take(n * sizeof(T))), {n * static_cast<int64_t>(sizeof(T))}) {
    if (zero) std::fill(values_.get(), values_.get() + n, T(0));
  }
  T* get() const { return values_.get(); }
  T& operator[](int64_t i) const { return values_.get()[i]; }

 private:
  struct Free {
    int64_t bytes;
    void operator()(T* p) const { workspace::give(p, bytes); }
  };
  std::unique_ptr<T, Free> values_;
};

// e^x, to 2 units in the last place from -87 to 88, beyond them as there; NaN stays. Polynomials are fitted
// in Chebyshev nodes.
FASTGEN_INLINE Vec<float> exponential(Vec<float> x) {
  using Bits = Vec<uint32_t>;
  const Vec<float> least = Vec<float>{} - 87.0f, most = Vec<float>{} + 88.0f;
  x = x < least ? least : x;
  x = x > most ? most : x;
  const Vec<float> shift = Vec<float>{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to integers
  const Vec<float> shifted = x * 1.44269504f + shift, n = shifted - shift;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Vec<float> p = Vec<float>{} + 0.00139485808f;
  p = p * r + 0.00837512889f;
  p = p * r + 0.0416662183f;
  p = p * r + 0.166664155f;
  p = p * r + 0.500000011f;
  p = p * r + 1.00000004f;
  p = p * r + 1.0f;
  // The integer stands in the lowest bits of the shifted sum.
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127 << 23);
  Vec<float> scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}
FASTGEN_INLINE Vec<double> exponential(Vec<double> x) {
  for (int64_t i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// log(1 + e) for e in [0, 1], to 1e-7.
FASTGEN_INLINE Vec<float> log1p_unit(Vec<float> e) {
  Vec<float> p = Vec<float>{} - 0.00325637848f;
  p = p * e + 0.0199071609f;
  p = p * e - 0.0570642008f;
  p = p * e + 0.106142647f;
  p = p * e - 0.153118631f;
  p = p * e + 0.196781173f;
  p = p * e - 0.249545589f;
  p = p * e + 0.33330004f;
  p = p * e - 0.49999904f;
  p = p * e + 1.0f;
  return p * e;
}
FASTGEN_INLINE Vec<double> log1p_unit(Vec<double> x) {
  for (int64_t i = 0; i < lanes<double>; ++i) x[i] = std::log1p(x[i]);
  return x;
}

}  // namespace fastgen
