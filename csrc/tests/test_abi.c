/* Includes the header as C and calls everything in it. The expected version is the first argument. */
#include "lumiere_fast.h"

#include "check.h"

#include <stdio.h>
#include <string.h>

static void check_version(const char* expected) {
  int major = -1, minor = -1, patch = -1;
  CHECK(sscanf(expected, "%d.%d.%d", &major, &minor, &patch) == 3);
  CHECK(strcmp(lf_version_string(), expected) == 0);
  CHECK(lf_version() == major * 10000 + minor * 100 + patch);
}

static void check_status_strings(void) {
  for (lf_status i = LF_OK; i <= LF_UNSUPPORTED_DEVICE; ++i) {
    for (lf_status j = -1; j < i; ++j) CHECK(strcmp(lf_status_string(i), lf_status_string(j)) != 0);
  }
  CHECK(strcmp(lf_status_string(-1), "unknown status") == 0);
  CHECK(strcmp(lf_status_string(LF_UNSUPPORTED_DEVICE + 1), "unknown status") == 0);
  CHECK(strcmp(lf_last_cuda_error(), "") == 0);
}

static void check_build_info(const char* version) {
  char expected[64];
  snprintf(expected, sizeof expected, "{\"version\": \"%s\", \"compiler\": \"", version);
  CHECK(strncmp(lf_build_info(), expected, strlen(expected)) == 0);
  CHECK(strstr(lf_build_info(), "\"sources\": {\"blend_windows\": \"") != NULL);
}

static void check_dtype_sizes(void) {
  const lf_dtype dtypes[] = {LF_FLOAT32, LF_FLOAT64, LF_FLOAT16, LF_BFLOAT16};
  const int64_t expected[] = {4, 8, 2, 2};
  for (int i = 0; i < 4; ++i) {
    int64_t bytes = -1;
    CHECK(lf_dtype_size(dtypes[i], &bytes) == LF_OK);
    CHECK(bytes == expected[i]);
  }
  int64_t untouched = 77;
  CHECK(lf_dtype_size(4, &untouched) == LF_UNSUPPORTED_DTYPE);
  CHECK(lf_dtype_size(-1, &untouched) == LF_UNSUPPORTED_DTYPE);
  CHECK(untouched == 77);
  CHECK(lf_dtype_size(LF_FLOAT32, 0) == LF_INVALID_ARGUMENT);
}

int main(int argc, char** argv) {
  if (argc != 2) {
    fprintf(stderr, "usage: %s EXPECTED_VERSION\n", argv[0]);
    return 2;
  }
  check_version(argv[1]);
  check_status_strings();
  check_build_info(argv[1]);
  check_dtype_sizes();
  if (failures == 0) printf("ABI of lumiere_fast %s: all checks passed\n", lf_version_string());
  return failures != 0;
}
