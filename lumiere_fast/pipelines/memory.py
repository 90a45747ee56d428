"""A lower bound of the memory that a clip takes, to refuse at once what could only end in an allocation error."""

from __future__ import annotations

import math
import os

import torch

from lumiere_fast.models import STUNet
from lumiere_fast.pipelines.text_to_video import LumierePipeline

# Of one clip at full size, fp32: noise, latent, history, next latent, and the conditioning image.
SSR_CLIPS = 5


def check_memory(pipe: LumierePipeline, num_frames: int | None, batch_size: int, *, guided: bool = True) -> None:
    """Raise a ValueError if clips of `num_frames` cannot fit into the memory of the pipeline's device.

    Passing does not mean that they fit: see `least_bytes`.
    """
    frames = pipe.config.num_frames if num_frames is None else num_frames
    needed, memory = least_bytes(pipe, frames, batch_size, guided=guided), total_memory(pipe.device)
    if memory is not None and needed > memory:
        raise ValueError(
            f"{batch_size} x {frames} frames need more than {needed / 2**30:,.1f} GiB of memory, and "
            f"{pipe.device} has {memory / 2**30:,.1f}; ask for fewer frames, or fewer clips at a time"
        )


def least_bytes(pipe: LumierePipeline, num_frames: int, batch_size: int, *, guided: bool = True) -> int:
    """The weights, and the larger of what either stage holds at once whatever the kernels.

    The base model holds its skip connections, of the whole clip and with guidance twice, when it reaches its coarsest
    level; super-resolution holds a few clips in fp32. What each layer needs besides is not counted.
    """
    weights = sum(p.numel() * p.element_size() for model in (pipe.base, pipe.ssr) for p in model.parameters())
    size = pipe.ssr.unet.config.sample_size
    clips = SSR_CLIPS * 3 * num_frames * size**2 * torch.float32.itemsize
    skips = _skip_elements(pipe.base, num_frames) * pipe.dtype.itemsize * (2 if guided else 1)
    return weights + batch_size * max(clips, skips)


def _skip_elements(model: STUNet, num_frames: int) -> int:
    """Elements of the skip connections of one clip: one for each layer on the way down."""
    config, factors = model.unet.config, model.inflation_config.temporal_factors
    elements = 0
    for level, (width, layers) in enumerate(zip(config.block_out_channels, config.layers_per_block, strict=True)):
        side = config.sample_size // config.patch_size // 2**level
        elements += layers * width * side**2 * (num_frames // math.prod(factors[:level]))
    return elements


def total_memory(device: torch.device) -> int | None:
    """Bytes of the device, in use or not; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
