"""The door to the native core in ``csrc/``: loaded when first asked for, and where it cannot be used it says why.

The core is one torch-free module with a CPU half and a CUDA half. Its functions write into tensors that are already
there and return nothing, so they also take numpy arrays and any object with ``__dlpack__``, without a copy:

    from lumiere_fast import native
    native.blend_windows(windows, starts, (num_frames,), None, out=video)
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

HALVES = ("cpu", "cuda")

_PACKAGE = Path(__file__).resolve().parent
_REPORT = _PACKAGE / "_native_build.json"
_CSRC = _PACKAGE.parent / "csrc"  # there in a source tree and an editable install only
_REBUILD = "install again (`make venv` in a source tree)"


class NativeUnavailable(RuntimeError):
    """The native core, or a half of it, cannot be used; the message has every reason."""


def load() -> ModuleType:
    """The module ``lumiere_fast._native``.

    Raises:
        NativeUnavailable: it cannot be used at all; see `why_not`.
    """
    module, reasons = _loaded()
    if module is None:
        raise NativeUnavailable("the native core cannot be used: " + "; ".join(reasons))
    return module


def why_not(half: str) -> list[str]:
    """Every reason why that half of the native core cannot be used; empty where it can be.

    "avx2" is the CPU half on a processor that has AVX2, for an op that torch is faster at without. "wgmma" is the CUDA
    half with code for sm_90a, which alone has warpgroup instructions.

    Whether there is a device, and whether it is one that the CUDA half was built for, is not asked here.
    """
    if half not in (*HALVES, "avx2", "wgmma"):
        raise ValueError(f"half must be one of {', '.join(HALVES)}, avx2, wgmma, got {half!r}")
    module, reasons = _loaded()
    if module is None:
        return list(reasons)
    if half in ("cuda", "wgmma") and _build_info()["cuda"] is None:
        return [f"the native core was built without its CUDA half: {_reported('cuda') or 'the build left no reason'}"]
    if half == "wgmma" and not any("90a" in arch for arch in _build_info()["cuda_archs"]):
        archs = ", ".join(_build_info()["cuda_archs"])
        return [f"the native core was built for {archs}, not for 90a: unset LUMIERE_FAST_CUDA_ARCHS and install again"]
    if half == "avx2" and module.temporal_conv_lanes() < 8:
        return ["this processor has no AVX2, or may not use it, and without it torch is faster"]
    return []


def build_info() -> dict[str, Any]:
    """How the core was built: version, compiler, flags, avx2, cuda, cuda_archs, cuda_flags, sources (hashes).

    cuda is the toolkit's version, and cuda_flags what nvcc was given besides the architectures; None without that half.

    Empty where there is no core that can be used; then `build_report` tells more.
    """
    return {} if _loaded()[0] is None else dict(_build_info())


def build_report() -> dict[str, Any] | None:
    """What the last install said of its build: for each half built or why not, and the end of a failed step's log."""
    try:
        report: dict[str, Any] = json.loads(_REPORT.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report


_LIVES_WITH = {"group_norm_stats": "group_norm"}  # the op whose files another op is in


def source_hash(op: str) -> str | None:
    """A hash of the sources of `op` that the core was built from; None where it has no such op or is not there."""
    return build_info().get("sources", {}).get(_LIVES_WITH.get(op, op))


def hash_of_sources(op: str, csrc: Path = _CSRC) -> str:
    """The hash that a core built from the folder `csrc` as it is now would have for `op`; CMakeLists.txt says the same.

    Over the files of the op, csrc/<op>.* and csrc/<op>_*, and those that all share, csrc/common/*.
    """
    op = _LIVES_WITH.get(op, op)
    files = [path for pattern in ("common/*", f"{op}.*", f"{op}_*") for path in csrc.glob(pattern)]
    hashes = {path.relative_to(csrc).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    listing = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
    return hashlib.sha256(listing.encode()).hexdigest()


@functools.cache
def _loaded() -> tuple[ModuleType | None, tuple[str, ...]]:
    """The module, or every reason why there is none; found out once."""
    try:
        module = importlib.import_module("lumiere_fast._native")
    except ImportError as error:
        return None, (_why_absent(error),)
    reasons = _why_outdated(json.loads(module.build_info()))
    if reasons:
        return None, reasons
    module.borrow_threads(_torch_threads())
    return module, ()


def _torch_threads() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that torch computes with; 0 where it uses another.

    Its idle threads spin for a while, waiting for torch's next operator. Threads of our own would have to share the
    cores with them; theirs start at once.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # Looked up in what the library was linked with, where another package may have brought its own runtime.
        return ctypes.cast(ctypes.CDLL(str(library)).GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


@functools.cache
def _build_info() -> dict[str, Any]:
    info: dict[str, Any] = json.loads(load().build_info())
    return info


def _why_absent(error: ImportError) -> str:
    built = list(_PACKAGE.glob("_native.*.so")) + list(_PACKAGE.glob("_native.*.pyd"))
    reported = _reported("cpu")
    if reported is not None:
        return f"the native core was not built: {reported}"
    if not built:
        return f"the native core was not built, and no install left a word about it: {_REBUILD}"
    names = ", ".join(path.name for path in built)
    return f"the native core is there ({names}) but does not load: {error}; {_REBUILD}"


def _why_outdated(info: dict[str, Any]) -> tuple[str, ...]:
    """A core of another version, or of sources that have changed since, would compute something else than told here."""
    reasons = []
    version = metadata.version("lumiere_fast")
    if info["version"] != version:
        reasons.append(f"the native core is of version {info['version']}, the package of {version}: {_REBUILD}")
    if _CSRC.is_dir():
        changed = [op for op, built in info["sources"].items() if hash_of_sources(op) != built]
        if changed:
            reasons.append(f"csrc/ has changed since the native core was built ({', '.join(changed)}): {_REBUILD}")
    return tuple(reasons)


def _reported(half: str) -> str | None:
    report = build_report()
    return report[half]["why_not"] if report else None


# --- operands ---------------------------------------------------------------------------------------------------------

_TORCH_NAMES = {getattr(torch, name): name for name in ("float32", "float64", "float16", "bfloat16")}
_PLAIN = (Tensor, torch.nn.Parameter)  # no subclass that may compute otherwise
_DLPACK_NAMES = {(2, 32): "float32", (2, 64): "float64", (2, 16): "float16", (4, 16): "bfloat16"}  # (code, bits)
_DLPACK_CPU, _DLPACK_CUDA = (1, 3), (2, 13)  # plain and pinned memory; device and managed memory


class _Operand(NamedTuple):
    """Where a tensor lies: what `view` is to the module, and whether it may be used with others."""

    view: tuple[int, Sequence[int], Sequence[int]]  # address, shape, strides in elements
    dtype: str
    device: int | None  # number of the CUDA device, None for the CPU
    owner: object  # keeps the memory


_View = tuple[int, Sequence[int], Sequence[int], str]  # address, shape, strides in elements, dtype


def _operand(op: str, name: str, x: Any, write: bool) -> _Operand:
    if isinstance(x, Tensor):
        return _of_tensor(op, name, x, write)
    if hasattr(x, "__array_interface__"):
        return _of_array(op, name, x, write)
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        return _of_dlpack(op, name, x)
    accepted = "a tensor, a numpy array or an object with __dlpack__ and __dlpack_device__"
    raise ValueError(f"{op}: {name} must be {accepted}, got {type(x)}")


def _of_tensor(op: str, name: str, x: Tensor, write: bool) -> _Operand:
    dtype = _TORCH_NAMES.get(x.dtype)
    if dtype is None:
        raise _wrong_dtype(op, name, x.dtype)
    if x.is_neg():  # a view whose memory holds the negated numbers
        if write:
            raise ValueError(f"{op}: {name} is a negated view, which cannot be written to; give a plain tensor")
        x = x.resolve_neg()
    if x.layout is not torch.strided:
        raise ValueError(f"{op}: {name} must be a dense tensor, got one of layout {x.layout}; use its .to_dense()")
    if x.is_cuda:
        device = x.device.index
    elif x.is_cpu:
        device = None
    else:
        raise ValueError(f"{op}: {name} must be on the CPU or a CUDA device, got {x.device}")
    try:
        return _Operand((x.data_ptr(), x.shape, x.stride()), dtype, device, x)
    except RuntimeError as error:  # of a tensor that stands for others: in a trace, under a transform
        raise ValueError(f"{op}: {name} must be a tensor with memory of its own, got {type(x)}: {error}") from error


def _of_array(op: str, name: str, x: Any, write: bool) -> _Operand:
    interface = x.__array_interface__
    dtype = {"<f4": "float32", "<f8": "float64", "<f2": "float16"}.get(interface["typestr"])
    if dtype is None:
        raise _wrong_dtype(op, name, interface["typestr"])
    if interface.get("data") is None:
        raise ValueError(f"{op}: {name} has an __array_interface__ without an address; give a numpy array")
    address, read_only = interface["data"]
    if write and read_only:
        raise ValueError(f"{op}: {name} is a read-only array; give one that can be written to")
    size, shape = int(interface["typestr"][2:]), interface["shape"]
    strides = interface.get("strides")
    if strides is None:  # rows one behind the other
        strides = [size * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if any(stride % size for stride in strides):
        raise ValueError(f"{op}: the strides of {name} must be multiples of its {size}-byte elements, got {strides}")
    return _Operand((address, shape, [stride // size for stride in strides]), dtype, None, x)


def _of_dlpack(op: str, name: str, x: Any) -> _Operand:
    kind, number = x.__dlpack_device__()
    if kind not in (*_DLPACK_CPU, *_DLPACK_CUDA):
        raise ValueError(f"{op}: {name} must be on the CPU or a CUDA device, got DLPack's device type {kind}")
    device = number if kind in _DLPACK_CUDA else None
    # On CUDA the producer makes the data ready for the stream that we launch on; 1 is how DLPack spells the default.
    capsule = x.__dlpack__() if device is None else x.__dlpack__(stream=_stream(device) or 1)
    try:
        view, element, _, _ = load().dlpack(capsule)
    except ValueError as error:
        raise ValueError(f"{op}: {name} cannot be read: {error}") from error
    dtype = _DLPACK_NAMES.get(element)
    if dtype is None:
        raise _wrong_dtype(op, name, f"DLPack's code {element[0]} of {element[1]} bits")
    return _Operand(view, dtype, device, (x, capsule))


def _wrong_dtype(op: str, name: str, got: object) -> ValueError:
    return ValueError(f"{op}: {name} must be float32, float64, float16 or bfloat16, got {got}")


def _stream(device: int) -> int:
    stream: int = torch.cuda.current_stream(device).cuda_stream
    return stream


def _operands(
    op: str, name_of: Callable[[int], str], tensors: Sequence[Any], written: int = 1
) -> tuple[str, int | None, list[Any], Any]:
    """dtype and device of all, the view of each, and what to hold while they are used. The first are to be written."""
    first = tensors[0]
    if type(first) is Tensor and (first.is_cpu or first.is_cuda) and first.dtype in _TORCH_NAMES:
        dtype, device = first.dtype, first.get_device()
        # The usual case, told at a fraction of the cost.
        if all(
            [type(x) in _PLAIN and x.dtype is dtype and x.get_device() == device and not x.is_neg() for x in tensors]
        ):
            try:
                views = [(x.data_ptr(), x.shape, x.stride()) for x in tensors]
                return _TORCH_NAMES[dtype], None if device < 0 else device, views, tensors
            except RuntimeError:  # of one without strides or memory, which _operand refuses
                pass
    operands = [_operand(op, name_of(i), x, i < written) for i, x in enumerate(tensors)]
    kinds = [f"{x.dtype} on {'the CPU' if x.device is None else f'cuda:{x.device}'}" for x in operands]
    for i, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(f"{op}: {name_of(i)} must be {kinds[0]} like {name_of(0)}, got {kind}")
    return operands[0].dtype, operands[0].device, [x.view for x in operands], operands


def _on_cpu(op: str, name: str, x: Any, held: list[Any], write: bool = False) -> _View:
    """Where a tensor on the CPU lies. Goes into `held`: what to hold while it is used."""
    if type(x) in _PLAIN and x.is_cpu and x.dtype in _TORCH_NAMES and not x.is_neg():
        try:  # the usual case, told at a fraction of the cost
            return x.data_ptr(), x.shape, x.stride(), _TORCH_NAMES[x.dtype]
        except RuntimeError:  # of one without strides or memory, which _operand refuses
            pass
    operand = _operand(op, name, x, write)
    held.append(operand)
    if operand.device is not None:
        raise ValueError(f"{op}: {name} must be on the CPU, got cuda:{operand.device}")
    address, shape, strides = operand.view
    return address, tuple(shape), strides, operand.dtype


def _out_or_window(index: int) -> str:
    return f"windows[{index - 1}]" if index else "out"


def _window(index: int) -> str:
    return f"windows[{index}]"


def _target(device: int | None) -> tuple[int, ...]:
    """A function's last arguments: the CPU half's number of threads, or the CUDA half's device and stream."""
    return (torch.get_num_threads(),) if device is None else (device, _stream(device))


def _launch(function: str, device: int | None, *arguments: Any) -> None:
    """Call a function of the half that the tensors are of."""
    half = "cpu" if device is None else "cuda"
    _check(function, getattr(load(), f"{function}_{half}")(*arguments, *_target(device)))


def _check(op: str, status: int) -> None:
    """Raise what a status of the module means, unless it is that all is well."""
    module = load()
    if status == module.OK:
        return
    said = module.status_string(status)
    if status == module.NOT_BUILT:
        raise NativeUnavailable(f"{op}: " + "; ".join(why_not("cuda")))
    if status == module.CUDA_ERROR:
        raise RuntimeError(f"{op}: {said}: {module.last_cuda_error()}")
    if status == module.UNSUPPORTED_DEVICE:
        raise RuntimeError(f"{op}: {said}")
    if status == module.OUT_OF_MEMORY:
        raise MemoryError(f"{op}: {said}")
    argument = module.ARGUMENTS.get(status)
    raise ValueError(f"{op}: {argument}: {said}" if argument else f"{op}: {said}")


# --- ops --------------------------------------------------------------------------------------------------------------


def blend_windows(
    windows: Sequence[Any],
    starts: Sequence[int],
    extent: Sequence[int],
    weights: Sequence[float] | None,
    *,
    out: Any,
) -> None:
    """`lumiere_fast.ops.blend_windows` into `out`, on the CPU or the CUDA device where the tensors are.

        out[f] = sum_i w[f - starts[i]] * windows[i][f - starts[i]] / sum_i w[f - starts[i]]

    Args:
        windows: N tensors (B, C, T'_i, H, W), numpy arrays or DLPack objects of any strides; float32, float64, float16
            or bfloat16, all of one.
        starts: flat: N first frames, or 3N corners (t, h, w) one after the other.
        extent: (T,), or (T, H, W) where windows lie in space too.
        weights: None for equal weights, or the vectors of the blended axes one after the other: T' or T' + H' + W'
            positive numbers; windows are then of one length.
        out: (B, C, T, H, W), written; any strides.

    On the CPU it takes at most `torch.get_num_threads()` threads. On a CUDA device it is queued on the current stream.

    Raises:
        ValueError: what does not fit: shapes, dtypes, devices, a window that sticks out, a position in no window,
            weights of an axis over 1e100 apart, an `out` whose elements may lie on top of one another or that lies
            between the first and the last byte of a window.
        NativeUnavailable: the native core, or its CUDA half, is not there.
    """
    module = load()
    if not isinstance(windows, Iterable):
        raise ValueError(f"blend_windows: windows must be a sequence of tensors (B, C, T', H, W), got {type(windows)}")
    dtype, device, (target, *views), held = _operands("blend_windows", _out_or_window, [out, *windows])
    _launch("blend_windows", device, module.DTYPES[dtype], views, starts, extent, weights, target)
    del held  # the memory of whatever was made on the way is no longer read


def denoise_step(
    windows: Sequence[Any],
    starts: Sequence[int],
    extent: Sequence[int],
    weights: Sequence[float] | None,
    latent: Any,
    coefficients: Sequence[float],
    guidance_scale: float | None,
    bound: str,
    percentile: float,
    noise: Any,
    history: Any,
    *,
    out: tuple[Any, Any],
) -> None:
    """`lumiere_fast.ops.denoise_step` into `out`, on the CPU.

        pred = the windows blended as `blend_windows` does; with guidance u + guidance_scale * (c - u) of its halves
        x0   = bounded(a * latent + b * pred)
        next = c * latent + d * x0 + e * history + f * noise

    Args:
        windows, starts, extent, weights: as for `blend_windows`; the windows' batch is the latent's, or with guidance
            twice that, the conditional half first.
        latent: (B, C, T, H, W), a tensor, numpy array or DLPack object of any strides and a dtype of its own.
        coefficients: the six numbers a to f, those of `StepCoefficients` in their order.
        guidance_scale: None for windows of the conditional half alone.
        bound: "none", "static" (-1..1), "clip" or "frame": -s..s and divided by s, the `percentile` quantile of |x0|
            over a clip or frame where that is over 1. It is exact, interpolated linearly between its neighbours.
        percentile: in (0, 1].
        noise, history: like the latent; None, or not looked at, where f or e is 0.
        out: (next, x0), like the latent, written; any strides. `next` may be the very latent, `x0` the very history.

    Arithmetic is in fp32, or fp64 where either dtype is, and rounded once. At most `torch.get_num_threads()` threads
    take part, and their number changes no result.

    Raises:
        ValueError: as for `blend_windows`; noise or history missing, a tensor that is not on the CPU, an element of
            `out` in the memory of another tensor.
        NativeUnavailable: the native core is not there.
    """
    op, module = "denoise_step", load()
    if not isinstance(windows, Iterable):
        raise ValueError(f"{op}: windows must be a sequence of tensors (B, C, T', H, W), got {type(windows)}")
    if bound not in module.BOUNDS:
        raise ValueError(f"{op}: bound must be one of {', '.join(module.BOUNDS)}, got {bound!r}")
    if bound in ("clip", "frame") and not 0 < percentile <= 1:
        raise ValueError(f"{op}: percentile must be in (0, 1], got {percentile}")
    clips = {"out[0]": out[0], "out[1]": out[1], "latent": latent}
    for name, tensor, coefficient in zip(("history", "noise"), (history, noise), coefficients[4:6], strict=False):
        if coefficient != 0:
            if tensor is None:
                raise ValueError(f"{op}: the coefficient of {name} is {coefficient}, so {name} must be given, got None")
            clips[name] = tensor
    dtype, device, lies, held = _operands(op, [*clips].__getitem__, [*clips.values()], written=2)
    parts = windows if isinstance(windows, (list, tuple)) else [*windows]
    kind, place, views, held_windows = _operands(op, _window, parts, written=0) if parts else (dtype, device, [], None)
    if device is not None or place is not None:
        raise ValueError(f"{op}: all tensors must be on the CPU, got cuda:{place if device is None else device}")
    shape = tuple(lies[2][1])
    for name, view in zip(clips, lies, strict=True):
        _check_shape(op, name, tuple(view[1]), shape)
    code = module.DTYPES[dtype]
    at = {name: (*view, code) for name, view in zip(clips, lies, strict=True)}
    status = module.denoise_step_cpu(
        *(module.DTYPES[kind], views, starts, extent, weights, code, lies[2], coefficients, guidance_scale),
        *(module.BOUNDS[bound], percentile, at.get("noise"), at.get("history"), at["out[0]"], at["out[1]"]),
        torch.get_num_threads(),
    )
    del held, held_windows  # the memory of whatever was made on the way is no longer read
    _check(op, status)


def _launch_bounds() -> tuple[int, ...]:
    """The most weights; the most windows and layouts, and those of varying weights. Nothing where there is no core."""
    module, _ = _loaded()
    return () if module is None else (module.MOST_WEIGHTS, *module.BLEND_LIMITS, *module.VARYING_BLEND_LIMITS)


# As `dispatch.constant_when_traced` does, which needs this module: Dynamo cannot trace an import.
_launch_bounds._dynamo_marked_constant = True  # type: ignore[attr-defined]


def blend_windows_limits(
    windows: Sequence[Tensor], starts: Sequence[int], extent: Sequence[int], weights: Sequence[float] | None
) -> list[str]:
    """Every reason why one CUDA launch cannot take these arguments of `blend_windows`; empty where it can.

    A launch carries all it needs in its parameters, which bounds how many windows may lie over one position, in how
    many different strides, and how many weights 3 axes may have. The bounds are the native core's own.
    """
    bounds = _launch_bounds()
    if not bounds:
        return []  # which `why_not` tells
    varying = weights is not None and len(extent) == 3
    most_weights, *pairs = bounds
    most, most_layouts = pairs[2:] if varying else pairs[:2]
    reasons = []
    if varying and weights is not None and len(weights) > most_weights:
        reasons.append(f"weights has {len(weights)} numbers for 3 axes, a launch takes {most_weights}")
    if len(windows) <= most_layouts:
        return reasons
    layouts = _layouts(windows, extent, varying)
    if len(windows) <= most and len(layouts) <= most_layouts:
        return reasons
    crowds = [crowd for crowd in _crowds(windows, starts, len(extent)) if crowd.bit_count() > most_layouts]
    windows_there = max((crowd.bit_count() for crowd in crowds), default=0)
    layouts_there = max((sum(1 for layout in layouts if layout & crowd) for crowd in crowds), default=0)
    if windows_there > most:
        reasons.append(f"{windows_there} windows lie over one position, a launch takes {most}")
    if layouts_there > most_layouts:
        reasons.append(f"windows of {layouts_there} different strides lie over one position, it takes {most_layouts}")
    return reasons


def _layouts(windows: Sequence[Tensor], extent: Sequence[int], varying: bool) -> list[int]:
    """For each different set of strides the windows that have it, as bits. Axes of one place are not walked along."""
    shape = (*windows[0].shape[:2], *extent, *windows[0].shape[2 + len(extent) :])
    walked = [axis for axis, size in enumerate(shape) if varying or size > 1]
    members: dict[tuple[int, ...], int] = {}
    for i, window in enumerate(windows):
        strides = window.stride()
        layout = tuple(int(strides[axis]) for axis in walked)  # int: in a trace they may be symbols
        members[layout] = members.get(layout, 0) | 1 << i
    return list(members.values())


def _crowds(windows: Sequence[Tensor], starts: Sequence[int], axes: int) -> set[int]:
    """The sets of windows, as bits, over the positions where a set can be largest: on each axis, a window's start."""
    crowds = {(1 << len(windows)) - 1}
    for axis in range(axes):
        lows = [int(start) for start in starts[axis::axes]]
        spans = [(low, low + int(window.shape[2 + axis])) for low, window in zip(lows, windows, strict=True)]
        over = {sum(1 << i for i, (low, high) in enumerate(spans) if low <= place < high) for place in set(lows)}
        crowds = {crowd & there for crowd in crowds for there in over}
    return crowds


def group_norm(
    x: Any,
    num_groups: int,
    weight: Any,
    bias: Any,
    scale: Any,
    shift: Any,
    act: str | None,
    eps: float,
    per_frame: bool,
    *,
    out: Any,
) -> None:
    """`lumiere_fast.ops.group_norm` into `out`, on the CPU.

        y = act(n * (1 + scale) + shift) with n = (x - mean) * rstd * weight + bias

    Args:
        x: (B, C, T, H, W), a tensor, numpy array or DLPack object of any strides; float32, float64, float16 or
            bfloat16.
        num_groups: divides C.
        weight, bias: (C,), or None for 1 and 0; of x's dtype, or float32 (float64 where x is that).
        scale, shift: (B, C) or (B, T, C), or None for 0; dtypes likewise.
        act: None or "silu".
        eps: added to the variance, > 0.
        per_frame: statistics of each frame, or of all of a clip's.
        out: of x's shape and dtype, written; any strides.

    Takes at most `torch.get_num_threads()` threads, whose number changes no result.

    Raises:
        ValueError: what does not fit: shapes, dtypes, devices, an `out` whose elements may lie on top of one another or
            that lies between the first and the last byte of x.
        NativeUnavailable: the native core is not there.
    """
    module, held = load(), list[Any]()
    source = _group_norm_input("group_norm", x, num_groups, held)
    values = _modulation("group_norm", source, weight, bias, scale, shift, held)
    target = _like("group_norm", "out", out, tuple(source[1]), source[3], held, write=True)
    silu = _is_silu("group_norm", act)
    status = module.group_norm_cpu(
        _coded(source), num_groups, *values, silu, eps, per_frame, _coded(target), torch.get_num_threads()
    )
    del held
    _check("group_norm", status)


def group_norm_stats(x: Any, num_groups: int, eps: float, per_frame: bool, *, out: tuple[Any, Any]) -> None:
    """`lumiere_fast.ops.group_norm_stats` into `out`, on the CPU: mean and rstd = 1 / sqrt(variance + eps).

    Args:
        x, num_groups, eps, per_frame: as for `group_norm`.
        out: two of (B, T, num_groups), or (B, num_groups) where `per_frame` is False; float32, or float64 where x is
            that; written, any strides.

    Raises: as `group_norm`.
    """
    module, held = load(), list[Any]()
    source = _group_norm_input("group_norm_stats", x, num_groups, held)
    B, _, T, *_ = source[1]
    shape = (B, T, num_groups) if per_frame else (B, num_groups)
    targets = []
    for name, value in zip(("mean", "rstd"), out, strict=True):
        address, _, strides, dtype = _like(
            "group_norm_stats", name, value, shape, _arithmetic(source), held, write=True
        )
        of_frames = strides if per_frame else (strides[0], 0, strides[1])
        targets.append(_coded((address, shape, of_frames, dtype)))
    status = module.group_norm_stats_cpu(_coded(source), num_groups, eps, per_frame, *targets, torch.get_num_threads())
    del held
    _check("group_norm_stats", status)


def group_norm_backward(
    gradient: Any,
    x: Any,
    num_groups: int,
    weight: Any,
    bias: Any,
    scale: Any,
    shift: Any,
    act: str | None,
    eps: float,
    per_frame: bool,
    *,
    out: Any,
    sums: Tensor,
) -> None:
    """What the gradients of `group_norm`'s arguments are, or are made of, from that of its result; on the CPU.

    Args:
        gradient: of the result; of x's shape and dtype.
        x, num_groups, weight, bias, scale, shift, act, eps, per_frame: as they were.
        out: the gradient of x, written; or None where it is not wanted.
        sums: (2, B, T, C), contiguous, float32, or float64 where x is that; written. Over the pixels of a frame the
            sums of the gradient of z, what `act` was applied to, and of the same times (x - mean) * rstd.

    Raises: as `group_norm`.
    """
    module, held = load(), list[Any]()
    op = "group_norm_backward"
    source = _group_norm_input(op, x, num_groups, held)
    values = _modulation(op, source, weight, bias, scale, shift, held)
    shape, dtype = tuple(source[1]), source[3]
    above = _like(op, "gradient", gradient, shape, dtype, held)
    target = None if out is None else _coded(_like(op, "out", out, shape, dtype, held, write=True))
    B, C, T, *_ = shape
    address, *_ = _dense(op, "sums", _like(op, "sums", sums, (2, B, T, C), _arithmetic(source), held, write=True))
    behind = address + sums[0].numel() * sums.element_size()
    status = module.group_norm_backward_cpu(
        _coded(above), _coded(source), num_groups, *values, _is_silu(op, act), eps, per_frame, target, address, behind,
        torch.get_num_threads(),
    )  # fmt: skip
    del held
    _check(op, status)


def _coded(view: _View) -> tuple[int, Sequence[int], Sequence[int], int]:
    """The view as the module takes it."""
    address, shape, strides, dtype = view
    return address, shape, strides, load().DTYPES[dtype]


def _arithmetic(x: _View) -> str:
    return "float64" if x[3] == "float64" else "float32"


def _video(op: str, x: Any, held: list[Any]) -> _View:
    view = _on_cpu(op, "x", x, held)
    if len(view[1]) != 5:
        raise ValueError(f"{op}: x must be (B, C, T, H, W), got {tuple(view[1])}")
    return view


def _group_norm_input(op: str, x: Any, num_groups: int, held: list[Any]) -> _View:
    view = _video(op, x, held)
    if num_groups < 1 or view[1][1] % num_groups:
        raise ValueError(f"{op}: num_groups must divide the {view[1][1]} channels, got {num_groups}")
    return view


def _like(
    op: str, name: str, y: Any, shape: tuple[int, ...], dtype: str, held: list[Any], write: bool = False
) -> _View:
    """Where `y` lies, which must have that shape and dtype."""
    view = _on_cpu(op, name, y, held, write)
    if tuple(view[1]) != shape or view[3] != dtype:
        raise ValueError(f"{op}: {name} must be {dtype} {shape}, got {view[3]} {tuple(view[1])}")
    return view


def _dense(op: str, name: str, view: _View) -> _View:
    """The same, whose rows must lie one behind the other."""
    _, shape, strides, _ = view
    wanted = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if any(size > 1 and found != step for size, found, step in zip(shape, strides, wanted, strict=True)):
        raise ValueError(f"{op}: {name} must be contiguous, got the strides {tuple(strides)} of {tuple(shape)}")
    return view


def _is_silu(op: str, act: str | None, name: str = "act") -> bool:
    if act not in (None, "silu"):
        raise ValueError(f"{op}: {name} must be None or 'silu', got {act!r}")
    return act == "silu"


_PerChannel = tuple[int, tuple[int, ...], int]  # address, strides of (B, T, C), code of the dtype


def _modulation(
    op: str, x: _View, weight: Any, bias: Any, scale: Any, shift: Any, held: list[Any], prefix: str = ""
) -> list[_PerChannel | None]:
    """The four as the module takes them."""
    B, C, T, *_ = x[1]
    affine, film = ((C,),), ((B, C), (B, T, C))
    given = (("weight", weight, affine), ("bias", bias, affine), ("scale", scale, film), ("shift", shift, film))
    return [_per_channel(op, prefix + name, value, shapes, x, held) for name, value, shapes in given]


def _per_channel(
    op: str, name: str, value: Any, shapes: tuple[tuple[int, ...], ...], x: _View, held: list[Any]
) -> _PerChannel | None:
    """An operand of one of these shapes, (C,), (B, C) or (B, T, C), as the module takes it."""
    if value is None:
        return None
    address, shape, strides, dtype = _on_cpu(op, name, value, held)
    if shape not in shapes:
        raise ValueError(f"{op}: {name} must have shape {' or '.join(map(str, shapes))}, got {tuple(shape)}")
    if dtype not in (x[3], _arithmetic(x)):
        raise ValueError(f"{op}: {name} must be {x[3]} like x or {_arithmetic(x)}, got {dtype}")
    along = {1: (0, 0, *strides), 2: (strides[0], 0, strides[-1]), 3: tuple(strides)}
    return address, along[len(shape)], load().DTYPES[dtype]


def temporal_conv(
    x: Any,
    weight: Any,
    bias: Any,
    padding_mode: str,
    act: str | None,
    residual: Any,
    stats_groups: int | None,
    norm_mean: Any = None,
    norm_rstd: Any = None,
    norm_weight: Any = None,
    norm_bias: Any = None,
    norm_scale: Any = None,
    norm_shift: Any = None,
    norm_act: str | None = "silu",
    *,
    out: tuple[Any, Any, Any],
) -> None:
    """`lumiere_fast.ops.temporal_conv` on the CPU, into `out`; the arguments are those of its reference.

    Args:
        x: (B, C_in, T, H, W); weight: (C_out, C_in, k), k odd; residual: None or (B, C_out, T, H, W). Any strides;
            float32, float16 or bfloat16, all of one. The arithmetic is fp32.
        bias: None, (C_out,) or (B, T, C_out).
        norm_mean, norm_rstd: (B, T, num_groups) of the norm before, or None. norm_weight, norm_bias: None or (C_in,).
            norm_scale, norm_shift: None, (B, C_in) or (B, T, C_in). Each, as bias too, of x's dtype or float32.
        norm_act: "silu", or None for none after that norm.
        out: y (B, C_out, T, H, W), of any strides, and with `stats_groups` the statistics mean and rstd
            (B, T, stats_groups), float32 and contiguous; without, the second and third are left alone.

    It takes at most `torch.get_num_threads()` threads; their number changes no result. Three taps are done by minimal
    filtering, F(2, 3), where there are at least 4 frames and 24 channels: two thirds of the multiplications, and an
    error of rounding is relative to the largest of the four frames around; infinity among them may come out as NaN.

    Raises:
        ValueError: what does not fit: shapes, dtypes, devices, a y whose elements may lie on top of one another or that
            lies between the first and the last byte of x or the residual.
        NativeUnavailable: the native core is not there.
    """
    module, op, held = load(), "temporal_conv", list[Any]()
    source, taps = _video(op, x, held), _on_cpu(op, "weight", weight, held)
    B, C, T, H, W = source[1]
    if len(taps[1]) != 3 or taps[1][1] != C or taps[3] != source[3]:
        raise ValueError(f"{op}: weight must be {source[3]} (C_out, {C}, k), got {taps[3]} {tuple(taps[1])}")
    if padding_mode not in ("zeros", "replicate"):
        raise ValueError(f"{op}: padding_mode must be 'zeros' or 'replicate', got {padding_mode!r}")
    if (norm_mean is None) != (norm_rstd is None):
        raise ValueError(f"{op}: norm_mean and norm_rstd come together or not at all")
    if norm_mean is None and any(each is not None for each in (norm_weight, norm_bias, norm_scale, norm_shift)):
        raise ValueError(f"{op}: the norm's parameters need norm_mean and norm_rstd")
    channels = taps[1][0]
    shape = (B, channels, T, H, W)
    y = _like(op, "y", out[0], shape, source[3], held, write=True)
    added = None if residual is None else _coded(_like(op, "residual", residual, shape, source[3], held))
    stats: list[Any] = [None, None]
    if stats_groups is not None:
        rows = (B, T, stats_groups)
        for i, name in enumerate(("mean", "rstd")):
            stats[i] = _coded(_dense(op, name, _like(op, name, out[1 + i], rows, "float32", held, write=True)))
    norm = None
    if norm_mean is not None:
        groups = norm_mean.shape[-1]
        norm = [
            groups,
            _per_channel(op, "norm_mean", norm_mean, ((B, T, groups),), source, held),
            _per_channel(op, "norm_rstd", norm_rstd, ((B, T, groups),), source, held),
            *_modulation(op, source, norm_weight, norm_bias, norm_scale, norm_shift, held, "norm_"),
            not _is_silu(op, norm_act, "norm_act"),
        ]
    status = module.temporal_conv_cpu(
        _coded(source),
        _coded(taps),
        _per_channel(op, "bias", bias, ((channels,), (B, T, channels)), source, held),
        padding_mode == "replicate",
        _is_silu(op, act),
        added,
        stats_groups or 0,
        norm,
        _coded(y),
        *stats,
        torch.get_num_threads(),
    )
    del held
    _check(op, status)


def temporal_attention(
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    rotary: Any,
    causal: bool,
    window: int | None,
    scale: float | None,
    *,
    out: Any,
) -> None:
    """`lumiere_fast.ops.temporal_attention` on the CPU, into `out`; the arguments are those of its reference.

    Args:
        q, k, v: (B, T, H, W, heads, D), tensors, numpy arrays or DLPack objects of any strides; float32, float16 or
            bfloat16, all of one. The arithmetic is fp32.
        bias: None or (heads, 2T - 1), of any strides and dtype.
        rotary: None or (T, D / 2, 2), float32, D even; contiguous where it is no tensor.
        causal, window: which frames are left out; `window` is None or >= 0.
        scale: None for D ** -0.5.
        out: of q's shape and dtype, written; any strides.

    It takes at most `torch.get_num_threads()` threads; their number changes no result.

    Raises:
        ValueError: what does not fit: shapes, dtypes, devices, an `out` whose elements may lie on top of one another or
            that lies between the first and the last byte of q, k or v.
        NativeUnavailable: the native core is not there.
    """
    op, held = "temporal_attention", list[Any]()
    call, source = _attention_call(op, q, k, v, bias, rotary, causal, window, scale, held)
    target = _like(op, "out", out, tuple(source[1]), source[3], held, write=True)
    status = load().temporal_attention_cpu(*call, _coded(target), None, torch.get_num_threads())
    del held
    _check(op, status)


def temporal_attention_backward(
    gradient: Any,
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    rotary: Any,
    causal: bool,
    window: int | None,
    scale: float | None,
    *,
    out: tuple[Any, ...],
) -> None:
    """The gradients of `temporal_attention` from that of its result, on the CPU.

    Args:
        gradient: of the result; of q's shape and dtype, any strides, those of an expanded tensor too.
        q, k, v, bias, rotary, causal, window, scale: as they were.
        out: the gradients of q, k and v, of q's shape and dtype and any strides, and that of the bias, (heads, 2T - 1)
            float32 and contiguous; written, each None where it is not wanted.

    Raises: as `temporal_attention`.
    """
    op, held = "temporal_attention_backward", list[Any]()
    call, source = _attention_call(op, q, k, v, bias, rotary, causal, window, scale, held)
    shape, dtype = tuple(source[1]), source[3]
    above = _coded(_like(op, "gradient", gradient, shape, dtype, held))
    found: list[Any] = [
        None if value is None else _coded(_like(op, name, value, shape, dtype, held, write=True))
        for name, value in zip(("gq", "gk", "gv"), out, strict=False)
    ]
    of_bias = None
    if out[3] is not None:
        lags = (shape[4], 2 * shape[1] - 1)
        of_bias = _coded(_dense(op, "gbias", _like(op, "gbias", out[3], lags, "float32", held, write=True)))
    status = load().temporal_attention_backward_cpu(*call, above, (*found, of_bias), torch.get_num_threads())
    del held
    _check(op, status)


def _attention_call(
    op: str,
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    rotary: Any,
    causal: bool,
    window: int | None,
    scale: float | None,
    held: list[Any],
) -> tuple[tuple[Any, ...], _View]:
    """The first arguments of the module's functions, and where q lies."""
    source = _on_cpu(op, "q", q, held)
    shape, dtype = tuple(source[1]), source[3]
    if len(shape) != 6 or min(shape[1:]) < 1:
        raise ValueError(f"{op}: q must be (B, T, H, W, heads, D) with all but B >= 1, got {shape}")
    if dtype == "float64":
        raise ValueError(f"{op}: q must be float32, float16 or bfloat16, got {dtype}")
    keys, values = (_coded(_like(op, name, each, shape, dtype, held)) for name, each in (("k", k), ("v", v)))
    added = None if bias is None else _on_cpu(op, "bias", bias, held)
    if added is not None:
        _check_shape(op, "bias", tuple(added[1]), (shape[4], 2 * shape[1] - 1))
    angles: Any = None
    if rotary is not None:
        if shape[5] % 2:
            raise ValueError(f"{op}: rotary turns pairs of channels, so D must be even, got {shape[5]}")
        if isinstance(rotary, Tensor) and not rotary.is_contiguous():
            rotary = rotary.contiguous()
            held.append(rotary)
        angles = _like(op, "rotary", rotary, (shape[1], shape[5] // 2, 2), "float32", held)
        angles = _coded(_dense(op, "rotary", angles))
    if window is not None and not 0 <= window < 2**63:
        raise ValueError(f"{op}: window must be None or >= 0 frames, got {window}")
    factor = shape[5] ** -0.5 if scale is None else scale
    if not math.isfinite(factor):
        raise ValueError(f"{op}: scale must be finite, got {scale}")
    options = (causal, -1 if window is None else window, factor)
    return (_coded(source), keys, values, None if added is None else _coded(added), angles, *options), source


def space_time_downsample(x: Any, factor: Sequence[int], mode: str, weight: Any, bias: Any, *, out: Any) -> None:
    """`lumiere_fast.ops.space_time_downsample` into `out`, on the CPU or the CUDA device where the tensors are.

    Args:
        x: (B, C, T, H, W), a tensor, numpy array or DLPack object of any strides; float32, float64, float16 or
            bfloat16. With a weight not float64, and on a CUDA device not float32 either.
        factor: (t, h, w), each >= 1. It divides T, H and W; T need not be divisible with a weight.
        mode: "nearest", "linear", "area" or "blur".
        weight: None for fixed taps, or (C_out, C, k), k odd, of x's dtype.
        bias: None or (C_out,), only beside a weight; of x's dtype.
        out: (B, C or C_out, ceil(T / t), H / h, W / w) of x's dtype, written; any strides.

    Arithmetic is in fp32 at least and rounded once; between a learned resize in time and one in space once more. On the
    CPU it takes at most `torch.get_num_threads()` threads, whose number changes no result. Three taps over at least 4
    frames and 24 channels, before and after, are done by minimal filtering there, but for t > 2: an error of rounding
    is relative to the sum over C of (the sum of the taps' magnitudes) * (that of the frames an output takes), also
    where the largest frame's own tap is small; and infinity among these frames, or numbers whose sums overflow fp32,
    may come out as infinity or NaN. On a CUDA device it is queued on the current stream. What a learned resize works
    in comes from torch's allocator.

    Raises:
        ValueError: what does not fit: shapes, dtypes, devices, an `out` whose elements may lie on top of one another or
            that lies between the first and the last byte of another argument. Nothing is written then.
        NativeUnavailable: the native core, or its CUDA half, is not there.
    """
    _resize("space_time_downsample", x, factor, mode, weight, bias, out)


def space_time_upsample(x: Any, factor: Sequence[int], mode: str, weight: Any, bias: Any, *, out: Any) -> None:
    """`lumiere_fast.ops.space_time_upsample` into `out`, on the CPU or the CUDA device where the tensors are.

    Args:
        x, factor, weight, bias: as for `space_time_downsample`, but that any factor fits any size.
        mode: "nearest" or "linear".
        out: (B, C or C_out, T * t, H * h, W * w) of x's dtype, written; any strides.

    Rounding, threads, streams and what is raised: as for `space_time_downsample`; three taps are filtered for any t.
    """
    _resize("space_time_upsample", x, factor, mode, weight, bias, out)


def space_time_downsample_wgmma(x: Any, factor: Sequence[int], mode: str, weight: Any, bias: Any, *, out: Any) -> None:
    """`space_time_downsample` by warpgroup instructions and bulk copies, of compute capability 9.0 alone.

    There is a weight, and x is float16 or bfloat16 and lies as `wgmma_reasons` wants it. Where it does not start at a
    multiple of 16 bytes, as a slice may, which no trace can tell, the call is `space_time_downsample`'s.

    Raises: as `space_time_downsample`; RuntimeError where the device is another one.
    """
    _resize("space_time_downsample", x, factor, mode, weight, bias, out, wgmma=True)


def space_time_upsample_wgmma(x: Any, factor: Sequence[int], mode: str, weight: Any, bias: Any, *, out: Any) -> None:
    """`space_time_upsample` by warpgroup instructions and bulk copies; see `space_time_downsample_wgmma`."""
    _resize("space_time_upsample", x, factor, mode, weight, bias, out, wgmma=True)


def space_time_downsample_adjoint(gradient: Any, factor: Sequence[int], mode: str, *, out: Any) -> None:
    """The adjoint of `space_time_downsample` by fixed taps: from the gradient of its result that of its input.

    Args:
        gradient: (B, C, T / t, H / h, W / w), of any strides.
        factor, mode: as they were.
        out: (B, C, T, H, W) of the gradient's dtype, written; any strides.

    Raises: as `space_time_downsample`.
    """
    _resize_back("space_time_downsample", gradient, factor, mode, out)


def space_time_upsample_adjoint(gradient: Any, factor: Sequence[int], mode: str, *, out: Any) -> None:
    """The adjoint of `space_time_upsample` by fixed taps; see `space_time_downsample_adjoint`."""
    _resize_back("space_time_upsample", gradient, factor, mode, out)


def wgmma_reasons(shape: Sequence[int], strides: Sequence[int], element_size: int, factor: Sequence[int]) -> list[str]:
    """Every reason why bulk copies cannot take a clip x that lies so; empty where they can.

    Channels lie behind one another and rows of pixels too, and all other strides are multiples of 16 bytes, above 0 and
    below 2^40. Where H or W is resized too, channels take a multiple of 16 bytes: going down, the clip between space
    and time, which is packed, has to lie so as well; going up no other is taken either.
    """
    reasons = []
    if shape[1] > 1 and strides[1] != 1:
        reasons.append(f"axis 1 of x has stride {strides[1]}, it needs stride 1")
    if shape[3] > 1 and shape[4] > 1 and strides[3] != shape[4] * strides[4]:
        reasons.append("the rows of x lie apart, they need to lie one behind the other")
    for axis in (0, 2, 3, 4):
        apart = strides[axis] * element_size
        if shape[axis] > 1 and (not 0 < apart < 1 << 40 or apart % 16):
            reasons.append(f"axis {axis} of x has a stride of {apart} bytes, it needs a multiple of 16 below 2^40")
    if max(factor[1:]) > 1 and shape[1] * element_size % 16:
        reasons.append(f"x has {shape[1]} channels, with a resize in space it needs a multiple of {16 // element_size}")
    return reasons


_RESIZE_MODES = {
    "space_time_downsample": ("nearest", "linear", "area", "blur"),
    "space_time_upsample": ("nearest", "linear"),
}


def _resize(
    op: str, x: Any, factor: Sequence[int], mode: str, weight: Any, bias: Any, out: Any, wgmma: bool = False
) -> None:
    given = {"out": out, "x": x}
    given |= {name: value for name, value in (("weight", weight), ("bias", bias)) if value is not None}
    dtype, device, views, held = _operands(op, [*given].__getitem__, [*given.values()])
    lies: dict[str, _View] = {name: (*view, dtype) for name, view in zip(given, views, strict=True)}
    shapes = {name: tuple(view[1]) for name, view in lies.items()}
    _check_clip(op, "x", shapes["x"])
    _check_resize_parameters(op, shapes, factor, mode)
    if weight is not None:
        _check_learned_dtype(op, dtype, device)
    _check_shape(op, "out", shapes["out"], _resized(op, "x", shapes["x"], factor, shapes.get("weight")))
    if wgmma:
        _check_wgmma(op, lies["x"], factor, device, weight)
    coded = {name: _coded(view) for name, view in lies.items()}
    parameters = (factor, load().RESIZE_MODES[mode], coded.get("weight"), coded.get("bias"))
    call = (coded["x"], *parameters, coded["out"], wgmma and lies["x"][0] % 16 == 0)
    memory = None if weight is None else _resize_workspace(op, device, call)
    _launch(op, device, *call, None if memory is None else (memory.data_ptr(), memory.numel()))
    del held


def _resize_workspace(op: str, device: int | None, call: tuple[Any, ...]) -> Tensor | None:
    """What a learned resize works in, None for nothing. A later call on the same stream may get the same memory."""
    status, size = getattr(load(), f"{op}_workspace")(*call, torch.get_num_threads() if device is None else 0)
    _check(op, status)
    where = torch.device("cpu") if device is None else torch.device("cuda", device)
    return torch.empty(size, dtype=torch.uint8, device=where) if size else None


def _resize_back(op: str, gradient: Any, factor: Sequence[int], mode: str, out: Any) -> None:
    adjoint = f"{op}_adjoint"
    dtype, device, views, held = _operands(adjoint, ("out", "gradient").__getitem__, [out, gradient])
    target, source = ((*view, dtype) for view in views)
    _check_clip(adjoint, "out", tuple(target[1]))
    _check_resize_parameters(adjoint, {}, factor, mode)
    _check_shape(adjoint, "gradient", tuple(source[1]), _resized(adjoint, "out", tuple(target[1]), factor, None))
    _launch(adjoint, device, _coded(target), factor, load().RESIZE_MODES[mode], None, None, _coded(source), False, None)
    del held


def _check_clip(op: str, name: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 5 or min(shape[1:]) < 1:
        raise ValueError(f"{op}: {name} must be (B, C, T, H, W) with C, T, H, W >= 1, got {shape}")


def _check_resize_parameters(op: str, shapes: dict[str, tuple[int, ...]], factor: Sequence[int], mode: str) -> None:
    values = factor if type(factor) is tuple or isinstance(factor, Sequence) else (factor,)
    if len(values) != 3 or any(type(f) is not int or not 1 <= f < 2**63 for f in values):
        raise ValueError(f"{op}: factor must be three integers >= 1 of at most 64 bits, (t, h, w), got {tuple(values)}")
    modes = _RESIZE_MODES[op.removesuffix("_adjoint")]
    if not isinstance(mode, str) or mode not in modes:
        raise ValueError(f"{op}: mode must be {' or '.join(map(repr, modes))}, got {mode!r}")
    if "weight" in shapes:
        weight = shapes["weight"]
        if len(weight) != 3 or weight[0] < 1 or weight[1:2] != shapes["x"][1:2] or weight[2] % 2 == 0:
            raise ValueError(f"{op}: weight must be (C_out, C, k), k odd, with C channels like x, got {weight}")
    if "bias" in shapes:
        if "weight" not in shapes:
            raise ValueError(f"{op}: bias came without weight")
        _check_shape(op, "bias", shapes["bias"], shapes["weight"][:1])


def _check_learned_dtype(op: str, dtype: str, device: int | None) -> None:
    if dtype == "float64" or (dtype == "float32" and device is not None):
        where, accepted = ("a CUDA device", "") if device is not None else ("the CPU", "float32, ")
        raise ValueError(f"{op}: x must be {accepted}float16 or bfloat16 with a weight on {where}, got {dtype}")


def _check_shape(op: str, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {shape}")


def _resized(
    op: str, name: str, shape: tuple[int, ...], factor: Sequence[int], weight: tuple[int, ...] | None
) -> tuple[int, ...]:
    """The shape that one becomes, which is that of the argument `name`."""
    start = (shape[0], shape[1] if weight is None else weight[0])
    if op.startswith("space_time_upsample"):
        return *start, *(size * f for size, f in zip(shape[2:], factor, strict=True))
    for axis, size, f in zip("THW", shape[2:], factor, strict=True):
        if size % f and (axis != "T" or weight is None):
            raise ValueError(f"{op}: {axis} of {name} must be a multiple of its factor {f}, got {size}")
    return *start, *(-(-size // f) for size, f in zip(shape[2:], factor, strict=True))


def _check_wgmma(op: str, x: _View, factor: Sequence[int], device: int | None, weight: Any) -> None:
    if weight is None:
        raise ValueError(f"{op}: weight must be given, fixed taps take no warpgroup instructions")
    if device is None:
        raise ValueError(f"{op}: x must be on a CUDA device, got the CPU")
    if reasons := wgmma_reasons(x[1], x[2], 2, factor):  # bytes of those that are taken
        raise ValueError(f"{op}: {'; '.join(reasons)}")
