"""What memory there is, and a lower bound of what a clip takes: what could only end in an error is refused at once."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lumiere_fast.models import STUNet
from lumiere_fast.pipelines.windows import WindowPlan

if TYPE_CHECKING:
    from lumiere_fast.pipelines.text_to_video import LumierePipeline

OVERLAP = 2  # of windows of frames: the paper's, and the pipelines' default

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:([kmgt])(i?b)?|b)?", re.IGNORECASE)


def check_memory(
    pipe: LumierePipeline, num_frames: int | None, batch_size: int, *, guided: bool = True, stochastic: bool = False
) -> None:
    """Raise a ValueError if clips of `num_frames` cannot fit into the memory of the pipeline's device.

    Passing does not mean that they fit: see `least_bytes`.
    """
    frames = pipe.config.num_frames if num_frames is None else num_frames
    needed = least_bytes(pipe, frames, batch_size, guided=guided, stochastic=stochastic)
    memory = total_memory(pipe.device)
    if memory is not None and needed > memory:
        raise ValueError(
            f"{batch_size} x {frames} frames need more than {needed / 2**30:,.1f} GiB of memory, and "
            f"{pipe.device} has {memory / 2**30:,.1f}; ask for fewer frames, or fewer clips at a time"
        )


def least_bytes(
    pipe: LumierePipeline, num_frames: int, batch_size: int, *, guided: bool = True, stochastic: bool = False
) -> int:
    """The weights, and the larger of what either stage holds at once whatever the kernels.

    The base model holds its skip connections, of a window and with guidance twice, when it reaches its coarsest level;
    super-resolution holds videos, see `video_bytes`. What each layer needs besides is not counted.
    """
    weights = sum(p.numel() * p.element_size() for model in (pipe.base, pipe.ssr) for p in model.parameters())
    window, stride = pipe.config.window_frames, max(1, pipe.config.window_frames - OVERLAP)
    windows = -((OVERLAP - num_frames) // stride)  # counted, since a plan would list them
    predicted = num_frames if num_frames <= window else windows * window
    frame, dtype = 3 * pipe.ssr.unet.config.sample_size**2, pipe.ssr.unet.conv_in.weight.dtype
    videos = _held_bytes(num_frames * frame, predicted * frame, dtype, stochastic)
    base_frames = min(num_frames, pipe.config.num_frames)
    skips = _skip_elements(pipe.base, base_frames) * pipe.dtype.itemsize * (2 if guided else 1)
    return weights + batch_size * max(videos, skips)


def video_bytes(windows: WindowPlan, size: tuple[int, int], dtype: torch.dtype, *, stochastic: bool = False) -> int:
    """What sampling holds of one clip with frames of `size`, (height, width), when it takes a step.

    The latent and the clean clip in fp32, with a stochastic sampler as much fresh noise, and the predictions of all
    windows, which overlap, in the network's `dtype`.
    """
    clip = 3 * windows.num_frames * math.prod(size)
    predicted = 3 * len(windows) * windows.window_frames * math.prod(windows.window_size or size)
    return _held_bytes(clip, predicted, dtype, stochastic)


def _held_bytes(clip: int, predicted: int, dtype: torch.dtype, stochastic: bool) -> int:
    return (3 if stochastic else 2) * clip * torch.float32.itemsize + predicted * dtype.itemsize


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


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still have of the device; None where the system does not tell.

    On CUDA what no process has, and what torch's allocator keeps for reuse. On the CPU what Linux can give without
    swapping, or less where a control group limits the process (a container, a batch job); what this process has freed
    and its allocator keeps is not in it.

    The CPU's figure matters the more: a GPU that is asked for too much says so and a smaller window is tried, Linux
    grants more than there is and kills the process when it is used.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        available = re.search(r"^MemAvailable:\s+(\d+) kB$", (PROC / "meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if available is None else max(0, min([int(available[1]) * 1024, *_free_in_control_groups()]))


def _free_in_control_groups() -> Iterator[int]:
    """What each limit on this process leaves: those of its own group and of all above it, versions 2 and 1."""
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage, cache = CGROUP, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        own = root / path.strip("/")
        for group in (own, *own.parents):
            if group.is_relative_to(root) and (group / limit).is_file():
                yield from _left(group, limit, usage, cache)


def _left(group: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    """The limit less what is used; files that are only cached are given up when memory runs short."""
    try:
        most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        cached = re.search(rf"^{cache} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return
    if most != "max":
        yield int(most) - used + (0 if cached is None else int(cached[1]))


def parse_bytes(text: int | str) -> int:
    """Bytes of "12GiB", "500 MB" or "1.5g"; of an integer itself.

    KB, MB, GB and TB are powers of 1000; KiB, MiB, GiB and TiB, and K, M, G and T alone, of 1024. Case does not count.

    Raises:
        ValueError: it is none of these, or not above zero.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        count = text
    else:
        found = SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
        if found is None:
            raise ValueError(f"memory must be a number of bytes or a text such as '12GiB' or '500MB', got {text!r}")
        number, prefix, unit = found.groups(default="")
        base = 1000 if unit.lower() == "b" else 1024
        count = int(float(number) * base ** " kmgt".index(prefix.lower() or " "))
    if count < 1:
        raise ValueError(f"memory must be above zero, got {text!r}")
    return count
