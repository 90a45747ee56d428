"""Random numbers that belong to a clip, not to the batch it is made in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for all clips, or one a clip; None for torch's own."""


def clip_generators(
    generator: Generators, batch_size: int, device: torch.device | str = "cpu"
) -> list[torch.Generator]:
    """A new generator for each clip of a batch, so that a clip does not depend on how a run is cut into batches.

    Each is seeded with a number drawn from `generator` in the order of the clips, or from the clip's own generator, and
    lives on the same device; with None, the numbers come from torch's own CPU generator and the new ones live on
    `device`. Called twice it gives other generators: a stage that takes its own draws nothing from the next one's.

    Raises:
        ValueError: a list of another length than `batch_size`, or of what is no generator.
    """
    parents = list(generator) if isinstance(generator, Sequence) else [generator] * batch_size
    kinds = torch.Generator if isinstance(generator, Sequence) else (torch.Generator, type(None))
    if len(parents) != batch_size or not all(isinstance(parent, kinds) for parent in parents):
        got = len(parents) if len(parents) != batch_size else repr(generator)
        raise ValueError(f"generator must be a torch.Generator, or one for each of the {batch_size} clips, got {got}")
    return [_child(parent, device) for parent in parents]


def _child(parent: torch.Generator | None, device: torch.device | str) -> torch.Generator:
    if parent is None:
        source, home = torch.device("cpu"), torch.device(device)
    else:
        source = home = parent.device
    seed = torch.randint(2**63 - 1, (), generator=parent, device=source)
    return torch.Generator(home).manual_seed(int(seed))


def draw_noise(shape: Sequence[int], device: torch.device | str, generators: Sequence[torch.Generator]) -> Tensor:
    """Unit normal noise (B, C, T, H, W), fp32, channels_last_3d: clip b from `generators[b]` alone.

    Drawn where the generators live, so that a seed means the same on any `device`.

    Raises:
        ValueError: not one generator a clip.
    """
    if len(generators) != shape[0]:
        raise ValueError(f"one generator a clip is needed: {shape[0]}, got {len(generators)}")
    noise = torch.empty(tuple(shape), device=device).contiguous(memory_format=torch.channels_last_3d)
    for clip, generator in zip(noise, generators, strict=True):
        clip.copy_(torch.randn(tuple(shape[1:]), generator=generator, device=generator.device))
    return noise
