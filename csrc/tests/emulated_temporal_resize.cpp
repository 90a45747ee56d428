// common/temporal_resize_mma.cu, compiled for the host, against the definition. Numbers are such that every sum is
// exact in fp32 in whatever order, so that results are compared bit for bit.
#include "../common/temporal_resize_mma.cu"

#include <cmath>
#include <cstdio>
#include <vector>

#include "check.h"
#include "far_memory.h"

namespace {

using lf::BFloat16;
using lf::Direction;
using lf::Half;
using lf::Sizes;
using lf::TemporalResize;

uint32_t random_state = 1;
uint32_t random_bits() { return (random_state = random_state * 1664525u + 1013904223u) >> 8; }
int64_t one_of(std::initializer_list<int64_t> values) { return values.begin()[random_bits() % values.size()]; }
float number() { return static_cast<float>(random_bits() % 32) / 8 - 2; }

enum Layout {
  kDense,
  kGapsBetweenRows,
  kGapsBetweenPixels,
  kBackwards,
  kInPacks,  // those before
  kOddPixels = kInPacks,
  kOddFrames,
  kEverySecond,
  kMisaligned,
  kChannelsFirst,
  kLayouts
};

// Elements somewhere in memory that is all NaN (as inputs) or marked (as output) around them.
template <class T> struct Clip {
  Sizes sizes;
  std::vector<T> memory;
  lf_clip clip;

  Clip(const Sizes& sizes_, Layout layout) : sizes(sizes_) {
    const auto [B, C, F, H, W] = sizes;
    const int64_t step = layout == kEverySecond ? 2 : 1, whole = (C + 7) / 8 * 8;
    const int64_t pixel = layout == kGapsBetweenPixels ? whole + 8 : layout == kOddPixels ? whole + 4 : step * C;
    const int64_t row = W * pixel + (layout == kGapsBetweenRows ? 8 : 0);
    const int64_t frame = layout == kOddPixels ? (H * row + 7) / 8 * 8 : H * row + (layout == kOddFrames ? 4 : 0);
    const int64_t strides[lf::kAxes] = {F * frame, step, frame, row, pixel};
    const int64_t channels_first[lf::kAxes] = {C * F * H * W, F * H * W, H * W, W, 1};
    std::copy_n(layout == kChannelsFirst ? channels_first : strides, lf::kAxes, clip.strides);
    int64_t first = 8;  // more than the alignment of what a vector allocates
    memory.assign(B * F * frame + 16, T{0xffff});
    while (reinterpret_cast<uintptr_t>(&memory[first]) % 16 != 0) ++first;
    if (layout == kMisaligned) ++first;
    if (layout == kBackwards) {
      first += (F - 1) * clip.strides[2];
      clip.strides[2] *= -1;
    }
    clip.data = &memory[first];
  }

  T& at(int64_t b, int64_t c, int64_t f, int64_t h, int64_t w) {
    const int64_t* s = clip.strides;
    return static_cast<T*>(clip.data)[b * s[0] + c * s[1] + f * s[2] + h * s[3] + w * s[4]];
  }

  template <class Each> void each(const Each& visit) {
    for (int64_t b = 0; b < sizes[0]; ++b)
      for (int64_t c = 0; c < sizes[1]; ++c)
        for (int64_t f = 0; f < sizes[2]; ++f)
          for (int64_t h = 0; h < sizes[3]; ++h)
            for (int64_t w = 0; w < sizes[4]; ++w) visit(at(b, c, f, h, w), b, c, f, h, w);
  }
};

struct Case {
  Direction direction = Direction::kUp;
  int64_t factor = 2, taps = 3, batch = 1, in = 64, out = 64, frames = 5, height = 3, width = 5;
  Layout x = kDense, y = kDense, weight = kDense;
  bool bias = true;

  int64_t out_frames() const {
    return direction == Direction::kUp ? frames * factor : (frames + factor - 1) / factor;
  }
  // The frame of x under a tap; -1 where there is none.
  int64_t frame(int64_t at, int64_t tap) const {
    const bool up = direction == Direction::kUp;
    const int64_t frame = (up ? at : factor * at) - taps / 2 + tap;
    if (frame < 0 || frame >= (up ? frames * factor : frames)) return -1;
    return up ? frame / factor : frame;
  }
};

template <class T> struct Call {
  const Case& c;
  Clip<T> x, y;
  Clip<T> weight;  // (1, in, out, taps, 1)
  std::vector<T> bias;

  explicit Call(const Case& c_)
      : c(c_), x({c.batch, c.in, c.frames, c.height, c.width}, c.x),
        y({c.batch, c.out, c.out_frames(), c.height, c.width}, c.y),
        weight({1, c.in, c.out, c.taps, 1}, c.weight), bias(2 * c.out, T{0xffff}) {
    if (c.weight == kChannelsFirst) {  // as (out, in, taps)
      weight.clip.strides[2] = c.in * c.taps;
      weight.clip.strides[1] = c.taps;
    }
    x.each([](T& value, auto...) { value = lf::narrow<T>(number()); });
    weight.each([](T& value, auto...) { value = lf::narrow<T>(number()); });
    for (int64_t o = 0; o < c.out; ++o) bias[2 * o] = lf::narrow<T>(number());
  }

  lf_status run(bool wgmma = false) {
    return lf::temporal_resize_cuda(resize(), wgmma, nullptr, 0, LF_EMULATED_STREAM);
  }

  // Up to so many frames as x's first has copies.
  lf_status run_long(int64_t frames, T* to) {
    TemporalResize longer = resize();
    longer.frames = 1, longer.factor = longer.out_frames = frames;
    longer.y = {to, {0, 1, c.out, 0, 0}};
    return lf::temporal_resize_cuda(longer, false, nullptr, 0, LF_EMULATED_STREAM);
  }

  TemporalResize resize() const {
    const lf_dtype dtype = std::is_same<T, Half>::value ? LF_FLOAT16 : LF_BFLOAT16;
    const int64_t* of_weight = weight.clip.strides;
    return {dtype, c.direction, c.batch, c.in, c.out, c.frames, c.out_frames(), c.height, c.width,
                                c.factor, c.taps, x.clip, y.clip, weight.clip.data,
                                {of_weight[2], of_weight[1], of_weight[3]}, c.bias ? bias.data() : nullptr, 2};
  }

  // By the definition.
  void fill(Clip<T>& expected) {
    std::vector<float> weights(c.out * c.taps * c.in), pixel(c.in);
    weight.each([&](T& value, int64_t, int64_t i, int64_t o, int64_t k, int64_t) {
      weights[(o * c.taps + k) * c.in + i] = lf::widen(value);
    });
    std::vector<float> sums(c.out);
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t at = 0; at < c.out_frames(); ++at)
        for (int64_t h = 0; h < c.height; ++h)
          for (int64_t w = 0; w < c.width; ++w) {
            for (int64_t o = 0; o < c.out; ++o) sums[o] = c.bias ? lf::widen(bias[2 * o]) : 0;
            for (int64_t k = 0; k < c.taps; ++k) {
              const int64_t frame = c.frame(at, k);
              if (frame < 0) continue;
              for (int64_t i = 0; i < c.in; ++i) pixel[i] = lf::widen(x.at(b, i, frame, h, w));
              for (int64_t o = 0; o < c.out; ++o) {
                const float* row = &weights[(o * c.taps + k) * c.in];
                float sum = 0;
                for (int64_t i = 0; i < c.in; ++i) sum += row[i] * pixel[i];
                sums[o] += sum;
              }
            }
            for (int64_t o = 0; o < c.out; ++o) expected.at(b, o, at, h, w) = lf::narrow<T>(sums[o]);
          }
  }
};

template <class T> bool same(const Clip<T>& a, const Clip<T>& b) {
  return a.memory.size() == b.memory.size() && memcmp(a.memory.data(), b.memory.data(), a.memory.size() * 2) == 0;
}

void describe(const Case& c) {
  fprintf(stderr, "  %s x%d, %d taps, batch %d, %d -> %d channels, %d frames of %d x %d, layouts %d, %d, %d\n",
          c.direction == Direction::kUp ? "up" : "down", int(c.factor), int(c.taps), int(c.batch), int(c.in),
          int(c.out), int(c.frames), int(c.height), int(c.width), c.x, c.y, c.weight);
}

template <class T> void check(const Case& c) {
  Call<T> call(c);
  Clip<T> expected = {call.y.sizes, c.y};
  call.fill(expected);
  const int before = failures;
  CHECK(call.run() == LF_OK);
  CHECK(same(call.y, expected));  // what lies between its elements too
  if (failures == before) return;
  fprintf(stderr, "  %s\n", lf::emulation::failure());
  describe(c);
}

void check_any(const Case& c) {
  lf::emulation::multiprocessors = static_cast<int>(one_of({1, 4, 60}));
  if (random_bits() % 2) check<BFloat16>(c);
  else check<Half>(c);
}

Case random_case() {
  Case c;
  c.batch = one_of({1, 1, 2});
  c.in = one_of({1, 8, 24, 40, 64, 72, 130});
  c.out = one_of({1, 8, 24, 40, 64, 72, 130});
  c.frames = one_of({1, 2, 5});
  c.height = one_of({1, 3, 13});
  c.width = one_of({1, 5, 11});
  c.bias = random_bits() % 4 != 0;
  return c;
}

void check_random_cases() {
  for (const Direction direction : {Direction::kDown, Direction::kUp}) {
    for (const int64_t factor : {1, 2, 3, 4}) {
      for (const int64_t taps : {1, 3, 5}) {
        for (const bool packs : {false, true}) {
          Case c = random_case();
          c.direction = direction, c.factor = factor, c.taps = taps;
          for (Layout* layout : {&c.x, &c.y, &c.weight}) {
            *layout = static_cast<Layout>(random_bits() % (packs ? kInPacks : kLayouts));
          }
          if (packs) {
            c.in = one_of({8, 24, 40, 64, 72});
            c.out = one_of({8, 24, 40, 64, 72});
          }
          check_any(c);
        }
      }
    }
  }
}

// Every kernel, with several tiles of everything and a ragged end of each.
void check_every_tile() {
  Case c;
  c.in = 40, c.height = 13, c.width = 11, c.frames = 3, c.x = c.y = kGapsBetweenRows;
  for (c.out = 72; c.out <= 104; c.out += 32) check<BFloat16>(c);
  c.direction = Direction::kDown;
  for (c.out = 136; c.out <= 200; c.out += 64) check<BFloat16>(c);
}

// All in packs but for one thing: the kernels that take packs would come upon misaligned memory.
void check_what_fits_no_packs() {
  for (const Direction direction : {Direction::kDown, Direction::kUp}) {
    Case c;
    c.direction = direction, c.in = c.out = 16, c.frames = 2;
    c.x = c.y = c.weight = kGapsBetweenPixels;
    for (Layout* layout : {&c.x, &c.y, &c.weight}) {
      for (int other = kInPacks; other < kLayouts; ++other) {
        *layout = static_cast<Layout>(other);
        check<BFloat16>(c);
      }
      *layout = kGapsBetweenPixels;
    }
    for (int64_t* channels : {&c.in, &c.out}) {
      *channels = 12;
      check<BFloat16>(c);
      *channels = 16;
    }
  }
}

// A walk in one piece, in pieces of several frames, and with a piece for each frame.
void check_pieces() {
  for (const int multiprocessors : {1, 3, 4, 100}) {
    for (const int64_t factor : {2, 3, 4}) {
      lf::emulation::multiprocessors = multiprocessors;
      Case c;
      c.in = c.out = 8, c.factor = factor, c.frames = 7;
      check<Half>(c);
    }
  }
}

// With the centre tap alone, and that the identity, frames are kept or doubled as they are.
template <class T> void check_identity(const Case& c) {
  Call<T> call(c);
  call.x.each([](T& value, auto...) {
    do value.bits = static_cast<uint16_t>(random_bits());
    while (!std::isfinite(lf::widen(value)) || value.bits == 0x8000);
  });
  call.weight.each([&](T& value, int64_t, int64_t i, int64_t o, int64_t k, int64_t) {
    value = lf::narrow<T>(i == o && k == c.taps / 2);
  });
  CHECK(call.run() == LF_OK);
  int64_t wrong = 0;
  call.y.each([&](T& value, int64_t b, int64_t o, int64_t f, int64_t h, int64_t w) {
    wrong += value.bits != call.x.at(b, o, c.frame(f, c.taps / 2), h, w).bits;
  });
  CHECK(wrong == 0);
  if (wrong) describe(c);
}

void check_identities() {
  for (const Direction direction : {Direction::kDown, Direction::kUp}) {
    for (const int64_t factor : {1, 2, 3}) {
      for (const Layout layout : {kDense, kChannelsFirst}) {
        Case c;
        c.direction = direction, c.factor = factor, c.in = c.out = 40, c.bias = false, c.x = c.y = layout;
        check_identity<BFloat16>(c);
        if (factor == 2) check_identity<Half>(c);
      }
    }
  }
}

// As x and y, or the weight, lie with one axis' places over 2^31 elements apart.
template <class T> void move_apart(Clip<T>& clip, const lf::emulation::FarMemory& memory, int axis) {
  int64_t sizes[lf::kAxes];
  std::copy_n(&clip.sizes[0], lf::kAxes, sizes);
  clip.clip.data =
      lf::emulation::move_apart(memory, static_cast<const T*>(clip.clip.data), sizes, clip.clip.strides, axis);
}

void check_far_apart(const Case& c, int axis, bool weight) {
  Call<BFloat16> call(c);
  Clip<BFloat16> expected = {call.y.sizes, kDense};
  call.fill(expected);
  const lf::emulation::FarMemory memory[2];
  if (weight) move_apart(call.weight, memory[0], axis);
  else move_apart(call.x, memory[0], axis), move_apart(call.y, memory[1], axis);
  CHECK(call.run() == LF_OK);
  int64_t wrong = 0;
  call.y.each([&](BFloat16& value, auto... at) { wrong += value.bits != expected.at(at...).bits; });
  CHECK(wrong == 0);
  if (wrong == 0) return;
  describe(c);
  fprintf(stderr, "  %s: axis %d is far apart\n", weight ? "weight" : "clips", axis);
}

void check_far_apart() {
  for (const Direction direction : {Direction::kDown, Direction::kUp}) {
    for (const int64_t channels : {12, 16}) {  // not in packs, and in packs
      Case c;
      c.direction = direction, c.in = c.out = channels, c.batch = 2, c.frames = 3, c.height = 2, c.width = 3;
      for (const int axis : {0, 1, 2, 3, 4}) check_far_apart(c, axis, false);
      for (const int axis : {1, 2, 3}) check_far_apart(c, axis, true);
    }
  }
}

// More blocks than one launch has. Of each launch the last ones run alone.
void check_many_blocks() {
  lf::emulation::most_blocks = 2;
  Case c;
  c.taps = 1, c.in = c.out = 8, c.batch = 1, c.height = c.width = 1;
  Call<BFloat16> call(c);
  const lf::emulation::FarMemory y;
  constexpr int64_t kFrames = (int64_t{1} << 31) + 8;
  auto* const to = static_cast<BFloat16*>(y.data());
  CHECK(call.run_long(kFrames, to) == LF_OK);
  Clip<BFloat16> expected = {call.y.sizes, kDense};
  call.fill(expected);
  int64_t wrong = 0;
  for (const int64_t frame : {int64_t{INT32_MAX} - 2, int64_t{INT32_MAX} - 1, kFrames - 2, kFrames - 1}) {
    for (int64_t o = 0; o < c.out; ++o) wrong += to[frame * c.out + o].bits != expected.at(0, o, 0, 0, 0).bits;
  }
  CHECK(wrong == 0);
  lf::emulation::most_blocks = UINT32_MAX;
}

int64_t products_of(const Case& c) {
  lf::emulation::counts.mma = 0;
  CHECK(Call<BFloat16>(c).run() == LF_OK);
  return lf::emulation::counts.mma;
}

// Nothing is multiplied but what has to be: skipped and missing frames never are.
void check_work() {
  lf::emulation::multiprocessors = 1;
  Case c;
  c.in = 32, c.out = 64;
  const int64_t one = 128 / 16 * (64 / 8) * (32 / 16);  // products of a frame's tile with one tap
  for (c.factor = 2; c.factor <= 4; ++c.factor) CHECK(products_of(c) == 3 * c.frames * one);
  c.factor = 1;  // a convolution: three taps but at the ends
  CHECK(products_of(c) == (3 * c.frames - 2) * one);
  c.direction = Direction::kDown, c.factor = 2;  // of 5 frames 0, 2 and 4
  CHECK(products_of(c) == (3 * 3 - 2) * one);
  c.frames = 1, c.taps = 5;
  CHECK(products_of(c) == one);
  c.direction = Direction::kUp, c.taps = 3, c.frames = 4;
  lf::emulation::multiprocessors = 100;  // a piece for each frame: its own three, and one of either neighbour
  CHECK(products_of(c) == (4 * 3 + 3 * 2) * one);
}

void check_refusals() {
  const Case c;
  Call<Half> call(c);
  lf::emulation::compute_capability = 75;
  CHECK(call.run() == LF_UNSUPPORTED_DEVICE);
  lf::emulation::compute_capability = 80;
  CHECK(call.run() == LF_OK);
  CHECK(call.run(true) == LF_UNSUPPORTED_DEVICE);
  TemporalResize resize{};
  resize.dtype = LF_FLOAT32;
  CHECK(lf::temporal_resize_cuda(resize, false, nullptr, 0, nullptr) == LF_UNSUPPORTED_DTYPE);
}

}  // namespace

int main() {
  check_work();
  check_pieces();
  check_what_fits_no_packs();
  check_every_tile();
  check_random_cases();
  check_identities();
  check_far_apart();
  check_many_blocks();
  check_refusals();
  CHECK(lf::emulation::counts.bank_conflicts == 0);
  return failures != 0;
}
