"""More frames, rows and columns: by fixed taps, or in time by duplication and a learned convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lumiere_fast import native
from lumiere_fast.dispatch import AUTO
from lumiere_fast.ops import _layout, _registry, _resizing
from lumiere_fast.ops._resizing import (
    AXES,
    check_arguments,
    coarser,
    convolution_gradients,
    finer,
    logical,
    stored,
    temporal_conv,
)
from lumiere_fast.ops._spec import Scenario

MODES = ("nearest", "linear")
DOWN_ONLY = ("area", "blur")


def space_time_upsample(
    x: Tensor,
    factor: Sequence[int],
    *,
    mode: str = "nearest",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply T, H and W of a clip by `factor = (t, h, w)`.

    Fixed taps, separable; along an axis of factor f, with 0 <= p < f and the edge samples repeated outside:

        nearest  y[f*i + p] = x[i]
        linear   y[f*i + p] = x at i + (p + 1/2)/f - 1/2, between its two neighbours, as
                 `F.interpolate(mode="trilinear", align_corners=False)`

    With `weight` the temporal resize is learned: `mode` acts on H and W, giving s, frames are duplicated t times, and

        y[j] = bias + sum_k weight[:, :, k] @ s[(j - K//2 + k) // t]        (zero outside the duplicated clip)

    Args:
        x: (B, C, T, H, W), fp16, bf16, fp32 or fp64, in any memory format; B may be 0.
        factor: (t, h, w), each >= 1. The product of factor, the sizes of x and, with `weight`, C_out is at most 2**56.
        mode: "nearest" or "linear"; "area" and "blur" go down only.
        weight: (C_out, C, K), K odd. A t of 1 is a plain convolution. Kernels take it in the dtype of x, to which
            autocast brings it.
        bias: (C_out,), only beside `weight`.
        backend: None for the current choice.
        out: where to put the result; not where a gradient is needed.

    Returns:
        (B, C or C_out, T * t, H * h, W * w) in the dtype and memory format of x, never a view of it. The arithmetic
        is in fp32 at least and rounds once, a kernel once more between learned time and space; fp64 stays fp64. (On a
        CPU three taps are convolved by minimal filtering, where clip and channels are not small: an error of fp32
        rounding is then relative to the largest of the frames an output takes, also where that one's tap is small, and
        infinity among them may come out as NaN.) Differentiable in x, weight and bias.

    Raises:
        ValueError: for shapes, factors and modes other than these.
        BackendUnavailable: the named backend cannot run the call.

    Source: Lumiere, section 3.1 and appendix B: frame duplication, then an identity-initialised temporal convolution.
    """
    return _OP(flatten(x, factor, mode, weight, bias), backend, out)


def space_time_upsample_reference(
    x: Tensor, factor: Sequence[int], mode: str, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    t, h, w = factor
    memory_format = _layout.video_format(x)
    if weight is None and (t, h, w) == (1, 1, 1):
        return x.clone(memory_format=memory_format)
    y, axes = stored(x, memory_format), AXES[memory_format]
    if weight is not None:
        # A temporal convolution and a spatial resize commute (the resize's taps sum to one, so the bias passes too),
        # and before the resize the convolution has h * w times fewer pixels.
        y = logical(_duplicate(y, axes, (t, 1, 1)), memory_format)
        y, t = stored(temporal_conv(y, weight, bias), memory_format), 1
    y = _duplicate(y, axes, (t, h, w)) if mode == "nearest" else _interpolate(y, axes, (t, h, w))
    return logical(y, memory_format).to(x.dtype).contiguous(memory_format=memory_format)


def _duplicate(x: Tensor, axes: Sequence[int], factor: Sequence[int]) -> Tensor:
    """Every sample repeated along each axis: one copy of an expanded view."""
    repeats = dict(zip(axes, factor, strict=True))
    shape = [size * repeats.get(axis, 1) for axis, size in enumerate(x.shape)]
    expanded = [n for axis, size in enumerate(x.shape) for n in ((size, repeats[axis]) if axis in repeats else (size,))]
    for axis in reversed(axes):
        x = x.unsqueeze(axis + 1)
    return x.expand(expanded).reshape(shape)


def _interpolate(x: Tensor, axes: Sequence[int], factor: Sequence[int]) -> Tensor:
    x = x.to(_layout.accumulation_dtype(x.dtype))
    for axis, f in zip(axes, factor, strict=True):
        if f > 1 and x.shape[axis]:
            x = _stretch(x, axis, f)
    return x


def _stretch(x: Tensor, axis: int, factor: int) -> Tensor:
    """The `factor` phases of one axis, each a blend of x with its neighbour before or after, interleaved."""
    size = x.shape[axis]
    before = torch.cat([x.narrow(axis, 0, 1), x.narrow(axis, 0, size - 1)], axis)
    after = torch.cat([x.narrow(axis, 1, size - 1), x.narrow(axis, size - 1, 1)], axis)
    shifts = [(phase + 0.5) / factor - 0.5 for phase in range(factor)]
    phases = [_blend(x, before if shift < 0 else after, abs(shift)) for shift in shifts]
    return torch.stack(phases, axis + 1).flatten(axis, axis + 1)


def _blend(x: Tensor, neighbour: Tensor, part: float) -> Tensor:
    """Of infinite samples too, whose difference torch.lerp would take."""
    return (1 - part) * x + part * neighbour if part else x


def flatten(x: Tensor, factor: Sequence[int], mode: str, weight: Tensor | None, bias: Tensor | None) -> tuple[Any, ...]:
    if isinstance(mode, str) and mode in DOWN_ONLY:
        raise ValueError(f"space_time_upsample: mode {mode!r} goes down only; up there are {', '.join(MODES)}")
    values, weight, bias = check_arguments("space_time_upsample", x, factor, mode, MODES, weight, bias)
    return x, values, mode, weight, bias


_adjoint = _resizing.make_adjoint("space_time_upsample", native.space_time_upsample_adjoint, coarser)


def _learned_gradients(
    gradient: Tensor, x: Tensor, factor: Sequence[int], mode: str, weight: Tensor, bias: Tensor | None
) -> _resizing.Gradients:
    """As `temporal_conv` of duplicated frames, which so exist in the backward alone."""
    (t, h, w), memory_format = factor, _layout.video_format(x)
    if h * w > 1:
        gradient = _adjoint(gradient, (1, h, w), mode, memory_format)
    frames = space_time_upsample(x, (t, 1, 1), backend=AUTO) if t > 1 else x
    of_x, of_weight, of_bias = convolution_gradients(gradient, frames, x.requires_grad, weight, bias)
    if t > 1 and of_x is not None:
        of_x = _adjoint(of_x, (t, 1, 1), "nearest", memory_format)
    return of_x, of_weight, of_bias


space_time_upsample_backward = _resizing.make_backward(_adjoint, _learned_gradients)

_OP = _registry.register(
    space_time_upsample,
    space_time_upsample_reference,
    flatten,
    _resizing.make_describe(finer),
    _resizing.backends("space_time_upsample", f"{__name__}:space_time_upsample_backward"),
)

# Between the levels of each model: space by fixed taps, then time by the learned convolution. And the base model's clip
# brought to the size of the SSR's.
SPEC = _resizing.make_spec(
    "space_time_upsample",
    (
        *(
            Scenario(f"{coarse}_space", sizes, _resizing.fixed("nearest", (1, 2, 2)), cpu)
            for _, (coarse, sizes, cpu) in _resizing.LEVEL_PAIRS
        ),
        *(
            Scenario(f"{coarse}_time", {**sizes, "H": large["H"], "W": large["W"]}, _resizing.LEARNED_IN_TIME, cpu)
            for (_, large, _), (coarse, sizes, cpu) in _resizing.LEVEL_PAIRS
        ),
        Scenario("paper_clip", {"B": 1, "C": 3, "T": 80, "H": 128, "W": 128}, _resizing.fixed("linear", (1, 8, 8))),
        *_resizing.host_scenarios(MODES),
    ),
    _resizing.small_checks(MODES),
    finer,
)
