"""What every Triton kernel here shares: how it is launched, and how its shipped compile variants are told."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_PROGRAMS = 2**31 - 1  # of a one-dimensional grid


class Variant(NamedTuple):
    """One compiled form of a kernel that ships: plain data, from which it can be compiled without a GPU.

    Every `kernels/<op>.py` lists its own in `VARIANTS`. Arguments that Triton would specialise by value or alignment
    are in `do_not_specialize`, so that what is compiled ahead of time is what a launch compiles.

    Args:
        name: how the table of resources calls it; unique within the op.
        kernel: name of the jitted function in the op's module.
        signature: Triton type by argument, "constexpr" for those in `constexprs`.
        constexprs: their values.
        wide_loads: how many 16-byte global loads its machine code is promised to have at least.
        wgmma: whether its matrix products are promised to be warpgroup instructions on sm_90.
        least_arch: the oldest architecture that it is launched on, 80 or 90.
        maxnreg: the most registers a thread may have; None for no cap.
    """

    name: str
    kernel: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    wide_loads: int = 0
    wgmma: bool = False
    least_arch: int = 80
    maxnreg: int | None = None


def launch(kernel: Any, programs: int, out: Tensor, *arguments: Any, **options: Any) -> None:
    """Run `programs` programs of a kernel on the device and current stream of `out`; in a trace, record that.

    Raises:
        ValueError: more programs than a grid holds.
    """
    if programs > MAX_PROGRAMS:
        raise ValueError(f"the result takes {programs} programs, a launch holds {MAX_PROGRAMS}; cut the batch")
    if traced(out):
        options.pop("maxnreg", None)  # which torch.compile takes for an argument of the kernel
        torch.library.wrap_triton(kernel)[(programs,)](*arguments, **options)
        return
    # The kernel itself: outside a `triton_op` wrap_triton's launch goes through a higher-order operator, 1 ms each.
    # Fusion of multiply and add is said because its default is about to change.
    elsewhere = out.is_cuda and out.device.index != torch.cuda.current_device()
    with torch.cuda.device(out.device) if elsewhere else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **options, enable_fp_fusion=True)


def traced(out: Tensor) -> bool:
    """Whether launches are being recorded and not run: `out` is fake or functional, or a dispatch mode watches."""
    return type(out) is not Tensor or torch._C._len_torch_dispatch_stack() > 0


def aligned(tensor: Tensor, nbytes: int, recording: bool) -> bool:
    """Whether the first element lies at a multiple of `nbytes`. In a trace, storages are taken to begin at one."""
    offset = int(tensor.storage_offset()) * tensor.element_size() if recording else tensor.data_ptr()
    return offset % nbytes == 0
