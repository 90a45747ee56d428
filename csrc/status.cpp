// What the library says of itself: version, build, statuses, element sizes.
#include "build_info.h"  // made by CMake
#include "common/cuda_error.h"
#include "lumiere_fast.h"

#include <cstdio>

namespace lf {
namespace {

thread_local char last_cuda_error[256] = "";

}  // namespace

lf_status cuda_error(const char* name, const char* text) noexcept {
  std::snprintf(last_cuda_error, sizeof last_cuda_error, "%s: %s", name, text);
  return LF_CUDA_ERROR;
}

}  // namespace lf

int32_t lf_version() noexcept { return LF_VERSION_MAJOR * 10000 + LF_VERSION_MINOR * 100 + LF_VERSION_PATCH; }

const char* lf_version_string() noexcept { return LF_VERSION_TEXT; }

const char* lf_build_info() noexcept { return LF_BUILD_INFO; }

const char* lf_last_cuda_error() noexcept { return lf::last_cuda_error; }

const char* lf_status_string(lf_status status) noexcept {
  switch (status) {
    case LF_OK: return "success";
    case LF_INVALID_ARGUMENT:
      return "invalid argument: a needed pointer is null, or a number is not one of those accepted";
    case LF_UNSUPPORTED_DTYPE: return "unsupported dtype: no code of one, or none that is taken there";
    case LF_INVALID_SHAPE:
      return "invalid shape: a size is not one of those accepted, groups do not divide it, or shapes do not fit";
    case LF_INVALID_STRIDES:
      return "invalid strides: elements of the output may lie on top of one another, a tensor leaves memory, or "
             "warpgroup instructions cannot take x where it lies";
    case LF_WINDOW_OUT_OF_RANGE: return "a window sticks out of the video";
    case LF_UNCOVERED: return "a position of the video is in no window";
    case LF_INVALID_WEIGHTS: return "invalid weights: not positive and finite, or for windows that differ in length";
    case LF_OUT_OF_MEMORY: return "out of host memory";
    case LF_NOT_BUILT: return "the CUDA half was not built";
    case LF_CUDA_ERROR: return "CUDA reported an error";
    case LF_TOO_MANY: return "too many windows over one position, or too many weights, for one launch";
    case LF_UNEVEN_WEIGHTS: return "invalid weights: the largest of an axis is over 1e100 times its least";
    case LF_SHARED_MEMORY:
      return "the output, or the memory to work in, lies in the memory of another tensor: give one of its own";
    case LF_NO_WORKSPACE: return "the working memory is missing, too small, or not at a multiple of 64 bytes";
    case LF_UNSUPPORTED_DEVICE: return "the device cannot run what was asked for";
    default: return "unknown status";
  }
}

lf_status lf_dtype_size(lf_dtype dtype, int64_t* bytes) noexcept {
  if (bytes == nullptr) return LF_INVALID_ARGUMENT;
  switch (dtype) {
    case LF_FLOAT64: *bytes = 8; return LF_OK;
    case LF_FLOAT32: *bytes = 4; return LF_OK;
    case LF_FLOAT16:
    case LF_BFLOAT16: *bytes = 2; return LF_OK;
    default: return LF_UNSUPPORTED_DTYPE;
  }
}
