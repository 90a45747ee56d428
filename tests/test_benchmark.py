"""`lumiere-fast benchmark`: what it times against what, on small scenarios; refusals; that forced means forced."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lumiere_fast import benchmark, dispatch, ops
from lumiere_fast.ops import _selfcheck, _spec

TINY = _spec.Scenario("tiny", {"B": 1, "C": 3, "T": 6, "H": 4, "W": 4}, {"window": 4}, cpu=True)


@pytest.fixture(autouse=True)
def one_op(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every op but blend_windows is left out, which has one tiny scenario of a CPU and one of a GPU."""
    large = replace(TINY, name="large", cpu=False)
    spec = replace(_selfcheck.spec_of(ops.blend_windows), scenarios=(TINY, large))
    monkeypatch.setattr(benchmark, "_specs", lambda: [spec])
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Recorded:
    """Calls of an op: the reference makes the result; unless it was asked for, "triton" is recorded to have run."""

    def __init__(self, public: Any) -> None:
        self.public, self.calls = public, []
        self.__module__, self.__name__ = public.__module__, public.__name__
        self.__signature__ = inspect.signature(public)

    def __call__(self, *args: Any, backend: str | None = None, out: Tensor | None = None, **kwargs: Any) -> Tensor:
        self.calls.append((backend, out))
        record = dispatch._record.get()
        result = self.public(*args, backend="reference", out=out, **kwargs)
        if record is not None and backend != "reference":
            record.clear()
            record.add("triton")
        return result


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    cli = pytest.importorskip("lumiere_fast.cli")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["benchmark", *arguments])
    captured = capsys.readouterr()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, captured.out, captured.err


def test_an_op_is_timed_on_the_device_s_scenarios_into_held_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(ops.blend_windows)
    monkeypatch.setattr(ops, "blend_windows", recorded)
    (row,) = benchmark.run(["blend_windows"], device="cpu", budget=1e-9)
    assert (row.name, row.scenario, row.device, row.dtype) == ("blend_windows", "tiny", "cpu", "float32")
    assert row.backend == "triton" and row.times_as_fast
    held = [id(out) for backend, out in recorded.calls if out is not None]
    assert len(held) >= 4 and len(set(held)) == 1


def test_the_reference_is_not_charged_for_a_copy_into_a_held_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(ops.blend_windows)
    monkeypatch.setattr(ops, "blend_windows", recorded)
    list(benchmark.run(["blend_windows"], device="cpu", budget=1e-9))
    theirs = [out for backend, out in recorded.calls if backend == "reference"]
    assert len(theirs) >= 4 and all(out is None for out in theirs)
    inputs = _selfcheck.example(recorded.public, TINY, "cpu", torch.float32)
    side = benchmark.into_held_buffer(recorded.public, inputs, "reference")
    assert side() is not side()


def test_ours_and_the_reference_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another backend than the reference there is a ratio, theirs over ours."""
    bench = benchmark._Bench("cpu", torch.float32, None, budget=1e-9)
    seconds = {"ours": 1.0, "reference": 3.0}
    monkeypatch.setattr(bench, "_try", lambda side: ("cpu", ()))
    row = bench._compare(
        "op", "s", lambda: "ours", lambda: "reference", lambda side: seconds[side()], nbytes=4 * 10**9, flops=10**9
    )
    assert (row.median_s, row.reference_s, row.times_as_fast) == (1.0, 3.0, 3.0)
    assert (row.gb_per_s, row.gflop_per_s, row.backend) == (4.0, 1.0, "cpu")


def test_the_reference_is_not_compared_with_itself() -> None:
    (row,) = benchmark.run(["blend_windows"], device="cpu", backend="reference", budget=1e-9)
    assert row.median_s and (row.backend, row.reference_s, row.times_as_fast) == ("reference", None, None)


def test_a_backend_that_cannot_run_has_reasons_and_no_times() -> None:
    (row,) = benchmark.run(["blend_windows"], device="cpu", backend="cuda", budget=1e-9)
    assert (row.median_s, row.backend) == (None, "cuda") and row.why_not
    assert "not run" in benchmark.render([row]) and row.why_not[0] in benchmark.render([row])


def test_a_scenario_that_does_not_fit_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB. Try less")

    monkeypatch.setattr(benchmark, "into_held_buffer", full)
    (row,) = benchmark.run(["blend_windows"], device="cpu")
    assert row.median_s is None and row.why_not == ("tiny does not fit into memory: tried to allocate 20 GiB",)


def test_models_and_pipeline_run_on_the_shipped_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "STEPS", 1)
    monkeypatch.setattr(benchmark.timing, "MIN_ROUNDS", 1)
    before = torch.get_num_threads()
    options = ("--device", "cpu", "--budget", "0.001", "--backend", "reference", "--threads", "1")
    code, out, _ = run(capsys, "--op", "stunet", "--op", "pipeline", "--json", *options)
    rows = json.loads(out)
    assert code == 0 and {row["name"] for row in rows} == {"stunet", "pipeline"}
    assert [row["scenario"] for row in rows if row["name"] == "stunet"] == ["base", "ssr"]
    assert all(row["median_s"] > 0 and row["threads"] == 1 and row["backend"] == "reference" for row in rows)
    assert torch.get_num_threads() == before


def test_the_table_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--op", "blend_windows", "--device", "cpu", "--budget", "0.001")
    head, _, row = out.splitlines()
    assert (code, err) == (0, "") and head.split()[:3] == ["what", "scenario", "backend"]
    assert row.startswith("blend_windows  tiny") and " us" in row


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--op", "nonsense"), "blend_windows"),
        (("--backend", "magic"), "reference"),
        (("--backend", "cuda", "--op", "blend_windows", "--device", "cpu"), "cuda"),
        (("--dtype", "int8"), "bfloat16"),
        (("--device", "abacus"), "cpu"),
        (("--threads", "0"), "--threads"),
        (("--budget", "0"), "--budget"),
        (("--budget", "nan"), "--budget"),
        (("--weights", "no-such-folder", "--op", "stunet"), "no-such-folder"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], options: tuple[str, ...], word: str) -> None:
    code, out, err = run(capsys, *options)
    assert (code, out) == (2, "") and err.count("\n") == 1 and word in err


def test_names_are_those_of_the_ops() -> None:
    assert set(benchmark.names()) == {"pipeline", "stunet", "blend_windows"}
    assert set(benchmark.names()) - {"pipeline", "stunet"} <= set(dispatch.registered_ops())
