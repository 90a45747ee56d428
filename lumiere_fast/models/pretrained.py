"""`save_pretrained` and `from_pretrained` of the models, in the folder layout of diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Self

MAX_SHARD_SIZE = 10 * 10**9  # bytes; diffusers' default, "10GB"


class PretrainedModel:
    """Adds the two methods to a model that `lumiere_fast.models.io` knows how to write."""

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = MAX_SHARD_SIZE,
        overwrite: bool = False,
    ) -> None:
        """Write `config.json` and `diffusion_pytorch_model.safetensors`, or its shards and their index.

        Args:
            folder: made if it does not exist.
            dtype: the weights' on disk; None keeps theirs.
            max_shard_size: bytes, or a string such as "2GB"; larger models are split into files of at most this size.
            overwrite: replace the model that `folder` holds. Its other files stay.

        Raises:
            FileExistsError: `folder` is not empty and `overwrite` is false, or what it holds is no such model.
            OSError: a file could not be written; names it.
            ValueError: `folder` is no path, or `max_shard_size` is not as above.
        """
        from lumiere_fast.models import io

        folder = io.as_path(folder)
        io.check_destination(folder, io.CONFIG_NAME, io.MODEL_KINDS, overwrite)
        io.save_model(self, folder, dtype=dtype, max_shard_size=max_shard_size)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, torch_dtype: torch.dtype | None = None) -> Self:
        """Load a folder made by `save_pretrained`, in eval mode, on the CPU.

        Args:
            torch_dtype: of the weights in memory; None for float32, whatever they are on disk.

        Raises:
            FileNotFoundError: the folder or a file of it is missing.
            ValueError: a file is damaged, a pickle or of another architecture, or the folder holds another class.
        """
        from lumiere_fast.models import io

        model: Any = io.load_model(io.as_path(folder), torch_dtype=torch_dtype)
        if not isinstance(model, cls):
            raise ValueError(f"{folder} holds a {type(model).__name__}, not a {cls.__name__}: load it with that class")
        return model
