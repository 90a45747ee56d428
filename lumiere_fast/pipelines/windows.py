"""How a clip is cut into overlapping windows, of frames alone or of frames, rows and columns; how large they may be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from torch import Tensor

from lumiere_fast import ops
from lumiere_fast.ops.blend_windows import WeightKind, given_vectors

Vectors = Sequence[float] | Sequence[Sequence[float]]


class Window(NamedTuple):
    """A box of a clip."""

    frames: slice
    rows: slice = slice(None)
    columns: slice = slice(None)

    def of(self, clip: Tensor) -> Tensor:
        """This part of a clip (B, C, T, H, W), a view."""
        return clip[:, :, self.frames, self.rows, self.columns]


class _Axis(NamedTuple):
    """One axis of a clip, and the windows along it."""

    length: int
    window: int
    overlap: int

    @property
    def starts(self) -> list[int]:
        return [0] if self.window == self.length else ops.window_starts(*self)

    @property
    def shift(self) -> int:
        """How far the last window is shifted back to end where the clip does."""
        return -(self.length - self.window) % (self.window - self.overlap) if self.window < self.length else 0


@dataclass(frozen=True)
class WindowPlan:
    """Windows of one size that cover a clip, as `ops.denoise_step` takes them. Made by `plan_windows`.

    As a string it is what a user reads: "13 windows of 8 frames, overlap 2, exact".

    Args:
        num_frames: of the clip.
        window_frames: of each window.
        overlap: frames that neighbours share; the last window is shifted back where they do not tile, and shares more.
        corners: where each window begins: (t,), or (t, h, w) where they lie in space too.
        window_size: (height, width) of each window; None for the whole frame.
        weights: of the blend, as `ops.blend_windows` takes them: "flat", as in the paper, or others.
        size: (height, width) of the clip's frames, where windows lie in space.
        size_overlap: rows and columns that neighbours share, likewise.
    """

    num_frames: int
    window_frames: int
    overlap: int
    corners: tuple[tuple[int, ...], ...]
    window_size: tuple[int, int] | None = None
    weights: WeightKind | Vectors = "flat"
    size: tuple[int, int] | None = None
    size_overlap: tuple[int, int] | None = None

    @property
    def starts(self) -> list[int] | list[tuple[int, ...]]:
        """As `ops.denoise_step` takes them."""
        return [t for (t,) in self.corners] if self.window_size is None else list(self.corners)

    @property
    def exact(self) -> bool:
        """Whether the windows tile the clip with the overlap everywhere, none of them shifted back."""
        return not any(axis.shift for axis in self._axes)

    def smaller(self, factor: int) -> WindowPlan | None:
        """The best plan of shorter windows for the same clip, of a multiple of `factor` frames; None if there is none.

        The best as `choose_windows` has it, which is not the next shorter: 80 frames in two windows of 76 would be
        twice the work for little less memory, three of 28 tile them. None too where weights were given as numbers,
        which fit no other length.
        """
        lengths = _window_lengths(self.num_frames, factor, self.overlap, self.window_frames - 1)
        if not isinstance(self.weights, str):
            return None
        plans = [
            plan_windows(
                self.num_frames,
                length,
                self.overlap,
                size=self.size,
                window_size=self.window_size,
                size_overlap=self.size_overlap,
                weights=self.weights,
            )
            for length in lengths
        ]
        return min(plans, key=_work, default=None)

    @property
    def _axes(self) -> list[_Axis]:
        space = zip(self.size or (), self.window_size or (), self.size_overlap or (), strict=True)
        return [_Axis(self.num_frames, self.window_frames, self.overlap), *(_Axis(*side) for side in space)]

    def __len__(self) -> int:
        return len(self.corners)

    def __iter__(self) -> Iterator[Window]:
        for t, *corner in self.corners:
            sides = zip(corner, self.window_size or (), strict=True)
            yield Window(slice(t, t + self.window_frames), *(slice(lo, lo + size) for lo, size in sides))

    def __str__(self) -> str:
        axes = self._axes
        extent = " x ".join(str(axis.window) for axis in axes)
        unit = "frames" if len(axes) == 1 else "(frames x height x width)"
        if len(self) == 1:
            return f"1 window of {extent} {unit}"
        count = " x ".join(str(len(axis.starts)) for axis in axes)
        overlap = " x ".join(str(axis.overlap) for axis in axes)
        shift = " x ".join(str(axis.shift) for axis in axes)
        tiling = "exact" if self.exact else f"the last shifted back by {shift}"
        kind = self.weights if isinstance(self.weights, str) else "given"
        blend = "" if kind == "flat" else f", {kind} weights"
        return f"{count} windows of {extent} {unit}, overlap {overlap}, {tiling}{blend}"


def plan_windows(
    num_frames: int,
    window_frames: int,
    overlap: int = 2,
    *,
    size: tuple[int, int] | None = None,
    window_size: tuple[int, int] | None = None,
    size_overlap: tuple[int, int] | None = None,
    weights: WeightKind | Vectors = "flat",
) -> WindowPlan:
    """Windows of `window_frames` that cover `num_frames`, neighbours sharing `overlap` frames (paper: 2).

    The last window of an axis is shifted back where the tiling is not exact; what is no longer than a window is one.

    Args:
        size: (height, width) of the clip's frames, where they are to be cut too.
        window_size: (height, width) of the windows.
        size_overlap: rows and columns that neighbours share; None for a quarter of the window's.
        weights: how windows are weighed where they overlap: "flat" alike (paper), "trapezoid" falling off over the
            overlap alone, "pyramid" from the middle on; see `ops.window_weights`. Or the numbers themselves, as in
            `ops.blend_windows`: a vector for the frames, or three, for frames, rows and columns.

    Raises:
        ValueError: an overlap is not below the window's length, or `size` and `window_size` do not come together.
    """
    axes = [_axis("overlap", "window_frames", num_frames, window_frames, overlap)]
    if (size is None) != (window_size is None) or (size_overlap is not None and window_size is None):
        raise ValueError("windows of frames are cut by size and window_size together, size_overlap beside them or not")
    if size is not None and window_size is not None:
        shared = [side // 4 for side in window_size] if size_overlap is None else size_overlap
        for i, side in enumerate(("height", "width")):
            axes.append(_axis(f"size_overlap's {side}", f"window_size's {side}", size[i], window_size[i], shared[i]))
    vectors = _vectors(weights, axes, [window_frames, *(window_size or ())])
    if all(axis.window == axis.length for axis in axes[1:]):
        axes, vectors = axes[:1], vectors[:1]  # whole frames: the blend goes over time alone
    corners = tuple(product(*(axis.starts for axis in axes)))
    whole = len(axes) == 1
    blend: WeightKind | Vectors = weights if isinstance(weights, str) else vectors[0] if whole else vectors
    if whole:
        return WindowPlan(num_frames, axes[0].window, overlap, corners, weights=blend)
    lengths, windows, overlaps = ((rows, columns) for rows, columns in zip(*axes[1:], strict=True))
    return WindowPlan(num_frames, axes[0].window, overlap, corners, windows, blend, lengths, overlaps)


def window_choices(
    num_frames: int, factor: int, overlap: int = 2, *, at_most: int | None = None, **settings: Any
) -> list[WindowPlan]:
    """The plans for a clip in windows of every length that a model takes, the longest first.

    Args:
        factor: the model's temporal factor: windows have a multiple of it.
        at_most: frames of a window; None for no bound but the clip's.
        settings: further ones of `plan_windows`.

    Raises:
        ValueError: no length is a multiple of `factor`, above `overlap` and within the clip and `at_most`.
    """
    if overlap < 0:
        raise ValueError(f"overlap must be >= 0, got {overlap}")
    longest = num_frames if at_most is None else min(num_frames, at_most)
    lengths = _window_lengths(num_frames, factor, overlap, longest)
    if not lengths:
        raise ValueError(
            f"windows of at most {longest} frames, multiples of the model's temporal factor {factor}, cannot share "
            f"{overlap} frames; give an overlap below {longest // factor * factor}"
            if longest >= factor
            else f"windows have a multiple of the model's temporal factor {factor} frames, and at most {longest} here; "
            "give longer windows or a longer clip"
        )
    # Where one window holds the clip nothing is shared, whatever the overlap.
    return [plan_windows(num_frames, max(n, overlap + 1), overlap, **settings) for n in lengths]


def choose_windows(choices: Sequence[WindowPlan], bytes_of: Callable[[int], int], budget: int | None) -> WindowPlan:
    """The plan that computes the fewest frames, then the fewest windows, of those that fit into `budget` bytes.

    `bytes_of` tells what a window of so many frames takes. Where none fits it is the one of the shortest windows, with
    a warning; a budget of None fits all. On the CPU leave room: what a GPU has not is refused and smaller windows are
    tried, but Linux promises more memory than it has, and ends the process that uses it.
    """
    fitting = [plan for plan in choices if budget is None or bytes_of(plan.window_frames) <= budget]
    if fitting:
        return min(fitting, key=_work)
    shortest = min(choices, key=lambda plan: plan.window_frames)
    assert budget is not None  # which fits all
    warnings.warn(
        f"even windows of {shortest.window_frames} frames, the shortest, take about "
        f"{bytes_of(shortest.window_frames) / 2**30:,.2f} GiB, and {budget / 2**30:,.2f} are to be had: "
        "memory may run out, which on the CPU ends the process",
        RuntimeWarning,
        stacklevel=2,
    )
    return shortest


def _work(plan: WindowPlan) -> tuple[int, int]:
    return len(plan) * plan.window_frames, len(plan)


def _window_lengths(num_frames: int, factor: int, overlap: int, longest: int) -> list[int]:
    lengths = range(longest // factor * factor, 0, -factor)
    return [n for n in lengths if n > overlap or n == num_frames]


def _axis(overlap_name: str, window_name: str, length: int, window: int, overlap: int) -> _Axis:
    if not 0 <= overlap < window:
        raise ValueError(f"{overlap_name} must be from 0 to {window_name} - 1 = {window - 1}, got {overlap}")
    return _Axis(length, min(window, length), overlap)


def _vectors(
    weights: WeightKind | Vectors, axes: Sequence[_Axis], sizes: Sequence[int]
) -> tuple[tuple[float, ...], ...]:
    """One for each axis where they are given as numbers, for windows of `sizes`; ones where they cancel, along what a
    single window holds."""
    if isinstance(weights, str):
        ops.window_weights(weights, 1)  # refuses other names
        return ()
    return tuple(
        (1.0,) * axis.length if axis.window == axis.length else tuple(vector)
        for vector, axis in zip(given_vectors("plan_windows", weights, sizes), axes, strict=True)
    )
