"""The one timer: rounds, quantiles and ratios on a clock that the test holds, and the table."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lumiere_fast import timing

Side = Callable[[], float]


def test_every_round_times_every_side_once_the_others_first() -> None:
    order: list[str] = []
    costs = {"ours": 2.0, "a": 1.0, "b": 1.0}

    def side(name: str) -> Callable[[], float]:
        return lambda: order.append(name) or costs[name]  # type: ignore[func-returns-value]

    ours, others = timing.interleave(side("ours"), {"a": side("a"), "b": side("b")}, lambda call: call(), budget=20.0)
    rounds = [tuple(order[i : i + 3]) for i in range(3, len(order), 3)]
    assert len(rounds) == 5  # 20 s of rounds that cost 4, after one to learn that
    assert set(rounds) == {("a", "b", "ours"), ("b", "a", "ours")}  # in either order
    assert ours == [2.0] * 5 and others == {"a": [1.0] * 5, "b": [1.0] * 5}


@pytest.mark.parametrize(("budget", "rounds"), [(1e-9, timing.MIN_ROUNDS), (7.0, 7), (1e9, timing.MAX_ROUNDS)])
def test_the_budget_sets_the_rounds_within_limits(budget: float, rounds: int) -> None:
    assert len(timing.interleave(lambda: None, {}, lambda side: 1.0, budget)[0]) == rounds


def test_a_ratio_is_taken_within_each_round() -> None:
    """A slow moment that falls on both sides of a round leaves its ratio alone."""
    ticks = iter([1.0, 1.0, *(2.0, 1.0), *(20.0, 10.0), *(2.0, 1.0)])  # cost of each; then (theirs, ours) a round
    ours, others = timing.interleave(lambda: None, {"a": lambda: None}, lambda side: next(ticks), budget=1e-9)
    assert timing.times_as_fast(others["a"], ours) == 2.0
    assert timing.times_as_fast([1.0, 1.0, 9.0], [4.0, 2.0, 3.0]) == 0.5  # of 0.25, 0.5 and 3


def test_quantiles_take_the_lower_sample() -> None:
    samples = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [timing.quantile(samples, f) for f in (0.0, 0.1, 0.5, 0.9, 1.0)] == [1.0, 1.0, 3.0, 4.0, 5.0]
    assert timing.median([4.0, 1.0, 2.0, 3.0]) == 2.0


def test_repeat_is_given_the_rounds() -> None:
    seen: list[int] = []

    def repeat(timed: Callable[[], None], before: Callable[[], None], rounds: int) -> None:
        seen.append(rounds)
        before()
        timed()

    ours, others = timing.interleave(lambda: None, {"a": lambda: None}, lambda side: 1.0, budget=10.0, repeat=repeat)
    assert seen == [5] and ours == [1.0] and others == {"a": [1.0]}


def test_the_clock_of_a_cpu_measures_wall_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def side() -> None:
        now[0] += 0.25

    assert timing.clock_for("cpu")(side) == 0.25


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_clock_of_a_gpu_measures_the_device() -> None:
    x = torch.ones(1 << 28, device="cuda")
    clock = timing.clock_for("cuda")
    clock(lambda: x.mul_(1))
    assert clock(lambda: [x.mul_(1) for _ in range(8)]) > 3 * clock(lambda: x.mul_(1)) > 0


def test_seconds_and_tables_for_people() -> None:
    assert [timing.seconds(value) for value in (2.5e-4, 1.5e-3, 2.0)] == ["250 us", "1.50 ms", "2.00 s"]
    lines = timing.aligned([("op", "time"), ("a", "1 us"), ("long", "10 us")], numbers=[1])
    assert lines == ["op     time", "-----------", "a      1 us", "long  10 us"]
