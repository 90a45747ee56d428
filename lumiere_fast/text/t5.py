"""T5's encoder as the text encoder, as in Imagen: `transformers` runs it, from a folder on this machine.

The package `transformers` is imported when an encoder is loaded, not before; `pip install lumiere_fast[t5]` brings it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lumiere_fast.text.encoder import TextEmbedding, Tokens, as_prompts, padded, text_from, warn_of_losses, word_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5EncoderModel
    from typing_extensions import Self

MAX_LENGTH = 128  # tokens, Imagen's


class T5TextEncoder:
    """The last hidden states of a frozen T5 encoder, one vector a token; the last token of a prompt is `</s>`.

    So "" is one token, and no mask is all False. A U-Net reads them if its `text_embed_dim` is the encoder's `d_model`
    (t5-v1_1-xxl: 4096).

    Args:
        model: a `transformers.T5EncoderModel`; it is frozen and put in eval mode.
        tokenizer: its tokeniser, a fast one.
        max_length: the most tokens a prompt may have, `</s>` included; None for `MAX_LENGTH`, or the tokeniser's
            `model_max_length` where that is less.

    Raises:
        ValueError: the tokeniser is a slow one, lacks `</s>` or has more tokens than the model.
    """

    def __init__(
        self, model: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
    ) -> None:
        if not tokenizer.is_fast or tokenizer.eos_token_id is None:
            raise ValueError("tokenizer must be a fast one of transformers with an eos_token, as T5's is")
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}: not a pair"
            )
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be >= 1, got {max_length}")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._max_length = max_length or min(MAX_LENGTH, tokenizer.model_max_length)
        tokenizer.model_max_length = self._max_length  # so that a saved tokeniser remembers it

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        tokenizer_folder: str | Path | None = None,
        *,
        torch_dtype: torch.dtype | None = None,
        max_length: int | None = None,
    ) -> Self:
        """Load a T5 folder of transformers: `config.json`, safetensors weights, and its tokeniser. Nothing is fetched.

        Args:
            folder: a whole T5 or its encoder alone.
            tokenizer_folder: where the tokeniser is, if not in `folder` too.
            torch_dtype: of the weights; None for float32.

        Raises:
            ModuleNotFoundError: transformers is not installed.
            FileNotFoundError: there is no such folder.
            ValueError: it holds no T5, no safetensors weights (a pickle is never loaded), or not all of them.
        """
        transformers = _transformers()
        folder = Path(folder)
        tokenizer_folder = folder if tokenizer_folder is None else Path(tokenizer_folder)
        _check_folders(folder, tokenizer_folder)
        with _errors_of(folder), _quiet(transformers):
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            if config.model_type != "t5":
                raise ValueError(f"it holds a model of type {config.model_type!r}")
            model, report = transformers.T5EncoderModel.from_pretrained(
                folder,
                config=config,
                dtype=torch_dtype or torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            # Before version 5 what does not fit is told by name, since then by name and shapes.
            misfits = [each if isinstance(each, str) else each[0] for each in report["mismatched_keys"]]
            wrong = [*report["missing_keys"], *misfits]
            if wrong:  # transformers would leave random numbers there
                raise ValueError(f"its weights lack {min(wrong)!r} in the shape of its config.json")
        with _errors_of(tokenizer_folder):
            if (tokenizer_folder / "tokenizer.json").is_file():  # the error of tokenizers would be a bare Exception
                json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
            tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        return cls(model, tokenizer, max_length=max_length)

    def save_pretrained(
        self, folder: str | Path, tokenizer_folder: str | Path | None = None, *, max_shard_size: int | str = "10GB"
    ) -> None:
        """Write the encoder, and its tokeniser beside it or into a folder of its own, as transformers does.

        Raises:
            FileExistsError: a folder exists and is not empty.
            OSError: a file could not be written; names the folder.
        """
        folders = [Path(folder)] if tokenizer_folder is None else [Path(folder), Path(tokenizer_folder)]
        for each in folders:
            if each.exists() and (not each.is_dir() or any(each.iterdir())):
                raise FileExistsError(f"{each} exists and is not empty; choose another folder")
        with _quiet(_transformers()), _writing(folders[0]):
            self.model.save_pretrained(folders[0], max_shard_size=max_shard_size)
        with _writing(folders[-1]):
            self.tokenizer.save_pretrained(folders[-1])

    @property
    def name(self) -> str:
        config = self.model.config
        return f"t5-{config.num_layers}x{config.d_model}"

    @property
    def embed_dim(self) -> int:
        return int(self.model.config.d_model)

    @property
    def max_length(self) -> int:
        return self._max_length

    def to(self, device: torch.device | str) -> Self:
        """Move the encoder; returns self. Its dtype stays: some of its layers need their own."""
        self.model.to(torch.device(device))
        return self

    def encode(self, prompts: str | Sequence[str]) -> TextEmbedding:
        """Encode one prompt (B = 1) or several.

        Returns:
            hidden_states (B, L, d_model) float32, whatever the weights' dtype, and mask (B, L) bool, on the encoder's
            device; L the token count of the longest prompt. Padding, on the right, is zero.

        Raises:
            TypeError: `prompts`, or one of them, is not a string.
            ValueError: no prompts, or one that is no valid Unicode.

        Warns:
            PromptWarning: a prompt is longer than `max_length` tokens, naming the words dropped from its end; or it has
                words that are `<unk>`, naming them.
        """
        batch = [self._tokenise(prompt) for prompt in as_prompts(prompts)]
        warn_of_losses(batch, self.max_length)
        ids, mask = padded(batch, self.model.device)
        with torch.no_grad():
            hidden_states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return TextEmbedding(hidden_states.float() * mask.unsqueeze(-1), mask)

    def _tokenise(self, prompt: str) -> Tokens:
        """Ids of a prompt, `</s>` last, cut before it to `max_length`; with what the cut dropped, and unknown words."""
        # Whether the tokeniser's own template adds </s> differs between folders; T5 always wants it. The warning of
        # transformers about long prompts would repeat ours.
        encoded = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets, word_ids = encoded["input_ids"], encoded["offset_mapping"], encoded.word_ids(0)
        kept = self.max_length - 1
        dropped = text_from(prompt, kept, word_ids, offsets) if len(ids) > kept else ""
        lost = [index for index, token in enumerate(ids) if token == self.tokenizer.unk_token_id]
        unknown = dict.fromkeys(word_at(prompt, index, word_ids, offsets) for index in lost)
        return Tokens((*ids[:kept], self.tokenizer.eos_token_id), dropped, tuple(unknown))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModuleNotFoundError(
            "the T5 text encoder needs transformers, which is not installed: pip install lumiere_fast[t5]",
            name="transformers",
        ) from error
    return transformers


def _check_folders(folder: Path, tokenizer_folder: Path) -> None:
    for each in (folder, tokenizer_folder):
        if not each.is_dir():
            raise FileNotFoundError(f"{each} is not a folder; give one on this machine: nothing is downloaded")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'} is missing: not a T5 folder of transformers")
    if not any(folder.glob("*.safetensors")):
        pickles = [path.name for path in sorted(folder.glob("*.bin"))]
        found = f"only {pickles[0]}, a pickle, which can run any code when it is loaded" if pickles else "no weights"
        raise ValueError(
            f"{folder} has {found}: model.safetensors is needed. If you trust a pickle, convert it: python -c "
            f"\"import transformers as t; t.T5EncoderModel.from_pretrained('{folder}').save_pretrained('converted')\""
        )


@contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    """transformers' many errors about a folder, as one ValueError that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, ImportError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{folder}: transformers cannot load this as a T5 encoder: {error}") from error


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """What the disk refuses, as an OSError that names the folder: tokenizers raises no more than an Exception."""
    from safetensors import SafetensorError

    try:
        yield
    except Exception as error:
        if isinstance(error, (OSError, SafetensorError)) or type(error) is Exception:
            raise OSError(f"{folder} could not be written: {error}") from error
        raise


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars of transformers, and not its report of what is missing: that is an error here."""
    logging = transformers.utils.logging
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
