"""Captured calls, with a recorder of torch's operators on the CPU where torch.cuda would record launches.

Like a graph, it runs again what ran at the capture, on the tensors of the capture: what was not copied there is stale.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lumiere_fast import inflate
from lumiere_fast.diffusion import EDMParameterization, EDMSchedule
from lumiere_fast.pipelines import cuda_graph
from lumiere_fast.pipelines.cuda_graph import WARM_UPS, Graphed
from lumiere_fast.pipelines.denoising import Denoiser
from lumiere_fast.pipelines.windows import Window, plan_windows
from tests.models.tiny import draw_inputs, randomise, tiny_unet


def draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Recorder(TorchDispatchMode):
    """A graph of torch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, results))
        return results

    def replay(self) -> None:
        log.append("replay")
        for func, args, kwargs, results in self.calls:
            again = func(*args, **kwargs)
            for new, old in zip(tree_leaves(again), tree_leaves(results), strict=True):
                if isinstance(old, Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


class Stream:
    def __init__(self, name: str = "side") -> None:
        self.name = name

    def wait_stream(self, other: Stream) -> None:
        log.append(f"{self.name} waits for {other.name}")


log: list[str] = []


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """torch.cuda as the module uses it, on the CPU; what happens, in order."""

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        log.append(f"on {stream.name}")
        yield
        log.append(f"off {stream.name}")

    @contextmanager
    def capture(graph: Recorder, *, pool: str, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        log.append(f"capture on {stream.name} in {pool}")
        with graph:
            yield

    monkeypatch.setattr(cuda_graph, "DEVICE", "cpu")
    current = Stream("current")
    stand_ins = {
        "current_stream": lambda: current,
        "Stream": Stream,
        "stream": on,
        "graph_pool_handle": partial(next, (f"pool {number}" for number in count())),
        "CUDAGraph": Recorder,
        "graph": capture,
        "device": lambda device: nullcontext(),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    log.clear()
    with torch.no_grad():
        yield log


class Counted:
    """A function that counts its calls: a replay is none."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.function(*args, **kwargs)


PER_CAPTURE = WARM_UPS + 1


def product(x: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
    return torch.sin(x @ y) * scale


def test_every_call_is_of_its_own_values(recorded: list[str]) -> None:
    counted = Counted(product)
    graphed = Graphed(counted)
    inputs = [(draw(4, 5, seed=i), draw(5, 3, seed=i + 10)) for i in range(4)]
    for x, y in inputs:
        assert torch.equal(graphed(x, y), product(x, y))
    assert counted.calls == PER_CAPTURE
    assert recorded.count("replay") == len(inputs)


def test_the_next_call_leaves_results_and_arguments_alone(recorded: list[str]) -> None:
    """The predictions of a step's windows lie together in memory."""
    graphed = Graphed(product)
    inputs = [(draw(4, 5, seed=i), draw(5, 3, seed=i + 10)) for i in range(3)]
    kept = [(x.clone(), y.clone()) for x, y in inputs]
    results = [graphed(x, y) for x, y in inputs]
    for result, (x, y), (x_kept, y_kept) in zip(results, inputs, kept, strict=True):
        assert torch.equal(result, product(x_kept, y_kept))
        assert torch.equal(x, x_kept)
        assert torch.equal(y, y_kept)


def test_it_is_captured_on_a_stream_of_its_own_after_warming_up(recorded: list[str]) -> None:
    graphed = Graphed(product)
    graphed(draw(2, 2), draw(2, 2))
    before = ["side waits for current", "on side", "off side", "current waits for side"]
    assert recorded == [*before, "capture on side in pool 0", "replay"]
    graphed(draw(3, 3), draw(3, 3))
    assert recorded[6:] == recorded[:6], "another capture, in the same memory"


def test_graphs_are_dropped_where_one_more_has_no_memory(recorded: list[str]) -> None:
    """The allocator cannot free what they hold, and the smaller call that comes next needs it."""
    graphed = Graphed(lambda x: x + 1 if x.numel() < 8 else torch.empty(2**60))
    graphed(draw(2, 2))
    (graph,) = [weakref.ref(graph.inputs[0]) for graph in graphed._graphs.values()]
    with pytest.raises(RuntimeError, match="allocate"):
        graphed(draw(4, 4))
    gc.collect()
    assert graph() is None
    assert torch.equal(graphed(draw(2, 2)), draw(2, 2) + 1)
    assert recorded.count("capture on side in pool 1") == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda x: ((x[:3],), {}),
        lambda x: ((x.double(),), {}),
        lambda x: ((x.t().contiguous().t(),), {}),
        lambda x: ((x,), {"scale": 2.0}),
        lambda x: (([x],), {}),
        lambda x: ((), {"x": x}),
    ],
    ids=["shape", "dtype", "strides", "constant", "nesting", "by name"],
)
def test_one_capture_for_each_signature(
    recorded: list[str], other: Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]
) -> None:
    def function(x: Any, scale: float = 1.0) -> Tensor:
        return torch.sin(x[0] if isinstance(x, list) else x) * scale

    counted = Counted(function)
    graphed = Graphed(counted)
    for seed, captures in ((0, 2), (1, 2), (2, 2)):
        x = draw(4, 5, seed=seed)
        args, kwargs = other(x)
        assert torch.equal(graphed(x), function(x))
        assert torch.equal(graphed(*args, **kwargs), function(*args, **kwargs))
        assert counted.calls == captures * PER_CAPTURE


def test_graphs_made_in_inference_mode_are_of_it_alone(recorded: list[str]) -> None:
    """Tensors made there cannot be written elsewhere."""
    graphed = Graphed(product)
    for _ in range(2):
        for mode in (torch.inference_mode(), nullcontext()):
            with mode:
                x, y = draw(4, 5, seed=len(recorded)), draw(5, 3)
                assert torch.equal(graphed(x, y), product(x, y))


def test_what_is_no_tensor_is_read_where_it_lay(recorded: list[str]) -> None:
    class Text:
        def __init__(self) -> None:
            self.keys = draw(5)

    text, layer = Text(), torch.nn.Linear(5, 5)
    counted = Counted(lambda x, text: layer(x) + text.keys)
    graphed = Graphed(counted)
    for _ in range(3):
        x = draw(4, 5, seed=counted.calls)
        layer.weight.mul_(1.5)
        text.keys.add_(1.0)
        assert torch.equal(graphed(x, text), layer(x) + text.keys)
    assert counted.calls == PER_CAPTURE
    other = Text()
    other.keys.fill_(7.0)
    assert torch.equal(graphed(x, other), layer(x) + 7.0)
    assert counted.calls == 2 * PER_CAPTURE


def test_tensors_may_be_nested(recorded: list[str]) -> None:
    def function(x: Tensor, others: dict[str, Tensor]) -> dict[str, Any]:
        return {"sum": x + others["a"], "both": (x * others["b"], "text")}

    graphed = Graphed(function)
    for seed in range(3):
        x, others = draw(4, seed=seed), {"a": draw(4, seed=seed + 5), "b": draw(4, seed=seed + 9)}
        result, wanted = graphed(x, others), function(x, others)
        assert torch.equal(result["sum"], wanted["sum"])
        assert torch.equal(result["both"][0], wanted["both"][0])
        assert result["both"][1] == "text"


def test_the_graphs_own_copy_of_a_window_is_no_larger_than_the_window(recorded: list[str]) -> None:
    seen: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        seen.append(x)
        return x + 1

    clip = draw(2, 3, 40, 4, 4).contiguous(memory_format=torch.channels_last_3d)
    Graphed(function)(clip[:, :, 10:14])
    assert seen[0].untyped_storage().nbytes() == clip[:, :, 10:14].numel() * clip.element_size()
    assert seen[0].is_contiguous(memory_format=torch.channels_last_3d)


def test_a_network_in_windows_is_captured_once(recorded: list[str]) -> None:
    """Super-resolution as the pipeline calls it, prepared text and conditioning among the arguments."""
    model = inflate(tiny_unet(ssr=True, dtype=torch.float32), temporal_factors=(2,))
    randomise(model.temporal)
    inputs = draw_inputs(tiny_unet(ssr=True, dtype=torch.float32), 1, 8, 8)
    text = model.prepare_text(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
    image, level = draw(1, 3, 10, 8, 8), torch.tensor([2.0])
    counted = Counted(model)

    def clip(network: Callable[..., Tensor]) -> Tensor:
        def predict(scaled: Tensor, timestep: Tensor, window: Window) -> Tensor:
            part = window.of(image)
            return network(scaled, timestep, text, image_conditioning=part, augmentation_level=level)

        denoiser = Denoiser(EDMSchedule(sigma_min=0.1, sigma_max=10.0), EDMParameterization())
        return denoiser(predict, draw(1, 3, 10, 8, 8, seed=9), 3, windows=plan_windows(10, 4)).clip

    torch.testing.assert_close(clip(Graphed(counted)), clip(model), rtol=0, atol=1e-5)
    assert counted.calls == PER_CAPTURE
    assert recorded.count("replay") == 3 * 4


# Where nothing is captured -------------------------------------------------------------------------------------------


def forbid_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a graph was asked for")

    for name in ("CUDAGraph", "graph", "Stream", "device"):
        monkeypatch.setattr(torch.cuda, name, refuse)


@torch.no_grad()
def test_off_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The very arguments go in and the very result comes out."""
    forbid_graphs(monkeypatch)
    x, kept = draw(4), []
    graphed = Graphed(lambda *args, **kwargs: kept.append((args, kwargs)) or args[0])
    for _ in range(3):
        assert graphed(x, "text", level=x) is x
    assert len(kept) == 3
    assert all(args[0] is x and kwargs["level"] is x for args, kwargs in kept)


def test_off_where_a_gradient_is_recorded_under_autocast_and_without_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "DEVICE", "cpu")
    forbid_graphs(monkeypatch)
    x = draw(4).requires_grad_()
    (gradient,) = torch.autograd.grad(Graphed(torch.sin)(x).sum(), x)
    assert torch.equal(gradient, x.cos())
    with torch.no_grad():
        assert Graphed(lambda n: n + 1)(3) == 4
        with torch.autocast("cpu", torch.bfloat16):
            assert Graphed(torch.matmul)(draw(4, 4), draw(4, 4)).dtype == torch.bfloat16


@torch.no_grad()
def test_on_for_tensors_of_one_cuda_device() -> None:
    with FakeTensorMode():
        first, second, host = (torch.empty(2, device=device) for device in ("cuda:0", "cuda:1", "cpu"))
    assert cuda_graph._is_captured([first, "text", first])
    assert not cuda_graph._is_captured([first, second])
    assert not cuda_graph._is_captured([first, host])
    assert not cuda_graph._is_captured([host])
    with torch.enable_grad():
        assert not cuda_graph._is_captured([first])
