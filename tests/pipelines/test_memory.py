from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lumiere_fast import LumierePipeline
from lumiere_fast.pipelines import memory
from lumiere_fast.pipelines.windows import plan_windows
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
    """40 frames in 19 windows of 4: latent and clean clip in fp32, the predictions of a step in the weights' dtype."""
    weights = 4 * sum(p.numel() for model in (pipe.base, pipe.ssr) for p in model.parameters())
    frame = 3 * 16 * 16 * 4
    assert memory.least_bytes(pipe, 40, 3) == weights + 3 * (2 * 40 + 19 * 4) * frame
    assert memory.least_bytes(pipe, 40, 3, stochastic=True) == weights + 3 * (3 * 40 + 19 * 4) * frame
    half = make_pipeline().to(torch.bfloat16)
    assert memory.least_bytes(half, 40, 3) == weights // 2 + 3 * (2 * 40 + 19 * 2) * frame
    monkeypatch.setattr(memory, "_skip_elements", lambda model, frames: 10**6 * frames)
    skips = 4 * 10**6 * pipe.config.num_frames  # of a window of the base model
    assert memory.least_bytes(pipe, 40, 3, guided=True) == weights + 3 * 2 * skips
    assert memory.least_bytes(pipe, 40, 3, guided=False) == weights + 3 * skips


@pytest.mark.parametrize("num_frames", [2, 4, 5, 6, 40, 41])
def test_the_bound_knows_the_plan(num_frames: int, pipe: LumierePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_skip_elements", lambda model, frames: 0)
    weights = 4 * sum(p.numel() for model in (pipe.base, pipe.ssr) for p in model.parameters())
    videos = memory.video_bytes(plan_windows(num_frames, 4), (16, 16), torch.float32)
    assert memory.least_bytes(pipe, num_frames, 1) == weights + videos


def test_windows_in_space_are_held_as_often_as_they_overlap() -> None:
    windows = plan_windows(8, 8, size=(96, 64), window_size=(64, 64), size_overlap=(32, 0))
    assert len(windows) == 2
    held, predicted = 2 * 8 * 96 * 64 * 4, 2 * 8 * 64 * 64 * 2
    assert memory.video_bytes(windows, (96, 64), torch.bfloat16) == 3 * (held + predicted)


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


# What is free -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("12GiB", 12 * 2**30),
        ("500 MB", 500 * 10**6),
        ("1.5g", 3 * 2**29),
        (" .5K ", 512),
        ("1tb", 10**12),
        ("7", 7),
        ("3B", 3),
        (12, 12),
    ],
)
def test_sizes_are_read(text: int | str, count: int) -> None:
    assert memory.parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-3", "1e3", "nan", "12 iB", "1GiBs", True, 1.5, None])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="a number of bytes or a text such as '12GiB' or '500MB', got"):
        memory.parse_bytes(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [0, "0 GB", "0.2"])
def test_no_memory_is_refused(text: int | str) -> None:
    with pytest.raises(ValueError, match="memory must be above zero"):
        memory.parse_bytes(text)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int | None]:
    """Free memory of a machine with 8 GiB available and files of control groups as given."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 16777216 kB\nMemFree:  99 kB\nMemAvailable:    8388608 kB\n")
    monkeypatch.setattr(memory, "PROC", proc)
    monkeypatch.setattr(memory, "CGROUP", groups)

    def free(lines: str, files: dict[str, object]) -> int | None:
        (proc / "self" / "cgroup").write_text(lines)
        for name, content in files.items():
            (groups / name).parent.mkdir(parents=True, exist_ok=True)
            (groups / name).write_text(f"{content}\n")
        return memory.free_memory(torch.device("cpu"))

    return free


def test_free_memory_is_what_linux_has_available(system: Callable[..., int | None]) -> None:
    assert system("", {}) == 8 * 2**30
    (memory.PROC / "meminfo").unlink()
    assert memory.free_memory(torch.device("cpu")) is None


def test_a_limit_of_any_group_above_counts(system: Callable[..., int | None]) -> None:
    """Version 2: what is left of a limit, with the files that are only cached."""
    unlimited = {"job/step/memory.max": "max", "job/step/memory.current": 1000, "job/step/memory.stat": "anon 1"}
    assert system("0::/job/step\n", unlimited) == 8 * 2**30
    stat = "anon 7\ninactive_file 300\nactive_file 9"
    limited = {"job/memory.max": 6000, "job/memory.current": 4000, "job/memory.stat": stat}
    assert system("0::/job/step\n", limited) == 2300
    assert system("0::/elsewhere\n", {"memory.max": 500, "memory.current": 900, "memory.stat": ""}) == 0


def test_groups_of_version_1_count_too(system: Callable[..., int | None]) -> None:
    files = {
        "memory/box/memory.limit_in_bytes": 5000,
        "memory/box/memory.usage_in_bytes": 3000,
        "memory/box/memory.stat": "inactive_file 1\ntotal_inactive_file 20",
    }
    assert system("4:memory:/box\n3:cpuset:/\n", files) == 2020
    assert system("3:cpuset:/box\n", {}) == 8 * 2**30


def test_on_a_gpu_what_the_allocator_keeps_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert memory.free_memory(torch.device("cuda")) == 140
