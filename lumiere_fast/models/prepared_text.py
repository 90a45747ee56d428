"""What a U-Net computes of its text alone: made once a generation, and used at every step and in every window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lumiere_fast.models.blocks import TextKeys, autocast_is_on


class TextReader(Protocol):
    """A model that prepares its text."""

    def prepare_text(self, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor) -> PreparedText: ...


@dataclass(frozen=True, eq=False, repr=False)
class PreparedText:
    """Given to a model's `forward` in the place of `encoder_hidden_states`, without a mask. Made by `prepare_text`.

    It is for sampling: make it under `torch.no_grad()`, and again when the weights have changed. In training give
    `forward` the states: what was made under `no_grad` has no graph, and the graph of any other serves one backward.

    Args:
        model: the one that made it and alone can use it, with the weights it had then.
        pooled: (B, E) the text's part of the embedding that scales and shifts the spatial layers.
        layers: what each spatial layer's cross-attention reads, in the order of the walk; None for one without.
        temporal: (B, E) as `pooled`, of the temporal layers where they read the text.
    """

    model: TextReader
    pooled: Tensor
    layers: tuple[TextKeys | None, ...]
    temporal: Tensor | None = None


def as_prepared(
    model: TextReader, text: Tensor | PreparedText, mask: Tensor | None, sample: Tensor, weight: Tensor
) -> PreparedText:
    """`text` prepared for a call of `model`, now if it is not yet.

    Raises:
        ValueError: `text` is neither states nor prepared; the mask is missing, or given beside a prepared text; that is
            another model's, or of another batch, device or dtype than `sample` and `weight` have.
    """
    if not isinstance(text, PreparedText):
        if not isinstance(text, Tensor):
            raise ValueError(
                "encoder_hidden_states must be a tensor, beside its encoder_attention_mask, or what prepare_text "
                f"returned, got {type(text).__name__}"
            )
        if mask is None:
            raise ValueError("encoder_attention_mask is required beside encoder_hidden_states, unless prepare_text did")
        text = model.prepare_text(text, mask)
    elif mask is not None:
        raise ValueError("encoder_attention_mask is part of a prepared text: leave it out")
    if text.model is not model:
        raise ValueError("the text was prepared by another model: use prepare_text of this one")
    wanted = (sample.shape[0], sample.device, _dtype_of_linear(weight))
    for name, given, want in zip(("batch", "device", "dtype"), _kind(text), wanted, strict=True):
        if given != want:
            raise ValueError(f"the text was prepared for {name} {given}, this call has {want}: prepare it again")
    return text


def _kind(text: PreparedText) -> tuple[int, torch.device, torch.dtype]:
    return text.pooled.shape[0], text.pooled.device, text.pooled.dtype


def _dtype_of_linear(weight: Tensor) -> torch.dtype:
    """In which a Linear of such a weight gives its result here: autocast takes all but fp64 to its own dtype."""
    if weight.dtype == torch.float64 or not autocast_is_on(weight.device):
        return weight.dtype
    return torch.get_autocast_dtype(weight.device.type)
