"""The embedded default text encoder: a frozen table of static word vectors, shipped with the package."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from lumiere_fast.text.encoder import TextEmbedding, Tokens, as_prompts, padded, text_from, warn_of_losses, word_at

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

    A word that is not in the vocabulary is read in pieces that are. What nothing can be made of is an unknown word, and
    `encode` warns of it: one with a character that the vocabulary lacks, or with letters other than Latin ones, of
    which the vocabulary has some but the table, made from English text, knows next to nothing.

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
            ValueError: no prompts, or one that is no valid Unicode.
            ImportError: the `tokenizers` package is missing.

        Warns:
            PromptWarning: a prompt is longer than `max_length` tokens, naming the words dropped from its end; or it has
                unknown words, naming them.
        """
        batch = [_tokenise(prompt, self.max_length) for prompt in as_prompts(prompts)]
        warn_of_losses(batch, self.max_length)
        ids, mask = padded(batch, self._table.device)
        return TextEmbedding(self._table[ids] * mask.unsqueeze(-1), mask)


@functools.lru_cache(maxsize=CACHED_PROMPTS)
def _tokenise(prompt: str, max_length: int) -> Tokens:
    """Token ids of a prompt, its BOS token first, cut to `max_length`; with what the cut dropped, and unknown words."""
    encoding = _tokenizer().encode(prompt, add_special_tokens=False)
    kept = max_length - 1
    fits = len(encoding.ids) <= kept
    dropped = "" if fits else text_from(prompt, kept, encoding.word_ids, encoding.offsets)
    pieces = zip(encoding.tokens, encoding.offsets, strict=True)
    lost = [
        i for i, (token, span) in enumerate(pieces) if token == UNKNOWN_TOKEN or not _is_latin(prompt[slice(*span)])
    ]
    unknown = dict.fromkeys(word_at(prompt, index, encoding.word_ids, encoding.offsets) for index in lost)
    return Tokens((BOS_ID, *encoding.ids[:kept]), dropped, tuple(unknown))


def _is_latin(text: str) -> bool:
    """Whether all letters are of the Latin alphabet; digits and punctuation are nobody's."""
    return all(unicodedata.name(letter, "").startswith("LATIN") for letter in text if letter.isalpha())


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
