"""Where there is no GPU, Triton's kernels run in its interpreter: asked for here, before anything imports Triton."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First those that have a time limit of their own, for being long: no worker is to be left with them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)
