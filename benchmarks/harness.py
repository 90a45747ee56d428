"""Times an op against named baselines, in turn and in one process, and prints one table for the whole run.

A benchmark file names its baselines as plain functions, and hands them to the `case` fixture:

    @each_scenario(SPEC)
    def test_blend_windows(case: Case) -> None:
        case.compare({"accumulate loop": lambda: accumulate(**case.inputs)})

Before anything is timed, every baseline's result is compared with ours. Then each round times every side once, so that
a slow moment of the machine falls on all of them; a ratio is the median over rounds of `baseline / ours`.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lumiere_fast import dispatch, ops
from lumiere_fast.ops._spec import OpSpec, Scenario

Side = Callable[[], Any]

MIN_ROUNDS, MAX_ROUNDS = 3, 200
L2_FLUSH_BYTES = 256 << 20


def each_scenario(spec: OpSpec) -> pytest.MarkDecorator:
    """Runs a benchmark at every scenario of the spec; conftest.py leaves out those too large for the device."""
    return pytest.mark.parametrize(
        ("spec", "scenario"), [pytest.param(spec, scenario, id=scenario.name) for scenario in spec.scenarios]
    )


@dataclass(frozen=True)
class Case:
    """One op at one scenario, with its inputs; `compare` times it.

    Args:
        inputs: the public function's arguments by name.
        run: the fixture's way to time, check and record (conftest.py).
    """

    spec: OpSpec
    scenario: Scenario
    backend: str
    device: str
    dtype: torch.dtype
    inputs: dict[str, Any]
    run: Callable[..., None]

    def compare(
        self,
        baselines: Mapping[str, Side],
        *,
        limits: Mapping[str, Side] | None = None,
        ours: Side | None = None,
        rtol: float | None = None,
    ) -> None:
        """Time the op into a held buffer, or `ours` where given, against the baselines.

        Args:
            baselines: by name, calls that return what the op returns.
            limits: calls that need not return it: a copy, a matrix product of equal size.
            rtol: relative to the largest magnitude of the result; by default a few hundred roundings.
        """
        tolerance = 512 * torch.finfo(self.dtype).eps if rtol is None else rtol
        self.run(self, ours or self.into_held_buffer(), baselines, limits or {}, tolerance)

    def into_held_buffer(self) -> Side:
        op = getattr(ops, self.spec.name)
        with torch.no_grad():
            result = op(**self.inputs, backend=self.backend)
        held = result if isinstance(result, Tensor) else result[0]
        return lambda: op(**self.inputs, backend=self.backend, out=held)

    @property
    def chosen_backend(self) -> str:
        """The backend that runs: for a single op, "auto" resolved."""
        if self.backend != dispatch.AUTO or self.spec.name not in dispatch.registered_ops():
            return self.backend
        usable = (name for name in dispatch.BACKENDS if dispatch.supports(self.spec.name, name, **self.inputs))
        return next(usable)


class Row(NamedTuple):
    """One line of the table. Times are seconds; `ratios` are a baseline's or a limit's time over ours."""

    op: str
    scenario: str
    backend: str
    threads: int
    samples: list[float]
    baselines: dict[str, float]
    limits: dict[str, float]
    ratios: dict[str, float]
    nbytes: int
    flops: int

    def quantile(self, fraction: float) -> float:
        return quantile(self.samples, fraction)

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def strongest(self) -> str | None:
        return min(self.baselines, key=lambda name: self.baselines[name], default=None)

    def extra_info(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "scenario": self.scenario,
            "backend": self.backend,
            "threads": self.threads,
            "median_s": self.median,
            "p10_s": self.quantile(0.1),
            "p90_s": self.quantile(0.9),
            "bytes": self.nbytes,
            "flops": self.flops,
            "gb_per_s": self.nbytes / self.median / 1e9,
            "gflop_per_s": self.flops / self.median / 1e9,
            "baselines_s": self.baselines,
            "limits_s": self.limits,
            "ratios": self.ratios,
            "strongest": self.strongest,
            "versions": versions(),
        }


def quantile(samples: Sequence[float], fraction: float) -> float:
    """The sample at `fraction` of the way through the sorted ones (the lower of two)."""
    return sorted(samples)[int(fraction * (len(samples) - 1))]


def versions() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    packages = [name for name in ("lumiere_fast", "torch", "triton") if find_spec(name)]
    return {"python": platform.python_version(), "device": device, **{name: version(name) for name in packages}}


def cpu_clock(side: Side) -> float:
    start = time.perf_counter()
    side()
    return time.perf_counter() - start


class CudaClock:
    """Device time between two events, with the L2 cache flushed before: the flush also hides the launch latency."""

    def __init__(self) -> None:
        self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self.start = torch.cuda.Event(enable_timing=True)
        self.stop = torch.cuda.Event(enable_timing=True)

    def __call__(self, side: Side) -> float:
        self.flush.zero_()
        self.start.record()
        side()
        self.stop.record()
        self.stop.synchronize()
        return self.start.elapsed_time(self.stop) / 1e3


def clock_for(device: torch.device | str) -> Callable[[Side], float]:
    return CudaClock() if torch.device(device).type == "cuda" else cpu_clock


def assert_same(results: Mapping[str, Any], expected: Any, rtol: float) -> None:
    """Every baseline computes what we compute, to `rtol` of the result's largest magnitude."""
    for name, result in results.items():
        for theirs, ours in zip(_tensors(result), _tensors(expected), strict=True):
            assert theirs.shape == ours.shape, f"{name} gives {tuple(theirs.shape)}, we {tuple(ours.shape)}"
            error = float((theirs.float() - ours.float()).abs().max())
            bound = rtol * float(ours.abs().max())
            assert error <= bound, f"{name} differs from us by {error:.3g}, {bound:.3g} is allowed"


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in _tensors(part)]


def interleave(
    benchmark: Any, clock: Callable[[Side], float], ours: Side, others: Mapping[str, Side], budget: float
) -> tuple[list[float], dict[str, list[float]]]:
    """Seconds of every side in every round. `ours` is what pytest-benchmark records; the others run in its set-up."""
    cost = clock(ours) + sum(clock(side) for side in others.values())  # the check has warmed them
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget / cost)))
    mine: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in others}

    def time_others() -> None:
        for name, side in others.items():
            theirs[name].append(clock(side))

    benchmark.pedantic(lambda: mine.append(clock(ours)), setup=time_others, rounds=rounds, iterations=1)
    return mine, theirs


def table(rows: Sequence[Row]) -> list[str]:
    """The report: `*` marks the strongest baseline, the one that the ratio must be read against."""
    head = ("op", "scenario", "backend", "threads", "median", "p10..p90", "GB/s", "GFLOP/s", "times as fast as")
    cells = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    pads = [str.ljust if i in (0, 1, 2, len(head) - 1) else str.rjust for i in range(len(head))]
    lines = [
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True)).rstrip()
        for line in cells
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _cells(row: Row) -> tuple[str, ...]:
    ratios = [f"{name} {row.ratios[name]:.2f}{'*' if name == row.strongest else ''}" for name in row.baselines]
    ratios += [f"({name} {row.ratios[name]:.2f})" for name in row.limits]
    return (
        row.op,
        row.scenario,
        row.backend,
        str(row.threads),
        seconds(row.median),
        f"{seconds(row.quantile(0.1))}..{seconds(row.quantile(0.9))}",
        f"{row.nbytes / row.median / 1e9:.1f}" if row.nbytes else "",
        f"{row.flops / row.median / 1e9:.1f}" if row.flops else "",
        ", ".join(ratios),
    )


def seconds(value: float) -> str:
    return f"{value * 1e6:.0f} us" if value < 1e-3 else f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"
