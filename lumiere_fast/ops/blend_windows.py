"""Temporal MultiDiffusion: one video from the overlapping windows a network predicted."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import islice, pairwise, product
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lumiere_fast import native
from lumiere_fast.dispatch import Backend, Needs
from lumiere_fast.ops import _layout, _registry
from lumiere_fast.ops._checks import (
    check_choice,
    check_device,
    check_floating,
    check_integer,
    check_is_tensor,
    check_same_dtype,
)
from lumiere_fast.ops._spec import Draw, OpSpec, Scenario

Box = tuple[tuple[int, int], ...]
WeightKind = Literal["flat", "trapezoid", "pyramid"]
Weights = WeightKind | Tensor | Sequence[float] | Sequence[Tensor] | Sequence[Sequence[float]] | None

LEAST_WEIGHT = 1e-100  # of a vector's largest: the product of three is a normal number still


def blend_windows(
    windows: Tensor | Sequence[Tensor],
    starts: Tensor | Sequence[int] | Sequence[Sequence[int]],
    num_frames: int,
    *,
    weights: Weights = None,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The video nearest to all its windows, `argmin_J sum_i w_i || J[window i] - windows[i] ||^2`.

    The solution is the weighted mean, at every position, of the windows that cover it:

        J[f] = sum_i w[f - starts[i]] * windows[i][f - starts[i]] / sum_i w[f - starts[i]]

    Positions that one window covers are that window's, exactly, and where all windows agree so does J, exactly.

    Args:
        windows: (N, B, C, T', H, W), or N tensors (B, C, T'_i, H, W) of any lengths and strides; one dtype and device.
        starts: (N,) first frames, all different. Or (N, 3) corners (t, h, w), to blend in space too. A sequence of
            integers, or a tensor, best on the CPU: its values are read.
        num_frames: frames of the video. With (N, 3) starts its height and width are where the furthest window ends.
        weights: None or "flat" for equal weights, as in the paper; a vector (T',) for (N,) starts; three vectors
            (T',), (H',), (W',) for (N, 3), whose product weighs a position. Or "trapezoid" or "pyramid" for the vectors
            of `window_weights`, a trapezoid's ramp as long as the least overlap of neighbours along its axis. Positive,
            within 1e100 of one another, for windows of one size. Constants: no gradient goes to them.
        backend: None for the current choice.
        out: where to put the result; not where a gradient is needed.

    Returns:
        (B, C, num_frames, H, W) in the dtype and memory format of the windows. Sums are in fp32 at least, in the order
        of the windows (deterministic), and round once; fp64 stays fp64. Differentiable in the windows.

    Raises:
        ValueError: a start is given twice, a window sticks out, or a position is in no window (the message lists them).
        BackendUnavailable: the named backend cannot run the call.

    Source: Lumiere, section 3.2, after MultiDiffusion (Bar-Tal et al. 2023).
    """
    return _OP(flatten(windows, starts, num_frames, weights), backend, out)


def window_starts(num_frames: int, window: int, overlap: int = 2) -> list[int]:
    """First frames of windows that cover the clip, `overlap` shared with the next; the last is shifted back to fit.

    Raises:
        ValueError: unless `0 <= overlap < window <= num_frames`.
    """
    if not 0 <= overlap < window <= num_frames:
        raise ValueError(f"need 0 <= overlap < window <= num_frames, got {overlap}, {window} and {num_frames}")
    return [*range(0, num_frames - window, window - overlap), num_frames - window]


def window_weights(kind: WeightKind, window: int, overlap: int = 2) -> tuple[float, ...]:
    """Weights of a window's frames (or rows, or columns), all divided by the largest:

        flat:       w[i] = 1
        trapezoid:  w[i] = min(i + 1, window - i, overlap + 1)
        pyramid:    w[i] = min(i + 1, window - i)

    Flat is the paper's. A trapezoid fades neighbours that share `overlap` frames, less than half of a window, linearly
    into one another. A pyramid trusts a window the more the further a frame is from its ends, which suits large
    overlaps; a trapezoid whose ramps meet is one.

    Raises:
        ValueError: another kind, no window, or a negative overlap.
    """
    op = "window_weights"
    check_choice(op, "kind", kind, get_args(WeightKind))
    window, overlap = check_integer(op, "window", window), check_integer(op, "overlap", overlap)
    if window < 1 or overlap < 0:
        raise ValueError(f"{op}: need window >= 1 and overlap >= 0, got {window} and {overlap}")
    ramp = {"flat": 1, "trapezoid": overlap + 1, "pyramid": window}[kind]
    heights = [min(i + 1, window - i, ramp) for i in range(window)]
    return tuple(height / max(heights) for height in heights)


def blend_windows_reference(
    windows: Sequence[Tensor], starts: Sequence[int], extent: Sequence[int], weights: Sequence[float] | None
) -> Tensor:
    return blend(windows, starts, extent, weights, windows[0].dtype)


def blend(
    windows: Sequence[Tensor],
    starts: Sequence[int],
    extent: Sequence[int],
    weights: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """The reference with the result's dtype free, so that `denoise_step` can go on without a rounding, in that of its
    own arithmetic where it is the wider one."""
    blended = _result(windows, extent, dtype).empty()
    accumulation = _layout.accumulation_dtype(torch.promote_types(windows[0].dtype, dtype))
    for cell in _plan(windows, starts, extent).cells:
        parts = [_crop(windows[i], box) for i, box in zip(cell.windows, cell.boxes, strict=True)]
        mean = parts[0]
        if len(parts) > 1:
            # Steps away from the first window: what the windows agree on survives the rounding of the shares.
            first = mean = mean.to(accumulation)
            for part, share in zip(parts[1:], _shares(cell, weights, windows[0], accumulation)[1:], strict=True):
                mean = mean + share * (part.to(accumulation) - first)
        _crop(blended, cell.box).copy_(mean)
    return blended


class Cell(NamedTuple):
    """A box of the video that one set of windows covers: which they are, and where in each of them it lies."""

    box: Box
    windows: tuple[int, ...]
    boxes: tuple[Box, ...]


class Plan(NamedTuple):
    cells: tuple[Cell, ...]
    bare: tuple[Box, ...]  # covered by no window
    sticks_out: tuple[int, int, int, int] | None = None  # the first window that does, axis, where it starts and stops


def _plan(windows: Sequence[Tensor], starts: Sequence[int], extent: Sequence[int]) -> Plan:
    # No cache can hold symbols, and Dynamo warns of caches.
    plan = plan_cells if _registry.traced() else _cached_plan
    return plan(tuple(starts), tuple([window.shape for window in windows]), tuple(extent))


def plan_cells(starts: Sequence[int], shapes: Sequence[Sequence[int]], extent: Sequence[int]) -> Plan:
    """Cut each axis where a window starts or stops: between cuts, the covering windows do not change."""
    axes = len(extent)
    corners = tuple(zip(*(map(int, starts[a::axes]) for a in range(axes)), strict=True))
    # int: in a trace with symbolic shapes, the lengths that decide who covers what become constants.
    sizes = tuple(tuple(map(int, shape[2 : 2 + axes])) for shape in shapes)
    extent = tuple(map(int, extent))
    spans = [tuple((c, c + n) for c, n in zip(*window, strict=True)) for window in zip(corners, sizes, strict=True)]
    for window, span in enumerate(spans):
        for axis, ((start, stop), end) in enumerate(zip(span, extent, strict=True)):
            if start < 0 or stop > end:
                return Plan((), (), (window, axis, start, stop))
    cuts = [sorted({0, n, *(edge for span in spans for edge in span[a])}) for a, n in enumerate(extent)]
    cells = []
    for box in product(*map(pairwise, cuts)):
        covering = tuple(i for i, span in enumerate(spans) if _inside(box, span))
        cells.append(Cell(box, covering, tuple(_shifted(box, corners[i]) for i in covering)))
    return Plan(tuple(cells), tuple(cell.box for cell in cells if not cell.windows))


_cached_plan = functools.lru_cache(maxsize=64)(plan_cells)


def _inside(box: Box, span: Box) -> bool:
    return all(lo <= a and b <= hi for (a, b), (lo, hi) in zip(box, span, strict=True))


def _shifted(box: Box, corner: tuple[int, ...]) -> Box:
    return tuple((lo - c, hi - c) for (lo, hi), c in zip(box, corner, strict=True))


def _shares(cell: Cell, weights: Sequence[float] | None, like: Tensor, dtype: torch.dtype) -> list[Any]:
    """What each covering window contributes to a cell: together one. To be multiplied with (B, C, T, H, W)."""
    if weights is None:
        return [1 / len(cell.windows)] * len(cell.windows)
    table = torch.tensor(weights, dtype=torch.float64, device=like.device)
    axes = len(cell.box)
    vectors = table.split(list(like.shape[2 : 2 + axes]))
    raw = []
    for box in cell.boxes:
        weight = torch.ones([1] * (3 - axes), dtype=torch.float64, device=like.device)
        for vector, (lo, hi) in zip(reversed(vectors), reversed(box), strict=True):
            weight = vector[lo:hi].reshape(-1, *[1] * weight.dim()) * weight
        raw.append(weight)
    total = torch.stack(raw).sum(0)
    return [(weight / total).to(dtype) for weight in raw]


def _crop(x: Tensor, box: Box) -> Tensor:
    index = (slice(None), slice(None), *(slice(lo, hi) for lo, hi in box))
    return x[index]


def flatten(
    windows: Tensor | Sequence[Tensor],
    starts: Tensor | Sequence[int] | Sequence[Sequence[int]],
    num_frames: int,
    weights: Weights,
) -> tuple[Any, ...]:
    parts = check_windows("blend_windows", windows)
    corners = check_starts("blend_windows", starts, parts)
    if type(num_frames) is not int and not isinstance(num_frames, torch.SymInt):
        num_frames = check_integer("blend_windows", "num_frames", num_frames)
    extent = (
        num_frames,
        *(max(c[a] + w.shape[2 + a] for c, w in zip(corners, parts, strict=True)) for a in _space(corners)),
    )
    return flatten_cover("blend_windows", parts, corners, extent, weights)


def flatten_cover(
    op: str,
    windows: list[Tensor],
    corners: list[tuple[int, ...]],
    extent: tuple[int, ...],
    weights: Weights,
) -> tuple[list[Tensor], list[int], tuple[int, ...], list[float] | None]:
    """The cover's part of the reference's arguments, once the windows are known to fit and to leave no gap."""
    starts = [start for corner in corners for start in corner]
    table = check_weights(op, weights, windows, corners)
    plan = _plan(windows, starts, extent)
    if plan.sticks_out is not None:
        window, axis, start, stop = plan.sticks_out
        raise ValueError(f"{op}: window {window} spans {start}..{stop} of {'THW'[axis]}, which is 0..{extent[axis]}")
    if plan.bare:
        raise ValueError(f"{op}: {_named(plan.bare)} are in no window")
    return windows, starts, extent, table


def _named(boxes: Sequence[Box]) -> str:
    """Frames one by one, or boxes where space is blended too; the first sixteen."""
    if len(boxes[0]) == 1:
        names = list(map(str, islice((frame for ((lo, hi),) in boxes for frame in range(lo, hi)), 17)))
    else:
        spans = [zip("thw", box, strict=True) for box in boxes]
        names = ["(" + ", ".join(f"{axis} {lo}..{hi}" for axis, (lo, hi) in span) + ")" for span in spans]
    kind = "frames" if len(boxes[0]) == 1 else "boxes"
    return f"{kind} {', '.join(names[:16])}{', ...' if len(names) > 16 else ''}"


def check_windows(op: str, windows: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if not isinstance(windows, (Tensor, list, tuple)):
        raise ValueError(f"{op}: windows must be a tensor (N, B, C, T', H, W) or a list of N, got {type(windows)}")
    parts = list(windows.unbind(0)) if isinstance(windows, Tensor) else list(windows)
    if not parts:
        raise ValueError(f"{op}: windows needs at least one window, got none")
    for i, part in enumerate(parts):
        if not isinstance(part, Tensor) or part.layout is not torch.strided or part.is_nested:
            check_is_tensor(op, f"windows[{i}]", part)
    first = parts[0]
    shape, dtype, device = first.shape, first.dtype, first.device
    for i, part in enumerate(parts):
        if i > 0 and part.shape == shape and part.dtype is dtype and part.device == device:
            continue
        name = f"windows[{i}]"
        if part.dim() != 5 or part.shape[:2] != parts[0].shape[:2] or 0 in part.shape[1:]:
            raise ValueError(
                f"{op}: {name} must be (B, C, T', H, W), not empty but for B, with the B and C of windows[0] "
                f"{tuple(parts[0].shape)}, got shape {tuple(part.shape)}"
            )
        check_floating(op, name, part)
        check_same_dtype(op, name, part, "windows[0]", parts[0])
        check_device(op, name, part, parts[0])
    return parts


def check_starts(
    op: str, starts: Tensor | Sequence[int] | Sequence[Sequence[int]], windows: Sequence[Tensor]
) -> list[tuple[int, ...]]:
    values = starts.tolist() if hasattr(starts, "tolist") else list(starts)
    corners = [tuple(v) if type(v) is not int and isinstance(v, Sequence) else (v,) for v in values]
    if len(corners) != len(windows):
        raise ValueError(f"{op}: {len(windows)} windows came with {len(corners)} starts; each window needs one")
    if any([type(n) is not int for corner in corners for n in corner]):
        corners = [tuple(check_integer(op, "starts", n) for n in corner) for corner in corners]
    if {*map(len, corners)} not in ({1}, {3}):
        raise ValueError(f"{op}: starts must be integers, (N,) frames or (N, 3) corners (t, h, w), got {values}")
    if len(set(corners)) < len(corners):
        corner = next(corner for i, corner in enumerate(corners) if corner in corners[:i])
        raise ValueError(f"{op}: start {corner[0] if len(corner) == 1 else corner} is given twice")
    first = windows[0].shape
    for i, window in enumerate(windows[1:] if len(corners[0]) == 1 else (), 1):
        if window.shape != first and window.shape[3:] != first[3:]:
            raise ValueError(
                f"{op}: windows[{i}] must have the H and W of windows[0] {tuple(windows[0].shape)} where only frames "
                f"are blended, got shape {tuple(window.shape)}; (N, 3) starts blend in space"
            )
    return corners


def check_weights(
    op: str, weights: Weights, windows: Sequence[Tensor], corners: Sequence[tuple[int, ...]]
) -> list[float] | None:
    """The vectors of all blended axes, one after the other, each relative to its largest: only their ratios count."""
    if isinstance(weights, str):
        check_choice(op, "weights", weights, (None, *get_args(WeightKind)))
        weights = None if weights == "flat" else weights
    if weights is None:
        return None
    axes = len(corners[0])
    sizes = [int(size) for size in windows[0].shape[2 : 2 + axes]]
    if any(window.shape[2 : 2 + axes] != windows[0].shape[2 : 2 + axes] for window in windows):
        raise ValueError(f"{op}: weights need windows of equal lengths; leave them out, or cut the windows alike")
    if isinstance(weights, str):
        along = zip(sizes, zip(*corners, strict=True), strict=True)
        vectors = [list(window_weights(weights, size, _least_overlap(starts, size))) for size, starts in along]
    else:
        vectors = given_vectors(op, weights, sizes)
    relative = [[value / max(vector) for value in vector] for vector in vectors]
    if any(min(vector) < LEAST_WEIGHT for vector in relative):
        raise ValueError(f"{op}: weights of one vector must lie within {1 / LEAST_WEIGHT:.0e} of one another")
    return [value for vector in relative for value in vector]


def _least_overlap(starts: Sequence[int], size: int) -> int:
    """Of neighbours along an axis; none where there is but one."""
    steps = [after - before for before, after in pairwise(sorted(set(starts)))]
    return max(0, size - max(steps)) if steps else 0


def given_vectors(op: str, weights: Any, sizes: Sequence[int]) -> list[list[float]]:
    """As lists, not as tensors: a trace can read them."""
    try:
        vectors = [[float(w) for w in _listed(v)] for v in (_listed(weights) if len(sizes) == 3 else [weights])]
    except (TypeError, ValueError):
        kind = "three vectors of numbers, for T, H and W" if len(sizes) == 3 else "a vector of numbers"
        accepted = ", ".join(map(repr, get_args(WeightKind)))
        raise ValueError(f"{op}: weights must be None, {accepted} or {kind}, got {weights!r}") from None
    if len(vectors) != len(sizes):
        raise ValueError(f"{op}: weights must be {len(sizes)} vectors, one for each of T, H, W, got {len(vectors)}")
    for a, (vector, size) in enumerate(zip(vectors, sizes, strict=True)):
        if len(vector) != size:
            raise ValueError(f"{op}: weights[{a}] must have the {size} entries of its axis, got {len(vector)}")
    if not all(0 < value < math.inf for vector in vectors for value in vector):
        raise ValueError(f"{op}: weights must be positive and finite, got {vectors}")
    return vectors


def _listed(values: Any) -> list[Any]:
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _space(corners: Sequence[Sequence[int]]) -> range:
    return range(1, len(corners[0]))


def _result(windows: Sequence[Tensor], extent: Sequence[int], dtype: torch.dtype) -> _registry.Result:
    first = windows[0]
    shape = (*first.shape[:2], *extent, *first.shape[2 + len(extent) :])
    return _registry.Result(shape, dtype, first.device, _layout.video_format(first))


def describe(
    windows: Sequence[Tensor], starts: Sequence[int], extent: Sequence[int], weights: Sequence[float] | None
) -> _registry.Result:
    return _result(windows, extent, windows[0].dtype)


def blend_windows_backward(
    gradients: Sequence[Tensor],
    windows: Sequence[Tensor],
    starts: Sequence[int],
    extent: Sequence[int],
    weights: Sequence[float] | None,
) -> tuple[Any, ...]:
    """Of any backend: the gradient of a window is its share of the result's, wherever it lies."""
    (gradient,) = gradients
    found = [torch.empty_like(window) if window.requires_grad else None for window in windows]
    accumulation = _layout.accumulation_dtype(gradient.dtype)
    for cell in _plan(windows, starts, extent).cells:
        part = _crop(gradient, cell.box).to(accumulation)
        for i, box, share in zip(
            cell.windows, cell.boxes, _shares(cell, weights, windows[0], accumulation), strict=True
        ):
            if (target := found[i]) is not None:
                _crop(target, box).copy_(share * part)
    return found, None, None, None


_OP = _registry.register(
    blend_windows,
    blend_windows_reference,
    flatten,
    describe,
    backends=(
        Backend(
            "triton",
            "lumiere_fast.kernels.blend_windows:blend_windows",
            Needs(devices=("cuda",), capability=(8, 0), gradient=True, modules=("triton",)),
            backward=f"{__name__}:blend_windows_backward",
        ),
        Backend(
            "cuda",
            "lumiere_fast.native:blend_windows",
            Needs(
                devices=("cuda",),
                capability=(8, 0),
                gradient=True,
                native="cuda",
                limits=native.blend_windows_limits,
            ),
            backward=f"{__name__}:blend_windows_backward",
        ),
        Backend(
            "cpu",
            "lumiere_fast.native:blend_windows",
            Needs(devices=("cpu",), gradient=True, native="cpu"),
            backward=f"{__name__}:blend_windows_backward",
        ),
    ),
)


def _check(name: str, **options: Any) -> Scenario:
    return Scenario(name, {"B": 2, "C": 3, "T": 20, "H": 9, "W": 17}, options)


def _video(name: str, T: int, H: int, window: int, *, B: int = 1, cpu: bool = False) -> Scenario:
    return Scenario(name, {"B": B, "C": 3, "T": T, "H": H, "W": H}, {"window": window}, cpu)


# Videos of three channels, in windows that overlap by 2 frames (the last one shifted back where they do not tile).
VIDEOS = (
    _video("paper_base", 80, 128, 28),
    _video("paper_ssr", 80, 1024, 8),
    _video("demo", 16, 64, 8, cpu=True),
    _video("host_80x128", 80, 128, 8, cpu=True),
    _video("host_32x256", 32, 256, 8, cpu=True),
)

APART = (3, 5)  # odd, so that no load of several elements fits


def draw_cover(scenario: Scenario, draw: Draw, batch: int) -> dict[str, Any]:
    """Windows, separate tensors as a loop over them makes them, their starts and their weights.

    Options: "window" and "overlap" in frames; "in_space": windows lie in fours, APART rows and columns from each other;
    "weighted": by vectors of the blended axes.
    """
    C, H, W = scenario.shape("CHW")
    length = scenario.options["window"]
    starts: list[Any] = _frames(scenario)
    vectors = [torch.rand(n, generator=draw.generator) + 0.5 for n in (length, H, W)]
    weights: Weights = vectors[0]
    if scenario.options.get("in_space"):
        starts, weights = list(product(starts, *((0, step) for step in APART))), vectors
    windows = [draw.activation(batch, C, length, H, W) for _ in starts]
    cover: dict[str, Any] = {"windows": windows, "starts": starts}
    return {**cover, "weights": weights} if scenario.options.get("weighted") else cover


def _frames(scenario: Scenario) -> list[int]:
    return window_starts(scenario.sizes["T"], scenario.options["window"], scenario.options.get("overlap", 2))


def video_shape(scenario: Scenario) -> tuple[int, ...]:
    """Of what `draw_cover` covers."""
    B, C, T, H, W = scenario.shape("BCTHW")
    return (B, C, T, H + APART[0], W + APART[1]) if scenario.options.get("in_space") else (B, C, T, H, W)


def _make_inputs(
    scenario: Scenario, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Any]:
    cover = draw_cover(scenario, Draw(device, dtype, generator), scenario.sizes["B"])
    return {**cover, "num_frames": scenario.sizes["T"]}


def window_elements(scenario: Scenario) -> int:
    return len(_frames(scenario)) * scenario.options["window"] * scenario.count("BCHW")


SPEC = OpSpec(
    name="blend_windows",
    scenarios=VIDEOS,
    flops=lambda scenario: 0,
    bytes=lambda scenario, dtype: (window_elements(scenario) + scenario.count("BCTHW")) * dtype.itemsize,
    make_inputs=_make_inputs,
    checks=(
        _check("weighted", window=8, weighted=True),
        _check("crowded", window=12, overlap=11),  # up to nine windows over a frame
        _check("space", window=8, in_space=True),
        _check("space_weighted", window=8, weighted=True, in_space=True),
    ),
)
