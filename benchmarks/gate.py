"""The static gate of resources.py as rows of the lab's record: one for each op and backend. Needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import processes
from benchmarks.record import FAILED, MET, SKIPPED

KEPT, BROKEN, NO_KERNEL, NOTHING_COMPILED = 0, 1, 2, 3  # exit codes; any other means that it did not run
GATE = (sys.executable, "-m", "benchmarks.resources", "--json")

Row = dict[str, Any]


def rows(op: str | None, log: Path, deadline: float) -> list[Row] | None:
    """Of one op or of all; None if the deadline came first."""
    if time.monotonic() >= deadline:
        return None
    command = [*GATE, *([] if op is None else ["--op", op])]
    process = processes.start(command, log, {"TRITON_INTERPRET": "0"}, stdout=subprocess.PIPE)
    try:
        told, _ = process.communicate(timeout=deadline - time.monotonic())
    except subprocess.TimeoutExpired:
        return None
    finally:
        processes.stop(process)
    if op is not None and process.returncode == NO_KERNEL:
        return [{"op": op, "verdict": SKIPPED, "why": "no kernel of it ships"}]
    if process.returncode not in (KEPT, BROKEN, NOTHING_COMPILED):
        return [{"op": op, "verdict": FAILED, "why": f"{processes.died(process.returncode)}; see {log.name}"}]
    found = json.loads(told)
    kernels = sorted({(row["op"], row["backend"]) for row in found["rows"]})
    return [summary(*kernel, found["rows"], found["broken"]) for kernel in kernels]


def summary(op: str, backend: str, compiled: Sequence[Row], broken: Sequence[str]) -> Row:
    """What there is to say of the kernels of one op and backend; `broken` names them as `op backend kernel`."""
    mine = [row for row in compiled if (row["op"], row["backend"]) == (op, backend)]
    there = [row for row in mine if row["missing"] is None]
    against = [told for told in broken if f": {op} {backend} " in told]
    row: Row = {"op": op, "backend": backend}
    if against:
        return {**row, "verdict": FAILED, "why": "; ".join(against)}
    if not there:
        return {**row, "verdict": SKIPPED, "why": mine[0]["missing"]}
    most = max(each["registers"] for each in there)
    lacking = f", {len(mine) - len(there)} not compiled" if len(there) < len(mine) else ""
    return {**row, "verdict": MET, "measured": f"{len(there)} variants, at most {most} registers{lacking}"}
