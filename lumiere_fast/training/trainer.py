"""The training loop: a learning rate with warm-up and decay, an exponential moving average, checkpoints that resume.

A run's folder holds the averaged model (loadable by `load_model` at any time), `training.safetensors` (raw weights,
average, optimiser moments, losses not yet logged; settings and step as its metadata), `log.csv` and `loss.png`.

A run that is interrupted, even killed, and resumed ends in the same weights, average, moments and log (but for its
times) as one that is not, on the same machine with the same number of threads: data and noise are functions of (seed,
step), and all else is in the checkpoint, which takes the place of the last one in one step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lumiere_fast.models.io import (
    CONFIG_NAME,
    load_weights,
    read_metadata,
    read_safetensors,
    save_file_atomically,
    save_model,
)
from lumiere_fast.training.lock import check_no_file
from lumiere_fast.training.log import LOG_NAME, LogRow, append_row, keep_rows_until
from lumiere_fast.training.loss_curve import MISSING, can_draw, draw_loss_curve
from lumiere_fast.training.optimizer import MuonAdamW, check_tensor
from lumiere_fast.training.tasks import DenoisingTask

STATE_NAME = "training.safetensors"
LOSSES_KEY = "unlogged_losses"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a run; a resumed run must have the same.

    The learning rate rises over `warmup_steps`, holds, and falls linearly to 0 over the last `decay_fraction` of steps.
    The average's decay is `min(ema_decay, (1 + step) / (10 + step))`.

    Raises:
        ValueError: a setting is no number, or out of its range; names it.
    """

    steps: int
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    decay_fraction: float = 0.4
    weight_decay: float = 0.01  # times the learning rate
    ema_decay: float = 0.9995
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")
        for name in ("learning_rate", "warmup_steps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)}")
        for name in ("decay_fraction", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0, got {self.max_grad_norm}")

    def learning_rate_at(self, step: int) -> float:
        """Of the step with this index, from 0."""
        warmup = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        decay = min(1.0, (self.steps - step) / max(self.decay_fraction * self.steps, 1.0))
        return self.learning_rate * warmup * decay


class Trainer:
    """Trains the parameters of `task.model` that require gradients, in `folder`.

    Args:
        resume: continue from the folder's last checkpoint. Without it a folder that holds a run is refused.

    Raises:
        FileExistsError: the folder holds a model or a run, or is a file.
        FileNotFoundError: there is no run to resume.
        ValueError: the run to resume had other settings, and each of them is named, then and now; or its checkpoint is
            damaged.
    """

    def __init__(self, task: DenoisingTask, config: TrainingConfig, folder: Path, *, resume: bool = False) -> None:
        self.task = task
        self.config = config
        self.folder = folder
        self.step = 0
        self.parameters = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
        self.optimizer = MuonAdamW(self.parameters, weight_decay=config.weight_decay)
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.unlogged: list[Tensor] = []  # losses of the steps since the last row of the log
        self.settings = self._settings()
        check_no_file(folder)
        if resume:
            self._restore()
        elif any((folder / name).exists() for name in (STATE_NAME, CONFIG_NAME, LOG_NAME)):
            raise FileExistsError(
                f"{folder} holds a model or a run: continue it with resume=True (--resume), or choose another folder"
            )

    def run(
        self,
        *,
        checkpoint_every: int = 500,
        log_every: int = 50,
        on_log: Callable[[int, float], None] | None = None,
        on_start: Callable[[], None] | None = None,
    ) -> None:
        """Train to `config.steps`, saving at the start, every `checkpoint_every` steps and at the end.

        Nothing is written before the first gradients are there: data that cannot be read, or a batch that does not fit
        into memory, leave no run behind.

        Args:
            on_log: called with (step, mean loss) at each row of the log.
            on_start: called before the first checkpoint is written.

        Raises:
            ValueError: weights are no longer finite, and the last checkpoint is from before; or the log is damaged.
            OSError: a file cannot be written; names it.
        """
        for name, every in (("checkpoint_every", checkpoint_every), ("log_every", log_every)):
            if every < 1:
                raise ValueError(f"{name} must be >= 1, got {every}")
        keep_rows_until(self.folder / LOG_NAME, self.step)
        if not can_draw():
            logger.warning(MISSING)
        self.task.model.train()
        timed, started = 0, time.perf_counter()
        loss = self._gradients() if self.step < self.config.steps else None
        if on_start is not None:
            on_start()
        self._save_first()
        while self.step < self.config.steps:
            self.unlogged.append(self._gradients() if loss is None else loss)
            loss = None
            self._update()
            self.step += 1
            timed += 1
            last = self.step == self.config.steps
            if self.step % log_every == 0 or last:
                mean = torch.stack(self.unlogged).mean().item()  # waits for the device: the time is then the steps'
                self._log(mean, (time.perf_counter() - started) / timed)
                if on_log is not None:
                    on_log(self.step, mean)
                self.unlogged, timed, started = [], 0, time.perf_counter()
            if self.step % checkpoint_every == 0 or last:
                self.save()

    def _gradients(self) -> Tensor:
        """Of the mean loss of the next step, which is returned."""
        self.optimizer.zero_grad()
        losses = []
        for loss in self.task.losses(self.step):
            (loss / self.task.gradient_accumulation_steps).backward()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def _update(self) -> None:
        """Step along the gradients."""
        nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        self.optimizer.step(self.config.learning_rate_at(self.step))
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)

    def _log(self, loss: float, seconds_per_step: float) -> None:
        rate = self.config.learning_rate_at(self.step - 1)
        append_row(self.folder / LOG_NAME, LogRow(self.step, loss, rate, seconds_per_step))

    def _save_first(self) -> None:
        """A run that is killed from here on resumes; one that was killed in `save` gets the rest of it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new = not (self.folder / STATE_NAME).exists()
        try:
            self.save()
        except OSError:
            if new:  # without its model the checkpoint of nothing would only be in the way of the next try
                (self.folder / STATE_NAME).unlink(missing_ok=True)
            raise

    def save(self) -> None:
        """Write the checkpoint, then the averaged model and the picture of the log."""
        self._check_finite()
        state = {f"raw.{name}": p.detach() for name, p in self.parameters.items()}
        state |= {f"average.{name}": average for name, average in self.average.items()}
        state |= self.optimizer.state()
        if self.unlogged:
            state[LOSSES_KEY] = torch.stack(self.unlogged)
        run = json.dumps({"step": self.step, "settings": self.settings})
        contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file_atomically(contiguous, self.folder / STATE_NAME, metadata={"run": run})
        with self.averaged():
            save_model(self.task.model, self.folder)
        if can_draw() and (self.folder / LOG_NAME).exists():
            draw_loss_curve(self.folder)

    def _check_finite(self) -> None:
        """A checkpoint of lost weights would take the place of the last good one."""
        norms = torch.stack(torch._foreach_norm(list(self.parameters.values())))
        if not bool(norms.isfinite().all()):
            raise ValueError(
                f"weights are no longer finite at step {self.step}; the last checkpoint in {self.folder} is kept. "
                "Train with a lower learning_rate, or a longer warm-up"
            )

    def averaged(self) -> _Swap:
        """Context in which the model holds the averaged weights."""
        return _Swap(self.parameters, self.average)

    def _settings(self) -> dict[str, Any]:
        """All that a run depends on besides its architecture, which the checkpoint's keys and shapes tell."""
        return {**dataclasses.asdict(self.config), **self.task.settings(), "frozen_weights": self._frozen_hash()}

    def _frozen_hash(self) -> str:
        """Of the weights that the run does not train: another source folder makes another run."""
        digest = hashlib.sha256()
        for name, tensor in self.task.model.state_dict().items():
            if name not in self.parameters:
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _restore(self) -> None:
        path = self.folder / STATE_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: there is no run to resume")
        state, (step, saved) = read_safetensors(path), _read_run(path)
        changed = [key for key in {**saved, **self.settings} if saved.get(key) != self.settings.get(key)]
        if changed:
            raise ValueError(
                f"{self.folder} was trained with other settings: "
                + ", ".join(f"{key}={saved.get(key)} (now {self.settings.get(key)})" for key in changed)
            )
        raw = {name.removeprefix("raw."): tensor for name, tensor in state.items() if name.startswith("raw.")}
        frozen = {k: v for k, v in self.task.model.state_dict().items() if k not in self.parameters}
        load_weights(self.task.model, {**frozen, **raw}, path)
        try:
            self._restore_step(step, state)
        except ValueError as error:
            raise _damaged(path, str(error)) from error

    def _restore_step(self, step: int, state: dict[str, Tensor]) -> None:
        """All but the weights."""
        if not 0 <= step <= self.config.steps:
            raise ValueError(f"it is of step {step}, the run has {self.config.steps}")
        self.step = step
        self.optimizer.load_state(state, step)
        for name, average in self.average.items():
            check_tensor(state, f"average.{name}", average.shape)
            average.copy_(state[f"average.{name}"])
        if LOSSES_KEY in state:
            check_tensor(state, LOSSES_KEY, torch.Size([state[LOSSES_KEY].numel()]))
            self.unlogged = list(state[LOSSES_KEY].to(self.task.device).unbind())


def _read_run(path: Path) -> tuple[int, dict[str, Any]]:
    """Step and settings in the metadata of a checkpoint; a ValueError where they are not."""
    metadata = read_metadata(path)
    if "run" not in metadata:
        raise _damaged(path, "its metadata has no 'run', the step and settings")
    try:
        run = json.loads(metadata["run"])
    except ValueError as error:
        raise _damaged(path, f"the 'run' of its metadata is not valid JSON ({error})") from error
    if not isinstance(run, dict) or type(run.get("step")) is not int or not isinstance(run.get("settings"), dict):
        raise _damaged(path, "the 'run' of its metadata must be an object with an integer 'step' and 'settings'")
    return run["step"], run["settings"]


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} cannot be resumed from, {what}: restore it from a copy, or train anew in another folder")


class _Swap:
    """Exchanges the values of two sets of tensors on entry, and back on exit."""

    def __init__(self, ours: dict[str, nn.Parameter], theirs: dict[str, Tensor]) -> None:
        self.ours = ours
        self.theirs = theirs

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self.ours.items():
            kept = parameter.clone()
            parameter.copy_(self.theirs[name])
            self.theirs[name].copy_(kept)

    def __enter__(self) -> None:
        self._exchange()

    def __exit__(self, *_: object) -> None:
        self._exchange()
