"""Which backend runs an op, and why the others do not.

A backend declares what it needs as data (`Needs`). `why_not` holds a call against that data and lists every reason
against it; nothing else decides. The choice is made, strongest first, by the `backend=` argument of the call, by
`use_backend`, by the environment variable LUMIERE_FAST_BACKEND, and is "auto" otherwise. A named backend runs or raises
`BackendUnavailable`; only "auto" falls through, in the order of `BACKENDS`, and says so once for each reason.

This module knows no op: the ops register themselves.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from lumiere_fast.kernels import PENDING_KERNELS

logger = logging.getLogger(__name__)

BACKENDS = ("triton", "cuda", "cpu", "reference")
"""Every backend, in the order "auto" tries them. The reference needs nothing, so it comes last."""

AUTO = "auto"
ENVIRONMENT_VARIABLE = "LUMIERE_FAST_BACKEND"


_F = TypeVar("_F", bound=Callable[..., Any])


def _constant_when_traced(function: _F) -> _F:
    """`torch.compiler.assume_constant_result`, without the second that its import of Dynamo takes."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run this call; the message holds every reason."""


@dataclass(frozen=True)
class Divisible:
    """Axis `axis` of the argument must be a multiple of `by`."""

    argument: str
    axis: int
    by: int


@dataclass(frozen=True)
class Needs:
    """What a backend needs of a call. Arguments go by their names in the op's reference.

    Args:
        devices: accepted device types of every tensor; empty for any.
        dtypes: accepted dtypes by argument; an argument not named may have any.
        divisible: sizes that must be multiples.
        dense: (argument, axis) pairs that must have stride 1.
        values: accepted values by argument, for those that are not tensors.
        capability: least CUDA compute capability of the device the tensors are on.
        gradient: whether the call may need a gradient.
        modules: Python modules that must be installed.
    """

    devices: tuple[str, ...] = ()
    dtypes: Mapping[str, tuple[torch.dtype, ...]] = field(default_factory=dict)
    divisible: tuple[Divisible, ...] = ()
    dense: tuple[tuple[str, int], ...] = ()
    values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    capability: tuple[int, int] | None = None
    gradient: bool = False
    modules: tuple[str, ...] = ()

    def unmet(self, arguments: Mapping[str, Any]) -> list[str]:
        """Every reason why a call with these arguments cannot be served, in the order of the fields."""
        checks = (self._device, self._dtype, self._divisible, self._dense, self._values, self._capability)
        reasons = [reason for check in checks for reason in check(arguments)]
        return [*reasons, *self._gradient(arguments), *self._modules()]

    def _device(self, arguments: Mapping[str, Any]) -> Iterator[str]:
        for name, tensor in named_tensors(arguments):
            if self.devices and tensor.device.type not in self.devices:
                yield f"{name} is on {tensor.device.type}, it needs {_either(self.devices)}"

    def _dtype(self, arguments: Mapping[str, Any]) -> Iterator[str]:
        for name, tensor in named_tensors(arguments):
            accepted = self.dtypes.get(name)
            if accepted is not None and tensor.dtype not in accepted:
                yield f"{name} is {_short(tensor.dtype)}, it needs {_either([_short(dtype) for dtype in accepted])}"

    def _divisible(self, arguments: Mapping[str, Any]) -> Iterator[str]:
        for need in self.divisible:
            for name, tensor in named_tensors({need.argument: arguments[need.argument]}):
                if tensor.shape[need.axis] % need.by != 0:
                    yield f"axis {need.axis} of {name} is {tensor.shape[need.axis]}, it needs a multiple of {need.by}"

    def _dense(self, arguments: Mapping[str, Any]) -> Iterator[str]:
        for argument, axis in self.dense:
            for name, tensor in named_tensors({argument: arguments[argument]}):
                if tensor.shape[axis] > 1 and tensor.stride(axis) != 1:
                    yield f"axis {axis} of {name} has stride {tensor.stride(axis)}, it needs stride 1"

    def _values(self, arguments: Mapping[str, Any]) -> Iterator[str]:
        for name, accepted in self.values.items():
            if arguments[name] not in accepted:
                yield f"{name} is {arguments[name]!r}, it needs {_either([repr(value) for value in accepted])}"

    def _capability(self, arguments: Mapping[str, Any]) -> Iterator[str]:
        if self.capability is None:
            return
        devices = {tensor.device for _, tensor in named_tensors(arguments) if tensor.device.type == "cuda"}
        for device in sorted(devices, key=str):
            found = _capability(device)
            if found < self.capability:
                yield f"{device} has compute capability {_version(found)}, it needs {_version(self.capability)}"

    def _gradient(self, arguments: Mapping[str, Any]) -> Iterator[str]:
        if not self.gradient and needs_gradient(arguments):
            yield "a gradient is needed, it has no backward (use torch.no_grad() where none is wanted)"

    def _modules(self) -> list[str]:
        return [f"the Python module {name} is not installed" for name in self.modules if not _installed(name)]


@dataclass(frozen=True)
class Backend:
    """One way to run an op.

    Args:
        name: one of `BACKENDS`.
        function: "module:function", imported at its first use. It takes the arguments of the op's reference by
            position, and `out=`: None, or a tensor for its (first) result, of any strides.
        needs: what a call must offer.
    """

    name: str
    function: str
    needs: Needs

    def load(self) -> Callable[..., Any]:
        return _load(self.function)


@dataclass(frozen=True)
class Op:
    """What dispatch knows of an op.

    Args:
        name: the one name of the op.
        parameters: the names of the reference's parameters.
        flatten: checks a call to the public function, and gives the arguments of the reference in their order.
        signature: of the public function, whose parameters `flatten` takes by name.
        backends: all but the reference.
    """

    name: str
    parameters: tuple[str, ...]
    flatten: Callable[..., tuple[Any, ...]]
    signature: inspect.Signature
    backends: Mapping[str, Backend]

    def bind(self, *inputs: Any, **options: Any) -> tuple[Any, ...]:
        """The arguments of the reference for a call `op(*inputs, **options)`."""
        call = self.signature.bind(*inputs, **options)
        call.apply_defaults()
        return self.flatten(**{name: v for name, v in call.arguments.items() if name not in ("backend", "out")})


_OPS: dict[str, Op] = {}


def register(op: Op) -> None:
    for backend in op.backends:
        _check_backend(backend, BACKENDS)
    _OPS[op.name] = op


def registered_ops() -> tuple[str, ...]:
    return tuple(_OPS)


def why_not(op: str, backend: str, *inputs: Any, **options: Any) -> list[str]:
    """Every reason why `backend` cannot run `op(*inputs, **options)`; empty if it can.

    Raises:
        ValueError: for an unknown op or backend, and for whatever the op itself would refuse.
    """
    if op not in _OPS:
        raise ValueError(f"op must be one of {', '.join(_OPS)}, got {op!r}")
    _check_backend(backend, BACKENDS)
    return reasons_against(_OPS[op], backend, _OPS[op].bind(*inputs, **options))


def supports(op: str, backend: str, *inputs: Any, **options: Any) -> bool:
    """Whether `backend` can run `op(*inputs, **options)`: that `why_not` finds no reason."""
    return not why_not(op, backend, *inputs, **options)


def reasons_against(op: Op, backend: str, arguments: Sequence[Any]) -> list[str]:
    """`why_not` for arguments that are checked and flat already."""
    if backend == "reference":
        return []
    if backend in op.backends:
        return op.backends[backend].needs.unmet(dict(zip(op.parameters, arguments, strict=True)))
    if op.name in PENDING_KERNELS:
        return ["its kernel is not written yet (lumiere_fast.kernels.PENDING_KERNELS)"]
    return [f"{op.name} has no {backend} kernel"]


def select(op: Op, requested: str | None, arguments: Sequence[Any]) -> str:
    """The backend that runs this call.

    Raises:
        ValueError: `requested`, the innermost `use_backend` or the environment names no backend.
        BackendUnavailable: it names one that cannot run the call.
    """
    name = current_backend() if requested is None else requested
    _check_backend(name, (AUTO, *BACKENDS))
    chosen = _first_without_reasons(op, arguments) if name == AUTO else _forced(op, name, arguments)
    if not torch.compiler.is_compiling() and (record := _record.get()) is not None:
        record.add(chosen)
    return chosen


def _forced(op: Op, name: str, arguments: Sequence[Any]) -> str:
    reasons = reasons_against(op, name, arguments)
    if reasons:
        raise BackendUnavailable(
            f"{op.name} cannot run on the backend {name!r}: {'; '.join(reasons)}. "
            'Ask for "auto" or "reference", or meet what it needs.'
        )
    return name


def current_backend() -> str:
    """What a call without `backend=` asks for: a backend's name, or "auto"."""
    # Dynamo cannot trace a ContextVar. It reads the variable while it traces and guards on its plain mirror, so that
    # compiled code is compiled again when another backend is asked for. The environment is read when tracing only.
    chosen = _read_choice(_mirror) if torch.compiler.is_compiling() else _choice.get()
    return os.environ.get(ENVIRONMENT_VARIABLE, AUTO) if chosen is None else chosen


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, in this thread or task, ops that are not told otherwise run on the backend `name` or raise.

    Nests; the outer choice is back after the block. `use_backend("auto")` overrides the environment variable. Code that
    torch.compile made follows the choice of the thread that traced it; it reads the environment variable when traced.

    Raises:
        ValueError: `name` is neither "auto" nor one of `BACKENDS`.
    """
    global _mirror
    _check_backend(name, (AUTO, *BACKENDS))
    token, before = _choice.set(name), _mirror
    _mirror = name
    try:
        yield
    finally:
        _choice.reset(token)
        _mirror = before


@contextlib.contextmanager
def record_backends() -> Iterator[set[str]]:
    """Within the block, in this thread or task, collect the names of the backends that eager calls ran on."""
    used: set[str] = set()
    token = _record.set(used)
    try:
        yield used
    finally:
        _record.reset(token)


_record: ContextVar[set[str] | None] = ContextVar("lumiere_fast_record", default=None)
_choice: ContextVar[str | None] = ContextVar("lumiere_fast_backend", default=None)
_mirror: str | None = None


@_constant_when_traced
def _read_choice(mirror: str | None) -> str | None:
    return _choice.get()


def needs_gradient(arguments: Mapping[str, Any] | Sequence[Any]) -> bool:
    values = arguments.values() if isinstance(arguments, Mapping) else arguments
    return torch.is_grad_enabled() and any(tensor.requires_grad for value in values for tensor in tensors_in(value))


def tensors_in(value: Any) -> Sequence[Tensor]:
    """The tensors of one argument: itself, those of a list, or none."""
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, (list, tuple)):
        return [item for item in value if isinstance(item, Tensor)]
    return ()


def named_tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments.items():
        for tensor in tensors_in(value):
            yield name, tensor


_logged: set[tuple[str, str, str]] = set()


def _first_without_reasons(op: Op, arguments: Sequence[Any]) -> str:
    for name in BACKENDS:
        reasons = reasons_against(op, name, arguments)
        if not reasons:
            return name
        _log_once(op.name, name, reasons)
    raise AssertionError("the reference has no reasons against it")


def _log_once(op: str, backend: str, reasons: Sequence[str]) -> None:
    if torch.compiler.is_compiling():  # a log call would break the graph
        return
    for reason in reasons:
        if (op, backend, reason) not in _logged:
            _logged.add((op, backend, reason))
            logger.info("%s does not run on the backend %s: %s", op, backend, reason)


def _check_backend(name: str, accepted: Sequence[str]) -> None:
    if name not in accepted:
        raise ValueError(f"backend must be one of {', '.join(accepted)}, got {name!r}")


@functools.cache
def _load(function: str) -> Callable[..., Any]:
    module, _, name = function.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return loaded


_find_spec = functools.cache(importlib.util.find_spec)


@_constant_when_traced
def _installed(module: str) -> bool:
    return _find_spec(module) is not None


@_constant_when_traced
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _version(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _either(values: Sequence[str]) -> str:
    return " or ".join(values)
