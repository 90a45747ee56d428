"""The file in which a call of the pipeline keeps its state, from step to step and from stage to stage."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumiere_fast.diffusion import Generators, clip_generators
from lumiere_fast.models import STUNet
from lumiere_fast.models.io import as_path
from lumiere_fast.pipelines.state import DenoisingState, check_same, load_state, save_state

SUFFIX = ".safetensors"
STAGE, SEEDS = "stage", "seeds"
SAMPLES = 64  # of a tensor, at least, where it has as many


@dataclass(frozen=True)
class Checkpoint:
    """Where a call keeps what it would go on from after an interruption.

    Args:
        path: a name ending in .safetensors; the file is written after every step, and read if it is there.
        keep: leave the file when the call returns, for the caller to remove once the clip is safe.
    """

    path: str | os.PathLike[str]
    keep: bool = False


class Resumption:
    """What an interrupted call left, if anything, and where this one leaves the same.

    Args:
        checkpoint: None for nowhere.

    Raises:
        ValueError: the path is none that could be written, or what lies there is no state of a call.
    """

    def __init__(self, checkpoint: str | os.PathLike[str] | Checkpoint | None) -> None:
        if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
            checkpoint = Checkpoint(checkpoint)
        self.path = None if checkpoint is None else _checked(checkpoint.path)
        self.keep = checkpoint is not None and checkpoint.keep
        self.stage: str | None = None
        self._state: DenoisingState | None = None
        self._found: dict[str, Any] = {}
        self._about: dict[str, Any] = {}
        if self.path is not None and self.path.exists():
            self._state, self._found = load_state(self.path)
            self.stage = self._found.pop(STAGE, None)
            if not isinstance(self.stage, str) or not isinstance(self._found.get(SEEDS), list):
                raise ValueError(f"{self.path} is the state of some other run, not of a pipeline's call")

    def generators(self, generator: Generators, count: int, device: torch.device) -> list[torch.Generator]:
        """As `clip_generators`; of a call that goes on without a generator, those that it began with."""
        if generator is None and self._found:
            return [torch.Generator(device).manual_seed(seed) for seed in self._found[SEEDS]]
        return clip_generators(generator, count, device)

    def check(self, about: dict[str, Any], generators: list[torch.Generator]) -> None:
        """Raise a ValueError naming every setting in which this call differs from the interrupted one."""
        seeds = {SEEDS: [generator.initial_seed() for generator in generators]}
        self._about = json.loads(json.dumps(about | seeds))  # tuples are lists in a file
        if self._found:
            try:
                check_same(self._about, self._found)
            except ValueError as error:
                raise ValueError(f"{self.path}: {error}; give the same, or remove the file to begin anew") from error

    def state(self, stage: str) -> DenoisingState | None:
        """To go on from in this stage; None where it is to begin."""
        return self._state if stage == self.stage else None

    def saver(self, stage: str, source: Tensor | None = None) -> Callable[[DenoisingState], None] | None:
        """What keeps the states of a stage, and with them the clip that an earlier one made."""
        if self.path is None:
            return None
        path, about = self.path, self._about | {STAGE: stage}
        return lambda state: save_state(path, replace(state, source=source), about)

    def finish(self) -> None:
        if self.path is not None and not self.keep:
            self.path.unlink(missing_ok=True)


def _checked(path: str | os.PathLike[str]) -> Path:
    checked = as_path(path)
    if checked.suffix != SUFFIX:
        raise ValueError(f"checkpoint {str(path)!r}: the name of a file that ends in {SUFFIX} is needed")
    if checked.is_dir():
        raise ValueError(f"checkpoint {str(path)!r} is a folder; name a file")
    if not checked.parent.is_dir():
        raise ValueError(
            f"checkpoint {str(path)!r}: the folder {str(checked.parent)!r} does not exist; create it first"
        )
    return checked


def fingerprint(model: STUNet) -> str:
    """Tells one model's weights from another's: of its settings, and of some numbers of every tensor."""
    parameters = dict(model.named_parameters())
    digest = hashlib.sha256(repr((model.unet.config, model.inflation_config, [*parameters])).encode())
    some = [p.detach().flatten()[:: max(1, p.numel() // SAMPLES)] for p in parameters.values()]
    digest.update(content(torch.cat([numbers.double() for numbers in some])))
    return digest.hexdigest()[:16]


def content(tensor: Tensor) -> bytes:
    return tensor.cpu().flatten().view(torch.uint8).numpy().tobytes()
