from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lumiere_fast.ops import NormArgs, group_norm, group_norm_stats, temporal_conv
from lumiere_fast.ops.temporal_conv import SPEC, temporal_conv_reference
from tests.ops.common import (
    CHANNELS_LAST,
    FORMATS,
    HALF_DTYPES,
    Draw,
    assert_no_worse_than_torch,
    check_compiled,
    check_operator,
    check_operator_gradient,
    check_out,
    in_format,
)

SHAPES = [
    (2, 8, 6, 5, 4, 3, 3),  # B, C_in, C_out, T, H, W, k
    (1, 5, 7, 1, 1, 7, 3),  # one frame, prime pixels, channels no multiple of 8
    (2, 3, 4, 2, 3, 1, 7),  # more taps than frames
    (1, 1, 3, 4, 2, 2, 5),  # one channel: both memory formats describe x
    (2, 4, 1, 4, 2, 2, 3),
    (1, 4, 5, 3, 1, 1, 1),  # one tap is a linear layer
    (0, 4, 5, 3, 2, 2, 3),
]
PADDING = {"zeros": "constant", "replicate": "replicate"}


def rearrange_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding_mode: str = "zeros") -> Tensor:
    """The textbook way: pixels into the batch, then torch's one-dimensional convolution over T."""
    B, C, T, H, W = x.shape
    sequences = x.permute(0, 3, 4, 1, 2).reshape(B * H * W, C, T)
    pad = weight.shape[2] // 2
    if B > 0:
        sequences = F.pad(sequences, (pad, pad), mode=PADDING[padding_mode])
    else:
        sequences = sequences.new_zeros(0, C, T + 2 * pad)
    y = F.conv1d(sequences, weight, bias)
    return y.reshape(B, H, W, weight.shape[0], T).permute(0, 3, 4, 1, 2)


def film_of(values: Tensor) -> Tensor:
    return values[:, :, None, None, None] if values.dim() == 2 else values.transpose(1, 2)[..., None, None]


@pytest.mark.parametrize("memory_format", FORMATS, ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("padding_mode", PADDING)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_conv1d_of_each_pixel(shape: tuple[int, ...], padding_mode: str, memory_format: torch.memory_format) -> None:
    B, C_in, C_out, T, H, W, k = shape
    draw = Draw(1)
    x, weight, bias = draw.clip(B, C_in, T, H, W, memory_format=memory_format), draw(C_out, C_in, k), draw(C_out)
    y = temporal_conv(x, weight, bias, padding_mode=padding_mode)
    torch.testing.assert_close(y, rearrange_conv1d(x, weight, bias, padding_mode))
    assert in_format(y, CHANNELS_LAST if in_format(x, CHANNELS_LAST) else memory_format)


def test_by_hand() -> None:
    """One channel, one pixel: the taps run forward in time, centred."""
    x = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 1, 3, 1, 1)
    weight = torch.tensor([[[100.0, 10.0, 1.0]]])
    assert temporal_conv(x, weight).flatten().tolist() == [12.0, 123.0, 230.0]
    assert temporal_conv(x, weight, padding_mode="replicate").flatten().tolist() == [112.0, 123.0, 233.0]


def test_identity_kernel_is_the_identity() -> None:
    x = Draw(2, torch.float32).clip(2, 6, 4, 3, 3)
    weight = torch.zeros(6, 6, 3)
    weight[:, :, 1] = torch.eye(6)
    torch.testing.assert_close(temporal_conv(x, weight), x, rtol=0, atol=0)


@pytest.mark.parametrize("bias_shape", [None, (6,), (2, 5, 6)], ids=str)
@pytest.mark.parametrize("act", [None, "silu"])
def test_epilogue_is_act_then_residual(bias_shape: tuple[int, ...] | None, act: str | None) -> None:
    draw = Draw(3)
    x, weight, residual = draw.clip(2, 4, 5, 2, 3), draw(6, 4, 3), draw.clip(2, 6, 5, 2, 3)
    bias = None if bias_shape is None else draw(*bias_shape)
    expected = rearrange_conv1d(x, weight)
    if bias is not None:
        expected = expected + (film_of(bias) if bias.dim() == 3 else bias[:, None, None, None])
    expected = (expected * torch.sigmoid(expected) if act else expected) + residual
    torch.testing.assert_close(temporal_conv(x, weight, bias, act=act, residual=residual), expected)


@pytest.mark.parametrize("padding_mode", PADDING)
@pytest.mark.parametrize("film", [None, (2, 6), (2, 5, 6)], ids=str)
def test_prologue_is_norm_then_silu_then_padding(film: tuple[int, ...] | None, padding_mode: str) -> None:
    draw = Draw(4)
    x, weight, w, b = draw.clip(2, 6, 5, 2, 3), draw(4, 6, 3), draw(6), draw(6)
    mean, rstd = draw(2, 5, 3), draw(2, 5, 3).square() + 0.5
    scale, shift = (None, None) if film is None else (draw(*film), draw(*film))
    groups = x.unflatten(1, (3, 2))
    n = (groups - mean.transpose(1, 2)[:, :, None, :, None, None]) * rstd.transpose(1, 2)[:, :, None, :, None, None]
    h = n.flatten(1, 2) * w[:, None, None, None] + b[:, None, None, None]
    if scale is not None and shift is not None:
        h = h * (1 + film_of(scale)) + film_of(shift)
    y = temporal_conv(x, weight, norm=NormArgs(mean, rstd, w, b, 3, scale, shift), padding_mode=padding_mode)
    torch.testing.assert_close(y, rearrange_conv1d(h * torch.sigmoid(h), weight, padding_mode=padding_mode))


def test_norm_without_affine() -> None:
    draw = Draw(5)
    x, weight = draw.clip(1, 6, 4, 2, 2), draw(5, 6, 3)
    y = temporal_conv(x, weight, norm=NormArgs(*group_norm_stats(x, 2), None, None, 2))
    torch.testing.assert_close(y, rearrange_conv1d(group_norm(x, 2, None, None, act="silu"), weight))


@pytest.mark.parametrize("frames", [1, 4])
def test_stats_are_those_of_each_frame_of_y(frames: int) -> None:
    draw = Draw(6)
    x, weight, residual = draw.clip(2, 4, frames, 3, 3), draw(6, 4, 3), draw.clip(2, 6, frames, 3, 3)
    y, (mean, rstd) = temporal_conv(x, weight, act="silu", residual=residual, stats_groups=2)
    groups = y.contiguous().reshape(2, 2, 3, frames, 9)
    torch.testing.assert_close(mean, groups.mean((2, 4)).transpose(1, 2))
    torch.testing.assert_close(rstd, (groups.var((2, 4), correction=0) + 1e-5).rsqrt().transpose(1, 2))


@pytest.mark.parametrize("padding_mode", PADDING)
def test_gradients(padding_mode: str) -> None:
    draw = Draw(7)
    x, weight, bias = draw.clip(1, 4, 3, 2, 1, grad=True), draw(2, 4, 3, grad=True), draw(1, 3, 2, grad=True)
    w, b, scale, shift = draw(4, grad=True), draw(4, grad=True), draw(1, 4, grad=True), draw(1, 3, 4, grad=True)
    residual = draw.clip(1, 2, 3, 2, 1, grad=True)
    mean = draw(1, 3, 2, grad=True)
    rstd = (draw(1, 3, 2).square() + 0.5).requires_grad_()

    def run(*t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias, residual, mean, rstd, w, b, scale, shift = t
        norm = NormArgs(mean, rstd, w, b, 2, scale, shift)
        y, stats = temporal_conv(
            x, weight, bias, norm=norm, act="silu", residual=residual, stats_groups=2, padding_mode=padding_mode
        )
        return y, *stats

    assert torch.autograd.gradcheck(run, (x, weight, bias, residual, mean, rstd, w, b, scale, shift))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    draw = Draw(8, dtype)
    x, weight, bias, residual = draw.clip(2, 16, 4, 3, 3), draw(16, 16, 3), draw(16), draw.clip(2, 16, 4, 3, 3)

    def composed(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return F.silu(rearrange_conv1d(x, weight, bias)) + residual

    y, (mean, _) = temporal_conv(x, weight, bias, act="silu", residual=residual, stats_groups=4)
    exact = composed(*(t.double() for t in (x, weight, bias, residual)))
    assert y.dtype == dtype and mean.dtype == torch.float32 and in_format(y, CHANNELS_LAST)
    assert_no_worse_than_torch(y, composed(x, weight, bias, residual), exact, factor=1.0)


SLICES = {
    "frames": lambda x: x[:, :, 1:4],
    "channels": lambda x: x[:, 2:6],
    "every other frame": lambda x: x[:, :, ::2],
    "columns": lambda x: x[..., 1::2],
    "clips": lambda x: x[1:],
}


@pytest.mark.parametrize("memory_format", FORMATS, ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("name", SLICES)
def test_strided_slices_keep_the_format(name: str, memory_format: torch.memory_format) -> None:
    draw = Draw(9)
    x = SLICES[name](draw.clip(3, 8, 5, 4, 6, memory_format=memory_format))
    weight = draw(5, x.shape[1], 3)
    y = temporal_conv(x, weight)
    torch.testing.assert_close(y, rearrange_conv1d(x, weight))
    assert in_format(y, memory_format)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [8, 16])
def test_channels_last_is_kept_without_a_copy(batch: int, threads: int, size: int) -> None:
    """torch picks the convolution by batch, size and threads; in no case may an activation be copied."""
    draw = Draw(10, torch.float32)
    x, weight = draw.clip(batch, 32, 4, size, size), draw(32, 32, 3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with (
            torch.no_grad(),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile,
        ):
            y = temporal_conv(x, weight)
    finally:
        torch.set_num_threads(before)
    copied = [math.prod(e.input_shapes[0]) for e in profile.events() if e.name in ("aten::copy_", "aten::clone")]
    assert in_format(y, CHANNELS_LAST) and all(count <= weight.numel() < x.numel() for count in copied)


def test_out() -> None:
    draw = Draw(11)
    check_out(temporal_conv, draw.clip(2, 4, 3, 2, 2), draw(6, 4, 3), draw(6), act="silu")
    check_out(temporal_conv, draw.clip(2, 4, 3, 2, 2), draw(6, 4, 3), stats_groups=2)


@pytest.mark.parametrize("needs", [(), ("x",), ("weight",), ("mean", "scale"), ("x", "bias", "residual")], ids=str)
def test_operator(needs: tuple[str, ...]) -> None:
    draw = Draw(12)
    x, residual = draw.clip(2, 4, 3, 2, 2, grad="x" in needs), draw.clip(2, 6, 3, 2, 2, grad="residual" in needs)
    norm = NormArgs(
        draw(2, 3, 2, grad="mean" in needs), draw(2, 3, 2), draw(4), None, 2, draw(2, 4, grad="scale" in needs)
    )
    inputs = (x, draw(6, 4, 3, grad="weight" in needs), draw(6, grad="bias" in needs))
    check_operator(temporal_conv, *inputs, norm=norm, residual=residual, stats_groups=3)
    if needs:
        check_operator_gradient(temporal_conv, *inputs, norm=norm, residual=residual)


def test_operator_without_stats() -> None:
    draw = Draw(13)
    check_operator(temporal_conv, draw.clip(2, 4, 3, 2, 2, grad=True), draw(6, 4, 1), padding_mode="replicate")


@pytest.mark.parametrize("memory_format", FORMATS, ids=["channels_last", "contiguous"])
def test_compiled(memory_format: torch.memory_format) -> None:
    draw = Draw(14, torch.float32)
    for frames in (3, 5):
        x, residual = (draw.clip(2, c, frames, 4, 4, memory_format=memory_format) for c in (8, 6))
        norm = NormArgs(*group_norm_stats(x, 2), draw(8), draw(8), 2)
        check_compiled(temporal_conv, x, draw(6, 8, 3), draw(6), norm=norm, residual=residual, stats_groups=2)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(0, 2),
    c_in=st.integers(1, 4),
    c_out=st.integers(1, 4),
    frames=st.integers(1, 5),
    height=st.integers(1, 3),
    width=st.integers(1, 3),
    half=st.integers(0, 2),
    padding_mode=st.sampled_from(list(PADDING)),
    seed=st.integers(0, 999),
)
def test_every_small_shape(
    batch: int, c_in: int, c_out: int, frames: int, height: int, width: int, half: int, padding_mode: str, seed: int
) -> None:
    draw = Draw(seed)
    x, weight = draw.clip(batch, c_in, frames, height, width), draw(c_out, c_in, 2 * half + 1)
    y = temporal_conv(x, weight, padding_mode=padding_mode)
    torch.testing.assert_close(y, rearrange_conv1d(x, weight, padding_mode=padding_mode))
    assert in_format(y, CHANNELS_LAST)


def norm_with(**changes: object) -> NormArgs:
    return NormArgs(torch.zeros(2, 3, 2), torch.ones(2, 3, 2), None, None, 2)._replace(**changes)


BAD_CALLS = {
    "x must be": {"x": torch.zeros(4, 3, 2, 2)},
    r"weight must be \(C_out, C_in, k\) with C_in = 4": {"weight": torch.zeros(6, 5, 3)},
    "weight must be .* k odd": {"weight": torch.zeros(6, 4, 2)},
    r"bias must have shape \(6,\) or \(2, 3, 6\), got \(4,\)": {"bias": torch.zeros(4)},
    "padding_mode must be 'zeros' or 'replicate', got 'reflect'": {"padding_mode": "reflect"},
    "act must be None or 'silu', got 'relu'": {"act": "relu"},
    "residual must have shape": {"residual": torch.zeros(2, 4, 3, 2, 2)},
    "stats_groups must divide the 6 channels, got 4": {"stats_groups": 4},
    "norm.num_groups must divide": {"norm": norm_with(num_groups=3)},
    "norm.mean must have shape": {"norm": norm_with(mean=torch.zeros(2, 2))},
    "norm.rstd must have shape": {"norm": norm_with(rstd=torch.ones(2, 3, 4))},
    "norm.weight must have shape": {"norm": norm_with(weight=torch.ones(2))},
    "norm.bias must have shape": {"norm": norm_with(bias=torch.ones(6))},
    "norm.scale must have shape": {"norm": norm_with(scale=torch.ones(2, 2, 4))},
    "norm.shift must have shape": {"norm": norm_with(shift=torch.ones(4))},
    "out must be": {"out": torch.zeros(2, 6, 3, 2, 2, dtype=torch.float64)},
    "weight must be torch.float32 like x, got torch.float16": {"weight": torch.zeros(6, 4, 3, dtype=torch.float16)},
    "bias must be torch.float32 like x, got torch.float64": {"bias": torch.zeros(6, dtype=torch.float64)},
    "residual must be torch.float32 like x": {"residual": torch.zeros(2, 6, 3, 2, 2, dtype=torch.bfloat16)},
    "norm.mean must be torch.float32, as": {"norm": norm_with(mean=torch.zeros(2, 3, 2, dtype=torch.float16))},
    "norm.rstd must be torch.float32, as": {"norm": norm_with(rstd=torch.ones(2, 3, 2, dtype=torch.float64))},
    "norm.weight must be torch.float32 like x": {"norm": norm_with(weight=torch.ones(4, dtype=torch.float16))},
    "norm.scale must be torch.float32 like x": {"norm": norm_with(scale=torch.ones(2, 4, dtype=torch.float16))},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments_are_named(message: str) -> None:
    call = {"x": torch.zeros(2, 4, 3, 2, 2), "weight": torch.zeros(6, 4, 3)}
    with pytest.raises(ValueError, match=f"temporal_conv: {message}"):
        temporal_conv(**{**call, **BAD_CALLS[message]})


def test_spec_inputs_are_what_the_op_takes() -> None:
    generator = torch.Generator().manual_seed(0)
    for scenario in SPEC.scenarios:
        if scenario.cpu:
            inputs = SPEC.make_inputs(scenario, "cpu", torch.float32, generator)
            assert temporal_conv(**inputs).shape == inputs["x"].shape
    base = next(s for s in SPEC.scenarios if s.name == "base0")
    assert SPEC.flops(base) == 2 * 80 * 128 * 128 * 3 * 256 * 256
    x, weight = torch.zeros(1, 2, 1, 1, 1), torch.zeros(3, 2, 1)
    assert [t.shape for t in temporal_conv_reference(x, weight)] == [(1, 3, 1, 1, 1), (0,), (0,)]


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_parameters_may_be_kept_more_precisely_than_activations(dtype: torch.dtype) -> None:
    draw, exact = Draw(40, dtype), Draw(42, torch.float32)
    x, weight, bias = draw.clip(1, 4, 3, 2, 2), draw(6, 4, 3), exact(6)
    norm = norm_with(weight=exact(4), bias=exact(4), scale=exact(1, 4), shift=exact(1, 3, 4))
    norm = norm._replace(mean=norm.mean[:1], rstd=norm.rstd[:1])
    y = temporal_conv(x, weight, bias, norm=norm)
    assert y.dtype == dtype
    doubled = NormArgs(*(t.double() if isinstance(t, torch.Tensor) else t for t in norm))
    torch.testing.assert_close(y, temporal_conv(x.double(), weight.double(), bias.double(), norm=doubled).to(dtype))


def test_under_autocast_parameters_follow_the_activation() -> None:
    draw, half = Draw(43, torch.float32), torch.bfloat16
    x, weight, residual = draw.clip(1, 4, 3, 2, 2).to(half), draw(6, 4, 3), draw.clip(1, 6, 3, 2, 2)
    with pytest.raises(ValueError, match=r"weight must be torch.bfloat16 like x, got torch.float32"):
        temporal_conv(x, weight)
    with torch.autocast("cpu", half):
        y = temporal_conv(x, weight, residual=residual)
    torch.testing.assert_close(y, temporal_conv(x, weight.to(half), residual=residual.to(half)), rtol=0, atol=0)


def test_autocast_leaves_the_definition_in_full_precision() -> None:
    draw = Draw(41, torch.float32)
    x, weight = draw.clip(1, 8, 4, 3, 3), draw(8, 8, 3)
    plain = temporal_conv(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(temporal_conv(x, weight), plain)
