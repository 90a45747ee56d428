"""What a model's activations take, counted on fake tensors: against counts by hand, and against a process's memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lumiere_fast import LumierePipeline, dispatch, inflate
from lumiere_fast.models import STUNet, UNet2D
from lumiere_fast.models.config import PAPER, config_to_dict
from lumiere_fast.pipelines.activations import MARGIN, forward_bytes, linear_bytes, peak_bytes


def twice_and_back(x: Tensor) -> Tensor:
    a = x + 1  # 1
    b = torch.cat([a, a])  # 3
    del a  # 2
    c = b.view(-1)[: x.numel()] * 2  # 3
    del b  # 1
    return c.reshape(x.shape).add_(1).t()


@pytest.mark.parametrize(
    ("function", "videos"),
    [
        (twice_and_back, 3),
        (lambda x: x.view(-1).t(), 0),
        (lambda x: [x + 1 for _ in range(3)], 3),
        (lambda x: x.clone().double(), 3),
        (lambda x: x[:, :1].expand(x.shape).contiguous(), 1),
        (lambda x: x.split(1), 0),
    ],
)
def test_live_storages_are_counted_once_and_no_longer_than_they_live(
    function: Callable[[Tensor], object], videos: int
) -> None:
    assert peak_bytes(function, torch.zeros(64, 32)) == videos * 64 * 32 * 4


def test_nothing_is_allocated_and_nothing_kept() -> None:
    terabyte = torch.zeros(1).expand(2**38)
    assert peak_bytes(lambda x: x + 1, terabyte) == 2**40


def test_weights_are_not_counted() -> None:
    layer = nn.Linear(1000, 8)
    assert peak_bytes(layer, torch.zeros(3, 1000)) == 3 * 8 * 4
    assert peak_bytes(lambda x: layer.weight.t()[:3] + x, torch.zeros(3, 8)) == 3 * 8 * 4


def test_a_call_takes_what_its_size_says() -> None:
    """Activations grow with frames, clips and pixels, and are half in bfloat16; a clip's text is next to nothing."""
    pipe = LumierePipeline.from_pretrained("demo")
    with dispatch.record_backends() as used:
        one = forward_bytes(pipe.ssr, 1, 4, 128, 128)
    assert not used, "nothing ran"
    line = linear_bytes(lambda frames: forward_bytes(pipe.ssr, 1, frames, 128, 128), 4, 12)
    assert line(12) == pytest.approx(3 * one, rel=0.01)
    assert forward_bytes(pipe.ssr, 2, 8, 128, 64) == pytest.approx(line(8), rel=0.01)
    pipe.to(torch.bfloat16)
    assert forward_bytes(pipe.ssr, 1, 4, 128, 128) == pytest.approx(one / 2, rel=0.01)


def test_one_length_is_a_line_too() -> None:
    assert linear_bytes(lambda frames: 7 * frames, 4, 4)(4) == 28


def faked(model: STUNet) -> STUNet:
    """A model without weights, on the CPU in bfloat16, its tensors of the fake mode that is on."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            made = torch.empty_strided(weight.shape, weight.stride(), dtype=torch.bfloat16)
            setattr(module, name, nn.Parameter(made, requires_grad=False))
    return model


def test_the_paper_model_is_measured_on_a_machine_that_cannot_hold_it() -> None:
    """A window of 8 x 1024 x 1024: 2 GiB for an activation of the first level, several of which live at once."""
    with torch.device("meta"):
        model = inflate(UNet2D(PAPER.ssr), **config_to_dict(PAPER.ssr_inflation))
    with FakeTensorMode():
        faked(model)
        taken = {frames: forward_bytes(model, 1, frames, 1024, 1024) / MARGIN["cpu"] / 2**30 for frames in (4, 8)}
    assert 20 < taken[8] < 25
    assert taken[8] == pytest.approx(2 * taken[4], rel=0.001)


PROCESS = """
import re
import torch
from pathlib import Path
from lumiere_fast import LumierePipeline
from lumiere_fast.pipelines.activations import _forward, _inputs, peak_bytes

torch.set_num_threads(1)

def resident(kind):
    return 1024 * int(re.search(rf"^{kind}:\\s+(\\d+) kB", Path("/proc/self/status").read_text(), re.M)[1])

model = LumierePipeline.from_pretrained("demo").ssr
call, weight = _forward(model), model.unet.conv_in.weight
with torch.no_grad():
    call(*_inputs(model, 1, 4, 32, 32, weight))
    inputs = _inputs(model, 1, 8, 256, 256, weight)
    inputs = [tensor.clone() if tensor.is_floating_point() else tensor for tensor in inputs]
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call(*inputs)
    print(resident("VmHWM") - before, peak_bytes(call, *inputs))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("threshold", "most"), [("65536", 1.05), (None, MARGIN["cpu"])], ids=["no heap", "heap"])
def test_a_process_grows_by_what_was_counted(
    threshold: str | None, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the demo's window of 8 x 256 x 256. Where malloc keeps no blocks in its heap it is the count; where it does,
    as it is set by default, the margin holds."""
    if threshold is not None:
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", threshold)
        monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", threshold)
    process = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, check=True)
    grown, counted = map(int, process.stdout.split())
    assert 0.98 < grown / counted < most
