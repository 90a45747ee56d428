"""What the two resizing ops share: storage order, checks, the temporal convolution, what kernels need, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lumiere_fast import native
from lumiere_fast.dispatch import AUTO, Backend, Needs, native_reasons, needs_gradient
from lumiere_fast.ops import _layout, _registry
from lumiere_fast.ops._checks import (
    check_activation,
    check_choice,
    check_device,
    check_floating,
    check_is_tensor,
    check_tensor,
    under_autocast,
)
from lumiere_fast.ops._spec import LEVELS, Draw, OpSpec, Scenario
from lumiere_fast.ops.temporal_conv import TEMPORAL_CONV, convolve

Factor = tuple[int, int, int]

# Where T, H and W lie once an activation is viewed in the order its bytes have.
AXES: dict[torch.memory_format, Factor] = {torch.channels_last_3d: (1, 2, 3), torch.contiguous_format: (2, 3, 4)}


def stored(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """`x` viewed in storage order, so that stacking and reshaping keep the memory format."""
    return _layout.to_rows(x) if memory_format == torch.channels_last_3d else x


def logical(y: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The inverse of `stored`."""
    return _layout.from_rows(y) if memory_format == torch.channels_last_3d else y


def temporal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """`y[t] = bias + sum_k W_k x[stride * t - size // 2 + k]`, zero outside, in at least fp32, in channels_last_3d."""
    dtype = _layout.accumulation_dtype(x.dtype)
    return convolve(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), stride=stride)


def check_arguments(
    op: str,
    x: Tensor,
    factor: Sequence[int],
    mode: str,
    modes: Sequence[str],
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Factor, Tensor | None, Tensor | None]:
    """Everything that down and up refuse alike; gives back `factor` as three integers, weight, and bias."""
    check_activation(op, x)
    values = tuple(factor) if isinstance(factor, Sequence) else (factor,)
    if len(values) != 3 or any(type(f) is not int or f < 1 for f in values):
        raise ValueError(f"{op}: factor must be three integers >= 1, (t, h, w), got {values}")
    check_choice(op, "mode", mode, modes)
    if weight is None:
        _check_elements(op, x, values, 1)
        if bias is not None:
            raise ValueError(f"{op}: bias came without weight; it belongs to the learned temporal convolution")
        return values, None, None
    check_is_tensor(op, "weight", weight)
    shape = weight.shape
    if len(shape) != 3 or shape[0] < 1 or shape[1] != x.shape[1] or shape[2] % 2 == 0:
        raise ValueError(
            f"{op}: weight must be (C_out, C_in, k) with C_out >= 1, C_in = {x.shape[1]}, the channels of x, and k "
            f"odd, got {tuple(shape)}"
        )
    _check_elements(op, x, values, shape[0])
    check_floating(op, "weight", weight)
    check_device(op, "weight", weight, x)
    check_tensor(op, "bias", bias, x, weight.shape[:1])
    weight, bias = under_autocast(x, weight, bias)
    return values, weight, bias


MOST_ELEMENTS = 2**56  # of at most 8 bytes; what is left of 64 bits is room for strides and sums


def _check_elements(op: str, x: Tensor, factor: Factor, channels_out: int) -> None:
    """Whatever a resize by `factor` goes through has elements that can be counted; bounded generously, and cheaply."""
    t, h, w = factor
    size = x.numel()
    symbolic = torch.compiler.is_compiling() or type(size) is not int  # a comparison would bound the symbols
    elements = t * h * w * (1 if symbolic else (size or x.shape[1:].numel()) * channels_out)
    if elements > MOST_ELEMENTS:
        raise ValueError(
            f"{op}: factor must keep the product of t, h, w, the sizes of x and C_out within 2**56, got {factor} "
            f"for x {tuple(x.shape)}"
        )


def finer(sizes: Sequence[int], factor: Sequence[int]) -> Factor:
    t, h, w = (size * f for size, f in zip(sizes, factor, strict=True))
    return t, h, w


def coarser(sizes: Sequence[int], factor: Sequence[int]) -> Factor:
    t, h, w = (-(-size // f) for size, f in zip(sizes, factor, strict=True))
    return t, h, w


Sizes = Callable[[Sequence[int], Sequence[int]], Factor]


def make_describe(sizes: Sizes) -> Callable[..., _registry.Result]:
    """What the result of an op is, of T, H and W as `sizes` makes them of the input's and the factor."""

    def describe(
        x: Tensor, factor: Sequence[int], mode: str, weight: Tensor | None, bias: Tensor | None
    ) -> _registry.Result:
        channels = x.shape[1] if weight is None else weight.shape[0]
        shape = (x.shape[0], channels, *sizes(x.shape[2:], factor))
        return _registry.Result(shape, x.dtype, x.device, _layout.video_format(x))

    return describe


# Kernels -------------------------------------------------------------------------------------------------------------

_HALVES = (torch.float16, torch.bfloat16)


def backends(op: str, backward: str) -> tuple[Backend, ...]:
    """Those of either op, whose functions `lumiere_fast.native` names after it."""
    function = f"lumiere_fast.native:{op}"
    on_cuda: dict[str, Any] = {"devices": ("cuda",), "gradient": True}
    return (
        Backend(
            "wgmma",
            f"{function}_wgmma",
            Needs(
                **on_cuda,
                capability=(9, 0),
                most_capability=(9, 0),
                native="wgmma",
                limits=wgmma_limits,
            ),
            backward,
        ),
        Backend("cuda", function, Needs(**on_cuda, capability=(8, 0), native="cuda", limits=cuda_limits), backward),
        Backend(
            "cpu",
            function,
            Needs(devices=("cpu",), gradient=True, native="cpu", limits=cpu_limits),
            backward,
            pays_from=(("weight", 0, 16), ("weight", 1, 16)),
        ),
    )


def cpu_limits(
    x: Tensor, factor: Sequence[int], mode: str, weight: Tensor | None, bias: Tensor | None
) -> Sequence[str]:
    """Why the native core's CPU half cannot take a call: fixed taps it always can."""
    if weight is None:
        return ()
    reasons = [*native_reasons("avx2"), *_wrong_dtypes(x, weight, bias, (torch.float32, *_HALVES))]
    if needs_gradient((x, weight, bias)):  # torch's own autograd does not run the reference's forward twice
        reasons.append("a gradient is needed, it has no backward of a learned resize")
    return reasons


def cuda_limits(
    x: Tensor, factor: Sequence[int], mode: str, weight: Tensor | None, bias: Tensor | None
) -> Sequence[str]:
    """Why its CUDA half cannot: fixed taps it always can."""
    return () if weight is None else _wrong_dtypes(x, weight, bias, _HALVES)


def wgmma_limits(
    x: Tensor, factor: Sequence[int], mode: str, weight: Tensor | None, bias: Tensor | None
) -> Sequence[str]:
    """Why its warpgroup kernels cannot, besides what `Needs` says."""
    if weight is None:
        return ("weight is None, it needs one: fixed taps multiply no matrices",)
    lies = native.wgmma_reasons(x.shape, x.stride(), x.element_size(), factor)
    return [*_wrong_dtypes(x, weight, bias, _HALVES), *lies]


def _wrong_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None, accepted: Sequence[torch.dtype]) -> list[str]:
    reasons = []
    if x.dtype not in accepted:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        reasons.append(f"x is {str(x.dtype).removeprefix('torch.')}, with a weight it needs {names}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != x.dtype:
            reasons.append(f"{name} is {str(value.dtype).removeprefix('torch.')}, it needs the dtype of x")
    return reasons


Adjoint = Callable[[Tensor, Sequence[int], str, torch.memory_format], Tensor]


def make_adjoint(op: str, function: Callable[..., None], sizes: Sizes) -> Adjoint:
    """The adjoint of an op's fixed taps, by the native core.

    Args:
        function: of `lumiere_fast.native`.
        sizes: T, H, W of its result, from those of the gradient and the factor.
    """

    def allocate(gradient: Tensor, factor: Sequence[int], mode: str, channels_last: bool) -> Tensor:
        shape = (*gradient.shape[:2], *sizes(gradient.shape[2:], factor))
        memory_format = torch.channels_last_3d if channels_last else torch.contiguous_format
        return torch.empty(shape, dtype=gradient.dtype, device=gradient.device, memory_format=memory_format)

    def run(gradient: Tensor, factor: Sequence[int], mode: str, channels_last: bool) -> Tensor:
        found = allocate(gradient, factor, mode, channels_last)
        if found.numel() > 0:
            function(gradient, factor, mode, out=found)
        return found

    # Only traces, which cannot see a call into the native core, take this way round.
    operator = torch.library.custom_op(
        f"lumiere_fast::{op}_adjoint",
        run,
        mutates_args=(),
        schema="(Tensor gradient, int[] factor, str mode, bool channels_last) -> Tensor",
    )
    operator.register_fake(allocate)

    def adjoint(gradient: Tensor, factor: Sequence[int], mode: str, memory_format: torch.memory_format) -> Tensor:
        call = operator if _registry.traced() else run
        return call(gradient, factor, mode, memory_format == torch.channels_last_3d)

    return adjoint


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of x, weight and bias


def make_backward(adjoint: Adjoint, learned_gradients: Callable[..., Gradients]) -> Callable[..., tuple[Any, ...]]:
    """An op's backward. `learned_gradients` takes the gradient and the op's arguments where there is a weight."""

    def backward(
        gradients: Sequence[Tensor],
        x: Tensor,
        factor: Sequence[int],
        mode: str,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Any, ...]:
        (gradient,) = gradients
        with torch.no_grad():
            if weight is None:
                return adjoint(gradient, factor, mode, _layout.video_format(x)), None, None, None, None
            of_x, of_weight, of_bias = learned_gradients(gradient, x, factor, mode, weight, bias)
        return of_x, None, None, of_weight, of_bias

    return backward


def convolution_gradients(gradient: Tensor, x: Tensor, of_x: bool, weight: Tensor, bias: Tensor | None) -> Gradients:
    """Of `temporal_conv(x, weight, bias)` the gradients of x, where `of_x`, and of what wants one of the others."""
    arguments = (x.detach().requires_grad_(of_x), weight, bias, "zeros", *[None] * 10)
    of_x_, of_weight, of_bias, *_ = TEMPORAL_CONV.gradients(AUTO, arguments, (gradient, None, None))
    return of_x_, of_weight, of_bias


# Scenarios -----------------------------------------------------------------------------------------------------------


def make_spec(
    name: str,
    scenarios: tuple[Scenario, ...],
    checks: tuple[Scenario, ...],
    output_sizes: Sizes,
) -> OpSpec:
    """The spec of either op. `scenario.options`: `factor`, `mode` and `learned`, a kernel of k or 3 taps with a bias.

    There are N channels out, or C. The FLOPs of a learned resize are those of one convolution at each output frame, at
    the smaller of the two spatial sizes (the spatial resize commutes with it); upsampling needs fewer.
    """

    def frames_and_area(scenario: Scenario) -> tuple[int, int, int]:
        T, H, W = scenario.shape("THW")
        frames, rows, columns = output_sizes((T, H, W), scenario.options["factor"])
        return frames, rows * columns, min(rows * columns, H * W)

    def weights(scenario: Scenario) -> tuple[int, int, int]:
        C = scenario.sizes["C"]
        return scenario.sizes.get("N", C), C, scenario.sizes.get("k", 3)

    def flops(scenario: Scenario) -> int:
        frames, _, smaller = frames_and_area(scenario)
        return 2 * scenario.count("B") * math.prod(weights(scenario)) * frames * smaller if _learned(scenario) else 0

    def nbytes(scenario: Scenario, dtype: torch.dtype) -> int:
        frames, area, _ = frames_and_area(scenario)
        channels = weights(scenario)[0]
        parameters = math.prod(weights(scenario)) + channels if _learned(scenario) else 0
        return (scenario.count("BCTHW") + scenario.count("B") * channels * frames * area + parameters) * dtype.itemsize

    def make_inputs(
        scenario: Scenario, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        draw = Draw(device, dtype, generator)
        inputs = {
            "x": draw.activation(*scenario.shape("BCTHW")),
            "factor": scenario.options["factor"],
            "mode": scenario.options["mode"],
        }
        if _learned(scenario):
            shape = weights(scenario)
            inputs |= {"weight": draw(*shape, scale=math.prod(shape[1:]) ** -0.5), "bias": draw(shape[0])}
        return inputs

    return OpSpec(name, scenarios, flops, nbytes, make_inputs, checks, GPU_CHECKS, rounds_operands=True)


def _learned(scenario: Scenario) -> bool:
    learned: bool = scenario.options["learned"]
    return learned


def fixed(mode: str, factor: Factor) -> dict[str, Any]:
    return {"factor": factor, "mode": mode, "learned": False}


def learned(factor: Factor, mode: str = "nearest") -> dict[str, Any]:
    return {"factor": factor, "mode": mode, "learned": True}


LEARNED_IN_TIME = learned((2, 1, 1))

# A level and the next coarser one of the same model, as (name, sizes, cpu).
LEVEL_PAIRS = [(fine, coarse) for fine, coarse in pairwise(LEVELS) if fine[1]["H"] == 2 * coarse[1]["H"]]


def host_scenarios(modes: Sequence[str]) -> tuple[Scenario, ...]:
    """Activations large enough for a CPU's memory (fixed taps) and arithmetic (learned) to be the limit."""
    clips = {
        "host16x64": {"B": 1, "C": 64, "T": 16, "H": 64, "W": 64},
        "host8x128": {"B": 1, "C": 32, "T": 8, "H": 128, "W": 128},
    }
    ways = {
        **{mode: fixed(mode, (2, 2, 2)) for mode in modes},
        **{f"{mode}_space": fixed(mode, (1, 2, 2)) for mode in modes},
        "learned": LEARNED_IN_TIME,
    }
    return tuple(
        Scenario(f"{clip}_{way}", sizes, options, cpu=True)
        for clip, sizes in clips.items()
        for way, options in ways.items()
    )


def small_checks(modes: Sequence[str]) -> tuple[Scenario, ...]:
    """What the scenarios leave out: sizes and factors that are no powers of two, one frame, other taps, all modes."""
    sizes = {"B": 2, "C": 20, "T": 6, "H": 6, "W": 15}
    taps = [
        Scenario(f"{mode}_{'x'.join(map(str, factor))}", sizes, fixed(mode, factor))
        for mode in modes
        for factor in ((2, 2, 3), (3, 1, 5), (1, 6, 1))
    ]
    thin = [
        Scenario(f"{mode}_one_channel", {**sizes, "C": 1, "T": 4, "W": 16}, fixed(mode, (4, 2, 4))) for mode in modes
    ]
    in_time = [
        Scenario(f"learned{t}_k{k}_T{T}", {**sizes, "C": C, "N": 24, "T": T, "k": k}, learned((t, 1, 1)))
        for t, k, T, C in ((2, 3, 5, 24), (2, 5, 4, 20), (3, 3, 7, 40), (4, 5, 6, 16), (3, 1, 4, 8), (1, 3, 3, 24))
    ]
    one = Scenario("learned_one_frame", {**sizes, "C": 16, "N": 40, "T": 1}, LEARNED_IN_TIME)
    everywhere = [
        Scenario(f"learned_{mode}_everywhere", {**sizes, "C": 24, "T": 5}, learned((2, 2, 3), mode)) for mode in modes
    ]
    return *taps, *thin, *in_time, one, *everywhere


# Wide enough for several blocks of channels each way, and tiles enough for all of a GPU's multiprocessors.
GPU_CHECKS = tuple(
    Scenario(f"wide{t}_k{k}", {"B": 1, "C": 256, "N": 320, "T": 8, "H": 40, "W": 39, "k": k}, learned((t, 1, 1)))
    for t, k in ((2, 3), (2, 1), (1, 3), (3, 5))
)
