// common/temporal_resize_wgmma.cu on the host, against a plain loop. Numbers are such that fp32 holds every sum:
// results are compared bit for bit.
#include "../common/temporal_resize_wgmma.cu"

#include <utility>
#include <vector>

#include "check.h"
#include "far_memory.h"

namespace {

using lf::Direction;
using lf::TemporalResize;
using Bits = std::vector<uint16_t>;

enum class WeightLayout { kInPlace, kTapsLast, kEveryOther };  // bulk copies can take the first as it lies

// A call, and which of its surroundings are odd.
struct Case {
  Direction direction = Direction::kDown;
  int64_t factor = 2, taps = 3, in = 64, out = 64, batch = 1, frames = 3, height = 1, width = 40;
  lf_dtype dtype = LF_BFLOAT16;
  bool bias = true, identity = false;
  WeightLayout layout = WeightLayout::kTapsLast;
  int64_t x_gap = 0, y_gap = 0;  // elements between pixels
  int64_t y_row_gap = 0;
  bool y_planes = false;         // channels of y are apart, pixels together
  int processors = 2;

  bool down() const { return direction == Direction::kDown; }
  int64_t out_frames() const { return down() ? (frames + factor - 1) / factor : frames * factor; }
};

uint16_t bits_of(lf_dtype dtype, float value) {
  return dtype == LF_BFLOAT16 ? lf::narrow<lf::BFloat16>(value).bits : lf::narrow<lf::Half>(value).bits;
}
float value_of(lf_dtype dtype, uint16_t bits) {
  return dtype == LF_BFLOAT16 ? lf::widen(lf::BFloat16{bits}) : lf::widen(lf::Half{bits});
}

// A whole multiple of 1/64 in [-2, 2).
float number() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int>(state >> 24) - 128) / 64;
}

constexpr uint16_t kUntouched = 0x7fa5;  // a NaN that nothing computes

class Call {
 public:
  explicit Call(const Case& c) : c_(c) {
    const int64_t pixel = (c.in + 7) / 8 * 8 + c.x_gap, pixels = c.height * c.width;
    r_.dtype = c.dtype, r_.direction = c.direction;
    r_.batch = c.batch, r_.in = c.in, r_.out = c.out, r_.frames = c.frames, r_.out_frames = c.out_frames();
    r_.height = c.height, r_.width = c.width, r_.factor = c.factor, r_.taps = c.taps;
    x_ = drawn(c.batch * c.frames * pixels * pixel);
    for (int64_t i = 0; i < c.batch * c.frames * pixels; ++i) forget(aligned(x_) + i * pixel, c.in, pixel);
    r_.x = {aligned(x_), {c.frames * pixels * pixel, 1, pixels * pixel, c.width * pixel, pixel}};
    weight_ = drawn(c.out * c.taps * 2 * ((c.in + 7) / 8 * 8));
    r_.weight = aligned(weight_);
    const int64_t row = (c.in + 7) / 8 * 8;
    if (c.layout == WeightLayout::kInPlace) {
      set_strides(row, 1, c.out * row);
      for (int64_t i = 0; i < c.out * c.taps; ++i) forget(aligned(weight_) + i * row, c.in, row);
    } else if (c.layout == WeightLayout::kTapsLast) {
      set_strides(c.in * c.taps, c.taps, 1);
    } else {
      set_strides(2 * row, 2, c.out * 2 * row);
    }
    if (c.identity) make_identity();
    bias_ = drawn(2 * c.out);
    r_.bias = c.bias ? aligned(bias_) : nullptr;
    r_.bias_stride = 2;
    place_y();
    workspace_.assign(temporal_resize_wgmma_bytes(r_) + 64, '\xff');
  }

  lf_status run() {
    lf::emulation::multiprocessors = c_.processors;
    lf::emulation::context = false;
    y_.assign(y_.size(), kUntouched);
    Bits written = y_;
    lf::emulation::after_block = [&] {
      for (size_t i = 0; i < y_.size(); ++i) {
        if (y_[i] == kUntouched) continue;
        written_twice_ = written_twice_ || written[i] != kUntouched;
        written[i] = std::exchange(y_[i], kUntouched);
      }
    };
    const auto address = reinterpret_cast<uintptr_t>(workspace_.data());
    const lf_status status = lf::temporal_resize_wgmma(r_, workspace_.data() + (64 - address % 64) % 64, 0,
                                                        LF_EMULATED_STREAM);
    lf::emulation::after_block = nullptr;
    y_ = written;
    CHECK(lf::emulation::nothing_left());
    if (status == LF_CUDA_ERROR) fprintf(stderr, "%s\n", lf_last_cuda_error());
    return status;
  }

  // Every element of y is what a plain loop makes, one block's work, and nothing between them was written.
  bool right() const {
    Bits expected(y_.size(), kUntouched);
    const int64_t first = static_cast<uint16_t*>(r_.y.data) - y_.data();
    each([&](int64_t offset, uint16_t sum) { expected[first + offset] = sum; });
    return expected == y_ && !written_twice_;
  }

  // The same where y's places along an axis are far apart, and x's too where bulk copies can take them.
  bool right_apart(int axis) {
    const lf::emulation::FarMemory x, y;
    const int64_t in[] = {r_.batch, r_.in, r_.frames, r_.height, r_.width};
    const int64_t out[] = {r_.batch, r_.out, r_.out_frames, r_.height, r_.width};
    if (axis == lf::kBatch || axis == lf::kTime) {
      r_.x.data = lf::emulation::move_apart(x, static_cast<const uint16_t*>(r_.x.data), in, r_.x.strides, axis);
    }
    r_.y.data = lf::emulation::move_apart(y, static_cast<const uint16_t*>(r_.y.data), out, r_.y.strides, axis);
    bool all = run() == LF_OK;
    each([&](int64_t offset, uint16_t sum) { all = all && static_cast<const uint16_t*>(r_.y.data)[offset] == sum; });
    return all;
  }

  TemporalResize& resize() { return r_; }

 private:
  // Of each element of y: where it lies, and what it has to be.
  template <class Visit> void each(const Visit& visit) const {
    const int64_t* s = r_.y.strides;
    for (int64_t b = 0; b < r_.batch; ++b)
      for (int64_t j = 0; j < r_.out_frames; ++j)
        for (int64_t h = 0; h < r_.height; ++h)
          for (int64_t w = 0; w < r_.width; ++w)
            for (int64_t o = 0; o < r_.out; ++o) {
              visit(b * s[0] + o * s[1] + j * s[2] + h * s[3] + w * s[4], sum(b, j, h, w, o));
            }
  }

  static int64_t to_alignment(const Bits& bits) { return reinterpret_cast<uintptr_t>(bits.data()) % 16 / 2; }
  static uint16_t* aligned(Bits& bits) { return bits.data() + (8 - to_alignment(bits)) % 8; }

  Bits drawn(int64_t size) const {
    Bits bits(size + 8);
    for (uint16_t& element : bits) element = bits_of(c_.dtype, number());
    return bits;
  }

  // What lies between the elements of a tensor is NaN.
  static void forget(uint16_t* row, int64_t begin, int64_t end) { std::fill(row + begin, row + end, kUntouched); }

  void set_strides(int64_t out, int64_t in, int64_t tap) {
    r_.weight_strides[0] = out, r_.weight_strides[1] = in, r_.weight_strides[2] = tap;
  }

  uint16_t& weight(int64_t o, int64_t i, int64_t k) const {
    const int64_t* s = r_.weight_strides;
    return const_cast<uint16_t*>(static_cast<const uint16_t*>(r_.weight))[o * s[0] + i * s[1] + k * s[2]];
  }

  void make_identity() {
    for (int64_t o = 0; o < c_.out; ++o)
      for (int64_t i = 0; i < c_.in; ++i)
        for (int64_t k = 0; k < c_.taps; ++k) weight(o, i, k) = bits_of(c_.dtype, o == i && k == c_.taps / 2);
  }

  void place_y() {
    const int64_t T = r_.out_frames, H = c_.height, W = c_.width, C = c_.out;
    int64_t* s = r_.y.strides;
    if (c_.y_planes) {
      s[4] = 1, s[3] = W + c_.y_row_gap, s[2] = H * s[3], s[1] = T * s[2], s[0] = C * s[1];
    } else {
      s[1] = 1, s[4] = C + c_.y_gap, s[3] = W * s[4] + c_.y_row_gap, s[2] = H * s[3], s[0] = T * s[2];
    }
    y_.resize(c_.batch * s[0] + 8);
    r_.y.data = aligned(y_);
  }

  uint16_t sum(int64_t b, int64_t j, int64_t h, int64_t w, int64_t o) const {
    const int64_t *s = r_.x.strides, radius = c_.taps / 2;
    double total = c_.bias ? read(static_cast<const uint16_t*>(r_.bias)[2 * o]) : 0;
    for (int64_t k = 0; k < c_.taps; ++k) {
      const int64_t place = (c_.down() ? c_.factor * j : j) - radius + k;
      if (place < 0 || place >= (c_.down() ? c_.frames : r_.out_frames)) continue;
      const int64_t frame = c_.down() ? place : place / c_.factor;
      const auto* x = static_cast<const uint16_t*>(r_.x.data) + b * s[0] + frame * s[2] + h * s[3] + w * s[4];
      for (int64_t i = 0; i < c_.in; ++i) total += read(x[i]) * read(weight(o, i, k));
    }
    return bits_of(c_.dtype, static_cast<float>(total));
  }

  double read(uint16_t bits) const { return value_of(c_.dtype, bits); }

  const Case c_;
  TemporalResize r_{};
  Bits x_, y_, weight_, bias_;
  std::vector<char> workspace_;
  bool written_twice_ = false;  // by two blocks
};

void check(const Case& c) {
  Call call(c);
  const bool fine = call.run() == LF_OK && call.right();
  CHECK(fine);
  if (fine) return;
  fprintf(stderr, "  %s by %d, %d taps, %d to %d channels, %d x %d frames of %d x %d, dtype %d, %d processors\n",
          c.down() ? "down" : "up", int(c.factor), int(c.taps), int(c.in), int(c.out), int(c.batch), int(c.frames),
          int(c.height), int(c.width), int(c.dtype), c.processors);
}

void check_directions_factors_and_taps() {
  for (const Direction direction : {Direction::kDown, Direction::kUp})
    for (int64_t factor = 1; factor <= 4; ++factor)
      for (const int64_t taps : {1, 3, 5})
        for (const int64_t frames : {1, 2, 5}) {
          Case c;
          c.direction = direction, c.factor = factor, c.taps = taps, c.frames = frames;
          c.in = 24, c.out = 16;
          check(c);
        }
}

void check_channels() {
  for (const Direction direction : {Direction::kDown, Direction::kUp})
    for (const auto& [in, out] : {std::pair{8, 8}, {3, 5}, {72, 40}, {136, 130}, {256, 200}, {64, 256}, {264, 264}}) {
      Case c;
      c.direction = direction, c.in = in, c.out = out, c.dtype = in % 16 ? LF_FLOAT16 : LF_BFLOAT16;
      c.frames = 2;
      check(c);
    }
}

void check_pixels_and_strides() {
  for (const Direction direction : {Direction::kDown, Direction::kUp})
    for (const auto& [height, width] : {std::pair{1, 1}, {7, 9}, {3, 43}, {8, 25}, {40, 1}}) {
      Case c;
      c.direction = direction, c.height = height, c.width = width, c.in = 16, c.out = 24, c.batch = 2, c.frames = 2;
      c.x_gap = 8, c.bias = height != 7;
      check(c);
      c.y_gap = 8, c.y_row_gap = 16, c.layout = WeightLayout::kInPlace;
      check(c);
      c.y_gap = 3, c.layout = WeightLayout::kEveryOther;
      check(c);
      c.y_planes = true;
      check(c);
    }
}

// Many more tiles than stages or blocks, and frames divided among blocks.
void check_rings_and_runs() {
  for (const int processors : {1, 2, 3, 5, 16}) {
    Case c;
    c.direction = Direction::kUp, c.processors = processors, c.frames = 9, c.in = 40, c.out = 72, c.width = 130;
    check(c);
    c.direction = Direction::kDown, c.factor = 1;
    check(c);
  }
  Case c;  // a run for each frame
  c.direction = Direction::kUp, c.processors = 16, c.frames = 5, c.in = 8;
  check(c);
}

// Weights that stay in shared memory, and such that do not fit.
void check_streamed_weights() {
  for (const Direction direction : {Direction::kDown, Direction::kUp})
    for (const int64_t in : {64, 320}) {
      Case c;
      c.direction = direction, c.in = in, c.out = 72, c.frames = 4, c.width = 20, c.processors = 1;
      check(c);
    }
}

void check_far_apart() {
  for (const Direction direction : {Direction::kDown, Direction::kUp})
    for (int axis = 0; axis < lf::kAxes; ++axis) {
      Case c;
      c.direction = direction, c.in = 16, c.out = 24, c.batch = 2, c.frames = 3, c.height = 3, c.width = 2;
      CHECK(Call(c).right_apart(axis));
    }
}

// What the driver takes: multiples of 16 bytes below 2^40 of them.
void check_strides_of_bulk_copies() {
  constexpr int64_t kLimit = int64_t{1} << 39;  // elements
  CHECK(lf::bulk_stride(2, 8) && lf::bulk_stride(2, kLimit - 8));
  for (const int64_t stride : {int64_t{0}, int64_t{-8}, int64_t{4}, int64_t{12}, kLimit - 4, kLimit, 2 * kLimit}) {
    CHECK(!lf::bulk_stride(2, stride) && lf::bulk_stride(1, stride));
  }
}

void check_identity() {
  for (const lf_dtype dtype : {LF_FLOAT16, LF_BFLOAT16})
    for (const Direction direction : {Direction::kDown, Direction::kUp})
      for (const int64_t factor : {2, 3}) {
        Case c;
        c.direction = direction, c.factor = factor, c.dtype = dtype, c.identity = true, c.bias = false;
        c.in = c.out = 72, c.frames = 5;
        check(c);
      }
}

void check_refusals() {
  const Case c;
  const auto status = [&](auto&& change) {
    Call call(c);
    change(call.resize());
    return call.run();
  };
  CHECK(status([](TemporalResize&) {}) == LF_OK);
  CHECK(status([](TemporalResize& r) { r.dtype = LF_FLOAT32; }) == LF_UNSUPPORTED_DTYPE);
  CHECK(status([](TemporalResize& r) { r.x.strides[1] = 2; }) == LF_INVALID_STRIDES);
  CHECK(status([](TemporalResize& r) { r.x.strides[2] += 4; }) == LF_INVALID_STRIDES);
  CHECK(status([](TemporalResize& r) { r.x.strides[4] = 0; }) == LF_INVALID_STRIDES);
  CHECK(status([](TemporalResize& r) { r.x.strides[2] *= -1; }) == LF_INVALID_STRIDES);
  CHECK(status([](TemporalResize& r) { r.height = 2, r.x.strides[3] += 8; }) == LF_INVALID_STRIDES);
  CHECK(status([](TemporalResize& r) { r.x.data = static_cast<char*>(r.x.data) + 2; }) == LF_INVALID_STRIDES);
  CHECK(status([](TemporalResize& r) { r.height = int64_t{1} << 31; }) == LF_INVALID_SHAPE);
  lf::emulation::compute_capability = 80;
  CHECK(status([](TemporalResize&) {}) == LF_UNSUPPORTED_DEVICE);
  lf::emulation::compute_capability = 90;
}

}  // namespace

int main() {
  check_directions_factors_and_taps();
  check_channels();
  check_pixels_and_strides();
  check_rings_and_runs();
  check_streamed_weights();
  check_identity();
  check_far_apart();
  check_strides_of_bulk_copies();
  check_refusals();
  return failures != 0;
}
