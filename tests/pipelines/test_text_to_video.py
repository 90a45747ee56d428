from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from lumiere_fast import BackendUnavailable, LumiereOutput, LumierePipeline, STUNet, use_backend
from lumiere_fast.diffusion import (
    PREDICTION_TYPES,
    SAMPLERS,
    CosineSchedule,
    EDMParameterization,
    EDMSchedule,
    Parameterization,
    SampleParameterization,
    Schedule,
    VParameterization,
    clip_generators,
    draw_noise,
)
from lumiere_fast.dispatch import BACKENDS
from lumiere_fast.ops import Threshold
from lumiere_fast.pipelines import budget
from lumiere_fast.pipelines.checkpoint import Checkpoint, fingerprint
from lumiere_fast.pipelines.denoising import Denoiser
from lumiere_fast.pipelines.progress import _Bar
from lumiere_fast.pipelines.state import DenoisingState, save_state
from lumiere_fast.pipelines.super_resolution import SuperResolution
from lumiere_fast.pipelines.text_to_video import denoise_from_text
from lumiere_fast.pipelines.windows import plan_windows
from lumiere_fast.text import WordVectorEncoder
from lumiere_fast.video import to_uint8
from tests.models.test_prepared_text import runs_of_text_layers
from tests.models.tiny import tiny_unet
from tests.pipelines.tiny import SCHEDULE, make_pipeline

BALL, STAR = "a red ball moving left", "a blue star rising"


@pytest.fixture(scope="module")
def pipe() -> LumierePipeline:
    return make_pipeline()


def generate(pipe: LumierePipeline, prompt: Any = BALL, seed: int = 0, **settings: Any) -> LumiereOutput:
    defaults = {"num_inference_steps": 2, "ssr_num_inference_steps": 2}
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **defaults | settings)


# What comes out ------------------------------------------------------------------------------------------------------


def test_a_prompt_gives_a_clip(pipe: LumierePipeline) -> None:
    pytest.importorskip("tokenizers")
    output = generate(pipe)
    assert (output.frames.shape, output.base_frames.shape) == ((1, 3, 4, 16, 16), (1, 3, 4, 8, 8))
    for frames in (output.frames, output.base_frames):
        assert frames.dtype == torch.float32
        assert frames.abs().max() <= 1
        assert frames.std() > 0.05
    assert list(output.seconds) == ["base", "ssr"]
    assert all(seconds > 0 for seconds in output.seconds.values())
    assert set(output.backend.split(", ")) <= set(BACKENDS)


def test_more_frames_than_a_window(pipe: LumierePipeline) -> None:
    pytest.importorskip("tokenizers")
    assert generate(pipe, num_frames=10).frames.shape == (1, 3, 10, 16, 16)
    assert generate(pipe, num_frames=2).frames.shape == (1, 3, 2, 16, 16)


def test_a_seed_decides_everything(pipe: LumierePipeline) -> None:
    pytest.importorskip("tokenizers")
    state = torch.get_rng_state()
    one, two, other = generate(pipe, seed=1), generate(pipe, seed=1), generate(pipe, seed=2)
    assert torch.equal(one.frames, two.frames)
    assert torch.equal(one.base_frames, two.base_frames)
    assert (one.base_frames - other.base_frames).abs().mean() > 0.05
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator was drawn from"


def test_without_a_generator_torchs_own_decides(pipe: LumierePipeline) -> None:
    pytest.importorskip("tokenizers")
    clips = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        clips.append(pipe(BALL, num_inference_steps=1, ssr_num_inference_steps=1).frames)
    assert torch.equal(clips[0], clips[1])
    assert not torch.equal(clips[0], clips[2])


def test_each_prompt_of_a_batch_has_its_own_clip(pipe: LumierePipeline) -> None:
    """Of the same length in tokens or not: padding does not leak."""
    pytest.importorskip("tokenizers")
    first = generate(pipe, [BALL, STAR])
    second = generate(pipe, (BALL, "a green ring on a white background, going around in a circle"))
    assert first.frames.shape == (2, 3, 4, 16, 16)
    torch.testing.assert_close(first.frames[0], second.frames[0], rtol=0, atol=1e-3)
    assert (first.base_frames[1] - second.base_frames[1]).abs().mean() > 0.01


PROMPTS = [BALL, STAR, "a green ring on a white background, going around in a circle"]
EVERY_SAMPLER = [{"sampler": name} for name in SAMPLERS] + [{"sampler": "ddim", "eta": 0.5}]


def with_schedules(pipe: LumierePipeline, base: Schedule, ssr: Schedule, **kinds: Parameterization) -> LumierePipeline:
    """The same networks, taken for others' training."""
    return LumierePipeline(pipe.base, pipe.ssr, replace(pipe.config, base_schedule=base, ssr_schedule=ssr, **kinds))


@pytest.mark.parametrize("settings", EVERY_SAMPLER, ids=lambda settings: "-".join(map(str, settings.values())))
@pytest.mark.parametrize("preserving", [False, True])
def test_a_batch_may_be_cut_anywhere(pipe: LumierePipeline, settings: dict[str, Any], preserving: bool) -> None:
    """One generator over two calls makes the clips of one call; so does each clip's own generator, if it is seeded as
    the one would seed it. To the rounding of matrix products of other sizes."""
    pytest.importorskip("tokenizers")
    if preserving:
        kinds = {"base_parameterization": VParameterization(), "ssr_parameterization": VParameterization()}
        pipe = with_schedules(pipe, CosineSchedule(), CosineSchedule(), **kinds)
    settings = {"num_inference_steps": 3, "ssr_num_inference_steps": 2, "num_frames": 6, **settings}
    generator = torch.Generator().manual_seed(4)
    parts = [pipe(cut, generator=generator, **settings) for cut in (PROMPTS[:2], PROMPTS[2:])]
    whole = pipe(PROMPTS, generator=torch.Generator().manual_seed(4), **settings)
    for name in ("base_frames", "frames"):
        joined = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(joined, getattr(whole, name), rtol=0, atol=1e-3)
    assert (whole.frames[0] - whole.frames[1]).abs().mean() > 0.05


def test_each_prompt_may_have_its_generator(pipe: LumierePipeline) -> None:
    pytest.importorskip("tokenizers")

    def make(prompts: list[str], seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(
            prompts, generator=generators, num_inference_steps=2, ssr_num_inference_steps=2, sampler="ddpm"
        ).frames

    both = make([BALL, STAR], [7, 8])
    torch.testing.assert_close(both[:1], make([BALL], [7]), rtol=0, atol=1e-3)
    torch.testing.assert_close(both[1:], make([STAR], [8]), rtol=0, atol=1e-3)
    torch.testing.assert_close(both[:1], generate(pipe, seed=7, sampler="ddpm").frames, rtol=0, atol=1e-3)
    assert (make([BALL, BALL], [7, 8])[1] - both[0]).abs().mean() > 0.05
    with pytest.raises(ValueError, match="one for each of the 2 clips, got 3"):
        make([BALL, STAR], [1, 2, 3])


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_super_resolution_starts_alike_whatever_the_base_drew(pipe: LumierePipeline, sampler: str) -> None:
    pytest.importorskip("tokenizers")
    seen: list[Tensor] = []
    handle = pipe.ssr.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        for steps in (1, 4):
            generate(pipe, num_inference_steps=steps, ssr_num_inference_steps=1, sampler=sampler)
    finally:
        handle.remove()
    assert torch.equal(*seen)


def test_each_stage_has_its_schedule_and_its_parameterization(pipe: LumierePipeline) -> None:
    """A pipeline of components that differ is its two stages, each run with its own."""
    pytest.importorskip("tokenizers")
    schedules = CosineSchedule(), EDMSchedule(sigma_max=30.0)
    mixed = with_schedules(
        pipe,
        *schedules,
        base_parameterization=VParameterization(),
        ssr_parameterization=SampleParameterization(),
    )
    clips = clip_generators(torch.Generator().manual_seed(0), 1)
    base = Denoiser(schedules[0], VParameterization(), "ddpm")
    generators = clip_generators(clips, 1)
    noise = draw_noise((1, 3, 4, 8, 8), "cpu", generators)
    enlarge = SuperResolution(pipe.ssr, Denoiser(schedules[1], SampleParameterization(), "ddpm"), 4, factor=2)
    with torch.no_grad():
        clip = denoise_from_text(pipe.base, pipe.text_encoder, base, [BALL], noise, 3, 2.0, generators=generators)
        frames = enlarge(clip, pipe.text_encoder.encode([BALL]), 2, clips).clip
    output = generate(mixed, num_inference_steps=3, guidance_scale=2.0, sampler="ddpm")
    torch.testing.assert_close(output.base_frames, clip.clamp(-1, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(output.frames, frames.clamp(-1, 1), rtol=0, atol=1e-5)
    assert (output.frames - generate(pipe, num_inference_steps=3, sampler="ddpm").frames).abs().mean() > 0.05


@pytest.mark.parametrize("kind", PREDICTION_TYPES.values(), ids=list(PREDICTION_TYPES))
@pytest.mark.parametrize("schedule", [SCHEDULE, CosineSchedule(shift=-0.5)], ids=["exploding", "preserving"])
@pytest.mark.parametrize("settings", EVERY_SAMPLER, ids=lambda settings: "-".join(map(str, settings.values())))
def test_any_training_is_sampled_by_any_sampler(
    pipe: LumierePipeline, kind: type[Parameterization], schedule: Schedule, settings: dict[str, Any]
) -> None:
    pytest.importorskip("tokenizers")
    kinds = {"base_parameterization": kind(), "ssr_parameterization": kind()}
    frames = generate(with_schedules(pipe, schedule, schedule, **kinds), **settings).frames
    assert frames.abs().max() <= 1
    assert frames.std() > 0.05


def test_the_clip_is_bounded_as_asked(pipe: LumierePipeline) -> None:
    """High guidance overshoots: static clips what dynamic scales."""
    pytest.importorskip("tokenizers")

    def base(threshold: Any) -> Tensor:
        return generate(pipe, guidance_scale=40.0, threshold=threshold, ssr_num_inference_steps=1).base_frames

    frames = {name: base(name) for name in ("static", "dynamic", None)}
    assert torch.equal(frames["static"], generate(pipe, guidance_scale=40.0).base_frames)
    assert torch.equal(frames["dynamic"], base(Threshold("dynamic", 0.995, "clip")))
    saturated = {name: (clip.abs() == 1).float().mean().item() for name, clip in frames.items()}
    assert saturated["dynamic"] < 0.02 < saturated["static"]
    assert (frames[None] - frames["static"]).abs().mean() > 0.01
    assert not torch.equal(base(Threshold("dynamic", 0.9, "frame")), frames["dynamic"])


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++"])
def test_guidance_of_one_is_the_conditional_model_and_zero_ignores_the_prompt(
    pipe: LumierePipeline, sampler: str
) -> None:
    pytest.importorskip("tokenizers")

    def base(scale: float, prompt: str = BALL) -> Tensor:
        return generate(pipe, prompt, guidance_scale=scale, sampler=sampler, ssr_num_inference_steps=1).base_frames

    torch.testing.assert_close(base(1.0), base(1.0 + 1e-6), rtol=0, atol=1e-3)
    torch.testing.assert_close(base(0.0), base(0.0, STAR), rtol=0, atol=1e-3)
    assert (base(1.0) - base(1.0, STAR)).abs().mean() > 0.01
    assert (base(1.0) - base(4.0)).abs().mean() > 0.01


def test_guidance_extrapolates_from_the_empty_prompt(pipe: LumierePipeline) -> None:
    """One step by hand: the network with the prompt, without it, and the line through both."""
    pytest.importorskip("tokenizers")
    edm, scale = EDMParameterization(), 3.5
    noise = torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((1,), SCHEDULE.sigma_max)
    seen = noise * SCHEDULE.sigma_max / (SCHEDULE.sigma_max**2 + 0.25) ** 0.5
    encode = WordVectorEncoder().encode
    with torch.no_grad():
        conditional, unconditional = (pipe.base(seen, 250 * sigma.log(), *encode(p)) for p in (BALL, ""))
        prediction = scale * conditional + (1 - scale) * unconditional
        total = SCHEDULE.sigma_max**2 + 0.25
        x0 = 0.25 / total * SCHEDULE.sigma_max * noise + SCHEDULE.sigma_max * 0.5 / total**0.5 * prediction
        denoiser = Denoiser(SCHEDULE, edm, threshold=None)
        got = denoise_from_text(pipe.base, pipe.text_encoder, denoiser, [BALL], noise, 1, scale)
    torch.testing.assert_close(got, x0, rtol=0, atol=1e-4)


def test_guidance_costs_a_doubled_batch_and_one_is_free(pipe: LumierePipeline) -> None:
    pytest.importorskip("tokenizers")
    batches: list[int] = []
    handle = pipe.base.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    try:
        generate(pipe, [BALL, STAR], guidance_scale=1.0)
        generate(pipe, [BALL, STAR], guidance_scale=2.0)
    finally:
        handle.remove()
    assert batches == [2, 2, 4, 4]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_text_is_read_once_a_stage(pipe: LumierePipeline, guidance_scale: float) -> None:
    """Over several steps and windows, with guidance too; as texts read anew at each are."""
    pytest.importorskip("tokenizers")
    settings: dict[str, Any] = {"num_frames": 10, "num_inference_steps": 3, "guidance_scale": guidance_scale}
    with runs_of_text_layers(pipe.base) as base, runs_of_text_layers(pipe.ssr) as ssr:
        made = generate(pipe, [BALL, STAR], **settings).frames
    for runs in (base, ssr):
        assert len(runs) == len(set(runs)) > 3

    def unprepared(model: STUNet) -> Any:
        """`prepare_text` that leaves the text as it is, and `forward` that prepares it at each call."""
        forward = model.forward
        return mock.patch.multiple(
            model,
            prepare_text=lambda *text: text,
            forward=lambda x, t, text, **more: forward(x, t, STUNet.prepare_text(model, *text), **more),
        )

    with unprepared(pipe.base), unprepared(pipe.ssr), runs_of_text_layers(pipe.base) as base:
        assert torch.equal(generate(pipe, [BALL, STAR], **settings).frames, made)
    assert len(base) == 3 * 4 * len(set(base))  # three steps of four windows


def test_images_come_from_the_image_model() -> None:
    pytest.importorskip("tokenizers")
    unet = tiny_unet(dtype=torch.float32, text_embed_dim=64)
    noise = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    denoiser = Denoiser(SCHEDULE, EDMParameterization())
    with torch.no_grad():
        images = denoise_from_text(unet, WordVectorEncoder(), denoiser, [BALL, STAR], noise, 2, 3.0)
    assert images.shape == (2, 3, 1, 8, 8)


# Half precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preserving", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_networks_in_half_precision_make_the_same_clip(preserving: bool, dtype: torch.dtype, tolerance: float) -> None:
    """The networks alone: they predict in their dtype, and what goes in is still in float32."""
    pytest.importorskip("tokenizers")
    pipe, full = make_pipeline(), make_pipeline()
    if preserving:
        kinds = {"base_parameterization": VParameterization(), "ssr_parameterization": VParameterization()}
        pipe, full = (with_schedules(each, CosineSchedule(), CosineSchedule(), **kinds) for each in (pipe, full))
    assert pipe.to(dtype=dtype) is pipe
    assert pipe.dtype == dtype
    seen: list[torch.dtype] = []
    for model in (pipe.base, pipe.ssr):
        model.register_forward_hook(lambda module, args, output: seen.extend([args[0].dtype, output.dtype]))
    output, wanted = generate(pipe, num_frames=6, sampler="ddpm"), generate(full, num_frames=6, sampler="ddpm")
    assert set(seen[::2]) == {torch.float32}
    assert set(seen[1::2]) == {dtype}
    assert output.frames.dtype == output.base_frames.dtype == torch.float32
    for frames, exact in ((output.base_frames, wanted.base_frames), (output.frames, wanted.frames)):
        assert 0 < (frames - exact).abs().mean() < tolerance


def test_noise_levels_are_told_in_full_precision() -> None:
    """Around 250 ln 16 = 693 bfloat16 steps by 4: a level rounded before its embedding would be its neighbour's."""
    pytest.importorskip("tokenizers")
    model = make_pipeline().to(torch.bfloat16).base
    text = WordVectorEncoder().encode(BALL)
    clip = torch.zeros(1, 3, 4, 8, 8)
    one, two = (model(clip, torch.tensor([level]), *text) for level in (691.0, 693.0))
    assert torch.tensor(691.0).bfloat16() == torch.tensor(693.0).bfloat16()
    assert (one - two).abs().max() > 0.01


def test_the_dtype_may_be_said_as_diffusers_does() -> None:
    pipe = make_pipeline()
    assert pipe.to(torch.float16).dtype == torch.float16
    assert pipe.to("cpu", torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match=r"dtype must be a floating one, such as torch.bfloat16, got torch.int8"):
        pipe.to(torch.int8)


# Progress ------------------------------------------------------------------------------------------------------------


def test_progress_counts_every_pass(pipe: LumierePipeline) -> None:
    pytest.importorskip("tokenizers")
    calls: list[tuple[str, int, int]] = []
    generate(pipe, num_frames=6, num_inference_steps=3, progress=lambda *call: calls.append(call))
    base = [("base", done, 6) for done in range(1, 7)]  # two windows a step
    ssr = [("ssr", done, 4) for done in range(1, 5)]  # likewise
    assert calls == base + ssr


def test_progress_bars_go_to_stderr(pipe: LumierePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    generate(pipe)
    assert capsys.readouterr() == ("", "")
    generate(pipe, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "base: 100%" in err
    assert "ssr: 100%" in err
    assert "2/2" in err


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "prompt must be a sentence.* got an empty one"),
        ({"prompt": "  \n"}, "prompt must be a sentence"),
        ({"prompt": []}, "prompt must be a sentence"),
        ({"prompt": [BALL, ""]}, "prompt must be a sentence"),
        ({"prompt": None}, "prompt must be a sentence, or several; got None"),
        ({"prompt": [BALL, 3]}, "prompt must be a sentence, or several; got .*3"),
        ({"prompt": [BALL, "a \udcff ball"]}, r"prompts\[1\]: 'a \\udcff ball' is not valid Unicode: character 2"),
        ({"num_frames": 4.0}, "num_frames must be >= 1, an integer, got 4.0"),
        ({"num_frames": "4"}, "num_frames must be >= 1, an integer, got '4'"),
        ({"num_frames": True}, "num_frames must be >= 1, an integer, got True"),
        ({"num_inference_steps": np.float32(2)}, "num_inference_steps must be >= 1, an integer, got"),
        ({"ssr_num_inference_steps": True}, "ssr_num_inference_steps must be >= 1, an integer, got True"),
        ({"num_frames": 5}, "temporal factor 2, got 5; the nearest accepted are 4 and 6"),
        ({"num_frames": 0}, "got 0"),
        ({"num_frames": -4}, "got -4"),
        ({"num_inference_steps": 0}, "num_inference_steps must be >= 1, an integer, got 0"),
        ({"num_inference_steps": -1}, "num_inference_steps must be >= 1, an integer, got -1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be >= 1, an integer, got 2.5"),
        ({"ssr_num_inference_steps": 0}, "ssr_num_inference_steps must be >= 1, an integer, got 0"),
        ({"guidance_scale": -0.5}, "guidance_scale must be a finite number >= 0, got -0.5"),
        ({"guidance_scale": math.nan}, "guidance_scale must be a finite number >= 0, got nan"),
        ({"guidance_scale": math.inf}, "guidance_scale must be a finite number >= 0, got inf"),
        ({"guidance_scale": 10**400}, "guidance_scale must be a finite number >= 0, got 1000"),
        ({"guidance_scale": "3"}, "guidance_scale must be a finite number >= 0, got '3'"),
        ({"guidance_scale": torch.tensor(3.0)}, r"guidance_scale must be a finite number >= 0, got tensor\(3"),
        ({"sampler": "euler"}, r"sampler must be one of ddim, dpm-solver\+\+, ddpm, got 'euler'"),
        ({"sampler": ["ddim"]}, r"sampler must be one of ddim, dpm-solver\+\+, ddpm, got \['ddim'\]"),
        ({"sampler": "ddim", "eta": "0"}, "eta must be from 0 .* got '0'"),
        ({"sampler": "ddpm", "eta": 0.5}, "eta is a setting of sampler 'ddim'; leave it 0 for 'ddpm', got 0.5"),
        ({"sampler": "ddim", "eta": 2}, r"eta must be from 0 \(deterministic\) to 1 \(ancestral\), got 2"),
        ({"threshold": "clip"}, "threshold must be 'static', 'dynamic', None or a Threshold, got 'clip'"),
        (
            {"window_frames": 3},
            "window_frames must be a positive multiple .* 2, got 3; the nearest accepted are 2 and 4",
        ),
        ({"window_frames": 4.0}, "window_frames must be >= 1, an integer, got 4.0"),
        ({"overlap": 4}, "overlap must be from 0 to window_frames - 1 = 3, got 4"),
        ({"overlap": -1}, "overlap must be >= 0, an integer, got -1"),
        ({"overlap": True}, "overlap must be >= 0, an integer, got True"),
        ({"base_overlap": 4}, "base_overlap must be below the base model's window, 4 frames, got 4"),
        ({"base_overlap": -1}, "base_overlap must be >= 0, an integer, got -1"),
        ({"max_memory": "12 potatoes"}, "max_memory: .* '12GiB' or '500MB', got '12 potatoes'"),
        ({"max_memory": 0}, "max_memory: memory must be above zero, got 0"),
        ({"max_memory": 1000}, "max_memory is 0.00 MiB, and super-resolution takes about"),
        ({"window_weights": "round"}, "window_weights: .*'flat' or 'trapezoid' or 'pyramid', got 'round'"),
        ({"checkpoint": 5}, "a str or a Path, got 5"),
        ({"checkpoint": "."}, "checkpoint '.': the name of a file that ends in .safetensors is needed"),
        ({"checkpoint": "nowhere/a.safetensors"}, "checkpoint .*: the folder 'nowhere' does not exist"),
        ({"threshold": Threshold("dynamic", 99.5)}, r"threshold.percentile must be in \(0, 1\], got 99.5"),
    ],
)
def test_bad_arguments_are_named_before_any_work(
    pipe: LumierePipeline, arguments: dict[str, Any], message: str
) -> None:
    calls: list[object] = []
    with pytest.raises(ValueError, match=message):
        generate(pipe, **{"prompt": BALL} | arguments, progress=lambda *call: calls.append(call))
    assert calls == []


def test_numbers_may_be_numpys(pipe: LumierePipeline) -> None:
    pytest.importorskip("tokenizers")
    plain = generate(pipe, num_frames=4, guidance_scale=2.0, sampler="ddim", eta=float(np.float32(0.7)))
    one = generate(
        pipe,
        num_frames=np.int64(4),
        num_inference_steps=np.int64(2),
        ssr_num_inference_steps=np.int32(2),
        guidance_scale=np.float32(2.0),
        sampler="ddim",
        eta=np.float32(0.7),
    )
    assert torch.equal(one.frames, plain.frames)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("bogus", "device 'bogus' cannot be used on this machine: Expected one of cpu"),
        ("cuda:99", "device 'cuda:99' cannot be used on this machine: "),
        (2.5, "device '2.5' cannot be used on this machine: "),
    ],
)
def test_a_device_that_is_not_here_is_refused_before_anything_moves(where: Any, message: str) -> None:
    pipe = make_pipeline()
    with pytest.raises(ValueError, match=message):
        pipe.to(where)
    assert pipe.device == torch.device("cpu")
    with pytest.raises(ValueError, match=r"dtype must be a floating one.* got float16"):
        pipe.to("cpu", "float16")  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="device 'cuda' cannot be used on this machine: "):
        make_pipeline().to("cuda")


def test_frames_must_suit_both_models() -> None:
    pipe = make_pipeline(base_factor=2, ssr_factor=3, window_frames=6)
    assert pipe.temporal_factor == 6
    with pytest.raises(ValueError, match="temporal factor 6, got 4; the nearest accepted are 6 and 12"):
        generate(pipe, num_frames=4)


def test_models_must_fit_together() -> None:
    with pytest.raises(ValueError, match="makes 20 pixels, a multiple of the base model's 8 is needed"):
        make_pipeline(sample_size=20)


def test_the_models_must_read_the_text_encoder(pipe: LumierePipeline) -> None:
    class Wide(WordVectorEncoder):
        embed_dim = 48

    with pytest.raises(ValueError, match=r"base reads text of width 64, the text encoder 'word-vectors-v1' gives 48"):
        LumierePipeline(pipe.base, pipe.ssr, pipe.config, Wide())
    narrow = make_pipeline(text_encoder=Wide())
    with pytest.raises(ValueError, match="ssr reads text of width 48"):
        LumierePipeline(pipe.base, narrow.ssr, pipe.config)


# Backends ------------------------------------------------------------------------------------------------------------


def test_forced_is_forced(pipe: LumierePipeline) -> None:
    """On the CPU not all of it can be Triton's: the call says why, and does not run another backend."""
    pytest.importorskip("tokenizers")
    with (
        use_backend("triton"),
        pytest.raises(BackendUnavailable, match=r"cannot run on the backend 'triton': \S+"),
    ):
        generate(pipe)


def test_the_reference_can_be_asked_for(pipe: LumierePipeline) -> None:
    pytest.importorskip("tokenizers")
    with use_backend("reference"):
        output = generate(pipe)
    assert output.backend == "reference"
    torch.testing.assert_close(output.frames, generate(pipe).frames, rtol=0, atol=1e-4)


# Other forms of the result -------------------------------------------------------------------------------------------


def test_arrays_and_images_are_the_tensor(pipe: LumierePipeline) -> None:
    pytest.importorskip("tokenizers")
    pytest.importorskip("PIL")
    settings: dict[str, Any] = {"prompt": [BALL, STAR], "num_frames": 2}
    tensor, array, images = (generate(pipe, **settings, output_type=kind) for kind in ("pt", "np", "pil"))
    assert torch.equal(tensor.frames, generate(pipe, **settings).frames)
    for name, size in (("frames", 16), ("base_frames", 8)):
        clips, found = getattr(tensor, name), getattr(array, name)
        assert (found.shape, found.dtype) == ((2, 2, size, size, 3), np.float32)
        np.testing.assert_allclose(found, (clips.permute(0, 2, 3, 4, 1).numpy() + 1) / 2, atol=1e-6)
        pictures = getattr(images, name)
        assert [len(clip) for clip in pictures] == [2, 2]
        for clip, shown in zip(clips, pictures, strict=True):
            np.testing.assert_array_equal(np.stack([np.asarray(picture) for picture in shown]), to_uint8(clip))
            assert {(picture.mode, picture.size) for picture in shown} == {("RGB", (size, size))}


def test_an_unknown_form_is_refused_before_any_work(pipe: LumierePipeline) -> None:
    calls: list[object] = []
    with pytest.raises(ValueError, match="output_type must be one of pt, np, pil, got 'latent'"):
        generate(pipe, output_type="latent", progress=lambda *call: calls.append(call))
    assert calls == []


def test_the_pipeline_moves_as_one(pipe: LumierePipeline) -> None:
    assert pipe.to("cpu") is pipe
    assert pipe.device == torch.device("cpu")
    assert pipe.default_fps == 8


# Windows of the base model -------------------------------------------------------------------------------------------


def test_more_frames_than_it_was_trained_on_go_through_the_base_model_in_windows(
    pipe: LumierePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of `config.num_frames` that share half of them, of one latent and one text."""
    pytest.importorskip("tokenizers")
    seen: list[tuple[int, ...]] = []
    handle = pipe.base.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    try:
        output = generate(pipe, num_frames=10)
        shared = generate(pipe, num_frames=10, base_overlap=1, overlap=0, window_weights="trapezoid")
    finally:
        handle.remove()
    assert seen == [(2, 3, 4, 8, 8)] * 2 * (4 + 3)
    assert output.windows["base"].starts == [0, 2, 4, 6]
    assert output.windows["ssr"].starts == [0, 2, 4, 6]
    assert shared.windows["base"].starts == [0, 3, 6]
    assert shared.windows["ssr"].starts == [0, 4, 6]
    assert {plan.weights for plan in shared.windows.values()} == {"trapezoid"}
    assert generate(pipe).windows["base"].starts == [0]
    monkeypatch.setattr(pipe, "config", replace(pipe.config, num_frames=8))
    assert pipe._base_windows(16, None, "flat").starts == [0, 4, 8]


def test_frames_of_neighbouring_windows_are_one_clip(pipe: LumierePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a base model that looks at pixels alone, a long clip is what it would be in one window."""
    pytest.importorskip("tokenizers")

    def of_each_pixel(sample: Tensor, *_: Any) -> Tensor:
        return torch.sin(3 * sample)

    monkeypatch.setattr(pipe.base, "forward", of_each_pixel)
    windowed = generate(pipe, num_frames=10, ssr_num_inference_steps=1)
    monkeypatch.setattr(pipe, "config", replace(pipe.config, num_frames=10))
    whole = generate(pipe, num_frames=10, ssr_num_inference_steps=1)
    assert len(whole.windows["base"]) == 1
    torch.testing.assert_close(windowed.base_frames, whole.base_frames, rtol=0, atol=1e-5)


def test_bars_say_step_and_window_and_the_plan(pipe: LumierePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    output = generate(pipe, num_frames=10, progress=True)
    err = capsys.readouterr().err
    for stage, plan in output.windows.items():
        assert f"{stage}: {plan}" in err
    assert "step 2/2, window 4/4" in err


def test_a_bar_follows_windows_that_become_smaller() -> None:
    said: list[str] = []
    bar = mock.Mock(n=0, set_postfix_str=lambda text, refresh: said.append(text))
    report = _Bar(bar, steps=3, steps_left=2, windows=2)
    for done, total in (
        (3, 6),
        (4, 6),
        (5, 6),
        *((done, 10) for done in range(6, 11)),
    ):  # the third step is made again in 5
        report(done, total)
    assert said[:4] == ["step 2/3, window 1/2", "step 2/3, window 2/2", "step 3/3, window 1/2", "step 3/3, window 1/5"]
    assert said[-1] == "step 3/3, window 5/5"


# Offloading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Each component's name and where it goes, of all pipelines."""
    made: list[tuple[str, str]] = []
    networks, words = torch.nn.Module.to, WordVectorEncoder.to

    def move(self: Any, device: Any = None, *args: Any, **kwargs: Any) -> Any:
        target = kwargs.get("device", device)
        if isinstance(self, STUNet):
            made.append(("ssr" if self.unet.config.conditioning_channels else "base", str(target)))
        return networks(self, device, *args, **kwargs) if device is not None else networks(self, **kwargs)

    def move_words(self: Any, device: Any) -> Any:
        made.append(("text", str(device)))
        return words(self, device)

    monkeypatch.setattr(torch.nn.Module, "to", move)
    monkeypatch.setattr(WordVectorEncoder, "to", move_words)
    return made


def test_each_model_is_on_the_device_only_while_it_runs(moves: list[tuple[str, str]]) -> None:
    pytest.importorskip("tokenizers")
    pipe, there = make_pipeline(), "cpu:0"
    wanted = generate(pipe).frames
    pipe.enable_model_cpu_offload(there)
    assert pipe.device == torch.device(there)
    moves.clear()
    assert torch.equal(generate(pipe).frames, wanted)
    names = ("text", "base", "text", "ssr")
    assert moves == [(name, place) for name in names for place in (there, "cpu")]
    moves.clear()
    upscaled = pipe.upscale(torch.zeros(3, 4, 8, 8), BALL, num_inference_steps=1)
    assert upscaled.frames.shape == (1, 3, 4, 16, 16)
    assert moves == [(name, place) for name in ("text", "ssr") for place in (there, "cpu")]


def test_a_model_leaves_the_device_when_it_fails(moves: list[tuple[str, str]]) -> None:
    pytest.importorskip("tokenizers")
    pipe = make_pipeline()
    pipe.enable_model_cpu_offload("cpu:0")

    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, progress=stop)
    assert moves[-2:] == [("base", "cpu:0"), ("base", "cpu")]


def test_a_device_given_ends_offloading_and_a_dtype_does_not(moves: list[tuple[str, str]]) -> None:
    pipe = make_pipeline()
    pipe.enable_model_cpu_offload("cpu:0")
    assert pipe.to(torch.float16).device == torch.device("cpu:0")
    assert pipe.dtype == torch.float16
    moves.clear()
    assert pipe.to("cpu").device == torch.device("cpu")
    assert moves == [("base", "cpu"), ("ssr", "cpu"), ("text", "cpu")]
    with pytest.raises(ValueError, match="device 'cuda:99' cannot be used on this machine"):
        pipe.enable_model_cpu_offload("cuda:99")
    assert pipe.device == torch.device("cpu")


# Going on after an interruption --------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


class Calls(list[tuple[str, int, int]]):
    """Of a progress function."""

    def __call__(self, *call: Any) -> None:
        self.append(call)


def interrupted_at(number: int) -> Any:
    """A progress function that raises at a call."""
    calls: list[int] = []

    def report(stage: str, done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == number:
            raise Interrupted

    return report


RESUMED: dict[str, Any] = {"num_frames": 6, "num_inference_steps": 3, "sampler": "ddpm", "seed": 3}


@pytest.mark.parametrize("sampler", ["ddpm", "dpm-solver++"])
def test_an_interrupted_call_goes_on_bit_for_bit(pipe: LumierePipeline, tmp_path: Path, sampler: str) -> None:
    """At every pass of both stages, one file taking the run from each interruption to the next."""
    pytest.importorskip("tokenizers")
    settings = {**RESUMED, "sampler": sampler, "prompt": [BALL, STAR]}
    wanted = generate(pipe, **settings)
    for number in range(1, 3 * 2 + 2 * 2 + 1):
        path = tmp_path / f"{number}.safetensors"
        with pytest.raises(Interrupted):
            generate(pipe, **settings, checkpoint=path, progress=interrupted_at(number))
        assert path.exists() == (number > 2)  # two windows make the first step
        calls = Calls()
        found = generate(pipe, **settings, checkpoint=path, progress=calls)
        assert len(calls) == 10 - (number - 1) // 2 * 2, "steps that were done are made again"
        assert torch.equal(found.frames, wanted.frames)
        assert torch.equal(found.base_frames, wanted.base_frames)
        assert found.windows == wanted.windows
        assert not path.exists()


def test_an_upscaled_clip_goes_on_bit_for_bit(pipe: LumierePipeline, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = tmp_path / "a.safetensors"
    clip = torch.rand(3, 7, 9, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def make(**settings: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return pipe.upscale(
            settings.pop("clip", clip), BALL, num_inference_steps=2, sampler="ddpm", generator=generator, **settings
        ).frames

    wanted = make()
    with pytest.raises(Interrupted):
        make(checkpoint=path, progress=interrupted_at(7))
    with pytest.raises(ValueError, match=r"clip was '.*' and is '.*'; give the same, or remove the file"):
        make(checkpoint=path, clip=-clip)
    with pytest.raises(ValueError, match="call was 'upscale' and is 'generate'"):
        generate(pipe, checkpoint=path)
    assert torch.equal(make(checkpoint=path), wanted)
    assert not path.exists()


def test_without_a_generator_the_interrupted_calls_seeds_are_taken(pipe: LumierePipeline, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = tmp_path / "a.safetensors"
    settings: dict[str, Any] = {"num_inference_steps": 2, "ssr_num_inference_steps": 2}
    torch.manual_seed(5)
    wanted = pipe(BALL, **settings).frames
    torch.manual_seed(5)
    with pytest.raises(Interrupted):
        pipe(BALL, **settings, checkpoint=path, progress=interrupted_at(4))
    assert torch.equal(pipe(BALL, **settings, checkpoint=path).frames, wanted)


def test_smaller_windows_stay_after_an_interruption(
    pipe: LumierePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory ran out before it, and what is free after it does not count: the clip is the one that was begun."""
    pytest.importorskip("tokenizers")
    path, settings = tmp_path / "a.safetensors", {"num_frames": 12, "window_frames": 8}
    wanted = generate(pipe, num_frames=12, window_frames=4)
    forward = pipe.ssr.forward

    def exhausted(sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if sample.shape[2] > 4:
            raise MemoryError
        return forward(sample, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="out of memory"), pytest.raises(Interrupted):
        patch.setattr(pipe.ssr, "forward", exhausted)
        generate(pipe, **settings, checkpoint=path, progress=interrupted_at(10 + 7))
    monkeypatch.setattr(budget, "free_memory", lambda device: 1)  # what is begun is not planned again
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = generate(pipe, **settings, checkpoint=path)
    assert output.windows == wanted.windows
    assert torch.equal(output.frames, wanted.frames)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": STAR}, "prompts was .*ball.* and is .*star"),
        ({"seed": 4}, "seeds was"),
        ({"num_frames": 8}, "num_frames was 6 and is 8"),
        ({"num_inference_steps": 4}, "num_inference_steps was 3 and is 4"),
        ({"ssr_num_inference_steps": 3}, "ssr_num_inference_steps was 2 and is 3"),
        ({"guidance_scale": 2.0}, "guidance_scale was 3.0 and is 2.0"),
        ({"sampler": "ddim"}, "sampler was 'ddpm' and is 'ddim'"),
        ({"threshold": None}, "threshold was"),
        ({"overlap": 1}, "overlap was 2 and is 1"),
        ({"window_frames": 6}, "window_frames was 4 and is 6"),
        ({"window_weights": "pyramid"}, "window_weights was 'flat' and is 'pyramid'"),
        ({"base_overlap": 1}, "base_overlap was 2 and is 1"),
        ({"max_memory": "1GiB"}, "max_memory was None and is 1073741824"),
    ],
)
def test_other_settings_are_refused_by_name(
    pipe: LumierePipeline, interrupted: Path, changed: dict[str, Any], message: str
) -> None:
    before = interrupted.read_bytes()
    with pytest.raises(ValueError, match=message):
        generate(pipe, **RESUMED | changed, checkpoint=interrupted)
    assert interrupted.read_bytes() == before


@pytest.fixture(scope="module")
def interrupted(pipe: LumierePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state left in the second stage."""
    pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("interrupted") / "a.safetensors"
    with pytest.raises(Interrupted):
        generate(pipe, **RESUMED, checkpoint=path, progress=interrupted_at(9))
    return path


def test_other_weights_are_refused(interrupted: Path) -> None:
    pipe = make_pipeline()
    with pytest.raises(ValueError, match=r"config was .*sigma_max=20.0.* and is .*sigma_max=30.0"):
        generate(with_schedules(pipe, EDMSchedule(sigma_max=30.0), SCHEDULE), **RESUMED, checkpoint=interrupted)
    with pytest.raises(ValueError, match="weights was"):
        generate(make_pipeline(seed=1), **RESUMED, checkpoint=interrupted)
    with pytest.raises(ValueError, match=r"dtype was 'torch.float32' and is 'torch.float16'"):
        generate(make_pipeline().to(torch.float16), **RESUMED, checkpoint=interrupted)


def test_a_change_of_any_weight_shows() -> None:
    model = make_pipeline().ssr
    before = fingerprint(model)
    for parameter in model.parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter += 1e-3
            assert fingerprint(model) != before
            parameter.copy_(kept)
    assert fingerprint(model) == before


def test_weights_that_do_not_fit_are_refused_before_there_is_work(
    pipe: LumierePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(pipe.base), "forward", None)
    with pytest.raises(ValueError, match=r"weights\[0\] must have the 4 entries"):
        generate(pipe, num_frames=8, window_frames=4, window_weights=[1.0] * 7)


def test_more_frames_than_memory_can_hold_are_refused_at_once(pipe: LumierePipeline) -> None:
    with pytest.raises(ValueError, match=r"1 x 1000000000000 frames need more than .* GiB of memory"):
        generate(pipe, num_frames=10**12)


def test_what_is_no_state_of_a_call_is_refused(pipe: LumierePipeline, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        generate(pipe, checkpoint=path)
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"b\.safetensors' is a folder; name a file"):
        generate(pipe, checkpoint=tmp_path / "b.safetensors")
    state = DenoisingState(1, torch.zeros(1, 3, 4, 8, 8), None, (), plan_windows(4, 4))
    save_state(path, state, {"sampler": "ddim"})
    with pytest.raises(ValueError, match="the state of some other run, not of a pipeline's call"):
        generate(pipe, checkpoint=path)


def test_a_file_may_be_kept_for_its_caller_to_remove(pipe: LumierePipeline, tmp_path: Path) -> None:
    """A finished call begun again returns its clip at once."""
    pytest.importorskip("tokenizers")
    path = tmp_path / "a.safetensors"
    first = generate(pipe, checkpoint=Checkpoint(path, keep=True))
    calls = Calls()
    again = generate(pipe, checkpoint=Checkpoint(path, keep=True), progress=calls)
    assert calls == []
    assert torch.equal(again.frames, first.frames)
    assert path.exists()
