"""space_time_upsample against torch's own resampling, and against duplication and Conv1d."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_space_time_downsample import Function, aten_interpolate, bound
from benchmarks.harness import Case, each_scenario
from lumiere_fast.ops.space_time_upsample import SPEC


def interpolate(x: Tensor, factor: Sequence[int], mode: str, out: Tensor | None = None) -> Tensor:
    if out is None:
        return F.interpolate(x, scale_factor=tuple(factor), mode={"linear": "trilinear"}.get(mode, mode))
    return aten_interpolate(x, out, tuple(factor), mode)


def interpolate_frames(x: Tensor, factor: Sequence[int], mode: str, out: Tensor | None = None) -> Tensor:
    """Frame by frame in two dimensions, for factors of one in time."""
    frames, scales = x.transpose(1, 2).flatten(0, 1), tuple(factor[1:])
    if out is None:
        y = F.interpolate(frames, scale_factor=scales, mode={"linear": "bilinear"}.get(mode, mode))
        return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
    held = out.transpose(1, 2).flatten(0, 1)
    if mode == "nearest":
        torch.ops.aten.upsample_nearest2d.out(frames, held.shape[2:], *scales, out=held)
    else:
        torch.ops.aten.upsample_bilinear2d.out(frames, held.shape[2:], False, *scales, out=held)
    return out


def expand_copy(x: Tensor, factor: Sequence[int], mode: str, out: Tensor | None = None) -> Tensor:
    """One copy of an expanded view, in the order of channels-last memory."""
    B, C, T, H, W = x.shape
    t, h, w = factor
    rows = x.permute(0, 2, 3, 4, 1)[:, :, None, :, None, :, None].expand(B, T, t, H, h, W, w, C)
    if out is None:
        return rows.reshape(B, T * t, H * h, W * w, C).permute(0, 4, 1, 2, 3)
    out.permute(0, 2, 3, 4, 1).unflatten(1, (T, t)).unflatten(3, (H, h)).unflatten(5, (W, w)).copy_(rows)
    return out


def duplicate_then_conv1d(x: Tensor, factor: Sequence[int], mode: str, weight: Tensor, bias: Tensor) -> Tensor:
    """repeat_interleave, (b h w) c t, Conv1d: how the public re-implementation does it."""
    frames = x.repeat_interleave(factor[0], dim=2)
    b, c, t, h, w = frames.shape
    y = F.conv1d(frames.permute(0, 3, 4, 1, 2).reshape(b * h * w, c, t), weight, bias, padding=1)
    return y.reshape(b, h, w, c, t).permute(0, 3, 4, 1, 2)


def duplicate_then_conv3d(x: Tensor, factor: Sequence[int], mode: str, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv3d(x.repeat_interleave(factor[0], dim=2), weight[..., None, None], bias, padding=(1, 0, 0))


def fixed_taps(factor: Sequence[int], mode: str) -> tuple[Function, ...]:
    of_frames = (interpolate_frames,) if factor[0] == 1 else ()
    return (interpolate, *of_frames, *((expand_copy,) if mode == "nearest" else ()))


@each_scenario(SPEC)
def test_space_time_upsample(case: Case) -> None:
    learned = case.scenario.options["learned"]
    fixed = fixed_taps(case.inputs["factor"], case.inputs["mode"])
    functions = (duplicate_then_conv1d, duplicate_then_conv3d) if learned else fixed
    case.compare(bound(functions, case), limits=case.copy(), compiled=functions[0])
