/* temporal_attention and its backward through the C ABI against their formulas in double: dtypes, layouts, sizes, every
 * option, threads, errors. */
#include "lumiere_fast.h"

#include "check.h"
#include "numbers.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { AXES = 6, B = 0, T = 1, H = 2, W = 3, N = 4, D = 5 };

/* Which options a case has. */
enum { BIAS = 1, ROTARY = 2, CAUSAL = 4, WINDOW = 8, EMPTY_ROWS = 16, FUSED = 32, REVERSED = 64, FOLDED_GY = 128 };

typedef struct {
  int64_t size[AXES];
} Shape;

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

static int64_t elements_of(const int64_t* shape) {
  return shape[B] * shape[T] * shape[H] * shape[W] * shape[N] * shape[D];
}

/* Axes from the innermost, over each element `step` of the last. */
static lf_heads heads_in(const int64_t* shape, const int* order, int64_t step, void* data) {
  lf_heads made = {data, {0}};
  for (int i = 0; i < AXES; ++i) {
    made.strides[order[i]] = step;
    step *= shape[order[i]];
  }
  return made;
}

static const int CONTIGUOUS[AXES] = {D, N, W, H, T, B}, ODD[AXES] = {T, N, D, B, W, H};

static int64_t offset(const lf_heads* x, const int64_t* at) {
  int64_t sum = 0;
  for (int axis = 0; axis < AXES; ++axis) sum += at[axis] * x->strides[axis];
  return sum;
}

static double value(const lf_temporal_attention* a, const lf_heads* x, const int64_t* at, int64_t t, int64_t d) {
  const int64_t place[AXES] = {at[B], t, at[H], at[W], at[N], d};
  return get(x->data, offset(x, place), a->dtype);
}

/* A channel of a query or a key, turned by its frame's angle; or back. */
static double turned(const lf_temporal_attention* a, double even, double odd, int64_t t, int64_t d, double sign) {
  const float* angle = a->rotary + (t * (a->channels / 2) + d / 2) * 2;
  return d % 2 == 0 ? even * angle[0] - sign * odd * angle[1] : sign * even * angle[1] + odd * angle[0];
}

static double rotated(const lf_temporal_attention* a, const lf_heads* x, const int64_t* at, int64_t t, int64_t d) {
  if (!a->rotary) return value(a, x, at, t, d);
  return turned(a, value(a, x, at, t, d - d % 2), value(a, x, at, t, d - d % 2 + 1), t, d, 1);
}

static int is_out(const lf_temporal_attention* a, int64_t t, int64_t s) {
  const int64_t lag = t - s;
  return (a->causal && lag < 0) || (a->window >= 0 && (lag < 0 ? -lag : lag) > a->window);
}

static double bias_at(const lf_temporal_attention* a, int64_t head, int64_t t, int64_t s) {
  if (is_out(a, t, s)) return -INFINITY;
  if (!a->bias) return 0;
  const int64_t lag = t - s + a->frames - 1;
  return get(a->bias, head * a->bias_strides[0] + lag * a->bias_strides[1], a->bias_dtype);
}

/* Of one pixel and head in double: rotated q and k (T, D), and the weights (T, T). */
typedef struct {
  double *q, *k, *v, *weights, *y;
} Sequence;

static double* doubles(int64_t count) { return memory(count, LF_FLOAT64); }

static Sequence attend(const lf_temporal_attention* a, const int64_t* at) {
  const int64_t frames = a->frames, channels = a->channels, size = frames * channels;
  Sequence s = {doubles(size), doubles(size), doubles(size), doubles(frames * frames), doubles(size)};
  for (int64_t i = 0; i < size; ++i) {
    s.q[i] = rotated(a, &a->q, at, i / channels, i % channels);
    s.k[i] = rotated(a, &a->k, at, i / channels, i % channels);
    s.v[i] = value(a, &a->v, at, i / channels, i % channels);
    s.y[i] = 0;
  }
  for (int64_t t = 0; t < frames; ++t) {
    double most = -INFINITY, sum = 0, *weights = s.weights + t * frames;
    for (int64_t j = 0; j < frames; ++j) {
      double score = 0;
      for (int64_t d = 0; d < channels; ++d) score += s.q[t * channels + d] * s.k[j * channels + d];
      weights[j] = a->scale * score + bias_at(a, at[N], t, j);
      most = weights[j] > most ? weights[j] : most;
    }
    for (int64_t j = 0; j < frames; ++j) {
      weights[j] = most == -INFINITY ? 0 : exp(weights[j] - most);
      sum += weights[j];
    }
    for (int64_t j = 0; j < frames; ++j) {
      weights[j] = sum == 0 ? 0 : weights[j] / sum;
      for (int64_t d = 0; d < channels; ++d) s.y[t * channels + d] += weights[j] * s.v[j * channels + d];
    }
  }
  return s;
}

static void forget(const Sequence* s) { free(s->q), free(s->k), free(s->v), free(s->weights), free(s->y); }

/* One rounding to 8 or 11 bits, and fp32's. */
static int is_near(const lf_temporal_attention* a, double got, double expected, double size) {
  const double rounding = a->dtype == LF_BFLOAT16 ? 1.0 / 256 : a->dtype == LF_FLOAT16 ? 1.0 / 2048 : 0;
  return fabs(got - expected) <= 1.01 * rounding * fabs(expected) + 4e-6 * size + (rounding > 0 ? 6e-8 : 0);
}

/* Calls at(...) for each pixel and head. */
static int for_sequences(const lf_temporal_attention* a, int (*at)(const lf_temporal_attention*, const int64_t*, void*),
                         void* data) {
  int wrong = 0;
  int64_t place[AXES] = {0};
  for (place[B] = 0; place[B] < a->batch; ++place[B]) {
    for (place[H] = 0; place[H] < a->height; ++place[H]) {
      for (place[W] = 0; place[W] < a->width; ++place[W]) {
        for (place[N] = 0; place[N] < a->heads; ++place[N]) wrong += at(a, place, data);
      }
    }
  }
  return wrong;
}

static int compare_forward(const lf_temporal_attention* a, const int64_t* at, void* unused) {
  (void)unused;
  int wrong = 0;
  const Sequence s = attend(a, at);
  for (int64_t i = 0; i < a->frames * a->channels; ++i) {
    wrong += !is_near(a, value(a, &a->y, at, i / a->channels, i % a->channels), s.y[i], 2);
  }
  forget(&s);
  return wrong;
}

static int compare_gradient(const lf_temporal_attention* a, const lf_heads* got, const int64_t* at, double* expected,
                            int rotate) {
  int wrong = 0;
  if (!got->data) return 0;
  for (int64_t i = 0; i < a->frames * a->channels; ++i) {
    const int64_t t = i / a->channels, d = i % a->channels;
    const double* pair = expected + i - d % 2;
    const double wanted = rotate && a->rotary ? turned(a, pair[0], pair[1], t, d, -1) : expected[i];
    wrong += !is_near(a, value(a, got, at, t, d), wanted, 8 * sqrt((double)a->channels));
  }
  return wrong;
}

/* `data` sums the gradient of the bias. */
static int compare_backward(const lf_temporal_attention* a, const int64_t* at, void* data) {
  const int64_t frames = a->frames, channels = a->channels, size = frames * channels;
  double* of_bias = (double*)data + at[N] * (2 * frames - 1);
  const Sequence s = attend(a, at);
  double *gq = doubles(size), *gk = doubles(size), *gv = doubles(size);
  for (int64_t i = 0; i < size; ++i) gq[i] = gk[i] = gv[i] = 0;
  for (int64_t t = 0; t < frames; ++t) {
    double *slopes = doubles(frames), sum = 0;
    for (int64_t j = 0; j < frames; ++j) {
      slopes[j] = 0;
      for (int64_t d = 0; d < channels; ++d) {
        slopes[j] += value(a, &a->y, at, t, d) * s.v[j * channels + d];
      }
      sum += s.weights[t * frames + j] * slopes[j];
    }
    for (int64_t j = 0; j < frames; ++j) {
      const double weight = s.weights[t * frames + j], slope = weight * (slopes[j] - sum);
      of_bias[t - j + frames - 1] += slope;
      for (int64_t d = 0; d < channels; ++d) {
        gq[t * channels + d] += a->scale * slope * s.k[j * channels + d];
        gk[j * channels + d] += a->scale * slope * s.q[t * channels + d];
        gv[j * channels + d] += weight * value(a, &a->y, at, t, d);
      }
    }
    free(slopes);
  }
  const int wrong = compare_gradient(a, &a->gq, at, gq, 1) + compare_gradient(a, &a->gk, at, gk, 1) +
                    compare_gradient(a, &a->gv, at, gv, 0);
  forget(&s);
  free(gq), free(gk), free(gv);
  return wrong;
}

/* What was allocated, to be freed. */
static void* owned[16];
static int owners = 0;
static void* own(void* data) { return owned[owners++] = data; }
static void release(void) {
  while (owners > 0) free(owned[--owners]);
}

static lf_heads clip(const int64_t* shape, const int* order, lf_dtype dtype, int filled) {
  const int64_t count = elements_of(shape);
  return heads_in(shape, order, 1, own(filled ? numbers(count, dtype) : memory(count, dtype)));
}

static void lay_out(lf_temporal_attention* a, const int64_t* shape, int options, const int* order) {
  lf_heads* const operands[] = {&a->q, &a->k, &a->v};
  if (options & FUSED) { /* views of one projection (B, T, H, W, 3, heads, D) */
    char* fused = own(numbers(3 * elements_of(shape), a->dtype));
    const int64_t row = shape[N] * shape[D];
    for (int i = 0; i < 3; ++i) {
      *operands[i] = heads_in(shape, CONTIGUOUS, 1, fused + i * row * size_of(a->dtype));
      for (int axis = B; axis <= W; ++axis) operands[i]->strides[axis] *= 3;
    }
    return;
  }
  for (int i = 0; i < 3; ++i) *operands[i] = clip(shape, order, a->dtype, 1);
  if (options & REVERSED) { /* keys from the last frame to the first */
    a->k.data = (char*)a->k.data + (shape[T] - 1) * a->k.strides[T] * size_of(a->dtype);
    a->k.strides[T] *= -1;
  }
}

static lf_temporal_attention make(Shape s, lf_dtype dtype, int options, const int* order) {
  const int64_t* n = s.size;
  lf_temporal_attention a;
  memset(&a, 0, sizeof a);
  a.dtype = dtype;
  a.batch = n[B], a.frames = n[T], a.height = n[H], a.width = n[W], a.heads = n[N], a.channels = n[D];
  lay_out(&a, n, options, order);
  a.window = options & WINDOW ? 3 : -1;
  a.causal = (options & CAUSAL) != 0;
  a.scale = 1 / sqrt((double)n[D]);
  const int64_t lags = 2 * n[T] - 1;
  if (options & BIAS) {
    a.bias_dtype = options & ROTARY ? LF_FLOAT64 : dtype;
    a.bias = own(numbers(n[N] * lags, a.bias_dtype));
    a.bias_strides[0] = 1, a.bias_strides[1] = n[N];
    /* The first rows see no frame. */
    for (int64_t i = 0; options & EMPTY_ROWS && i < n[T] + n[T] / 3; ++i) {
      set((void*)a.bias, i * n[N], a.bias_dtype, -INFINITY);
    }
  }
  if (options & ROTARY && n[D] % 2 == 0) {
    float* angles = own(memory(n[T] * n[D], LF_FLOAT32));
    for (int64_t i = 0; i < n[T] * n[D]; i += 2) {
      angles[i] = (float)cos((double)i), angles[i + 1] = (float)sin((double)i);
    }
    a.rotary = angles;
  }
  return a;
}

static void complain(const lf_temporal_attention* a, const char* what, int options, int wrong) {
  if (wrong) {
    fprintf(stderr, "%s, dtype %d, T %d, D %d, options %d: %d numbers are wrong\n", what, (int)a->dtype,
            (int)a->frames, (int)a->channels, options, wrong);
  }
  CHECK(wrong == 0);
}

static void forward(Shape s, lf_dtype dtype, int options, const int* order) {
  lf_temporal_attention a = make(s, dtype, options, order);
  a.y = clip(s.size, options & FUSED ? CONTIGUOUS : order, dtype, 0);
  CHECK(lf_temporal_attention_cpu(&a, 2) == LF_OK);
  complain(&a, "forward", options, for_sequences(&a, compare_forward, NULL));
  release();
}

/* `wanted`: of gq, gk, gv and gbias, as bits. */
static void backward(Shape s, lf_dtype dtype, int options, const int* order, int wanted) {
  lf_temporal_attention a = make(s, dtype, options, order);
  const int64_t lags = s.size[N] * (2 * s.size[T] - 1);
  lf_heads* const gradients[] = {&a.gq, &a.gk, &a.gv};
  a.y = clip(s.size, order, dtype, 1);
  for (int axis = 0; options & FOLDED_GY && axis < AXES; ++axis) a.y.strides[axis] = 0;
  for (int i = 0; i < 3; ++i) {
    if (wanted & 1 << i) *gradients[i] = clip(s.size, i == 1 ? order : CONTIGUOUS, dtype, 0);
  }
  if (wanted & 8) a.gbias = own(memory(lags, LF_FLOAT32));
  CHECK(lf_temporal_attention_backward_cpu(&a, 2) == LF_OK);
  double* sums = own(memory(lags, LF_FLOAT64));
  for (int64_t i = 0; i < lags; ++i) sums[i] = 0;
  int wrong = for_sequences(&a, compare_backward, sums);
  const double slack = 1e-4 * sqrt((double)s.size[D]);
  for (int64_t i = 0; a.gbias && i < lags; ++i) wrong += !(fabs(a.gbias[i] - sums[i]) <= slack);
  complain(&a, "backward", options, wrong);
  release();
}

static void every_size(void) {
  const int64_t frames[] = {1, 2, 5, 16, 17, 64, 80, 100, 300}, channels[] = {1, 5, 8, 32, 40, 64, 80, 96, 128, 160};
  for (size_t t = 0; t < sizeof frames / sizeof *frames; ++t) {
    for (size_t d = 0; d < sizeof channels / sizeof *channels; ++d) {
      if (frames[t] > 100 && channels[d] != 5 && channels[d] != 64) continue;
      const Shape shape = {{1, frames[t], 1, 2, 1, channels[d]}};
      forward(shape, LF_FLOAT32, BIAS | FUSED, CONTIGUOUS);
      if (frames[t] <= 100) backward(shape, LF_FLOAT32, BIAS, CONTIGUOUS, 15);
    }
  }
  const Shape longest = {{1, 300, 1, 1, 1, 5}};
  backward(longest, LF_FLOAT32, BIAS, CONTIGUOUS, 15);
}

static void every_option(void) {
  const Shape shapes[] = {{{2, 7, 3, 5, 3, 6}}, {{1, 37, 1, 3, 2, 40}}, {{2, 16, 2, 3, 4, 32}}};
  const int options[] = {0, BIAS, ROTARY, CAUSAL, WINDOW, BIAS | EMPTY_ROWS, FUSED | BIAS | CAUSAL, REVERSED | WINDOW,
                         BIAS | ROTARY | CAUSAL | WINDOW | EMPTY_ROWS | REVERSED, FOLDED_GY | BIAS};
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; ++i) {
    for (lf_dtype dtype = LF_FLOAT32; dtype <= LF_BFLOAT16; ++dtype) {
      if (dtype == LF_FLOAT64) continue;
      for (size_t j = 0; j < sizeof options / sizeof *options; ++j) {
        const int* order = j % 2 ? CONTIGUOUS : ODD;
        forward(shapes[i], dtype, options[j], order);
        forward(shapes[i], dtype, options[j], CONTIGUOUS);
        backward(shapes[i], dtype, options[j], order, 15);
      }
    }
  }
  for (int wanted = 0; wanted < 16; ++wanted) backward(shapes[0], LF_FLOAT32, BIAS | ROTARY, CONTIGUOUS, wanted);
}

/* Bit for bit the same with any number of threads, the library's own or borrowed ones. */
static void in_turn(void (*work)(void*), void* data, uint32_t num_threads, uint32_t flags) {
  CHECK(flags == 0);
  for (uint32_t i = 0; i < num_threads; ++i) work(data);
}

static void threads_change_nothing(void) {
  const Shape shape = {{2, 18, 11, 31, 4, 32}};
  const size_t bytes = (size_t)elements_of(shape.size) * 4, of_lags = 4 * 35 * 4;
  lf_temporal_attention a = make(shape, LF_FLOAT32, BIAS | CAUSAL, CONTIGUOUS);
  lf_heads* const results[] = {&a.y, &a.gq, &a.gk, &a.gv};
  void* first[4];
  for (int i = 0; i < 4; ++i) *results[i] = clip(shape.size, CONTIGUOUS, LF_FLOAT32, 0), first[i] = own(malloc(bytes));
  a.gbias = own(memory(4 * 35, LF_FLOAT32));
  float* const first_lags = own(memory(4 * 35, LF_FLOAT32));
  for (int32_t threads = 1; threads <= 5; ++threads) {
    if (threads == 4) lf_borrow_threads(in_turn);
    for (int i = 0; i < 4; ++i) memset(results[i]->data, 0xff, bytes);
    CHECK(lf_temporal_attention_cpu(&a, threads) == LF_OK);
    CHECK(lf_temporal_attention_backward_cpu(&a, threads) == LF_OK);
    if (threads == 1) memcpy(first_lags, a.gbias, of_lags);
    CHECK(memcmp(first_lags, a.gbias, of_lags) == 0);
    for (int i = 0; i < 4; ++i) {
      if (threads == 1) memcpy(first[i], results[i]->data, bytes);
      CHECK(memcmp(first[i], results[i]->data, bytes) == 0);
    }
  }
  lf_borrow_threads(NULL);
  release();
}

/* A NaN or an infinity is seen at its own pixel and head, and there alone. */
static void pixels_stay_apart(void) {
  const Shape shape = {{1, 9, 1, 7, 2, 20}};
  const double strange[] = {NAN, INFINITY};
  for (int operand = 0; operand < 6; ++operand) {
    lf_temporal_attention a = make(shape, LF_FLOAT32, 0, CONTIGUOUS);
    a.y = clip(shape.size, CONTIGUOUS, LF_FLOAT32, 0);
    lf_heads* const operands[] = {&a.q, &a.k, &a.v};
    const int64_t where[AXES] = {0, 4, 0, 3, 1, 2};
    set(operands[operand % 3]->data, offset(operands[operand % 3], where), LF_FLOAT32, strange[operand / 3]);
    CHECK(lf_temporal_attention_cpu(&a, 1) == LF_OK);
    int64_t strangers = 0, elsewhere = 0;
    for (int64_t i = 0; i < elements_of(shape.size); ++i) {
      const int64_t pixel = i / 40 % 7, head = i / 20 % 2;
      const int strangely = !isfinite(((float*)a.y.data)[i]);
      if (pixel == 3 && head == 1) strangers += strangely;
      else elsewhere += strangely;
    }
    CHECK(elsewhere == 0);
    CHECK(strangers == (operand % 3 == 0 ? 20 : operand % 3 == 1 ? (operand < 3 ? 180 : strangers) : 9));
    CHECK(strangers > 0);
    release();
  }
}

/* Rows that see no frame are 0, and take no part in gradients, whatever the values and the gradient there are. */
static void empty_rows_are_zero(void) {
  const Shape shape = {{1, 6, 1, 2, 1, 4}};
  lf_temporal_attention a = make(shape, LF_FLOAT32, BIAS | EMPTY_ROWS, CONTIGUOUS);
  a.y = clip(shape.size, CONTIGUOUS, LF_FLOAT32, 0);
  for (int i = 0; i < 4 * 2; ++i) ((float*)a.v.data)[i] = INFINITY;
  CHECK(lf_temporal_attention_cpu(&a, 1) == LF_OK);
  for (int i = 0; i < 3 * 4 * 2; ++i) CHECK(((float*)a.y.data)[i] == 0);
  for (int i = 0; i < 4 * 2; ++i) ((float*)a.v.data)[i] = 1;
  for (int i = 0; i < 6 * 4 * 2; ++i) ((float*)a.y.data)[i] = i < 3 * 4 * 2 ? NAN : 1;
  a.gq = clip(shape.size, CONTIGUOUS, LF_FLOAT32, 0), a.gk = clip(shape.size, CONTIGUOUS, LF_FLOAT32, 0);
  a.gv = clip(shape.size, CONTIGUOUS, LF_FLOAT32, 0), a.gbias = own(memory(11, LF_FLOAT32));
  CHECK(lf_temporal_attention_backward_cpu(&a, 1) == LF_OK);
  for (int i = 0; i < 3 * 4 * 2; ++i) CHECK(((float*)a.gq.data)[i] == 0);
  for (int i = 0; i < 6 * 4 * 2; ++i) CHECK(isfinite(((float*)a.gk.data)[i]) && isfinite(((float*)a.gv.data)[i]));
  for (int i = 0; i < 11; ++i) CHECK(isfinite(a.gbias[i]));
  release();
}

static lf_status (*function)(const lf_temporal_attention*, int32_t);

static lf_status status_after(void (*change)(lf_temporal_attention*)) {
  const Shape shape = {{1, 3, 2, 2, 2, 4}};
  const int64_t count = elements_of(shape.size);
  lf_temporal_attention a = make(shape, LF_FLOAT32, BIAS | ROTARY, CONTIGUOUS);
  lf_heads* const results[] = {&a.gq, &a.gk, &a.gv, &a.y};
  for (int i = 0; i < 4; ++i) *results[i] = clip(shape.size, CONTIGUOUS, LF_FLOAT32, 0);
  a.gbias = own(memory(2 * 5, LF_FLOAT32));
  const lf_temporal_attention kept = a;
  change(&a);
  const lf_status status = function(&a, 1);
  const lf_heads* const written[] = {&kept.gq, &kept.gk, &kept.gv, &kept.y};
  for (int i = 0; i < 4 && status != LF_OK; ++i) {
    /* A call that fails writes nothing. */
    for (int64_t j = 0; j < count; ++j) CHECK(isnan(((float*)written[i]->data)[j]));
  }
  for (int i = 0; i < 2 * 5 && status != LF_OK; ++i) CHECK(isnan(kept.gbias[i]));
  release();
  return status;
}

static void leave(lf_temporal_attention* a) { (void)a; }
static void no_batch(lf_temporal_attention* a) { a->batch = 0, a->q.data = a->k.data = a->v.data = a->y.data = NULL; }
static void take_q(lf_temporal_attention* a) { a->q.data = NULL; }
static void take_k(lf_temporal_attention* a) { a->k.data = NULL; }
static void take_v(lf_temporal_attention* a) { a->v.data = NULL; }
static void take_y(lf_temporal_attention* a) { a->y.data = NULL; }
static void double_q(lf_temporal_attention* a) { a->dtype = LF_FLOAT64; }
static void unknown_dtype(lf_temporal_attention* a) { a->dtype = 9; }
static void unknown_bias(lf_temporal_attention* a) { a->bias_dtype = -1; }
static void negative_batch(lf_temporal_attention* a) { a->batch = -1; }
static void no_frames(lf_temporal_attention* a) { a->frames = 0; }
static void negative_heads(lf_temporal_attention* a) { a->heads = -2; }
static void odd_rotary(lf_temporal_attention* a) { a->channels = 3; }
static void vast(lf_temporal_attention* a) { a->height = a->width = (int64_t)1 << 40; }
static void vast_frames(lf_temporal_attention* a) { a->batch = 0, a->frames = (int64_t)1 << 62; }
static void negative_window(lf_temporal_attention* a) { a->window = -2; }
static void infinite_scale(lf_temporal_attention* a) { a->scale = INFINITY; }
static void far_k(lf_temporal_attention* a) { a->k.strides[T] = INT64_MAX / 2; }
static void folded_y(lf_temporal_attention* a) { a->y.strides[T] = 0; }
static void y_in_q(lf_temporal_attention* a) { a->y.data = (float*)a->q.data + 4; }
static void y_in_v(lf_temporal_attention* a) { a->y.data = a->v.data; }
static void folded_gk(lf_temporal_attention* a) { a->gk.strides[N] = 0; }
static void gq_in_k(lf_temporal_attention* a) { a->gq.data = a->k.data; }
static void gv_in_gy(lf_temporal_attention* a) { a->gv.data = a->y.data; }
static void gk_in_gq(lf_temporal_attention* a) { a->gk.data = a->gq.data; }
static void gbias_in_gv(lf_temporal_attention* a) { a->gbias = (float*)a->gv.data + 7; }

static void errors_of_both(void) {
  CHECK(status_after(leave) == LF_OK);
  CHECK(status_after(no_batch) == LF_OK);
  CHECK(status_after(take_q) == LF_INVALID_ARGUMENT);
  CHECK(status_after(take_k) == LF_INVALID_ARGUMENT);
  CHECK(status_after(take_v) == LF_INVALID_ARGUMENT);
  CHECK(status_after(take_y) == LF_INVALID_ARGUMENT);
  CHECK(status_after(double_q) == LF_UNSUPPORTED_DTYPE);
  CHECK(status_after(unknown_dtype) == LF_UNSUPPORTED_DTYPE);
  CHECK(status_after(unknown_bias) == LF_UNSUPPORTED_DTYPE);
  CHECK(status_after(negative_batch) == LF_INVALID_SHAPE);
  CHECK(status_after(no_frames) == LF_INVALID_SHAPE);
  CHECK(status_after(negative_heads) == LF_INVALID_SHAPE);
  CHECK(status_after(odd_rotary) == LF_INVALID_SHAPE);
  CHECK(status_after(vast) == LF_INVALID_SHAPE);
  CHECK(status_after(vast_frames) == LF_INVALID_SHAPE);
  CHECK(status_after(negative_window) == LF_INVALID_ARGUMENT);
  CHECK(status_after(infinite_scale) == LF_INVALID_ARGUMENT);
  CHECK(status_after(far_k) == LF_INVALID_STRIDES);
  CHECK(function(NULL, 1) == LF_INVALID_ARGUMENT);
}

static void errors(void) {
  function = lf_temporal_attention_cpu;
  errors_of_both();
  CHECK(status_after(folded_y) == LF_INVALID_STRIDES);
  CHECK(status_after(y_in_q) == LF_SHARED_MEMORY);
  CHECK(status_after(y_in_v) == LF_SHARED_MEMORY);
  CHECK(status_after(folded_gk) == LF_OK); /* of the backward alone */
  function = lf_temporal_attention_backward_cpu;
  errors_of_both();
  CHECK(status_after(folded_y) == LF_OK); /* the gradient, which is read */
  CHECK(status_after(folded_gk) == LF_INVALID_STRIDES);
  CHECK(status_after(gq_in_k) == LF_SHARED_MEMORY);
  CHECK(status_after(gv_in_gy) == LF_SHARED_MEMORY);
  CHECK(status_after(gk_in_gq) == LF_SHARED_MEMORY);
  CHECK(status_after(gbias_in_gv) == LF_SHARED_MEMORY);
}

int main(void) {
  every_size();
  every_option();
  threads_change_nothing();
  pixels_stay_apart();
  empty_rows_are_zero();
  errors();
  if (failures == 0) printf("temporal_attention: all checks passed, with %d lanes\n", (int)lf_temporal_conv_lanes());
  return failures != 0;
}
