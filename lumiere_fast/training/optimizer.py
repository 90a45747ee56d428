"""The optimiser: Muon for weight matrices, AdamW for everything else, one learning rate for both.

Muon (Jordan et al. 2024) steps along the orthogonalised momentum, so that every direction of a weight matrix learns at
the same pace; scaled to AdamW's usual update size (Liu et al. 2025) it takes AdamW's rates.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

SMALLEST_MATRIX = 16
ADAMW_STATE = ("exp_avg", "exp_avg_sq")
MUON_STATE = ("momentum_buffer",)


class MuonAdamW:
    """Optimises `parameters` by name; weights with at least 16 rows and columns are matrices, (out, all the rest)."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, weight_decay: float) -> None:
        self.parameters = dict(parameters)
        # Muon wants matrices: a second parameter on the same memory stands in for each weight
        self.matrices = {
            name: nn.Parameter(as_matrix(p.detach(), like=p)) for name, p in parameters.items() if is_matrix(p)
        }
        others = [p for name, p in parameters.items() if name not in self.matrices]
        self.optimizers: list[torch.optim.Optimizer] = []
        if self.matrices:
            self.optimizers.append(
                torch.optim.Muon(self.matrices.values(), weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        if others:
            self.optimizers.append(torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=weight_decay))

    def step(self, learning_rate: float) -> None:
        """Apply the gradients."""
        for name, matrix in self.matrices.items():
            gradient = self.parameters[name].grad
            matrix.grad = None if gradient is None else as_matrix(gradient, like=self.parameters[name])
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """The moments, under "<moment>.<parameter name>": of parameters that have been stepped."""
        states = ((name, state, moments) for name, state, moments in self._states() if state)
        return {f"{moment}.{name}": state[moment] for name, state, moments in states for moment in moments}

    def load_state(self, saved: Mapping[str, Tensor], step: int) -> None:
        """Restore what `state` gave after `step` steps.

        Raises:
            ValueError: a moment is missing or has another shape; names it.
        """
        if step == 0:
            return  # there are none before the first step, which every parameter takes part in
        for name, state, moments in self._states():
            target = self.matrices.get(name, self.parameters[name])
            for moment in moments:
                check_tensor(saved, f"{moment}.{name}", target.shape)
                # laid out like the parameter, as the optimiser makes them: other strides round otherwise
                state[moment] = torch.empty_like(target, requires_grad=False).copy_(saved[f"{moment}.{name}"])
            if moments is ADAMW_STATE:
                state["step"] = torch.tensor(float(step))

    def _states(self) -> list[tuple[str, dict[str, Tensor], tuple[str, ...]]]:
        states: list[tuple[str, dict[str, Tensor], tuple[str, ...]]] = []
        for name, parameter in self.parameters.items():
            matrix = self.matrices.get(name)
            optimizer = self.optimizers[0 if matrix is not None else -1]
            key = parameter if matrix is None else matrix
            states.append((name, optimizer.state[key], ADAMW_STATE if matrix is None else MUON_STATE))
        return states


def check_tensor(saved: Mapping[str, Tensor], name: str, shape: torch.Size) -> None:
    """A ValueError unless `saved` has a tensor of this name and shape."""
    if name not in saved:
        raise ValueError(f"{name!r} is missing")
    if saved[name].shape != shape:
        raise ValueError(f"{name!r} has shape {tuple(saved[name].shape)}, the model wants {tuple(shape)}")


def is_matrix(weight: Tensor) -> bool:
    return weight.ndim >= 2 and min(weight.shape[0], weight[0].numel()) >= SMALLEST_MATRIX


def as_matrix(tensor: Tensor, *, like: Tensor) -> Tensor:
    """(out, everything else) in the memory order of the weight `like`; of the weight itself a view."""
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    if like.ndim == 3 and like.transpose(1, 2).is_contiguous():
        tensor = tensor.transpose(1, 2)
    return tensor.flatten(1)
