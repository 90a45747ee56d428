"""Text to video: the base model denoises the whole clip, super-resolution raises it window by window."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lumiere_fast import dispatch
from lumiere_fast.diffusion import (
    EDMParameterization,
    Generators,
    Parameterization,
    Schedule,
    clip_generators,
    draw_noise,
)
from lumiere_fast.models import STUNet, UNet2D
from lumiere_fast.models.blocks import channels_last_weights
from lumiere_fast.models.io import as_path, check_is_folder, load_stunet, replacing_entries, save_model
from lumiere_fast.models.pretrained import MAX_SHARD_SIZE
from lumiere_fast.models.stunet import check_num_frames
from lumiere_fast.ops.blend_windows import WeightKind
from lumiere_fast.ops.denoise_step import Bound
from lumiere_fast.pipelines import arguments
from lumiere_fast.pipelines import folder as layout
from lumiere_fast.pipelines.arguments import as_clips, as_output
from lumiere_fast.pipelines.budget import Job, weight_bytes, within_memory
from lumiere_fast.pipelines.checkpoint import Checkpoint, Resumption, content, fingerprint
from lumiere_fast.pipelines.denoising import Denoised, Denoiser
from lumiere_fast.pipelines.memory import check_memory, parse_bytes
from lumiere_fast.pipelines.progress import OnStep, ProgressCallback, Stages
from lumiere_fast.pipelines.super_resolution import SuperResolution, padded
from lumiere_fast.pipelines.text_guided import TextGuided
from lumiere_fast.pipelines.windows import Vectors, WindowPlan, plan_windows
from lumiere_fast.text import TextEmbedding, TextEncoder, WordVectorEncoder
from lumiere_fast.video import MAX_FPS

SHIPPED = Path(__file__).parent.parent / "weights"


@dataclass(frozen=True)
class LumiereOutput:
    """A generated batch of clips.

    Args:
        frames: the clips, on the CPU, by `output_type`:
            "pt": a tensor (B, 3, T, H, W) float32 in [-1, 1];
            "np": an array (B, T, H, W, 3) float32 in [0, 1];
            "pil": B lists of T images.
        base_frames: the base model's clips, likewise, before super-resolution; of `upscale` those that it was given.
        seconds: wall time of each stage that ran, in order.
        backend: the backends that the ops ran on.
        windows: of each stage, "base" and "ssr", the windows that it was made in at last: smaller than asked for where
            memory ran out. `str(output.windows["ssr"])` tells of them in words.
    """

    frames: Any
    base_frames: Any
    seconds: dict[str, float]
    backend: str
    windows: dict[str, WindowPlan]


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
        self._offload_device: torch.device | None = None
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
        """Where the networks run."""
        return self._offload_device or next(self.base.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the base model's weights."""
        return next(self.base.parameters()).dtype

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> LumierePipeline:
        """Move the models and the text encoder to `device` and cast the models to `dtype`; returns self.

        A device ends `enable_model_cpu_offload`: all is moved there, to stay.

        In bfloat16 or float16 the networks alone compute in it: noise, latent and sampler stay in float32.

        Raises:
            ValueError: no such device is here, or `dtype` is not a floating one.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be a floating one, such as torch.bfloat16, got {dtype}")
        target = None if device is None else _usable_device(device)
        for model in (self.base, self.ssr):
            model.to(device=target, dtype=dtype)
        if target is not None:
            self._offload_device = None
            self.text_encoder.to(target)
        return self

    def enable_model_cpu_offload(self, device: torch.device | str = "cuda") -> None:
        """Keep the text encoder and both models on the CPU, each on `device` only while it runs.

        The memory of `device` then holds one of them at a time, beside the clip; moving them costs a few seconds a
        call at most. `to` with a device ends it.

        Raises:
            ValueError: no such device is here.
        """
        target = _usable_device(device)
        self.to("cpu")
        self._offload_device = target

    @contextmanager
    def _running(self, component: STUNet | TextEncoder) -> Iterator[None]:
        """Within the block the component is where it runs."""
        if self._offload_device is None:
            yield
            return
        component.to(self._offload_device)
        try:
            yield
        finally:
            component.to("cpu")

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
        threshold: Bound = "static",
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        progress: bool | ProgressCallback = False,
        output_type: Literal["pt", "np", "pil"] = "pt",
        window_frames: int | None = None,
        overlap: int = 2,
        max_memory: int | str | None = None,
        window_weights: WeightKind | Vectors = "flat",
        base_overlap: int | None = None,
        checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
        cuda_graphs: bool = False,
    ) -> LumiereOutput:
        """Generate one clip a prompt.

        Args:
            prompt: one sentence, or several for a batch.
            num_frames: a multiple of `temporal_factor`; None for what the model was trained on. More go through the
                base model in windows of that many.
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
            window_frames: frames that super-resolution takes at a time, a multiple of its temporal factor; None for
                what it was trained on. Fewer, with a warning, where the memory that is free at the start, or in the
                middle, does not suffice.
            overlap: frames that neighbouring windows of super-resolution share (paper: 2).
            max_memory: bytes that super-resolution may take, such as "12GiB": weights, videos and one window of
                frames. Its windows are then the best that fit, of at most `window_frames`.
            window_weights: how windows are weighed where they overlap, in both stages; "flat" as in the paper. Or as
                many numbers as `window_frames`, for super-resolution; the base model's windows are then "flat".
            base_overlap: frames that neighbouring windows of the base model share; None for half of a window. The
                paper's 2 serve super-resolution, whose small clip already moves as one. How a clip moves the base
                model decides, and windows agree on it only through the frames they share; with half, every frame but
                those at the ends lies in two windows, at twice the work.
            checkpoint: a file ending in .safetensors in which the call keeps its state after every step. If it is
                there, the call goes on from it, bit for bit, and it is removed when the call returns.
            cuda_graphs: replay the networks as CUDA graphs; no effect on the CPU.

        Raises:
            ValueError: an argument is not as above, a prompt is empty, `checkpoint` holds another call, or the device
                has less memory than the clips take at least.
            BackendUnavailable: the backend asked for by name cannot run an op of the model.
        """
        prompts = arguments.check_prompts(prompt)
        num_frames = self.config.num_frames if num_frames is None else arguments.integer("num_frames", num_frames)
        check_num_frames(num_frames, self.temporal_factor)
        steps = arguments.at_least(1, "num_inference_steps", num_inference_steps)
        ssr_steps = arguments.at_least(1, "ssr_num_inference_steps", ssr_num_inference_steps)
        scale = arguments.guidance(guidance_scale)
        arguments.check_output_type(output_type)
        sampling = (sampler, threshold, eta)
        base = self._text_guided(sampling, scale, cuda_graphs)
        check_memory(self, num_frames, len(prompts), guided=scale != 1, stochastic=base.denoiser.stochastic)
        plan = self._base_windows(num_frames, base_overlap, window_weights)
        ssr = self._super_resolution(sampling, window_frames, overlap, window_weights, None, cuda_graphs)
        size = self.base.unet.config.sample_size
        job = Job(len(prompts), num_frames, size, size)
        ssr.plan(*job[1:])  # refuses weights that do not fit before there is work
        call = self._begin(
            prompts,
            generator,
            progress,
            checkpoint,
            {
                "call": "generate",
                "num_frames": num_frames,
                "num_inference_steps": steps,
                "guidance_scale": scale,
                "base_overlap": plan.overlap,
            },
            self._settings_of(ssr, ssr_steps, max_memory),
        )
        ssr_plan = self._ssr_windows(ssr, job, max_memory, call)
        with dispatch.record_backends() as used:
            small, base_frames = self._make_small(call, base, job, steps, plan)
            big = self._enlarge(call, ssr, small, ssr_steps, ssr_plan, source=small)
            frames = big.clip
        call.resumption.finish()
        shown, shown_base = (as_output(clips, output_type) for clips in (frames, base_frames))
        plans = {"base": plan, "ssr": big.windows}
        return LumiereOutput(shown, shown_base, call.stages.seconds, ", ".join(sorted(used)), plans)

    @torch.no_grad()
    def upscale(
        self,
        frames: Any,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int = 8,
        sampler: str = "dpm-solver++",
        eta: float = 0.0,
        threshold: Bound = "static",
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        progress: bool | ProgressCallback = False,
        output_type: Literal["pt", "np", "pil"] = "pt",
        window_frames: int | None = None,
        overlap: int = 2,
        size_overlap: int | None = None,
        max_memory: int | str | None = None,
        window_weights: WeightKind | Vectors | None = None,
        checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
        cuda_graphs: bool = False,
    ) -> LumiereOutput:
        """Super-resolution alone, of clips of any length and size.

        Frames that come out larger than those the model was trained on are made in windows of that size. A length and
        sides that the model cannot take are made up by repeating the last frame, row and column, and cut off again.

        Args:
            frames: the clips: a tensor (B, 3, T, H, W) in [-1, 1], or an array (B, T, H, W, 3), float in [0, 1] or
                uint8, or lists of images; of a single clip without B as well.
            prompt: what they show: a sentence a clip.
            size_overlap: rows and columns that neighbouring windows share; None for a quarter of their side.
            window_weights: as in `__call__`; None for "trapezoid" where windows lie in space, else "flat".

        The others are as in `__call__`, and so are the errors.
        """
        clips = as_clips(frames)
        prompts = arguments.check_prompts(prompt)
        if len(prompts) != len(clips):
            raise ValueError(f"prompt must be a sentence for each of the {len(clips)} clips, got {len(prompts)}")
        steps = arguments.at_least(1, "num_inference_steps", num_inference_steps)
        arguments.check_output_type(output_type)
        sampling = (sampler, threshold, eta)
        ssr = self._super_resolution(sampling, window_frames, overlap, window_weights, size_overlap, cuda_graphs)
        small = padded(clips, ssr.padding(*clips.shape[2:]))
        call = self._begin(
            prompts,
            generator,
            progress,
            checkpoint,
            {"call": "upscale", "clip": hashlib.sha256(content(small)).hexdigest()[:16], "size_overlap": size_overlap},
            self._settings_of(ssr, steps, max_memory),
        )
        plan = self._ssr_windows(ssr, Job(len(clips), *small.shape[2:]), max_memory, call)
        with dispatch.record_backends() as used:
            big = self._enlarge(call, ssr, small.to(self.device), steps, plan)
        call.resumption.finish()
        length, height, width = clips.shape[2], clips.shape[3] * ssr.factor, clips.shape[4] * ssr.factor
        shown = as_output(big.clip[:, :, :length, :height, :width], output_type)
        given = as_output(clips, output_type)
        return LumiereOutput(shown, given, call.stages.seconds, ", ".join(sorted(used)), {"ssr": big.windows})

    def _text_guided(self, sampling: _Sampling, guidance_scale: float, cuda_graphs: bool) -> TextGuided:
        config = self.config
        denoiser = Denoiser(config.base_schedule, config.base_parameterization, *sampling)
        return TextGuided(self.base, denoiser, guidance_scale, cuda_graphs)

    def _super_resolution(
        self,
        sampling: _Sampling,
        window_frames: int | None,
        overlap: int,
        weights: WeightKind | Vectors | None,
        size_overlap: int | None,
        cuda_graphs: bool,
    ) -> SuperResolution:
        config = self.config
        return SuperResolution(
            self.ssr,
            Denoiser(config.ssr_schedule, config.ssr_parameterization, *sampling),
            config.window_frames if window_frames is None else arguments.integer("window_frames", window_frames),
            self.ssr.unet.config.sample_size // self.base.unet.config.sample_size,
            arguments.at_least(0, "overlap", overlap),
            weights=weights,
            size_overlap=None if size_overlap is None else arguments.at_least(0, "size_overlap", size_overlap),
            cuda_graphs=cuda_graphs,
        )

    def _base_windows(self, num_frames: int, overlap: int | None, weights: WeightKind | Vectors) -> WindowPlan:
        window = self.config.num_frames
        overlap = window // 2 if overlap is None else arguments.at_least(0, "base_overlap", overlap)
        if overlap >= window:
            raise ValueError(f"base_overlap must be below the base model's window, {window} frames, got {overlap}")
        return plan_windows(num_frames, window, overlap, weights=weights if isinstance(weights, str) else "flat")

    def _ssr_windows(self, ssr: SuperResolution, job: Job, max_memory: int | str | None, call: _Call) -> WindowPlan:
        """Those of the interrupted call, if there was one: it may have had another memory."""
        state = call.resumption.state("ssr")
        if state is not None:
            return state.windows
        offloaded = self._offload_device is not None
        resident = weight_bytes(self.ssr) if offloaded else weight_bytes(self.base, self.ssr)
        arriving = resident if offloaded else 0
        allowed = _allowed(max_memory)
        return within_memory(ssr, job, self.device, resident=resident, arriving=arriving, max_memory=allowed)

    def _settings_of(self, ssr: SuperResolution, steps: int, max_memory: int | str | None) -> dict[str, Any]:
        """What must be the same for an interrupted call to go on, of what super-resolution is given."""
        denoiser = ssr.denoiser
        return {
            "ssr_num_inference_steps": steps,
            "sampler": denoiser.sampler,
            "eta": denoiser.eta,
            "threshold": str(denoiser.threshold),
            "window_frames": ssr.window_frames,
            "overlap": ssr.overlap,
            "window_weights": ssr.weights,
            "max_memory": _allowed(max_memory),
        }

    def _begin(
        self,
        prompts: list[str],
        generator: Generators,
        progress: bool | ProgressCallback,
        checkpoint: str | os.PathLike[str] | Checkpoint | None,
        *settings: dict[str, Any],
    ) -> _Call:
        resumption = Resumption(checkpoint)
        generators = resumption.generators(generator, len(prompts), self.device)
        if resumption.path is not None:
            about: dict[str, Any] = {
                "prompts": prompts,
                "text_encoder": self.text_encoder.name,
                "config": str(self.config),
                "weights": [fingerprint(model) for model in (self.base, self.ssr)],
                "dtype": str(self.dtype),
                "device": self.device.type,
                "backend": dispatch.current_backend(),
            }
            for part in settings:
                about |= part
            resumption.check(about, generators)
        return _Call(prompts, generators, Stages(progress), resumption)

    def _make_small(
        self, call: _Call, base: TextGuided, job: Job, steps: int, plan: WindowPlan
    ) -> tuple[Tensor, Tensor]:
        """The base model's clips, where they were made, and on the CPU as they are shown."""
        enlarging = call.resumption.state("ssr")
        # The base stage draws from generators of its own, whose seeds come first of `call.generators`.
        generators = clip_generators(call.generators, job.batch)
        if enlarging is not None:
            assert enlarging.source is not None
            small = enlarging.source.to(self.device)
            return small, small.clamp(-1, 1).cpu()
        state = call.resumption.state("base")
        with call.stages.stage("base", steps, plan, state) as on_step:
            text = self._encode(base.texts(call.prompts))
            noise = draw_noise((job.batch, 3, *job[1:]), self.device, generators)
            with self._running(self.base):
                small = base(
                    text,
                    noise,
                    steps,
                    windows=plan,
                    generators=generators,
                    on_step=on_step,
                    resume=state,
                    on_state=call.resumption.saver("base"),
                ).clip
            return small, small.clamp(-1, 1).cpu()  # waits for the device, so that the stage's time is its own

    def _enlarge(
        self,
        call: _Call,
        ssr: SuperResolution,
        small: Tensor,
        steps: int,
        plan: WindowPlan,
        source: Tensor | None = None,
    ) -> Denoised:
        """The clip on the CPU. `source` is what a checkpoint must hold of the stage before."""
        state = call.resumption.state("ssr")
        with call.stages.stage("ssr", steps, plan, state) as on_step:
            text = self._encode(call.prompts)
            with self._running(self.ssr):
                big = ssr(
                    small,
                    text,
                    steps,
                    call.generators,
                    on_step,
                    windows=plan,
                    resume=state,
                    on_state=call.resumption.saver("ssr", source),
                )
            return Denoised(big.clip.clamp(-1, 1).cpu(), big.windows)

    def _encode(self, texts: list[str]) -> TextEmbedding:
        with self._running(self.text_encoder):
            return self.text_encoder.encode(texts)


_Sampling = tuple[str, Bound, float]
"""Sampler, threshold and eta of both stages."""


class _Call(NamedTuple):
    """What the stages of one call share."""

    prompts: list[str]
    generators: list[torch.Generator]
    stages: Stages
    resumption: Resumption


def denoise_from_text(
    model: UNet2D | STUNet,
    text_encoder: TextEncoder,
    denoiser: Denoiser,
    prompts: list[str],
    noise: Tensor,
    num_inference_steps: int,
    guidance_scale: float,
    on_step: OnStep | None = None,
    *,
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Unit `noise` (B, 3, T, H, W) to the clips, or with a `UNet2D` the images, of B prompts, in one window.

    `generators`, one a prompt, are what a stochastic sampler draws from. The noise becomes the clips: pass a clone to
    keep it.
    """
    guided = TextGuided(model, denoiser, guidance_scale)
    text = text_encoder.encode(guided.texts(prompts))
    whole = plan_windows(noise.shape[2], noise.shape[2], 0)
    return guided(text, noise, num_inference_steps, windows=whole, generators=generators, on_step=on_step).clip


def shipped_names() -> list[str]:
    """The pipelines that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{layout.INDEX_NAME}"))


def _allowed(max_memory: int | str | None) -> int | None:
    try:
        return None if max_memory is None else parse_bytes(max_memory)
    except ValueError as error:
        raise ValueError(f"max_memory: {error}") from error


def _usable_device(device: torch.device | str) -> torch.device:
    """The device, if a tensor can be made there: its name alone says nothing about this build and this machine."""
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"device {str(device)!r} cannot be used on this machine: {reason}") from error
    return target
