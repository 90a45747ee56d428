"""The lab's record: one JSON file of rows, written anew after each, and the table made from it. Needs no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.provenance import cpu_name

Row = dict[str, Any]
Key = tuple[Any, ...]

FORMAT = 1
NAME, TABLE_NAME = "record.json", "table.md"
KEY = ("stage", "op", "backend", "scenario", "dtype", "threads")
STAGES = ("build", "smoke", "tests", "sanitizer", "resources", "tuning", "benchmarks")

MET, MISSED, NO_GOAL, FAILED, SKIPPED = "met", "missed", "no goal", "failed", "skipped"
MEASURED = (MET, MISSED, NO_GOAL)
MACHINE = ("device", "gpu", "capability", "cpu", "versions")


class Record:
    """Rows by what they are about; a row put again replaces its predecessor.

    Raises:
        ValueError: the folder holds a record that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[Key, Row] = {}
        path = folder / NAME
        if path.exists():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                if content["format"] != FORMAT:
                    raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
                self.rows = {key_of(row): row for row in content["rows"]}
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path} is not a record of the lab ({error}); move it away to start anew") from error

    def put(self, row: Row) -> None:
        self.rows[key_of(row)] = row
        self.save()

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "rows": self.sorted_rows()}
        write_atomically(self.folder / NAME, json.dumps(content, indent=1) + "\n")

    def find(self, key: Key) -> Row | None:
        return self.rows.get(key)

    def sorted_rows(self) -> list[Row]:
        return sorted(self.rows.values(), key=lambda row: (STAGES.index(row["stage"]), *map(_sortable, key_of(row))))


def _sortable(value: Any) -> tuple[bool, Any]:
    return value is not None, value


def key_of(row: Mapping[str, Any]) -> Key:
    return tuple(row.get(name) for name in KEY)


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def is_current(row: Row | None, source: str | None, machine: Mapping[str, Any]) -> bool:
    """Whether a row tells of this source on this machine with these versions."""
    return row is not None and row["source"] == source and all(row.get(name) == machine.get(name) for name in MACHINE)


def is_red(row: Row) -> bool:
    return bool(row["verdict"] == FAILED)


def this_cpu() -> dict[str, Any]:
    """The machine as far as it is known before the package can be imported."""
    return {"device": None, "gpu": None, "capability": None, "driver": None, "cpu": cpu_name(), "versions": {}}


# ---------------------------------------------------------------- for people

HEAD = ("stage", "op", "backend", "scenario", "dtype", "threads", "verdict", "measured", "against its goal", "note")
LONGEST_NOTE = 200


def table(rows: Iterable[Row]) -> str:
    """Markdown, its columns padded so that it also reads as text."""
    cells = [HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEAD))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def _cells(row: Row) -> tuple[str, ...]:
    key = (str(value) if value is not None else "" for value in key_of(row))
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f} of {row['goal']}"
    note = " ".join((row["why"] or "").split()).replace("|", "/")
    note = note if len(note) <= LONGEST_NOTE else f"{note[:LONGEST_NOTE]}..."
    return (*key, row["verdict"], row["measured"] or "", ratio.replace("|", "/"), note)


def summary(rows: Iterable[Row]) -> str:
    """How many rows there are of each verdict, by stage."""
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        found = counts.setdefault(row["stage"], {})
        found[row["verdict"]] = found.get(row["verdict"], 0) + 1
    return "; ".join(f"{stage}: {', '.join(f'{n} {v}' for v, n in found.items())}" for stage, found in counts.items())
