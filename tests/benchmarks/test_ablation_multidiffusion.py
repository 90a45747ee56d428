"""The measure of the ablation: it finds a seam that was planted, and none where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.ablation_multidiffusion import differences, joins, ratios
from lumiere_fast.pipelines.windows import plan_windows


def truth(num_frames: int = 40) -> Tensor:
    """Two clips that move, ever faster."""
    t = torch.arange(num_frames, dtype=torch.float32)[:, None, None]
    x = torch.arange(16, dtype=torch.float32)
    return torch.stack([torch.sin(speed * t * (1 + t / 40) + x).expand(3, -1, 16, -1) for speed in (0.1, 0.3)])


def grainy(clip: Tensor) -> Tensor:
    """With grain of the same strength in all frames, as a model leaves it."""
    return clip + 0.1 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))


def test_joins_are_where_the_windows_change() -> None:
    assert joins(plan_windows(24, 8, 0)).nonzero().flatten().tolist() == [7, 15]
    assert joins(plan_windows(14, 8, 2)).nonzero().flatten().tolist() == [5, 7]  # into the overlap, and out of it
    assert not joins(plan_windows(8, 8, 2)).any()


def test_a_clip_without_seams_has_a_ratio_of_one_however_it_moves() -> None:
    found = differences(grainy(truth()), truth())
    for overlap in (0, 2):
        assert ratios(found, joins(plan_windows(40, 8, overlap))) == pytest.approx([1.0, 1.0], abs=0.05)


@pytest.mark.parametrize("jump", [0.2, -0.2])
def test_a_planted_seam_is_found_where_it_is_and_nowhere_else(jump: float) -> None:
    at = joins(plan_windows(40, 8, 0))
    segment = (torch.arange(40) // 8 % 2)[:, None, None]  # every other one is brighter
    found = differences(grainy(truth()) + jump * segment, truth())
    assert min(ratios(found, at)) > 1.5
    for clip in found:
        assert sorted(clip.topk(int(at.sum())).indices.tolist()) == at.nonzero().flatten().tolist()
    assert max(ratios(found, at.roll(1))) < 1


def test_of_a_still_clip_every_difference_counts() -> None:
    still = torch.zeros(1, 3, 4, 2, 2)
    still[:, :, 2:] = 0.5
    assert differences(still).tolist() == [[0.0, 0.5, 0.0]]
    assert torch.equal(differences(still), differences(still, torch.zeros_like(still)))
