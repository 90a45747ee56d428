"""What each op must reach, as data, and the verdict on one measured row.

The absolute goals were set on an H100 that copies at 3.0 TB/s and multiplies at 798 TFLOP/s; another card's are scaled
by what it measures for the same two. Goals in bytes a second hold from 512 MB of traffic, goals in arithmetic from 16k
rows; below that, ratios only. The reference backend has no goal: it is the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from lumiere_fast.ops._spec import Scenario

H100_COPY, H100_MATMUL = 3.0e12, 798e12
BANDWIDTH_FROM_BYTES = 512 << 20
CPU_BANDWIDTH_FROM_BYTES = 4 << 20  # past a core's own caches
ARITHMETIC_FROM_ROWS = 16_384
NO_TEMPORARIES = 1 << 20  # the allocator's rounding, and scalars

MET, MISSED, NO_GOAL = "met", "missed", "no goal"
TIMES, BANDWIDTH, ARITHMETIC, BYTES, OF_MEMORY = "times", "bandwidth", "arithmetic", "bytes", "of memory"


class Ceilings(NamedTuple):
    """What the card reaches: a copy, counting bytes read and written, and a large bf16 matrix product."""

    copy_bytes_per_s: float = H100_COPY
    matmul_flop_per_s: float = H100_MATMUL


H100 = Ceilings()


@dataclass(frozen=True)
class Measured:
    """What a verdict needs of a row.

    Args:
        requested: the backend asked for, perhaps "auto"; `backend` is what ran.
        times_as_fast: by baseline or limit, its time over ours.
        temporaries: bytes allocated at the peak of a call beyond inputs and outputs; None where not measured.
        of_memory: by baseline, our temporaries over its.
    """

    op: str
    requested: str
    backend: str
    scenario: Scenario
    device: str
    dtype: str
    threads: int
    seconds: float
    times_as_fast: Mapping[str, float]
    nbytes: int
    flops: int
    temporaries: int | None = None
    of_memory: Mapping[str, float] = field(default_factory=dict)
    ceilings: Ceilings = H100

    @property
    def rows(self) -> int:
        return self.scenario.count("BTHW")

    def option(self, name: str) -> object:
        return self.scenario.options.get(name)


Condition = Callable[[Measured], bool]


@dataclass(frozen=True)
class Goal:
    """`quantity` must be at least `bound`, or for the two quantities of memory at most.

    Args:
        quantity: TIMES as fast as the best of `over`; BANDWIDTH in bytes/s and ARITHMETIC in FLOP/s on an H100; BYTES
            of temporaries; OF_MEMORY, temporaries as a part of those of `over`.
        over: names of baselines or limits. Those that a row lacks do not count; a row that has none is not judged.
        when: which rows the goal is for.
    """

    op: str
    device: str
    quantity: str
    bound: float
    over: tuple[str, ...] = ()
    when: Condition = lambda row: True

    def applies(self, row: Measured) -> bool:
        dtype = "bfloat16" if self.device == "cuda" else "float32"
        if (row.op, row.device, row.dtype) != (self.op, self.device, dtype) or row.backend == "reference":
            return False
        return self._is_large(row) and self.when(row) and self._reached(row) is not None

    def _is_large(self, row: Measured) -> bool:
        if self.quantity == BANDWIDTH:
            return row.nbytes >= BANDWIDTH_FROM_BYTES
        if self.over == COPY:
            return row.nbytes >= CPU_BANDWIDTH_FROM_BYTES
        arithmetic = self.quantity == ARITHMETIC or self.over in (EQUAL_MATMUL, EQUAL_CONV)
        return not arithmetic or row.device == "cpu" or row.rows >= ARITHMETIC_FROM_ROWS

    def _reached(self, row: Measured) -> float | None:
        if self.quantity == BANDWIDTH:
            return row.nbytes / row.seconds
        if self.quantity == ARITHMETIC:
            return row.flops / row.seconds
        if self.quantity == BYTES:
            return row.temporaries
        ratios = row.times_as_fast if self.quantity == TIMES else row.of_memory
        found = [ratios[name] for name in self.over if name in ratios]
        worst = min if self.quantity == TIMES else max
        return worst(found) if found else None

    def verdict(self, row: Measured) -> Verdict:
        reached = self._reached(row)
        assert reached is not None
        bound = self.bound * self._scale(row.ceilings)
        met = reached <= bound if self.quantity in (BYTES, OF_MEMORY) else reached >= bound
        return Verdict(self.text(bound), reached, bound, MET if met else MISSED)

    def _scale(self, ceilings: Ceilings) -> float:
        if self.quantity == BANDWIDTH:
            return ceilings.copy_bytes_per_s / H100_COPY
        return ceilings.matmul_flop_per_s / H100_MATMUL if self.quantity == ARITHMETIC else 1.0

    def text(self, bound: float) -> str:
        best = self.over[0] if len(self.over) == 1 else f"best of {' | '.join(self.over)}"
        return {
            TIMES: f">= {bound:g}x {best}",
            BANDWIDTH: f">= {bound / 1e12:.2f} TB/s",
            ARITHMETIC: f">= {bound / 1e12:.0f} TFLOP/s",
            BYTES: f"<= {bound / 2**20:g} MiB of temporaries",
            OF_MEMORY: f"<= {bound:g} of the memory of {best}",
        }[self.quantity]


class Verdict(NamedTuple):
    goal: str
    reached: float
    bound: float
    verdict: str


COMPILED = ("torch.compile",)
COPY = ("copy",)
EQUAL_MATMUL = ("mm",)
EQUAL_CONV = ("temporal_conv of as many frames",)
CONV_EAGER = ("conv1d", "conv3d NCDHW")
CONV_ANY = ("conv1d", "conv2d", "conv3d NDHWC", "conv3d NCDHW")
NORM_EITHER_WAY = ("norm in the prologue", "norm in a pass before")
NORM_LAYERS = ("layers", "layers, NCHW")
SDPA_KERNELS = ("SDPA", "SDPA flash", "SDPA efficient", "SDPA cuDNN", "SDPA math")
REARRANGED = tuple(f"rearrange + {name}" for name in (*SDPA_KERNELS, "xFormers"))
ATTENTION_OURS = ("triton",)
ATTENTION_FLASH = ("SDPA flash of views", "SDPA cuDNN of views")
ATTENTION_ANY = (
    *(f"{name} of {memory}" for name in SDPA_KERNELS for memory in ("views", "copies")),
    "xFormers",
    "matmul",
)
COMPOSED = ("composed", "composed, sort", "composed, topk")
NEAREST = {
    "space_time_downsample": ("interpolate",),
    "space_time_upsample": ("interpolate", "interpolate_frames"),
}
POOL = ("avg_pool3d", "avg_pool2d")


def _option(name: str, value: object) -> Condition:
    return lambda row: row.option(name) == value


def _both(first: Condition, second: Condition) -> Condition:
    return lambda row: first(row) and second(row)


def _wide(row: Measured) -> bool:
    return row.scenario.sizes["C"] >= 256


def _narrow(row: Measured) -> bool:
    return row.scenario.sizes["C"] <= 128


def _forward(row: Measured) -> bool:
    return row.option("backward") is None


def _frames(least: int, most: int) -> Condition:
    """Temporal attention's forward pass of so many: there is no goal for its gradients."""
    return lambda row: _forward(row) and least <= row.scenario.sizes["T"] <= most


def _long_sequences(head_dim: int) -> Condition:
    """Each frame's own pixels, 4096 of them or more."""
    return lambda row: (
        row.option("text") is False and row.scenario.sizes["D"] == head_dim and row.scenario.count("HW") >= 4096
    )


_fused, _plain = _option("fused", True), _option("fused", False)
_fused_convolution = _both(_fused, lambda row: row.scenario.sizes.get("k") != 1)  # what layers cost is in the taps
_learned, _taps = _option("learned", True), _option("learned", False)
_paper, _demo = _option("preset", "paper"), _option("preset", "demo")
_of_auto: Condition = lambda row: row.requested == "auto"  # noqa: E731
_base_clip: Condition = lambda row: row.scenario.shape("THW") == (80, 128, 128)  # noqa: E731


def _cuda(op: str, when: Condition, eager: float, over: tuple[str, ...], compiled: float | None) -> tuple[Goal, ...]:
    """The two columns of ratios: over eager layers, and over torch.compile of them."""
    ratio = Goal(op, "cuda", TIMES, eager, over, when)
    return (ratio,) if compiled is None else (ratio, Goal(op, "cuda", TIMES, compiled, COMPILED, when))


CUDA_GOALS = (
    *_cuda("temporal_conv", _both(_plain, _wide), 3, CONV_EAGER, 1.5),
    Goal("temporal_conv", "cuda", TIMES, 0.85, EQUAL_MATMUL, _both(_plain, _wide)),
    *_cuda("temporal_conv", _both(_fused_convolution, _wide), 4, CONV_EAGER, 2),
    *_cuda("temporal_conv", _both(_fused_convolution, _narrow), 5, CONV_EAGER, 2.5),
    Goal("temporal_conv", "cuda", BANDWIDTH, 2.4e12, when=_both(_fused, _narrow)),
    Goal("temporal_conv", "cuda", TIMES, 0.97, NORM_EITHER_WAY, _fused),
    *_cuda("group_norm", lambda row: True, 10, NORM_LAYERS, 1.3),
    Goal("group_norm", "cuda", BANDWIDTH, 1.9e12),
    *_cuda("temporal_attention", _frames(5, 80), 4, REARRANGED, 3),
    Goal("temporal_attention", "cuda", BANDWIDTH, 2.4e12, when=_frames(5, 80)),
    Goal("temporal_attention", "cuda", BYTES, NO_TEMPORARIES, when=_forward),
    *_cuda("spatial_attention", lambda row: True, 1, ATTENTION_ANY, None),
    Goal("spatial_attention", "cuda", TIMES, 0.97, (*ATTENTION_OURS, *ATTENTION_FLASH), _of_auto),
    Goal("spatial_attention", "cuda", ARITHMETIC, 380e12, when=_long_sequences(64)),
    Goal("spatial_attention", "cuda", ARITHMETIC, 420e12, when=_long_sequences(128)),
    *_cuda("denoise_step", lambda row: not _base_clip(row), 4, COMPOSED, 2),
    *_cuda("denoise_step", _base_clip, 8, COMPOSED, 2),
    Goal("denoise_step", "cuda", BANDWIDTH, 2.6e12),
    Goal("denoise_step", "cuda", BYTES, NO_TEMPORARIES),
    *(
        goal
        for op, aten in NEAREST.items()
        for goal in (
            Goal(op, "cuda", TIMES, 5, aten, _both(_taps, _option("mode", "nearest"))),
            Goal(op, "cuda", TIMES, 1.3, COMPILED, _taps),
            Goal(op, "cuda", BANDWIDTH, 2.6e12, when=_taps),
        )
    ),
    *_cuda("space_time_upsample", _learned, 2.5, ("duplicate_then_conv1d",), 2),
    Goal("space_time_upsample", "cuda", OF_MEMORY, 0.1, ("duplicate_then_conv3d",), _learned),
    *_cuda("space_time_downsample", _learned, 4, ("conv1d_then_stride",), None),
    Goal("space_time_downsample", "cuda", TIMES, 0.9, EQUAL_CONV, _learned),
    *_cuda("stunet", _paper, 2.5, ("eager layers",), 1.5),
    Goal("stunet", "cuda", ARITHMETIC, 0.6 * H100_MATMUL, when=_paper),
    Goal("stunet", "cuda", OF_MEMORY, 0.5, ("eager layers",), _paper),
)

CPU_GOALS = (
    Goal("temporal_conv", "cpu", TIMES, 0.95, (*EQUAL_MATMUL, "conv3d NDHWC", "conv1d"), _plain),
    Goal("temporal_conv", "cpu", TIMES, 1.3, CONV_ANY, _both(_fused_convolution, lambda row: row.threads == 1)),
    Goal("temporal_conv", "cpu", TIMES, 1.15, CONV_ANY, _both(_fused_convolution, lambda row: row.threads == 2)),
    Goal("group_norm", "cpu", TIMES, 2, NORM_LAYERS),
    Goal("group_norm", "cpu", TIMES, 0.6, COPY),
    Goal("temporal_attention", "cpu", TIMES, 3, REARRANGED, _frames(14, 16)),
    Goal("temporal_attention", "cpu", TIMES, 1.5, REARRANGED, _frames(80, 80)),
    *(Goal(op, "cpu", TIMES, 0.6, COPY, _taps) for op in NEAREST),
    *(Goal(op, "cpu", TIMES, 1, aten, _both(_taps, _option("mode", "nearest"))) for op, aten in NEAREST.items()),
    Goal(
        "space_time_upsample", "cpu", TIMES, 2, NEAREST["space_time_upsample"], _both(_taps, _option("mode", "linear"))
    ),
    Goal("space_time_downsample", "cpu", TIMES, 8, POOL, _both(_taps, _option("mode", "area"))),
    Goal("space_time_upsample", "cpu", TIMES, 2.4, ("duplicate_then_conv1d",), _learned),
    Goal("space_time_downsample", "cpu", TIMES, 3, ("conv1d_then_stride",), _learned),
    Goal("blend_windows", "cpu", TIMES, 2.5, ("accumulate loop",)),
    Goal("denoise_step", "cpu", TIMES, 3, COMPOSED),
    Goal("stunet", "cpu", TIMES, 1.5, ("reference backend",), _demo),
    Goal("stunet", "cpu", TIMES, 1.2, COMPILED, _demo),
)

GOALS = CUDA_GOALS + CPU_GOALS


def verdicts(row: Measured) -> list[Verdict]:
    """One for each goal that is for this row."""
    return [goal.verdict(row) for goal in GOALS if goal.applies(row)]


def overall(found: list[Verdict]) -> str:
    """`missed` if any was missed."""
    if not found:
        return NO_GOAL
    return MISSED if any(each.verdict == MISSED for each in found) else MET
