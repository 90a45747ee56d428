/* Resizes a raw clip in time and space: frames one behind the other, pixels row by row, the channels of a pixel
 * together, no header, as `ffmpeg -i in.mp4 -f rawvideo -pix_fmt rgb24 in.rgb` writes. */
#ifndef _WIN32
#define _XOPEN_SOURCE 700 /* lstat() */
#endif

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

#include <sys/stat.h>

#include "lumiere_fast.h"

#ifdef _WIN32
#define lstat _stat64
#define stat _stat64
#define S_ISREG(mode) (((mode) & _S_IFMT) == _S_IFREG)
#endif

static const char usage[] =
    "usage: resize_clip [options] IN OUT FRAMESxHEIGHTxWIDTHxCHANNELS down|up TxHxW [nearest|linear|area|blur]\n"
    "\n"
    "Divides (down) or multiplies (up) frames, height and width by the whole numbers T, H and W.\n"
    "Default: area down, linear up. There is no area or blur up.\n"
    "While it is written the clip is OUT.part, a name that nothing may have.\n"
    "\n"
    "  --dtype u8|f32|f16  elements of both files: bytes (default), or floats in the machine's byte order\n"
    "  --threads N         at most N threads (default 1)\n"
    "  --overwrite         replace OUT if it is a regular file; links are not followed\n";

enum { FRAMES, HEIGHT, WIDTH, CHANNELS };

typedef struct {
  const char *in, *out;
  int64_t shape[4], factor[3];
  int up, bytes, overwrite;
  lf_dtype dtype; /* of the arithmetic: of the files too, but where they hold bytes */
  lf_resize_mode mode;
  int32_t threads;
} Job;

static int fail(const char* subject, const char* what) {
  fprintf(stderr, "resize_clip: %s: %s\n", subject, what);
  return 0;
}

/* ---- the command line ---- */

/* `count` numbers from 1 on, with an x between them. */
static int read_numbers(const char* text, int count, int64_t* numbers) {
  const char* at = text;
  for (int i = 0; i < count; ++i) {
    char* end;
    if (*at < '0' || *at > '9') break;
    numbers[i] = strtoll(at, &end, 10);
    if (numbers[i] < 1 || numbers[i] == INT64_MAX || *end != (i + 1 < count ? 'x' : '\0')) break;
    if (i + 1 == count) return 1;
    at = end + 1;
  }
  return fail(text, count == 1   ? "expected a number from 1 on"
                    : count == 3 ? "expected three numbers from 1 on: TxHxW"
                                 : "expected four numbers from 1 on: FRAMESxHEIGHTxWIDTHxCHANNELS");
}

/* Which of `count` names `text` is. */
static int read_name(const char* text, const char* const* names, int count, int32_t* index) {
  for (*index = 0; *index < count; ++*index) {
    if (strcmp(text, names[*index]) == 0) return 1;
  }
  fprintf(stderr, "resize_clip: %s: expected one of", text);
  for (int i = 0; i < count; ++i) fprintf(stderr, " %s", names[i]);
  fprintf(stderr, "\n");
  return 0;
}

static int read_dtype(const char* text, Job* job) {
  static const char* const names[] = {"u8", "f32", "f16"};
  static const lf_dtype dtypes[] = {LF_FLOAT32, LF_FLOAT32, LF_FLOAT16};
  int32_t index;
  if (!read_name(text, names, 3, &index)) return 0;
  job->bytes = index == 0;
  job->dtype = dtypes[index];
  return 1;
}

static int read_threads(const char* text, Job* job) {
  int64_t threads;
  if (!read_numbers(text, 1, &threads)) return 0;
  if (threads > INT32_MAX) return fail(text, "that is too many threads");
  job->threads = (int32_t)threads;
  return 1;
}

/* What the library would refuse too, in words about this clip. */
static int fits(const Job* job, const char* mode) {
  static const char* const axes[] = {"frames", "height", "width"};
  if (job->up && job->mode != LF_NEAREST && job->mode != LF_LINEAR) return fail(mode, "up takes nearest, linear");
  for (int i = FRAMES; i <= WIDTH && !job->up; ++i) {
    if (job->shape[i] % job->factor[i] == 0) continue;
    fprintf(stderr, "resize_clip: %s: %lld cannot be divided by %lld\n", axes[i], (long long)job->shape[i],
            (long long)job->factor[i]);
    return 0;
  }
  return 1;
}

static int read_positional(int count, char** given, Job* job) {
  static const char* const directions[] = {"down", "up"};
  static const char* const modes[] = {"nearest", "linear", "area", "blur"}; /* in the order of lf_resize_mode */
  int32_t direction;
  if (count != 5 && count != 6) {
    fputs(usage, stderr);
    return 0;
  }
  job->in = given[0];
  job->out = given[1];
  if (!read_numbers(given[2], 4, job->shape) || !read_name(given[3], directions, 2, &direction)) return 0;
  job->up = direction == 1;
  job->mode = job->up ? LF_LINEAR : LF_AREA;
  if (!read_numbers(given[4], 3, job->factor)) return 0;
  if (count == 6 && !read_name(given[5], modes, 4, &job->mode)) return 0;
  return fits(job, modes[job->mode]);
}

static int read_job(int argc, char** argv, Job* job) {
  char* positional[6];
  int count = 0;
  *job = (Job){.bytes = 1, .dtype = LF_FLOAT32, .threads = 1};
  for (int i = 1; i < argc; ++i) {
    const int last = i + 1 == argc;
    if (strcmp(argv[i], "--overwrite") == 0) {
      job->overwrite = 1;
    } else if (strcmp(argv[i], "--dtype") == 0 && !last) {
      if (!read_dtype(argv[++i], job)) return 0;
    } else if (strcmp(argv[i], "--threads") == 0 && !last) {
      if (!read_threads(argv[++i], job)) return 0;
    } else if (strncmp(argv[i], "--", 2) == 0 || count == 6) {
      fputs(usage, stderr);
      return 0;
    } else {
      positional[count++] = argv[i];
    }
  }
  return read_positional(count, positional, job);
}

/* ---- files ---- */

static void* allocate(int64_t bytes) {
  void* memory = (uint64_t)bytes <= SIZE_MAX ? malloc((size_t)bytes) : NULL;
  if (!memory) fprintf(stderr, "resize_clip: no memory for %lld bytes\n", (long long)bytes);
  return memory;
}

static int read_file(const char* path, void* data, int64_t bytes) {
  FILE* file = fopen(path, "rb");
  if (!file) return fail(path, strerror(errno));
  const size_t got = fread(data, 1, (size_t)bytes, file);
  const int more = fgetc(file) != EOF, failed = ferror(file);
  fclose(file);
  if (failed) return fail(path, "it cannot be read");
  if ((int64_t)got == bytes && !more) return 1;
  fprintf(stderr, "resize_clip: %s: it has %s%lld bytes, and a clip of this shape and dtype %lld\n", path,
          more ? "more than " : "", (long long)got, (long long)bytes);
  return 0;
}

/* Whether nothing has this name, not even a link to nothing, or else a file that may be replaced. */
static int may_write(const char* path, int replace) {
  struct stat found;
  if (lstat(path, &found) != 0) return errno == ENOENT || fail(path, strerror(errno));
  if (!S_ISREG(found.st_mode)) return fail(path, "it is a link, or else no regular file, and none is replaced");
  return replace || fail(path, "it exists; --overwrite replaces it");
}

/* The name of OUT until it is whole, so that a failure neither leaves half a clip nor takes what was there. */
static char* part_of(const Job* job) {
  char* part = allocate((int64_t)strlen(job->out) + 6);
  return part ? strcat(strcpy(part, job->out), ".part") : NULL;
}

static int write_part(const char* part, const void* data, int64_t bytes) {
  FILE* file = fopen(part, "wbx"); /* never one that is there */
  if (!file) return fail(part, strerror(errno));
  const int written = fwrite(data, 1, (size_t)bytes, file) == (size_t)bytes;
  if (fclose(file) == 0 && written) return 1;
  remove(part);
  return fail(part, "it cannot be written");
}

/* What OUT is may have changed meanwhile. */
static int rename_part(const char* part, const Job* job) {
  int done = may_write(job->out, job->overwrite);
#ifdef _WIN32
  if (done) remove(job->out); /* rename() does not replace it there */
#endif
  if (done && rename(part, job->out) != 0) done = fail(job->out, strerror(errno));
  if (!done) remove(part);
  return done;
}

static int write_file(const Job* job, const void* data, int64_t bytes) {
  char* part = part_of(job);
  const int done = part && write_part(part, data, bytes) && rename_part(part, job);
  free(part);
  return done;
}

/* Before anything is read: what would be refused then. Whether OUT's folder can be written shows when it is. */
static int check_names(const Job* job) {
  struct stat found;
  char* part = part_of(job);
  int may = part && may_write(job->out, job->overwrite);
  if (may && lstat(part, &found) == 0) {
    may = fail(part, "it exists; move it, or remove it if a run that was stopped left it");
  }
  free(part);
  return may;
}

/* ---- the resize ---- */

/* A clip of the library is (batch, channels, frames, height, width) with any strides; here channels lie innermost. */
static void set_strides(const int64_t* shape, lf_clip* clip) {
  const int64_t pixel = shape[CHANNELS], row = shape[WIDTH] * pixel, frame = shape[HEIGHT] * row;
  const int64_t strides[5] = {shape[FRAMES] * frame, 1, frame, row, pixel};
  memcpy(clip->strides, strides, sizeof strides);
}

static int64_t elements(const int64_t* shape) {
  return shape[FRAMES] * shape[HEIGHT] * shape[WIDTH] * shape[CHANNELS];
}

static void result_shape(const Job* job, int64_t* shape) {
  memcpy(shape, job->shape, sizeof job->shape);
  for (int i = FRAMES; i <= WIDTH; ++i) {
    shape[i] = job->up ? shape[i] * job->factor[i] : shape[i] / job->factor[i];
  }
}

static int failed(lf_status status) {
  if (status == LF_OK) return 0;
  fail("the clip cannot be resized so", lf_status_string(status));
  return 1;
}

/* All but the clips' memory. Whatever the library does not take it says here, before a file is touched. */
static int prepare(const Job* job, lf_space_time* call) {
  *call = (lf_space_time){.dtype = job->dtype,
                          .mode = job->mode,
                          .batch = 1,
                          .channels = job->shape[CHANNELS],
                          .frames = job->shape[FRAMES],
                          .height = job->shape[HEIGHT],
                          .width = job->shape[WIDTH]};
  memcpy(call->factor, job->factor, sizeof job->factor);
  return !failed(job->up ? lf_space_time_upsample_workspace(call, job->threads, &call->workspace_size)
                         : lf_space_time_downsample_workspace(call, job->threads, &call->workspace_size));
}

static int resize(const Job* job, lf_space_time* call, void* from, void* to) {
  int64_t to_shape[4];
  result_shape(job, to_shape);
  set_strides(job->shape, &call->x);
  set_strides(to_shape, &call->y);
  call->x.data = from;
  call->y.data = to;
  /* None for fixed taps, as here; a resize in time with weights takes some. It has to begin at a multiple of 64. */
  char* workspace = allocate(call->workspace_size + 63);
  if (!workspace) return 0;
  call->workspace = workspace + (64 - (uintptr_t)workspace % 64) % 64;
  const lf_status status = job->up ? lf_space_time_upsample_cpu(call, job->threads)
                                   : lf_space_time_downsample_cpu(call, job->threads);
  free(workspace);
  return !failed(status);
}

static void from_bytes(const unsigned char* bytes, int64_t count, float* floats) {
  for (int64_t i = 0; i < count; ++i) floats[i] = bytes[i];
}

/* To the nearest byte, halves upwards. */
static void to_bytes(const float* floats, int64_t count, unsigned char* bytes) {
  for (int64_t i = 0; i < count; ++i) {
    const double value = floats[i] < 0 ? 0 : floats[i] > 255 ? 255 : floats[i];
    bytes[i] = (unsigned char)(value + 0.5);
  }
}

static int read_clip(const Job* job, int64_t count, int64_t size, void* clip) {
  if (!job->bytes) return read_file(job->in, clip, count * size);
  unsigned char* bytes = allocate(count);
  const int done = bytes && read_file(job->in, bytes, count);
  if (done) from_bytes(bytes, count, clip);
  free(bytes);
  return done;
}

static int write_clip(const Job* job, int64_t count, int64_t size, const void* clip) {
  if (!job->bytes) return write_file(job, clip, count * size);
  unsigned char* bytes = allocate(count);
  if (!bytes) return 0;
  to_bytes(clip, count, bytes);
  const int done = write_file(job, bytes, count);
  free(bytes);
  return done;
}

static int run(const Job* job) {
  lf_space_time call;
  int64_t to_shape[4], size;
  if (!check_names(job) || !prepare(job, &call) || failed(lf_dtype_size(job->dtype, &size))) return 0;
  result_shape(job, to_shape);
  const int64_t from_count = elements(job->shape), to_count = elements(to_shape);
  void *from = allocate(from_count * size), *to = allocate(to_count * size);
  const int done = from && to && read_clip(job, from_count, size, from) && resize(job, &call, from, to) &&
                   write_clip(job, to_count, size, to);
  free(from);
  free(to);
  if (done) {
    printf("%s: %lld frames of %lldx%lld, %lld channels\n", job->out, (long long)to_shape[FRAMES],
           (long long)to_shape[WIDTH], (long long)to_shape[HEIGHT], (long long)to_shape[CHANNELS]);
  }
  return done;
}

int main(int argc, char** argv) {
  Job job;
  if (argc == 2 && strcmp(argv[1], "--help") == 0) {
    fputs(usage, stdout);
    return 0;
  }
  return read_job(argc, argv, &job) && run(&job) ? 0 : 1;
}
