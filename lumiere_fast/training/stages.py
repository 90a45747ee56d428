"""The stages of training the demo cascade, and their defaults.

t2i -> inflate (from t2i)        the base model
ssr -> inflate (from ssr)        the super-resolution model
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lumiere_fast.diffusion import EDMSchedule
from lumiere_fast.models import PRESETS, STUNet, UNet2D, inflate
from lumiere_fast.models.blocks import channels_last_weights
from lumiere_fast.models.io import load_model, load_stunet
from lumiere_fast.pipelines import LumierePipeline
from lumiere_fast.pipelines.text_to_video import PipelineConfig
from lumiere_fast.training.tasks import DenoisingTask
from lumiere_fast.training.trainer import Trainer, TrainingConfig


@dataclass(frozen=True)
class Stage:
    """Defaults of one stage. The shipped weights took as many steps, in legs that differed (README, The demo model)."""

    steps: int
    batch_size: int
    learning_rate: float
    schedule: EDMSchedule


IMAGES = Stage(3200, 64, 2e-3, EDMSchedule(train_mean=-0.1, train_std=1.4))
# Higher noise than for single images: a wrong motion word raises the loss most at levels of 4 to 16, where trajectories
# are settled. In the one run made, around a median of 2.7 they did not follow the text after 1200 steps; around 9 most
# did after 700 more.
CLIPS = Stage(3500, 8, 2e-3, EDMSchedule(train_mean=2.2, train_std=1.2))
SSR_IMAGES = Stage(1550, 32, 2e-3, EDMSchedule(train_mean=-0.8, train_std=1.4))
SSR_CLIPS = Stage(400, 4, 2e-3, EDMSchedule(train_mean=-0.5, train_std=1.4))
STAGES = ("t2i", "inflate", "ssr")
CASCADE = PRESETS["demo"]


def train(
    stage: str,
    out: Path,
    *,
    source: Path | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    resume: bool = False,
    device: str = "cpu",
    checkpoint_every: int = 200,
    on_log: Callable[[int, float], None] | None = None,
) -> None:
    """Run one stage of the demo cascade into the folder `out`.

    Args:
        stage: "t2i", "ssr", or "inflate", which adds temporal layers to a model trained by one of these and trains
            those layers alone.
        source: the folder of a trained model. "inflate" needs it; any stage goes on from a model of its own kind.
        steps, batch_size, learning_rate: None takes the stage's defaults.
        resume: go on from the last checkpoint in `out`.
    """
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}")
    if stage == "inflate" and source is None:
        raise ValueError("stage 'inflate' needs a source folder: that of the trained t2i or ssr model")
    torch.manual_seed(seed)
    model = _model(stage, source).to(device)
    defaults = _defaults(model)
    task = DenoisingTask(
        model,
        defaults.schedule,
        defaults.batch_size if batch_size is None else batch_size,
        seed=seed,
        num_frames=_num_frames(model),
        upscale_factor=CASCADE.ssr.sample_size // CASCADE.base.sample_size,
        device=torch.device(device),
    )
    config = TrainingConfig(
        steps=defaults.steps if steps is None else steps,
        learning_rate=defaults.learning_rate if learning_rate is None else learning_rate,
    )
    Trainer(task, config, out, resume=resume).run(checkpoint_every=checkpoint_every, on_log=on_log)


def _model(stage: str, source: Path | None) -> UNet2D | STUNet:
    if source is None:
        return channels_last_weights(UNet2D(CASCADE.base if stage == "t2i" else CASCADE.ssr))
    model = load_model(source)
    if stage == "inflate":
        if isinstance(model, UNet2D):
            is_ssr = bool(model.config.conditioning_channels)
            model = inflate(model, CASCADE.ssr_inflation if is_ssr else CASCADE.base_inflation)
    elif isinstance(model, STUNet) or (stage == "ssr") != bool(model.config.conditioning_channels):
        raise ValueError(f"{source} holds no model of stage {stage!r}; give the folder of such a run")
    return channels_last_weights(model)


def _defaults(model: UNet2D | STUNet) -> Stage:
    if isinstance(model, STUNet):
        return SSR_CLIPS if model.unet.config.conditioning_channels else CLIPS
    return SSR_IMAGES if model.config.conditioning_channels else IMAGES


def _num_frames(model: UNet2D | STUNet) -> int:
    if isinstance(model, STUNet) and model.unet.config.conditioning_channels:
        return CASCADE.window_frames
    return CASCADE.num_frames


def assemble(base: Path, ssr: Path, out: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Join two trained models into a pipeline folder that `LumierePipeline.from_pretrained` loads.

    Args:
        base, ssr: folders of the two "inflate" stages.
        dtype: of the weights on disk.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another folder, or remove it")
    config = PipelineConfig(
        base_schedule=CLIPS.schedule,
        ssr_schedule=SSR_CLIPS.schedule,
        num_frames=CASCADE.num_frames,
        fps=CASCADE.fps,
        window_frames=CASCADE.window_frames,
    )
    LumierePipeline(load_stunet(base), load_stunet(ssr), config).save_pretrained(out, dtype=dtype)
