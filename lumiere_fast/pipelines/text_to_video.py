"""Text to video: the base model denoises the whole clip, super-resolution raises it window by window."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lumiere_fast import dispatch
from lumiere_fast.diffusion import EDMParameterization, EDMSchedule
from lumiere_fast.diffusion.schedule import check_positive_numbers
from lumiere_fast.models import STUNet, UNet2D
from lumiere_fast.models.blocks import channels_last_weights
from lumiere_fast.models.io import load_stunet, read_json, save_model, write_json_atomically
from lumiere_fast.models.stunet import check_num_frames
from lumiere_fast.pipelines.denoising import Denoiser
from lumiere_fast.pipelines.super_resolution import SuperResolution, draw_noise
from lumiere_fast.text import TextEncoder, WordVectorEncoder

INDEX_NAME = "model_index.json"
SHIPPED = Path(__file__).parent.parent / "weights"

ProgressCallback = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LumiereOutput:
    """A generated batch of clips.

    Args:
        frames: (B, 3, T, H, W) float32 in [-1, 1], on the CPU.
        base_frames: the base model's clip, likewise, before super-resolution.
        seconds: wall time of each stage, in order.
        backend: the backends that the ops ran on.
    """

    frames: Tensor
    base_frames: Tensor
    seconds: dict[str, float]
    backend: str


@dataclass(frozen=True)
class PipelineConfig:
    """Everything of a pipeline but its weights: the content of `model_index.json`."""

    base_schedule: EDMSchedule
    ssr_schedule: EDMSchedule
    num_frames: int
    fps: int
    window_frames: int
    text_encoder: str = WordVectorEncoder.name
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        for name in ("num_frames", "fps", "window_frames"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        check_positive_numbers(sigma_data=self.sigma_data)


class LumierePipeline:
    """Turns prompts into clips. Load one with `from_pretrained`.

    Every random number comes from `generator`; with the same generator state, prompt and settings a machine gives the
    same clip.
    """

    def __init__(self, base: STUNet, ssr: STUNet, config: PipelineConfig) -> None:
        if config.text_encoder != WordVectorEncoder.name:
            raise ValueError(f"text_encoder must be {WordVectorEncoder.name!r}, got {config.text_encoder!r}")
        if base.unet.config.conditioning_channels or not ssr.unet.config.conditioning_channels:
            raise ValueError(
                "base must be a text-to-image model inflated, ssr a super-resolution one: look at their order"
            )
        if ssr.unet.config.sample_size % base.unet.config.sample_size:
            raise ValueError(
                f"the super-resolution model makes {ssr.unet.config.sample_size} pixels, "
                f"a multiple of the base model's {base.unet.config.sample_size} is needed"
            )
        self.config = config
        self.base = base.eval()
        self.ssr = ssr.eval()
        self.text_encoder = WordVectorEncoder(self.device)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path = "demo") -> LumierePipeline:
        """Load the shipped "demo" pipeline, or a folder made by `save_pretrained`.

        Raises:
            FileNotFoundError: there is no such folder, or a file of it is missing.
            ValueError: a file is damaged or of another architecture; names the first key that differs.
        """
        shipped = SHIPPED / str(name_or_path)
        folder = shipped if str(name_or_path) in shipped_names() else Path(name_or_path)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not a folder of weights; give one, or a shipped model: {', '.join(shipped_names())}"
            )
        config = _config_from_index(folder / INDEX_NAME)
        base, ssr = (channels_last_weights(load_stunet(folder / part)) for part in ("base", "ssr"))
        return cls(base, ssr, config)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write `model_index.json`, `base/` and `ssr/`; weights are cast to `dtype` (None keeps theirs)."""
        folder = Path(folder)
        save_model(self.base, folder / "base", dtype=dtype)
        save_model(self.ssr, folder / "ssr", dtype=dtype)
        write_json_atomically({"_class_name": type(self).__name__, **asdict(self.config)}, folder / INDEX_NAME)

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    def to(self, device: torch.device | str) -> LumierePipeline:
        """Move the models and the text table; returns self."""
        device = torch.device(device)
        self.base.to(device)
        self.ssr.to(device)
        self.text_encoder.to(device)
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
        generator: torch.Generator | None = None,
        progress: bool | ProgressCallback = False,
    ) -> LumiereOutput:
        """Generate one clip a prompt.

        Args:
            prompt: one sentence, or several for a batch.
            num_frames: a multiple of `temporal_factor`; None for what the model was trained on.
            num_inference_steps, ssr_num_inference_steps: network evaluations of the base model, and of each window of
                the super-resolution model.
            guidance_scale: s in `unconditional + s (conditional - unconditional)`; 1 turns guidance off.
            sampler: "dpm-solver++" or "ddim".
            generator: source of all noise; None for torch's own.
            progress: True for progress bars on stderr, or a function called with (stage, done, total).

        Raises:
            ValueError: an argument is not as above, or a prompt is empty.
            BackendUnavailable: the backend asked for by name cannot run an op of the model.
        """
        prompts = _check_prompts(prompt)
        num_frames = self.config.num_frames if num_frames is None else num_frames
        check_num_frames(num_frames, self.temporal_factor)
        _check_at_least(1, num_inference_steps=num_inference_steps, ssr_num_inference_steps=ssr_num_inference_steps)
        _check_at_least(0, guidance_scale=guidance_scale)
        parameterization = EDMParameterization(self.config.sigma_data)
        base = Denoiser(self.config.base_schedule, parameterization, sampler)
        ssr = SuperResolution(
            self.ssr,
            Denoiser(self.config.ssr_schedule, parameterization, sampler),
            self.config.window_frames,
            self.ssr.unet.config.sample_size // self.base.unet.config.sample_size,
        )
        seconds: dict[str, float] = {}
        with dispatch.record_backends() as used:
            with _stage("base", seconds, progress) as on_step:
                size = self.base.unet.config.sample_size
                noise = draw_noise((len(prompts), 3, num_frames, size, size), self.device, generator)
                clip = denoise_from_text(
                    self.base, self.text_encoder, base, prompts, noise, num_inference_steps, guidance_scale, on_step
                )
                base_frames = clip.clamp(-1, 1).cpu()  # waits for the device, so that the stage's time is its own
            with _stage("ssr", seconds, progress) as on_step:
                text = self.text_encoder.encode(prompts)
                frames = ssr(clip, text, ssr_num_inference_steps, generator, on_step).clamp(-1, 1).cpu()
        return LumiereOutput(frames, base_frames, seconds, ", ".join(sorted(used)))


def denoise_from_text(
    model: UNet2D | STUNet,
    text_encoder: TextEncoder,
    denoiser: Denoiser,
    prompts: list[str],
    noise: Tensor,
    num_inference_steps: int,
    guidance_scale: float,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Unit `noise` (B, 3, T, H, W) to the clips, or with a `UNet2D` the images, of B prompts, in one window."""
    guided = guidance_scale != 1
    text = text_encoder.encode(prompts + [""] * len(prompts) if guided else prompts)

    def predict(window: Tensor, timestep: Tensor, frames: slice) -> Tensor:
        if guided:
            window, timestep = torch.cat([window, window]), torch.cat([timestep, timestep])
        prediction: Tensor = model(window, timestep, text.hidden_states, text.mask)
        return prediction

    return denoiser(
        predict,
        noise,
        num_inference_steps,
        windows=[slice(0, noise.shape[2])],
        guidance_scale=guidance_scale if guided else None,
        on_step=on_step,
    )


def shipped_names() -> list[str]:
    """The pipelines that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{INDEX_NAME}"))


def _config_from_index(path: Path) -> PipelineConfig:
    values = read_json(path)
    try:
        if values.pop("_class_name", None) != LumierePipeline.__name__:
            raise ValueError(f"expected _class_name {LumierePipeline.__name__}")
        config = PipelineConfig(**values)
        base, ssr = EDMSchedule(**values["base_schedule"]), EDMSchedule(**values["ssr_schedule"])
        return replace(config, base_schedule=base, ssr_schedule=ssr)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a pipeline of this version: {error}") from error


def _check_prompts(prompt: str | Sequence[str]) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or any(not isinstance(text, str) or not text.strip() for text in prompts):
        raise ValueError('prompt must be a sentence, or several; got an empty one. Try "a red ball moving left"')
    return prompts


def _check_at_least(least: int, **values: float) -> None:
    for name, value in values.items():
        if not least <= value < math.inf:  # nor NaN
            raise ValueError(f"{name} must be >= {least}, got {value}")


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
