/* Runs the example resize_clip, whose path is the first argument, on clips made here: every byte of what it writes, and
 * what it does where it cannot write. Factors are 1 and 2, with which all arithmetic is exact. */
#if defined(__unix__) || defined(__APPLE__)
#define _XOPEN_SOURCE 700
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#define POSIX_FILES
#endif

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

enum { T = 4, H = 6, W = 10, C = 3, COUNT = T * H * W * C, MOST = 8 * COUNT * 4 };
#define SHAPE "4x6x10x3"

static const char* program;

/* Runs it with these arguments; its exit code, another than its own if it was killed, and what it says on stderr. */
static int call(const char* arguments, char* said, size_t size) {
  char command[4096];
  snprintf(command, sizeof command, "\"%s\" %s 2> said.txt", program, arguments);
  fflush(NULL);
  const int status = system(command);
  FILE* file = fopen("said.txt", "rb");
  said[file ? fread(said, 1, size - 1, file) : 0] = '\0';
  if (file) fclose(file);
#ifdef POSIX_FILES
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
#else
  return status;
#endif
}

static void runs(const char* arguments) {
  char said[4096];
  CHECK(call(arguments, said, sizeof said) == 0);
  if (said[0]) fprintf(stderr, "%s: %s", arguments, said);
}

/* It fails, and says so in these words among others. */
static void refuses(const char* arguments, const char* words) {
  char said[4096];
  CHECK(call(arguments, said, sizeof said) == 1);
  CHECK(strstr(said, words) != NULL);
  if (!strstr(said, words)) fprintf(stderr, "%s: %s", arguments, said);
}

static void write_file(const char* name, const void* data, size_t bytes) {
  FILE* file = fopen(name, "wb");
  CHECK(file && fwrite(data, 1, bytes, file) == bytes);
  if (file) fclose(file);
}

/* Bytes of the file, at most MOST; -1 where there is none. */
static long read_file(const char* name, void* data) {
  FILE* file = fopen(name, "rb");
  if (!file) return -1;
  const size_t bytes = fread(data, 1, MOST, file);
  fclose(file);
  return (long)bytes;
}

/* ---- the definition, in quarters along each axis ---- */

typedef struct {
  int64_t at[3];
  int64_t quarters[3];
} Taps;

static Taps taps(const char* mode, int up, int64_t factor, int64_t size, int64_t i) {
  if (factor == 1) return (Taps){{i, 0, 0}, {4, 0, 0}};
  if (up && mode[0] == 'n') return (Taps){{i / 2, 0, 0}, {4, 0, 0}};
  if (up) {
    const int64_t other = i / 2 + (i % 2 ? 1 : -1);
    return (Taps){{i / 2, other < 0 ? 0 : other == size ? size - 1 : other, 0}, {3, 1, 0}};
  }
  if (mode[0] == 'n') return (Taps){{2 * i, 0, 0}, {4, 0, 0}};
  if (mode[0] == 'b') return (Taps){{i ? 2 * i - 1 : 0, 2 * i, 2 * i + 1}, {1, 2, 1}};
  return (Taps){{2 * i, 2 * i + 1, 0}, {2, 2, 0}}; /* linear and area are one for a factor of 2 */
}

/* 64 times the value at (t, h, w, c). */
static int64_t expected(const unsigned char* x, const Taps* along_t, const Taps* along_h, const Taps* along_w,
                        int64_t c) {
  int64_t sum = 0;
  for (int i = 0; i < 27; ++i) {
    const int t = i / 9, h = i / 3 % 3, w = i % 3;
    const int64_t weight = along_t->quarters[t] * along_h->quarters[h] * along_w->quarters[w];
    sum += weight * x[((along_t->at[t] * H + along_h->at[h]) * W + along_w->at[w]) * C + c];
  }
  return sum;
}

static int64_t resized(int64_t size, int up, int64_t factor) { return up ? size * factor : size / factor; }

/* Every element of the resized clip, 64 times; how many they are. */
static long resize(const unsigned char* x, const char* mode, int up, const int64_t* factor, int64_t* y) {
  const int64_t frames = resized(T, up, factor[0]), height = resized(H, up, factor[1]),
                width = resized(W, up, factor[2]);
  long n = 0;
  for (int64_t t = 0; t < frames; ++t) {
    for (int64_t h = 0; h < height; ++h) {
      for (int64_t w = 0; w < width; ++w) {
        const Taps along_t = taps(mode, up, factor[0], T, t), along_h = taps(mode, up, factor[1], H, h),
                   along_w = taps(mode, up, factor[2], W, w);
        for (int64_t c = 0; c < C; ++c) y[n++] = expected(x, &along_t, &along_h, &along_w, c);
      }
    }
  }
  return n;
}

/* ---- the checks ---- */

static unsigned char clip[COUNT], got[MOST], before[MOST];

static void check_bytes(const char* mode, int up, const int64_t* factor) {
  static int64_t y[8 * COUNT];
  char arguments[256];
  snprintf(arguments, sizeof arguments, "--overwrite --threads 2 clip.u8 out.u8 " SHAPE " %s %dx%dx%d %s",
           up ? "up" : "down", (int)factor[0], (int)factor[1], (int)factor[2], mode);
  runs(arguments);
  const long count = resize(clip, mode, up, factor, y);
  long wrong = read_file("out.u8", got) != count;
  for (long i = 0; i < count && !wrong; ++i) wrong = got[i] != (y[i] + 32) / 64;
  CHECK(!wrong);
  if (wrong) fprintf(stderr, "with %s\n", arguments);
}

static void check_floats(void) {
  static int64_t y[8 * COUNT];
  static float x[COUNT], floats[8 * COUNT];
  const int64_t factor[] = {2, 1, 2};
  for (int i = 0; i < COUNT; ++i) x[i] = clip[i];
  write_file("clip.f32", x, sizeof x);
  runs("--dtype f32 clip.f32 out.f32 " SHAPE " up 2x1x2");
  const long count = resize(clip, "linear", 1, factor, y);
  long wrong = read_file("out.f32", got) != count * (long)sizeof(float);
  memcpy(floats, got, (size_t)count * sizeof(float));
  for (long i = 0; i < count; ++i) wrong += floats[i] != (float)y[i] / 64;
  CHECK(wrong == 0);
}

/* Copies of halves, of any value. */
static void check_halves(void) {
  static uint16_t x[COUNT], halves[COUNT];
  for (int i = 0; i < COUNT; ++i) x[i] = (uint16_t)(0x3000 + 7 * i);
  write_file("clip.f16", x, sizeof x);
  runs("--dtype f16 clip.f16 out.f16 " SHAPE " down 2x2x1 nearest");
  CHECK(read_file("out.f16", got) == sizeof x / 4);
  memcpy(halves, got, sizeof x / 4);
  for (int t = 0; t < T / 2; ++t) {
    for (int h = 0; h < H / 2; ++h) {
      for (int i = 0; i < W * C; ++i) {
        CHECK(halves[(t * (H / 2) + h) * W * C + i] == x[(2 * t * H + 2 * h) * W * C + i]);
      }
    }
  }
}

static void check_refusals(void) {
  refuses("clip.u8", "usage: resize_clip");
  refuses("clip.u8 none.u8 " SHAPE " down 2x2", "2x2: expected three numbers from 1 on: TxHxW");
  refuses("clip.u8 none.u8 4x6x10 down 2x2x2", "4x6x10: expected four numbers");
  refuses("clip.u8 none.u8 " SHAPE " down 0x2x2", "0x2x2: expected three numbers");
  refuses("clip.u8 none.u8 " SHAPE " around 2x2x2", "around: expected one of down up");
  refuses("clip.u8 none.u8 " SHAPE " down 2x2x2 cubic", "cubic: expected one of nearest linear area blur");
  refuses("--dtype u9 clip.u8 none.u8 " SHAPE " down 2x2x2", "u9: expected one of u8 f32 f16");
  refuses("--threads 0 clip.u8 none.u8 " SHAPE " down 2x2x2", "0: expected a number from 1 on");
  refuses("--what clip.u8 none.u8 " SHAPE " down 2x2x2", "usage: resize_clip");
  refuses("clip.u8 none.u8 " SHAPE " up 2x2x2 area", "area: up takes nearest, linear");
  refuses("clip.u8 none.u8 " SHAPE " up 2x2x2 blur", "blur: up takes nearest, linear");
  refuses("clip.u8 none.u8 " SHAPE " down 3x2x2", "frames: 4 cannot be divided by 3");
  refuses("clip.u8 none.u8 " SHAPE " down 2x12x2", "height: 6 cannot be divided by 12");
  refuses("clip.u8 none.u8 " SHAPE " down 2x2x3 nearest", "width: 10 cannot be divided by 3");
  refuses("clip.u8 none.u8 9000000000x9000000000x1x1 up 1x1x1", "invalid shape");
  refuses("clip.u8 none.u8 100000000x1000000000x1x1 down 1x1x1", "no memory for 400000000000000000 bytes");
  refuses("missing.u8 none.u8 " SHAPE " down 2x2x2", "missing.u8: ");
  refuses("clip.u8 none.u8 4x6x10x4 down 2x2x2", "clip.u8: it has 720 bytes, and a clip of this shape and dtype 960");
  refuses("clip.u8 none.u8 4x6x10x1 down 2x2x2",
          "clip.u8: it has more than 240 bytes, and a clip of this shape and dtype 240");
  refuses("--dtype f32 clip.u8 none.u8 " SHAPE " down 2x2x2",
          "clip.u8: it has 720 bytes, and a clip of this shape and dtype 2880");
  CHECK(read_file("none.u8", got) == -1 && read_file("none.u8.part", got) == -1);
}

static void check_what_exists_stays(void) {
  const long bytes = read_file("out.u8", before);
  CHECK(bytes > 0);
  refuses("clip.u8 out.u8 " SHAPE " down 2x2x2", "out.u8: it exists; --overwrite replaces it");
  refuses("--overwrite clip.u8 out.u8 4x6x10x4 down 2x2x2", "it has 720 bytes");
  CHECK(read_file("out.u8", got) == bytes && memcmp(got, before, (size_t)bytes) == 0);
}

/* Not even the input, which is then read from nowhere. */
static void check_part_stays(void) {
  static const char words[] = "none.u8.part: it exists; move it, or remove it if a run that was stopped left it";
  write_file("none.u8.part", clip, sizeof clip);
  refuses("clip.u8 none.u8 " SHAPE " down 2x2x2", words);
  refuses("none.u8.part none.u8 " SHAPE " down 2x2x2", words);
  refuses("--overwrite none.u8.part none.u8 " SHAPE " down 2x2x2", words);
  CHECK(read_file("none.u8.part", got) == sizeof clip && memcmp(got, clip, sizeof clip) == 0);
  CHECK(read_file("none.u8", got) == -1);
  remove("none.u8.part");
}

#ifdef POSIX_FILES
static mode_t kind_of(const char* name) {
  struct stat found;
  return lstat(name, &found) == 0 ? found.st_mode & S_IFMT : 0;
}
#endif

/* Links, also to nothing, pipes and folders stay, and so does what a link leads to. */
static void check_only_files_are_replaced(void) {
#ifdef POSIX_FILES
  static const char* const outs[] = {"link", "dangling", "pipe", "folder"};
  const mode_t kinds[] = {S_IFLNK, S_IFLNK, S_IFIFO, S_IFDIR};
  CHECK(symlink("clip.u8", "link") == 0 && symlink("none.u8", "dangling") == 0);
  CHECK(mkfifo("pipe", 0600) == 0 && mkdir("folder", 0700) == 0);
  for (int i = 0; i < 8; ++i) {
    char arguments[256];
    snprintf(arguments, sizeof arguments, "%s clip.u8 %s " SHAPE " down 2x2x2", i < 4 ? "" : "--overwrite",
             outs[i % 4]);
    refuses(arguments, "it is a link, or else no regular file");
    CHECK(kind_of(outs[i % 4]) == kinds[i % 4]);
  }
  CHECK(read_file("clip.u8", got) == sizeof clip && memcmp(got, clip, sizeof clip) == 0);
  CHECK(kind_of("none.u8") == 0);
  CHECK(symlink("none.u8", "none.f32.part") == 0);
  refuses("clip.u8 none.f32 " SHAPE " down 2x2x2", "none.f32.part: it exists");
  CHECK(kind_of("none.f32.part") == S_IFLNK && kind_of("none.f32") == 0 && kind_of("none.u8") == 0);
#endif
}

/* Another makes OUT or its part once the names have been looked at: it is given the clip through a pipe. */
static void check_what_comes_meanwhile_stays(void) {
#ifdef POSIX_FILES
  static const char* const made[] = {"none.u8", "none.u8.part"};
  static const char* const words[] = {"none.u8: it exists", "none.u8.part: "};
  CHECK(mkfifo("feed", 0600) == 0);
  for (int i = 0; i < 2; ++i) {
    char command[256];
    snprintf(command, sizeof command,
             "(exec 3> feed; cp clip.u8 %s; cat clip.u8 >&3) < clip.u8 > feed.txt 2>&1 &", made[i]);
    CHECK(system(command) == 0);
    refuses("feed none.u8 " SHAPE " down 2x2x2", words[i]);
    CHECK(read_file(made[i], got) == sizeof clip && memcmp(got, clip, sizeof clip) == 0);
    remove(made[i]);
    CHECK(read_file(made[1 - i], got) == -1);
  }
#endif
}

/* As on a full disk: neither half a clip nor a loss of the one that was there. */
static void check_writing_fails(void) {
#ifdef POSIX_FILES
  struct rlimit limit = {0, 0}, lower;
  CHECK(getrlimit(RLIMIT_FSIZE, &limit) == 0);
  const long bytes = read_file("out.u8", before);
  lower = limit;
  lower.rlim_cur = 1000; /* under the 5760 to be written */
  signal(SIGXFSZ, SIG_IGN);
  CHECK(setrlimit(RLIMIT_FSIZE, &lower) == 0);
  refuses("clip.u8 none.u8 " SHAPE " up 2x2x2", "none.u8.part: it cannot be written");
  refuses("--overwrite clip.u8 out.u8 " SHAPE " up 2x2x2", "out.u8.part: it cannot be written");
  CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
  CHECK(read_file("none.u8", got) == -1 && read_file("none.u8.part", got) == -1);
  CHECK(read_file("out.u8.part", got) == -1);
  CHECK(read_file("out.u8", got) == bytes && memcmp(got, before, (size_t)bytes) == 0);
#endif
}

static void remove_files(void) {
  const char* const names[] = {"clip.u8", "clip.f32",    "clip.f16", "out.u8",       "out.f32",
                               "out.f16", "out.u8.part", "none.u8",  "none.u8.part", "said.txt"};
  for (size_t i = 0; i < sizeof names / sizeof *names; ++i) remove(names[i]);
#ifdef POSIX_FILES
  static const char* const others[] = {"link", "dangling", "pipe", "folder", "none.f32.part", "feed", "feed.txt"};
  for (size_t i = 0; i < sizeof others / sizeof *others; ++i) remove(others[i]);
#endif
}

int main(int argc, char** argv) {
  static const char* const down[] = {"nearest", "linear", "area", "blur"};
  static const int64_t factors[][3] = {{2, 2, 2}, {1, 2, 2}, {2, 1, 1}, {1, 1, 2}};
  if (argc != 2) {
    fprintf(stderr, "usage: %s RESIZE_CLIP\n", argv[0]);
    return 2;
  }
  program = argv[1];
  remove_files();
  uint32_t state = 1;
  for (int i = 0; i < COUNT; ++i) clip[i] = (unsigned char)((state = state * 1664525u + 1013904223u) >> 24);
  write_file("clip.u8", clip, sizeof clip);
  for (size_t i = 0; i < sizeof factors / sizeof *factors; ++i) {
    for (int mode = 0; mode < 4; ++mode) check_bytes(down[mode], 0, factors[i]);
    for (int mode = 0; mode < 2; ++mode) check_bytes(down[mode], 1, factors[i]);
  }
  check_floats();
  check_halves();
  check_refusals();
  check_what_exists_stays();
  check_part_stays();
  check_only_files_are_replaced();
  check_what_comes_meanwhile_stays();
  check_writing_fails();
  if (failures == 0) {
    remove_files();
    printf("resize_clip: all checks passed\n");
  }
  return failures != 0;
}
