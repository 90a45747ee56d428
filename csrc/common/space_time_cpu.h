// The functions of space_time_downsample and space_time_upsample on a CPU.
#ifndef LF_COMMON_SPACE_TIME_CPU_H
#define LF_COMMON_SPACE_TIME_CPU_H

#include "common/resample.h"
#include "common/space_time.h"

namespace lf {

// common/temporal_resize.cpp
lf_status temporal_resize_cpu(const TemporalResize& resize, void* workspace, int64_t num_threads);

class CpuEngines {
 public:
  explicit CpuEngines(int64_t num_threads) : num_threads_(num_threads) {}

  template <class Work> lf_status use(const Work& work) const { return work(); }
  template <class Taps> lf_status gather_fine(const Resample& r) const {
    return gather_fine_cpu<Taps>(r, num_threads_);
  }
  template <class Taps> lf_status gather_coarse(const Resample& r) const {
    return gather_coarse_cpu<Taps>(r, num_threads_);
  }
  lf_status resize(const TemporalResize& r, void* workspace) const {
    return temporal_resize_cpu(r, workspace, num_threads_);
  }
  int64_t resize_bytes(const TemporalResize& r) const { return temporal_resize_cpu_bytes(r, num_threads_); }

 private:
  int64_t num_threads_;
};

template <Direction direction, class Taps> struct SpaceTimeOnCpu {
  static lf_status forward(const lf_space_time* arguments, int32_t num_threads) noexcept {
    return run<Purpose::kForward>(arguments, num_threads);
  }
  static lf_status adjoint(const lf_space_time* arguments, int32_t num_threads) noexcept {
    return run<Purpose::kAdjoint>(arguments, num_threads);
  }
  static lf_status workspace(const lf_space_time* arguments, int32_t num_threads, int64_t* bytes) noexcept {
    return lf::workspace(arguments, direction, num_threads, bytes);
  }

 private:
  template <Purpose purpose> static lf_status run(const lf_space_time* arguments, int32_t num_threads) noexcept {
    if (num_threads < 1) return LF_INVALID_ARGUMENT;
    return run_call<direction, Taps, purpose>(arguments, CpuEngines(num_threads));
  }
};

}  // namespace lf

#endif  // LF_COMMON_SPACE_TIME_CPU_H
