"""The sampling loop of both stages: a clip denoised in one window, or in overlapping ones by MultiDiffusion."""

from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from lumiere_fast import dispatch, ops
from lumiere_fast.diffusion import NoiseLevel, Parameterization, Schedule, check_sampler, draw_noise, sampling_table
from lumiere_fast.ops import _layout
from lumiere_fast.ops.denoise_step import Bound, _flat_threshold
from lumiere_fast.pipelines.state import DenoisingState
from lumiere_fast.pipelines.windows import Window, WindowPlan

Predictor = Callable[[Tensor, Tensor, Window], Tensor]
"""`predict(scaled, timestep, window)`: the network's output for the scaled clip of a window, in any floating dtype.
With guidance its batch is doubled, conditional before unconditional."""


OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|_STATUS_ALLOC_FAILED|could not create a memory object"
    r"|^\[enforce fail at alloc_cpu\.cpp"
)

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Denoised:
    """A finished `clip`, and the `windows` that it was made in at last: smaller than asked for where memory ran out."""

    clip: Tensor
    windows: WindowPlan


@dataclass(frozen=True)
class Denoiser:
    """How a stage turns noise into a clip: what the network was trained for and how it is sampled.

    Args:
        schedule, parameterization: those of the network's training.
        sampler: a name in `lumiere_fast.diffusion.SAMPLERS`.
        threshold: how the predicted clean clip is bounded at every step, once, after blending, as
            `lumiere_fast.ops.denoise_step` takes it; None for not at all.
        eta: of sampler "ddim": 0 deterministic, 1 ancestral.

    Raises:
        ValueError: one of these is not as above.
    """

    schedule: Schedule
    parameterization: Parameterization
    sampler: str = "dpm-solver++"
    threshold: Bound = "static"
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_sampler(self.sampler, self.eta)
        _flat_threshold(self.threshold)  # refuses what the op would, before there is work

    @property
    def stochastic(self) -> bool:
        """Whether steps draw fresh noise."""
        return self.sampler == "ddpm" or self.eta > 0

    def __call__(
        self,
        predict: Predictor,
        noise: Tensor,
        num_inference_steps: int,
        *,
        windows: WindowPlan,
        guidance_scale: float | None = None,
        generators: Sequence[torch.Generator] | None = None,
        on_step: Callable[[int, int], None] | None = None,
        shrink: Callable[[WindowPlan], WindowPlan | None] | None = None,
        resume: DenoisingState | None = None,
        on_state: Callable[[DenoisingState], None] | None = None,
    ) -> Denoised:
        """Denoise unit `noise` (B, C, T, H, W), drawn once a frame whatever the windows.

        The noise becomes the latent, in its own memory: pass a clone to keep it. Where a gradient of it is needed, or
        its elements do not lie densely, it is left as it is.

        At each step every window's prediction is made from the same latent, the predictions are averaged where windows
        overlap (paper, section 3.2: the least-squares reconciliation of MultiDiffusion), and one step is taken for the
        whole clip, with noise drawn once a frame from `generators`, one a clip, where the sampler is stochastic. The
        latent keeps the dtype of `noise`.

        Videos in memory, beside what `predict` holds: the latent; between steps of a multistep sampler the last clean
        clip; the predictions of one step; and while it is taken its clean clip and fresh noise.

        Args:
            on_step: called with (done, total), the windows of all steps; `total` grows where memory ran out.
            shrink: gives the next smaller plan, or None. Where a step runs out of memory it is made again with that,
                from the same latent and the same noise, and so are the steps after; without one the error goes on.
            resume: go on from this state, on its windows and with `generators` set to where they were, as if there had
                been no interruption. Of `noise` only shape, dtype and device count then.
            on_state: called after each step. The state's tensors are the run's own, which the next step writes over.

        Raises:
            ValueError: a stochastic sampler without generators, or a state that does not fit the call.
        """
        levels = self.schedule.levels(num_inference_steps)
        table = sampling_table(self.sampler, levels, self.parameterization, eta=self.eta)
        if generators is None and any(row.noise for row in table):
            raise ValueError(f"sampler {self.sampler!r} draws noise at every step: give generators, one a clip")
        first = 0
        history: Tensor | None = None
        if resume is None:
            sigma = levels[0].sigma
            latent = _dense(noise)
            latent = latent * sigma if dispatch.needs_gradient((noise,)) else latent.mul_(sigma)
        else:
            _check_fits(resume, noise, table, generators or ())
            first, windows = resume.step, resume.windows
            latent = _dense(noise.detach()).copy_(resume.latent)
            history = None if resume.history is None else resume.history.to(noise.device, copy=True)
            for generator, state in zip(generators or (), resume.generators, strict=True):
                generator.set_state(state)
        run = _Run(self, predict, levels, table, guidance_scale, generators, _Progress(on_step, first * len(windows)))
        states = run.generator_states()
        for step in range(first, len(table)):
            take = partial(run.take, step, latent, history, states)
            (latent, x0), windows = _within_memory(take, windows, shrink, latent.device)
            history = x0 if step + 1 < len(table) and table[step + 1].history else None
            del take, x0
            states = run.generator_states()
            if on_state is not None:
                on_state(DenoisingState(step + 1, latent, history, states, windows))
        return Denoised(latent, windows)


@dataclass(frozen=True)
class _Run:
    """What stays the same from step to step."""

    denoiser: Denoiser
    predict: Predictor
    levels: Sequence[NoiseLevel]
    table: Sequence[ops.StepCoefficients]
    guidance_scale: float | None
    generators: Sequence[torch.Generator] | None
    progress: _Progress

    def generator_states(self) -> tuple[Tensor, ...]:
        return tuple(generator.get_state() for generator in self.generators or ())

    def take(
        self, step: int, latent: Tensor, history: Tensor | None, states: Sequence[Tensor], windows: WindowPlan
    ) -> ops.DenoiseStep:
        """In place, but where a gradient is needed. Where memory runs out the latent is as it was: all that a step
        takes is there before it writes. `states`: of the generators, before the step."""
        for generator, state in zip(self.generators or (), states, strict=True):
            generator.set_state(state)
        self.progress.left = (len(self.table) - step) * len(windows)
        predictions = self.predictions(latent, self.levels[step], windows)
        row, noise = self.table[step], None
        if self.generators is not None and row.noise:
            noise = draw_noise(latent.shape, latent.device, self.generators).to(latent.dtype)
        return ops.denoise_step(
            predictions,
            windows.starts,
            latent,
            row,
            guidance_scale=self.guidance_scale,
            threshold=self.denoiser.threshold,
            weights=windows.weights,
            noise=noise,
            history=history,
            out=None if dispatch.needs_gradient((predictions, latent, history)) else (latent, history),
        )

    def predictions(self, latent: Tensor, level: NoiseLevel, windows: WindowPlan) -> list[Tensor]:
        """One for each window. The network's input is scaled a window at a time."""
        parameterization = self.denoiser.parameterization
        alpha, sigma = (torch.full((latent.shape[0],), value, device=latent.device) for value in level)
        timestep = parameterization.timestep(alpha, sigma)
        predictions = []
        for window in windows:
            scaled = parameterization.scale_input(window.of(latent), _per_clip(alpha), _per_clip(sigma))
            predictions.append(self.predict(scaled, timestep, window))
            self.progress.advance()
        return predictions


@dataclass
class _Progress:
    """Counts windows. Those of a step that is made again count once more, so that `done` never falls."""

    on_step: Callable[[int, int], None] | None
    done: int
    left: int = 0

    def advance(self) -> None:
        self.done += 1
        self.left -= 1
        if self.on_step is not None:
            self.on_step(self.done, self.done + self.left)


def _within_memory(
    make: Callable[[WindowPlan], _Made],
    windows: WindowPlan,
    shrink: Callable[[WindowPlan], WindowPlan | None] | None,
    device: torch.device,
) -> tuple[_Made, WindowPlan]:
    """What `make` makes of the first of `windows`, `shrink(windows)` and so on that memory suffices for, and that."""
    while True:
        try:
            return make(windows), windows
        except (MemoryError, RuntimeError) as error:
            smaller = shrink(windows) if shrink is not None and _is_out_of_memory(error) else None
            if smaller is None:
                raise
        # Only here, past the handler, are the frames gone that hold activations; those of a cycle go with the next line
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(f"out of memory with {windows}: the step is made again with {smaller}", stacklevel=3)
        windows = smaller


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Only torch's CUDA allocator has an error of its own; its CPU allocator, the CUDA driver and the libraries say it
    in words."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


def _check_fits(
    state: DenoisingState, noise: Tensor, table: Sequence[ops.StepCoefficients], generators: Sequence[torch.Generator]
) -> None:
    """Raise a ValueError unless a run of this table, from this noise, can go on from `state`."""
    if not 0 <= state.step <= len(table):
        raise ValueError(f"resume is after step {state.step}, the run has {len(table)}: give as many steps as before")
    for name, tensor in (("latent", state.latent), ("history", state.history)):
        if tensor is not None and (tensor.shape, tensor.dtype) != (noise.shape, noise.dtype):
            raise ValueError(
                f"resume.{name} must be like noise, {tuple(noise.shape)} {noise.dtype}, "
                f"got {tuple(tensor.shape)} {tensor.dtype}"
            )
    if state.history is None and state.step < len(table) and table[state.step].history:
        raise ValueError("resume.history is missing, and the sampler's next step reads it: use the sampler of before")
    found, wanted = ([tuple(x.shape) for x in xs] for xs in (state.generators, [g.get_state() for g in generators]))
    if found != wanted:
        raise ValueError(
            f"resume holds {len(found)} generators, the call has {len(wanted)}: "
            "give as many as before, on the same kind of device"
        )


def _dense(video: Tensor) -> Tensor:
    """In the layout of a video, itself where it is in one."""
    return video.contiguous(memory_format=_layout.video_format(video))


def _per_clip(values: Tensor) -> Tensor:
    """(B,) to broadcast against (B, C, T, H, W)."""
    return values[:, None, None, None, None]
