"""A text prepared once serves every call of its model, and none of another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lumiere_fast import STUNet, UNet2D, inflate
from lumiere_fast.models import PreparedText
from lumiere_fast.models.blocks import TextConditioner, TextCrossAttention
from tests.models.tiny import draw_inputs, randomise, tiny_unet

TEXT = ("encoder_hidden_states", "encoder_attention_mask")


def image(**changes: Any) -> UNet2D:
    return tiny_unet(3, **changes)


def video(**changes: Any) -> STUNet:
    return randomise(inflate(tiny_unet(3, **changes), temporal_factors=(2, 1), temporal_conditioning=True))


MODELS = {"image": image, "video": video, "ssr": lambda **changes: video(ssr=True, **changes)}


def prepared(model: UNet2D | STUNet, inputs: dict[str, Tensor]) -> tuple[PreparedText, dict[str, Any]]:
    """The text, and the other arguments."""
    return model.prepare_text(*(inputs[name] for name in TEXT)), {n: x for n, x in inputs.items() if n not in TEXT}


@contextmanager
def runs_of_text_layers(model: nn.Module) -> Iterator[list[str]]:
    """The names of the layers that read nothing but text, each time one runs."""
    runs: list[str] = []
    layers = [name for name, m in model.named_modules() if isinstance(m, TextConditioner)]
    layers += [f"{name}.to_kv" for name, m in model.named_modules() if isinstance(m, TextCrossAttention)]
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: runs.append(name)) for name in layers
    ]
    try:
        yield runs
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("kind", MODELS)
def test_a_prepared_text_gives_the_same_to_the_bit_and_is_read_once(kind: str) -> None:
    model = MODELS[kind]()
    inputs = draw_inputs(model, 2, 4, 16, 16)
    wanted = [model(**inputs), model(**inputs | {"timestep": inputs["timestep"] + 40})]
    with runs_of_text_layers(model) as runs:
        text, others = prepared(model, inputs)
        # six cross-attentions, and the readings of the spatial and of the temporal layers
        assert len(runs) == len(set(runs)) == (7 if kind == "image" else 8)
        runs.clear()
        got = [model(others.pop("sample"), others.pop("timestep"), text, **others)]
        others |= {"sample": inputs["sample"], "timestep": inputs["timestep"] + 40}
        got.append(model(**others, encoder_hidden_states=text))
        assert runs == []
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


def test_gradients_pass_through_a_prepared_text() -> None:
    unet = image()
    inputs = draw_inputs(unet, 2, 16, 16)
    gradients = []
    for prepare in (False, True):
        unet.zero_grad()
        text, others = prepared(unet, inputs)
        result = unet(**others, encoder_hidden_states=text) if prepare else unet(**inputs)
        result.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(".to_kv." in name for name in gradients[0])
    assert all(torch.equal(grad, gradients[1][name]) for name, grad in gradients[0].items())


def test_a_prepared_text_is_of_its_model() -> None:
    model, twin = video(), video()
    inputs = draw_inputs(model, 1, 4, 16, 16)
    text, others = prepared(model, inputs)
    for other in (twin, model.unet):
        with pytest.raises(ValueError, match="the text was prepared by another model: use prepare_text of this one"):
            other(**others, encoder_hidden_states=text)
    with pytest.raises(ValueError, match="prepared by another model"):
        model(**others, encoder_hidden_states=prepared(model.unet, inputs)[0])


def test_a_prepared_text_is_of_its_batch_dtype_and_device() -> None:
    model = video(dtype=torch.float32)
    inputs = draw_inputs(model, 2, 4, 16, 16)
    text, others = prepared(model, inputs)
    one = {name: x[:1] for name, x in others.items()}
    with pytest.raises(ValueError, match="prepared for batch 2, this call has 1: prepare it again"):
        model(**one, encoder_hidden_states=text)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match=r"for dtype torch.float32, this call has torch.bfloat16"):
            model(**others, encoder_hidden_states=text)
        inside, _ = prepared(model, inputs)
        assert torch.equal(model(**others, encoder_hidden_states=inside), model(**inputs))
    with pytest.raises(ValueError, match=r"for dtype torch.bfloat16, this call has torch.float32"):
        model(**others, encoder_hidden_states=inside)
    with pytest.raises(ValueError, match=r"for dtype torch.float32, this call has torch.float64"):
        model.double()(**others, encoder_hidden_states=text)
    elsewhere, meta = model.to("meta"), {name: x.to("meta") for name, x in others.items()}
    with pytest.raises(ValueError, match=r"for device cpu, this call has meta|for dtype"):
        elsewhere.float()(**meta, encoder_hidden_states=text)


def test_the_mask_belongs_to_the_text() -> None:
    model = video()
    inputs = draw_inputs(model, 1, 4, 16, 16)
    mask = inputs["encoder_attention_mask"]
    text, others = prepared(model, inputs)
    with pytest.raises(ValueError, match="encoder_attention_mask is part of a prepared text: leave it out"):
        model(**others, encoder_hidden_states=text, encoder_attention_mask=mask)
    with pytest.raises(ValueError, match="encoder_attention_mask is required beside encoder_hidden_states"):
        model(**others, encoder_hidden_states=inputs["encoder_hidden_states"])


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": None}, r"states must be a tensor \(B, L, 12\) with L >= 1, got NoneType"),
        ({"states": np.zeros((1, 5, 12))}, "got ndarray"),
        ({"states": torch.zeros(1, 5, 13)}, r"got torch.float32 \(1, 5, 13\)"),
        ({"states": torch.zeros(1, 0, 12), "mask": torch.ones(1, 0, dtype=torch.bool)}, r"L >= 1, got .* \(1, 0, 12\)"),
        ({"mask": None}, r"mask must be a torch.bool tensor \(1, 5\), True at real tokens, got NoneType"),
        ({"mask": np.ones((1, 5), dtype=bool)}, "got ndarray"),
        ({"mask": torch.ones(1, 5)}, r"got torch.float32 \(1, 5\)"),
        ({"mask": torch.ones(1, 4, dtype=torch.bool)}, r"got torch.bool \(1, 4\)"),
    ],
)
def test_states_and_mask_are_tensors_of_one_shape(kind: str, change: dict[str, Any], message: str) -> None:
    given = {"states": torch.zeros(1, 5, 12), "mask": torch.ones(1, 5, dtype=torch.bool)} | change
    with pytest.raises(ValueError, match=message):
        MODELS[kind]().prepare_text(given["states"], given["mask"])


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_text_that_is_neither_states_nor_prepared_is_refused(kind: str) -> None:
    model = MODELS[kind]()
    inputs = draw_inputs(model, 1, 4, 16, 16)
    states, mask = (inputs.pop(name) for name in TEXT)
    message = "encoder_hidden_states must be a tensor, .* or what prepare_text returned, got "
    for text in (None, (states, mask), states.numpy()):
        for beside in ({}, {"encoder_attention_mask": mask}):
            with pytest.raises(ValueError, match=message + type(text).__name__):
                model(**inputs, encoder_hidden_states=text, **beside)
