"""A lower bound of the memory that training takes, to refuse at once what could only end in an allocation error."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lumiere_fast.models import STUNet, UNet2D
from lumiere_fast.pipelines.memory import total_memory
from lumiere_fast.training.optimizer import ADAMW_STATE, MUON_STATE, is_matrix
from lumiere_fast.training.tasks import DenoisingTask

# Of one sample at full size, fp32: what is learnt, and its noise.
CLIPS = 2


def check_model_fits(build: Callable[[], UNet2D | STUNet], device: torch.device) -> None:
    """Raise a ValueError if the model that `build` makes cannot be trained in the memory of `device`.

    It is built without its weights. Passing does not mean that it fits: see `least_bytes`.
    """
    try:
        with torch.device("meta"):
            needed = least_bytes(build())
    except (RuntimeError, TypeError) as error:
        if "verflow" not in str(error):  # torch counts elements and bytes in 63 bits
            raise
        raise ValueError("the cascade's models are larger than any memory; give one of smaller models") from error
    _check_fits("this model", needed, device, "give a cascade of smaller models")


def check_step_fits(task: DenoisingTask) -> None:
    """Raise a ValueError if the clips of one step, alone, cannot fit into the memory of the task's device."""
    samples = task.batch_size * task.gradient_accumulation_steps
    elements = CLIPS * samples * 3 * task.source.num_frames * task.spatial.sample_size**2
    advice = "give a smaller batch_size or fewer gradient_accumulation_steps"
    _check_fits(f"with {samples} samples a step", elements * torch.float32.itemsize, task.device, advice)


def _check_fits(what: str, needed: int, device: torch.device, advice: str) -> None:
    memory = total_memory(device)
    if memory is not None and needed > memory:
        raise ValueError(
            f"training {what} takes more than {needed / 2**30:,.1f} GiB of memory, and {device} has "
            f"{memory / 2**30:,.1f}; {advice}"
        )


def least_bytes(model: UNet2D | STUNet) -> int:
    """Weights, and of those that are trained the gradients, averages and the optimiser's moments; no activations."""
    total = 0
    for parameter in model.parameters():
        moments = MUON_STATE if is_matrix(parameter) else ADAMW_STATE
        copies = 3 + len(moments) if parameter.requires_grad else 1
        total += copies * parameter.numel() * parameter.element_size()
    return total
