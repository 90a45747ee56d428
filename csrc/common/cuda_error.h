// How a launch reports what CUDA said.
#ifndef LF_COMMON_CUDA_ERROR_H
#define LF_COMMON_CUDA_ERROR_H

#include "lumiere_fast.h"

namespace lf {

// Keeps "name: text" for lf_last_cuda_error() of this thread, and returns LF_CUDA_ERROR.
lf_status cuda_error(const char* name, const char* text) noexcept;

}  // namespace lf

#endif  // LF_COMMON_CUDA_ERROR_H
