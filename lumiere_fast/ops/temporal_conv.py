"""Convolution over time, with its neighbours in a block: norm (and SiLU) before, bias, SiLU, residual after.

This is the Conv1D of Lumiere's convolution inflation block (paper, figure 4b), and with one tap its closing Linear. One
tap after a norm without SiLU is the projection to queries, keys and values at the head of an attention block. It mixes
channels and frames at each pixel and never normalises over time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from lumiere_fast.dispatch import Backend, Needs
from lumiere_fast.ops import _layout
from lumiere_fast.ops._checks import (
    ACTIVATIONS,
    check_activation,
    check_choice,
    check_film,
    check_groups,
    check_is_tensor,
    check_parameter,
    check_same_dtype,
    check_tensor,
    under_autocast,
)
from lumiere_fast.ops._registry import Result, register
from lumiere_fast.ops._spec import (
    BASE_ATTENTION_LEVELS,
    DEMO_ATTENTION_LEVELS,
    LEVELS,
    Draw,
    OpSpec,
    Scenario,
    at_levels,
)
from lumiere_fast.ops.group_norm import (
    ANIMATEDIFF,
    HOST,
    SVD,
    channel_affine,
    describe_stats,
    group_norm_stats_reference,
    scale_and_shift,
)

PADDING_MODES = ("zeros", "replicate")


class NormArgs(NamedTuple):
    """A group norm whose statistics are known, and `act`, applied to a convolution's input; see `group_norm`.

    `mean` and `rstd` are (B, T, num_groups), from `group_norm_stats` or from the convolution before (`stats_groups`).
    They are in fp32, in fp64 for fp64. `weight`, `bias` are (C,); `scale`, `shift` (B, C) or (B, T, C), in the dtype of
    the input or in fp32. `act` is "silu" or None.
    """

    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    num_groups: int
    scale: Tensor | None = None
    shift: Tensor | None = None
    act: str | None = "silu"


@overload
def temporal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    *,
    padding_mode: str = ...,
    norm: NormArgs | None = ...,
    act: str | None = ...,
    residual: Tensor | None = ...,
    stats_groups: None = ...,
    backend: str | None = ...,
    out: Tensor | None = ...,
) -> Tensor: ...


@overload
def temporal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    *,
    padding_mode: str = ...,
    norm: NormArgs | None = ...,
    act: str | None = ...,
    residual: Tensor | None = ...,
    stats_groups: int,
    backend: str | None = ...,
    out: Tensor | None = ...,
) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...


def temporal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding_mode: str = "zeros",
    norm: NormArgs | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
    stats_groups: int | None = None,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """`y[t] = act(sum_j W[:, :, j] h[t + j - k//2] + bias[t]) + residual[t]`, at each pixel by itself.

    `h = norm.act(((x - mean) * rstd * w + b) * (1 + scale) + shift)` where `norm` is given, else `x`; `norm.act` is
    SiLU or, as None, the identity. Padding comes after that: frames outside the clip are zero, or with "replicate" the
    clip's first and last `h`. The result has T frames. The arithmetic is fp32 (fp64 for fp64), rounded once at the end;
    a normalised `h` may be rounded to the dtype of `x` too, as tensor cores take it. Differentiable in every tensor,
    those of `norm` included. (On CUDA the reference is cuDNN's convolution, whose fp32 follows
    `torch.backends.cudnn.allow_tf32`. On a CPU three taps are convolved by minimal filtering, F(2, 3), where clip and
    channels are not small: an error of fp32 rounding is then relative to the largest of the four frames around, and
    infinity among them may come out as NaN.)

    Args:
        x: (B, C_in, T, H, W), floating, any strides; channels_last_3d costs no copy. B may be 0.
        weight: (C_out, C_in, k), k odd, in the dtype of `x` (under autocast in any).
        bias: (C_out,), or (B, T, C_out) for an embedding added to each frame; in the dtype of `x` or in fp32.
        padding_mode: "zeros" or "replicate".
        norm: a norm of the input, statistics known, with or without SiLU; see `NormArgs`.
        act: None or "silu".
        residual: (B, C_out, T, H, W) in the dtype of `x`, added after `act`.
        stats_groups: number of groups G of the norm that follows; its statistics are returned with y.
        backend: None for the current choice; see `lumiere_fast.dispatch`.
        out: receives y; only where nothing needs a gradient. May not overlap the inputs.

    Returns:
        y (B, C_out, T, H, W), in the dtype and memory format of `x`; with `stats_groups`, `(y, (mean, rstd))` where the
        statistics are those of `group_norm_stats(y, G)`, taken before y is rounded.

    Raises:
        ValueError: an argument is not as above.
        BackendUnavailable: a backend asked for by name cannot run this call.
    """
    arguments = _flatten(x, weight, bias, padding_mode, norm, act, residual, stats_groups)
    y, mean, rstd = TEMPORAL_CONV(arguments, backend, out)
    return y if stats_groups is None else (y, (mean, rstd))


def temporal_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding_mode: str = "zeros",
    act: str | None = None,
    residual: Tensor | None = None,
    stats_groups: int | None = None,
    norm_mean: Tensor | None = None,
    norm_rstd: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_scale: Tensor | None = None,
    norm_shift: Tensor | None = None,
    norm_act: str | None = "silu",
) -> tuple[Tensor, Tensor, Tensor]:
    """`temporal_conv` in plain torch: `(y, mean, rstd)`, the statistics empty without `stats_groups`.

    The clip is seen as an image of T by H*W pixels, a view of channels-last memory, and convolved with a (k, 1) kernel:
    on the CPU the fastest of conv2d, conv3d, shifted GEMMs and a transposed conv1d, forward and backward.
    """
    dtype = _layout.accumulation_dtype(x.dtype)
    h = x.to(dtype)
    if norm_mean is not None and norm_rstd is not None:
        h = _normalise(h, norm_mean, norm_rstd, norm_weight, norm_bias, norm_scale, norm_shift)
        h = F.silu(h) if norm_act == "silu" else h
    frame_bias = bias is not None and bias.dim() == 3
    y = convolve(h, weight.to(dtype), None if bias is None or frame_bias else bias.to(dtype), padding_mode)
    if bias is not None and frame_bias:
        y = y + _layout.over_pixels(bias.to(dtype))
    y = F.silu(y) if act == "silu" else y
    y = y if residual is None else y + residual.to(dtype)
    if stats_groups is None:
        mean, rstd = y.new_empty(0), y.new_empty(0)
    else:
        mean, rstd = group_norm_stats_reference(y, stats_groups)
    return y.to(x.dtype).contiguous(memory_format=_layout.video_format(x)), mean, rstd


def _normalise(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """The norm, all of it folded into one multiplier and one offset per frame and channel."""
    repeats = x.shape[1] // mean.shape[-1]
    mean, rstd = (stat.to(x.dtype).repeat_interleave(repeats, dim=-1) for stat in (mean, rstd))
    multiplier, offset = channel_affine(weight, bias, scale, shift, x.dtype)
    multiplier = rstd if multiplier is None else rstd * multiplier
    offset = -mean * multiplier if offset is None else offset - mean * multiplier
    return scale_and_shift(x, multiplier, offset)


def convolve(h: Tensor, weight: Tensor, bias: Tensor | None, padding_mode: str = "zeros", stride: int = 1) -> Tensor:
    """The bare convolution over time, every `stride`-th frame of it, of operands in one dtype."""
    if weight.shape[2] == stride == 1:  # a matrix product: torch's is faster than its convolution, in backward most
        return _layout.from_rows(F.linear(_layout.to_rows(h), weight.squeeze(2), bias))
    pad = weight.shape[2] // 2
    if padding_mode == "replicate" and pad > 0:
        first, last = h[:, :, :1], h[:, :, -1:]
        h = torch.cat([*[first] * pad, h, *[last] * pad], dim=2)
        pad = 0
    # contiguous: of other strides some of torch's convolutions have no backward
    y = F.conv2d(_layout.fold_pixels(h), weight.contiguous()[..., None], bias, (stride, 1), (pad, 0))
    return _layout.from_rows(y.permute(0, 2, 3, 1).unflatten(2, h.shape[3:]))


def _flatten(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding_mode: str,
    norm: NormArgs | None,
    act: str | None,
    residual: Tensor | None,
    stats_groups: int | None,
) -> tuple[object, ...]:
    op = "temporal_conv"
    check_activation(op, x)
    check_is_tensor(op, "weight", weight)
    if weight.dim() != 3 or weight.shape[0] < 1 or weight.shape[1] != x.shape[1] or weight.shape[2] % 2 == 0:
        raise ValueError(
            f"{op}: weight must be (C_out, C_in, k) with C_in = {x.shape[1]} (the channels of x) and k odd, "
            f"got {tuple(weight.shape)}"
        )
    weight, bias, residual = under_autocast(x, weight, bias, residual)  # type: ignore[assignment]  # not None
    check_tensor(op, "weight", weight, x, weight.shape)
    check_same_dtype(op, "weight", weight, "x", x)
    B, _, T, H, W = x.shape
    C_out = weight.shape[0]
    check_parameter(op, "bias", bias, x, (C_out,), (B, T, C_out))
    check_choice(op, "padding_mode", padding_mode, PADDING_MODES)
    check_choice(op, "act", act, ACTIVATIONS)
    check_tensor(op, "residual", residual, x, (B, C_out, T, H, W))
    if residual is not None:
        check_same_dtype(op, "residual", residual, "x", x)
    if stats_groups is not None:
        check_groups(op, "stats_groups", stats_groups, C_out)
    arguments = (x, weight, bias, padding_mode, act, residual, stats_groups)
    if norm is None:
        return (*arguments, *[None] * 7)
    if not isinstance(norm, NormArgs):
        raise ValueError(f"{op}: norm must be None or a NormArgs, got {type(norm).__name__}")
    affine = under_autocast(x, norm.weight, norm.bias, norm.scale, norm.shift)
    _check_norm(op, x, norm, *affine)
    return (*arguments, norm.mean, norm.rstd, *affine, norm.act)


def _check_norm(
    op: str,
    x: Tensor,
    norm: NormArgs,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    B, C, T = x.shape[:3]
    check_groups(op, "norm.num_groups", norm.num_groups, C)
    precise = _layout.accumulation_dtype(x.dtype)
    for name, stat in (("norm.mean", norm.mean), ("norm.rstd", norm.rstd)):
        check_is_tensor(op, name, stat)
        check_tensor(op, name, stat, x, (B, T, norm.num_groups))
        if stat.dtype != precise:
            raise ValueError(f"{op}: {name} must be {precise}, as group_norm_stats returns it, got {stat.dtype}")
    check_parameter(op, "norm.weight", weight, x, (C,))
    check_parameter(op, "norm.bias", bias, x, (C,))
    check_film(op, x, scale, shift, prefix="norm.")
    check_choice(op, "norm.act", norm.act, ACTIVATIONS)


def _describe(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding_mode: str,
    act: str | None,
    residual: Tensor | None,
    stats_groups: int | None,
    *norm: Tensor | str | None,
) -> tuple[Result, Result, Result]:
    B, _, T, H, W = x.shape
    y = Result((B, weight.shape[0], T, H, W), x.dtype, x.device, _layout.video_format(x))
    if stats_groups is None:
        none = Result((0,), _layout.accumulation_dtype(x.dtype), x.device)
        return y, none, none
    return y, *describe_stats(x, stats_groups)


_NARROW = {name: (torch.float32, torch.float16, torch.bfloat16) for name in ("x", "weight", "residual")}

TEMPORAL_CONV = register(
    temporal_conv,
    temporal_conv_reference,
    _flatten,
    _describe,
    backends=(
        Backend(
            "triton",
            "lumiere_fast.kernels.temporal_conv:temporal_conv",
            Needs(devices=("cuda",), dtypes=_NARROW, capability=(8, 0), gradient=True, modules=("triton",)),
            backward="lumiere_fast.kernels.temporal_conv_backward:temporal_conv_backward",
        ),
        Backend(
            "cpu",
            "lumiere_fast.native:temporal_conv",
            # no gradient: torch's own autograd does not run the reference's forward twice
            Needs(devices=("cpu",), dtypes=_NARROW, native="avx2"),
            pays_from=(("x", 1, 16), ("weight", 0, 16)),
        ),
    ),
)


def _projection(name: str, sizes: Mapping[str, int], cpu: bool) -> Scenario:
    """To queries, keys and values at the head of an attention block, sinusoidal positions in the bias of each frame."""
    options = {"fused": True, "norm_act": None, "frame_bias": True, "residual": False}
    return Scenario(f"{name}_qkv", {**sizes, "N": 3 * sizes["C"], "k": 1}, options, cpu)


SCENARIOS = (
    *at_levels({"fused": False}, (*LEVELS, *HOST, *SVD), k=3),
    *at_levels({"fused": True}, (*LEVELS, *HOST, *SVD), suffix="_fused", k=3),
    *at_levels({"fused": False}, ANIMATEDIFF, suffix="_linear", k=1),
    *at_levels({"fused": True}, ANIMATEDIFF, suffix="_fused", k=3),
    *(_projection(*level) for level in (*BASE_ATTENTION_LEVELS, *DEMO_ATTENTION_LEVELS)),
    *at_levels({"fused": True}, (*LEVELS, *HOST), suffix="_fused_linear", k=1),  # an inflation block's last layer
)


def _check(name: str, *, T: int = 3, k: int = 3, fused: bool = False, **options: Any) -> Scenario:
    """C_in != C_out, neither a power of two, and 63 pixels a frame."""
    sizes = {"B": 2, "C": 24, "N": 40, "T": T, "H": 7, "W": 9, "G": 8, "k": k}
    return Scenario(name, sizes, {"fused": fused, **options})


CHECKS = (
    _check("replicate", k=5, padding_mode="replicate", act="silu"),
    _check("one_tap", k=1, frame_bias=True, stats_groups=8),
    _check("film", fused=True, film="BTC", wide=True, stats_groups=4),
    _check("film_of_clip", k=5, fused=True, film="BC", padding_mode="replicate", frame_bias=True, act="silu"),
    _check("one_frame", T=1, fused=True, stats_groups=40),
    _check("projection", k=1, fused=True, norm_act=None, frame_bias=True, residual=False),
    _check("norm_alone", fused=True, norm_act=None, film="BTC", stats_groups=4),
)

# Wide enough for several blocks of channels each way, and tiles enough for all of a GPU's multiprocessors.
GPU_CHECKS = tuple(
    Scenario(
        f"wide{k}{'_fused' if fused else ''}",
        {"B": 1, "C": 256, "N": 320, "T": 8, "H": 40, "W": 39, "G": 32, "k": k},
        {"fused": fused, **({"stats_groups": 32} if fused else {})},
    )
    for k in (1, 3)
    for fused in (False, True)
)


def _channels_out(scenario: Scenario) -> int:
    return scenario.sizes.get("N", scenario.sizes["C"])


def _has_residual(scenario: Scenario) -> bool:
    return bool(scenario.options["fused"] and scenario.options.get("residual", True))


def _flops(scenario: Scenario) -> int:
    return 2 * scenario.count("BTHW") * scenario.count("Ck") * _channels_out(scenario)


def _bytes(scenario: Scenario, dtype: torch.dtype) -> int:
    """x and y, the weights, and the residual of the fused form."""
    channels = scenario.sizes["C"] + (1 + _has_residual(scenario)) * _channels_out(scenario)
    return (channels * scenario.count("BTHW") + scenario.count("Ck") * _channels_out(scenario)) * dtype.itemsize


def _make_inputs(
    scenario: Scenario, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, object]:
    """Plain, or "fused": the norm of x and SiLU before, bias and residual after.

    Further options: "norm_act" for SiLU, "residual" for whether there is one, "frame_bias"; and of checks alone
    arguments by name, "film" of the norm as its shape in letters, and "wide" for bias and norm in the accumulation
    dtype. There are N channels out, or C.
    """
    options = scenario.options
    draw = Draw(device, dtype, generator)
    parameter = Draw(device, _layout.accumulation_dtype(dtype), generator) if options.get("wide") else draw
    B, C, T, H, W, G, k = scenario.shape("BCTHWGk")
    C_out = _channels_out(scenario)
    x = draw.activation(B, C, T, H, W)
    call = {
        "x": x,
        "weight": draw(C_out, C, k, scale=(C * k) ** -0.5),
        "bias": parameter(B, T, C_out) if options.get("frame_bias") else parameter(C_out),
        **{name: options[name] for name in ("padding_mode", "act", "stats_groups") if name in options},
    }
    if not options["fused"]:
        return call
    film = options.get("film")
    scale, shift = (None if film is None else parameter(*scenario.shape(film), scale=0.1) for _ in range(2))
    stats = group_norm_stats_reference(x, G)
    norm = NormArgs(*stats, parameter(C), parameter(C), G, scale, shift, options.get("norm_act", "silu"))
    return {**call, "norm": norm, "residual": draw.activation(B, C_out, T, H, W) if _has_residual(scenario) else None}


SPEC = OpSpec("temporal_conv", SCENARIOS, _flops, _bytes, _make_inputs, CHECKS, GPU_CHECKS, rounds_operands=True)
