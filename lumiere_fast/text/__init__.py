"""Text encoders: prompts in, one vector a token out. The embedded default is `WordVectorEncoder`."""

from __future__ import annotations

from lumiere_fast.text.encoder import PromptWarning, TextEmbedding, TextEncoder
from lumiere_fast.text.t5 import T5TextEncoder
from lumiere_fast.text.word_vectors import WordVectorEncoder

__all__ = ["PromptWarning", "T5TextEncoder", "TextEmbedding", "TextEncoder", "WordVectorEncoder"]
