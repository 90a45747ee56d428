"""Kernels under compute-sanitizer, which finds bad memory accesses and races. Needs no torch.

Two kinds of program run under it: the package's self-check of every kernel on the GPU, each tensor in an allocation of
its own, so that a step outside of one is seen; and the native core's C tests.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import processes
from benchmarks.provenance import ROOT
from benchmarks.record import FAILED, MET, SKIPPED

TOOLS = {"memcheck": ("--report-api-errors", "no"), "racecheck": ()}
FOUND_SOMETHING = 86  # the exit code we ask it for
BUILD = ROOT / "build" / "lab-native"
NO_CUDA_CALL = "Target application terminated before first instrumented API call"
SANITIZER = "/usr/local/cuda/bin/compute-sanitizer"  # where the toolkit puts it, if it is not on the PATH
OUTPUT = "sanitizer.log"

SELF_CHECK = """
import sys
from lumiere_fast import selftest
checks = selftest.run("cuda")
print(*checks, sep="\\n")
sys.exit(any(check.status == "failed" for check in checks))
"""

Row = dict[str, Any]


def rows(on_gpu: bool, log: Path, deadline: float, holds: Callable[[Row], bool]) -> Iterator[Row]:
    """One for each program and tool; those that `holds` knows are not run again, and those left have only "left"."""
    tool = shutil.which("compute-sanitizer") or shutil.which(SANITIZER)
    if not on_gpu or tool is None:
        yield {"verdict": SKIPPED, "why": "compute-sanitizer is not installed" if on_gpu else "the run is not on a GPU"}
        return
    own_allocations = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    yield from _checked("self-check", [sys.executable, "-c", SELF_CHECK], own_allocations, tool, log, deadline, holds)
    lacking = [name for name in ("cmake", "ctest", "ninja") if shutil.which(name) is None]
    if lacking:
        yield {"scenario": "C tests", "verdict": SKIPPED, "why": f"{', '.join(lacking)} not installed"}
        return
    code = _build(log, deadline)
    if code is None:
        yield {"scenario": "C tests", "left": True}
    elif code != 0:
        yield {"scenario": "C tests", "verdict": FAILED, "why": f"they do not build: code {code}; see {log.name}"}
    else:
        for name, command in _commands():
            yield from _checked(name, command, {}, tool, log, deadline, holds)


def _build(log: Path, deadline: float) -> int | None:
    configured = processes.run(["cmake", "-S", ".", "-B", str(BUILD), "-G", "Ninja"], log, deadline)
    return configured if configured != 0 else processes.run(["cmake", "--build", str(BUILD)], log, deadline)


def _commands() -> list[tuple[str, list[str]]]:
    listed = subprocess.run(
        ["ctest", "--test-dir", str(BUILD), "--show-only=json-v1"], capture_output=True, text=True, check=True
    )
    return [(test["name"], test["command"]) for test in json.loads(listed.stdout)["tests"]]


def _checked(
    name: str,
    command: list[str],
    env: Mapping[str, str],
    tool: str,
    log: Path,
    deadline: float,
    holds: Callable[[Row], bool],
) -> Iterator[Row]:
    for check, options in TOOLS.items():
        row: Row = {"scenario": f"{name}, {check}"}
        if holds(row):
            continue
        whole = [tool, "--tool", check, "--error-exitcode", str(FOUND_SOMETHING), *options, *command]
        found = _run(whole, env, log.with_name(OUTPUT), deadline)
        yield {**row, **found}
        if found.get("verdict") == SKIPPED:  # a program without CUDA calls: no tool sees anything
            return


def _run(command: list[str], env: Mapping[str, str], output: Path, deadline: float) -> Row:
    if time.monotonic() >= deadline:
        return {"left": True}
    before = output.stat().st_size if output.exists() else 0
    code = processes.run(command, output, deadline, env)
    if code is None:
        return {"left": True}
    with output.open(encoding="utf-8", errors="replace") as file:
        file.seek(before)
        told = file.read()
    if NO_CUDA_CALL in told:
        return {"verdict": SKIPPED, "why": "it makes no CUDA call"}
    if code == 0:
        return {"verdict": MET, "measured": "nothing found"}
    return {"verdict": FAILED, "why": f"code {code}; see {output.name}"}
