"""`pytest benchmarks/`: options, the `case` fixture, and one table at the end. See harness.py for how it times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.harness import Case, Row, default_dtype, draw_inputs, prepare, table
from lumiere_fast.ops._spec import OpSpec, Scenario

ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lumiere_fast benchmarks")
    group.addoption("--all-scenarios", action="store_true", help="on a CPU, also the scenarios meant for a GPU")
    group.addoption("--backends", default="auto", help="comma-separated backends to time (default: auto)")
    group.addoption("--threads", default=None, help="comma-separated CPU thread counts (default: 1 and all)")
    group.addoption("--dtype", default=None, help="of the activations (default: float32, bfloat16 on a GPU)")
    group.addoption("--compile", action="store_true", help="also torch.compile where a benchmark offers it: slow")
    group.addoption("--budget", type=float, default=0.3, help="seconds of timed rounds a row (default: 0.3)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.option.benchmark_quiet = True  # our table replaces pytest-benchmark's


def pytest_sessionstart() -> None:
    prepare()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config, names = metafunc.config, metafunc.fixturenames
    if "backend" in names:
        metafunc.parametrize("backend", config.getoption("--backends").split(","))
    if "threads" in names:
        given = config.getoption("--threads")
        counts = given.split(",") if given else {1, torch.get_num_threads()} if default_device() == "cpu" else {1}
        metafunc.parametrize("threads", sorted(map(int, counts)), ids=lambda n: f"{n}t")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a CPU, leave out the scenarios meant for a GPU unless asked."""
    if default_device() == "cuda" or config.getoption("--all-scenarios"):
        return
    large = [item for item in items if isinstance(scenario_of(item), Scenario) and not scenario_of(item).cpu]
    config.hook.pytest_deselected(items=large)
    items[:] = [item for item in items if item not in large]


def scenario_of(item: pytest.Item) -> Any:
    return getattr(item, "callspec", None) and item.callspec.params.get("scenario")  # type: ignore[attr-defined]


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def case(
    request: pytest.FixtureRequest, benchmark: Any, spec: OpSpec, scenario: Scenario, backend: str, threads: int
) -> Iterator[Case]:
    config, device = request.config, default_device()
    dtype = getattr(torch, name) if (name := config.getoption("--dtype")) else default_dtype(device)

    def finish(row: Row) -> None:
        benchmark.extra_info.update(row.extra_info())
        config.stash[ROWS].append(row)

    def repeat(timed: Callable[[], None], before: Callable[[], None], rounds: int) -> None:
        """pytest-benchmark records our side; the others run in its set-up."""
        benchmark.pedantic(timed, setup=before, rounds=rounds, iterations=1)

    inputs = draw_inputs(spec, scenario, device, dtype)
    budget, compiles = config.getoption("--budget"), config.getoption("--compile")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield Case(spec, scenario, backend, device, dtype, threads, inputs, finish, budget, compiles, repeat)
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if rows:
        terminalreporter.section("lumiere_fast benchmarks (* the strongest baseline; limits in parentheses)")
        for line in table(rows):
            terminalreporter.write_line(line)
