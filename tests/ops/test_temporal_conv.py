from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lumiere_fast import dispatch, native
from lumiere_fast.ops import NormArgs, group_norm, group_norm_stats, temporal_conv
from lumiere_fast.ops._layout import accumulation_dtype
from lumiere_fast.ops.temporal_conv import SPEC, temporal_conv_reference
from tests.ops.common import (
    CHANNELS_LAST,
    CONTIGUOUS,
    FORMATS,
    HALF_DTYPES,
    Draw,
    assert_no_worse_than_torch,
    check_compiled,
    check_operator,
    check_operator_gradient,
    check_out,
    device_of,
    flatten,
    in_format,
    in_layout,
    steps,
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
@pytest.mark.parametrize("act", [None, "silu"])
def test_prologue_is_norm_then_act_then_padding(
    act: str | None, film: tuple[int, ...] | None, padding_mode: str
) -> None:
    draw = Draw(4)
    x, weight, w, b = draw.clip(2, 6, 5, 2, 3), draw(4, 6, 3), draw(6), draw(6)
    mean, rstd = draw(2, 5, 3), draw(2, 5, 3).square() + 0.5
    scale, shift = (None, None) if film is None else (draw(*film), draw(*film))
    groups = x.unflatten(1, (3, 2))
    n = (groups - mean.transpose(1, 2)[:, :, None, :, None, None]) * rstd.transpose(1, 2)[:, :, None, :, None, None]
    h = n.flatten(1, 2) * w[:, None, None, None] + b[:, None, None, None]
    if scale is not None and shift is not None:
        h = h * (1 + film_of(scale)) + film_of(shift)
    h = h * torch.sigmoid(h) if act else h
    y = temporal_conv(x, weight, norm=NormArgs(mean, rstd, w, b, 3, scale, shift, act), padding_mode=padding_mode)
    torch.testing.assert_close(y, rearrange_conv1d(h, weight, padding_mode=padding_mode))


def test_norm_without_affine() -> None:
    draw = Draw(5)
    x, weight = draw.clip(1, 6, 4, 2, 2), draw(5, 6, 3)
    norm = NormArgs(*group_norm_stats(x, 2), None, None, 2)  # with SiLU, unless told otherwise
    torch.testing.assert_close(
        temporal_conv(x, weight, norm=norm), rearrange_conv1d(group_norm(x, 2, None, None, act="silu"), weight)
    )


def test_norm_and_one_tap_are_the_projection_of_an_attention_block() -> None:
    draw = Draw(15)
    x, weight, w, b, bias = draw.clip(2, 6, 4, 2, 3), draw(18, 6, 1), draw(6), draw(6), draw(2, 4, 18)
    y = temporal_conv(x, weight, bias, norm=NormArgs(*group_norm_stats(x, 2), w, b, 2, act=None))
    rows = group_norm(x, 2, w, b).permute(0, 2, 3, 4, 1)
    expected = F.linear(rows, weight[..., 0]) + bias[:, :, None, None]
    torch.testing.assert_close(y, expected.permute(0, 4, 1, 2, 3))


@pytest.mark.parametrize("frames", [1, 4])
def test_stats_are_those_of_each_frame_of_y(frames: int) -> None:
    draw = Draw(6)
    x, weight, residual = draw.clip(2, 4, frames, 3, 3), draw(6, 4, 3), draw.clip(2, 6, frames, 3, 3)
    y, (mean, rstd) = temporal_conv(x, weight, act="silu", residual=residual, stats_groups=2)
    groups = y.contiguous().reshape(2, 2, 3, frames, 9)
    torch.testing.assert_close(mean, groups.mean((2, 4)).transpose(1, 2))
    torch.testing.assert_close(rstd, (groups.var((2, 4), correction=0) + 1e-5).rsqrt().transpose(1, 2))


@pytest.mark.parametrize("padding_mode", PADDING)
@pytest.mark.parametrize("norm_act", [None, "silu"])
def test_gradients(norm_act: str | None, padding_mode: str) -> None:
    draw = Draw(7)
    x, weight, bias = draw.clip(1, 4, 3, 2, 1, grad=True), draw(2, 4, 3, grad=True), draw(1, 3, 2, grad=True)
    w, b, scale, shift = draw(4, grad=True), draw(4, grad=True), draw(1, 4, grad=True), draw(1, 3, 4, grad=True)
    residual = draw.clip(1, 2, 3, 2, 1, grad=True)
    mean = draw(1, 3, 2, grad=True)
    rstd = (draw(1, 3, 2).square() + 0.5).requires_grad_()

    def run(*t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias, residual, mean, rstd, w, b, scale, shift = t
        norm = NormArgs(mean, rstd, w, b, 2, scale, shift, norm_act)
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
    check_operator(temporal_conv, *inputs, norm=norm._replace(act=None), residual=residual)
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
    "norm must be None or a NormArgs, got tuple": {"norm": tuple(norm_with())},
    "norm.mean must have shape": {"norm": norm_with(mean=torch.zeros(2, 2))},
    "norm.rstd must have shape": {"norm": norm_with(rstd=torch.ones(2, 3, 4))},
    "norm.weight must have shape": {"norm": norm_with(weight=torch.ones(2))},
    "norm.bias must have shape": {"norm": norm_with(bias=torch.ones(6))},
    "norm.scale must have shape": {"norm": norm_with(scale=torch.ones(2, 2, 4))},
    "norm.shift must have shape": {"norm": norm_with(shift=torch.ones(4))},
    "norm.act must be None or 'silu', got 'relu'": {"norm": norm_with(act="relu")},
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


# --- the CPU backend --------------------------------------------------------------------------------------------------

needs_core = pytest.mark.skipif(bool(native.why_not("avx2")), reason="; ".join(native.why_not("avx2")))

CPU_SHAPES = [
    *SHAPES,
    (1, 8, 24, 2, 3, 5, 3),  # two frames
    (1, 24, 320, 5, 1, 7, 3),  # minimal filtering, of an odd number of frames
    (1, 320, 8, 4, 1, 3, 3),
    (2, 40, 48, 4, 1, 53, 3),  # pieces of unequal size
    (1, 64, 64, 3, 4, 4, 1),
]
OPTIONS = {
    "plain": {},
    "bias of frames, silu": {"bias": 3, "act": "silu"},
    "norm, residual": {"bias": 1, "norm": True, "residual": True},
    "norm without silu": {"bias": 3, "norm": True, "norm_act": None, "film": True, "stats": True},
    "all": {"bias": 3, "act": "silu", "norm": True, "film": True, "residual": True, "stats": True},
}


def drawn_call(
    draw: Draw, shape: tuple[int, ...], name: str, padding_mode: str, memory_format: torch.memory_format
) -> tuple[tuple[Tensor, ...], dict[str, object]]:
    """Arguments of a call with some options; what may have a dtype of its own is fp32."""
    B, C_in, C_out, T, H, W, k = shape
    chosen = OPTIONS[name]
    single = Draw(1, torch.float32)
    x = draw.clip(B, C_in, T, H, W, memory_format=memory_format)
    weight = (draw(C_out, C_in, k) / math.sqrt(C_in * k)).to(x.dtype)
    bias = {None: None, 1: draw(C_out), 3: single(B, T, C_out)}[chosen.get("bias")]
    options: dict[str, object] = {"padding_mode": padding_mode, "act": chosen.get("act")}
    if chosen.get("norm"):
        groups = 1 if C_in % 2 else 2
        film = (draw(B, C_in), single(B, T, C_in)) if chosen.get("film") else (None, None)
        mean, rstd = single(B, T, groups), single(B, T, groups).square() + 0.5
        options["norm"] = NormArgs(
            mean, rstd, draw(C_in), single(C_in), groups, *film, act=chosen.get("norm_act", "silu")
        )
    if chosen.get("residual"):
        options["residual"] = draw.clip(B, C_out, T, H, W, memory_format=memory_format)
    if chosen.get("stats"):
        options["stats_groups"] = 1 if C_out % 2 else 2
    return (x, weight, *([] if bias is None else [bias])), options


def in_double(value: object) -> object:
    if isinstance(value, Tensor):
        return value.double()
    return NormArgs(*map(in_double, value)) if isinstance(value, NormArgs) else value


def results_on(backend: str, inputs: tuple[object, ...], options: dict[str, object]) -> list[Tensor]:
    result = temporal_conv(*inputs, **options, backend=backend)
    return [result] if isinstance(result, Tensor) else [result[0], *result[1]]


def assert_cpu_is_no_worse_than_torch(inputs: tuple[Tensor, ...], options: dict[str, object]) -> None:
    double = tuple(map(in_double, inputs)), {name: in_double(value) for name, value in options.items()}
    x, weight = inputs[:2]
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    out = torch.full(shape, math.nan, dtype=x.dtype)
    out = out.contiguous(memory_format=CHANNELS_LAST if in_format(x, CHANNELS_LAST) else CONTIGUOUS)
    ours = results_on("cpu", inputs, {**options, "out": out})
    theirs, exact = results_on("reference", inputs, options), results_on("reference", *double)
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert_no_worse_than_torch(mine, other, truth)


@needs_core
@pytest.mark.parametrize("memory_format", FORMATS, ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_cpu_is_no_worse_than_torch(name: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    for seed, shape in enumerate(CPU_SHAPES):
        for padding_mode in PADDING:
            assert_cpu_is_no_worse_than_torch(*drawn_call(Draw(seed, dtype), shape, name, padding_mode, memory_format))


@needs_core
@pytest.mark.parametrize("memory_format", FORMATS, ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("name", SLICES)
def test_cpu_takes_slices(name: str, memory_format: torch.memory_format) -> None:
    """Of x and the residual, into a strided `out`; nothing beside it is written."""
    draw = Draw(51, torch.float32)
    x, residual = (SLICES[name](draw.clip(3, 32, 5, 4, 6, memory_format=memory_format)) for _ in range(2))
    weight = draw(residual.shape[1], x.shape[1], 3)
    held = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan).contiguous(memory_format=memory_format)
    out = held[..., 1::2]
    y = temporal_conv(x, weight, residual=residual, backend="cpu", out=out)
    expected = temporal_conv(x, weight, residual=residual, backend="reference")
    torch.testing.assert_close(y, expected)
    assert held.isnan().sum() == held.numel() - out.numel()


@needs_core
@pytest.mark.parametrize("padding_mode", PADDING)
def test_minimal_filtering_keeps_the_identity(padding_mode: str) -> None:
    """It adds frames and takes them off again: exact where their sum is, and within a rounding elsewhere."""
    weight = torch.zeros(32, 32, 3)
    weight[:, :, 1] = torch.eye(32)
    whole = Draw(52).clip(1, 32, 6, 3, 3).mul(64).round().float()
    assert torch.equal(temporal_conv(whole, weight, padding_mode=padding_mode, backend="cpu"), whole)
    x = Draw(53, torch.float32).clip(1, 32, 6, 3, 3)
    y = temporal_conv(x, weight, padding_mode=padding_mode, backend="cpu")
    torch.testing.assert_close(y, x, rtol=0, atol=float(x.abs().max()) * 2**-23)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_core
def test_cpu_threads_change_nothing(threads: None) -> None:
    inputs, options = drawn_call(Draw(54, torch.float32), (2, 64, 96, 5, 17, 19, 3), "all", "zeros", CHANNELS_LAST)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(results_on("cpu", inputs, options))
    for others in found[1:]:
        assert all(torch.equal(ours, other) for ours, other in zip(found[0], others, strict=True))


@needs_core
@pytest.mark.parametrize("name", OPTIONS)
def test_cpu_writes_large_results_past_the_caches(name: str) -> None:
    inputs, options = drawn_call(Draw(57, torch.float32), (1, 8, 64, 4, 47, 47, 3), name, "zeros", CHANNELS_LAST)
    assert_cpu_is_no_worse_than_torch(inputs, options)


@needs_core
def test_cpu_statistics_do_not_cancel() -> None:
    draw = Draw(55, torch.float32)
    x, weight = draw.clip(1, 8, 3, 7, 7), draw(8, 8, 3)
    y, (mean, rstd) = temporal_conv(x, weight, torch.full((8,), 3e3), stats_groups=2, backend="cpu")
    exact = group_norm_stats(y.double(), 2)
    torch.testing.assert_close(mean.double(), exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), exact[1], rtol=1e-3, atol=0)


@needs_core
def test_cpu_silu_of_extreme_sums() -> None:
    x = torch.tensor([-math.inf, -1e30, -100.0, -88.5, -20.0, -1e-30, 0.0, 1e-30, 20.0, 88.5, 3e38, math.nan])
    expected = F.silu(x.double()).float()
    for backend in ("cpu", "reference"):
        y = temporal_conv(x.reshape(1, 1, 1, 1, -1), torch.ones(1, 1, 1), act="silu", backend=backend).flatten()
        torch.testing.assert_close(y[1:], expected[1:], rtol=1e-6, atol=1e-30, equal_nan=True)


@needs_core
@pytest.mark.parametrize(
    ("message", "changes"),
    {
        r"x must be \(B, C, T, H, W\)": {"x": torch.ones(4, 3, 2, 2)},
        r"weight must be float32 \(C_out, 4, k\), got float32 \(6, 5, 3\)": {"weight": torch.ones(6, 5, 3)},
        r"bias must have shape \(6,\) or \(1, 3, 6\), got \(1, 6\)": {"bias": torch.ones(1, 6)},
        "bias must be float32 like x or float32, got float64": {"bias": torch.ones(6).double()},
        r"residual must be float32 \(1, 6, 3, 2, 2\)": {"residual": torch.ones(1, 6, 3, 2, 1)},
        r"norm_rstd must have shape \(1, 3, 2\)": {"norm_mean": torch.ones(1, 3, 2), "norm_rstd": torch.ones(1, 2)},
        r"y must be float32 \(1, 6, 3, 2, 2\)": {"y": torch.ones(1, 6, 3, 2, 1)},
        r"mean must be float32 \(1, 3, 2\)": {"mean": torch.ones(1, 3, 3)},
        "rstd must be contiguous": {"rstd": torch.ones(1, 2, 3).mT},
        "norm_act must be None or 'silu', got 'relu'": {
            "norm_mean": (ones := torch.ones(1, 3, 2)),
            "norm_rstd": ones,
            "norm_act": "relu",
        },
        "the output, or the memory to work in, lies in the memory of another tensor": {
            "y": (whole := torch.ones(1, 6, 3, 2, 2)),
            "residual": whole,
        },
    }.items(),
)
def test_native_says_what_does_not_fit(message: str, changes: dict[str, Tensor]) -> None:
    arguments = {"x": torch.ones(1, 4, 3, 2, 2), "weight": torch.ones(6, 4, 3), "bias": None, "padding_mode": "zeros"}
    arguments |= {"act": None, "residual": None, "stats_groups": 2}
    results = {"y": torch.ones(1, 6, 3, 2, 2), "mean": torch.ones(1, 3, 2), "rstd": torch.ones(1, 3, 2)}
    out = tuple({**results, **changes}[name] for name in results)
    given = {**arguments, **{name: value for name, value in changes.items() if name not in results}}
    with pytest.raises(ValueError, match=message):
        native.temporal_conv(**given, out=out)


@needs_core
def test_cpu_is_chosen_and_captured() -> None:
    draw = Draw(56, torch.float32)
    x, residual = draw.clip(2, 32, 4, 2, 2), draw.clip(2, 16, 4, 2, 2)
    inputs, norm = (
        (x, draw(16, 32, 3), draw(16)),
        NormArgs(draw(2, 4, 2), draw(2, 4, 2), draw(32), None, 2, draw(2, 32)),
    )
    with dispatch.record_backends() as used:
        check_compiled(temporal_conv, *inputs, norm=norm, residual=residual, stats_groups=2)
    assert used == {"cpu"}
    check_operator(temporal_conv, *inputs, backend="cpu", norm=norm, residual=residual, stats_groups=2)
    check_out(temporal_conv, *inputs, norm=norm, residual=residual, backend="cpu")
    with dispatch.record_backends() as used:
        temporal_conv(x.double(), inputs[1].double())
        temporal_conv(x, inputs[1].clone().requires_grad_())
    assert used == {"reference"}


@needs_core
@pytest.mark.parametrize("switch", ["LUMIERE_FAST_NO_AVX512", "LUMIERE_FAST_PORTABLE"])
def test_cpu_code_for_older_processors(switch: str) -> None:
    """The tests above where newer instructions may not be used; without AVX2 the reference is chosen instead."""
    if switch == "LUMIERE_FAST_PORTABLE":
        probe = "import torch; from lumiere_fast import dispatch, ops; " + (
            "print(dispatch.why_not('temporal_conv', 'cpu', torch.ones(1, 2, 3, 1, 1), torch.ones(2, 2, 3)))"
        )
        command = [sys.executable, "-c", probe]
    else:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "no_worse"]
    done = subprocess.run(command, env={**os.environ, switch: "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("has no AVX2" if switch == "LUMIERE_FAST_PORTABLE" else "passed") in done.stdout


# Every backend, on its device ----------------------------------------------------------------------------------------


def random_call(case: int, dtype: torch.dtype, device: str, grad: bool = False) -> dict[str, Any]:
    """A call of `temporal_conv`, its options drawn by `case`: sizes, layouts, padding, norm, bias, residual."""
    random, draw = np.random.default_rng(case), Draw(case)
    B, T, H, W, groups = (int(n) for n in random.integers((1, 1, 1, 1, 1), (3, 9, 8, 12, 4)))
    c_in, c_out = (groups * int(random.choice([1, 3, 8, 24])) for _ in range(2))
    taps = int(random.choice([1, 3, 5]))

    def tensor(*shape: int, wide: bool = False) -> Tensor:
        kind = accumulation_dtype(dtype) if wide else dtype
        return draw(*shape).to(device, kind).requires_grad_(grad)

    def clip(channels: int) -> Tensor:
        return in_layout(draw(B, channels, T, H, W).to(device, dtype), int(random.integers(4))).requires_grad_(grad)

    call: dict[str, Any] = {"x": clip(c_in), "weight": tensor(c_out, c_in, taps)}
    call["padding_mode"] = str(random.choice(["zeros", "replicate"]))
    call["act"] = "silu" if random.integers(2) else None
    if random.integers(3):
        call["bias"] = tensor(c_out) if random.integers(2) else tensor(B, T, c_out, wide=True)
    if random.integers(2):
        call["residual"] = clip(c_out)
    if random.integers(2):
        call["stats_groups"] = groups
    if random.integers(2):
        film = (B, c_in) if random.integers(2) else (B, T, c_in)
        mean, rstd = tensor(B, T, groups, wide=True), tensor(B, T, groups, wide=True)
        affine = (tensor(c_in), tensor(c_in), groups, tensor(*film), tensor(*film))
        call["norm"] = NormArgs(mean, rstd, *affine, "silu" if random.integers(2) else None)
    return call


def doubled(call: dict[str, Any]) -> dict[str, Any]:
    def double(value: Any) -> Any:
        if isinstance(value, NormArgs):
            return NormArgs(*map(double, value))
        return value.detach().double().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    return {name: double(value) for name, value in call.items()}


def leaves_of(call: dict[str, Any]) -> list[Tensor]:
    values = [each for value in call.values() for each in (value if isinstance(value, NormArgs) else (value,))]
    return [each for each in values if isinstance(each, Tensor)]


KERNELS = ("cpu", "triton")
KERNEL_DTYPES = (torch.float32, *HALF_DTYPES)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_every_backend_is_the_reference_on_its_device(backend: str, dtype: torch.dtype) -> None:
    device = device_of(backend)
    for case in range(24):
        call = random_call(case, dtype, device)
        ours, theirs = (flatten(temporal_conv(**call, backend=each)) for each in (backend, "reference"))
        exact = flatten(temporal_conv(**doubled(call), backend="reference"))
        for mine, other, truth in zip(ours, theirs, exact, strict=True):
            assert steps(mine) == steps(other) and mine.dtype == other.dtype
            assert_no_worse_than_torch(mine, other, truth, rounded=dtype)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_gradients_of_the_gpu_s_backend_are_the_reference_s(dtype: torch.dtype) -> None:
    backend, device = "triton", device_of("triton")
    for case in range(12):
        call = random_call(case, dtype, device, grad=True)
        if call.get("stats_groups"):  # else the variance of one value may be as good as 0
            call["x"] = call["x"].detach().mul(3).requires_grad_()
        seeds = [Draw(100 + case)(*each.shape) for each in flatten(temporal_conv(**doubled(call), backend="reference"))]

        def gradients(call: dict[str, Any], backend: str, seeds: list[Tensor] = seeds) -> list[Tensor]:
            results = flatten(temporal_conv(**call, backend=backend))
            given = [seed.to(each) for seed, each in zip(seeds, results, strict=True)]
            return list(torch.autograd.grad(results, leaves_of(call), given))

        ours, theirs = gradients(call, backend), gradients(call, "reference")
        exact = gradients(doubled(call), "reference")
        for mine, other, truth in zip(ours, theirs, exact, strict=True):
            assert_no_worse_than_torch(mine, other, truth, factor=3.0, rounded=dtype, roundings=4)


@pytest.mark.skipif(bool(native.why_not("avx2")), reason="of the native core")
@pytest.mark.parametrize(("channels", "ran"), [((16, 16), "cpu"), ((8, 16), "reference"), ((16, 3), "reference")])
def test_auto_leaves_few_channels_to_torch(channels: tuple[int, int], ran: str) -> None:
    with dispatch.record_backends() as used:
        temporal_conv(torch.zeros(1, channels[0], 2, 3, 3), torch.zeros(channels[1], channels[0], 3))
    assert used == {ran}
