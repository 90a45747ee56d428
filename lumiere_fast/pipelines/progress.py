"""What a call of the pipeline tells of its stages while it runs: bars, a function of the caller's, wall times."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lumiere_fast.pipelines.state import DenoisingState
from lumiere_fast.pipelines.windows import WindowPlan

ProgressCallback = Callable[[str, int, int], None]
OnStep = Callable[[int, int], None]


class Stages:
    """Times the stages of a call, and reports their passes through the network as `progress` asks for it."""

    def __init__(self, progress: bool | ProgressCallback) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, steps: int, plan: WindowPlan, resume: DenoisingState | None) -> Iterator[OnStep | None]:
        """Gives what is to be called with (done, total) after each pass."""
        started = time.perf_counter()
        if callable(self.progress):
            report = self.progress
            yield lambda done, total: report(name, done, total)
        elif self.progress:
            from tqdm import tqdm

            tqdm.write(f"{name}: {plan}", file=sys.stderr)
            with tqdm(desc=name, unit="pass") as bar:
                yield _Bar(bar, steps, steps - (0 if resume is None else resume.step), len(plan))
        else:
            yield None
        self.seconds[name] = time.perf_counter() - started


class _Bar:
    """A bar of all passes that says in which step and window they are."""

    def __init__(self, bar: Any, steps: int, steps_left: int, windows: int) -> None:
        self.bar, self.steps, self.windows = bar, steps, windows
        self.left = steps_left * windows

    def __call__(self, done: int, total: int) -> None:
        left = total - done
        if left != self.left - 1:  # memory ran out: what is left of the steps is made in more and smaller windows
            self.windows = (left + 1) // -(-self.left // self.windows)
        self.left = left
        step, window = self.steps - left // self.windows, self.windows - left % self.windows
        self.bar.total = total
        self.bar.set_postfix_str(f"step {step}/{self.steps}, window {window}/{self.windows}", refresh=False)
        self.bar.update(done - self.bar.n)
