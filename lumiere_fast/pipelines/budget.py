"""How many frames of super-resolution fit into the memory that there is, or that a call may take."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lumiere_fast import dispatch
from lumiere_fast.models import STUNet
from lumiere_fast.pipelines.activations import forward_bytes, linear_bytes
from lumiere_fast.pipelines.memory import free_memory, video_bytes
from lumiere_fast.pipelines.super_resolution import SuperResolution
from lumiere_fast.pipelines.windows import WindowPlan, choose_windows, window_choices

# A pass of any network here holds fewer tensors of its finest level at once: where this many fit nothing is measured.
AMPLE = 64

_measured: WeakKeyDictionary[STUNet, dict[Hashable, Callable[[int], int]]] = WeakKeyDictionary()


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
    if max_memory is None:
        plan, free = ssr.plan(*job[1:]), free_memory(device)
        if free is None or AMPLE * _finest(ssr, plan, job) + _videos(ssr, plan, job) <= free - arriving:
            return plan
        choices = _choices(ssr, job)
        return _within_free(plan, choices, job_bytes(ssr, choices, job), free - arriving)
    choices = _choices(ssr, job)
    bytes_of, shortest = job_bytes(ssr, choices, job), choices[-1].window_frames
    least = resident + bytes_of(shortest)
    if least > max_memory:
        raise ValueError(
            f"max_memory is {_size(max_memory)}, and super-resolution takes about {_size(least)} in windows "
            f"of {shortest} frames, the shortest, {_size(resident)} of them weights; "
            "allow more, or ask for fewer frames or clips"
        )
    return choose_windows(choices, bytes_of, max_memory - resident)


def _within_free(
    plan: WindowPlan, choices: list[WindowPlan], bytes_of: Callable[[int], int], budget: int
) -> WindowPlan:
    """The longest windows that fit: a clip is to be as it would be elsewhere, or as near to it as can be."""
    if bytes_of(plan.window_frames) <= budget:
        return plan
    fitting = [choice for choice in choices if bytes_of(choice.window_frames) <= budget]
    if not fitting:
        return choose_windows(choices, bytes_of, budget)  # which says so
    warnings.warn(
        f"windows of {plan.window_frames} frames take about {_size(bytes_of(plan.window_frames))}, and {_size(budget)} "
        f"are free: super-resolution goes by {fitting[0]}",
        RuntimeWarning,
        stacklevel=5,
    )
    return fitting[0]


def _choices(ssr: SuperResolution, job: Job) -> list[WindowPlan]:
    """Weights given as numbers fit windows of one length alone."""
    settings = ssr.space(job.height, job.width)
    if not isinstance(settings["weights"], str):
        return [ssr.plan(*job[1:])]
    factor = ssr.model.temporal_factor
    return window_choices(job.frames, factor, ssr.overlap, at_most=ssr.window_frames, **settings)


def job_bytes(ssr: SuperResolution, choices: list[WindowPlan], job: Job) -> Callable[[int], int]:
    """What the stage takes for a job in windows of so many frames of `choices`, the weights apart."""
    window = _window_bytes(ssr, job)
    videos = {plan.window_frames: _videos(ssr, plan, job) for plan in choices}
    return lambda frames: window(frames) + videos[frames]


def _window_bytes(ssr: SuperResolution, job: Job) -> Callable[[int], int]:
    """Of the network alone, measured once: it takes about a second."""
    height, width = _window_size(ssr, job)
    factor, weight = ssr.model.temporal_factor, next(ssr.model.parameters())
    longest = max(2 * factor, ssr.window_frames)
    key = (job.batch, height, width, longest, weight.dtype, weight.device, dispatch.current_backend())
    known = _measured.setdefault(ssr.model, {})
    if key not in known:
        measured = partial(forward_bytes, ssr.model, job.batch, height=height, width=width)
        known[key] = linear_bytes(measured, factor, longest)
    return known[key]


def _videos(ssr: SuperResolution, plan: WindowPlan, job: Job) -> int:
    size, weight = (job.height * ssr.factor, job.width * ssr.factor), next(ssr.model.parameters())
    return job.batch * video_bytes(plan, size, weight.dtype, stochastic=ssr.denoiser.stochastic)


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


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if abs(count) >= 2**30 else f"{count / 2**20:,.2f} MiB"
