"""The Triton kernels of group_norm against the reference: in Triton's interpreter, or compiled if there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lumiere_fast.ops.group_norm import (
    EPS,
    SPEC,
    channel_affine,
    describe_stats,
    group_norm_reference,
    group_norm_stats_reference,
    scale_and_shift,
)
from tests.ops.common import CHANNELS_LAST, CONTIGUOUS, FORMATS, Draw, assert_no_worse_than_torch

pytest.importorskip("triton", reason="the kernels need Triton")
from lumiere_fast.kernels import group_norm as kernels

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Never bfloat16 in the interpreter, which computes it wrongly and says nothing.
DTYPES = (torch.float32, torch.float64, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))
NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
FORWARD, BACKWARD = 2.0, 3.0  # how much worse than torch's own error an error may be
PARAMETERS = ("weight", "bias", "scale", "shift")

# Lanes without pixels divide by zero before they are masked off.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")


class Launches(list[str]):
    """The kernels launched so far with the form of their tile, each one that the gate compiles ahead of time."""

    def __call__(self, kernel: Any, programs: int, out: Tensor, *arguments: Any, **options: Any) -> None:
        kinds = tuple(NAMES[value.dtype] for value in arguments if isinstance(value, Tensor))
        constants = {name: value for name, value in options.items() if name not in kernels.OPTIONS}
        assert (kernel.__name__, kinds, tuple(constants.items())) in SHIPPED
        shapes = {tile: name for size in (2, 4, 8) for name, tile in kernels._forms(size).items()}
        self.append(shapes[kernels.Form(**constants)] if "VECTOR" in constants else "finish")
        LAUNCH(kernel, programs, out, *arguments, **options)


LAUNCH = kernels.launch
SHIPPED = {
    (
        variant.kernel,
        tuple(kind.removeprefix("*") for kind in variant.signature.values() if kind.startswith("*")),
        tuple(variant.constexprs.items()),
    )
    for variant in kernels.VARIANTS
}


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    recorded = Launches()
    monkeypatch.setattr(kernels, "launch", recorded)
    yield recorded


@pytest.fixture
def long_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where programs are many: each walks over as many steps as it may."""
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    monkeypatch.setattr(kernels, "_cached_plan", kernels._plan)


def to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) else value


def exactly(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*(to(value, torch.float64) for value in arguments))


class Case:
    """The flat arguments of `group_norm`, drawn; parameters as named, FiLM per clip or per frame."""

    def __init__(
        self,
        shape: Sequence[int],
        groups: int,
        dtype: torch.dtype = torch.float32,
        *,
        given: Sequence[str] = PARAMETERS,
        film: str = "clip",
        act: str | None = "silu",
        per_frame: bool = True,
        memory_format: torch.memory_format = CHANNELS_LAST,
        seed: int = 3,
    ) -> None:
        self.draw = Draw(seed)
        B, C, T, _, _ = shape
        self.x = self.draw.clip(*shape).to(DEVICE, dtype).contiguous(memory_format=memory_format)
        sizes = {"weight": (C,), "bias": (C,), "scale": (B, C), "shift": (B, C)}
        if film == "frame":
            sizes |= {"scale": (B, T, C), "shift": (B, T, C)}
        drawn = {name: self.draw(*size).to(DEVICE, dtype) for name, size in sizes.items()}
        self.parameters = [drawn[name] if name in given else None for name in PARAMETERS]
        self.groups, self.act, self.eps, self.per_frame = groups, act, EPS, per_frame

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.x, self.groups, *self.parameters, self.act, self.eps, self.per_frame)

    def check(self, out: Tensor | None = None) -> Tensor:
        out = torch.empty_like(self.x) if out is None else out
        kernels.group_norm(*self.arguments, out=out.fill_(float("nan")))
        exact = exactly(group_norm_reference, *self.arguments)
        assert_no_worse_than_torch(out, group_norm_reference(*self.arguments), exact, FORWARD)
        return out

    def check_stats(self) -> tuple[Tensor, Tensor]:
        arguments = (self.x, self.groups, self.eps, self.per_frame)
        ours = tuple(result.empty().fill_(float("nan")) for result in describe_stats(*arguments))
        kernels.group_norm_stats(*arguments, out=ours)
        for mine, theirs, exact in zip(
            ours, group_norm_stats_reference(*arguments), exactly(group_norm_stats_reference, *arguments), strict=True
        ):
            assert_no_worse_than_torch(mine, theirs, exact, FORWARD)
        return ours

    def check_gradients(self, wanted: Sequence[str] = ("x", *PARAMETERS)) -> None:
        """Of the tensors wanted and no others, each in its dtype."""
        grad = self.draw(*self.x.shape).to(DEVICE, self.x.dtype)
        names = ("x", "num_groups", *PARAMETERS, "act", "eps", "per_frame")
        leaves = [value.detach() if isinstance(value, Tensor) else value for value in self.arguments]
        for name, value in zip(names, leaves, strict=True):
            if name in wanted:
                value.requires_grad_()
        ours = kernels.group_norm_backward((grad,), *leaves)
        assert [name for name, found in zip(names, ours, strict=True) if found is not None] == list(wanted)
        check_against_autograd(group_norm_reference, self.arguments, (grad,), ours)


def check_against_autograd(
    definition: Callable[..., Any], arguments: Sequence[Any], grads: Sequence[Tensor], ours: Sequence[Tensor | None]
) -> None:
    """Our gradients, one for each argument or None, against torch's in the arguments' dtypes and in fp64."""
    wanted = [place for place, found in enumerate(ours) if found is not None]

    def differentiated(dtype: torch.dtype | None) -> Sequence[Tensor]:
        values = [value.detach() if isinstance(value, Tensor) else value for value in arguments]
        values = [value if dtype is None else to(value, dtype) for value in values]
        leaves = [values[place].requires_grad_() for place in wanted]
        results = definition(*values)
        results = (results,) if isinstance(results, Tensor) else results
        return torch.autograd.grad(results, leaves, [to(g, y.dtype) for g, y in zip(grads, results, strict=True)])

    for place, theirs, exact in zip(wanted, differentiated(None), differentiated(torch.float64), strict=True):
        mine = ours[place]
        assert isinstance(mine, Tensor) and (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert_no_worse_than_torch(mine, theirs, exact, BACKWARD)


SHAPES = [
    (2, 8, 2, 4, 6, 2),
    (1, 6, 1, 7, 1, 3),  # one frame, prime pixels, C no multiple of 8
    (2, 5, 2, 1, 1, 5),  # every group is a single number
    (1, 24, 1, 3, 11, 1),  # one more pixel than a tile has
    (1, 30, 1, 3, 3, 1),
    (1, 8, 2, 5, 5, 8),  # a group is a channel
    (1, 1, 2, 23, 23, 1),  # one channel, prime pixels
]


@pytest.mark.parametrize("memory_format", FORMATS, ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    case = Case(shape[:-1], shape[-1], memory_format=memory_format)
    assert case.check().stride() == case.x.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_groups_across_tiles_of_channels(dtype: torch.dtype) -> None:
    """320 channels in groups of 10, in tiles of 32 and 64."""
    case = Case((1, 320, 1, 2, 2), 32, dtype)
    case.check()
    if dtype == torch.float32:
        case.check_gradients()


@pytest.mark.parametrize(
    ("dtype", "memory_format"), [(torch.float32, CONTIGUOUS), *((dtype, CHANNELS_LAST) for dtype in DTYPES)], ids=str
)
@pytest.mark.parametrize("side", [(2, 16), (7, 13), (5, 103)], ids=str)
def test_programs_walk_over_several_tiles(
    side: tuple[int, int], dtype: torch.dtype, memory_format: torch.memory_format, long_walks: None
) -> None:
    """Frames of one step of a walk, of some and a part, and of more than a walk."""
    case = Case((1, 8, 1, *side), 2, dtype, film="frame", memory_format=memory_format)
    case.check()
    case.check_stats()
    case.check_gradients()


@pytest.mark.parametrize(
    ("per_frame", "film", "act"),
    [(True, "clip", "silu"), (False, "frame", "silu"), (True, "frame", None), (False, "clip", None)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(dtype: torch.dtype, per_frame: bool, film: str, act: str | None) -> None:
    case = Case((2, 12, 2, 3, 5), 2, dtype, film=film, act=act, per_frame=per_frame)
    case.check()
    case.check_gradients()


@pytest.mark.parametrize(
    "given", [(), *((name,) for name in PARAMETERS), ("bias", "scale"), ("weight", "shift")], ids=str
)
def test_each_parameter_may_be_absent(given: tuple[str, ...]) -> None:
    case = Case((2, 8, 2, 3, 3), 2, torch.float16, given=given)
    case.check()
    case.check_gradients(("x", *given))


def test_parameters_of_both_dtypes() -> None:
    """Each is of the dtype of x or of the accumulation dtype."""
    for high in (PARAMETERS, ("weight", "bias"), ("scale",)):
        case = Case((2, 8, 2, 3, 3), 2, torch.float16)
        pairs = zip(PARAMETERS, case.parameters, strict=True)
        case.parameters = [to(value, torch.float32) if name in high else value for name, value in pairs]
        case.check()
        case.check_gradients()


@pytest.mark.parametrize("form", ["chunks", "frames of a chunk", "expanded", "reversed axes"])
def test_parameters_of_any_strides(form: str) -> None:
    case = Case((2, 8, 3, 3, 3), 2)
    wide = case.draw(2, 3, 16).to(DEVICE, torch.float32)
    if form == "chunks":
        scale, shift = wide[:, 0].chunk(2, dim=-1)
    elif form == "frames of a chunk":
        scale, shift = wide.chunk(2, dim=-1)
    elif form == "expanded":
        scale, shift = (part[:, :1].expand(2, 3, 8) for part in wide.chunk(2, dim=-1))
    else:
        scale, shift = (part.permute(2, 1, 0).contiguous().permute(2, 1, 0) for part in wide.chunk(2, dim=-1))
    case.parameters = [wide[0, 0, ::2], wide[0, 1, 1::2], scale, shift]
    case.check()


SLICES = {
    "frames": lambda x: x[:1, :8, 1:],
    "channels": lambda x: x[:1, 8:, :2],
    "misaligned channels": lambda x: x[:1, 3:11, :2],
    "every other channel": lambda x: x[:1, ::2, :2],
    "every other frame": lambda x: x[:1, :8, ::2],
    "columns": lambda x: x[:1, :8, :2, :, 1::2],
    "rows": lambda x: x[:1, :8, :2, 1:3],
    "clips": lambda x: x[1:, :8, :1],
    "one frame for all": lambda x: x[:1, :8, :1].expand(-1, -1, 3, -1, -1),
}


@pytest.mark.parametrize("memory_format", FORMATS, ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("name", SLICES)
def test_strided_slices(name: str, memory_format: torch.memory_format) -> None:
    x = SLICES[name](Case((2, 16, 3, 4, 6), 4, torch.float16, memory_format=memory_format).x)
    case = Case(x.shape, 2, torch.float16)
    case.x = x
    case.check()
    case.check_gradients(("x",))


@pytest.mark.parametrize("layout", ["slice", "axes in another order", "gaps everywhere"])
def test_out_of_any_strides(layout: str) -> None:
    """And nothing beside it is touched."""
    case = Case((2, 8, 3, 4, 4), 2)
    held = torch.full((2, 16, 6, 10, 12), -7.0, device=DEVICE).contiguous(memory_format=CHANNELS_LAST)
    if layout == "slice":
        out = held[:, :8, :3, :4, 4:8]
    elif layout == "axes in another order":
        out = held[:, :8, :3, :4, :4].permute(0, 1, 4, 3, 2).contiguous().permute(0, 1, 4, 3, 2)
    else:
        out = held[:, ::2, ::2, 2::2, ::3]
    assert case.check(out) is out
    if layout != "axes in another order":
        out.fill_(-7.0)
        assert (held == -7.0).all()


def test_statistics_of_any_strides() -> None:
    case = Case((2, 8, 3, 4, 4), 2)
    for per_frame, shape in ((True, (2, 3, 2)), (False, (2, 2))):
        held = torch.full((*shape, 2), float("nan"), device=DEVICE)
        turned = torch.full(shape[::-1], float("nan"), device=DEVICE).permute(*reversed(range(len(shape))))
        kernels.group_norm_stats(case.x, 2, EPS, per_frame, out=(held[..., 0], turned))
        expected = group_norm_stats_reference(case.x, 2, EPS, per_frame)
        for ours, theirs in zip((held[..., 0], turned), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert held[..., 1].isnan().all()


@pytest.mark.parametrize("memory_format", FORMATS, ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("what", ["offset", "outlier", "constant"])
def test_statistics_do_not_cancel(what: str, memory_format: torch.memory_format, long_walks: None) -> None:
    """Not where the mean is ten thousand deviations, nor where a tile's first pixel is far from all others."""
    for dtype in (torch.float32, torch.float64):
        case = Case((1, 8, 2, 15, 40), 4, dtype, memory_format=memory_format)
        if what == "offset":
            case.x += 1e4
        elif what == "outlier":
            case.x[..., 0, 0] = 1e4
        else:
            case.x.fill_(3.0)
            case.eps = 1e-7
        if dtype != torch.float64 or what != "offset":  # there torch's own norm, in channels-last memory, cancels
            case.check()
        mean, rstd = case.check_stats()
        if what == "constant":
            assert (mean == 3.0).all()
            torch.testing.assert_close(
                rstd, torch.full_like(rstd, 1e-7**-0.5), rtol=1e-14 if rstd.dtype == torch.float64 else 1e-6, atol=0
            )


@pytest.mark.parametrize("per_frame", [True, False], ids=["per frame", "per clip"])
@pytest.mark.parametrize(("pixels", "rows"), [(1, 4), (5, 64), (7, 4), (16, 4), (700, 1)], ids=str)
def test_partials_of_another_kernel(pixels: int, rows: int, per_frame: bool) -> None:
    """With fp32 means; the last ones take several rounds."""
    B, T, C, G = 2, 2, 12, 4
    x = Draw(5, torch.float32)(B, T, pixels, C).to(DEVICE) + 5.0
    parts = x.split(rows, dim=2)
    means = torch.stack([part.mean(2) for part in parts], 2)
    squares = torch.stack([part.var(2, correction=0) * part.shape[2] for part in parts], 2)
    clip = x[:, :, None].permute(0, 4, 1, 2, 3)
    ours = tuple(result.empty().fill_(float("nan")) for result in describe_stats(clip, G, EPS, per_frame))
    kernels.finish_stats(means, squares, rows, pixels, G, EPS, per_frame, out=ours)
    exact = group_norm_stats_reference(clip.double(), G, EPS, per_frame)
    for mine, theirs, truth in zip(ours, group_norm_stats_reference(clip, G, EPS, per_frame), exact, strict=True):
        assert_no_worse_than_torch(mine, theirs, truth)


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias", "shift"), ("x", "scale")], ids=str)
def test_only_wanted_gradients(wanted: tuple[str, ...], launches: Launches) -> None:
    Case((2, 8, 2, 3, 3), 2).check_gradients(wanted)
    assert len(launches) == (4 if "x" in wanted else 3)


@pytest.mark.parametrize("per_frame", [True, False], ids=["per frame", "per clip"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_the_statistics(dtype: torch.dtype, per_frame: bool) -> None:
    case = Case((2, 12, 2, 5, 7), 2, dtype)
    arguments = (case.x, 2, EPS, per_frame)
    shape, total = describe_stats(*arguments)[0].shape, describe_stats(*arguments)[0].dtype
    grads = [case.draw(*shape).to(DEVICE, total) for _ in range(2)]
    for given in (grads, [grads[0], None], [None, grads[1]]):
        ours = kernels.group_norm_stats_backward(tuple(given), *arguments)
        assert ours[0] is not None and ours[1:] == (None, None, None)
        filled = [torch.zeros_like(grads[0]) if each is None else each for each in given]
        check_against_autograd(group_norm_stats_reference, arguments, filled, ours)


def normalized(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str | None,
) -> Tensor:
    """`normalize` in plain torch."""
    stats = [each if each.dim() == 3 else each[:, None] for each in (mean, rstd)]
    stats = [each.repeat_interleave(x.shape[1] // each.shape[-1], dim=-1) for each in stats]
    center, gain = (each.transpose(1, 2)[..., None, None] for each in stats)
    n = (x.to(mean.dtype) - center) * gain
    y = scale_and_shift(n, *channel_affine(weight, bias, scale, shift, mean.dtype))
    return (F.silu(y) if act == "silu" else y).to(x.dtype)


@pytest.mark.parametrize("act", [None, "silu"])
@pytest.mark.parametrize("per_frame", [True, False], ids=["per frame", "per clip"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_with_given_statistics(dtype: torch.dtype, per_frame: bool, act: str | None) -> None:
    """Forward and backward; the statistics are inputs like all others, and not those of x."""
    case = Case((2, 12, 2, 3, 5), 2, dtype, film="frame" if per_frame else "clip", act=act)
    stats = describe_stats(case.x, 2, EPS, per_frame)
    mean, rstd = (0.3 * case.draw(*each.shape).to(DEVICE, each.dtype) + 1.0 for each in stats)
    arguments = (case.x, mean, rstd, *case.parameters, act)
    out = torch.full_like(case.x, float("nan"))
    kernels.normalize(*arguments, out=out)
    assert_no_worse_than_torch(out, normalized(*arguments), exactly(normalized, *arguments), FORWARD)
    grad = case.draw(*case.x.shape).to(DEVICE, dtype)
    names = ("x", "mean", "rstd", *PARAMETERS)
    subsets = [("x",), ("mean", "rstd"), ("rstd", "weight", "shift")] if dtype == torch.float32 and act else []
    for wanted in (names, *subsets):
        ours = kernels.normalize_backward(grad, *arguments, [name in wanted for name in names])
        assert [name for name, found in zip(names, ours, strict=True) if found is not None] == list(wanted)
        check_against_autograd(normalized, arguments, (grad,), (*ours, None))


def test_a_gradient_that_is_expanded() -> None:
    """As of a sum: one number for all elements."""
    case = Case((1, 8, 2, 3, 3), 4)
    arguments = tuple(value.detach() if isinstance(value, Tensor) else value for value in case.arguments)
    arguments[0].requires_grad_()
    grad = torch.ones((), device=DEVICE).expand(case.x.shape)
    check_against_autograd(group_norm_reference, arguments, (grad,), kernels.group_norm_backward((grad,), *arguments))


@pytest.mark.parametrize("memory_format", FORMATS, ids=["channels_last", "contiguous"])
def test_results_are_the_same_each_time(memory_format: torch.memory_format) -> None:
    case = Case((1, 6, 1, 9, 9), 2, memory_format=memory_format)
    grad = case.draw(*case.x.shape).to(DEVICE, torch.float32)
    leaves = [value.requires_grad_() if isinstance(value, Tensor) else value for value in case.arguments]

    def everything() -> list[Tensor]:
        out = torch.empty_like(case.x)
        kernels.group_norm(*case.arguments, out=out)
        return [out, *(each for each in kernels.group_norm_backward((grad,), *leaves) if each is not None)]

    for once, again in zip(everything(), everything(), strict=True):
        assert torch.equal(once, again)


def test_frames_do_not_see_each_other() -> None:
    case = Case((1, 8, 3, 3, 3), 4)
    y = case.check()
    case.x[:, :, 1] = float("nan")
    z = torch.empty_like(y)
    kernels.group_norm(*case.arguments, out=z)
    assert z[:, :, 1].isnan().all() and torch.equal(z[:, :, ::2], y[:, :, ::2])


@pytest.mark.parametrize("scenario", [s for s in SPEC.scenarios if s.cpu], ids=lambda scenario: scenario.name)
def test_the_spec_takes_wide_loads(scenario: Any, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "LAUNCH", lambda *arguments, **options: None)
    for dtype in (torch.float32, torch.float16):
        inputs = SPEC.make_inputs(scenario, DEVICE, dtype, torch.Generator().manual_seed(0))
        named = {"eps": EPS, "per_frame": True, **inputs}
        kernels.group_norm(**named, out=torch.empty_like(named["x"]))
    assert launches == ["dense", "finish", "dense"] * 2


def test_forms(launches: Launches) -> None:
    """What promises 16-byte loads is channels-last memory in whole vectors, slices of it included; pixels are walked
    along where they are denser than channels."""
    x = Case((1, 32, 2, 4, 6), 1, torch.float16).x
    rows = x.permute(0, 2, 3, 4, 1)
    moved = torch.empty(x.numel() + 1, device=DEVICE, dtype=torch.float16)[1:].view(rows.shape).copy_(rows)
    forms = {
        "dense": [x, x[:, 8:24], x[:, :, 1:], x[:, :, :, 1:3], x[..., :1], x[..., :1, :], x[:, :, :, ::2, :1]],
        "channels": [
            x[:, 4:28],
            x[..., 1:5],
            x[:, :30],
            x[:, ::2],
            moved.permute(0, 4, 1, 2, 3),
        ],
        "pixels": [x.contiguous(), x[:, :1], x.contiguous()[..., ::2]],
    }
    for form, clips in forms.items():
        for clip in clips:
            case = Case(clip.shape, 1, torch.float16)
            case.x = clip
            launches.clear()
            case.check_stats()
            assert launches == [form, "finish"], (form, clip.shape, clip.stride())


@pytest.mark.parametrize("C", [7, 8])
def test_elements_past_2_to_the_31(C: int) -> None:
    """Frames that lie 2^30 elements apart in storage that is never touched between them."""
    apart = 2**30
    storage = torch.empty(2 * apart + 128, dtype=torch.float16, device=DEVICE)
    far = storage.as_strided((1, C, 3, 3, 3), (0, 1, apart, 3 * 8, 8))
    case = Case((1, C, 3, 3, 3), C, torch.float16)
    near = case.x
    far.copy_(near)
    y = case.check()
    case.x = far
    out = torch.empty_like(near)
    kernels.group_norm(*case.arguments, out=out)
    assert torch.equal(out, y)
    case.x = near
    kernels.group_norm(*case.arguments, out=far)
    assert torch.equal(far, y)


def test_a_frame_that_is_too_large_is_refused() -> None:
    x = torch.empty(1, device=DEVICE).expand(1, 1, 1, 2**16, 2**15)
    with pytest.raises(ValueError, match="x has 2147483648 pixels in a frame, at most 1073741824 are served"):
        kernels.group_norm(x, 1, None, None, None, None, None, EPS, True, out=x)


def test_an_empty_batch(launches: Launches) -> None:
    """Launches nothing; its parameters have gradients of zero."""
    case = Case((0, 8, 2, 3, 3), 4)
    case.check()
    case.check_stats()
    assert not launches
    case.check_gradients()


TRACE = """
import torch, triton
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from lumiere_fast.kernels.group_norm import group_norm, group_norm_backward

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())

@torch.library.triton_op("test::norm", mutates_args=())
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    if not isinstance(out, FakeTensor):
        group_norm(x, 4, weight, weight, None, None, "silu", 1e-5, True, out=out)
    return out

class Model(torch.nn.Module):
    def forward(self, x, weight):
        y = torch.ops.test.norm(x, weight)
        arguments = x.detach().requires_grad_(), 4, weight, weight, None, None, "silu", 1e-5, True
        return y, group_norm_backward((y,), *arguments)[0]

with FakeTensorMode():
    x = torch.empty(1, 2, 6, 6, 16, device="cuda").permute(0, 4, 1, 2, 3)
    graph, _ = aot_export_module(Model(), [x, torch.empty(16, device="cuda")], trace_joint=False)
    calls = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    print(*(call.kwargs["tensors_to_clone"] for call in calls))
"""


def test_a_trace_holds_the_launches_and_knows_what_each_writes() -> None:
    """torch.compile sees all kernels: traced on fake CUDA tensors, for sm_90, without a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", TRACE], capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment
    )
    statistics = "['means', 'squares'] ['mean', 'rstd']"
    expected = f"{statistics} ['out'] {statistics} ['totals', 'moments'] ['dx']\n"
    assert done.stdout == expected, done.stdout + done.stderr


@on_gpu
def test_another_stream_and_a_graph() -> None:
    case = Case((2, 24, 3, 9, 9), 8, torch.bfloat16)
    wanted, out, graph = case.check(), torch.empty_like(case.x), torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        kernels.group_norm(*case.arguments, out=out)
    stream.synchronize()
    assert torch.equal(out, wanted)
    with torch.cuda.graph(graph):
        kernels.group_norm(*case.arguments, out=out)
    case.x.neg_()
    graph.replay()
    assert torch.equal(out, case.check())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_device_that_is_not_the_current_one() -> None:
    case = Case((1, 8, 2, 3, 3), 4)
    case.x, case.parameters = case.x.to("cuda:1"), [each.to("cuda:1") for each in case.parameters]
    case.check()
