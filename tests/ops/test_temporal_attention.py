from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lumiere_fast.ops import temporal_attention
from lumiere_fast.ops.temporal_attention import SPEC
from tests.ops.common import (
    HALF_DTYPES,
    Draw,
    assert_no_worse_than_torch,
    check_compiled,
    check_operator,
    check_operator_gradient,
    check_out,
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


@pytest.mark.parametrize("pixels", [65535, 65536, 65537])
def test_many_pixels(pixels: int) -> None:
    """torch's fused kernels on a GPU stop at 65535 sequences."""
    q, k, v = draw_qkv(Draw(5, torch.float32), (1, 2, 1, pixels, 1, 2))
    y = temporal_attention(q, k, v)
    expected = by_loops(*(t[0, :, 0, -1].double() for t in (q, k, v)), None, False, None)
    torch.testing.assert_close(y[0, :, 0, -1].double(), expected, rtol=1e-5, atol=1e-6)
    assert y.isfinite().all()


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


def test_compiled() -> None:
    draw = Draw(10, torch.float32)
    for frames in (3, 5):
        q, k, v = draw_qkv(draw, (2, frames, 2, 2, 2, 4))
        check_compiled(temporal_attention, q, k, v, bias=draw(2, 2 * frames - 1), causal=True, window=2)


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


BAD_CALLS = {
    "q must be": {"q": torch.zeros(2, 3, 4, 2, 4)},
    "q must be float": {"q": torch.zeros(2, 3, 2, 2, 2, 4, dtype=torch.int32)},
    "k must have the shape of q": {"k": torch.zeros(2, 4, 2, 2, 2, 4)},
    "v must be torch.float32 like q": {"v": torch.zeros(2, 3, 2, 2, 2, 4, dtype=torch.float64)},
    "v must be on cpu": {"v": torch.zeros(2, 3, 2, 2, 2, 4, device="meta")},
    r"bias must have shape \(2, 5\), got \(2, 3\)": {"bias": torch.zeros(2, 3)},
    "window must be None or >= 0 frames, got -1": {"window": -1},
    "out must be": {"out": torch.zeros(2, 3, 2, 2, 8)},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments_are_named(message: str) -> None:
    call = {name: torch.zeros(2, 3, 2, 2, 2, 4) for name in "qkv"}
    with pytest.raises(ValueError, match=f"temporal_attention: {message}"):
        temporal_attention(**{**call, **BAD_CALLS[message]})


def test_spec_inputs_are_what_the_op_takes() -> None:
    generator = torch.Generator().manual_seed(0)
    for scenario in SPEC.scenarios:
        if scenario.cpu:
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
