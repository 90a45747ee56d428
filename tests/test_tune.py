"""`lumiere-fast tune`: which candidate wins, what may not, what is written and kept; on kernels and clocks played here,
and once on the real kernel in Triton's interpreter.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lumiere_fast import dispatch, ops, timing, tune
from lumiere_fast.kernels import _configs
from lumiere_fast.ops._spec import Scenario
from lumiere_fast.tune import Tuned, Tuner

OP, GPU = "temporal_conv", "NVIDIA Imaginary"
ORDERED = "spatial_attention_order"
PLAIN, NORM = "half-c64-kn-plain-few", "half-c64-kn-norm-few"
CPU = torch.device("cpu")
SIZES = {"B": 1, "C": 8, "T": 2, "H": 3, "W": 3, "G": 2, "k": 3}
TINY = (Scenario("tiny", SIZES, {"fused": False}), Scenario("tiny_fused", SIZES, {"fused": True}))


def config(stages: int, case: str = PLAIN, **changes: Any) -> dict[str, Any]:
    """The default of a case with another number of stages, by which the kernel played here tells them apart."""
    return {**_configs.shipped(OP)[case][0], "num_stages": stages, **changes}


DEFAULT = _configs.shipped(OP)[PLAIN][0]["num_stages"]


class PlayedKernel:
    """temporal_conv with a kernel that is right but for its `faults`, by number of stages, and takes `costs`."""

    def __init__(self) -> None:
        self.real = ops.temporal_conv
        self.__module__ = self.real.__module__
        self.costs: dict[Any, float] = {}
        self.faults: dict[int, Callable[[Tensor], Any]] = {}
        self.ran: list[dict[str, Any]] = []

    def __call__(self, *, backend: str, out: Tensor | None = None, **inputs: Any) -> Tensor:
        result = self.real(**inputs, backend="reference")
        if out is None:
            return result
        case = NORM if "norm" in inputs else PLAIN
        self.ran.append(dict(_configs.chosen(OP, case, CPU)))
        out.copy_(result)
        self.faults.get(self.ran[-1]["num_stages"], lambda y: None)(out)
        return out

    def clock(self, side: Callable[[], Any]) -> float:
        side()
        used = self.ran[-1]
        return self.costs.get((used["num_stages"], used.get("fused_norm")), self.costs.get(used["num_stages"], 1.0))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> PlayedKernel:
    played = PlayedKernel()
    module = SimpleNamespace(
        CANDIDATES={PLAIN: [config(5), config(6)], NORM: [config(5, NORM)]},
        case_of=lambda dtype, c_out, taps, rows, normed: "" if dtype != torch.bfloat16 else NORM if normed else PLAIN,
    )
    monkeypatch.setattr(ops, OP, played)
    monkeypatch.setattr(timing, "clock_for", lambda device: played.clock)
    monkeypatch.setattr(tune, "_kernel", lambda op: module)
    monkeypatch.setattr(tune, "scenarios", lambda op: list(TINY))
    return played


def tuned(case: str = PLAIN) -> Tuned:
    return Tuner(CPU, time.monotonic() + 60).tune(OP, case)


def reasons(row: Tuned) -> dict[Any, str | None]:
    return {outcome.config["num_stages"]: outcome.why_not for outcome in row.candidates}


# ---------------------------------------------------------------- who wins


def test_the_fastest_wins(kernel: PlayedKernel) -> None:
    kernel.costs = {DEFAULT: 3.0, 5: 2.0, 6: 1.5}
    row = tuned()
    assert (row.status, row.config, row.times_as_fast) == ("tuned", config(6), pytest.approx(2.0))
    assert [outcome.times_as_fast for outcome in row.candidates] == [1.0, pytest.approx(1.5), pytest.approx(2.0)]
    assert row.scenarios == ("tiny bfloat16",)


def test_the_default_stays_unless_another_is_clearly_faster(kernel: PlayedKernel) -> None:
    kernel.costs = {DEFAULT: 1.0, 5: 0.99, 6: 1.5}
    assert (tuned().config, tuned().times_as_fast) == (config(DEFAULT), 1.0)
    kernel.costs[5] = 0.97
    assert tuned().config == config(5)


def test_the_mean_over_scenarios_decides(kernel: PlayedKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    wider = Scenario("wider", {**SIZES, "C": 16}, {"fused": False})
    monkeypatch.setattr(tune, "scenarios", lambda op: [TINY[0], wider])
    real = kernel.clock
    width = lambda side: side().shape[1]  # noqa: E731

    def clock(side: Callable[[], Any]) -> float:
        return real(side) ** (2 if width(side) == 16 else -1)  # 5 is slow at one and very fast at the other

    monkeypatch.setattr(timing, "clock_for", lambda device: clock)
    kernel.costs = {5: 0.5}
    row = tuned()
    assert row.scenarios == ("tiny bfloat16", "wider bfloat16")
    assert row.config == config(5) and row.times_as_fast == pytest.approx(math.sqrt(4 * 0.5))


FAULTS: dict[str, Callable[[Tensor], Any]] = {
    "wrong at tiny": lambda y: y.mul_(1.1),
    "off by nan": lambda y: y[..., -1].fill_(math.nan),
}


@pytest.mark.parametrize("told", FAULTS)
def test_a_wrong_one_does_not_win_and_is_told(kernel: PlayedKernel, told: str) -> None:
    kernel.costs, kernel.faults = {5: 0.1, 6: 0.5}, {5: FAULTS[told]}
    row = tuned()
    assert row.config == config(6)
    assert told in (reasons(row)[5] or "") and reasons(row)[6] is None
    assert f"{PLAIN}: left out: block_m" in tune.render([row]) and "num_stages 5" in tune.render([row])


def test_one_that_writes_nothing_does_not_pass_for_the_one_before_it(
    kernel: PlayedKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lazy(*, backend: str, out: Tensor | None = None, **inputs: Any) -> Tensor:
        if out is not None and _configs.chosen(OP, PLAIN, CPU)["num_stages"] == 5:
            return out
        return kernel(backend=backend, out=out, **inputs)

    lazy.__module__ = kernel.__module__
    monkeypatch.setattr(ops, OP, lazy)
    assert "off by nan" in (reasons(tuned())[5] or "")


def test_a_machine_that_the_kernel_cannot_run_on_is_no_fault_of_a_candidate(kernel: PlayedKernel) -> None:
    def unavailable(y: Tensor) -> None:
        raise dispatch.BackendUnavailable("triton needs compute capability 8.0")

    kernel.faults = {5: unavailable}
    with pytest.raises(dispatch.BackendUnavailable, match="compute capability"):
        tuned()


def test_one_that_cannot_be_launched_is_told(kernel: PlayedKernel) -> None:
    def refuse(y: Tensor) -> None:
        raise RuntimeError("out of resource: shared memory")

    kernel.costs, kernel.faults = {5: 0.1}, {5: refuse}
    row = tuned()
    assert row.config == config(DEFAULT) and reasons(row)[5] == "RuntimeError: out of resource: shared memory"


def test_where_the_default_cannot_run_another_wins(kernel: PlayedKernel) -> None:
    kernel.costs, kernel.faults = {5: 4.0, 6: 5.0}, {DEFAULT: lambda y: y.zero_()}
    row = tuned()
    assert (row.status, row.config, row.times_as_fast) == ("tuned", config(5), None)


def test_where_none_is_right_there_is_no_winner(kernel: PlayedKernel) -> None:
    kernel.faults = dict.fromkeys((DEFAULT, 5, 6), lambda y: y.zero_())
    row = tuned()
    assert (row.status, row.config, row.why) == ("failed", None, "no candidate is right here")


def test_the_norm_is_tried_fused_and_in_a_pass_before(kernel: PlayedKernel) -> None:
    fused = _configs.shipped(OP)[NORM][0]["fused_norm"]
    kernel.costs = {(5, not fused): 0.5}
    row = tuned(NORM)
    tried = {(outcome.config["num_stages"], outcome.config["fused_norm"]) for outcome in row.candidates}
    assert tried == {(DEFAULT, True), (DEFAULT, False), (5, True), (5, False)}
    assert row.config == config(5, NORM, fused_norm=not fused)


def test_a_scenario_that_does_not_fit_is_left_out(kernel: PlayedKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    large = Scenario("large", {**SIZES, "C": 16}, {"fused": False})
    monkeypatch.setattr(tune, "scenarios", lambda op: [TINY[0], large])
    real = kernel.real

    def full(**inputs: Any) -> Tensor:
        if inputs["x"].shape[1] == 16:
            raise torch.OutOfMemoryError("tried to allocate")
        return real(**inputs)

    kernel.real = full  # type: ignore[assignment]
    assert (tuned().status, tuned().scenarios) == ("tuned", ("tiny bfloat16",))
    monkeypatch.setattr(tune, "scenarios", lambda op: [large])
    assert (tuned().status, tuned().why) == ("failed", "no scenario of it fits into memory")


# ---------------------------------------------------------------- time, and a GPU that breaks


def test_at_the_end_of_its_time_a_case_is_left(kernel: PlayedKernel) -> None:
    row = Tuner(CPU, time.monotonic() - 1).tune(OP, PLAIN)
    assert (row.status, row.config) == ("left", None) and "time is up" in (row.why or "")
    assert not kernel.ran


def test_a_candidate_that_breaks_the_gpu_ends_the_run(kernel: PlayedKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = Tuner(CPU, time.monotonic() + 60)

    def illegal(y: Tensor) -> None:
        tuner.device = torch.device("cuda")  # so that it is asked whether it still works
        raise RuntimeError("an illegal memory access was encountered")

    def synchronize(device: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    kernel.faults = {5: illegal}
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    row = tuner.tune(OP, PLAIN)
    assert row.status == "failed" and "illegal memory access" in (row.why or "")
    assert tuner.tune(OP, NORM).status == "left"


# ---------------------------------------------------------------- the table


def written(path: Path, cases: Sequence[str] | None = None, seconds: float = 60.0) -> list[Tuned]:
    tuner = Tuner(CPU, time.monotonic() + seconds)
    return list(tune._run({OP: (PLAIN, NORM)}, cases, tune.read(path, GPU), tuner, path, GPU))


def test_a_winner_is_written_used_and_kept(
    kernel: PlayedKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUMIERE_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(_configs, "gpu_name", lambda device: GPU)
    path = _configs.user_file(GPU)
    kernel.costs = {5: 0.5}
    assert [row.status for row in written(path)] == ["tuned", "tuned"]
    assert _configs.chosen(OP, PLAIN, CPU) == config(5)
    kernel.costs, kernel.ran = {6: 0.1}, []
    assert [(row.status, row.config) for row in written(path)] == [("kept", config(5)), ("kept", config(5, NORM))]
    assert not kernel.ran
    assert [(row.case, row.status) for row in written(path, [PLAIN])] == [(PLAIN, "tuned")]
    assert _configs.chosen(OP, PLAIN, CPU) == config(6) and _configs.chosen(OP, NORM, CPU) == config(5, NORM)


def test_what_others_wrote_of_other_cases_stays(kernel: PlayedKernel, tmp_path: Path) -> None:
    path, by_hand = tmp_path / "table.json", config(7, "single-wide-kn-plain-few")
    _configs.save(path, GPU, {OP: {"single-wide-kn-plain-few": by_hand, PLAIN: config(7)}})
    kernel.costs = {5: 0.5}
    written(path, [PLAIN])
    assert tune.read(path, GPU)[OP] == {"single-wide-kn-plain-few": by_hand, PLAIN: config(5)}


def test_a_run_that_is_stopped_goes_on_where_it_was(kernel: PlayedKernel, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    rows = tune._run({OP: (PLAIN, NORM)}, None, {}, Tuner(CPU, time.monotonic() + 60), path, GPU)
    assert next(rows).case == PLAIN and set(tune.read(path, GPU)[OP]) == {PLAIN}
    assert [row.status for row in written(path)] == ["kept", "tuned"]


def test_a_case_that_is_left_or_failed_writes_nothing(kernel: PlayedKernel, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    assert [row.status for row in written(path, seconds=-1)] == ["left", "left"]
    kernel.faults = dict.fromkeys((DEFAULT, 5, 6), lambda y: y.zero_())
    assert [row.status for row in written(path)] == ["failed", "failed"]
    assert not path.exists()


# ---------------------------------------------------------------- the order of backends


FORWARD, GRADIENT = "single-d32-text-masked-forward", "single-d32-text-masked-gradient"
PLACES = {"efficient": 1, "triton": 2, "cudnn": 3, "flash": 4}  # of the default
TEXT_SIZES = {"B": 2, "C": 64, "T": 3, "H": 3, "W": 3, "D": 32, "L": 5}


class PlayedAttention:
    """spatial_attention by the reference, wrong with the `faults` of a backend, which takes its `costs`."""

    def __init__(self) -> None:
        self.real = ops.spatial_attention
        self.__module__, self.__name__ = self.real.__module__, self.real.__name__
        self.costs: dict[str, float] = {}
        self.faults: dict[str, Callable[[Tensor], Any]] = {}
        self.ran: list[str] = []

    def __call__(self, *, backend: str, **inputs: Any) -> Tensor:
        self.ran.append(backend)
        return self.faults.get(backend, lambda y: y)(self.real(**inputs, backend="reference"))

    def clock(self, side: Callable[[], Any]) -> float:
        side()
        return self.costs[self.ran[-1]]


@pytest.fixture
def ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    def scenarios(table: str) -> Any:
        assert table == ORDERED
        tiny = {
            case: Scenario(case, TEXT_SIZES, {"text": True, "empty": True, "gradient": case == GRADIENT})
            for case in (FORWARD, GRADIENT)
        }
        return {case: [(scenario, torch.float32)] for case, scenario in tiny.items()}

    monkeypatch.setattr(tune, "_order_scenarios", scenarios)


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch, ordered: None) -> PlayedAttention:
    played = PlayedAttention()
    monkeypatch.setattr(ops, "spatial_attention", played)
    monkeypatch.setattr(dispatch, "why_not", lambda *call, **options: [])
    monkeypatch.setattr(timing, "clock_for", lambda device: played.clock)
    return played


def order(case: str = FORWARD) -> Tuned:
    return Tuner(CPU, time.monotonic() + 60).tune(ORDERED, case)


def reasons_by_backend(row: Tuned) -> dict[str, str | None]:
    return {name: outcome.why_not for outcome in row.candidates for name in outcome.config}


@pytest.mark.parametrize("case", [FORWARD, GRADIENT])
def test_the_faster_backend_has_the_better_place(attention: PlayedAttention, case: str) -> None:
    attention.costs = {"efficient": 3.0, "triton": 2.0, "cudnn": 6.0, "flash": 1.0}
    row = order(case)
    assert row.status == "tuned" and row.config == {"flash": 1, "triton": 2, "efficient": 3, "cudnn": 4}
    assert row.times_as_fast == pytest.approx(3.0) and row.scenarios == (f"{case} float32",)
    assert tune.shown(row.config) == "flash 1, triton 2, efficient 3, cudnn 4"


WRONG: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "wrong at": (FORWARD, lambda y: y * 1.05),
    "off by nan": (FORWARD, lambda y: torch.full_like(y, math.nan)),
    f"wrong at {GRADIENT}": (GRADIENT, lambda y: y * 1.05),
}


@pytest.mark.parametrize("told", WRONG)
def test_a_wrong_backend_comes_after_all_that_are_right(attention: PlayedAttention, told: str) -> None:
    case, fault = WRONG[told]
    attention.costs, attention.faults = {"flash": 1.0, "triton": 0.1, "efficient": 2.0, "cudnn": 3.0}, {"triton": fault}
    row = order(case)
    assert row.config == {"flash": 1, "efficient": 2, "cudnn": 3, "triton": 4}
    assert told in (reasons_by_backend(row)["triton"] or "") and reasons_by_backend(row)["flash"] is None


def test_where_no_backend_is_right_nothing_is_ordered(attention: PlayedAttention) -> None:
    attention.faults = dict.fromkeys(PLACES, lambda y: y * 2)
    row = order()
    assert (row.status, row.config, row.why) == ("failed", None, "no backend is right here")


@pytest.mark.parametrize("case", [FORWARD, GRADIENT])
def test_the_real_backends_are_told_apart(ordered: None, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: flash runs, and the others keep the places of the default after it."""
    monkeypatch.setattr(tune, "ROUNDS_BUDGET", 1e-9)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    row = order(case)
    assert row.status == "tuned" and row.config == {"flash": 1, "efficient": 2, "triton": 3, "cudnn": 4}
    told = reasons_by_backend(row)
    assert told.pop("flash") is None and all(reason for reason in told.values())
    assert "q is on cpu, it needs cuda" in (told["cudnn"] or "")


def test_an_order_is_written_and_followed(
    attention: PlayedAttention, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUMIERE_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(_configs, "gpu_name", lambda device: GPU)
    attention.costs = {"efficient": 3.0, "triton": 2.0, "cudnn": 6.0, "flash": 1.0}
    path, tuner = _configs.user_file(GPU), Tuner(CPU, time.monotonic() + 60)
    rows = list(tune._run({ORDERED: (FORWARD, GRADIENT)}, None, {}, tuner, path, GPU))
    assert [row.status for row in rows] == ["tuned", "tuned"]
    followed = dispatch._measured_order(ORDERED, FORWARD, CPU)
    assert followed[:4] == ("flash", "triton", "efficient", "cudnn") and followed[-1] == "reference"
    rows = list(tune._run({ORDERED: (FORWARD,)}, None, tune.read(path, GPU), tuner, path, GPU))
    assert [row.status for row in rows] == ["kept"]


BAD_ORDERS = {
    "must have exactly efficient, triton, cudnn, flash": {FORWARD: {**PLACES, "metal": 5}},
    "must have exactly .* got {'efficient': 1}": {FORWARD: {"efficient": 1}},
    "flash must be a whole number above 0, got 0": {FORWARD: {**PLACES, "flash": 0}},
    "flash must be a whole number above 0, got 'first'": {FORWARD: {**PLACES, "flash": "first"}},
    "has no case 'single-d33'": {"single-d33": PLACES},
}


@pytest.mark.parametrize("told", BAD_ORDERS)
def test_a_damaged_order_is_refused_with_the_name_of_its_file(told: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"gpu": GPU, ORDERED: BAD_ORDERS[told]}))
    with pytest.raises(ValueError, match=f"{path}: .*{told}"):
        _configs.read(path, GPU)
    path.write_text(json.dumps({"gpu": GPU, ORDERED: {FORWARD: PLACES}}))
    with pytest.raises(ValueError, match=f"{path}: .*another|{path}: .*this is the table of"):
        _configs.read(path, "NVIDIA Other")
    assert _configs.read(path, GPU) == {ORDERED: {FORWARD: PLACES}}


def test_every_order_that_ships_names_each_backend_once() -> None:
    """The places 1 to 4; and every case of a GPU has a scenario by which it is tuned."""
    op = dispatch.registered("spatial_attention")
    assert set(tune.cases_of(ORDERED)) == {case for case in _configs.cases(ORDERED) if not case.startswith("cpu")}
    for case, tables in _configs.shipped(ORDERED).items():
        for places in tables:
            assert sorted(places.values()) == list(range(1, len(places) + 1))
            assert set(places) <= {"triton", "reference", *op.backends}
            assert case.startswith("cpu") or set(places) == set(PLACES)
        if not case.startswith("cpu"):
            for scenario, dtype in tune.representatives(ORDERED, case):
                assert dtype == (torch.bfloat16 if case.startswith("half") else torch.float32)
                assert scenario.options["gradient"] == case.endswith("gradient") and not scenario.cpu


def test_an_op_s_name_stands_for_its_order_too() -> None:
    assert tune._tables(["spatial_attention"])[-1] == ORDERED == tune._tables([ORDERED])[0]
    assert tune._tables(None) == list(tune.tunable())


# ---------------------------------------------------------------- the real cases, and the real kernel


@pytest.fixture
def real() -> Iterator[Any]:
    pytest.importorskip("triton")
    yield tune._kernel(OP)


@pytest.mark.parametrize("op", [OP, "spatial_attention"])
def test_every_case_has_candidates_and_scenarios_that_are_of_it(op: str, real: Any) -> None:
    for case in _configs.cases(op):
        for scenario, dtype in tune.representatives(op, case):
            assert tune.case_of(op, scenario, dtype) == case
            assert scenario.count("BCTHW") <= tune.LARGEST
        tried = tune.candidates(op, case)
        assert len(tried) > 1 and tried[0] == _configs.shipped(op)[case][0]
        for each in tried:
            with _configs.override(op, case, each):
                pass


def test_an_op_without_configurations_is_not_tunable(real: Any) -> None:
    assert tune.tunable() == (OP, "spatial_attention", ORDERED)


def test_the_kernel_in_the_interpreter_runs_as_its_candidate_says(real: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = "single-c64-kn-norm-few"
    default = _configs.shipped(OP)[case][0]
    other = {**default, "block_m": 32, "split_k": 2}
    module = SimpleNamespace(CANDIDATES={case: [other]}, case_of=real.case_of)
    monkeypatch.setattr(tune, "_kernel", lambda op: module)
    monkeypatch.setattr(tune, "scenarios", lambda op: TINY[1:])
    used: list[dict[str, Any]] = []
    chosen = real.chosen

    def watched(*arguments: Any) -> Any:
        used.append(chosen(*arguments))
        return used[-1]

    monkeypatch.setattr(real, "chosen", watched)

    def clock(side: Callable[[], Any]) -> float:
        side()
        return {(32, 2): 1.0}.get((used[-1]["block_m"], used[-1]["split_k"]), 2.0)

    monkeypatch.setattr(timing, "clock_for", lambda device: clock)
    monkeypatch.setattr(timing, "MIN_ROUNDS", 1)
    monkeypatch.setattr(tune, "ROUNDS_BUDGET", 1e-9)
    row = tuned(case)
    assert (row.status, row.config, row.times_as_fast) == ("tuned", other, pytest.approx(2.0))
    assert len(row.candidates) == 4 and not any(reasons(row).values())


# ---------------------------------------------------------------- refusals


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    cli = pytest.importorskip("lumiere_fast.cli")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["tune", *arguments])
    told = capsys.readouterr()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, told.out, told.err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "no CUDA device"),
        (
            ("--op", "group_norm"),
            "op must be one of temporal_conv, spatial_attention, spatial_attention_order, got 'group_norm'",
        ),
        (("--case", "huge"), "got 'huge'"),
        (("--budget", "0"), "--budget"),
        (("--out", ""), "--out"),
    ],
)
def test_what_the_command_refuses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], word: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = command(capsys, *arguments)
    assert (code, out) == (2, "") and word in err and err.count("\n") == 1


def test_without_options_the_command_tunes_all(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def run(*arguments: Any, **options: Any) -> list[Tuned]:
        asked.append((arguments, options))
        return [Tuned(OP, PLAIN, "left", why="the time is up"), Tuned(OP, NORM, "left", why="the time is up")]

    monkeypatch.setattr(tune, "run", run)
    code, out, _ = command(capsys)
    assert code == 0 and asked == [((None, None), {"budget": tune.BUDGET, "out": None})]
    assert f"{PLAIN}, {NORM}: the time is up" in out


def test_the_command_prints_the_table_of_a_gpu_and_its_code_tells_of_failures(
    kernel: PlayedKernel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    for name, value in (("is_available", True), ("current_device", 0), ("get_device_name", GPU)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(tune, "Tuner", lambda device, until: Tuner(CPU, until))
    kernel.costs = {5: 0.5}
    arguments = ("--case", PLAIN, "--out", str(path))
    code, out, _ = command(capsys, *arguments)
    assert code == 0 and "2.00" in out and "num_stages 5" in out
    assert json.loads(path.read_text())[OP] == {PLAIN: config(5)}
    code, out, _ = command(capsys, *arguments, "--json")
    (row,) = json.loads(out)
    assert row["status"] == "tuned" and row["config"] == config(5) and len(row["candidates"]) == 3
    kernel.faults = dict.fromkeys((DEFAULT, 5, 6), lambda y: y.zero_())
    assert command(capsys, *arguments)[0] == 1
    assert json.loads(path.read_text())[OP] == {PLAIN: config(5)}
    path.write_text("{")
    code, _, err = command(capsys, *arguments)
    assert code == 2 and str(path) in err and path.read_text() == "{"
