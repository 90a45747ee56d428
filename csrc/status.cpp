#include "lumiere_fast.h"

// Two macros, so that the numbers are expanded before they are made text.
#define LF_TEXT(x) #x
#define LF_VERSION_TEXT(major, minor, patch) LF_TEXT(major) "." LF_TEXT(minor) "." LF_TEXT(patch)

int32_t lf_version() noexcept { return LF_VERSION_MAJOR * 10000 + LF_VERSION_MINOR * 100 + LF_VERSION_PATCH; }

const char* lf_version_string() noexcept {
  return LF_VERSION_TEXT(LF_VERSION_MAJOR, LF_VERSION_MINOR, LF_VERSION_PATCH);
}

const char* lf_status_string(lf_status status) noexcept {
  switch (status) {
    case LF_OK: return "success";
    case LF_INVALID_ARGUMENT: return "invalid argument: a required pointer is null";
    case LF_UNSUPPORTED_DTYPE: return "unsupported dtype code";
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
