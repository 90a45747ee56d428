"""What the two resizing ops share: the storage order of an activation, the checks, the temporal convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lumiere_fast.ops import _layout, _registry
from lumiere_fast.ops._checks import check_activation, check_choice, check_is_tensor, check_tensor
from lumiere_fast.ops._spec import LEVELS, Draw, OpSpec, Scenario
from lumiere_fast.ops.temporal_conv import convolve

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
) -> Factor:
    """Everything that down and up refuse alike; gives `factor` back as three integers."""
    check_activation(op, x)
    values = tuple(factor) if isinstance(factor, Sequence) else (factor,)
    if len(values) != 3 or any(type(f) is not int or f < 1 for f in values):
        raise ValueError(f"{op}: factor must be three integers >= 1, (t, h, w), got {values}")
    check_choice(op, "mode", mode, modes)
    if weight is None:
        if bias is not None:
            raise ValueError(f"{op}: bias came without weight; it belongs to the learned temporal convolution")
        return values
    check_is_tensor(op, "weight", weight)
    if weight.dim() != 3 or weight.shape[1] != x.shape[1] or weight.shape[2] % 2 == 0:
        raise ValueError(
            f"{op}: weight must be (C_out, C_in, k) with C_in = {x.shape[1]}, the channels of x, and k odd, "
            f"got {tuple(weight.shape)}"
        )
    check_tensor(op, "weight", weight, x, weight.shape)
    check_tensor(op, "bias", bias, x, weight.shape[:1])
    return values


def describe(x: Tensor, sizes: Sequence[int], weight: Tensor | None) -> _registry.Result:
    """The result of resizing `x` to T, H, W = `sizes`."""
    channels = x.shape[1] if weight is None else weight.shape[0]
    return _registry.Result((x.shape[0], channels, *sizes), x.dtype, x.device, _layout.video_format(x))


def make_spec(
    name: str,
    scenarios: tuple[Scenario, ...],
    output_sizes: Callable[[Sequence[int], Sequence[int]], Factor],
) -> OpSpec:
    """The spec of either op. `scenario.options`: `factor`, `mode` and `learned`, a kernel of 3 with a bias.

    The FLOPs of a learned resize are those of one convolution at each output frame, at the smaller of the two spatial
    sizes (the spatial resize commutes with it); polyphase upsampling needs 2/3 of them.
    """

    def frames_and_area(scenario: Scenario) -> tuple[int, int, int]:
        T, H, W = scenario.shape("THW")
        frames, rows, columns = output_sizes((T, H, W), scenario.options["factor"])
        return frames, rows * columns, min(rows * columns, H * W)

    def flops(scenario: Scenario) -> int:
        frames, _, smaller = frames_and_area(scenario)
        return 2 * 3 * scenario.count("BCC") * frames * smaller if scenario.options["learned"] else 0

    def nbytes(scenario: Scenario, dtype: torch.dtype) -> int:
        frames, area, _ = frames_and_area(scenario)
        parameters = 3 * scenario.count("CC") + scenario.count("C") if scenario.options["learned"] else 0
        return (scenario.count("BCTHW") + scenario.count("BC") * frames * area + parameters) * dtype.itemsize

    def make_inputs(
        scenario: Scenario, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        draw = Draw(device, dtype, generator)
        C = scenario.sizes["C"]
        inputs = {
            "x": draw.activation(*scenario.shape("BCTHW")),
            "factor": scenario.options["factor"],
            "mode": scenario.options["mode"],
        }
        if scenario.options["learned"]:
            inputs |= {"weight": draw(C, C, 3, scale=(3 * C) ** -0.5), "bias": draw(C)}
        return inputs

    return OpSpec(name, scenarios, flops, nbytes, make_inputs)


def fixed(mode: str, factor: Factor) -> dict[str, Any]:
    return {"factor": factor, "mode": mode, "learned": False}


LEARNED_IN_TIME = {"factor": (2, 1, 1), "mode": "nearest", "learned": True}

# A level and the next coarser one of the same model, as (name, sizes, cpu).
LEVEL_PAIRS = [(fine, coarse) for fine, coarse in pairwise(LEVELS) if fine[1]["H"] == 2 * coarse[1]["H"]]


def host_scenarios(modes: Sequence[str], H: int) -> tuple[Scenario, ...]:
    """Activations large enough for a CPU's memory (fixed taps) and arithmetic (learned) to be the limit."""
    sizes = {"B": 1, "C": 64, "T": 16, "H": H, "W": H}
    taps = (Scenario(f"host_{mode}", sizes, fixed(mode, (1, 2, 2)), cpu=True) for mode in modes)
    return *taps, Scenario("host_learned", {**sizes, "C": 128, "H": 32, "W": 32}, LEARNED_IN_TIME, cpu=True)
