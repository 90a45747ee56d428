#include "common/space_time.h"

#include "common/temporal_resize_wgmma.h"

namespace lf {
namespace {

// False where the product, or the sum below, is none of int64.
bool multiply(int64_t a, int64_t b, int64_t& product) {
  if (a != 0 && b > INT64_MAX / a) return false;
  product = a * b;
  return true;
}

// Whether a tensor of these sizes, each >= 0, has as many bytes as can be counted, and as a sum of several such can.
bool countable(const Sizes& shape, int64_t element_size) {
  constexpr int64_t kTensors = 16;
  int64_t bytes = kTensors * element_size;
  for (const int64_t size : shape) {
    if (size > 0 && !multiply(size, bytes, bytes)) return false;
  }
  return true;
}

std::optional<Span> span_of(const lf_clip& clip, const Sizes& shape, int64_t element_size) {
  return span_of(clip.data, shape.data(), clip.strides, kAxes, element_size);
}

// Of a weight and a bias; the latter also where it is null.
struct Parameters {
  explicit Parameters(const lf_space_time& a)
      : weight{const_cast<void*>(a.weight), {a.weight_strides[0], a.weight_strides[1], a.weight_strides[2], 0, 0}},
        bias{const_cast<void*>(a.bias), {a.bias_stride, 0, 0, 0, 0}},
        weights{a.channels_out, a.channels, a.taps, 1, 1},
        biases{a.bias ? a.channels_out : 1, 1, 1, 1, 1} {}

  lf_status check_apart(const std::optional<Span>& written, int64_t element_size) const {
    const lf_status status = lf::check_apart(span_of(weight, weights, element_size), written);
    return status != LF_OK || !bias.data ? status : lf::check_apart(span_of(bias, biases, element_size), written);
  }

  lf_clip weight, bias;
  Sizes weights, biases;
};

lf_clip packed(const Sizes& shape) {  // channels last
  const int64_t C = shape[kChannel], W = shape[kWidth], H = shape[kHeight], T = shape[kTime];
  return {nullptr, {T * H * W * C, 1, H * W * C, W * C, C}};
}

class Reader {
 public:
  Reader(const lf_space_time& a, Direction direction, Purpose purpose, SpaceTimeCall& call)
      : a_(a), down_(direction == Direction::kDown), purpose_(purpose), call_(call) {
    call_ = {};
    call_.temporal.direction = direction;
  }

  lf_status read() {
    lf_status status = lf_dtype_size(a_.dtype, &element_size_);
    if (status == LF_OK) status = check_numbers();
    if (status == LF_OK) status = shape();
    if (status != LF_OK) return status;
    call_.empty = a_.batch == 0;
    call_.learned = a_.weight != nullptr;
    call_.fixed = !call_.learned || a_.factor[1] * a_.factor[2] > 1;
    call_.learned_first = call_.learned && !down_;
    if (purpose_ != Purpose::kWorkspace && !call_.empty) status = check_memory();
    if (status == LF_OK) take_apart();
    return status;
  }

 private:
  lf_status check_numbers() const {
    if (a_.mode < LF_NEAREST || a_.mode > (down_ ? LF_BLUR : LF_LINEAR)) return LF_INVALID_ARGUMENT;
    if (purpose_ == Purpose::kAdjoint && a_.weight) return LF_INVALID_ARGUMENT;
    if (a_.weight && a_.dtype == LF_FLOAT64) return LF_UNSUPPORTED_DTYPE;
    if (a_.weight && (a_.taps < 1 || a_.taps % 2 == 0 || a_.channels_out < 1)) return LF_INVALID_SHAPE;
    return LF_OK;
  }

  lf_status shape() {
    x_ = {a_.batch, a_.channels, a_.frames, a_.height, a_.width};
    if (a_.batch < 0 || std::min({a_.channels, a_.frames, a_.height, a_.width}) < 1) return LF_INVALID_SHAPE;
    y_ = x_;
    if (a_.weight) y_[kChannel] = a_.channels_out;
    for (int i = 0; i < 3; ++i) {
      const int64_t factor = a_.factor[i];
      int64_t& size = y_[kTime + i];
      if (factor < 1) return LF_INVALID_SHAPE;
      if (!down_) {
        if (!multiply(size, factor, size)) return LF_INVALID_SHAPE;
      } else if (a_.weight && i == 0) {
        size = size / factor + (size % factor != 0);
      } else {
        if (size % factor) return LF_INVALID_SHAPE;
        size /= factor;
      }
    }
    constexpr int64_t kPackedBytes = 16;  // of a weight's element at most, where rows are rounded up to that
    bool fits = !a_.weight || countable(Parameters(a_).weights, kPackedBytes);
    for (const Sizes& shape : {x_, y_, between()}) fits = fits && countable(shape, element_size_);
    return fits ? LF_OK : LF_INVALID_SHAPE;
  }

  lf_status check_memory() const {
    if (!a_.x.data || !a_.y.data) return LF_INVALID_ARGUMENT;
    const bool adjoint = purpose_ == Purpose::kAdjoint;
    const lf_clip &in = adjoint ? a_.y : a_.x, &out = adjoint ? a_.x : a_.y;
    const Sizes &in_shape = adjoint ? y_ : x_, &out_shape = adjoint ? x_ : y_;
    if (!elements_apart(out_shape.data(), out.strides, kAxes)) return LF_INVALID_STRIDES;
    const std::optional<Span> written = span_of(out, out_shape, element_size_);
    const lf_status status = check_apart(span_of(in, in_shape, element_size_), written);
    return status != LF_OK || !a_.weight ? status : Parameters(a_).check_apart(written, element_size_);
  }

  // Of the clip between a resize in space and a learned one in time: the smaller of the two there could be.
  Sizes between() const {
    Sizes shape = x_;
    if (down_) shape[kHeight] = y_[kHeight], shape[kWidth] = y_[kWidth];
    else shape[kChannel] = y_[kChannel], shape[kTime] = y_[kTime];
    return shape;
  }

  void take_apart() {
    const bool adjoint = purpose_ == Purpose::kAdjoint;
    Resample& r = call_.resample;
    r.dtype = a_.dtype;
    r.from = adjoint ? a_.y : a_.x, r.from_shape = adjoint ? y_ : x_;
    r.to = adjoint ? a_.x : a_.y, r.to_shape = adjoint ? x_ : y_;
    const Sizes& coarse = down_ ? y_ : x_;
    for (int i = 0; i < 3; ++i) r.axes[i] = {coarse[kTime + i], a_.factor[i], a_.mode};
    if (!call_.learned) return;
    TemporalResize& t = call_.temporal;
    t.dtype = a_.dtype;
    t.batch = a_.batch, t.in = a_.channels, t.out = a_.channels_out, t.frames = a_.frames, t.out_frames = y_[kTime];
    t.height = a_.height, t.width = a_.width, t.factor = a_.factor[0], t.taps = a_.taps;
    t.x = a_.x, t.y = a_.y;
    t.weight = a_.weight, t.bias = a_.bias, t.bias_stride = a_.bias_stride;
    std::copy_n(a_.weight_strides, 3, t.weight_strides);
    if (!call_.fixed) return;
    const Sizes shape = between();
    call_.between = element_size_;
    for (const int64_t size : shape) call_.between *= size;
    call_.between = whole_units(call_.between);
    r.axes[0] = {shape[kTime], 1, a_.mode};
    (down_ ? r.to_shape : r.from_shape) = shape;
    (down_ ? r.to : r.from) = (down_ ? t.x : t.y) = packed(shape);
    if (down_) t.height = shape[kHeight], t.width = shape[kWidth];
  }

  const lf_space_time& a_;
  const bool down_;
  const Purpose purpose_;
  SpaceTimeCall& call_;
  int64_t element_size_ = 0;
  Sizes x_{}, y_{};
};

}  // namespace

int64_t temporal_resize_cuda_bytes(const TemporalResize& resize, bool wgmma) {
  return wgmma ? temporal_resize_wgmma_bytes(resize) : 0;
}

lf_status read_call(const lf_space_time* arguments, Direction direction, Purpose purpose,
                    SpaceTimeCall& call) noexcept {
  return arguments ? Reader(*arguments, direction, purpose, call).read() : LF_INVALID_ARGUMENT;
}

lf_status check_workspace(const lf_space_time& arguments, const SpaceTimeCall& call, int64_t needed) noexcept {
  if (needed == 0) return LF_OK;
  const auto address = reinterpret_cast<uintptr_t>(arguments.workspace);
  if (address == 0 || address % kWorkspaceUnit != 0 || arguments.workspace_size < needed) return LF_NO_WORKSPACE;
  int64_t size = 0;
  lf_dtype_size(arguments.dtype, &size);
  const int64_t step = 1;
  const std::optional<Span> own = span_of(arguments.workspace, &needed, &step, 1, 1);
  if (!own) return LF_NO_WORKSPACE;
  const TemporalResize& t = call.temporal;
  const Sizes in{t.batch, t.in, t.frames, t.height, t.width}, out{t.batch, t.out, t.out_frames, t.height, t.width};
  const bool down = t.direction == Direction::kDown;
  const Sizes &x = call.fixed && down ? call.resample.from_shape : in;
  const Sizes &y = call.fixed && !down ? call.resample.to_shape : out;
  lf_status status = check_apart(span_of(arguments.x, x, size), own);
  if (status == LF_OK) status = check_apart(span_of(arguments.y, y, size), own);
  return status == LF_OK ? Parameters(arguments).check_apart(own, size) : status;
}

}  // namespace lf
