from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumiere_fast import UNet2D, inflate
from lumiere_fast.models import STUNet
from lumiere_fast.models.blocks import (
    ResnetBlock2D,
    SpatialSelfAttention,
    TextConditioner,
    TextCrossAttention,
    fold_frames,
    sinusoidal_embedding,
    unfold_frames,
)
from tests.models.tiny import draw_inputs, frame_by_frame, of_rows, randomise, tiny_config, tiny_unet

EXACT = {"rtol": 0.0, "atol": 1e-12}
CHANNELS_LAST = torch.channels_last_3d


def draw(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The whole model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ssr", [False, True])
def test_an_image_is_a_clip_of_one_frame(ssr: bool) -> None:
    unet = tiny_unet(ssr=ssr)
    image = draw_inputs(unet, 2, 8, 8)
    clip = {name: x[:, :, None] if x.ndim == 4 else x for name, x in image.items()}
    assert torch.equal(unet(**clip), unet(**image)[:, :, None])


@pytest.mark.parametrize("patch_size", [1, 2])
def test_frames_and_samples_of_a_batch_do_not_see_each_other(patch_size: int) -> None:
    unet = tiny_unet(3, patch_size=patch_size, sample_size=16)
    inputs = draw_inputs(unet, 3, 4, 16, 16)
    whole = unet(**inputs)
    torch.testing.assert_close(whole, frame_by_frame(unet, inputs), **EXACT)
    for i in range(3):
        alone = unet(**{name: x[i : i + 1] for name, x in inputs.items()})
        torch.testing.assert_close(whole[i : i + 1], alone, **EXACT)


def test_longer_padding_of_the_text_changes_nothing() -> None:
    unet = tiny_unet()
    inputs = draw_inputs(unet, 2, 2, 8, 8)
    states, mask = inputs["encoder_hidden_states"], inputs["encoder_attention_mask"]
    garbage = 100 * draw(2, 4, states.shape[2])
    padded = inputs | {
        "encoder_hidden_states": torch.cat([states, garbage], dim=1),
        "encoder_attention_mask": F.pad(mask, (0, 4)),
    }
    torch.testing.assert_close(unet(**padded), unet(**inputs), **EXACT)


@pytest.mark.parametrize(
    "name", ["sample", "timestep", "encoder_hidden_states", "image_conditioning", "augmentation_level"]
)
def test_every_input_matters(name: str) -> None:
    unet = tiny_unet(ssr=True)
    inputs = draw_inputs(unet, 1, 8, 8)
    moved = inputs | {name: inputs[name] * 1.5}
    assert (unet(**moved) - unet(**inputs)).abs().mean() > 1e-3


def test_the_order_of_the_words_matters() -> None:
    unet = tiny_unet()
    inputs = draw_inputs(unet, 1, 8, 8)
    swapped = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].flip(1)}
    assert (unet(**swapped) - unet(**inputs)).abs().mean() > 1e-3


def test_a_fresh_model_gives_every_parameter_a_gradient_once_its_zeros_are_gone() -> None:
    unet = tiny_unet(3, ssr=True, dtype=torch.float32)
    unet(**draw_inputs(unet, 2, 16, 16)).square().mean().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_fresh_block_is_the_identity() -> None:
    torch.manual_seed(0)
    block = ResnetBlock2D(8, 8, 12, 4)
    x = draw(2, 8, 3, 4, 4, dtype=torch.float32)
    assert torch.equal(block(x, torch.randn(2, 12)), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_single(dtype: torch.dtype) -> None:
    unet = tiny_unet(dtype=torch.float32)
    inputs = draw_inputs(unet, 2, 2, 8, 8)
    exact = unet(**inputs)
    keep = ("timestep", "encoder_attention_mask")
    half = unet.to(dtype)(**{name: x if name in keep else x.to(dtype) for name, x in inputs.items()})
    assert half.dtype == dtype
    assert (half.float() - exact).norm() < (0.1 if dtype == torch.bfloat16 else 0.02) * exact.norm()


def test_walk_tells_level_and_width_after_each_layer() -> None:
    unet = UNet2D(tiny_config(3, layers_per_block=(1, 2, 1)))
    seen: list[tuple[int, int]] = []

    class Recorder:
        def layer(self, index: int, x: Tensor) -> Tensor:
            assert index == len(seen)
            seen.append((int(math.log2(32 // x.shape[-1])), x.shape[1]))
            return x

        def downsample(self, level: int, x: Tensor) -> Tensor:
            return x

        def upsample(self, level: int, x: Tensor) -> Tensor:
            return x

    unet(**draw_inputs(unet, 1, 32, 32), inflation=Recorder())
    assert seen == list(unet.walk())


def test_the_head_of_a_patched_model_is_a_pixel_shuffle() -> None:
    unet = tiny_unet(patch_size=2, sample_size=16)
    cells: list[Tensor] = []
    unet.conv_out.register_forward_hook(lambda module, args, output: cells.append(output))
    image = unet(**draw_inputs(unet, 2, 16, 16))
    grouped = cells[0][:, :, 0].unflatten(1, (4, 3)).transpose(1, 2).flatten(1, 2)  # (C, p, p) as pixel_shuffle has it
    assert torch.equal(image, F.pixel_shuffle(grouped, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": torch.zeros(1, 4, 8, 8)}, r"sample must be \(B, 3, \[T,\] H, W\), got \(1, 4, 1, 8, 8\)"),
        ({"sample": torch.zeros(3, 8, 8)}, r"sample must be"),
        ({"sample": torch.zeros(1, 3, 9, 8)}, "multiples of 2, got 9x8"),
        ({"image_conditioning": torch.zeros(1, 3, 8, 8)}, "image_conditioning must be absent"),
        ({"augmentation_level": torch.zeros(1)}, "augmentation_level is not accepted"),
        (
            {"encoder_hidden_states": torch.zeros(1, 5, 13)},
            r"encoder_hidden_states must be a tensor \(B, L, 12\) with L >= 1, got torch.float32 \(1, 5, 13\)",
        ),
        ({"encoder_attention_mask": torch.ones(1, 5)}, r"encoder_attention_mask must be a torch.bool tensor \(1, 5\)"),
        ({"encoder_attention_mask": torch.ones(1, 4, dtype=torch.bool)}, r"got torch.bool \(1, 4\)"),
    ],
)
def test_bad_inputs_are_named(changes: dict[str, Tensor], message: str) -> None:
    unet = tiny_unet(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        unet(**draw_inputs(unet, 1, 8, 8) | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_conditioning": None}, r"image_conditioning must be \(1, 3, 2, 8, 8\)"),
        ({"image_conditioning": torch.zeros(1, 3, 2, 4, 4)}, r"must be \(1, 3, 2, 8, 8\).* got \(1, 3, 2, 4, 4\)"),
        ({"image_conditioning": torch.zeros(1, 3, 3, 8, 8)}, r"got \(1, 3, 3, 8, 8\)"),
        ({"augmentation_level": None}, "augmentation_level is required"),
    ],
)
def test_bad_super_resolution_inputs_are_named(changes: dict[str, Any], message: str) -> None:
    unet = tiny_unet(ssr=True, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        unet(**draw_inputs(unet, 1, 2, 8, 8) | changes)


# Memory --------------------------------------------------------------------------------------------------------------


def models() -> dict[str, UNet2D | STUNet]:
    plain, patched = tiny_unet(3, dtype=torch.float32), tiny_unet(3, dtype=torch.float32, patch_size=2, sample_size=64)
    video = inflate(tiny_unet(3, dtype=torch.float32), temporal_conditioning=True, temporal_attention_layers=2)
    return {"image": plain, "patched": patched, "video": randomise(video)}


@pytest.mark.parametrize("kind", ["image", "patched", "video"])
@pytest.mark.parametrize("given", [CHANNELS_LAST, torch.contiguous_format])
def test_activations_stay_channels_last(kind: str, given: torch.memory_format) -> None:
    model = models()[kind]
    seen = []

    def check(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 5:
            # a Linear works on (B, T, H, W, C) rows, everything else on (B, C, T, H, W)
            rows = type(module) is nn.Linear
            seen.append(output.is_contiguous(memory_format=torch.contiguous_format if rows else CHANNELS_LAST))

    for module in model.modules():
        module.register_forward_hook(check)
    inputs = draw_inputs(model, 2, 8, 32, 32)
    inputs["sample"] = inputs["sample"].contiguous(memory_format=given)
    model(**inputs)
    assert len(seen) > 40
    assert all(seen)


def test_folding_is_a_view() -> None:
    x = draw(2, 4, 3, 5, 5).contiguous(memory_format=CHANNELS_LAST)
    frames = fold_frames(x)
    assert frames.data_ptr() == x.data_ptr()
    assert frames.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(frames[1 * 3 + 2], x[1, :, 2])
    back = unfold_frames(frames, x.shape[2])
    assert back.data_ptr() == x.data_ptr()
    assert torch.equal(back, x)


def test_any_layout_gives_the_same() -> None:
    unet = tiny_unet()
    inputs = draw_inputs(unet, 2, 4, 8, 8)
    wanted = unet(**inputs)
    wide = draw(2, 3, 4, 8, 16)
    wide[..., ::2] = inputs["sample"]
    for sample in (inputs["sample"].contiguous(memory_format=CHANNELS_LAST), wide[..., ::2]):
        torch.testing.assert_close(unet(**inputs | {"sample": sample}), wanted, **EXACT)


# The layers, against plain torch on single images --------------------------------------------------------------------


def test_resnet_block_in_plain_torch() -> None:
    block = randomise(ResnetBlock2D(8, 12, 20, 4).double())
    x, embedding = draw(2, 8, 3, 6, 5), draw(2, 20, seed=4)
    scale, shift = block.scale_shift.proj(F.silu(embedding)).chunk(2, dim=1)
    frames = []
    for t in range(3):
        h = F.silu(F.group_norm(x[:, :, t], 4, block.norm1.weight, block.norm1.bias))
        h = F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1)
        h = F.group_norm(h, 4, block.norm2.weight, block.norm2.bias) * (1 + scale[..., None, None])
        h = F.conv2d(F.silu(h + shift[..., None, None]), block.conv2.weight, block.conv2.bias, padding=1)
        frames.append(F.conv2d(x[:, :, t], block.shortcut.weight, block.shortcut.bias) + h)
    torch.testing.assert_close(block(x, embedding), torch.stack(frames, dim=2), **EXACT)


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor, head_dim: int, mask: Tensor | None = None) -> Tensor:
    """(B, Q, C), (B, K, C) -> (B, Q, C), one head at a time."""
    heads = []
    for one in range(0, q.shape[-1], head_dim):
        a, b, c = (x[..., one : one + head_dim] for x in (q, k, v))
        scores = a @ b.mT / math.sqrt(head_dim)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -math.inf)
        heads.append(scores.softmax(-1) @ c)
    return torch.cat(heads, dim=-1)


def test_self_attention_in_plain_torch() -> None:
    layer = randomise(SpatialSelfAttention(16, 8, 4).double())
    x = draw(2, 16, 3, 4, 5)
    for t in range(3):
        rows = F.group_norm(x[:, :, t], 4, layer.norm.weight, layer.norm.bias).flatten(2).mT
        q, k, v = of_rows(layer.to_qkv, rows).chunk(3, dim=-1)
        wanted = x[:, :, t] + of_rows(layer.to_out, attention_by_hand(q, k, v, 8)).mT.unflatten(2, (4, 5))
        torch.testing.assert_close(layer(x)[:, :, t], wanted, **EXACT)


def test_cross_attention_in_plain_torch() -> None:
    layer = randomise(TextCrossAttention(16, 8, 12, 4).double())
    x, text = draw(2, 16, 3, 4, 5), draw(2, 6, 12, seed=4)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    k, v = layer.to_kv(text).chunk(2, dim=-1)
    for t in range(3):
        rows = F.group_norm(x[:, :, t], 4, layer.norm.weight, layer.norm.bias).flatten(2).mT
        wanted = x[:, :, t] + of_rows(
            layer.to_out, attention_by_hand(of_rows(layer.to_q, rows), k, v, 8, mask)
        ).mT.unflatten(2, (4, 5))
        got = layer(x, layer.text_keys(text, mask))[:, :, t]
        torch.testing.assert_close(got, wanted, **EXACT)


def test_sinusoids() -> None:
    positions = torch.tensor([0.0, 1.0, -7.5])
    got = sinusoidal_embedding(positions, 6)
    for row, p in zip(got.tolist(), positions.tolist(), strict=True):
        angles = [p / 10000 ** (i / 3) for i in range(3)]
        assert row == pytest.approx([*map(math.cos, angles), *map(math.sin, angles)], abs=1e-6)


def test_pooled_text_is_a_convex_mixture_of_its_tokens() -> None:
    torch.manual_seed(0)
    conditioner = TextConditioner(12, 16, 1, 16).double().eval()
    nn.init.eye_(conditioner.pool_out.weight)
    nn.init.zeros_(conditioner.pool_out.bias)
    mask = torch.tensor([[True, True, True, False]])
    states, pooled = conditioner(draw(1, 4, 12), mask)
    real = states[0, :3]
    assert (pooled >= real.amin(0) - 1e-12).all()
    assert (pooled <= real.amax(0) + 1e-12).all()
    only = conditioner(draw(1, 4, 12), torch.tensor([[True, False, False, False]]))
    torch.testing.assert_close(only[1], only[0][:, 0], **EXACT)


def test_shapes_come_without_memory_on_the_meta_device() -> None:
    model = models()["video"].to("meta")
    inputs = {name: value.to("meta") for name, value in draw_inputs(models()["video"], 1, 8, 32, 32).items()}
    assert model(**inputs).shape == (1, 3, 8, 32, 32)
