"""`loss.png` of a run: what `log.csv` says, as a picture. Needs matplotlib, imported when a picture is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lumiere_fast.training.log import LOG_NAME, LogRow, naming, read_log

PICTURE_NAME = "loss.png"
MISSING = "loss.png needs matplotlib, which is not installed: pip install lumiere_fast[plot]"
# The smoothed line weighs a row half as much as one this share of all rows later.
HALF_LIFE = 0.03
INK, RAW, SMOOTHED, RATE = "#1f2933", "#9fb3c8", "#0b5fa5", "#b4540a"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_loss_curve(folder: Path) -> Path:
    """Draw the log in a run's folder into its `loss.png`: raw means, smoothed loss, learning rate below.

    Raises:
        FileNotFoundError: the folder holds no log.
        ValueError: the log has no row yet, or is damaged.
        ModuleNotFoundError: matplotlib is missing.
    """
    rows = read_log(folder / LOG_NAME)
    if not rows:
        raise ValueError(f"{folder / LOG_NAME} has no row yet: there is nothing to draw")
    if not can_draw():
        raise ModuleNotFoundError(MISSING, name="matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # no pyplot: it would choose a window toolkit for the whole process
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    rates = [row for row in rows if row.learning_rate is not None]
    if rates:
        loss, rate = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        rate.plot([row.step for row in rates], [row.learning_rate for row in rates], color=RATE, linewidth=1.6)
        rate.set(ylabel="learning rate", ylim=(0, None))
        rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    else:
        loss = rate = figure.subplots()
    _draw_loss(loss, rows)
    rate.set(xlabel="step", xlim=(0, rows[-1].step * 1.01))
    for axes in {loss, rate}:
        axes.grid(color="#e4e7eb", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    partial = folder / f"{PICTURE_NAME}.partial"
    try:
        with naming(partial):
            figure.savefig(partial, format="png", dpi=120)
        partial.replace(folder / PICTURE_NAME)
    finally:
        partial.unlink(missing_ok=True)
    return folder / PICTURE_NAME


def _draw_loss(axes, rows: Sequence[LogRow]) -> None:  # type: ignore[no-untyped-def]  # matplotlib is not imported here
    steps, losses = [row.step for row in rows], [row.loss for row in rows]
    axes.plot(steps, losses, ".", color=RAW, markersize=4, label=f"mean of {steps[0]} steps")
    axes.plot(steps, smoothed(losses), color=SMOOTHED, linewidth=1.8, label="smoothed")
    if min(losses) > 0 and max(losses) > 4 * min(losses):
        axes.set_yscale("log")
    axes.set_ylabel("loss", color=INK)
    axes.set_title(f"smoothed loss {smoothed(losses)[-1]:.4f} at step {steps[-1]}", loc="left", color=INK, fontsize=10)
    axes.legend(frameon=False)


def smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential moving average, each value divided by the weight it has gathered, so that the start is no outlier."""
    decay = 0.5 ** (1 / max(HALF_LIFE * len(losses), 1e-9))
    total = weight = 0.0
    values = []
    for loss in losses:
        if math.isfinite(loss):
            total, weight = decay * total + (1 - decay) * loss, decay * weight + (1 - decay)
        values.append(total / weight if weight else math.nan)
    return values
