from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lumiere_fast.ops import group_norm, group_norm_stats
from lumiere_fast.ops.group_norm import SPEC, group_norm_reference
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
    (2, 8, 5, 4, 6, 4),
    (1, 6, 1, 7, 1, 3),  # one frame, prime pixels, C no multiple of 8
    (3, 5, 2, 1, 1, 5),  # every group is a single number
    (1, 12, 3, 3, 5, 1),
    (0, 8, 4, 2, 2, 2),
]


def frame_by_frame(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """torch's own norm, one contiguous frame of one clip at a time."""
    norm = nn.GroupNorm(groups, x.shape[1], eps=eps, affine=False)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for b in range(x.shape[0]):
        for t in range(x.shape[2]):
            frame = x[b : b + 1, :, t].contiguous()
            single = frame.numel() == groups  # torch's module refuses a single value
            y[b, :, t] = torch.zeros_like(frame)[0] if single else norm(frame)[0]
    return y * weight[:, None, None, None] + bias[:, None, None, None]


def formula(x: Tensor, groups: int, b: int, c: int, t: int, eps: float) -> tuple[float, float]:
    """mean and rstd of channel c's group in frame t of clip b, with Python's exact sums."""
    per_group = x.shape[1] // groups
    lo = c // per_group * per_group
    values = x[b, lo : lo + per_group, t].flatten().tolist()
    mean = math.fsum(values) / len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
    return mean, 1 / math.sqrt(variance + eps)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_torchs_norm_of_each_frame(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    *dims, groups = shape
    draw = Draw(1)
    x, weight, bias = draw.clip(*dims, memory_format=memory_format), draw(dims[1]), draw(dims[1])
    y = group_norm(x, groups, weight, bias)
    torch.testing.assert_close(y, frame_by_frame(x, groups, weight, bias))
    assert in_format(y, memory_format)


@pytest.mark.parametrize("film_shape", [(2, 6), (2, 3, 6)], ids=["per clip", "per frame"])
def test_formula_with_film_and_silu(film_shape: tuple[int, ...]) -> None:
    draw = Draw(2)
    x, weight, bias = draw.clip(2, 6, 3, 2, 2), draw(6), draw(6)
    scale, shift = draw(*film_shape), draw(*film_shape)
    y = group_norm(x, 3, weight, bias, scale=scale, shift=shift, act="silu", eps=1e-3)
    for b, c, t in [(0, 0, 0), (0, 5, 2), (1, 2, 1), (1, 3, 0)]:
        mean, rstd = formula(x, 3, b, c, t, 1e-3)
        film = (b, c) if len(film_shape) == 2 else (b, t, c)
        z = (x[b, c, t] - mean) * rstd * weight[c] + bias[c]
        z = z * (1 + scale[film]) + shift[film]
        torch.testing.assert_close(y[b, c, t], z / (1 + torch.exp(-z)))


@pytest.mark.parametrize(
    "given_names", [(), ("weight",), ("bias",), ("scale",), ("shift",), ("bias", "scale")], ids=str
)
def test_each_parameter_may_be_absent(given_names: tuple[str, ...]) -> None:
    draw = Draw(3)
    x = draw.clip(2, 4, 3, 2, 5)
    values = {name: draw(4) if name in ("weight", "bias") else draw(2, 4) for name in given_names}
    filled = {"weight": torch.ones(4).double(), "bias": torch.zeros(4).double(), **values}
    y = group_norm(x, 2, values.get("weight"), values.get("bias"), scale=values.get("scale"), shift=values.get("shift"))
    expected = frame_by_frame(x, 2, filled["weight"], filled["bias"])
    if "scale" in values:
        expected = expected * (1 + values["scale"][:, :, None, None, None])
    if "shift" in values:
        expected = expected + values["shift"][:, :, None, None, None]
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["channels_last", "contiguous"])
def test_statistics_of_the_whole_clip(memory_format: torch.memory_format) -> None:
    draw = Draw(4)
    x, weight, bias = draw.clip(2, 8, 3, 5, 2, memory_format=memory_format), draw(8), draw(8)
    y = group_norm(x, 4, weight, bias, per_frame=False)
    torch.testing.assert_close(y, nn.functional.group_norm(x.contiguous(), 4, weight, bias))
    assert in_format(y, memory_format)
    mean, rstd = group_norm_stats(x, 4, per_frame=False)
    groups = x.contiguous().reshape(2, 4, -1)
    torch.testing.assert_close(mean, groups.mean(-1))
    torch.testing.assert_close(rstd, (groups.var(-1, correction=0) + 1e-5).rsqrt())


def test_frames_do_not_see_each_other() -> None:
    draw = Draw(5)
    x, changed = (draw.clip(1, 8, 4, 3, 3) for _ in range(2))
    changed[:, :, 2] = x[:, :, 2]
    y, z = (group_norm(clip, 4, None, None) for clip in (x, changed))
    torch.testing.assert_close(y[:, :, 2], z[:, :, 2], rtol=0, atol=0)
    assert not torch.allclose(y[:, :, 1], z[:, :, 1])


def test_stats_are_those_of_the_formula() -> None:
    x = Draw(6).clip(2, 6, 3, 2, 3)
    mean, rstd = group_norm_stats(x, 3, eps=1e-3)
    assert mean.shape == rstd.shape == (2, 3, 3)
    for b, g, t in [(0, 0, 0), (1, 2, 2), (0, 1, 1)]:
        expected = formula(x, 3, b, 2 * g, t, 1e-3)
        assert (float(mean[b, t, g]), float(rstd[b, t, g])) == pytest.approx(expected, rel=1e-12)


def test_stats_survive_a_large_mean() -> None:
    """E[x^2] - E[x]^2 in fp32 would be all rounding error here."""
    x = Draw(7, torch.float32).clip(1, 8, 2, 16, 16) + 3000.0
    _, rstd = group_norm_stats(x, 2)
    _, exact = group_norm_stats(x.double(), 2)
    torch.testing.assert_close(rstd.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("per_frame", [True, False])
def test_gradients(per_frame: bool) -> None:
    draw = Draw(8)
    x, weight, bias = draw.clip(2, 4, 2, 2, 3, grad=True), draw(4, grad=True), draw(4, grad=True)
    scale, shift = draw(2, 2, 4, grad=True), draw(2, 4, grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return group_norm(x, 2, weight, bias, scale=scale, shift=shift, act="silu", per_frame=per_frame)

    assert torch.autograd.gradcheck(run, (x, weight, bias, scale, shift))
    assert torch.autograd.gradcheck(lambda x: group_norm_stats(x, 2, per_frame=per_frame), (x,))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    draw = Draw(9, dtype)
    x, weight, bias, scale, shift = draw.clip(2, 16, 3, 5, 5), draw(16), draw(16), draw(2, 16), draw(2, 16)

    def composed(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        frames = x.transpose(1, 2).flatten(0, 1)
        n = nn.functional.group_norm(frames, 4, weight, bias).unflatten(0, (2, 3)).transpose(1, 2)
        scale, shift = (film[:, :, None, None, None] for film in (scale, shift))
        return nn.functional.silu(n * (1 + scale) + shift)

    y = group_norm(x, 4, weight, bias, scale=scale, shift=shift, act="silu")
    exact = composed(*(t.double() for t in (x, weight, bias, scale, shift)))
    assert y.dtype == dtype and in_format(y, CHANNELS_LAST)
    assert_no_worse_than_torch(y, composed(x, weight, bias, scale, shift), exact, factor=1.0)
    assert group_norm_stats(x, 4)[0].dtype == torch.float32


SLICES = {
    "frames": lambda x: x[:, :, 1:4],
    "channels": lambda x: x[:, 4:12],
    "every other frame": lambda x: x[:, :, ::2],
    "columns": lambda x: x[..., 1::2],
    "clips": lambda x: x[1:],
}


@pytest.mark.parametrize("memory_format", FORMATS, ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("name", SLICES)
def test_strided_slices_keep_the_format(name: str, memory_format: torch.memory_format) -> None:
    draw = Draw(10)
    x = SLICES[name](draw.clip(3, 16, 5, 4, 6, memory_format=memory_format))
    weight, bias = draw(x.shape[1]), draw(x.shape[1])
    y = group_norm(x, 4, weight, bias)
    torch.testing.assert_close(y, frame_by_frame(x, 4, weight, bias))
    assert in_format(y, memory_format)


FROZEN_INPUT = """
import torch
from lumiere_fast import ops
draw = torch.Generator().manual_seed(0)
for input_needs_gradient in (False, True):
    x = torch.randn(8, 4, 16, 16, 64, generator=draw).permute(0, 4, 1, 2, 3).requires_grad_(input_needs_gradient)
    weight, bias = torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)
    y = ops.group_norm(x, 8, weight, bias, act="silu")
    gradients = torch.autograd.grad(y.square().sum(), (weight, bias))
    flat = torch.ops.lumiere_fast.group_norm(x, 8, weight, bias, None, None, "silu", 1e-5, True, "reference")
    for ours, theirs in zip(torch.autograd.grad(flat.square().sum(), (weight, bias)), gradients):
        torch.testing.assert_close(ours, theirs)
print("lived")
"""


def test_affine_gradient_under_a_frozen_input_does_not_crash() -> None:
    """torch 2.13 segfaults in GroupNorm's backward on the CPU when only its affine parameters want a gradient.

    In a process of its own, so that a crash is a failed test and not the end of the run.
    """
    done = subprocess.run([sys.executable, "-c", FROZEN_INPUT], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "lived"), done.stderr


def test_out() -> None:
    draw = Draw(11)
    check_out(group_norm, draw.clip(2, 8, 3, 2, 2), 4, draw(8), draw(8), act="silu")


@pytest.mark.parametrize("needs", [(), ("x",), ("weight",), ("shift",), ("x", "bias", "scale")], ids=str)
def test_operator(needs: tuple[str, ...]) -> None:
    draw = Draw(12)
    x = draw.clip(2, 4, 3, 2, 2, grad="x" in needs)
    affine = {name: draw(4, grad=name in needs) for name in ("weight", "bias")}
    film = {name: draw(2, 4, grad=name in needs) for name in ("scale", "shift")}
    check_operator(group_norm, x, 2, *affine.values(), **film, act="silu")
    if needs:
        check_operator_gradient(group_norm, x, 2, *affine.values(), **film, act="silu")


def test_stats_operator() -> None:
    x = Draw(13).clip(2, 4, 3, 2, 2, grad=True)
    check_operator(group_norm_stats, x, 2)
    check_operator_gradient(group_norm_stats, x, 2, per_frame=False)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["channels_last", "contiguous"])
def test_compiled(memory_format: torch.memory_format) -> None:
    draw = Draw(14, torch.float32)
    for frames in (3, 5):  # the second size is traced with symbolic shapes
        x = draw.clip(2, 8, frames, 4, 4, memory_format=memory_format)
        check_compiled(group_norm, x, 4, draw(8), draw(8), scale=draw(2, 8), shift=draw(2, 8), act="silu")


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(0, 2),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    frames=st.integers(1, 3),
    height=st.integers(1, 3),
    width=st.integers(1, 3),
    memory_format=st.sampled_from(FORMATS),
    seed=st.integers(0, 999),
)
def test_every_small_shape(
    batch: int,
    groups: int,
    per_group: int,
    frames: int,
    height: int,
    width: int,
    memory_format: torch.memory_format,
    seed: int,
) -> None:
    draw = Draw(seed)
    channels = groups * per_group
    x = draw.clip(batch, channels, frames, height, width, memory_format=memory_format)
    weight, bias = draw(channels), draw(channels)
    y = group_norm(x, groups, weight, bias)
    torch.testing.assert_close(y, frame_by_frame(x, groups, weight, bias))
    assert in_format(y, memory_format)


BAD_CALLS = {
    "x must be": {"x": torch.zeros(2, 4, 3, 2)},
    "x must be float": {"x": torch.zeros(2, 4, 3, 2, 2, dtype=torch.int64)},
    "num_groups must divide": {"num_groups": 3},
    "weight must have shape": {"weight": torch.zeros(3)},
    "bias must have shape": {"bias": torch.zeros(4, 1)},
    "scale must have shape": {"scale": torch.zeros(2, 2, 4)},
    "shift must have shape": {"shift": torch.zeros(4)},
    "act must be None or 'silu', got 'gelu'": {"act": "gelu"},
    "eps must be > 0": {"eps": 0.0},
    "backend must be one of": {"backend": "cudnn"},
    "out must be": {"out": torch.zeros(2, 4, 3, 2, 3)},
    "weight must be on cpu": {"weight": torch.zeros(4, device="meta")},
    "weight must be torch.float32 like x, got torch.float16": {"weight": torch.ones(4, dtype=torch.float16)},
    "bias must be torch.float32 like x, got torch.float64": {"bias": torch.ones(4, dtype=torch.float64)},
    "scale must be torch.float32 like x": {"scale": torch.ones(2, 4, dtype=torch.bfloat16)},
    "shift must be torch.float32 like x": {"shift": torch.ones(2, 4, dtype=torch.bfloat16)},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments_are_named(message: str) -> None:
    call = {"x": torch.zeros(2, 4, 3, 2, 2), "num_groups": 2, "weight": torch.zeros(4), "bias": None}
    with pytest.raises(ValueError, match=f"(group_norm: )?{message}"):
        group_norm(**{**call, **BAD_CALLS[message]})


def test_out_is_refused_where_a_gradient_is_needed() -> None:
    x = torch.zeros(1, 4, 1, 2, 2)
    weight = torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match="out was given where a gradient is needed"):
        group_norm(x, 2, weight, None, out=torch.empty_like(x))
    with torch.no_grad():
        group_norm(x, 2, weight, None, out=torch.empty_like(x))


def test_spec_inputs_are_what_the_op_takes() -> None:
    generator = torch.Generator().manual_seed(0)
    for scenario in SPEC.scenarios:
        if scenario.cpu:
            inputs = SPEC.make_inputs(scenario, "cpu", torch.float32, generator)
            assert in_format(inputs["x"], CHANNELS_LAST)
            torch.testing.assert_close(group_norm(**inputs), group_norm_reference(**inputs))
    base = next(s for s in SPEC.scenarios if s.name == "base0")
    assert SPEC.bytes(base, torch.bfloat16) == 2 * 80 * 128 * 128 * 256 * 2
