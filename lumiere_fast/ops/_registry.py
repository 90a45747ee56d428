"""How an op is registered: one flat reference, one fake rule, one autograd rule, one way to call it.

An op module writes a public function, `flatten` (checks the public arguments once and turns them into the reference's),
`<op>_reference` (flat: tensors, lists of tensors, numbers, strings), and `describe` (shape, dtype and memory format of
each result). `register` makes of these

- the call path of the public function, and
- `torch.ops.lumiere_fast.<op>`, an opaque operator with a fake rule and an autograd rule, for compile and export.

Adding a kernel is: write kernels/<op>.py, give `register` a `Backend` for it, take the op off PENDING_KERNELS.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lumiere_fast import dispatch


@dataclass(frozen=True)
class Result:
    """Shape, dtype, device and memory format of one result, known before it is computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    memory_format: torch.memory_format = torch.contiguous_format

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device, memory_format=self.memory_format)


class RegisteredOp:
    """An op's call path. See `register` for the arguments."""

    def __init__(
        self,
        op: dispatch.Op,
        reference: Callable[..., Any],
        describe: Callable[..., Result | tuple[Result, ...]],
    ) -> None:
        self.op = op
        self.reference = reference
        self.describe = describe
        self.opaque = _opaque_operator(op, reference, describe)

    def __call__(self, arguments: tuple[Any, ...], backend: str | None, out: Tensor | None = None) -> Any:
        """Run on the backend that dispatch selects; `arguments` are the reference's, checked.

        A call of a custom operator costs about 20 us, a raw call 1 us. So the reference is called as plain torch,
        with torch's own autograd (and torch.compile sees through it), and a kernel is called straight unless a graph
        is being captured or a gradient is needed: only these want the operator.
        """
        chosen = dispatch.select(self.op, backend, arguments)
        if out is not None:
            self._check_out(out, arguments)
        if chosen == "reference":
            return _store(self._definition(*arguments), out)
        if torch.compiler.is_compiling() or dispatch.needs_gradient(arguments):
            return _store(self.opaque(*arguments, chosen), out)
        return self.op.backends[chosen].load()(*arguments, out=out)

    def _definition(self, *arguments: Any) -> Any:
        """The reference, in its own precision: autocast would take its fp32 arithmetic down again."""
        device = next(tensor for value in arguments for tensor in dispatch.tensors_in(value)).device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return self.reference(*arguments)
        with torch.autocast(device, enabled=False):
            return self.reference(*arguments)

    def _check_out(self, out: Tensor, arguments: tuple[Any, ...]) -> None:
        name = self.op.name
        if dispatch.needs_gradient((*arguments, out)):
            raise ValueError(f"{name}: out was given where a gradient is needed; drop it, or use torch.no_grad()")
        results = self.describe(*arguments)
        first = results if isinstance(results, Result) else results[0]
        if (tuple(out.shape), out.dtype, out.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"{name}: out must be {first.shape} {first.dtype} on {first.device}, "
                f"got {tuple(out.shape)} {out.dtype} on {out.device}"
            )


def register(
    public: Callable[..., Any],
    reference: Callable[..., Any],
    flatten: Callable[..., tuple[Any, ...]],
    describe: Callable[..., Result | tuple[Result, ...]],
    backends: Sequence[dispatch.Backend] = (),
) -> RegisteredOp:
    """Register an op under the name of its public function.

    Args:
        public: the function users call. Besides its own parameters it has `backend`, and may have `out`.
        reference: the definition, in plain torch. Its annotated parameters are the operator's schema: Tensor,
            Tensor | None, Sequence[Tensor], Sequence[int], int, float, bool, str, the last five also optional. It
            returns a Tensor or a tuple of Tensors.
        flatten: takes the parameters of `public` by name (all but `backend` and `out`), raises ValueError for what it
            does not accept, and returns the arguments of `reference` in order.
        describe: takes the arguments of `reference` and tells its result, or each of them.
        backends: the kernels there are.
    """
    op = dispatch.Op(
        name=public.__name__,
        parameters=tuple(inspect.signature(reference).parameters),
        flatten=flatten,
        signature=inspect.signature(public),
        backends={backend.name: backend for backend in backends},
    )
    dispatch.register(op)
    return RegisteredOp(op, reference, describe)


def _store(result: Any, out: Tensor | None) -> Any:
    """`result` with its first tensor moved into `out`."""
    if out is None:
        return result
    if isinstance(result, Tensor):
        return out.copy_(result)
    return (out.copy_(result[0]), *result[1:])


def _opaque_operator(
    op: dispatch.Op, reference: Callable[..., Any], describe: Callable[..., Result | tuple[Result, ...]]
) -> Callable[..., Any]:
    """`torch.ops.lumiere_fast.<op>(*arguments, backend)`."""

    def run(*arguments: Any) -> Any:
        *inputs, backend = arguments
        function = reference if backend == "reference" else op.backends[backend].load()
        return _without_aliases(function(*inputs), inputs)

    run.__signature__ = _operator_signature(reference)  # type: ignore[attr-defined]
    operator = torch.library.custom_op(f"lumiere_fast::{op.name}", run, mutates_args=())

    @operator.register_fake
    def fake(*arguments: Any) -> Any:
        described = describe(*arguments[:-1])
        return described.empty() if isinstance(described, Result) else tuple(result.empty() for result in described)

    operator.register_autograd(functools.partial(_backward, reference), setup_context=_save_inputs)
    return operator


def _operator_signature(reference: Callable[..., Any]) -> inspect.Signature:
    """The reference's parameters and `backend`; no defaults, since torch drops trailing arguments equal to theirs."""
    hints = typing.get_type_hints(reference)
    result = hints.pop("return")
    kinds = {**{name: hints[name] for name in inspect.signature(reference).parameters}, "backend": str}
    position = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, position, annotation=kind) for name, kind in kinds.items()]
    return inspect.Signature(parameters, return_annotation=result)


def _without_aliases(result: Any, inputs: Sequence[Any]) -> Any:
    """An operator may not return its input's memory, which a reference does where there is nothing to compute."""
    taken = {tensor.untyped_storage().data_ptr() for value in inputs for tensor in dispatch.tensors_in(value)}
    if isinstance(result, Tensor):
        return result.clone() if result.untyped_storage().data_ptr() in taken else result
    return tuple(_without_aliases(tensor, inputs) for tensor in result)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Tensors go through `save_for_backward`; `ctx.layout` says for each argument what it was."""
    arguments = inputs[:-1]
    ctx.save_for_backward(*(tensor for value in arguments for tensor in dispatch.tensors_in(value)))
    ctx.layout = [
        Ellipsis if isinstance(value, Tensor) else len(value) if dispatch.tensors_in(value) else (value,)
        for value in arguments
    ]


def _backward(reference: Callable[..., Any], ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    """The gradient of any backend: the reference is run again, with a graph, and differentiated by torch."""
    saved = iter(ctx.saved_tensors)
    with torch.enable_grad():
        arguments: list[Any] = []
        for kind, needed in zip(ctx.layout, ctx.needs_input_grad[:-1], strict=True):
            if kind is Ellipsis:
                arguments.append(_leaf(next(saved), needed))
            elif isinstance(kind, int):
                arguments.append([_leaf(next(saved), wanted) for wanted in needed])
            else:
                arguments.append(kind[0])
        results = reference(*arguments)
    results = (results,) if isinstance(results, Tensor) else results
    pairs = [(y, g) for y, g in zip(results, gradients, strict=True) if g is not None and y.requires_grad]
    leaves = [tensor for value in arguments for tensor in dispatch.tensors_in(value) if tensor.requires_grad]
    found = iter(torch.autograd.grad([y for y, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True))

    def gradient(value: Any) -> Any:
        if isinstance(value, Tensor):
            return next(found) if value.requires_grad else None
        return [gradient(item) for item in value] if dispatch.tensors_in(value) else None

    return (*(gradient(value) for value in arguments), None)


def _leaf(tensor: Tensor, needed: bool) -> Tensor:
    return tensor.detach().requires_grad_(needed)
