"""The stages of training a cascade, and their defaults.

t2i -> inflate (from t2i)        the base model
ssr -> inflate (from ssr)        the super-resolution model
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lumiere_fast.data.source import ClipSource, ProceduralClips
from lumiere_fast.data.videos import Crop, ShortClips, VideoFolder, check_choices
from lumiere_fast.diffusion import (
    PREDICTION_TYPES,
    CosineSchedule,
    EDMParameterization,
    EDMSchedule,
    Parameterization,
    Schedule,
    VParameterization,
)
from lumiere_fast.models import PRESETS, Preset, STUNet, UNet2D, UNetConfig, inflate
from lumiere_fast.models.blocks import channels_last_weights
from lumiere_fast.models.io import load_model, load_stunet
from lumiere_fast.pipelines import LumierePipeline
from lumiere_fast.pipelines.folder import check_free
from lumiere_fast.pipelines.text_to_video import PipelineConfig
from lumiere_fast.text import PromptWarning, TextEncoder, WordVectorEncoder
from lumiere_fast.training.lock import locked
from lumiere_fast.training.memory import check_model_fits, check_step_fits
from lumiere_fast.training.run_folder import CASCADE_NAME, check_cascade, read_cascade, read_noising, write_run_files
from lumiere_fast.training.tasks import DenoisingTask, Precision
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
SCHEDULE_NAMES = ("edm", "cosine")
CASCADE = PRESETS["demo"]

logger = logging.getLogger(__name__)


def train(
    stage: str,
    out: Path,
    *,
    source: Path | None = None,
    data: Path | None = None,
    cascade: Preset | None = None,
    schedule: str | None = None,
    prediction_type: str | None = None,
    text_encoder: TextEncoder | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    gradient_accumulation_steps: int = 1,
    learning_rate: float | None = None,
    precision: Precision = "fp32",
    gradient_checkpointing: bool = False,
    crop: Crop = "center",
    short_clips: ShortClips = "refuse",
    seed: int = 0,
    resume: bool = False,
    device: str = "cpu",
    checkpoint_every: int = 200,
    log_every: int = 50,
    on_log: Callable[[int, float], None] | None = None,
) -> None:
    """Run one stage of a cascade into the folder `out`.

    Args:
        stage: "t2i", "ssr", or "inflate", which adds temporal layers to a model trained by one of these and trains
            those layers alone.
        source: the folder of a trained model. "inflate" needs it; any stage goes on from a model of its own kind.
        data: a folder of captioned videos and pictures, see `VideoFolder`. None for the procedural clips.
        cascade: architectures, frames and frame rate. None takes those of `source`'s run, or else the demo's.
        schedule: "edm", or "cosine" shifted for the model's size. None takes the kind that `source` was trained with,
            or else "edm".
        prediction_type: "edm", "epsilon", "v_prediction" or "sample". A source's cannot be changed; None takes it, or
            else "edm" for that schedule and "v_prediction" for the cosine one.
        text_encoder: None for the embedded one.
        steps, batch_size, learning_rate: None takes the stage's defaults.
        gradient_accumulation_steps: batches of `batch_size` whose gradients make one step.
        precision: "bf16" runs the model under autocast; weights, optimiser and average stay fp32.
        gradient_checkpointing: keep fewer activations and compute them again: slower, the same result.
        crop, short_clips: of `data`, see `VideoFolder`.
        resume: go on from the last checkpoint in `out`; all that the result depends on must be as it was.

    A start that fails, by an argument, the data or the memory of the first batch, leaves `out` as it was.

    Raises:
        ValueError: an argument is not as above, does not suit the source, or is not that of the run to resume; or the
            model or its batches cannot fit into the device's memory.
        FileNotFoundError, FileExistsError: see `Trainer`, `VideoFolder`.
        BlockingIOError: another process trains in `out`.
    """
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}")
    if stage == "inflate" and source is None:
        raise ValueError("stage 'inflate' needs a source folder: that of the trained t2i or ssr model")
    check_choices(crop, short_clips)
    cascade = _cascade(cascade, source)
    torch.manual_seed(seed)
    model = _model(stage, source, cascade, torch.device(device)).to(device)
    defaults = _defaults(model)
    noising = _noising(schedule, prediction_type, defaults, source, _spatial(model).sample_size)
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    with closing(_clips(model, cascade, data, seed, crop, short_clips)) as clips:
        task = DenoisingTask(
            model,
            clips,
            noising[0],
            defaults.batch_size if batch_size is None else batch_size,
            gradient_accumulation_steps,
            upscale_factor=cascade.ssr.sample_size // cascade.base.sample_size,
            precision=precision,
            device=torch.device(device),
            text_encoder=(text_encoder or WordVectorEncoder()).to(device),
            parameterization=noising[1],
        )
        config = TrainingConfig(
            steps=defaults.steps if steps is None else steps,
            learning_rate=defaults.learning_rate if learning_rate is None else learning_rate,
        )
        check_step_fits(task)
        with locked(out), _cut_captions_told_once():
            Trainer(task, config, out, resume=resume).run(
                checkpoint_every=checkpoint_every,
                log_every=log_every,
                on_log=on_log,
                on_start=lambda: write_run_files(out, cascade, *noising),
            )


@contextmanager
def _cut_captions_told_once() -> Iterator[None]:
    """Within the block the first `PromptWarning` is logged and the others are dropped: they come at every step."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", PromptWarning)
        show = warnings.showwarning

        def show_once(message: Warning | str, category: type[Warning], *where: Any, **rest: Any) -> None:
            if not issubclass(category, PromptWarning):
                show(message, category, *where, **rest)
                return
            warnings.simplefilter("ignore", PromptWarning)
            logger.warning(
                "a caption does not reach the model whole, and others may not, which is said once: %s", message
            )

        warnings.showwarning = show_once
        yield


def _cascade(given: Preset | None, source: Path | None) -> Preset:
    if given is not None:
        return check_cascade(given)
    if source is not None and (source / CASCADE_NAME).is_file():
        return read_cascade(source)
    return CASCADE


def _model(stage: str, source: Path | None, cascade: Preset, device: torch.device) -> UNet2D | STUNet:
    if source is None:
        config = cascade.base if stage == "t2i" else cascade.ssr
        check_model_fits(lambda: UNet2D(config), device)
        return channels_last_weights(UNet2D(config))
    model = load_model(source)
    is_ssr = bool(_spatial(model).conditioning_channels)
    if stage != "inflate" and (isinstance(model, STUNet) or (stage == "ssr") != is_ssr):
        raise ValueError(f"{source} holds no model of stage {stage!r}; give the folder of such a run")
    inflation = cascade.ssr_inflation if is_ssr else cascade.base_inflation
    _check_architecture(asdict(_spatial(model)), asdict(cascade.ssr if is_ssr else cascade.base), source)
    if isinstance(model, STUNet):
        _check_architecture(asdict(model.inflation_config), asdict(inflation), source)
    elif stage == "inflate":
        check_model_fits(lambda: inflate(UNet2D(_spatial(model)), inflation), device)
        model = inflate(model, inflation)
    return channels_last_weights(model)


def _check_architecture(found: dict[str, object], wanted: dict[str, object], source: Path) -> None:
    differing = [
        f"{name}={found[name]} (the cascade: {value})" for name, value in wanted.items() if found[name] != value
    ]
    if differing:
        raise ValueError(
            f"{source} holds a model of another cascade: {', '.join(differing)}; give the cascade it belongs to"
        )


def _spatial(model: UNet2D | STUNet) -> UNetConfig:
    return model.unet.config if isinstance(model, STUNet) else model.config


def _defaults(model: UNet2D | STUNet) -> Stage:
    if isinstance(model, STUNet):
        return SSR_CLIPS if model.unet.config.conditioning_channels else CLIPS
    return SSR_IMAGES if model.config.conditioning_channels else IMAGES


def _noising(
    schedule: str | None, prediction_type: str | None, defaults: Stage, source: Path | None, size: int
) -> tuple[Schedule, Parameterization]:
    """The noise of the clips, and what the network makes of it."""
    for name, value, known in (
        ("schedule", schedule, SCHEDULE_NAMES),
        ("prediction_type", prediction_type, tuple(PREDICTION_TYPES)),
    ):
        if value is not None and value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    before = None if source is None else read_noising(source)
    cosine = schedule == "cosine" or (schedule is None and before is not None and isinstance(before[0], CosineSchedule))
    noise = CosineSchedule(shift=round(math.log(64 / size), 4)) if cosine else defaults.schedule
    if before is not None:
        if prediction_type not in (None, before[1].prediction_type):
            raise ValueError(
                f"{source} was trained with prediction_type={before[1].prediction_type!r}, which its layers keep; "
                f"got {prediction_type!r}"
            )
        return noise, before[1]
    if prediction_type is not None:
        return noise, PREDICTION_TYPES[prediction_type]()
    return noise, VParameterization() if cosine else EDMParameterization()


def _clips(
    model: UNet2D | STUNet, cascade: Preset, data: Path | None, seed: int, crop: Crop, short_clips: ShortClips
) -> ClipSource:
    num_frames = 1
    if isinstance(model, STUNet):
        num_frames = cascade.window_frames if _spatial(model).conditioning_channels else cascade.num_frames
    if data is None:
        return ProceduralClips(seed, num_frames)
    return VideoFolder(data, num_frames=num_frames, fps=cascade.fps, seed=seed, crop=crop, short_clips=short_clips)


def assemble(
    base: Path,
    ssr: Path,
    out: Path,
    *,
    dtype: torch.dtype = torch.float16,
    text_encoder: TextEncoder | None = None,
    overwrite: bool = False,
) -> None:
    """Join two trained models into a pipeline folder that `LumierePipeline.from_pretrained` loads.

    The pipeline samples each model with the noise and the parameterisation that its run's folder tells, and makes clips
    of the frames that it was trained for; folders that tell nothing are taken for the demo's.

    Args:
        base, ssr: folders of the two "inflate" stages.
        dtype: of the weights on disk.
        text_encoder: the one that both were trained with; None for the embedded one.
        overwrite: replace the pipeline in `out`.

    Raises:
        FileExistsError: `out` is not empty, or with `overwrite` holds something else than a pipeline.
        ValueError: the two runs are of different cascades, or one is not such a model.
    """
    check_free(out, overwrite)
    told = [read_cascade(folder) for folder in (base, ssr) if (folder / CASCADE_NAME).is_file()]
    if len(told) == 2 and told[0] != told[1]:
        raise ValueError(f"{base} and {ssr} were trained for different cascades: see their {CASCADE_NAME}")
    cascade = told[0] if told else CASCADE
    base_noising = read_noising(base) or (CLIPS.schedule, EDMParameterization())
    ssr_noising = read_noising(ssr) or (SSR_CLIPS.schedule, EDMParameterization())
    config = PipelineConfig(
        base_schedule=base_noising[0],
        ssr_schedule=ssr_noising[0],
        num_frames=cascade.num_frames,
        fps=cascade.fps,
        window_frames=cascade.window_frames,
        base_parameterization=base_noising[1],
        ssr_parameterization=ssr_noising[1],
    )
    pipe = LumierePipeline(load_stunet(base), load_stunet(ssr), config, text_encoder)
    pipe.save_pretrained(out, dtype=dtype, overwrite=overwrite)
