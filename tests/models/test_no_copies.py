"""A whole video model moves no activation to change its layout, inside its layers and inside the ops they call."""

from __future__ import annotations

import math
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lumiere_fast import STUNet, inflate, native, use_backend
from lumiere_fast.models import blocks
from lumiere_fast.models.blocks import (
    SpatialSelfAttention,
    TemporalSelfAttention,
    TextCrossAttention,
    channels_last_weights,
)
from lumiere_fast.ops import _registry
from tests.models.tiny import draw_inputs, randomise, tiny_unet

BATCH, FRAMES, SIZE = 2, 8, 32

# Operators whose result holds its input's values in other places, and nothing new.
MOVES = (
    *("clone", "copy_", "_to_copy", "_reshape_copy", "contiguous", "cat", "stack", "index", "index_select", "gather"),
    *("flip", "roll", "repeat", "constant_pad_nd", "pixel_shuffle", "masked_fill", "view_copy", "permute_copy"),
)
TORCH = "torch"  # the place of what no line of ours runs
ATTENTION = (SpatialSelfAttention, TextCrossAttention, TemporalSelfAttention)


def base() -> STUNet:
    """Every kind of block: two levels of convolution blocks, attention at two, a resize of space and time at each."""
    unet = tiny_unet(3, dtype=torch.float32, patch_size=2, sample_size=64)
    model = inflate(unet, temporal_factors=(2, 2), temporal_conditioning=True, temporal_attention_layers=2)
    return channels_last_weights(randomise(model))


def ssr() -> STUNet:
    unet = tiny_unet(3, dtype=torch.float32, patch_size=2, sample_size=64, ssr=True)
    return channels_last_weights(randomise(inflate(unet, temporal_factors=(2, 1), temporal_positions="rotary")))


MODELS = {"base": base, "ssr": ssr}


class Moves(TorchDispatchMode):
    """Every move of a tensor of at least `least` elements: (operator, innermost function of the package)."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.places: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in MOVES and isinstance(result, Tensor) and result.numel() >= self.least:
            ours = [frame for frame in traceback.extract_stack() if "/lumiere_fast/" in frame.filename]
            place = f"{ours[-1].filename.split('/lumiere_fast/')[1]}: {ours[-1].name}" if ours else TORCH
            self.places.append((name, place))
        return result

    def outside_ops(self) -> Counter[tuple[str, str]]:
        return Counter(place for place in self.places if not place[1].startswith("ops/"))


def smallest_activation(model: STUNet) -> int:
    """Elements of the activation of the level that has the fewest: the finest's cells, halved in space each level."""
    config, factors = model.unet.config, model.inflation_config.temporal_factors
    side = SIZE // config.patch_size
    return min(
        BATCH * width * FRAMES // math.prod(factors[:level]) * (side >> level) ** 2
        for level, width in enumerate(config.block_out_channels)
    )


def entered(model: STUNet) -> dict[str, Any]:
    """Arguments as they are after the entry: in channels_last_3d memory, the prompts read."""
    inputs: dict[str, Any] = draw_inputs(model, BATCH, FRAMES, SIZE, SIZE)
    clips = [name for name, x in inputs.items() if x.ndim == 5]
    for name in clips:
        inputs[name] = inputs[name].contiguous(memory_format=torch.channels_last_3d)
    text = model.prepare_text(inputs.pop("encoder_hidden_states"), inputs.pop("encoder_attention_mask"))
    return inputs | {"encoder_hidden_states": text}


@contextmanager
def kernels_called_straight() -> Iterator[None]:
    """Ops run as where nothing watches, not as opaque operators: a dispatch mode then sees into them."""
    with mock.patch.object(_registry, "traced", lambda: False):
        yield


def in_training(model: STUNet) -> tuple[Moves, int]:
    """Of one step, and how many of its moves were in the forward pass."""
    inputs = entered(model.train())
    with Moves(smallest_activation(model)) as moves:
        result = model(**inputs)
        forward = len(moves.places)
        result.backward(torch.ones_like(result))
    return moves, forward


# What a model moves for its own sake. In: the conditioning image is joined to the noisy one. Between: a skip is joined
# to the main path. Out: the rows of a cell of 2x2 pixels, neighbours as the last convolution leaves them, take their
# places in two rows of the clip; no strides describe that.
IMAGE = ("cat", "models/unet2d.py: _input")
SKIP = ("cat", "models/unet2d.py: run")
PIXELS = ("clone", "models/unet2d.py: _output")


def allowed(model: STUNet) -> Counter[tuple[str, str]]:
    config = model.unet.config
    return Counter(
        {SKIP: sum(config.layers_per_block), PIXELS: 1} | ({IMAGE: 1} if config.conditioning_channels else {})
    )


def moves_of(model: STUNet) -> Moves:
    inputs = entered(model)
    with torch.no_grad(), kernels_called_straight(), Moves(smallest_activation(model)) as moves:
        model(**inputs)
    return moves


@pytest.mark.skipif(bool(native.why_not("cpu")), reason="of the native core")
@pytest.mark.parametrize("kind", MODELS)
def test_a_video_model_moves_no_activation(kind: str) -> None:
    """On the backends that a call chooses, their wrappers included; on a CPU the native core's."""
    model = MODELS[kind]()
    assert Counter(moves_of(model).places) == allowed(model)


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_is_moved_between_the_references_of_the_ops(kind: str) -> None:
    model = MODELS[kind]()
    with use_backend("reference"):
        assert moves_of(model).outside_ops() == allowed(model)


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_is_moved_between_the_ops_in_training(kind: str) -> None:
    """Nor by the backward of an op of ours; torch's own moves, as of `unbind`, have none of our lines below them."""
    model = MODELS[kind]()
    moves, forward = in_training(model)
    assert Counter(place for place in moves.places[:forward] if not place[1].startswith("ops/")) == allowed(model)
    assert {line for _, line in moves.places[forward:]} == {TORCH}


def test_a_move_would_be_seen() -> None:
    """One in each attention layer: rows of (B, T, H, W, C) made (B, C, T, H, W) in memory."""
    model = base()
    join_heads = blocks.join_heads
    with mock.patch.object(blocks, "join_heads", lambda attended: join_heads(attended).contiguous()):
        found = moves_of(model).outside_ops() - allowed(model)
    layers = [m for m in model.modules() if isinstance(m, ATTENTION)]
    assert sum(found.values()) >= len(layers) > 6
    assert {operator for operator, _ in found} == {"clone"}


class Formats(TorchDispatchMode):
    """Whether the activations that ops of ours and torch's convolutions make have their channels last."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.seen: dict[str, list[bool]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "lumiere_fast" or name in ("convolution", "cat", "add"):
            for x in result if isinstance(result, tuple) else (result,):
                if x.ndim >= 4 and x.numel() >= self.least:
                    formats = {4: torch.channels_last, 5: torch.channels_last_3d, 6: torch.contiguous_format}
                    self.seen[name].append(x.is_contiguous(memory_format=formats[x.ndim]))
        return result


@pytest.mark.skipif(bool(native.why_not("cpu")), reason="of the native core")
@pytest.mark.parametrize("kind", MODELS)
def test_every_activation_has_its_channels_last(kind: str) -> None:
    model = MODELS[kind]()
    inputs = entered(model)
    with torch.no_grad(), Formats(smallest_activation(model)) as formats:
        result = model(**inputs)
    assert {name for name, seen in formats.seen.items() if not all(seen)} == set()
    kernels = {"group_norm", "temporal_conv", "space_time_downsample", "space_time_upsample"}
    assert kernels | {"convolution", "cat"} <= formats.seen.keys()
    assert result.is_contiguous(memory_format=torch.channels_last_3d)
