"""The stages from end to end on tiny cascades: which model, which clips and which noise each takes, and refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lumiere_fast import STUNet, UNet2D
from lumiere_fast.data.videos import VideoFolder
from lumiere_fast.diffusion import (
    CosineSchedule,
    EDMParameterization,
    EDMSchedule,
    EpsilonParameterization,
    SampleParameterization,
    VParameterization,
)
from lumiere_fast.models import PRESETS, InflationConfig, Preset
from lumiere_fast.models.io import load_model, read_metadata, save_model
from lumiere_fast.pipelines import LumierePipeline
from lumiere_fast.text import PromptWarning, WordVectorEncoder
from lumiere_fast.training import assemble, evaluate_images, read_cascade, read_noising, stages, tasks, train
from lumiere_fast.training.lock import locked
from lumiere_fast.training.tasks import DenoisingTask
from tests.models.tiny import tiny_config
from tests.training.common import assert_equal_runs, make_model, same

pytestmark = pytest.mark.usefixtures("without_pictures")

CASCADE = Preset(
    base=tiny_config(sample_size=8, text_embed_dim=64),
    base_inflation=InflationConfig((2,), temporal_conditioning=True, text_layers=1),
    ssr=tiny_config(ssr=True, sample_size=16, text_embed_dim=64),
    ssr_inflation=InflationConfig((2,)),
    num_frames=8,
    fps=6,
    window_frames=4,
)
HUGE = dataclasses.replace(CASCADE, base=dataclasses.replace(CASCADE.base, time_embed_dim=2 * 10**9))
ONE = {"cascade": CASCADE, "steps": 1, "batch_size": 1}


def settings_of(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(read_metadata(folder / "training.safetensors")["run"])["settings"]
    return settings


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        ("t2v", {}, "stage must be one of t2i, inflate, ssr, got 't2v'"),
        ("inflate", {}, "stage 'inflate' needs a source folder"),
        ("t2i", {"crop": "foo"}, "crop must be one of center, random, got 'foo'"),
        ("t2i", {"short_clips": "foo"}, "short_clips must be one of refuse, skip, got 'foo'"),
        ("t2i", {"learning_rate": math.inf}, "learning_rate must be a finite number >= 0, got inf"),
        ("t2i", {"batch_size": 10**9}, "training with 1000000000 samples a step takes more than"),
        ("t2i", {"cascade": HUGE}, "larger than any memory"),
        ("t2i", {"steps": 0}, "steps must be >= 1, got 0"),
        ("t2i", {"batch_size": 0, "steps": 1}, "batch_size=0"),
        ("t2i", {"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
        ("t2i", {"schedule": "linear"}, "schedule must be one of edm, cosine, got 'linear'"),
        ("t2i", {"prediction_type": "v"}, "prediction_type must be one of edm, epsilon, v_prediction, sample, got 'v'"),
        ("t2i", {"precision": "int4"}, "precision must be one of fp32, bf16, got 'int4'"),
        ("t2i", {"cascade": dataclasses.replace(CASCADE, num_frames=7)}, "num_frames must be a multiple of the 2 of"),
        ("t2i", {"cascade": PRESETS["paper"], "steps": 1}, "the model reads text of width 4096, word-vectors-v1 gives"),
    ],
)
def test_bad_stages_are_refused(
    stage: str, arguments: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if arguments.get("cascade") is PRESETS["paper"]:  # its 700 million weights need not exist for this
        monkeypatch.setattr(stages, "UNet2D", lambda config: UNet2D(tiny_config(text_embed_dim=config.text_embed_dim)))
    with pytest.raises(ValueError, match=message):
        train(stage, tmp_path / "out", **{"cascade": CASCADE, **arguments})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("stage", "kind"), [("t2i", "ssr image"), ("ssr", "image"), ("t2i", "video")])
def test_a_stage_goes_on_from_a_model_of_its_own_kind(stage: str, kind: str, tmp_path: Path) -> None:
    save_model(make_model(kind), tmp_path / "model")
    with pytest.raises(ValueError, match=f"model holds no model of stage '{stage}'"):
        train(stage, tmp_path / "out", source=tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        train(stage, tmp_path / "out", source=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["t2i", "ssr"])
def test_the_inflate_stage_adds_to_an_image_model_and_goes_on_from_a_video_model(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    train(kind, tmp_path / "image", **ONE)
    image = load_model(tmp_path / "image")
    rest = {"steps": 1, "batch_size": 1}
    train("inflate", tmp_path / "video", source=tmp_path / "image", **rest)  # the cascade is that of the source
    video = load_model(tmp_path / "video")
    assert isinstance(video, STUNet)
    assert same(video.unet.state_dict(), image.state_dict())
    assert video.inflation_config == (CASCADE.base_inflation if kind == "t2i" else CASCADE.ssr_inflation)
    assert settings_of(tmp_path / "video")["num_frames"] == (8 if kind == "t2i" else 4)
    train("inflate", tmp_path / "more", source=tmp_path / "video", learning_rate=1e-9, **rest)
    more = load_model(tmp_path / "more")
    for name, tensor in video.state_dict().items():
        torch.testing.assert_close(more.state_dict()[name], tensor, rtol=0, atol=1e-6)
    for run in ("image", "video", "more"):
        assert read_cascade(tmp_path / run) == CASCADE


def test_the_source_must_be_of_the_cascade(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    save_model(make_model("image"), tmp_path / "image")
    with pytest.raises(ValueError, match=r"image holds a model of another cascade: sample_size=8 \(the cascade: 32\)"):
        train("inflate", tmp_path / "out", source=tmp_path / "image", steps=1)
    train("t2i", tmp_path / "t2i", **ONE)
    train("inflate", tmp_path / "video", source=tmp_path / "t2i", steps=1, batch_size=1)
    other = dataclasses.replace(CASCADE, base_inflation=dataclasses.replace(CASCADE.base_inflation, text_layers=2))
    with pytest.raises(ValueError, match=r"another cascade: text_layers=1 \(the cascade: 2\); give the cascade"):
        train("inflate", tmp_path / "out", source=tmp_path / "video", cascade=other, steps=1)
    assert not (tmp_path / "out").exists()


# The folder of a run -------------------------------------------------------------------------------------------------


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    with (
        locked(tmp_path / "run"),
        pytest.raises(BlockingIOError, match=r"another process is training in .*run"),
    ):
        train("t2i", tmp_path / "run", **ONE)
    train("t2i", tmp_path / "run", **ONE)
    with locked(tmp_path / "run"), pytest.raises(BlockingIOError, match=r"another process is training in .*run"):
        train("t2i", tmp_path / "run", **ONE, resume=True)
    assert not (tmp_path / "run" / "training.lock").exists()


def test_a_start_that_fails_leaves_nothing(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="there is no run to resume"):
        train("t2i", tmp_path / "run", **ONE, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(VideoFolder, "_load", lambda *_: (_ for _ in ()).throw(ValueError("clip.mp4 cannot be read")))
        with pytest.raises(ValueError, match=r"clip\.mp4 cannot be read"):
            train("t2i", tmp_path / "run", data=videos, **ONE)
    assert not (tmp_path / "run").exists()
    train("t2i", tmp_path / "run", data=videos, **ONE)


def test_captions_with_unknown_words_are_told_once(
    tmp_path: Path, videos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(videos, tmp_path / "clips")
    for index, path in enumerate(sorted(folder.glob("*.txt"))):
        path.write_text(f"a square \u732b{index}", encoding="utf-8")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train("t2i", tmp_path / "run", data=folder, cascade=CASCADE, steps=3, batch_size=4)
        assert not [warning for warning in caught if issubclass(warning.category, PromptWarning)]
        WordVectorEncoder().encode("\u732b")  # as before, once the run has ended
    assert [warning.category for warning in caught] == [PromptWarning]
    (message,) = [record.getMessage() for record in caplog.records if "caption" in record.getMessage()]
    assert message.startswith(
        "a caption does not reach the model whole, and others may not, which is said once: prompt"
    )


# Noise ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "schedule", "parameterization"),
    [
        ({}, stages.IMAGES.schedule, EDMParameterization()),
        ({"prediction_type": "epsilon"}, stages.IMAGES.schedule, EpsilonParameterization()),
        ({"schedule": "cosine"}, CosineSchedule(shift=round(math.log(8), 4)), VParameterization()),
        (
            {"schedule": "cosine", "prediction_type": "edm"},
            CosineSchedule(shift=round(math.log(8), 4)),
            EDMParameterization(),
        ),
    ],
)
def test_schedule_and_prediction_are_recorded_and_passed_on(
    arguments: dict[str, Any], schedule: Any, parameterization: Any, tmp_path: Path
) -> None:
    pytest.importorskip("tokenizers")
    train("t2i", tmp_path / "t2i", **ONE, **arguments)
    assert read_noising(tmp_path / "t2i") == (schedule, parameterization)
    train("inflate", tmp_path / "video", source=tmp_path / "t2i", steps=1, batch_size=1)
    inherited = schedule if isinstance(schedule, CosineSchedule) else stages.CLIPS.schedule
    assert read_noising(tmp_path / "video") == (inherited, parameterization)
    recorded = settings_of(tmp_path / "video")
    assert recorded["parameterization"]["_class_name"] == type(parameterization).__name__
    assert recorded["schedule"]["_class_name"] == type(inherited).__name__
    with pytest.raises(ValueError, match="was trained with other settings: parameterization="):
        other = "sample"
        train("t2i", tmp_path / "t2i", **ONE, **{**arguments, "prediction_type": other}, resume=True)


def test_a_source_keeps_what_it_predicts(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    train("t2i", tmp_path / "t2i", **ONE, prediction_type="v_prediction")
    with pytest.raises(ValueError, match="t2i was trained with prediction_type='v_prediction', which its layers keep"):
        train("inflate", tmp_path / "out", source=tmp_path / "t2i", prediction_type="epsilon")
    train("inflate", tmp_path / "out", source=tmp_path / "t2i", schedule="edm", steps=1, batch_size=1)
    assert read_noising(tmp_path / "out") == (stages.CLIPS.schedule, VParameterization())
    assert isinstance(stages.CLIPS.schedule, EDMSchedule)


def test_an_assembled_pipeline_samples_as_its_models_were_trained(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    for stage in ("t2i", "ssr"):
        train(stage, tmp_path / stage, **ONE, schedule="cosine", prediction_type="sample")
        train("inflate", tmp_path / f"{stage} video", source=tmp_path / stage, steps=1, batch_size=1)
    assemble(tmp_path / "t2i video", tmp_path / "ssr video", tmp_path / "pipeline")
    pipe = LumierePipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.config.base_schedule == CosineSchedule(shift=round(math.log(8), 4))
    assert pipe.config.ssr_schedule == CosineSchedule(shift=round(math.log(4), 4))
    for parameterization in (pipe.config.base_parameterization, pipe.config.ssr_parameterization):
        assert parameterization == SampleParameterization()
    assert (pipe.config.num_frames, pipe.config.fps, pipe.config.window_frames) == (8, 6, 4)
    assert pipe("a ball", num_inference_steps=2, ssr_num_inference_steps=1).frames.shape == (1, 3, 8, 16, 16)
    figures = evaluate_images(pipe.base.unet, 2, num_inference_steps=1, noising=read_noising(tmp_path / "t2i video"))
    assert 0 <= figures["look"]["accuracy"] <= 1


# Data and settings ---------------------------------------------------------------------------------------------------


def test_a_folder_of_videos_at_the_frames_and_rate_of_the_cascade(tmp_path: Path, videos: Path) -> None:
    train("t2i", tmp_path / "t2i", data=videos, **ONE)
    train("inflate", tmp_path / "video", source=tmp_path / "t2i", data=videos, steps=1, batch_size=1, crop="random")
    wanted = {"data": "folder", "seed": 0, "fps": 6}
    image, video = settings_of(tmp_path / "t2i"), settings_of(tmp_path / "video")
    assert wanted.items() <= image.items()
    assert {**wanted, "num_frames": 8, "crop": "random"}.items() <= video.items()
    assert image["data_fingerprint"] == video["data_fingerprint"]
    with pytest.raises(ValueError, match=r"was trained with other settings: data=folder \(now procedural\)"):
        train("t2i", tmp_path / "t2i", **ONE, resume=True)
    long = dataclasses.replace(CASCADE, num_frames=80)
    with pytest.raises(ValueError, match=r"3 videos are shorter than the 13\.25 s that 80 frames at 6 fps need"):
        train("inflate", tmp_path / "out", source=tmp_path / "t2i", cascade=long, data=videos)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder of videos"):
        train("t2i", tmp_path / "out", cascade=CASCADE, data=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_a_resumed_stage_is_the_uninterrupted_one(tmp_path: Path, videos: Path) -> None:
    """By the public function, on a folder with accumulation: the files of the run are equal."""
    settings: dict[str, Any] = {
        "data": videos,
        "cascade": CASCADE,
        "steps": 6,
        "batch_size": 1,
        "gradient_accumulation_steps": 2,
        "crop": "random",
        "log_every": 2,
        "schedule": "cosine",
    }

    class Interrupted(Exception):
        pass

    def interrupt(step: int, loss: float) -> None:
        if step == 4:
            raise Interrupted

    train("t2i", tmp_path / "whole", **settings)
    with pytest.raises(Interrupted):
        train("t2i", tmp_path / "cut", **settings, checkpoint_every=3, on_log=interrupt)
    train("t2i", tmp_path / "cut", **settings, resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_options_reach_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(tasks, "_has_bf16_units", lambda device: True)
    made: list[DenoisingTask] = []
    original = DenoisingTask.__post_init__

    def remember(task: DenoisingTask) -> None:
        original(task)
        made.append(task)

    monkeypatch.setattr(DenoisingTask, "__post_init__", remember)
    options = {"gradient_accumulation_steps": 3, "precision": "bf16", "gradient_checkpointing": True, "seed": 4}
    train("ssr", tmp_path / "out", **ONE, **options)
    (task,) = made
    assert task.model.gradient_checkpointing
    assert (task.precision, task.gradient_accumulation_steps, task.source.seed) == ("bf16", 3, 4)
    assert task.upscale_factor == 2
    # what changes no result may differ in a run that is resumed
    train("ssr", tmp_path / "out", **ONE, **{**options, "gradient_checkpointing": False}, resume=True)
    with pytest.raises(ValueError, match=r"precision=bf16 \(now fp32\)$"):
        train("ssr", tmp_path / "out", **ONE, **{**options, "precision": "fp32"}, resume=True)
