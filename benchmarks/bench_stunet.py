"""One STUNet forward against the same network of eager layers, and with --compile against torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.eager import eager_ops
from benchmarks.harness import Case, Side, each_scenario
from lumiere_fast import dispatch
from lumiere_fast.benchmark import stunet_inputs
from lumiere_fast.models import PRESETS, STUNet, UNet2D, inflate
from lumiere_fast.models.blocks import channels_last_weights
from lumiere_fast.ops._spec import Draw, OpSpec, Scenario


def random_stunet(preset: str, part: str, device: str = "cpu") -> STUNet:
    """A model of the preset with every weight drawn, on the device: as initialised, most of its layers add zero."""
    cascade = PRESETS[preset]
    config, inflation = (
        (cascade.base, cascade.base_inflation) if part == "base" else (cascade.ssr, cascade.ssr_inflation)
    )
    with torch.device(device):
        model = inflate(UNet2D(config), inflation).eval()
    if device == "meta":
        return model
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    return channels_last_weights(model)


@functools.lru_cache(maxsize=1)
def loaded(preset: str, part: str, device: str, dtype: torch.dtype) -> STUNet:
    return random_stunet(preset, part, device).to(dtype)


def make_inputs(
    scenario: Scenario, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Any]:
    cascade = PRESETS[scenario.options["preset"]]
    config = cascade.base if scenario.options["part"] == "base" else cascade.ssr
    draw = Draw(device, dtype, generator)
    return stunet_inputs(config, draw, scenario.sizes["B"], scenario.sizes["T"])


def flops(scenario: Scenario) -> int:
    """Counted by torch over one forward of shapes without values."""
    model = random_stunet(scenario.options["preset"], scenario.options["part"], "meta")
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
def test_stunet(case: Case) -> None:
    options = case.scenario.options
    model = loaded(options["preset"], options["part"], case.device, case.dtype)

    def on(backend: str) -> Tensor:
        with dispatch.use_backend(backend):
            return model(**case.inputs)

    def eager(**inputs: Tensor) -> Tensor:
        with eager_ops():
            return model(**inputs)

    baselines: dict[str, Side] = {"eager layers": partial(eager, **case.inputs)}
    if case.backend != "reference":
        baselines["reference backend"] = partial(on, "reference")
    case.compare(
        baselines,
        ours=partial(on, case.backend),
        rtol=1e-3 if case.dtype == torch.float32 else 0.1,
        compiled=reference_forward(model),
    )


def reference_forward(model: STUNet) -> Callable[..., Tensor]:
    def forward(**inputs: Tensor) -> Tensor:
        with dispatch.use_backend("reference"):
            return model(**inputs)

    return forward
