from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lumiere_fast.diffusion import clip_generators, draw_noise

SHAPE = (3, 4, 8, 8)  # of a clip


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(generators: list[torch.Generator]) -> Tensor:
    return draw_noise((len(generators), *SHAPE), "cpu", generators)


def test_noise_is_unit_normal_in_the_memory_format_of_activations() -> None:
    noise = draw_noise((2, 3, 8, 64, 64), "cpu", clip_generators(seeded(), 2))
    assert noise.dtype == torch.float32
    assert noise.is_contiguous(memory_format=torch.channels_last_3d)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.01)
    assert noise.var(dim=(1, 2, 3, 4)).tolist() == pytest.approx([1.0, 1.0], rel=0.02)
    assert (noise[0] * noise[1]).mean().item() == pytest.approx(0.0, abs=0.01)


def test_a_clip_has_the_noise_of_its_generator_whatever_the_batch() -> None:
    alone = torch.cat([draw([seeded(seed)]) for seed in (1, 2, 3)])
    assert torch.equal(draw([seeded(1), seeded(2), seeded(3)]), alone)
    assert torch.equal(alone[1], torch.randn(SHAPE, generator=seeded(2)))


def test_one_generator_serves_batches_of_any_cut() -> None:
    """Five clips at once, or 2 and 3, whatever is drawn in between."""
    whole = draw(clip_generators(seeded(), 5))
    generator = seeded()
    parts = []
    for count in (2, 3):
        generators = clip_generators(generator, count)
        parts.append(draw(generators))
        draw(generators)
    assert torch.equal(torch.cat(parts), whole)


def test_a_list_of_one_is_the_one() -> None:
    assert torch.equal(draw(clip_generators([seeded()], 1)), draw(clip_generators(seeded(), 1)))


def test_stages_draw_apart() -> None:
    """The second stage's noise does not depend on how much the first one drew."""
    results = []
    for draws in (1, 4):
        clips = clip_generators(seeded(), 2)
        first = clip_generators(clips, 2)
        for _ in range(draws):
            used = draw(first)
        results.append(draw(clip_generators(clips, 2)))
    assert torch.equal(*results)
    assert not torch.equal(results[0], used)


def test_without_a_generator_torchs_own_seeds_them() -> None:
    noise = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        noise.append(draw(clip_generators(None, 2)))
    assert torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])


def test_as_many_generators_as_clips() -> None:
    with pytest.raises(ValueError, match="one for each of the 3 clips, got 2"):
        clip_generators([seeded(), seeded()], 3)
    for wrong in (0, [seeded(), None], [1, 2]):
        with pytest.raises(ValueError, match=r"generator must be a torch\.Generator, or one for each of the 2 clips"):
            clip_generators(wrong, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one generator a clip is needed: 2, got 1"):
        draw_noise((2, *SHAPE), "cpu", [seeded()])
