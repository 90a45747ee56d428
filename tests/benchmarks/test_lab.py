"""The lab: what it keeps, renews, leaves and refuses to time, on workers played here; and once the real thing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from benchmarks import gate, lab, provenance, sanitizer, suite
from benchmarks.lab import Lab, Options
from benchmarks.record import Record, key_of

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {
    "device": "cuda",
    "gpu": "NVIDIA Imaginary",
    "capability": "9.0",
    "driver": "1.2",
    "cpu": "some",
    "cores": 2,
    "versions": {"torch": "2.13.0", "triton": "3.7.1", "cuda": "13.0"},
}


def unit(op: str, backend: str, traffic: int = 1, source: str = "s1") -> dict[str, Any]:
    key = {"stage": "benchmarks", "op": op, "backend": backend, "scenario": "big", "dtype": "bfloat16", "threads": 1}
    return {**key, "source": source, "traffic": traffic}


CASES = tuple(
    {**unit("blend_windows", "triton", number), "stage": "tuning", "scenario": case, "dtype": None, "threads": None}
    for number, case in enumerate(("narrow", "wide"))
)


class Played(Lab):
    """A lab whose build, description and workers are told here."""

    units: Sequence[dict[str, Any]] = (unit("blend_windows", "triton"), unit("blend_windows", "reference"))
    cases: Sequence[dict[str, Any]] = ()
    winners: Mapping[str, int] = MappingProxyType({"narrow": 2, "wide": 1})
    wrong: frozenset[tuple[str, str]] = frozenset()
    machine_here = MACHINE
    slow = 0.0

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.performed: list[tuple[str, ...]] = []
        self.asked: list[dict[str, Any]] = []

    def build(self, deadline: float) -> None:
        self.put("build", {"verdict": "met"}, "b")

    def ask(self, deadline: float) -> dict[str, Any] | None:
        return {
            "ops": ["blend_windows"],
            "tuning": self.cases,
            "configs": "nvidia-imaginary.json",
            "benchmarks": self.units,
            "machine": dict(self.machine_here),
        }

    def work(self, units: Any, deadline: float) -> Iterator[tuple[Any, Any]]:
        for each in units:
            time.sleep(self.slow)
            if time.monotonic() >= deadline:
                return
            self.performed.append((each["stage"], each["op"], each.get("backend", "")))
            self.asked.append(each)
            perform = {"smoke": self.smoked, "tuning": self.tuned_one, "benchmarks": self.timed}
            yield each, perform[each["stage"]](each)

    def smoked(self, each: Any) -> Any:
        backends = [unit["backend"] for unit in self.units if unit["backend"] != "reference"]
        return [
            {
                "op": each["op"],
                "backend": backend,
                "verdict": "failed" if (each["op"], backend) in self.wrong else "met",
                "why": "off by 3e-2" if (each["op"], backend) in self.wrong else None,
                "source": "s1",
            }
            for backend in backends
        ]

    def tuned_one(self, each: Any) -> Any:
        numbers = {"op": each["op"], "config": {"block": self.winners[each["scenario"]]}, "default": {"block": 1}}
        return [{"verdict": "met", "measured": "2.00x the default", "numbers": numbers}]

    def timed(self, each: Any) -> Any:
        return [
            {"verdict": "met", "measured": "1.00 ms", "goal": ">= 2x x", "ratio": 1.5, "numbers": {"median_s": 1e-3}}
        ]


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., tuple[int, Played]]:
    def run(part: str = "speed", budget: float = 60.0, **changes: Any) -> tuple[int, Played]:
        options = {name: changes.pop(name) for name in ("ops", "scenarios") if name in changes}
        played = type("Here", (Played,), changes)(Options(tmp_path / "out", budget, part, **options))
        return played.run(), played

    return run


def rows_of(played: Lab, stage: str) -> dict[str, dict[str, Any]]:
    """By backend."""
    content = json.loads((played.options.out / "record.json").read_text())
    return {row["backend"]: row for row in content["rows"] if row["stage"] == stage}


# ---------------------------------------------------------------- rows and resuming


def test_a_row_tells_where_it_comes_from(play: Any) -> None:
    code, played = play()
    row = rows_of(played, "benchmarks")["triton"]
    assert code == 0
    for name in ("gpu", "capability", "driver", "versions"):
        assert row[name] == MACHINE[name]
    assert row["source"] == "s1" and row["threads"] == 1 and row["dtype"] == "bfloat16"
    assert len(row["commit"]) == 40 and row["dirty"] in (True, False) and row["date"].endswith("Z")
    assert (row["verdict"], row["goal"], row["measured"], row["ratio"]) == ("met", ">= 2x x", "1.00 ms", 1.5)
    assert row["tree"] == provenance.hash_of(*provenance.TESTED)


def test_a_commit_is_believed_only_where_there_is_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "commit", lambda: ("unknown", True))
    assert provenance.commit_as(None) == {"commit": "unknown", "dirty": True}
    assert provenance.commit_as("c1") == {"commit": "c1", "dirty": False}
    monkeypatch.setattr(provenance, "commit", lambda: ("c1", True))
    assert provenance.commit_as("c1") == provenance.commit_as(None) == {"commit": "c1", "dirty": True}
    with pytest.raises(ValueError, match="this one's is c1, got c2"):
        provenance.commit_as("c2")


def test_a_second_run_measures_nothing_again_but_the_smoke(play: Any) -> None:
    _, first = play()
    assert [stage for stage, *_ in first.performed] == ["smoke", "benchmarks", "benchmarks"]
    _, second = play()
    assert second.performed == [("smoke", "blend_windows", "")]
    assert rows_of(second, "benchmarks") == rows_of(first, "benchmarks")


def test_what_failed_is_tried_again(play: Any) -> None:
    assert play(timed=lambda self, each: "no answer within 180 s")[0] == 1
    code, second = play()
    assert code == 0 and [stage for stage, *_ in second.performed] == ["smoke", "benchmarks", "benchmarks"]
    assert {row["verdict"] for row in rows_of(second, "benchmarks").values()} == {"met"}


@pytest.mark.parametrize(
    "change",
    [
        {"machine_here": {**MACHINE, "versions": {**MACHINE["versions"], "torch": "2.14.0"}}},
        {"units": [unit("blend_windows", "triton", source="s2"), unit("blend_windows", "reference", source="s2")]},
    ],
)
def test_other_versions_and_other_source_are_measured_again(play: Any, change: dict[str, Any]) -> None:
    play()
    _, second = play(**change)
    assert [backend for stage, _, backend in second.performed if stage == "benchmarks"] == ["triton", "reference"]


def test_another_machine_is_refused(play: Any) -> None:
    play()
    with pytest.raises(ValueError, match=r"NVIDIA Imaginary.*NVIDIA Other.*another folder"):
        play(machine_here={**MACHINE, "gpu": "NVIDIA Other"})


def test_the_stalest_come_first_then_kernels_then_the_cheapest(play: Any) -> None:
    units = [
        unit("blend_windows", "reference", 1),
        unit("blend_windows", "triton", 9),
        unit("blend_windows", "cuda", 2),
    ]
    _, first = play(units=units)
    assert [backend for stage, _, backend in first.performed if stage == "benchmarks"] == [
        "cuda",
        "triton",
        "reference",
    ]
    record = Record(first.options.out)
    for key, row in record.rows.items():
        if row["stage"] == "benchmarks":
            record.rows[key] = {
                **row,
                "source": "old",
                "date": f"2026-01-0{['triton', 'cuda', 'reference'].index(row['backend']) + 1}",
            }
    record.save()
    _, second = play(units=units)
    assert [backend for stage, _, backend in second.performed if stage == "benchmarks"] == [
        "triton",
        "cuda",
        "reference",
    ]


def test_what_is_gone_is_forgotten(play: Any) -> None:
    play()
    _, second = play(units=[unit("blend_windows", "triton")])
    assert set(rows_of(second, "benchmarks")) == {"triton"}


def test_only_the_ops_and_scenarios_asked_for(play: Any) -> None:
    _, played = play(scenarios=("small",))
    assert played.performed == [("smoke", "blend_windows", "")]
    _, played = play(ops=("group_norm",))
    assert played.performed == []


# ---------------------------------------------------------------- the budget


def test_an_exhausted_budget_leaves_the_rest_for_the_next_run(play: Any) -> None:
    code, first = play(slow=0.25, budget=0.6)
    left = [row for row in rows_of(first, "benchmarks").values() if row["left"]]
    assert code == 0 and left and all("left for the next run" in row["why"] for row in left)
    assert "run again with the same --out" in (first.options.out / "table.md").read_text()
    assert time.monotonic() - first.started < 3
    _, second = play()
    done = rows_of(second, "benchmarks")
    assert len(second.performed) == 1 + len(left) and not any(row["left"] for row in done.values())


def test_what_was_cut_off_goes_last_the_next_time(play: Any) -> None:
    units = [unit("blend_windows", backend, traffic) for traffic, backend in enumerate(("triton", "cuda", "cpu"))]

    def cut_off(self: Any, units: Any, deadline: float) -> Iterator[tuple[Any, Any]]:
        for each, reply in Played.work(self, units, deadline):
            if each.get("backend") == "cuda":
                return
            yield each, reply

    _, first = play(units=units, work=cut_off)
    assert {b for b, row in rows_of(first, "benchmarks").items() if row["under_way"]} == {"cuda"}
    _, second = play(units=units)
    assert [backend for stage, _, backend in second.performed if stage == "benchmarks"] == ["cpu", "cuda"]


def test_what_is_left_keeps_a_red_row_that_still_holds(play: Any) -> None:
    class Wrong(Played):
        def timed(self, each: Any) -> Any:
            return [{"verdict": "failed", "why": "differs from us"}]

    assert play(timed=Wrong.timed)[0] == 1
    code, second = play(slow=0.25, budget=0.3)
    assert code == 1 and {row["verdict"] for row in rows_of(second, "benchmarks").values()} == {"failed"}


def test_deadlines_share_the_budget_and_end_with_it(tmp_path: Path) -> None:
    for part, stages in lab.PARTS.items():
        played = Played(Options(tmp_path, 100.0, part))
        deadlines = dict(played.deadlines())
        assert tuple(deadlines) == stages and sorted(deadlines.values()) == list(deadlines.values())
        assert deadlines[stages[-1]] == pytest.approx(played.started + 100.0)
        assert 0 < deadlines["build"] - played.started < 70


# ---------------------------------------------------------------- red


def test_a_wrong_backend_is_not_timed_and_the_code_is_one(play: Any) -> None:
    code, played = play(wrong={("blend_windows", "triton")})
    rows = rows_of(played, "benchmarks")
    assert code == 1 and ("benchmarks", "blend_windows", "triton") not in played.performed
    assert rows["triton"]["verdict"] == "skipped" and "not timed: correctness red" in rows["triton"]["why"]
    assert (rows["triton"]["measured"], rows["triton"]["numbers"], rows["triton"]["ratio"]) == (None, None, None)
    assert rows["reference"]["verdict"] == "met"  # nothing is wrong with the definition


def test_an_earlier_time_of_what_turned_out_wrong_is_withdrawn(play: Any) -> None:
    play()
    code, played = play(wrong={("blend_windows", "triton")})
    row = rows_of(played, "benchmarks")["triton"]
    assert code == 1 and row["measured"] is None and row["numbers"] is None
    assert (
        "1.00 ms"
        not in [line for line in (played.options.out / "table.md").read_text().splitlines() if "triton" in line][-1]
    )


def test_what_was_not_checked_is_not_timed(play: Any) -> None:
    _, played = play(smoked=lambda self, each: [])
    assert "not checked yet" in rows_of(played, "benchmarks")["triton"]["why"]


def test_a_backend_that_is_not_here_has_one_row(play: Any) -> None:
    skipped = [{"op": "blend_windows", "backend": "triton", "verdict": "skipped", "why": "not installed"}]
    code, played = play(smoked=lambda self, each: skipped)
    assert code == 0 and set(rows_of(played, "benchmarks")) == {"reference"}


def test_a_smoke_that_dies_is_red_for_every_kernel_of_the_op(play: Any) -> None:
    code, played = play(smoked=lambda self, each: "the process died of SIGSEGV")
    rows = rows_of(played, "benchmarks")
    assert code == 1 and "red" in rows["triton"]["why"] and rows["reference"]["verdict"] == "met"
    assert "SIGSEGV" in rows_of(played, "smoke")[None]["why"]


def red_tests(*failures: str, op: str | None = "blend_windows", scenario: str = "x") -> dict[str, Any]:
    return {"stage": "tests", "op": op, "backend": None, "scenario": scenario, "failures": list(failures)}


@pytest.mark.parametrize(
    ("row", "accused"),
    [
        (red_tests("tests/ops/test_blend_windows.py::test_gradients"), {*lab.BACKENDS}),
        (red_tests("t.py::test_a[triton-fp32]"), {"triton"}),
        (red_tests("t.py::test_a[triton-fp32]", "t.py::test_b[cuda]"), {"triton", "cuda"}),
        (red_tests("t.py::test_a[triton-fp32]", "t.py::test_b"), {*lab.BACKENDS}),
        (red_tests("tests/kernels/test_blend_windows.py::test_a[fp16]"), {"triton"}),
        (red_tests("t.py::test_a", op="group_norm"), set()),
        (red_tests("tests/test_cli.py::test_a", op=None), set()),
        ({"stage": "smoke", "op": "blend_windows", "backend": "cuda", "scenario": None}, {"cuda"}),
        ({"stage": "smoke", "op": "blend_windows", "backend": None, "scenario": None}, {*lab.BACKENDS} - {"reference"}),
        ({"stage": "sanitizer", "op": None, "backend": None, "scenario": "abi"}, {*lab.BACKENDS} - {"reference"}),
        ({"stage": "resources", "op": "blend_windows", "backend": "triton", "scenario": None}, set()),
    ],
)
def test_whom_a_red_row_accuses(row: dict[str, Any], accused: set[str]) -> None:
    assert {backend for backend in lab.BACKENDS if lab.accuses(row, "blend_windows", backend)} == accused


def test_a_model_is_as_wrong_as_any_op_or_model_test() -> None:
    assert lab.accuses(red_tests("t.py::test_a[triton]"), "stunet", "auto")
    assert lab.accuses(red_tests("a", op=None, scenario="tests/models/test_unet2d.py"), "stunet", "auto")
    assert not lab.accuses(red_tests("a", op=None, scenario="tests/test_cli.py"), "stunet", "auto")


# ---------------------------------------------------------------- tuning


def timed_with(played: Played) -> list[Any]:
    """By what table the benchmarks of the Triton kernel were timed."""
    return [each["configs"] for each in played.asked if each["stage"] == "benchmarks" and each["backend"] == "triton"]


def test_winners_are_written_beside_the_record_and_timed(play: Any) -> None:
    code, played = play(cases=CASES)
    table = played.options.out / "nvidia-imaginary.json"
    assert code == 0 and json.loads(table.read_text()) == {
        "gpu": "NVIDIA Imaginary",
        "blend_windows": {"narrow": {"block": 2}, "wide": {"block": 1}},
    }
    assert [stage for stage, *_ in played.performed] == ["smoke", "tuning", "tuning", "benchmarks", "benchmarks"]
    assert timed_with(played) == [str(table)]
    sources = {backend: row["source"] for backend, row in rows_of(played, "benchmarks").items()}
    assert sources["reference"] == "s1" and sources["triton"].startswith("s1 tuned ")


def test_what_is_tuned_is_not_tuned_again_nor_timed_again(play: Any) -> None:
    play(cases=CASES)
    _, second = play(cases=CASES)
    assert [stage for stage, *_ in second.performed] == ["smoke"]


def test_times_with_another_configuration_are_taken_again(play: Any) -> None:
    play()
    _, second = play(cases=CASES[1:])  # the default won: the times still hold
    assert [stage for stage, *_ in second.performed] == ["smoke", "tuning"]
    _, third = play(cases=CASES)
    assert third.performed[1:] == [("tuning", "blend_windows", "triton"), ("benchmarks", "blend_windows", "triton")]
    changed = [{**case, "source": "s2"} for case in CASES]
    _, fourth = play(cases=changed, winners={"narrow": 3, "wide": 1})
    assert [stage for stage, *_ in fourth.performed] == ["smoke", "tuning", "tuning", "benchmarks"]


def test_a_case_whose_worker_died_is_red_and_tried_again(play: Any) -> None:
    died = "the process died of SIGSEGV"
    code, first = play(cases=CASES[:1], tuned_one=lambda self, each: died)
    (row,) = rows_of(first, "tuning").values()
    assert code == 1 and died in row["why"] and not (first.options.out / "nvidia-imaginary.json").exists()
    assert timed_with(first) == [None]
    assert play(cases=CASES[:1])[0] == 0


def test_cases_that_the_budget_has_no_room_for_are_left(play: Any) -> None:
    _, first = play(cases=CASES, tuned_one=lambda self, each: [{"verdict": "skipped", "left": True, "why": "time"}])
    assert {row["left"] for row in rows_of(first, "tuning").values()} == {True}
    _, second = play(cases=CASES)
    assert [stage for stage, *_ in second.performed].count("tuning") == 2


def test_what_is_wrong_is_not_tuned(play: Any) -> None:
    _, played = play(cases=CASES, wrong={("blend_windows", "triton")})
    assert "tuning" not in [stage for stage, *_ in played.performed]
    assert all("correctness red" in row["why"] for row in rows_of(played, "tuning").values())


def test_a_case_that_is_gone_is_forgotten(play: Any) -> None:
    play(cases=CASES)
    _, second = play(cases=CASES[:1])
    assert [row["scenario"] for row in second.record.rows.values() if row["stage"] == "tuning"] == ["narrow"]
    table = json.loads((second.options.out / "nvidia-imaginary.json").read_text())
    assert table["blend_windows"] == {"narrow": {"block": 2}}


def test_without_a_gpu_there_is_nothing_to_tune(play: Any) -> None:
    code, played = play()
    (row,) = rows_of(played, "tuning").values()
    assert code == 0 and row["verdict"] == "skipped" and "of a GPU" in row["why"]


# ---------------------------------------------------------------- the other stages


def test_the_suite_s_rows_resume_by_file(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["tests/ops/test_blend_windows.py", "tests/test_info.py"]  # in the order of suite.urgency
    asked: list[list[str]] = []

    def run(todo: list[str], *_: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        asked.append(list(todo))
        for file in todo[:1]:
            yield file, {"verdict": "met", "measured": "3 passed", "failures": []}

    monkeypatch.setattr(suite, "test_files", lambda: files)
    monkeypatch.setattr(suite, "run", run)
    monkeypatch.setattr(gate, "rows", lambda *_: [])
    assert play("correctness")[0] == 0
    _, played = play("correctness")
    assert asked == [files, files[1:]]
    rows = [row for row in played.record.rows.values() if row["stage"] == "tests"]
    assert {row["source"] for row in rows} == {row["tree"] for row in rows}  # by which evidence ties them to a kernel
    assert {(row["scenario"], row["op"], row["left"]) for row in rows} == {
        (files[0], "blend_windows", False),
        (files[1], None, False),
    }
    monkeypatch.setattr(suite, "test_files", lambda: files[:1])
    _, played = play("correctness")
    assert [row["scenario"] for row in played.record.rows.values() if row["stage"] == "tests"] == files[:1]


def test_a_package_that_cannot_be_imported_ends_the_run(play: Any) -> None:
    code, played = play(ask=lambda self, deadline: None)
    assert code == 1 and {row["stage"] for row in played.record.rows.values()} == {"build"}
    assert "cannot be imported" in rows_of(played, "build")[None]["why"]


def test_the_gate_s_rows_are_by_op_and_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"op": "a", "backend": b, "registers": r, "missing": None} for b, r in (("triton", 40), ("triton", 96))]
    rows += [{"op": "a", "backend": "cuda", "registers": 0, "missing": "nvcc was not found"}]
    told = json.dumps({"rows": rows, "broken": ["no stack: a triton k (v) sm_80: stack is 8, at most 0 is allowed"]})
    good = json.dumps({"rows": rows, "broken": []})

    def run(told: str, code: int, seconds: float = 20.0) -> Any:
        program = f"import sys, time; time.sleep({0 if seconds > 1 else 60}); print({told!r}); sys.exit({code})"
        monkeypatch.setattr(gate, "GATE", (sys.executable, "-c", program))
        return gate.rows(None, tmp_path / "log", time.monotonic() + seconds)

    by_backend = {row["backend"]: row for row in run(told, 1)}
    assert by_backend["triton"]["verdict"] == "failed" and "stack is 8" in by_backend["triton"]["why"]
    by_backend = {row["backend"]: row for row in run(good, 0)}
    assert by_backend["triton"] == {
        "op": "a",
        "backend": "triton",
        "verdict": "met",
        "measured": "2 variants, at most 96 registers",
    }
    assert by_backend["cuda"]["verdict"] == "skipped" and "nvcc" in by_backend["cuda"]["why"]
    assert [row["verdict"] for row in run("", 7)] == ["failed"]
    nothing = json.dumps({"rows": rows[2:], "broken": []})
    assert [(row["backend"], row["verdict"]) for row in run(nothing, gate.NOTHING_COMPILED)] == [("cuda", "skipped")]
    assert run("", 0, seconds=0.3) is None


SANITIZER = """#!{python}
import os, sys
if "racecheck" in sys.argv and "busy" in sys.argv: print("RACE"); sys.exit(86)
if "idle" in sys.argv: print("========= Target application terminated before first instrumented API call")
if "-c" in sys.argv: sys.exit(os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1")
"""


def test_programs_under_the_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.format(python=sys.executable))
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: str(tool) if "sanitizer" in name else name)
    monkeypatch.setattr(sanitizer, "_build", lambda *_: 0)
    monkeypatch.setattr(sanitizer, "_commands", lambda: [("blend", ["blend", "busy"]), ("abi", ["abi", "idle"])])
    deadline = time.monotonic() + 30

    def verdicts(**options: Any) -> dict[str, str]:
        settings = {"on_gpu": True, "holds": lambda row: False, "deadline": deadline, **options}
        rows = sanitizer.rows(log=tmp_path / "lab.log", **settings)
        return {row.get("scenario", ""): row.get("verdict", "left") for row in rows}

    assert verdicts() == {
        "self-check, memcheck": "met",
        "self-check, racecheck": "met",
        "blend, memcheck": "met",
        "blend, racecheck": "failed",
        "abi, memcheck": "skipped",
    }
    assert set(verdicts(holds=lambda row: "memcheck" in row["scenario"])) == {
        "self-check, racecheck",
        "blend, racecheck",
        "abi, racecheck",
    }
    assert set(verdicts(deadline=0.0).values()) == {"left"}
    monkeypatch.setattr(sanitizer, "_build", lambda *_: 1)
    assert verdicts()["C tests"] == "failed"
    monkeypatch.setattr(sanitizer, "_build", lambda *_: None)
    assert verdicts()["C tests"] == "left"
    assert verdicts(on_gpu=False) == {"": "skipped"}
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: None)
    assert verdicts() == {"": "skipped"}


# ---------------------------------------------------------------- the command


def test_the_lab_itself_needs_neither_torch_nor_the_package() -> None:
    probe = "import sys, benchmarks.lab; print(sorted({'torch', 'lumiere_fast', 'pytest', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(("--out", "{}", "--budget", "0"), "--budget"), (("--publish", "{}"), "must hold the record")],
)
def test_the_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], word: str
) -> None:
    assert lab.main([argument.format(tmp_path / "new") for argument in arguments]) == 2
    assert word in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_damaged_record_is_refused_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "record.json").write_text("{")
    assert lab.main(["--out", str(tmp_path)]) == 2
    assert "record.json is not a record of the lab" in capsys.readouterr().err
    assert (tmp_path / "record.json").read_text() == "{"


# A backend that gives wrong results, slipped into the workers of an otherwise real run.
SABOTAGE = """
try:
    from lumiere_fast import selftest
    def checks(device, names):
        for op in names:
            yield selftest.Check(op, "cpu", "failed", "fp32: off by 3e-2", 0.0)
    selftest.checks = checks
except ImportError:
    pass
"""


def test_end_to_end_on_a_cpu_then_with_a_wrong_backend(tmp_path: Path) -> None:
    out, bad = tmp_path / "out", tmp_path / "bad"
    bad.mkdir()
    (bad / "sitecustomize.py").write_text(SABOTAGE)
    command = [sys.executable, "-m", "benchmarks.lab", "--out", str(out), "--part", "speed", "--no-build"]
    command += ["--op", "blend_windows", "--scenario", "demo", "--device", "cpu", "--budget", "100"]

    def run(path: str) -> tuple[int, str, dict[Any, Any]]:
        path = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        rows = json.loads((out / "record.json").read_text())["rows"]
        return done.returncode, done.stdout, {key_of(row): row for row in rows}

    code, printed, first = run("")
    timed = {key: row for key, row in first.items() if row["stage"] == "benchmarks"}
    reference = {key: row for key, row in timed.items() if row["backend"] == "reference"}
    assert code == 0 and reference, printed
    assert all(
        row["numbers"]["median_s"] > 0 and row["numbers"]["ratios"]["accumulate loop"] > 0 for row in timed.values()
    )
    assert (out / "table.md").read_text() == printed and "accumulate loop" in printed

    code, printed, second = run(str(bad))
    assert code == 1 and "off by 3e-2" in printed
    for row in second.values():
        if row["stage"] == "benchmarks" and row["backend"] == "cpu":
            assert "correctness red" in row["why"] and row["numbers"] is None
    assert any(row["stage"] == "benchmarks" and row["backend"] == "cpu" for row in second.values())
    assert {key: second[key] for key in reference} == reference  # resumed: not measured again
