from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lumiere_fast.data.clips import (
    COLOURS,
    GROUNDS,
    MOTIONS,
    SHAPES,
    Attributes,
    ClipBatch,
    ClipSampler,
    SceneState,
    coverage,
    render,
)
from lumiere_fast.data.tracker import evaluate, score_clip, track, wilson_interval

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up", "circle": "none", "pulse": "pulse"}


@pytest.fixture(scope="module")
def batch() -> ClipBatch:
    return ClipSampler(21).batch(0, 96)


@pytest.fixture(scope="module")
def video(batch: ClipBatch) -> Tensor:
    return render(batch.states, 32)


def noisy(video: Tensor) -> Tensor:
    return video + 0.05 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))


def blurred(video: Tensor) -> Tensor:
    row = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (row[:, None] * row).expand(3, 1, 1, 3, 3).contiguous()
    return F.conv3d(F.pad(video, (1, 1, 1, 1, 0, 0), mode="replicate"), kernel, groups=3)


def scene(
    shape: str = "ball", colour: str = "red", ground: str = "black", *, cx: Tensor, cy: Tensor, diameter: Tensor
) -> Tensor:
    """A clip of arbitrary course, (3, T, 32, 32)."""
    indices = SHAPES.index(shape), list(COLOURS).index(colour), list(GROUNDS).index(ground)
    look = [torch.tensor([index]) for index in indices]
    return render(SceneState(look[0], look[1], look[2], cx[None], cy[None], diameter[None]), 32)[0]


HERE = torch.full((16,), 0.5)
FRAMES = torch.arange(16.0)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_truth_is_recognised(size: int, split: str) -> None:
    batch = ClipSampler(22, split).batch(0, 120)  # type: ignore[arg-type]
    report = evaluate(render(batch.states, size), batch.attributes)
    assert report["colour"]["accuracy"] == report["ground"]["accuracy"] == 1.0
    assert report["shape"]["accuracy"] >= 0.98 and report["motion"]["accuracy"] >= 0.98
    assert report["quality"]["detected"] == 1.0 and report["quality"]["ground_flicker"] < 1e-4
    assert report["quality"]["shape_fit"] > 0.95 and report["quality"]["shape_flips"] < 0.1


@pytest.mark.parametrize("spoil", [noisy, blurred, lambda v: noisy(blurred(v))], ids=["noise", "blur", "both"])
def test_slightly_spoiled_truth_is_recognised(spoil, batch: ClipBatch, video: Tensor) -> None:  # type: ignore[no-untyped-def]
    report = evaluate(spoil(video), batch.attributes)
    assert all(report[name]["accuracy"] >= 0.95 for name in ("shape", "colour", "ground", "motion", "all"))


def test_positions_and_areas_are_the_true_ones_under_noise(batch: ClipBatch, video: Tensor) -> None:
    state, spoiled = batch.states, noisy(video)
    for i in range(24):
        ground = torch.tensor(list(GROUNDS.values()))[batch.ground[i]] / 127.5 - 1
        colour = torch.tensor(list(COLOURS.values()))[batch.colour[i]] / 127.5 - 1
        seen = track(spoiled[i], ground, colour)
        alpha = coverage(state.shape[i].expand(16), state.cx[i], state.cy[i], state.diameter[i], 256)
        assert seen.detected.all()
        torch.testing.assert_close(seen.cx, state.cx[i], atol=0.01, rtol=0)
        torch.testing.assert_close(seen.cy, state.cy[i], atol=0.01, rtol=0)
        torch.testing.assert_close(seen.area, alpha.mean(dim=(1, 2)), atol=0, rtol=0.15)


# ------------------------------------------------------------------------------------- wrong clips are not let through


def test_reversed_clips_show_the_opposite_motion(batch: ClipBatch, video: Tensor) -> None:
    for a, clip in zip(batch.attributes, video, strict=True):
        assert score_clip(clip.flip(1)).motion == OPPOSITE[MOTIONS[a.motion]]


def test_shuffled_frames_show_no_motion(batch: ClipBatch, video: Tensor) -> None:
    generator = torch.Generator().manual_seed(3)
    for clip in video:
        order = torch.randperm(16, generator=generator)
        assert score_clip(clip[:, order]).motion == "none"


def test_a_repeated_frame_is_still(video: Tensor) -> None:
    for clip in video[:24]:
        assert score_clip(clip[:, :1].expand(-1, 16, -1, -1)).motion == "still"


def test_wrong_attributes_are_counted_wrong(batch: ClipBatch) -> None:
    names = {"shape": len(SHAPES), "colour": len(COLOURS), "ground": len(GROUNDS)}
    for name, count in names.items():
        wrong = replace(batch, **{name: (getattr(batch, name) + 1) % count})
        report = evaluate(render(wrong.states, 32), batch.attributes)
        assert report[name]["accuracy"] == report["look"]["accuracy"] == report["all"]["accuracy"] == 0.0
        assert all(report[other]["accuracy"] >= 0.98 for other in {*names, "motion"} - {name})


def test_motion_alone_wrong_keeps_the_look(batch: ClipBatch, video: Tensor) -> None:
    wanted = [a._replace(motion=(a.motion + 1) % len(MOTIONS)) for a in batch.attributes]
    report = evaluate(video, wanted)
    assert report["motion"]["accuracy"] == report["all"]["accuracy"] == 0.0
    assert report["look"]["accuracy"] >= 0.98


@pytest.mark.parametrize(
    ("cx", "cy", "diameter"),
    [
        (0.5 + 0.2 * torch.cos(math.pi / 8 * FRAMES), HERE, 0.9 * HERE),
        (0.3 + 0.027 * FRAMES, 0.3 + 0.027 * FRAMES, 0.9 * HERE),
        (0.5 + 0.2 * torch.cos(math.pi / 4 * FRAMES), 0.5 + 0.2 * torch.sin(math.pi / 4 * FRAMES), 0.9 * HERE),
        (HERE, HERE, 0.3 + 0.015 * FRAMES),
        (0.4 + 0.012 * FRAMES, HERE, 0.45 + 0.12 * torch.sin(math.pi / 4 * FRAMES)),
        (HERE, HERE, 0.45 + 0.12 * torch.sin(math.pi / 2 * FRAMES)),
        (0.5 + 0.2 * (FRAMES < 8) - 0.2 * (FRAMES >= 8), HERE, 0.9 * HERE),
    ],
    ids=["swings", "diagonal", "circles twice", "grows", "pulses adrift", "pulses twice as quickly", "jumps once"],
)
def test_other_courses_fit_no_motion(cx: Tensor, cy: Tensor, diameter: Tensor) -> None:
    assert score_clip(scene(cx=cx, cy=cy, diameter=diameter)).motion == "none"


def test_an_object_seen_in_half_of_the_frames_has_no_motion() -> None:
    clip = scene(cx=0.3 + 0.025 * FRAMES, cy=HERE, diameter=0.9 * HERE)
    assert score_clip(clip).motion == "right"
    clip[:, ::2] = -1
    score = score_clip(clip)
    assert score.detected == 0.5 and score.motion == "none" and score.shape == "ball"


def test_a_bare_ground_has_no_object() -> None:
    bare = (torch.tensor(GROUNDS["brown"]) / 127.5 - 1).view(3, 1, 1, 1).expand(3, 16, 32, 32)
    score = score_clip(noisy(bare))
    assert (score.shape, score.colour, score.ground, score.motion) == (None, None, "brown", "none")
    assert score.detected == 0.0


def test_noise_is_no_shape_and_no_motion() -> None:
    generator = torch.Generator().manual_seed(4)
    for _ in range(8):
        score = score_clip(2 * torch.rand(3, 16, 32, 32, generator=generator) - 1)
        assert score.shape is None and score.motion not in MOTIONS


# ------------------------------------------------------------------------------------------------------------- quality


def test_shape_flips_are_counted() -> None:
    ball, star = (scene(name, cx=HERE, cy=HERE, diameter=0.9 * HERE) for name in ("ball", "star"))
    assert score_clip(ball).shape_flips == 0
    clip = ball.clone()
    clip[:, 4:8] = star[:, 4:8]
    clip[:, 12:] = star[:, 12:]
    assert score_clip(clip).shape_flips == 3


def test_ground_flicker_is_the_deviation_of_the_border() -> None:
    clip = scene(ground="gray", cx=HERE, cy=HERE, diameter=0.9 * HERE)
    clip[:, ::2] += 0.04
    clip[:, 1::2] -= 0.04
    # Black to white is 2 in the clip and 1 in the score.
    assert score_clip(clip).ground_flicker == pytest.approx(0.02, abs=1e-4)


def test_a_single_frame_has_a_look() -> None:
    images = ClipSampler(23).images(0, 60)
    report = evaluate(render(images.states, 32), images.attributes)
    assert report["look"]["accuracy"] >= 0.98
    assert report["motion"]["accuracy"] == 0.0


# ------------------------------------------------------------------------------------------------------------ interface


@pytest.mark.parametrize(("hits", "trials"), [(0, 7), (7, 7), (3, 10), (96, 100), (1, 2000)])
def test_wilson_ends_lie_z_standard_errors_from_the_rate(hits: int, trials: int) -> None:
    rate, z = hits / trials, 1.959964
    low, high = wilson_interval(hits, trials)
    for end in (low, high):
        assert abs(rate - end) == pytest.approx(z * math.sqrt(end * (1 - end) / trials), abs=1e-6)
    assert low <= rate <= high and low < high


def test_half_precision_and_any_memory_format_score_alike(batch: ClipBatch, video: Tensor) -> None:
    for clip, a in list(zip(video, batch.attributes, strict=True))[:8]:
        assert score_clip(clip.contiguous()).matches(a)["all"]
        assert score_clip(clip.bfloat16()).matches(a)["all"]


def test_bad_input_is_named(video: Tensor) -> None:
    with pytest.raises(ValueError, match=r"video has shape \(16, 3, 32, 32\)"):
        score_clip(video[0].transpose(0, 1))
    with pytest.raises(ValueError, match=r"video has dtype torch\.uint8"):
        score_clip(video[0].to(torch.uint8))
    with pytest.raises(ValueError, match="not finite"):
        score_clip(torch.full_like(video[0], math.nan))
    with pytest.raises(ValueError, match="attributes has 1 entries"):
        evaluate(video, [Attributes(0, 0, 0, 0)])
    with pytest.raises(ValueError, match="hits=3, trials=2"):
        wilson_interval(3, 2)
