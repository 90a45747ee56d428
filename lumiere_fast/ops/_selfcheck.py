"""A kernel held against its reference on a device, at the small scenarios of its op's spec.

The rule is that of the tests: relative to the fp64 result, an error may be twice the reference's own at that dtype, and
a little more where the reference happens to be exact. Results are poisoned with NaN before the kernel writes them.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lumiere_fast import dispatch
from lumiere_fast.ops._spec import OpSpec, Scenario

if TYPE_CHECKING:
    from lumiere_fast.ops._registry import RegisteredOp

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# One rounding at 1, and a little for sums: what a difference may be where torch happens to be exact.
FLOORS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
FACTOR = 2.0
SEED = 0


def failures(op: RegisteredOp, public: Callable[..., Any], backend: str, device: torch.device) -> list[str]:
    """One line for each small call, dtype and layout at which `backend` is wrong, of those that it serves."""
    found = []
    spec = spec_of(public)
    for scenario, dtype in product(_small(spec), DTYPES):
        floor = FLOORS[dtype] if spec.rounds_operands else 0.0
        drawn = op.op.bind(**example(public, scenario, device, dtype))
        for layout, arguments in (("channels last", drawn), ("contiguous", _contiguous(drawn))):
            if not dispatch.reasons_against(op.op, backend, arguments):
                where = f"{scenario.name} in {dtype}, {layout}"
                found += [f"{where}: {wrong}" for wrong in _wrong(op, backend, arguments, floor)]
    return found


def _contiguous(value: Any) -> Any:
    """The same arguments with all tensors in contiguous memory."""
    if isinstance(value, Tensor):
        return value.contiguous()
    return type(value)(map(_contiguous, value)) if isinstance(value, (tuple, list)) else value


def example(
    public: Callable[..., Any], scenario: Scenario, device: torch.device | str, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments by name of a call of an op at a scenario, drawn always alike."""
    inputs = spec_of(public).make_inputs(scenario, device, dtype, torch.Generator().manual_seed(SEED))
    accepted = inspect.signature(public).parameters
    return {name: value for name, value in inputs.items() if name in accepted}


def spec_of(public: Callable[..., Any]) -> OpSpec:
    """The spec in the op's module."""
    spec: OpSpec = sys.modules[public.__module__].SPEC
    return spec


def smallest(spec: OpSpec) -> Scenario:
    return min(spec.scenarios, key=_size)


def _small(spec: OpSpec) -> list[Scenario]:
    """Scenarios within eight times of the smallest, and the spec's own checks: about a second, compiling left aside."""
    return [each for each in spec.scenarios if _size(each) <= 8 * _size(smallest(spec))] + list(spec.checks)


def _size(scenario: Scenario) -> int:
    return math.prod(scenario.sizes.values())


def _wrong(op: RegisteredOp, backend: str, arguments: tuple[Any, ...], floor: float) -> Iterator[str]:
    with torch.no_grad():
        ours = op.allocate(arguments)
        for result in _tuple(ours):
            result.fill_(math.nan)
        try:
            op.launch(backend, arguments, ours)
        except _kernel_errors() as raised:
            yield f"{type(raised).__name__}: {' '.join(str(raised).split())}"
            return
        theirs = op.definition(*arguments)
        exact = op.definition(*(_in_double(value) for value in arguments))
    for index, (mine, other, truth) in enumerate(zip(_tuple(ours), _tuple(theirs), _tuple(exact), strict=True)):
        error = relative_error(mine, truth)
        bound = FACTOR * relative_error(other, truth) + max(floor, FLOORS[mine.dtype])
        if not error <= bound:  # NaN is wrong
            yield f"result {index} is off by {error:.2e} of its largest value, {bound:.2e} is allowed"


def _kernel_errors() -> tuple[type[Exception], ...]:
    """What a kernel that cannot be compiled or launched raises: torch's, the native core's, Triton's."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    from triton.errors import TritonError

    return (RuntimeError, TritonError)


def _in_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if dispatch.tensors_in(value):
        return [_in_double(item) for item in value]
    return value


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def relative_error(result: Tensor, exact: Tensor) -> float:
    """The largest error, relative to the largest magnitude."""
    if exact.numel() == 0:
        return 0.0
    scale = max(1e-30, float(exact.abs().max()))
    return float((result.double() - exact).abs().max()) / scale
