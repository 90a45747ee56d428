from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from lumiere_fast import dispatch
from lumiere_fast.ops import temporal_attention
from lumiere_fast.ops.temporal_attention import SPEC
from tests.ops.common import (
    HALF_DTYPES,
    Draw,
    assert_no_worse_than_torch,
    check_operator,
    check_operator_gradient,
    check_out,
    device_of,
)

SHAPES = [
    (2, 5, 2, 3, 2, 8),  # B, T, H, W, heads, D
    (1, 1, 1, 7, 3, 5),
    (3, 2, 1, 1, 1, 1),
    (1, 16, 2, 2, 2, 6),
    (0, 4, 2, 2, 2, 4),
]


def rearrange_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """The textbook way: pixels into the batch, then torch's attention over T."""
    B, T, H, W, heads, D = q.shape
    folded = (t.permute(0, 2, 3, 4, 1, 5).reshape(B * H * W, heads, T, D).contiguous() for t in (q, k, v))
    y = F.scaled_dot_product_attention(*folded, attn_mask=mask, scale=scale)
    return y.reshape(B, H, W, heads, T, D).permute(0, 4, 1, 2, 3, 5)


def by_loops(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, window: int | None) -> Tensor:
    """The formula, one number at a time, for one pixel: q, k, v (T, heads, D)."""
    T, heads, D = q.shape
    y = torch.zeros_like(q)
    for n in range(heads):
        for t in range(T):
            seen = [s for s in range(T) if not (causal and s > t) and not (window is not None and abs(t - s) > window)]
            scores = [float(q[t, n] @ k[s, n]) / math.sqrt(D) for s in seen]
            if bias is not None:
                scores = [a + float(bias[n, t - s + T - 1]) for a, s in zip(scores, seen, strict=True)]
            powers = [math.exp(a) for a in scores]
            for p, s in zip(powers, seen, strict=True):
                y[t, n] += p / sum(powers) * v[s, n]
    return y


def draw_qkv(draw: Draw, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one fused projection (B, T, H, W, 3, heads, D)."""
    q, k, v = draw(*shape[:4], 3, *shape[4:]).unbind(4)
    return q, k, v


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_torchs_attention_of_each_pixel(shape: tuple[int, ...]) -> None:
    q, k, v = draw_qkv(Draw(1), shape)
    y = temporal_attention(q, k, v)
    torch.testing.assert_close(y, rearrange_sdpa(q, k, v))
    assert y.is_contiguous()
    torch.testing.assert_close(temporal_attention(q, k, v, scale=0.3), rearrange_sdpa(q, k, v, scale=0.3))


@pytest.mark.parametrize("window", [None, 0, 1, 3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_formula(biased: bool, causal: bool, window: int | None) -> None:
    draw = Draw(2)
    q, k, v = draw_qkv(draw, (2, 5, 1, 2, 2, 3))
    bias = draw(2, 9) if biased else None
    y = temporal_attention(q, k, v, bias=bias, causal=causal, window=window)
    for b, w in [(0, 1), (1, 0)]:
        expected = by_loops(q[b, :, 0, w], k[b, :, 0, w], v[b, :, 0, w], bias, causal, window)
        torch.testing.assert_close(y[b, :, 0, w], expected)


def test_bias_is_indexed_by_the_lag_to_the_key() -> None:
    """Equal scores, and a bias that lets each frame see only the frame before it."""
    T = 4
    bias = torch.full((1, 2 * T - 1), -1e9, dtype=torch.float64)
    bias[0, T - 1 + 1] = 0.0  # t - s = 1
    v = torch.arange(1.0, T + 1, dtype=torch.float64).reshape(1, T, 1, 1, 1, 1)
    y = temporal_attention(torch.zeros_like(v), torch.zeros_like(v), v, bias=bias)
    assert y.flatten().tolist()[1:] == [1.0, 2.0, 3.0]


def test_rows_that_see_nothing_are_zero_and_pass_no_gradient() -> None:
    draw = Draw(3)
    q, k, v = (draw(1, 3, 1, 2, 2, 4, grad=True) for _ in range(3))
    bias = draw(2, 5)
    bias[0] = float("-inf")
    bias.requires_grad_()
    y = temporal_attention(q, k, v, bias=bias)
    assert (y[..., 0, :] == 0).all() and (y[..., 1, :] != 0).all()
    gradients = torch.autograd.grad(y.square().sum(), (q, k, v, bias))
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[2][..., 0, :] == 0).all() and (gradients[2][..., 1, :] != 0).any()


STRIDED = {
    "each its own layout": lambda draw: (
        draw(2, 3, 2, 2, 2, 4),
        draw(2, 2, 2, 2, 3, 4).permute(0, 4, 1, 2, 3, 5),
        draw(3, 2, 2, 2, 2, 4).transpose(0, 1),
    ),
    "slices": lambda draw: (draw(2, 6, 4, 4, 4, 8)[:, ::2, 1:3, :2, 1:3, 2:6],) * 3,
    "D not dense": lambda draw: (draw(2, 3, 2, 2, 4, 2).transpose(4, 5),) * 3,
    "one frame for all": lambda draw: (draw(2, 1, 2, 2, 2, 4).expand(2, 3, 2, 2, 2, 4), *[draw(2, 3, 2, 2, 2, 4)] * 2),
}


@pytest.mark.parametrize("name", STRIDED)
def test_any_strides(name: str) -> None:
    q, k, v = STRIDED[name](Draw(4))
    y = temporal_attention(q, k, v)
    torch.testing.assert_close(y, rearrange_sdpa(q, k, v))
    assert y.is_contiguous() and y.flatten(-2).data_ptr() == y.data_ptr()


@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal: bool) -> None:
    draw = Draw(6)
    q, k, v = (draw(1, 3, 1, 2, 2, 3, grad=True) for _ in range(3))

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return temporal_attention(q, k, v, bias=bias, causal=causal, window=1)

    assert torch.autograd.gradcheck(run, (q, k, v, draw(2, 5, grad=True)))
    assert torch.autograd.gradcheck(temporal_attention, (q, k, v))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    q, k, v = draw_qkv(Draw(7, dtype), (2, 6, 3, 3, 2, 16))
    y = temporal_attention(q, k, v)
    exact = rearrange_sdpa(*(t.double() for t in (q, k, v)))
    assert y.dtype == dtype
    assert_no_worse_than_torch(y, rearrange_sdpa(q, k, v), exact, factor=1.0)


def test_out() -> None:
    check_out(temporal_attention, *draw_qkv(Draw(8), (2, 3, 2, 2, 2, 4)), causal=True)


@pytest.mark.parametrize("needs", [(), ("q",), ("k", "v"), ("bias",)], ids=str)
def test_operator(needs: tuple[str, ...]) -> None:
    draw = Draw(9)
    q, k, v = (draw(2, 3, 2, 2, 2, 4, grad=name in needs) for name in "qkv")
    options = {"bias": draw(2, 5, grad="bias" in needs), "window": 2}
    check_operator(temporal_attention, q, k, v, **options)
    if needs:
        check_operator_gradient(temporal_attention, q, k, v, **options)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(0, 2),
    frames=st.integers(1, 5),
    height=st.integers(1, 3),
    width=st.integers(1, 3),
    heads=st.integers(1, 3),
    dim=st.integers(1, 5),
    causal=st.booleans(),
    window=st.none() | st.integers(0, 5),
    seed=st.integers(0, 999),
)
def test_every_small_shape(
    batch: int, frames: int, height: int, width: int, heads: int, dim: int, causal: bool, window: int | None, seed: int
) -> None:
    draw = Draw(seed)
    q, k, v = draw_qkv(draw, (batch, frames, height, width, heads, dim))
    bias = draw(heads, 2 * frames - 1)
    table = torch.stack([bias[:, frames - 1 + t - torch.arange(frames)] for t in range(frames)], dim=1)
    visible = torch.tensor(
        [
            [(s <= t or not causal) and (window is None or abs(t - s) <= window) for s in range(frames)]
            for t in range(frames)
        ]
    )
    y = temporal_attention(q, k, v, bias=bias, causal=causal, window=window)
    torch.testing.assert_close(y, rearrange_sdpa(q, k, v, table.masked_fill(~visible, float("-inf"))))
    assert y.is_contiguous()


BAD_CALLS: dict[str, dict[str, Any]] = {
    r"q must be \(B, T, H, W, heads, D\) .*, got \(2, 3, 4, 2, 4\)": {"q": torch.zeros(2, 3, 4, 2, 4)},
    "q must be a tensor, got list": {"q": [0.0]},
    "q must be float": {"q": torch.zeros(2, 3, 2, 2, 2, 4, dtype=torch.int32)},
    r"k must have the shape of q, \(2, 3, 2, 2, 2, 4\), got \(2, 4, 2, 2, 2, 4\)": {"k": torch.zeros(2, 4, 2, 2, 2, 4)},
    "v must be torch.float32 like q, got torch.float64": {"v": torch.zeros(2, 3, 2, 2, 2, 4, dtype=torch.float64)},
    "v must be on cpu": {"v": torch.zeros(2, 3, 2, 2, 2, 4, device="meta")},
    r"bias must have shape \(2, 5\), got \(2, 3\)": {"bias": torch.zeros(2, 3)},
    "bias must be a tensor, got float": {"bias": 0.5},
    "bias must be float16, bfloat16": {"bias": torch.zeros(2, 5, dtype=torch.int64)},
    "bias must be torch.float32 like q, got torch.float64": {"bias": torch.zeros(2, 5).double()},
    "bias must be on cpu": {"bias": torch.zeros(2, 5, device="meta")},
    r"rotary must have shape \(3, 2, 2\), got \(3, 4\)": {"rotary": torch.zeros(3, 4)},
    "rotary must be torch.float32 beside q in torch.float32, got torch.float16": {
        "rotary": torch.zeros(3, 2, 2).half()
    },
    "rotary must be a tensor, got int": {"rotary": 3},
    "rotary turns pairs of channels, so D must be even, got 3": {
        **{name: torch.zeros(2, 3, 2, 2, 2, 3) for name in "qkv"},
        "rotary": torch.zeros(3, 1, 2),
    },
    "causal must be True or False, got 'yes'": {"causal": "yes"},
    "causal must be True or False, got None": {"causal": None},
    "causal must be True or False, got tensor": {"causal": torch.tensor(True)},
    "window must be None or >= 0 frames, got -1": {"window": -1},
    "window takes integers, got True": {"window": True},
    "window takes integers, got 2.0": {"window": 2.0},
    "window takes integers, got '2'": {"window": "2"},
    "scale must be None or a finite number, got nan": {"scale": math.nan},
    "scale must be None or a finite number, got inf": {"scale": math.inf},
    "scale must be None or a finite number, got '1'": {"scale": "1"},
    "scale must be None or a finite number, got True": {"scale": True},
    "scale must be None or a finite number, got tensor": {"scale": torch.tensor(0.5)},
    "out must be": {"out": torch.zeros(2, 3, 2, 2, 8)},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments_are_named(message: str) -> None:
    call: dict[str, Any] = {name: torch.zeros(2, 3, 2, 2, 2, 4) for name in "qkv"}
    with pytest.raises(ValueError, match=f"temporal_attention: {message}"):
        temporal_attention(**{**call, **BAD_CALLS[message]})


def test_numpy_s_numbers_are_numbers() -> None:
    q, k, v = draw_qkv(Draw(22), (1, 4, 1, 2, 1, 4))
    y = temporal_attention(q, k, v, causal=np.True_, window=np.int64(1), scale=np.float32(0.5))
    assert torch.equal(y, temporal_attention(q, k, v, causal=True, window=1, scale=0.5))
    flat = dispatch.registered("temporal_attention").bind(q, k, v, causal=np.True_, window=np.int64(1), scale=1)
    assert [type(each) for each in flat[5:]] == [bool, int, float]  # what an operator's schema takes


def test_spec_inputs_are_what_the_op_takes() -> None:
    generator = torch.Generator().manual_seed(0)
    for scenario in (*SPEC.scenarios, *SPEC.checks):
        if scenario.cpu or scenario in SPEC.checks:
            inputs = SPEC.make_inputs(scenario, "cpu", torch.float32, generator)
            assert temporal_attention(**inputs).shape == inputs["q"].shape
    base = next(s for s in SPEC.scenarios if s.name == "base3")
    assert SPEC.flops(base) == 4 * 10 * 10 * 16 * 16 * 1024


def test_rotary_makes_scores_depend_on_the_lag() -> None:
    draw = Draw(21)
    T, D = 6, 8
    q, k, v = draw_qkv(draw, (1, T, 1, 3, 2, D))
    angles = torch.arange(T)[:, None] * torch.tensor([1.0, 0.5, 0.1, 0.03], dtype=q.dtype)
    rotary = torch.stack([angles.cos(), angles.sin()], -1)
    y = temporal_attention(q, k, v, rotary=rotary)
    paired = [torch.view_as_complex(a.unflatten(-1, (-1, 2)).contiguous()) for a in (q, k)]
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None, None, None]
    turned = [torch.view_as_real(a * turn).flatten(-2) for a in paired]
    torch.testing.assert_close(y, rearrange_sdpa(*turned, v))
    shifted = torch.stack([(angles + 0.7).cos(), (angles + 0.7).sin()], -1)
    torch.testing.assert_close(y, temporal_attention(q, k, v, rotary=shifted))


# Every backend, on its device ----------------------------------------------------------------------------------------

OP = "temporal_attention"
BACKENDS = ("reference", "cpu", "triton")
EVERY_DTYPE = (torch.float32, torch.float64, *HALF_DTYPES)
Call = dict[str, Any]

# Positions and masks: (bias, rotary, causal, window, scale)
WAYS: dict[str, tuple[bool, bool, bool, int | None, float | None]] = {
    "plain": (False, False, False, None, None),
    "bias": (True, False, False, None, None),
    "rotary": (False, True, False, None, None),
    "causal": (False, False, True, None, None),
    "window": (False, False, False, 3, None),
    "all": (True, True, True, 20, 0.3),
}


def device_for(backend: str, dtype: torch.dtype = torch.float32) -> str:
    """Where it runs; the test is skipped where it cannot, for reasons that no call changes."""
    if backend == "reference":
        return "cpu"
    if backend not in dispatch.registered(OP).backends:
        pytest.skip(f"{OP} has no {backend} kernel")
    device = device_of(backend)
    q = torch.zeros(1, 2, 1, 1, 1, 8, dtype=dtype, device=device)
    if reasons := dispatch.why_not(OP, backend, q, q, q):
        pytest.skip("; ".join(reasons))
    return device


def draw_call(
    seed: int, shape: tuple[int, ...], way: str = "plain", dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Call:
    """q, k, v are views of one fused projection."""
    draw, (biased, turned, causal, window, scale) = Draw(seed, dtype), WAYS[way]
    T, heads, D = shape[1], *shape[4:]
    q, k, v = draw(*shape[:4], 3, heads, D).to(device).unbind(4)
    call: Call = {"q": q, "k": k, "v": v, "causal": causal, "window": window, "scale": scale}
    if biased:
        call["bias"] = draw(heads, 2 * T - 1).to(device)
    if turned and D % 2 == 0:
        angles = torch.arange(T)[:, None] * torch.linspace(1, 0.01, D // 2, dtype=torch.float64)
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        call["rotary"] = torch.stack([angles.cos(), angles.sin()], -1).to(device, precise)
    return call


def in_dtype(call: Call, dtype: torch.dtype) -> Call:
    return {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in call.items()}


def textbook(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    rotary: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """torch's attention of pixels in the batch, rotated as complex numbers, by a table of what each frame sees."""
    T = q.shape[1]
    if rotary is not None:
        turn = torch.view_as_complex(rotary)[:, None, None, None]
        q, k = (torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn) for x in (q, k))
        q, k = q.flatten(-2), k.flatten(-2)
    rows = [[(s <= t or not causal) and (window is None or abs(t - s) <= window) for s in range(T)] for t in range(T)]
    hidden = ~torch.tensor(rows, device=q.device)
    bias = q.new_zeros(q.shape[4], 2 * T - 1) if bias is None else bias
    table = torch.stack([bias[:, t : t + T].flip(1) for t in range(T)], dim=1).masked_fill(hidden, float("-inf"))
    return rearrange_sdpa(q, k, v, table, scale)


def check_call(backend: str, call: Call) -> None:
    """No worse than the textbook computed in fp32, or in the dtype where that is wider, and rounded once."""
    dtype = call["q"].dtype
    ours = temporal_attention(**call, backend=backend)
    theirs = textbook(**in_dtype(call, torch.promote_types(dtype, torch.float32))).to(dtype)
    assert ours.dtype == dtype and ours.is_contiguous() and ours.shape == call["q"].shape
    assert_no_worse_than_torch(ours, theirs, textbook(**in_dtype(call, torch.float64)))


@pytest.mark.parametrize("T", [1, 2, 5, 16, 17, 64, 80, 100, 129])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths(backend: str, T: int) -> None:
    device = device_for(backend)
    for seed, way in enumerate(WAYS):
        check_call(backend, draw_call(seed, (2, T, 1, 7, 2, 16), way, device=device))


@pytest.mark.parametrize("D", [1, 2, 5, 24, 32, 40, 64, 80, 96, 128])
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_dims(backend: str, D: int) -> None:
    device = device_for(backend)
    for seed, way in enumerate(WAYS):
        check_call(backend, draw_call(seed, (1, 6, 1, 5, 3, D), way, device=device))


@pytest.mark.parametrize("pixels", [(1, 1), (1, 2), (1, 13), (101, 1), (7, 31), (1, 521)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pixel_counts(backend: str, pixels: tuple[int, int]) -> None:
    device = device_for(backend)
    for seed, way in enumerate(("plain", "all")):
        check_call(backend, draw_call(seed, (3, 5, *pixels, 1, 8), way, device=device))


@pytest.mark.parametrize("pixels", [65535, 65536, 65537])
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_pixels(backend: str, pixels: int) -> None:
    """torch's fused kernels on a GPU stop at 65535 sequences."""
    device = device_for(backend)
    call = draw_call(5, (1, 2, 1, pixels, 1, 4), "bias", device=device)
    ours = temporal_attention(**call, backend=backend)
    torch.testing.assert_close(ours, textbook(**in_dtype(call, torch.float64)).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    device = device_for(backend, dtype)
    for seed, way in enumerate(WAYS):
        for T, D in ((16, 32), (7, 40), (80, 64)):
            check_call(backend, draw_call(seed, (1, T, 2, 3, 2, D), way, dtype, device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_kept_in_full_precision(backend: str) -> None:
    device = device_for(backend, torch.bfloat16)
    call = draw_call(1, (1, 5, 2, 3, 2, 16), "all", torch.bfloat16, device)
    rounded = temporal_attention(**call, backend=backend)
    assert torch.equal(temporal_attention(**{**call, "bias": call["bias"].float()}, backend=backend), rounded)


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_on_every_backend(backend: str, name: str) -> None:
    device = device_for(backend)
    q, k, v = (x.to(device) for x in STRIDED[name](Draw(4, torch.float32)))
    for way in ("plain", "all"):
        call = {**draw_call(3, tuple(q.shape), way, device=device), "q": q, "k": k, "v": v}
        if name == "D not dense" and (reasons := dispatch.why_not(OP, backend, **call)):
            assert all("stride" in reason for reason in reasons)
            continue
        check_call(backend, call)


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_of_any_strides(backend: str) -> None:
    device = device_for(backend)
    call = draw_call(8, (2, 5, 2, 3, 2, 8), "all", device=device)
    expected = temporal_attention(**call, backend=backend)
    wide = torch.full((2, 5, 2, 6, 2, 16), math.nan, device=device)
    frames_last = torch.full((2, 2, 3, 2, 8, 5), math.nan, device=device).permute(0, 5, 1, 2, 3, 4)
    for out in (torch.full_like(expected, math.nan), wide[:, :, :, ::2, :, 4:12], frames_last):
        assert temporal_attention(**call, backend=backend, out=out) is out
        torch.testing.assert_close(out, expected)
    assert wide.isnan().sum() == wide.numel() - expected.numel()  # nothing beside is written


@pytest.mark.parametrize("T", [3, 17, 80, 130])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing_on_every_backend(backend: str, T: int) -> None:
    """Zero, with gradients of zero, whether a head or some of its frames see nothing, and never NaN."""
    device = device_for(backend)
    call = draw_call(3, (1, T, 1, 3, 2, 8), "bias", device=device)
    call["bias"][0] = -math.inf
    call["bias"][1, T - 1 :] = -math.inf  # no frame sees itself or the past: the last sees nothing
    leaves = {name: call[name].detach().requires_grad_() for name in ("q", "k", "v", "bias")}
    y = temporal_attention(**{**call, **leaves}, backend=backend)
    assert (y[..., 0, :] == 0).all() and (y[:, -1] == 0).all() and (y[:, :-1, ..., 1, :] != 0).all()
    gradients = dict(zip(leaves, torch.autograd.grad(y.square().sum(), list(leaves.values())), strict=True))
    assert all(each.isfinite().all() for each in gradients.values())
    for name in ("q", "k", "v"):
        assert (gradients[name][..., 0, :] == 0).all()
    assert (gradients["q"][:, -1] == 0).all() and (gradients["v"][:, 1:, ..., 1, :] != 0).any()
    assert (gradients["bias"][0] == 0).all() and (gradients["bias"][1, T - 1 :] == 0).all()
    causal = temporal_attention(**{**call, "causal": True}, backend=backend)  # and with the mask, nobody anything
    assert (causal == 0).all()


@pytest.mark.parametrize("T", [3, 80])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_that_is_finite_leaves_no_frame_out(backend: str, T: int) -> None:
    """The least of fp32, with which masks are often made: a row that has nothing else is its frames' mean."""
    call = draw_call(5, (1, T, 1, 3, 2, 8), "bias", device=device_for(backend))
    call["bias"].fill_(torch.finfo(torch.float32).min)
    mean = call["v"].mean(1, keepdim=True).expand_as(call["v"])
    torch.testing.assert_close(temporal_attention(**call, backend=backend), mean)


@pytest.mark.parametrize("T", [3, 80])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing_are_zero_whatever_the_values(backend: str, T: int) -> None:
    call = draw_call(6, (1, T, 1, 3, 2, 8), "bias", device=device_for(backend))
    call["bias"].fill_(-math.inf)
    call["v"] = call["v"].clone().fill_(math.nan)
    assert (temporal_attention(**call, backend=backend) == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_pixel_breaks_no_other(backend: str, value: float) -> None:
    device = device_for(backend)
    for T in (1, 5, 16, 80):
        call = draw_call(4, (2, T, 1, 11, 2, 16), "all", device=device)
        leaves = {name: call[name].clone() for name in ("q", "k", "v")}
        expected = temporal_attention(**{**call, **leaves}, backend=backend)
        for each in leaves.values():
            each[1, T // 2, 0, 4, 1] = value
            each.requires_grad_()
        y = temporal_attention(**{**call, **leaves}, backend=backend)
        whole = torch.ones(2, 11, 2, dtype=torch.bool, device=device)
        whole[1, 4, 1] = False
        rows = y.permute(0, 2, 3, 4, 1, 5)[:, 0]
        assert torch.equal(rows[whole], expected.permute(0, 2, 3, 4, 1, 5)[:, 0][whole])
        assert not rows[~whole].isfinite().all()
        for gradient in torch.autograd.grad(y.sum(), list(leaves.values())):
            assert gradient.permute(0, 2, 3, 4, 1, 5)[:, 0][whole].isfinite().all()


def gradients_of(call: Call, wanted: tuple[str, ...], backend: str | None, above: Tensor) -> list[Tensor]:
    """By a backend, or of the textbook."""
    leaves = {name: call[name].detach().requires_grad_() for name in wanted}
    run = textbook if backend is None else lambda **call: temporal_attention(**call, backend=backend)
    y = run(**{**call, **leaves})
    return list(torch.autograd.grad(y, list(leaves.values()), above.to(y)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_on_every_backend(backend: str, way: str, dtype: torch.dtype) -> None:
    device = device_for(backend, dtype)
    for seed, (T, D) in enumerate(((1, 8), (5, 40), (16, 32), (80, 16), (130, 8))):
        shape = (2, T, 1, 3, 2, D)
        call, above = draw_call(seed, shape, way, dtype, device), Draw(100 + seed)(*shape)
        wanted = tuple(name for name in ("q", "k", "v", "bias") if name in call)
        precise = torch.promote_types(dtype, torch.float32)
        ours = gradients_of(call, wanted, backend, above)
        theirs = [each.to(dtype) for each in gradients_of(in_dtype(call, precise), wanted, None, above)]
        exact = gradients_of(in_dtype(call, torch.float64), wanted, None, above)
        for mine, other, truth in zip(ours, theirs, exact, strict=True):
            assert mine.dtype == dtype
            assert_no_worse_than_torch(mine, other, truth, factor=3.0, roundings=4)


@pytest.mark.parametrize("wanted", [("q",), ("k",), ("v",), ("bias",), ("q", "v"), ("k", "bias")], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_some(backend: str, wanted: tuple[str, ...]) -> None:
    device = device_for(backend)
    call, above = draw_call(7, (1, 6, 1, 4, 2, 8), "all", device=device), Draw(107)(1, 6, 1, 4, 2, 8)
    exact = gradients_of(in_dtype(call, torch.float64), wanted, None, above)
    for mine, truth in zip(gradients_of(call, wanted, backend, above), exact, strict=True):
        torch.testing.assert_close(mine, truth.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_from_above_of_any_strides(backend: str) -> None:
    device = device_for(backend)
    call = draw_call(9, (2, 5, 1, 4, 2, 8), "bias", device=device)
    for above in (torch.ones(1).expand(2, 5, 1, 4, 2, 8), Draw(109)(2, 2, 1, 4, 5, 8).transpose(1, 4)):
        exact = gradients_of(in_dtype(call, torch.float64), ("q", "k", "v", "bias"), None, above)
        ours = gradients_of(call, ("q", "k", "v", "bias"), backend, above.to(device))
        for mine, truth in zip(ours, exact, strict=True):
            torch.testing.assert_close(mine, truth.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_the_same_each_time(backend: str) -> None:
    """Gradients too: of the bias, which every pixel adds to."""
    device = device_for(backend)
    call, above = draw_call(11, (2, 16, 5, 13, 2, 16), "all", device=device), Draw(111)(2, 16, 5, 13, 2, 16)
    for run in (
        lambda: [temporal_attention(**call, backend=backend)],
        lambda: gradients_of(call, ("q", "k", "v", "bias"), backend, above),
    ):
        assert all(map(torch.equal, run(), run()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_are_the_textbook_s(backend: str) -> None:
    device = device_for(backend)
    call = draw_call(12, (1, 4, 1, 3, 2, 8), "all", device=device)

    def penalised(run: Any, call: Call) -> list[Tensor]:
        leaves = {name: call[name].detach().requires_grad_() for name in ("q", "v", "bias")}
        y = run(**{**call, **leaves, "q": 1.5 * leaves["q"]})
        (slope,) = torch.autograd.grad(y.square().sum(), leaves["q"], create_graph=True)
        return list(torch.autograd.grad(slope.square().sum(), list(leaves.values())))

    ours = penalised(lambda **call: temporal_attention(**call, backend=backend), call)
    for mine, truth in zip(ours, penalised(textbook, in_dtype(call, torch.float64)), strict=True):
        torch.testing.assert_close(mine, truth.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend: str) -> None:
    device = device_for(backend)
    call = draw_call(13, (0, 4, 2, 2, 2, 8), "all", device=device)
    bias = call["bias"].requires_grad_()
    y = temporal_attention(**{**call, "q": call["q"].requires_grad_()}, backend=backend)
    assert y.shape == call["q"].shape
    of_q, of_bias = torch.autograd.grad(y.sum(), (call["q"], bias))
    assert of_q.shape == y.shape and (of_bias == 0).all()


def test_rotary_is_a_constant() -> None:
    call = draw_call(14, (1, 4, 1, 3, 2, 8), "rotary")
    rotary = call["rotary"].requires_grad_()
    assert not temporal_attention(**call).requires_grad
    y = temporal_attention(**{**call, "q": call["q"].clone().requires_grad_()})
    y.sum().backward()
    assert rotary.grad is None
    held = torch.empty_like(y, requires_grad=False)
    assert temporal_attention(**call, out=held) is held


# --- captured, watched, transformed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_operator_of_every_backend(backend: str) -> None:
    device = device_for(backend)
    call = draw_call(15, (2, 4, 1, 3, 2, 8), "all", device=device)
    check_operator(temporal_attention, **call, backend=backend)
    for wanted in (("q", "k", "v", "bias"), ("q",), ("k", "v"), ("bias",)):
        leaves = {name: call[name].detach().requires_grad_() for name in wanted}
        check_operator_gradient(temporal_attention, **{**call, **leaves}, backend=backend)
    check_operator(temporal_attention, **{**call, "q": call["q"].detach().requires_grad_()}, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_on_every_backend(backend: str) -> None:
    """One graph forward and backward, with the number of frames a symbol the second time."""
    device = device_for(backend)
    torch.compiler.reset()  # of what earlier tests compiled of the same function
    run = torch.compile(temporal_attention, fullgraph=True, backend="aot_eager")
    for T in (3, 6):
        call = draw_call(16, (2, T, 1, 3, 2, 8), "all", device=device)
        leaves = {name: call[name].detach().requires_grad_() for name in ("q", "k", "v", "bias")}
        y, expected = (each(**{**call, **leaves}, backend=backend) for each in (run, temporal_attention))
        assert y.stride() == expected.stride()
        torch.testing.assert_close(y, expected)
        above = Draw(116, torch.float32)(*y.shape).to(device)
        found, eager = (torch.autograd.grad(each, list(leaves.values()), above) for each in (y, expected))
        torch.testing.assert_close(found, eager)
        assert [each.stride() for each in found] == [each.stride() for each in eager]


class Layer(torch.nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, rotary: Tensor) -> Tensor:
        return temporal_attention(q, k, v, bias=bias, rotary=rotary, causal=True, window=2, backend=self.backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exported(backend: str) -> None:
    device = device_for(backend)
    first, second = (
        tuple(draw_call(seed, (2, 4, 2, 3, 2, 8), "all", device=device)[n] for n in ("q", "k", "v", "bias", "rotary"))
        for seed in (17, 18)
    )
    with torch.no_grad():
        program = torch.export.export(Layer(backend), first)
        torch.testing.assert_close(program.module()(*second), Layer(backend)(*second))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_arithmetic_in_full_precision(backend: str) -> None:
    device = device_for(backend)
    call = draw_call(19, (1, 6, 2, 3, 2, 16), "all", device=device)
    expected = temporal_attention(**call, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(temporal_attention(**call, backend=backend), expected)
        half = {name: call[name].bfloat16() for name in ("q", "k", "v")}  # a projection's, beside parameters in fp32
        if not dispatch.why_not(OP, backend, **{**call, **half}):
            assert temporal_attention(**{**call, **half}, backend=backend).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_transforms_see_through_the_reference_alone(backend: str) -> None:
    device = device_for(backend)
    call = draw_call(20, (3, 4, 1, 2, 2, 8), device=device)
    q, k, v = call["q"], call["k"], call["v"]

    def attend(q: Tensor, run: Any = temporal_attention) -> Tensor:
        return run(q[None], k[:1], v[:1])[0]

    torch.testing.assert_close(torch.func.vmap(attend)(q), torch.stack([attend(each) for each in q]))
    tangent = torch.ones_like(q[0])
    exact = torch.func.jvp(lambda q: attend(q, textbook), (q[0],), (tangent,))
    torch.testing.assert_close(torch.func.jvp(attend, (q[0],), (tangent,)), exact)
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(attend(forward_ad.make_dual(q[0], tangent)))
        torch.testing.assert_close((y.primal, y.tangent), exact)
    with pytest.raises(dispatch.BackendUnavailable, match=r"torch.func transform is active"):
        torch.func.vmap(lambda q: temporal_attention(q[None], k[:1], v[:1], backend=backend))(q)


def test_the_example_of_another_model_s_layer() -> None:
    example = Path(__file__).parents[2] / "examples" / "motion_attention.py"
    done = subprocess.run([sys.executable, str(example), "cpu"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "reference: can run this call" in done.stdout


# --- addresses and memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_addresses_past_2_to_the_31(backend: str, tmp_path: Path) -> None:
    """Frames that lie 2**30 elements apart, in a file without blocks where there is no GPU, and so in no memory."""
    device = device_for(backend, torch.float16)
    apart, shape = 2**30 + 64, (1, 4, 1, 5, 2, 16)
    size = 3 * apart + 3 * 5 * 32
    if device == "cpu":
        memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.float16)
    else:
        memory = torch.empty(size, dtype=torch.float16, device=device)
    strides = (4 * apart, apart, 480, 96, 16, 1)
    q, k, v = (memory.as_strided(shape, strides, 32 * i).copy_(Draw(30 + i)(*shape)) for i in range(3))
    near = [each.contiguous() for each in (q, k, v)]
    expected = temporal_attention(*near, backend=backend)
    torch.testing.assert_close(temporal_attention(q, k, v, backend=backend), expected)
    above = Draw(33, torch.float16)(*shape).to(device)
    far = [each.detach().requires_grad_() for each in (q, k, v)]
    near = [each.requires_grad_() for each in near]
    found, wanted = (
        torch.autograd.grad(temporal_attention(*leaves, backend=backend), leaves, above) for leaves in (far, near)
    )
    torch.testing.assert_close(found, wanted)
    assert temporal_attention(*(each.detach() for each in near), backend=backend, out=q) is q
    torch.testing.assert_close(q, expected)


PEAK = """
import torch
from pathlib import Path
from lumiere_fast.ops import temporal_attention

def status(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])

def peak(call):
    call()  # threads, and what a first call loads
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    call()
    return max(0, status("VmHWM") - before)

for dtype, T, pixels in ((torch.float32, 16, 64), (torch.bfloat16, 16, 96), (torch.float32, 80, 32)):
    q, k, v = torch.ones(1, T, pixels, pixels, 3, 4, 32, dtype=dtype).unbind(4)
    out, bias = torch.zeros(q.shape, dtype=dtype).fill_(1), torch.zeros(4, 2 * T - 1, dtype=dtype)
    for backend, threads in (("cpu", 1), ("cpu", 2), ("reference", 1)):
        torch.set_num_threads(threads)
        extra = peak(lambda: temporal_attention(q, k, v, bias=bias, causal=True, backend=backend, out=out))
        print(backend, extra / (out.numel() * out.element_size()))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux alone tells the peak anew")
def test_no_memory_beside_the_result() -> None:
    """Nothing is copied, transposed or widened: a tenth of the activation at most, where the reference takes more.

    What a call frees goes back to the system, by the threshold, so that the next does not find it.
    """
    device_for("cpu", torch.bfloat16)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    found = [(backend, float(part)) for backend, part in map(str.split, done.stdout.splitlines())]
    assert len(found) == 9
    for backend, part in found:
        assert part <= 0.1 if backend == "cpu" else part > 1, found
