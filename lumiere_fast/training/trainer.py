"""The training loop: a learning rate with warm-up and decay, an exponential moving average, checkpoints that resume.

A run's folder holds `config.json` and `model.safetensors` (the averaged weights, loadable by `load_model` at any time),
`training.safetensors` (raw weights, average, optimiser moments; settings and step as its metadata) and `log.csv`.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lumiere_fast.models.io import (
    WEIGHTS_NAME,
    load_weights,
    read_metadata,
    read_safetensors,
    save_file_atomically,
    save_model,
)
from lumiere_fast.training.optimizer import MuonAdamW
from lumiere_fast.training.tasks import DenoisingTask

STATE_NAME = "training.safetensors"
LOG_NAME = "log.csv"


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
    """

    def __init__(self, task: DenoisingTask, config: TrainingConfig, folder: Path, *, resume: bool = False) -> None:
        self.task = task
        self.config = config
        self.folder = folder
        self.step = 0
        self.parameters = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
        self.optimizer = MuonAdamW(self.parameters, weight_decay=config.weight_decay)
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.settings = self._settings()
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file; a run needs a folder")
        if resume:
            self._restore()
        elif any((folder / name).exists() for name in (STATE_NAME, WEIGHTS_NAME)):
            raise FileExistsError(f"{folder} holds a model or a run: continue it with resume, or choose another folder")

    def run(
        self, *, checkpoint_every: int = 500, log_every: int = 50, on_log: Callable[[int, float], None] | None = None
    ) -> None:
        """Train to `config.steps`, saving every `checkpoint_every` steps and at the end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.task.model.train()
        losses, started = [], time.perf_counter()
        while self.step < self.config.steps:
            losses.append(self._train_step())
            self.step += 1
            if self.step % log_every == 0:
                loss = torch.stack(losses).mean().item()  # waits for the device, so that the time below is the steps'
                self._log(loss, (time.perf_counter() - started) / len(losses))
                if on_log is not None:
                    on_log(self.step, loss)
                losses, started = [], time.perf_counter()
            if self.step % checkpoint_every == 0 or self.step == self.config.steps:
                self.save()

    def _train_step(self) -> Tensor:
        loss = self.task.loss(self.step)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        self.optimizer.step(self.config.learning_rate_at(self.step))
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)
        return loss.detach()

    def _log(self, loss: float, seconds_per_step: float) -> None:
        path = self.folder / LOG_NAME
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", "loss", "seconds_per_step"])
            writer.writerow([self.step, f"{loss:.5f}", f"{seconds_per_step:.4f}"])

    def save(self) -> None:
        """Write the checkpoint, then the averaged model."""
        state = {f"raw.{name}": p.detach() for name, p in self.parameters.items()}
        state |= {f"average.{name}": average for name, average in self.average.items()}
        state |= self.optimizer.state()
        run = json.dumps({"step": self.step, "settings": self.settings})
        contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file_atomically(contiguous, self.folder / STATE_NAME, metadata={"run": run})
        with self.averaged():
            save_model(self.task.model, self.folder)

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
        settings = run["settings"]
        changed = [key for key, value in settings.items() if self.settings.get(key) != value]
        if changed:
            raise ValueError(
                f"{self.folder} was trained with other settings: "
                + ", ".join(f"{key}={settings[key]} (now {self.settings.get(key)})" for key in changed)
            )
        raw = {name.removeprefix("raw."): tensor for name, tensor in state.items() if name.startswith("raw.")}
        frozen = {k: v for k, v in self.task.model.state_dict().items() if k not in self.parameters}
        load_weights(self.task.model, {**frozen, **raw}, path)
        self.step = int(run["step"])
        self.optimizer.load_state(state, self.step)
        for name, average in self.average.items():
            average.copy_(state[f"average.{name}"])


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
