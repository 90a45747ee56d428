// The CUDA functions of a library built without CUDA.
#include "lumiere_fast.h"

lf_status lf_blend_windows_cuda(lf_dtype, int64_t, const void* const*, const int64_t*, const int64_t*, int32_t,
                                const int64_t*, const double*, void*, const int64_t*, const int64_t*, int32_t,
                                void*) noexcept {
  return LF_NOT_BUILT;
}

lf_status lf_space_time_downsample_cuda(const lf_space_time*, int32_t, void*) noexcept { return LF_NOT_BUILT; }

lf_status lf_space_time_downsample_adjoint_cuda(const lf_space_time*, int32_t, void*) noexcept { return LF_NOT_BUILT; }

lf_status lf_space_time_upsample_cuda(const lf_space_time*, int32_t, void*) noexcept { return LF_NOT_BUILT; }

lf_status lf_space_time_upsample_adjoint_cuda(const lf_space_time*, int32_t, void*) noexcept { return LF_NOT_BUILT; }
