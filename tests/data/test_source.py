from __future__ import annotations

import pytest
import torch

from lumiere_fast.data.clips import ClipSampler, render
from lumiere_fast.data.source import ProceduralClips

CPU = torch.device("cpu")


def test_single_frames_are_the_samplers_images() -> None:
    frames, prompts = ProceduralClips(3, 1).draw(5, 4, 16, CPU)
    images = ClipSampler(3).images(5, 4)
    assert torch.equal(frames, render(images.states, 16))
    assert frames.shape == (4, 3, 1, 16, 16)
    assert prompts == images.prompts


def test_clips_are_windows_at_any_place() -> None:
    source = ProceduralClips(0, 4)
    starts = set()
    for step in range(60):
        whole = render(ClipSampler(0).batch(step, 2).states, 8)
        frames, _ = source.draw(step, 2, 8, CPU)
        (start,) = (s for s in range(13) if torch.equal(whole[:, :, s : s + 4], frames))
        starts.add(start)
    assert len(starts) > 10
    assert {0, 12} <= starts


@pytest.mark.parametrize("num_frames", [16, 24])
def test_a_clip_may_be_as_long_as_wanted(num_frames: int) -> None:
    frames, prompts = ProceduralClips(0, num_frames).draw(0, 2, 8, CPU)
    whole = ClipSampler(0, num_frames=num_frames).batch(0, 2)
    assert torch.equal(frames, render(whole.states, 8))
    assert prompts == whole.prompts


def test_settings_and_refusal() -> None:
    assert ProceduralClips(7, 4).settings() == {"data": "procedural", "seed": 7, "num_frames": 4}
    with pytest.raises(ValueError, match="num_frames must be >= 1, got 0"):
        ProceduralClips(0, 0)
