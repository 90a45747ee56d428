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
from lumiere_fast.training.log import LOG_NAME, LogRow, append_row, keep_rows_until
from lumiere_fast.training.loss_curve import MISSING, can_draw, draw_loss_curve
from lumiere_fast.training.optimizer import MuonAdamW
from lumiere_fast.training.tasks import DenoisingTask

STATE_NAME = "training.safetensors"
LOSSES_KEY = "unlogged_losses"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a run; a resumed run must have the same.

    The learning rate rises over `warmup_steps`, holds, and falls linearly to 0 over the last `decay_fraction` of steps.
    The average's decay is `min(ema_decay, (1 + step) / (10 + step))`.
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
        ValueError: the run to resume had other settings; names each of them, then and now.
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
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file; a run needs a folder")
        if resume:
            self._restore()
        elif any((folder / name).exists() for name in (STATE_NAME, CONFIG_NAME, LOG_NAME)):
            raise FileExistsError(f"{folder} holds a model or a run: continue it with resume, or choose another folder")

    def run(
        self, *, checkpoint_every: int = 500, log_every: int = 50, on_log: Callable[[int, float], None] | None = None
    ) -> None:
        """Train to `config.steps`, saving at the start, every `checkpoint_every` steps and at the end.

        Raises:
            ValueError: weights are no longer finite. The last checkpoint is from before.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        keep_rows_until(self.folder / LOG_NAME, self.step)
        if not can_draw():
            logger.warning(MISSING)
        self.task.model.train()
        self.save()  # a run that is killed from here on resumes; one that was killed in `save` gets the rest of it
        timed, started = 0, time.perf_counter()
        while self.step < self.config.steps:
            self.unlogged.append(self._train_step())
            self.step += 1
            timed += 1
            last = self.step == self.config.steps
            if self.step % log_every == 0 or last:
                loss = torch.stack(self.unlogged).mean().item()  # waits for the device: the time is then the steps'
                self._log(loss, (time.perf_counter() - started) / timed)
                if on_log is not None:
                    on_log(self.step, loss)
                self.unlogged, timed, started = [], 0, time.perf_counter()
            if self.step % checkpoint_every == 0 or last:
                self.save()

    def _train_step(self) -> Tensor:
        self.optimizer.zero_grad()
        losses = []
        for loss in self.task.losses(self.step):
            (loss / self.task.gradient_accumulation_steps).backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        self.optimizer.step(self.config.learning_rate_at(self.step))
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)
        return torch.stack(losses).mean()

    def _log(self, loss: float, seconds_per_step: float) -> None:
        rate = self.config.learning_rate_at(self.step - 1)
        append_row(self.folder / LOG_NAME, LogRow(self.step, loss, rate, seconds_per_step))

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
        state, run = read_safetensors(path), json.loads(read_metadata(path)["run"])
        saved = run["settings"]
        changed = [key for key in {**saved, **self.settings} if saved.get(key) != self.settings.get(key)]
        if changed:
            raise ValueError(
                f"{self.folder} was trained with other settings: "
                + ", ".join(f"{key}={saved.get(key)} (now {self.settings.get(key)})" for key in changed)
            )
        raw = {name.removeprefix("raw."): tensor for name, tensor in state.items() if name.startswith("raw.")}
        frozen = {k: v for k, v in self.task.model.state_dict().items() if k not in self.parameters}
        load_weights(self.task.model, {**frozen, **raw}, path)
        self.step = int(run["step"])
        self.optimizer.load_state(state, self.step)
        for name, average in self.average.items():
            average.copy_(state[f"average.{name}"])
        if LOSSES_KEY in state:
            self.unlogged = list(state[LOSSES_KEY].to(self.task.device).unbind())


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
