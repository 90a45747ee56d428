"""Publishing a record: where it goes, what becomes evidence and what does not; and the package's own evidence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import publish
from benchmarks.record import Record
from lumiere_fast.evidence import Evidence


def row(stage: str = "smoke", verdict: str = "met", **changes: Any) -> dict[str, Any]:
    about = {"op": "blend_windows", "backend": "triton", "scenario": None, "dtype": None, "threads": None}
    found = {"goal": None, "measured": None, "ratio": None, "why": None, "numbers": None, "seconds": 1.0, "left": False}
    origin = {"source": "aaaa", "commit": "c" * 40, "dirty": False, "date": "2026-11-23T07:00:00Z"}
    machine = {"device": "cuda", "gpu": "NVIDIA H200", "capability": "9.0", "driver": "580", "cpu": "AMD EPYC"}
    versions = {"torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0", "python": "3.12"}
    return {"stage": stage, "verdict": verdict, **about, **found, **origin, **machine, "versions": versions, **changes}


CPU = {"device": "cpu", "gpu": None, "capability": None, "driver": None}


class Shelf:
    """A results folder and an evidence file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results, self.evidence = folder, folder / "results", folder / "evidence.json"
        self.number = 0

    def publish(self, *rows: dict[str, Any]) -> list[dict[str, Any]]:
        self.number += 1
        record = Record(self.folder / f"lab{self.number}")
        for each in rows:
            record.put(each)
        publish.publish(record.folder, self.results, self.evidence)
        return self.records()

    def records(self) -> list[dict[str, Any]]:
        return list(json.loads(self.evidence.read_text())["records"])


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def test_a_green_kernel_of_a_gpu_becomes_evidence(shelf: Shelf) -> None:
    assert shelf.publish(row(), row("benchmarks", "missed", scenario="big")) == [
        {
            "op": "blend_windows",
            "backend": "triton",
            "source": "aaaa",
            "gpu": "NVIDIA H200",
            "capability": "9.0",
            "commit": "c" * 40,
            "date": "2026-11-23",
            "torch": "2.11.0",
            "triton": "3.6.0",
            "cuda": "13.0",
        }
    ]
    assert set(shelf.records()[0]) == {field.name for field in dataclasses.fields(Evidence)}
    folder = shelf.results / "nvidia-h200"
    assert len(Record(folder).rows) == 2 and "big" in (folder / "table.md").read_text()


@pytest.mark.parametrize(
    "rows",
    [
        [row(verdict="failed")],
        [row(verdict="skipped")],
        [row(source=None)],
        [row(), row("tests", "failed", backend=None, scenario="t", failures=["test_x[triton]"])],
        [row(), row("tests", "failed", backend=None, scenario="t", failures=["test_x"])],
    ],
)
def test_what_is_red_or_unchecked_is_no_evidence(shelf: Shelf, rows: list[dict[str, Any]]) -> None:
    assert shelf.publish(*rows) == []


def test_another_backend_s_failure_does_not_count(shelf: Shelf) -> None:
    red = row("tests", "failed", backend=None, scenario="t", failures=["test_x[cuda]"])
    assert [each["backend"] for each in shelf.publish(row(), row(backend="cuda"), red)] == ["triton"]


def test_a_cpu_record_is_kept_and_is_never_evidence(shelf: Shelf) -> None:
    assert shelf.publish(row(backend="cpu", **CPU)) == []
    assert (shelf.results / "cpu-amd-epyc" / "record.json").exists()


def test_a_new_record_replaces_what_the_old_one_said(shelf: Shelf) -> None:
    shelf.publish(row(), row(op="group_norm"))
    changed = shelf.publish(row(source="bbbb"), row(op="group_norm"))
    assert [(each["op"], each["source"]) for each in changed] == [("blend_windows", "bbbb"), ("group_norm", "aaaa")]


def test_records_of_several_gpus_stand_side_by_side(shelf: Shelf) -> None:
    shelf.publish(row())
    both = shelf.publish(row(gpu="NVIDIA A100", capability="8.0"))
    assert [each["capability"] for each in both] == ["8.0", "9.0"]
    for newer in ({"gpu": "NVIDIA H100", "date": "2026-12-01"}, {"gpu": "NVIDIA H300", "date": "2026-12-02"}):
        assert [each["gpu"] for each in shelf.publish(row(**newer))] == ["NVIDIA A100", newer["gpu"]]


def test_publishing_again_changes_nothing(shelf: Shelf) -> None:
    rows = [row(), row(op="group_norm"), row(backend="cuda")]
    shelf.publish(*rows)
    before = shelf.evidence.read_bytes()
    shelf.publish(*reversed(rows))
    assert shelf.evidence.read_bytes() == before


def test_a_record_of_two_machines_or_of_none_is_refused(shelf: Shelf) -> None:
    with pytest.raises(ValueError, match=r"one machine.*NVIDIA A100, NVIDIA H200"):
        shelf.publish(row(), row(op="group_norm", gpu="NVIDIA A100"))
    with pytest.raises(ValueError, match="it has none"):
        publish.publish(shelf.folder / "nothing", shelf.results, shelf.evidence)
    assert not shelf.evidence.exists() and not shelf.results.exists()


def test_the_package_s_evidence_is_what_the_committed_records_give() -> None:
    assert publish.EVIDENCE.exists()
    content = json.loads(publish.EVIDENCE.read_text())
    assert content == {"records": publish.evidence_of(publish.RESULTS)}
