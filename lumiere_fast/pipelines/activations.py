"""How much memory a model's activations take, found without computing them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lumiere_fast import dispatch
from lumiere_fast.models import STUNet

MARGIN = {"cpu": 1.75, "cuda": 1.25}
"""What a call takes of a device, at most, for each byte of `peak_bytes`: kernels' scratch, and what the allocator keeps
between blocks. On the CPU by measurement: the demo model's resident memory grows by 1.00 to 1.02 times the count where
malloc gives every block back at once, by 1.25 to 1.6 times, from one run to the next, where it keeps them in its heap.
On a GPU it is a guess: what is too much there is said and tried again with less, on the CPU Linux ends the process."""

TOKENS = 16  # of a prompt; what they take is nothing beside the clip


def peak_bytes(function: Callable[..., Any], *tensors: Tensor) -> int:
    """The most bytes alive at once of what `function(*tensors)` allocates, its results included.

    Nothing is computed, and nothing of size allocated: the call runs on fake tensors (shapes, strides, dtypes and
    devices alone), also where `function` closes over true ones, such as a model's weights. Neither these nor `tensors`
    are counted, and views count once. What a kernel takes and gives back within one operator is not seen: see `MARGIN`.
    """
    mode = detect_fake_mode(tensors) or FakeTensorMode(allow_non_fake_inputs=True)
    live = _LiveStorages()
    with torch.no_grad(), mode, dispatch.record_backends():  # a record of its own: nothing runs on any
        fakes = [mode.from_tensor(tensor) for tensor in tensors]
        with live:
            function(*fakes)
    return live.peak


def forward_bytes(model: STUNet, batch_size: int, num_frames: int, height: int, width: int) -> int:
    """What a call of `model` on clips of this size takes of its device at most, its weights and the clips apart.

    A GPU's kernels count where they are proved (see `evidence`), so the smallest of clips goes through them before.
    """
    weight = model.unet.conv_in.weight
    if weight.device.type == "cuda":
        side = model.unet.config.spatial_factor
        with torch.no_grad():
            _forward(model)(*_inputs(model, 1, model.temporal_factor, side, side, weight))
    with detect_fake_mode([weight]) or FakeTensorMode(allow_non_fake_inputs=True):
        inputs = _inputs(model, batch_size, num_frames, height, width, weight)
    return math.ceil(peak_bytes(_forward(model), *inputs) * MARGIN.get(weight.device.type, max(MARGIN.values())))


def linear_bytes(bytes_of: Callable[[int], int], shortest: int, longest: int) -> Callable[[int], int]:
    """`bytes_of` for all numbers of frames from two calls of it, at the ends: between them activations grow linearly,
    or, where attention keeps its scores, less than the line has it."""
    low, high = bytes_of(shortest), bytes_of(longest)
    slope = (high - low) / max(1, longest - shortest)
    return lambda frames: math.ceil(low + slope * (frames - shortest))


def _forward(model: STUNet) -> Callable[..., Tensor]:
    def forward(sample: Tensor, timestep: Tensor, states: Tensor, mask: Tensor, *image: Tensor) -> Tensor:
        image_conditioning, augmentation_level = (*image, None, None)[:2]
        prediction: Tensor = model(
            sample,
            timestep,
            states,
            mask,
            image_conditioning=image_conditioning,
            augmentation_level=augmentation_level,
        )
        return prediction

    return forward


def _inputs(model: STUNet, batch_size: int, num_frames: int, height: int, width: int, weight: Tensor) -> list[Tensor]:
    """As the pipelines give them: clip and noise level in fp32, text in the weights' dtype."""
    config, device = model.unet.config, weight.device

    def clip(channels: int) -> Tensor:
        return torch.zeros(batch_size, channels, num_frames, height, width, device=device)

    level = torch.zeros(batch_size, device=device)
    states = torch.zeros(batch_size, TOKENS, config.text_embed_dim, dtype=weight.dtype, device=device)
    inputs = [clip(config.in_channels), level, states, torch.ones(batch_size, TOKENS, dtype=torch.bool, device=device)]
    if config.conditioning_channels:
        inputs.append(clip(config.conditioning_channels))
    return [*inputs, level] if config.noise_augmentation else inputs


class _LiveStorages(TorchDispatchMode):
    """Counts the storages that operators make, from when they do until nothing refers to them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if all(returned.alias_info is None for returned in func._schema.returns):  # neither a view nor in place
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self._made(tensor.untyped_storage())
        return result

    def _made(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key, size).atexit = False

    def _freed(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.now -= size
