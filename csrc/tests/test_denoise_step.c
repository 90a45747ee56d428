/* denoise_step through the C ABI against the formula in fp64, position by position: every pair of dtypes, layouts,
 * guidance, weights, thresholds by sorting, threads, in place, errors. */
#include "lumiere_fast.h"

#include "check.h"
#include "numbers.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { AXES = 5, WINDOWS = 4 };

/* A video in windows that overlap, in time and, with 3 axes, in columns. */
typedef struct {
  lf_denoise_step call;
  unsigned char* windows[WINDOWS];
  unsigned char* clips[5]; /* latent, history, noise, next, x0 */
  const void* data[WINDOWS];
  int64_t shapes[WINDOWS * AXES], strides[WINDOWS * AXES], starts[WINDOWS * 3];
  double weights[1024];
  int64_t elements;
} Case;

static void* room(int64_t bytes) {
  void* memory = malloc((size_t)bytes + 1);
  if (!memory) abort();
  memset(memory, 0xff, (size_t)bytes); /* NaN in every dtype */
  return memory;
}

/* Channels last, or in planes; returns how many elements there are. */
static int64_t lay(const int64_t shape[AXES], int channels_last, int64_t strides[AXES]) {
  static const int orders[2][AXES] = {{4, 3, 2, 1, 0}, {1, 4, 3, 2, 0}};
  int64_t stride = 1;
  for (int i = 0; i < AXES; ++i) {
    const int axis = orders[channels_last][i];
    strides[axis] = stride;
    stride *= shape[axis];
  }
  return stride;
}

static int64_t offset_of(const int64_t strides[AXES], const int64_t index[AXES]) {
  int64_t offset = 0;
  for (int axis = 0; axis < AXES; ++axis) offset += index[axis] * strides[axis];
  return offset;
}

static void* filled(int64_t elements, lf_dtype dtype) {
  unsigned char* memory = room(elements * size_of(dtype));
  for (int64_t i = 0; i < elements; ++i) write_element(memory + i * size_of(dtype), dtype, number());
  return memory;
}

/* T = 11 in windows of 5 from 0, 3, 6; columns in two overlapping halves where there are 3 axes, and 2 windows then. */
static void prepare(Case* c, lf_dtype window_dtype, lf_dtype dtype, int64_t H, int64_t W, int channels_last, int guided,
                    int32_t axes, int weighted) {
  const int64_t shape[AXES] = {2, 3, axes == 1 ? 11 : 5, H, W};
  lf_denoise_step* call = &c->call;
  memset(c, 0, sizeof *c);
  memcpy(call->shape, shape, sizeof shape);
  call->window_dtype = window_dtype, call->dtype = dtype, call->axes = axes;
  call->num_windows = axes == 1 ? 3 : 2;
  for (int64_t i = 0; i < call->num_windows; ++i) {
    const int64_t window[AXES] = {guided ? 4 : 2, 3, 5, H, axes == 1 ? W : W - 2};
    memcpy(c->shapes + i * AXES, window, sizeof window);
    c->windows[i] = filled(lay(window, channels_last, c->strides + i * AXES), window_dtype);
    c->data[i] = c->windows[i];
    c->starts[i * axes] = axes == 1 ? 3 * i : 0;
    if (axes == 3) c->starts[i * axes + 2] = 2 * i;
  }
  for (int i = 0; i < 1024; ++i) c->weights[i] = 0.1 + fabs(uniform());
  lf_clip* clips[5] = {&call->latent, &call->history, &call->noise, &call->next, &call->x0};
  for (int i = 0; i < 5; ++i) {
    c->elements = lay(shape, channels_last, clips[i]->strides);
    clips[i]->data = c->clips[i] = i < 3 ? filled(c->elements, dtype) : room(c->elements * size_of(dtype));
  }
  call->windows = c->data, call->window_shapes = c->shapes, call->window_strides = c->strides;
  call->starts = c->starts, call->weights = weighted ? c->weights : NULL;
  call->x0_latent = 0.75, call->x0_prediction = -0.5, call->latent_coefficient = 0.625, call->x0_coefficient = 0.375;
  call->history_coefficient = -0.25, call->noise_coefficient = 0.125;
  call->guided = guided, call->guidance_scale = 2.5;
}

static void release(Case* c) {
  for (int i = 0; i < WINDOWS; ++i) free(c->windows[i]);
  for (int i = 0; i < 5; ++i) free(c->clips[i]);
}

static double blended(const Case* c, const int64_t index[AXES], int half) {
  const lf_denoise_step* call = &c->call;
  double sum = 0, total = 0;
  for (int64_t i = 0; i < call->num_windows; ++i) {
    const int64_t* shape = c->shapes + i * AXES;
    const double* weights = c->weights;
    double weight = 1;
    int64_t local[AXES];
    int inside = 1;
    memcpy(local, index, sizeof local);
    local[0] += half * call->shape[0];
    for (int a = 0; a < call->axes; ++a) {
      local[2 + a] -= c->starts[i * call->axes + a];
      inside = inside && local[2 + a] >= 0 && local[2 + a] < shape[2 + a];
    }
    if (!inside) continue;
    for (int a = 0; call->weights && a < call->axes; ++a) {
      weight *= weights[local[2 + a]];
      weights += shape[2 + a];
    }
    sum += weight * read_element(c->windows[i] + offset_of(c->strides + i * AXES, local) * size_of(call->window_dtype),
                                 call->window_dtype);
    total += weight;
  }
  return sum / total;
}

static int ascending(const void* a, const void* b) {
  const double x = *(const double*)a, y = *(const double*)b;
  return x < y ? -1 : x > y;
}

/* The limit of the clip or frame that starts at position `first` of x0, which is ordered (B, T, C, H, W). */
static double limit_of(const double* x0, int64_t first, int64_t n, double percentile) {
  double* sorted = malloc((size_t)n * sizeof *sorted);
  const double position = percentile * (double)(n - 1);
  const int64_t below = (int64_t)floor(position);
  if (!sorted) abort();
  for (int64_t i = 0; i < n; ++i) sorted[i] = fabs(x0[first + i]);
  qsort(sorted, (size_t)n, sizeof *sorted, ascending);
  const double lower = sorted[below], upper = sorted[below + 1 < n ? below + 1 : below];
  free(sorted);
  const double quantile = lower + (position - (double)below) * (upper - lower);
  return quantile > 1 ? quantile : 1;
}

/* What is expected, (B, T, C, H, W) as fp64: both outputs. `latent` and `history` as they were before the call. */
static void expect(const Case* c, const unsigned char* latent, const unsigned char* history, double* next, double* x0) {
  const lf_denoise_step* call = &c->call;
  const int64_t* s = call->shape;
  const int64_t frame = s[1] * s[3] * s[4], n = s[0] * s[2] * frame;
  const int64_t unit = call->bound == LF_BOUND_FRAME ? frame : frame * s[2];
  for (int pass = 0; pass < 2; ++pass) {
    double limit = 1;
    int64_t i = 0;
    for (int64_t b = 0; b < s[0]; ++b) for (int64_t t = 0; t < s[2]; ++t) for (int64_t k = 0; k < s[1]; ++k)
      for (int64_t h = 0; h < s[3]; ++h) for (int64_t w = 0; w < s[4]; ++w, ++i) {
        const int64_t index[AXES] = {b, k, t, h, w};
        const int64_t at = offset_of(call->latent.strides, index) * size_of(call->dtype);
        const double current = read_element(latent + at, call->dtype);
        if (pass == 0) {
          double pred = blended(c, index, 0);
          if (call->guided) {
            const double other = blended(c, index, 1);
            pred = other + call->guidance_scale * (pred - other);
          }
          x0[i] = call->x0_latent * current + call->x0_prediction * pred;
          continue;
        }
        if (call->bound >= LF_BOUND_CLIP && i % unit == 0) limit = limit_of(x0, i, unit, call->percentile);
        if (call->bound != LF_BOUND_NONE) x0[i] = fmax(-limit, fmin(limit, x0[i])) / limit;
        next[i] = call->latent_coefficient * current + call->x0_coefficient * x0[i];
        if (call->history_coefficient != 0)
          next[i] += call->history_coefficient * read_element(history + at, call->dtype);
        if (call->noise_coefficient != 0) next[i] += call->noise_coefficient * read_element(c->clips[2] + at, call->dtype);
      }
  }
  (void)n;
}

static double tolerance(lf_dtype dtype, lf_dtype window_dtype, double expected) {
  const double rounding = dtype == LF_FLOAT16 ? ldexp(1, -11) : dtype == LF_BFLOAT16 ? ldexp(1, -8)
                        : dtype == LF_FLOAT32 ? ldexp(1, -24) : 0;
  const int wide = dtype == LF_FLOAT64 || window_dtype == LF_FLOAT64;
  return rounding * fabs(expected) * 1.01 + (wide ? 2e-14 : 4e-6);
}

static void compare(const Case* c, const lf_clip* clip, const double* expected, const char* name) {
  const lf_denoise_step* call = &c->call;
  const int64_t* s = call->shape;
  int64_t i = 0;
  for (int64_t b = 0; b < s[0]; ++b) for (int64_t t = 0; t < s[2]; ++t) for (int64_t k = 0; k < s[1]; ++k)
    for (int64_t h = 0; h < s[3]; ++h) for (int64_t w = 0; w < s[4]; ++w, ++i) {
      const int64_t index[AXES] = {b, k, t, h, w};
      const void* at = (const unsigned char*)clip->data + offset_of(clip->strides, index) * size_of(call->dtype);
      const double got = read_element(at, call->dtype);
      if (!(fabs(got - expected[i]) <= tolerance(call->dtype, call->window_dtype, expected[i]))) {
        fprintf(stderr, "%s (dtypes %d, %d; bound %d): at (%d, %d, %d, %d, %d) %.9g, not %.9g\n", name,
                (int)call->window_dtype, (int)call->dtype, (int)call->bound, (int)b, (int)k, (int)t, (int)h, (int)w, got,
                expected[i]);
        ++failures;
        return;
      }
    }
}

/* One call against the formula, and once more with other threads and in place: bit for bit the same. */
static void run(Case* c, const char* name) {
  lf_denoise_step* call = &c->call;
  const size_t bytes = (size_t)(c->elements * size_of(call->dtype));
  double *next = room(c->elements * 8), *x0 = room(c->elements * 8);
  expect(c, c->clips[0], c->clips[1], next, x0);
  CHECK(lf_denoise_step_cpu(call, 1) == LF_OK);
  compare(c, &call->next, next, name);
  compare(c, &call->x0, x0, name);
  unsigned char *first = room((int64_t)bytes), *second = room((int64_t)bytes);
  memcpy(first, call->next.data, bytes);
  memcpy(second, call->x0.data, bytes);
  memset(call->next.data, 0xff, bytes);
  CHECK(lf_denoise_step_cpu(call, 5) == LF_OK);
  CHECK(memcmp(first, call->next.data, bytes) == 0 && memcmp(second, call->x0.data, bytes) == 0);
  const lf_clip apart[2] = {call->next, call->x0};
  call->next = call->latent;
  if (call->history_coefficient != 0) call->x0 = call->history;
  CHECK(lf_denoise_step_cpu(call, 3) == LF_OK);
  CHECK(memcmp(first, call->next.data, bytes) == 0 && memcmp(second, call->x0.data, bytes) == 0);
  call->next = apart[0], call->x0 = apart[1];
  free(first), free(second), free(next), free(x0);
}

static void every_kind(lf_dtype window_dtype, lf_dtype dtype) {
  static Case c;
  for (int i = 0; i < 16; ++i) {
    const int32_t axes = i & 4 ? 3 : 1;
    prepare(&c, window_dtype, dtype, 5, 9, i & 1, i >> 1 & 1, axes, i >> 3);
    c.call.bound = (i + (int)dtype + (int)window_dtype) % 4;
    c.call.percentile = i % 3 ? 0.9 : 1;
    run(&c, axes == 3 ? "in space" : "in time");
    release(&c);
  }
}

/* Units large enough for a sample, and enough work for threads. `scale`: x0 in relation to 1. */
static void large(int32_t bound, double percentile, double scale, double guidance_scale) {
  static Case c;
  prepare(&c, LF_BFLOAT16, LF_FLOAT32, 61, 103, bound == LF_BOUND_FRAME, 1, 1, 0);
  c.call.bound = bound, c.call.percentile = percentile, c.call.guidance_scale = guidance_scale;
  c.call.x0_latent *= scale, c.call.x0_prediction *= scale;
  c.call.history_coefficient = 0, c.call.history.data = NULL; /* neither is looked at */
  c.call.noise_coefficient = 0, c.call.noise.data = NULL;
  run(&c, "large");
  release(&c);
}

/* |x0| is |latent|, of which many are equal, so that no bracket holds few; and some are infinite or NaN. */
static void crowded(double value, int64_t others, double other, double percentile, double expected) {
  static Case c;
  prepare(&c, LF_FLOAT32, LF_FLOAT32, 113, 131, 1, 0, 1, 0);
  c.call.bound = LF_BOUND_CLIP, c.call.percentile = percentile;
  c.call.x0_latent = 1, c.call.x0_prediction = 0;
  for (int64_t i = 0; i < c.elements; ++i) ((float*)(void*)c.clips[0])[i] = (float)(i % 2 ? value : -value);
  for (int64_t i = 0; i < others; ++i) {
    for (int64_t b = 0; b < 2; ++b) ((float*)(void*)c.clips[0])[b * c.elements / 2 + 7 * i] = (float)other;
  }
  CHECK(lf_denoise_step_cpu(&c.call, 2) == LF_OK);
  const float got = ((float*)c.call.x0.data)[c.elements - 1], bounded = (float)(value < expected ? value : expected);
  const float wanted = bounded / (float)expected;
  if (isnan(expected) ? !isnan(got) : fabsf(got) != wanted) {
    fprintf(stderr, "crowded at %g with %d of %g: %.9g, not %.9g\n", value, (int)others, other, got, wanted);
    ++failures;
  }
  release(&c);
}

/* The lower neighbour is the largest of those a sample promises, as it sees nothing of the 2443 that are larger. */
static void unseen(void) {
  static Case c;
  prepare(&c, LF_FLOAT32, LF_FLOAT32, 113, 131, 1, 0, 1, 0);
  c.call.bound = LF_BOUND_CLIP, c.call.percentile = 0.995;
  c.call.x0_latent = 1, c.call.x0_prediction = 0;
  const int64_t clip = c.elements / 2;
  for (int64_t b = 0; b < 2; ++b) {
    float* latent = (float*)(void*)c.clips[0] + b * clip;
    int64_t larger = 0;
    for (int64_t i = 0; i < clip; ++i) {
      const int hidden = i / 64 % 32 == 5 && i < 130000 && larger < 2443;
      latent[i] = hidden ? 9.0f : i >= 140000 && i % 100 == 0 ? 5.0f : 0.5f;
      larger += hidden;
    }
    CHECK(larger == 2443); /* of 488499: the quantile lies 0.51 of the way from the 2444th to the 2443rd */
  }
  CHECK(lf_denoise_step_cpu(&c.call, 1) == LF_OK);
  CHECK(fabs(((float*)c.call.x0.data)[0] - 0.5 / 7.04) < 1e-3);
  release(&c);
}

static void agreement(void) { /* where windows agree, the mean is exactly what they agree on */
  static Case c;
  prepare(&c, LF_FLOAT32, LF_FLOAT32, 7, 9, 1, 0, 1, 1);
  for (int i = 0; i < 3; ++i) {
    for (int64_t k = 0; k < 2 * 3 * 5 * 7 * 9; ++k) ((float*)(void*)c.windows[i])[k] = 0.1f;
  }
  c.call.x0_latent = 0, c.call.x0_prediction = 1;
  CHECK(lf_denoise_step_cpu(&c.call, 1) == LF_OK);
  for (int64_t i = 0; i < c.elements; ++i) CHECK(((float*)c.call.x0.data)[i] == 0.1f);
  release(&c);
}

static lf_status status_after(void (*change)(lf_denoise_step*)) {
  static Case c;
  prepare(&c, LF_FLOAT16, LF_FLOAT32, 3, 4, 1, 1, 1, 0);
  change(&c.call);
  const lf_status status = lf_denoise_step_cpu(&c.call, 1);
  for (int64_t i = 0; i < c.elements * 4 && status != LF_OK; ++i) {
    CHECK(c.clips[3][i] == 0xff && c.clips[4][i] == 0xff); /* a call that fails writes nothing */
  }
  release(&c);
  return status;
}

static void leave(lf_denoise_step* c) { (void)c; }
static void no_latent(lf_denoise_step* c) { c->latent.data = NULL; }
static void no_history(lf_denoise_step* c) { c->history.data = NULL; }
static void no_noise(lf_denoise_step* c) { c->noise.data = NULL; }
static void no_x0(lf_denoise_step* c) { c->x0.data = NULL; }
static void no_next(lf_denoise_step* c) { c->next.data = NULL; }
static void unknown_bound(lf_denoise_step* c) { c->bound = 4; }
static void large_percentile(lf_denoise_step* c) { c->bound = LF_BOUND_CLIP, c->percentile = 1.5; }
static void nan_percentile(lf_denoise_step* c) { c->bound = LF_BOUND_FRAME, c->percentile = NAN; }
static void unknown_dtype(lf_denoise_step* c) { c->dtype = 4; }
static void unknown_windows(lf_denoise_step* c) { c->window_dtype = -1; }
static void one_half(lf_denoise_step* c) { c->shape[0] = 4; }
static void odd_halves(lf_denoise_step* c) { c->shape[0] = 1, c->guided = 0; }
static void unguided(lf_denoise_step* c) { c->guided = 0; }
static void folded_next(lf_denoise_step* c) { c->next.strides[3] = 0; }
static void folded_x0(lf_denoise_step* c) { c->x0.strides[4] = 0; }
static void same_outputs(lf_denoise_step* c) { c->x0 = c->next; }
static void next_in_history(lf_denoise_step* c) { c->next = c->history; }
static void next_in_noise(lf_denoise_step* c) { c->next = c->noise; }
static void x0_in_latent(lf_denoise_step* c) { c->x0 = c->latent; }
static void x0_in_noise(lf_denoise_step* c) { c->x0 = c->noise; }
static void next_in_a_window(lf_denoise_step* c) { c->next.data = (void*)c->windows[1]; }
static void x0_in_a_window(lf_denoise_step* c) { c->x0.data = (void*)c->windows[2]; }
static void near_latent(lf_denoise_step* c) { c->next.data = (float*)c->latent.data + 1; }
static void turned_latent(lf_denoise_step* c) {
  c->next = c->latent;
  lay(c->shape, 0, c->next.strides);
}
static void far_history(lf_denoise_step* c) { c->history.strides[2] = INT64_MAX; }
static void late_window(lf_denoise_step* c) { ((int64_t*)c->starts)[2] = 7; }
static void gap(lf_denoise_step* c) { ((int64_t*)c->starts)[2] = 5; }
static void in_place(lf_denoise_step* c) { c->next = c->latent, c->x0 = c->history; }

static void check_errors(void) {
  CHECK(status_after(leave) == LF_OK);
  CHECK(status_after(in_place) == LF_OK);
  CHECK(status_after(no_latent) == LF_INVALID_ARGUMENT);
  CHECK(status_after(no_history) == LF_INVALID_ARGUMENT);
  CHECK(status_after(no_noise) == LF_INVALID_ARGUMENT);
  CHECK(status_after(no_x0) == LF_INVALID_ARGUMENT);
  CHECK(status_after(no_next) == LF_INVALID_ARGUMENT);
  CHECK(status_after(unknown_bound) == LF_INVALID_ARGUMENT);
  CHECK(status_after(large_percentile) == LF_INVALID_ARGUMENT);
  CHECK(status_after(nan_percentile) == LF_INVALID_ARGUMENT);
  CHECK(status_after(unknown_dtype) == LF_UNSUPPORTED_DTYPE);
  CHECK(status_after(unknown_windows) == LF_UNSUPPORTED_DTYPE);
  CHECK(status_after(one_half) == LF_INVALID_SHAPE);
  CHECK(status_after(odd_halves) == LF_INVALID_SHAPE);
  CHECK(status_after(unguided) == LF_INVALID_SHAPE);
  CHECK(status_after(folded_next) == LF_INVALID_STRIDES);
  CHECK(status_after(folded_x0) == LF_INVALID_STRIDES);
  CHECK(status_after(far_history) == LF_INVALID_STRIDES);
  CHECK(status_after(same_outputs) == LF_SHARED_MEMORY);
  CHECK(status_after(next_in_history) == LF_SHARED_MEMORY);
  CHECK(status_after(next_in_noise) == LF_SHARED_MEMORY);
  CHECK(status_after(x0_in_latent) == LF_SHARED_MEMORY);
  CHECK(status_after(x0_in_noise) == LF_SHARED_MEMORY);
  CHECK(status_after(next_in_a_window) == LF_SHARED_MEMORY);
  CHECK(status_after(x0_in_a_window) == LF_SHARED_MEMORY);
  CHECK(status_after(near_latent) == LF_SHARED_MEMORY);
  CHECK(status_after(turned_latent) == LF_SHARED_MEMORY);
  CHECK(status_after(late_window) == LF_WINDOW_OUT_OF_RANGE);
  CHECK(status_after(gap) == LF_UNCOVERED);
  CHECK(lf_denoise_step_cpu(NULL, 1) == LF_INVALID_ARGUMENT);
}

int main(void) {
  const lf_dtype dtypes[] = {LF_FLOAT32, LF_FLOAT64, LF_FLOAT16, LF_BFLOAT16};
  for (int i = 0; i < 16; ++i) every_kind(dtypes[i / 4], dtypes[i % 4]);
  const int32_t bounds[] = {LF_BOUND_CLIP, LF_BOUND_FRAME};
  for (int i = 0; i < 2; ++i) {
    large(bounds[i], 0.995, 1, 7.5);
    large(bounds[i], 0.5, 1, 7.5);
    large(bounds[i], 0.995, 0.1, 1);  /* nothing over 1 */
    large(bounds[i], 0.0001, 4, 7.5);
    large(bounds[i], 1, 1, 7.5);
  }
  large(LF_BOUND_STATIC, 1, 1, 2);
  const int64_t clip = 3 * 11 * 113 * 131; /* 488499 */
  crowded(5, 0, 0, 0.995, 5);
  crowded(1, 0, 0, 0.995, 1);
  crowded(0.5, 0, 0, 0.995, 1);
  crowded(5, 3000, 9, 0.995, 9);       /* the upper 2443 are among the 3000 */
  crowded(5, 2000, 9, 0.995, 5);
  crowded(5, 3000, INFINITY, 0.995, NAN); /* both neighbours infinite: their difference is NaN, as for torch */
  crowded(5, 3000, NAN, 0.995, NAN);
  crowded(5, 3000, NAN, 0.99, 5);
  crowded(0.5, 1, 9, 1 - 0.5 / (double)(clip - 1), 4.75); /* half way from 0.5 to the only one over 1 */
  unseen();
  agreement();
  check_errors();
  if (failures == 0) printf("denoise_step: all checks passed\n");
  return failures != 0;
}
