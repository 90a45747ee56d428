"""Which backend runs an op, and why the others do not.

A backend declares what it needs as data (`Needs`). `why_not` holds a call against that data and lists every reason
against it; nothing else decides. The choice is made, strongest first, by the `backend=` argument of the call, by
`use_backend`, by the environment variable LUMIERE_FAST_BACKEND, and is "auto" otherwise. A named backend runs or raises
`BackendUnavailable`; only "auto" falls through, and says so once for each reason: in the order of `BACKENDS`, or in the
one that was measured for calls of that kind (`Op.case`). On a GPU "auto" also wants proof that the kernel is right
there (`evidence`), and it never takes Triton's interpreter.

This module knows no op: the ops register themselves.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lumiere_fast import evidence, native
from lumiere_fast.kernels import PENDING_KERNELS, _configs

logger = logging.getLogger(__name__)

BACKENDS = ("triton", "wgmma", "cuda", "cpu", "cudnn", "flash", "efficient", "reference")
"""Every backend, in the order "auto" tries them. The reference needs nothing, so it comes last.

"wgmma" is the native core's CUDA half by Hopper's warpgroup instructions. It is a backend beside "cuda", not a part of
it, since what a GPU has proved is kept by backend: where it is wrong or unproved, "cuda" runs. "cudnn", "flash" and
"efficient" are torch's own attention kernels.
"""

GPU_BACKENDS = ("triton", "wgmma", "cuda", *evidence.TORCHS)

COMPOSED = (*evidence.TORCHS, "reference")
"""Those made of torch's operators: traces and torch's autograd see through them, and they return a result of their own.
"""

AUTO = "auto"
INTERPRETED = "it would run in Triton's interpreter, which is for tests"
ENVIRONMENT_VARIABLE = "LUMIERE_FAST_BACKEND"


_F = TypeVar("_F", bound=Callable[..., Any])


def constant_when_traced(function: _F) -> _F:
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
        most_capability: the largest, for instructions that later devices do not have.
        gradient: whether the call may need a gradient.
        modules: Python modules that must be installed.
        native: the half of the native core that must be built, or "avx2" or "wgmma": see `native.why_not`.
        limits: what no field can say: takes the arguments by position, returns reasons. Traces go through it.
    """

    devices: tuple[str, ...] = ()
    dtypes: Mapping[str, tuple[torch.dtype, ...]] = field(default_factory=dict)
    divisible: tuple[Divisible, ...] = ()
    dense: tuple[tuple[str, int], ...] = ()
    values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    capability: tuple[int, int] | None = None
    most_capability: tuple[int, int] | None = None
    gradient: bool = False
    modules: tuple[str, ...] = ()
    native: str | None = None
    limits: Callable[..., Iterable[str]] | None = None

    def unmet(self, arguments: Mapping[str, Any]) -> list[str]:
        """Every reason why a call with these arguments cannot be served, each once, in the order of the fields."""
        reasons = [reason for check in self._checks for reason in check(arguments)]
        return list(dict.fromkeys(reasons)) if reasons else reasons

    @functools.cached_property
    def _checks(self) -> tuple[Callable[[Mapping[str, Any]], Iterable[str]], ...]:
        """Those of the fields that are given."""
        checks = (
            (self.devices, self._device),
            (self.dtypes, self._dtype),
            (self.divisible, self._divisible),
            (self.dense, self._dense),
            (self.values, self._values),
            (self.capability or self.most_capability, self._capability),
            (not self.gradient, self._gradient),
            (True, self._transform),
            (self.modules, self._modules),
            (self.native, self._native),
            (self.limits, self._limits),
        )
        return tuple(check for given, check in checks if given)

    def _device(self, arguments: Mapping[str, Any]) -> Iterator[str]:
        interpreted = "triton" in self.modules and interpreting()
        for name, tensor in _first_tensors(arguments):
            if self.devices == ("cpu",) and tensor.is_cpu:
                continue  # the usual case, told at a fraction of the cost
            if interpreted and tensor.dtype == torch.bfloat16:
                yield f"{name} is bfloat16, which Triton's interpreter computes wrongly"
            if not interpreted and tensor.device.type not in self.devices:
                yield f"{name} is on {tensor.device.type}, it needs {_either(self.devices)}"

    def _dtype(self, arguments: Mapping[str, Any]) -> Iterator[str]:
        for name, accepted in self.dtypes.items():
            for tensor in tensors_in(arguments[name]):
                if tensor.dtype not in accepted:
                    yield f"{name} is {_short(tensor.dtype)}, it needs {_either([_short(dtype) for dtype in accepted])}"

    def _divisible(self, arguments: Mapping[str, Any]) -> Iterator[str]:
        for need in self.divisible:
            for tensor in tensors_in(arguments[need.argument]):
                if need.axis < tensor.dim() and (size := tensor.shape[need.axis]) % need.by != 0:
                    yield f"axis {need.axis} of {need.argument} is {size}, it needs a multiple of {need.by}"

    def _dense(self, arguments: Mapping[str, Any]) -> Iterator[str]:
        for name, axis in self.dense:
            for tensor in tensors_in(arguments[name]):
                if axis < tensor.dim() and tensor.shape[axis] > 1 and tensor.stride(axis) != 1:
                    yield f"axis {axis} of {name} has stride {tensor.stride(axis)}, it needs stride 1"

    def _values(self, arguments: Mapping[str, Any]) -> Iterator[str]:
        for name, accepted in self.values.items():
            if arguments[name] not in accepted:
                yield f"{name} is {arguments[name]!r}, it needs {_either([repr(value) for value in accepted])}"

    def _capability(self, arguments: Mapping[str, Any]) -> Iterator[str]:
        devices = {tensor.device for _, tensor in _first_tensors(arguments) if tensor.device.type == "cuda"}
        for device in sorted(devices, key=str):
            found = _capability(device)
            if found is None:
                yield f"this machine has no {device}"
            elif self.capability and found < self.capability:
                yield f"{device} has compute capability {_version(found)}, it needs {_version(self.capability)}"
            elif self.most_capability and found > self.most_capability:
                most = _version(self.most_capability)
                yield f"{device} has compute capability {_version(found)}, it needs {most} at most"

    def _gradient(self, arguments: Mapping[str, Any]) -> Iterator[str]:
        if needs_gradient(arguments):
            yield "a gradient is needed, it has no backward (use torch.no_grad() where none is wanted)"

    def _transform(self, arguments: Mapping[str, Any]) -> Iterable[str]:
        return () if torch.compiler.is_compiling() else _transforms()

    def _modules(self, arguments: Mapping[str, Any]) -> list[str]:
        return [f"the Python module {name} is not installed" for name in self.modules if not _installed(name)]

    def _native(self, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        return native_reasons(self.native or "")

    def _limits(self, arguments: Mapping[str, Any]) -> Iterable[str]:
        return () if self.limits is None else self.limits(*arguments.values())


@dataclass(frozen=True)
class Backend:
    """One way to run an op.

    Args:
        name: one of `BACKENDS`.
        function: "module:function", imported at its first use. It takes the arguments of the op's reference by
            position, and `out=`: its result, allocated and of any strides, or a tuple of them. It writes there and
            returns nothing. A Triton kernel is launched by `lumiere_fast.kernels._launch`, which traces see through.
            That of a backend in COMPOSED is a function, not a name, and is called like the reference.
        needs: what a call must offer.
        backward: "module:function", or None to run the best of COMPOSED again and differentiate it. It takes the
            gradients of the results as a tuple, None where there is none, then the arguments of the reference; it
            returns a gradient for each argument: a tensor, None, or a list of these for a list of tensors.
        pays_from: (argument, axis, size) triples: where an axis is shorter, others are faster, and "auto" passes over.
            An argument that is not given does not count.
    """

    name: str
    function: str | Callable[..., Any]
    needs: Needs
    backward: str | None = None
    pays_from: tuple[tuple[str, int, int], ...] = ()

    def load(self) -> Callable[..., Any]:
        return _load(self.function) if isinstance(self.function, str) else self.function

    def load_backward(self) -> Callable[..., Any] | None:
        return None if self.backward is None else _load(self.backward)


@dataclass(frozen=True)
class Op:
    """What dispatch knows of an op.

    Args:
        name: the one name of the op.
        parameters: the names of the reference's parameters.
        flatten: checks a call to the public function, and gives the arguments of the reference in their order.
        signature: of the public function, whose parameters `flatten` takes by name.
        backends: all but the reference.
        check: holds a backend against the reference on a device, and tells what was wrong.
        case: takes the arguments of the reference, and names the case of the call in the table `<op>_order` of
            kernels/configs, which has the place of each backend. None for the order of BACKENDS.
    """

    name: str
    parameters: tuple[str, ...]
    flatten: Callable[..., tuple[Any, ...]]
    signature: inspect.Signature
    backends: Mapping[str, Backend]
    check: evidence.Check
    case: Callable[..., str] | None = None

    def bind(self, *inputs: Any, **options: Any) -> tuple[Any, ...]:
        """The arguments of the reference for a call `op(*inputs, **options)`."""
        call = self.signature.bind(*inputs, **options)
        call.apply_defaults()
        return self.flatten(**{name: v for name, v in call.arguments.items() if name not in ("backend", "out")})


_OPS: dict[str, Op] = {}


def register(op: Op) -> None:
    for name, backend in op.backends.items():
        _check_backend(name, BACKENDS)
        _ = backend.needs._checks  # found now: until Python 3.11 that takes a lock, which Dynamo cannot trace
    _OPS[op.name] = op


def registered_ops() -> tuple[str, ...]:
    return tuple(_OPS)


def registered(op: str) -> Op:
    """What is registered under a name.

    Raises:
        ValueError: nothing is.
    """
    if op not in _OPS:
        raise ValueError(f"op must be one of {', '.join(_OPS)}, got {op!r}")
    return _OPS[op]


def why_not(op: str, backend: str, *inputs: Any, **options: Any) -> list[str]:
    """Every reason why `backend` cannot run `op(*inputs, **options)`; empty if it can.

    Raises:
        ValueError: for an unknown op or backend, and for whatever the op itself would refuse.
    """
    found = registered(op)
    _check_backend(backend, BACKENDS)
    return reasons_against(found, backend, found.bind(*inputs, **options))


def supports(op: str, backend: str, *inputs: Any, **options: Any) -> bool:
    """Whether `backend` can run `op(*inputs, **options)`: that `why_not` finds no reason."""
    return not why_not(op, backend, *inputs, **options)


def reasons_against(op: Op, backend: str, arguments: Sequence[Any]) -> list[str]:
    """`why_not` for arguments that are checked and flat already."""
    if backend == "reference":
        return []
    if backend in op.backends:
        return op.backends[backend].needs.unmet(dict(zip(op.parameters, arguments, strict=True)))
    if backend in COMPOSED:
        return ["it is a kernel of torch's for attention over space: give backend= to that op alone"]
    if op.name in PENDING_KERNELS:
        return ["its kernel is not written yet (lumiere_fast.kernels.PENDING_KERNELS)"]
    return [f"{op.name} has no {backend} kernel"]


def kernels(op: str) -> tuple[str, ...]:
    """The backends to tell of: ours, which an op has or lacks, and torch's own where it takes them."""
    found = registered(op).backends
    return tuple(name for name in BACKENDS if name not in COMPOSED or name in found)


def select(op: Op, requested: str | None, arguments: Sequence[Any]) -> str:
    """The backend that runs this call.

    Raises:
        ValueError: `requested`, the innermost `use_backend` or the environment names no backend.
        BackendUnavailable: it names one that cannot run the call.
    """
    name = current_backend() if requested is None else requested
    if name != AUTO:
        asked_by_environment = requested is None and name == os.environ.get(ENVIRONMENT_VARIABLE)
        _check_backend(name, (AUTO, *BACKENDS), ENVIRONMENT_VARIABLE if asked_by_environment else "backend")
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
    return os.environ.get(ENVIRONMENT_VARIABLE) or AUTO if chosen is None else chosen


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


@constant_when_traced
def _read_choice(mirror: str | None) -> str | None:
    return _choice.get()


def needs_gradient(arguments: Mapping[str, Any] | Sequence[Any]) -> bool:
    values = arguments.values() if isinstance(arguments, Mapping) else arguments
    return torch.is_grad_enabled() and any(tensor.requires_grad for value in values for tensor in tensors_in(value))


def tensors_in(value: Any) -> Sequence[Tensor]:
    """The tensors of one argument: itself, those of a list (all, or none of it), or none."""
    if isinstance(value, (list, tuple)):
        return value if value and isinstance(value[0], Tensor) else ()
    return (value,) if isinstance(value, Tensor) else ()


def _first_tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Each argument's tensor, of a list its first: an op has seen to it that the others are like it, but for layout."""
    for name, value in arguments.items():
        if tensors := tensors_in(value):
            yield name, tensors[0]


_logged: set[tuple[str, str, str]] = set()
_elsewhere: set[tuple[str, str, str]] = set()


def first_composed(op: Op, arguments: Sequence[Any]) -> str:
    """The backend of COMPOSED that "auto" would take."""
    return _first_without_reasons(op, arguments, COMPOSED)


def _first_without_reasons(op: Op, arguments: Sequence[Any], among: Sequence[str] = BACKENDS) -> str:
    where, tracing = _device_of(arguments), torch.compiler.is_compiling()
    device = where.type
    for name in order(op, where, arguments):
        if name == "reference":
            return name
        if name not in among:
            continue
        if not tracing and (op.name, name, device) in _elsewhere:
            continue  # not there, or of other devices, which has been said: the usual case, at a fraction of the cost
        reasons = reasons_against(op, name, arguments) or reasons_to_pass_over(op, name, arguments)
        if not reasons:
            return name
        if not tracing:  # a log call would break the graph
            _log_once(op.name, name, reasons)
            if name not in op.backends or device not in (op.backends[name].needs.devices or (device,)):
                _elsewhere.add((op.name, name, device))
    raise AssertionError("the reference has no reasons against it")


def order(op: Op, device: torch.device, arguments: Sequence[Any]) -> Sequence[str]:
    """All backends, as "auto" tries them: those with a place in the op's table by that, the others after them."""
    if op.case is None:
        return BACKENDS
    return _measured_order(f"{op.name}_order", op.case(*arguments), device)


@constant_when_traced
def _measured_order(table: str, case: str, device: torch.device) -> tuple[str, ...]:
    return _by_place(tuple(_configs.chosen(table, case, device).items()))


@functools.cache
def _by_place(places: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """Equal places, and none, leave the order of BACKENDS."""
    known = dict(places)
    return tuple(sorted(BACKENDS, key=lambda name: known.get(name, math.inf)))


def _device_of(arguments: Sequence[Any]) -> torch.device:
    return next(tensor for value in arguments for tensor in tensors_in(value)).device


def reasons_to_pass_over(op: Op, backend: str, arguments: Sequence[Any]) -> Sequence[str]:
    """Why "auto" leaves out a backend that could run the call: not proved, or fit for tests alone."""
    if backend == "reference":
        return ()
    device = _device_of(arguments)
    if backend == "triton" and interpreting():
        return (INTERPRETED,)
    unprofitable = [
        f"axis {axis} of {name} is below {size}, from where it pays"
        for name, axis, size in op.backends[backend].pays_from
        if _is_short(arguments[op.parameters.index(name)], axis, size)
    ]
    return unprofitable or (_why_unproven(op.name, backend, device) if device.type == "cuda" else ())


def _is_short(argument: Tensor | None, axis: int, size: int) -> bool:
    return argument is not None and argument.shape[axis] < size


def _log_once(op: str, backend: str, reasons: Sequence[str]) -> None:
    for reason in reasons:
        if (op, backend, reason) not in _logged:
            _logged.add((op, backend, reason))
            logger.info("%s does not run on the backend %s: %s", op, backend, reason)


def _check_backend(name: str, accepted: Sequence[str], what: str = "backend") -> None:
    if name not in accepted:
        raise ValueError(f"{what} must be one of {', '.join(accepted)}, got {name!r}")


@functools.cache
def _load(function: str) -> Callable[..., Any]:
    module, _, name = function.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return loaded


@constant_when_traced
def _why_unproven(op: str, backend: str, device: torch.device) -> Sequence[str]:
    return evidence.why_unproven(op, backend, device, _OPS[op].check)


@constant_when_traced
def native_reasons(half: str) -> tuple[str, ...]:
    """`native.why_not`, which traces may ask too."""
    return tuple(native.why_not(half))


@constant_when_traced
def interpreting() -> bool:
    """Whether Triton, as it reads its own variable, runs kernels in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "on", "yes", "true")


def _transforms() -> tuple[str, ...]:
    """Derivatives and batching that go by what a tensor is wrapped in, which no kernel sees."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return ("a torch.func transform is active, it sees through torch operations only",)
    if forward_ad._current_level >= 0:
        return ("forward-mode differentiation is active, it sees through torch operations only",)
    return ()


_find_spec = functools.cache(importlib.util.find_spec)


@constant_when_traced
def _installed(module: str) -> bool:
    return _find_spec(module) is not None


@constant_when_traced
def _capability(device: torch.device) -> tuple[int, int] | None:
    """None for a device that only fake tensors are on."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def _version(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _either(values: Sequence[str]) -> str:
    return " or ".join(values)
