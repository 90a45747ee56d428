"""A kernel held against its reference on a device, at the small scenarios of its op's spec; and its own backward.

The rule is that of the tests: relative to the fp64 result, an error may be twice the reference's own at that dtype, a
gradient's three times, and a little more where the reference happens to be exact. Results are poisoned with NaN before
the kernel writes them.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
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

# Of a gradient, which is longer a sum, and rounds on its way what products take: g_y, g_z, g_h, and the norm's result.
GRADIENT_DTYPES = (torch.float32, torch.bfloat16)
GRADIENT_FACTOR = 3.0
ROUNDINGS = 4
SEED = 0


def failures(op: RegisteredOp, public: Callable[..., Any], backend: str, device: torch.device) -> list[str]:
    """One line for each call, dtype and layout at which `backend` or its gradient is wrong, of those that it serves."""
    spec = spec_of(public)
    found = []
    with torch.inference_mode(False):  # there nothing can be differentiated
        for scenario, dtype in product([*_small(spec), *_checks(spec, device)], DTYPES):
            floor = FLOORS[dtype] if spec.rounds_operands else 0.0
            drawn = op.op.bind(**example(public, scenario, device, dtype))
            for layout, arguments in (("channels last", drawn), ("contiguous", _mapped(Tensor.contiguous, drawn))):
                if not dispatch.reasons_against(op.op, backend, arguments):
                    where = f"{scenario.name} in {dtype}, {layout}"
                    found += [f"{where}: {wrong}" for wrong in _wrong(op, backend, arguments, floor)]
        for scenario, dtype in product(_checks(spec, device), GRADIENT_DTYPES):
            floor = FLOORS[dtype] * (ROUNDINGS if spec.rounds_operands else 1)
            drawn = op.op.bind(**example(public, scenario, device, dtype))
            leaves = _leaves(drawn, [name not in spec.constants for name in op.op.parameters])
            if not dispatch.reasons_against(op.op, backend, leaves):
                where = f"gradient at {scenario.name} in {dtype}"
                found += [f"{where}: {wrong}" for wrong in _wrong_gradients(op, backend, leaves, floor)]
    return found


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A value with every tensor in it put through a function."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: _mapped(function, each) for name, each in value.items()}
    if not isinstance(value, (tuple, list)):
        return value
    items = [_mapped(function, each) for each in value]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _leaves(arguments: tuple[Any, ...], wanted: Sequence[bool]) -> tuple[Any, ...]:
    return tuple(_mapped(_leaf, value) if wants else value for value, wants in zip(arguments, wanted, strict=True))


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
    """Scenarios within eight times of the smallest: with the spec's checks about a second, compiling left aside."""
    return [each for each in spec.scenarios if _size(each) <= 8 * _size(smallest(spec))]


def _checks(spec: OpSpec, device: torch.device) -> tuple[Scenario, ...]:
    return (*spec.checks, *(spec.gpu_checks if device.type == "cuda" else ()))


def _size(scenario: Scenario) -> int:
    return math.prod(size for letter, size in scenario.sizes.items() if letter != "k")  # taps make no call smaller


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
        exact = op.definition(*_mapped(_double, arguments))
    for index, (mine, other, truth) in enumerate(zip(_tuple(ours), _tuple(theirs), _tuple(exact), strict=True)):
        if wrong := too_far_off(mine, other, truth, FACTOR, floor):
            yield f"result {index} is {wrong}"


def _kernel_errors() -> tuple[type[Exception], ...]:
    """What a kernel that cannot be compiled or launched raises: torch's, the native core's, Triton's."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    from triton.errors import TritonError

    return (RuntimeError, TritonError)


def _wrong_gradients(op: RegisteredOp, backend: str, leaves: tuple[Any, ...], floor: float) -> Iterator[str]:
    """What is wrong with the gradients, where all floating tensors want one, unless they are the reference's."""
    wanted = [bool(_wanting(value)) for value in leaves]
    exact_leaves = _leaves(_mapped(_double, leaves), wanted)
    with torch.enable_grad():
        results, exact_results = (_tuple(op.definition(*each)) for each in (leaves, exact_leaves))
    generator = torch.Generator().manual_seed(SEED)
    seeds = [torch.randn(each.shape, generator=generator).to(each) for each in results]
    theirs, exact = _gradients(results, leaves, seeds), _gradients(exact_results, exact_leaves, seeds)
    try:
        if backend not in dispatch.COMPOSED and op.op.backends[backend].load_backward() is None:
            return
        found = op.gradients(backend, leaves, tuple(seed if seed.numel() else None for seed in seeds))
        ours = [each for value, of_value in zip(leaves, found, strict=True) for each in _beside(value, of_value)]
    except Exception as raised:  # whatever it is, it speaks against the kernel
        yield f"{type(raised).__name__}: {' '.join(str(raised).split())}"
        return
    names = [name for name, value in zip(op.op.parameters, leaves, strict=True) for _ in _wanting(value)]
    for name, mine, other, truth in zip(names, ours, theirs, exact, strict=True):
        if mine is None or mine.shape != truth.shape:
            yield f"{name} has {'none' if mine is None else f'one of shape {tuple(mine.shape)}'}"
            continue
        if wrong := too_far_off(mine, other, truth, GRADIENT_FACTOR, floor):
            yield f"that of {name} is {wrong}"


def _wanting(value: Any) -> list[Tensor]:
    return [tensor for tensor in dispatch.tensors_in(value) if tensor.requires_grad]


def _beside(value: Any, gradients: Any) -> list[Tensor | None]:
    """Of an argument and what a backward returns for it, the gradient of each tensor that wants one."""
    if isinstance(value, Tensor):
        return [gradients] if value.requires_grad else []
    pairs = zip(dispatch.tensors_in(value), gradients or (), strict=True)
    return [gradient for tensor, gradient in pairs if tensor.requires_grad]


def _gradients(results: Sequence[Tensor], leaves: tuple[Any, ...], seeds: Sequence[Tensor]) -> list[Tensor]:
    """By torch; zero where nothing depends on a tensor."""
    tensors = [tensor for value in leaves for tensor in _wanting(value)]
    given = [result for result in results if result.numel()]
    above = [seed.to(result) for result, seed in zip(results, seeds, strict=True) if result.numel()]
    return list(torch.autograd.grad(given, tensors, above, allow_unused=True, materialize_grads=True))


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def too_far_off(mine: Tensor, other: Tensor, truth: Tensor, factor: float, floor: float = 0.0) -> str | None:
    """What is wrong with a result where the reference has `other` in the same dtype and `truth` in fp64."""
    error = relative_error(mine, truth)
    bound = factor * relative_error(other, truth) + max(floor, FLOORS[mine.dtype])
    if error <= bound:  # NaN is wrong
        return None
    return f"off by {error:.2e} of its largest value, {bound:.2e} is allowed"


def relative_error(result: Tensor, exact: Tensor) -> float:
    """The largest error, relative to the largest magnitude."""
    if exact.numel() == 0:
        return 0.0
    scale = max(1e-30, float(exact.abs().max()))
    return float((result.double() - exact).abs().max()) / scale
