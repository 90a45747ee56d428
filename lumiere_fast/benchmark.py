"""How fast this machine runs the shipped pipeline, its models and each op: ``lumiere-fast benchmark``.

Each row times the backend that is used against the reference backend, in turn and in one process. A kernel writes into
a held buffer; the reference makes its own result, since for `out=` it would have to copy that. `times_as_fast` is the
reference's time over ours, so it is missing where ours is the reference. `pytest benchmarks/` in the source tree
compares with other ways to compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lumiere_fast import dispatch, ops, timing
from lumiere_fast._malloc import keep_freed_memory
from lumiere_fast.models import STUNet
from lumiere_fast.models.config import UNetConfig
from lumiere_fast.ops import _selfcheck
from lumiere_fast.ops._spec import Draw, OpSpec, Scenario
from lumiere_fast.pipelines import LumiereOutput, LumierePipeline
from lumiere_fast.selftest import checked_device
from lumiere_fast.timing import Side

PROMPT = "a red ball moving left on a black background"
STEPS, SSR_STEPS = 2, 1  # enough: each step costs the same
TEXT_TOKENS = 16
PIPELINE, STUNET = "pipeline", "stunet"
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Timing:
    """One row. Times in seconds; those of a row that could not run are missing, and `why_not` tells why.

    Args:
        name: an op, "stunet" or "pipeline".
        backend: what ran, or what was asked for in vain.
        times_as_fast: the reference's time over ours; missing where they are one.
    """

    name: str
    scenario: str
    backend: str
    device: str
    dtype: str
    threads: int
    median_s: float | None = None
    p10_s: float | None = None
    p90_s: float | None = None
    reference_s: float | None = None
    times_as_fast: float | None = None
    gb_per_s: float | None = None
    gflop_per_s: float | None = None
    why_not: tuple[str, ...] = ()


def names() -> tuple[str, ...]:
    """What can be timed."""
    return (PIPELINE, STUNET, *(spec.name for spec in _specs()))


def run(
    wanted: Sequence[str] | None = None,
    *,
    backend: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    budget: float = 0.3,
    weights: str = "demo",
) -> Iterator[Timing]:
    """Time these, in the threads that torch is set to; one row after the other.

    Args:
        wanted: of `names()`; None for all.
        backend: None for the current choice, as a rule "auto".
        device: None for the GPU where there is one, else the CPU.
        dtype: of activations and models, the pipeline excepted; None for float32, on a GPU bfloat16.
        budget: seconds of timed rounds a row; at least three rounds are timed.
        weights: a folder of weights, or the name of a shipped pipeline.

    Raises:
        ValueError: an argument is not as above.
        FileNotFoundError: there are no such weights.
    """
    for name in wanted or ():
        if name not in names():
            raise ValueError(f"what to time must be of {', '.join(names())}, got {name!r}")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not budget > 0:
        raise ValueError(f"budget must be a positive number of seconds, got {budget}")
    if backend not in (None, dispatch.AUTO, *dispatch.BACKENDS):
        raise ValueError(f"backend must be one of auto, {', '.join(dispatch.BACKENDS)}, got {backend!r}")
    where = checked_device(device).type
    bench = _Bench(where, getattr(torch, dtype or ("bfloat16" if where == "cuda" else "float32")), backend, budget)
    return bench.rows(wanted or names(), weights)


def render(rows: Sequence[Timing]) -> str:
    """The table for people, and below it the reasons of rows that could not run."""
    head = ("what", "scenario", "backend", "dtype", "threads", "median", "p10..p90", "GB/s", "GFLOP/s", "x reference")
    lines = timing.aligned([head, *(_cells(row) for row in rows)], numbers=range(4, 10))
    for reason in dict.fromkeys(reason for row in rows for reason in row.why_not):
        lines.append(f"not run: {reason} ({', '.join(dict.fromkeys(r.name for r in rows if reason in r.why_not))})")
    return "\n".join(lines)


def _cells(row: Timing) -> tuple[str, ...]:
    first = (row.name, row.scenario, row.backend, row.dtype, str(row.threads))
    if row.median_s is None or row.p10_s is None or row.p90_s is None:
        return (*first, "not run", "", "", "", "")
    return (
        *first,
        timing.seconds(row.median_s),
        f"{timing.seconds(row.p10_s)}..{timing.seconds(row.p90_s)}",
        f"{row.gb_per_s:.1f}" if row.gb_per_s else "",
        f"{row.gflop_per_s:.1f}" if row.gflop_per_s else "",
        f"{row.times_as_fast:.2f}" if row.times_as_fast else "",
    )


class _Bench:
    def __init__(self, device: str, dtype: torch.dtype, backend: str | None, budget: float) -> None:
        self.device, self.dtype, self.backend, self.budget = device, dtype, backend, budget

    def rows(self, wanted: Sequence[str], weights: str) -> Iterator[Timing]:
        keep_freed_memory()
        clock = timing.clock_for(self.device)
        if {PIPELINE, STUNET} & set(wanted):
            pipe = LumierePipeline.from_pretrained(weights).to(self.device)
            if PIPELINE in wanted:
                yield from self._pipeline(pipe)
            if STUNET in wanted:
                yield from self._stunets(pipe, clock)
        for spec in _specs():
            if spec.name in wanted:
                for scenario in spec.scenarios:
                    if scenario.cpu == (self.device == "cpu"):
                        yield self._fitting_op(spec, scenario, clock)

    def _pipeline(self, pipe: LumierePipeline) -> Iterator[Timing]:
        """The stages of a short run; the pipeline measures them itself, waiting for the device."""

        def clip() -> LumiereOutput:
            generator = torch.Generator().manual_seed(0)
            return pipe(PROMPT, generator=generator, num_inference_steps=STEPS, ssr_num_inference_steps=SSR_STEPS)

        def stages(backend: str) -> dict[str, float]:
            with dispatch.use_backend(backend):
                return clip().seconds

        chosen = dispatch.current_backend() if self.backend is None else self.backend
        try:
            with dispatch.use_backend(chosen):
                ran = clip().backend
        except dispatch.BackendUnavailable as error:
            yield self._not_run(PIPELINE, "clip", chosen, (str(error),), torch.float32)
            return
        sides = [chosen] if ran == "reference" else [chosen, "reference"]
        first = [stages(side) for side in sides]
        rounds = max(timing.MIN_ROUNDS, int(self.budget / sum(sum(each.values()) for each in first)))
        samples = [[stages(side) for side in sides] for _ in range(rounds)]
        for stage in first[0]:
            mine, *theirs = ([each[side][stage] for each in samples] for side in range(len(sides)))
            scenario = f"{stage} of {STEPS} + {SSR_STEPS} steps"
            yield self._row(PIPELINE, scenario, ran, mine, theirs[0] if theirs else None, dtype=torch.float32)

    def _stunets(self, pipe: LumierePipeline, clock: timing.Clock) -> Iterator[Timing]:
        """One forward of the base model with both halves of guidance, and one of the super-resolution on a window."""
        parts = (("base", pipe.base, 2, pipe.config.num_frames), ("ssr", pipe.ssr, 1, pipe.config.window_frames))
        for name, model, batch, frames in parts:
            before = next(model.parameters()).dtype
            yield self._stunet(name, model.to(self.dtype), batch, frames, clock)
            model.to(before)

    def _stunet(self, name: str, model: STUNet, batch: int, frames: int, clock: timing.Clock) -> Timing:
        draw = Draw(self.device, self.dtype, torch.Generator().manual_seed(0))
        inputs = stunet_inputs(model.unet.config, draw, batch, frames)

        def reference() -> Tensor:
            with dispatch.use_backend("reference"):
                return model(**inputs)

        return self._compare(STUNET, name, lambda: model(**inputs), reference, clock)

    def _fitting_op(self, spec: OpSpec, scenario: Scenario, clock: timing.Clock) -> Timing:
        """The scenarios of a GPU are those of a large one."""
        try:
            return self._op(spec, scenario, clock)
        except torch.OutOfMemoryError as error:
            reason = f"{scenario.name} does not fit into memory: {str(error).partition('. ')[0]}"
            return self._not_run(spec.name, scenario.name, self.backend or dispatch.current_backend(), (reason,))

    def _op(self, spec: OpSpec, scenario: Scenario, clock: timing.Clock) -> Timing:
        public = getattr(ops, spec.name)
        inputs = _selfcheck.example(public, scenario, self.device, self.dtype)
        backend = dispatch.current_backend() if self.backend is None else self.backend
        ran, why_not = self._try(lambda: public(**inputs, backend=backend))
        if why_not:
            return self._not_run(spec.name, scenario.name, ran, why_not)
        ours, reference = (into_held_buffer(public, inputs, name) for name in (backend, "reference"))
        nbytes, flops = spec.bytes(scenario, self.dtype), spec.flops(scenario)
        return self._compare(spec.name, scenario.name, ours, reference, clock, nbytes, flops)

    @torch.no_grad()
    def _compare(
        self,
        name: str,
        scenario: str,
        ours: Side,
        reference: Side,
        clock: timing.Clock,
        nbytes: int = 0,
        flops: int = 0,
    ) -> Timing:
        ran, why_not = self._try(ours)
        if why_not:
            return self._not_run(name, scenario, ran, why_not)
        others = {} if ran == "reference" else {"reference": reference}
        for side in others.values():
            side()
        with self._chosen():
            mine, theirs = timing.interleave(ours, others, clock, self.budget)
        return self._row(name, scenario, ran, mine, theirs.get("reference"), nbytes, flops)

    @torch.no_grad()
    def _try(self, side: Side) -> tuple[str, tuple[str, ...]]:
        """Run it once: the backends that ran, or the one asked for and what is against it."""
        try:
            with self._chosen(), dispatch.record_backends() as used:
                side()
        except dispatch.BackendUnavailable as error:
            return self.backend or dispatch.current_backend(), (str(error),)
        return ", ".join(sorted(used)), ()

    def _chosen(self) -> AbstractContextManager[None]:
        return nullcontext() if self.backend is None else dispatch.use_backend(self.backend)

    def _row(
        self,
        name: str,
        scenario: str,
        ran: str,
        mine: Sequence[float],
        reference: Sequence[float] | None,
        nbytes: int = 0,
        flops: int = 0,
        dtype: torch.dtype | None = None,
    ) -> Timing:
        median = timing.median(mine)
        return Timing(
            *self._key(name, scenario, ran, dtype),
            median_s=median,
            p10_s=timing.quantile(mine, 0.1),
            p90_s=timing.quantile(mine, 0.9),
            reference_s=timing.median(reference) if reference else None,
            times_as_fast=timing.times_as_fast(reference, mine) if reference else None,
            gb_per_s=nbytes / median / 1e9 if nbytes else None,
            gflop_per_s=flops / median / 1e9 if flops else None,
        )

    def _not_run(
        self, name: str, scenario: str, ran: str, why_not: tuple[str, ...], dtype: torch.dtype | None = None
    ) -> Timing:
        return Timing(*self._key(name, scenario, ran, dtype), why_not=why_not)

    def _key(
        self, name: str, scenario: str, ran: str, dtype: torch.dtype | None
    ) -> tuple[str, str, str, str, str, int]:
        shown = str(dtype or self.dtype).removeprefix("torch.")
        return name, scenario, ran, self.device, shown, torch.get_num_threads()


def into_held_buffer(public: Callable[..., Any], inputs: Mapping[str, Any], backend: str) -> Side:
    """A call of an op that writes its (first) result where an earlier call did, or else a plain call.

    What is composed of torch's operators, as the reference is, computes a new result whatever it is told, and copies it
    into `out`: timed with it, it would be charged for a copy that nobody needs.
    """
    with torch.no_grad(), dispatch.record_backends() as used:
        result = public(**inputs, backend=backend)
    if used <= set(dispatch.COMPOSED):
        return lambda: public(**inputs, backend=backend)
    held = result if isinstance(result, Tensor) else result[0]
    return lambda: public(**inputs, backend=backend, out=held)


def stunet_inputs(config: UNetConfig, draw: Draw, batch: int, frames: int) -> dict[str, Any]:
    """Arguments by name of a forward at the size that the model is made for."""
    size = config.sample_size
    inputs = {
        "sample": draw.activation(batch, config.in_channels, frames, size, size),
        "timestep": torch.full((batch,), 100.0, device=draw.device),
        "encoder_hidden_states": draw(batch, TEXT_TOKENS, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(batch, TEXT_TOKENS, dtype=torch.bool, device=draw.device),
    }
    if config.conditioning_channels:
        inputs["image_conditioning"] = draw.activation(batch, config.conditioning_channels, frames, size, size)
    if config.noise_augmentation:
        inputs["augmentation_level"] = torch.zeros(batch, device=draw.device)
    return inputs


def _specs() -> list[OpSpec]:
    """Of the ops that have a module of their own."""
    found = {op: _selfcheck.spec_of(getattr(ops, op)) for op in dispatch.registered_ops()}
    return [spec for op, spec in found.items() if spec.name == op]
