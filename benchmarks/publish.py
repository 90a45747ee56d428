"""From a lab's folder into the repository: benchmarks/results/<machine>/, and the evidence that the package carries.

`evidence.json` is made from the committed records alone, so that it can be made again and compared: one row for each
op, backend and compute capability whose kernel, as it is in the tree now, a record shows to be right. For that a GPU's
record must hold, all from one clean tree, machine and set of versions: the kernel's smoke and the test files of
`tests_of`, green; and nothing red that speaks against it, such as a finding of the sanitizer. Times prove nothing. A
record published for a machine replaces the one before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT
from benchmarks.record import MET, TABLE_NAME, Record, Row, is_current, is_red, table, write_atomically

RESULTS = ROOT / "benchmarks" / "results"
EVIDENCE = ROOT / "lumiere_fast" / "evidence.json"
KERNELS = ("triton", "wgmma", "cuda")
NATIVE_TESTS = ("tests/test_native.py", "tests/test_native_core.py")
LONGEST_REASON = 200

Source = Callable[[str, str], str | None]
"""`source(op, backend)` of a kernel as it is now; None if there is none."""


def present_source(op: str, backend: str) -> str | None:
    """Of the tree, whatever is built. Imports the package."""
    from lumiere_fast import kernels, native

    try:
        return kernels.source_hash(op) if backend == "triton" else native.hash_of_sources(op)
    except FileNotFoundError:
        return None


def publish(folder: Path, results: Path = RESULTS, evidence: Path = EVIDENCE, source: Source = present_source) -> str:
    """Copy the folder's record and table, and write the evidence anew; tells what was done, and of each kernel whether
    the record is evidence for it or why not.

    Raises:
        ValueError: the folder has no record, or rows of several machines.
    """
    record = Record(folder)
    name = machine_of(folder, record.rows.values())
    target = results / name
    replaced = "replacing what was there" if target.exists() else "new"
    published = Record(target)
    published.rows = record.rows
    published.save()
    write_atomically(target / TABLE_NAME, table(record.sorted_rows()) + "\n")
    found = evidence_of(results, source)
    write_atomically(evidence, as_json(found))
    shown = evidence.relative_to(ROOT) if evidence.is_relative_to(ROOT) else evidence
    told = f"{len(record.rows)} rows in results/{name} ({replaced}); {len(found)} rows in {shown}"
    return "\n".join([told, *verdicts(list(record.rows.values()), source)])


def verdicts(rows: Sequence[Row], source: Source) -> list[str]:
    """A line for each kernel that the record's smoke tells of."""
    lines = []
    for op in sorted({row["op"] for row in rows if row["stage"] == "smoke"}):
        for backend in KERNELS:
            reasons = reasons_against(rows, op, backend, source(op, backend))
            told = f"no evidence: {'; '.join(reasons)}" if reasons else "evidence"
            lines.append(f"{op} {backend}: {told}")
    return lines


def machine_of(folder: Path, rows: Iterable[Row]) -> str:
    """The folder's name in results: the GPU's, or for a CPU record the CPU's."""
    names = {row["gpu"] or f"cpu {row['cpu']}" for row in rows if row["device"] is not None}
    if len(names) != 1:
        raise ValueError(f"{folder} must hold the record of one machine, it has {', '.join(sorted(names)) or 'none'}")
    return re.sub(r"[^a-z0-9]+", "-", names.pop().lower()).strip("-")


def evidence_of(results: Path, source: Source = present_source) -> list[dict[str, Any]]:
    """From every record under `results`, sorted; the newest where two machines of a capability agree."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for path in sorted(results.glob("*/record.json")):
        for row in green_kernels(list(Record(path.parent).rows.values()), source):
            key = tuple(row[name] for name in ("op", "backend", "source", "capability"))
            if key not in found or row["date"] > found[key]["date"]:
                found[key] = row
    return [found[key] for key in sorted(found)]


def green_kernels(rows: Sequence[Row], source: Source) -> Iterable[dict[str, Any]]:
    """The evidence that a record's rows are."""
    for row in rows:
        kernel = row["stage"] == "smoke" and row["backend"] in KERNELS
        if kernel and not reasons_against(rows, row["op"], row["backend"], source(row["op"], row["backend"])):
            versions = {name: row["versions"].get(name) for name in ("torch", "triton", "cuda")}
            origin = {name: row[name] for name in ("op", "backend", "source", "gpu", "capability", "commit")}
            yield {**origin, "date": row["date"][:10], **versions}


def tests_of(op: str, backend: str) -> tuple[str, ...]:
    """The test files that a kernel must have passed."""
    from lumiere_fast.kernels import HOMES

    op = HOMES.get(op, op)
    triton = tuple(f"tests/kernels/test_{op}{part}.py" for part in ("", "_backward"))
    own = tuple(file for file in triton if (ROOT / file).is_file()) if backend == "triton" else NATIVE_TESTS
    return (f"tests/ops/test_{op}.py", *own)


def reasons_against(rows: Sequence[Row], op: str, backend: str, source: str | None) -> list[str]:
    """Why a record is no evidence for a kernel whose source is `source` now; empty if it is."""
    from benchmarks.lab import accuses

    files = tests_of(op, backend)
    red = [row for row in rows if is_red(row) and (row["stage"] == "build" or accuses(row, op, backend))]
    others = [f"{_name(row)} is red" for row in red if row["scenario"] not in files]
    smoke = next(
        (row for row in rows if row["stage"] == "smoke" and (row["op"], row["backend"]) == (op, backend)), None
    )
    if smoke is None:
        return others or ["its smoke did not run"]
    if smoke["device"] != "cuda":
        return ["it did not run on a GPU"]
    if smoke["verdict"] != MET:
        return [f"its smoke is {smoke['verdict']}: {' '.join((smoke['why'] or '').split())[:LONGEST_REASON]}"]
    tests = {row["scenario"]: row for row in rows if row["stage"] == "tests"}
    reasons = [_against_run(tests.get(file), file, smoke) for file in files]
    return [reason for reason in (*_against_source(smoke, source), *reasons, *others) if reason]


def _against_source(smoke: Row, source: str | None) -> list[str]:
    changed = smoke["source"] is None or smoke["source"] != source
    reasons = ["its source is not the one that ran"] if changed else []
    if smoke["dirty"] or smoke["commit"] == "unknown":
        reasons.append(f"what ran is no commit: {smoke['commit']} with changes")
    return reasons


def _against_run(row: Row | None, file: str, smoke: Row) -> str | None:
    """What is wrong with a test file's row, as a proof of what the smoke ran."""
    if row is None or row["left"]:
        return f"{file} did not run"
    if row["verdict"] != MET:
        return f"{file} is {row['verdict']}"
    if row["dirty"] or row.get("tree") is None or row.get("tree") != smoke.get("tree"):
        return f"{file} ran on other sources"
    return None if is_current(row, row["source"], smoke) else f"{file} ran on another machine or with other versions"


def _name(row: Row) -> str:
    return " ".join(str(part) for part in (row["stage"], row["op"], row["backend"], row["scenario"]) if part)


def as_json(records: list[dict[str, Any]]) -> str:
    return json.dumps({"records": records}, indent=1) + "\n"
