/* Loads the library, computes on several threads and unloads it, over and over: no thread may be left inside. The
 * library's path is the first argument. */
#include "lumiere_fast.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { AXES = 5, THREADS = 4, SIDE = 512, ELEMENTS = 4 * SIDE * SIDE };

typedef lf_status (*Blend)(lf_dtype, int64_t, const void* const*, const int64_t*, const int64_t*, int32_t,
                           const int64_t*, const double*, void*, const int64_t*, const int64_t*, int32_t);

static int use(const char* path, const float* in, float* out) {
  const void* windows[] = {in};
  const int64_t shape[AXES] = {1, 1, 4, SIDE, SIDE}, start = 0;
  const int64_t strides[AXES] = {ELEMENTS, ELEMENTS, SIDE * SIDE, SIDE, 1};
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  Blend blend;
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
  *(void**)&blend = dlsym(library, "lf_blend_windows_cpu");
  memset(out, 0, ELEMENTS * sizeof *out);
  const lf_status status =
      blend(LF_FLOAT32, 1, windows, shape, strides, 1, &start, NULL, out, shape, strides, THREADS);
  if (dlclose(library) != 0) return fprintf(stderr, "%s\n", dlerror()), 1;
  if (dlopen(path, RTLD_NOW | RTLD_NOLOAD)) return fprintf(stderr, "the library was not unloaded\n"), 1;
  if (status != LF_OK || memcmp(in, out, ELEMENTS * sizeof *out) != 0) return fprintf(stderr, "wrong result\n"), 1;
  return 0;
}

int main(int argc, char** argv) {
  if (argc != 2) return fprintf(stderr, "usage: %s LIBRARY\n", argv[0]), 2;
  float* in = malloc(2 * ELEMENTS * sizeof *in);
  if (!in) return 2;
  for (int i = 0; i < ELEMENTS; ++i) in[i] = (float)i;
  int failed = 0;
  for (int i = 0; i < 100 && !failed; ++i) failed = use(argv[1], in, in + ELEMENTS);
  free(in);
  if (!failed) printf("unload: all checks passed\n");
  return failed;
}
