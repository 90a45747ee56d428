"""Super-resolution of a whole clip, window by window, one sampler step: its time, and on a GPU its peak of memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks import bench_stunet
from benchmarks.bench_stunet import forward_of, loaded
from benchmarks.eager import eager_ops
from benchmarks.harness import Case, Side, each_scenario
from lumiere_fast import dispatch
from lumiere_fast.diffusion import EDMParameterization, EDMSchedule
from lumiere_fast.models import PRESETS, STUNet
from lumiere_fast.ops._spec import Draw, OpSpec, Scenario
from lumiere_fast.pipelines.denoising import Denoiser
from lumiere_fast.pipelines.super_resolution import SuperResolution
from lumiere_fast.pipelines.windows import plan_windows
from lumiere_fast.text import TextEmbedding

TOKENS = 77
STEPS = 1


def factor_of(preset: str) -> int:
    return PRESETS[preset].ssr.sample_size // PRESETS[preset].base.sample_size


def make_inputs(
    scenario: Scenario, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Any]:
    """A small clip in fp32, whatever the network computes in, and a text that no encoder made."""
    preset, sizes = scenario.options["preset"], scenario.sizes
    side, config = sizes["H"] // factor_of(preset), PRESETS[preset].ssr
    states = Draw(device, dtype, generator)(sizes["B"], TOKENS, config.text_embed_dim)
    mask = torch.ones(sizes["B"], TOKENS, dtype=torch.bool, device=device)
    clip = Draw(device, torch.float32, generator)(sizes["B"], sizes["C"], sizes["T"], side, side)
    return {"clip": clip.clamp(-1, 1), "text": TextEmbedding(states, mask)}


def flops(scenario: Scenario) -> int:
    """Of the network alone: one forward for each window."""
    cascade = PRESETS[scenario.options["preset"]]
    windows = plan_windows(scenario.sizes["T"], cascade.window_frames)
    return STEPS * len(windows) * bench_stunet.flops(forward_of(scenario.options["preset"], "ssr", scenario.sizes["B"]))


def clip_of(preset: str, num_frames: int, *, cpu: bool = False) -> Scenario:
    size = PRESETS[preset].ssr.sample_size
    sizes = {"B": 1, "C": 3, "T": num_frames, "H": size, "W": size}
    return Scenario(f"{preset}_{num_frames}_frames", sizes, {"preset": preset}, cpu=cpu)


SPEC = OpSpec(
    name="super_resolution",
    scenarios=(clip_of("demo", 16, cpu=True), clip_of("paper", 80)),
    flops=flops,
    bytes=lambda scenario, dtype: 0,
    make_inputs=make_inputs,
)


def stage(model: STUNet, preset: str) -> SuperResolution:
    denoiser = Denoiser(EDMSchedule(), EDMParameterization())
    return SuperResolution(model, denoiser, PRESETS[preset].window_frames, factor_of(preset))


@each_scenario(SPEC)
def test_super_resolution(case: Case) -> None:
    """Against eager layers, but at the paper's size: bench_stunet compares a window of it, a whole clip takes long."""
    preset = case.scenario.options["preset"]
    enlarge = stage(loaded(preset, "ssr", case.device, case.dtype), preset)

    def ours() -> Tensor:
        # where the clip is: a host takes seconds to draw the noise of the larger ones
        generator = torch.Generator(case.device).manual_seed(0)
        with dispatch.use_backend(case.backend):
            return enlarge(**case.inputs, num_inference_steps=STEPS, generator=generator).clip

    def eager() -> Tensor:
        with eager_ops():
            return ours()

    baselines: dict[str, Side] = {} if preset == "paper" else {"eager layers": eager}
    case.compare(baselines, ours=ours, rtol=1e-2)
