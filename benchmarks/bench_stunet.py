"""One STUNet forward against the same network of eager layers, and with --compile against torch.compile."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.eager import eager_ops
from benchmarks.harness import Case, Side, each_scenario
from lumiere_fast import dispatch
from lumiere_fast.models import PRESETS, STUNet, UNet2D, inflate
from lumiere_fast.models.blocks import channels_last_weights
from lumiere_fast.ops._spec import Draw, OpSpec, Scenario

TEXT_TOKENS = 16


def random_stunet(preset: str, part: str) -> STUNet:
    """A model of the preset with every weight drawn: as initialised, most of its layers add zero."""
    cascade = PRESETS[preset]
    config, inflation = (
        (cascade.base, cascade.base_inflation) if part == "base" else (cascade.ssr, cascade.ssr_inflation)
    )
    model = inflate(UNet2D(config), inflation).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.device.type != "meta":
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    return channels_last_weights(model)


@functools.lru_cache(maxsize=1)
def loaded(preset: str, part: str, device: str, dtype: torch.dtype) -> STUNet:
    return random_stunet(preset, part).to(device, dtype)


def make_inputs(
    scenario: Scenario, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Any]:
    cascade = PRESETS[scenario.options["preset"]]
    config = cascade.base if scenario.options["part"] == "base" else cascade.ssr
    draw, B = Draw(device, dtype, generator), scenario.sizes["B"]
    inputs = {
        "sample": draw.activation(*scenario.shape("BCTHW")),
        "timestep": torch.full((B,), 100.0, device=device),
        "encoder_hidden_states": draw(B, TEXT_TOKENS, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(B, TEXT_TOKENS, dtype=torch.bool, device=device),
    }
    if config.conditioning_channels:
        inputs["image_conditioning"] = draw.activation(*scenario.shape("BCTHW"))
        inputs["augmentation_level"] = torch.zeros(B, device=device)
    return inputs


def flops(scenario: Scenario) -> int:
    """Counted by torch over one forward of shapes without values."""
    with torch.device("meta"):
        model = random_stunet(scenario.options["preset"], scenario.options["part"])
    inputs = make_inputs(scenario, "cpu", torch.float32, torch.Generator())
    inputs = {name: value.to("meta") for name, value in inputs.items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


def forward_of(preset: str, part: str, batch: int) -> Scenario:
    cascade = PRESETS[preset]
    config = cascade.base if part == "base" else cascade.ssr
    frames = cascade.num_frames if part == "base" else cascade.window_frames
    sizes = {"B": batch, "C": 3, "T": frames, "H": config.sample_size, "W": config.sample_size}
    return Scenario(f"{preset}_{part}", sizes, {"preset": preset, "part": part}, cpu=preset == "demo")


# The base model on a whole clip (at demo scale with both halves of guidance), the super-resolution model on a window.
SPEC = OpSpec(
    name="stunet",
    scenarios=(
        forward_of("demo", "base", 2),
        forward_of("demo", "ssr", 1),
        forward_of("paper", "base", 1),
        forward_of("paper", "ssr", 1),
    ),
    flops=flops,
    bytes=lambda scenario, dtype: 0,
    make_inputs=make_inputs,
)


@each_scenario(SPEC)
def test_stunet(case: Case, request: pytest.FixtureRequest) -> None:
    options = case.scenario.options
    model = loaded(options["preset"], options["part"], case.device, case.dtype)

    def ours() -> Tensor:
        with dispatch.use_backend(case.backend):
            return model(**case.inputs)

    def eager() -> Tensor:
        with eager_ops():
            return model(**case.inputs)

    baselines: dict[str, Side] = {"eager layers": eager}
    if request.config.getoption("--compile"):
        compiled = torch.compile(model, dynamic=False)
        baselines["torch.compile"] = lambda: compiled(**case.inputs)
    case.compare(baselines, ours=ours, rtol=1e-3 if case.dtype == torch.float32 else 0.1)
