/* The C ABI of lumiere_fast. It knows neither torch nor Python, and no exception crosses it.
 *
 * Functions that can fail return an lf_status and write their results through pointers; when they fail they write nothing.
 * Every code is a fixed-width integer with a value that will not change, so that callers need not be compiled with the
 * compiler that built the library.
 */
#ifndef LUMIERE_FAST_H
#define LUMIERE_FAST_H

#include <stdint.h>

#if defined(LF_STATIC)
#define LF_API
#elif defined(_WIN32) && defined(LF_BUILDING)
#define LF_API __declspec(dllexport)
#elif defined(_WIN32)
#define LF_API __declspec(dllimport)
#else
#define LF_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
#define LF_NOEXCEPT noexcept
extern "C" {
#else
#define LF_NOEXCEPT
#endif

/* The version of the library that is loaded: major * 10000 + minor * 100 + patch. */
LF_API int32_t lf_version(void) LF_NOEXCEPT;

/* The same as "major.minor.patch". The string is static. */
LF_API const char* lf_version_string(void) LF_NOEXCEPT;

typedef int32_t lf_status;
enum {
  LF_OK = 0,
  LF_INVALID_ARGUMENT = 1, /* a pointer that must not be null is null */
  LF_UNSUPPORTED_DTYPE = 2 /* the dtype code is none of the codes below */
};

/* A short English sentence for a status, "unknown status" for a code that is none of the above. The string is static. */
LF_API const char* lf_status_string(lf_status status) LF_NOEXCEPT;

/* Element types of activations, weights and statistics. */
typedef int32_t lf_dtype;
enum {
  LF_FLOAT32 = 0,
  LF_FLOAT64 = 1,
  LF_FLOAT16 = 2, /* IEEE 754 binary16 */
  LF_BFLOAT16 = 3 /* the upper half of a binary32 */
};

/* Bytes of one element of `dtype`.
 * LF_UNSUPPORTED_DTYPE: `dtype` is not a code above; LF_INVALID_ARGUMENT: `bytes` is null. */
LF_API lf_status lf_dtype_size(lf_dtype dtype, int64_t* bytes) LF_NOEXCEPT;

#ifdef __cplusplus
} /* extern "C" */
#endif

#undef LF_NOEXCEPT

#endif /* LUMIERE_FAST_H */
