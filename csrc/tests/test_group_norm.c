/* group_norm, its statistics and its backward through the C ABI against the formula in double precision: every dtype,
 * layouts, odd sizes, threads, FiLM, errors. */
#include "lumiere_fast.h"

#include "check.h"
#include "numbers.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { AXES = 5, MAX_CHANNELS = 512, MAX_FRAMES = 64 };

/* Memory of exactly the tensor's size, so that the sanitizers see a step outside; `order` is from the outermost axis.
 * */
typedef struct {
  unsigned char* data;
  int64_t strides[AXES];
} Tensor;

typedef struct {
  const char* name;
  lf_dtype dtype;
  int64_t shape[AXES];
  int64_t groups;
  int32_t per_frame;
  int film; /* 0: none; 1: of each clip; 2: of each frame */
  lf_activation act;
  const int* order;
  double mean; /* of x */
} Case;

static const int CONTIGUOUS[AXES] = {0, 1, 2, 3, 4};
static const int CHANNELS_LAST[AXES] = {0, 2, 3, 4, 1};
static const int ODD[AXES] = {4, 0, 2, 1, 3};

static double weight[MAX_CHANNELS], bias[MAX_CHANNELS];
static double scale[MAX_FRAMES * MAX_CHANNELS], shift[MAX_FRAMES * MAX_CHANNELS];

static int64_t count_of(const Case* c) {
  return c->shape[0] * c->shape[1] * c->shape[2] * c->shape[3] * c->shape[4];
}

static Tensor tensor_of(const Case* c) {
  Tensor tensor;
  int64_t stride = 1;
  for (int i = AXES - 1; i >= 0; --i) {
    tensor.strides[c->order[i]] = stride;
    stride *= c->shape[c->order[i]];
  }
  tensor.data = malloc((size_t)(stride * size_of(c->dtype)));
  if (!tensor.data) abort();
  memset(tensor.data, 0xff, (size_t)(stride * size_of(c->dtype))); /* NaN in every dtype */
  return tensor;
}

static unsigned char* at(const Case* c, const Tensor* tensor, int64_t b, int64_t ch, int64_t t, int64_t h, int64_t w) {
  const int64_t* s = tensor->strides;
  return tensor->data + (b * s[0] + ch * s[1] + t * s[2] + h * s[3] + w * s[4]) * size_of(c->dtype);
}

#define FOR_PIXELS(c, h, w)                      \
  for (int64_t h = 0; h < (c)->shape[3]; ++h) \
    for (int64_t w = 0; w < (c)->shape[4]; ++w)

static void fill(const Case* c, const Tensor* tensor, double mean) {
  for (int64_t b = 0; b < c->shape[0]; ++b)
    for (int64_t ch = 0; ch < c->shape[1]; ++ch)
      for (int64_t t = 0; t < c->shape[2]; ++t)
        FOR_PIXELS(c, h, w) write_element(at(c, tensor, b, ch, t, h, w), c->dtype, mean + number());
}

/* mean and rstd of a group, of frame t or of the clip. */
static void statistics_of(const Case* c, const Tensor* x, int64_t b, int64_t g, int64_t t, double* mean, double* rstd) {
  const int64_t width = c->shape[1] / c->groups, first = c->per_frame ? t : 0, end = c->per_frame ? t + 1 : c->shape[2];
  const double count = (double)(width * (end - first) * c->shape[3] * c->shape[4]);
  double squares = 0;
  *mean = 0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t ch = g * width; ch < (g + 1) * width; ++ch)
      for (int64_t f = first; f < end; ++f)
        FOR_PIXELS(c, h, w) {
          const double value = read_element(at(c, x, b, ch, f, h, w), c->dtype);
          if (pass == 0) *mean += value / count;
          else squares += (value - *mean) * (value - *mean);
        }
  }
  *rstd = 1 / sqrt(squares / count + 1e-5);
}

/* Where frame t of clip b has its scale and shift. */
static int64_t film_at(const Case* c, int64_t b, int64_t t) {
  return (c->film == 2 ? b * c->shape[2] + t : b) * c->shape[1];
}

typedef struct {
  lf_per_channel weight, bias, scale, shift;
  int film;
} Given;

/* In double where x is, else in single precision: exactly the numbers of the arrays, which few bits hold. */
static lf_per_channel given_of(const Case* c, const double* values, int64_t count, int film, void* memory) {
  const lf_dtype dtype = c->dtype == LF_FLOAT64 ? LF_FLOAT64 : LF_FLOAT32;
  const int64_t C = c->shape[1];
  lf_per_channel given = {memory, {0, 0, 1}, dtype};
  if (film == 1) given.strides[0] = C;
  if (film == 2) given.strides[0] = C * c->shape[2], given.strides[1] = C;
  for (int64_t i = 0; i < count; ++i) write_element((char*)memory + i * size_of(dtype), dtype, values[i]);
  return given;
}

static double memory_of[4][MAX_FRAMES * MAX_CHANNELS];

static Given draw_given(const Case* c) {
  const int64_t C = c->shape[1], rows = c->film == 2 ? c->shape[0] * c->shape[2] : c->shape[0];
  Given given;
  for (int64_t i = 0; i < C; ++i) weight[i] = 1 + number() / 4, bias[i] = number();
  for (int64_t i = 0; i < rows * C; ++i) scale[i] = c->film ? number() / 4 : 0, shift[i] = c->film ? number() : 0;
  given.weight = given_of(c, weight, C, 0, memory_of[0]);
  given.bias = given_of(c, bias, C, 0, memory_of[1]);
  given.scale = given_of(c, scale, rows * C, c->film, memory_of[2]);
  given.shift = given_of(c, shift, rows * C, c->film, memory_of[3]);
  given.film = c->film;
  return given;
}

static lf_status forward(const Case* c, const Tensor* x, const Given* given, const Tensor* y, int32_t num_threads) {
  return lf_group_norm_cpu(c->dtype, x->data, c->shape, x->strides, c->groups, &given->weight, &given->bias,
                           given->film ? &given->scale : NULL, given->film ? &given->shift : NULL, c->act, 1e-5,
                           c->per_frame, y->data, y->strides, num_threads);
}

static int close_to(const Case* c, double got, double expected, double size) {
  const double rounding = c->dtype == LF_FLOAT16 ? ldexp(1, -10) : c->dtype == LF_BFLOAT16 ? ldexp(1, -7) : 0;
  return fabs(got - expected) <= rounding * fabs(expected) + (c->dtype == LF_FLOAT64 ? 1e-12 : 4e-6) * size;
}

static void complain(const Case* c, const char* what, double got, double expected) {
  fprintf(stderr, "%s, dtype %d, C %d, groups %d: %s is %.9g, not %.9g\n", c->name, (int)c->dtype, (int)c->shape[1],
          (int)c->groups, what, got, expected);
  ++failures;
}

static void check_forward(const Case* c, const Tensor* x, const Tensor* y) {
  for (int64_t b = 0; b < c->shape[0]; ++b)
    for (int64_t ch = 0; ch < c->shape[1]; ++ch)
      for (int64_t t = 0; t < c->shape[2]; ++t) {
        double mean, rstd;
        statistics_of(c, x, b, ch / (c->shape[1] / c->groups), t, &mean, &rstd);
        FOR_PIXELS(c, h, w) {
          const int64_t film = film_at(c, b, t) + ch;
          double z = (read_element(at(c, x, b, ch, t, h, w), c->dtype) - mean) * rstd * weight[ch] + bias[ch];
          if (c->film) z = z * (1 + scale[film]) + shift[film];
          const double expected = c->act == LF_SILU ? z / (1 + exp(-z)) : z;
          const double got = read_element(at(c, y, b, ch, t, h, w), c->dtype);
          if (!close_to(c, got, expected, 4)) {
            complain(c, "y", got, expected);
            return;
          }
        }
      }
}

static void check_statistics(const Case* c, const Tensor* x) {
  const lf_dtype dtype = c->dtype == LF_FLOAT64 ? LF_FLOAT64 : LF_FLOAT32;
  const int64_t frames = c->per_frame ? c->shape[2] : 1, count = c->shape[0] * frames * c->groups;
  const int64_t behind[3] = {frames * c->groups, c->groups, 1}, across[3] = {1, c->shape[0], c->shape[0] * frames};
  unsigned char *mean = malloc((size_t)(count * size_of(dtype))), *rstd = malloc((size_t)(count * size_of(dtype)));
  if (!mean || !rstd) abort();
  CHECK(lf_group_norm_stats_cpu(c->dtype, x->data, c->shape, x->strides, c->groups, 1e-5, c->per_frame, mean, behind,
                                rstd, across, 3) == LF_OK);
  for (int64_t b = 0; b < c->shape[0]; ++b)
    for (int64_t t = 0; t < frames; ++t)
      for (int64_t g = 0; g < c->groups; ++g) {
        double expected[2];
        statistics_of(c, x, b, g, t, expected, expected + 1);
        const double got = read_element(mean + (b * behind[0] + t * behind[1] + g) * size_of(dtype), dtype);
        const double scaled =
            read_element(rstd + (b * across[0] + t * across[1] + g * across[2]) * size_of(dtype), dtype);
        const double exactness = c->dtype == LF_FLOAT64 ? 1e-12 : 1e-6;
        if (!(fabs(got - expected[0]) <= exactness * (1 + fabs(expected[0])))) complain(c, "mean", got, expected[0]);
        if (!(fabs(scaled / expected[1] - 1) <= 10 * exactness)) complain(c, "rstd", scaled, expected[1]);
      }
  free(mean);
  free(rstd);
}

/* Derivatives of sum(gy * y) by x, against differences of the call itself; in double precision. */
static double objective(const Case* c, const Tensor* x, const Given* given, const Tensor* gy, const Tensor* y) {
  double sum = 0;
  CHECK(forward(c, x, given, y, 1) == LF_OK);
  for (int64_t i = 0; i < count_of(c); ++i) sum += ((double*)gy->data)[i] * ((double*)y->data)[i];
  return sum;
}

static void check_backward(const Case* c) {
  const Tensor x = tensor_of(c), y = tensor_of(c), gy = tensor_of(c), gx = tensor_of(c);
  const int64_t C = c->shape[1], rows = c->shape[0] * c->shape[2];
  double *sums = malloc((size_t)(rows * C) * 8), *n_sums = malloc((size_t)(rows * C) * 8);
  if (!sums || !n_sums) abort();
  fill(c, &x, 0);
  fill(c, &gy, 0);
  const Given given = draw_given(c);
  CHECK(lf_group_norm_backward_cpu(c->dtype, gy.data, gy.strides, x.data, c->shape, x.strides, c->groups, &given.weight,
                                   &given.bias, given.film ? &given.scale : NULL, given.film ? &given.shift : NULL,
                                   c->act, 1e-5, c->per_frame, gx.data, gx.strides, sums, n_sums, 2) == LF_OK);
  for (int64_t i = 0; i < count_of(c); i += 1 + count_of(c) / 40) {
    double* moved = (double*)x.data + i;
    const double kept = *moved, step = 1e-5;
    *moved = kept + step;
    const double above = objective(c, &x, &given, &gy, &y);
    *moved = kept - step;
    const double expected = (above - objective(c, &x, &given, &gy, &y)) / (2 * step), got = ((double*)gx.data)[i];
    *moved = kept;
    if (!(fabs(got - expected) <= 1e-6 * (1 + fabs(expected)))) complain(c, "gx", got, expected);
  }
  for (int64_t ch = 0; ch < C; ch += 1 + C / 5) {
    double got[2] = {0, 0};
    double* moved[2] = {(double*)memory_of[0] + ch, (double*)memory_of[1] + ch};
    for (int64_t row = 0; row < rows; ++row) {
      const double gain = c->film ? 1 + scale[film_at(c, row / c->shape[2], row % c->shape[2]) + ch] : 1;
      got[0] += n_sums[row * C + ch] * gain;
      got[1] += sums[row * C + ch] * gain;
    }
    for (int k = 0; k < 2; ++k) {
      const double kept = *moved[k], step = 1e-5;
      *moved[k] = kept + step;
      const double above = objective(c, &x, &given, &gy, &y);
      *moved[k] = kept - step;
      const double expected = (above - objective(c, &x, &given, &gy, &y)) / (2 * step);
      *moved[k] = kept;
      const double most = 1e-6 * (1 + fabs(expected));
      if (!(fabs(got[k] - expected) <= most)) complain(c, "gradient of affine", got[k], expected);
    }
  }
  free(sums), free(n_sums);
  free(x.data), free(y.data), free(gy.data), free(gx.data);
}

static void check(Case c) {
  const Tensor x = tensor_of(&c), y = tensor_of(&c), again = tensor_of(&c);
  fill(&c, &x, c.mean);
  const Given given = draw_given(&c);
  CHECK(forward(&c, &x, &given, &y, 1) == LF_OK);
  check_forward(&c, &x, &y);
  CHECK(forward(&c, &x, &given, &again, 3) == LF_OK);
  CHECK(memcmp(y.data, again.data, (size_t)(count_of(&c) * size_of(c.dtype))) == 0); /* threads change nothing */
  check_statistics(&c, &x);
  free(x.data), free(y.data), free(again.data);
}

static void check_grid(lf_dtype dtype, const int order[AXES]) {
  const int64_t sizes[][6] = {/* B, C, T, H, W, groups */
                              {2, 8, 3, 4, 5, 2},   {1, 1, 1, 1, 1, 1},  {1, 30, 2, 7, 1, 3}, {2, 10, 1, 1, 13, 10},
                              {1, 24, 2, 11, 7, 8}, {1, 320, 1, 3, 5, 32}, {1, 3, 2, 53, 1, 1}, {1, 64, 2, 16, 16, 16}};
  for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; ++i) {
    for (int film = 0; film < 3; ++film) {
      const int64_t* s = sizes[i];
      const lf_activation act = film ? LF_SILU : LF_NO_ACTIVATION;
      Case c = {"grid", dtype, {s[0], s[1], s[2], s[3], s[4]}, s[5], film != 1, film, act, order, 0};
      check(c);
      if (dtype == LF_FLOAT64) check_backward(&c);
    }
  }
}

/* Several pieces a frame, few frames for the threads: a frame is shared out. */
static void check_large(lf_dtype dtype, const int order[AXES], int32_t per_frame) {
  const Case c = {"large", dtype, {1, 6, 3, 211, 307}, 3, per_frame, 2, LF_SILU, order, 0};
  check(c);
}

static void check_large_mean(const int order[AXES]) {
  const Case c = {"large mean", LF_FLOAT32, {1, 16, 2, 24, 24}, 4, 1, 1, LF_SILU, order, 1024};
  check(c);
}

static void check_errors(void) {
  float x[24], y[24], gy[24], sums[8], n_sums[8], ones[4] = {1, 1, 1, 1};
  const int64_t shape[AXES] = {1, 4, 2, 1, 3}, strides[AXES] = {24, 6, 3, 3, 1};
  const int64_t empty[AXES] = {0, 4, 2, 1, 3}, none[AXES] = {1, 4, 2, 0, 3}, folded[AXES] = {24, 6, 3, 3, 0};
  lf_per_channel affine = {ones, {0, 0, 1}, LF_FLOAT32}, nowhere = {NULL, {0, 0, 1}, LF_FLOAT32};
  lf_per_channel wide = {ones, {0, 0, 1}, LF_FLOAT64};
  for (int i = 0; i < 24; ++i) x[i] = (float)i, y[i] = -7;
#define NORM(dtype, x, shape, strides, groups, weight, act, eps, out, out_strides, threads)                            \
  lf_group_norm_cpu(dtype, x, shape, strides, groups, weight, NULL, NULL, NULL, act, eps, 1, out, out_strides, threads)
  CHECK(NORM(LF_FLOAT32, NULL, shape, strides, 2, &affine, LF_SILU, 1e-5, y, strides, 1) == LF_INVALID_ARGUMENT);
  CHECK(NORM(LF_FLOAT32, x, NULL, strides, 2, &affine, LF_SILU, 1e-5, y, strides, 1) == LF_INVALID_ARGUMENT);
  CHECK(NORM(LF_FLOAT32, x, shape, NULL, 2, &affine, LF_SILU, 1e-5, y, strides, 1) == LF_INVALID_ARGUMENT);
  CHECK(NORM(LF_FLOAT32, x, shape, strides, 2, &affine, LF_SILU, 1e-5, NULL, strides, 1) == LF_INVALID_ARGUMENT);
  CHECK(NORM(LF_FLOAT32, x, shape, strides, 2, &affine, LF_SILU, 1e-5, y, NULL, 1) == LF_INVALID_ARGUMENT);
  CHECK(NORM(LF_FLOAT32, x, shape, strides, 3, &affine, LF_SILU, 1e-5, y, strides, 1) == LF_INVALID_SHAPE);
  CHECK(NORM(LF_FLOAT32, x, shape, strides, 0, &affine, LF_SILU, 1e-5, y, strides, 1) == LF_INVALID_SHAPE);
  CHECK(NORM(LF_FLOAT32, x, shape, strides, 2, &nowhere, LF_SILU, 1e-5, y, strides, 1) == LF_INVALID_ARGUMENT);
  CHECK(NORM(LF_FLOAT32, x, shape, strides, 2, &affine, 2, 1e-5, y, strides, 1) == LF_INVALID_ARGUMENT);
  CHECK(NORM(LF_FLOAT32, x, shape, strides, 2, &affine, LF_SILU, 0, y, strides, 1) == LF_INVALID_ARGUMENT);
  CHECK(NORM(LF_FLOAT32, x, shape, strides, 2, &affine, LF_SILU, NAN, y, strides, 1) == LF_INVALID_ARGUMENT);
  CHECK(NORM(LF_FLOAT32, x, shape, strides, 2, &affine, LF_SILU, 1e-5, y, strides, 0) == LF_INVALID_ARGUMENT);
  CHECK(NORM(9, x, shape, strides, 2, &affine, LF_SILU, 1e-5, y, strides, 1) == LF_UNSUPPORTED_DTYPE);
  CHECK(NORM(LF_FLOAT32, x, shape, strides, 2, &wide, LF_SILU, 1e-5, y, strides, 1) == LF_UNSUPPORTED_DTYPE);
  CHECK(NORM(LF_FLOAT32, x, none, strides, 2, &affine, LF_SILU, 1e-5, y, strides, 1) == LF_INVALID_SHAPE);
  CHECK(NORM(LF_FLOAT32, x, shape, strides, 2, &affine, LF_SILU, 1e-5, y, folded, 1) == LF_INVALID_STRIDES);
  CHECK(NORM(LF_FLOAT32, x, shape, strides, 2, &affine, LF_SILU, 1e-5, x, strides, 1) == LF_SHARED_MEMORY);
  CHECK(NORM(LF_FLOAT32, NULL, empty, strides, 2, &nowhere, LF_SILU, 1e-5, NULL, strides, 1) == LF_OK);
  for (int i = 0; i < 24; ++i) CHECK(y[i] == -7 && x[i] == (float)i); /* a call that fails writes nothing */
  CHECK(NORM(LF_FLOAT32, x, shape, strides, 2, &affine, LF_SILU, 1e-5, y, strides, 1) == LF_OK);
  const int64_t three[3] = {4, 2, 1}, zeros[3] = {0, 0, 0};
  float mean[4], rstd[4];
#define STATS(mean, mean_strides, rstd)                                                                                \
  lf_group_norm_stats_cpu(LF_FLOAT32, x, shape, strides, 2, 1e-5, 1, mean, mean_strides, rstd, three, 1)
  CHECK(STATS(mean, zeros, rstd) == LF_INVALID_STRIDES);
  CHECK(STATS(NULL, three, rstd) == LF_INVALID_ARGUMENT);
  CHECK(STATS(mean, three, x) == LF_SHARED_MEMORY);
  CHECK(STATS(mean, three, rstd) == LF_OK);
#define BACKWARD(gy, gx, gx_strides, sums)                                                                             \
  lf_group_norm_backward_cpu(LF_FLOAT32, gy, strides, x, shape, strides, 2, NULL, NULL, NULL, NULL, LF_SILU, 1e-5, 1,  \
                             gx, gx_strides, sums, n_sums, 1)
  memcpy(gy, x, sizeof gy);
  CHECK(BACKWARD(NULL, y, strides, sums) == LF_INVALID_ARGUMENT);
  CHECK(BACKWARD(gy, y, strides, NULL) == LF_INVALID_ARGUMENT);
  CHECK(BACKWARD(gy, y, folded, sums) == LF_INVALID_STRIDES);
  CHECK(BACKWARD(gy, gy, strides, sums) == LF_SHARED_MEMORY);
  CHECK(BACKWARD(gy, x, strides, sums) == LF_SHARED_MEMORY);
  CHECK(BACKWARD(gy, NULL, NULL, sums) == LF_OK);
  CHECK(BACKWARD(gy, y, strides, sums) == LF_OK);
}

int main(void) {
  const lf_dtype dtypes[] = {LF_FLOAT32, LF_FLOAT64, LF_FLOAT16, LF_BFLOAT16};
  const int* orders[] = {CONTIGUOUS, CHANNELS_LAST, ODD};
  for (int o = 0; o < 3; ++o) {
    for (int d = 0; d < 4; ++d) check_grid(dtypes[d], orders[o]);
    check_large(dtypes[o], orders[o], o % 2);
    check_large_mean(orders[o]);
  }
  check_errors();
  if (failures == 0) printf("group_norm: all checks passed\n");
  return failures != 0;
}
