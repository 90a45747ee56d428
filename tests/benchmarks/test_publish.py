"""Publishing a record: where it goes, what becomes evidence and what does not; and the package's own evidence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import publish
from benchmarks.record import Record
from lumiere_fast import native
from lumiere_fast.evidence import Evidence, source_hash


def row(stage: str = "smoke", verdict: str = "met", **changes: Any) -> dict[str, Any]:
    about = {"op": "blend_windows", "backend": "triton", "scenario": None, "dtype": None, "threads": None}
    found = {"goal": None, "measured": None, "ratio": None, "why": None, "numbers": None, "seconds": 1.0, "left": False}
    origin = {"source": "aaaa", "commit": "c" * 40, "dirty": False, "tree": "t1", "date": "2026-11-23T07:00:00Z"}
    machine = {"device": "cuda", "gpu": "NVIDIA H200", "capability": "9.0", "driver": "580", "cpu": "AMD EPYC"}
    versions = {"torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0", "python": "3.12"}
    return {"stage": stage, "verdict": verdict, **about, **found, **origin, **machine, "versions": versions, **changes}


def suite_row(file: str, verdict: str = "met", **changes: Any) -> dict[str, Any]:
    about = {"op": None, "backend": None, "scenario": f"tests/{file}.py", "source": "t1"}
    return row("tests", verdict, **{**about, **changes})


def proof(backend: str = "triton", op: str = "blend_windows", **changes: Any) -> list[dict[str, Any]]:
    """Everything that a kernel needs, each row with the changes."""
    files = [f"kernels/test_{op}"] if backend == "triton" else ["test_native", "test_native_core"]
    smoke = row(op=op, backend=backend, **changes)
    changes.pop("source", None)
    tests = [suite_row(f"ops/test_{op}", op=op, **changes), *(suite_row(file, **changes) for file in files)]
    return [smoke, *tests]


def without(rows: list[dict[str, Any]], stage: str, file: str = "") -> list[dict[str, Any]]:
    return [row for row in rows if row["stage"] != stage or file not in str(row["scenario"])]


def changed(rows: list[dict[str, Any]], stage: str, file: str = "", **changes: Any) -> list[dict[str, Any]]:
    hits = [row["stage"] == stage and file in str(row["scenario"]) for row in rows]
    assert any(hits)
    return [{**row, **changes} if hit else row for row, hit in zip(rows, hits, strict=True)]


CPU = {"device": "cpu", "gpu": None, "capability": None, "driver": None}


class Shelf:
    """A results folder and an evidence file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results, self.evidence = folder, folder / "results", folder / "evidence.json"
        self.number, self.sources, self.told = 0, {"blend_windows": "aaaa", "group_norm": "aaaa"}, ""

    def source(self, op: str, backend: str) -> str | None:
        return self.sources.get(op)

    def publish(self, *rows: dict[str, Any]) -> list[dict[str, Any]]:
        self.number += 1
        record = Record(self.folder / f"lab{self.number}")
        for each in rows:
            record.put(each)
        self.told = publish.publish(record.folder, self.results, self.evidence, self.source)
        return self.records()

    def records(self) -> list[dict[str, Any]]:
        return list(json.loads(self.evidence.read_text())["records"])


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def test_a_green_kernel_of_a_gpu_becomes_evidence(shelf: Shelf) -> None:
    assert shelf.publish(*proof(), row("benchmarks", "missed", scenario="big")) == [
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
    assert len(Record(folder).rows) == 4 and "big" in (folder / "table.md").read_text()


OPS, KERNELS = "tests/ops/test_blend_windows.py", "tests/kernels/test_blend_windows.py"
SANITIZER = row("sanitizer", "failed", op=None, backend=None, scenario="self-check, memcheck")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (changed(proof(), "smoke", verdict="failed", why="off by 3e-2"), "its smoke is failed: off by 3e-2"),
        (changed(proof(), "smoke", verdict="skipped", why="no Triton"), "its smoke is skipped: no Triton"),
        (changed(proof(), "smoke", backend=None, verdict="failed"), "smoke blend_windows is red"),
        (changed(proof(), "smoke", source=None), "its source is not the one that ran"),
        (changed(proof(), "smoke", source="bbbb"), "its source is not the one that ran"),
        (without(proof(), "tests"), f"{OPS} did not run; {KERNELS} did not run"),
        (without(proof(), "tests", "kernels/"), f"{KERNELS} did not run"),
        (changed(proof(), "tests", "ops/", verdict="skipped", left=True), f"{OPS} did not run"),
        (changed(proof(), "tests", "ops/", verdict="skipped"), f"{OPS} is skipped"),
        (changed(proof(), "tests", "ops/", verdict="failed", failures=["test_x"]), f"{OPS} is failed"),
        (changed(proof(), "tests", "ops/", verdict="failed", failures=["test_x[cuda]"]), f"{OPS} is failed"),
        (changed(proof(), "tests", "kernels/", verdict="failed", failures=["test_x"]), f"{KERNELS} is failed"),
        (changed(proof(), "tests", "kernels/", tree="t0"), f"{KERNELS} ran on other sources"),
        (changed(proof(), "tests", "kernels/", dirty=True), f"{KERNELS} ran on other sources"),
        (proof(tree=None), f"{OPS} ran on other sources; {KERNELS} ran on other sources"),
        (changed(proof(), "tests", "ops/", versions={"torch": "2.12.0"}), f"{OPS} ran on another machine or with"),
        (changed(proof(), "smoke", dirty=True), f"what ran is no commit: {'c' * 40} with changes"),
        (proof(commit="unknown"), "what ran is no commit: unknown with changes"),
        ([*proof(), SANITIZER], "sanitizer self-check, memcheck is red"),
        ([*proof(), row("build", "failed", op=None, backend=None)], "build is red"),
        ([*proof(), suite_row("x", "failed", op="blend_windows", failures=["t"])], "tests blend_windows tests/x.py is"),
    ],
)  # fmt: skip
def test_what_is_red_or_unchecked_is_no_evidence_and_why(shelf: Shelf, rows: list[dict[str, Any]], told: str) -> None:
    assert shelf.publish(*rows) == []
    (line,) = (line for line in shelf.told.splitlines() if line.startswith("blend_windows triton: "))
    assert line.startswith(f"blend_windows triton: no evidence: {told}")
    assert shelf.publish(*proof()) and "blend_windows triton: evidence" in shelf.told.splitlines()


def test_times_alone_are_no_evidence(shelf: Shelf) -> None:
    """What `--part speed` leaves in a folder."""
    build, times = row("build", op=None, backend=None), [row("benchmarks", scenario=name) for name in ("a", "b")]
    assert shelf.publish(build, row(), *times) == []
    assert "did not run" in shelf.told


@pytest.mark.parametrize("file", publish.NATIVE_TESTS)
def test_a_native_kernel_needs_the_native_core_s_tests(shelf: Shelf, file: str) -> None:
    rows = proof("cuda")
    assert [each["backend"] for each in shelf.publish(*rows)] == ["cuda"]
    assert shelf.publish(*without(rows, "tests", file)) == [] and f"{file} did not run" in shelf.told
    assert shelf.publish(*changed(rows, "tests", file, verdict="failed", failures=[])) == []


def test_the_native_core_s_tests_are_those_of_the_tree() -> None:
    found = (path.relative_to(publish.ROOT).as_posix() for path in (publish.ROOT / "tests").glob("test_native*.py"))
    assert tuple(sorted(found)) == publish.NATIVE_TESTS


def test_another_backend_s_failure_does_not_count(shelf: Shelf) -> None:
    rows = [*proof(), *changed(proof("cuda"), "smoke", verdict="failed"), suite_row("test_native_core", "failed")]
    assert [each["backend"] for each in shelf.publish(*rows)] == ["triton"]


def test_a_kernel_that_changed_since_is_no_longer_evidence(shelf: Shelf) -> None:
    assert shelf.publish(*proof())
    shelf.sources["blend_windows"] = "bbbb"
    assert shelf.publish(*proof(gpu="NVIDIA A100", capability="8.0")) == []


def test_the_source_now_is_the_one_that_evidence_goes_by() -> None:
    assert publish.present_source("blend_windows", "triton") == source_hash("blend_windows", "triton")
    assert publish.present_source("blend_windows", "cuda") == native.hash_of_sources("blend_windows")
    assert publish.present_source("no_such_op", "triton") is None


def test_a_cpu_record_is_kept_and_is_never_evidence(shelf: Shelf) -> None:
    assert shelf.publish(row(backend="cpu", **CPU)) == []
    assert (shelf.results / "cpu-amd-epyc" / "record.json").exists()


def test_a_new_record_replaces_what_the_old_one_said(shelf: Shelf) -> None:
    shelf.publish(*proof(), *proof(op="group_norm"))
    shelf.sources["blend_windows"] = "bbbb"
    both = shelf.publish(*proof(source="bbbb"), *proof(op="group_norm"))
    assert [(each["op"], each["source"]) for each in both] == [("blend_windows", "bbbb"), ("group_norm", "aaaa")]


def test_records_of_several_gpus_stand_side_by_side(shelf: Shelf) -> None:
    shelf.publish(*proof())
    both = shelf.publish(*proof(gpu="NVIDIA A100", capability="8.0"))
    assert [each["capability"] for each in both] == ["8.0", "9.0"]
    for newer in ({"gpu": "NVIDIA H100", "date": "2026-12-01"}, {"gpu": "NVIDIA H300", "date": "2026-12-02"}):
        assert [each["gpu"] for each in shelf.publish(*proof(**newer))] == ["NVIDIA A100", newer["gpu"]]


def test_publishing_again_changes_nothing(shelf: Shelf) -> None:
    rows = [*proof(), *proof(op="group_norm"), *proof("cuda")[:1], *proof("cuda")[2:]]
    assert len(shelf.publish(*rows)) == 3
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
    rows = [row for row in content.pop("records") if publish.present_source(row["op"], row["backend"]) == row["source"]]
    assert rows == publish.evidence_of(publish.RESULTS) and content == {}
