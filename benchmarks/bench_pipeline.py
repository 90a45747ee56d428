"""From a sentence to a clip: the whole pipeline at few steps, against the same pipeline of eager layers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_stunet import random_stunet
from benchmarks.eager import eager_ops
from benchmarks.harness import Case, each_scenario
from lumiere_fast import LumierePipeline, dispatch
from lumiere_fast.diffusion import EDMSchedule
from lumiere_fast.models import PRESETS
from lumiere_fast.ops._spec import OpSpec, Scenario
from lumiere_fast.pipelines.text_to_video import PipelineConfig


@functools.lru_cache(maxsize=1)
def random_pipeline(preset: str, device: str) -> LumierePipeline:
    cascade = PRESETS[preset]
    config = PipelineConfig(
        base_schedule=EDMSchedule(),
        ssr_schedule=EDMSchedule(),
        num_frames=cascade.num_frames,
        fps=cascade.fps,
        window_frames=cascade.window_frames,
    )
    return LumierePipeline(random_stunet(preset, "base"), random_stunet(preset, "ssr"), config).to(device)


def make_inputs(
    scenario: Scenario, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Any]:
    return {
        "prompt": ["a red ball moving left on a black background"] * scenario.sizes["B"],
        "num_inference_steps": scenario.options["steps"],
        "ssr_num_inference_steps": 1,
    }


SPEC = OpSpec(
    name="pipeline",
    scenarios=(Scenario("demo_2_and_1_steps", {"B": 1}, {"preset": "demo", "steps": 2}, cpu=True),),
    flops=lambda scenario: 0,
    bytes=lambda scenario, dtype: 0,
    make_inputs=make_inputs,
)


@each_scenario(SPEC)
def test_pipeline(case: Case) -> None:
    pipeline = random_pipeline(case.scenario.options["preset"], case.device)

    def ours() -> Tensor:
        with dispatch.use_backend(case.backend):
            return pipeline(**case.inputs, generator=torch.Generator().manual_seed(0)).frames

    def eager() -> Tensor:
        with eager_ops():
            return pipeline(**case.inputs, generator=torch.Generator().manual_seed(0)).frames

    case.compare({"eager layers": eager}, ours=ours, rtol=1e-2)
