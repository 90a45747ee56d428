from __future__ import annotations

import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from lumiere_fast.training import loss_curve
from lumiere_fast.training.log import LogRow, append_row
from lumiere_fast.training.loss_curve import draw_loss_curve, smoothed
from lumiere_fast.training.trainer import Trainer
from tests.training.common import CONFIG, make_task

PNG = b"\x89PNG\r\n"


def write_log(folder: Path, losses: list[float], rates: list[float] | None = None) -> None:
    for index, loss in enumerate(losses):
        rate = 1e-3 if rates is None else rates[index]
        append_row(folder / "log.csv", LogRow(50 * (index + 1), loss, rate, 0.1))


def test_smoothing_takes_the_noise_and_keeps_the_level() -> None:
    noise = np.random.default_rng(0).normal(0, 0.2, 500)
    values = np.array(smoothed((3 + noise).tolist()))
    assert np.abs(values[50:] - 3).max() < 0.15
    assert values[100:].std() < 0.3 * noise.std()
    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2, 2, 2])
    assert smoothed([5.0]) == pytest.approx([5])
    late = smoothed([1.0] * 250 + [0.0] * 250)
    assert late[249] == pytest.approx(1)
    assert late[265] == pytest.approx(0.5, abs=0.05)  # 15 rows are the half-life of 500
    assert late[-1] < 0.01


def test_smoothing_steps_over_what_is_not_finite() -> None:
    values = smoothed([1.0, math.nan, math.inf, 1.0])
    assert values == pytest.approx([1, 1, 1, 1])
    assert math.isnan(smoothed([math.nan])[0])


def ink(path: Path, colour: str) -> int:
    """How many pixels have a colour, to a shade."""
    image = pytest.importorskip("PIL.Image")
    pixels = np.asarray(image.open(path).convert("RGB")).astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels - wanted).max(axis=-1) < 12).sum())


def test_the_picture_shows_loss_smoothed_loss_and_rate(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_log(tmp_path, [1 / (i + 1) + 0.05 * (i % 3) for i in range(60)])
    assert draw_loss_curve(tmp_path) == tmp_path / "loss.png"
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "loss.png"]
    for colour in (loss_curve.RAW, loss_curve.SMOOTHED, loss_curve.RATE):
        assert ink(tmp_path / "loss.png", colour) > 100, colour


def test_an_older_log_is_drawn_without_its_rate(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = "".join(f"{50 * i},{1 / i},0.1\n" for i in range(1, 20))
    (tmp_path / "log.csv").write_text("step,loss,seconds_per_step\n" + rows)
    draw_loss_curve(tmp_path)
    assert ink(tmp_path / "loss.png", loss_curve.SMOOTHED) > 100
    assert ink(tmp_path / "loss.png", loss_curve.RATE) == 0


@pytest.mark.parametrize("losses", [[0.5], [0.0, -1.0], [0.3, math.nan, 0.2], [1e-3, 1e3]])
def test_odd_logs_are_drawn(losses: list[float], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_log(tmp_path, losses)
    assert draw_loss_curve(tmp_path).stat().st_size > 5000


def test_what_cannot_be_drawn_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"log\.csv is missing"):
        draw_loss_curve(tmp_path)
    (tmp_path / "log.csv").write_text("step,loss,learning_rate,seconds_per_step\n")
    with pytest.raises(ValueError, match="has no row yet"):
        draw_loss_curve(tmp_path)
    write_log(tmp_path, [0.5])
    monkeypatch.setattr(loss_curve, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"loss\.png needs matplotlib.*: pip install lumiere_fast\[plot\]"):
        draw_loss_curve(tmp_path)
    assert not (tmp_path / "loss.png").exists()


def test_a_run_draws_its_picture_at_each_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tokenizers")
    seen: list[int] = []
    trainer = Trainer(make_task(), CONFIG, tmp_path)
    trainer.run(checkpoint_every=2, log_every=1, on_log=lambda *_: seen.append((tmp_path / "loss.png").exists()))
    assert seen == [False, False, True, True, True, True]
    last = (tmp_path / "loss.png").read_bytes()
    draw_loss_curve(tmp_path)
    assert (tmp_path / "loss.png").read_bytes() == last
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_a_run_says_so_once_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(loss_curve, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        Trainer(make_task(), CONFIG, tmp_path).run(checkpoint_every=1, log_every=1)
    assert [record.getMessage() for record in caplog.records] == [loss_curve.MISSING]
    assert not (tmp_path / "loss.png").exists()
    assert (tmp_path / "log.csv").exists()
