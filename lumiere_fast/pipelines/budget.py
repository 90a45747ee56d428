"""How many frames of super-resolution fit into the memory that there is, or that a call may take."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lumiere_fast import dispatch
from lumiere_fast.models import STUNet
from lumiere_fast.pipelines.activations import peak_bytes
from lumiere_fast.pipelines.memory import SSR_CLIPS, free_memory
from lumiere_fast.pipelines.super_resolution import SuperResolution
from lumiere_fast.pipelines.windows import WindowPlan, choose_windows, window_choices

# A pass of any network here holds fewer tensors of its finest level at once: where this many fit nothing is measured,
# which takes about a second.
AMPLE = 64
TOKENS = 32  # of a prompt: what the text takes does not show beside a clip

_measured: WeakKeyDictionary[STUNet, dict[Hashable, tuple[int, int]]] = WeakKeyDictionary()


class Job(NamedTuple):
    """The small clips that are to be enlarged."""

    batch: int
    frames: int
    height: int
    width: int


def within_memory(
    ssr: SuperResolution, job: Job, device: torch.device, *, resident: int, arriving: int, max_memory: int | None
) -> WindowPlan:
    """The windows for a job: as set, or as much smaller as memory wants it.

    Args:
        resident: bytes of the weights that are on `device` while it runs.
        arriving: those of them that are not there yet.
        max_memory: bytes that the stage may take, weights, videos and one window together. The windows are then the
            best of those that fit, none longer than set. None for what is free, and windows as set where they fit.

    Raises:
        ValueError: not even the shortest windows fit into `max_memory`.
    """
    videos = video_bytes(ssr, job)
    if max_memory is not None:
        choices, bytes_of = _choices(ssr, job), window_bytes(ssr, job)
        budget = max_memory - resident - videos
        least = bytes_of(choices[-1].window_frames)
        if least > budget:
            raise ValueError(
                f"max_memory is {_gib(max_memory)}, and super-resolution takes at least "
                f"{_gib(resident + videos + least)}: weights {_gib(resident)}, videos {_gib(videos)}, a window of "
                f"{choices[-1].window_frames} frames {_gib(least)}; allow more, or ask for fewer frames or clips"
            )
        return choose_windows(choices, bytes_of, budget)
    plan, free = ssr.plan(*job[1:]), free_memory(device)
    if free is None or AMPLE * _finest(ssr, plan, job) <= free - arriving - videos:
        return plan
    return _within_free(plan, _choices(ssr, job), window_bytes(ssr, job), free - arriving - videos)


def _within_free(
    plan: WindowPlan, choices: list[WindowPlan], bytes_of: Callable[[int], int], budget: int
) -> WindowPlan:
    """The longest windows that fit: a clip is to be as it would be elsewhere, or as near to it as can be."""
    if bytes_of(plan.window_frames) <= budget:
        return plan
    fitting = [choice for choice in choices if bytes_of(choice.window_frames) <= budget]
    smaller = fitting[0] if fitting else choose_windows(choices, bytes_of, budget)
    if smaller != plan:
        warnings.warn(
            f"windows of {plan.window_frames} frames take about {_gib(bytes_of(plan.window_frames))}, and "
            f"{_gib(budget)} are free for them: super-resolution goes by {smaller}",
            RuntimeWarning,
            stacklevel=5,
        )
    return smaller


def _choices(ssr: SuperResolution, job: Job) -> list[WindowPlan]:
    """Weights given as numbers fit windows of one length alone."""
    settings = ssr.space(job.height, job.width)
    if not isinstance(settings["weights"], str):
        return [ssr.plan(*job[1:])]
    factor = ssr.model.temporal_factor
    return window_choices(job.frames, factor, ssr.overlap, at_most=ssr.window_frames, **settings)


def window_bytes(ssr: SuperResolution, job: Job) -> Callable[[int], int]:
    """What the network takes for a window of so many frames. Linear in them: two lengths tell, measured once."""
    factor = ssr.model.temporal_factor
    height, width = _window_size(ssr, job)
    parameter = next(ssr.model.parameters())

    def measured(frames: int) -> int:
        clip = torch.empty(job.batch, 3, frames, height, width, device="meta")
        text = torch.empty(job.batch, TOKENS, ssr.model.unet.config.text_embed_dim, device="meta")
        tensors = (clip, text, torch.empty(job.batch, device="meta"))
        return peak_bytes(run, *(torch.empty_like(tensor, device=parameter.device) for tensor in tensors))

    def run(clip: Tensor, text: Tensor, level: Tensor) -> Tensor:
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        prepared = ssr.model.prepare_text(text, mask)
        result: Tensor = ssr.model(clip, level, prepared, image_conditioning=clip, augmentation_level=level)
        return result

    known = _measured.setdefault(ssr.model, {})
    key = (job.batch, height, width, parameter.dtype, dispatch.current_backend())
    if key not in known:
        known[key] = (measured(factor), measured(2 * factor))
    one, two = known[key]
    return lambda frames: one + (two - one) * (frames - factor) // factor


def video_bytes(ssr: SuperResolution, job: Job) -> int:
    pixels = job.frames * job.height * job.width * ssr.factor**2
    return SSR_CLIPS * 3 * job.batch * pixels * torch.float32.itemsize


def weight_bytes(*models: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for model in models for p in model.parameters())


def _finest(ssr: SuperResolution, plan: WindowPlan, job: Job) -> int:
    """Bytes of a window's tensor at the network's finest level."""
    config = ssr.model.unet.config
    height, width = _window_size(ssr, job)
    elements = config.block_out_channels[0] * plan.window_frames * height * width // config.patch_size**2
    return job.batch * elements * next(ssr.model.parameters()).element_size()


def _window_size(ssr: SuperResolution, job: Job) -> tuple[int, int]:
    size: tuple[int, int] = ssr.space(job.height, job.width).get(
        "window_size", (job.height * ssr.factor, job.width * ssr.factor)
    )
    return size


def _gib(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB"
