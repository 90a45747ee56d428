"""blend_windows against the two ways it is written elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Case, each_scenario
from lumiere_fast.ops.blend_windows import SPEC


def accumulate(windows: Sequence[Tensor], starts: Sequence[int], num_frames: int) -> Tensor:
    """Add every window into a sum and a count; divide at the end (diffusers' MultiDiffusion pipelines)."""
    b, c, _, h, w = windows[0].shape
    total = windows[0].new_zeros(b, c, num_frames, h, w, dtype=torch.float32)
    count = torch.zeros_like(total)
    for window, start in zip(windows, starts, strict=True):
        total[:, :, start : start + window.shape[2]] += window
        count[:, :, start : start + window.shape[2]] += 1
    return (total / count).to(windows[0].dtype)


def frame_by_frame(windows: Sequence[Tensor], starts: Sequence[int], num_frames: int) -> Tensor:
    """The mean of each frame's predictions, frame after frame."""
    means = []
    for frame in range(num_frames):
        covering = [w[:, :, frame - s] for w, s in zip(windows, starts, strict=True) if s <= frame < s + w.shape[2]]
        means.append(torch.stack(covering).float().mean(0))
    return torch.stack(means, 2).to(windows[0].dtype)


@each_scenario(SPEC)
def test_blend_windows(case: Case) -> None:
    held = accumulate(**case.inputs)
    case.compare(
        {
            "accumulate loop": partial(accumulate, **case.inputs),
            "frame by frame": partial(frame_by_frame, **case.inputs),
        },
        limits={"copy of the result": held.clone},
    )
