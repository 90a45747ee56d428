from __future__ import annotations

import copy
import math
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lumiere_fast import InflationConfig, STUNet, UNet2D, dispatch, inflate, native, ops
from lumiere_fast.models.blocks import (
    AttentionInflationBlock,
    ConvInflationBlock,
    ResnetBlock2D,
    TemporalDownsample,
    TemporalKernel,
    TemporalSelfAttention,
    TemporalUpsample,
    channels_last_weights,
    identity_kernel_,
    sinusoidal_embedding,
)
from tests.models.tiny import draw_inputs, frame_by_frame, of_rows, randomise, tiny_config, tiny_unet

EXACT = {"rtol": 0.0, "atol": 1e-12}
ROOT = Path(__file__).parents[2]


def draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(levels: int, factors: tuple[int, ...], *, conditioning: bool = False, **changes: Any) -> tuple[UNet2D, STUNet]:
    """A random text-to-image model, and its inflation (of a copy) with the temporal layers at their initialisation."""
    unet = tiny_unet(levels, **changes)
    return unet, inflate(copy.deepcopy(unet), temporal_factors=factors, temporal_conditioning=conditioning)


# The initialisation (paper, appendix B) ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factors", "num_frames", "changes"),
    [
        ((2,), 6, {}),
        ((2, 2), 8, {}),
        ((2, 2, 2), 16, {}),
        ((4,), 8, {}),
        ((3,), 6, {}),
        ((2, 1, 2), 8, {}),
        ((1, 4), 8, {}),
        ((2, 2), 8, {"patch_size": 2, "sample_size": 64}),
        ((2, 2), 8, {"conditioning": True, "layers_per_block": (2, 1, 2)}),
        ((2, 2), 8, {"ssr": True}),
        ((2, 1), 8, {"ssr": True, "conditioning": True, "patch_size": 2, "sample_size": 64}),
    ],
)
def test_every_nth_frame_is_the_image_model(factors: tuple[int, ...], num_frames: int, changes: dict[str, Any]) -> None:
    """fp64, against the image model run on one image at a time. Not to the bit: its batch is another one."""
    unet, stunet = pair(len(factors) + 1, factors, **changes)
    n, size = stunet.temporal_factor, max(8, unet.config.spatial_factor)
    inputs = draw_inputs(unet, 2, num_frames, size, size)
    clip, wanted = stunet(**inputs), frame_by_frame(unet, inputs, n)
    assert wanted.std() > 0.1
    torch.testing.assert_close(clip[:, :, ::n], wanted, **EXACT)
    between = frame_by_frame(unet, inputs)[:, :, 1::n]
    assert (clip[:, :, 1::n] - between).abs().mean() > 1e-2, "time was not resized at all"


@contextmanager
def resizes_without_arithmetic() -> Iterator[None]:
    """Within the block learned resizes pick or repeat frames, which at initialisation is what they are."""
    upsample = ops.space_time_upsample

    def down(x: Tensor, factor: tuple[int, int, int], weight: Tensor, bias: Tensor) -> Tensor:
        return x[:, :, :: factor[0]].contiguous(memory_format=torch.channels_last_3d)

    def up(x: Tensor, factor: tuple[int, int, int], **parameters: Any) -> Tensor:
        if "weight" not in parameters:
            return upsample(x, factor, **parameters)
        return x.repeat_interleave(factor[0], dim=2).contiguous(memory_format=torch.channels_last_3d)

    with mock.patch.multiple(ops, space_time_downsample=down, space_time_upsample=up):
        yield


@contextmanager
def backends_of_resizes() -> Iterator[list[tuple[str, str]]]:
    """The resizes made within the block, and the backends that ran them."""
    calls: list[tuple[str, str]] = []

    def recorded(name: str) -> Any:
        function = getattr(ops, name)

        def call(*inputs: Any, **options: Any) -> Tensor:
            with dispatch.record_backends() as used:
                y: Tensor = function(*inputs, **options)
            calls.extend((name, backend) for backend in used)
            return y

        return call

    names = ("space_time_downsample", "space_time_upsample")
    with mock.patch.multiple(ops, **{name: recorded(name) for name in names}):
        yield calls


@pytest.mark.skipif(bool(native.why_not("avx2")), reason="without AVX2 torch is faster")
@pytest.mark.parametrize(
    ("factors", "num_frames", "ssr"),
    [
        ((2,), 6, False),
        ((2, 2), 8, False),
        ((3,), 6, False),
        ((4,), 8, False),
        ((2, 1, 2), 8, False),
        ((2, 2), 8, True),
    ],
)
def test_every_nth_frame_on_the_native_backend(factors: tuple[int, ...], num_frames: int, ssr: bool) -> None:
    """fp32, on the backend that is chosen by itself, for every resize in time and in space.

    To the bit against resizes that only pick and repeat frames. Against the image model run on each image not to the
    bit, and that is none of the resizes' doing: torch's convolutions, matrix products and norms round otherwise for
    another number of frames at a time.
    """
    unet, stunet = pair(len(factors) + 1, factors, ssr=ssr, dtype=torch.float32)
    inputs = draw_inputs(unet, 2, num_frames, 8, 8)
    with torch.no_grad():
        with backends_of_resizes() as calls:
            clip = stunet(**inputs)
        resized = [factor for factor in factors if factor > 1]
        ups = len(resized) + len(factors)  # in time, and in space between any two levels
        assert [name for name, _ in calls].count("space_time_downsample") == len(resized)
        assert [name for name, _ in calls].count("space_time_upsample") == ups
        assert {backend for _, backend in calls} == {"cpu"}
        with resizes_without_arithmetic():
            assert torch.equal(stunet(**inputs), clip)
        n = stunet.temporal_factor
        torch.testing.assert_close(clip[:, :, ::n], frame_by_frame(unet, inputs, n), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ssr", [False, True])
def test_without_temporal_resizing_every_frame_is_the_image_model(ssr: bool) -> None:
    """To the bit: the same frozen layers see the same batch of frames, and every block adds exactly nothing."""
    unet, stunet = pair(3, (1, 1), ssr=ssr, conditioning=True)
    inputs = draw_inputs(unet, 2, 5, 8, 8)
    with (
        torch.no_grad()
    ):  # a graph over trainable weights would turn torch's fused transformer layer off, in one of them
        assert torch.equal(stunet(**inputs), unet(**inputs))
    torch.testing.assert_close(stunet(**inputs), frame_by_frame(unet, inputs), **EXACT)


def parameters_that_count_at_once() -> list[str]:
    """Those whose change shows while the others are at their initialisation: the closing Linears and the resizes."""
    _, stunet = pair(3, (2, 2))
    names = [*stunet.new_parameters()]
    return [name for name in names if ".proj." in name or "samplers" in name]


def test_every_block_and_resize_takes_part() -> None:
    """Moving any one of them breaks the equality with the image model, which so can fail."""
    unet, stunet = pair(3, (2, 2))
    inputs = draw_inputs(unet, 1, 8, 8, 8)
    initial = stunet(**inputs)[:, :, ::4]
    names = parameters_that_count_at_once()
    assert len(names) == 2 * 8 + 2 * 2 * 2  # 8 spatial layers, 2 resizes down and up, a weight and a bias each
    for name in names:
        parameter = stunet.get_parameter(name)
        with torch.no_grad():
            kept = parameter.clone()
            parameter.add_(0.1 * draw(*parameter.shape))
            moved = (stunet(**inputs)[:, :, ::4] - initial).abs().mean()
            parameter.copy_(kept)
        assert moved > 1e-4, name


@pytest.mark.parametrize("embed_dim", [None, 12])
def test_fresh_inflation_blocks_are_exactly_the_identity(embed_dim: int | None) -> None:
    torch.manual_seed(0)
    s = draw(2, 16, 5, 4, 4).float()
    embedding = None if embed_dim is None else draw(2, embed_dim).float()
    for block in (
        ConvInflationBlock(16, 3, 4, embed_dim),
        ConvInflationBlock(16, 5, 4, embed_dim),
        AttentionInflationBlock(16, 8, 4, 3, embed_dim),
    ):
        assert torch.equal(block(s, embedding), s)
        randomise(block.proj)
        assert not torch.equal(block(s, embedding), s)


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("taps", [1, 3, 5])
def test_fresh_temporal_resizes_are_stride_and_duplication(factor: int, taps: int) -> None:
    x = draw(2, 6, 12, 3, 3).float()
    assert torch.equal(TemporalDownsample(6, taps, factor)(x), x[:, :, ::factor])
    assert torch.equal(TemporalUpsample(6, taps, factor)(x), x.repeat_interleave(factor, dim=2))


def test_the_identity_kernel_wants_a_square_of_odd_taps() -> None:
    for shape in ((4, 4, 2), (4, 5, 3)):
        with pytest.raises(ValueError, match=r"odd number of taps"):
            identity_kernel_(torch.empty(shape))


# The layers, against plain torch -------------------------------------------------------------------------------------


def conv1d_of_pixels(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """`F.conv1d` after rearranging (B, C, T, H, W) to (B*H*W, C, T), and back."""
    batch, _, _, height, width = x.shape
    rows = F.conv1d(x.permute(0, 3, 4, 1, 2).flatten(0, 2), weight, bias, stride, weight.shape[2] // 2)
    return rows.unflatten(0, (batch, height, width)).permute(0, 3, 4, 1, 2)


def norm_of_frames(x: Tensor, norm: nn.Module, groups: int) -> Tensor:
    frames = [F.group_norm(frame, groups, norm.weight, norm.bias) for frame in x.unbind(2)]  # type: ignore[arg-type]
    return torch.stack(frames, dim=2)


@pytest.mark.parametrize("taps", [1, 3, 5])
@pytest.mark.parametrize("conditioned", [False, True])
def test_convolution_inflation_block_in_plain_torch(taps: int, conditioned: bool) -> None:
    block = randomise(ConvInflationBlock(8, taps, 4, 12 if conditioned else None).double())
    s, embedding = draw(2, 8, 5, 4, 3), draw(2, 12, seed=4)
    h = F.conv3d(s, block.conv2d.weight[:, :, None], block.conv2d.bias, padding=(0, 1, 1))
    h = F.silu(norm_of_frames(h, block.norm1, 4))
    h = norm_of_frames(conv1d_of_pixels(h, block.conv1d.weight, block.conv1d.bias), block.norm2, 4)
    if conditioned:
        scale, shift = block.film.scale_shift.proj(F.silu(embedding)).chunk(2, dim=1)
        h = h * (1 + scale[..., None, None, None]) + shift[..., None, None, None]
    wanted = s + torch.einsum("oc,bcthw->bothw", block.proj.weight, F.silu(h)) + block.proj.bias[:, None, None, None]
    for training in (True, False):  # layer by layer, and fused
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(block(s, embedding if conditioned else None), wanted, **EXACT)


def test_attention_inflation_block_in_plain_torch() -> None:
    block = randomise(AttentionInflationBlock(16, 8, 4, 2, None).double())
    s = draw(2, 16, 5, 4, 3)
    h = s
    for layer in block.layers:
        assert isinstance(layer, TemporalSelfAttention)
        pixels = norm_of_frames(h, layer.norm, 4).permute(0, 3, 4, 2, 1).flatten(0, 2)  # (B*H*W, T, C)
        pixels = pixels + sinusoidal_embedding(torch.arange(5), 16)
        q, k, v = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in of_rows(layer.to_qkv, pixels).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + of_rows(layer.to_out, mixed).unflatten(0, (2, 4, 3)).permute(0, 4, 3, 1, 2)
    wanted = s + torch.einsum("oc,bcthw->bothw", block.proj.weight, h) + block.proj.bias[:, None, None, None]
    torch.testing.assert_close(block(s, None), wanted, **EXACT)


@pytest.mark.parametrize("factor", [2, 4])
def test_trained_temporal_resizes_in_plain_torch(factor: int) -> None:
    down, up = (randomise(kind(6, 3, factor).double()) for kind in (TemporalDownsample, TemporalUpsample))
    x = draw(2, 6, 8, 3, 4)
    torch.testing.assert_close(down(x), conv1d_of_pixels(x, down.weight, down.bias, factor), **EXACT)
    duplicated = x.repeat_interleave(factor, dim=2)
    torch.testing.assert_close(up(x), conv1d_of_pixels(duplicated, up.weight, up.bias), **EXACT)


def test_attention_knows_the_order_of_frames() -> None:
    block = randomise(AttentionInflationBlock(16, 8, 4, 1, None).double())
    s = draw(1, 16, 6, 3, 3)
    assert (block(s.flip(2), None).flip(2) - block(s, None)).abs().mean() > 1e-3


@pytest.mark.skipif(bool(native.why_not("cpu")), reason="of the native core")
@pytest.mark.parametrize("conditioned", [False, True])
def test_no_activation_is_copied_on_the_way_through_a_block(conditioned: bool) -> None:
    """Inside the ops too, which a dispatch mode does not see into: of all that torch runs, nothing copies one."""
    block = randomise(ConvInflationBlock(16, 3, 4, 12 if conditioned else None))
    resnet = channels_last_weights(randomise(ResnetBlock2D(16, 16, 12, 4)))
    s, embedding = draw(2, 3, 9, 7, 16).float().permute(0, 4, 1, 2, 3), draw(2, 12).float()
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        y = block(resnet(s, embedding), embedding)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    sizes = {math.prod(event.input_shapes[0]): event.name for event in seen.events() if event.name in COPIES}
    assert s.numel() not in sizes and any(event.name == "aten::conv2d" for event in seen.events()), sizes


COPIES = ("aten::copy_", "aten::clone")


def test_weights_in_channels_last_are_the_same_weights() -> None:
    stunet = randomise(inflate(tiny_unet(3), temporal_factors=(2, 2)))
    inputs = draw_inputs(stunet, 1, 8, 16, 16)
    with torch.no_grad():
        wanted, state = stunet(**inputs), {name: each.clone() for name, each in stunet.state_dict().items()}
        channels_last_weights(stunet)
        torch.testing.assert_close(stunet(**inputs), wanted, **EXACT)
    assert all(torch.equal(each, state[name]) for name, each in stunet.state_dict().items())
    kernels = [m.weight for m in stunet.modules() if isinstance(m, TemporalKernel) and m.weight.shape[2] > 1]
    assert kernels and all(weight.stride(1) == 1 for weight in kernels)


# What may see what over time -----------------------------------------------------------------------------------------


def moved_frames(stunet: STUNet, frame: int, num_frames: int = 12) -> list[int]:
    """The frames of the result that change, in any bit, when one frame of the input does."""
    inputs = draw_inputs(stunet, 1, num_frames, 8, 8)
    other = inputs["sample"].clone()
    other[:, :, frame] += 1
    with torch.no_grad():
        difference = stunet(**inputs) != stunet(**inputs | {"sample": other})
    return difference.any(dim=(0, 1, 3, 4)).nonzero().flatten().tolist()


def test_nothing_but_the_temporal_taps_and_attention_reaches_across_frames() -> None:
    """Blocks are trained-like, but attention is off: a frame reaches as far as the convolutions' side taps, no farther.

    Any statistic taken over T, in a norm of either U-Net, would reach every frame.
    """
    _, stunet = pair(3, (1, 1), layers_per_block=(1, 2, 1))
    randomise(stunet.temporal)
    for block in stunet.temporal.blocks:
        if isinstance(block, AttentionInflationBlock):
            nn.init.zeros_(block.proj.weight)
    # one convolution block a layer at the two fine levels, down and up: 2 * (1 + 2) side taps
    assert moved_frames(stunet, 0) == list(range(0, 7))
    assert moved_frames(stunet, 11) == list(range(5, 12))
    for name, parameter in stunet.temporal.named_parameters():
        if name.endswith("conv1d.weight"):
            with torch.no_grad():
                parameter[:, :, [0, 2]] = 0
    assert moved_frames(stunet, 4) == [4]


def test_attention_reaches_every_frame() -> None:
    _, stunet = pair(2, (1,))
    randomise(stunet.temporal)
    assert moved_frames(stunet, 4) == list(range(12))


def test_the_samples_of_a_batch_do_not_see_each_other() -> None:
    _, stunet = pair(3, (2, 2), conditioning=True)
    randomise(stunet.temporal)
    inputs = draw_inputs(stunet, 2, 8, 8, 8)
    alone = stunet(**{name: x[1:] for name, x in inputs.items()})
    torch.testing.assert_close(stunet(**inputs)[1:], alone, **EXACT)


def test_temporal_layers_read_noise_level_and_text_when_conditioned() -> None:
    _, stunet = pair(2, (2,), conditioning=True)
    randomise(stunet.temporal)
    assert stunet.temporal.conditioner is not None
    inputs = draw_inputs(stunet, 1, 4, 8, 8)
    seen: list[Tensor] = []
    stunet.temporal.conditioner.register_forward_hook(lambda module, args, output: seen.append(output))
    stunet(**inputs)
    stunet(**inputs | {"timestep": inputs["timestep"] + 50})
    stunet(**inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"] + 1})
    assert (seen[0] - seen[1]).abs().mean() > 1e-2
    assert (seen[0] - seen[2]).abs().mean() > 1e-2
    block = stunet.temporal.blocks[0]
    s = draw(1, 16, 4, 8, 8)
    assert (block(s, seen[0]) - block(s, seen[1])).abs().mean() > 1e-4


# The order of things -------------------------------------------------------------------------------------------------


@pytest.fixture
def trace() -> Iterator[tuple[STUNet, list[tuple[str, Tensor, Tensor]]]]:
    """A random video model and, after a call, (name, input, output) of its layers in the order they ran."""
    _, stunet = pair(3, (2, 2))
    randomise(stunet.temporal)
    calls: list[tuple[str, Tensor, Tensor]] = []

    def record(name: str) -> Any:
        return lambda module, args, output: calls.append((name, args[0], output))

    for i, down in enumerate(stunet.unet.down_levels):
        if i < 2:
            down.resize.register_forward_hook(record(f"space down {i}"))
            stunet.temporal.downsamplers[i].register_forward_hook(record(f"time down {i}"))
            stunet.temporal.upsamplers[i].register_forward_hook(record(f"time up {i}"))
    for i, up in enumerate(stunet.unet.up_levels):
        for layer in up.layers:
            layer.register_forward_hook(record(f"up layer {2 - i}"))
        if up.resize is not None:
            up.resize.register_forward_hook(record(f"space up {1 - i}"))
    for i, block in enumerate(stunet.temporal.blocks):
        block.register_forward_hook(record(f"block {i}"))
    yield stunet, calls


def test_space_is_resized_before_time_and_blocks_follow_layers(
    trace: tuple[STUNet, list[tuple[str, Tensor, Tensor]]],
) -> None:
    stunet, calls = trace
    stunet(**draw_inputs(stunet, 1, 8, 16, 16))
    assert [name for name, _, _ in calls] == [
        *("block 0", "space down 0", "time down 0"),
        *("block 1", "space down 1", "time down 1"),
        *("block 2", "block 3", "block 4"),
        *("up layer 2", "block 5", "space up 1", "time up 1"),
        *("up layer 1", "block 6", "space up 0", "time up 0"),
        *("up layer 0", "block 7"),
    ]
    sizes = {name: tuple(output.shape[2:]) for name, _, output in calls}
    assert sizes["space down 0"] == (8, 8, 8)
    assert sizes["time down 0"] == (4, 8, 8)
    assert sizes["time down 1"] == sizes["block 3"] == (2, 4, 4)
    assert sizes["space up 1"] == (2, 8, 8)
    assert sizes["time up 1"] == (4, 8, 8)
    assert sizes["time up 0"] == (8, 16, 16)


def test_skips_are_taken_after_the_inflation_block_and_before_both_resizes(
    trace: tuple[STUNet, list[tuple[str, Tensor, Tensor]]],
) -> None:
    stunet, calls = trace
    stunet(**draw_inputs(stunet, 1, 8, 16, 16))
    given = {name: x for name, x, _ in calls}
    result = {name: y for name, _, y in calls}
    for level, width in enumerate(stunet.unet.config.block_out_channels):
        skip = given[f"up layer {level}"][:, -width:]
        assert torch.equal(skip, result[f"block {level}"]), level
        assert skip.shape[2:] == (8 >> level, 16 >> level, 16 >> level)


def test_only_the_coarsest_level_attends_over_time() -> None:
    _, stunet = pair(3, (2, 2))
    coarsest = [level == 2 for level, _ in stunet.unet.walk()]
    assert [isinstance(block, AttentionInflationBlock) for block in stunet.temporal.blocks] == coarsest
    assert sum(coarsest) == 4
    assert all(isinstance(block, ConvInflationBlock | AttentionInflationBlock) for block in stunet.temporal.blocks)


# Freezing and training -----------------------------------------------------------------------------------------------


def test_only_new_parameters_are_trained() -> None:
    unet = tiny_unet(3, dtype=torch.float32)
    stunet = inflate(unet, temporal_factors=(2, 2), temporal_conditioning=True)
    assert stunet.unet is unet
    new = stunet.new_parameters()
    assert {name for name, p in stunet.named_parameters() if p.requires_grad} == set(new)
    assert all(name.startswith("temporal.") for name in new)
    randomise(stunet.temporal)
    frozen = {name: p.clone() for name, p in unet.named_parameters()}
    before = {name: p.detach().clone() for name, p in new.items()}
    optimizer = torch.optim.AdamW(stunet.parameters(), lr=1e-2)
    stunet.train()
    stunet(**draw_inputs(stunet, 2, 8, 8, 8)).square().mean().backward()
    optimizer.step()
    assert [name for name, p in new.items() if p.grad is None or not p.grad.any()] == []
    assert [name for name, p in new.items() if torch.equal(p, before[name])] == []
    assert [name for name, p in unet.named_parameters() if p.grad is not None] == []
    assert [name for name, p in unet.named_parameters() if not torch.equal(p, frozen[name])] == []


def test_at_initialisation_the_gradient_enters_by_the_closing_linears() -> None:
    """Zero-initialised, they hold back the block behind them but get a gradient of their own."""
    _, stunet = pair(2, (1,), dtype=torch.float32)
    stunet(**draw_inputs(stunet, 1, 4, 8, 8)).square().mean().backward()
    for name, parameter in stunet.temporal.blocks.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) == (".proj." in name), name


def test_the_frozen_model_stays_in_eval_mode() -> None:
    _, stunet = pair(2, (2,))
    assert not stunet.training  # as the model it was made of
    stunet.train()
    assert stunet.training
    assert stunet.temporal.training
    assert not any(module.training for module in stunet.unet.modules())
    assert not stunet.eval().temporal.training


def test_a_model_in_training_gives_one_in_training() -> None:
    stunet = inflate(UNet2D(tiny_config()).train(), temporal_factors=(2,))
    assert stunet.training
    assert not stunet.unet.training


def test_a_training_step_over_a_frozen_model_survives_in_channels_last() -> None:
    """torch's group norm backward can crash the process where its weight needs no gradient and the input is
    channels_last: its own process, then, and several group counts."""
    script = """
        import torch
        from lumiere_fast import inflate
        from tests.models.tiny import draw_inputs, randomise, tiny_unet

        for groups in (1, 4, 8):
            unet = tiny_unet(3, dtype=torch.float32, norm_num_groups=groups).to(memory_format=torch.channels_last)
            stunet = inflate(unet, temporal_factors=(2, 2), temporal_conditioning=True).train()
            randomise(stunet.temporal)
            optimizer = torch.optim.AdamW(stunet.new_parameters().values(), lr=1e-3)
            inputs = draw_inputs(stunet, 2, 8, 16, 16)
            inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last_3d)
            inputs["sample"].requires_grad_()
            stunet(**inputs).square().mean().backward()
            assert all(torch.isfinite(p.grad).all() for p in stunet.new_parameters().values())
            optimizer.step()
        print("survived")
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stdout) == (0, "survived\n"), run.stderr


# The door ------------------------------------------------------------------------------------------------------------


def test_inflate_takes_a_config_factors_or_fields() -> None:
    assert inflate(tiny_unet(3)).inflation_config == InflationConfig((2, 2))
    config = InflationConfig((1, 2), temporal_kernel_size=5)
    assert inflate(tiny_unet(3), config).inflation_config == config
    changed = inflate(tiny_unet(3), config, temporal_factors=(4, 1), temporal_attention_layers=2).inflation_config
    assert changed == InflationConfig((4, 1), temporal_kernel_size=5, temporal_attention_layers=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_temporal_layers_take_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    stunet = inflate(tiny_unet(2, dtype=dtype))
    assert {p.dtype for p in stunet.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temporal_factors": (2,)}, r"one factor for each of the 2 spatial resizes, got \(2,\)"),
        ({"temporal_factors": (2, 0)}, "temporal_factors must be >= 1"),
        ({"temporal_kernel_size": 4}, "temporal_kernel_size must be odd"),
        ({"temporal_attention_layers": 0}, "temporal_attention_layers must be >= 1"),
    ],
)
def test_a_refused_inflation_leaves_the_model_as_it_was(fields: dict[str, Any], message: str) -> None:
    unet = tiny_unet(3).train()
    with pytest.raises(ValueError, match=message):
        inflate(unet, **fields)
    assert unet.training
    assert all(p.requires_grad for p in unet.parameters())


@pytest.mark.parametrize(
    ("num_frames", "nearest"), [(6, "4 and 8"), (9, "8 and 12"), (1, "4 and 8"), (15, "12 and 16"), (5, "4 and 8")]
)
def test_a_wrong_number_of_frames_names_the_two_nearest(num_frames: int, nearest: str) -> None:
    _, stunet = pair(3, (2, 2))
    with pytest.raises(ValueError, match=f"temporal factor 4, got {num_frames}; the nearest accepted are {nearest}$"):
        stunet(**draw_inputs(stunet, 1, num_frames, 8, 8))


def test_images_are_refused() -> None:
    _, stunet = pair(2, (2,))
    with pytest.raises(ValueError, match=r"sample must be \(B, C, T, H, W\), got \(1, 3, 8, 8\)"):
        stunet(**draw_inputs(stunet, 1, 8, 8))
