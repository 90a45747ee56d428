"""From a lab's folder into the repository: benchmarks/results/<machine>/, and the evidence that the package carries.

`evidence.json` is made from the committed records alone, so that it can be made again and compared: one row for each
op, backend, source and compute capability that a CUDA record found right. A record published for a machine replaces the
one before, and with it what that said of sources that have changed since. Needs no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT
from benchmarks.record import CORRECTNESS, MET, TABLE_NAME, Record, Row, is_red, table, write_atomically

RESULTS = ROOT / "benchmarks" / "results"
EVIDENCE = ROOT / "lumiere_fast" / "evidence.json"


def publish(folder: Path, results: Path = RESULTS, evidence: Path = EVIDENCE) -> str:
    """Copy the folder's record and table, and write the evidence anew; tells what was done.

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
    found = evidence_of(results)
    write_atomically(evidence, as_json(found))
    shown = evidence.relative_to(ROOT) if evidence.is_relative_to(ROOT) else evidence
    return f"{len(record.rows)} rows in results/{name} ({replaced}); {len(found)} rows in {shown}"


def machine_of(folder: Path, rows: Iterable[Row]) -> str:
    """The folder's name in results: the GPU's, or for a CPU record the CPU's."""
    names = {row["gpu"] or f"cpu {row['cpu']}" for row in rows if row["device"] is not None}
    if len(names) != 1:
        raise ValueError(f"{folder} must hold the record of one machine, it has {', '.join(sorted(names)) or 'none'}")
    return re.sub(r"[^a-z0-9]+", "-", names.pop().lower()).strip("-")


def evidence_of(results: Path) -> list[dict[str, Any]]:
    """From every record under `results`, sorted; the newest where two machines of a capability agree."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for path in sorted(results.glob("*/record.json")):
        for row in green_kernels(list(Record(path.parent).rows.values())):
            key = tuple(row[name] for name in ("op", "backend", "source", "capability"))
            if key not in found or row["date"] > found[key]["date"]:
                found[key] = row
    return [found[key] for key in sorted(found)]


def green_kernels(rows: list[Row]) -> Iterable[dict[str, Any]]:
    """Kernels that a GPU's smoke found right and that no red row speaks against."""
    from benchmarks.lab import accuses

    red = [row for row in rows if is_red(row) and row["stage"] in CORRECTNESS]
    for row in rows:
        proved = row["stage"] == "smoke" and row["verdict"] == MET and row["device"] == "cuda" and row["source"]
        if proved and not any(accuses(each, row["op"], row["backend"]) for each in red):
            versions = {name: row["versions"].get(name) for name in ("torch", "triton", "cuda")}
            origin = {name: row[name] for name in ("op", "backend", "source", "gpu", "capability", "commit")}
            yield {**origin, "date": row["date"][:10], **versions}


def as_json(records: list[dict[str, Any]]) -> str:
    return json.dumps({"records": records}, indent=1) + "\n"
