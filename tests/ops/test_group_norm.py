from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lumiere_fast import native
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
    device_of,
    in_format,
    in_layout,
    steps,
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
from lumiere_fast import native, ops
draw = torch.Generator().manual_seed(0)
for input_needs_gradient in (False, True):
    x = torch.randn(8, 4, 16, 16, 64, generator=draw).permute(0, 4, 1, 2, 3).requires_grad_(input_needs_gradient)
    weight, bias = torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)
    def gradients(y):
        return torch.autograd.grad(y.square().sum(), (weight, bias))
    def flat(backend):
        return torch.ops.lumiere_fast.group_norm(x, 8, weight, bias, None, None, "silu", 1e-5, True, backend)
    def run(x, weight, bias):
        return ops.group_norm(x, 8, weight, bias, act="silu")
    found = [gradients(run(x, weight, bias)), gradients(flat("reference"))]
    found.append(gradients(torch.compile(run, fullgraph=True, backend="aot_eager")(x, weight, bias)))
    if not native.why_not("cpu"):
        found.append(gradients(flat("cpu")))
    expected = gradients(ops.group_norm(x, 8, weight, bias, act="silu", backend="reference"))
    for path in found:
        for ours, theirs in zip(path, expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
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
    "eps must be a number > 0, got 0.0": {"eps": 0.0},
    "eps must be a number > 0, got None": {"eps": None},
    "per_frame must be True or False, got 'no'": {"per_frame": "no"},
    "per_frame must be True or False, got array": {"per_frame": np.ones(2, bool)},
    "backend must be one of": {"backend": "cublas"},
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


# --- the native core's backend ----------------------------------------------------------------------------------------

needs_core = pytest.mark.skipif(bool(native.why_not("cpu")), reason="; ".join(native.why_not("cpu")))
DTYPES = (torch.float32, torch.float64, *HALF_DTYPES)

# B, C, T, H, W, groups
NATIVE_SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 8, 2, 1, 13, 8),
    (1, 10, 1, 7, 1, 1),
    (1, 24, 2, 11, 7, 3),
    (1, 30, 3, 4, 4, 10),
    (1, 320, 1, 3, 5, 32),
    (2, 64, 3, 12, 12, 16),
    (0, 8, 2, 3, 3, 4),
]
FILMS = {
    "no film": lambda draw, B, C, T: (None, None),
    "per clip": lambda draw, B, C, T: draw(B, 2 * C).chunk(2, dim=1),
    "per frame": lambda draw, B, C, T: (draw(B, 2 * C, T)[:, C:].transpose(1, 2), draw(B, 1, C).expand(B, T, C)),
}


def in_double(*values: object) -> list[object]:
    return [value.detach().double() if isinstance(value, Tensor) else value for value in values]


def poisoned(like: Tensor) -> Tensor:
    return torch.full_like(like, torch.nan)


def check_native(x: Tensor, groups: int, *rest: object) -> Tensor:
    """Against the fp64 reference, with torch's own error at that dtype as the measure; returns the result."""
    y = group_norm_reference(x, groups, *rest)
    ours = poisoned(y)
    native.group_norm(x, groups, *rest, out=ours)
    assert_no_worse_than_torch(ours, y, group_norm_reference(*in_double(x, groups, *rest)))
    return ours


def gradients(
    backend: str,
    dtype: torch.dtype,
    call: dict[str, Tensor | None],
    wanted: tuple[str, ...],
    options: dict[str, object],
    upstream: Tensor,
) -> tuple[Tensor, ...]:
    """Of the arguments that are wanted and given, in `dtype`."""
    given = {
        name: None if value is None else value.detach().to(dtype).requires_grad_(name in wanted)
        for name, value in call.items()
    }
    leaves = [value for value in given.values() if value is not None and value.requires_grad]
    return torch.autograd.grad(group_norm(**given, **options, backend=backend), leaves, upstream.to(dtype))


@needs_core
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["channels_last", "contiguous"])
class TestNative:
    @pytest.mark.parametrize("per_frame", [True, False], ids=["per frame", "per clip"])
    @pytest.mark.parametrize("film", FILMS)
    def test_forward(self, dtype: torch.dtype, memory_format: torch.memory_format, film: str, per_frame: bool) -> None:
        draw = Draw(20, dtype)
        for B, C, T, H, W, groups in NATIVE_SHAPES:
            x = draw.clip(B, C, T, H, W, memory_format=memory_format)
            weight, bias = draw(C), draw(2 * C)[::2].to(torch.promote_types(dtype, torch.float32))
            scale, shift = FILMS[film](draw, B, C, T)
            for act in (None, "silu"):
                if B > 0:
                    check_native(x, groups, weight, bias, scale, shift, act, 1e-5, per_frame)
                y = group_norm(x, groups, weight, None, scale=scale, act=act, per_frame=per_frame, backend="cpu")
                assert y.shape == x.shape and y.dtype == dtype and in_format(y, memory_format)

    def test_statistics(self, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
        draw = Draw(21, dtype)
        for B, C, T, H, W, groups in NATIVE_SHAPES:
            x = draw.clip(B, C, T, H, W, memory_format=memory_format)
            for per_frame in (True, False):
                ours = group_norm_stats(x, groups, per_frame=per_frame, backend="cpu")
                theirs = group_norm_stats(x, groups, per_frame=per_frame, backend="reference")
                exact = group_norm_stats(x.double(), groups, per_frame=per_frame, backend="reference")
                for mine, other, truth in zip(ours, theirs, exact, strict=True):
                    assert mine.shape == truth.shape
                    assert_no_worse_than_torch(mine, other, truth)

    @pytest.mark.parametrize("name", SLICES)
    def test_slices(self, dtype: torch.dtype, memory_format: torch.memory_format, name: str) -> None:
        """Inputs and results of any strides; what lies between a result's elements is not written."""
        draw = Draw(22, dtype)
        x = SLICES[name](draw.clip(3, 16, 5, 4, 6, memory_format=memory_format))
        rest = (4, draw(x.shape[1]), None, None, None, "silu", 1e-5, True)
        expected = check_native(x, *rest)
        whole = poisoned(draw.clip(3, 16, 5, 4, 6, memory_format=memory_format))
        for out in (
            SLICES[name](whole),
            torch.empty_like(expected).flip(3).transpose(2, 4).contiguous().transpose(2, 4),
        ):
            native.group_norm(x, *rest, out=out)
            assert torch.equal(out, expected)
        assert whole.isnan().sum() == whole.numel() - expected.numel()

    @pytest.mark.parametrize("wanted", [("x",), ("weight", "bias"), ("scale", "x"), ("x", "weight", "bias", "shift")])
    def test_gradients(self, dtype: torch.dtype, memory_format: torch.memory_format, wanted: tuple[str, ...]) -> None:
        draw = Draw(23, dtype)
        for (B, C, T, H, W, groups), film in product(NATIVE_SHAPES[1:-1], FILMS):
            x = draw.clip(B, C, T, H, W, memory_format=memory_format)
            scale, shift = FILMS[film](draw, B, C, T)
            call = {"x": x, "weight": draw(C), "bias": draw(C), "scale": scale, "shift": shift}
            options = {"num_groups": groups, "act": "silu", "per_frame": film != "per clip"}
            upstream = draw(*x.shape).transpose(3, 4).contiguous().transpose(3, 4)
            exact = gradients("reference", torch.float64, call, wanted, options, upstream)
            ours, theirs = (gradients(name, dtype, call, wanted, options, upstream) for name in ("cpu", "reference"))
            for mine, other, truth in zip(ours, theirs, exact, strict=True):
                assert mine.dtype == dtype
                assert_no_worse_than_torch(mine, other, truth, factor=3.0)


@needs_core
class TestNativeNumbers:
    @pytest.mark.parametrize("memory_format", FORMATS, ids=["channels_last", "contiguous"])
    def test_a_large_mean(self, memory_format: torch.memory_format) -> None:
        """x - mean is taken before anything is multiplied: no worse than rounding x itself allows."""
        x = Draw(24, torch.float32).clip(1, 16, 2, 24, 24, memory_format=memory_format) + 1e4
        ours, exact = (group_norm(each, 4, None, None, backend="cpu") for each in (x, x.double()))
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("memory_format", FORMATS, ids=["channels_last", "contiguous"])
    def test_a_first_tile_unlike_the_rest(self, memory_format: torch.memory_format) -> None:
        """The pivot is far from the mean; the sums of squares do not cancel."""
        x = Draw(25, torch.float32).clip(1, 2, 1, 160, 400, memory_format=memory_format)
        x[:, :, :, :20] += 1e4
        ours, exact = (group_norm_stats(each, 1, backend="cpu") for each in (x, x.double()))
        for mine, truth in zip(ours, exact, strict=True):
            torch.testing.assert_close(mine.double(), truth, rtol=2e-6, atol=0)

    @pytest.mark.parametrize("memory_format", FORMATS, ids=["channels_last", "contiguous"])
    @pytest.mark.parametrize("per_frame", [True, False])
    def test_threads_change_nothing(self, memory_format: torch.memory_format, per_frame: bool) -> None:
        draw, before = Draw(26, torch.float32), torch.get_num_threads()
        x = draw.clip(1, 6, 3, 211, 307, memory_format=memory_format)
        weight = draw(6).requires_grad_()
        results = []
        try:
            for count in (1, 2, 3, 4):
                torch.set_num_threads(count)
                leaf = x.clone().requires_grad_()
                y = group_norm(leaf, 3, weight, None, act="silu", per_frame=per_frame, backend="cpu")
                results.append((y.detach(), torch.autograd.grad(y.square().sum(), leaf)[0]))
        finally:
            torch.set_num_threads(before)
        for others in results[1:]:
            assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))

    def test_silu_over_its_whole_range(self) -> None:
        """A shift puts z anywhere; the norm itself is 0 where a group is constant."""
        z = torch.cat([torch.linspace(-120, 120, 4801), torch.tensor([-2e38, 2e38, torch.inf, -torch.inf, torch.nan])])
        x = torch.zeros(1, z.numel(), 1, 1, 1)
        for dtype in (torch.float32, torch.float64):
            ours = group_norm(x.to(dtype), 1, None, z.to(dtype), act="silu", backend="cpu").flatten()
            exact = nn.functional.silu(z.double())
            finite = z.isfinite()
            error = (ours[finite].double() - exact[finite]).abs() / exact[finite].abs().clamp(min=1e-30)
            epsilon = torch.finfo(dtype).eps
            assert (error <= epsilon * (2 + z[finite].abs().clamp(max=120)))[z[finite] > -80].all()
            assert (error <= 2 * epsilon)[z[finite] > -1].all()
            torch.testing.assert_close(ours[~finite], nn.functional.silu(z[~finite]).to(dtype), equal_nan=True)
            assert ours[-5] == 0 and ours[-4] > 1e38


OTHER_PROCESSORS = """
import sys, torch
from lumiere_fast.ops import group_norm
calls = torch.load(sys.argv[1])
torch.save([group_norm(*call, act="silu", backend="cpu") for call in calls], sys.argv[1])
"""


@needs_core
@pytest.mark.parametrize("switch", ["LUMIERE_FAST_NO_AVX512", "LUMIERE_FAST_PORTABLE"])
def test_code_for_other_processors(switch: str, tmp_path: Path) -> None:
    calls = []
    for dtype, memory_format in product(DTYPES, FORMATS):
        draw = Draw(27, dtype)
        calls += [
            (draw.clip(2, C, 2, 9, 7, memory_format=memory_format), groups, draw(C), draw(C))
            for C, groups in ((3, 1), (30, 10), (64, 16))
        ]
    torch.save(calls, tmp_path / "calls.pt")
    environment = {**os.environ, switch: "1"}
    subprocess.run([sys.executable, "-c", OTHER_PROCESSORS, str(tmp_path / "calls.pt")], env=environment, check=True)
    for call, ours in zip(calls, torch.load(tmp_path / "calls.pt"), strict=True):
        theirs, exact = (group_norm(*args, act="silu", backend="reference") for args in (call, in_double(*call)))
        assert_no_worse_than_torch(ours, theirs, exact)


@needs_core
@pytest.mark.parametrize("needs", [(), ("x",), ("weight",), ("x", "bias", "scale")], ids=str)
def test_operator_of_the_native_core(needs: tuple[str, ...]) -> None:
    draw = Draw(28)
    x = draw.clip(2, 4, 3, 2, 2, grad="x" in needs)
    affine = {name: draw(4, grad=name in needs) for name in ("weight", "bias")}
    film = {name: draw(2, 4, grad=name in needs) for name in ("scale", "shift")}
    check_operator(group_norm, x, 2, *affine.values(), **film, act="silu", backend="cpu")
    if needs:
        check_operator_gradient(group_norm, x, 2, *affine.values(), **film, act="silu", backend="cpu")
    check_operator(group_norm_stats, x, 2, backend="cpu")
    if "x" in needs:
        check_operator_gradient(group_norm_stats, x, 2, backend="cpu")


@needs_core
@pytest.mark.parametrize("memory_format", FORMATS, ids=["channels_last", "contiguous"])
def test_compiled_training(memory_format: torch.memory_format) -> None:
    """One graph forward and backward, through the native core; strides are kept."""
    draw = Draw(29, torch.float32)
    x = draw.clip(2, 8, 3, 4, 4, memory_format=memory_format, grad=True)
    weight = draw(8, grad=True)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return group_norm(x, 4, weight, None, act="silu", backend="cpu")

    y, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(x, weight), run(x, weight)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    upstream = draw(*y.shape)
    for ours, eager in zip(*(torch.autograd.grad(each, (x, weight), upstream) for each in (y, expected)), strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=0)
        assert ours.stride() == eager.stride()


@needs_core
def test_the_native_core_takes_numpy_and_tells_what_does_not_fit() -> None:
    draw = Draw(30, torch.float32)
    x, weight, scale = draw(1, 4, 2, 3, 3), draw(4), draw(1, 4)
    out = np.full(x.shape, np.nan, dtype=np.float32)
    native.group_norm(x.numpy(), 2, weight.numpy(), None, scale.numpy(), None, "silu", 1e-5, True, out=out)
    expected = group_norm_reference(x, 2, weight, None, scale, None, "silu")
    torch.testing.assert_close(torch.from_numpy(out), expected)

    def refused(match: str, **changes: object) -> None:
        given = {"x": x, "num_groups": 2, "weight": weight, "bias": None, "scale": scale, "shift": None, "act": "silu"}
        given |= {"eps": 1e-5, "per_frame": True, "out": torch.empty_like(x)} | changes
        result = given.pop("out")
        with pytest.raises(ValueError, match=match):
            native.group_norm(*given.values(), out=result)

    refused(r"x must be \(B, C, T, H, W\), got \(4, 2, 3, 3\)", x=x[0])
    refused("num_groups must divide the 4 channels, got 3", num_groups=3)
    refused(r"weight must have shape \(4,\), got \(1, 4\)", weight=scale)
    refused(r"scale must have shape \(1, 4\) or \(1, 2, 4\), got \(4,\)", scale=weight)
    refused("bias must be float32 like x or float32, got float64", bias=weight.double())
    refused("act must be None or 'silu', got 'gelu'", act="gelu")
    refused("invalid argument", eps=0.0)
    refused("out must be float32", out=torch.empty_like(x).double())
    refused("out must be float32", out=torch.empty(1, 4, 2, 3, 4))
    refused("elements of the output may lie on top of one another", out=torch.empty(1, 4, 2, 3, 1).expand_as(x))
    refused("the output, or the memory to work in, lies in the memory of another tensor", out=x)
    refused("x must be float32, float64, float16 or bfloat16", x=x.int())
    refused("x must be a tensor", x=None)
    refused("out must be on the CPU", out=x.to("meta"))
    with pytest.raises(ValueError, match=r"rstd must be float32 \(1, 2, 2\), got float32 \(1, 2\)"):
        native.group_norm_stats(x, 2, 1e-5, True, out=(torch.empty(1, 2, 2), torch.empty(1, 2)))


# Every backend, on its device ----------------------------------------------------------------------------------------

NORM_DTYPES = (torch.float32, torch.float64, *HALF_DTYPES)


def random_call(case: int, dtype: torch.dtype, device: str, grad: bool = False) -> dict[str, Any]:
    """A call of `group_norm`, its options drawn by `case`: sizes, layouts, affine, FiLM, SiLU, per frame or clip."""
    random, draw = np.random.default_rng(case), Draw(case)
    B, T, H, W, groups = (int(n) for n in random.integers((1, 1, 2, 2, 1), (3, 7, 24, 24, 9)))
    C = groups * int(random.choice([1, 3, 8, 10]))
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def tensor(*shape: int) -> Tensor:
        return draw(*shape).to(device, wide if random.integers(2) else dtype).requires_grad_(grad)

    x = in_layout(draw(B, C, T, H, W).to(device, dtype), int(random.integers(4))).requires_grad_(grad)
    call: dict[str, Any] = {"x": x, "num_groups": groups, "per_frame": bool(random.integers(2))}
    call["weight"], call["bias"] = (tensor(C) if random.integers(4) else None for _ in range(2))
    film = (B, C) if random.integers(2) else (B, T, C)
    call["scale"], call["shift"] = (tensor(*film) if random.integers(2) else None for _ in range(2))
    return {**call, "act": "silu" if random.integers(2) else None}


def doubled(call: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().double().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
        for name, value in call.items()
    }


@pytest.mark.parametrize("dtype", NORM_DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_every_backend_is_the_reference_on_its_device(backend: str, dtype: torch.dtype) -> None:
    device = device_of(backend)
    for case in range(24):
        call = random_call(case, dtype, device)
        ours, theirs = (group_norm(**call, backend=each) for each in (backend, "reference"))
        assert steps(ours) == steps(theirs)
        assert_no_worse_than_torch(ours, theirs, group_norm(**doubled(call), backend="reference"))
        plain = (call["num_groups"],), {"per_frame": call["per_frame"]}
        stats, others = (group_norm_stats(call["x"], *plain[0], **plain[1], backend=b) for b in (backend, "reference"))
        exact = group_norm_stats(call["x"].double(), *plain[0], **plain[1], backend="reference")
        for mine, other, truth in zip(stats, others, exact, strict=True):
            assert_no_worse_than_torch(mine, other, truth)


@pytest.mark.parametrize("dtype", NORM_DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_gradients_of_every_backend_are_the_reference_s(backend: str, dtype: torch.dtype) -> None:
    device = device_of(backend)
    for case in range(12):
        call = random_call(case, dtype, device, grad=True)
        seed = Draw(100 + case)(*call["x"].shape)

        def found(call: dict[str, Any], backend: str, seed: Tensor = seed) -> list[Tensor]:
            y = group_norm(**call, backend=backend)
            leaves = [value for value in call.values() if isinstance(value, Tensor)]
            return list(torch.autograd.grad(y, leaves, seed.to(y)))

        ours, theirs, exact = found(call, backend), found(call, "reference"), found(doubled(call), "reference")
        for mine, other, truth in zip(ours, theirs, exact, strict=True):
            assert_no_worse_than_torch(mine, other, truth, factor=3.0, rounded=dtype)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_second_derivatives_are_the_reference_s(backend: str) -> None:
    """A gradient penalty: the gradient enters the loss, and is differentiated through what the input was made from."""
    device = device_of(backend)

    def penalised(backend: str) -> list[Tensor]:
        draw = Draw(61, torch.float32)
        x, weight, shift = (draw(*shape).to(device).requires_grad_() for shape in ((2, 8, 2, 3, 4), (8,), (2, 8)))
        y = group_norm(1.5 * x, 4, weight, None, shift=shift, act="silu", backend=backend)
        mean, rstd = group_norm_stats(1.5 * x, 4, backend=backend)
        loss = y.square().sum() + (mean * rstd).square().sum()
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return list(torch.autograd.grad(y.sum() + slope.square().sum(), [x, weight, shift]))

    for mine, other in zip(penalised(backend), penalised("reference"), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("per_frame", [True, False])
def test_an_empty_batch_has_an_empty_gradient(per_frame: bool) -> None:
    x = torch.zeros(0, 8, 2, 3, 3, requires_grad=True)
    results = (group_norm(x, 4, None, None, per_frame=per_frame), *group_norm_stats(x, 4, per_frame=per_frame))
    sum(each.sum() for each in results).backward()
    assert x.grad is not None and x.grad.shape == x.shape


def test_who_saved_a_tensor_is_told_that_out_changed_it() -> None:
    x = torch.ones(1, 8, 2, 3, 3)
    held, weight = torch.ones_like(x), torch.ones_like(x, requires_grad=True)
    loss = (weight * held).sum()
    with torch.no_grad():
        group_norm(x, 4, None, None, out=held)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        group_norm(x, 4, None, None, out=torch.empty_like(x))


def test_traced_by_torch_jit() -> None:
    x, other = (Draw(seed, torch.float32).clip(1, 8, 2, 3, 3) for seed in (71, 72))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x: group_norm(x, 4, None, None), x, check_trace=False)
    torch.testing.assert_close(traced(other), group_norm(other, 4, None, None), rtol=0, atol=0)
