"""The embedded default text encoder: a frozen table of static word vectors, shipped with the package."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import load_file

from lumiere_fast.text.encoder import TextEmbedding

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from typing_extensions import Self

DATA_DIR = Path(__file__).parent / "data"
BOS_ID = 101  # [CLS] in the shipped vocabulary
UNKNOWN_TOKEN = "[UNK]"
# A training run repeats its captions: keep their token ids (about 1 kB each).
CACHED_PROMPTS = 16384


class WordVectorEncoder:
    """Static word vectors looked up by WordPiece token: no learned parameter, no download, no context.

    The table is MiniLM's input embeddings projected to 64 dimensions and stored as int8 with one scale a row
    (`data/NOTICE`, `tools/make_word_vectors.py`); dequantised it has unit RMS per element. Words of like meaning have
    near vectors, so that a model trained on "rotating" has a fair guess at "spinning". Word order is not encoded: the
    model reading the tokens adds positions if it wants them.

    Every prompt starts with a token of its own (BERT's [CLS] vector), so "" is one token and no mask is all False.

    Args:
        device: where the table lives and `encode` puts its result.
    """

    name = "word-vectors-v1"
    embed_dim = 64
    max_length = 32

    def __init__(self, device: torch.device | str = "cpu") -> None:
        stored = load_file(DATA_DIR / "word_vectors.safetensors")
        self._table = (stored["vectors"].float() * stored["scale"]).to(device)

    def to(self, device: torch.device | str) -> Self:
        """Move the table to `device`; returns self."""
        self._table = self._table.to(device)
        return self

    def encode(self, prompts: str | Sequence[str]) -> TextEmbedding:
        """Look up the tokens of one prompt (B = 1) or of several.

        Returns:
            hidden_states (B, L, 64) float32 and mask (B, L) bool, L the token count of the longest prompt, at most
            `max_length`. Padding, on the right, is zero. A row does not depend on the other prompts but for L.

        Raises:
            TypeError: `prompts`, or one of them, is not a string.
            ValueError: no prompts.
            ImportError: the `tokenizers` package is missing.

        Warns:
            UserWarning: a prompt is longer than `max_length` tokens; names the words dropped from its end.
        """
        batch = [_tokenise(prompt, self.max_length) for prompt in _as_list(prompts)]
        for index, tokens in enumerate(batch):
            if tokens.dropped:
                warnings.warn(
                    f"prompt {index} is longer than {self.max_length} tokens; dropped from its end: {tokens.dropped!r}",
                    stacklevel=2,
                )
        length = max(len(tokens.ids) for tokens in batch)
        # Padding is id -1 until the mask is made: every id of the vocabulary is a real token.
        ids = torch.tensor([tokens.ids + (-1,) * (length - len(tokens.ids)) for tokens in batch])
        ids = ids.to(self._table.device)
        mask = ids >= 0
        return TextEmbedding(self._table[ids.clamp(min=0)] * mask.unsqueeze(-1), mask)


class _Tokens(NamedTuple):
    ids: tuple[int, ...]
    dropped: str


def _as_list(prompts: str | Sequence[str]) -> list[str]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise TypeError(f"prompts: got {type(prompts).__name__}, expected a string or a sequence of strings")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts[{index}]: got {prompt!r} ({type(prompt).__name__}), expected a string")
    if not prompts:
        raise ValueError('prompts: got an empty sequence, expected at least one prompt ("" is the unconditional one)')
    return list(prompts)


@functools.lru_cache(maxsize=CACHED_PROMPTS)
def _tokenise(prompt: str, max_length: int) -> _Tokens:
    """Token ids of a prompt, its BOS token first, cut to `max_length`; and the text that the cut dropped."""
    encoding = _tokenizer().encode(prompt, add_special_tokens=False)
    kept = max_length - 1
    if len(encoding.ids) <= kept:
        return _Tokens((BOS_ID, *encoding.ids), "")
    # A word cut in its middle is named whole: what remains of it no longer means it.
    first_piece = encoding.word_ids.index(encoding.word_ids[kept])
    start, _ = encoding.offsets[first_piece]
    return _Tokens((BOS_ID, *encoding.ids[:kept]), prompt[start:].strip())


@functools.cache
def _tokenizer() -> Tokenizer:
    """BERT's uncased WordPiece over the shipped vocabulary: lower case, accents stripped."""
    try:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    except ImportError as error:
        raise ImportError("the text encoder needs the tokenizers package: pip install tokenizers") from error
    words = (DATA_DIR / "vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN_TOKEN, max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer
