from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lumiere_fast import BackendUnavailable, LumiereOutput, LumierePipeline, inflate, use_backend
from lumiere_fast.diffusion import EDMParameterization, EDMSchedule
from lumiere_fast.dispatch import BACKENDS
from lumiere_fast.models.io import save_model
from lumiere_fast.pipelines.denoising import Denoiser
from lumiere_fast.pipelines.text_to_video import PipelineConfig, denoise_from_text
from lumiere_fast.text import WordVectorEncoder
from tests.models.tiny import randomise, tiny_unet

BALL, STAR = "a red ball moving left", "a blue star rising"
SCHEDULE = EDMSchedule(sigma_max=20.0)


def make_pipeline(
    base_factor: int = 2, ssr_factor: int = 2, window_frames: int = 4, **ssr_changes: Any
) -> LumierePipeline:
    """8x8 to 16x16 pixels, 4 frames, all parameters random."""
    common = {"text_embed_dim": 64, "dtype": torch.float32}
    base = inflate(tiny_unet(**common, sample_size=8), temporal_factors=(base_factor,), temporal_conditioning=True)
    ssr = inflate(tiny_unet(**common, ssr=True, **{"sample_size": 16} | ssr_changes), temporal_factors=(ssr_factor,))
    config = PipelineConfig(SCHEDULE, SCHEDULE, num_frames=4, fps=8, window_frames=window_frames)
    return LumierePipeline(randomise(base), randomise(ssr), config)


@pytest.fixture(scope="module")
def pipe() -> LumierePipeline:
    return make_pipeline()


def generate(pipe: LumierePipeline, prompt: Any = BALL, seed: int = 0, **settings: Any) -> LumiereOutput:
    defaults = {"num_inference_steps": 2, "ssr_num_inference_steps": 2}
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **defaults | settings)


# What comes out ------------------------------------------------------------------------------------------------------


def test_a_prompt_gives_a_clip(pipe: LumierePipeline) -> None:
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
    assert generate(pipe, num_frames=10).frames.shape == (1, 3, 10, 16, 16)
    assert generate(pipe, num_frames=2).frames.shape == (1, 3, 2, 16, 16)


def test_a_seed_decides_everything(pipe: LumierePipeline) -> None:
    state = torch.get_rng_state()
    one, two, other = generate(pipe, seed=1), generate(pipe, seed=1), generate(pipe, seed=2)
    assert torch.equal(one.frames, two.frames)
    assert torch.equal(one.base_frames, two.base_frames)
    assert (one.base_frames - other.base_frames).abs().mean() > 0.05
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator was drawn from"


def test_without_a_generator_torchs_own_decides(pipe: LumierePipeline) -> None:
    clips = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        clips.append(pipe(BALL, num_inference_steps=1, ssr_num_inference_steps=1).frames)
    assert torch.equal(clips[0], clips[1])
    assert not torch.equal(clips[0], clips[2])


def test_each_prompt_of_a_batch_has_its_own_clip(pipe: LumierePipeline) -> None:
    """Of the same length in tokens or not: padding does not leak."""
    first = generate(pipe, [BALL, STAR])
    second = generate(pipe, (BALL, "a green ring on a white background, going around in a circle"))
    assert first.frames.shape == (2, 3, 4, 16, 16)
    torch.testing.assert_close(first.frames[0], second.frames[0], rtol=0, atol=1e-3)
    assert (first.base_frames[1] - second.base_frames[1]).abs().mean() > 0.01


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++"])
def test_guidance_of_one_is_the_conditional_model_and_zero_ignores_the_prompt(
    pipe: LumierePipeline, sampler: str
) -> None:
    def base(scale: float, prompt: str = BALL) -> Tensor:
        return generate(pipe, prompt, guidance_scale=scale, sampler=sampler, ssr_num_inference_steps=1).base_frames

    torch.testing.assert_close(base(1.0), base(1.0 + 1e-6), rtol=0, atol=1e-3)
    torch.testing.assert_close(base(0.0), base(0.0, STAR), rtol=0, atol=1e-3)
    assert (base(1.0) - base(1.0, STAR)).abs().mean() > 0.01
    assert (base(1.0) - base(4.0)).abs().mean() > 0.01


def test_guidance_extrapolates_from_the_empty_prompt(pipe: LumierePipeline) -> None:
    """One step by hand: the network with the prompt, without it, and the line through both."""
    edm, scale = EDMParameterization(), 3.5
    noise = torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((1,), SCHEDULE.sigma_max)
    seen = edm.scale_input(noise * SCHEDULE.sigma_max, sigma[:, None, None, None, None])
    encode = WordVectorEncoder().encode
    with torch.no_grad():
        conditional, unconditional = (pipe.base(seen, edm.timestep(sigma), *encode(p)) for p in (BALL, ""))
        prediction = scale * conditional + (1 - scale) * unconditional
        total = SCHEDULE.sigma_max**2 + 0.25
        x0 = 0.25 / total * SCHEDULE.sigma_max * noise + SCHEDULE.sigma_max * 0.5 / total**0.5 * prediction
        denoiser = Denoiser(SCHEDULE, edm, threshold=None)
        got = denoise_from_text(pipe.base, pipe.text_encoder, denoiser, [BALL], noise, 1, scale)
    torch.testing.assert_close(got, x0, rtol=0, atol=1e-4)


def test_guidance_costs_a_doubled_batch_and_one_is_free(pipe: LumierePipeline) -> None:
    batches: list[int] = []
    handle = pipe.base.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    try:
        generate(pipe, [BALL, STAR], guidance_scale=1.0)
        generate(pipe, [BALL, STAR], guidance_scale=2.0)
    finally:
        handle.remove()
    assert batches == [2, 2, 4, 4]


def test_images_come_from_the_image_model() -> None:
    unet = tiny_unet(dtype=torch.float32, text_embed_dim=64)
    noise = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    denoiser = Denoiser(SCHEDULE, EDMParameterization())
    with torch.no_grad():
        images = denoise_from_text(unet, WordVectorEncoder(), denoiser, [BALL, STAR], noise, 2, 3.0)
    assert images.shape == (2, 3, 1, 8, 8)


# Progress ------------------------------------------------------------------------------------------------------------


def test_progress_counts_every_pass(pipe: LumierePipeline) -> None:
    calls: list[tuple[str, int, int]] = []
    generate(pipe, num_frames=6, num_inference_steps=3, progress=lambda *call: calls.append(call))
    base = [("base", done, 3) for done in range(1, 4)]
    ssr = [("ssr", done, 4) for done in range(1, 5)]  # two windows a step
    assert calls == base + ssr


def test_progress_bars_go_to_stderr(pipe: LumierePipeline, capsys: pytest.CaptureFixture[str]) -> None:
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
        ({"num_frames": 5}, "temporal factor 2, got 5; the nearest accepted are 4 and 6"),
        ({"num_frames": 0}, "got 0"),
        ({"num_frames": -4}, "got -4"),
        ({"num_inference_steps": 0}, "num_inference_steps must be >= 1, got 0"),
        ({"num_inference_steps": -1}, "num_inference_steps must be >= 1, got -1"),
        ({"ssr_num_inference_steps": 0}, "ssr_num_inference_steps must be >= 1, got 0"),
        ({"guidance_scale": -0.5}, "guidance_scale must be >= 0, got -0.5"),
        ({"guidance_scale": math.nan}, "guidance_scale must be >= 0, got nan"),
        ({"sampler": "euler"}, r"sampler must be one of ddim, dpm-solver\+\+, got 'euler'"),
    ],
)
def test_bad_arguments_are_named_before_any_work(
    pipe: LumierePipeline, arguments: dict[str, Any], message: str
) -> None:
    calls: list[object] = []
    with pytest.raises(ValueError, match=message):
        generate(pipe, **{"prompt": BALL} | arguments, progress=lambda *call: calls.append(call))
    assert calls == []


def test_frames_must_suit_both_models() -> None:
    pipe = make_pipeline(base_factor=2, ssr_factor=3, window_frames=6)
    assert pipe.temporal_factor == 6
    with pytest.raises(ValueError, match="temporal factor 6, got 4; the nearest accepted are 6 and 12"):
        generate(pipe)


def test_models_must_fit_together() -> None:
    with pytest.raises(ValueError, match="makes 20 pixels, a multiple of the base model's 8 is needed"):
        make_pipeline(sample_size=20)


def test_an_unknown_text_encoder_is_refused(pipe: LumierePipeline) -> None:
    config = PipelineConfig(SCHEDULE, SCHEDULE, 4, 8, 4, text_encoder="t5-xxl")
    with pytest.raises(ValueError, match="text_encoder must be 'word-vectors-v1', got 't5-xxl'"):
        LumierePipeline(pipe.base, pipe.ssr, config)


# Backends ------------------------------------------------------------------------------------------------------------


def test_forced_is_forced(pipe: LumierePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU no Triton kernel can serve: the call says why, and does not run another backend."""
    with (
        use_backend("triton"),
        pytest.raises(BackendUnavailable, match=r"group_norm cannot run on the backend 'triton': \S+"),
    ):
        generate(pipe)
    monkeypatch.setenv("LUMIERE_FAST_BACKEND", "triton")
    with pytest.raises(BackendUnavailable, match="cannot run on the backend 'triton'"):
        generate(pipe)


def test_the_reference_can_be_asked_for(pipe: LumierePipeline) -> None:
    with use_backend("reference"):
        output = generate(pipe)
    assert output.backend == "reference"
    torch.testing.assert_close(output.frames, generate(pipe).frames, rtol=0, atol=1e-4)


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(pipe: LumierePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "tiny"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved pipeline, to damage."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def test_what_is_saved_is_loaded(pipe: LumierePipeline, saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["base", "model_index.json", "ssr"]
    for given in (saved, str(saved)):
        loaded = LumierePipeline.from_pretrained(given)
        assert loaded.config == pipe.config
        assert not loaded.base.training
        assert not loaded.ssr.training
    torch.testing.assert_close(generate(loaded).frames, generate(pipe).frames, rtol=0, atol=1e-4)


def test_half_precision_on_disk(pipe: LumierePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path, dtype=torch.float16)
    assert {x.dtype for x in load_file(tmp_path / "ssr" / "model.safetensors").values()} == {torch.float16}
    loaded = LumierePipeline.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.ssr.parameters()} == {torch.float32}
    assert (generate(loaded).base_frames - generate(pipe).base_frames).abs().mean() < 0.02


def test_the_pipeline_moves_as_one(pipe: LumierePipeline) -> None:
    assert pipe.to("cpu") is pipe
    assert pipe.device == torch.device("cpu")
    assert pipe.default_fps == 8


def edit_index(folder: Path, **changes: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def swap_models(folder: Path) -> None:
    (folder / "base").rename(folder / "spare")
    (folder / "ssr").rename(folder / "base")
    (folder / "spare").rename(folder / "ssr")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit_index(f, _class_name="StableDiffusionPipeline"), "expected _class_name LumierePipeline"),
        (lambda f: edit_index(f, scheduler="x"), r"model_index\.json: not a pipeline of this version.*scheduler"),
        (lambda f: edit_index(f, base_schedule={"sigma": 1}), r"model_index\.json: not a pipeline of this version"),
        (lambda f: (f / "model_index.json").write_text("{"), r"model_index\.json is not valid JSON"),
        (lambda f: edit_index(f, text_encoder="t5"), "text_encoder must be"),
        (lambda f: edit_index(f, fps="x"), "fps must be an integer >= 1, got 'x'"),
        (lambda f: edit_index(f, window_frames=0), "window_frames must be an integer >= 1, got 0"),
        (lambda f: edit_index(f, sigma_data=-1), "sigma_data must be a number > 0, got -1"),
        (lambda f: edit_index(f, base_schedule={"sigma_min": 100}), "sigma_min must not exceed sigma_max"),
        (lambda f: (f / "base" / "model.safetensors").write_bytes(b"123"), r"base/model\.safetensors is truncated"),
        (swap_models, "look at their order"),
        (
            lambda f: shutil.copy(f / "base" / "model.safetensors", f / "ssr" / "model.safetensors"),
            r"ssr/model\.safetensors: these weights are of another architecture: 'unet\.\S+'",
        ),
        (
            lambda f: save_model(tiny_unet(dtype=torch.float32), f / "base"),
            "base holds a UNet2D, a STUNet is needed",
        ),
    ],
)
def test_a_damaged_folder_is_told(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        LumierePipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (".", "is not a folder of weights; give one, or a shipped model"),
        ("model_index.json", r"model_index\.json is missing"),
        ("ssr", "ssr is not a folder"),
        ("base/config.json", r"base/config\.json is missing"),
        ("base/model.safetensors", r"base/model\.safetensors is missing"),
    ],
)
def test_what_is_missing_is_named(folder: Path, missing: str, message: str) -> None:
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match=message):
        LumierePipeline.from_pretrained(folder)
