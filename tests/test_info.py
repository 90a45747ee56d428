from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lumiere_fast import dispatch, evidence, info, native
from lumiere_fast.kernels import PENDING_KERNELS


def test_every_registered_op_and_backend_has_a_place() -> None:
    table = info.reasons_by_op("cpu")
    assert set(table) == set(dispatch.registered_ops())
    assert all(tuple(backends) == dispatch.BACKENDS for backends in table.values())


def test_reasons_are_dispatch_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def answers(op: str, backend: str, *inputs: object, **options: object) -> list[str]:
        asked.append((op, backend))
        return [f"{op} dislikes {backend}"]

    monkeypatch.setattr(dispatch, "why_not", answers)
    table = info.reasons_by_op("cpu")
    assert len(set(asked)) == len(table) * len(dispatch.BACKENDS)
    assert table["temporal_conv"]["triton"] == ["temporal_conv dislikes triton"]


def test_the_reference_runs_everything_and_pending_kernels_say_so() -> None:
    for op, backends in info.reasons_by_op("cpu").items():
        assert backends["reference"] == []
        if op in PENDING_KERNELS:
            assert all("not written yet" in " ".join(backends[name]) for name in ("triton", "cuda"))


def test_collected_facts() -> None:
    report = info.collect()
    assert report["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report["packages"]["torch"] == torch.__version__
    assert report["threads"] == torch.get_num_threads()
    assert report["pending_kernels"] == list(PENDING_KERNELS)


def test_a_package_that_is_missing_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "_PACKAGES", ("torch", "no-such-package-at-all"))
    report = info.collect()
    assert report["packages"] == {"torch": torch.__version__, "no-such-package-at-all": None}
    assert "no-such-package-at-all not installed" in info.render(report)


def test_the_native_core_is_told() -> None:
    report = info.collect()
    assert report["native"]["why_not"] == {half: native.why_not(half) for half in ("cpu", "cuda")}
    for half, reasons in report["native"]["why_not"].items():
        assert f"native core: {half} half: {'; '.join(reasons) or 'built'}" in info.render(report).splitlines()


RECORD = evidence.Evidence(
    "blend_windows", "triton", "abc", "NVIDIA H100", "9.0", "0123456789", "2026-11-20", "2.11.0", "3.6.0", "13.0"
)


def test_evidence_is_told_for_the_present_source_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "records", lambda: (RECORD,))
    monkeypatch.setattr(evidence, "source_hash", lambda op, backend: "abc")
    report = info.collect()
    assert report["evidence"]["blend_windows"] == {"triton": dataclasses.asdict(RECORD), "cuda": None}
    lines = info.render(report).splitlines()
    assert "evidence: blend_windows on triton: right on NVIDIA H100, 2026-11-20, commit 0123456" in lines
    assert "evidence: blend_windows on cuda: not yet run on a GPU" in lines
    assert row_of("blend_windows") == [
        "right on NVIDIA H100 (2026-11-20, 0123456)",
        "-",
        "not yet run on a GPU",
        "tested",
        "-",
    ]
    monkeypatch.setattr(evidence, "source_hash", lambda op, backend: "newer")
    assert info.collect()["evidence"]["blend_windows"] == {"triton": None, "cuda": None}
    assert row_of("blend_windows") == ["not yet run on a GPU", "-", "not yet run on a GPU", "tested", "-"]


def row_of(op: str) -> list[str]:
    (row,) = (line for line in info.readme_table().splitlines() if line.startswith(f"| `{op}` |"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_pending_kernels_are_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    assert row_of("blend_windows")[1] == "-"
    monkeypatch.setattr(info, "PENDING_KERNELS", ("blend_windows",))
    assert row_of("blend_windows")[1] == "to come"


def test_torch_s_own_kernels_are_told_where_they_are_taken() -> None:
    assert row_of("spatial_attention")[4] == "cudnn, flash, efficient"
    assert all(row_of(op)[4] == "-" for op in dispatch.registered_ops() if op != "spatial_attention")


def test_the_readme_holds_the_table() -> None:
    """After a change: `python -m lumiere_fast.info --table`, between the two marks."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    marks = "<!-- kernels: python -m lumiere_fast.info --table -->", "<!-- end of kernels -->"
    assert text.count(marks[0]) == text.count(marks[1]) == 1
    assert text.split(marks[0])[1].split(marks[1])[0].strip() == info.readme_table()


def test_the_chosen_backend_is_told() -> None:
    with dispatch.use_backend("reference"):
        assert info.collect()["backend"] == "reference"


def test_render_shows_each_op_once_in_the_table_and_each_reason_once() -> None:
    report = info.collect()
    report["ops"] = {
        "first": {"triton": ["too old"], "cuda": ["no device", "too old"], "cpu": [], "reference": []},
        "second": {"triton": ["too old"], "cuda": [], "cpu": [], "reference": []},
    }
    lines = info.render(report).splitlines()
    assert [line.split() for line in lines if line.startswith(("first", "second"))] == [
        ["first", "-", "-", "yes", "yes"],
        ["second", "-", "yes", "yes", "yes"],
    ]
    text = "\n".join(lines)
    assert "why not: too old\n  triton: every op\n  cuda: first\n" in text
    assert "why not: no device\n  cuda: first\n" in text
    assert all(name in lines[-1] for name in PENDING_KERNELS)


def test_the_module_runs_and_its_json_is_the_report() -> None:
    command = [sys.executable, "-m", "lumiere_fast.info"]
    printed = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert set(printed) == set(info.Info.__annotations__)
    assert printed["ops"] == info.reasons_by_op("cuda" if torch.cuda.is_available() else "cpu")
    assert "kernels pending: " in subprocess.run(command, capture_output=True, text=True, check=True).stdout
