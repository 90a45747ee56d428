"""Which windows a clip is cut into, and which of the possible cuts a memory budget allows."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumiere_fast import ops
from lumiere_fast.pipelines.windows import WindowPlan, choose_windows, plan_windows, window_choices


def lengths(plans: list[WindowPlan]) -> list[int]:
    return [plan.window_frames for plan in plans]


def chosen(budget: int | None, **options: Any) -> int:
    """Frames of a window, of those for 80 frames in multiples of 4, where a frame takes a byte."""
    return choose_windows(window_choices(80, 4, **options), lambda frames: frames, budget).window_frames


# Exact or shifted ----------------------------------------------------------------------------------------------------


def test_the_lengths_that_tile_80_frames() -> None:
    exact = [plan.window_frames for plan in reversed(window_choices(80, 1)) if plan.exact]
    assert exact == [3, 4, 5, 8, 15, 28, 41, 80]
    assert [plan.window_frames for plan in reversed(window_choices(80, 4)) if plan.exact] == [4, 8, 28, 80]


@settings(deadline=None)
@given(st.integers(1, 90), st.integers(1, 30), st.data())
def test_exact_is_that_all_neighbours_share_the_overlap(frames: int, window: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, window - 1))
    plan = plan_windows(frames, window, overlap)
    shared = [one.frames.stop - two.frames.start for one, two in pairwise(plan)]
    assert plan.exact == all(count == overlap for count in shared)


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (plan_windows(80, 8), "13 windows of 8 frames, overlap 2, exact"),
        (plan_windows(16, 8), "3 windows of 8 frames, overlap 2, the last shifted back by 4"),
        (plan_windows(5, 8), "1 window of 5 frames"),
        (plan_windows(8, 6, 4, weights="pyramid"), "2 windows of 6 frames, overlap 4, exact, pyramid weights"),
        (plan_windows(8, 5, weights=[1, 2, 3, 2, 1]), "2 windows of 5 frames, overlap 2, exact, given weights"),
        (
            plan_windows(16, 8, size=(96, 80), window_size=(64, 64), weights="trapezoid"),
            "3 x 2 x 2 windows of 8 x 64 x 64 (frames x height x width), overlap 2 x 16 x 16, "
            "the last shifted back by 4 x 16 x 32, trapezoid weights",
        ),
        (plan_windows(8, 8, size=(64, 64), window_size=(64, 99)), "1 window of 8 frames"),
    ],
)
def test_a_plan_says_what_it_is(plan: WindowPlan, text: str) -> None:
    assert str(plan) == text


# In space ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.tuples(*[st.integers(1, 7)] * 3), st.tuples(*[st.integers(2, 5)] * 3), st.data())
def test_windows_in_space_cover_the_clip(
    clip: tuple[int, int, int], window: tuple[int, int, int], data: st.DataObject
) -> None:
    overlap = [data.draw(st.integers(0, side // 2)) for side in window]
    plan = plan_windows(
        clip[0], window[0], overlap[0], size=clip[1:], window_size=window[1:], size_overlap=(overlap[1], overlap[2])
    )
    counts = torch.zeros(1, 1, *clip)
    for box in plan:
        box.of(counts).add_(1)
    assert counts.min() > 0
    assert len(plan) == len(set(plan.corners))
    pieces = [box.of(torch.ones(1, 1, *clip)) for box in plan]
    assert all(piece.shape[2:] == tuple(map(min, window, clip)) for piece in pieces)
    assert (ops.blend_windows(pieces, plan.starts, clip[0], weights=plan.weights) == 1).all()


def test_a_quarter_of_a_side_is_shared_by_default() -> None:
    plan = plan_windows(4, 4, size=(100, 256), window_size=(64, 128))
    assert plan.size_overlap == (16, 32)
    assert plan.starts == [(0, h, w) for h in (0, 36) for w in (0, 96, 128)]


def test_frames_that_a_window_holds_are_not_cut() -> None:
    plan = plan_windows(16, 8, size=(64, 48), window_size=(64, 64), weights=[[1] * 8, [1] * 64, [2] * 64])
    assert plan.window_size is None
    assert plan.starts == [0, 6, 8]
    assert plan.weights == (1.0,) * 8


@pytest.mark.parametrize("weights", ["trapezoid", "pyramid", ([1, 2, 3, 1], [1, 5, 1], range(1, 10))])
def test_weights_reach_the_blend(weights: Any) -> None:
    """The columns are one window's: whatever weights were given along them, for windows wider than the clip, cancel."""
    plan = plan_windows(7, 4, 1, size=(4, 2), window_size=(3, 9), size_overlap=(2, 0), weights=weights)
    pieces = [torch.full((1, 1, 4, 3, 2), float(i)) for i in range(len(plan))]
    blended = ops.blend_windows(pieces, plan.starts, 7, weights=plan.weights)
    over_time = weights[0] if isinstance(weights, tuple) else ops.window_weights(weights, 4, 1)
    assert [corner[0] for corner in plan.corners] == [0, 0, 3, 3]
    share = over_time[0] / (over_time[3] + over_time[0])  # of the second window, of values 2 and 3, in frame 3
    assert blended[0, 0, 3, 0, 0].item() == pytest.approx(2 * share)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (64, 64)}, "size and window_size together"),
        ({"window_size": (64, 64)}, "size and window_size together"),
        ({"size_overlap": (4, 4)}, "size and window_size together"),
        (
            {"size": (64, 64), "window_size": (32, 16), "size_overlap": (4, 16)},
            "size_overlap's width must be from 0 to window_size's width - 1 = 15, got 16",
        ),
        ({"weights": "square"}, "'flat' or 'trapezoid' or 'pyramid', got 'square'"),
        ({"size": (64, 64), "window_size": (32, 32), "weights": [[1.0] * 4]}, "3 vectors, .* got 1"),
        ({"weights": [1.0] * 3}, r"weights\[0\] must have the 4 entries of its axis, got 3"),
        ({"weights": [1.0, 2.0, -1.0, 1.0]}, "weights must be positive and finite"),
        ({"weights": 3}, "a vector of numbers, got 3"),
    ],
)
def test_what_is_no_plan_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_windows(16, 4, **options)


# The choice ----------------------------------------------------------------------------------------------------------


def test_choices_are_the_lengths_that_the_model_takes() -> None:
    assert lengths(window_choices(80, 4)) == list(range(80, 0, -4))
    assert lengths(window_choices(80, 4, at_most=10)) == [8, 4]
    assert lengths(window_choices(80, 4, overlap=4)) == list(range(80, 4, -4))
    assert lengths(window_choices(80, 4, overlap=0))[-1] == 4
    assert lengths(window_choices(10, 4)) == [8, 4], "10 frames are no multiple: the last window is shifted"
    assert lengths(window_choices(9, 1, overlap=7)) == [9, 8]
    space = window_choices(8, 4, size=(64, 64), window_size=(32, 32))
    assert [len(plan) for plan in space] == [9, 27]


@pytest.mark.parametrize(("num_frames", "factor", "overlap"), [(1, 1, 2), (4, 4, 7), (4, 4, 4)])
def test_one_window_shares_nothing_whatever_the_overlap(num_frames: int, factor: int, overlap: int) -> None:
    (plan,) = window_choices(num_frames, factor, overlap)
    assert (len(plan), plan.window_frames, plan.exact) == (1, num_frames, True)
    assert plan.smaller(factor) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 4), "a multiple of the model's temporal factor 4 frames, and at most 3 here"),
        ((80, 4, 8, 10), "at most 10 frames, .* temporal factor 4, cannot share 8 frames; give an overlap below 8"),
        ((80, 4, -1), "overlap must be >= 0, got -1"),
    ],
)
def test_no_choice_is_an_error(arguments: tuple[int, ...], message: str) -> None:
    *positions, at_most = arguments if len(arguments) == 4 else (*arguments, None)
    with pytest.raises(ValueError, match=message):
        window_choices(*positions, at_most=at_most)  # type: ignore[arg-type]


def test_the_choice_under_shrinking_budgets() -> None:
    """The fewest frames computed, then the fewest windows: 28 tiles, 44 does not; 24, 16 and 12 make 96, 20 makes 100.

    Where memory fits all of the clip it is one window, and from 28 on the exact tiling beats the longer ones.
    """
    picked = {budget: chosen(budget) for budget in range(4, 84)}
    runs = {frames: [b for b, picked_frames in picked.items() if picked_frames == frames] for frames in picked.values()}
    assert {frames: (run[0], run[-1]) for frames, run in runs.items()} == {
        4: (4, 7),
        8: (8, 11),
        12: (12, 15),
        16: (16, 23),
        24: (24, 27),
        28: (28, 79),
        80: (80, 83),
    }
    assert chosen(None) == 80
    assert chosen(79, at_most=16) == 16
    assert chosen(79, at_most=8) == 8


def test_a_budget_that_none_fits_is_said() -> None:
    message = "even windows of 4 frames, the shortest, take about 8.00 GiB, and 7.00 are to be had"
    with pytest.warns(RuntimeWarning, match=re.escape(message)):
        plan = choose_windows(window_choices(80, 4), lambda frames: frames * 2**31, 7 * 2**30)
    assert plan.window_frames == 4


def test_smaller_plans_end() -> None:
    """Each computes no less than the one before and needs less memory; shape, overlap and weights stay."""
    plan: WindowPlan | None = plan_windows(
        80, 80, 3, size=(64, 64), window_size=(32, 32), size_overlap=(8, 4), weights="pyramid"
    )
    kept, seen = [], []
    while plan is not None:
        kept.append((plan.num_frames, plan.overlap, plan.size, plan.window_size, plan.size_overlap, plan.weights))
        seen.append(plan)
        plan = plan.smaller(4)
    assert set(kept) == {(80, 3, (64, 64), (32, 32), (8, 4), "pyramid")}
    assert lengths(seen)[0] == 80 and lengths(seen)[-1] == 4
    for before, after in pairwise(seen):
        assert after.window_frames < before.window_frames
        assert len(after) * after.window_frames >= len(before) * before.window_frames
    assert lengths(iterated(plan_windows(80, 80))) == [80, 28, 24, 16, 12, 8, 4]


def iterated(plan: WindowPlan | None) -> list[WindowPlan]:
    return [] if plan is None else [plan, *iterated(plan.smaller(4))]


def test_the_smallest_has_none_below() -> None:
    assert plan_windows(80, 4).smaller(4) is None
    assert plan_windows(80, 8, 4).smaller(4) is None, "4 frames cannot share 4"
    assert plan_windows(10, 8).smaller(4) is not None
    assert plan_windows(80, 8, weights=[1.0] * 8).smaller(4) is None, "eight numbers fit no other length"
