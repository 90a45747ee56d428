"""Verdicts on made-up rows: at the boundary, which rows a goal is for, and that no goal names a side nobody times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import goals
from benchmarks.goals import Ceilings, Measured, overall, verdicts
from lumiere_fast.ops._spec import Scenario

ROOT = Path(__file__).resolve().parents[2]


def row(op: str, device: str = "cuda", options: dict[str, Any] | None = None, **changes: Any) -> Measured:
    sizes = {"B": 1, "C": 256, "T": 16, "H": 64, "W": 64, "D": 64, **changes.pop("sizes", {})}
    settings: dict[str, Any] = {
        "op": op,
        "requested": "auto",
        "backend": "triton" if device == "cuda" else "cpu",
        "scenario": Scenario("made_up", sizes, options or {}),
        "device": device,
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "threads": 1,
        "seconds": 1e-3,
        "times_as_fast": {},
        "nbytes": 0,
        "flops": 0,
    }
    return Measured(**{**settings, **changes})


def reached(measured: Measured) -> dict[str, str]:
    return {verdict.goal: verdict.verdict for verdict in verdicts(measured)}


@pytest.mark.parametrize(("ratio", "verdict"), [(2.5, "met"), (2.4999, "missed"), (float("nan"), "missed")])
def test_a_ratio_at_the_boundary(ratio: float, verdict: str) -> None:
    measured = row("blend_windows", "cpu", times_as_fast={"accumulate loop": ratio, "frame by frame": 0.1})
    assert reached(measured) == {">= 2.5x accumulate loop": verdict}
    assert overall(verdicts(measured)) == verdict


def test_the_best_of_several_baselines_counts() -> None:
    fused = {"fused": True}
    both = {"conv1d": 9.0, "conv3d NCDHW": 3.9}
    assert list(reached(row("temporal_conv", options=fused, times_as_fast=both)).values()) == ["missed"]
    assert list(reached(row("temporal_conv", options=fused, times_as_fast={"conv1d": 9.0})).values()) == ["met"]
    assert overall(verdicts(row("temporal_conv", options=fused, times_as_fast={"unknown": 9.0}))) == "no goal"


@pytest.mark.parametrize(("rate", "verdict"), [(1.9001e12, "met"), (1.8999e12, "missed")])
def test_a_bandwidth_at_the_boundary(rate: float, verdict: str) -> None:
    nbytes = 1 << 30
    assert reached(row("group_norm", nbytes=nbytes, seconds=nbytes / rate)) == {">= 1.90 TB/s": verdict}


def test_bandwidth_goals_hold_from_512_mb_on() -> None:
    size = goals.BANDWIDTH_FROM_BYTES
    assert reached(row("group_norm", nbytes=size)) and not reached(row("group_norm", nbytes=size - 1))


def test_goals_of_arithmetic_hold_from_16k_rows_on() -> None:
    plain, slow = {"fused": False}, {"mm": 0.8}
    large = {"B": 1, "T": 16, "H": 32, "W": 32}
    assert reached(row("temporal_conv", options=plain, times_as_fast=slow, sizes=large)) == {">= 0.85x mm": "missed"}
    assert not reached(row("temporal_conv", options=plain, times_as_fast=slow, sizes={**large, "W": 31}))


def test_another_card_s_goals_are_scaled_by_what_it_reaches() -> None:
    nbytes = 1 << 30
    measured = row("denoise_step", nbytes=nbytes, seconds=nbytes / 3e12)
    assert reached(measured) == {">= 2.60 TB/s": "met"}
    faster = replace(measured, ceilings=Ceilings(copy_bytes_per_s=4.2e12))
    assert reached(faster) == {">= 3.64 TB/s": "missed"}


@pytest.mark.parametrize(("bytes_", "verdict"), [(goals.NO_TEMPORARIES, "met"), (goals.NO_TEMPORARIES + 1, "missed")])
def test_temporaries_may_not_be_more(bytes_: int, verdict: str) -> None:
    assert reached(row("denoise_step", temporaries=bytes_)) == {"<= 1 MiB of temporaries": verdict}


@pytest.mark.parametrize(("part", "verdict"), [(0.5, "met"), (0.51, "missed")])
def test_memory_relative_to_a_baseline(part: float, verdict: str) -> None:
    measured = row("stunet", options={"preset": "paper"}, of_memory={"eager layers": part}, flops=0)
    assert reached(measured)["<= 0.5 of the memory of eager layers"] == verdict


def test_threads_decide_on_a_cpu() -> None:
    for threads, bound in ((1, 1.3), (2, 1.15)):
        measured = row("temporal_conv", "cpu", {"fused": True}, threads=threads, times_as_fast={"conv1d": bound})
        (verdict,) = verdicts(measured)
        assert (verdict.bound, verdict.verdict) == (bound, "met")


def test_the_fused_convolution_is_held_against_conv2d_too() -> None:
    measured = row("temporal_conv", "cpu", {"fused": True}, times_as_fast={"conv1d": 9.0, "conv2d": 1.2})
    assert list(reached(measured).values()) == ["missed"]
    plain = row("temporal_conv", "cpu", {"fused": False}, times_as_fast={"conv1d": 9.0, "mm": 2.0, "conv2d": 0.1})
    assert list(reached(plain).values()) == ["met"]


def test_a_fused_linear_layer_is_not_held_to_the_goals_of_convolutions() -> None:
    for device in ("cpu", "cuda"):
        for taps, held in ((3, True), (1, False)):
            ratios = {"conv1d": 1.0, "conv2d": 1.0}
            options = {"options": {"fused": True}, "times_as_fast": ratios, "sizes": {"k": taps}, "threads": 1}
            assert ("missed" in reached(row("temporal_conv", device, **options)).values()) == held


@pytest.mark.parametrize(("slower", "verdict"), [(0.97, "met"), (0.96, "missed")])
def test_the_norm_must_be_where_it_is_faster(slower: float, verdict: str) -> None:
    ways = dict(zip(goals.NORM_EITHER_WAY, (slower, 2.0), strict=True))
    assert list(reached(row("temporal_conv", options={"fused": True}, times_as_fast=ways)).values()) == [verdict]
    assert not reached(row("temporal_conv", options={"fused": False}, times_as_fast=ways))


def test_the_guided_base_clip_has_its_own_goal() -> None:
    clip = {"T": 80, "H": 128, "W": 128}
    ratio = {"composed, sort": 6.0}
    assert reached(row("denoise_step", times_as_fast=ratio, sizes=clip)) == {
        f">= 8x best of {' | '.join(goals.COMPOSED)}": "missed"
    }
    assert "missed" not in reached(row("denoise_step", times_as_fast=ratio)).values()


def test_temporal_attention_is_held_against_the_best_kernel_of_torch() -> None:
    ratios = {"rearrange + SDPA": 9.0, "rearrange + SDPA efficient": 3.9, "rearrange + matmul": 1.0}
    measured = row("temporal_attention", times_as_fast=ratios)
    assert list(reached(measured).values()) == ["missed"]
    slower = row("temporal_attention", times_as_fast={**ratios, "rearrange + SDPA efficient": 4.0})
    assert list(reached(slower).values()) == ["met"]
    gradients = row("temporal_attention", options={"backward": True}, times_as_fast=ratios, temporaries=1 << 30)
    assert not reached(gradients)


def test_auto_is_held_against_our_own_kernel_too() -> None:
    ratios = {"SDPA cuDNN of views": 1.0, "triton": 0.96}
    measured = row("spatial_attention", options={"text": True}, backend="cudnn", times_as_fast=ratios)
    assert sorted(reached(measured).values()) == ["met", "missed"]
    forced = row("spatial_attention", options={"text": True}, requested="cudnn", times_as_fast=ratios)
    assert list(reached(forced).values()) == ["met"]


@pytest.mark.parametrize("change", [{"backend": "reference"}, {"dtype": "float16"}])
def test_no_goal_for_the_reference_and_other_dtypes(change: dict[str, str]) -> None:
    assert verdicts(row("group_norm", times_as_fast={"layers": 1.0}))
    assert overall(verdicts(row("group_norm", times_as_fast={"layers": 1.0}, **change))) == "no goal"


@pytest.mark.parametrize("op", sorted({goal.op for goal in goals.GOALS}))
def test_every_side_that_a_goal_names_is_timed(op: str) -> None:
    source = (ROOT / "benchmarks" / f"bench_{op}.py").read_text()
    harness = (ROOT / "benchmarks" / "harness.py").read_text()
    for name in {name for goal in goals.GOALS if goal.op == op for name in goal.over}:
        by_name = f'"{name}"' in source or f'"{name}"' in harness or f"def {name}(" in source
        assert by_name or (name in goals.EQUAL_CONV and "EQUAL_CONV" in source), name
