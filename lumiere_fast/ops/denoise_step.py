"""All that a diffusion sampler does between two calls of the network: blend, guide, bound, and step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lumiere_fast.dispatch import Backend, Needs
from lumiere_fast.ops import _layout, _registry
from lumiere_fast.ops._checks import (
    check_choice,
    check_device,
    check_floating,
    check_is_tensor,
    check_like,
    check_number,
)
from lumiere_fast.ops._spec import Draw, OpSpec, Scenario
from lumiere_fast.ops.blend_windows import (
    VIDEOS,
    Weights,
    blend,
    check_starts,
    check_windows,
    draw_cover,
    flatten_cover,
    video_shape,
    window_elements,
)


class StepCoefficients(NamedTuple):
    """One sampler step as a linear map; every field is a plain float. With `pred` the blended, guided prediction:

        x0   = x0_latent * latent + x0_prediction * pred           (then bounded by the threshold)
        next = latent * latent + x0 * x0 + history * history + noise * noise

    x0_latent, x0_prediction: what the network predicts. eps: 1/alpha, -sigma/alpha; v: alpha, -sigma; x0: 0, 1; EDM
        preconditioning: c_skip, c_out.
    latent, x0: the sampler's step from the current latent and the bounded x0.
    history: of the previous step's x0, for multistep samplers such as DPM-Solver++(2M).
    noise: of fresh noise, for stochastic samplers such as DDIM with eta > 0.
    """

    x0_latent: float
    x0_prediction: float
    latent: float
    x0: float
    history: float = 0.0
    noise: float = 0.0


class Threshold(NamedTuple):
    """How x0 is bounded, once, after blending.

    "static": `clamp(x0, -1, 1)`. "dynamic": `clamp(x0, -s, s) / s` with `s = max(quantile(|x0|, percentile), 1)`, the
    linearly interpolated quantile over each clip or each frame (Imagen, section 2.3).
    """

    kind: Literal["static", "dynamic"] = "static"
    percentile: float = 0.995
    per: Literal["clip", "frame"] = "clip"


Bound = Threshold | Literal["static", "dynamic"] | None


class DenoiseStep(NamedTuple):
    """`latent` for the next step, and the bounded `x0` that it was made with: the next step's history."""

    latent: Tensor
    x0: Tensor


def denoise_step(
    windows: Tensor | Sequence[Tensor],
    starts: Tensor | Sequence[int] | Sequence[Sequence[int]],
    latent: Tensor,
    coefficients: StepCoefficients,
    *,
    guidance_scale: float | None = None,
    threshold: Bound = None,
    weights: Weights = None,
    noise: Tensor | None = None,
    history: Tensor | None = None,
    backend: str | None = None,
    out: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
) -> DenoiseStep:
    """One sampler step of a whole video from the network's prediction of each window.

        blended = blend_windows(windows)
        pred    = uncond + guidance_scale * (cond - uncond)         (cond, uncond = the halves of blended's batch)
        x0      = threshold(x0_latent * latent + x0_prediction * pred)
        next    = coefficients.latent * latent + coefficients.x0 * x0 + coefficients.history * history
                  + coefficients.noise * noise

    Predictions are averaged and then one step is taken, with one draw of noise for each frame. Averaging windows that
    have been stepped each with its own noise would halve the variance of the noise wherever two overlap.

    Args:
        windows: the predictions, as in `blend_windows`: (N, B', C, T', H, W) or N tensors (B', C, T'_i, H, W).
            B' = B; with guidance B' = 2B, the B conditional ones first, then the B unconditional.
        starts: (N,) first frames or (N, 3) corners (t, h, w). One window over the whole clip: `[0]`.
        latent: (B, C, T, H, W), the current noisy video, in any floating dtype (fp32 as a rule).
        coefficients: the step; see `StepCoefficients`.
        guidance_scale: s of classifier-free guidance; None where the windows hold the conditional half only.
        threshold: a `Threshold`; "static" or "dynamic" for one with its defaults; None for no bound.
        weights: as in `blend_windows`.
        noise, history: like latent; needed where their coefficient is not 0, not read where it is.
        backend: None for the current choice.
        out: where to put the next latent, or (next latent, x0), either of them None; not where a gradient is needed.
            In place is `out=(latent, history)`: each may be the very tensor that is read there, and nothing else may
            lie in the memory of an input.

    Returns:
        `(latent, x0)`, both in the dtype and memory format of `latent`. Between reading and these two roundings all is
        in fp32 at least; fp64 stays fp64. Differentiable in windows, latent, noise and history.

    Raises:
        ValueError: an argument is not as above: shapes that do not fit, a cover with gaps, noise or history missing.
        BackendUnavailable: the named backend cannot run the call.

    Source: Lumiere, section 3.2 (MultiDiffusion over time); Imagen (dynamic thresholding); DPM-Solver++, DDIM.
    """
    arguments = flatten(windows, starts, latent, coefficients, guidance_scale, threshold, weights, noise, history)
    return DenoiseStep(*_OP(arguments, backend, out))


def denoise_step_reference(
    windows: Sequence[Tensor],
    starts: Sequence[int],
    extent: Sequence[int],
    weights: Sequence[float] | None,
    latent: Tensor,
    coefficients: Sequence[float],
    guidance_scale: float | None,
    bound: str,
    percentile: float,
    noise: Tensor | None,
    history: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`bound` is "none", "static", "clip" or "frame"."""
    dtype = _layout.accumulation_dtype(torch.promote_types(latent.dtype, windows[0].dtype))
    step = StepCoefficients(*coefficients)
    current = latent.to(dtype)
    prediction = blend(windows, starts, extent, weights, dtype)
    if guidance_scale is not None:
        conditional, unconditional = prediction.chunk(2)
        prediction = unconditional + guidance_scale * (conditional - unconditional)
    x0 = _bounded(step.x0_latent * current + step.x0_prediction * prediction, bound, percentile)
    following = step.latent * current + step.x0 * x0
    for scale, term in ((step.history, history), (step.noise, noise)):
        if term is not None and scale != 0:
            following = following + scale * term.to(dtype)
    return _like(following, latent), _like(x0, latent)


def _bounded(x0: Tensor, bound: str, percentile: float) -> Tensor:
    if bound == "none":
        return x0
    if bound == "static":
        return x0.clamp(-1.0, 1.0)
    axes = (2, 3, 4, 1) if bound == "clip" else (3, 4, 1)  # in storage order: flattening them is a view
    limit = quantile(x0.abs(), percentile, axes).clamp(min=1.0)
    return torch.minimum(torch.maximum(x0, -limit), limit) / limit


def quantile(x: Tensor, fraction: float, axes: Sequence[int]) -> Tensor:
    """`torch.quantile` over several axes, which are kept with size 1; but NaN counts as the largest, and is the result
    only where the quantile lies there. Its own limit is 2**24 elements; here is none."""
    kept = [axis for axis in range(x.dim()) if axis not in axes]
    flat = x.permute(*kept, *axes).flatten(len(kept))
    position = fraction * (flat.shape[-1] - 1)
    below = math.floor(position)
    top = flat.topk(flat.shape[-1] - below, dim=-1).values  # the last two lie around the position
    value = torch.lerp(top[..., -1], top[..., max(-2, -top.shape[-1])], position - below)
    return value.reshape([1 if axis in axes else size for axis, size in enumerate(x.shape)])


def _like(y: Tensor, latent: Tensor) -> Tensor:
    return y.to(latent.dtype).contiguous(memory_format=_layout.video_format(latent))


def flatten(
    windows: Tensor | Sequence[Tensor],
    starts: Tensor | Sequence[int] | Sequence[Sequence[int]],
    latent: Tensor,
    coefficients: StepCoefficients,
    guidance_scale: float | None,
    threshold: Bound,
    weights: Weights,
    noise: Tensor | None,
    history: Tensor | None,
) -> tuple[Any, ...]:
    op = "denoise_step"
    parts = check_windows(op, windows)
    corners = check_starts(op, starts, parts)
    guidance_scale = check_number(op, "guidance_scale", guidance_scale, or_none=True)
    _check_latent(latent, parts, guidance_scale, len(corners[0]))
    step = _check_coefficients(coefficients)
    for name, tensor, scale in (("noise", noise, step.noise), ("history", history, step.history)):
        if tensor is not None:
            check_like(op, name, tensor, "latent", latent)
        elif scale != 0:
            raise ValueError(f"{op}: coefficients.{name} is {scale}, so {name} must be a tensor like latent, got None")
    bound, percentile = _flat_threshold(threshold)
    extent = tuple(latent.shape[2 : 2 + len(corners[0])])
    cover = flatten_cover(op, parts, corners, extent, weights)
    return *cover, latent, list(step), guidance_scale, bound, percentile, noise, history


def _check_coefficients(coefficients: StepCoefficients) -> StepCoefficients:
    if not isinstance(coefficients, StepCoefficients):
        raise ValueError(f"denoise_step: coefficients must be a StepCoefficients, got {coefficients!r}")
    named = zip(StepCoefficients._fields, coefficients, strict=True)
    return StepCoefficients(*(check_number("denoise_step", f"coefficients.{name}", value) for name, value in named))


def _check_latent(latent: Tensor, windows: Sequence[Tensor], guidance_scale: float | None, blended_axes: int) -> None:
    check_is_tensor("denoise_step", "latent", latent)
    check_floating("denoise_step", "latent", latent)
    first = windows[0]
    check_device("denoise_step", "latent", latent, first)
    halves = 1 if guidance_scale is None else 2
    free = 2 + blended_axes  # axes of a window that need not be the latent's
    if (
        latent.dim() != 5
        or first.shape[0] != halves * latent.shape[0]
        or first.shape[1] != latent.shape[1]
        or first.shape[free:] != latent.shape[free:]
    ):
        kind = (
            "without guidance"
            if halves == 1
            else "with guidance (conditional, then unconditional: twice latent's batch)"
        )
        raise ValueError(
            f"denoise_step: latent must be (B, C, T, H, W) and fit the windows, {kind}; "
            f"got latent {tuple(latent.shape)} and windows[0] {tuple(first.shape)}"
        )


def _flat_threshold(threshold: Bound) -> tuple[str, float]:
    """`bound` and `percentile` of the reference.

    Raises:
        ValueError: it is no `Threshold`, nor the name of one, nor None; or one of its fields is not as it says.
    """
    op = "denoise_step"
    if threshold is None:
        return "none", 1.0
    if isinstance(threshold, str) and threshold in ("static", "dynamic"):
        threshold = Threshold(threshold)
    if not isinstance(threshold, Threshold):
        raise ValueError(f"{op}: threshold must be 'static', 'dynamic', None or a Threshold, got {threshold!r}")
    check_choice(op, "threshold.kind", threshold.kind, ("static", "dynamic"))
    check_choice(op, "threshold.per", threshold.per, ("clip", "frame"))
    percentile = check_number(op, "threshold.percentile", threshold.percentile)
    if not 0 < percentile <= 1:
        raise ValueError(f"{op}: threshold.percentile must be in (0, 1], got {percentile}")
    return threshold.kind if threshold.kind == "static" else threshold.per, percentile


def describe(
    windows: Sequence[Tensor],
    starts: Sequence[int],
    extent: Sequence[int],
    weights: Sequence[float] | None,
    latent: Tensor,
    *_: Any,
) -> tuple[_registry.Result, _registry.Result]:
    result = _registry.Result(tuple(latent.shape), latent.dtype, latent.device, _layout.video_format(latent))
    return result, result


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_OP = _registry.register(
    denoise_step,
    denoise_step_reference,
    flatten,
    describe,
    backends=(
        Backend(
            "triton",
            "lumiere_fast.kernels.denoise_step:denoise_step",
            Needs(
                devices=("cuda",),
                dtypes={"windows": _DTYPES, "latent": _DTYPES},
                capability=(8, 0),
                gradient=True,
                modules=("triton",),
            ),
        ),
        Backend(
            "cpu",
            "lumiere_fast.native:denoise_step",
            Needs(devices=("cpu",), gradient=True, native="cpu"),
        ),
    ),
    in_place=("latent", "history"),
)


THRESHOLDS: dict[str, Threshold | None] = {
    "none": None,
    "static": Threshold("static"),
    "clip": Threshold("dynamic"),
    "frame": Threshold("dynamic", per="frame"),
}


def _make_inputs(
    scenario: Scenario, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Any]:
    """The windows in `dtype`, as the network makes them; latent and history in fp32, as the sampler keeps them.

    Options, besides those of `draw_cover`: "bound", as the reference names it; "guided", "history" and "noise", whether
    there is such; "quiet": x0 stays within 1; "narrow": the sampler's tensors in `dtype` too.
    """
    options = {"guided": True, "history": True, "noise": False, "quiet": False, "narrow": False, **scenario.options}
    cover = draw_cover(scenario, Draw(device, dtype, generator), (1 + options["guided"]) * scenario.sizes["B"])
    state = Draw(device, dtype if options["narrow"] else _layout.accumulation_dtype(dtype), generator)
    shape = video_shape(scenario)
    scale = 0.01 if options["quiet"] else 1.0
    terms = {name: scale for name, scale in (("history", -0.15), ("noise", 0.3)) if options[name]}
    return {
        **cover,
        "latent": state.activation(*shape),
        "coefficients": StepCoefficients(0.8 * scale, -0.6 * scale, 0.7, 0.45, **terms),
        "guidance_scale": 7.5 if options["guided"] else None,
        "threshold": THRESHOLDS[options["bound"]],
        **{name: state.activation(*shape) for name in terms},
    }


def _bytes(scenario: Scenario, dtype: torch.dtype) -> int:
    """Both halves of every window; latent and history in; latent and x0 out."""
    state = _layout.accumulation_dtype(dtype).itemsize
    return 2 * window_elements(scenario) * dtype.itemsize + 4 * scenario.count("BCTHW") * state


def _check(name: str, bound: str, window: int = 8, sizes: dict[str, int] | None = None, **options: Any) -> Scenario:
    sizes = sizes or {"B": 2, "C": 3, "T": 20, "H": 9, "W": 17}
    return Scenario(name, sizes, {"window": window, "bound": bound, **options})


SPEC = OpSpec(
    name="denoise_step",
    scenarios=tuple(
        Scenario(f"{video.name}_{bound}", video.sizes, {**video.options, "bound": bound}, video.cpu)
        for video in VIDEOS
        for bound in ("static", "clip", "frame")
    ),
    flops=lambda scenario: 0,
    bytes=_bytes,
    make_inputs=_make_inputs,
    checks=(
        _check("weighted", "static", weighted=True, history=False, noise=True),
        _check("crowded", "clip", 12, overlap=11),  # up to nine windows over a frame
        _check("space", "frame", in_space=True, noise=True),
        _check("space_weighted", "none", in_space=True, weighted=True, guided=False, history=False),
        _check("one_window", "clip", 20, guided=False, narrow=True),
        _check("quiet_clips", "clip", quiet=True, history=False),
        _check("quiet_frames", "frame", quiet=True),
        _check("pixels", "frame", 2, {"B": 1, "C": 1, "T": 3, "H": 1, "W": 1}, overlap=1, guided=False),
        _check("wide_frames", "frame", 2, {"B": 1, "C": 5, "T": 3, "H": 31, "W": 67}, overlap=1),
    ),
)
