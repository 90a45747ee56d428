from __future__ import annotations

import copy
import csv
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lumiere_fast import STUNet, UNet2D, inflate
from lumiere_fast.diffusion import EDMSchedule
from lumiere_fast.models.blocks import channels_last_weights
from lumiere_fast.models.io import load_model, read_metadata, save_model
from lumiere_fast.training import train
from lumiere_fast.training.tasks import DenoisingTask
from lumiere_fast.training.trainer import Trainer, TrainingConfig
from tests.models.tiny import tiny_config

CONFIG = TrainingConfig(steps=6, learning_rate=5e-3, warmup_steps=2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """With one thread a sum has one order, so that runs can be compared to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_task(kind: str = "image", *, batch_size: int = 4, seed: int = 0, **changes: Any) -> DenoisingTask:
    """Freshly initialised models of 8x8 pixels, or 16x16 for an "ssr", in the layout that training uses."""
    torch.manual_seed(seed)
    ssr = "ssr" in kind
    unet = UNet2D(tiny_config(ssr=ssr, sample_size=16 if ssr else 8, text_embed_dim=64))
    model = inflate(unet, temporal_factors=(2,), temporal_conditioning=True) if "video" in kind else unet
    return DenoisingTask(channels_last_weights(model), EDMSchedule(), batch_size, seed=seed, num_frames=4, **changes)


def values(task: DenoisingTask) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in task.model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


KINDS = ["image", "ssr image", "video", "ssr video"]


# The loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_a_function_of_weights_and_step(kind: str) -> None:
    task, twin = make_task(kind), make_task(kind)
    with torch.no_grad():
        losses = [task.loss(step).item() for step in range(3)]
        torch.manual_seed(123)
        assert [twin.loss(step).item() for step in (2, 0, 1)] == [losses[2], losses[0], losses[1]]
    assert len(set(losses)) == 3
    reseeded = dataclasses.replace(task, seed=1)
    assert reseeded.loss(0).item() != losses[0]
    task.model.get_parameter("unet.conv_in.bias" if "video" in kind else "conv_in.bias").data.add_(0.1)
    assert task.loss(0).item() != losses[0]


def test_the_loss_is_the_error_of_the_parameterised_prediction() -> None:
    """With a network that answers 0 it is the variance of the target: one, less what the clips' own variance lacks."""
    task = make_task(batch_size=64)
    task.model.forward = lambda sample, *args, **kwargs: torch.zeros_like(sample)  # type: ignore[method-assign]
    zero = sum(task.loss(step).item() for step in range(8)) / 8
    assert 0.5 < zero < 2.0


@pytest.mark.parametrize(("share", "empty"), [(0.0, 0), (1.0, 64), (0.25, 16)])
def test_prompts_are_dropped_at_their_rate(share: float, empty: int) -> None:
    task = make_task(batch_size=64, drop_text=share)
    prompts: list[str] = []
    encoder = task.text_encoder

    class Recorder:
        name, embed_dim, max_length = encoder.name, encoder.embed_dim, encoder.max_length

        def encode(self, batch: list[str]) -> Any:
            prompts.extend(batch)
            return encoder.encode(batch)

    task.text_encoder = Recorder()  # type: ignore[assignment]
    with torch.no_grad():
        task.loss(0)
        assert abs(prompts.count("") - empty) <= (8 if 0 < share < 1 else 0)
        task.loss(1)
    assert prompts[:64] != prompts[64:] or share == 1, "every step has the same clips"


def test_a_video_task_takes_windows_of_a_clip() -> None:
    task = make_task("video")
    shapes: list[tuple[int, ...]] = []
    task.model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    with torch.no_grad():
        task.loss(0)
    assert shapes == [(4, 3, 4, 8, 8)]
    starts = {float(task._batch(step, torch.Generator().manual_seed(step)).frames[0, 0]) for step in range(60)}
    assert starts == {float(start) for start in range(13)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 17}, "num_frames must be from 1 to the 16 of a clip, got 17"),
        ({"num_frames": 0}, "got 0"),
    ],
)
def test_impossible_tasks_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_task("video"), **changes)


def test_text_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="the model reads text of width 12, word-vectors-v1 gives 64"):
        DenoisingTask(UNet2D(tiny_config()), EDMSchedule(), 4)


# Learning ------------------------------------------------------------------------------------------------------------


def test_training_learns(tmp_path: Path) -> None:
    """On batches it has not seen, against the same model untrained, and against one whose steps are too small."""
    held_out = range(1000, 1008)

    def score(task: DenoisingTask) -> float:
        with torch.no_grad():
            return sum(task.loss(step).item() for step in held_out) / len(held_out)

    control = make_task(batch_size=16)
    learner = copy.deepcopy(control)
    frozen = copy.deepcopy(control)
    before = score(control)
    Trainer(learner, TrainingConfig(steps=40, learning_rate=4e-3, warmup_steps=5), tmp_path / "learner").run()
    Trainer(frozen, TrainingConfig(steps=2, learning_rate=1e-12, warmup_steps=1), tmp_path / "frozen").run()
    assert score(control) == before
    assert score(frozen) == pytest.approx(before, rel=1e-3)
    assert score(learner) < 0.6 * before


def test_the_inflate_stage_trains_the_temporal_layers_alone(tmp_path: Path) -> None:
    task = make_task("video")
    before = values(task)
    Trainer(task, CONFIG, tmp_path).run()
    after = values(task)
    assert [name for name in before if name.startswith("unet.") and not torch.equal(before[name], after[name])] == []
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved
    assert all(name.startswith("temporal.") for name in moved)
    saved = load_model(tmp_path)
    assert isinstance(saved, STUNet)
    assert same(
        saved.unet.state_dict(), {k.removeprefix("unet."): v for k, v in before.items() if k.startswith("unet.")}
    )


def test_the_learning_rate_rises_holds_and_falls() -> None:
    config = TrainingConfig(steps=100, learning_rate=2.0, warmup_steps=10, decay_fraction=0.4)
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[9:61] == pytest.approx([2.0] * 52)
    assert rates[60:] == pytest.approx([2.0 * (100 - step) / 40 for step in range(60, 100)])
    assert rates[99] == pytest.approx(0.05)


def test_the_scheduled_rate_is_the_one_used(tmp_path: Path) -> None:
    trainer = Trainer(make_task(), CONFIG, tmp_path)
    rates: list[float] = []
    trainer.run(
        log_every=1, on_log=lambda step, loss: rates.append(trainer.optimizer.optimizers[0].param_groups[0]["lr"])
    )
    assert rates == [CONFIG.learning_rate_at(step) for step in range(6)]


def test_gradients_are_clipped(tmp_path: Path) -> None:
    trainer = Trainer(make_task(), dataclasses.replace(CONFIG, steps=1, max_grad_norm=1e-3), tmp_path)
    trainer.run()
    norm = torch.stack([p.grad.norm() for p in trainer.parameters.values() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-2)


# The average ---------------------------------------------------------------------------------------------------------


def test_the_average_is_the_average(tmp_path: Path) -> None:
    """Against the recursion written out over the weights seen after every step."""
    config = dataclasses.replace(CONFIG, ema_decay=0.35)  # reached at the fifth step: both branches of the decay
    task = make_task()
    by_hand = {name: p.detach().double().clone() for name, p in task.model.named_parameters()}
    trainer = Trainer(task, config, tmp_path)

    def average(step: int, loss: float) -> None:
        decay = min(0.35, step / (9 + step))  # the index of the step just made is step - 1
        for name, parameter in task.model.named_parameters():
            by_hand[name] = decay * by_hand[name] + (1 - decay) * parameter.detach().double()

    trainer.run(log_every=1, on_log=average)
    raw = values(task)
    saved = load_model(tmp_path).state_dict()
    for name, wanted in by_hand.items():
        torch.testing.assert_close(trainer.average[name].double(), wanted, rtol=0, atol=1e-6)
        assert torch.equal(saved[name], trainer.average[name]), name
    assert any(not torch.equal(raw[name], saved[name]) for name in raw)


def test_averaged_swaps_and_swaps_back(tmp_path: Path) -> None:
    task = make_task()
    trainer = Trainer(task, CONFIG, tmp_path)
    trainer.run()
    raw, average = values(task), {name: x.clone() for name, x in trainer.average.items()}
    with trainer.averaged():
        assert same(values(task), average)
    assert same(values(task), raw)
    with pytest.raises(KeyError), trainer.averaged():
        raise KeyError
    assert same(values(task), raw)
    assert same(trainer.average, average)


# Checkpoints ---------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupt_at(wanted: int) -> Any:
    def on_log(step: int, loss: float) -> None:
        if step == wanted:
            raise Interrupted

    return on_log


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(kind: str, tmp_path: Path) -> None:
    whole = Trainer(make_task(kind), CONFIG, tmp_path / "whole")
    whole.run()
    with pytest.raises(Interrupted):  # at the fifth step, two after a checkpoint
        Trainer(make_task(kind), CONFIG, tmp_path / "cut").run(checkpoint_every=3, log_every=1, on_log=interrupt_at(5))
    torch.manual_seed(77)
    task = make_task(kind)
    if kind == "image":
        for parameter in task.model.parameters():
            parameter.data.fill_(0.5)  # all of it must come from the checkpoint
    resumed = Trainer(task, CONFIG, tmp_path / "cut", resume=True)
    assert resumed.step == 3
    resumed.run()
    assert same(values(task), values(whole.task))
    assert same(resumed.average, whole.average)
    for name in ("model.safetensors", "training.safetensors", "config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_finished_run_resumes_to_nothing(tmp_path: Path) -> None:
    Trainer(make_task(), CONFIG, tmp_path).run()
    task = make_task()
    resumed = Trainer(task, CONFIG, tmp_path, resume=True)
    resumed.run(on_log=lambda step, loss: pytest.fail("trained on"))
    assert resumed.step == CONFIG.steps


def test_an_occupied_folder_is_refused(tmp_path: Path) -> None:
    Trainer(make_task(), dataclasses.replace(CONFIG, steps=1), tmp_path / "run").run()
    save_model(make_task().model, tmp_path / "model")
    for folder in ("run", "model"):
        before = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        with pytest.raises(FileExistsError, match=f"{folder} holds a model or a run: continue it with resume"):
            Trainer(make_task(), CONFIG, tmp_path / folder)
        assert {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} == before


@pytest.mark.parametrize(
    ("config", "task", "message"),
    [
        ({"learning_rate": 0.1}, {}, r"learning_rate=0.005 \(now 0.1\)$"),
        ({"steps": 9, "ema_decay": 0.9}, {}, r"steps=6 \(now 9\), ema_decay=0.9995 \(now 0.9\)$"),
        ({}, {"seed": 3}, r"seed=0 \(now 3\)$"),
        ({}, {"batch_size": 5}, r"batch_size=4 \(now 5\)$"),
        ({}, {"drop_text": 0.2}, r"drop_text=0.1 \(now 0.2\)$"),
    ],
)
def test_changed_settings_are_named(config: dict[str, Any], task: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        Trainer(make_task(), CONFIG, tmp_path).run(checkpoint_every=1, log_every=1, on_log=interrupt_at(2))
    with pytest.raises(ValueError, match=f"was trained with other settings: {message}"):
        Trainer(make_task(**task), dataclasses.replace(CONFIG, **config), tmp_path, resume=True)


def test_other_frozen_weights_make_another_run(tmp_path: Path) -> None:
    Trainer(make_task("video"), CONFIG, tmp_path).run()
    other = make_task("video")
    assert isinstance(other.model, STUNet)
    next(other.model.unet.parameters()).data.add_(1)
    with pytest.raises(ValueError, match="was trained with other settings: frozen_weights="):
        Trainer(other, CONFIG, tmp_path, resume=True)


def test_a_file_is_no_folder_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(FileExistsError, match="file is a file; a run needs a folder"):
        Trainer(make_task(), CONFIG, tmp_path / "file")


def test_a_run_of_another_architecture_names_the_first_key(tmp_path: Path) -> None:
    Trainer(make_task(), CONFIG, tmp_path).run()
    other = UNet2D(tiny_config(sample_size=8, text_embed_dim=64, time_embed_dim=24))
    task = dataclasses.replace(make_task(), model=other)
    with pytest.raises(
        ValueError, match=r"training\.safetensors: these weights are of another architecture: '\S+' has"
    ):
        Trainer(task, CONFIG, tmp_path, resume=True)


def test_nothing_to_resume_is_told(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"training\.safetensors is missing: there is no run to resume"):
            Trainer(make_task(), CONFIG, folder, resume=True)


def test_a_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    name = "training.safetensors"
    Trainer(make_task(), CONFIG, tmp_path).run()
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{name} is truncated or not a safetensors"):
        Trainer(make_task(), CONFIG, tmp_path, resume=True)


def test_the_log_holds_the_mean_loss(tmp_path: Path) -> None:
    losses: list[float] = []
    single = Trainer(make_task(), CONFIG, tmp_path / "single")
    single.run(log_every=1, on_log=lambda step, loss: losses.append(loss))
    means: list[tuple[int, float]] = []
    Trainer(make_task(), CONFIG, tmp_path / "mean").run(log_every=2, on_log=lambda *row: means.append(row))
    assert [step for step, _ in means] == [2, 4, 6]
    assert [loss for _, loss in means] == pytest.approx([sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)])
    with (tmp_path / "mean" / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [2, 4, 6]
    assert [float(row["loss"]) for row in rows] == pytest.approx([loss for _, loss in means], abs=1e-5)
    assert all(float(row["seconds_per_step"]) > 0 for row in rows)


def test_the_first_mean_after_a_resume_is_of_the_steps_made(tmp_path: Path) -> None:
    losses: list[float] = []
    Trainer(make_task(), CONFIG, tmp_path / "whole").run(log_every=1, on_log=lambda step, loss: losses.append(loss))
    with pytest.raises(Interrupted):
        Trainer(make_task(), CONFIG, tmp_path / "cut").run(checkpoint_every=1, log_every=2, on_log=interrupt_at(4))
    means: list[tuple[int, float]] = []
    resumed = Trainer(make_task(), CONFIG, tmp_path / "cut", resume=True)
    assert resumed.step == 3
    resumed.run(log_every=2, on_log=lambda *row: means.append(row))
    assert means[0] == (4, pytest.approx(losses[3]))


def test_settings_are_plain_json(tmp_path: Path) -> None:
    Trainer(make_task(), dataclasses.replace(CONFIG, steps=1), tmp_path).run()
    run = json.loads(read_metadata(tmp_path / "training.safetensors")["run"])
    assert run["step"] == 1
    assert run["settings"]["batch_size"] == 4
    assert run["settings"]["schedule"]["train_mean"] == EDMSchedule().train_mean


@pytest.mark.parametrize("steps", [0, -3])
def test_fewer_than_one_step_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps must be >= 1, got {steps}"):
        TrainingConfig(steps=steps)


# The stages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        ("t2v", {}, "stage must be one of t2i, inflate, ssr, got 't2v'"),
        ("inflate", {}, "stage 'inflate' needs a source folder"),
        ("t2i", {"steps": 0}, "steps must be >= 1, got 0"),
        ("t2i", {"batch_size": 0, "steps": 1}, "batch_size=0"),
    ],
)
def test_bad_stages_are_refused(stage: str, arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(stage, tmp_path / "out", **arguments)


@pytest.mark.parametrize(("stage", "kind"), [("t2i", "ssr image"), ("ssr", "image"), ("t2i", "video")])
def test_a_stage_goes_on_from_a_model_of_its_own_kind(stage: str, kind: str, tmp_path: Path) -> None:
    save_model(make_task(kind).model, tmp_path / "model")
    with pytest.raises(ValueError, match=f"model holds no model of stage '{stage}'"):
        train(stage, tmp_path / "out", source=tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        train(stage, tmp_path / "out", source=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_the_inflate_stage_adds_to_an_image_model_and_goes_on_from_a_video_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2D(tiny_config(3, ssr=True, sample_size=16, text_embed_dim=64))
    save_model(unet, tmp_path / "image")
    train("inflate", tmp_path / "video", source=tmp_path / "image", steps=1, batch_size=1)
    video = load_model(tmp_path / "video")
    assert isinstance(video, STUNet)
    assert same(video.unet.state_dict(), unet.state_dict())
    train("inflate", tmp_path / "more", source=tmp_path / "video", steps=1, batch_size=1, learning_rate=1e-9)
    more = load_model(tmp_path / "more")
    for name, tensor in video.state_dict().items():
        torch.testing.assert_close(more.state_dict()[name], tensor, rtol=0, atol=1e-6)
