/* space_time_downsample and space_time_upsample through the C ABI against loops over the header's formulas: modes,
 * factors, dtypes, adjoints, learned resizes, strides, threads, working memory, errors. */
#include "lumiere_fast.h"

#include "check.h"
#include "numbers.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { AXES = 5, B = 0, C = 1, T = 2, H = 3, W = 4 };
enum { DOWN = 0, UP = 1, FORWARD = 0, ADJOINT = 1 };

typedef lf_status (*Entry)(const lf_space_time*, int32_t);
static const Entry ENTRIES[2][2] = {{lf_space_time_downsample_cpu, lf_space_time_downsample_adjoint_cpu},
                                    {lf_space_time_upsample_cpu, lf_space_time_upsample_adjoint_cpu}};

static lf_status workspace_of(int direction, const lf_space_time* a, int32_t threads, int64_t* bytes) {
  return direction == DOWN ? lf_space_time_downsample_workspace(a, threads, bytes)
                           : lf_space_time_upsample_workspace(a, threads, bytes);
}

static void* memory_of(int64_t bytes) {
  void* data = malloc((size_t)(bytes ? bytes : 1));
  if (!data) abort();
  memset(data, 0xff, (size_t)bytes); /* NaN in every dtype */
  return data;
}

static int64_t pick(int64_t below) {
  uniform();
  return (int64_t)(random_state >> 8) % below;
}

/* --- tensors ----------------------------------------------------------------------------------------------------- */

/* Channels last; planes; channels behind one another, the rest anyhow; everything anyhow. */
enum { LAST, PLANES, LAST_LOOSE, LOOSE, LAYOUTS };

typedef struct {
  lf_dtype dtype;
  int64_t shape[AXES];
  lf_clip clip;
  unsigned char* memory; /* no more than the elements span, so that the sanitizer sees any step outside */
  int64_t elements;      /* that it has room for */
} Tensor;

static Tensor make(lf_dtype dtype, const int64_t shape[AXES], int layout) {
  static const int last[AXES] = {B, T, H, W, C}, planes[AXES] = {B, C, T, H, W};
  Tensor x = {dtype, {0}, {NULL, {0}}, NULL, 1};
  int order[AXES];
  int64_t unit = 1, first = 0;
  memcpy(x.shape, shape, sizeof x.shape);
  memcpy(order, layout == PLANES ? planes : last, sizeof order);
  for (int i = layout == LOOSE ? AXES - 1 : layout == LAST_LOOSE ? AXES - 2 : 0; i > 0; --i) {
    const int64_t j = pick(i + 1);
    const int kept = order[i];
    order[i] = order[j], order[j] = kept;
  }
  for (int i = AXES - 1; i >= 0; --i) {
    const int axis = order[i];
    const int loose = layout == LOOSE || (layout == LAST_LOOSE && axis != C);
    int64_t* stride = &x.clip.strides[axis];
    *stride = unit * (loose ? 1 + pick(2) : 1);
    unit = *stride * shape[axis] + (loose ? pick(3) : 0);
    x.elements += (shape[axis] - 1) * *stride;
    if (loose && pick(3) == 0) first += (shape[axis] - 1) * *stride, *stride = -*stride;
  }
  if (layout == LOOSE || layout == LAST_LOOSE) {
    const int64_t lead = pick(4);
    first += lead, x.elements += lead;
  }
  x.memory = memory_of(x.elements * size_of(dtype));
  x.clip.data = x.memory + first * size_of(dtype);
  return x;
}

static int64_t place(const Tensor* x, const int64_t at[AXES]) {
  int64_t sum = 0;
  for (int i = 0; i < AXES; ++i) sum += at[i] * x->clip.strides[i];
  return sum;
}

static unsigned char* element(const Tensor* x, int64_t offset) {
  return (unsigned char*)x->clip.data + offset * size_of(x->dtype);
}

static double get(const Tensor* x, int64_t offset) { return read_element(element(x, offset), x->dtype); }

/* The next position, in no particular order of memory; 0 after the last. Start at zeros. */
static int next(int64_t at[AXES], const int64_t shape[AXES]) {
  for (int i = AXES - 1; i >= 0; --i) {
    if (++at[i] < shape[i]) return 1;
    at[i] = 0;
  }
  return 0;
}

static double draw(lf_dtype dtype) { return dtype == LF_FLOAT32 || dtype == LF_FLOAT64 ? uniform() : number(); }

static void fill(const Tensor* x) {
  int64_t at[AXES] = {0};
  do write_element(element(x, place(x, at)), x->dtype, draw(x->dtype));
  while (next(at, x->shape));
}

/* How many bytes between the elements are no longer as `make` left them. */
static int64_t touched_gaps(const Tensor* x) {
  const int64_t size = size_of(x->dtype), bytes = x->elements * size;
  unsigned char* own = memory_of(bytes);
  int64_t at[AXES] = {0}, touched = 0;
  do memset(own + (element(x, place(x, at)) - x->memory), 0, (size_t)size);
  while (next(at, x->shape));
  for (int64_t i = 0; i < bytes; ++i) touched += own[i] && x->memory[i] != 0xff;
  free(own);
  return touched;
}

static int untouched(const void* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i) {
    if (((const unsigned char*)data)[i] != 0xff) return 0;
  }
  return 1;
}

/* --- the formulas ------------------------------------------------------------------------------------------------ */

/* One axis: result i is the sum over j of parts[i * from + j] / whole times x[j]. */
typedef struct {
  int64_t to, from, whole;
  int64_t* parts;
} Taps;

static Taps taps_of(int direction, lf_resize_mode mode, int64_t coarse, int64_t f, int adjoint) {
  const int64_t fine = coarse * f;
  Taps taps = {direction == DOWN ? coarse : fine, direction == DOWN ? fine : coarse, 1, NULL};
  taps.parts = calloc((size_t)(fine * coarse), sizeof *taps.parts);
  if (!taps.parts) abort();
  for (int64_t i = 0; direction == DOWN && i < coarse; ++i) {
    int64_t* row = taps.parts + i * fine;
    if (f == 1 || mode == LF_NEAREST) row[f * i] += 1;
    else if (mode == LF_LINEAR && f % 2) row[f * i + f / 2] += 1;
    else if (mode == LF_LINEAR) taps.whole = 2, row[f * i + f / 2 - 1] += 1, row[f * i + f / 2] += 1;
    else if (mode == LF_BLUR) taps.whole = 4, row[i ? f * i - 1 : 0] += 1, row[f * i] += 2, row[f * i + 1] += 1;
    for (int64_t j = 0; f > 1 && mode == LF_AREA && j < f; ++j) taps.whole = f, row[f * i + j] += 1;
  }
  for (int64_t j = 0; direction == UP && j < fine; ++j) {
    int64_t* row = taps.parts + j * coarse;
    int64_t at = 2 * j + 1 - f; /* where on the coarse side, in parts of 2 f */
    taps.whole = mode == LF_LINEAR ? 2 * f : 1;
    if (mode == LF_NEAREST) at = j / f * taps.whole;
    if (at < 0) at = 0;
    if (at > (coarse - 1) * taps.whole) at = (coarse - 1) * taps.whole;
    row[at / taps.whole] += taps.whole - at % taps.whole;
    if (at % taps.whole) row[at / taps.whole + 1] += at % taps.whole;
  }
  if (!adjoint) return taps;
  const Taps turned = {taps.from, taps.to, taps.whole, calloc((size_t)(fine * coarse), sizeof *taps.parts)};
  if (!turned.parts) abort();
  for (int64_t i = 0; i < taps.to * taps.from; ++i) {
    turned.parts[i % taps.from * taps.to + i / taps.from] = taps.parts[i];
  }
  free(taps.parts);
  return turned;
}

/* In the arithmetic of a dtype: a result of double precision rounded to fp32 is that of fp32. */
static double arithmetic(lf_dtype dtype, double value) { return dtype == LF_FLOAT64 ? value : (double)(float)value; }

/* What a dtype makes of a number, to nearest even. */
static double rounded(lf_dtype dtype, double value) {
  int exponent, digits = dtype == LF_FLOAT16 ? 11 : 8;
  if (dtype == LF_FLOAT64) return value;
  if (dtype == LF_FLOAT32) return (float)value;
  frexp(value, &exponent);
  exponent -= digits;
  if (dtype == LF_FLOAT16 && exponent < -24) exponent = -24;
  return ldexp(nearbyint(ldexp(value, -exponent)), exponent);
}

/* Sums over W of sums over H of sums over T, each from its first term on: the order is part of the definition. */
static double gather(const Tensor* x, const Taps taps[3], const int64_t at[3], int64_t offset, int axis, lf_dtype in,
                     int absolute) {
  if (axis < 0) return absolute ? fabs(get(x, offset)) : get(x, offset);
  double sum = 0;
  int terms = 0;
  for (int64_t j = 0; j < taps[axis].from; ++j) {
    const int64_t part = taps[axis].parts[at[axis] * taps[axis].from + j];
    if (part == 0) continue;
    const double weight = arithmetic(in, (double)part / (double)taps[axis].whole);
    const double inner = gather(x, taps, at, offset + j * x->clip.strides[T + axis], axis - 1, in, absolute);
    const double term = arithmetic(in, weight * inner);
    sum = terms++ ? arithmetic(in, sum + term) : term;
  }
  return sum;
}

/* --- fixed taps -------------------------------------------------------------------------------------------------- */

typedef struct {
  int direction, adjoint;
  lf_dtype dtype;
  lf_resize_mode mode;
  int64_t batch, channels, coarse[3], factor[3];
} Case;

static void shapes_of(const Case* c, int64_t x[AXES], int64_t y[AXES]) {
  x[B] = y[B] = c->batch, x[C] = y[C] = c->channels;
  for (int i = 0; i < 3; ++i) {
    const int64_t fine = c->coarse[i] * c->factor[i];
    x[T + i] = c->direction == DOWN ? fine : c->coarse[i];
    y[T + i] = c->direction == DOWN ? c->coarse[i] : fine;
  }
}

static lf_space_time arguments_of(const Case* c, const Tensor* x, const Tensor* y) {
  lf_space_time a;
  memset(&a, 0, sizeof a);
  a.dtype = c->dtype, a.mode = c->mode;
  a.batch = x->shape[B], a.channels = x->shape[C];
  a.frames = x->shape[T], a.height = x->shape[H], a.width = x->shape[W];
  memcpy(a.factor, c->factor, sizeof a.factor);
  a.x = x->clip, a.y = y->clip;
  return a;
}

static void fixed(const Case* c, int from_layout, int to_layout, int32_t threads) {
  int64_t shapes[2][AXES], at[AXES] = {0}, wrong = 0, bytes = -1;
  shapes_of(c, shapes[0], shapes[1]);
  const Tensor from = make(c->dtype, shapes[c->adjoint], from_layout);
  const Tensor to = make(c->dtype, shapes[!c->adjoint], to_layout);
  const lf_space_time a = arguments_of(c, c->adjoint ? &to : &from, c->adjoint ? &from : &to);
  Taps taps[3];
  fill(&from);
  for (int i = 0; i < 3; ++i) taps[i] = taps_of(c->direction, c->mode, c->coarse[i], c->factor[i], c->adjoint);
  CHECK(workspace_of(c->direction, &a, threads, &bytes) == LF_OK && bytes == 0);
  CHECK(ENTRIES[c->direction][c->adjoint](&a, threads) == LF_OK);
  do {
    const int64_t start = at[B] * from.clip.strides[B] + at[C] * from.clip.strides[C];
    const double expected = rounded(c->dtype, gather(&from, taps, at + T, start, 2, c->dtype, 0));
    wrong += !(get(&to, place(&to, at)) == expected);
  } while (next(at, to.shape));
  if (wrong) {
    fprintf(stderr, "%s%s, mode %d, dtype %d, layouts %d %d, %d channels, (%d %d %d) by (%d %d %d): %d wrong\n",
            c->direction == DOWN ? "down" : "up", c->adjoint ? ", adjoint" : "", (int)c->mode, (int)c->dtype,
            from_layout, to_layout, (int)c->channels, (int)c->coarse[0], (int)c->coarse[1], (int)c->coarse[2],
            (int)c->factor[0], (int)c->factor[1], (int)c->factor[2], (int)wrong);
  }
  CHECK(wrong == 0);
  CHECK(touched_gaps(&to) == 0);
  for (int i = 0; i < 3; ++i) free(taps[i].parts);
  free(from.memory), free(to.memory);
}

static const int64_t FACTORS[] = {1, 2, 3, 4, 5, 7}, CHANNELS[] = {1, 3, 8, 31, 64};
enum { NUM_FACTORS = 6, NUM_CHANNELS = 5, MOST = 4000 };

/* Each op, mode, direction and dtype, with shapes, factors and strides by chance. */
static void every_mode(void) {
  for (int kind = 0; kind < 6 * 2 * 4; ++kind) {
    const int mode = kind % 6, direction = mode < 4 ? DOWN : UP;
    for (int trial = 0; trial < 36; ++trial) {
      Case c = {direction, kind / 6 % 2, kind / 12, direction == DOWN ? mode : mode - 4, 1 + pick(2),
                CHANNELS[trial % NUM_CHANNELS], {0}, {0}};
      int64_t elements;
      do {
        elements = c.batch * c.channels;
        for (int i = 0; i < 3; ++i) {
          c.coarse[i] = 1 + pick(i == 2 ? 9 : 4);
          c.factor[i] = trial < NUM_FACTORS && i == 2 ? FACTORS[trial] : FACTORS[pick(NUM_FACTORS)];
          elements *= c.coarse[i] * c.factor[i];
        }
      } while (elements > MOST * (c.channels > 8 ? 4 : 1));
      fixed(&c, trial % LAYOUTS, trial % 3 ? trial % LAYOUTS : (int)pick(LAYOUTS), 1 + trial % 2);
    }
  }
}

/* Widths and channels around the vectors of any processor, their groups, and the parts of a row. */
static void odd_sizes(void) {
  static const int64_t channels[] = {2, 4, 7, 15, 16, 17, 31, 33, 47, 64, 65, 79, 128, 130, 200};
  for (int kind = 0; kind < 6 * 2 * 4; ++kind) {
    const int mode = kind % 6, direction = mode < 4 ? DOWN : UP;
    for (int64_t width = 1; width <= 9; ++width) {
      const int64_t c = channels[(size_t)(width + kind) % (sizeof channels / sizeof *channels)];
      const Case one = {direction, kind / 6 % 2, kind / 12, direction == DOWN ? mode : mode - 4, 1, c,
                        {1 + width % 2, 1 + kind % 2, width}, {1 + width % 3, 1 + (width + kind) % 2, 1 + width % 4}};
      fixed(&one, width % LAYOUTS, width % 2 ? LAST : LAST_LOOSE, 1);
    }
    const Case wide = {direction, kind / 6 % 2, kind / 12, direction == DOWN ? mode : mode - 4, 1, 144 + kind % 3,
                       {1, 1, 23}, {1, 2, 2 + kind % 3}};
    fixed(&wide, LAST, LAST, 1);
  }
}

/* Results so large that they are written past the caches are those of memory where they cannot be. */
static void large_results(void) {
  for (int kind = 0; kind < 4 * 4; ++kind) { /* nearest and linear up, the adjoints of linear and nearest down */
    const int64_t channels = 64 * 4 / (kind / 4 == LF_FLOAT64 ? 8 : kind / 4 == LF_FLOAT32 ? 4 : 2);
    const Case c = {kind % 4 < 2 ? UP : DOWN, kind % 4 >= 2, kind / 4, kind % 2, 1, channels, {8, 32, 33}, {2, 2, 2}};
    int64_t shapes[2][AXES];
    shapes_of(&c, shapes[0], shapes[1]);
    const Tensor from = make(c.dtype, shapes[c.adjoint], LAST), to = make(c.dtype, shapes[!c.adjoint], LAST);
    const int64_t bytes = to.elements * size_of(c.dtype);
    unsigned char *memory = memory_of(2 * (bytes + 128)), *line = memory + (64 - (uintptr_t)memory % 64);
    unsigned char* off = line + bytes + size_of(c.dtype) + (64 - bytes % 64) % 64;
    Tensor aligned = to, shifted = to;
    aligned.clip.data = line, shifted.clip.data = off;
    fill(&from);
    for (int i = 0; i < 2; ++i) {
      const Tensor* result = i ? &shifted : &aligned;
      const lf_space_time a = arguments_of(&c, c.adjoint ? result : &from, c.adjoint ? &from : result);
      CHECK(ENTRIES[c.direction][c.adjoint](&a, 1 + i) == LF_OK);
    }
    CHECK(memcmp(line, off, (size_t)bytes) == 0);
    free(memory), free(from.memory), free(to.memory);
  }
}

/* Rows, and pixels, longer than any scratch memory. */
static void long_rows(void) {
  static const int64_t sizes[][2] = {{64, 150}, {9000, 2}, {3, 5000}, {1, 9001}};
  for (int kind = 0; kind < 6 * 2; ++kind) {
    const int mode = kind % 6, direction = mode < 4 ? DOWN : UP;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; ++i) {
      const Case c = {direction, kind / 6, i == 1 ? LF_FLOAT16 : LF_FLOAT32, direction == DOWN ? mode : mode - 4, 1,
                      sizes[i][0], {1, 1, sizes[i][1]}, {1, 2, 1 + (int64_t)(i != 1)}};
      if (c.coarse[2] < 1000) fixed(&c, LAST, LAST, 1), fixed(&c, LAST_LOOSE, LAST_LOOSE, 1);
    }
  }
}

/* Factors beyond any table of taps. */
static void large_factors(void) {
  for (int kind = 0; kind < 6 * 2; ++kind) {
    const int mode = kind % 6, direction = mode < 4 ? DOWN : UP;
    for (int axis = 0; axis < 3; ++axis) {
      for (int64_t f = 63; f <= 66; ++f) {
        Case c = {direction, kind / 6, LF_FLOAT32, direction == DOWN ? mode : mode - 4, 1, axis == 1 ? 5 : 2,
                  {2, 2, 3}, {1, 2, 2}};
        c.factor[axis] = f;
        fixed(&c, LAST, LAST, 1);
      }
    }
  }
}

static void in_turn(void (*work)(void*), void* data, uint32_t num_threads, uint32_t flags) {
  CHECK(flags == 0);
  for (uint32_t i = 0; i < num_threads; ++i) work(data);
}

/* Bit for bit the same with any number of threads, the library's own or borrowed ones. */
static void threads_change_nothing(void) {
  static const Case cases[] = {
      {DOWN, FORWARD, LF_FLOAT32, LF_AREA, 1, 20, {6, 20, 24}, {3, 3, 3}},
      {DOWN, ADJOINT, LF_FLOAT16, LF_BLUR, 1, 20, {6, 20, 24}, {2, 3, 3}},
      {UP, FORWARD, LF_FLOAT32, LF_LINEAR, 2, 16, {3, 20, 24}, {2, 3, 3}},
      {UP, FORWARD, LF_BFLOAT16, LF_NEAREST, 1, 16, {6, 20, 24}, {2, 3, 3}},
      {UP, ADJOINT, LF_FLOAT32, LF_LINEAR, 1, 24, {6, 40, 48}, {1, 2, 2}},
  };
  for (size_t i = 0; i < 2 * (sizeof cases / sizeof *cases); ++i) {
    const Case* c = &cases[i / 2];
    int64_t shapes[2][AXES];
    shapes_of(c, shapes[0], shapes[1]);
    const Tensor from = make(c->dtype, shapes[c->adjoint], i % 2 ? PLANES : LAST);
    const Tensor to = make(c->dtype, shapes[!c->adjoint], i % 2 ? PLANES : LAST);
    const lf_space_time a = arguments_of(c, c->adjoint ? &to : &from, c->adjoint ? &from : &to);
    const size_t bytes = (size_t)(to.elements * size_of(c->dtype));
    unsigned char* first = memory_of((int64_t)bytes);
    fill(&from);
    CHECK(ENTRIES[c->direction][c->adjoint](&a, 1) == LF_OK);
    memcpy(first, to.memory, bytes);
    for (int32_t threads = 2; threads <= 5; ++threads) {
      if (threads == 4) lf_borrow_threads(in_turn);
      memset(to.memory, 0xff, bytes);
      CHECK(ENTRIES[c->direction][c->adjoint](&a, threads) == LF_OK);
      CHECK(memcmp(to.memory, first, bytes) == 0);
    }
    lf_borrow_threads(NULL);
    free(first), free(from.memory), free(to.memory);
  }
}

static double dot(const Tensor* a, const Tensor* b) {
  int64_t at[AXES] = {0};
  double sum = 0;
  do sum += get(a, place(a, at)) * get(b, place(b, at));
  while (next(at, a->shape));
  return sum;
}

/* <A x, y> = <x, A* y>. */
static void adjoints_are_adjoint(void) {
  for (int mode = 0; mode < 6; ++mode) {
    const int direction = mode < 4 ? DOWN : UP;
    for (int i = 0; i < 12; ++i) {
      const Case c = {direction, 0, LF_FLOAT64, direction == DOWN ? mode : mode - 4, 1, 3, {1 + i % 2, 2, 1 + i % 5},
                      {FACTORS[pick(NUM_FACTORS)], FACTORS[pick(NUM_FACTORS)], FACTORS[i % NUM_FACTORS]}};
      int64_t x_shape[AXES], y_shape[AXES];
      shapes_of(&c, x_shape, y_shape);
      const Tensor x = make(c.dtype, x_shape, LAST), back = make(c.dtype, x_shape, LAST);
      const Tensor y = make(c.dtype, y_shape, LAST), there = make(c.dtype, y_shape, LAST);
      fill(&x), fill(&y);
      const lf_space_time forward = arguments_of(&c, &x, &there), adjoint = arguments_of(&c, &back, &y);
      CHECK(ENTRIES[direction][FORWARD](&forward, 1) == LF_OK);
      CHECK(ENTRIES[direction][ADJOINT](&adjoint, 1) == LF_OK);
      CHECK(fabs(dot(&there, &y) - dot(&x, &back)) < 1e-10);
      free(x.memory), free(back.memory), free(y.memory), free(there.memory);
    }
  }
}

/* --- learned resizes --------------------------------------------------------------------------------------------- */

typedef struct {
  int direction;
  lf_dtype dtype;
  lf_resize_mode mode;
  int64_t batch, in, out, frames, coarse[2], factor[3], taps;
  int with_bias, identity, layout, out_layout;
} Learned;

enum { GUARD = 64 }; /* bytes behind the working memory, and what it starts at a multiple of */

/* A call and all that it points to. */
typedef struct {
  lf_space_time a;
  Tensor x, y;
  unsigned char *weight, *bias, *memory;
  int64_t bytes;
} Call;

static Call make_call(const Learned* c, int32_t threads) {
  const int64_t t = c->factor[0], size = size_of(c->dtype);
  const int64_t out_frames = c->direction == UP ? c->frames * t : (c->frames + t - 1) / t;
  int64_t shapes[2][AXES] = {{c->batch, c->in, c->frames, 0, 0}, {c->batch, c->out, out_frames, 0, 0}};
  for (int i = 0; i < 2; ++i) {
    shapes[c->direction][H + i] = c->coarse[i] * c->factor[1 + i];
    shapes[!c->direction][H + i] = c->coarse[i];
    if (c->direction == DOWN) shapes[0][H + i] = c->coarse[i] * c->factor[1 + i], shapes[1][H + i] = c->coarse[i];
  }
  Call call;
  const Case numbers = {c->direction, 0, c->dtype, c->mode, c->batch, c->in, {0}, {t, c->factor[1], c->factor[2]}};
  call.x = make(c->dtype, shapes[0], c->layout);
  call.y = make(c->dtype, shapes[1], c->out_layout);
  fill(&call.x);
  call.a = arguments_of(&numbers, &call.x, &call.y);
  call.a.channels_out = c->out, call.a.taps = c->taps;
  const int64_t orders[3][3] = {{c->in * c->taps, c->taps, 1}, {1, c->out, c->out * c->in}, {c->in, 1, c->in * c->out}};
  memcpy(call.a.weight_strides, orders[pick(3)], sizeof orders[0]);
  call.weight = memory_of(c->out * c->in * c->taps * size);
  call.a.weight = call.weight;
  for (int64_t i = 0; i < c->out * c->in * c->taps; ++i) {
    const int64_t *s = call.a.weight_strides, tap = i % c->taps, in = i / c->taps % c->in, out = i / c->taps / c->in;
    const double identity = in == out && tap == c->taps / 2;
    write_element(call.weight + (out * s[0] + in * s[1] + tap * s[2]) * size, c->dtype,
                  c->identity ? identity : draw(c->dtype));
  }
  call.a.bias_stride = 1 + pick(2);
  call.bias = memory_of(((c->out - 1) * call.a.bias_stride + 1) * size);
  for (int64_t o = 0; o < c->out; ++o) {
    write_element(call.bias + o * call.a.bias_stride * size, c->dtype, draw(c->dtype));
  }
  call.a.bias = c->with_bias ? call.bias : NULL;
  call.bytes = -1;
  CHECK(workspace_of(c->direction, &call.a, threads, &call.bytes) == LF_OK && call.bytes >= 0);
  call.memory = memory_of(call.bytes + 2 * GUARD);
  call.a.workspace = call.memory + (GUARD - (uintptr_t)call.memory % GUARD) % GUARD;
  call.a.workspace_size = call.bytes;
  return call;
}

static void release(const Call* call) {
  free(call->x.memory), free(call->y.memory), free(call->weight), free(call->bias), free(call->memory);
}

/* Result and magnitude of the terms it is made of: fixed taps in space, then the sum over taps and channels. */
static double learned_at(const Learned* c, const Call* call, const Taps taps[3], const int64_t at[AXES], double* size) {
  const lf_space_time* a = &call->a;
  const Tensor *x = &call->x;
  const int64_t bytes = size_of(c->dtype), t = c->factor[0];
  double sum = a->bias ? read_element(call->bias + at[C] * a->bias_stride * bytes, c->dtype) : 0;
  *size = fabs(sum);
  for (int64_t k = 0; k < c->taps; ++k) {
    const int64_t place = (c->direction == DOWN ? t * at[T] : at[T]) - c->taps / 2 + k;
    if (place < 0 || place >= (c->direction == DOWN ? c->frames : t * c->frames)) continue;
    const int64_t to[3] = {c->direction == DOWN ? place : place / t, at[H], at[W]};
    for (int64_t i = 0; i < c->in; ++i) {
      const int64_t offset = at[C] * a->weight_strides[0] + i * a->weight_strides[1] + k * a->weight_strides[2];
      const double w = read_element(call->weight + offset * bytes, c->dtype);
      const int64_t start = at[B] * x->clip.strides[B] + i * x->clip.strides[C];
      if (w == 0) continue;
      sum += w * gather(x, taps, to, start, 2, LF_FLOAT64, 0);
      *size += fabs(w) * gather(x, taps, to, start, 2, LF_FLOAT64, 1);
    }
  }
  return sum;
}

static void learned(const Learned* c, int32_t threads) {
  const Call call = make_call(c, threads);
  const int in_space = c->factor[1] * c->factor[2] > 1;
  const double unit = c->dtype == LF_BFLOAT16 ? 1.0 / 256 : c->dtype == LF_FLOAT16 ? 1.0 / 2048 : 0;
  const Taps taps[3] = {taps_of(DOWN, LF_NEAREST, c->frames, 1, 0),
                        taps_of(c->direction, c->mode, c->coarse[0], c->factor[1], 0),
                        taps_of(c->direction, c->mode, c->coarse[1], c->factor[2], 0)};
  int64_t at[AXES] = {0}, wrong = 0;
  CHECK(ENTRIES[c->direction][FORWARD](&call.a, threads) == LF_OK);
  do {
    double size;
    const double expected = learned_at(c, &call, taps, at, &size), got = get(&call.y, place(&call.y, at));
    const double allowed = 1e-5 * size + 1.01 * unit * (fabs(expected) + in_space * size);
    wrong += c->identity && c->mode == LF_NEAREST ? !(got == expected) : !(fabs(got - expected) <= allowed);
  } while (next(at, call.y.shape));
  if (wrong) {
    fprintf(stderr, "learned %s, mode %d, dtype %d, %d to %d channels, %d frames by %d, %d taps, layouts %d %d: %d\n",
            c->direction == DOWN ? "down" : "up", (int)c->mode, (int)c->dtype, (int)c->in, (int)c->out, (int)c->frames,
            (int)c->factor[0], (int)c->taps, c->layout, c->out_layout, (int)wrong);
  }
  CHECK(wrong == 0);
  CHECK(touched_gaps(&call.y) == 0);
  CHECK(untouched((unsigned char*)call.a.workspace + call.bytes, GUARD));
  for (int i = 0; i < 3; ++i) free(taps[i].parts);
  release(&call);
}

static void every_learned(void) {
  static const lf_dtype dtypes[] = {LF_FLOAT32, LF_FLOAT16, LF_BFLOAT16};
  for (int trial = 0; trial < 240; ++trial) {
    const int direction = trial % 2, small = trial % 3 != 0;
    const int64_t f = trial / 2 % 2 ? 1 : 1 + pick(3);
    Learned c = {direction, dtypes[trial / 4 % 3], (lf_resize_mode)pick(direction == DOWN ? 4 : 2), 1 + pick(2),
                 CHANNELS[pick(small ? 3 : 5)], CHANNELS[pick(small ? 3 : 5)], 1 + pick(9), {1 + pick(3), 1 + pick(5)},
                 {1 + trial / 6 % 4, f, f == 1 ? 1 : 1 + pick(3)}, 1 + 2 * pick(3), trial % 5 != 0, trial % 4 == 1,
                 trial / 2 % LAYOUTS, trial % 7 ? trial / 2 % LAYOUTS : (int)pick(LAYOUTS)};
    if (c.identity) c.with_bias = 0;
    if (c.in * c.out > 1000) c.batch = 1, c.frames = 1 + c.frames / 2, c.coarse[0] = 1;
    learned(&c, 1 + trial % 3);
  }
}

/* Of many pixels and channels: what engines take in blocks. The same bits with any number of threads. */
static void large_learned(void) {
  for (int i = 0; i < 8; ++i) {
    const Learned c = {i % 2, i / 2 % 2 ? LF_BFLOAT16 : LF_FLOAT32, LF_NEAREST, 1, 72, 40, 7, {12, 27}, 
                       {2, 1, 1 + i / 4},
                       3, 1, 0, LAST, LAST};
    const Call call = make_call(&c, 5);
    const size_t bytes = (size_t)(call.y.elements * size_of(c.dtype));
    unsigned char* first = memory_of((int64_t)bytes);
    for (int32_t threads = 1; threads <= 5; ++threads) {
      if (threads == 4) lf_borrow_threads(in_turn);
      memset(call.y.memory, 0xff, bytes);
      CHECK(ENTRIES[c.direction][FORWARD](&call.a, threads) == LF_OK);
      if (threads == 1) memcpy(first, call.y.memory, bytes);
      CHECK(memcmp(first, call.y.memory, bytes) == 0);
    }
    lf_borrow_threads(NULL);
    const Taps taps[3] = {taps_of(DOWN, LF_NEAREST, 7, 1, 0), taps_of(c.direction, LF_NEAREST, 12, 1, 0),
                          taps_of(c.direction, LF_NEAREST, 27, c.factor[2], 0)};
    for (int sample = 0; sample < 2000; ++sample) {
      int64_t at[AXES];
      double size;
      for (int axis = 0; axis < AXES; ++axis) at[axis] = pick(call.y.shape[axis]);
      const double expected = learned_at(&c, &call, taps, at, &size), got = get(&call.y, place(&call.y, at));
      CHECK(fabs(got - expected) <= 1e-5 * size + (c.dtype == LF_BFLOAT16) * 1.01 / 256 * (fabs(expected) + size));
    }
    for (int axis = 0; axis < 3; ++axis) free(taps[axis].parts);
    free(first);
    release(&call);
  }
}

/* Clips of many and few frames, in several pieces and panels, whose convolution is split up in another way than the
 * formula: sums that two outputs share, some of them carried from frame to frame. */
static void filtered_learned(void) {
  static const lf_dtype dtypes[] = {LF_FLOAT32, LF_FLOAT16, LF_BFLOAT16};
  static const int64_t channels[][2] = {{24, 24}, {31, 31}, {64, 64}, {40, 72}, {33, 24}, {70, 70}};
  for (int trial = 0; trial < 60; ++trial) {
    const int64_t *c = channels[trial % 6], in = c[0], out = c[1], frames = 1 + trial / 2 % 9;
    const int identity = trial % 4 < 3 && in == out;
    const Learned call = {trial / 6 % 2, dtypes[trial % 5 % 3], LF_NEAREST, 1 + (trial % 11 == 0), in, out, frames,
                          {trial % 3 ? 1 : 3, trial % 4 ? 11 : 18}, {2 + (trial % 7 == 0) + 2 * (trial % 10 == 0), 1, 1}, 3,
                          !identity, identity, trial / 3 % LAYOUTS, trial / 5 % LAYOUTS};
    learned(&call, 1 + trial % 3);
  }
}

/* Frame of x that tap k of output i falls on, or -1. */
static int64_t source_of(const Learned* c, int64_t i, int64_t k) {
  const int64_t t = c->factor[0], place = (c->direction == DOWN ? t * i : i) - c->taps / 2 + k;
  if (place < 0 || place >= (c->direction == DOWN ? c->frames : t * c->frames)) return -1;
  return c->direction == DOWN ? place : place / t;
}

/* What the header says of minimal filtering: an error is relative to the frames that an output takes, each times all
 * its taps; and none to other frames, however large they are. */
static double filtered_size(const Learned* c, const Call* call, const int64_t at[AXES]) {
  const lf_space_time* a = &call->a;
  double size = fabs(read_element(call->bias + at[C] * a->bias_stride * 4, LF_FLOAT32));
  for (int64_t i = 0; i < c->in; ++i) {
    double taps = 0, frames = 0;
    for (int64_t k = 0; k < c->taps; ++k) {
      const int64_t offset = at[C] * a->weight_strides[0] + i * a->weight_strides[1] + k * a->weight_strides[2];
      const int64_t from[AXES] = {at[B], i, source_of(c, at[T], k), at[H], at[W]};
      taps += fabs(read_element(call->weight + offset * 4, LF_FLOAT32));
      if (from[T] >= 0) frames += fabs(get(&call->x, place(&call->x, from)));
    }
    size += taps * frames;
  }
  return size;
}

static int takes_frame(const Learned* c, int64_t i, int64_t frame) {
  for (int64_t k = 0; k < c->taps; ++k) {
    if (source_of(c, i, k) == frame) return 1;
  }
  return 0;
}

/* One outer tap is 0 in every other channel, and the other in the rest; one frame is so many times the others. */
static void one_sided(int direction, int64_t t, int64_t loud, double ratio) {
  const Learned c = {direction, LF_FLOAT32, LF_NEAREST, 1, 40, 36, 9, {1, 5}, {t, 1, 1}, 3, 1, 0, LAST, LAST};
  const Call call = make_call(&c, 1);
  const Taps taps[3] = {taps_of(DOWN, LF_NEAREST, c.frames, 1, 0), taps_of(direction, LF_NEAREST, 1, 1, 0),
                        taps_of(direction, LF_NEAREST, 5, 1, 0)};
  int64_t at[AXES] = {0}, wrong = 0;
  for (int64_t o = 0; o < c.out; ++o) {
    for (int64_t i = 0; i < c.in; ++i) {
      const int64_t* s = call.a.weight_strides;
      write_element(call.weight + (o * s[0] + i * s[1] + o % 2 * 2 * s[2]) * 4, LF_FLOAT32, 0);
    }
  }
  do {
    const int64_t x = place(&call.x, at);
    if (at[T] == loud) write_element(element(&call.x, x), LF_FLOAT32, ratio * get(&call.x, x));
  } while (next(at, call.x.shape));
  CHECK(ENTRIES[direction][FORWARD](&call.a, 1) == LF_OK);
  do {
    double size;
    const double got = get(&call.y, place(&call.y, at));
    if (isinf(ratio) && takes_frame(&c, at[T], loud)) continue;
    const double expected = learned_at(&c, &call, taps, at, &size);
    wrong += !(fabs(got - expected) <= 1e-6 * filtered_size(&c, &call, at));
  } while (next(at, call.y.shape));
  if (wrong) fprintf(stderr, "one-sided, %d by %d, frame %d: %d wrong\n", direction, (int)t, (int)loud, (int)wrong);
  CHECK(wrong == 0);
  for (int axis = 0; axis < 3; ++axis) free(taps[axis].parts);
  release(&call);
}

static void one_sided_learned(void) {
  static const double ratios[] = {1, 1e4, 1e8, HUGE_VAL};
  for (int i = 0; i < 2 * 3 * 9 * 4; ++i) one_sided(i % 2, 1 + i / 2 % 3, i / 6 % 9, ratios[i / 54]);
}

/* --- what is refused --------------------------------------------------------------------------------------------- */

typedef void (*Change)(lf_space_time*);

/* What a call says that is good but for one change; it may have written nothing. */
static lf_status status_after(int direction, int adjoint, int with_weight, Change change) {
  const Learned c = {direction, LF_FLOAT32, LF_LINEAR, 1, 4, 6, 4, {2, 3}, {2, 2, 2}, 3, 1, 0, LAST, LAST};
  Learned alike = c;
  if (!with_weight) alike.out = 4;
  const Call call = make_call(&alike, 1);
  const Tensor *out = adjoint ? &call.x : &call.y, *in = adjoint ? &call.y : &call.x;
  lf_space_time a = call.a;
  if (!with_weight) a.weight = NULL, a.bias = NULL, a.workspace = NULL, a.workspace_size = 0;
  fill(in);
  memset(out->memory, 0xff, (size_t)(4 * out->elements));
  change(&a);
  const lf_status status = ENTRIES[direction][adjoint](&a, 1);
  if (status != LF_OK) {
    CHECK(untouched(out->memory, 4 * out->elements));
    CHECK(untouched(call.memory, call.bytes + 2 * GUARD));
  }
  release(&call);
  return status;
}

static void leave(lf_space_time* a) { (void)a; }
static void no_batch(lf_space_time* a) {
  a->batch = 0, a->x.data = a->y.data = a->workspace = NULL;
}
static void take_x(lf_space_time* a) { a->x.data = NULL; }
static void take_y(lf_space_time* a) { a->y.data = NULL; }
static void negative_mode(lf_space_time* a) { a->mode = -1; }
static void unknown_mode(lf_space_time* a) { a->mode = 4; }
static void area(lf_space_time* a) { a->mode = LF_AREA; }
static void blur(lf_space_time* a) { a->mode = LF_BLUR; }
static void unknown_dtype(lf_space_time* a) { a->dtype = 4; }
static void full_precision(lf_space_time* a) { a->dtype = LF_FLOAT64; }
static void no_factor(lf_space_time* a) { a->factor[1] = 0; }
static void negative_factor(lf_space_time* a) { a->factor[0] = -2; }
static void unfit_height(lf_space_time* a) { a->factor[1] = 3; }
static void unfit_frames(lf_space_time* a) { a->factor[0] = 3; }
static void huge_factor(lf_space_time* a) { a->factor[2] = INT64_MAX; }
static void huge_clip(lf_space_time* a) { a->factor[0] = a->factor[1] = a->factor[2] = 1 << 20; }
static void huge_sizes(lf_space_time* a) { a->height = a->width = (int64_t)1 << 31; }
static void as_many_as_int64(lf_space_time* a) { a->channels = INT64_MAX; }
static void negative_batch(lf_space_time* a) { a->batch = -1; }
static void no_channels(lf_space_time* a) { a->channels = 0; }
static void no_frames(lf_space_time* a) { a->frames = 0; }
static void no_height(lf_space_time* a) { a->height = 0; }
static void no_width(lf_space_time* a) { a->width = 0; }
static void even_taps(lf_space_time* a) { a->taps = 2; }
static void no_taps(lf_space_time* a) { a->taps = 0; }
static void negative_taps(lf_space_time* a) { a->taps = -1; }
static void huge_taps(lf_space_time* a) { a->taps = INT64_MAX; }
static void no_channels_out(lf_space_time* a) { a->channels_out = 0; }
static void huge_channels_out(lf_space_time* a) { a->channels_out = INT64_MAX / 8; }
static void folded_x(lf_space_time* a) { a->x.strides[W] = 0; }
static void folded_y(lf_space_time* a) { a->y.strides[T] = 1; }
static void far_x(lf_space_time* a) { a->x.strides[T] = INT64_MAX / 4; }
static void far_y(lf_space_time* a) { a->y.strides[T] = INT64_MAX / 4; }
static void furthest_x(lf_space_time* a) { a->x.strides[H] = INT64_MIN; }
static void furthest_y(lf_space_time* a) { a->y.strides[H] = INT64_MIN; }
static void far_weight(lf_space_time* a) { a->weight_strides[2] = INT64_MAX / 4; }
/* Fewer bytes away than int64 counts, but below address 0, or past the last. */
static void x_below_memory(lf_space_time* a) { a->x.strides[H] = -((int64_t)1 << 57); }
static void y_below_memory(lf_space_time* a) { a->y.strides[H] = -((int64_t)1 << 57); }
static void x_past_memory(lf_space_time* a) { a->x.data = (void*)(UINTPTR_MAX - 63); }
static void y_past_memory(lf_space_time* a) { a->y.data = (void*)(UINTPTR_MAX - 63); }
static void weight_below_memory(lf_space_time* a) { a->weight_strides[2] = -((int64_t)1 << 57); }
static void bias_below_memory(lf_space_time* a) { a->bias_stride = -((int64_t)1 << 57); }
static void far_bias(lf_space_time* a) { a->bias_stride = INT64_MIN; }
static void one_memory(lf_space_time* a) { a->y.data = a->x.data; }
static void y_behind_x(lf_space_time* a) { a->y.data = (float*)a->x.data + 4; }
static void x_behind_y(lf_space_time* a) { a->x.data = (float*)a->y.data + 4; }
static void weight_in_y(lf_space_time* a) { a->weight = (float*)a->y.data + 5; }
static void bias_in_y(lf_space_time* a) { a->bias = (float*)a->y.data + 5; }
static void take_workspace(lf_space_time* a) { a->workspace = NULL; }
static void small_workspace(lf_space_time* a) { --a->workspace_size; }
static void negative_workspace(lf_space_time* a) { a->workspace_size = INT64_MIN; }
static void x_in_workspace(lf_space_time* a) {
  a->x.data = a->workspace;
  memset(a->x.strides, 0, sizeof a->x.strides);
}
static void weight_in_workspace(lf_space_time* a) {
  a->weight = a->workspace, a->weight_strides[0] = a->weight_strides[1] = a->weight_strides[2] = 0;
}
static void bias_in_workspace(lf_space_time* a) { a->bias = a->workspace, a->bias_stride = 0; }
static void y_over_workspace(lf_space_time* a) {
  a->workspace = (char*)a->y.data + (GUARD - (uintptr_t)a->y.data % GUARD) % GUARD;
}
static void x_over_workspace(lf_space_time* a) {
  a->workspace = (char*)a->x.data + (GUARD - (uintptr_t)a->x.data % GUARD) % GUARD;
}
static void shifted_workspace(lf_space_time* a) { a->workspace = (char*)a->workspace + 32; }

static void errors(void) {
  static const struct {
    Change change;
    lf_status status;
  } always[] = {
      {take_x, LF_INVALID_ARGUMENT},      {take_y, LF_INVALID_ARGUMENT},     {negative_mode, LF_INVALID_ARGUMENT},
      {unknown_mode, LF_INVALID_ARGUMENT}, {unknown_dtype, LF_UNSUPPORTED_DTYPE}, {no_factor, LF_INVALID_SHAPE},
      {negative_factor, LF_INVALID_SHAPE}, {huge_factor, LF_INVALID_SHAPE},  {huge_clip, LF_INVALID_SHAPE},
      {huge_sizes, LF_INVALID_SHAPE},     {as_many_as_int64, LF_INVALID_SHAPE}, {negative_batch, LF_INVALID_SHAPE},
      {no_channels, LF_INVALID_SHAPE},    {no_frames, LF_INVALID_SHAPE},     {no_height, LF_INVALID_SHAPE},
      {no_width, LF_INVALID_SHAPE},       {far_x, LF_INVALID_STRIDES},       {far_y, LF_INVALID_STRIDES},
      {furthest_x, LF_INVALID_STRIDES},   {furthest_y, LF_INVALID_STRIDES},  {one_memory, LF_SHARED_MEMORY},
      {y_behind_x, LF_SHARED_MEMORY},     {x_behind_y, LF_SHARED_MEMORY},    {leave, LF_OK},
      {x_below_memory, LF_INVALID_STRIDES}, {y_below_memory, LF_INVALID_STRIDES},
      {x_past_memory, LF_INVALID_STRIDES}, {y_past_memory, LF_INVALID_STRIDES},
      {no_batch, LF_OK},
  }, learning[] = {
      {full_precision, LF_UNSUPPORTED_DTYPE}, {even_taps, LF_INVALID_SHAPE},  {no_taps, LF_INVALID_SHAPE},
      {negative_taps, LF_INVALID_SHAPE},  {huge_taps, LF_INVALID_SHAPE},     {no_channels_out, LF_INVALID_SHAPE},
      {huge_channels_out, LF_INVALID_SHAPE}, {far_weight, LF_INVALID_STRIDES}, {far_bias, LF_INVALID_STRIDES},
      {weight_below_memory, LF_INVALID_STRIDES}, {bias_below_memory, LF_INVALID_STRIDES},
      {weight_in_y, LF_SHARED_MEMORY},    {bias_in_y, LF_SHARED_MEMORY},     {take_workspace, LF_NO_WORKSPACE},
      {small_workspace, LF_NO_WORKSPACE}, {negative_workspace, LF_NO_WORKSPACE},
      {x_in_workspace, LF_SHARED_MEMORY}, {weight_in_workspace, LF_SHARED_MEMORY},
      {bias_in_workspace, LF_SHARED_MEMORY}, {y_over_workspace, LF_SHARED_MEMORY},
      {x_over_workspace, LF_SHARED_MEMORY}, {shifted_workspace, LF_NO_WORKSPACE}, {folded_y, LF_INVALID_STRIDES},
      {folded_x, LF_OK},
  };
  for (int direction = DOWN; direction <= UP; ++direction) {
    for (size_t i = 0; i < sizeof always / sizeof *always; ++i) {
      for (int kind = 0; kind < 3; ++kind) { /* forward, adjoint, learned */
        const lf_status status = status_after(direction, kind == 1, kind == 2, always[i].change);
        if (status != always[i].status) fprintf(stderr, "%d %d %d: status %d\n", direction, kind, (int)i, (int)status);
        CHECK(status == always[i].status);
      }
    }
    for (size_t i = 0; i < sizeof learning / sizeof *learning; ++i) {
      const lf_status status = status_after(direction, FORWARD, 1, learning[i].change);
      if (status != learning[i].status) fprintf(stderr, "%d learned %d: status %d\n", direction, (int)i, (int)status);
      CHECK(status == learning[i].status);
    }
    CHECK(status_after(direction, ADJOINT, 1, leave) == LF_INVALID_ARGUMENT);
    CHECK(status_after(direction, FORWARD, 0, folded_x) == LF_OK);
    CHECK(status_after(direction, FORWARD, 0, folded_y) == LF_INVALID_STRIDES);
    CHECK(status_after(direction, ADJOINT, 0, folded_x) == LF_INVALID_STRIDES);
    CHECK(status_after(direction, ADJOINT, 0, folded_y) == LF_OK);
    CHECK(ENTRIES[direction][FORWARD](NULL, 1) == LF_INVALID_ARGUMENT);
    CHECK(ENTRIES[direction][ADJOINT](NULL, 1) == LF_INVALID_ARGUMENT);
  }
  CHECK(status_after(DOWN, FORWARD, 0, unfit_height) == LF_INVALID_SHAPE);
  CHECK(status_after(DOWN, FORWARD, 0, unfit_frames) == LF_INVALID_SHAPE);
  CHECK(status_after(DOWN, FORWARD, 1, unfit_height) == LF_INVALID_SHAPE);
  CHECK(status_after(DOWN, FORWARD, 1, unfit_frames) == LF_OK);
  CHECK(status_after(DOWN, FORWARD, 0, area) == LF_OK && status_after(DOWN, ADJOINT, 0, blur) == LF_OK);
  CHECK(status_after(UP, FORWARD, 0, area) == LF_INVALID_ARGUMENT);
  CHECK(status_after(UP, ADJOINT, 0, blur) == LF_INVALID_ARGUMENT);
  CHECK(status_after(UP, FORWARD, 1, blur) == LF_INVALID_ARGUMENT);
}

static void no_threads(void) {
  const int64_t shape[AXES] = {1, 1, 1, 1, 1};
  const Case c = {DOWN, 0, LF_FLOAT32, LF_NEAREST, 1, 1, {1, 1, 1}, {1, 1, 1}};
  const Tensor x = make(LF_FLOAT32, shape, LAST), y = make(LF_FLOAT32, shape, LAST);
  const lf_space_time a = arguments_of(&c, &x, &y);
  for (int i = 0; i < 4; ++i) {
    CHECK(ENTRIES[i / 2][i % 2](&a, 0) == LF_INVALID_ARGUMENT);
    CHECK(ENTRIES[i / 2][i % 2](&a, INT32_MIN) == LF_INVALID_ARGUMENT);
  }
  free(x.memory), free(y.memory);
}

static void workspace_errors(void) {
  for (int direction = DOWN; direction <= UP; ++direction) {
    lf_space_time a;
    int64_t bytes = 77;
    memset(&a, 0, sizeof a);
    a.batch = a.channels = a.frames = a.height = a.width = 4;
    a.factor[0] = a.factor[1] = a.factor[2] = 2;
    CHECK(workspace_of(direction, NULL, 1, &bytes) == LF_INVALID_ARGUMENT && bytes == 77);
    CHECK(workspace_of(direction, &a, 1, NULL) == LF_INVALID_ARGUMENT);
    CHECK(workspace_of(direction, &a, -1, &bytes) == LF_INVALID_ARGUMENT && bytes == 77);
    a.weight = &a, a.channels_out = 4, a.taps = 2;
    CHECK(workspace_of(direction, &a, 1, &bytes) == LF_INVALID_SHAPE && bytes == 77);
    a.taps = 3;
    CHECK(workspace_of(direction, &a, 1, &bytes) == LF_OK && bytes >= 4);
    CHECK(workspace_of(direction, &a, 0, &bytes) == LF_OK && bytes >= 4);
    a.batch = 0;
    CHECK(workspace_of(direction, &a, 1, &bytes) == LF_OK && bytes == 0);
    a.batch = 1, a.height = INT64_MAX / 64, bytes = 77; /* as many bytes as int64 holds, or nearly */
    a.height -= a.height % 2;
    CHECK(workspace_of(direction, &a, 1, &bytes) == LF_INVALID_SHAPE && bytes == 77);
    a.batch = a.height = a.width = a.factor[1] = a.factor[2] = 1; /* more than there can be, but counted */
    a.channels = a.channels_out = (int64_t)1 << 26;
    CHECK(workspace_of(direction, &a, 1, &bytes) == LF_OK && bytes > (int64_t)1 << 52);
    a.channels = a.channels_out = 1, a.taps = ((int64_t)1 << 54) - 1;
    CHECK(workspace_of(direction, &a, 1, &bytes) == LF_OK && bytes > (int64_t)1 << 52);
    a.factor[1] = a.factor[2] = 2, a.width = 4, a.height = (int64_t)1 << 49; /* and a clip between, as large as any */
    CHECK(workspace_of(direction, &a, 1, &bytes) == LF_OK && bytes > (int64_t)1 << 61);
    a.factor[1] = a.factor[2] = a.width = a.height = 1;
    a.taps = 7, a.frames = (int64_t)1 << 50;
    CHECK(workspace_of(direction, &a, 3, &bytes) == LF_OK && bytes < 1 << 24);
    a.frames = 4, a.factor[0] = (int64_t)1 << 50;
    CHECK(workspace_of(direction, &a, INT32_MAX, &bytes) == LF_OK && bytes < (int64_t)1 << 24);
  }
}

int main(void) {
  every_mode();
  odd_sizes();
  large_results();
  long_rows();
  large_factors();
  threads_change_nothing();
  adjoints_are_adjoint();
  every_learned();
  large_learned();
  filtered_learned();
  one_sided_learned();
  errors();
  no_threads();
  workspace_errors();
  if (failures == 0) printf("space_time: all checks passed\n");
  return failures != 0;
}
