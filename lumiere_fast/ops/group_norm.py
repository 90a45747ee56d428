"""Group normalisation of a clip's channels, with affine, FiLM and SiLU in one op.

Lumiere inflates a text-to-image model that is trained on single images: its norms, and those of the temporal layers
(paper, section 3.1 and figure 4), must not see across frames. So statistics are taken per frame unless asked otherwise.
FiLM is the scale-shift norm of Imagen's Efficient U-Net, by which the noise level and the text steer a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lumiere_fast import native
from lumiere_fast.dispatch import Backend, Needs
from lumiere_fast.ops import _layout
from lumiere_fast.ops._checks import (
    ACTIVATIONS,
    check_activation,
    check_choice,
    check_film,
    check_groups,
    check_parameter,
    under_autocast,
)
from lumiere_fast.ops._registry import Result, register, traced
from lumiere_fast.ops._spec import LEVELS, Draw, OpSpec, Scenario, at_levels

EPS = 1e-5


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str | None = None,
    eps: float = EPS,
    per_frame: bool = True,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`y = act(n * (1 + scale) + shift)` with `n = (x - mean) * rstd * weight + bias`.

    `mean` and `rstd = 1 / sqrt(variance + eps)` are taken over a group's channels and the H*W pixels of one frame, or
    of the whole clip; the variance is the biased one. The arithmetic is fp32 (fp64 for fp64), rounded once at the
    end. Differentiable in every tensor.

    Args:
        x: (B, C, T, H, W), floating, any strides; channels_last_3d costs no copy. B may be 0.
        num_groups: divides C.
        weight, bias: (C,), or None for 1 and 0; in the dtype of `x` or in fp32 (under autocast in any).
        scale, shift: (B, C), or (B, T, C) for each frame its own; None for 0. Their dtype as that of `weight`.
        act: None or "silu".
        eps: added to the variance, > 0.
        per_frame: statistics of each frame by itself (the default), or of all T frames together.
        backend: None for the current choice; see `lumiere_fast.dispatch`.
        out: receives the result; only where nothing needs a gradient. May not overlap the inputs.

    Returns:
        (B, C, T, H, W) in the dtype and memory format of `x`.

    Raises:
        ValueError: an argument is not as above.
        BackendUnavailable: a backend asked for by name cannot run this call.
    """
    return _GROUP_NORM(_flatten(x, num_groups, weight, bias, scale, shift, act, eps, per_frame), backend, out)


def group_norm_stats(
    x: Tensor, num_groups: int, *, eps: float = EPS, per_frame: bool = True, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The statistics that `group_norm` would use: `mean` and `rstd = 1 / sqrt(variance + eps)`.

    Args: as for `group_norm`. Differentiable in `x`.

    Returns:
        `(mean, rstd)`, each (B, T, num_groups), or (B, num_groups) where `per_frame` is False; fp32, or fp64 for fp64.

    Raises:
        ValueError: an argument is not as above.
        BackendUnavailable: a backend asked for by name cannot run this call.
    """
    mean, rstd = _GROUP_NORM_STATS(_flatten_stats(x, num_groups, eps, per_frame), backend)
    return mean, rstd


def group_norm_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str | None = None,
    eps: float = EPS,
    per_frame: bool = True,
) -> Tensor:
    """`group_norm` in plain torch.

    Not `torch.group_norm`: in channels-last memory on the CPU it loses the variance where the mean is large, and in
    torch 2.13 its backward segfaults wherever its affine parameters want a gradient and its input does not, as under a
    frozen text-to-image model.
    """
    dtype = _layout.accumulation_dtype(x.dtype)
    mean, rstd = group_norm_stats_reference(x, num_groups, eps, per_frame)

    def of_channels(stat: Tensor) -> Tensor:
        return _layout.each_frame(stat.repeat_interleave(x.shape[1] // num_groups, dim=-1))

    multiplier, offset = channel_affine(weight, bias, scale, shift, dtype)
    multiplier = of_channels(rstd) if multiplier is None else of_channels(rstd) * multiplier
    y = scale_and_shift(x.to(dtype) - _layout.over_pixels(of_channels(mean)), multiplier, offset)
    y = F.silu(y) if act == "silu" else y
    return y.to(x.dtype).contiguous(memory_format=_layout.video_format(x))


def group_norm_stats_reference(
    x: Tensor, num_groups: int, eps: float = EPS, per_frame: bool = True
) -> tuple[Tensor, Tensor]:
    """`group_norm_stats` in plain torch: two passes, because E[x^2] - E[x]^2 cancels where the mean is large.

    Pixels are reduced before channels: `torch.var_mean` over both axes of channels-last memory is seven times slower.
    """
    rows = _layout.to_rows(x.to(_layout.accumulation_dtype(x.dtype)))
    pixels = (2, 3) if per_frame else (1, 2, 3)
    groups = (num_groups, x.shape[1] // num_groups)
    mean = rows.mean(pixels, keepdim=True).unflatten(-1, groups).mean(-1, keepdim=True)
    centred = rows - mean.expand(*mean.shape[:-1], groups[1]).flatten(-2)
    variance = centred.square().mean(pixels).unflatten(-1, groups).mean(-1)
    return mean.reshape(variance.shape), torch.rsqrt(variance + eps)


def channel_affine(
    weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Affine and FiLM as one pair: `(n * weight + bias) * (1 + scale) + shift = n * multiplier + offset`.

    Each is (C,), (B, 1, C) or (B, T, C), or None where it would be 1 or 0.
    """
    multiplier = None if weight is None else weight.to(dtype)
    offset = None if bias is None else bias.to(dtype)
    if scale is not None:
        gain = 1 + _layout.each_frame(scale.to(dtype))
        multiplier = gain if multiplier is None else multiplier * gain
        offset = None if offset is None else offset * gain
    if shift is not None:
        added = _layout.each_frame(shift.to(dtype))
        offset = added if offset is None else offset + added
    return multiplier, offset


def scale_and_shift(n: Tensor, multiplier: Tensor | None, offset: Tensor | None) -> Tensor:
    """`n * multiplier + offset` in one pass over `n` (B, C, T, H, W); the pair as `channel_affine` gives it."""
    if multiplier is None:
        return n if offset is None else n + _layout.over_pixels(offset)
    if offset is None:
        return n * _layout.over_pixels(multiplier)
    return torch.addcmul(_layout.over_pixels(offset), n, _layout.over_pixels(multiplier))


def _flatten(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str | None,
    eps: float,
    per_frame: bool,
) -> tuple[object, ...]:
    op = "group_norm"
    _check_input(op, x, num_groups, eps, per_frame)
    weight, bias, scale, shift = under_autocast(x, weight, bias, scale, shift)
    check_parameter(op, "weight", weight, x, x.shape[1:2])
    check_parameter(op, "bias", bias, x, x.shape[1:2])
    check_film(op, x, scale, shift)
    check_choice(op, "act", act, ACTIVATIONS)
    return x, num_groups, weight, bias, scale, shift, act, eps, per_frame


def _flatten_stats(x: Tensor, num_groups: int, eps: float, per_frame: bool) -> tuple[object, ...]:
    _check_input("group_norm_stats", x, num_groups, eps, per_frame)
    return x, num_groups, eps, per_frame


def _check_input(op: str, x: Tensor, num_groups: int, eps: float, per_frame: bool) -> None:
    check_activation(op, x)
    check_groups(op, "num_groups", num_groups, x.shape[1])
    if isinstance(eps, bool) or not isinstance(eps, float | int) or not eps > 0:
        raise ValueError(f"{op}: eps must be a number > 0, got {eps!r}")
    check_choice(op, "per_frame", per_frame, (True, False))


def _describe(x: Tensor, *_: object) -> Result:
    return Result(tuple(x.shape), x.dtype, x.device, _layout.video_format(x))


def describe_stats(x: Tensor, num_groups: int, eps: float = EPS, per_frame: bool = True) -> tuple[Result, Result]:
    B, _, T = x.shape[:3]
    shape = (B, T, num_groups) if per_frame else (B, num_groups)
    stats = Result(shape, _layout.accumulation_dtype(x.dtype), x.device)
    return stats, stats


def gradients_from_sums(
    sums: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> list[Tensor | None]:
    """Gradients of weight, bias, scale and shift; None where none is wanted.

    Args:
        sums: (2, B, T, C), over the pixels of a frame: of the gradient of z, what `act` is applied to, and of the same
            times the normalised x before its affine.
    """
    plain, times_n = sums

    def over(total: Tensor, wanted: Tensor | None) -> Tensor | None:
        if wanted is None or not wanted.requires_grad:
            return None
        axes = {1: (0, 1), 2: (1,), 3: ()}[wanted.dim()]
        return (total.sum(axes) if axes else total).to(wanted.dtype)

    gain: Tensor | float = 1.0 if scale is None else 1 + _layout.each_frame(scale.detach().to(sums.dtype))
    of_scale = times_n if weight is None else times_n * weight.detach().to(sums.dtype)
    of_scale = of_scale if bias is None else of_scale + plain * bias.detach().to(sums.dtype)
    return [over(times_n * gain, weight), over(plain * gain, bias), over(of_scale, scale), over(plain, shift)]


def group_norm_backward_cpu(
    gradients: Sequence[Tensor],
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str | None,
    eps: float,
    per_frame: bool,
) -> tuple[Any, ...]:
    """By the native core, in two passes over x and the gradient besides that for the statistics."""
    constants = [None if each is None else each.detach() for each in (weight, bias, scale, shift)]
    arguments: tuple[Any, ...] = (
        gradients[0],
        x.detach(),
        num_groups,
        *constants,
        act,
        eps,
        per_frame,
        x.requires_grad,
    )
    of_x, sums = (_NATIVE_BACKWARD if traced() else _native_backward)(*arguments)
    rest = gradients_from_sums(sums, weight, bias, scale, shift)
    return (of_x if x.requires_grad else None, None, *rest, None, None, None)


def _native_backward(
    gradient: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str | None,
    eps: float,
    per_frame: bool,
    of_x: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of x, empty where `of_x` is False, and what `gradients_from_sums` takes."""
    found, sums = _backward_results(gradient, x, of_x)
    call = (gradient, x, num_groups, weight, bias, scale, shift, act, eps, per_frame)
    if x.numel() > 0:
        native.group_norm_backward(*call, out=found if of_x else None, sums=sums)
    return found, sums


def _backward_results(gradient: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, C, T = x.shape[:3]
    found = torch.empty_like(x, memory_format=_layout.video_format(x)) if rest[-1] else x.new_empty(0)
    return found, x.new_empty((2, B, T, C), dtype=_layout.accumulation_dtype(x.dtype))


# Only traces, which cannot see a call into the native core, take this way round.
_NATIVE_BACKWARD = torch.library.custom_op(
    "lumiere_fast::group_norm_backward_cpu",
    _native_backward,
    mutates_args=(),
    schema="(Tensor gradient, Tensor x, int num_groups, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
    "str? act, float eps, bool per_frame, bool of_x) -> (Tensor, Tensor)",
)
_NATIVE_BACKWARD.register_fake(_backward_results)


def group_norm_stats_backward_cpu(
    gradients: Sequence[Tensor | None], x: Tensor, num_groups: int, eps: float, per_frame: bool
) -> tuple[Any, ...]:
    """Mean moves by `1 / n` with each of n numbers, and rstd by `-rstd^3 * (x - mean) / n`."""
    mean, rstd = _GROUP_NORM_STATS((x.detach(), num_groups, eps, per_frame), "cpu")
    of_mean, of_rstd = gradients
    count = x.shape[1:].numel() // mean.shape[1:].numel()
    slope = torch.zeros_like(mean) if of_rstd is None else -of_rstd * rstd.pow(3) / count
    constant = torch.zeros_like(mean) if of_mean is None else of_mean / count

    def of_channels(each: Tensor) -> Tensor:
        return _layout.each_frame(each.repeat_interleave(x.shape[1] // num_groups, dim=-1))

    centred = x.detach().to(mean.dtype) - _layout.over_pixels(of_channels(mean))
    found = scale_and_shift(centred, of_channels(slope), of_channels(constant)).to(x.dtype)
    return found.contiguous(memory_format=_layout.video_format(x)), None, None, None


_KERNELS = "lumiere_fast.kernels.group_norm"
_TRITON = Needs(devices=("cuda",), capability=(8, 0), gradient=True, modules=("triton",))
_CPU = Needs(devices=("cpu",), gradient=True, native="cpu")

_GROUP_NORM = register(
    group_norm,
    group_norm_reference,
    _flatten,
    _describe,
    backends=(
        Backend("triton", f"{_KERNELS}:group_norm", _TRITON, backward=f"{_KERNELS}:group_norm_backward"),
        Backend("cpu", "lumiere_fast.native:group_norm", _CPU, backward=f"{__name__}:group_norm_backward_cpu"),
    ),
)
_GROUP_NORM_STATS = register(
    group_norm_stats,
    group_norm_stats_reference,
    _flatten_stats,
    describe_stats,
    backends=(
        Backend("triton", f"{_KERNELS}:group_norm_stats", _TRITON, backward=f"{_KERNELS}:group_norm_stats_backward"),
        Backend(
            "cpu", "lumiere_fast.native:group_norm_stats", _CPU, backward=f"{__name__}:group_norm_stats_backward_cpu"
        ),
    ),
)


def _levels(name: str, T: int, *levels: tuple[int, int, int]) -> tuple[tuple[str, dict[str, int], bool], ...]:
    """Those of a model with 32 groups that makes clips of T frames with guidance; (C, H, W) of each."""
    return tuple(
        (f"{name}{i}", {"B": 2, "C": C, "T": T, "H": H, "W": W, "G": 32}, False) for i, (C, H, W) in enumerate(levels)
    )


# The temporal residual blocks of diffusers' Stable Video Diffusion (576x1024, both releases), which normalise over the
# whole clip; AnimateDiff's motion modules (512x512); and what a CPU can time of the sizes between.
_SVD = ((320, 72, 128), (640, 36, 64), (1280, 18, 32), (1280, 9, 16))
SVD = (*_levels("svd", 14, *_SVD), *_levels("svd_xt", 25, *_SVD))
ANIMATEDIFF = _levels("animatediff", 16, (320, 64, 64), (640, 32, 32), (1280, 16, 16), (1280, 8, 8))
HOST = tuple((f"host{C}", {"B": 1, "C": C, "T": 16, "H": 32, "W": 32, "G": 32}, True) for C in (64, 128, 256))

SCENARIOS = (
    *at_levels({"act": "silu", "film": None}, (*LEVELS, *HOST)),
    *at_levels({"act": "silu", "film": "BC"}, (*LEVELS, *HOST), suffix="_film"),
    *at_levels({"act": "silu", "film": None, "per_frame": False}, SVD),
    *at_levels({"act": None, "film": None}, ANIMATEDIFF),
)


def _check(name: str, *, C: int = 24, T: int = 3, G: int = 8, act: str | None = "silu", **options: Any) -> Scenario:
    """Three channels a group and 63 pixels a frame, unless told otherwise: powers of two are in the scenarios."""
    sizes = {"B": 2, "C": C, "T": T, "H": 7, "W": 9, "G": G}
    return Scenario(name, sizes, {"act": act, "film": None, **options})


CHECKS = (
    _check("film_of_frames", film="BTC", wide=True),
    _check("clip", film="BC", per_frame=False),
    _check("groups_of_ten", C=320, G=32, act=None),
    _check("one_frame", T=1, G=1, affine=False),
    _check("groups_of_one", G=24, film="BC"),
)


def _flops(scenario: Scenario) -> int:
    return 0  # no contraction: the op is bound by bandwidth


def _bytes(scenario: Scenario, dtype: torch.dtype) -> int:
    return 2 * scenario.count("BCTHW") * dtype.itemsize


def _make_inputs(
    scenario: Scenario, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, object]:
    """Options: "film" is its shape in letters or None; "wide" parameters are of the accumulation dtype."""
    options = scenario.options
    draw = Draw(device, dtype, generator)
    parameter = Draw(device, _layout.accumulation_dtype(dtype), generator) if options.get("wide") else draw
    weight, bias = (parameter(*scenario.shape("C")) if options.get("affine", True) else None for _ in range(2))
    film = options["film"]
    scale, shift = (None if film is None else parameter(*scenario.shape(film), scale=0.1) for _ in range(2))
    return {
        "x": draw.activation(*scenario.shape("BCTHW")),
        "num_groups": scenario.sizes["G"],
        "weight": weight,
        "bias": bias,
        "scale": scale,
        "shift": shift,
        "act": options["act"],
        "per_frame": options.get("per_frame", True),
    }


SPEC = OpSpec("group_norm", SCENARIOS, _flops, _bytes, _make_inputs, CHECKS)
