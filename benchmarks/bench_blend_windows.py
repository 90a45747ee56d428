"""blend_windows against the two ways it is written elsewhere, all of them into held buffers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Case, each_scenario
from lumiere_fast.ops.blend_windows import SPEC


def video_like(windows: Sequence[Tensor], num_frames: int, dtype: torch.dtype | None = None) -> Tensor:
    """Room for the video, in the windows' memory format."""
    b, c, _, h, w = windows[0].shape
    shape = (b, num_frames, h, w, c)
    return windows[0].new_empty(shape, dtype=dtype or windows[0].dtype).permute(0, 4, 1, 2, 3)


class Accumulate:
    """Add every window into a sum and a count; divide at the end (diffusers' MultiDiffusion pipelines)."""

    def __init__(self, windows: Sequence[Tensor], num_frames: int) -> None:
        self.total, self.count = (video_like(windows, num_frames, torch.float32) for _ in range(2))
        self.result = video_like(windows, num_frames)

    def __call__(self, windows: Sequence[Tensor], starts: Sequence[int], num_frames: int) -> Tensor:
        self.total.zero_()
        self.count.zero_()
        for window, start in zip(windows, starts, strict=True):
            self.total[:, :, start : start + window.shape[2]] += window
            self.count[:, :, start : start + window.shape[2]] += 1
        return torch.div(self.total, self.count, out=self.result)


class FrameByFrame:
    """The mean of each frame's predictions, frame after frame."""

    def __init__(self, windows: Sequence[Tensor], num_frames: int) -> None:
        self.result = video_like(windows, num_frames)

    def __call__(self, windows: Sequence[Tensor], starts: Sequence[int], num_frames: int) -> Tensor:
        for frame in range(num_frames):
            covering = [w[:, :, frame - s] for w, s in zip(windows, starts, strict=True) if s <= frame < s + w.shape[2]]
            self.result[:, :, frame] = torch.stack(covering).float().mean(0)
        return self.result


@each_scenario(SPEC)
def test_blend_windows(case: Case) -> None:
    windows, num_frames = case.inputs["windows"], case.inputs["num_frames"]
    accumulate, frame_by_frame = Accumulate(windows, num_frames), FrameByFrame(windows, num_frames)
    case.compare(
        {
            "accumulate loop": partial(accumulate, **case.inputs),
            "frame by frame": partial(frame_by_frame, **case.inputs),
        },
        limits=case.copy(),
    )
