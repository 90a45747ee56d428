"""The loop: what it learns, averages and writes, and that a run cut anywhere goes on as if it had not been."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lumiere_fast import STUNet, UNet2D
from lumiere_fast.diffusion import EDMSchedule
from lumiere_fast.models import io
from lumiere_fast.models.io import load_model, read_metadata, save_model
from lumiere_fast.training import tasks
from lumiere_fast.training.tasks import DenoisingTask
from lumiere_fast.training.trainer import STATE_NAME, Trainer, TrainingConfig
from tests.models.tiny import tiny_config
from tests.training.common import CONFIG, assert_equal_runs, gradients, log_without_times, make_task, same, values

pytest.importorskip("tokenizers", reason="a task encodes captions")

pytestmark = pytest.mark.usefixtures("without_pictures")

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize("parts", [1, 4])
def test_gradients_are_clipped_once_a_step(parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of a step's gradients, cut to the norm: not the mean of cut ones."""
    limit = 1e-3
    norms: list[float] = []
    original = torch.nn.utils.clip_grad_norm_

    def clip(*args: Any, **kwargs: Any) -> Any:
        norms.append(original(*args, **kwargs).item())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    task = make_task(batch_size=8 // parts, gradient_accumulation_steps=parts)
    config = dataclasses.replace(CONFIG, steps=1, max_grad_norm=limit)
    whole = make_task(batch_size=8)
    whole.loss(0).backward()
    wanted = gradients(whole)
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm().item()
    Trainer(task, config, tmp_path).run()
    assert norms == [pytest.approx(norm, rel=1e-4)]
    for name, gradient in gradients(task).items():
        torch.testing.assert_close(gradient, wanted[name] * limit / norm, rtol=1e-3, atol=1e-8)


def test_accumulation_changes_a_run_by_rounding_alone(tmp_path: Path) -> None:
    runs = {"whole": {"batch_size": 8}, "parts": {"batch_size": 2, "gradient_accumulation_steps": 4}}
    for name, settings in runs.items():
        Trainer(make_task(**settings), dataclasses.replace(CONFIG, steps=2), tmp_path / name).run(log_every=1)
    logs = [[float(row["loss"]) for row in log_without_times(tmp_path / name)] for name in runs]
    assert logs[0] == pytest.approx(logs[1], rel=1e-3)


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


RUNS: dict[str, dict[str, Any]] = {
    "image": {},
    "video": {"kind": "video"},
    "accumulated": {"batch_size": 2, "gradient_accumulation_steps": 2},
    "ssr accumulated": {"kind": "ssr video", "batch_size": 1, "gradient_accumulation_steps": 2},
    "folder": {"folder": True, "batch_size": 2},
    "folder accumulated": {"kind": "video", "folder": True, "batch_size": 1, "gradient_accumulation_steps": 2},
    "bf16 accumulated": {"precision": "bf16", "batch_size": 2, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, average, moments, losses not logged yet and the log, which had rows after the checkpoint."""
    monkeypatch.setattr(tasks, "_has_bf16_units", lambda device: True)
    settings = dict(RUNS[name])
    if settings.pop("folder", False):
        settings["folder"] = request.getfixturevalue("videos")
    config = dataclasses.replace(CONFIG, steps=8)

    def make() -> DenoisingTask:
        return make_task(**settings)

    whole = Trainer(make(), config, tmp_path / "whole")
    whole.run(log_every=2)
    with pytest.raises(Interrupted):  # in the sixth step; checkpoint and log fall apart: at 3 and at 4
        Trainer(make(), config, tmp_path / "cut").run(checkpoint_every=3, log_every=2, on_log=interrupt_at(4))
    assert [row["step"] for row in log_without_times(tmp_path / "cut")] == ["2", "4"]
    torch.manual_seed(77)
    task = make()
    for parameter in task.model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(0.5)  # all of it must come from the checkpoint
    resumed = Trainer(task, config, tmp_path / "cut", resume=True)
    assert resumed.step == 3
    resumed.run(log_every=2)
    assert same(values(task), values(whole.task))
    assert same(resumed.average, whole.average)
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")
    assert [row["step"] for row in log_without_times(tmp_path / "cut")] == ["2", "4", "6", "8"]
    for each in (task, whole.task):
        each.source.close()


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.training.common import CONFIG, make_task
from lumiere_fast.training.trainer import Trainer

countdown = int(sys.argv[2])

def dies(function):
    def call(*args, **kwargs):
        global countdown
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

trainer = Trainer(make_task(), CONFIG, Path(sys.argv[1]))
for name in ("replace", "rename", "unlink", "write_text"):
    setattr(Path, name, dies(getattr(Path, name)))
from safetensors import torch as safetensors
from lumiere_fast.models import io
io.save_file = dies(safetensors.save_file)
trainer.run(checkpoint_every=2, log_every=1)
"""


def test_a_kill_in_the_middle_of_saving_leaves_a_run_that_resumes(tmp_path: Path) -> None:
    """SIGKILL before the n-th change of a file, of several n: the run goes on to the end that it would have had."""
    Trainer(make_task(), CONFIG, tmp_path / "whole").run(checkpoint_every=2, log_every=1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    steps = set()
    for count in (12, 22):
        folder = tmp_path / str(count)
        command = [sys.executable, "-c", KILLED, str(folder), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT)
        assert done.returncode == -signal.SIGKILL, done.stderr
        resumed = Trainer(make_task(), CONFIG, folder, resume=True)
        steps.add(resumed.step)
        resumed.run(checkpoint_every=2, log_every=1)
        assert_equal_runs(tmp_path / "whole", folder)
        assert not list(folder.glob("*.partial*"))
    assert len(steps) > 1


class Killed(BaseException):
    """In place of a signal: nothing may catch it."""


def test_a_run_resumes_from_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above at every change of a file there is, in one process."""
    config = dataclasses.replace(CONFIG, steps=3)
    Trainer(make_task(), config, tmp_path / "whole").run(checkpoint_every=2, log_every=1)
    originals = {name: getattr(Path, name) for name in ("replace", "write_text", "mkdir")}
    for moment in range(1, 100):
        folder = tmp_path / str(moment)
        trainer = Trainer(make_task(), config, folder)
        left = moment

        def dying(name: str) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    raise Killed
                return originals[name](*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in originals:
                patch.setattr(Path, name, dying(name))
            try:
                trainer.run(checkpoint_every=2, log_every=1)
            except Killed:
                pass
            else:
                break
        # before the first checkpoint nothing is there: the run starts anew
        resumed = Trainer(make_task(), config, folder, resume=(folder / STATE_NAME).exists())
        resumed.run(checkpoint_every=2, log_every=1)
        assert_equal_runs(tmp_path / "whole", folder)
    assert 8 < moment < 99


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
        with pytest.raises(FileExistsError, match=f"{folder} holds a model or a run: continue it with resume=True"):
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


def test_a_setting_that_the_checkpoint_does_not_tell_is_named(tmp_path: Path) -> None:
    """A checkpoint from before there was such a setting: nobody knows what it was."""
    old = Trainer(make_task(), dataclasses.replace(CONFIG, steps=1), tmp_path)
    del old.settings["precision"]
    old.run()
    with pytest.raises(ValueError, match=r"other settings: precision=None \(now fp32\)$"):
        Trainer(make_task(), dataclasses.replace(CONFIG, steps=1), tmp_path, resume=True)


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


def rewrite(change: Callable[[dict[str, Tensor], dict[str, str]], None], path: Path) -> None:
    """The checkpoint with its tensors and metadata changed."""
    tensors, metadata = load_file(path), read_metadata(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata or None)


def first_of(tensors: dict[str, Tensor], kind: str) -> str:
    return next(name for name in tensors if name.startswith(f"{kind}."))


def run_is(value: str) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return lambda tensors, metadata: metadata.update(run=value)


def without(kind: str) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        del tensors[first_of(tensors, kind)]

    return change


def longer(kind: str) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        tensors[first_of(tensors, kind)] = torch.zeros(3, 1, 4)

    return change


def at_step(step: int) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        metadata["run"] = json.dumps({**json.loads(metadata["run"]), "step": step})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, metadata: metadata.clear(), "its metadata has no 'run'"),
        (run_is("{"), "the 'run' of its metadata is not valid JSON"),
        (run_is("[]"), "the 'run' of its metadata must be an object with"),
        (run_is('{"step": "6", "settings": {}}'), "the 'run' of its metadata must be an object with"),
        (run_is('{"step": 6}'), "the 'run' of its metadata must be an object with"),
        (at_step(7), "it is of step 7, the run has 6"),
        (without("average"), r"'average\.\S+' is missing"),
        (without("momentum_buffer"), r"'momentum_buffer\.\S+' is missing"),
        (without("exp_avg"), r"'exp_avg\.\S+' is missing"),
        (without("exp_avg_sq"), r"'exp_avg_sq\.\S+' is missing"),
        (longer("average"), r"'average\.\S+' has shape \(3, 1, 4\), the model wants"),
        (longer("exp_avg_sq"), r"'exp_avg_sq\.\S+' has shape \(3, 1, 4\), the model wants"),
        (lambda tensors, metadata: tensors.update(unlogged_losses=torch.zeros(2, 2)), "'unlogged_losses' has shape"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_named(
    change: Callable[[dict[str, Tensor], dict[str, str]], None],
    message: str,
    finished: Path,
    tmp_path: Path,
) -> None:
    name = "training.safetensors"
    (tmp_path / name).write_bytes((finished / name).read_bytes())
    rewrite(change, tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} cannot be resumed from, {message}.*: restore it from a copy, or"):
        Trainer(make_task(), CONFIG, tmp_path, resume=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    Trainer(make_task(), CONFIG, folder).run()
    return folder


def test_a_damaged_log_is_told_before_anything_changes(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "log.csv").write_text("step,loss,learning_rate,seconds_per_step\nsix,1,1,1\n")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match=r"log\.csv, line 2: not a row of a run's log"):
        Trainer(make_task(), CONFIG, tmp_path / "run", resume=True).run()
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_first_batch_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("a.mp4 cannot be read")

    task = make_task()
    with monkeypatch.context() as patch:
        patch.setattr(task.source, "draw", refuse)
        with pytest.raises(ValueError, match=r"a\.mp4 cannot be read"):
            Trainer(task, CONFIG, tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def test_a_full_disk_names_the_file_and_leaves_room_for_the_next_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the checkpoint, or at the model after it: safetensors' own error is not an OSError."""
    for good in (0, 1):
        left = good

        def full(*args: Any, **kwargs: Any) -> None:
            nonlocal left
            if left == 0:
                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
            left -= 1
            save_file(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(io, "save_file", full)
            with pytest.raises(OSError, match=r"\.safetensors.*No space left on device"):
                Trainer(make_task(), CONFIG, tmp_path).run()
        assert not list(tmp_path.iterdir())
    Trainer(make_task(), CONFIG, tmp_path).run()


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


def test_the_log_tells_the_rate_and_ends_with_the_last_step(tmp_path: Path) -> None:
    Trainer(make_task(), CONFIG, tmp_path).run(log_every=4)
    rows = log_without_times(tmp_path)
    assert [row["step"] for row in rows] == ["4", "6"]
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates == pytest.approx([CONFIG.learning_rate_at(3), CONFIG.learning_rate_at(5)], rel=1e-4)


def test_lost_weights_do_not_take_the_place_of_a_checkpoint(tmp_path: Path) -> None:
    task = make_task()
    trainer = Trainer(task, CONFIG, tmp_path)

    def lose(step: int, loss: float) -> None:
        if step == 3:
            next(task.model.parameters()).data.fill_(math.nan)

    with pytest.raises(ValueError, match=r"weights are no longer finite at step 4; the last checkpoint in .* is kept"):
        trainer.run(checkpoint_every=2, log_every=1, on_log=lose)
    resumed = Trainer(make_task(), CONFIG, tmp_path, resume=True)
    assert resumed.step == 2
    resumed.run(checkpoint_every=2, log_every=1)
    Trainer(make_task(), CONFIG, tmp_path / "whole").run(checkpoint_every=2, log_every=1)
    assert_equal_runs(tmp_path / "whole", tmp_path)


def test_settings_are_plain_json(tmp_path: Path) -> None:
    Trainer(make_task(), dataclasses.replace(CONFIG, steps=1), tmp_path).run()
    run = json.loads(read_metadata(tmp_path / "training.safetensors")["run"])
    assert run["step"] == 1
    assert run["settings"]["batch_size"] == 4
    assert run["settings"]["schedule"]["train_mean"] == EDMSchedule().train_mean


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": math.inf}, "learning_rate must be a finite number >= 0, got inf"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number >= 0, got nan"),
        ({"learning_rate": -1e-3}, "learning_rate must be a finite number >= 0, got -0.001"),
        ({"warmup_steps": -1}, "warmup_steps must be a finite number >= 0, got -1"),
        ({"weight_decay": math.nan}, "weight_decay must be a finite number >= 0, got nan"),
        ({"decay_fraction": 1.5}, "decay_fraction must be from 0 to 1, got 1.5"),
        ({"ema_decay": -0.1}, "ema_decay must be from 0 to 1, got -0.1"),
        ({"max_grad_norm": 0}, "max_grad_norm must be above 0, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(steps=1, **settings)


@pytest.mark.parametrize("name", ["checkpoint_every", "log_every"])
def test_a_period_of_no_steps_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        Trainer(make_task(), CONFIG, tmp_path / "run").run(**{name: 0})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("steps", [0, -3])
def test_fewer_than_one_step_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps must be >= 1, got {steps}"):
        TrainingConfig(steps=steps)
