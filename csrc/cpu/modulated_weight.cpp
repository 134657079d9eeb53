// The weight of a modulated convolution, its taps in the order that the convolution wants, in its dtype, and
// the demodulation; of a single sample, styles and demodulation are folded into the weight. Each output's
// taps are read from memory once.
#include <cmath>

#include "common.h"

namespace fastgen {
namespace {

struct Job {
  const void* weight;         // [O, taps], taps counting inputs too
  std::vector<float> styles;  // [N, taps]
  std::vector<void*> parts;   // [O, inputs, taps of the part], or [O, taps of the part, inputs]
  std::vector<std::vector<int64_t>> taps;
  int64_t inputs, kernel, batch, outputs;
  bool demodulate, channels_last;
  float* d;  // [N, O] of more samples than one, else null
};

template <class S>
FASTGEN_INLINE void fold_rows(const Job& job, int64_t begin, int64_t end) {
  const int64_t taps = job.inputs * job.kernel;
  std::vector<float> scaled(taps), line(job.inputs);
  for (int64_t o = begin; o < end; ++o) {
    const float* w = static_cast<const float*>(job.weight) + o * taps;
    const float* source = w;
    float factor = 1;
    for (int64_t n = 0; n < job.batch && (job.demodulate || job.batch == 1); ++n) {
      constexpr int64_t lanes = 32;
      float squares[lanes] = {};
      const float* styles = job.styles.data() + n * taps;
      for (int64_t i = 0; i < taps; ++i) scaled[i] = w[i] * styles[i];
      int64_t i = 0;
      for (; i + lanes <= taps; i += lanes) {
        for (int64_t k = 0; k < lanes; ++k) squares[k] += scaled[i + k] * scaled[i + k];
      }
      for (; i < taps; ++i) squares[0] += scaled[i] * scaled[i];
      double sum = 1e-8;
      for (float square : squares) sum += square;
      const float d = job.demodulate ? static_cast<float>(1 / std::sqrt(sum)) : 1.f;
      if (job.d) job.d[n * job.outputs + o] = d;
      if (job.batch == 1) {
        source = scaled.data();
        factor = d;
      }
    }
    for (size_t p = 0; p < job.parts.size(); ++p) {
      const std::vector<int64_t>& of = job.taps[p];
      const int64_t n = static_cast<int64_t>(of.size());
      S* to = static_cast<S*>(job.parts[p]) + o * job.inputs * n;
      if (n == job.kernel && of[0] == 0 && !job.channels_last) {
        for (int64_t j = 0; j < taps; ++j) to[j] = static_cast<S>(source[j] * factor);
        continue;
      }
      for (int64_t k = 0; k < n; ++k) {
        const float* from = source + of[k];
        if (job.channels_last) {
          // Apart, since the compiler makes vectors of the second loop alone.
          for (int64_t c = 0; c < job.inputs; ++c) line[c] = from[c * job.kernel] * factor;
          for (int64_t c = 0; c < job.inputs; ++c) to[k * job.inputs + c] = static_cast<S>(line[c]);
        } else {
          for (int64_t c = 0; c < job.inputs; ++c)
            to[c * n + k] = static_cast<S>(from[c * job.kernel] * factor);
        }
      }
    }
  }
}

FASTGEN_RUN(fold_rows)

std::vector<Tensor> modulated_weight_cpu(const Tensor& weight, const Tensor& styles, bool demodulate,
                                         bool flip, bool phases, bool channels_last, ScalarType dtype) {
  const char* op = "modulated_weight";
  FASTGEN_CHECK(weight.dim() == 4 && weight.scalar_type() == ScalarType::Float && weight.size(2) > 0 &&
                    weight.size(3) > 0,
                op, ": weight must be float32 [O, I, kh, kw], with at least one tap");
  const int64_t O = weight.size(0), I = weight.size(1), kh = weight.size(2), kw = weight.size(3);
  FASTGEN_CHECK(styles.dim() == 2 && styles.size(1) == I, op, ": styles must have shape [N, I=", I, "]");
  FASTGEN_CHECK(!phases || (kh > 1 && kw > 1), op, ": phases need a kernel of 2 x 2 or more");
  const Tensor dense = torch::stable::contiguous(weight);
  const int64_t N = styles.size(0);
  Job job{dense.const_data_ptr(), {}, {}, {}, I, kh * kw, N, O, demodulate, channels_last, nullptr};
  for (float style : host_vector<float>(op, styles)) job.styles.insert(job.styles.end(), kh * kw, style);

  // A phase of the transposed convolution has every second tap; a convolution has them in reverse.
  const int64_t step = phases ? 2 : 1;
  std::vector<Tensor> parts;
  for (int64_t i = 0; i < step; ++i) {
    for (int64_t j = 0; j < step; ++j) {
      std::vector<int64_t> taps;
      for (int64_t y = i; y < kh; y += step) {
        for (int64_t x = j; x < kw; x += step)
          taps.push_back(flip ? (kh - 1 - y) * kw + kw - 1 - x : y * kw + x);
      }
      if (phases) std::reverse(taps.begin(), taps.end());
      parts.push_back(torch::stable::empty(
          {O, I, ceil_div(kh - i, step), ceil_div(kw - j, step)}, dtype, std::nullopt, weight.device(),
          std::nullopt, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous));
      job.parts.push_back(parts.back().mutable_data_ptr());
      job.taps.push_back(std::move(taps));
    }
  }
  const Tensor d = empty(weight, {N > 1 && demodulate ? N : 0, O}, MemoryFormat::Contiguous);
  job.d = d.numel() ? mutable_data<float>(d) : nullptr;
  dispatch(op, dtype, [&](auto zero) {
    parallel_for(O, 2 * I * kh * kw, [&](int64_t begin, int64_t end) { run(zero, job, begin, end); });
  });
  parts.push_back(d);
  return parts;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("modulated_weight", TORCH_BOX(&modulated_weight_cpu));
}

}  // namespace fastgen
