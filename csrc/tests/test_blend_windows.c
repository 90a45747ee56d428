/* blend_windows through the C ABI against the formula, position by position: every dtype, layouts, odd sizes, threads,
 * weights, errors. With LF_TEST_CUDA the CUDA launch is tested, emulated on the host. */
#include "lumiere_fast.h"

#include "check.h"
#include "numbers.h"
#if defined(LF_TEST_CUDA)
#include "emulation/stream.h"
#endif

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { AXES = 5, MAX_WINDOWS = 900 };

/* A tensor inside a larger allocation: `gap` elements between any two rows of the innermost axis, `lead` in front. */
typedef struct {
  unsigned char* memory;
  unsigned char* data;
  int64_t shape[AXES];
  int64_t strides[AXES];
  int64_t elements; /* of the allocation */
} Tensor;

typedef struct {
  lf_dtype dtype;
  int64_t count;
  int32_t axes;
  Tensor windows[MAX_WINDOWS];
  int64_t starts[MAX_WINDOWS * 3];
  double weights[4096];
  int weighted;
  Tensor out;
} Case;

static int64_t offset_of(const Tensor* tensor, const int64_t index[AXES]) {
  int64_t offset = 0;
  for (int axis = 0; axis < AXES; ++axis) offset += index[axis] * tensor->strides[axis];
  return offset;
}

/* `order`: the axes from the outermost to the innermost in memory. */
static void allocate(Tensor* tensor, lf_dtype dtype, const int64_t shape[AXES], const int order[AXES], int64_t lead,
                     int64_t gap) {
  int64_t stride = 1;
  memcpy(tensor->shape, shape, sizeof tensor->shape);
  for (int i = AXES - 1; i >= 0; --i) {
    tensor->strides[order[i]] = stride;
    stride = stride * shape[order[i]] + (i == AXES - 1 ? gap : 0);
  }
  tensor->elements = lead + stride;
  tensor->memory = malloc((size_t)(tensor->elements * size_of(dtype)) + 1);
  if (!tensor->memory) abort();
  memset(tensor->memory, 0xff, (size_t)(tensor->elements * size_of(dtype))); /* NaN in every dtype */
  tensor->data = tensor->memory + lead * size_of(dtype);
}

static int next_index(int64_t index[AXES], const int64_t shape[AXES]) {
  for (int axis = AXES - 1; axis >= 0; --axis) {
    if (++index[axis] < shape[axis]) return 1;
    index[axis] = 0;
  }
  return 0;
}

static void fill(Tensor* tensor, lf_dtype dtype) {
  int64_t index[AXES] = {0};
  do write_element(tensor->data + offset_of(tensor, index) * size_of(dtype), dtype, number());
  while (next_index(index, tensor->shape));
}

static lf_status blend(const Case* c, int32_t num_threads) {
  const void* data[MAX_WINDOWS];
  int64_t shapes[MAX_WINDOWS * AXES], strides[MAX_WINDOWS * AXES];
  for (int64_t i = 0; i < c->count; ++i) {
    data[i] = c->windows[i].data;
    memcpy(shapes + i * AXES, c->windows[i].shape, sizeof c->windows[i].shape);
    memcpy(strides + i * AXES, c->windows[i].strides, sizeof c->windows[i].strides);
  }
#if defined(LF_TEST_CUDA)
  (void)num_threads;
  return lf_blend_windows_cuda(c->dtype, c->count, data, shapes, strides, c->axes, c->starts,
                               c->weighted ? c->weights : NULL, c->out.data, c->out.shape, c->out.strides, 0,
                               LF_EMULATED_STREAM);
#else
  return lf_blend_windows_cpu(c->dtype, c->count, data, shapes, strides, c->axes, c->starts,
                              c->weighted ? c->weights : NULL, c->out.data, c->out.shape, c->out.strides, num_threads);
#endif
}

/* The formula at one position; exactly the window's value where `covering` is 1. */
static double expected_at(const Case* c, const int64_t index[AXES], int* covering) {
  double sum = 0, total = 0, value = 0;
  *covering = 0;
  for (int64_t i = 0; i < c->count; ++i) {
    const Tensor* window = &c->windows[i];
    int64_t local[AXES];
    const double* weights = c->weights;
    double weight = 1;
    int inside = 1;
    memcpy(local, index, sizeof local);
    for (int a = 0; a < c->axes; ++a) {
      local[2 + a] -= c->starts[i * c->axes + a];
      inside = inside && local[2 + a] >= 0 && local[2 + a] < window->shape[2 + a];
    }
    if (!inside) continue;
    for (int a = 0; c->weighted && a < c->axes; ++a) {
      weight *= weights[local[2 + a]];
      weights += window->shape[2 + a];
    }
    value = read_element(window->data + offset_of(window, local) * size_of(c->dtype), c->dtype);
    sum += weight * value;
    total += weight;
    ++*covering;
  }
  return *covering == 1 ? value : sum / total;
}

/* One rounding of the result, and those of the sum of numbers up to 2. */
static double tolerance(lf_dtype dtype, double expected) {
  const double rounding = dtype == LF_FLOAT16 ? ldexp(1, -11) : dtype == LF_BFLOAT16 ? ldexp(1, -8) : 0;
  return rounding * fabs(expected) + (dtype == LF_FLOAT64 ? 4e-15 : 2e-6);
}

static void compare(const Case* c, const char* name) {
  int64_t index[AXES] = {0};
  do {
    int covering = 0;
    const double expected = expected_at(c, index, &covering);
    const double got = read_element(c->out.data + offset_of(&c->out, index) * size_of(c->dtype), c->dtype);
    const double bound = covering == 1 ? 0 : tolerance(c->dtype, expected);
    if (!(fabs(got - expected) <= bound)) {
      fprintf(stderr, "%s, dtype %d: at (%d, %d, %d, %d, %d) %.9g, not %.9g\n", name, (int)c->dtype, (int)index[0],
              (int)index[1], (int)index[2], (int)index[3], (int)index[4], got, expected);
      ++failures;
      return;
    }
  } while (next_index(index, c->out.shape));
}

/* What lies between the rows of `out` is not written. */
static void check_gaps(const Case* c, const char* name) {
  const int64_t bytes = c->out.elements * size_of(c->dtype);
  unsigned char* inside = calloc((size_t)bytes + 1, 1);
  int64_t index[AXES] = {0};
  if (!inside) abort();
  do memset(inside + (c->out.data - c->out.memory) + offset_of(&c->out, index) * size_of(c->dtype), 1,
            (size_t)size_of(c->dtype));
  while (next_index(index, c->out.shape));
  for (int64_t i = 0; i < bytes; ++i) {
    if (!inside[i] && c->out.memory[i] != 0xff) {
      fprintf(stderr, "%s: byte %ld outside the result was written\n", name, (long)i);
      ++failures;
      break;
    }
  }
  free(inside);
}

static void release(Case* c) {
  for (int64_t i = 0; i < c->count; ++i) free(c->windows[i].memory);
  free(c->out.memory);
}

static const int CONTIGUOUS[AXES] = {0, 1, 2, 3, 4};
static const int CHANNELS_LAST[AXES] = {0, 2, 3, 4, 1};
static const int ODD[AXES] = {2, 0, 4, 1, 3};

static void run(Case* c, const char* name, const int order[AXES], int64_t lead, int64_t gap, int32_t num_threads) {
  for (int64_t i = 0; i < c->count; ++i) {
    const int64_t shape[AXES] = {c->out.shape[0], c->out.shape[1], c->windows[i].shape[2], c->windows[i].shape[3],
                                 c->windows[i].shape[4]};
    allocate(&c->windows[i], c->dtype, shape, order, lead * (i % 2), gap * (i % 3));
    fill(&c->windows[i], c->dtype);
  }
  int64_t out_shape[AXES];
  memcpy(out_shape, c->out.shape, sizeof out_shape);
  allocate(&c->out, c->dtype, out_shape, order, lead, gap);
  const lf_status status = blend(c, num_threads);
  if (status != LF_OK) {
    fprintf(stderr, "%s: %s (%s)\n", name, lf_status_string(status), lf_last_cuda_error());
    ++failures;
  } else {
    compare(c, name);
    check_gaps(c, name);
  }
  release(c);
}

static void describe(Case* c, lf_dtype dtype, int64_t B, int64_t C, int64_t T, int64_t H, int64_t W) {
  const int64_t shape[AXES] = {B, C, T, H, W};
  memset(c, 0, sizeof *c);
  c->dtype = dtype;
  c->axes = 1;
  memcpy(c->out.shape, shape, sizeof shape);
}

static void add_window(Case* c, int64_t t, int64_t h, int64_t w, int64_t T, int64_t H, int64_t W) {
  const int64_t start[3] = {t, h, w};
  for (int a = 0; a < c->axes; ++a) c->starts[c->count * c->axes + a] = start[a];
  c->windows[c->count].shape[2] = T;
  c->windows[c->count].shape[3] = H;
  c->windows[c->count].shape[4] = W;
  ++c->count;
}

static Case shared; /* too large for a stack */

static void in_time(lf_dtype dtype, const int order[AXES], int64_t C, int64_t H, int64_t W, int64_t lead, int64_t gap,
                    int weighted, int32_t num_threads) {
  Case* c = &shared;
  describe(c, dtype, 2, C, 13, H, W);
  const int64_t starts[] = {0, 8, 4, 3};
  for (int i = 0; i < 4; ++i) add_window(c, starts[i], 0, 0, i < 3 || weighted ? 5 : 2, H, W);
  c->weighted = weighted;
  for (int i = 0; i < 5; ++i) c->weights[i] = 0.1 + fabs(uniform());
  run(c, weighted ? "in time, weighted" : "in time", order, lead, gap, num_threads);
}

static void in_space(lf_dtype dtype, const int order[AXES], int64_t C, int weighted) {
  Case* c = &shared;
  describe(c, dtype, 2, C, 4, 7, 11);
  c->axes = 3;
  for (int t = 0; t < 2; ++t) {
    for (int h = 0; h < 3; ++h) {
      for (int w = 0; w < 2; ++w) add_window(c, t, 2 * h, 4 * w, 3, 3, 7);
    }
  }
  c->weighted = weighted;
  for (int i = 0; i < 13; ++i) c->weights[i] = 0.1 + fabs(uniform());
  run(c, weighted ? "in space, weighted" : "in space", order, 1, 0, 3);
}

/* Large enough for several threads, and for runs and rows that are shared out; less where threads are emulated. */
static void large(lf_dtype dtype, const int order[AXES], int weighted, int32_t num_threads) {
#if defined(LF_TEST_CUDA)
  const int64_t frames = 2;
#else
  const int64_t frames = 8;
#endif
  Case* c = &shared;
  describe(c, dtype, 1, 3, 3 * frames - 2, 131, 127);
  c->axes = weighted ? 3 : 1;
  for (int i = 0; i < 3; ++i) add_window(c, (frames - 1) * i, 0, 0, frames, 131, 127);
  c->weighted = weighted;
  for (int i = 0; i < frames + 131 + 127; ++i) c->weights[i] = 0.1 + fabs(uniform());
  run(c, "large", order, 0, 0, num_threads);
}

/* Weights whose products and sums double precision does not hold, against the same ones of a size that it does. */
static void extreme_weights(double scale) {
  Case* c = &shared;
  const int64_t shape[AXES] = {1, 2, 4, 3, 4};
  describe(c, LF_FLOAT64, 1, 2, 4, 3, 4);
  c->axes = 3;
  c->weighted = 1;
  for (int i = 0; i < 2; ++i) {
    add_window(c, 0, 0, i, 4, 3, 3);
    const int64_t window[AXES] = {1, 2, 4, 3, 3};
    allocate(&c->windows[i], c->dtype, window, CONTIGUOUS, 0, 0);
    fill(&c->windows[i], c->dtype);
  }
  allocate(&c->out, c->dtype, shape, CONTIGUOUS, 0, 0);
  for (int i = 0; i < 10; ++i) c->weights[i] = scale * (1 + i);
  CHECK(blend(c, 1) == LF_OK);
  for (int i = 0; i < 10; ++i) c->weights[i] = 1 + i;
  compare(c, "extreme weights");
  release(c);
}

/* One window over the whole video: its weights cancel. */
static void alone(const int order[AXES]) {
  Case* c = &shared;
  describe(c, LF_FLOAT32, 1, 3, 5, 2, 3);
  add_window(c, 0, 0, 0, 5, 2, 3);
  c->weighted = 1;
  for (int i = 0; i < 5; ++i) c->weights[i] = 1 + i;
  run(c, "alone", order, 0, 0, 1);
}

/* Windows that are slices of one tensor, with strides equal to the output's. */
static void slices(const int order[AXES], int32_t axes) {
  Case* c = &shared;
  const int64_t shape[AXES] = {2, 3, 9, 4, 8};
  describe(c, LF_FLOAT32, 2, 3, 9, 4, 8);
  c->axes = axes;
  Tensor clip;
  allocate(&clip, c->dtype, shape, order, 0, 0);
  fill(&clip, c->dtype);
  for (int i = 0; i < 3; ++i) {
    const int64_t w = axes == 3 && i != 1 ? 1 : 0;
    add_window(c, 3 * i, 0, w, i == 1 ? 4 : 3, 4, 8 - w);
    add_window(c, 3 * i, 0, 0, i == 1 ? 3 : 2, 4, axes == 3 ? 5 : 8);
  }
  if (axes == 3) add_window(c, 0, 0, 0, 9, 4, 2);
  else add_window(c, 0, 0, 0, 9, 4, 8);
  for (int64_t i = 0; i < c->count; ++i) {
    Tensor* window = &c->windows[i];
    const int64_t index[AXES] = {0, 0, c->starts[i * axes], 0, axes == 3 ? c->starts[i * axes + 2] : 0};
    memcpy(window->shape, shape, 2 * sizeof *shape);
    memcpy(window->strides, clip.strides, sizeof clip.strides);
    window->data = clip.data + offset_of(&clip, index) * size_of(c->dtype);
  }
  allocate(&c->out, c->dtype, shape, order, 0, 0);
  CHECK(blend(c, 2) == LF_OK);
  compare(c, "slices");
  CHECK(memcmp(c->out.memory, clip.memory, (size_t)(clip.elements * size_of(c->dtype))) == 0);
  free(c->out.memory);
  free(clip.memory);
}

/* More windows, and more of them over one position, than one launch on a device takes at first. */
static void many(int64_t count, int64_t length) {
  Case* c = &shared;
  describe(c, LF_FLOAT32, 1, 1, count + length - 1, 2, 3);
  for (int64_t i = 0; i < count; ++i) add_window(c, i, 0, 0, length, 2, 3);
  run(c, "many", CONTIGUOUS, 0, 0, 2);
}

/* Windows of many layouts, as slices of tensors of many sizes are. */
static void many_layouts(void) {
  Case* c = &shared;
  describe(c, LF_FLOAT16, 1, 2, 60, 2, 3);
  for (int i = 0; i < 59; ++i) add_window(c, i, 0, 0, 2 + (i % 40 < 59 - i ? i % 40 : 0), 2, 3);
  run(c, "many layouts", CONTIGUOUS, 0, 0, 2);
}

static lf_status status_after(void (*change)(Case*)) {
  Case* c = &shared;
  describe(c, LF_FLOAT32, 1, 2, 6, 3, 4);
  add_window(c, 0, 0, 0, 4, 3, 4);
  add_window(c, 2, 0, 0, 4, 3, 4);
  for (int i = 0; i < 4; ++i) c->weights[i] = 1;
  for (int i = 0; i < 2; ++i) {
    const int64_t shape[AXES] = {1, 2, 4, 3, 4};
    allocate(&c->windows[i], c->dtype, shape, CONTIGUOUS, 0, 0);
    fill(&c->windows[i], c->dtype);
  }
  const int64_t out_shape[AXES] = {1, 2, 6, 3, 4};
  allocate(&c->out, c->dtype, out_shape, CONTIGUOUS, 0, 0);
  Case kept = *c;
  change(c);
  const lf_status status = blend(c, 1);
  for (int64_t i = 0; i < kept.out.elements * 4 && status != LF_OK; ++i) {
    CHECK(kept.out.memory[i] == 0xff); /* a call that fails writes nothing */
  }
  release(&kept);
  return status;
}

static void leave(Case* c) { (void)c; }
static void take_window(Case* c) { c->windows[1].data = NULL; }
static void take_out(Case* c) { c->out.data = NULL; }
static void no_windows(Case* c) { c->count = 0; }
static void two_axes(Case* c) { c->axes = 2; }
static void unknown_dtype(Case* c) { c->dtype = 9; }
static void negative_size(Case* c) { c->windows[0].shape[2] = -1; }
static void negative_batch(Case* c) { c->out.shape[0] = c->windows[0].shape[0] = c->windows[1].shape[0] = -1; }
static void empty_axis(Case* c) { c->out.shape[3] = c->windows[0].shape[3] = c->windows[1].shape[3] = 0; }
static void other_channels(Case* c) { c->windows[1].shape[1] = 3; }
static void folded_out(Case* c) { c->out.strides[4] = 0; }
static void meeting_out(Case* c) { c->out.strides[1] = 4; }
static void far_apart_out(Case* c) { c->out.strides[3] = INT64_MIN, c->out.strides[2] = INT64_MAX; }
static void out_in_a_window(Case* c) { c->out.data = c->windows[1].data + 4 * (c->windows[1].elements - 1); }
static void out_before_a_window(Case* c) { c->windows[1].data = c->out.data + 4 * (c->out.elements - 1); }
static void late_window(Case* c) { c->starts[1] = 3; }
static void early_window(Case* c) { c->starts[0] = -1; }
static void far_window(Case* c) { c->starts[1] = INT64_MAX; }
static void long_window(Case* c) { c->windows[0].shape[2] = INT64_MAX; }
static void gap_inside(Case* c) { c->windows[0].shape[2] = 1; }
static void gap_at_the_end(Case* c) { c->starts[1] = 1; }
static void zero_weight(Case* c) { c->weighted = 1, c->weights[3] = 0; }
static void nan_weight(Case* c) { c->weighted = 1, c->weights[0] = NAN; }
static void infinite_weight(Case* c) { c->weighted = 1, c->weights[0] = INFINITY; }
static void uneven_weights(Case* c) { c->weighted = 1, c->weights[0] = 1e-60, c->weights[1] = 1e41; }
static void barely_even_weights(Case* c) { c->weighted = 1, c->weights[0] = 1e-60, c->weights[1] = 1e39; }
static void weights_of_unequal_windows(Case* c) { c->weighted = 1, c->windows[0].shape[2] = 3; }
static void empty_batch(Case* c) {
  c->out.shape[0] = c->windows[0].shape[0] = c->windows[1].shape[0] = 0;
  c->out.data = c->windows[0].data = c->windows[1].data = NULL;
}

static void check_errors(void) {
  CHECK(status_after(leave) == LF_OK);
  CHECK(status_after(empty_batch) == LF_OK);
  CHECK(status_after(take_window) == LF_INVALID_ARGUMENT);
  CHECK(status_after(take_out) == LF_INVALID_ARGUMENT);
  CHECK(status_after(no_windows) == LF_INVALID_ARGUMENT);
  CHECK(status_after(two_axes) == LF_INVALID_ARGUMENT);
  CHECK(status_after(unknown_dtype) == LF_UNSUPPORTED_DTYPE);
  CHECK(status_after(negative_size) == LF_INVALID_SHAPE);
  CHECK(status_after(negative_batch) == LF_INVALID_SHAPE);
  CHECK(status_after(empty_axis) == LF_INVALID_SHAPE);
  CHECK(status_after(other_channels) == LF_INVALID_SHAPE);
  CHECK(status_after(folded_out) == LF_INVALID_STRIDES);
  CHECK(status_after(meeting_out) == LF_INVALID_STRIDES);
  CHECK(status_after(far_apart_out) == LF_INVALID_STRIDES);
  CHECK(status_after(out_in_a_window) == LF_SHARED_MEMORY);
  CHECK(status_after(out_before_a_window) == LF_SHARED_MEMORY);
  CHECK(status_after(late_window) == LF_WINDOW_OUT_OF_RANGE);
  CHECK(status_after(early_window) == LF_WINDOW_OUT_OF_RANGE);
  CHECK(status_after(far_window) == LF_WINDOW_OUT_OF_RANGE);
  CHECK(status_after(long_window) == LF_WINDOW_OUT_OF_RANGE);
  CHECK(status_after(gap_inside) == LF_UNCOVERED);
  CHECK(status_after(gap_at_the_end) == LF_UNCOVERED);
  CHECK(status_after(zero_weight) == LF_INVALID_WEIGHTS);
  CHECK(status_after(nan_weight) == LF_INVALID_WEIGHTS);
  CHECK(status_after(infinite_weight) == LF_INVALID_WEIGHTS);
  CHECK(status_after(uneven_weights) == LF_UNEVEN_WEIGHTS);
  CHECK(status_after(barely_even_weights) == LF_OK);
  CHECK(status_after(weights_of_unequal_windows) == LF_INVALID_WEIGHTS);
}

#if defined(LF_TEST_CUDA)
static void on_unknown_device(void) {
  const float in[2] = {1, 2};
  float out[2] = {0, 0};
  const void* windows[] = {in};
  const int64_t shape[AXES] = {1, 1, 1, 1, 2}, strides[AXES] = {2, 2, 2, 2, 1}, start = 0;
  CHECK(lf_blend_windows_cuda(LF_FLOAT32, 1, windows, shape, strides, 1, &start, NULL, out, shape, strides, 7, NULL) ==
        LF_CUDA_ERROR);
  CHECK(strstr(lf_last_cuda_error(), "cudaErrorInvalidDevice: invalid device") != NULL);
}

/* As many sets of strides over one position as a launch takes, and one more; fewer where space is weighted. */
static void layouts_on_one_position(int count, int weighted, lf_status expected) {
  Case* c = &shared;
  const int64_t shape[AXES] = {1, 1, 1, 3, 5};
  describe(c, LF_FLOAT32, 1, 1, 1, 3, 5);
  c->axes = weighted ? 3 : 1;
  c->weighted = weighted;
  for (int i = 0; i < 9; ++i) c->weights[i] = 1 + i;
  for (int i = 0; i < count; ++i) {
    add_window(c, 0, 0, 0, 1, 3, 5);
    allocate(&c->windows[i], c->dtype, shape, CONTIGUOUS, 0, i);
    fill(&c->windows[i], c->dtype);
  }
  allocate(&c->out, c->dtype, shape, CONTIGUOUS, 0, 0);
  CHECK(blend(c, 1) == expected);
  if (expected == LF_OK) compare(c, "layouts on one position");
  release(c);
}

static void windows_on_one_position(int count, int weighted, lf_status expected) {
  Case* c = &shared;
  const int64_t shape[AXES] = {1, 1, 1, 1, 1};
  describe(c, LF_FLOAT32, 1, 1, 1, 1, 1);
  c->axes = weighted ? 3 : 1;
  c->weighted = weighted;
  for (int i = 0; i < 3; ++i) c->weights[i] = 1;
  for (int i = 0; i < count; ++i) {
    add_window(c, 0, 0, 0, 1, 1, 1);
    allocate(&c->windows[i], c->dtype, shape, CONTIGUOUS, 0, 0);
    fill(&c->windows[i], c->dtype);
  }
  allocate(&c->out, c->dtype, shape, CONTIGUOUS, 0, 0);
  CHECK(blend(c, 1) == expected);
  if (expected == LF_OK) compare(c, "windows on one position");
  release(c);
}

static void weights_of_one_launch(int count, lf_status expected) {
  Case* c = &shared;
  const int64_t shape[AXES] = {1, 1, 1, 2, count - 3};
  describe(c, LF_FLOAT32, 1, 1, 1, 2, count - 3);
  c->axes = 3;
  c->weighted = 1;
  for (int i = 0; i < count; ++i) c->weights[i] = 1;
  add_window(c, 0, 0, 0, 1, 2, count - 3);
  allocate(&c->windows[0], c->dtype, shape, CONTIGUOUS, 0, 0);
  fill(&c->windows[0], c->dtype);
  allocate(&c->out, c->dtype, shape, CONTIGUOUS, 0, 0);
  CHECK(blend(c, 1) == expected);
  if (expected == LF_OK) compare(c, "weights of one launch");
  release(c);
}
#else
/* One thread after the other; the first does all the work. */
static int entered = 0;
static void in_turn(void (*work)(void*), void* data, uint32_t num_threads, uint32_t flags) {
  CHECK(flags == 0);
  for (uint32_t i = 0; i < num_threads; ++i, ++entered) work(data);
}
static void nobody(void (*work)(void*), void* data, uint32_t num_threads, uint32_t flags) {
  (void)work, (void)data, (void)num_threads, (void)flags;
  ++entered;
}

static void borrowed_threads(void) {
  lf_borrow_threads(in_turn);
  large(LF_FLOAT32, CHANNELS_LAST, 0, 3);
  CHECK(entered == 3);
  in_time(LF_FLOAT32, CONTIGUOUS, 3, 5, 7, 0, 0, 0, 4);
  CHECK(entered == 3); /* too little work for a second thread */
  lf_borrow_threads(nobody);
  large(LF_FLOAT32, CHANNELS_LAST, 0, 3);
  CHECK(entered == 4);
  lf_borrow_threads(NULL);
  large(LF_FLOAT32, CHANNELS_LAST, 0, 3);
  CHECK(entered == 4);
}

static void no_threads(void) {
  const float in[2] = {1, 2};
  float out[2] = {0, 0};
  const void* windows[] = {in};
  const int64_t shape[AXES] = {1, 1, 1, 1, 2}, strides[AXES] = {2, 2, 2, 2, 1}, start = 0;
  const int64_t backwards[AXES] = {2, 2, 2, 2, -1};
  CHECK(lf_blend_windows_cpu(LF_FLOAT32, 1, windows, shape, strides, 1, &start, NULL, out, shape, strides, 0) ==
        LF_INVALID_ARGUMENT);
  CHECK(lf_blend_windows_cpu(LF_FLOAT32, 1, NULL, shape, strides, 1, &start, NULL, out, shape, strides, 1) ==
        LF_INVALID_ARGUMENT);
  CHECK(lf_blend_windows_cpu(LF_FLOAT32, 1, windows, shape, strides, 1, &start, NULL, out + 1, shape, backwards, 1) ==
        LF_OK);
  CHECK(out[0] == 2 && out[1] == 1); /* strides may be negative */
}
#endif

int main(void) {
  const lf_dtype dtypes[] = {LF_FLOAT32, LF_FLOAT64, LF_FLOAT16, LF_BFLOAT16};
  const int* orders[] = {CONTIGUOUS, CHANNELS_LAST, ODD};
  for (int d = 0; d < 4; ++d) {
    for (int o = 0; o < 3; ++o) {
      for (int weighted = 0; weighted < 2; ++weighted) {
        in_time(dtypes[d], orders[o], 3, 5, 7, 0, 0, weighted, 1);
        in_time(dtypes[d], orders[o], 8, 4, 8, 0, 0, weighted, 2);
        in_time(dtypes[d], orders[o], 8, 2, 24, 0, 8, weighted, 2);
        in_time(dtypes[d], orders[o], 3, 2, 37, 1, 0, weighted, 2);
        in_time(dtypes[d], orders[o], 1, 1, 1, 0, 0, weighted, 4);
        in_time(dtypes[d], orders[o], 5, 3, 11, 1, 3, weighted, 4);
        in_space(dtypes[d], orders[o], 3, weighted);
        in_space(dtypes[d], orders[o], 1, weighted);
      }
    }
    large(dtypes[d], orders[d % 2], d / 2, 2 + d);
  }
  for (int o = 0; o < 3; ++o) {
    alone(orders[o]);
    slices(orders[o], 1);
    slices(orders[o], 3);
  }
  extreme_weights(1e120);
  extreme_weights(1e-120);
  extreme_weights(1e307);
  extreme_weights(5e-324);
  many(40, 1);
  many(45, 30);
  many(90, 70);
  many(300, 40);
  many_layouts();
  check_errors();
#if defined(LF_TEST_CUDA)
  on_unknown_device();
  layouts_on_one_position(32, 0, LF_OK);
  layouts_on_one_position(33, 0, LF_TOO_MANY);
  layouts_on_one_position(8, 1, LF_OK);
  layouts_on_one_position(9, 1, LF_TOO_MANY);
  windows_on_one_position(640, 0, LF_OK);
  windows_on_one_position(641, 0, LF_TOO_MANY);
  windows_on_one_position(128, 1, LF_OK);
  windows_on_one_position(129, 1, LF_TOO_MANY);
  weights_of_one_launch(2880, LF_OK);
  weights_of_one_launch(2881, LF_TOO_MANY);
#else
  borrowed_threads();
  no_threads();
#endif
  if (failures == 0) printf("blend_windows: all checks passed\n");
  return failures != 0;
}
