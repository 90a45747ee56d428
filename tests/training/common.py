"""Tiny tasks to train on, and what to compare of two runs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumiere_fast import STUNet, UNet2D, inflate
from lumiere_fast.data.source import ClipSource, ProceduralClips
from lumiere_fast.data.videos import VideoFolder
from lumiere_fast.diffusion import EDMSchedule, Schedule
from lumiere_fast.models.blocks import channels_last_weights
from lumiere_fast.models.io import CONFIG_NAME, WEIGHTS_NAME
from lumiere_fast.training.tasks import DenoisingTask
from lumiere_fast.training.trainer import STATE_NAME, TrainingConfig
from tests.models.tiny import tiny_config

CONFIG = TrainingConfig(steps=6, learning_rate=5e-3, warmup_steps=2)
KINDS = ["image", "ssr image", "video", "ssr video"]


def make_model(kind: str = "image", *, seed: int = 0) -> UNet2D | STUNet:
    """Freshly initialised, 8x8 pixels, or 16x16 for an "ssr", in the layout that training uses."""
    torch.manual_seed(seed)
    ssr = "ssr" in kind
    unet = UNet2D(tiny_config(ssr=ssr, sample_size=16 if ssr else 8, text_embed_dim=64))
    model = inflate(unet, temporal_factors=(2,), temporal_conditioning=True) if "video" in kind else unet
    return channels_last_weights(model)


def make_task(
    kind: str = "image",
    *,
    batch_size: int = 4,
    seed: int = 0,
    num_frames: int | None = None,
    folder: Path | None = None,
    schedule: Schedule | None = None,
    **changes: Any,
) -> DenoisingTask:
    """A task on procedural clips, or on the videos in `folder`."""
    if num_frames is None:
        num_frames = 4 if "video" in kind else 1
    source: ClipSource = ProceduralClips(seed, num_frames)
    if folder is not None:
        source = VideoFolder(folder, num_frames=num_frames, fps=8, seed=seed, crop="random", num_workers=2)
    return DenoisingTask(make_model(kind, seed=seed), source, schedule or EDMSchedule(), batch_size, **changes)


def values(task: DenoisingTask) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in task.model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def gradients(task: DenoisingTask) -> dict[str, Tensor]:
    """Of the parameters that are trained, from what has been differentiated since the last call."""
    found = {name: p.grad for name, p in task.model.named_parameters() if p.requires_grad}
    task.model.zero_grad()
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def log_without_times(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds_per_step"]
    return rows


def assert_equal_runs(one: Path, two: Path) -> None:
    """Every file to the bit, but for the times in the log."""
    for name in (STATE_NAME, WEIGHTS_NAME, CONFIG_NAME):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert log_without_times(one) == log_without_times(two)
