"""Times an op against named baselines, in turn and in one process, and prints one table for the whole run.

A benchmark file names its baselines as plain functions, and hands them to the `case` fixture:

    @each_scenario(SPEC)
    def test_blend_windows(case: Case) -> None:
        case.compare({"accumulate loop": lambda: accumulate(**case.inputs)})

Before anything is timed, every baseline's result is compared with ours; a row that fails there has no times. Then each
round times every side once (`lumiere_fast.timing`). `pytest benchmarks/` and the lab both come through here.
"""

from __future__ import annotations

import functools
import importlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import goals, provenance
from lumiere_fast import dispatch, ops, timing
from lumiere_fast._malloc import keep_freed_memory
from lumiere_fast.benchmark import into_held_buffer
from lumiere_fast.ops._spec import OpSpec, Scenario
from lumiere_fast.timing import Side

COMPILE_MODE = "max-autotune-no-cudagraphs"
CEILING_COPY_BYTES, CEILING_MATMUL = 2 << 30, 8192


def each_scenario(spec: OpSpec) -> pytest.MarkDecorator:
    """Runs a benchmark at every scenario of the spec; conftest.py leaves out those too large for the device."""
    return pytest.mark.parametrize(
        ("spec", "scenario"), [pytest.param(spec, scenario, id=scenario.name) for scenario in spec.scenarios]
    )


@dataclass(frozen=True)
class Case:
    """One op at one scenario, with its inputs; `compare` times it.

    Args:
        backend: as asked for, perhaps "auto".
        inputs: the public function's arguments by name.
        finish: takes the row.
        budget: seconds of timed rounds.
        compiles: whether a baseline is also timed as torch.compile makes it, which is slow to make.
        repeat: as of `timing.interleave`.
    """

    spec: OpSpec
    scenario: Scenario
    backend: str
    device: str
    dtype: torch.dtype
    threads: int
    inputs: dict[str, Any]
    finish: Callable[[Row], None]
    budget: float
    compiles: bool = False
    repeat: timing.Repeat = timing.run_rounds

    def compare(
        self,
        baselines: Mapping[str, Side],
        *,
        limits: Mapping[str, Side] | None = None,
        ours: Side | None = None,
        rtol: float | None = None,
        compiled: Callable[..., Any] | None = None,
    ) -> None:
        """Time the op into a held buffer, or `ours` where given, against the baselines.

        Args:
            baselines: by name, calls that return what the op returns.
            limits: calls that need not return it: a copy, a matrix product of equal size.
            rtol: relative to the largest magnitude of the result; by default a few hundred roundings.
            compiled: the baseline to give to torch.compile where that is wanted; takes the inputs by name.
        """
        sides = dict(baselines)
        if self.compiles and compiled is not None:
            function = torch.compile(compiled, dynamic=False, mode=COMPILE_MODE)
            sides["torch.compile"] = lambda: function(**self.inputs)
        tolerance = 512 * torch.finfo(self.dtype).eps if rtol is None else rtol
        self.finish(measure(self, ours or self.into_held_buffer(), sides, limits or {}, tolerance))

    def into_held_buffer(self) -> Side:
        return into_held_buffer(getattr(ops, self.spec.name), self.inputs, self.backend)

    def copy(self) -> dict[str, Side]:
        """The limit "copy": as many bytes as the op reads and writes, moved by torch between held buffers."""
        half = self.spec.bytes(self.scenario, self.dtype) // 2
        held, other = (torch.ones(half, dtype=torch.int8, device=self.device) for _ in range(2))
        return {"copy": lambda: held.copy_(other)}


@dataclass(frozen=True)
class Row:
    """One line of the table. Times are seconds; `ratios` are a baseline's or a limit's time over ours.

    Args:
        broken: baselines that torch cannot run here, and why.
        others: the part of the machine's processors that other programs used meanwhile, where it is known.
    """

    op: str
    scenario: str
    backend: str
    threads: int
    dtype: str
    samples: list[float]
    baselines: dict[str, float]
    limits: dict[str, float]
    ratios: dict[str, float]
    nbytes: int
    flops: int
    temporaries: int | None = None
    peak: int | None = None
    broken: dict[str, str] = field(default_factory=dict)
    others: float | None = None
    source: str | None = None
    verdicts: list[goals.Verdict] = field(default_factory=list)

    def quantile(self, fraction: float) -> float:
        return timing.quantile(self.samples, fraction)

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def strongest(self) -> str | None:
        return min(self.baselines, key=lambda name: self.baselines[name], default=None)

    @property
    def verdict(self) -> str:
        return goals.overall(self.verdicts)

    def numbers(self) -> dict[str, Any]:
        """What a record keeps of the row."""
        return {
            "median_s": self.median,
            "p10_s": self.quantile(0.1),
            "p90_s": self.quantile(0.9),
            "rounds": len(self.samples),
            "bytes": self.nbytes,
            "flops": self.flops,
            "gb_per_s": self.nbytes / self.median / 1e9,
            "gflop_per_s": self.flops / self.median / 1e9,
            "temporaries": self.temporaries,
            "peak": self.peak,
            "baselines_s": self.baselines,
            "limits_s": self.limits,
            "ratios": self.ratios,
            "strongest": self.strongest,
            "broken": self.broken,
            "used_by_others": self.others,
            "goals": [verdict._asdict() for verdict in self.verdicts],
        }

    def extra_info(self) -> dict[str, Any]:
        """What pytest-benchmark's JSON keeps of it."""
        key = {name: value for name, value in asdict(self).items() if name in ("op", "scenario", "backend", "threads")}
        return {**key, "dtype": self.dtype, "source": self.source, "verdict": self.verdict, **self.numbers()}


def measure(case: Case, ours: Side, baselines: Mapping[str, Side], limits: Mapping[str, Side], rtol: float) -> Row:
    """Check every side, then time them in turn, and hold the row against its goals."""
    with torch.no_grad():
        with dispatch.record_backends() as used:
            expected = ours()
        baselines, broken = usable(baselines, expected, rtol)
        del expected
        memory, peak = {"": temporaries(ours, case.device)}, peak_memory(case.device)
        memory |= {name: temporaries(side, case.device) for name, side in baselines.items()}
        for side in limits.values():
            side()
        clock = timing.clock_for(case.device)
        before = processor_seconds()
        mine, theirs = timing.interleave(ours, {**baselines, **limits}, clock, case.budget, case.repeat)
        others = used_by_others(before, processor_seconds())
    backend = case.backend if case.backend != dispatch.AUTO else ", ".join(sorted(used)) or case.backend
    row = Row(
        op=case.spec.name,
        scenario=case.scenario.name,
        backend=backend,
        threads=case.threads,
        dtype=str(case.dtype).removeprefix("torch."),
        samples=mine,
        baselines={name: timing.median(theirs[name]) for name in baselines},
        limits={name: timing.median(theirs[name]) for name in limits},
        ratios={name: timing.times_as_fast(times, mine) for name, times in theirs.items()},
        nbytes=case.spec.bytes(case.scenario, case.dtype),
        flops=case.spec.flops(case.scenario),
        temporaries=memory[""],
        peak=peak,
        broken=broken,
        others=others,
        source=provenance.source_of(case.spec.name, backend),
    )
    of_memory = {name: memory[""] / max(1, m) for name, m in memory.items() if name and m and memory[""] is not None}
    return replace(row, verdicts=goals.verdicts(_measured(case, row, of_memory)))


def _measured(case: Case, row: Row, of_memory: dict[str, float]) -> goals.Measured:
    return goals.Measured(
        op=row.op,
        requested=case.backend,
        backend=row.backend,
        scenario=case.scenario,
        device=case.device,
        dtype=row.dtype,
        threads=row.threads,
        seconds=row.median,
        times_as_fast=row.ratios,
        nbytes=row.nbytes,
        flops=row.flops,
        temporaries=row.temporaries,
        of_memory=of_memory,
        ceilings=ceilings() if case.device == "cuda" else goals.Ceilings(),
    )


def temporaries(side: Side, device: str) -> int | None:
    """Bytes that a call allocates at its peak; with a held result, beyond inputs and outputs. Only a GPU tells."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_memory(device: str) -> int | None:
    """Bytes allocated at the peak of the call that `temporaries` just made, inputs and weights included."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else None


@functools.cache
def ceilings() -> goals.Ceilings:
    """What this GPU reaches: the median of ten large copies, and of ten large bf16 products of random numbers."""
    return goals.Ceilings(_copy_rate(timing.CudaClock()), _matmul_rate(timing.CudaClock()))


def _copy_rate(clock: timing.Clock) -> float:
    source, target = (torch.ones(CEILING_COPY_BYTES, dtype=torch.int8, device="cuda") for _ in range(2))
    return 2 * CEILING_COPY_BYTES / timing.median([clock(lambda: target.copy_(source)) for _ in range(10)])


def _matmul_rate(clock: timing.Clock) -> float:
    a, b, c = (torch.randn(CEILING_MATMUL, CEILING_MATMUL, device="cuda").bfloat16() for _ in range(3))
    return 2 * CEILING_MATMUL**3 / timing.median([clock(lambda: torch.mm(a, b, out=c)) for _ in range(10)])


def usable(baselines: Mapping[str, Side], expected: Any, rtol: float) -> tuple[dict[str, Side], dict[str, str]]:
    """The baselines that run, each held against our result; and of those that torch cannot run here, why."""
    kept, broken = {}, {}
    for name, side in baselines.items():
        try:
            result = side()
        except RuntimeError as error:  # out of memory, a grid too large, no kernel for the shape
            broken[name] = str(error).partition("\n")[0]
            continue
        assert_same(name, result, expected, rtol)
        kept[name] = side
    return kept, broken


def assert_same(name: str, result: Any, expected: Any, rtol: float) -> None:
    """The baseline computes what we compute, to `rtol` of the result's largest magnitude."""
    for theirs, ours in zip(_tensors(result), _tensors(expected), strict=True):
        assert theirs.shape == ours.shape, f"{name} gives {tuple(theirs.shape)}, we {tuple(ours.shape)}"
        error = float((theirs.float() - ours.float()).abs().max())
        bound = rtol * float(ours.abs().max())
        assert error <= bound, f"{name} differs from us by {error:.3g}, {bound:.3g} is allowed"


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in _tensors(part)]


def benchmark_of(name: str) -> tuple[OpSpec, Callable[..., None]]:
    """The spec and the test function of bench_<name>.py."""
    module = importlib.import_module(f"benchmarks.bench_{name}")
    return module.SPEC, getattr(module, f"test_{name}")


def prepare() -> None:
    """What a process that times does first: baselines get reused memory, and cuDNN the search that it offers."""
    keep_freed_memory()
    torch.backends.cudnn.benchmark = True


def draw_inputs(spec: OpSpec, scenario: Scenario, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Drawn on the device itself: a host takes seconds for the larger ones."""
    with torch.device(device):
        return spec.make_inputs(scenario, device, dtype, torch.Generator(device).manual_seed(0))


def processor_seconds() -> tuple[float, float, float] | None:
    """Since the start: what this process used, what all did, and what there was. Linux alone tells."""
    try:
        line = Path("/proc/stat").read_text().partition("\n")[0]
    except OSError:
        return None
    ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in line.split()[1:9]]
    idle = ticks[3] + ticks[4]
    return time.process_time(), sum(ticks) - idle, sum(ticks)


def used_by_others(before: tuple[float, float, float] | None, after: tuple[float, float, float] | None) -> float | None:
    """The part of all processors that went to other programs between two readings."""
    if before is None or after is None:
        return None
    ours, busy, there = (b - a for a, b in zip(before, after, strict=True))
    return max(0.0, busy - ours) / there if there else None


def default_dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def table(rows: Sequence[Row]) -> list[str]:
    """The report: `*` marks the strongest baseline, the one that the ratio must be read against."""
    head = ("op", "scenario", "backend", "threads", "median", "p10..p90", "GB/s", "GFLOP/s", "goals", "as fast as")
    return timing.aligned([head, *(_cells(row) for row in rows)], numbers=range(3, 8))


def _cells(row: Row) -> tuple[str, ...]:
    ratios = [f"{name} {row.ratios[name]:.2f}{'*' if name == row.strongest else ''}" for name in row.baselines]
    ratios += [f"({name} {row.ratios[name]:.2f})" for name in row.limits]
    ratios += [f"({name} cannot run)" for name in row.broken]
    return (
        row.op,
        row.scenario,
        row.backend,
        str(row.threads),
        timing.seconds(row.median),
        f"{timing.seconds(row.quantile(0.1))}..{timing.seconds(row.quantile(0.9))}",
        f"{row.nbytes / row.median / 1e9:.1f}" if row.nbytes else "",
        f"{row.flops / row.median / 1e9:.1f}" if row.flops else "",
        "" if row.verdict == goals.NO_GOAL else row.verdict,
        ", ".join(ratios),
    )
