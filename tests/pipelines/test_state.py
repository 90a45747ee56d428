"""An interrupted run goes on bit for bit, from memory or from its file; files that cannot serve are refused by name."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from lumiere_fast.diffusion import SAMPLERS, EDMParameterization, EDMSchedule, clip_generators
from lumiere_fast.models import io
from lumiere_fast.pipelines import state as module
from lumiere_fast.pipelines.denoising import Denoised, Denoiser
from lumiere_fast.pipelines.state import DenoisingState, check_same, load_state, save_state
from lumiere_fast.pipelines.windows import Window, WindowPlan, plan_windows

STEPS, PLAN = 5, plan_windows(10, 4)
ABOUT = {"prompt": ["a red ball", "Ein grüner Würfel"], "guidance_scale": 7.1, "steps": 5, "seed": None}
EVERY_SAMPLER = pytest.mark.parametrize(
    "settings", [{"sampler": name} for name in SAMPLERS] + [{"sampler": "ddim", "eta": 0.7}], ids=lambda s: str(s)
)


def draw(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def predict(scaled: Tensor, timestep: Tensor, window: Window) -> Tensor:
    return torch.sin(scaled + scaled.mean(dim=2, keepdim=True) + window.frames.start) + timestep[0] / 1000


def made_state(history: bool = True, plan: WindowPlan = PLAN) -> DenoisingState:
    return DenoisingState(2, draw(2, 3, 10, 4, 5), draw(2, 3, 10, 4, 5, seed=4) if history else None, (), plan)


def of_two(
    settings: dict[str, Any], call: Callable[..., Tensor] = predict, seed: int = 5, dtype: torch.dtype = torch.float32
) -> Callable[..., Denoised]:
    """A run of two clips in the layout of the pipeline, drawn anew at each call as a new process would."""

    def run(**arguments: Any) -> Denoised:
        generators = clip_generators(torch.Generator().manual_seed(seed), 2)
        noise = draw(2, 3, 10, 4, 5, seed=seed, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
        denoiser = Denoiser(EDMSchedule(sigma_min=0.1, sigma_max=10.0), EDMParameterization(), **settings)
        return denoiser(call, noise, STEPS, **{"windows": PLAN, "generators": generators, **arguments})

    return run


# Going on ------------------------------------------------------------------------------------------------------------


class Interrupted:
    """Ctrl-C in a window of the run."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, *call: Any) -> Tensor:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return predict(*call)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY_SAMPLER
def test_an_interrupted_run_goes_on_bit_for_bit(settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    """Through its file, whichever step it was in, and as if it came from a process that knows nothing of the first."""
    whole = of_two(settings, dtype=dtype)()
    path = tmp_path / "run.safetensors"
    for step in range(1, STEPS):
        with pytest.raises(KeyboardInterrupt):
            of_two(settings, Interrupted(step * len(PLAN) + 2), dtype=dtype)(
                on_state=lambda state: save_state(path, state, ABOUT)
            )
        state, about = load_state(path)
        assert (state.step, about) == (step, ABOUT)
        rest = of_two(settings, dtype=dtype)(resume=state)
        assert torch.equal(rest.clip, whole.clip)
        assert rest.clip.stride() == whole.clip.stride()


@torch.no_grad()
@EVERY_SAMPLER
def test_a_run_can_be_interrupted_again_and_again(settings: dict[str, Any], tmp_path: Path) -> None:
    """And a state serves twice: the run works on a copy."""
    whole, path = of_two(settings)(), tmp_path / "run.safetensors"

    def on_state(state: DenoisingState) -> None:
        save_state(path, state, {})
        raise InterruptedError

    arguments: dict[str, Any] = {}
    for step in range(1, STEPS + 1):
        with pytest.raises(InterruptedError):
            of_two(settings)(on_state=on_state, **arguments)
        arguments = {"resume": load_state(path)[0]}
        assert arguments["resume"].step == step
        for _ in range(2):
            assert torch.equal(of_two(settings)(**arguments).clip, whole.clip)


@torch.no_grad()
def test_a_finished_run_is_its_state(tmp_path: Path) -> None:
    states: list[DenoisingState] = []
    clip = of_two({})(on_state=states.append).clip
    assert [state.step for state in states] == [1, 2, 3, 4, 5]
    steps: list[tuple[int, int]] = []
    again = of_two({}, Interrupted(0))(resume=states[-1], on_step=lambda *now: steps.append(now)).clip
    assert torch.equal(again, clip)
    assert steps == []


@torch.no_grad()
def test_windows_are_counted_from_where_the_run_goes_on() -> None:
    steps: list[tuple[int, int]] = []
    state = made_state(plan=plan_windows(10, 6))
    of_two({})(resume=replace(state, generators=generator_states()), on_step=lambda *now: steps.append(now))
    assert steps == [(done, 10) for done in range(5, 11)]


def generator_states() -> tuple[Tensor, ...]:
    return tuple(generator.get_state() for generator in clip_generators(torch.Generator().manual_seed(0), 2))


@torch.no_grad()
def test_the_history_is_kept_for_the_step_that_reads_it_alone() -> None:
    for sampler, reads in (("ddim", []), ("ddpm", []), ("dpm-solver++", [1, 2, 3])):
        states: list[DenoisingState] = []
        of_two({"sampler": sampler})(on_state=states.append)
        assert [state.step for state in states if state.history is not None] == reads


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 6}, "resume is after step 6, the run has 5: give as many steps as before"),
        ({"latent": draw(2, 3, 8, 4, 5)}, r"resume.latent must be like noise, \(2, 3, 10, 4, 5\) torch.float32, got"),
        ({"history": draw(2, 3, 10, 4, 5).half()}, "resume.history must be like noise, .* torch.float16"),
        ({"history": None}, "resume.history is missing, and the sampler's next step reads it"),
        ({"generators": ()}, "resume holds 0 generators, the call has 2"),
        ({"generators": (torch.zeros(16, dtype=torch.uint8),) * 2}, "on the same kind of device"),
    ],
)
def test_a_state_of_another_run_is_refused(change: dict[str, Any], message: str) -> None:
    state = replace(made_state(), generators=generator_states())
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        of_two({})(resume=replace(state, **change))


# The file ------------------------------------------------------------------------------------------------------------


PLANS = [
    PLAN,
    replace(PLAN, weights=(0.1, 0.7, 1 / 3, 0.2)),
    WindowPlan(10, 4, 2, ((0, 0, 0), (6, 1, 2)), (3, 3), ((0.1,) * 4, (1 / 7, 1.0, 1 / 7), (1.0,) * 3)),
]


@pytest.mark.parametrize("plan", PLANS, ids=["frames", "weights", "space"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_state_comes_back_as_it_was(
    dtype: torch.dtype, layout: torch.memory_format, plan: WindowPlan, tmp_path: Path
) -> None:
    latent, history = (draw(2, 3, 10, 4, 5, seed=i, dtype=dtype).contiguous(memory_format=layout) for i in (0, 1))
    for kept in (history, None):
        state = DenoisingState(3, latent, kept, generator_states(), plan)
        save_state(tmp_path / "run.safetensors", state, ABOUT)
        found, about = load_state(tmp_path / "run.safetensors")
        assert (found.step, found.windows, about) == (3, plan, ABOUT)
        assert hash(found.windows) == hash(plan)
        for new, old in ((found.latent, latent), (found.history, kept)):
            assert (new is None) == (old is None)
            if new is not None and old is not None:
                assert torch.equal(new, old)
                assert (new.dtype, new.stride()) == (old.dtype, old.stride())
        assert len(found.generators) == 2
        assert all(map(torch.equal, found.generators, state.generators))


@pytest.mark.parametrize("about", [{"plan": PLAN}, {"size": (1, 2)}, {"x": float("nan")}, {1: "x"}, {"t": draw(1)}])
def test_what_a_file_cannot_say_of_a_run_is_refused(about: dict[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="about must hold strings, finite numbers, booleans, None and lists of these"):
        save_state(tmp_path / "run.safetensors", made_state(), about)
    assert not list(tmp_path.iterdir())


def test_every_setting_that_differs_is_named() -> None:
    check_same(ABOUT, dict(ABOUT))
    now = {"prompt": ["a red ball"], "guidance_scale": 7.1, "steps": 6, "sampler": "ddim"}
    with pytest.raises(ValueError) as error:
        check_same(now, ABOUT)
    assert str(error.value) == (
        "the interrupted run had other settings: prompt was ['a red ball', 'Ein grüner Würfel'] and is ['a red ball']; "
        "steps was 5 and is 6; seed was None and is not given; sampler was not given and is 'ddim'"
    )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path} is missing or not a file"):
            load_state(path)


def written(state: DenoisingState, path: Path) -> bytes:
    save_state(path, state, ABOUT)
    return path.read_bytes()


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 40, 0.5, -1])
def test_a_truncated_file_is_refused_by_name(kept: float, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    whole = written(made_state(), path)
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=f"{path} is truncated or not a safetensors file"):
        load_state(path)


@pytest.mark.parametrize("name", ["run.safetensors", "run.pt", "run"])
@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_is_refused_by_name(write: Callable[[object, Path], None], name: str, tmp_path: Path) -> None:
    write({"latent": draw(2, 3, 10, 4, 5)}, tmp_path / name)
    with pytest.raises(ValueError, match=f"{tmp_path / name} is a pickle, which can run any code"):
        load_state(tmp_path / name)


HEADER = {
    "step": 2,
    "channels_last": {"latent": True},
    "windows": {"num_frames": 10, "window_frames": 4, "overlap": 2, "corners": [[0]], "window_size": None},
    "about": {},
}


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {module.KEY: "{"},
        {module.KEY: "[]"},
        {module.KEY: json.dumps({"step": 2})},
        {module.KEY: json.dumps(HEADER)},
    ],
    ids=["none", "another's", "no JSON", "no object", "incomplete", "a plan without weights"],
)
def test_a_foreign_file_is_refused_by_name(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    save_file({"latent": draw(2, 10, 4, 5, 3)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=f"{path} is not the state of an interrupted run, or it is damaged"):
        load_state(path)


def test_a_header_that_begins_as_pickles_do_is_none(tmp_path: Path) -> None:
    """The first bytes are the length of the header: 0x380 is also, in protocol 3, the start of a pickle."""
    path = tmp_path / "run.safetensors"
    save_state(path, made_state(history=False), {"padding": ""})
    missing = 0x380 - int.from_bytes(path.read_bytes()[:8], "little")
    save_state(path, made_state(history=False), {"padding": "x" * missing})
    assert path.read_bytes().startswith(b"\x80\x03")
    assert load_state(path)[0].step == 2


def test_a_file_with_entries_of_another_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    written(made_state(history=False), path)
    metadata = io.read_metadata(path)
    path.write_bytes(save({"latent": draw(2, 3, 10, 4, 5), "weight": draw(3)}, metadata))
    with pytest.raises(ValueError, match=f"{path} is not the state of an interrupted run"):
        load_state(path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
@pytest.mark.parametrize("when", ["before", "amid", "after"])
def test_the_previous_state_outlives_a_failure_to_write(
    error: type[BaseException], when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.safetensors"
    before = written(made_state(), path)

    def fail(tensors: dict[str, Tensor], partial: Path, metadata: dict[str, str] | None = None) -> None:
        if when != "before":
            whole = save(tensors, metadata)
            Path(partial).write_bytes(whole if when == "after" else whole[: len(whole) // 2])
        raise error

    monkeypatch.setattr(io, "save_file", fail)
    with pytest.raises(error):
        save_state(path, replace(made_state(), step=3), ABOUT)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before
    assert load_state(path)[0].step == 2


def test_bytes_reach_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.safetensors"
    written(made_state(), path)
    happened: list[tuple[str, int]] = []
    fsync, replace_file = os.fsync, Path.replace

    def synced(file: int) -> None:
        happened.append(("synced", os.fstat(file).st_ino))
        fsync(file)

    def replaced(source: Path, target: Path) -> Path:
        happened.append(("replaced", source.stat().st_ino))
        return replace_file(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    save_state(path, replace(made_state(), step=3), ABOUT)
    assert happened == [("synced", path.stat().st_ino), ("replaced", path.stat().st_ino)]
    assert load_state(path)[0].step == 3


def test_a_state_in_use_may_be_replaced(tmp_path: Path) -> None:
    """What was loaded does not change with the file that it came from."""
    path = tmp_path / "run.safetensors"
    written(made_state(), path)
    state, _ = load_state(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(state.latent, made_state().latent)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "run.safetensors"
    with pytest.raises(OSError, match=f"{path} could not be written"):
        save_state(path, made_state(), {})
