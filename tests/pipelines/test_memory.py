from __future__ import annotations

import pytest
import torch

from lumiere_fast import LumierePipeline
from lumiere_fast.pipelines import memory
from tests.pipelines.tiny import make_pipeline


@pytest.fixture(scope="module")
def pipe() -> LumierePipeline:
    return make_pipeline()


def test_the_skips_are_those_that_the_model_concatenates(
    pipe: LumierePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted at the joins of a forward pass: `torch.cat([h, skip], dim=1)` in the way up, conditional and not."""
    pytest.importorskip("tokenizers")
    joined: list[int] = []
    concatenate = torch.cat

    def counting(tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
        if len(tensors) == 2 and tensors[0].ndim == 5 and dim == 1:
            joined.append(tensors[1].numel())
        return concatenate(tensors, dim=dim)

    monkeypatch.setattr(torch, "cat", counting)
    hidden_states, mask = pipe.text_encoder.encode(["a red ball"] * 2)
    with torch.no_grad():
        pipe.base(torch.zeros(2, 3, 8, 8, 8), torch.zeros(2), hidden_states, mask)
    assert len(joined) == 2
    assert sum(joined) == 2 * memory._skip_elements(pipe.base, 8)


def test_the_bound_is_the_larger_stage_and_the_weights(pipe: LumierePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = 4 * sum(p.numel() for model in (pipe.base, pipe.ssr) for p in model.parameters())
    clips = 5 * 3 * 40 * 16 * 16 * 4
    assert memory.least_bytes(pipe, 40, 3) == weights + 3 * clips
    monkeypatch.setattr(memory, "SSR_CLIPS", 0)
    skips = 4 * memory._skip_elements(pipe.base, 4)  # of a window of the base model
    assert memory.least_bytes(pipe, 40, 3, guided=True) == weights + 3 * 2 * skips
    assert memory.least_bytes(pipe, 40, 3, guided=False) == weights + 3 * skips


def test_what_cannot_fit_is_refused_with_both_figures(pipe: LumierePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = memory.least_bytes(pipe, 4000, 2)
    monkeypatch.setattr(memory, "total_memory", lambda device: needed)
    memory.check_memory(pipe, 4000, 2)
    monkeypatch.setattr(memory, "total_memory", lambda device: needed - 1)
    gib = f"{needed / 2**30:,.1f}"
    with pytest.raises(ValueError, match=f"2 x 4000 frames need more than {gib} GiB of memory, and cpu has {gib}"):
        memory.check_memory(pipe, 4000, 2)
    monkeypatch.setattr(memory, "total_memory", lambda device: None)
    memory.check_memory(pipe, 10**12, 2)


def test_this_machine_can_make_a_short_clip_and_not_an_endless_one(pipe: LumierePipeline) -> None:
    memory.check_memory(pipe, None, 1)
    total = memory.total_memory(torch.device("cpu"))
    assert total is None or 2**28 < total < 2**50
    if total is not None:
        with pytest.raises(ValueError, match="GiB"):
            memory.check_memory(pipe, 10**12, 1)
