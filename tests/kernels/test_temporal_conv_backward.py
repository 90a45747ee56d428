"""The backward of temporal_conv against autograd of the reference in fp64: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lumiere_fast.ops._selfcheck import FLOORS, relative_error
from lumiere_fast.ops.temporal_conv import temporal_conv_reference
from tests.ops.common import CHANNELS_LAST, CONTIGUOUS, FORMATS, Draw

pytest.importorskip("triton", reason="the kernels need Triton")
from lumiere_fast.kernels import temporal_conv_backward as kernels

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Never bfloat16 in the interpreter, which computes it wrongly and says nothing.
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
ARGUMENTS = tuple(temporal_conv_reference.__annotations__)[:14]
FACTOR = 3.0  # of torch's own error that a gradient may have
# What torch's autograd of the reference keeps in fp32 and a backward rounds to the dtype of x: h, z, g_z and g_h.
ROUNDINGS = {torch.float32: 1, torch.float16: 4, torch.bfloat16: 4}

SHAPES = [
    (2, 8, 24, 3, 3, 5, 3),  # B, C_in, C_out, T, H, W, k
    (1, 24, 40, 2, 1, 7, 5),  # more taps than frames, prime pixels
    (1, 40, 8, 1, 2, 4, 5),
    (2, 8, 8, 1, 1, 1, 3),
    (1, 10, 7, 3, 3, 1, 3),  # channels that 16 bytes do not divide
    (1, 16, 24, 5, 1, 13, 1),
    (1, 5, 7, 2, 9, 11, 1),
    (1, 72, 80, 2, 1, 67, 3),  # more than a tile of channels and of pixels
]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": "C"},
    "bias of each frame, SiLU": {"bias": "BTC", "act": "silu"},
    "residual": {"residual": True},
    "statistics": {"bias": "C", "stats": 2},
    "residual, statistics": {"residual": True, "stats": 4},
    "SiLU, statistics": {"act": "silu", "stats": 1},
    "SiLU, residual, statistics": {"act": "silu", "residual": True, "stats": 8},
    "norm": {"norm": 2},
    "affine norm": {"norm": 4, "affine": True},
    "norm without SiLU": {"norm": 2, "affine": True, "film": "BTC", "norm_act": None, "bias": "BTC"},
    "norm without SiLU, all that follows": {
        **{"norm": 2, "norm_act": None, "act": "silu", "residual": True, "stats": 2},
    },
    "norm, FiLM of each clip": {"norm": 1, "film": "BC", "bias": "C"},
    "everything": {
        **{"norm": 2, "affine": True, "film": "BTC"},
        **{"bias": "BTC", "act": "silu", "residual": True, "stats": 2},
    },
}
EVERYTHING = OPTIONS["everything"]


class Launches(list[str]):
    """The names of this module's kernels launched so far, each a form that the gate compiles ahead of time."""

    def __call__(self, kernel: Any, programs: int, out: Tensor, *arguments: Any, **options: Any) -> None:
        names = kernels.POINTWISE_TENSORS if kernel is kernels._pointwise_kernel else kernels.WEIGHT_TENSORS
        form = tuple(None if x is None else NAMES[x.dtype] for x in arguments[: len(names)])
        assert (kernel.__name__, form, tuple(sorted(options.items()))) in SHIPPED
        self.append(kernel.__name__)
        LAUNCH(kernel, programs, out, *arguments, **options)


LAUNCH = kernels.launch
SHIPPED = {
    (
        variant.kernel,
        tuple(
            None if name in variant.constexprs else kind.removeprefix("*")
            for name, kind in variant.signature.items()
            if name in kernels.POINTWISE_TENSORS + kernels.WEIGHT_TENSORS
        ),
        tuple(
            sorted(
                {
                    **{name: value for name, value in variant.constexprs.items() if name.isupper()},
                    **{"num_warps": variant.num_warps, "num_stages": variant.num_stages},
                }.items()
            )
        ),
    )
    for variant in kernels.VARIANTS
}


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    recorded = Launches()
    monkeypatch.setattr(kernels, "launch", recorded)
    yield recorded


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory begins as NaN, and torch refuses what differs from run to run."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw_arguments(
    shape: Sequence[int],
    dtype: torch.dtype,
    padding_mode: str = "zeros",
    memory_format: torch.memory_format = CHANNELS_LAST,
    *,
    bias: str | None = None,
    act: str | None = None,
    residual: bool = False,
    stats: int | None = None,
    norm: int | None = None,
    norm_act: str | None = "silu",
    affine: bool = False,
    film: str | None = None,
) -> list[Any]:
    """Those of the reference; every tensor wants a gradient, the last four of a norm in fp32."""
    B, C_in, C_out, T, H, W, k = shape
    draw = Draw(sum(shape))
    sizes = {"C": (C_out,), "BTC": (B, T, C_out)}

    def tensor(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return draw(*shape).to(DEVICE, of)

    def clip(channels: int) -> Tensor:
        return tensor(B, channels, T, H, W).contiguous(memory_format=memory_format)

    weight = draw(C_out, C_in, k).mul((C_in * k) ** -0.5).to(DEVICE, dtype)
    values = [clip(C_in), weight, None if bias is None else tensor(*sizes[bias]), padding_mode, act]
    values += [clip(C_out) if residual else None, None if stats is None else _fitting(stats, C_out)]
    groups = None if norm is None else _fitting(norm, C_in)
    mean, rstd = (None, None) if groups is None else (tensor(B, T, groups, of=torch.float32) for _ in range(2))
    values += [mean, None if rstd is None else rstd.square() + 0.5]
    values += [tensor(C_in, of=torch.float32) if affine else None for _ in range(2)]
    film_sizes = {"BC": (B, C_in), "BTC": (B, T, C_in)}
    values += [None if film is None else tensor(*film_sizes[film], of=torch.float32) for _ in range(2)]
    values.append(norm_act)
    return [value.requires_grad_() if isinstance(value, Tensor) else value for value in values]


def _fitting(groups: int, channels: int) -> int:
    return groups if channels % groups == 0 else 1


def draw_gradients(arguments: Sequence[Any]) -> list[Tensor | None]:
    """Of y, in its memory format, and of the statistics, as large as to matter; empty ones where there are none."""
    x, weight, groups = arguments[0], arguments[1], arguments[6]
    B, _, T, H, W = x.shape
    draw = Draw(5)
    dy = draw(B, weight.shape[0], T, H, W).to(x)
    if groups is None:
        return [dy.contiguous(memory_format=CHANNELS_LAST), *[torch.empty(0, device=DEVICE)] * 2]
    stats = [draw(B, T, groups).mul(H * W).to(DEVICE, torch.float32) for _ in range(2)]
    return [dy.contiguous(memory_format=CHANNELS_LAST), *stats]


def autograd(gradients: Sequence[Tensor | None], arguments: Sequence[Any], double: bool) -> list[Tensor | None]:
    """torch's own gradients of the reference."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (value.double() if double else value).detach().requires_grad_(value.requires_grad)

    leaves = [leaf(value) for value in arguments]
    with torch.enable_grad():
        results = temporal_conv_reference(*leaves)
    pairs = [(y, dy.to(y)) for y, dy in zip(results, gradients, strict=True) if dy is not None and y.requires_grad]
    torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])
    return [value.grad if isinstance(value, Tensor) else None for value in leaves]


def check(arguments: Sequence[Any], gradients: Sequence[Tensor | None] | None = None) -> tuple[Tensor | None, ...]:
    """Every gradient that is wanted, and none else, is as near to the exact one as torch's own, in the dtype of x."""
    gradients = draw_gradients(arguments) if gradients is None else gradients
    ours = kernels.temporal_conv_backward(tuple(gradients), *arguments)
    theirs, exact = autograd(gradients, arguments, double=False), autograd(gradients, arguments, double=True)
    dtype = arguments[0].dtype
    for name, value, mine, other, truth in zip(ARGUMENTS, arguments, ours, theirs, exact, strict=True):
        if not (isinstance(value, Tensor) and value.requires_grad):
            assert mine is None, name
            continue
        assert mine is not None, name
        assert (mine.shape, mine.dtype) == (value.shape, value.dtype), name
        assert other is not None and truth is not None
        error, torchs = (relative_error(found.to(dtype), truth) for found in (mine, other))
        bound = FACTOR * torchs + ROUNDINGS[dtype] * FLOORS[dtype]
        assert error <= bound, f"{name} is off by {error:.1e}, {bound:.1e} is allowed"
    return ours


@pytest.mark.parametrize("padding_mode", ["zeros", "replicate"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...], padding_mode: str) -> None:
    for dtype in DTYPES if padding_mode == "zeros" else DTYPES[:1]:
        check(draw_arguments(shape, dtype, padding_mode, **EVERYTHING))


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    for dtype in DTYPES:
        check(draw_arguments((1, 8, 16, 2, 5, 5, 3), dtype, "replicate", **OPTIONS[name]))


@pytest.mark.parametrize("taps", [3, 5, 7])
@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_replicated_frames(frames: int, taps: int) -> None:
    """Also where a tap sees nothing but copies of the first or the last."""
    check(draw_arguments((1, 8, 8, frames, 1, 3, taps), torch.float32, "replicate"))


@pytest.mark.parametrize("which", range(3), ids=["y", "mean", "rstd"])
@pytest.mark.parametrize("name", ["statistics", "everything"])
def test_one_result_alone_has_a_gradient(name: str, which: int) -> None:
    arguments = draw_arguments((1, 8, 16, 2, 3, 3, 3), torch.float32, **OPTIONS[name])
    gradients = draw_gradients(arguments)
    check(arguments, [gradient if i == which else None for i, gradient in enumerate(gradients)])


WANTED = {
    "x": {"_pointwise_kernel"},
    "weight": {"_pointwise_kernel", "_weight_kernel"},
    "bias": {"_pointwise_kernel"},
    "residual": set(),
    "norm_mean": {"_pointwise_kernel"},
    "norm_scale": {"_pointwise_kernel"},
}


@pytest.mark.parametrize("with_stats", [False, True])
@pytest.mark.parametrize("name", WANTED)
def test_one_argument_alone_wants_a_gradient(name: str, with_stats: bool, launches: Launches) -> None:
    """And no more is computed than that: no weight gradient for a frozen layer."""
    options = EVERYTHING if with_stats else {**EVERYTHING, "stats": None}
    arguments = draw_arguments((1, 8, 8, 2, 3, 3, 3), torch.float32, **options)
    for other, value in zip(ARGUMENTS, arguments, strict=True):
        if isinstance(value, Tensor):
            value.requires_grad_(other == name)
    check(arguments)
    assert set(launches) == WANTED[name] | ({"_pointwise_kernel"} if with_stats else set())


def test_a_bare_convolution_takes_the_gradient_as_it_is(launches: Launches) -> None:
    arguments = draw_arguments((1, 8, 8, 2, 3, 3, 3), torch.float32, residual=True)
    gradients = draw_gradients(arguments)
    assert check(arguments, gradients)[ARGUMENTS.index("residual")] is gradients[0]
    assert launches == ["_weight_kernel"]


def test_nothing_wanted_or_nothing_there() -> None:
    arguments = draw_arguments((2, 8, 8, 2, 3, 3, 3), torch.float32, **EVERYTHING)
    frozen = [value.detach() if isinstance(value, Tensor) else value for value in arguments]
    assert kernels.temporal_conv_backward(tuple(draw_gradients(arguments)), *frozen) == (None,) * 14
    empty = [value[:0] if isinstance(value, Tensor) and value.dim() in (3, 5) else value for value in arguments]
    empty[1:3] = arguments[1:3]
    found = kernels.temporal_conv_backward(tuple(gradient[:0] for gradient in draw_gradients(arguments)), *empty)
    for value, gradient in zip(empty, found, strict=True):
        if isinstance(value, Tensor):
            assert gradient is not None and gradient.shape == value.shape and not gradient.any()


@pytest.mark.parametrize("memory_format", FORMATS, ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Slices with gaps, gradients in contiguous memory, weights stored by taps, statistics within larger tensors."""
    whole = draw_arguments((2, 12, 16, 6, 3, 8, 3), dtype, "replicate", memory_format, **EVERYTHING)
    arguments = draw_arguments((2, 8, 16, 3, 3, 4, 3), dtype, "replicate", **EVERYTHING)
    arguments[0] = whole[0].detach()[:, 2:10, ::2, :, 1::2].requires_grad_()
    arguments[1] = arguments[1].detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    arguments[5] = whole[5].detach()[:, :, 3:, :, ::2].requires_grad_()
    for name in ("norm_mean", "norm_shift"):
        at = ARGUMENTS.index(name)
        arguments[at] = arguments[at].detach().repeat(1, 1, 2)[..., : arguments[at].shape[-1]].requires_grad_()
    dy, *rest = draw_gradients(arguments)
    check(arguments, [dy.contiguous(memory_format=CONTIGUOUS), *rest])


@pytest.mark.parametrize("act", [None, "silu"])
def test_gradient_of_a_sum(act: str | None) -> None:
    """Which autograd expands from one number."""
    arguments = draw_arguments((1, 8, 8, 3, 2, 3, 3), torch.float32, bias="C", act=act)
    check(arguments, [torch.ones((), device=DEVICE).expand(1, 8, 3, 2, 3), None, None])


def test_parameters_in_the_dtype_of_x() -> None:
    arguments = draw_arguments((1, 8, 8, 2, 3, 3, 3), torch.float16, **EVERYTHING)
    arguments[9:13] = [value.detach().half().requires_grad_() for value in arguments[9:13]]
    check(arguments)


@pytest.mark.parametrize("C_out, C_in", [(256, 256), (136, 128), (16, 320)])
def test_weights_in_every_tile_and_in_splits(
    C_out: int, C_in: int, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which those of the outer taps, who see fewer frames, leave some empty."""
    monkeypatch.setattr(kernels, "FEWEST_STEPS", 1)
    draw = Draw(7)
    g_z, h = (draw.clip(1, C, 3, 5, 13).to(DEVICE, torch.float16) for C in (C_out, C_in))
    weight = torch.empty(C_out, C_in, 3, dtype=torch.float16, device=DEVICE)
    ours = kernels._weight_gradient(g_z, h, weight, "zeros")
    frames = g_z.double().flatten(3), torch.nn.functional.pad(h.double().flatten(3), (0, 0, 1, 1))
    exact = torch.stack([torch.einsum("botp,bitp->oi", frames[0], frames[1][:, :, j : j + 3]) for j in range(3)], -1)
    assert relative_error(ours, exact) <= FLOORS[torch.float16]
    assert launches == ["_weight_kernel"]


@given(st.integers(1, 2000), st.integers(1, 10**6), st.integers(1, 4))
def test_splits_fill_the_card_and_are_not_too_short(blocks: int, steps: int, resident: int) -> None:
    splits = kernels._splits(blocks, steps, resident)
    slots = kernels.MULTIPROCESSORS * resident
    assert splits == 1 or steps // splits >= kernels.FEWEST_STEPS
    assert splits == 1 or blocks * splits <= 2 * slots
    if steps >= kernels.FEWEST_STEPS * slots and blocks <= slots:
        assert blocks * splits >= slots * 2 / 3


def test_the_same_bits_in_every_run() -> None:
    arguments = draw_arguments((1, 72, 80, 2, 1, 67, 3), torch.float16, "replicate", **EVERYTHING)
    gradients = tuple(draw_gradients(arguments))
    runs = [kernels.temporal_conv_backward(gradients, *arguments) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert (first is None and second is None) or torch.equal(first, second)


def test_elements_past_2_to_the_31(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that lie 2^30 elements apart in storage that is never touched between them."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    apart, draw = 2**30, Draw(8, torch.float16)
    storage = torch.empty(2 * apart + 64, dtype=torch.float16, device=DEVICE)
    for C, step in ((8, 8), (3, 4)):  # in vectors, and one by one
        far = storage.as_strided((1, C, 3, 1, 4), (0, 1, apart, 4 * step, step))
        near, weight = draw.clip(1, C, 3, 1, 4).to(DEVICE), draw(C, C, 3).to(DEVICE)
        far.copy_(near)
        wanted = kernels._weight_gradient(near, near, weight, "zeros")
        assert torch.equal(kernels._weight_gradient(far, near, weight, "zeros"), wanted)
        assert torch.equal(kernels._weight_gradient(near, far, weight, "zeros"), wanted)
        pairs = zip(*(kernels._pointwise(dy, near, None, True, None)[1:] for dy in (far, near)), strict=True)
        assert all(torch.equal(first, second) for first, second in pairs)
    assert set(launches) == {"_weight_kernel", "_pointwise_kernel"}


TRACE = """
import torch, triton
from torch._functorch.aot_autograd import aot_export_module
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from lumiere_fast.kernels.temporal_conv_backward import temporal_conv_backward

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())
OPTIONS = ("replicate", "silu", None, 2, *[None] * 7)

@torch.library.triton_op("test::conv", mutates_args=())
def conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), bias.new_empty(1, 3, 2), bias.new_empty(1, 3, 2)

def backward(ctx, *gradients):
    leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
    return temporal_conv_backward(gradients, *leaves, *OPTIONS)[:3]

conv.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(64, 64, 3, dtype=torch.bfloat16))
        self.bias = torch.nn.Parameter(torch.empty(64))

    def forward(self, x):
        y, mean, rstd = conv(conv(x, self.weight, self.bias)[0], self.weight, self.bias)
        return (y.float().sum() + mean.sum() + rstd.sum(),)

with FakeTensorMode():
    clip = torch.empty(1, 3, 16, 16, 64, dtype=torch.bfloat16).permute(0, 4, 1, 2, 3)
    module, signature = aot_export_module(Model(), [clip], trace_joint=True, output_loss_index=0)
for node in module.graph.nodes:
    if "triton_kernel_wrapper_functional" in str(node.target):
        kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn
        print(kernel.__name__, *node.kwargs["tensors_to_clone"])
"""


def test_a_trace_holds_every_launch() -> None:
    """torch.compile sees the backward's kernels: of two layers traced on fake tensors, for sm_90, without a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", TRACE], capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment
    )
    written = [line for line in done.stdout.splitlines() if line.startswith(("_pointwise", "_weight"))]
    assert written == 2 * ["_pointwise_kernel g_z sums", "_weight_kernel partials"], done.stdout + done.stderr
