"""Fewer frames, rows and columns: by fixed taps, or in time by a learned, strided convolution."""

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

MODES = ("nearest", "linear", "area", "blur")


def space_time_downsample(
    x: Tensor,
    factor: Sequence[int],
    *,
    mode: str = "nearest",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Divide T, H and W of a clip by `factor = (t, h, w)`.

    Fixed taps, separable; along an axis of factor f > 1, with x[-1] = x[0]:

        nearest  y[i] = x[f*i]
        linear   y[i] = x at f*i + (f - 1)/2: one sample (f odd) or the mean of the middle two (f even), as
                 `F.interpolate(mode="trilinear", align_corners=False, antialias=False)`: samples between are dropped
        area     y[i] = mean of x[f*i .. f*i + f - 1], as `F.avg_pool3d`
        blur     y[i] = (x[f*i - 1] + 2 x[f*i] + x[f*i + 1]) / 4

    With `weight` the temporal resize is learned: `mode` acts on H and W, giving s, and then

        y[i] = bias + sum_k weight[:, :, k] @ s[t*i - K//2 + k]        (s is zero outside the clip)

    Args:
        x: (B, C, T, H, W), fp16, bf16, fp32 or fp64, in any memory format; B may be 0.
        factor: (t, h, w), each >= 1. With fixed taps it divides T, H and W; T need not be divisible with `weight`. The
            product of factor, the sizes of x and, with `weight`, C_out is at most 2**56.
        mode: "nearest", "linear", "area" or "blur".
        weight: (C_out, C, K), K odd. A t of 1 is a plain convolution. Kernels take it in the dtype of x, to which
            autocast brings it.
        bias: (C_out,), only beside `weight`.
        backend: None for the current choice.
        out: where to put the result; not where a gradient is needed.

    Returns:
        (B, C or C_out, ceil(T / t), H / h, W / w) in the dtype and memory format of x, never a view of it. The
        arithmetic is in fp32 at least and rounds once, a kernel once more between space and learned time; fp64 stays
        fp64. (On a CPU three taps are convolved by minimal filtering for t <= 2, where clip and channels are not small:
        an error of fp32 rounding is then relative to the largest of the frames an output takes, also where that one's
        tap is small, and infinity among them may come out as NaN.) Differentiable in x, weight and bias.

    Raises:
        ValueError: for shapes, factors and modes other than these; names the two nearest sizes accepted.
        BackendUnavailable: the named backend cannot run the call.

    Source: Lumiere, section 3.1 and appendix B: a temporal convolution, identity-initialised, followed by a stride.
    """
    return _OP(flatten(x, factor, mode, weight, bias), backend, out)


def space_time_downsample_reference(
    x: Tensor, factor: Sequence[int], mode: str, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    t, h, w = factor
    fixed = (1 if weight is not None else t, h, w)
    memory_format = _layout.video_format(x)
    y = stored(x, memory_format)
    for axis, f in zip(AXES[memory_format], fixed, strict=True):
        y = _shrink(y, axis, taps(mode, f), f)
    y = logical(y, memory_format)
    if weight is not None:
        y = temporal_conv(y, weight, bias, stride=t)
    elif all(len(taps(mode, f)) == 1 for f in fixed):  # samples were only picked: still a view of x
        return y.clone(memory_format=memory_format)
    return y.to(x.dtype).contiguous(memory_format=memory_format)


def taps(mode: str, factor: int) -> dict[int, float]:
    """The samples that make output `i` along one axis: offset from `factor * i`, and weight."""
    if factor == 1 or mode == "nearest":
        return {0: 1.0}
    if mode == "area":
        return {offset: 1.0 / factor for offset in range(factor)}
    if mode == "blur":
        return {-1: 0.25, 0: 0.5, 1: 0.25}
    return {factor // 2: 1.0} if factor % 2 else {factor // 2 - 1: 0.5, factor // 2: 0.5}


def _shrink(x: Tensor, axis: int, weights: dict[int, float], factor: int) -> Tensor:
    if len(weights) == 1:
        return _pick(x, axis, factor, *weights)  # a view, in x's dtype
    x = x.to(_layout.accumulation_dtype(x.dtype))
    (first, scale), *others = weights.items()
    total = _pick(x, axis, factor, first) * scale
    for offset, weight in others:
        total = torch.add(total, _pick(x, axis, factor, offset), alpha=weight)
    return total


def _pick(x: Tensor, axis: int, factor: int, offset: int) -> Tensor:
    """`x[factor * i + offset]` for every i; the sample before the first is the first."""
    every = [slice(None)] * x.dim()
    if offset >= 0:
        every[axis] = slice(offset, None, factor)
        return x[tuple(every)]
    every[axis] = slice(factor + offset, -1, factor)
    return torch.cat([x.narrow(axis, 0, min(1, x.shape[axis])), x[tuple(every)]], axis)


def flatten(x: Tensor, factor: Sequence[int], mode: str, weight: Tensor | None, bias: Tensor | None) -> tuple[Any, ...]:
    (t, h, w), weight, bias = check_arguments("space_time_downsample", x, factor, mode, MODES, weight, bias)
    for axis, size, f in zip("THW", x.shape[2:], (1 if weight is not None else t, h, w), strict=True):
        if size % f:
            below, above = size // f * f, (size // f + 1) * f
            accepted = f"{below} and {above}" if below else str(above)
            raise ValueError(
                f"space_time_downsample: {axis} is {size}, not a multiple of its factor {f}; "
                f"nearest accepted: {accepted}"
            )
    return x, (t, h, w), mode, weight, bias


_adjoint = _resizing.make_adjoint("space_time_downsample", native.space_time_downsample_adjoint, finer)


def _learned_gradients(
    gradient: Tensor, x: Tensor, factor: Sequence[int], mode: str, weight: Tensor, bias: Tensor | None
) -> _resizing.Gradients:
    """As every t-th frame of a `temporal_conv`: zeros lie between those of the gradient."""
    (t, h, w), memory_format = factor, _layout.video_format(x)
    resized = h * w > 1
    s = space_time_downsample(x, (1, h, w), mode=mode, backend=AUTO) if resized else x
    if t > 1:
        shape = (*gradient.shape[:2], x.shape[2], *gradient.shape[3:])
        stuffed = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format).zero_()
        stuffed[:, :, ::t] = gradient
        gradient = stuffed
    of_x, of_weight, of_bias = convolution_gradients(gradient, s, x.requires_grad, weight, bias)
    if resized and of_x is not None:
        of_x = _adjoint(of_x, (1, h, w), mode, memory_format)
    return of_x, of_weight, of_bias


space_time_downsample_backward = _resizing.make_backward(_adjoint, _learned_gradients)

_OP = _registry.register(
    space_time_downsample,
    space_time_downsample_reference,
    flatten,
    _resizing.make_describe(coarser),
    _resizing.backends("space_time_downsample", f"{__name__}:space_time_downsample_backward"),
)

# Between the levels of each model: space by fixed taps, then time by the learned convolution.
SPEC = _resizing.make_spec(
    "space_time_downsample",
    (
        *(
            Scenario(f"{fine}_space", sizes, _resizing.fixed("area", (1, 2, 2)), cpu)
            for (fine, sizes, cpu), _ in _resizing.LEVEL_PAIRS
        ),
        *(
            Scenario(f"{fine}_time", {**sizes, "H": small["H"], "W": small["W"]}, _resizing.LEARNED_IN_TIME, cpu)
            for (fine, sizes, cpu), (_, small, _) in _resizing.LEVEL_PAIRS
        ),
        *_resizing.host_scenarios(MODES),
    ),
    _resizing.small_checks(MODES),
    coarser,
)
