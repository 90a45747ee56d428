"""The Triton kernels of temporal_conv against the reference: in Triton's interpreter, or compiled if there is a GPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lumiere_fast.kernels import _configs
from lumiere_fast.ops._selfcheck import FLOORS, relative_error
from lumiere_fast.ops.temporal_conv import temporal_conv_reference
from tests.ops.common import CHANNELS_LAST, CONTIGUOUS, Draw, assert_no_worse_than_torch

pytest.importorskip("triton", reason="the kernels need Triton")
from lumiere_fast.kernels import temporal_conv as kernels

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Never bfloat16 in the interpreter, which computes it wrongly and says nothing.
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
NAN = float("nan")
OP = kernels.OP


class Launches(list[tuple[str, dict[str, Any]]]):
    """The kernels launched so far with what they were compiled with: shipped forms, unless a test overrides them."""

    def __init__(self) -> None:
        super().__init__()
        self.overridden = False

    def __call__(self, kernel: Any, programs: int, out: Tensor, *arguments: Any, **options: Any) -> None:
        name = kernel.__name__
        types = {key: kind for key, kind in zip(kernel.arg_names, map(type_of, arguments), strict=False) if kind}
        assert self.overridden or (name, frozen(types), frozen(options)) in SHIPPED, (name, types, options)
        if options.get("LAYOUT", "any") != "any" or name == "_walk_kernel":
            for tensor in (*arguments[:2], out):  # x and the weight
                assert tensor.data_ptr() % 16 == 0, "what was promised to the compiler"
        self.append((name, options))
        kernels_launch(kernel, programs, out, *arguments, **options)

    def forms(self, name: str) -> list[tuple[Any, ...]]:
        """(SPAN, LAYOUT) of the convolutions, say."""
        keys = ("SPAN", "LAYOUT") if name == "_conv_kernel" else ()
        return [tuple(options[key] for key in keys) for found, options in self if found == name]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self]


def type_of(value: Any) -> str | None:
    return NAMES[value.dtype] if isinstance(value, Tensor) else "absent" if value is None else None


def frozen(items: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(items.items()))


def shipped(variant: Any) -> tuple[Any, ...]:
    types = {key: kind[1:] for key, kind in variant.signature.items() if kind.startswith("*")}
    absent = {key: "absent" for key, value in variant.constexprs.items() if value is None}
    constants = {key: value for key, value in variant.constexprs.items() if value is not None}
    options = {**constants, "num_warps": variant.num_warps, "num_stages": variant.num_stages}
    options |= {} if variant.maxnreg is None else {"maxnreg": variant.maxnreg}
    return variant.kernel, frozen(types | absent), frozen(options)


kernels_launch = kernels.launch
SHIPPED = {shipped(variant) for variant in kernels.VARIANTS}


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    recorded = Launches()
    monkeypatch.setattr(kernels, "launch", recorded)
    yield recorded


class Case:
    """The flat arguments of a call, drawn; `options` replace some of them."""

    def __init__(
        self,
        B: int = 1,
        C_in: int = 8,
        C_out: int = 8,
        T: int = 2,
        H: int = 3,
        W: int = 3,
        k: int = 3,
        *,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = CHANNELS_LAST,
        norm: int | None = None,
        norm_act: str | None = "silu",
        film: str = "",
        bias: str = "",
        residual: bool = False,
        wide_parameters: bool = False,
        seed: int = 5,
        **options: Any,
    ) -> None:
        draw = Draw(seed)
        self.dtype, self.memory_format = dtype, memory_format
        self.shape = (B, C_out, T, H, W)

        def small(*shape: int, wide: bool = wide_parameters) -> Tensor:
            return draw(*shape).to(DEVICE, torch.float32 if wide else dtype)

        def clip(C: int) -> Tensor:
            return draw(B, C, T, H, W).to(DEVICE, dtype).contiguous(memory_format=memory_format)

        self.arguments: dict[str, Any] = {
            "x": clip(C_in),
            "weight": (draw(C_out, C_in, k) / math.sqrt(C_in * k)).to(DEVICE, dtype),
            "bias": small(C_out) if bias == "channel" else small(B, T, C_out) if bias == "frame" else None,
            "padding_mode": "zeros",
            "act": None,
            "residual": clip(C_out) if residual else None,
            "stats_groups": None,
            **dict.fromkeys(("norm_mean", "norm_rstd", "norm_weight", "norm_bias", "norm_scale", "norm_shift")),
            "norm_act": norm_act,
        }
        if norm is not None:
            film_shape = (B, C_in) if film == "clip" else (B, T, C_in)
            self.arguments |= {
                "norm_mean": draw(B, T, norm).to(DEVICE, torch.float32),
                "norm_rstd": draw(B, T, norm).abs().to(DEVICE, torch.float32) + 0.5,
                "norm_weight": small(C_in),
                "norm_bias": small(C_in, wide=True),
                "norm_scale": small(*film_shape) if film else None,
                "norm_shift": small(*film_shape) if film else None,
            }
        self.arguments |= options

    def run(self, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What the kernels write over NaN."""
        B, _, T = self.shape[:3]
        groups = self.arguments["stats_groups"]
        if out is None:
            out = torch.empty(self.shape, dtype=self.dtype, device=DEVICE, memory_format=self.memory_format)
        stats = (B, T, groups) if groups else (0,)
        mean, rstd = (torch.full(stats, NAN, device=DEVICE) for _ in range(2))
        kernels.temporal_conv(*self.arguments.values(), out=(out.fill_(NAN), mean, rstd))
        return out, mean, rstd

    def check(self, out: Tensor | None = None) -> Tensor:
        ours = self.run(out)
        flat = self.arguments.values()
        theirs = temporal_conv_reference(*flat)
        exact = temporal_conv_reference(*(v.double() if isinstance(v, Tensor) else v for v in flat))
        assert_no_worse_than_torch(ours[0], theirs[0], exact[0])
        for mine, their, true in zip(ours[1:], theirs[1:], exact[1:], strict=True):
            if self.arguments["norm_mean"] is None:
                assert_no_worse_than_torch(mine, their, true)
            else:  # of a product whose operand, the normed x, is rounded to the dtype of x
                assert relative_error(mine, true) <= 2 * relative_error(their, true) + FLOORS[self.dtype]
        return ours[0]


SHAPES = (
    (1, 8, 8, 1, 1, 1),
    (2, 24, 8, 2, 5, 7),
    (1, 8, 24, 5, 1, 37),
    (1, 40, 72, 3, 9, 15),
)


@pytest.mark.parametrize("padding_mode", ["zeros", "replicate"])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(dtype: torch.dtype, shape: tuple[int, ...], k: int, padding_mode: str) -> None:
    Case(*shape, k, dtype=dtype, padding_mode=padding_mode).check()


@pytest.mark.parametrize(("k", "padding_mode"), [(1, "zeros"), (3, "replicate"), (3, "zeros"), (5, "replicate")])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_before_and_all_that_follows(
    dtype: torch.dtype, shape: tuple[int, ...], k: int, padding_mode: str, launches: Launches
) -> None:
    options: dict[str, Any] = {"act": "silu", "stats_groups": 4, "padding_mode": padding_mode}
    Case(*shape, k, dtype=dtype, norm=2, bias="channel", residual=True, **options).check()
    assert launches.names == ["_affine_kernel", "_conv_kernel"]  # and finish_stats, of group_norm


@pytest.mark.parametrize(("k", "padding_mode"), [(1, "zeros"), (3, "replicate"), (3, "zeros")])
@pytest.mark.parametrize(
    ("shape", "form"), [((2, 24, 72, 2, 8, 16), (False, "in")), ((2, 5, 7, 2, 3, 5), (False, "any"))]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_without_silu(
    dtype: torch.dtype, shape: tuple[int, ...], form: tuple[bool, str], k: int, padding_mode: str, launches: Launches
) -> None:
    """Zero padding comes after the norm here too."""
    options: dict[str, Any] = {"bias": "frame", "stats_groups": 1, "padding_mode": padding_mode}
    Case(*shape, k, dtype=dtype, norm=1, norm_act=None, film="frame", **options).check()
    assert launches.names == ["_affine_kernel", "_conv_kernel"] and not launches[-1][1]["NORM_SILU"]
    assert launches.forms("_conv_kernel") == [form]


@pytest.mark.parametrize("wide_parameters", [False, True])
@pytest.mark.parametrize("film", ["", "clip", "frame"])
@pytest.mark.parametrize("bias", ["", "channel", "frame"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters(dtype: torch.dtype, bias: str, film: str, wide_parameters: bool) -> None:
    """Each in the dtype of x or in fp32."""
    Case(2, 24, 16, 3, 2, 5, dtype=dtype, norm=3, film=film, bias=bias, wide_parameters=wide_parameters).check()


@pytest.mark.parametrize("absent", ["norm_weight", "norm_bias", "norm_scale", "norm_shift"])
def test_a_norm_without_some_of_its_parameters(absent: str) -> None:
    Case(2, 16, 8, 2, 2, 3, norm=4, film="frame", **{absent: None}).check()


@pytest.mark.parametrize("act", [None, "silu"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("stats_groups", [None, 1, 3, 24])
def test_what_follows(stats_groups: int | None, residual: bool, act: str | None) -> None:
    Case(2, 8, 24, 1, 5, 14, act=act, residual=residual, stats_groups=stats_groups).check()


@pytest.mark.parametrize(("C", "second"), [(8, False), (264, True)])
def test_statistics_do_not_cancel(C: int, second: bool, launches: Launches) -> None:
    """A mean of 1e3 and a deviation of 1, from the epilogue and from the second pass."""
    case = Case(1, C, C, 2, 9, 15, 1, bias="channel", stats_groups=2)
    case.arguments["bias"].fill_(1e3)
    case.check()
    assert ("_reduce_kernel" in launches.names) == second


@pytest.mark.parametrize("padding_mode", ["zeros", "replicate"])
@pytest.mark.parametrize(
    ("shape", "form"), [((2, 320, 136, 4, 3, 3), (True, "in")), ((1, 136, 264, 2, 8, 16), (False, "in"))]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_sums(
    dtype: torch.dtype, shape: tuple[int, ...], form: tuple[bool, str], padding_mode: str, launches: Launches
) -> None:
    """Few tiles: the loop is shared out, and small frames go into one tile."""
    options: dict[str, Any] = {"act": "silu", "stats_groups": 8, "padding_mode": padding_mode}
    Case(*shape, dtype=dtype, bias="frame", residual=True, **options).check()
    assert launches.names == ["_conv_kernel", "_reduce_kernel"]
    assert launches.forms("_conv_kernel") == [form]


def test_a_clip_of_one_frame_shares_out_its_only_tap(launches: Launches) -> None:
    Case(1, 40, 136, 1, 8, 16).check()
    assert launches.names == ["_conv_kernel", "_reduce_kernel"]


@pytest.mark.parametrize(
    ("clips", "channels", "splits"),
    [(1, 256, 3), (44, 256, 3), (45, 256, 2), (66, 256, 2), (67, 256, 1), (131, 256, 1), (1, 48, 1)],
)
def test_sums_are_shared_out_until_all_programs_run_at_once(clips: int, channels: int, splits: int) -> None:
    """Two on each of 132 multiprocessors: with two tiles of 128 by 128 a clip, and as many as there are steps."""
    x, y = (torch.empty(1, device=DEVICE, dtype=torch.half).expand(clips, C, 1, 8, 16) for C in (channels, 256))
    x, y = (clip.contiguous(memory_format=CHANNELS_LAST) for clip in (x, y))
    config = kernels.Config(128, 128, 64, 3, 8, 3)
    weight = torch.empty(256, channels, 1, device=DEVICE, dtype=torch.half)
    _, plan = kernels._plan(x, weight, None, y, config, False)
    assert (plan.splits, plan.second, plan.programs) == (splits, splits > 1, 2 * clips * splits)


def test_registers_are_capped_where_it_costs_no_stack() -> None:
    assert kernels._capped(False, False, False, newer=False) and not kernels._capped(False, True, False, newer=False)
    assert kernels._capped(False, True, False, newer=True) and not kernels._capped(False, True, True, newer=True)
    assert not kernels._capped(True, False, True, newer=True)  # rows that span frames are always handed on
    assert kernels.Config(128, 128, 64, 1, 8, 3, maxnreg=128).launch_options(True)["maxnreg"] == 128
    assert "maxnreg" not in kernels.Config(128, 128, 64, 1, 8, 3, maxnreg=128).launch_options(False)
    assert "maxnreg" not in kernels.Config(128, 128, 64, 1, 8, 3).launch_options(True)


@pytest.mark.parametrize("padding_mode", ["zeros", "replicate"])
@pytest.mark.parametrize("norm_act", ["no norm", "silu", None])
@pytest.mark.parametrize(("C_in", "C_out", "T"), [(8, 24, 1), (64, 72, 9), (104, 8, 2)])
def test_walk(C_in: int, C_out: int, T: int, norm_act: str | None, padding_mode: str, launches: Launches) -> None:
    """Three taps in one pass over the frames: parts of clips, one block of channels and two."""
    launches.overridden = True
    options: dict[str, Any] = {"act": "silu", "stats_groups": 4, "padding_mode": padding_mode}
    norm = {} if norm_act == "no norm" else {"norm": 2, "norm_act": norm_act, "film": "frame"}
    case = Case(1, C_in, C_out, T, 8, 15, dtype=torch.float16, bias="frame", residual=True, **norm, **options)
    with configured(walk=True):
        case.check()
    assert launches.names[-1] == "_walk_kernel"
    assert launches[-1][1]["WIDE"] == (C_in > 64)


@pytest.mark.parametrize(("fused", "names"), [(True, ["_affine_kernel", "_conv_kernel"]), (False, ["_conv_kernel"])])
@pytest.mark.parametrize("memory_format", [CHANNELS_LAST, CONTIGUOUS])
@pytest.mark.parametrize("act", [None, "silu"])
def test_norm_fused_or_in_a_pass_before(
    act: str | None, memory_format: torch.memory_format, fused: bool, names: list[str], launches: Launches
) -> None:
    launches.overridden = True
    with configured(fused_norm=fused):
        Case(2, 24, 16, 3, 4, 16, norm=3, norm_act=act, film="clip", memory_format=memory_format).check()
    assert launches.names == names


def configured(**fields: Any) -> ExitStack:
    """Within it, all cases have these fields where they have such ones."""
    stack = ExitStack()
    device = torch.device(DEVICE)
    for case in _configs.cases(OP):
        config = _configs.chosen(OP, case, device)
        stack.enter_context(_configs.override(OP, case, {**config, **{k: v for k, v in fields.items() if k in config}}))
    return stack


# Layouts.


@pytest.mark.parametrize("norm", [None, 2])
@pytest.mark.parametrize("memory_format", [CHANNELS_LAST, CONTIGUOUS])
@pytest.mark.parametrize("C_in", [6, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(
    dtype: torch.dtype, C_in: int, memory_format: torch.memory_format, norm: int | None, launches: Launches
) -> None:
    """Any of the activations, in any of a few ways; and nothing beside `out` is touched, or beside x is of account."""
    case = Case(2, C_in, 8, 3, 3, 5, dtype=dtype, norm=norm, residual=True, bias="frame", memory_format=memory_format)
    dense = case.arguments["x"], case.arguments["residual"]
    case.arguments["x"], case.arguments["residual"] = map(in_a_larger, dense)
    held = torch.full((2, 9, 4, 7, 11), -7.0, dtype=dtype, device=DEVICE)
    out = held[:, :8, 1:, 1:4, ::2][..., :5]
    case.check(out)
    out.fill_(-7.0)
    assert (held == -7.0).all()
    assert launches[-1][1]["LAYOUT"] == "any"


def in_a_larger(clip: Tensor) -> Tensor:
    """The same values, with NaN around them and gaps between them."""
    B, C, T, H, W = clip.shape
    held = torch.full((B + 1, T + 2, H + 1, 2 * W, 3 * C), NAN, dtype=clip.dtype, device=clip.device)
    within = held[1:, 1:-1, :H, ::2, C : 2 * C].permute(0, 4, 1, 2, 3)
    return within.copy_(clip)


def test_slices_of_whole_vectors_keep_wide_loads(launches: Launches) -> None:
    """Frames, rows and channels of a larger clip, with NaN in what is not theirs."""
    case = Case(1, 24, 16, 3, 4, 32, dtype=torch.float16)
    held = torch.full((1, 7, 6, 32, 64), NAN, dtype=torch.float16, device=DEVICE)
    x = held[:, 1:7:2, 1:5, :, 8:32].permute(0, 4, 1, 2, 3)
    case.arguments["x"] = x.copy_(case.arguments["x"])
    case.check()
    assert launches.forms("_conv_kernel") == [(False, "in")]


@pytest.mark.parametrize(
    ("order", "layout", "copies"), [((2, 0, 1), "in", False), ((2, 1, 0), "out", False), ((0, 1, 2), "in", True)]
)
def test_weights(
    order: tuple[int, ...], layout: str, copies: bool, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taps outermost in memory cost no copy, whichever axis of channels is dense."""
    case = Case(1, 24, 16, 3, 4, 32)
    weight = case.arguments["weight"]
    back = [order.index(axis) for axis in range(3)]
    case.arguments["weight"] = weight = weight.permute(order).contiguous().permute(back)
    read = []
    plan = kernels._plan
    monkeypatch.setattr(kernels, "_plan", lambda *a: read.append(plan(*a)) or read[-1])
    case.check()
    assert launches.forms("_conv_kernel") == [(False, layout)]
    ((used, _),) = read
    assert torch.equal(used, weight)
    assert (used.data_ptr() != weight.data_ptr()) == copies


def test_weights_and_biases_of_any_strides() -> None:
    """Taps backwards would be a copy of torch's own; every other tap, channel and frame is not."""
    case = Case(2, 8, 16, 3, 2, 5, bias="frame")
    held = torch.full((32, 16, 6), NAN, device=DEVICE)
    case.arguments["weight"] = held[::2, 8:, 1::2].copy_(case.arguments["weight"])
    biases = torch.full((2, 3, 33), NAN, device=DEVICE)
    case.arguments["bias"] = biases[..., 1::2].copy_(case.arguments["bias"])
    case.check()
    case.arguments["x"] = case.arguments["x"].contiguous()
    case.check()


def test_rows_with_gaps(launches: Launches) -> None:
    """A window of a wider clip, on whole vectors."""
    case = Case(1, 8, 8, 2, 3, 4)
    held = torch.full((1, 2, 3, 9, 8), NAN, device=DEVICE)
    case.arguments["x"] = held[:, :, :, 2:6].permute(0, 4, 1, 2, 3).copy_(case.arguments["x"])
    case.check()
    assert launches.forms("_conv_kernel") == [(False, "any")]


def test_expanded_film_chunks() -> None:
    """Scale and shift as halves of a projection, one for all frames."""
    case = Case(2, 16, 8, 3, 2, 3, norm=2)
    both = torch.randn(2, 1, 32, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    scale, shift = both.expand(2, 3, 32).chunk(2, dim=-1)
    case.arguments |= {"norm_scale": scale, "norm_shift": shift}
    case.check()


def test_a_misaligned_weight_is_copied(launches: Launches) -> None:
    case = Case(1, 8, 8, 2, 4, 32)
    memory = torch.full((1 + 3 * 8 * 8,), NAN, device=DEVICE)
    case.arguments["weight"] = memory[1:].view(3, 8, 8).permute(1, 2, 0).copy_(case.arguments["weight"])
    case.check()
    assert launches.forms("_conv_kernel") == [(False, "in")]


def test_misaligned_clips_take_narrow_loads(launches: Launches) -> None:
    case = Case(1, 8, 8, 2, 3, 3)
    memory = torch.full((1 + 2 * 3 * 3 * 8,), NAN, device=DEVICE)
    case.arguments["x"] = memory[1:].view(1, 2, 3, 3, 8).permute(0, 4, 1, 2, 3).copy_(case.arguments["x"])
    case.check()
    assert launches[-1][1]["LAYOUT"] == "any"


@pytest.mark.parametrize("C", [8, 136])
def test_the_same_bits_in_every_run(C: int) -> None:
    case = Case(1, C, C, 3, 5, 7, dtype=torch.float16, bias="channel", stats_groups=2)
    for once, again in zip(case.run(), case.run(), strict=True):
        assert torch.equal(once, again)


def test_an_empty_batch_launches_nothing(launches: Launches) -> None:
    assert Case(0).run()[0].shape == (0, 8, 2, 3, 3)
    assert not launches


@pytest.mark.parametrize("C", [6, 8])
def test_elements_past_2_to_the_31(C: int) -> None:
    """Frames that lie 2^30 elements apart in storage that is never touched between them."""
    apart = 2**30
    case = Case(1, C, C, 4, 3, 3, dtype=torch.float16)
    storage = torch.empty(3 * apart + 128, dtype=torch.float16, device=DEVICE)
    far = storage.as_strided((1, C, 4, 3, 3), (0, 1, apart, 3 * C, C))
    case.arguments["x"] = far.copy_(case.arguments["x"])
    wanted = case.check().clone()
    near = Case(1, C, C, 4, 3, 3, dtype=torch.float16)
    assert torch.equal(near.run(far)[0], wanted)


def test_a_grid_that_cannot_be_is_refused() -> None:
    case = Case(1, 1, 1, 1, 1, 1, 1)
    case.arguments["x"] = torch.empty(1, device=DEVICE).expand(2**21, 1, 2**11, 1, 1)
    out = torch.empty(1, device=DEVICE).expand(2**21, 1, 2**11, 1, 1)
    empty = torch.empty(0, device=DEVICE)
    with pytest.raises(ValueError, match="takes 4294967296 programs"):
        kernels.temporal_conv(*case.arguments.values(), out=(out, empty, empty))


TRACE = """
import torch, triton
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from lumiere_fast.kernels.temporal_conv import temporal_conv

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())

@torch.library.triton_op("test::conv", mutates_args=())
def conv(x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor | None) -> list[torch.Tensor]:
    y = torch.empty_like(x)
    stats = [torch.empty(1, x.shape[2], 2, device="cuda") for _ in "ab"]
    if not isinstance(y, FakeTensor):
        temporal_conv(x, weight, None, "zeros", "silu", None, 2, mean, mean, *[None] * 4, "silu", out=(y, *stats))
    return [y, *stats]

class Model(torch.nn.Module):
    def forward(self, x, weight, mean=None):
        return tuple(torch.ops.test.conv(x, weight, mean))

with FakeTensorMode():
    for C, normed in ((32, True), (256, True), (256, False)):
        x = torch.empty(1, 4, 8, 16, C, device="cuda", dtype=torch.bfloat16).permute(0, 4, 1, 2, 3)
        weight = torch.empty(C, C, 3, device="cuda", dtype=torch.bfloat16)
        inputs = [x, weight, *([torch.empty(1, 4, 2, device="cuda")] if normed else [])]
        graph, _ = aot_export_module(Model(), inputs, trace_joint=False)
        calls = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        print(*("+".join(sorted(call.kwargs["tensors_to_clone"])) for call in calls))
        assert not any("maxnreg" in call.kwargs["kwargs"] for call in calls)
"""


def test_a_trace_holds_the_launches_and_knows_what_they_write() -> None:
    """torch.compile sees the kernels: traced on fake CUDA tensors, for sm_90, without a GPU.

    Wide channels would cap registers, which a traced launch cannot be told.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", TRACE], capture_output=True, text=True, timeout=250, cwd=ROOT, env=environment
    )
    finish = "mean+rstd"
    assert done.stdout.splitlines() == [
        f"multiplier+offset m2+mean+y {finish}",
        f"out partials m2+mean+y {finish}",
        f"partials m2+mean+y {finish}",
    ], done.stdout + done.stderr


# Configurations.


def test_every_case_is_reached_and_has_candidates() -> None:
    dtypes, channels, rows = (torch.float32, torch.bfloat16), (8, 64, 72, 128, 136, 256, 264, 2048), (128, 2**20)
    reached = {
        kernels.case_of(dtype, c_out, taps, n, normed)
        for dtype, c_out, taps, n, normed in product(dtypes, channels, (1, 3, 5), rows, (False, True))
    }
    assert reached == set(_configs.cases(OP)) == set(kernels.CANDIDATES)
    for case, found in kernels.CANDIDATES.items():
        assert found
        for config in found:
            with _configs.override(OP, case, config):
                assert _configs.chosen(OP, case, torch.device(DEVICE)) == config


GPU = "NVIDIA H100 80GB HBM3"
CASE = "half-wide-kn-plain-many"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A GPU of that name, a folder of what ships, and an empty cache folder, both under the path."""
    shipped = tmp_path / "configs"
    shipped.mkdir()
    (shipped / "default.json").write_text((_configs.FOLDER / "default.json").read_text())
    monkeypatch.setattr(_configs, "FOLDER", shipped)
    monkeypatch.setattr(_configs, "gpu_name", lambda device: GPU)
    monkeypatch.setenv("LUMIERE_FAST_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    _configs._chosen.cache_clear()
    _configs._defaults.cache_clear()


def chosen(case: str = CASE) -> _configs.Config:
    return _configs.chosen(OP, case, torch.device("cuda"))


def changed(**fields: Any) -> dict[str, Any]:
    return {**_configs._defaults()[OP][CASE], **fields}


def test_override_then_user_then_shipped_then_default(tables: Path) -> None:
    assert chosen() == changed()
    _configs.save(tables / "configs" / _configs.file_name(GPU), GPU, {OP: {CASE: changed(split_k=2)}})
    assert chosen() == changed(split_k=2)
    assert _configs.shipped(OP)[CASE] == [changed(), changed(split_k=2)]
    _configs.save(_configs.user_file(GPU), GPU, {OP: {CASE: changed(split_k=3)}})
    assert chosen() == changed(split_k=3)
    with _configs.override(OP, CASE, changed(split_k=4)), _configs.override(OP, "half-c64-kn-plain-few", changed()):
        assert chosen() == changed(split_k=4)
    assert chosen() == changed(split_k=3)
    assert chosen("half-c64-kn-plain-few") == _configs._defaults()[OP]["half-c64-kn-plain-few"]


def test_a_gpu_is_asked_for_its_name_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: asked.append(index) or f"GPU {index}")
    _configs._device_name.cache_clear()
    names = [_configs.gpu_name(torch.device("cuda", index)) for index in (0, 1, 0, 1)]
    _configs._device_name.cache_clear()
    assert names == ["GPU 0", "GPU 1", "GPU 0", "GPU 1"] and asked == [0, 1]
    assert _configs.gpu_name(torch.device("cpu")) is None


def test_save_keeps_other_cases(tables: Path) -> None:
    path = _configs.user_file(GPU)
    assert path == tables / "cache" / "configs" / "nvidia-h100-80gb-hbm3.json"
    _configs.save(path, GPU, {OP: {CASE: changed(split_k=2), "half-wide-kn-plain-few": changed(split_k=5)}})
    _configs.save(path, GPU, {OP: {CASE: changed(split_k=3)}})
    held = json.loads(path.read_text())
    assert held == {"gpu": GPU, OP: {CASE: changed(split_k=3), "half-wide-kn-plain-few": changed(split_k=5)}}
    assert [each.name for each in path.parent.iterdir()] == [path.name]


DAMAGED = {
    "{": "cannot be read",
    "[]": "must be a JSON object",
    "{}": '"gpu" is None',
    json.dumps({"gpu": "NVIDIA A100"}): "\"gpu\" is 'NVIDIA A100', this is the table of 'NVIDIA H100",
    json.dumps({"gpu": GPU, "temporal_cow": {}}): "no op 'temporal_cow'",
    json.dumps({"gpu": GPU, OP: []}): "must be an object of cases",
    json.dumps({"gpu": GPU, OP: {"half-wide": {}}}): "no case 'half-wide'",
    json.dumps({"gpu": GPU, OP: {CASE: {"block_m": 64}}}): "must have exactly block_m, block_n",
}


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_table_is_named(text: str, tables: Path) -> None:
    path = _configs.user_file(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError) as raised:
        chosen()
    assert str(path) in str(raised.value) and DAMAGED[text] in str(raised.value)


@pytest.mark.parametrize("field", [{"split_k": 0}, {"split_k": True}, {"walk": 1}, {"split_k": "2"}, {"stages": 2}])
def test_a_wrong_field_is_named(field: dict[str, Any], tables: Path) -> None:
    (name,) = field
    with (
        pytest.raises(ValueError, match=rf"the override: {OP}, {CASE}.*{name}"),
        _configs.override(OP, CASE, changed(**field)),
    ):
        pass
    path = tables / "table.json"
    with pytest.raises(ValueError, match=name):
        _configs.save(path, GPU, {OP: {CASE: changed(**field)}})
    assert not path.exists()


@pytest.mark.parametrize("call", [lambda: _configs.cases("no_op"), lambda: chosen("no-case")])
def test_what_there_is_not_is_said(call: Any) -> None:
    with pytest.raises(ValueError, match=r"no_op|no-case"):
        call()


def test_variants_have_each_name_once() -> None:
    names: Sequence[str] = [variant.name for variant in kernels.VARIANTS]
    assert len(set(names)) == len(names)
