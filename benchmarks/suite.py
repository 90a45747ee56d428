"""The test-suite as the lab runs it: a row a test file, written as soon as the file is done.

pytest runs in a process of its own with reporting.py as a plugin, which appends one line of JSON to a file for each
outcome: a crash or the time limit then costs no more than the file it came in, where junit's XML would be lost whole.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import processes
from benchmarks.provenance import ROOT
from benchmarks.record import FAILED, MET, SKIPPED

RUNS_THE_LAB = "tests/benchmarks/test_lab.py"
PLUGINS = ("-p", "benchmarks.reporting", "-p", "no:cacheprovider")
PYTEST = (sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors", *PLUGINS)
KERNELS_FIRST = ("tests/kernels/", "tests/ops/", "tests/test_native")  # the rest proves no kernel
LEAST_FILES_FOR_WORKERS = 5
ENDED_WELL = (0, 1, 5)  # all passed, some failed, nothing collected


@dataclass
class File:
    """What became of one test file so far."""

    collected: int | None = None
    outcomes: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    lacking: str | None = None
    seconds: float = 0.0

    @property
    def is_done(self) -> bool:
        broken = self.lacking is not None or (self.collected is None and bool(self.failures))
        return broken or (self.collected is not None and len(self.outcomes) >= self.collected)

    def row(self) -> dict[str, Any]:
        counts = {name: list(self.outcomes.values()).count(name) for name in ("passed", "failed", "skipped")}
        told = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or None
        common = {"measured": told, "seconds": self.seconds, "failures": sorted(self.failures)}
        if self.failures:
            return {**common, "verdict": FAILED, "why": "; ".join(f"{t}: {w}" for t, w in self.failures.items())}
        if self.lacking or not counts["passed"]:
            return {**common, "verdict": SKIPPED, "why": self.lacking or "nothing in it runs here"}
        return {**common, "verdict": MET, "why": None}


def test_files() -> list[str]:
    """All but the one that runs the lab itself, in the order of `urgency`."""
    found = (path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py"))
    return sorted((name for name in found if name != RUNS_THE_LAB), key=lambda name: (urgency(name), name))


def urgency(file: str) -> int:
    """The place of its kind in a run that may not come to its end: what proves kernels comes first."""
    kinds = [place for place, prefix in enumerate(KERNELS_FIRST) if file.startswith(prefix)]
    return kinds[0] if kinds else len(KERNELS_FIRST)


def run(
    files: Sequence[str], log: Path, deadline: float, env: Mapping[str, str], root: Path = ROOT
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each file under `root` with its row, as it is done; of those that the deadline cut off, only what failed."""
    rest = {name: File() for name in files}
    while rest:
        code = yield from _run_once(rest, log, deadline, env, root)
        if code in ENDED_WELL:  # what is left was skipped as a whole
            yield from ((name, state.row()) for name, state in rest.items())
            return
        if code is None:
            yield from ((name, state.row()) for name, state in rest.items() if state.failures)
            return
        culprit = next((name for name, state in rest.items() if state.outcomes), next(iter(rest)))
        state = rest.pop(culprit)
        state.failures[culprit] = processes.died(code)
        yield culprit, state.row()
        if code > 0:  # pytest itself gave up
            return


def _run_once(
    rest: dict[str, File], log: Path, deadline: float, env: Mapping[str, str], root: Path
) -> Generator[tuple[str, dict[str, Any]], None, int | None]:
    """One pytest over these files, which are taken off as they are done; its code, or None at the deadline."""
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder) / "events.jsonl"
        events.touch()
        command = [*PYTEST, f"--lab-events={events}", f"--rootdir={root}", *_workers(len(rest)), *rest]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, **env}
        process = processes.start(command, log, settings, root)
        try:
            with events.open(encoding="utf-8") as reader:
                while True:
                    code, in_time = process.poll(), time.monotonic() < deadline
                    _read(reader, rest)
                    for name in [name for name, state in rest.items() if state.is_done]:
                        yield name, rest.pop(name).row()
                    if code is not None or not in_time:
                        return code
                    time.sleep(0.2)
        finally:
            processes.stop(process)


def _workers(files: int) -> list[str]:
    """pytest-xdist where it is installed and worth its start."""
    if importlib.util.find_spec("xdist") is None or files < LEAST_FILES_FOR_WORKERS:
        return []
    return ["-n", str(min(8, os.cpu_count() or 1))]


def _read(reader: Any, states: Mapping[str, File]) -> None:
    while line := reader.readline():
        event = json.loads(line)
        state = states.get(event["file"])
        if state is None:
            continue
        if "collected" in event:
            state.collected = event["collected"]
        elif "lacking" in event and "test" not in event:
            state.lacking = event["lacking"]
        else:
            _note(state, event)


def _note(state: File, event: Mapping[str, Any]) -> None:
    test, outcome = event["test"], event["outcome"]
    state.seconds += event["seconds"]
    if outcome == "failed":
        state.failures[test] = event["why"]
    if outcome != "passed" or event["when"] == "teardown":
        state.outcomes.setdefault(test, outcome)
    if outcome == "failed" and test in state.outcomes:
        state.outcomes[test] = outcome
