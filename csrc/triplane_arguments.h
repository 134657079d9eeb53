// What sample_triplane's raw ops ask of their arguments, which their kernels would otherwise read out of
// bounds.
#pragma once
#include <limits>

#include "common.h"

namespace fastgen {
namespace {

inline std::vector<int64_t> sizes(const Tensor& x) {
  return {x.sizes().begin(), x.sizes().end()};
}

// planes names the device.
inline void check_like(const char* name, const Tensor& x, const std::vector<int64_t>& shape, ScalarType type,
                       const Tensor& planes) {
  FASTGEN_CHECK(sizes(x) == shape && x.scalar_type() == type, "sample_triplane: ", name,
                " has a wrong shape or dtype");
  FASTGEN_CHECK(x.is_cpu() == planes.is_cpu() && x.get_device_index() == planes.get_device_index(),
                "sample_triplane: ", name, " must be on the planes' device");
}

inline void check(const Tensor& planes, const Tensor& coordinates, const std::vector<double>& projection) {
  const int64_t most = std::numeric_limits<int32_t>::max() - 1;
  FASTGEN_CHECK(planes.dim() == 5 && planes.size(1) == 3 && planes.size(3) > 0 && planes.size(4) > 0 &&
                    planes.size(3) < most && planes.size(4) < most,
                "sample_triplane: planes must be [N, 3, C, H, W], H and W from 1 to 2^31 - 3");
  FASTGEN_CHECK(coordinates.dim() == 3 && coordinates.size(0) == planes.size(0) && coordinates.size(2) == 3,
                "sample_triplane: coordinates must be [N, M, 3]");
  FASTGEN_CHECK(projection.size() == 18, "sample_triplane: projection must be 18 numbers");
  check_like("coordinates", coordinates, sizes(coordinates), coordinates.scalar_type(), planes);
  dispatch("sample_triplane", coordinates.scalar_type(), [](auto) {});
}

inline std::vector<int64_t> samples_shape(const Tensor& planes, const Tensor& coordinates, bool mean) {
  const int64_t N = planes.size(0), C = planes.size(2), M = coordinates.size(1);
  return mean ? std::vector<int64_t>{N, M, C} : std::vector<int64_t>{N, 3, M, C};
}

inline void check_bwd2(const std::optional<Tensor>& ddplanes, const std::optional<Tensor>& ddcoordinates,
                       const Tensor& dy, const Tensor& planes, const Tensor& coordinates, bool mean,
                       bool need_planes) {
  check_like("dy", dy, samples_shape(planes, coordinates, mean), planes.scalar_type(), planes);
  FASTGEN_CHECK(ddcoordinates || (ddplanes && !need_planes),
                "sample_triplane: planes have a second gradient only from ddcoordinates");
  if (ddplanes) check_like("ddplanes", *ddplanes, sizes(planes), planes.scalar_type(), planes);
  if (ddcoordinates) {
    check_like("ddcoordinates", *ddcoordinates, sizes(coordinates), coordinates.scalar_type(), planes);
  }
}

}  // namespace
}  // namespace fastgen
