from __future__ import annotations

import math
import re
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lumiere_fast import dispatch
from lumiere_fast.dispatch import BackendUnavailable, why_not
from lumiere_fast.evidence import TORCHS
from lumiere_fast.kernels import _configs
from lumiere_fast.ops import _sdpa, _selfcheck, spatial_attention
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


# ---------------------------------------------------------------- torch's own kernels


MASK = torch.tensor([[True, False, True, True, False], [False] * 5])


def masked_text(draw: Draw, shape: tuple[int, ...]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Two prompts, of which one has no key."""
    return list(draw_text(draw, shape, 5)), {"key_mask": MASK}


CALLS = {
    "self": lambda draw: (list(draw_qkv(draw, (2, 3, 4, 3, 2, 8))), {}),
    "one pixel": lambda draw: (list(draw_qkv(draw, (2, 3, 1, 1, 2, 8))), {"scale": 0.3}),
    "text": lambda draw: (list(draw_text(draw, (2, 3, 4, 3, 2, 8), 5)), {"scale": 0.3}),
    "masked": lambda draw: masked_text(draw, (2, 3, 4, 3, 2, 8)),
    "part of a clip": lambda draw: ([x[:, 1:3] for x in draw_qkv(draw, (1, 4, 4, 3, 2, 8))], {}),
    "part of a batch": lambda draw: ([x[::2] for x in draw_qkv(draw, (3, 1, 4, 3, 2, 8))], {}),
    "no clip": lambda draw: (list(draw_qkv(draw, (0, 3, 4, 3, 2, 8))), {}),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_flash_is_the_reference(name: str, dtype: torch.dtype) -> None:
    """Values, gradients, strides: of the kernel that torch has for the CPU, held against fp64."""
    inputs, options = CALLS[name](Draw(20, dtype))
    leaves = [x.detach().requires_grad_() for x in inputs]
    exact_leaves = [x.detach().double().requires_grad_() for x in inputs]
    ours = spatial_attention(*leaves, **options, backend="flash")
    theirs = spatial_attention(*leaves, **options, backend="reference")
    exact = spatial_attention(*exact_leaves, **options, backend="reference")
    assert ours.is_contiguous() and ours.dtype == dtype
    assert_no_worse_than_torch(ours, theirs, exact)
    above = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad(ours, leaves, above.to(dtype))
    expected = torch.autograd.grad(theirs, leaves, above.to(dtype))
    truth = torch.autograd.grad(exact, exact_leaves, above)
    for mine, other, true in zip(found, expected, truth, strict=True):
        assert_no_worse_than_torch(mine, other, true, factor=3.0)


def test_flash_gives_a_prompt_without_keys_zero_and_no_gradient() -> None:
    inputs, options = masked_text(Draw(21), (2, 2, 2, 2, 2, 8))
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = spatial_attention(*leaves, **options, backend="flash")
    assert (y[1] == 0).all() and (y[0] != 0).all()
    for gradient in torch.autograd.grad(y.square().sum(), leaves):
        assert (gradient[1] == 0).all() and gradient.isfinite().all() and (gradient[0] != 0).any()


@pytest.mark.parametrize("name", ["self", "text", "masked"])
def test_the_operator_of_flash(name: str) -> None:
    inputs, options = CALLS[name](Draw(22))
    check_operator(spatial_attention, *inputs, **options, backend="flash")
    leaves = [x.detach().requires_grad_() for x in inputs]
    check_operator(spatial_attention, *leaves, **options, backend="flash")
    check_operator_gradient(spatial_attention, *leaves, **options, backend="flash")


class Graphs:
    """A backend of torch.compile that keeps what it is given."""

    def __init__(self) -> None:
        self.code: list[str] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Any:
        self.code.append(module.code)
        return module.forward


@pytest.mark.parametrize("name", ["self", "masked"])
def test_compiled_code_and_exported_programs_hold_the_kernel(name: str) -> None:
    """Not the function that chooses one: the choice would depend on a context that is not there when they run."""
    inputs, options = CALLS[name](Draw(23, torch.float32))
    eager = spatial_attention(*inputs, **options, backend="flash")

    class Module(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            result: Tensor = spatial_attention(*inputs, **options, backend="flash")
            return result

    graphs, module = Graphs(), Module()
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend=graphs)(*inputs), eager)
    exported = torch.export.export(module, tuple(inputs))
    torch.testing.assert_close(exported.module()(*inputs), eager)
    for code in (*graphs.code, exported.graph_module.code):
        assert "_scaled_dot_product_flash_attention_for_cpu" in code
        assert "lumiere_fast" not in code


@pytest.mark.parametrize("name", ["self", "text", "masked"])
def test_compiled_for_gradients(name: str) -> None:
    inputs, options = CALLS[name](Draw(24, torch.float32))
    leaves = [x.detach().requires_grad_() for x in inputs]
    compiled = torch.compile(spatial_attention, fullgraph=True, backend="aot_eager")
    found, expected = (
        torch.autograd.grad(run(*leaves, **options, backend="flash").square().sum(), leaves)
        for run in (compiled, spatial_attention)
    )
    torch.testing.assert_close(found, expected)


class Passes(TorchDispatchMode):
    """Counts what is written in the size of an activation, by operator; views write nothing."""

    VIEWS: ClassVar[set[str]] = {
        "view",
        "transpose",
        "unsqueeze",
        "expand",
        "slice",
        "select",
        "detach",
        "_unsafe_view",
    }

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names = size, list[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.__name__.partition(".")[0]
        written = result[0] if isinstance(result, tuple) else result
        if name not in self.VIEWS and isinstance(written, Tensor) and written.numel() >= self.size:
            self.names.append(name)
        return result


def passes(inputs: list[Tensor], options: dict[str, Any], backend: str | None) -> list[str]:
    with Passes(inputs[0].numel()) as seen:
        spatial_attention(*inputs, **options, backend=backend)
    return seen.names


@pytest.mark.parametrize("name", ["self", "text", "masked", "part of a clip", "part of a batch"])
def test_flash_writes_one_activation(name: str) -> None:
    inputs, options = CALLS[name](Draw(25, torch.float32))
    assert passes(inputs, options, "flash") == ["_scaled_dot_product_flash_attention_for_cpu"]


def test_auto_on_a_cpu_takes_the_reference_which_comes_to_the_same_kernel() -> None:
    """In half precision it computes in fp32, which is faster."""
    draw = Draw(26, torch.float32)
    inputs, options = masked_text(draw, (2, 4, 32, 32, 2, 8))
    unmasked = draw_qkv(draw, (2, 4, 32, 32, 2, 8))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for call, masked in ((inputs, options), (unmasked, {})):
            with dispatch.record_backends() as used:
                spatial_attention(*(x.to(dtype) for x in call), **masked)
            assert used == {"reference"}
    for call, masked in ((inputs, options), (unmasked, {})):
        assert passes(call, masked, "reference") == ["_scaled_dot_product_flash_attention_for_cpu"]


def test_out_is_filled_by_flash() -> None:
    q, k, v = draw_qkv(Draw(28), (2, 3, 4, 3, 2, 8))
    out = torch.full_like(q, float("nan"))
    assert spatial_attention(q, k, v, backend="flash", out=out) is out
    torch.testing.assert_close(out, spatial_attention(q, k, v, backend="reference"))


def test_autocast_does_not_round_inside() -> None:
    inputs, options = CALLS["masked"](Draw(29, torch.float32))
    expected = spatial_attention(*inputs, **options, backend="flash")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = spatial_attention(*inputs, **options, backend="flash")
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


# ---------------------------------------------------------------- what they do not take


FAKE = FakeTensorMode()


def on_a_gpu(shape: tuple[int, ...], length: int | None = None, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k, v of fused projections that say they are on a GPU."""
    return [that_says_so(x) for x in meta(shape, length, dtype)]


def meta(shape: tuple[int, ...], length: int | None = None, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    if length is None:
        return list(torch.empty(*shape[:4], 3, *shape[4:], device="meta", dtype=dtype).unbind(4))
    text = torch.empty(shape[0], length, 2, *shape[4:], device="meta", dtype=dtype)
    return [torch.empty(shape, device="meta", dtype=dtype), *text.unbind(2)]


def that_says_so(x: Tensor) -> Tensor:
    return FakeTensor(FAKE, x, torch.device("cuda:0"))


def mask_on_a_gpu() -> Tensor:
    return that_says_so(torch.ones(2, 77, dtype=torch.bool, device="meta"))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(_sdpa, "_cudnn_version", lambda: 92000)


PLAIN = (2, 3, 8, 8, 4, 64)


@pytest.mark.usefixtures("hopper")
def test_a_gpu_has_all_three_for_what_the_model_does() -> None:
    for backend in TORCHS:
        for gradient in (False, True):
            calls = [
                on_a_gpu(PLAIN),
                on_a_gpu(PLAIN, 77),
                on_a_gpu((2, 3, 8, 8, 4, 40)),
                on_a_gpu((2, 3, 7, 5, 3, 128)),
            ]
            for call in calls:
                assert why_not("spatial_attention", backend, *(x.requires_grad_(gradient) for x in call)) == []
        masked = why_not("spatial_attention", backend, *on_a_gpu(PLAIN, 77), key_mask=mask_on_a_gpu())
        assert (masked == []) == (backend != "flash") and all("key_mask" in reason for reason in masked)
    assert why_not("spatial_attention", "efficient", *on_a_gpu(PLAIN, dtype=torch.float32)) == []


def strided(shape: tuple[int, ...], *order: int) -> list[Tensor]:
    """q, k, v whose axes lie in memory in another order."""
    memory = torch.empty([shape[axis] for axis in order], device="meta", dtype=torch.bfloat16)
    return [that_says_so(memory.permute([order.index(axis) for axis in range(6)]))] * 3


def offset(by: int) -> list[Tensor]:
    memory = torch.empty(3 * 64 * 256 + by, device="meta", dtype=torch.bfloat16)
    return [that_says_so(memory[by:].view(1, 3, 8, 8, 4, 64))] * 3


def narrow(shape: tuple[int, ...]) -> list[Tensor]:
    """Of every row of pixels the first is left out."""
    return [that_says_so(x[:, :, :, 1:]) for x in meta(shape)]


REFUSED: dict[str, tuple[tuple[str, ...], Any]] = {
    "D is 36, it needs a multiple of 8": (TORCHS, lambda: on_a_gpu((2, 3, 8, 8, 4, 36))),
    "D is 6, it needs a multiple of 4": (TORCHS, lambda: on_a_gpu((2, 3, 8, 8, 4, 6), dtype=torch.float32)),
    "q has rows that do not begin at a multiple of 16 bytes": (TORCHS, lambda: offset(4)),
    "q has strides .* its axes cannot be folded": (TORCHS, lambda: narrow(PLAIN)),
    "v has strides .* its axes cannot be folded": (
        TORCHS,
        lambda: [*on_a_gpu(PLAIN)[:2], narrow((2, 3, 8, 9, 4, 64))[2]],
    ),
    "k has strides .* its axes cannot be folded": (
        TORCHS,
        lambda: [that_says_so(x[:, 1:]) for x in meta((2, 4, 8, 8, 4, 64))],
    ),
    r"q has strides \(.*its axes cannot be folded": (
        TORCHS,
        lambda: [that_says_so(x) for x in (meta(PLAIN)[0][:, :, 1:], *meta(PLAIN, 77)[1:])],
    ),
    "q has strides .* the result would be ordered like it": (TORCHS, lambda: strided(PLAIN, 0, 1, 4, 2, 3, 5)),
    "axis -1 of q has stride 2": (TORCHS, lambda: [that_says_so(x[..., ::2]) for x in meta((2, 3, 8, 8, 4, 128))]),
    "there are 65536 sequences, torch's kernel takes 65535": (TORCHS, lambda: on_a_gpu((512, 32, 2, 2, 4, 8))),
    "an argument spans 2.31 elements": (TORCHS, lambda: on_a_gpu((1, 2, 1024, 1024, 6, 64))),
    "a gradient of 2.31 elements is needed": (
        TORCHS,
        lambda: [x.requires_grad_() for x in on_a_gpu((1, 8191, 30, 30, 8, 8))],
    ),
    "there are 1 queries and 1 keys": (("cudnn",), lambda: on_a_gpu((2, 3, 1, 1, 4, 64))),
    "there are 192 queries and 1 keys": (("cudnn",), lambda: on_a_gpu(PLAIN, 1)),
    "D is 136, cuDNN takes 128": (("cudnn",), lambda: on_a_gpu((2, 3, 8, 8, 4, 136))),
    "D is 256, flash attention takes 192": (("flash",), lambda: on_a_gpu((2, 3, 8, 8, 4, 256))),
    "q is float32, it needs float16 or bfloat16": (("cudnn",), lambda: on_a_gpu(PLAIN, dtype=torch.float32)),
    "q is torch.float32 on a GPU": (("flash",), lambda: on_a_gpu(PLAIN, dtype=torch.float32)),
    "q is float64, it needs float16 or bfloat16 or float32": (
        ("efficient",),
        lambda: on_a_gpu(PLAIN, dtype=torch.float64),
    ),
}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("told", REFUSED)
def test_what_a_gpu_s_kernels_do_not_take_is_told(told: str) -> None:
    backends, draw = REFUSED[told]
    for backend in TORCHS:
        reasons = why_not("spatial_attention", backend, *draw())
        found = [reason for reason in reasons if re.search(told, reason)]
        assert len(found) == (backend in backends), (backend, reasons)
        if backend in backends:
            assert len(reasons) <= 3 and all(len(reason) < 120 for reason in reasons)


def test_at_the_limits_they_take_it(hopper: None) -> None:
    for backend in TORCHS:
        assert why_not("spatial_attention", backend, *on_a_gpu((257, 51, 2, 2, 5, 8))) == []  # 65535 sequences
        assert why_not("spatial_attention", backend, *on_a_gpu((1, 2, 512, 1024, 6, 64), 77)) == []


def test_the_machine_and_cudnn_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = on_a_gpu(PLAIN)
    monkeypatch.setattr(dispatch, "_capability", lambda device: (7, 5))
    monkeypatch.setattr(_sdpa, "_cudnn_version", lambda: 91002)
    for backend in TORCHS:
        reasons = why_not("spatial_attention", backend, q, k, v)
        assert "cuda:0 has compute capability 7.5, it needs 8.0" in reasons
        assert ("torch has cuDNN 91002, it needs 91501" in reasons) == (backend == "cudnn")
        monkeypatch.setattr(_sdpa, "_cudnn_version", lambda: 0)
    monkeypatch.undo()
    cpu = draw_qkv(Draw(30, torch.float32), (2, 3, 4, 3, 2, 8))
    assert why_not("spatial_attention", "efficient", *cpu) == ["q is on cpu, it needs cuda"] + [
        f"{name} is on cpu, it needs cuda" for name in "kv"
    ]
    (reason,) = why_not("spatial_attention", "flash", *(x.bfloat16() for x in cpu))
    assert reason == "q is torch.bfloat16 on a CPU, where the reference, which computes in float32, is faster"
    with pytest.raises(BackendUnavailable, match="its axes cannot be folded without a copy"):
        spatial_attention(*STRIDED["slices"](Draw(31)), backend="flash")


@pytest.mark.usefixtures("hopper")
def test_cudnn_is_not_differentiated_with_a_mask() -> None:
    mask = mask_on_a_gpu()
    call = [x.requires_grad_() for x in on_a_gpu(PLAIN, 77)]
    assert why_not("spatial_attention", "cudnn", *call, key_mask=mask) == [
        "key_mask is given and a gradient is needed: cuDNN gives NaN at some lengths"
    ]
    with torch.no_grad():
        assert why_not("spatial_attention", "cudnn", *call, key_mask=mask) == []
    assert why_not("spatial_attention", "efficient", *call, key_mask=mask) == []


@pytest.mark.parametrize("length", [None, 77])
@pytest.mark.parametrize("backend", TORCHS)
def test_on_a_gpu_a_call_is_one_kernel_between_views(backend: str, length: int | None) -> None:
    """By torch's own rules of what each kernel returns: its result is an activation, and nothing copies it."""
    inputs = (on_a_gpu if backend == "flash" else meta)(PLAIN, length)  # flash has another kernel elsewhere
    masks = [None] if length is None or backend == "flash" else [None, torch.ones(2, 77, device="meta") > 0]
    with Passes(inputs[0].numel()) as seen:
        results = [getattr(_sdpa, backend)(*inputs, mask, None) for mask in masks]
    name = {"cudnn": "_scaled_dot_product_cudnn_attention", "flash": "_scaled_dot_product_flash_attention"}
    assert seen.names == [name.get(backend, "_scaled_dot_product_efficient_attention")] * len(masks)
    for result in results:
        assert result.shape == PLAIN and result.is_contiguous() and result.dtype == torch.bfloat16


def test_the_row_that_efficient_attention_reads_is_aligned() -> None:
    """It reads 16 bytes at a time: of 5 keys, 16 places, that no later key is read from."""
    bias, keys, values = _sdpa._without_masked(*(torch.ones(2, 5, 1, 4) for _ in range(3)), MASK)
    assert bias is not None and bias.shape == (2, 1, 1, 5) and bias.stride(0) == 16 and bias.stride(-1) == 1
    inf = -math.inf
    assert bias[:, 0, 0].tolist() == [[0.0, inf, 0.0, 0.0, inf], [0.0] * 5]
    for each in (keys, values):
        assert torch.equal(each[..., 0, 0], MASK.to(each.dtype))


# ---------------------------------------------------------------- which of them


def order_of(*call: Tensor, **options: Any) -> tuple[str, ...]:
    op = dispatch.registered("spatial_attention")
    arguments = op.bind(*call, **options)
    found = tuple(dispatch.order(op, call[0].device, arguments))
    assert sorted(found) == sorted(dispatch.BACKENDS)
    return found


def test_every_call_has_a_case_of_the_table() -> None:
    cases = set(_configs.cases("spatial_attention_order"))
    reached = set()
    op = dispatch.registered("spatial_attention")
    for D in (1, 32, 40, 64, 128, 192):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            shapes = [((2, 3, size, size, 4, D), None) for size in (1, 16, 17, 32, 33)]
            for shape, length in [*shapes, ((2, 3, 8, 8, 4, D), 77)]:
                for gradient in (False, True):
                    call = [x.requires_grad_(gradient) for x in on_a_gpu(shape, length, dtype)]
                    for key_mask in [None] if length is None else [None, mask_on_a_gpu()]:
                        reached.add(op.case(*call, key_mask, None))  # type: ignore[misc]
    assert reached == {case for case in cases if not case.startswith("cpu")}


def test_without_a_measurement_the_order_is_by_what_is_known() -> None:
    assert order_of(*on_a_gpu(PLAIN))[:4] == ("cudnn", "flash", "triton", "efficient")
    assert order_of(*on_a_gpu(PLAIN, 77))[0] == "triton"
    assert order_of(*on_a_gpu(PLAIN, dtype=torch.float32))[:2] == ("efficient", "triton")
    assert order_of(*on_a_gpu(PLAIN, 77), key_mask=mask_on_a_gpu())[:3] == ("triton", "efficient", "cudnn")
    assert order_of(*(x.requires_grad_() for x in on_a_gpu(PLAIN)))[:4] == ("cudnn", "flash", "efficient", "triton")
    for call in (on_a_gpu(PLAIN), on_a_gpu(PLAIN, 77), on_a_gpu(PLAIN, dtype=torch.float32)):
        assert order_of(*call)[-1] == "reference"


@pytest.mark.usefixtures("hopper")
def test_auto_takes_the_first_of_the_order_that_can_and_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    unproven: set[str] = set()
    monkeypatch.setattr(dispatch, "_why_unproven", lambda op, name, device: ["unproven"] if name in unproven else [])
    op = dispatch.registered("spatial_attention")

    def chosen(*call: Tensor) -> str:
        return dispatch.select(op, None, op.bind(*call))

    assert chosen(*on_a_gpu(PLAIN)) == "cudnn"
    assert chosen(*on_a_gpu((2, 3, 1, 1, 4, 64))) == "flash"  # a sequence of one is not for cuDNN
    unproven |= {"cudnn", "flash"}
    assert chosen(*on_a_gpu(PLAIN, dtype=torch.float32)) == "efficient"
    places = {"efficient": 1, "flash": 2, "cudnn": 3, "triton": 4}
    unproven.clear()
    with _configs.override("spatial_attention_order", "half-d64-self-few-forward", places):
        assert chosen(*on_a_gpu(PLAIN)) == "efficient"
        assert chosen(*(x.requires_grad_() for x in on_a_gpu(PLAIN))) == "cudnn"  # that is another case
    unproven.update(TORCHS)
    assert chosen(*(x.requires_grad_() for x in on_a_gpu(PLAIN))) in ("triton", "reference")


def test_the_self_check_finds_a_wrong_call_of_torch_s_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    op = dispatch.registered("spatial_attention")
    assert op.check("flash", torch.device("cpu")) == []
    right = _sdpa.flash
    load = dispatch.Backend.load

    def wrong(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        return right(q, k, v.detach(), *rest)

    monkeypatch.setattr(dispatch.Backend, "load", lambda self: wrong if self.name == "flash" else load(self))
    failures = op.check("flash", torch.device("cpu"))
    assert failures and all("gradient" in failure and "v" in failure for failure in failures)
    monkeypatch.setattr(dispatch.Backend, "load", lambda self: lambda *call: right(*call) * 1.05)
    assert any("result 0 is off by" in failure for failure in op.check("flash", torch.device("cpu")))
    checked = _selfcheck.spec_of(spatial_attention).checks
    assert any(each.options.get("empty") for each in checked)


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


@pytest.mark.parametrize("backend", ["reference", "flash"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_key_that_is_left_out_may_hold_anything(bad: float, backend: str) -> None:
    inputs, options = masked_text(Draw(29, torch.float32), (2, 3, 4, 5, 2, 8))
    q, k, v = inputs
    left_out = ~options["key_mask"]
    expected = spatial_attention(q, k, v, **options, backend=backend)
    k, v = (x.masked_fill(left_out[:, :, None, None], bad) for x in (k, v))
    torch.testing.assert_close(spatial_attention(q, k, v, **options, backend=backend), expected, rtol=0, atol=0)
    none = torch.zeros_like(left_out)
    assert not spatial_attention(q, k, v, key_mask=none, backend=backend).any()
