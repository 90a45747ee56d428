"""How a benchmark's row comes about: sides checked before they are timed, held buffers, ratios, verdicts, the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    bench_blend_windows,
    bench_denoise_step,
    bench_group_norm,
    bench_temporal_conv,
    goals,
    harness,
    record,
    worker,
)
from benchmarks.bench_blend_windows import Accumulate, FrameByFrame
from benchmarks.bench_denoise_step import BySorting, Composed
from benchmarks.harness import Case, Row
from lumiere_fast import dispatch, ops, timing, tune
from lumiere_fast.kernels import _configs
from lumiere_fast.ops._spec import Scenario

TINY = Scenario("tiny", {"B": 1, "C": 3, "T": 10, "H": 4, "W": 5}, {"window": 4, "bound": "clip"}, cpu=True)


def case_of(module: Any, rows: list[Row], backend: str = "reference", **changes: Any) -> Case:
    inputs = harness.draw_inputs(module.SPEC, TINY, "cpu", torch.float32)
    return Case(module.SPEC, TINY, backend, "cpu", torch.float32, 1, inputs, rows.append, 1e-9, **changes)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds by the name of a side, in place of time."""
    costs: dict[str, float] = {}
    monkeypatch.setattr(timing, "clock_for", lambda device: lambda side: costs[side.__name__])
    return costs


def test_a_row_of_made_up_times(clock: dict[str, float]) -> None:
    rows: list[Row] = []
    case = case_of(bench_blend_windows, rows)
    expected = ops.blend_windows(**case.inputs)

    def ours() -> Any:
        return expected

    def slow() -> Any:
        return expected.clone()

    def copy() -> None:
        pass

    clock.update(ours=2.0, slow=6.0, copy=1.0)
    case.compare({"slow": slow}, limits={"copy": copy}, ours=ours)
    (row,) = rows
    assert (row.median, row.baselines, row.limits) == (2.0, {"slow": 6.0}, {"copy": 1.0})
    assert row.ratios == {"slow": 3.0, "copy": 0.5} and row.strongest == "slow"
    assert row.numbers()["gb_per_s"] == row.nbytes / 2e9 and row.numbers()["rounds"] == timing.MIN_ROUNDS
    assert row.source and row.verdict == "no goal" and row.extra_info()["source"] == row.source
    assert "slow 3.00*, (copy 0.50)" in harness.table([row])[2]


@pytest.mark.parametrize("wrong", [lambda x: x + 1e-2, lambda x: x[:, :1], lambda x: x * float("nan")])
def test_a_baseline_that_differs_gives_no_row(wrong: Any) -> None:
    rows: list[Row] = []
    case = case_of(bench_blend_windows, rows)
    expected = ops.blend_windows(**case.inputs)
    with pytest.raises(AssertionError, match=r"baseline (differs|gives)"):
        case.compare({"baseline": lambda: wrong(expected)})
    assert rows == []


def test_a_baseline_that_torch_cannot_run_is_left_out_and_told() -> None:
    rows: list[Row] = []
    case = case_of(bench_blend_windows, rows)

    def broken() -> None:
        raise RuntimeError("CUDA error: invalid configuration argument\nand more")

    case.compare({"broken": broken, "frames": lambda: ops.blend_windows(**case.inputs)})
    assert rows[0].broken == {"broken": "CUDA error: invalid configuration argument"}
    assert list(rows[0].baselines) == ["frames"] and "(broken cannot run)" in harness.table(rows)[2]


def test_our_own_failure_is_not_swallowed() -> None:
    def ours() -> None:
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        case_of(bench_blend_windows, []).compare({}, ours=ours)


def test_the_baselines_of_blend_windows_write_into_what_they_hold() -> None:
    case = case_of(bench_blend_windows, [])
    windows, num_frames = case.inputs["windows"], case.inputs["num_frames"]
    expected = ops.blend_windows(**case.inputs)
    for baseline in (Accumulate(windows, num_frames), FrameByFrame(windows, num_frames)):
        first = baseline(**case.inputs)
        first.fill_(float("nan"))
        assert baseline(**case.inputs) is first
        torch.testing.assert_close(first, expected)
        assert first.stride() == expected.stride()


@pytest.mark.parametrize("bound", ["static", "clip", "frame"])
def test_the_baselines_of_denoise_step_are_the_step(bound: str) -> None:
    """And the one with held buffers writes into what it holds."""
    scenario = replace(TINY, options={**TINY.options, "bound": bound})
    inputs = harness.draw_inputs(bench_denoise_step.SPEC, scenario, "cpu", torch.float32)
    step = Composed(None if bound == "static" else BySorting(), inputs["windows"], inputs["latent"])
    for result in step(**inputs):
        result.fill_(float("nan"))
    expected = ops.denoise_step(**inputs)
    held = step(**inputs)
    for latent, x0 in (held, bench_denoise_step.composed(**inputs)):
        torch.testing.assert_close(latent, expected.latent)
        torch.testing.assert_close(x0, expected.x0)
    assert all(again is result for again, result in zip(step(**inputs), held, strict=True))


def test_the_copy_moves_the_op_s_bytes() -> None:
    case = case_of(bench_blend_windows, [])
    (copied,) = (side() for side in case.copy().values())
    assert 2 * copied.numel() == case.spec.bytes(TINY, torch.float32)


# ---------------------------------------------------------------- the norm and the convolution


CLIP = {"B": 1, "C": 8, "T": 3, "H": 4, "W": 5, "G": 4}


def row_of(module: Any, options: dict[str, Any], backend: str = "reference", **sizes: int) -> Row:
    """One tiny scenario through a benchmark, which holds every side against ours."""
    rows: list[Row] = []
    scenario = Scenario("tiny", {**CLIP, **sizes}, options, cpu=True)
    inputs = harness.draw_inputs(module.SPEC, scenario, "cpu", torch.float32)
    test = getattr(module, f"test_{module.SPEC.name}")
    test(Case(module.SPEC, scenario, backend, "cpu", torch.float32, 1, inputs, rows.append, 1e-9))
    return rows[0]


@pytest.mark.parametrize("film", [None, "BC"])
@pytest.mark.parametrize("per_frame", [True, False])
@pytest.mark.parametrize("act", [None, "silu"])
def test_the_layers_around_a_norm_compute_it(film: str | None, per_frame: bool, act: str | None) -> None:
    row = row_of(bench_group_norm, {"act": act, "film": film, "per_frame": per_frame})
    assert set(row.baselines) == set(goals.NORM_LAYERS) and not row.broken


@pytest.mark.parametrize("per_frame", [True, False])
def test_the_other_layout_is_one_that_torch_does_not_copy(per_frame: bool) -> None:
    x = bench_group_norm.contiguous(torch.zeros(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d), per_frame)
    assert (x.transpose(1, 2) if per_frame else x).is_contiguous()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_every_convolution_over_time_computes_it(fused: bool, taps: int, batch: int) -> None:
    row = row_of(bench_temporal_conv, {"fused": fused}, k=taps, B=batch)
    assert set(row.baselines) == set(goals.CONV_ANY) and not row.broken
    assert set(row.limits) == {"mm", "copy"}


@pytest.mark.parametrize("norm_act", [None, "silu"])
def test_every_projection_of_an_attention_block_computes_it(norm_act: str | None) -> None:
    options = {"fused": True, "norm_act": norm_act, "frame_bias": True, "residual": False}
    row = row_of(bench_temporal_conv, options, k=1, N=24)
    assert set(row.baselines) == {*goals.CONV_ANY, "linear"} and not row.broken


@pytest.mark.parametrize("fused", [False, True])
def test_one_clip_is_an_image_that_torch_takes_for_channels_last(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    """The stride of a batch of one decides which of its convolutions torch takes; the other is half as fast."""
    seen: list[torch.Tensor] = []
    real = torch.nn.functional.conv2d

    def watched(image: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        seen.append(image)
        return real(image, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    row_of(bench_temporal_conv, {"fused": fused}, k=3)
    assert seen and all(image.stride(0) == image[0].numel() and image.stride(1) == 1 for image in seen)


@pytest.mark.parametrize("fused", [False, True])
def test_the_norm_is_timed_in_the_kernel_and_before_it(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = pytest.importorskip("lumiere_fast.kernels.temporal_conv")
    used: list[bool] = []
    chosen = kernel.chosen

    def watched(*arguments: Any) -> Any:
        found = chosen(*arguments)
        used.append(found.get("fused_norm", False))
        return found

    monkeypatch.setattr(kernel, "chosen", watched)
    monkeypatch.setattr(timing, "MIN_ROUNDS", 1)
    row = row_of(bench_temporal_conv, {"fused": fused}, "triton", k=3)
    assert set(row.limits) == {"mm", "copy", *(goals.NORM_EITHER_WAY if fused else ())}
    assert set(used) == ({True, False} if fused else {False})


def test_torch_compile_gets_the_convolution_that_is_fastest_here(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"a": 2.0, "b": 1.0, "c": 3.0}

    def broken() -> None:
        raise RuntimeError("no kernel for the shape")

    sides: dict[str, Any] = {name: (lambda name=name: name) for name in costs}
    monkeypatch.setattr(timing, "clock_for", lambda device: lambda side: costs[side()])
    assert bench_temporal_conv.fastest({"broken": broken, **sides}, "cpu") == "b"


# ---------------------------------------------------------------- the lab's worker


def test_the_worker_knows_every_scenario_of_a_cpu() -> None:
    described = worker.describe("cpu")
    units = described["benchmarks"]
    assert described["machine"]["device"] == "cpu" and described["machine"]["versions"]["torch"] == torch.__version__
    assert {unit["op"] for unit in units} == {*worker.benchmarked_ops(), *worker.MODELS}
    for unit in units:
        spec, _ = harness.benchmark_of(unit["op"])
        assert {s.name: s.cpu for s in spec.scenarios}[unit["scenario"]]
    blends = {(unit["scenario"], unit["backend"]) for unit in units if unit["op"] == "blend_windows"}
    names = [scenario.name for scenario in bench_blend_windows.SPEC.scenarios if scenario.cpu]
    assert blends == {(name, backend) for name in names for backend in ("cpu", "reference")}


UNIT = {"stage": "benchmarks", "op": "blend_windows", "backend": "reference", "scenario": "demo", "dtype": "float32"}
SETTINGS = {"threads": 1, "budget": 1e-6, "compile": False}
CASE = "half-wide-kn-norm-many"


def test_the_worker_tunes_every_case_on_a_gpu_alone() -> None:
    described = worker.describe("cpu")
    assert (described["tuning"], described["configs"]) == ([], None)
    units = list(worker._cases())
    configured = [unit["scenario"] for unit in units if unit["table"] == "temporal_conv"]
    assert configured == list(_configs.cases("temporal_conv"))
    ordered = {unit["scenario"] for unit in units if unit["table"] == "spatial_attention_order"}
    assert ordered == {case for case in _configs.cases("spatial_attention_order") if not case.startswith("cpu")}
    assert {unit["op"] for unit in units} == {"temporal_conv", "spatial_attention"}
    assert len({tuple(unit[name] for name in record.KEY) for unit in units}) == len(units)
    assert all(unit["source"] for unit in units)


@pytest.mark.parametrize(("status", "verdict"), [("tuned", "met"), ("left", "skipped"), ("failed", "failed")])
def test_the_worker_s_row_of_a_case(monkeypatch: pytest.MonkeyPatch, status: Any, verdict: str) -> None:
    default, wrong = tune.default("temporal_conv", CASE), tune.Outcome({"block_m": 8}, why_not="off by nan")
    found = tune.Tuned("temporal_conv", CASE, status)
    if status == "tuned":
        found = replace(found, config={"block_m": 128}, times_as_fast=1.5, candidates=(tune.Outcome(default), wrong))
    monkeypatch.setattr(tune.Tuner, "tune", lambda self, op, case: found)
    unit = {"stage": "tuning", "table": "temporal_conv", "scenario": CASE, "budget": 1.0}
    (row,) = worker.perform(unit, "cpu")
    assert (row["verdict"], row["left"]) == (verdict, status == "left")
    if status == "tuned":
        assert row["measured"] == "1.50x the default, block_m 128" and "off by nan" in row["why"]
        assert (row["numbers"]["config"], row["numbers"]["default"]) == ({"block_m": 128}, default)
        json.dumps(row)
    else:
        assert row["numbers"] is row["measured"] is None


def test_the_worker_times_with_the_table_that_it_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, device = tmp_path / "table.json", torch.device("cpu")
    before = _configs.chosen("temporal_conv", CASE, device)
    config = {**before, "num_stages": 5}
    _configs.save(path, "NVIDIA Imaginary", {"temporal_conv": {CASE: config}})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Imaginary")
    with worker.tuned(str(path)):
        assert _configs.chosen("temporal_conv", CASE, device) == config
    with worker.tuned(None):
        assert _configs.chosen("temporal_conv", CASE, device) == before
    monkeypatch.setattr(worker, "_benchmark", lambda *_: dict(_configs.chosen("temporal_conv", CASE, device)))
    assert worker.perform({**UNIT, **SETTINGS, "configs": str(path)}, "cpu") == [config]
    assert worker.perform({**UNIT, **SETTINGS, "configs": None}, "cpu") == [before]


def test_the_worker_reports_times_and_what_they_are_held_against() -> None:
    before = torch.get_num_threads()
    row = worker.benchmark({**UNIT, **SETTINGS}, "cpu")
    torch.set_num_threads(before)
    assert row["verdict"] == "no goal" and row["numbers"]["median_s"] > 0 and "GB/s" in row["measured"]
    assert set(row["numbers"]["ratios"]) == {"accumulate loop", "frame by frame", "copy"}


def test_the_worker_gives_a_wrong_result_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.blend_windows

    def wrong(*args: Any, **options: Any) -> Any:
        return right(*args, **options).add_(1e-2)

    monkeypatch.setattr(ops, "blend_windows", wrong)
    monkeypatch.setattr(worker, "_reasons_against", lambda case: [])
    row = worker.benchmark({**UNIT, **SETTINGS}, "cpu")
    assert set(row) == {"verdict", "why"} and row["verdict"] == "failed" and "differs from us" in row["why"]


def test_the_worker_tells_what_cannot_run_or_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    row = worker.benchmark({**UNIT, **SETTINGS, "backend": "cuda"}, "cpu")
    assert row["verdict"] == "skipped" and "cuda" in row["why"]

    def full(case: Any) -> list[str]:
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(worker, "_reasons_against", full)
    row = worker.benchmark({**UNIT, **SETTINGS}, "cpu")
    assert row["verdict"] == "skipped" and "out of memory" in row["why"]


@pytest.mark.parametrize(("name", "verdict"), [("tokenizers", "skipped"), ("lumiere_fastt", "failed")])
def test_the_worker_skips_what_lacks_an_optional_package(
    monkeypatch: pytest.MonkeyPatch, name: str, verdict: str
) -> None:
    def lacking(case: Any) -> list[str]:
        try:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        except ImportError as error:
            raise ImportError("the text encoder needs it") from error

    monkeypatch.setattr(worker, "_reasons_against", lacking)
    monkeypatch.setattr("benchmarks.reporting.importlib.util.find_spec", lambda name: None)
    row = worker.benchmark({**UNIT, **SETTINGS}, "cpu")
    assert row["verdict"] == verdict
    assert ("tokenizers, which is not installed" in row["why"]) == (verdict == "skipped")


def test_the_worker_s_smoke_has_a_row_for_each_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # as the lab starts it
    rows = {row["backend"]: row for row in worker.smoke("blend_windows", "cpu")}
    assert set(rows) == {*dispatch.BACKENDS} - {*dispatch.COMPOSED}
    assert all(row["verdict"] in ("met", "skipped") for row in rows.values())
    assert all((row["source"] is None) == (row["verdict"] == "skipped") for row in rows.values())


def test_a_smoke_that_raises_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def checks(device: str, names: list[str]) -> Any:
        raise RuntimeError("ptxas died")

    monkeypatch.setattr(worker.selftest, "checks", checks)
    (row,) = worker.smoke("blend_windows", "cpu")
    assert row["verdict"] == "failed" and "ptxas died" in row["why"]


def test_what_others_use_of_the_machine_is_told() -> None:
    assert harness.used_by_others((1.0, 10.0, 100.0), (3.0, 16.0, 108.0)) == 0.5  # 6 s of 8 busy, 2 of them ours
    assert harness.used_by_others((1.0, 10.0, 100.0), (3.0, 11.0, 108.0)) == 0.0  # ticks are coarse
    assert harness.used_by_others(None, None) is None
    rows: list[Row] = []
    case_of(bench_blend_windows, rows).compare({})
    told = worker._against_baselines(replace(rows[0], others=0.25, broken={"a": "x"}))
    assert told == "a cannot run, others used 25% of the machine meanwhile"
    assert "others" not in worker._against_baselines(replace(rows[0], others=0.05))
