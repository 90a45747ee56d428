"""How a clip is cut into overlapping windows, of frames alone or of frames, rows and columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from lumiere_fast import ops


class Window(NamedTuple):
    """A box of a clip."""

    frames: slice
    rows: slice = slice(None)
    columns: slice = slice(None)

    def of(self, clip: Tensor) -> Tensor:
        """This part of a clip (B, C, T, H, W), a view."""
        return clip[:, :, self.frames, self.rows, self.columns]


@dataclass(frozen=True)
class WindowPlan:
    """Windows of one size that cover a clip, as `ops.denoise_step` takes them.

    Args:
        num_frames: of the clip.
        window_frames: of each window.
        overlap: frames that neighbours share; the last window is shifted back where they do not tile, and shares more.
        corners: where each window begins: (t,), or (t, h, w) where they lie in space too.
        window_size: (height, width) of each window; None for the whole frame.
        weights: of the blend, as in `ops.blend_windows`; None for equal weights, as in the paper.
    """

    num_frames: int
    window_frames: int
    overlap: int
    corners: tuple[tuple[int, ...], ...]
    window_size: tuple[int, int] | None = None
    weights: tuple[float, ...] | tuple[tuple[float, ...], ...] | None = None

    @property
    def starts(self) -> list[int] | list[tuple[int, ...]]:
        """As `ops.denoise_step` takes them."""
        return [t for (t,) in self.corners] if self.window_size is None else list(self.corners)

    def __len__(self) -> int:
        return len(self.corners)

    def __iter__(self) -> Iterator[Window]:
        for t, *corner in self.corners:
            sides = zip(corner, self.window_size or (), strict=True)
            yield Window(slice(t, t + self.window_frames), *(slice(lo, lo + size) for lo, size in sides))


def plan_windows(num_frames: int, window_frames: int, overlap: int = 2) -> WindowPlan:
    """Windows of `window_frames` that cover `num_frames`, neighbours sharing `overlap` frames (paper: 2).

    The last window is shifted back where the tiling is not exact; a clip no longer than a window is one window.
    """
    if not 0 <= overlap < window_frames:
        raise ValueError(f"overlap must be from 0 to window_frames - 1 = {window_frames - 1}, got {overlap}")
    window_frames = min(window_frames, num_frames)
    starts = [0] if num_frames == window_frames else ops.window_starts(num_frames, window_frames, overlap)
    return WindowPlan(num_frames, window_frames, overlap, tuple((start,) for start in starts))
