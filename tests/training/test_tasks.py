"""The loss of a task: what it is a function of, how it is split, and in which precision it is computed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lumiere_fast import UNet2D
from lumiere_fast.data.source import ProceduralClips
from lumiere_fast.diffusion import PREDICTION_TYPES, CosineSchedule, EDMSchedule
from lumiere_fast.models.blocks import FrameConv2d
from lumiere_fast.training import tasks
from lumiere_fast.training.tasks import DenoisingTask, check_precision
from tests.models.tiny import tiny_config
from tests.training.common import KINDS, gradients, make_model, make_task

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_a_function_of_weights_and_step(kind: str) -> None:
    pytest.importorskip("tokenizers")
    task, twin = make_task(kind), make_task(kind)
    with torch.no_grad():
        losses = [task.loss(step).item() for step in range(3)]
        torch.manual_seed(123)
        assert [twin.loss(step).item() for step in (2, 0, 1)] == [losses[2], losses[0], losses[1]]
        assert len(set(losses)) == 3
        reseeded = dataclasses.replace(task, source=ProceduralClips(1, task.source.num_frames))
        assert reseeded.loss(0).item() != losses[0]
        task.model.get_parameter("unet.conv_in.bias" if "video" in kind else "conv_in.bias").data.add_(0.1)
        assert task.loss(0).item() != losses[0]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", [EDMSchedule(), CosineSchedule(shift=1.0)])
def test_the_loss_is_the_error_of_the_parameterised_prediction(
    schedule: EDMSchedule | CosineSchedule, prediction_type: str
) -> None:
    """With a network that answers with its input, against the loss written out over the same random numbers."""
    pytest.importorskip("tokenizers")
    parameterization = PREDICTION_TYPES[prediction_type]()
    task = make_task(batch_size=64, schedule=schedule, parameterization=parameterization)
    seen: list[Tensor] = []

    def answer(sample: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(timestep)
        return sample

    task.model.forward = answer  # type: ignore[method-assign]
    drawn = {name: x.double() for name, x in task._samples(0).items()}
    clean, noise, alpha, sigma = (
        drawn["clean"],
        drawn["noise"],
        *(drawn[name][:, None, None, None, None] for name in ("alpha", "sigma")),
    )
    given = parameterization.scale_input(alpha * clean + sigma * noise, alpha, sigma)
    wanted = (given - parameterization.target(clean, noise, alpha, sigma)).square().mean()
    assert task.loss(0).item() == pytest.approx(wanted.item(), rel=1e-4)
    torch.testing.assert_close(
        seen[0].double(), parameterization.timestep(alpha, sigma).flatten(), rtol=1e-5, atol=1e-3
    )


def recorded(task: DenoisingTask, step: int = 0) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the model is given at a step."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = task.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        task.loss(step)
    hook.remove()
    return calls


def test_a_super_resolution_model_is_given_the_small_version_of_its_own_frames() -> None:
    """By areas, then noised and enlarged; the noise's level is told, and it is uniform up to its most."""
    pytest.importorskip("tokenizers")
    task = make_task("ssr video", batch_size=64)
    ((_, given),) = recorded(task)
    drawn = task._samples(0)
    level = drawn["level"]
    assert level.max() <= tasks.MAX_AUGMENTATION
    assert level.mean().item() == pytest.approx(tasks.MAX_AUGMENTATION / 2, rel=0.2)
    told = task.parameterization.timestep(torch.ones(64), level)
    torch.testing.assert_close(given["augmentation_level"], told)
    small = torch.nn.functional.avg_pool3d(drawn["clean"], (1, 2, 2))
    noised = small + level[:, None, None, None, None] * drawn["small_noise"]
    wanted = torch.nn.functional.interpolate(noised, scale_factor=(1, 2, 2), mode="trilinear")
    torch.testing.assert_close(given["image_conditioning"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("share", "empty"), [(0.0, 0), (1.0, 64), (0.25, 16)])
def test_prompts_are_dropped_at_their_rate(share: float, empty: int) -> None:
    pytest.importorskip("tokenizers")
    task = make_task(batch_size=64, drop_text=share)
    prompts: list[str] = []
    encoder = task.text_encoder

    class Recorder:
        name, embed_dim, max_length = encoder.name, encoder.embed_dim, encoder.max_length

        def encode(self, batch: list[str]) -> Any:
            prompts.extend(batch)
            return encoder.encode(batch)

    task.text_encoder = Recorder()  # type: ignore[assignment]
    with torch.no_grad():
        task.loss(0)
        assert abs(prompts.count("") - empty) <= (8 if 0 < share < 1 else 0)
        task.loss(1)
    assert prompts[:64] != prompts[64:] or share == 1, "every step has the same clips"


def test_a_folder_of_videos_is_learned_from(videos: Path) -> None:
    for kind in KINDS:
        task = make_task(kind, folder=videos, batch_size=2)
        ((args, _),) = recorded(task)
        size = 16 if "ssr" in kind else 8
        assert args[0].shape == (2, 3, 4 if "video" in kind else 1, size, size)
        procedural = make_task(kind, batch_size=2)
        with torch.no_grad():
            assert task.loss(0).item() != procedural.loss(0).item()
        task.source.close()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("video", {"num_frames": 3}, "num_frames must be a positive multiple of the model's temporal factor 2, got 3"),
        ("image", {"num_frames": 2}, "a UNet2D learns from single frames, the source gives 2"),
        ("image", {"batch_size": 0}, "batch_size must be >= 1, got batch_size=0"),
        ("image", {"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be >= 1"),
        ("image", {"precision": "fp16"}, "precision must be one of fp32, bf16, got 'fp16'"),
    ],
)
def test_impossible_tasks_are_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(kind, **changes)


def test_text_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="the model reads text of width 12, word-vectors-v1 gives 64"):
        DenoisingTask(UNet2D(tiny_config()), ProceduralClips(0, 1), EDMSchedule(), 4)


# Accumulation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_small_batches_have_the_gradient_of_the_large_one(kind: str) -> None:
    """The same samples either way, the gradient to rounding; and no batch has it alone."""
    pytest.importorskip("tokenizers")
    whole = make_task(kind, batch_size=6)
    parts = make_task(kind, batch_size=2, gradient_accumulation_steps=3)
    for task in (whole, parts):
        task.model.double()
    whole.loss(4).backward()
    wanted = gradients(whole)
    losses = []
    for loss in parts.losses(4):
        (loss / 3).backward()
        losses.append(loss.item())
    found = gradients(parts)
    assert len(set(losses)) == 3
    assert sum(losses) / 3 == pytest.approx(whole.loss(4).item(), rel=1e-6)
    assert found.keys() == wanted.keys()
    scale = max(gradient.abs().max().item() for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * scale)
    next(parts.losses(4)).backward()
    lone = gradients(parts)
    assert any((lone[name] - wanted[name]).norm() > 0.05 * wanted[name].norm() for name in wanted)


def test_one_graph_is_alive_at_a_time() -> None:
    """A batch's forward pass starts when its loss is asked for, not before."""
    pytest.importorskip("tokenizers")
    task = make_task(batch_size=2, gradient_accumulation_steps=3)
    calls: list[int] = []
    task.model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    for count, _ in enumerate(task.losses(0), start=1):
        assert calls == [2] * count
    assert calls == [2, 2, 2]


# Precision -----------------------------------------------------------------------------------------------------------


def dtypes_of_convolutions(task: DenoisingTask) -> set[torch.dtype]:
    found: set[torch.dtype] = set()
    for module in task.model.modules():
        if isinstance(module, FrameConv2d):
            module.register_forward_hook(lambda module, args, output: found.add(output.dtype))
    with torch.no_grad():
        task.loss(0)
    return found


@pytest.mark.parametrize("kind", ["image", "ssr video"])
def test_bf16_runs_the_model_under_autocast_over_fp32_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(tasks, "_has_bf16_units", lambda device: True)
    full, half = make_task(kind), make_task(kind, precision="bf16")
    assert dtypes_of_convolutions(full) == {torch.float32}
    assert dtypes_of_convolutions(half) == {torch.bfloat16}
    full.loss(0).backward()
    loss = half.loss(0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(full.loss(0).item(), rel=0.02)
    assert loss.item() != full.loss(0).item()
    wanted, found = gradients(full), gradients(half)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    flat = [torch.cat([x.flatten() for x in g.values()]) for g in (wanted, found)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.98


def test_bf16_is_refused_where_it_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match=r"precision='bf16' needs .* which cpu is not: .* use that"):
        check_precision("bf16", CPU)
    check_precision("fp32", CPU)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    check_precision("bf16", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="which cuda:0 is not"):
        check_precision("bf16", torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_precision("bf16", torch.device("cuda:0"))


# Checkpointing of activations ----------------------------------------------------------------------------------------


def saved_bytes(task: DenoisingTask) -> tuple[int, dict[str, Tensor]]:
    """Bytes of activations that the graph of a loss keeps, each storage once, and the gradients."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in task.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = task.loss(0)
        total = sum(kept.values())
        loss.backward()
    return total, gradients(task)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_keeps_less_and_changes_no_bit(
    kind: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(tasks, "_has_bf16_units", lambda device: True)
    task = make_task(kind, batch_size=2, precision=precision)
    for parameter in task.model.parameters():  # zero-initialised layers would hide what is behind them
        parameter.data.add_(0.05)
    everything, wanted = saved_bytes(task)
    task.model.enable_gradient_checkpointing()
    less, found = saved_bytes(task)
    assert less < 0.6 * everything, (less, everything)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    task.model.disable_gradient_checkpointing()
    assert saved_bytes(task)[0] == everything


def test_gradient_checkpointing_recomputes_only_for_gradients() -> None:
    pytest.importorskip("tokenizers")
    task = make_task("video")
    task.model.enable_gradient_checkpointing()
    calls: list[int] = []
    task.model.unet.mid_layers[0].register_forward_pre_hook(lambda module, args: calls.append(1))
    with torch.no_grad():
        task.loss(0)
    assert len(calls) == 1
    task.loss(0).backward()
    assert len(calls) == 3
    assert not make_model("video").unet.gradient_checkpointing
