"""Where training samples come from: one small protocol, and the procedural clips behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lumiere_fast.data.clips import CLIP_FRAMES, ClipSampler, mixed_generator, render

# Streams of `mixed_generator` under one seed; `ClipSampler` draws from 0 and 1.
NOISE_STREAM = 2
WINDOW_STREAM = 3
ORDER_STREAM = 4
CROP_STREAM = 5


class CaptionedFrames(NamedTuple):
    """A batch: `frames` (B, 3, T, size, size) fp32 in [-1, 1] and B `prompts`."""

    frames: Tensor
    prompts: Sequence[str]


class ClipSource(Protocol):
    """An endless stream of captioned clips, or of single pictures where `num_frames` is 1.

    A batch is a pure function of (`seed`, step), whatever was drawn before: that is what makes a run resumable to the
    bit.

    Attributes:
        seed: names the stream.
        num_frames: frames of a sample.
    """

    @property
    def seed(self) -> int: ...

    @property
    def num_frames(self) -> int: ...

    def settings(self) -> dict[str, Any]:
        """All that the stream depends on, as plain data: a run that is resumed must have the same."""
        ...

    def draw(self, step: int, batch_size: int, size: int, device: torch.device) -> CaptionedFrames:
        """Batch `step` at `size` pixels a side, its frames on `device`."""
        ...

    def close(self) -> None:
        """Stop work in the background; `draw` starts it again."""
        ...


class ProceduralClips:
    """`ClipSampler`'s training clips, drawn on the device that learns from them.

    Args:
        num_frames: fewer than a clip's 16 take a random window of it; 1 takes single frames at any time, half of whose
            captions have no word of motion.
    """

    def __init__(self, seed: int, num_frames: int = CLIP_FRAMES) -> None:
        if num_frames < 1:
            raise ValueError(f"num_frames must be >= 1, got {num_frames}")
        self.seed = seed
        self.num_frames = num_frames
        self._sampler = ClipSampler(seed, num_frames=max(num_frames, CLIP_FRAMES))

    def settings(self) -> dict[str, Any]:
        """See `ClipSource`."""
        return {"data": "procedural", "seed": self.seed, "num_frames": self.num_frames}

    def draw(self, step: int, batch_size: int, size: int, device: torch.device) -> CaptionedFrames:
        """See `ClipSource`."""
        if self.num_frames == 1:
            batch = self._sampler.images(step, batch_size)
        else:
            batch = self._sampler.batch(step, batch_size)
            spare = batch.frames.shape[1] - self.num_frames
            start = int(torch.randint(spare + 1, (), generator=mixed_generator(self.seed, WINDOW_STREAM, step)))
            batch = replace(batch, frames=batch.frames[:, start : start + self.num_frames])
        return CaptionedFrames(render(batch.to(device).states, size), batch.prompts)

    def close(self) -> None:
        """Nothing runs in the background."""
