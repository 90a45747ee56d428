"""space_time_downsample against torch's own resampling, and against Conv1d and a stride."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from benchmarks.goals import EQUAL_CONV
from benchmarks.harness import Case, Side, each_scenario
from lumiere_fast import ops
from lumiere_fast.benchmark import into_held_buffer
from lumiere_fast.ops.space_time_downsample import SPEC


def interpolate(x: Tensor, factor: Sequence[int], mode: str) -> Tensor:
    return F.interpolate(x, scale_factor=[1 / f for f in factor], mode={"linear": "trilinear"}.get(mode, mode))


def avg_pool3d(x: Tensor, factor: Sequence[int], mode: str) -> Tensor:
    return F.avg_pool3d(x, tuple(factor))


def avg_pool2d(x: Tensor, factor: Sequence[int], mode: str) -> Tensor:
    """Frame by frame, for factors of one in time."""
    frames = F.avg_pool2d(x.transpose(1, 2).flatten(0, 1), tuple(factor[1:]))
    return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def blur_conv(x: Tensor, factor: Sequence[int], mode: str) -> Tensor:
    """A depthwise 3x3 convolution with edges repeated, for factors of (1, 2, 2)."""
    b, c, t = x.shape[:3]
    frames = F.pad(x.transpose(1, 2).flatten(0, 1), (1, 0, 1, 0), mode="replicate")
    taps = x.new_tensor([0.25, 0.5, 0.25])
    kernel = (taps[:, None] * taps).expand(c, 1, 3, 3).contiguous()
    return F.conv2d(frames, kernel, stride=2, groups=c).unflatten(0, (b, t)).transpose(1, 2)


def conv1d_then_stride(x: Tensor, factor: Sequence[int], mode: str, weight: Tensor, bias: Tensor) -> Tensor:
    """(b h w) c t, a Conv1d at every frame, every t-th kept: how the public re-implementation does it."""
    b, c, t, h, w = x.shape
    y = F.conv1d(x.permute(0, 3, 4, 1, 2).reshape(b * h * w, c, t), weight, bias, padding=1)[..., :: factor[0]]
    return y.reshape(b, h, w, c, -1).permute(0, 3, 4, 1, 2)


def conv3d(x: Tensor, factor: Sequence[int], mode: str, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv3d(x, weight[..., None, None], bias, (factor[0], 1, 1), (1, 0, 0))


FIXED: dict[str, tuple[Callable[..., Tensor], ...]] = {
    "nearest": (interpolate,),
    "linear": (interpolate,),
    "area": (avg_pool3d, avg_pool2d),
    "blur": (blur_conv,),
}


@each_scenario(SPEC)
def test_space_time_downsample(case: Case) -> None:
    learned = case.scenario.options["learned"]
    functions = (conv1d_then_stride, conv3d) if learned else FIXED[case.inputs["mode"]]
    limits = {EQUAL_CONV[0]: conv_of_as_many_frames(case)} if learned and case.inputs["factor"][0] > 1 else {}
    case.compare(bound(functions, case), limits={**limits, **case.copy()}, compiled=functions[0])


def conv_of_as_many_frames(case: Case) -> Side:
    """Our own temporal_conv with the arithmetic of the learned downsampling, for as many frames as that returns."""
    x, (stride, _, _) = case.inputs["x"], case.inputs["factor"]
    inputs = {"x": x[:, :, : -(-x.shape[2] // stride)], "weight": case.inputs["weight"], "bias": case.inputs["bias"]}
    return into_held_buffer(ops.temporal_conv, inputs, "auto")


def bound(functions: Sequence[Callable[..., Tensor]], case: Case) -> dict[str, Side]:
    return {function.__name__: partial(function, **case.inputs) for function in functions}
