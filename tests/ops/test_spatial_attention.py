from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lumiere_fast.ops import spatial_attention
from lumiere_fast.ops.spatial_attention import SPEC
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
    (2, 3, 4, 3, 2, 8),  # B, T, H, W, heads, D
    (1, 1, 1, 7, 3, 5),
    (2, 2, 1, 1, 1, 1),
    (0, 4, 2, 2, 2, 4),
]


def frame_by_frame(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """torch's own attention, one contiguous frame of one clip at a time."""
    y = torch.empty(q.shape, dtype=q.dtype)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            folded = (a[b, t].flatten(0, 1).transpose(0, 1).contiguous() for a in (q, k, v))
            y[b, t] = F.scaled_dot_product_attention(*folded, scale=scale).transpose(0, 1).reshape(q.shape[2:])
    return y


def by_loops(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The formula for one query and head: q (D,), k and v (L, D), mask (L,)."""
    powers = [math.exp(float(q @ k[s]) / math.sqrt(len(q))) if mask[s] else 0.0 for s in range(len(k))]
    total = sum(powers)
    return sum((p / total * v[s] for s, p in enumerate(powers)), torch.zeros_like(q)) if total else torch.zeros_like(q)


def draw_qkv(draw: Draw, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one fused projection (B, T, H, W, 3, heads, D)."""
    q, k, v = draw(*shape[:4], 3, *shape[4:]).unbind(4)
    return q, k, v


def draw_text(draw: Draw, shape: tuple[int, ...], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and keys and values as views of one fused projection (B, L, 2, heads, D)."""
    k, v = draw(shape[0], length, 2, *shape[4:]).unbind(2)
    return draw(*shape), k, v


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_torchs_attention_of_each_frame(shape: tuple[int, ...]) -> None:
    q, k, v = draw_qkv(Draw(1), shape)
    y = spatial_attention(q, k, v)
    torch.testing.assert_close(y, frame_by_frame(q, k, v))
    assert y.is_contiguous()
    torch.testing.assert_close(spatial_attention(q, k, v, scale=0.3), frame_by_frame(q, k, v, scale=0.3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("length", [1, 5])
def test_every_frame_reads_the_same_text(shape: tuple[int, ...], length: int) -> None:
    q, k, v = draw_text(Draw(2), shape, length)
    y = spatial_attention(q, k, v)
    for t in range(shape[1]):
        frame, keys, values = q[:, t].flatten(1, 2), k, v
        expected = F.scaled_dot_product_attention(*(a.transpose(1, 2).contiguous() for a in (frame, keys, values)))
        torch.testing.assert_close(y[:, t].flatten(1, 2), expected.transpose(1, 2))
    assert y.is_contiguous()


def test_masked_keys_are_left_out() -> None:
    draw = Draw(3)
    q, k, v = draw_text(draw, (3, 2, 2, 2, 2, 4), 5)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    y = spatial_attention(q, k, v, key_mask=mask)
    for b, n in [(0, 0), (0, 1), (1, 0), (2, 1)]:
        expected = by_loops(q[b, 1, 0, 1, n], k[b, :, n], v[b, :, n], mask[b])
        torch.testing.assert_close(y[b, 1, 0, 1, n], expected)
    poisoned = v.masked_fill(~mask[:, :, None, None], 1e6)
    torch.testing.assert_close(spatial_attention(q, k, poisoned, key_mask=mask), y)


def test_a_prompt_without_keys_gives_zero_and_no_gradient() -> None:
    draw = Draw(4)
    q, k, v = draw(2, 2, 2, 2, 1, 4, grad=True), draw(2, 3, 1, 4, grad=True), draw(2, 3, 1, 4, grad=True)
    mask = torch.tensor([[False] * 3, [True, False, True]])
    y = spatial_attention(q, k, v, key_mask=mask)
    assert (y[0] == 0).all() and (y[1] != 0).all()
    for gradient in torch.autograd.grad(y.square().sum(), (q, k, v)):
        assert (gradient[0] == 0).all() and gradient.isfinite().all() and (gradient[1] != 0).any()


STRIDED = {
    "each its own layout": lambda draw: (
        draw(2, 3, 2, 2, 2, 4),
        draw(2, 2, 2, 2, 3, 4).permute(0, 4, 1, 2, 3, 5),
        draw(3, 2, 2, 2, 2, 4).transpose(0, 1),
    ),
    "slices": lambda draw: (draw(2, 6, 4, 4, 4, 8)[:, ::2, 1:3, :2, 1:3, 2:6],) * 3,
    "D not dense": lambda draw: (draw(2, 3, 2, 2, 4, 2).transpose(4, 5),) * 3,
}


@pytest.mark.parametrize("name", STRIDED)
def test_any_strides(name: str) -> None:
    q, k, v = STRIDED[name](Draw(5))
    y = spatial_attention(q, k, v)
    torch.testing.assert_close(y, frame_by_frame(q, k, v))
    assert y.is_contiguous() and y.flatten(-2).data_ptr() == y.data_ptr()


def test_gradients() -> None:
    draw = Draw(6)
    q, k, v = (draw(1, 2, 2, 2, 2, 3, grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(spatial_attention, (q, k, v))
    text = (draw(2, 3, 2, 3, grad=True), draw(2, 3, 2, 3, grad=True))
    mask = torch.tensor([[True, False, True], [False] * 3])

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return spatial_attention(q, k, v, key_mask=mask)

    assert torch.autograd.gradcheck(run, (draw(2, 2, 1, 2, 2, 3, grad=True), *text))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    q, k, v = draw_qkv(Draw(7, dtype), (2, 2, 4, 4, 2, 16))
    y = spatial_attention(q, k, v)
    assert y.dtype == dtype
    exact = frame_by_frame(*(t.double() for t in (q, k, v)))
    assert_no_worse_than_torch(y, frame_by_frame(q, k, v), exact, factor=1.0)


def test_out() -> None:
    draw = Draw(8)
    check_out(spatial_attention, *draw_qkv(draw, (2, 2, 2, 2, 2, 4)))
    check_out(spatial_attention, *draw_text(draw, (2, 2, 2, 2, 2, 4), 3))


@pytest.mark.parametrize("needs", [(), ("q",), ("k", "v")], ids=str)
@pytest.mark.parametrize("text", [False, True], ids=["self", "text"])
def test_operator(text: bool, needs: tuple[str, ...]) -> None:
    draw = Draw(9)
    shapes = {"q": (2, 3, 2, 2, 2, 4), "k": (2, 5, 2, 4), "v": (2, 5, 2, 4)}
    inputs = [draw(*(shapes[name] if text else shapes["q"]), grad=name in needs) for name in "qkv"]
    options = {"key_mask": torch.arange(5).expand(2, 5) < 3} if text else {}
    check_operator(spatial_attention, *inputs, **options)
    if needs:
        check_operator_gradient(spatial_attention, *inputs, **options)


def test_compiled() -> None:
    draw = Draw(10, torch.float32)
    for frames in (3, 5):
        shape = (2, frames, 2, 2, 2, 4)
        check_compiled(spatial_attention, *draw_qkv(draw, shape))
        check_compiled(spatial_attention, *draw_text(draw, shape, 6), key_mask=torch.arange(6).expand(2, 6) < frames)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(0, 2),
    frames=st.integers(1, 3),
    height=st.integers(1, 3),
    width=st.integers(1, 3),
    heads=st.integers(1, 3),
    dim=st.integers(1, 5),
    length=st.none() | st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_every_small_shape(
    batch: int, frames: int, height: int, width: int, heads: int, dim: int, length: int | None, seed: int
) -> None:
    draw, shape = Draw(seed), (batch, frames, height, width, heads, dim)
    if length is None:
        q, k, v = draw_qkv(draw, shape)
        expected = frame_by_frame(q, k, v)
    else:
        q, k, v = draw_text(draw, shape, length)
        scores = torch.einsum("bthwnd,blnd->bthwnl", q, k) / math.sqrt(dim)
        expected = torch.einsum("bthwnl,blnd->bthwnd", scores.softmax(-1), v)
    y = spatial_attention(q, k, v)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous()


TEXT = torch.zeros(2, 5, 2, 4)
BAD_CALLS = {
    "q must be": {"q": torch.zeros(2, 3, 4, 2, 4)},
    "k must have the shape of q": {"k": torch.zeros(2, 3, 2, 1, 2, 4)},
    "v must have the shape of k": {"k": TEXT, "v": torch.zeros(2, 6, 2, 4)},
    r"k must have shape \(2, 5, 2, 4\), got \(2, 5, 4, 4\)": {"k": torch.zeros(2, 5, 4, 4)},
    "k must hold at least one key": {"k": TEXT[:, :0], "v": TEXT[:, :0]},
    "k must be torch.float32 like q": {"k": TEXT.double()},
    "v must be torch.float32 like k": {"v": torch.zeros(2, 3, 2, 2, 2, 4, dtype=torch.float16)},
    r"key_mask must be bool \(B, L\) beside k \(B, L, heads, D\)": {"key_mask": torch.ones(2, 4, dtype=torch.bool)},
    "key_mask must be bool .* got torch.float32": {"k": TEXT, "v": TEXT, "key_mask": torch.ones(2, 5)},
    r"key_mask must be bool .* got torch.bool \(2, 4\)": {"k": TEXT, "v": TEXT, "key_mask": TEXT[:, :4, 0, 0] == 0},
    "out must be": {"out": torch.zeros(2, 3, 2, 2, 8)},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments_are_named(message: str) -> None:
    call = {name: torch.zeros(2, 3, 2, 2, 2, 4) for name in "qkv"}
    with pytest.raises(ValueError, match=f"spatial_attention: {message}"):
        spatial_attention(**{**call, **BAD_CALLS[message]})


def test_spec_inputs_are_what_the_op_takes() -> None:
    generator = torch.Generator().manual_seed(0)
    for scenario in SPEC.scenarios:
        if scenario.cpu:
            inputs = SPEC.make_inputs(scenario, "cpu", torch.float32, generator)
            assert spatial_attention(**inputs).shape == inputs["q"].shape
    base = next(s for s in SPEC.scenarios if s.name == "base3")
    assert SPEC.flops(base) == 4 * 10 * 256 * 256 * 1024
