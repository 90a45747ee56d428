from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """With one thread a sum has one order, so that runs can be compared to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUMIERE_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no loss.png, which takes longer than training a tiny model."""
    monkeypatch.setattr("lumiere_fast.training.trainer.can_draw", lambda: False)


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of captioned videos."""
    pytest.importorskip("av")
    from tests.data.files import write_folder

    return write_folder(tmp_path_factory.mktemp("videos"))
