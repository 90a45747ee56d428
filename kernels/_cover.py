"""What the kernels that blend windows share: which windows reach where, how a result is walked, and the mean itself.

The result is walked in runs that are contiguous in it: whole frames in channels_last_3d memory, planes of a frame in
contiguous memory, rows where frames have gaps. Frame and row are scalars of a program, so which windows cover it is
a uniform branch; only where space is blended too is it also a mask over the run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

Box = tuple[tuple[int, int], ...]
Integers = tuple[int, ...]

VECTOR_BYTES = 16
LARGEST_TILE = 4096
LONGEST_RUN = 2**30  # positions within a run are int32; longer runs are walked in parts
LEAST_WEIGHT = 2.0**-60  # of the largest: below it, fp32 products of weights and differences could vanish


def table_of(
    weights: Sequence[float] | None, window: Tensor, axes: int, dtype: torch.dtype, recording: bool
) -> Tensor | None:
    """The weights on the device, of positions in windows like this one, for sums of at least `dtype`.

    The first call with new weights copies them and waits.
    """
    if weights is None:
        return None
    make = _table if recording else _cached_table
    return make(tuple(weights), tuple(window.shape[2 : 2 + axes]), dtype, window.device)


def _table(weights: tuple[float, ...], sizes: Integers, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The vectors of T, H and W one after the other, each relative to its largest; a one for an axis not blended."""
    ends = accumulate(map(int, sizes))
    vectors = [weights[end - int(size) : end] for size, end in zip(sizes, ends, strict=True)]
    vectors += [(1.0,)] * (3 - len(sizes))
    values = [weight / max(vector) for vector in vectors for weight in vector]
    least = math.prod(min(vector) / max(vector) for vector in vectors)
    double = dtype == torch.float64 or least < LEAST_WEIGHT
    return torch.tensor(values, dtype=torch.float64 if double else torch.float32, device=device)


# Without a limit: a CUDA graph that was captured with a table reads it for as long as it is replayed.
_cached_table = functools.cache(_table)


@triton.jit
def place(channels, from_t, from_h, count_t, count_h, tiles):  # type: ignore[no-untyped-def]
    """Where this program's tile lies in the result: clip, channel, frame, row, and which tile of the run; all int64."""
    program = tl.program_id(0)
    tile = (program % tiles).to(tl.int64)
    program = program // tiles
    h = (from_h + program % count_h).to(tl.int64)
    program = program // count_h
    t = (from_t + program % count_t).to(tl.int64)
    program = program // count_t
    return (program // channels).to(tl.int64), (program % channels).to(tl.int64), t, h, tile


@triton.jit
def take(part, weight, here, first, pull, mass):  # type: ignore[no-untyped-def]
    """One more window, where it is `here`: the first is kept, the others pull away from it by their weights."""
    pull += tl.where(here & (mass > 0), weight * (part - first), 0.0)
    first = tl.where(here & (mass == 0), part, first)
    mass += tl.where(here, weight, 0.0)
    return first, pull, mass


@triton.jit
def blended(first, pull, mass):  # type: ignore[no-untyped-def]
    """The weighted mean; what nothing pulls stays as it is, to the sign of a zero."""
    return tl.where(pull == 0, first, first + pull / mass)


class Geometry(NamedTuple):
    """All that decides the launches.

    Args:
        others: the strides of all tensors like the result.
        itemsizes: an element's bytes, in the windows and in the others, where every tensor begins at a multiple of 16
            bytes, and 16-byte loads may be wanted; else None.
        halves: how many results the batch of a window holds, one after the other.
    """

    starts: Integers
    extent: Integers
    shapes: tuple[Integers, ...]
    strides: tuple[Integers, ...]
    others: tuple[Integers, ...]
    itemsizes: tuple[int, int] | None
    halves: int = 1

    @property
    def space(self) -> bool:
        return len(self.extent) == 3

    @property
    def corners(self) -> list[Integers]:
        """Of each window: (t, h, w)."""
        axes = len(self.extent)
        return [(*self.starts[i : i + axes], *[0] * (3 - axes)) for i in range(0, len(self.starts), axes)]

    @property
    def shape(self) -> Integers:
        """Of the result."""
        first = self.shapes[0]
        return (first[0] // self.halves, first[1], *self.extent, *first[2 + len(self.extent) :])

    @property
    def whole(self) -> Box:
        """The result."""
        return tuple((0, n) for n in self.shape[2:])

    @property
    def spans(self) -> list[Box]:
        """Of each window, in the result."""
        pairs = zip(self.corners, self.shapes, strict=True)
        return [tuple((lo, lo + n) for lo, n in zip(corner, shape[2:], strict=True)) for corner, shape in pairs]

    @property
    def alike(self) -> bool:
        """Whether all windows have one shape and layout; to be asked of what is `settled`."""
        return len({shape[2:] for shape in self.shapes}) == 1 and len(set(self.strides)) == 1

    @property
    def vector(self) -> int:
        """Elements of the longest vector of 16 bytes."""
        assert self.itemsizes is not None  # takes_vectors
        return VECTOR_BYTES // min(self.itemsizes)


class Walk(NamedTuple):
    """How the result is walked: along runs, whose places are scalars of a program.

    Args:
        channels: whether C is in the run; else its index is a scalar.
        rows: whether a run is a row; else it is the whole frame.
        dense: whether every run is contiguous, in the result and in all windows.
        inner: elements of the run's inner part: of C or W, or of the whole run where it is dense.
        unit: elements of the run for a step in W.
    """

    channels: bool
    rows: bool
    dense: bool
    inner: int
    unit: int

    def strides(self, strides: Integers) -> Integers:
        """(b, c, t, h, p, q) of a tensor: of the scalars, and of the outer and the inner part of its runs."""
        b, c, t, h, w = strides
        run = (0, 1) if self.dense else (w, c) if self.channels else (0, w)
        return (b, 0 if self.channels else c, t, h if self.rows else 0, *run)


def settled(geometry: Geometry) -> Geometry:
    """Plain integers, also in a trace with symbolic shapes, and strides of 0 where an axis has one element."""

    def strides(shape: Sequence[int], found: Sequence[int]) -> Integers:
        return tuple(int(stride) if n > 1 else 0 for n, stride in zip(shape, found, strict=True))

    plain = Geometry(
        tuple(map(int, geometry.starts)),
        tuple(map(int, geometry.extent)),
        tuple(tuple(map(int, shape)) for shape in geometry.shapes),
        *geometry[3:],
    )
    return plain._replace(
        strides=tuple(strides(*pair) for pair in zip(plain.shapes, plain.strides, strict=True)),
        others=tuple(strides(plain.shape, other) for other in plain.others),
    )


def boxes(box: Box, candidates: Integers, spans: Sequence[Box], slots: int) -> Iterator[tuple[Box, Integers]]:
    """Boxes that make up `box`, with the windows that reach into each: at most `slots`, or all cover all of it."""
    reach = _reach(box, candidates, spans)
    cuts = [
        sorted({edge for i in reach for edge in spans[i][axis] if lo < edge < hi}) for axis, (lo, hi) in enumerate(box)
    ]
    if len(reach) <= slots or not any(cuts):
        yield box, reach
        return
    axis = max(range(3), key=lambda a: len(cuts[a]))
    lo, hi = box[axis]

    def part(begin: int, end: int) -> Box:
        return (*box[:axis], (begin, end), *box[axis + 1 :])

    served = [cut for cut in cuts[axis] if len(_reach(part(lo, cut), reach, spans)) <= slots]
    middle = served[-1] if served else cuts[axis][len(cuts[axis]) // 2]
    yield from boxes(part(lo, middle), reach, spans, slots)
    yield from boxes(part(middle, hi), reach, spans, slots)


def _reach(box: Box, candidates: Integers, spans: Sequence[Box]) -> Integers:
    """Those of the windows that overlap a box."""
    return tuple(
        i for i in candidates if all(a < hi and lo < b for (a, b), (lo, hi) in zip(spans[i], box, strict=True))
    )


def walk_of(geometry: Geometry) -> Walk:
    """The longest runs that are contiguous everywhere; else rows, along the denser of C and W in the result."""
    tensors = [
        *zip(geometry.shapes, geometry.strides, strict=True),
        *((geometry.shape, other) for other in geometry.others),
    ]
    _, C, _, H, W = geometry.shape
    for rows, channels in product((False, True), (True, False)):
        unit = C if channels else 1
        axes = [*([1] if channels else []), 4, *([] if rows else [3])]
        run = W * unit * (1 if rows else H)
        if (rows or not geometry.space) and run < LONGEST_RUN and all(_packed(*tensor, axes) for tensor in tensors):
            return Walk(channels, rows, True, run, unit)
    _, to_c, _, _, to_w = geometry.others[0]
    channels = to_c < to_w or W == 1
    if W * (C if channels else 1) > 2 * LONGEST_RUN - LARGEST_TILE:
        raise ValueError(f"a row of {W} pixels is longer than the {2 * LONGEST_RUN} elements of a run")
    return Walk(channels, True, False, C if channels else W, C if channels else 1)


def _packed(shape: Integers, strides: Integers, axes: Sequence[int]) -> bool:
    """Whether these axes, the densest first, lie in memory without gaps."""
    expected = 1
    for axis in axes:
        if shape[axis] > 1 and strides[axis] != expected:
            return False
        expected *= shape[axis]
    return True


def takes_vectors(geometry: Geometry, walk: Walk) -> bool:
    """Whether the windows are alike, and every run of them and of the result is made of whole 16-byte vectors."""
    if geometry.itemsizes is None or not walk.dense or not geometry.alike:
        return False
    of_window, of_other = geometry.itemsizes
    lengths = [walk.inner]
    if geometry.space:
        lengths += [geometry.shapes[0][4] * walk.unit, *(corner[2] * walk.unit for corner in geometry.corners)]
    places = [stride * of_window for stride in walk.strides(geometry.strides[0])[:4]]
    places += [stride * of_other for other in geometry.others for stride in walk.strides(other)[:4]]
    return all(length % geometry.vector == 0 for length in lengths) and all(at % VECTOR_BYTES == 0 for at in places)


class Region(NamedTuple):
    """The box of the result that a launch writes, in frames, rows and elements of a run."""

    channels: int
    from_t: int
    from_h: int
    from_x: int
    count_t: int
    count_h: int
    count_x: int

    def programs(self, geometry: Geometry, tile: int) -> int:
        tiles = -(-self.count_x // tile)
        return geometry.shape[0] * self.channels * self.count_t * self.count_h * tiles


def region_of(geometry: Geometry, walk: Walk, box: Box) -> Region:
    channels = 1 if walk.channels else geometry.shape[1]
    (t, t_end), (h, h_end), (w, w_end) = box
    if walk.rows:
        return Region(channels, t, h, w * walk.unit, t_end - t, h_end - h, (w_end - w) * walk.unit)
    return Region(channels, t, 0, 0, t_end - t, 1, walk.inner)
