"""space_time_downsample against torch's own resampling, and against Conv1d and a stride."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.goals import EQUAL_CONV
from benchmarks.harness import Case, Side, each_scenario
from lumiere_fast import ops
from lumiere_fast.benchmark import into_held_buffer
from lumiere_fast.ops.space_time_downsample import SPEC

Function = Callable[..., Tensor]


def interpolate(x: Tensor, factor: Sequence[int], mode: str, out: Tensor | None = None) -> Tensor:
    if out is None:
        return F.interpolate(x, scale_factor=[1 / f for f in factor], mode={"linear": "trilinear"}.get(mode, mode))
    return aten_interpolate(x, out, [1 / f for f in factor], mode)


def aten_interpolate(x: Tensor, out: Tensor, scales: Sequence[float], mode: str) -> Tensor:
    """What `F.interpolate` calls, into a held buffer."""
    if mode == "nearest":
        return torch.ops.aten.upsample_nearest3d.out(x, out.shape[2:], *scales, out=out)
    return torch.ops.aten.upsample_trilinear3d.out(x, out.shape[2:], False, *scales, out=out)


def slice_copy(x: Tensor, factor: Sequence[int], mode: str, out: Tensor | None = None) -> Tensor:
    t, h, w = factor
    picked = x[:, :, ::t, ::h, ::w]
    return picked.contiguous(memory_format=torch.channels_last_3d) if out is None else out.copy_(picked)


def avg_pool3d(x: Tensor, factor: Sequence[int], mode: str, out: Tensor | None = None) -> Tensor:
    if out is None:
        return F.avg_pool3d(x, tuple(factor))
    return torch.ops.aten.avg_pool3d.out(x, list(factor), list(factor), out=out)


def avg_pool2d(x: Tensor, factor: Sequence[int], mode: str, out: Tensor | None = None) -> Tensor:
    """Frame by frame, for factors of one in time."""
    frames = x.transpose(1, 2).flatten(0, 1)
    if out is None:
        return F.avg_pool2d(frames, tuple(factor[1:])).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
    torch.ops.aten.avg_pool2d.out(frames, list(factor[1:]), list(factor[1:]), out=out.transpose(1, 2).flatten(0, 1))
    return out


def blur_conv(x: Tensor, factor: Sequence[int], mode: str) -> Tensor:
    """A depthwise 3x3 convolution with edges repeated, frame by frame, for factors of one in time."""
    b, c, t = x.shape[:3]
    frames = F.pad(x.transpose(1, 2).flatten(0, 1), (1, 0, 1, 0), mode="replicate")
    taps = x.new_tensor([0.25, 0.5, 0.25])
    kernel = (taps[:, None] * taps).expand(c, 1, 3, 3).contiguous()
    return F.conv2d(frames, kernel, stride=tuple(factor[1:]), groups=c).unflatten(0, (b, t)).transpose(1, 2)


def blur_conv3d(x: Tensor, factor: Sequence[int], mode: str) -> Tensor:
    """A depthwise 3x3x3 convolution with edges repeated, where every axis is resized."""
    c = x.shape[1]
    taps = x.new_tensor([0.25, 0.5, 0.25])
    kernel = (taps[:, None, None] * taps[:, None] * taps).expand(c, 1, 3, 3, 3).contiguous()
    return F.conv3d(F.pad(x, (1, 0) * 3, mode="replicate"), kernel, stride=tuple(factor), groups=c)


def conv1d_then_stride(x: Tensor, factor: Sequence[int], mode: str, weight: Tensor, bias: Tensor) -> Tensor:
    """(b h w) c t, a Conv1d at every frame, every t-th kept: how the public re-implementation does it."""
    b, c, t, h, w = x.shape
    y = F.conv1d(x.permute(0, 3, 4, 1, 2).reshape(b * h * w, c, t), weight, bias, padding=1)[..., :: factor[0]]
    return y.reshape(b, h, w, c, -1).permute(0, 3, 4, 1, 2)


def conv3d(x: Tensor, factor: Sequence[int], mode: str, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv3d(x, weight[..., None, None], bias, (factor[0], 1, 1), (1, 0, 0))


def fixed_taps(factor: Sequence[int], mode: str) -> tuple[Function, ...]:
    """torch's ways; by twos, linear is the mean of all there is."""
    of_frames = factor[0] == 1
    pools = (avg_pool3d, avg_pool2d) if of_frames else (avg_pool3d,)
    ways: dict[str, tuple[Function, ...]] = {
        "nearest": (interpolate, slice_copy),
        "linear": (interpolate, *(pools if max(factor) <= 2 else ())),
        "area": pools,
        "blur": (blur_conv if of_frames else blur_conv3d,),
    }
    return ways[mode]


@each_scenario(SPEC)
def test_space_time_downsample(case: Case) -> None:
    learned = case.scenario.options["learned"]
    factor = case.inputs["factor"]
    functions = (conv1d_then_stride, conv3d) if learned else fixed_taps(factor, case.inputs["mode"])
    limits = {EQUAL_CONV[0]: conv_of_as_many_frames(case)} if learned and factor[0] > 1 else {}
    case.compare(bound(functions, case), limits={**limits, **case.copy()}, compiled=functions[0])


def conv_of_as_many_frames(case: Case) -> Side:
    """Our own temporal_conv with the arithmetic of the learned downsampling, for as many frames as that returns."""
    x, (stride, _, _) = case.inputs["x"], case.inputs["factor"]
    inputs = {"x": x[:, :, : -(-x.shape[2] // stride)], "weight": case.inputs["weight"], "bias": case.inputs["bias"]}
    return into_held_buffer(ops.temporal_conv, inputs, "auto")


def bound(functions: Sequence[Function], case: Case) -> dict[str, Side]:
    return {function.__name__: side(function, case) for function in functions}


def side(function: Function, case: Case) -> Side:
    """Into a buffer that is held, as ours is, where torch has such a form: one as the function itself makes."""
    plain = partial(function, **case.inputs)
    if "out" not in inspect.signature(function).parameters:
        return plain
    try:
        held = torch.empty_like(plain())
    except RuntimeError:  # which the harness will meet again, and tell
        return plain
    return partial(plain, out=held)
