// Fixed taps on a CPU.
#ifndef LF_COMMON_RESAMPLE_H
#define LF_COMMON_RESAMPLE_H

#include "common/space_time.h"

namespace lf {

// The taps of one axis, by function.
struct Gather {
  bool to_coarse;
  Range (*fine_of)(const ResizedAxis& axis, int64_t coarse);
  Range (*coarse_of)(const ResizedAxis& axis, int64_t fine);  // two places at most
  float (*single)(const ResizedAxis& axis, int64_t coarse, int64_t fine);
  double (*full)(const ResizedAxis& axis, int64_t coarse, int64_t fine);
};

void resample_cpu(const Resample& resample, const Gather& gather, int64_t num_threads);

template <class Taps> Gather gather_by(bool to_coarse) {
  return {to_coarse, Taps::fine_of, Taps::coarse_of, Taps::template weight<float>, Taps::template weight<double>};
}

template <class Taps> lf_status gather_fine_cpu(const Resample& resample, int64_t num_threads) {
  resample_cpu(resample, gather_by<Taps>(true), num_threads);
  return LF_OK;
}

template <class Taps> lf_status gather_coarse_cpu(const Resample& resample, int64_t num_threads) {
  resample_cpu(resample, gather_by<Taps>(false), num_threads);
  return LF_OK;
}

}  // namespace lf

#endif  // LF_COMMON_RESAMPLE_H
