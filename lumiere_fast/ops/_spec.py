"""What a benchmark and a roofline need to know of an op: named scenarios, FLOPs, bytes, inputs.

FLOPs count a multiply-add as two, and only the contractions. Bytes count each input once and each output once, whatever
an implementation reads twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scenario:
    """One named use of an op.

    Args:
        name: how tables and test ids call it.
        sizes: the op's sizes by letter (B, C, T, H, W, ...).
        options: arguments of the op that are not tensors, or that say which optional tensors there are.
        cpu: whether it is small enough to be timed on a CPU.
    """

    name: str
    sizes: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    cpu: bool = False

    def shape(self, letters: str) -> tuple[int, ...]:
        """`shape("BCT")` -> (B, C, T)."""
        return tuple(self.sizes[letter] for letter in letters)

    def count(self, letters: str) -> int:
        """The number of elements of `shape(letters)`."""
        return math.prod(self.shape(letters))


@dataclass(frozen=True)
class OpSpec:
    """The scenarios of an op and what each costs.

    Args:
        flops: floating-point operations of a scenario.
        bytes: bytes moved, given the dtype that activations are stored in.
        make_inputs: the public function's arguments by name, drawn from the generator; activations channels_last_3d.
        checks: further small calls that a self-check makes, of what the scenarios leave out.
        gpu_checks: larger ones that it makes on a GPU alone.
        rounds_operands: whether kernels may round what they computed to the dtype of the activations before they
            multiply it, as tensor cores need it; results of a wider dtype then carry those roundings.
        constants: tensors, by their names in the reference, that no gradient is taken of.
    """

    name: str
    scenarios: tuple[Scenario, ...]
    flops: Callable[[Scenario], int]
    bytes: Callable[[Scenario, torch.dtype], int]
    make_inputs: Callable[[Scenario, torch.device | str, torch.dtype, torch.Generator], dict[str, Any]]
    checks: tuple[Scenario, ...] = ()
    gpu_checks: tuple[Scenario, ...] = ()
    rounds_operands: bool = False
    constants: tuple[str, ...] = ()


def _level(name: str, C: int, T: int, H: int, *, B: int = 1, cpu: bool = False) -> tuple[str, dict[str, int], bool]:
    return name, {"B": B, "C": C, "T": T, "H": H, "W": H, "G": 16 if cpu else 32}, cpu


# Where an op meets the model: the `paper` preset's levels (base: the whole clip; SSR: one window of 8 frames; B = 2 is
# guidance), and the `demo` preset's, which a CPU can time. G is the preset's number of norm groups.
LEVELS = (
    _level("base0", 256, 80, 128),
    _level("base1", 512, 40, 64),
    _level("base2", 768, 20, 32),
    _level("base3", 1024, 10, 16),
    _level("ssr0", 128, 8, 1024),
    _level("ssr1", 256, 4, 512),
    _level("ssr2", 512, 2, 256),
    _level("ssr3", 1024, 2, 128),
    _level("demo0", 64, 16, 16, B=2, cpu=True),
    _level("demo1", 96, 8, 8, B=2, cpu=True),
    _level("demo2", 96, 4, 4, B=2, cpu=True),
    _level("demo_ssr0", 32, 8, 32, B=2, cpu=True),
)
BASE_ATTENTION_LEVELS = LEVELS[1:4]
DEMO_ATTENTION_LEVELS = LEVELS[9:11]


def at_levels(
    options: Mapping[str, Any],
    levels: tuple[tuple[str, dict[str, int], bool], ...] = LEVELS,
    suffix: str = "",
    **sizes: int,
) -> tuple[Scenario, ...]:
    """A scenario at each level, with the same options and further sizes."""
    return tuple(Scenario(name + suffix, {**shape, **sizes}, options, cpu) for name, shape, cpu in levels)


class Draw:
    """Normal tensors on a device from one generator (which lives on the CPU, so that every device sees the same)."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator) -> None:
        self.device, self.dtype, self.generator = device, dtype, generator

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=self.generator)).to(self.device, self.dtype)

    def activation(self, *shape: int) -> Tensor:
        """(B, C, T, H, W) in channels_last_3d memory."""
        B, C, T, H, W = shape
        return self(B, T, H, W, C).permute(0, 4, 1, 2, 3)
