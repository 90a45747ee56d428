"""The attention blocks: how they know the order of frames, what they hand on, and space and time as one module."""

from __future__ import annotations

import copy
import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumiere_fast import InflationConfig, STUNet, inflate, ops
from lumiere_fast.models import FactorizedAttention
from lumiere_fast.models.blocks import (
    AttentionInflationBlock,
    ChannelLinear,
    SpatialLayer,
    SpatialSelfAttention,
    TemporalSelfAttention,
    bias_of_lags,
    sinusoidal_embedding,
)
from lumiere_fast.models.config import TEMPORAL_POSITIONS, config_from_dict, config_to_dict
from tests.models.tiny import draw_inputs, frame_by_frame, of_rows, randomise, tiny_unet

EXACT = {"rtol": 0.0, "atol": 1e-12}


def draw(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last_3d) if x.ndim == 5 else x


def trained(module: nn.Module) -> Any:
    return randomise(module.double())


# Positions -----------------------------------------------------------------------------------------------------------


def turned(x: Tensor) -> Tensor:
    """(N, T, D): each pair of channels as a complex number, times that of its frame and frequency."""
    T, D = x.shape[1:]
    angles = torch.arange(T)[:, None] * 10000.0 ** (-2 * torch.arange(D // 2, dtype=torch.float64) / D)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("positions", TEMPORAL_POSITIONS)
def test_temporal_attention_in_plain_torch(positions: str, conditioned: bool) -> None:
    """Pixel by pixel, head by head; with lags beyond those that the relative bias tells apart."""
    layer = trained(TemporalSelfAttention(16, 8, 4, 12 if conditioned else None, positions, relative_range=3))
    x, embedding = draw(2, 16, 6, 4, 3), draw(2, 12, seed=4) if conditioned else None
    h = torch.stack([F.group_norm(frame, 4, layer.norm.weight, layer.norm.bias) for frame in x.unbind(2)], dim=2)
    if embedding is not None:
        scale, shift = layer.film.scale_shift.proj(F.silu(embedding)).chunk(2, dim=1)
        h = h * (1 + scale[..., None, None, None]) + shift[..., None, None, None]
    pixels = h.permute(0, 3, 4, 2, 1).flatten(0, 2)  # (B*H*W, T, C)
    if positions == "sinusoidal":
        pixels = pixels + sinusoidal_embedding(torch.arange(6), 16)
    mixed = []
    heads = of_rows(layer.to_qkv, pixels).unflatten(-1, (3, 2, 8)).movedim(-2, 0)
    for head, projected in enumerate(heads):
        q, k, v = projected.unbind(-2)
        q, k = (turned(q), turned(k)) if positions == "rotary" else (q, k)
        scores = q @ k.mT / math.sqrt(8)
        if positions == "relative":
            for t in range(6):
                for s in range(6):
                    scores[:, t, s] += layer.relative_bias[head, min(max(t - s, -3), 3) + 3]
        mixed.append(scores.softmax(-1) @ v)
    wanted = x + of_rows(layer.to_out, torch.cat(mixed, -1)).unflatten(0, (2, 4, 3)).permute(0, 4, 3, 1, 2)
    for training in (True, False):  # layer by layer, and fused
        with torch.set_grad_enabled(training):  # positions are made in fp32
            torch.testing.assert_close(layer(x, embedding), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", TEMPORAL_POSITIONS)
def test_the_order_of_frames_matters(positions: str) -> None:
    layer = trained(TemporalSelfAttention(16, 8, 4, None, positions))
    x, order = draw(1, 16, 6, 3, 3), torch.tensor([2, 0, 1, 5, 3, 4])
    assert (layer(x[:, :, order]) - layer(x)[:, :, order]).abs().mean() > 1e-3
    for blind in ("sinusoidal", "rotary"):  # the test can fail: nothing else tells the order
        if positions == blind:
            layer.positions = "none"
            torch.testing.assert_close(layer(x[:, :, order]), layer(x)[:, :, order], **EXACT)


@pytest.mark.parametrize("positions", TEMPORAL_POSITIONS)
@pytest.mark.parametrize("num_frames", [1, 2, 5, 80])
def test_any_number_of_frames(positions: str, num_frames: int) -> None:
    layer = trained(TemporalSelfAttention(8, 4, 2, None, positions, relative_range=4))
    x = draw(1, 8, num_frames, 1, 2)
    assert torch.isfinite(layer(x)).all()


def test_lags_beyond_the_table_are_taken_for_its_ends() -> None:
    table = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0]])
    assert bias_of_lags(table, 2).tolist() == [[-1, 0, 1]]
    assert bias_of_lags(table, 5).tolist() == [[-2, -2, -2, -1, 0, 1, 2, 2, 2]]
    assert bias_of_lags(table, 1).tolist() == [[0]]


@pytest.mark.parametrize("positions", TEMPORAL_POSITIONS)
def test_with_any_positions_a_fresh_video_model_is_the_image_model_and_trains(positions: str) -> None:
    unet = tiny_unet(2)
    stunet = inflate(copy.deepcopy(unet), temporal_factors=(2,), temporal_positions=positions)
    inputs = draw_inputs(unet, 2, 8, 8, 8)
    torch.testing.assert_close(stunet(**inputs)[:, :, ::2], frame_by_frame(unet, inputs, 2), **EXACT)
    randomise(stunet.temporal)
    stunet(**inputs).square().mean().backward()
    assert [name for name, p in stunet.new_parameters().items() if p.grad is None or not p.grad.any()] == []
    learned = [name for name in stunet.new_parameters() if name.endswith("relative_bias")]
    assert len(learned) == (4 if positions == "relative" else 0)


def test_the_default_positions_have_no_parameters() -> None:
    names = {name for name, _ in TemporalSelfAttention(8, 4, 2, None).named_parameters()}
    parts = ("norm", "to_qkv", "to_out")
    assert names == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}


def test_positions_are_part_of_the_configuration() -> None:
    config = InflationConfig((2, 2), temporal_positions="relative", relative_range=7)
    assert config_from_dict(InflationConfig, config_to_dict(config)) == config
    before = {"temporal_factors": [2], "temporal_kernel_size": 3, "temporal_attention_layers": 1, "text_layers": 2}
    assert config_from_dict(InflationConfig, before).temporal_positions == "sinusoidal"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temporal_positions": "learned"}, "temporal_positions must be one of sinusoidal, relative, rotary"),
        ({"relative_range": 0}, "relative_range must be an integer >= 1, got 0"),
        ({"relative_range": 2.5}, "relative_range must be an integer >= 1, got 2.5"),
    ],
)
def test_other_positions_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InflationConfig((2,), **fields)


def test_rotary_positions_want_pairs_of_channels() -> None:
    unet = tiny_unet(2, block_out_channels=(12, 12), attention_head_dim=3)
    with pytest.raises(ValueError, match="turns pairs of channels: a head must be even, got 3"):
        inflate(unet, temporal_factors=(1,), temporal_positions="rotary")
    assert isinstance(inflate(unet, temporal_factors=(1,)), STUNet)


# What is handed on ---------------------------------------------------------------------------------------------------


def calls_of(function: Any) -> list[str]:
    """The ops that the function calls without gradients, in order."""
    calls: list[str] = []
    names = ("group_norm", "group_norm_stats", "temporal_conv", "temporal_attention", "spatial_attention")

    def recorded(name: str) -> Any:
        op = getattr(ops, name)
        return lambda *args, **options: (calls.append(name), op(*args, **options))[1]

    with mock.patch.multiple(ops, **{name: recorded(name) for name in names}), torch.no_grad():
        function()
    return calls


def test_each_layer_takes_the_statistics_that_the_one_before_hands_on() -> None:
    block, x = trained(AttentionInflationBlock(16, 8, 4, 3, None)), draw(1, 16, 4, 3, 3)
    layer = ["temporal_conv", "temporal_attention", "temporal_conv"]
    assert calls_of(lambda: block(x, None)) == ["group_norm_stats", *layer, *layer, *layer, "temporal_conv"]

    space = SpatialLayer(16, 16, 20, 4, attention=(8, 12)).double()
    text = space.text_keys(draw(1, 5, 12), torch.ones(1, 5, dtype=torch.bool))
    layer = ["temporal_conv", "spatial_attention", "temporal_conv"]
    resnet = ["group_norm", "group_norm"]
    assert calls_of(lambda: space(x, draw(1, 20), text)) == [*resnet, "group_norm_stats", *layer, *layer]


@pytest.mark.parametrize(
    "make",
    [
        lambda: AttentionInflationBlock(16, 8, 4, 3, 12),
        lambda: SpatialLayer(16, 16, 12, 4, attention=(8, 12)),
    ],
)
def test_fused_blocks_are_the_blocks_of_training(make: Any) -> None:
    block, x, embedding = trained(make()), draw(2, 16, 4, 3, 3), draw(2, 12)
    text = []
    if isinstance(block, SpatialLayer):
        text = [block.text_keys(draw(2, 5, 12), torch.ones(2, 5, dtype=torch.bool))]
    with torch.no_grad():
        fused = block(x, embedding, *text)
    torch.testing.assert_close(fused, block(x, embedding, *text), **EXACT)


def test_a_linear_over_channels_is_a_linear() -> None:
    layer, x = ChannelLinear(8, 12).double(), draw(2, 8, 3, 4, 5)
    torch.testing.assert_close(layer(x), of_rows(layer, x.movedim(1, -1)).movedim(-1, 1), **EXACT)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("training", [False, True])
def test_under_autocast_a_model_follows_single_precision(training: bool) -> None:
    stunet = randomise(inflate(tiny_unet(2, dtype=torch.float32), temporal_factors=(2,), temporal_conditioning=True))
    inputs = draw_inputs(stunet, 2, 4, 8, 8)
    with torch.set_grad_enabled(training):
        exact = stunet(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            half = stunet(**inputs)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() < 0.1 * exact.norm()


# Space, then time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", TEMPORAL_POSITIONS)
def test_factorized_attention_is_space_then_time(positions: str) -> None:
    module = trained(FactorizedAttention(16, 8, 4, positions=positions))
    assert isinstance(module.spatial, SpatialSelfAttention)
    x = draw(2, 16, 3, 4, 5)
    wanted = module.temporal(module.spatial(x))
    for training in (True, False):
        with torch.set_grad_enabled(training):
            for layout in (x, x.contiguous(), x.transpose(3, 4).contiguous().transpose(3, 4)):
                y = module(layout)
                torch.testing.assert_close(y, wanted, **EXACT)
                assert y.is_contiguous(memory_format=torch.channels_last_3d)
    time = ["temporal_conv", "temporal_attention", "temporal_conv"]
    assert calls_of(lambda: module(x)) == [
        "group_norm_stats",
        "temporal_conv",
        "spatial_attention",
        "temporal_conv",
        *time,
    ]


def test_a_fresh_factorized_attention_changes_nothing_and_trains() -> None:
    torch.manual_seed(0)
    module, x = FactorizedAttention(64), draw(1, 64, 3, 4, 4, dtype=torch.float32)
    assert torch.equal(module(x), x)
    trained(module)(x.double()).square().mean().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((60,), "channels must be a multiple of head_dim=64, got 60"),
        ((64, 32, 24), "channels must be a multiple of num_groups=24, got 64"),
        ((0,), "channels must be >= 1, got 0"),
        ((64, 0), "head_dim must be >= 1, got 0"),
        ((64, 64, -1), "num_groups must be >= 1, got -1"),
        ((True,), "channels takes integers, got True"),
        ((64.0,), "channels takes integers, got 64.0"),
        ((64, None), "head_dim takes integers, got None"),
        ((64, 64, "32"), "num_groups takes integers, got '32'"),
        ((15, 5, 5), "channels must be even, got 15"),
    ],
)
def test_widths_that_do_not_divide_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FactorizedAttention(*arguments)


def test_what_takes_pairs_of_channels_refuses_odd_ones() -> None:
    with pytest.raises(ValueError, match="'sinusoidal' adds pairs of sinusoids: channels must be even, got 15"):
        TemporalSelfAttention(15, 5, 5, None)
    with pytest.raises(ValueError, match="a head must be even, got 5"):
        FactorizedAttention(20, 5, 5, positions="rotary")
    x = draw(1, 15, 3, 2, 2, dtype=torch.float32)
    assert FactorizedAttention(15, 5, 5, positions="relative")(x).shape == x.shape
    assert FactorizedAttention(np.int64(16), np.int32(8), 4).temporal.head_dim == 8


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (None, "x must be a tensor, got NoneType"),
        (np.zeros((1, 16, 2, 3, 3)), "x must be a tensor, got ndarray"),
        (torch.zeros(1, 16, 3, 3), r"x must be \(B, C, T, H, W\) .* got \(1, 16, 3, 3\)"),
        (torch.zeros(1, 16, 0, 3, 3), r"x must be .* T, H, W >= 1, got \(1, 16, 0, 3, 3\)"),
        (torch.zeros(1, 8, 2, 3, 3), r"x must have 16 channels, got \(1, 8, 2, 3, 3\)"),
        (torch.zeros(1, 16, 2, 3, 3, dtype=torch.int64), "x must be float16, .* got torch.int64"),
        (torch.zeros(1, 16, 2, 3, 3).double(), "x must be torch.float32 like the module, got torch.float64"),
        (torch.zeros(1, 16, 2, 3, 3).bfloat16(), "x must be torch.float32 like the module, got torch.bfloat16"),
    ],
)
def test_other_activations_are_refused(x: Any, message: str, training: bool) -> None:
    with torch.set_grad_enabled(training), pytest.raises(ValueError, match="FactorizedAttention: " + message):
        FactorizedAttention(16, 8, 4)(x)


@pytest.mark.parametrize("training", [False, True])
def test_under_autocast_the_dtypes_may_differ(training: bool) -> None:
    module, x = randomise(FactorizedAttention(16, 8, 4)), draw(1, 16, 3, 4, 4, dtype=torch.float32)
    with torch.set_grad_enabled(training):
        exact = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            for given in (x, x.bfloat16()):
                assert (module(given).float() - exact).norm() < 0.1 * exact.norm()
