"""space_time_upsample against torch's own resampling, and against duplication and Conv1d."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_space_time_downsample import bound
from benchmarks.harness import Case, each_scenario
from lumiere_fast.ops.space_time_upsample import SPEC


def interpolate(x: Tensor, factor: Sequence[int], mode: str) -> Tensor:
    return F.interpolate(x, scale_factor=tuple(factor), mode={"linear": "trilinear"}.get(mode, mode))


def interpolate_frames(x: Tensor, factor: Sequence[int], mode: str) -> Tensor:
    """Frame by frame in two dimensions, for factors of one in time."""
    frames = x.transpose(1, 2).flatten(0, 1)
    y = F.interpolate(frames, scale_factor=tuple(factor[1:]), mode={"linear": "bilinear"}.get(mode, mode))
    return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def duplicate_then_conv1d(x: Tensor, factor: Sequence[int], mode: str, weight: Tensor, bias: Tensor) -> Tensor:
    """repeat_interleave, (b h w) c t, Conv1d: how the public re-implementation does it."""
    frames = x.repeat_interleave(factor[0], dim=2)
    b, c, t, h, w = frames.shape
    y = F.conv1d(frames.permute(0, 3, 4, 1, 2).reshape(b * h * w, c, t), weight, bias, padding=1)
    return y.reshape(b, h, w, c, t).permute(0, 3, 4, 1, 2)


def duplicate_then_conv3d(x: Tensor, factor: Sequence[int], mode: str, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv3d(x.repeat_interleave(factor[0], dim=2), weight[..., None, None], bias, padding=(1, 0, 0))


@each_scenario(SPEC)
def test_space_time_upsample(case: Case) -> None:
    learned = case.scenario.options["learned"]
    functions = (duplicate_then_conv1d, duplicate_then_conv3d) if learned else (interpolate, interpolate_frames)
    case.compare(bound(functions, case), limits=case.copy(), compiled=functions[0])
