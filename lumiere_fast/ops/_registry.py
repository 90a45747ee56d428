"""How an op is registered: one flat reference, one fake rule, one autograd rule, one way to call it.

An op module writes a public function, `flatten` (checks the public arguments once and turns them into the reference's),
`<op>_reference` (flat: tensors, lists of tensors, numbers, strings), and `describe` (shape, dtype and memory format of
each result). `register` makes of these

- the call path of the public function,
- `torch.ops.lumiere_fast.<op>`, an opaque operator with a fake rule and an autograd rule, for compile and export, and
- `torch.ops.lumiere_fast.<op>_triton`, once wanted: the same for a Triton kernel, which torch.compile sees through.

Adding a kernel is: write kernels/<op>.py, give `register` a `Backend` for it, take the op off PENDING_KERNELS.
"""

from __future__ import annotations

import inspect
import threading
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lumiere_fast import dispatch
from lumiere_fast.ops import _selfcheck
from lumiere_fast.ops._checks import check_is_tensor

Out = Tensor | tuple[Tensor | None, ...] | None


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
        in_place: Sequence[str] = (),
    ) -> None:
        self.op = op
        self.reference = reference
        self.describe = describe
        self.in_place = [op.parameters.index(name) for name in in_place]
        self.single = typing.get_type_hints(reference)["return"] is Tensor
        self.operator = _operator(torch.library.custom_op, op.name, self._named_body(), reference, named=True)
        self.operator.register_fake(self._fake)
        self.operator.register_autograd(self._backward, setup_context=_save_inputs)

    def __call__(self, arguments: tuple[Any, ...], backend: str | None, out: Out = None) -> Any:
        """Run on the backend that dispatch selects; `arguments` are the reference's, checked.

        `out`: room for the first result, or for each that is not None.

        A call of a custom operator costs about 20 us, a raw call 1 us. So what is composed of torch's operators is
        called as plain torch, with torch's own autograd (and torch.compile sees through it), and a kernel is called
        straight unless a graph is being captured, a gradient is needed or a dispatch mode is watching: only these want
        the operator.
        """
        chosen = dispatch.select(self.op, backend, arguments)
        if out is not None:
            self._check_out(out, arguments)
        if chosen in dispatch.COMPOSED:
            return _store(self.composed(chosen, arguments), out)
        if traced() or dispatch.needs_gradient(arguments):
            return _store(self._captured(chosen, arguments), out)
        results = self.launch(chosen, arguments, self.allocate(arguments, out))
        for given in _given(out):
            if not given.is_inference():
                torch.autograd.graph.increment_version(given)  # whoever saved it for a backward is to be told
        return results

    def definition(self, *arguments: Any) -> Any:
        return self.composed("reference", arguments)

    def composed(self, chosen: str, arguments: Sequence[Any]) -> Any:
        """A backend of torch's operators, in its own precision: autocast would take fp32 arithmetic down again.

        Torch's fused kernels are not all fit for an empty tensor, which the reference is.
        """
        first = _first(arguments)
        plain = chosen == "reference" or first.numel() == 0
        function = self.reference if plain else self.op.backends[chosen].load()
        device = first.device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return function(*arguments)
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    def _captured(self, chosen: str, arguments: tuple[Any, ...]) -> Any:
        """The call as an operator: one that shows its kernels to torch.compile where they are Triton's."""
        if chosen != "triton":
            return self.operator(*arguments, chosen)
        return getattr(torch.ops.lumiere_fast, _triton_operator(self.op.name))(*arguments)

    def launch(self, chosen: str, arguments: tuple[Any, ...], results: Any) -> Any:
        """Run a kernel, which sees to the tensors' device itself; it writes `results`, which `allocate` made.

        What is composed of torch's operators returns results of its own, which are copied.
        """
        if chosen in dispatch.COMPOSED:
            return _store(self.composed(chosen, arguments), results)
        first = results if isinstance(results, Tensor) else results[0]
        if first.numel() > 0:
            self.op.backends[chosen].load()(*arguments, out=results)
        return results

    def allocate(self, arguments: Sequence[Any], out: Out = None) -> Any:
        """Room for the results, not filled; `out` is the first of them, or several, if given."""
        if isinstance(out, Tensor) and self.single:
            return out
        described = self.describe(*arguments)
        if isinstance(described, Result):
            return described.empty()
        rooms = zip_longest(described, _rooms(out))
        return tuple(result.empty() if room is None else room for result, room in rooms)

    def _named_body(self) -> Callable[..., Any]:
        """The body of the operator, whose last argument names the backend."""

        def run(*arguments: Any) -> Any:
            *inputs, backend = arguments
            if backend in dispatch.COMPOSED:
                return _without_aliases(self.composed(backend, inputs), inputs)
            return self.launch(backend, tuple(inputs), self.allocate(inputs))

        return run

    def _fake(self, *arguments: Any) -> Any:
        return self.allocate(arguments[:-1])

    def register_triton_operator(self) -> None:
        """Make `torch.ops.lumiere_fast.<op>_triton`, when first wanted: it takes a second."""
        kernel = self.op.backends["triton"].load()

        def run(*arguments: Any) -> Any:
            results = self.allocate(arguments)
            if not _is_fake(results):
                kernel(*arguments, out=results)
            return results

        name = f"{self.op.name}_triton"
        operator = _operator(torch.library.triton_op, name, run, self.reference, named=False)
        operator.register_autograd(self._backward_of_triton, setup_context=_save_all_inputs)

    def _backward(self, ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return (*self._gradients(ctx, ctx.backend, gradients), None)

    def _backward_of_triton(self, ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return self._gradients(ctx, "triton", gradients)

    def _gradients(self, ctx: Any, backend: str, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """By the backend's own backward where it has one, else by running again what torch can differentiate.

        Where the gradients are to be differentiated in their turn (`create_graph`), the reference is run on the tensors
        as they came, with what they were made from: a kernel's backward has no derivative.
        """
        if torch.is_grad_enabled():
            return _gradients_again(self.definition, _saved_arguments(ctx, _as_it_came), gradients, again=True)
        return self.gradients(backend, _saved_arguments(ctx, _leaf), gradients)

    def gradients(self, backend: str, arguments: Sequence[Any], gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """Those of the arguments that have `requires_grad`, from those of the results of a call that need not be made.

        `backend` may be "auto". Not to be differentiated in their turn.
        """
        with torch.no_grad():
            chosen = dispatch.select(self.op, backend, arguments) if backend == dispatch.AUTO else backend
            own = self.op.backends[chosen].load_backward() if chosen in self.op.backends else None
            if own is None:
                return _gradients_again(self._differentiable(chosen, arguments), arguments, gradients)
            return tuple(own(gradients, *arguments))

    def _differentiable(self, chosen: str, arguments: Sequence[Any]) -> Callable[..., Any]:
        """What stands for a call of `chosen` where torch is to differentiate it: the fastest that torch can."""
        if chosen not in dispatch.COMPOSED:
            with torch.enable_grad():
                chosen = dispatch.first_composed(self.op, arguments)
        return lambda *arguments: self.composed(chosen, arguments)

    def _check_out(self, out: Any, arguments: tuple[Any, ...]) -> None:
        name = self.op.name
        results = self.describe(*arguments)
        described = (results,) if isinstance(results, Result) else results
        if isinstance(out, tuple) and len(out) != len(described):
            raise ValueError(f"{name}: out must be a tensor, or {len(described)} for the results, got {len(out)}")
        names = [f"out[{i}]" if isinstance(out, tuple) else "out" for i in range(len(described))]
        rooms = [(i, room) for i, room in enumerate(_rooms(out)) if room is not None]
        gradient = dispatch.needs_gradient(arguments)
        for i, room in rooms:
            self._check_room(names[i], room, described[i], gradient)
        if torch.compiler.is_compiling() or any(isinstance(room, FakeTensor) for _, room in rooms):
            return
        read = [(i, _Lying(tensor)) for i, value in enumerate(arguments) for tensor in dispatch.tensors_in(value)]
        written = [(i, _Lying(room)) for i, room in rooms]
        for i, lying in written:
            self._check_memory(names[i], lying, i, read)
        if any(lying.overlaps(other) for i, lying in written for j, other in written if j < i):
            raise ValueError(f"{name}: the tensors of out must not lie in one another's memory; give each its own")

    def _check_room(self, what: str, room: Any, result: Result, gradient: bool) -> None:
        name = self.op.name
        check_is_tensor(name, what, room)
        if gradient or (room.requires_grad and torch.is_grad_enabled()):
            raise ValueError(f"{name}: {what} was given where a gradient is needed; drop it, or use torch.no_grad()")
        if (tuple(room.shape), room.dtype, room.device) != (result.shape, result.dtype, result.device):
            raise ValueError(
                f"{name}: {what} must be {result.shape} {result.dtype} on {result.device}, "
                f"got {tuple(room.shape)} {room.dtype} on {room.device}"
            )

    def _check_memory(self, what: str, room: _Lying, index: int, read: Sequence[tuple[int, _Lying]]) -> None:
        """`read`: the tensors that the call reads, each with the number of its argument. A result may take the place of
        one, the very same elements, and otherwise lie in the memory of none."""
        name = self.op.name
        taken = self.in_place[index] if index < len(self.in_place) else None
        if any(room.overlaps(other) and not (i == taken and room.coincides(other)) for i, other in read):
            raise ValueError(f"{name}: {what} must not lie in the memory of an input; give a tensor of its own")
        if _folds(room.tensor):
            raise ValueError(
                f"{name}: {what} has several elements in one place, strides {room.tensor.stride()}; give a plain one"
            )


def register(
    public: Callable[..., Any],
    reference: Callable[..., Any],
    flatten: Callable[..., tuple[Any, ...]],
    describe: Callable[..., Result | tuple[Result, ...]],
    backends: Sequence[dispatch.Backend] = (),
    case: Callable[..., str] | None = None,
    in_place: Sequence[str] = (),
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
        case: as of `dispatch.Op`, where the order of the backends is measured.
        in_place: for each result, the parameter of `reference` whose tensor `out` may be, the very same: every backend
            reads an element of it before it writes the result's.
    """
    name = public.__name__
    op = dispatch.Op(
        name=name,
        parameters=tuple(inspect.signature(reference).parameters),
        flatten=flatten,
        signature=inspect.signature(public),
        backends={backend.name: backend for backend in backends},
        check=lambda backend, device: _selfcheck.failures(_REGISTERED[name], public, backend, device),
        case=case,
    )
    dispatch.register(op)
    _REGISTERED[name] = RegisteredOp(op, reference, describe, in_place)
    return _REGISTERED[name]


_REGISTERED: dict[str, RegisteredOp] = {}


@dispatch.constant_when_traced
def _triton_operator(op: str) -> str:
    """The name of the op's Triton operator, which is there from now on."""
    name = f"{op}_triton"
    with _making:
        if not hasattr(torch.ops.lumiere_fast, name):
            _REGISTERED[op].register_triton_operator()
    return name


_making = threading.Lock()


def _rooms(out: Out) -> tuple[Tensor | None, ...]:
    return out if isinstance(out, tuple) else (out,)


def _given(out: Out) -> list[Tensor]:
    return [room for room in _rooms(out) if room is not None]


def _store(result: Any, out: Out) -> Any:
    """`result` with its tensors moved into those of `out`."""
    if out is None:
        return result
    if isinstance(out, Tensor) and isinstance(result, Tensor):
        return out.copy_(result)
    rooms = zip_longest(result, _rooms(out))
    return tuple(tensor if room is None else room.copy_(tensor) for tensor, room in rooms)


def _operator(
    kind: Callable[..., Any], name: str, run: Callable[..., Any], reference: Callable[..., Any], *, named: bool
) -> Any:
    """`torch.ops.lumiere_fast.<name>` of the reference's arguments and, with `named`, the name of a backend."""
    run.__signature__ = _operator_signature(reference, named)  # type: ignore[attr-defined]
    return kind(f"lumiere_fast::{name}", run, mutates_args=())


def _operator_signature(reference: Callable[..., Any], named: bool) -> inspect.Signature:
    """The reference's parameters; without defaults, since torch drops trailing arguments equal to theirs."""
    hints = typing.get_type_hints(reference)
    result = hints.pop("return")
    kinds = {name: hints[name] for name in inspect.signature(reference).parameters}
    if named:
        kinds["backend"] = str
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
    """Of the operator whose last argument names the backend."""
    _save_all_inputs(ctx, inputs[:-1], output)
    ctx.backend = inputs[-1]


def _save_all_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Tensors go through `save_for_backward`; `ctx.layout` says for each argument what it was."""
    ctx.save_for_backward(*(tensor for value in inputs for tensor in dispatch.tensors_in(value)))
    ctx.layout = [
        Ellipsis if isinstance(value, Tensor) else len(value) if dispatch.tensors_in(value) else (value,)
        for value in inputs
    ]


def _saved_arguments(ctx: Any, made: Callable[[Tensor, bool], Tensor]) -> list[Any]:
    """The arguments in their order, each tensor `made` from the saved one and from whether it needs a gradient."""
    saved = iter(ctx.saved_tensors)
    arguments: list[Any] = []
    for kind, needed in zip(ctx.layout, ctx.needs_input_grad, strict=False):  # the name of the backend has no layout
        if kind is Ellipsis:
            arguments.append(made(next(saved), needed))
        elif isinstance(kind, int):
            arguments.append([made(next(saved), wanted) for wanted in needed])
        else:
            arguments.append(kind[0])
    return arguments


def _gradients_again(
    composed: Callable[..., Any], arguments: Sequence[Any], gradients: Sequence[Tensor | None], again: bool = False
) -> tuple[Any, ...]:
    """A call is made again, with a graph, and differentiated by torch; `again`: so that it can be again."""
    with torch.enable_grad():
        results = composed(*arguments)
    results = (results,) if isinstance(results, Tensor) else results
    pairs = [(y, g) for y, g in zip(results, gradients, strict=True) if g is not None and y.requires_grad]
    leaves = [tensor for value in arguments for tensor in dispatch.tensors_in(value) if tensor.requires_grad]
    given = [g for _, g in pairs]
    found = iter(torch.autograd.grad([y for y, _ in pairs], leaves, given, allow_unused=True, create_graph=again))

    def gradient(value: Any) -> Any:
        if isinstance(value, Tensor):
            return next(found) if value.requires_grad else None
        return [gradient(item) for item in value] if dispatch.tensors_in(value) else None

    return tuple(gradient(value) for value in arguments)


def _leaf(tensor: Tensor, needed: bool) -> Tensor:
    return tensor.detach().requires_grad_(needed)


def _as_it_came(tensor: Tensor, needed: bool) -> Tensor:
    return tensor if needed else tensor.detach()


def _first(arguments: Sequence[Any]) -> Tensor:
    return next(tensor for value in arguments for tensor in dispatch.tensors_in(value))


def traced() -> bool:
    """Whether calls are captured or watched: by Dynamo, by torch.jit.trace, or by a `TorchDispatchMode` such as that of
    fake tensors, of make_fx or of a counter. These see operators, not kernels, and their shapes may be symbols."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return torch._C._get_tracing_state() is not None


def _is_fake(results: Any) -> bool:
    return isinstance(results if isinstance(results, Tensor) else results[0], FakeTensor)


class _Lying:
    """A tensor, and the addresses of its storage, which two that share memory need not share as an object."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.tensor = tensor
        self.low = storage.data_ptr()
        self.high = self.low + storage.nbytes()

    def overlaps(self, other: _Lying) -> bool:
        """Whether the spans of the two in memory meet."""
        if self.high <= other.low or other.high <= self.low:
            return False
        (low, high), (first, end) = _span(self.tensor), _span(other.tensor)
        return low < end and first < high

    def coincides(self, other: _Lying) -> bool:
        """Whether these are the same elements in the same places."""
        a, b = self.tensor, other.tensor
        return (a.data_ptr(), a.dtype, a.shape, a.stride()) == (b.data_ptr(), b.dtype, b.shape, b.stride())


def _folds(out: Tensor) -> bool:
    """Whether two elements may share a place: a stride that does not step over all that smaller strides reach."""
    if out.is_contiguous() or out.is_contiguous(memory_format=torch.channels_last_3d):
        return False
    reach = 0
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the one after the last; equal where there are none."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()
