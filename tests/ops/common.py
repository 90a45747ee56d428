"""What the tests of every op share: drawing inputs, tolerances measured against torch's own error, the op contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lumiere_fast import dispatch
from lumiere_fast.ops import _registry
from lumiere_fast.ops._selfcheck import FLOORS, relative_error

CHANNELS_LAST = torch.channels_last_3d
CONTIGUOUS = torch.contiguous_format
FORMATS = (CHANNELS_LAST, CONTIGUOUS)
HALF_DTYPES = (torch.bfloat16, torch.float16)


class Draw:
    """Normal tensors from one seeded generator."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def __call__(self, *shape: int, grad: bool = False) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)
        return drawn.requires_grad_(grad)

    def clip(self, *shape: int, memory_format: torch.memory_format = CHANNELS_LAST, grad: bool = False) -> Tensor:
        """(B, C, T, H, W) in `memory_format`."""
        return self(*shape).contiguous(memory_format=memory_format).requires_grad_(grad)


def in_format(x: Tensor, memory_format: torch.memory_format) -> bool:
    return x.is_contiguous(memory_format=memory_format)


def assert_no_worse_than_torch(
    ours: Tensor,
    theirs: Tensor,
    exact: Tensor,
    factor: float = 2.0,
    rounded: torch.dtype | None = None,
    roundings: int = 1,
) -> None:
    """`error(ours) <= factor * error(torch) + floor`, both against the fp64 result.

    The floor is that of the result's dtype, or of `roundings` on the way to it to the less precise `rounded`.
    """
    exact = exact.detach()
    error = relative_error(ours.detach(), exact)
    bound = factor * relative_error(theirs.detach(), exact) + roundings * FLOORS[rounded or ours.dtype]
    assert error <= bound, f"relative error {error:.2e}, torch's own allows {bound:.2e}"


def steps(x: Tensor) -> list[int]:
    """The strides of axes that are walked along."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def device_of(backend: str) -> str:
    """Where a backend runs; without that, the test is skipped."""
    if backend == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip(f"the {backend} backend needs a GPU")
    return "cuda"


def launch_on(public: Callable[..., Any], backend: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
    """What the backend writes over NaN, or over `out`; Triton's kernels in the interpreter where there is no GPU.

    A backend that the op does not have, or that does not take the call, skips the test.
    """
    registered = _registry._REGISTERED[public.__name__]
    arguments = arguments_of(public, *inputs, **options)
    if reasons := dispatch.reasons_against(registered.op, backend, arguments):
        pytest.skip("; ".join(reasons))
    rooms = registered.allocate(arguments, out)
    for room in flatten(rooms) if out is None else ():
        room.fill_(float("nan"))
    return registered.launch(backend, arguments, rooms)


def in_layout(x: Tensor, kind: int) -> Tensor:
    """`x` in channels last, contiguous, in a slice of something larger, or with rows apart."""
    if kind == 0:
        return x.contiguous(memory_format=CHANNELS_LAST)
    if kind == 1:
        return x.contiguous()
    shape = list(x.shape)
    axis = 2 if kind == 2 else 3
    shape[axis] = 2 * shape[axis] + 1
    inside = [slice(None)] * 5
    inside[axis] = slice(1, None, 2)
    return torch.zeros(shape, dtype=x.dtype, device=x.device)[tuple(inside)].copy_(x)


def arguments_of(public: Callable[..., Any], *inputs: Any, **options: Any) -> tuple[Any, ...]:
    """The flat arguments of the reference, as dispatch gives them to a backend."""
    return dispatch._OPS[public.__name__].bind(*inputs, **options)


def operator_of(public: Callable[..., Any]) -> Any:
    return getattr(torch.ops.lumiere_fast, public.__name__).default


def check_operator(public: Callable[..., Any], *inputs: Any, backend: str = "reference", **options: Any) -> None:
    """torch's own check of the registration: schema, fake rule (strides too), autograd, tracing with dynamic shapes."""
    torch.library.opcheck(operator_of(public), (*arguments_of(public, *inputs, **options), backend))


def check_operator_gradient(
    public: Callable[..., Any], *inputs: Any, backend: str = "reference", **options: Any
) -> None:
    """The operator's own autograd rule gives what torch's autograd gives for the plain reference."""
    flat = arguments_of(public, *inputs, **options)
    leaves = [t for value in flat for t in dispatch.tensors_in(value) if t.requires_grad]
    plain = first(public(*inputs, **options, backend="reference"))
    opaque = first(operator_of(public)(*flat, backend))
    torch.testing.assert_close(opaque, plain)
    gradient = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1), dtype=plain.dtype)
    expected = torch.autograd.grad(plain, leaves, gradient)
    torch.testing.assert_close(torch.autograd.grad(opaque, leaves, gradient), expected)


def check_compiled(public: Callable[..., Any], *inputs: Any, **options: Any) -> None:
    """Compiled in one graph, values and strides are those of the eager call."""
    compiled = torch.compile(public, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(flatten(compiled(*inputs, **options)), flatten(public(*inputs, **options)), strict=True):
        torch.testing.assert_close(ours, eager)
        assert ours.stride() == eager.stride()


def check_out(public: Callable[..., Any], *inputs: Any, **options: Any) -> None:
    """`out=` is filled, also where it is a strided slice, and is what comes back."""
    expected = first(public(*inputs, **options))
    held = torch.full((*expected.shape[:-1], 2 * expected.shape[-1]), float("nan"), dtype=expected.dtype)
    for out in (torch.full_like(expected, float("nan")), held[..., ::2]):
        assert first(public(*inputs, **options, out=out)) is out
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


def first(result: Any) -> Tensor:
    return flatten(result)[0]


def flatten(result: Any) -> Sequence[Tensor]:
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in flatten(part)]
