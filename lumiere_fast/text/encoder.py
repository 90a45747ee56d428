"""What every text encoder offers to the models and pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


class TextEmbedding(NamedTuple):
    """Encoded prompts, right-padded to the longest of the batch.

    Attributes:
        hidden_states: (B, L, embed_dim) float32; rows of padding are zero.
        mask: (B, L) bool, True where there is a token. No row is all False.
    """

    hidden_states: Tensor
    mask: Tensor


class TextEncoder(Protocol):
    """A frozen map from prompts to token vectors.

    Attributes:
        name: identifies encoder and version; a checkpoint records the one it was trained with.
        embed_dim: width of a token vector.
        max_length: the most tokens a prompt may have; longer ones are cut with a warning.
    """

    @property
    def name(self) -> str: ...

    @property
    def embed_dim(self) -> int: ...

    @property
    def max_length(self) -> int: ...

    def encode(self, prompts: str | Sequence[str]) -> TextEmbedding:
        """Encode one prompt (B = 1) or several; "" is the unconditional prompt of classifier-free guidance."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move to `device`, where `encode` then puts its result; returns self."""
        ...
