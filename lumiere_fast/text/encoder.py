"""What every text encoder offers to the models and pipelines, and what they share."""

from __future__ import annotations

import warnings
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


class PromptWarning(UserWarning):
    """Part of a prompt does not reach the model."""


class Tokens(NamedTuple):
    """A prompt as ids, with what of its text they do not carry.

    Attributes:
        dropped: the end of the prompt that is over the encoder's length, in whole words.
        unknown: words that the encoder does not know.
    """

    ids: tuple[int, ...]
    dropped: str = ""
    unknown: tuple[str, ...] = ()


def as_prompts(prompts: str | Sequence[str]) -> list[str]:
    """The argument of `encode` as a list.

    Raises:
        TypeError: it, or one of its items, is not a string.
        ValueError: it is empty, or a prompt is no valid Unicode.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise TypeError(f"prompts: got {type(prompts).__name__}, expected a string or a sequence of strings")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts[{index}]: got {prompt!r} ({type(prompt).__name__}), expected a string")
        _check_unicode(prompt, index)
    if not prompts:
        raise ValueError('prompts: got an empty sequence, expected at least one prompt ("" is the unconditional one)')
    return list(prompts)


def _check_unicode(prompt: str, index: int) -> None:
    """Python reads bytes of a command line that are not UTF-8 as lone surrogates, which no tokeniser takes."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"prompts[{index}]: {prompt!r} is not valid Unicode: character {error.start} is a lone surrogate, which is "
            "what bytes that are not UTF-8 become; write the prompt in UTF-8"
        ) from error


def text_from(prompt: str, token: int, word_ids: Sequence[int | None], offsets: Sequence[tuple[int, int]]) -> str:
    """The prompt's text from this token on, the token's word whole: what is left of a cut word no longer means it."""
    first = list(word_ids).index(word_ids[token])
    return prompt[offsets[first][0] :].strip()


def word_at(prompt: str, token: int, word_ids: Sequence[int | None], offsets: Sequence[tuple[int, int]]) -> str:
    """The word of the prompt that this token is a piece of."""
    pieces = [span for span, word in zip(offsets, word_ids, strict=True) if word == word_ids[token]]
    return prompt[pieces[0][0] : pieces[-1][1]].strip()


def warn_of_losses(batch: Sequence[Tokens], max_length: int, stacklevel: int = 3) -> None:
    """A `PromptWarning` for each prompt that was cut or has unknown words."""
    for index, tokens in enumerate(batch):
        if tokens.dropped:
            message = f"is longer than {max_length} tokens; dropped from its end: {tokens.dropped!r}"
            warnings.warn(f"prompt {index} {message}", PromptWarning, stacklevel)
        if tokens.unknown:
            words = ", ".join(repr(word) for word in tokens.unknown)
            message = f"has words that the text encoder does not know: {words}; they will not be followed"
            warnings.warn(f"prompt {index} {message}", PromptWarning, stacklevel)


def padded(batch: Sequence[Tokens], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Token ids (B, L), 0 where a row is padded on its right, and the mask (B, L) that is True elsewhere."""
    length = max(len(tokens.ids) for tokens in batch)
    ids = torch.tensor([tokens.ids + (0,) * (length - len(tokens.ids)) for tokens in batch], device=device)
    lengths = torch.tensor([len(tokens.ids) for tokens in batch], device=device)
    return ids, torch.arange(length, device=device) < lengths[:, None]
