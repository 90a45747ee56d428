/* temporal_conv through the C ABI against its formula in double: dtypes, layouts, sizes, every option, threads, errors.
 * */
#include "lumiere_fast.h"

#include "check.h"
#include "numbers.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { AXES = 5, B = 0, C = 1, T = 2, H = 3, W = 4 };

static const int CONTIGUOUS[AXES] = {0, 1, 2, 3, 4}, CHANNELS_LAST[AXES] = {0, 2, 3, 4, 1}, ODD[AXES] = {3, 1, 0, 4, 2};

/* Which options a case has. */
enum { BIAS = 1, FRAME_BIAS = 2, SILU = 4, RESIDUAL = 8, NORM = 16, FILM = 32, STATS = 64, REPLICATE = 128, ALL = 255,
       LINEAR = 256 /* of a norm: without SiLU */ };

typedef struct {
  lf_dtype dtype;
  int64_t batch, in, out, frames, height, width, taps;
} Sizes;

static double get(const void* data, int64_t i, lf_dtype dtype) {
  return read_element((const char*)data + i * size_of(dtype), dtype);
}

static void set(void* data, int64_t i, lf_dtype dtype, double value) {
  write_element((char*)data + i * size_of(dtype), dtype, value);
}

/* Exactly as much, so that the sanitizer sees any step outside. */
static void* memory(int64_t elements, lf_dtype dtype) {
  void* data = malloc((size_t)(elements * size_of(dtype)));
  if (!data) abort();
  memset(data, 0xff, (size_t)(elements * size_of(dtype))); /* NaN in every dtype */
  return data;
}

static void* numbers(int64_t elements, lf_dtype dtype) {
  void* data = memory(elements, dtype);
  for (int64_t i = 0; i < elements; ++i) set(data, i, dtype, number());
  return data;
}

static int64_t elements_of(const int64_t shape[AXES]) { return shape[B] * shape[C] * shape[T] * shape[H] * shape[W]; }

static lf_clip clip(const int64_t shape[AXES], const int order[AXES], void* data) {
  lf_clip made = {data, {0}};
  int64_t stride = 1;
  for (int i = AXES - 1; i >= 0; --i) {
    made.strides[order[i]] = stride;
    stride *= shape[order[i]];
  }
  return made;
}

static double at(const lf_clip* x, lf_dtype dtype, int64_t b, int64_t c, int64_t t, int64_t h, int64_t w) {
  const int64_t* s = x->strides;
  return get(x->data, b * s[B] + c * s[C] + t * s[T] + h * s[H] + w * s[W], dtype);
}

static double factor(const lf_per_channel* f, int64_t b, int64_t t, int64_t c, double without) {
  return f->data ? get(f->data, b * f->strides[0] + t * f->strides[1] + c * f->strides[2], f->dtype) : without;
}

static double silu(double x) { return x / (1 + exp(-x)); }

static double input_at(const lf_temporal_conv* a, int64_t b, int64_t c, int64_t t, int64_t h, int64_t w) {
  if (t < 0 || t >= a->frames) {
    if (!a->replicate) return 0;
    t = t < 0 ? 0 : a->frames - 1;
  }
  const double x = at(&a->x, a->dtype, b, c, t, h, w);
  if (a->norm_groups == 0) return x;
  const int64_t g = c / (a->channels_in / a->norm_groups);
  const double n = (x - factor(&a->norm_mean, b, t, g, 0)) * factor(&a->norm_rstd, b, t, g, 1);
  const double affine = n * factor(&a->norm_weight, b, t, c, 1) + factor(&a->norm_bias, b, t, c, 0);
  const double normed = affine * (1 + factor(&a->norm_scale, b, t, c, 0)) + factor(&a->norm_shift, b, t, c, 0);
  return a->norm_linear ? normed : silu(normed);
}

static double output_at(const lf_temporal_conv* a, int64_t b, int64_t o, int64_t t, int64_t h, int64_t w) {
  double sum = factor(&a->bias, b, t, o, 0);
  for (int64_t j = 0; j < a->taps; ++j) {
    for (int64_t c = 0; c < a->channels_in; ++c) {
      const int64_t* s = a->weight_strides;
      sum += get(a->weight, o * s[0] + c * s[1] + j * s[2], a->dtype) * input_at(a, b, c, t + j - a->taps / 2, h, w);
    }
  }
  if (a->silu) sum = silu(sum);
  return a->residual.data ? sum + at(&a->residual, a->dtype, b, o, t, h, w) : sum;
}

/* Of fp32 sums of so many numbers near 1, and of one rounding to 8 or 11 bits. */
static double tolerance(const lf_temporal_conv* a, double expected) {
  const double rounding = a->dtype == LF_BFLOAT16 ? 1.0 / 256 : a->dtype == LF_FLOAT16 ? 1.0 / 2048 : 0;
  return 1.01 * rounding * fabs(expected) + 1e-5 * sqrt((double)(a->channels_in * a->taps));
}

static void compare(const lf_temporal_conv* a, const char* name) {
  const int64_t in_group = a->stats_groups ? a->channels_out / a->stats_groups : 1;
  int wrong = 0;
  for (int64_t b = 0; b < a->batch; ++b) {
    for (int64_t t = 0; t < a->frames; ++t) {
      for (int64_t group = 0; group < a->channels_out / in_group; ++group) {
        double sum = 0, squares = 0;
        for (int64_t o = group * in_group; o < (group + 1) * in_group; ++o) {
          for (int64_t h = 0; h < a->height; ++h) {
            for (int64_t w = 0; w < a->width; ++w) {
              const double expected = output_at(a, b, o, t, h, w), got = at(&a->y, a->dtype, b, o, t, h, w);
              wrong += !(fabs(got - expected) <= tolerance(a, expected));
              sum += expected;
              squares += expected * expected;
            }
          }
        }
        if (a->stats_groups == 0) continue;
        const double count = (double)(in_group * a->height * a->width), mean = sum / count;
        const double rstd = 1 / sqrt(squares / count - mean * mean + 1e-5);
        const int64_t i = (b * a->frames + t) * a->stats_groups + group;
        wrong += !(fabs(a->mean[i] - mean) <= 1e-4) + !(fabs(a->rstd[i] - rstd) <= 1e-3 * rstd);
      }
    }
  }
  if (wrong) fprintf(stderr, "%s, dtype %d: %d numbers are wrong\n", name, (int)a->dtype, wrong);
  CHECK(wrong == 0);
}

static lf_per_channel factors(int64_t batch, int64_t frames, int64_t channels, lf_dtype dtype) {
  const lf_per_channel made = {numbers((batch ? batch : 1) * (frames ? frames : 1) * channels, dtype),
                               {batch ? (frames ? frames : 1) * channels : 0, frames ? channels : 0, 1},
                               dtype};
  return made;
}

static lf_temporal_conv make(Sizes s, int options, const int order[AXES], const int out_order[AXES]) {
  const int64_t in[AXES] = {s.batch, s.in, s.frames, s.height, s.width};
  const int64_t out[AXES] = {s.batch, s.out, s.frames, s.height, s.width};
  lf_temporal_conv a = {s.dtype, s.batch, s.in, s.out, s.frames, s.height, s.width, s.taps, 0, 0, 0, 0,
                        clip(in, order, numbers(elements_of(in), s.dtype)), {NULL, {0}},
                        clip(out, out_order, memory(elements_of(out), s.dtype)), NULL, {0}, {NULL, {0}, 0},
                        {NULL, {0}, 0}, {NULL, {0}, 0}, {NULL, {0}, 0}, {NULL, {0}, 0}, {NULL, {0}, 0}, {NULL, {0}, 0},
                        NULL, NULL, (options & LINEAR) != 0};
  const int64_t stats = s.batch * s.frames;
  a.weight = numbers(s.out * s.in * s.taps, s.dtype);
  a.weight_strides[0] = options & FILM ? 1 : s.in * s.taps; /* also a weight that lies otherwise */
  a.weight_strides[1] = options & FILM ? s.out : s.taps;
  a.weight_strides[2] = options & FILM ? s.out * s.in : 1;
  a.replicate = (options & REPLICATE) != 0;
  a.silu = (options & SILU) != 0;
  if (options & (BIAS | FRAME_BIAS)) {
    a.bias = options & FRAME_BIAS ? factors(s.batch, s.frames, s.out, LF_FLOAT64) : factors(0, 0, s.out, s.dtype);
  }
  if (options & RESIDUAL) a.residual = clip(out, order, numbers(elements_of(out), s.dtype));
  if (options & NORM) {
    a.norm_groups = s.in % 2 ? 1 : 2;
    a.norm_mean = factors(s.batch, s.frames, a.norm_groups, LF_FLOAT32);
    a.norm_rstd = factors(s.batch, s.frames, a.norm_groups, LF_FLOAT32);
    a.norm_weight = factors(0, 0, s.in, s.dtype);
    a.norm_bias = factors(0, 0, s.in, LF_FLOAT32);
  }
  if ((options & NORM) && (options & FILM)) {
    a.norm_scale = factors(s.batch, 0, s.in, LF_BFLOAT16);
    a.norm_shift = factors(s.batch, s.frames, s.in, LF_FLOAT16);
  }
  if (options & STATS) {
    a.stats_groups = s.out % 3 ? 1 : 3;
    a.mean = memory(stats * a.stats_groups, LF_FLOAT32);
    a.rstd = memory(stats * a.stats_groups, LF_FLOAT32);
  }
  return a;
}

static void release(const lf_temporal_conv* a) {
  const void* data[] = {a->x.data, a->residual.data, a->y.data, a->weight, a->bias.data, a->norm_mean.data,
                        a->norm_rstd.data, a->norm_weight.data, a->norm_bias.data, a->norm_scale.data,
                        a->norm_shift.data, a->mean, a->rstd};
  for (size_t i = 0; i < sizeof data / sizeof *data; ++i) free((void*)data[i]);
}

static void run(const char* name, Sizes sizes, int options, const int order[AXES], const int out_order[AXES]) {
  lf_temporal_conv a = make(sizes, options, order, out_order);
  CHECK(lf_temporal_conv_cpu(&a, 2) == LF_OK);
  compare(&a, name);
  release(&a);
}

static void every_option(Sizes sizes) {
  static const int options[] = {
      0,         BIAS, FRAME_BIAS | SILU, RESIDUAL,       SILU | RESIDUAL, NORM, NORM | FILM, STATS,
      REPLICATE, ALL,  NORM | LINEAR,     (ALL & ~FILM) | LINEAR, /* with both, sums are not of numbers near 1 */
  };
  for (lf_dtype dtype = LF_FLOAT32; dtype <= LF_BFLOAT16; ++dtype) {
    if (dtype == LF_FLOAT64) continue;
    sizes.dtype = dtype;
    for (size_t i = 0; i < sizeof options / sizeof *options; ++i) {
      run("channels last", sizes, options[i], CHANNELS_LAST, CHANNELS_LAST);
      run("contiguous", sizes, options[i], CONTIGUOUS, CONTIGUOUS);
      run("mixed", sizes, options[i], ODD, i % 2 ? CHANNELS_LAST : ODD);
    }
  }
}

/* Bit for bit the same with any number of threads, the library's own or borrowed ones. */
static void in_turn(void (*work)(void*), void* data, uint32_t num_threads, uint32_t flags) {
  CHECK(flags == 0);
  for (uint32_t i = 0; i < num_threads; ++i) work(data);
}

static void threads_change_nothing(void) {
  const Sizes sizes = {LF_FLOAT32, 2, 64, 96, 5, 17, 19, 3};
  lf_temporal_conv a = make(sizes, ALL & ~FRAME_BIAS, CHANNELS_LAST, CHANNELS_LAST);
  const size_t y = (size_t)(2 * 96 * 5 * 17 * 19) * 4, stats = (size_t)(2 * 5 * 3) * 4;
  CHECK(lf_temporal_conv_cpu(&a, 1) == LF_OK);
  void *first = malloc(y), *mean = malloc(stats), *rstd = malloc(stats);
  if (!first || !mean || !rstd) abort();
  memcpy(first, a.y.data, y);
  memcpy(mean, a.mean, stats);
  memcpy(rstd, a.rstd, stats);
  for (int32_t threads = 2; threads <= 5; ++threads) {
    if (threads == 4) lf_borrow_threads(in_turn);
    memset(a.y.data, 0xff, y);
    CHECK(lf_temporal_conv_cpu(&a, threads) == LF_OK);
    CHECK(memcmp(a.y.data, first, y) == 0);
    CHECK(memcmp(a.mean, mean, stats) == 0 && memcmp(a.rstd, rstd, stats) == 0);
  }
  lf_borrow_threads(NULL);
  free(first), free(mean), free(rstd);
  release(&a);
}

/* Variances far below the squared mean: E[y^2] - E[y]^2 would have no digit of them. */
static void statistics_do_not_cancel(void) {
  const Sizes sizes = {LF_FLOAT32, 1, 4, 6, 2, 31, 5, 1};
  lf_temporal_conv a = make(sizes, FRAME_BIAS | STATS, CHANNELS_LAST, CHANNELS_LAST);
  for (int64_t i = 0; i < 2 * 6; ++i) set((void*)a.bias.data, i, LF_FLOAT64, 4096);
  CHECK(lf_temporal_conv_cpu(&a, 1) == LF_OK);
  for (int64_t t = 0; t < 2; ++t) {
    for (int64_t g = 0; g < 3; ++g) {
      double mean = 0, squares = 0;
      for (int64_t i = 0; i < 2 * 155; ++i) {
        mean += at(&a.y, LF_FLOAT32, 0, 2 * g + i % 2, t, i / 2 / 5, i / 2 % 5) / 310;
      }
      for (int64_t i = 0; i < 2 * 155; ++i) {
        const double apart = at(&a.y, LF_FLOAT32, 0, 2 * g + i % 2, t, i / 2 / 5, i / 2 % 5) - mean;
        squares += apart * apart / 310;
      }
      CHECK(fabs(a.rstd[t * 3 + g] * sqrt(squares + 1e-5) - 1) < 1e-4);
    }
  }
  release(&a);
}

static lf_status status_after(void (*change)(lf_temporal_conv*)) {
  const Sizes sizes = {LF_FLOAT32, 1, 4, 6, 3, 2, 2, 3};
  lf_temporal_conv a = make(sizes, ALL & ~BIAS, CHANNELS_LAST, CHANNELS_LAST);
  const lf_temporal_conv kept = a;
  change(&a);
  const lf_status status = lf_temporal_conv_cpu(&a, 1);
  for (int64_t i = 0; i < 6 * 3 * 2 * 2 && status != LF_OK; ++i) {
    CHECK(isnan(((float*)kept.y.data)[i])); /* a call that fails writes nothing */
  }
  release(&kept);
  return status;
}

static void leave(lf_temporal_conv* a) { (void)a; }
static void no_batch(lf_temporal_conv* a) { a->batch = 0, a->x.data = a->y.data = NULL; }
static void take_x(lf_temporal_conv* a) { a->x.data = NULL; }
static void take_y(lf_temporal_conv* a) { a->y.data = NULL; }
static void take_weight(lf_temporal_conv* a) { a->weight = NULL; }
static void take_mean(lf_temporal_conv* a) { a->mean = NULL; }
static void take_norm(lf_temporal_conv* a) { a->norm_rstd.data = NULL; }
static void double_x(lf_temporal_conv* a) { a->dtype = LF_FLOAT64; }
static void unknown_bias(lf_temporal_conv* a) { a->bias.dtype = 9; }
static void even_taps(lf_temporal_conv* a) { a->taps = 2; }
static void no_frames(lf_temporal_conv* a) { a->frames = 0; }
static void negative_batch(lf_temporal_conv* a) { a->batch = -1; }
static void uneven_groups(lf_temporal_conv* a) { a->norm_groups = 3; }
static void uneven_stats(lf_temporal_conv* a) { a->stats_groups = 4; }
static void negative_groups(lf_temporal_conv* a) { a->stats_groups = -1; }
static void folded_y(lf_temporal_conv* a) { a->y.strides[T] = 0; }
static void y_in_x(lf_temporal_conv* a) { a->y.data = (float*)a->x.data + 4; }
static void y_in_residual(lf_temporal_conv* a) { a->y.data = a->residual.data; }

static void errors(void) {
  CHECK(status_after(leave) == LF_OK);
  CHECK(status_after(no_batch) == LF_OK);
  CHECK(status_after(take_x) == LF_INVALID_ARGUMENT);
  CHECK(status_after(take_y) == LF_INVALID_ARGUMENT);
  CHECK(status_after(take_weight) == LF_INVALID_ARGUMENT);
  CHECK(status_after(take_mean) == LF_INVALID_ARGUMENT);
  CHECK(status_after(take_norm) == LF_INVALID_ARGUMENT);
  CHECK(status_after(double_x) == LF_UNSUPPORTED_DTYPE);
  CHECK(status_after(unknown_bias) == LF_UNSUPPORTED_DTYPE);
  CHECK(status_after(even_taps) == LF_INVALID_SHAPE);
  CHECK(status_after(no_frames) == LF_INVALID_SHAPE);
  CHECK(status_after(negative_batch) == LF_INVALID_SHAPE);
  CHECK(status_after(uneven_groups) == LF_INVALID_SHAPE);
  CHECK(status_after(uneven_stats) == LF_INVALID_SHAPE);
  CHECK(status_after(negative_groups) == LF_INVALID_SHAPE);
  CHECK(status_after(folded_y) == LF_INVALID_STRIDES);
  CHECK(status_after(y_in_x) == LF_SHARED_MEMORY);
  CHECK(status_after(y_in_residual) == LF_SHARED_MEMORY);
  CHECK(lf_temporal_conv_cpu(NULL, 1) == LF_INVALID_ARGUMENT);
}

int main(void) {
  const Sizes sizes[] = {
      {0, 2, 5, 7, 3, 2, 3, 3},    {0, 1, 1, 1, 1, 1, 1, 1},   {0, 1, 18, 35, 4, 3, 7, 1},
      {0, 1, 3, 6, 2, 1, 7, 7},    {0, 1, 24, 33, 4, 1, 13, 3}, {0, 1, 40, 24, 5, 4, 5, 3},
      {0, 1, 33, 25, 7, 1, 53, 3}, {0, 1, 8, 8, 3, 2, 2, 5},
      {0, 1, 24, 24, 13, 1, 53, 3}, {0, 1, 4, 5, 23, 1, 50, 5}, /* packed frames make room for later ones */
  };
  const int32_t lanes = lf_temporal_conv_lanes();
  CHECK(lanes == 1 || lanes == 4 || lanes == 8 || lanes == 16);
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; ++i) every_option(sizes[i]);
  threads_change_nothing();
  statistics_do_not_cancel();
  errors();
  if (failures == 0) printf("temporal_conv: all checks passed, with %d lanes\n", (int)lanes);
  return failures != 0;
}
