"""Text to video: the base model denoises the whole clip, super-resolution raises it window by window."""

from __future__ import annotations

import math
import operator
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lumiere_fast import dispatch
from lumiere_fast.diffusion import EDMParameterization, Parameterization, Schedule, clip_generators, draw_noise
from lumiere_fast.models import STUNet, UNet2D
from lumiere_fast.models.blocks import channels_last_weights
from lumiere_fast.models.io import as_path, check_is_folder, load_stunet, replacing_entries, save_model
from lumiere_fast.models.pretrained import MAX_SHARD_SIZE
from lumiere_fast.models.stunet import check_num_frames
from lumiere_fast.ops.denoise_step import Threshold
from lumiere_fast.pipelines import folder as layout
from lumiere_fast.pipelines.denoising import Denoiser, resolve_threshold
from lumiere_fast.pipelines.super_resolution import SuperResolution
from lumiere_fast.pipelines.windows import Window, plan_windows
from lumiere_fast.text import TextEncoder, WordVectorEncoder
from lumiere_fast.text.encoder import as_prompts
from lumiere_fast.video import MAX_FPS, to_uint8

SHIPPED = Path(__file__).parent.parent / "weights"

OUTPUT_TYPES = ("pt", "np", "pil")
ProgressCallback = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LumiereOutput:
    """A generated batch of clips.

    Args:
        frames: the clips, on the CPU, by `output_type`:
            "pt": a tensor (B, 3, T, H, W) float32 in [-1, 1];
            "np": an array (B, T, H, W, 3) float32 in [0, 1];
            "pil": B lists of T images.
        base_frames: the base model's clips, likewise, before super-resolution.
        seconds: wall time of each stage, in order.
        backend: the backends that the ops ran on.
    """

    frames: Any
    base_frames: Any
    seconds: dict[str, float]
    backend: str


@dataclass(frozen=True)
class PipelineConfig:
    """Everything of a pipeline but its networks: what they were trained for, and the clips that it makes.

    Args:
        base_schedule, ssr_schedule: noise levels of the two stages.
        num_frames: frames of a clip, unless a call says otherwise.
        fps: frames a second that they are meant to be shown at.
        window_frames: frames that super-resolution takes at a time.
        base_parameterization, ssr_parameterization: what the two networks predict.
    """

    base_schedule: Schedule
    ssr_schedule: Schedule
    num_frames: int
    fps: int
    window_frames: int
    base_parameterization: Parameterization = field(default_factory=EDMParameterization)
    ssr_parameterization: Parameterization = field(default_factory=EDMParameterization)

    def __post_init__(self) -> None:
        for name in layout.SETTINGS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if self.fps > MAX_FPS:
            raise ValueError(f"fps must be at most {MAX_FPS}, got {self.fps}")


class LumierePipeline:
    """Turns prompts into clips. Load one with `from_pretrained`.

    Every random number comes from `generator`; with the same generator state, prompt and settings a machine gives the
    same clip.
    """

    def __init__(
        self, base: STUNet, ssr: STUNet, config: PipelineConfig, text_encoder: TextEncoder | None = None
    ) -> None:
        """`text_encoder` is the one that both models were trained with; None for the embedded `WordVectorEncoder`."""
        if base.unet.config.conditioning_channels or not ssr.unet.config.conditioning_channels:
            raise ValueError(
                "base must be a text-to-image model inflated, ssr a super-resolution one: look at their order"
            )
        if ssr.unet.config.sample_size % base.unet.config.sample_size:
            raise ValueError(
                f"the super-resolution model makes {ssr.unet.config.sample_size} pixels, "
                f"a multiple of the base model's {base.unet.config.sample_size} is needed"
            )
        encoder = WordVectorEncoder() if text_encoder is None else text_encoder
        for name, model in (("base", base), ("ssr", ssr)):
            width = model.unet.config.text_embed_dim
            if width != encoder.embed_dim:
                raise ValueError(
                    f"{name} reads text of width {width}, the text encoder {encoder.name!r} gives {encoder.embed_dim}: "
                    "pass as text_encoder the one that the model was trained with"
                )
        factors = {"num_frames": math.lcm(base.temporal_factor, ssr.temporal_factor)}
        factors["window_frames"] = ssr.temporal_factor
        for name, factor in factors.items():
            if getattr(config, name) % factor:
                raise ValueError(
                    f"{name} must be a multiple of {factor}, the models' temporal factor, got {getattr(config, name)}"
                )
        self.config = config
        self.base = base.eval()
        self.ssr = ssr.eval()
        self.text_encoder = encoder.to(self.device)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str] = "demo", *, torch_dtype: torch.dtype | None = None
    ) -> LumierePipeline:
        """Load the shipped "demo" pipeline, or a folder made by `save_pretrained`, on the CPU.

        Args:
            torch_dtype: of the networks' weights in memory; None for float32, whatever they are on disk.

        Raises:
            FileNotFoundError: there is no such folder, or a file of it is missing.
            ValueError: a file is damaged, a pickle or of another architecture; names the first key that differs.
            ModuleNotFoundError: the pipeline reads T5, and transformers is not installed.
        """
        folder = as_path(name_or_path)
        folder = SHIPPED / folder if str(name_or_path) in shipped_names() else folder
        check_is_folder(folder)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not a folder of weights; give one, or a shipped model: {', '.join(shipped_names())}"
            )
        components, settings = layout.read_index(folder)
        schedulers: dict[str, Any] = {}
        for stage in ("base", "ssr"):
            name = f"{stage}_scheduler"
            schedule, parameterization = layout.read_scheduler(folder / name, components[name][1])
            schedulers |= {f"{stage}_schedule": schedule, f"{stage}_parameterization": parameterization}
        try:
            config = PipelineConfig(**schedulers, **settings)
        except ValueError as error:
            raise ValueError(f"{folder / layout.INDEX_NAME}: {error}") from error
        text_encoder = layout.read_text_encoder(folder, components["text_encoder"], torch_dtype)
        models = (load_stunet(folder / stage, torch_dtype=torch_dtype) for stage in ("base", "ssr"))
        base, ssr = (channels_last_weights(model) for model in models)
        try:
            return cls(base, ssr, config, text_encoder)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = MAX_SHARD_SIZE,
        overwrite: bool = False,
    ) -> None:
        """Write the folder that `from_pretrained` loads: `model_index.json` and a folder for each component.

        All is written before anything is replaced: after a failure `folder` is as it was.

        Args:
            folder: made if it does not exist.
            dtype: of the two networks' weights on disk; None keeps theirs. A T5 encoder keeps its own.
            max_shard_size: bytes, or a string such as "2GB"; larger models are split into files of at most this size.
            overwrite: replace the pipeline that `folder` holds. Files that are not a pipeline's stay.

        Raises:
            FileExistsError: `folder` is not empty and `overwrite` is false, or what it holds is no such pipeline.
            OSError: a file could not be written; names it.
            ValueError: `folder` is no path, or `max_shard_size` is not as above.
        """
        folder, config = as_path(folder), self.config
        layout.check_free(folder, overwrite)
        with replacing_entries(folder, layout.INDEX_NAME, layout.COMPONENTS) as new:
            save_model(self.base, new / "base", dtype=dtype, max_shard_size=max_shard_size)
            save_model(self.ssr, new / "ssr", dtype=dtype, max_shard_size=max_shard_size)
            layout.write_scheduler(new / "base_scheduler", config.base_schedule, config.base_parameterization)
            layout.write_scheduler(new / "ssr_scheduler", config.ssr_schedule, config.ssr_parameterization)
            layout.write_text_encoder(new, self.text_encoder, max_shard_size)
            schedules = {"base_scheduler": config.base_schedule, "ssr_scheduler": config.ssr_schedule}
            settings = {name: getattr(config, name) for name in layout.SETTINGS}
            layout.write_index(new, settings, schedules, self.text_encoder)

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the base model's weights."""
        return next(self.base.parameters()).dtype

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> LumierePipeline:
        """Move the models and the text encoder to `device` and cast the models to `dtype`; returns self.

        In bfloat16 or float16 the networks alone compute in it: noise, latent and sampler stay in float32.

        Raises:
            ValueError: no such device is here, or `dtype` is not a floating one.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be a floating one, such as torch.bfloat16, got {dtype}")
        target = self.device if device is None else _usable_device(device)
        for model in (self.base, self.ssr):
            model.to(device=target, dtype=dtype)
        self.text_encoder.to(target)
        return self

    @property
    def temporal_factor(self) -> int:
        """`num_frames` must be a multiple of this, the least that suits both models."""
        return math.lcm(self.base.temporal_factor, self.ssr.temporal_factor)

    @property
    def default_fps(self) -> int:
        return self.config.fps

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_frames: int | None = None,
        num_inference_steps: int = 24,
        ssr_num_inference_steps: int = 8,
        guidance_scale: float = 3.0,
        sampler: str = "dpm-solver++",
        eta: float = 0.0,
        threshold: Threshold | Literal["static", "dynamic"] | None = "static",
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        progress: bool | ProgressCallback = False,
        output_type: Literal["pt", "np", "pil"] = "pt",
    ) -> LumiereOutput:
        """Generate one clip a prompt.

        Args:
            prompt: one sentence, or several for a batch.
            num_frames: a multiple of `temporal_factor`; None for what the model was trained on.
            num_inference_steps, ssr_num_inference_steps: network evaluations of the base model, and of each window of
                the super-resolution model.
            guidance_scale: s in `unconditional + s (conditional - unconditional)`; 1 turns guidance off.
            sampler: "dpm-solver++", "ddim" or, ancestral, "ddpm".
            eta: of sampler "ddim": 0 deterministic, 1 ancestral.
            threshold: how the predicted clean clip is bounded at every step: "static" clamps it to [-1, 1], "dynamic"
                divides it by a quantile of its own that is above 1, None leaves it; or a `lumiere_fast.ops.Threshold`.
            generator: source of all noise, one for all prompts or one for each; None for torch's own. Each prompt's
                noise comes from a stream of its own, seeded in the order of the prompts: its clip does not depend on
                its neighbours, and the same prompts in two calls with one generator make the same clips as in one call.
                A generator on the CPU gives the same noise on every device.
            progress: True for progress bars on stderr, or a function called with (stage, done, total).
            output_type: what `LumiereOutput.frames` holds: "pt" a tensor, "np" an array, "pil" images.

        Raises:
            ValueError: an argument is not as above, or a prompt is empty.
            BackendUnavailable: the backend asked for by name cannot run an op of the model.
        """
        prompts = _check_prompts(prompt)
        num_frames = self.config.num_frames if num_frames is None else _integer("num_frames", num_frames)
        check_num_frames(num_frames, self.temporal_factor)
        num_inference_steps = _steps("num_inference_steps", num_inference_steps)
        ssr_num_inference_steps = _steps("ssr_num_inference_steps", ssr_num_inference_steps)
        guidance_scale = _guidance(guidance_scale)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        config, bound = self.config, resolve_threshold(threshold)
        base = Denoiser(config.base_schedule, config.base_parameterization, sampler, bound, eta)
        ssr = SuperResolution(
            self.ssr,
            Denoiser(config.ssr_schedule, config.ssr_parameterization, sampler, bound, eta),
            config.window_frames,
            self.ssr.unet.config.sample_size // self.base.unet.config.sample_size,
        )
        clips = clip_generators(generator, len(prompts), self.device)
        seconds: dict[str, float] = {}
        with dispatch.record_backends() as used:
            with _stage("base", seconds, progress) as on_step:
                size = self.base.unet.config.sample_size
                generators = clip_generators(clips, len(prompts))  # of this stage; the next draws its own of `clips`
                noise = draw_noise((len(prompts), 3, num_frames, size, size), self.device, generators)
                clip = denoise_from_text(
                    self.base,
                    self.text_encoder,
                    base,
                    prompts,
                    noise,
                    num_inference_steps,
                    guidance_scale,
                    on_step,
                    generators=generators,
                )
                base_frames = clip.clamp(-1, 1).cpu()  # waits for the device, so that the stage's time is its own
            with _stage("ssr", seconds, progress) as on_step:
                text = self.text_encoder.encode(prompts)
                frames = ssr(clip, text, ssr_num_inference_steps, clips, on_step).clamp(-1, 1).cpu()
        big, small = (_as_output(clips, output_type) for clips in (frames, base_frames))
        return LumiereOutput(big, small, seconds, ", ".join(sorted(used)))


def denoise_from_text(
    model: UNet2D | STUNet,
    text_encoder: TextEncoder,
    denoiser: Denoiser,
    prompts: list[str],
    noise: Tensor,
    num_inference_steps: int,
    guidance_scale: float,
    on_step: Callable[[int, int], None] | None = None,
    *,
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Unit `noise` (B, 3, T, H, W) to the clips, or with a `UNet2D` the images, of B prompts, in one window.

    `generators`, one a prompt, are what a stochastic sampler draws from.
    """
    guided = guidance_scale != 1
    text = model.prepare_text(*text_encoder.encode(prompts + [""] * len(prompts) if guided else prompts))

    def predict(scaled: Tensor, timestep: Tensor, window: Window) -> Tensor:
        if guided:
            scaled, timestep = torch.cat([scaled, scaled]), torch.cat([timestep, timestep])
        prediction: Tensor = model(scaled, timestep, text)
        return prediction

    return denoiser(
        predict,
        noise,
        num_inference_steps,
        windows=plan_windows(noise.shape[2], noise.shape[2], 0),
        guidance_scale=guidance_scale if guided else None,
        generators=generators,
        on_step=on_step,
    ).clip


def shipped_names() -> list[str]:
    """The pipelines that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{layout.INDEX_NAME}"))


def _check_prompts(prompt: str | Sequence[str]) -> list[str]:
    prompts = list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, str) else [prompt]
    if not prompts or any(not isinstance(text, str) or not text.strip() for text in prompts):
        got = "an empty one" if prompts and all(isinstance(text, str) for text in prompts) else repr(prompt)
        raise ValueError(f'prompt must be a sentence, or several; got {got}. Try "a red ball moving left"')
    return as_prompts(prompts)


def _as_output(frames: Tensor, output_type: str) -> Any:
    """(B, 3, T, H, W) in [-1, 1] as `LumiereOutput` describes."""
    if output_type == "pt":
        return frames
    if output_type == "np":
        return frames.add(1).div(2).permute(0, 2, 3, 4, 1).contiguous().numpy()
    from PIL import Image

    return [[Image.fromarray(picture) for picture in to_uint8(clip)] for clip in frames]


def _integer(name: str, value: object) -> int:
    """An integer of any library as Python's own; no bool, which is one by descent only, and no float."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"{name} must be >= 1, an integer, got {value!r}") from error


def _steps(name: str, value: object) -> int:
    steps = _integer(name, value)
    if steps < 1:
        raise ValueError(f"{name} must be >= 1, an integer, got {value!r}")
    return steps


def _guidance(value: Any) -> float:
    try:
        scale = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        scale = math.inf
    if not 0 <= scale < math.inf:
        raise ValueError(f"guidance_scale must be a finite number >= 0, got {value!r}")
    return scale


def _usable_device(device: torch.device | str) -> torch.device:
    """The device, if a tensor can be made there: its name alone says nothing about this build and this machine."""
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"device {str(device)!r} cannot be used on this machine: {reason}") from error
    return target


@contextmanager
def _stage(
    name: str, seconds: dict[str, float], progress: bool | ProgressCallback
) -> Iterator[Callable[[int, int], None]]:
    """Time a stage and give it a function to report its steps to."""
    started = time.perf_counter()
    if callable(progress):
        report = progress
        yield lambda done, total: report(name, done, total)
    elif progress:
        from tqdm import tqdm

        with tqdm(desc=name, unit="pass") as bar:

            def on_step(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield on_step
    else:
        yield lambda done, total: None
    seconds[name] = time.perf_counter() - started
