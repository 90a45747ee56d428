// The Python module lumiere_fast._native: the only file that knows Python. It reads addresses, shapes and strides out
// of Python objects and hands them to the C functions; lumiere_fast/native.py gives it tensors' and explains statuses.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "blend_windows_limits.h"
#include "lumiere_fast.h"

namespace py = pybind11;

namespace {

constexpr Py_ssize_t kAxes = 5, kMostAxes = 6;

// Straight to CPython: pybind11's casters cost more than a small call's work.
[[noreturn]] void refuse(const std::string& accepted, PyObject* got) {
  PyErr_Clear();
  throw py::value_error(accepted + ", got " + std::string(py::repr(got)));
}

int64_t integer(PyObject* object, const char* what) {
  const long long value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) refuse(std::string(what) + " must be integers of at most 64 bits", object);
  return value;
}

double number(PyObject* object, const char* what) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1 && PyErr_Occurred()) refuse(std::string(what) + " must be None or numbers", object);
  return value;
}

void* address(PyObject* object) {
  void* const found = PyLong_AsVoidPtr(object);
  if (found == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return found;
}

// The items of a list or tuple, or of anything else that can be iterated.
class Items {
 public:
  Items(PyObject* object, const char* what)
      : sequence_(py::reinterpret_steal<py::object>(PySequence_Fast(object, ""))) {
    if (!sequence_) refuse(std::string(what) + " must be a sequence", object);
  }
  Py_ssize_t size() const { return PySequence_Fast_GET_SIZE(sequence_.ptr()); }
  PyObject* operator[](Py_ssize_t i) const { return PySequence_Fast_GET_ITEM(sequence_.ptr(), i); }

  void require(Py_ssize_t size, const char* what) const {
    if (this->size() != size) throw py::value_error(what);
  }

 private:
  py::object sequence_;
};

void append_axes(PyObject* object, std::vector<int64_t>& to) {
  const Items items(object, "a shape");
  items.require(kAxes, "every window, and out, must have 5 axes (B, C, T, H, W)");
  for (Py_ssize_t i = 0; i < kAxes; ++i) to.push_back(integer(items[i], "shapes and strides"));
}

// (address, shape, strides) of some tensors.
struct Operands {
  std::vector<void*> data;
  std::vector<int64_t> shapes, strides;

  void add(PyObject* object) {
    const Items items(object, "an operand");
    items.require(3, "an operand is (address, shape, strides)");
    data.push_back(address(items[0]));
    append_axes(items[1], shapes);
    append_axes(items[2], strides);
  }
};

struct WindowArguments {
  Operands windows, out;
  std::vector<int64_t> starts;
  std::vector<double> weights;
  int32_t axes;

  // `out_`: what has the video's shape.
  WindowArguments(const char* op, py::handle windows_, py::handle starts_, py::handle extent_, py::handle weights_,
                  py::handle out_) try {
    const Items parts(windows_.ptr(), "windows"), first(starts_.ptr(), "starts");
    const Items extent(extent_.ptr(), "extent");
    for (Py_ssize_t i = 0; i < parts.size(); ++i) windows.add(parts[i]);
    for (Py_ssize_t i = 0; i < first.size(); ++i) starts.push_back(integer(first[i], "starts"));
    out.add(out_.ptr());
    axes = static_cast<int32_t>(extent.size());
    if (axes != 1 && axes != 3) throw py::value_error("extent must be (T,) or (T, H, W)");
    first.require(parts.size() * axes, "starts must hold one integer a window and blended axis");
    for (int32_t axis = 0; axis < axes; ++axis) {
      const bool fits = integer(extent[axis], "the sizes of extent") == out.shapes[2 + axis];
      if (!fits) throw py::value_error("out must have the extent");
    }
    if (!weights_.is_none()) read_weights(weights_.ptr());
  } catch (const py::value_error& error) {
    throw py::value_error(std::string(op) + ": " + error.what());
  }

  const double* weights_or_null() const { return weights.empty() ? nullptr : weights.data(); }

 private:
  void read_weights(PyObject* object) {
    const Items items(object, "weights");
    int64_t needed = 0;
    for (int32_t axis = 0; axis < axes && !windows.shapes.empty(); ++axis) needed += windows.shapes[2 + axis];
    items.require(needed, "weights must hold one number for each place on each axis blended");
    for (Py_ssize_t i = 0; i < items.size(); ++i) weights.push_back(number(items[i], "weights"));
  }
};

lf_status blend_windows_cpu(lf_dtype dtype, py::handle windows, py::handle starts, py::handle extent,
                            py::handle weights, py::handle out, int32_t num_threads) {
  const WindowArguments a("blend_windows", windows, starts, extent, weights, out);
  const py::gil_scoped_release release;
  return lf_blend_windows_cpu(dtype, a.windows.data.size(), a.windows.data.data(), a.windows.shapes.data(),
                              a.windows.strides.data(), a.axes, a.starts.data(), a.weights_or_null(), a.out.data[0],
                              a.out.shapes.data(), a.out.strides.data(), num_threads);
}

lf_status blend_windows_cuda(lf_dtype dtype, py::handle windows, py::handle starts, py::handle extent,
                             py::handle weights, py::handle out, int32_t device, uintptr_t stream) {
  const WindowArguments a("blend_windows", windows, starts, extent, weights, out);
  const py::gil_scoped_release release;
  return lf_blend_windows_cuda(dtype, a.windows.data.size(), a.windows.data.data(), a.windows.shapes.data(),
                               a.windows.strides.data(), a.axes, a.starts.data(), a.weights_or_null(), a.out.data[0],
                               a.out.shapes.data(), a.out.strides.data(), device, reinterpret_cast<void*>(stream));
}

// (address, shape, strides, dtype) of a tensor of few axes, or None; lumiere_fast/native.py has looked at the shape.
struct View {
  void* data = nullptr;
  std::array<int64_t, kMostAxes> shape{}, strides{};
  lf_dtype dtype{};

  explicit View(py::handle object) {
    if (object.is_none()) return;
    const Items items(object.ptr(), "an operand");
    items.require(4, "an operand is (address, shape, strides, dtype)");
    data = address(items[0]);
    read(items[1], shape);
    read(items[2], strides);
    dtype = static_cast<lf_dtype>(integer(items[3], "a dtype's code"));
  }
  lf_clip clip() const {
    lf_clip clip{data, {}};
    std::copy_n(strides.begin(), kAxes, clip.strides);
    return clip;
  }
  lf_heads heads() const {
    lf_heads heads{data, {}};
    std::copy(strides.begin(), strides.end(), heads.strides);
    return heads;
  }

 private:
  static void read(PyObject* object, std::array<int64_t, kMostAxes>& to) {
    const Items items(object, "a shape");
    if (items.size() > kMostAxes) throw py::value_error("an operand has at most 6 axes");
    for (Py_ssize_t i = 0; i < items.size(); ++i) to[i] = integer(items[i], "shapes and strides");
  }
};

// `history` and `noise` may be None. `latent` is (address, shape, strides), the other clips have a dtype behind them.
lf_status denoise_step_cpu(lf_dtype window_dtype, py::handle windows, py::handle starts, py::handle extent,
                           py::handle weights, lf_dtype dtype, py::handle latent, py::handle coefficients_,
                           py::handle guidance_scale, lf_bound bound, double percentile, py::handle noise,
                           py::handle history, py::handle next, py::handle x0, int32_t num_threads) {
  const WindowArguments a("denoise_step", windows, starts, extent, weights, latent);
  lf_denoise_step call{};
  call.window_dtype = window_dtype, call.num_windows = a.windows.data.size(), call.windows = a.windows.data.data();
  call.window_shapes = a.windows.shapes.data(), call.window_strides = a.windows.strides.data();
  call.axes = a.axes, call.starts = a.starts.data(), call.weights = a.weights_or_null();
  call.dtype = dtype;
  std::copy_n(a.out.shapes.begin(), kAxes, call.shape);
  call.latent.data = a.out.data[0];
  std::copy_n(a.out.strides.begin(), kAxes, call.latent.strides);
  call.noise = View(noise).clip(), call.history = View(history).clip();
  call.next = View(next).clip(), call.x0 = View(x0).clip();
  const Items coefficients(coefficients_.ptr(), "denoise_step: coefficients");
  coefficients.require(6, "denoise_step: coefficients must be six numbers");
  double* const of[] = {&call.x0_latent,      &call.x0_prediction,       &call.latent_coefficient,
                        &call.x0_coefficient, &call.history_coefficient, &call.noise_coefficient};
  for (Py_ssize_t i = 0; i < 6; ++i) *of[i] = number(coefficients[i], "denoise_step: coefficients");
  call.guided = !guidance_scale.is_none();
  if (call.guided) call.guidance_scale = number(guidance_scale.ptr(), "denoise_step: guidance_scale");
  call.bound = bound, call.percentile = percentile;
  const py::gil_scoped_release release;
  return lf_denoise_step_cpu(&call, num_threads);
}

// None, or (address, strides, dtype) with the strides of (B, T, C).
struct PerChannel {
  lf_per_channel value;
  bool given;

  explicit PerChannel(py::handle object) : value{}, given(!object.is_none()) {
    if (!given) return;
    const Items items(object.ptr(), "an operand"), strides(items[1], "strides");
    strides.require(3, "a channel's numbers have 3 strides");
    value.data = address(items[0]);
    for (Py_ssize_t i = 0; i < 3; ++i) value.strides[i] = integer(strides[i], "strides");
    value.dtype = static_cast<lf_dtype>(integer(items[2], "a dtype's code"));
  }
  const lf_per_channel* or_null() const { return given ? &value : nullptr; }
};

lf_status group_norm_cpu(py::handle x_, int64_t num_groups, py::handle weight_, py::handle bias_, py::handle scale_,
                         py::handle shift_, bool silu, double eps, bool per_frame, py::handle out_,
                         int32_t num_threads) {
  const View x(x_), out(out_);
  const PerChannel weight(weight_), bias(bias_), scale(scale_), shift(shift_);
  const py::gil_scoped_release release;
  return lf_group_norm_cpu(x.dtype, x.data, x.shape.data(), x.strides.data(), num_groups, weight.or_null(),
                           bias.or_null(), scale.or_null(), shift.or_null(), silu ? LF_SILU : LF_NO_ACTIVATION, eps,
                           per_frame, out.data, out.strides.data(), num_threads);
}

// `mean` and `rstd` have the 3 strides of (B, T, num_groups).
lf_status group_norm_stats_cpu(py::handle x_, int64_t num_groups, double eps, bool per_frame, py::handle mean_,
                               py::handle rstd_, int32_t num_threads) {
  const View x(x_), mean(mean_), rstd(rstd_);
  const py::gil_scoped_release release;
  return lf_group_norm_stats_cpu(x.dtype, x.data, x.shape.data(), x.strides.data(), num_groups, eps, per_frame,
                                 mean.data, mean.strides.data(), rstd.data, rstd.strides.data(), num_threads);
}

// `gx` may be None.
lf_status group_norm_backward_cpu(py::handle gy_, py::handle x_, int64_t num_groups, py::handle weight_,
                                  py::handle bias_, py::handle scale_, py::handle shift_, bool silu, double eps,
                                  bool per_frame, py::handle gx_, uintptr_t sums, uintptr_t n_sums,
                                  int32_t num_threads) {
  const View gy(gy_), x(x_), gx(gx_);
  const PerChannel weight(weight_), bias(bias_), scale(scale_), shift(shift_);
  const py::gil_scoped_release release;
  return lf_group_norm_backward_cpu(gy.dtype, gy.data, gy.strides.data(), x.data, x.shape.data(), x.strides.data(),
                                    num_groups, weight.or_null(), bias.or_null(), scale.or_null(), shift.or_null(),
                                    silu ? LF_SILU : LF_NO_ACTIVATION, eps, per_frame, gx.data, gx.strides.data(),
                                    reinterpret_cast<void*>(sums), reinterpret_cast<void*>(n_sums), num_threads);
}

// `residual`, `mean` and `rstd` may be None. `norm` is None, or (groups, mean, rstd, weight, bias, scale, shift,
// whether no SiLU follows).
lf_status temporal_conv_cpu(py::handle x_, py::handle weight_, py::handle bias, bool replicate, bool silu,
                            py::handle residual, int64_t stats_groups, py::handle norm_, py::handle y, py::handle mean,
                            py::handle rstd, int32_t num_threads) {
  const View x(x_), weight(weight_);
  lf_temporal_conv a{};
  a.dtype = x.dtype;
  a.batch = x.shape[0], a.channels_in = x.shape[1], a.channels_out = weight.shape[0], a.frames = x.shape[2];
  a.height = x.shape[3], a.width = x.shape[4], a.taps = weight.shape[2];
  a.replicate = replicate, a.silu = silu, a.stats_groups = stats_groups;
  a.x = x.clip(), a.residual = View(residual).clip(), a.y = View(y).clip();
  a.weight = weight.data;
  std::copy_n(weight.strides.begin(), 3, a.weight_strides);
  a.bias = PerChannel(bias).value;
  a.mean = static_cast<float*>(View(mean).data), a.rstd = static_cast<float*>(View(rstd).data);
  if (!norm_.is_none()) {
    const Items norm(norm_.ptr(), "temporal_conv: the norm");
    norm.require(8, "temporal_conv: a norm is (groups, mean, rstd, weight, bias, scale, shift, linear)");
    a.norm_groups = integer(norm[0], "temporal_conv: the norm's groups");
    lf_per_channel* const factors[] = {&a.norm_mean, &a.norm_rstd,  &a.norm_weight,
                                       &a.norm_bias, &a.norm_scale, &a.norm_shift};
    for (Py_ssize_t i = 0; i < 6; ++i) *factors[i] = PerChannel(norm[1 + i]).value;
    a.norm_linear = integer(norm[7], "temporal_conv: whether the norm is linear") != 0;
  }
  const py::gil_scoped_release release;
  return lf_temporal_conv_cpu(&a, num_threads);
}

// `bias`, `rotary` and each of `gradients` (gq, gk, gv, gbias) may be None; of the forward there are none. `window` is
// -1 for none.
template <auto function>
lf_status temporal_attention_cpu(py::handle q_, py::handle k, py::handle v, py::handle bias_, py::handle rotary,
                                 bool causal, int64_t window, double scale, py::handle y, py::handle gradients_,
                                 int32_t num_threads) {
  const View q(q_), bias(bias_);
  lf_temporal_attention a{};
  a.dtype = q.dtype;
  a.batch = q.shape[0], a.frames = q.shape[1], a.height = q.shape[2], a.width = q.shape[3];
  a.heads = q.shape[4], a.channels = q.shape[5];
  a.q = q.heads(), a.k = View(k).heads(), a.v = View(v).heads(), a.y = View(y).heads();
  a.bias = bias.data, a.bias_dtype = bias.dtype;
  std::copy_n(bias.strides.begin(), 2, a.bias_strides);
  a.rotary = static_cast<const float*>(View(rotary).data);
  a.causal = causal, a.window = window, a.scale = scale;
  if (!gradients_.is_none()) {
    const Items gradients(gradients_.ptr(), "temporal_attention: gradients");
    gradients.require(4, "temporal_attention: gradients are (gq, gk, gv, gbias)");
    lf_heads* const written[] = {&a.gq, &a.gk, &a.gv};
    for (Py_ssize_t i = 0; i < 3; ++i) *written[i] = View(gradients[i]).heads();
    a.gbias = static_cast<float*>(View(gradients[3]).data);
  }
  const py::gil_scoped_release release;
  return function(&a, num_threads);
}

// A call of space_time_downsample or space_time_upsample. `weight`, `bias` and `workspace` (address, bytes) may be
// None; lumiere_fast/native.py has looked at the shapes.
struct SpaceTime {
  lf_space_time value{};

  SpaceTime(py::handle x_, py::handle factor, lf_resize_mode mode, py::handle weight_, py::handle bias_, py::handle y,
            bool wgmma, py::handle workspace) {
    const View x(x_), weight(weight_), bias(bias_);
    value.dtype = x.dtype, value.mode = mode, value.wgmma = wgmma;
    value.batch = x.shape[0], value.channels = x.shape[1], value.frames = x.shape[2];
    value.height = x.shape[3], value.width = x.shape[4];
    const Items factors(factor.ptr(), "factor");
    factors.require(3, "factor is (t, h, w)");
    for (Py_ssize_t i = 0; i < 3; ++i) value.factor[i] = integer(factors[i], "factors");
    value.x = x.clip(), value.y = View(y).clip();
    value.weight = weight.data, value.channels_out = weight.shape[0], value.taps = weight.shape[2];
    std::copy_n(weight.strides.begin(), 3, value.weight_strides);
    value.bias = bias.data, value.bias_stride = bias.strides[0];
    if (workspace.is_none()) return;
    const Items memory(workspace.ptr(), "the workspace");
    memory.require(2, "a workspace is (address, bytes)");
    value.workspace = address(memory[0]);
    value.workspace_size = integer(memory[1], "bytes");
  }
};

template <auto function>
lf_status space_time_cpu(py::handle x, py::handle factor, lf_resize_mode mode, py::handle weight, py::handle bias,
                         py::handle y, bool wgmma, py::handle workspace, int32_t num_threads) {
  const SpaceTime call(x, factor, mode, weight, bias, y, wgmma, workspace);
  const py::gil_scoped_release release;
  return function(&call.value, num_threads);
}

template <auto function>
lf_status space_time_cuda(py::handle x, py::handle factor, lf_resize_mode mode, py::handle weight, py::handle bias,
                          py::handle y, bool wgmma, py::handle workspace, int32_t device, uintptr_t stream) {
  const SpaceTime call(x, factor, mode, weight, bias, y, wgmma, workspace);
  const py::gil_scoped_release release;
  return function(&call.value, device, reinterpret_cast<void*>(stream));
}

// The status, and the bytes that the call works in.
template <auto function>
py::tuple space_time_workspace(py::handle x, py::handle factor, lf_resize_mode mode, py::handle weight, py::handle bias,
                               py::handle y, bool wgmma, int32_t num_threads) {
  const SpaceTime call(x, factor, mode, weight, bias, y, wgmma, py::none());
  int64_t bytes = 0;
  const lf_status status = function(&call.value, num_threads, &bytes);
  return py::make_tuple(status, bytes);
}

// DLPack's tensor, as its specification lays it out; the unversioned capsule holds one at its start.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dimensions;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; null for rows one behind the other
  uint64_t byte_offset;
};

// What a DLPack capsule describes: (address, shape, strides), (code, bits), device type and device number. It stays the
// capsule's: whoever uses the address keeps the capsule.
py::tuple dlpack(py::handle capsule) {
  constexpr char kName[] = "dltensor";
  if (!PyCapsule_IsValid(capsule.ptr(), kName)) {  // nothing was asked that allows for the versioned one
    refuse("its __dlpack__ must give a capsule named dltensor", capsule.ptr());
  }
  const auto* tensor = static_cast<const DLTensor*>(PyCapsule_GetPointer(capsule.ptr(), kName));
  if (tensor->lanes != 1) throw py::value_error("elements of several lanes are not supported");
  py::tuple shape(tensor->dimensions), strides(tensor->dimensions);
  int64_t behind = 1;
  for (int32_t i = tensor->dimensions - 1; i >= 0; --i) {
    shape[i] = py::int_(tensor->shape[i]);
    strides[i] = py::int_(tensor->strides ? tensor->strides[i] : behind);
    behind *= tensor->shape[i];
  }
  const auto first = reinterpret_cast<uintptr_t>(tensor->data) + tensor->byte_offset;
  return py::make_tuple(py::make_tuple(first, shape, strides), py::make_tuple(int(tensor->code), int(tensor->bits)),
                        tensor->device_type, tensor->device_id);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "The native core; lumiere_fast.native is the door to it.";
  module.attr("__version__") = lf_version_string();
  module.attr("DTYPES") = py::dict(py::arg("float32") = int(LF_FLOAT32), py::arg("float64") = int(LF_FLOAT64),
                                   py::arg("float16") = int(LF_FLOAT16), py::arg("bfloat16") = int(LF_BFLOAT16));
  module.attr("RESIZE_MODES") = py::dict(py::arg("nearest") = int(LF_NEAREST), py::arg("linear") = int(LF_LINEAR),
                                         py::arg("area") = int(LF_AREA), py::arg("blur") = int(LF_BLUR));
  module.attr("BOUNDS") = py::dict(py::arg("none") = int(LF_BOUND_NONE), py::arg("static") = int(LF_BOUND_STATIC),
                                   py::arg("clip") = int(LF_BOUND_CLIP), py::arg("frame") = int(LF_BOUND_FRAME));
  // What the statuses that the caller can do something about speak of.
  module.attr("ARGUMENTS") = [] {
    py::dict of;
    of[py::int_(int(LF_SHARED_MEMORY))] = "out";  // the memory to work in is made by the module's own callers
    for (const int status : {LF_WINDOW_OUT_OF_RANGE, LF_UNCOVERED}) of[py::int_(status)] = "starts";
    for (const int status : {LF_INVALID_WEIGHTS, LF_UNEVEN_WEIGHTS}) of[py::int_(status)] = "weights";
    of[py::int_(int(LF_UNSUPPORTED_DTYPE))] = "x";
    return of;
  }();
  module.attr("BLEND_LIMITS") = py::make_tuple(lf::kMostWindows, lf::kMostLayouts);
  module.attr("VARYING_BLEND_LIMITS") = py::make_tuple(lf::kMostVaryingWindows, lf::kMostVaryingLayouts);
  module.attr("MOST_WEIGHTS") = lf::kMostWeights;
  module.attr("OK") = int(LF_OK);
  module.attr("OUT_OF_MEMORY") = int(LF_OUT_OF_MEMORY);
  module.attr("NOT_BUILT") = int(LF_NOT_BUILT);
  module.attr("CUDA_ERROR") = int(LF_CUDA_ERROR);
  module.attr("UNSUPPORTED_DEVICE") = int(LF_UNSUPPORTED_DEVICE);
  module.def("build_info", [] { return lf_build_info(); });
  module.def("status_string", [](lf_status status) { return lf_status_string(status); });
  module.def("last_cuda_error", [] { return lf_last_cuda_error(); });
  module.def("dlpack", &dlpack);
  module.def("borrow_threads", [](uintptr_t parallel) { lf_borrow_threads(reinterpret_cast<lf_parallel>(parallel)); });
  module.def("blend_windows_cpu", &blend_windows_cpu);
  module.def("blend_windows_cuda", &blend_windows_cuda);
  module.def("denoise_step_cpu", &denoise_step_cpu);
  module.def("group_norm_cpu", &group_norm_cpu);
  module.def("group_norm_stats_cpu", &group_norm_stats_cpu);
  module.def("group_norm_backward_cpu", &group_norm_backward_cpu);
  module.def("temporal_attention_cpu", &temporal_attention_cpu<lf_temporal_attention_cpu>);
  module.def("temporal_attention_backward_cpu", &temporal_attention_cpu<lf_temporal_attention_backward_cpu>);
  module.def("temporal_conv_cpu", &temporal_conv_cpu);
  module.def("space_time_downsample_workspace", &space_time_workspace<lf_space_time_downsample_workspace>);
  module.def("space_time_downsample_cpu", &space_time_cpu<lf_space_time_downsample_cpu>);
  module.def("space_time_downsample_cuda", &space_time_cuda<lf_space_time_downsample_cuda>);
  module.def("space_time_downsample_adjoint_cpu", &space_time_cpu<lf_space_time_downsample_adjoint_cpu>);
  module.def("space_time_downsample_adjoint_cuda", &space_time_cuda<lf_space_time_downsample_adjoint_cuda>);
  module.def("space_time_upsample_workspace", &space_time_workspace<lf_space_time_upsample_workspace>);
  module.def("space_time_upsample_cpu", &space_time_cpu<lf_space_time_upsample_cpu>);
  module.def("space_time_upsample_cuda", &space_time_cuda<lf_space_time_upsample_cuda>);
  module.def("space_time_upsample_adjoint_cpu", &space_time_cpu<lf_space_time_upsample_adjoint_cpu>);
  module.def("space_time_upsample_adjoint_cuda", &space_time_cuda<lf_space_time_upsample_adjoint_cuda>);
  module.def("temporal_conv_lanes", [] { return lf_temporal_conv_lanes(); });
}
