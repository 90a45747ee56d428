"""A network's launches recorded once as a CUDA graph, and started together at every later call.

Written without a GPU: the tests hold its logic against a recorder of torch's operators on the CPU in the place of
torch.cuda's graphs. No GPU has run it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

DEVICE = "cuda"
WARM_UPS = 2  # the first compiles kernels and checks backends; the second shows the allocator what the graph will need


class Graphed:
    """`function` with its calls on a CUDA device captured, one graph for each signature; elsewhere `function` itself.

    A signature is the nesting of the arguments, each tensor's shape, strides, dtype and device, and what else there is
    by its equality. Tensors among the arguments may hold other values at each call: they are copied into the graph's
    own. Everything else that `function` reads is read where it lay at the capture: weights, and what an argument such
    as a `PreparedText` holds, which is no tensor itself. So make a new `Graphed` once those have moved.

    The results are copies, which later calls leave alone. Calls that record a gradient or run under autocast are not
    captured.

    Args:
        function: of tensors, in tuples, lists and dicts, to tensors, likewise. It must not read values back to the host
            nor draw random numbers, and is called `WARM_UPS` times more for each graph.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._graphs: dict[Hashable, _Graph] = {}
        self._pool: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        if not _is_captured(leaves):
            return self.function(*args, **kwargs)
        signature = (structure, torch.is_inference_mode_enabled(), *(_kind(leaf) for leaf in leaves))
        graph = self._graphs.get(signature)
        with torch.cuda.device(_tensors(leaves)[0].device):
            if graph is None:
                try:
                    graph = self._graphs[signature] = self._capture(leaves, structure)
                except RuntimeError:  # of memory: nothing else could free what the graphs hold
                    self._graphs.clear()
                    self._pool = None
                    raise
            return graph(_tensors(leaves))

    def _capture(self, leaves: Sequence[Any], structure: Any) -> _Graph:
        """On a stream beside the current one, where nothing but the graph's own work may run.

        The graphs share their memory: each one's results are copied before another is started, so none of it outlives
        a call. Other threads may allocate meanwhile.
        """
        own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(own, structure)
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.function(*args, **kwargs)
        current.wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            results = self.function(*args, **kwargs)
        return _Graph(graph, _tensors(own), results)


@dataclass(frozen=True)
class _Graph:
    """A captured call: `inputs` is where it reads, `results` where it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    results: Any

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given)
        self.graph.replay()
        return tree_map_only(Tensor, Tensor.clone, self.results)


def _is_captured(leaves: Sequence[Any]) -> bool:
    """Whether a call is one for a graph: of tensors of one CUDA device, to be differentiated and cast by nobody."""
    devices = {tensor.device for tensor in _tensors(leaves)}
    if len(devices) != 1 or devices.pop().type != DEVICE:
        return False
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled(DEVICE)


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _kind(leaf: Any) -> Hashable:
    """What two arguments have in common that one graph can take."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return type(leaf), leaf
