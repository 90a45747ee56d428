"""Times several ways to do one thing, in turn and in one process, so that a slow moment falls on all of them.

A ratio of two sides is the median over rounds of the one's time over the other's in the same round.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Side = Callable[[], Any]
Clock = Callable[[Side], float]
Repeat = Callable[[Callable[[], None], Callable[[], None], int], Any]

MIN_ROUNDS, MAX_ROUNDS = 3, 200
L2_FLUSH_BYTES = 256 << 20
L2_FLUSHES = 4  # about 0.3 ms of device time, in which the host gets ahead: see CudaClock


def cpu_clock(side: Side) -> float:
    """Seconds of wall time."""
    start = time.perf_counter()
    side()
    return time.perf_counter() - start


class CudaClock:
    """Seconds of device time between two events, with the L2 cache flushed before.

    While the device is busy flushing, about 0.3 ms, the host queues the side's launches, and what they cost the host is
    not measured: some fifty launches. A side of more, a baseline of hundreds of small operations say, whose launches
    cost the host longer than the device, is measured at the speed of its host; a CUDA graph of it would be faster.
    """

    def __init__(self) -> None:
        self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self.start = torch.cuda.Event(enable_timing=True)
        self.stop = torch.cuda.Event(enable_timing=True)

    def __call__(self, side: Side) -> float:
        for _ in range(L2_FLUSHES):
            self.flush.zero_()
        self.start.record()
        side()
        self.stop.record()
        self.stop.synchronize()
        return self.start.elapsed_time(self.stop) / 1e3


def clock_for(device: torch.device | str) -> Clock:
    return CudaClock() if torch.device(device).type == "cuda" else cpu_clock


def run_rounds(timed: Callable[[], None], before: Callable[[], None], rounds: int) -> None:
    for _ in range(rounds):
        before()
        timed()


def interleave(
    ours: Side, others: Mapping[str, Side], clock: Clock, budget: float, repeat: Repeat = run_rounds
) -> tuple[list[float], dict[str, list[float]]]:
    """Seconds of `ours`, and of each other side, in every round, the others in an order drawn anew for each.

    A side finds in the caches what the one before left there: in one order, one side alone would always follow ours.

    Args:
        ours, others: already run once, so that nothing is built or cached in the first round.
        budget: seconds of all rounds together, from which their number follows: MIN_ROUNDS to MAX_ROUNDS.
        repeat: runs `(timed, before, rounds)`, that is before() and timed() in each round; pytest-benchmark's place.
    """
    cost = clock(ours) + sum(clock(side) for side in others.values())
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget / cost)))
    mine: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in others}

    names, order = list(others), random.Random(0)

    def time_others() -> None:
        order.shuffle(names)
        for name in names:
            theirs[name].append(clock(others[name]))

    repeat(lambda: mine.append(clock(ours)), time_others, rounds)
    return mine, theirs


def quantile(samples: Sequence[float], fraction: float) -> float:
    """The sample at `fraction` of the way through the sorted ones (the lower of two)."""
    return sorted(samples)[int(fraction * (len(samples) - 1))]


def median(samples: Sequence[float]) -> float:
    return quantile(samples, 0.5)


def times_as_fast(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """The median over rounds of their seconds over ours: above 1 where we are faster."""
    return median([other / our for other, our in zip(theirs, ours, strict=True)])


def seconds(value: float) -> str:
    """For people: `250 us`, `1.50 ms`, `2.00 s`."""
    return f"{value * 1e6:.0f} us" if value < 1e-3 else f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"


def aligned(cells: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> list[str]:
    """Lines of a table whose first row is its head; the columns in `numbers` are set to the right."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    pads = [str.rjust if i in numbers else str.ljust for i in range(len(widths))]
    lines = [
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True)).rstrip()
        for line in cells
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
