from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from lumiere_fast import UNet2D
from lumiere_fast.models import PRESETS
from lumiere_fast.training import memory
from lumiere_fast.training.memory import check_model_fits, check_step_fits, least_bytes
from lumiere_fast.training.trainer import Trainer
from tests.training.common import CONFIG, make_model, make_task

CPU = torch.device("cpu")


@pytest.mark.parametrize("width", [10**7, 10**9, 10**30])
def test_absurd_widths_are_refused_before_they_are_allocated(width: int) -> None:
    widths = (width,) * len(PRESETS["demo"].base.block_out_channels)
    config = dataclasses.replace(PRESETS["demo"].base, block_out_channels=widths)
    with pytest.raises(ValueError, match=r"of memory, and cpu has|larger than any memory; give one of smaller models"):
        check_model_fits(lambda: UNet2D(config), CPU)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_bound_is_what_a_step_leaves_in_memory(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted over the tensors of a trainer that has made a step."""
    pytest.importorskip("tokenizers")
    task = make_task(kind)
    trainer = Trainer(task, CONFIG, tmp_path)
    trainer._gradients()
    trainer._update()
    held = [*task.model.parameters(), *trainer.average.values(), *trainer.optimizer.state().values()]
    held += [p.grad for p in trainer.parameters.values() if p.grad is not None]
    needed = sum(tensor.nbytes for tensor in held)
    assert least_bytes(task.model) == needed
    monkeypatch.setattr(memory, "total_memory", lambda device: needed)
    check_model_fits(lambda: task.model, CPU)
    monkeypatch.setattr(memory, "total_memory", lambda device: needed - 1)
    with pytest.raises(ValueError, match=r"training this model takes more than 0\.0 GiB of memory, and cpu has 0\.0"):
        check_model_fits(lambda: task.model, CPU)
    monkeypatch.setattr(memory, "total_memory", lambda device: None)
    check_model_fits(lambda: task.model, CPU)


def test_a_batch_larger_than_memory_is_refused() -> None:
    check_step_fits(make_task())
    with pytest.raises(
        ValueError, match=r"training with 2000000000 samples a step takes more than .*smaller batch_size"
    ):
        check_step_fits(make_task(batch_size=10**9, gradient_accumulation_steps=2))


def test_other_errors_of_building_are_not_hidden() -> None:
    def build() -> UNet2D:
        raise TypeError("a defect")

    with pytest.raises(TypeError, match="a defect"):
        check_model_fits(build, CPU)
    check_model_fits(make_model, CPU)
