"""torch.compile sees through an op's Triton kernel. Traced for a GPU that is not here, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

TRACE = """
import torch
import triton
from torch._functorch.aot_autograd import aot_function
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from lumiere_fast import dispatch, ops


class Hopper:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)


def blend(*windows):
    return ops.blend_windows(list(windows), [0, 6], 14, backend="triton").sin()


def print_and_stop(module, inputs):
    print(module.code)
    raise SystemExit


triton.runtime.driver.set_active(Hopper())
dispatch._capability = lambda device: (9, 0)
with FakeTensorMode():
    windows = [torch.empty(1, 3, 8, 16, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    aot_function(blend, print_and_stop)(*windows)
"""


def test_the_graph_holds_the_kernel_and_copies_no_input() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", TRACE], capture_output=True, text=True, env=environment, timeout=250)
    assert done.returncode == 0, done.stderr
    graph = done.stdout
    assert graph.count("triton_kernel_wrapper_functional(") == 1 and "lumiere_fast.blend_windows" not in graph
    assert "'w0': arg0_1, 'w1': arg1_1" in graph
    assert "tensors_to_clone = ['out']" in graph  # all that the kernel writes
    assert "clone" not in graph.replace("tensors_to_clone", "") and "contiguous(" not in graph
