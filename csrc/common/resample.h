// Fixed taps on a CPU.
#ifndef LF_COMMON_RESAMPLE_H
#define LF_COMMON_RESAMPLE_H

#include "common/space_time.h"

namespace lf {

// The taps of one axis. A place of the side that is written is made of those places of the other that `range` gives.
struct Gather {
  bool to_coarse;
  Range (*range)(const ResizedAxis& axis, int64_t place);
  float (*single)(const ResizedAxis& axis, int64_t coarse, int64_t fine);
  double (*full)(const ResizedAxis& axis, int64_t coarse, int64_t fine);
};

void resample_cpu(const Resample& resample, const Gather& gather, int64_t num_threads);

template <class Taps> lf_status gather_fine_cpu(const Resample& resample, int64_t num_threads) {
  const Gather gather{true, Taps::fine_of, Taps::template weight<float>, Taps::template weight<double>};
  resample_cpu(resample, gather, num_threads);
  return LF_OK;
}

template <class Taps> lf_status gather_coarse_cpu(const Resample& resample, int64_t num_threads) {
  const Gather gather{false, Taps::coarse_of, Taps::template weight<float>, Taps::template weight<double>};
  resample_cpu(resample, gather, num_threads);
  return LF_OK;
}

}  // namespace lf

#endif  // LF_COMMON_RESAMPLE_H
