"""Convolution over time, with its neighbours in an inflation block: norm and SiLU before, bias, SiLU, residual after.

This is the Conv1D of Lumiere's convolution inflation block (paper, figure 4b), and with one tap its closing Linear. It
mixes channels and frames at each pixel and never normalises over time.
"""

from __future__ import annotations

from typing import NamedTuple, overload

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
    check_tensor,
)
from lumiere_fast.ops._registry import Result, register
from lumiere_fast.ops._spec import Draw, OpSpec, Scenario, at_levels
from lumiere_fast.ops.group_norm import (
    channel_affine,
    describe_stats,
    group_norm_stats_reference,
    scale_and_shift,
)

PADDING_MODES = ("zeros", "replicate")


class NormArgs(NamedTuple):
    """A group norm whose statistics are known, applied with SiLU to a convolution's input; see `group_norm`.

    `mean` and `rstd` are (B, T, num_groups), from `group_norm_stats` or from the convolution before (`stats_groups`).
    `weight`, `bias` are (C,); `scale`, `shift` (B, C) or (B, T, C).
    """

    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    num_groups: int
    scale: Tensor | None = None
    shift: Tensor | None = None


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

    `h = silu(((x - mean) * rstd * w + b) * (1 + scale) + shift)` where `norm` is given, else `x`. Padding comes after
    the norm: frames outside the clip are zero, or with "replicate" the clip's first and last `h`. The result has T
    frames. The arithmetic is fp32 (fp64 for fp64), rounded once at the end. Differentiable in every tensor, those of
    `norm` included. (On CUDA the reference is cuDNN's convolution, whose fp32 follows
    `torch.backends.cudnn.allow_tf32`.)

    Args:
        x: (B, C_in, T, H, W), floating, any strides; channels_last_3d costs no copy. B may be 0.
        weight: (C_out, C_in, k), k odd.
        bias: (C_out,), or (B, T, C_out) for an embedding added to each frame.
        padding_mode: "zeros" or "replicate".
        norm: a norm of the input, statistics known; see `NormArgs`.
        act: None or "silu".
        residual: (B, C_out, T, H, W), added after `act`.
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
    y, mean, rstd = _TEMPORAL_CONV(arguments, backend, out)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """`temporal_conv` in plain torch: `(y, mean, rstd)`, the statistics empty without `stats_groups`.

    The clip is seen as an image of T by H*W pixels, a view of channels-last memory, and convolved with a (k, 1) kernel:
    on the CPU the fastest of conv2d, conv3d, shifted GEMMs and a transposed conv1d, forward and backward.
    """
    dtype = _layout.accumulation_dtype(x.dtype)
    h = x.to(dtype)
    if norm_mean is not None and norm_rstd is not None:
        h = _normalise(h, norm_mean, norm_rstd, norm_weight, norm_bias, norm_scale, norm_shift)
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
    """`silu` of the norm, all of it folded into one multiplier and one offset per frame and channel."""
    repeats = x.shape[1] // mean.shape[-1]
    mean, rstd = (stat.to(x.dtype).repeat_interleave(repeats, dim=-1) for stat in (mean, rstd))
    multiplier, offset = channel_affine(weight, bias, scale, shift, x.dtype)
    multiplier = rstd if multiplier is None else rstd * multiplier
    offset = -mean * multiplier if offset is None else offset - mean * multiplier
    return F.silu(scale_and_shift(x, multiplier, offset))


def convolve(h: Tensor, weight: Tensor, bias: Tensor | None, padding_mode: str = "zeros", stride: int = 1) -> Tensor:
    """The bare convolution over time, every `stride`-th frame of it, of operands in one dtype."""
    pad = weight.shape[2] // 2
    if padding_mode == "replicate" and pad > 0:
        first, last = h[:, :, :1], h[:, :, -1:]
        h = torch.cat([*[first] * pad, h, *[last] * pad], dim=2)
        pad = 0
    y = F.conv2d(_layout.fold_pixels(h), weight[..., None], bias, (stride, 1), (pad, 0))
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
    check_tensor(op, "weight", weight, x, weight.shape)
    B, _, T, H, W = x.shape
    C_out = weight.shape[0]
    check_tensor(op, "bias", bias, x, (C_out,), (B, T, C_out))
    check_choice(op, "padding_mode", padding_mode, PADDING_MODES)
    check_choice(op, "act", act, ACTIVATIONS)
    check_tensor(op, "residual", residual, x, (B, C_out, T, H, W))
    if stats_groups is not None:
        check_groups(op, "stats_groups", stats_groups, C_out)
    arguments = (x, weight, bias, padding_mode, act, residual, stats_groups)
    if norm is None:
        return (*arguments, *[None] * 6)
    _check_norm(op, x, norm)
    return (*arguments, norm.mean, norm.rstd, norm.weight, norm.bias, norm.scale, norm.shift)


def _check_norm(op: str, x: Tensor, norm: NormArgs) -> None:
    B, C, T = x.shape[:3]
    check_groups(op, "norm.num_groups", norm.num_groups, C)
    for name, stat in (("norm.mean", norm.mean), ("norm.rstd", norm.rstd)):
        check_tensor(op, name, stat, x, (B, T, norm.num_groups))
    check_tensor(op, "norm.weight", norm.weight, x, (C,))
    check_tensor(op, "norm.bias", norm.bias, x, (C,))
    check_film(op, x, norm.scale, norm.shift, prefix="norm.")


def _describe(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding_mode: str,
    act: str | None,
    residual: Tensor | None,
    stats_groups: int | None,
    *norm: Tensor | None,
) -> tuple[Result, Result, Result]:
    B, _, T, H, W = x.shape
    y = Result((B, weight.shape[0], T, H, W), x.dtype, x.device, _layout.video_format(x))
    if stats_groups is None:
        none = Result((0,), _layout.accumulation_dtype(x.dtype), x.device)
        return y, none, none
    return y, *describe_stats(x, stats_groups)


_TEMPORAL_CONV = register(
    temporal_conv,
    temporal_conv_reference,
    _flatten,
    _describe,
    backends=(
        Backend(
            "cpu",
            "lumiere_fast.native:temporal_conv",
            Needs(
                devices=("cpu",),
                dtypes={"x": (torch.float32, torch.float16, torch.bfloat16)},
                native="avx2",  # no gradient: torch's own autograd does not run the reference's forward twice
            ),
        ),
    ),
)


SCENARIOS = (
    *at_levels({"fused": False}, k=3),
    *at_levels({"fused": True}, suffix="_fused", k=3),
)


def _flops(scenario: Scenario) -> int:
    return 2 * scenario.count("BTHW") * scenario.count("CCk")


def _bytes(scenario: Scenario, dtype: torch.dtype) -> int:
    """x and y, the weights, and the residual of the fused form."""
    activations = 3 if scenario.options["fused"] else 2
    return (activations * scenario.count("BCTHW") + scenario.count("CCk")) * dtype.itemsize


def _make_inputs(
    scenario: Scenario, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, object]:
    """Plain, or "fused": the norm of x and SiLU before, bias and residual after."""
    draw = Draw(device, dtype, generator)
    C, G = scenario.sizes["C"], scenario.sizes["G"]
    x = draw.activation(*scenario.shape("BCTHW"))
    weight, bias = draw(*scenario.shape("CCk"), scale=(C * scenario.sizes["k"]) ** -0.5), draw(C)
    if not scenario.options["fused"]:
        return {"x": x, "weight": weight, "bias": bias}
    norm = NormArgs(*group_norm_stats_reference(x, G), draw(C), draw(C), G)
    return {"x": x, "weight": weight, "bias": bias, "norm": norm, "residual": draw.activation(*scenario.shape("BCTHW"))}


SPEC = OpSpec("temporal_conv", SCENARIOS, _flops, _bytes, _make_inputs)
