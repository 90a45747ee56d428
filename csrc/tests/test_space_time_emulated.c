/* The fixed taps of space_time_downsample and space_time_upsample as a CUDA device runs them, emulated, against the
 * CPU's bit for bit: modes, factors, dtypes, adjoints, any strides, clips of more elements than 32 bits count, errors. */
#define _DEFAULT_SOURCE
#include "lumiere_fast.h"

#include "check.h"
#include "emulation/stream.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { AXES = 5, B = 0, C = 1, T = 2, H = 3, W = 4 };
enum { DOWN = 0, UP = 1, MODES = 6 }; /* modes 0 to 3 go down, 4 and 5 up */

typedef lf_status (*Cpu)(const lf_space_time*, int32_t);
typedef lf_status (*Cuda)(const lf_space_time*, int32_t, void*);
static const Cpu CPU[2][2] = {{lf_space_time_downsample_cpu, lf_space_time_downsample_adjoint_cpu},
                              {lf_space_time_upsample_cpu, lf_space_time_upsample_adjoint_cpu}};
static const Cuda CUDA[2][2] = {{lf_space_time_downsample_cuda, lf_space_time_downsample_adjoint_cuda},
                                {lf_space_time_upsample_cuda, lf_space_time_upsample_adjoint_cuda}};

typedef struct {
  int direction, adjoint;
  lf_dtype dtype;
  lf_resize_mode mode;
  int64_t batch, channels, coarse[3], factor[3];
} Case;

static int64_t pick(int64_t below) {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (int64_t)(state >> 33) % below;
}

static int64_t size_of(lf_dtype dtype) {
  int64_t bytes = 0;
  CHECK(lf_dtype_size(dtype, &bytes) == LF_OK);
  return bytes;
}

/* Of x or y. */
static void shape_of(const Case* c, int of_y, int64_t shape[AXES]) {
  shape[B] = c->batch, shape[C] = c->channels;
  for (int i = 0; i < 3; ++i) shape[T + i] = c->coarse[i] * (of_y == (c->direction == UP) ? c->factor[i] : 1);
}

static lf_space_time arguments_of(const Case* c, lf_clip from, lf_clip to) {
  lf_space_time a;
  int64_t x[AXES];
  memset(&a, 0, sizeof a);
  shape_of(c, 0, x);
  a.dtype = c->dtype, a.mode = c->mode;
  a.batch = x[B], a.channels = x[C], a.frames = x[T], a.height = x[H], a.width = x[W];
  memcpy(a.factor, c->factor, sizeof a.factor);
  a.x = c->adjoint ? to : from, a.y = c->adjoint ? from : to;
  return a;
}

/* Finite numbers of all magnitudes that sums do not leave, zeros of both signs among them. */
static void draw(unsigned char* at, lf_dtype dtype) {
  const double value = pick(16) ? ldexp((double)(pick(1 << 24) - (1 << 23)), (int)pick(30) - 43) : pick(2) ? 0.0 : -0.0;
  const float single = (float)value;
  uint32_t wide;
  uint16_t bits;
  memcpy(&wide, &single, 4);
  if (dtype == LF_FLOAT64) memcpy(at, &value, 8);
  if (dtype == LF_FLOAT32) memcpy(at, &single, 4);
  if (dtype == LF_FLOAT64 || dtype == LF_FLOAT32) return;
  bits = (uint16_t)(wide >> 16);
  if (dtype == LF_FLOAT16) bits = (uint16_t)(pick(0x7000) | pick(2) << 15); /* subnormal ones too */
  memcpy(at, &bits, 2);
}

/* --- memory of any layout ---------------------------------------------------------------------------------------- */

/* Channels last; that with room between pixels, rows and frames, in packs; planes; anyhow, from any address. */
enum { LAST, ROOMY, PLANES, LOOSE, LAYOUTS };

typedef struct {
  int64_t bytes, first; /* of the memory; the first element's place in it */
  int64_t strides[AXES];
} Layout;

static Layout layout_of(const int64_t shape[AXES], int64_t size, int kind) {
  static const int last[AXES] = {B, T, H, W, C}, planes[AXES] = {B, C, T, H, W};
  Layout layout = {0, 0, {0}};
  int order[AXES];
  int64_t unit = 1, reach = 1;
  memcpy(order, kind == PLANES ? planes : last, sizeof order);
  for (int i = AXES - 1; i > 0 && kind == LOOSE; --i) {
    const int64_t j = pick(i + 1);
    const int kept = order[i];
    order[i] = order[j], order[j] = kept;
  }
  for (int i = AXES - 1; i >= 0; --i) {
    const int axis = order[i];
    int64_t* stride = &layout.strides[axis];
    *stride = unit;
    if (kind == LOOSE && pick(2)) *stride *= 2;
    if (kind == ROOMY && axis != C) *stride = (unit * size + 15) / 16 * 16 / size + 16 / size * pick(3);
    unit = *stride * shape[axis];
    reach += (shape[axis] - 1) * *stride;
    if (kind == LOOSE && pick(3) == 0) layout.first += (shape[axis] - 1) * *stride * size, *stride = -*stride;
  }
  if (kind == LOOSE) layout.first += size * pick(4);
  layout.bytes = reach * size + 4 * size;
  return layout;
}

static lf_clip clip_in(unsigned char* memory, const Layout* layout) {
  lf_clip clip;
  clip.data = memory + layout->first;
  memcpy(clip.strides, layout->strides, sizeof clip.strides);
  return clip;
}

static unsigned char* memory_of(int64_t bytes) {
  void* data = NULL;
  if (posix_memalign(&data, 64, (size_t)bytes) != 0) abort();
  memset(data, 0xff, (size_t)bytes);
  return data;
}

static void tell(const Case* c, const char* what) {
  fprintf(stderr, "%s: %s%s, mode %d, dtype %d, %d x %d, (%d %d %d) by (%d %d %d)\n", what,
          c->direction == DOWN ? "down" : "up", c->adjoint ? ", adjoint" : "", (int)c->mode, (int)c->dtype,
          (int)c->batch, (int)c->channels, (int)c->coarse[0], (int)c->coarse[1], (int)c->coarse[2], (int)c->factor[0],
          (int)c->factor[1], (int)c->factor[2]);
}

/* All of the memory is compared, what lies between the elements too. */
static void compare(const Case* c, int from_kind, int to_kind) {
  const int64_t size = size_of(c->dtype);
  int64_t from_shape[AXES], to_shape[AXES];
  shape_of(c, c->adjoint, from_shape), shape_of(c, !c->adjoint, to_shape);
  const Layout from = layout_of(from_shape, size, from_kind), to = layout_of(to_shape, size, to_kind);
  unsigned char *input = memory_of(from.bytes), *device = memory_of(to.bytes), *host = memory_of(to.bytes);
  for (int64_t i = 0; i + size <= from.bytes; i += size) draw(input + i, c->dtype);
  const lf_space_time on_device = arguments_of(c, clip_in(input, &from), clip_in(device, &to));
  const lf_space_time on_host = arguments_of(c, clip_in(input, &from), clip_in(host, &to));
  CHECK(CUDA[c->direction][c->adjoint](&on_device, 0, LF_EMULATED_STREAM) == LF_OK);
  CHECK(CPU[c->direction][c->adjoint](&on_host, 1) == LF_OK);
  if (memcmp(device, host, (size_t)to.bytes) != 0) tell(c, "unlike the CPU"), ++failures;
  free(input), free(device), free(host);
}

static void fuzz(void) {
  static const int64_t factors[] = {1, 1, 2, 2, 3, 4, 5}, channels[] = {1, 2, 3, 5, 8, 16, 24, 40, 67};
  for (int trial = 0; trial < MODES * 2 * 4 * 40; ++trial) {
    const int mode = trial % MODES, direction = mode < 4 ? DOWN : UP;
    Case c = {direction, trial / MODES % 2, trial / MODES / 2 % 4, direction == DOWN ? mode : mode - 4, 1 + pick(3),
              channels[pick(9)], {0}, {0}};
    int64_t elements;
    do {
      elements = c.batch * c.channels;
      for (int i = 0; i < 3; ++i) {
        c.coarse[i] = 1 + pick(i == 2 ? 20 : 4), c.factor[i] = factors[pick(7)];
        elements *= c.coarse[i] * c.factor[i];
      }
    } while (elements > 12000);
    const int kind = (int)pick(LAYOUTS);
    compare(&c, kind, pick(3) ? kind : (int)pick(LAYOUTS));
  }
}

/* Enough for threads to walk along W: what they hold is handed on, or not. */
static void runs(void) {
  for (int kind = 0; kind < MODES * 2 * 3; ++kind) {
    const int mode = kind % MODES, direction = mode < 4 ? DOWN : UP, adjoint = kind / MODES % 2, f = 2 + kind / 24;
    const int to_coarse = adjoint == (direction == UP);
    const Case c = {direction, adjoint, LF_FLOAT64, direction == DOWN ? mode : mode - 4, 1, kind / 12 == 1 ? 15 : 16,
                    {2, to_coarse ? 32 : 16, to_coarse ? 131 : 263 / f}, {1, to_coarse ? 1 : 2, f}};
    compare(&c, LAST, LAST);
  }
}

/* Few channels, whose pixels are written in packs: dense rows of pixels, of planes, and rows that are no whole packs. */
static void few_channels(void) {
  for (int kind = 0; kind < MODES * 4 * 4 * 2; ++kind) {
    const int mode = kind % MODES, direction = mode < 4 ? DOWN : UP, channels = 1 + kind / MODES % 4;
    const lf_dtype dtype = kind / MODES / 4 % 4;
    const Case c = {direction, direction == DOWN, dtype, direction == DOWN ? mode : mode - 4, 2, channels,
                    {2, 2, 5}, {1 + kind % 2, 8, kind % 5 ? 8 : 3}};
    compare(&c, kind < MODES * 4 * 4 ? LAST : PLANES, kind < MODES * 4 * 4 ? LAST : PLANES);
  }
}

/* --- far apart --------------------------------------------------------------------------------------------------- */

static const size_t FAR_BYTES = (size_t)1 << 37;

static unsigned char* far_memory(void) {
  void* data = mmap(NULL, FAR_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) abort();
  return data;
}

/* Calls on clips of which one axis after the other has strides over 2^31 elements. */
static void far_strides(void) {
  static const int64_t far = ((int64_t)1 << 31) + 64;
  for (int kind = 0; kind < MODES * 2 * AXES; ++kind) {
    const int mode = kind % MODES, direction = mode < 4 ? DOWN : UP, axis = kind / MODES / 2;
    const Case c = {direction, kind / MODES % 2, kind % 2 ? LF_FLOAT32 : LF_BFLOAT16,
                    direction == DOWN ? mode : mode - 4, 2, axis == C ? 3 : 16, {2, 2, 3}, {1 + (axis == T), 2, 2}};
    const int64_t size = size_of(c.dtype);
    int64_t shapes[2][AXES], at[AXES] = {0};
    lf_clip clips[3];
    for (int i = 0; i < 3; ++i) {
      int64_t* shape = shapes[i != 0];
      shape_of(&c, c.adjoint != (i != 0), shape);
      clips[i].data = far_memory();
      const int order[AXES] = {B, T, H, W, C};
      int64_t unit = 1;
      for (int j = AXES - 1; j >= 0; --j) {
        clips[i].strides[order[j]] = order[j] == axis ? far : unit;
        if (order[j] != axis) unit *= shape[order[j]];
      }
    }
    do {
      int64_t offset = 0;
      for (int i = 0; i < AXES; ++i) offset += at[i] * clips[0].strides[i];
      draw((unsigned char*)clips[0].data + offset * size, c.dtype);
      int i = AXES - 1;
      while (i >= 0 && ++at[i] == shapes[0][i]) at[i--] = 0;
    } while (at[B] || at[C] || at[T] || at[H] || at[W]);
    const lf_space_time on_device = arguments_of(&c, clips[0], clips[1]);
    const lf_space_time on_host = arguments_of(&c, clips[0], clips[2]);
    CHECK(CUDA[direction][c.adjoint](&on_device, 0, LF_EMULATED_STREAM) == LF_OK);
    CHECK(CPU[direction][c.adjoint](&on_host, 1) == LF_OK);
    int wrong = 0;
    do {
      int64_t offset = 0;
      for (int i = 0; i < AXES; ++i) offset += at[i] * clips[1].strides[i];
      wrong += memcmp((unsigned char*)clips[1].data + offset * size, (unsigned char*)clips[2].data + offset * size,
                      (size_t)size) != 0;
      int i = AXES - 1;
      while (i >= 0 && ++at[i] == shapes[1][i]) at[i--] = 0;
    } while (at[B] || at[C] || at[T] || at[H] || at[W]);
    if (wrong) tell(&c, "far apart, unlike the CPU"), ++failures;
    for (int i = 0; i < 3; ++i) munmap(clips[i].data, FAR_BYTES);
  }
}

/* An axis that 32 bits do not count, of which few places are taken: they are written first. */
static void long_axis(void) {
  static const lf_resize_mode modes[] = {LF_NEAREST, LF_LINEAR, LF_BLUR};
  for (int i = 0; i < 3 * 3; ++i) {
    Case c = {DOWN, 0, LF_BFLOAT16, modes[i / 3], 1, 8, {1, 1, 1}, {1, 1, 1}};
    const int64_t f = ((int64_t)1 << 31) + 2;
    c.coarse[i % 3] = 3, c.factor[i % 3] = f;
    unsigned char* memory = far_memory();
    lf_clip from = {memory, {8, 1, 8, 8, 8}};
    unsigned char results[2][3 * 8 * 2];
    lf_clip to = {NULL, {24, 1, 8, 8, 8}};
    for (int64_t place = 0; place < 3; ++place) {
      for (int64_t tap = 0; tap < 4; ++tap) {
        const int64_t j = tap < 2 ? f * place + (tap - 1) : f * place + f / 2 - (tap - 2);
        for (int64_t n = 0; n < 8 && j >= 0; ++n) draw(memory + (j * 8 + n) * 2, c.dtype);
      }
    }
    to.data = results[0];
    const lf_space_time on_device = arguments_of(&c, from, to);
    CHECK(CUDA[DOWN][0](&on_device, 0, LF_EMULATED_STREAM) == LF_OK);
    to.data = results[1];
    const lf_space_time on_host = arguments_of(&c, from, to);
    CHECK(CPU[DOWN][0](&on_host, 1) == LF_OK);
    if (memcmp(results[0], results[1], sizeof results[0]) != 0) tell(&c, "long, unlike the CPU"), ++failures;
    munmap(memory, FAR_BYTES);
  }
}

/* --- what is refused --------------------------------------------------------------------------------------------- */

static void errors(void) {
  static float x[64], y[64];
  const Case good = {DOWN, 0, LF_FLOAT32, LF_AREA, 1, 4, {1, 2, 2}, {1, 2, 2}};
  const lf_clip from = {x, {64, 1, 64, 16, 4}}, to = {y, {16, 1, 16, 8, 4}};
  for (int kind = 0; kind < 4; ++kind) {
    Case c = good;
    c.direction = kind / 2, c.adjoint = kind % 2, c.mode = LF_LINEAR;
    const int to_fine = c.adjoint != c.direction;
    const lf_space_time a = arguments_of(&c, to_fine ? to : from, to_fine ? from : to);
    const Cuda call = CUDA[c.direction][c.adjoint];
    CHECK(call(NULL, 0, NULL) == LF_INVALID_ARGUMENT);
    CHECK(call(&a, 0, LF_EMULATED_STREAM) == LF_OK);
    CHECK(call(&a, 1, NULL) == LF_CUDA_ERROR);
    lf_space_time changed = a;
    changed.x.data = NULL;
    CHECK(call(&changed, 0, NULL) == LF_INVALID_ARGUMENT);
    changed = a, changed.dtype = 9;
    CHECK(call(&changed, 0, NULL) == LF_UNSUPPORTED_DTYPE);
    changed = a, changed.factor[1] = 0;
    CHECK(call(&changed, 0, NULL) == LF_INVALID_SHAPE);
    changed = a, changed.factor[2] = INT64_MAX;
    CHECK(call(&changed, 0, NULL) == LF_INVALID_SHAPE);
    changed = a, changed.y.data = changed.x.data;
    CHECK(call(&changed, 0, NULL) == LF_SHARED_MEMORY);
    changed = a, (c.adjoint ? &changed.x : &changed.y)->strides[W] = 1;
    CHECK(call(&changed, 0, NULL) == LF_INVALID_STRIDES);
    changed = a, changed.batch = 0, changed.x.data = changed.y.data = NULL;
    CHECK(call(&changed, 0, LF_EMULATED_STREAM) == LF_OK);
  }
}

/* More than a launch numbers: nothing is read or written, so that there need be no memory. */
static void too_many(void) {
  Case c = {DOWN, 0, LF_FLOAT32, LF_NEAREST, (int64_t)1 << 42, 1, {1, 1, 1}, {1, 1, 1}};
  const lf_clip from = {(void*)(uintptr_t)64, {1, 1, 1, 1, 1}}, to = {(void*)((uintptr_t)1 << 60), {1, 1, 1, 1, 1}};
  const lf_space_time a = arguments_of(&c, from, to);
  CHECK(CUDA[DOWN][0](&a, 0, NULL) == LF_TOO_MANY);
}

int main(void) {
  fuzz();
  runs();
  few_channels();
  far_strides();
  long_axis();
  errors();
  too_many();
  if (failures == 0) printf("space_time, emulated: all checks passed\n");
  return failures != 0;
}
