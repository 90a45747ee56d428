"""Which configuration of a kernel is the fastest on this GPU, case by case: ``lumiere-fast tune``.

A kernel with configurations has cases (`kernels/_configs.py`) and, for each, CANDIDATES. A candidate is first held
against the reference at every scenario that stands for the case; one that does not compile, does not fit or is wrong
is left out and told. The others are timed there in turn, in one process. The fastest is written into the table of this
GPU's name as soon as its case is done, so that a run that is stopped goes on where it was.

The order of an op's backends (`dispatch.Op.case`) is a table too, <op>_order: its candidates are the backends, and
each gets its place.
"""

from __future__ import annotations

import functools
import importlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lumiere_fast import dispatch, ops, timing
from lumiere_fast.kernels import _configs
from lumiere_fast.kernels._configs import Config
from lumiere_fast.ops import _selfcheck
from lumiere_fast.ops._spec import Scenario
from lumiere_fast.timing import Side

DTYPES = (torch.bfloat16, torch.float32)
REPRESENTATIVES = 3
LARGEST = 1 << 27  # elements of an activation: more tells nothing new, and the exact result takes eight bytes each
CLEARLY = 1.02  # times as fast as the default that a candidate must be: less is noise
ROUNDS_BUDGET = 0.5  # seconds of timed rounds a scenario
BUDGET = 900.0
LONGEST_REASON = 300
FACTOR = _selfcheck.FACTOR
ORDER = "_order"  # a table's name ends so
ORDER_HEADS = (32, 64, 128)
MOST_KEYS = 4096  # of a frame whose scores the reference can keep in fp64
HEADS = (32, 64, 80, 96, 128)


@dataclass(frozen=True)
class Outcome:
    """One candidate: how many times as fast as the default it is, or why it is left out."""

    config: Config
    times_as_fast: float | None = None
    why_not: str | None = None


@dataclass(frozen=True)
class Tuned:
    """One case.

    Args:
        op: the table: an op, or <op>_order.
        status: "tuned"; "kept", it was in the table already; "left", the time was up; "failed", nothing was right.
        config: what the table now has of it.
        times_as_fast: the default's time over this one's; missing where the default cannot run here.
        scenarios: what it was timed at.
    """

    op: str
    case: str
    status: Literal["tuned", "kept", "left", "failed"]
    config: Config | None = None
    times_as_fast: float | None = None
    scenarios: tuple[str, ...] = ()
    candidates: tuple[Outcome, ...] = ()
    why: str | None = None
    seconds: float = 0.0


def run(
    names: Sequence[str] | None = None,
    cases: Sequence[str] | None = None,
    *,
    budget: float = BUDGET,
    out: Path | None = None,
) -> Iterator[Tuned]:
    """Tune on the current CUDA device, one case after the other.

    Args:
        names: of ops that have configurations or an order, or of one of these tables; None for all.
        cases: of these ops; None for those that the table does not have yet. One that is named is tuned again.
        budget: seconds. A case that cannot be finished in them is left as it was.
        out: the table, a JSON file; None for the user's own, in the cache folder. What it has of other cases stays.

    Raises:
        ValueError: an argument is not as above, there is no CUDA device, or the table is damaged or another GPU's.
        BackendUnavailable: the Triton kernels cannot run here.
    """
    known = {table: cases_of(table) for table in _tables(names)}
    accepted = [case for each in known.values() for case in each]
    for case in cases or ():
        if case not in accepted:
            raise ValueError(f"case must be one of {', '.join(accepted)}, got {case!r}")
    if not budget > 0:
        raise ValueError(f"budget must be a positive number of seconds, got {budget}")
    if not torch.cuda.is_available():
        raise ValueError("configurations are tuned on the GPU that they are for, and there is no CUDA device here")
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_name(device)
    path = _configs.user_file(gpu) if out is None else out
    held = read(path, gpu)
    return _run(known, cases, held, Tuner(device, time.monotonic() + budget), path, gpu)


def _run(
    known: Mapping[str, Sequence[str]],
    wanted: Sequence[str] | None,
    held: _configs.Table,
    tuner: Tuner,
    path: Path,
    gpu: str,
) -> Iterator[Tuned]:
    for op, cases in known.items():
        for case in cases if wanted is None else [case for case in cases if case in wanted]:
            if wanted is None and case in held.get(op, {}):
                yield Tuned(op, case, "kept", held[op][case])
                continue
            row = tuner.tune(op, case)
            if row.config is not None:
                _configs.save(path, gpu, {op: {case: row.config}})
            yield row


def tunable() -> tuple[str, ...]:
    """The tables: the ops whose kernels have configurations, and <op>_order of those with a measured order."""
    found = []
    for table in (table for op in dispatch.registered_ops() for table in (op, op + ORDER)):
        with suppress(ValueError):
            _configs.cases(table)
            found.append(table)
    return tuple(found)


def _tables(names: Sequence[str] | None) -> list[str]:
    """All tables of these names.

    Raises:
        ValueError: an op has none.
    """
    found: list[str] = []
    for name in tunable() if names is None else names:
        tables = [table for table in tunable() if table in (name, name + ORDER)]
        if not tables:
            raise ValueError(f"op must be one of {', '.join(tunable())}, got {name!r}")
        found += [table for table in tables if table not in found]
    return found


def cases_of(table: str) -> tuple[str, ...]:
    """Those that are tuned: of an order, the cases of a GPU."""
    return tuple(_order_scenarios(table)) if table.endswith(ORDER) else _configs.cases(table)


def read(path: Path, gpu: str) -> _configs.Table:
    """The table of a GPU in a file; empty if there is no file.

    Raises:
        ValueError: it is damaged, or another GPU's.
    """
    return _configs.read(path, gpu) if path.exists() else {}


class Tuner:
    """Finds the fastest configuration of a case on a device, until `until` on the monotonic clock."""

    def __init__(self, device: torch.device, until: float) -> None:
        self.device, self.until = device, until
        self.clock = timing.clock_for(device)
        self.broken = False

    @torch.no_grad()
    def tune(self, op: str, case: str) -> Tuned:
        """Nothing is written. `status` is "tuned", "left" or "failed"."""
        started = time.monotonic()
        try:
            scenarios, outcomes = self._outcomes(op, case)
            row = (_ordered if op.endswith(ORDER) else _concluded)(op, case, outcomes)
        except _Stopped as stopped:
            scenarios, row = [], Tuned(op, case, "failed" if stopped.wrong else "left", why=str(stopped))
        return replace(row, scenarios=tuple(scenarios), seconds=time.monotonic() - started)

    def _outcomes(self, op: str, case: str) -> tuple[list[str], list[Outcome]]:
        """All candidates, the default first, after what they were held against and timed at."""
        configs = candidates(op, case)
        reasons: dict[int, str] = {}
        fitting = []
        for scenario, dtype in representatives(op, case):
            self._check_time()
            try:
                trial = _trial(op, case, scenario, dtype, self.device)
            except torch.OutOfMemoryError:
                continue
            fitting.append((scenario, dtype))
            self._hold_against_reference(trial, configs, reasons)
        right = [number for number in range(len(configs)) if number not in reasons]
        ratios: dict[int, list[float]] = {number: [] for number in right}
        for scenario, dtype in fitting if right else ():
            self._check_time()
            self._time(_trial(op, case, scenario, dtype, self.device), configs, ratios)
        means = {number: math.exp(sum(map(math.log, each)) / len(each)) for number, each in ratios.items() if each}
        names = [f"{scenario.name} {str(dtype).removeprefix('torch.')}" for scenario, dtype in fitting]
        return names, [Outcome(config, means.get(i), reasons.get(i)) for i, config in enumerate(configs)]

    def _hold_against_reference(
        self, trial: Trial | OrderTrial, configs: Sequence[Config], reasons: dict[int, str]
    ) -> None:
        """Put down by number why a candidate that has no reason against it yet is not right here."""
        for number, config in enumerate(configs):
            if number not in reasons and (reason := trial.why_not(config)):
                reasons[number] = reason
                self._check_device(reason)
            self._check_time()

    def _time(self, trial: Trial | OrderTrial, configs: Sequence[Config], ratios: dict[int, list[float]]) -> None:
        """Put down by number how many times as fast as the first of them each is here."""
        first, *others = ratios
        sides = {str(number): trial.side(configs[number]) for number in others}
        mine, theirs = timing.interleave(trial.side(configs[first]), sides, self.clock, ROUNDS_BUDGET)
        ratios[first].append(1.0)
        for number in others:
            ratios[number].append(timing.times_as_fast(mine, theirs[str(number)]))

    def _check_time(self) -> None:
        if self.broken:
            raise _Stopped("the GPU cannot be used by this process any more: run again")
        if time.monotonic() >= self.until:
            raise _Stopped("the time is up: run again")

    def _check_device(self, reason: str) -> None:
        """After an illegal address, say, every further call of the process fails: none of them tells of a candidate."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError:
                self.broken = True
                raise _Stopped(f"a candidate broke the GPU for this process: {reason}", wrong=True) from None


class _Stopped(Exception):
    def __init__(self, why: str, wrong: bool = False) -> None:
        super().__init__(why)
        self.wrong = wrong


class Trial:
    """A scenario that stands for a case: a call at it with any configuration, and what is right there."""

    def __init__(self, op: str, case: str, scenario: Scenario, dtype: torch.dtype, device: torch.device) -> None:
        self.op, self.case, self.name, self.public = op, case, scenario.name, getattr(ops, op)
        with device:  # drawn there: a host takes seconds for the larger ones
            generator = torch.Generator(device).manual_seed(_selfcheck.SEED)
            self.inputs = _selfcheck.spec_of(self.public).make_inputs(scenario, device, dtype, generator)
        self.theirs = _tensors(self.public(**self.inputs, backend="reference"))
        self.held = torch.empty_like(self.theirs[0])

    @functools.cached_property
    def exact(self) -> list[Tensor]:
        return _tensors(self.public(**_selfcheck._mapped(_selfcheck._double, self.inputs), backend="reference"))

    def side(self, config: Config) -> Side:
        def call() -> Any:
            with _configs.override(self.op, self.case, config):
                return self.public(**self.inputs, backend="triton", out=self.held)

        return call

    def why_not(self, config: Config) -> str | None:
        """Why a configuration must not win: it cannot be compiled or launched, or is wrong."""
        exact = self.exact
        self.held.fill_(math.nan)
        try:
            ours = _tensors(self.side(config)())
            return next(self._differences(ours, exact), None)
        except dispatch.BackendUnavailable:  # which speaks of the machine, not of the candidate
            raise
        except _selfcheck._kernel_errors() as raised:
            return f"{type(raised).__name__}: {' '.join(str(raised).split())[:LONGEST_REASON]}"

    def _differences(self, ours: Sequence[Tensor], exact: Sequence[Tensor]) -> Iterator[str]:
        """By the rule of the self-check."""
        for mine, other, truth in zip(ours, self.theirs, exact, strict=True):
            if wrong := _selfcheck.too_far_off(mine, other, truth, FACTOR):
                yield f"wrong at {self.name}: {wrong}"


class OrderTrial:
    """A scenario that stands for a case of an order: a call at it on any backend, and what is right there.

    Where the scenario wants a gradient, a call makes it too. No side writes into a held result, since torch's own
    kernels cannot. What is right is seen at the first frame: in fp64 the reference keeps all scores.
    """

    def __init__(self, table: str, scenario: Scenario, dtype: torch.dtype, device: torch.device) -> None:
        self.op, self.gradient = dispatch.registered(table.removesuffix(ORDER)), scenario.options["gradient"]
        self.name, self.public = scenario.name, getattr(ops, self.op.name)
        with device:
            generator = torch.Generator(device).manual_seed(_selfcheck.SEED)
            self.inputs = _order_inputs(self.public, scenario, device, dtype, generator)
        self.above = torch.ones_like(self.inputs["q"], memory_format=torch.contiguous_format)

    def side(self, config: Config) -> Side:
        (backend,) = config
        return lambda: self._call(self.inputs, backend, self.above)

    def _call(self, inputs: Mapping[str, Any], backend: str, above: Tensor) -> list[Tensor]:
        """The result, or where it is wanted the gradients."""
        with torch.set_grad_enabled(self.gradient):
            result = self.public(**inputs, backend=backend)
        leaves = [tensor for tensor in inputs.values() if isinstance(tensor, Tensor) and tensor.requires_grad]
        return list(torch.autograd.grad(result, leaves, above)) if leaves else [result]

    def why_not(self, config: Config) -> str | None:
        """Why a backend has no place by its time: it cannot run this, or is wrong."""
        (backend,) = config
        with torch.set_grad_enabled(self.gradient):
            reasons = dispatch.why_not(self.op.name, backend, **self.inputs)
        if reasons:
            return "; ".join(reasons)
        try:
            self.side(config)()
            ours = self._call(self._frame, backend, self.above[:, :1])
        except _selfcheck._kernel_errors() as raised:
            return f"{type(raised).__name__}: {' '.join(str(raised).split())[:LONGEST_REASON]}"
        return next(self._differences(ours), None)

    @functools.cached_property
    def _frame(self) -> dict[str, Any]:
        """The inputs of the first frame of every clip."""
        inputs = {name: value[:, :1] if value.dim() == 6 else value for name, value in self.inputs.items()}
        return _selfcheck._mapped(_selfcheck._leaf, inputs) if self.gradient else inputs

    @functools.cached_property
    def _truth(self) -> tuple[list[Tensor], list[Tensor]]:
        """Of that frame by the reference, in its dtype and in fp64."""
        above, double = self.above[:, :1], _selfcheck._mapped(_selfcheck._double, self._frame)
        double = _selfcheck._mapped(_selfcheck._leaf, double) if self.gradient else double
        return self._call(self._frame, "reference", above), self._call(double, "reference", above.double())

    def _differences(self, ours: Sequence[Tensor]) -> Iterator[str]:
        """By the rule of the self-check."""
        factor, roundings = (_selfcheck.GRADIENT_FACTOR, _selfcheck.ROUNDINGS) if self.gradient else (FACTOR, 1)
        for mine, other, truth in zip(ours, *self._truth, strict=True):
            if wrong := _selfcheck.too_far_off(mine, other, truth, factor, roundings * _selfcheck.FLOORS[mine.dtype]):
                yield f"wrong at {self.name}: {wrong}"


def _trial(op: str, case: str, scenario: Scenario, dtype: torch.dtype, device: torch.device) -> Trial | OrderTrial:
    if op.endswith(ORDER):
        return OrderTrial(op, scenario, dtype, device)
    return Trial(op, case, scenario, dtype, device)


def _ordered(table: str, case: str, outcomes: Sequence[Outcome]) -> Tuned:
    """The fastest has the first place; after those that were timed come the others, as they were."""
    timed = [outcome for outcome in outcomes if outcome.times_as_fast is not None]
    if not timed:
        return Tuned(table, case, "failed", candidates=tuple(outcomes), why="no backend is right here")
    timed.sort(key=lambda outcome: -(outcome.times_as_fast or 0.0))
    ranked = [*timed, *(outcome for outcome in outcomes if outcome.times_as_fast is None)]
    places = {name: place for place, name in enumerate((name for each in ranked for name in each.config), start=1)}
    over_default = timed[0].times_as_fast if outcomes[0].times_as_fast is not None else None
    return Tuned(table, case, "tuned", places, over_default, candidates=tuple(outcomes))


def _concluded(op: str, case: str, outcomes: Sequence[Outcome]) -> Tuned:
    """The fastest wins, but the default, which comes first, stays where none is clearly faster."""
    default, timed = outcomes[0], [outcome for outcome in outcomes if outcome.times_as_fast is not None]
    if not timed:
        fits = any(outcome.why_not for outcome in outcomes)
        why = "no candidate is right here" if fits else "no scenario of it fits into memory"
        return Tuned(op, case, "failed", candidates=tuple(outcomes), why=why)
    winner = max(timed, key=lambda outcome: outcome.times_as_fast or 0.0)
    if default.times_as_fast is not None and (winner.times_as_fast or 0.0) < CLEARLY:
        winner = default
    over_default = None if default.times_as_fast is None else winner.times_as_fast
    return Tuned(op, case, "tuned", winner.config, over_default, candidates=tuple(outcomes))


def candidates(op: str, case: str) -> list[Config]:
    """The default, what else ships for the case, and the kernel's CANDIDATES, each also with the norm the other way.

    Of an order, the backends as the default places them.
    """
    if op.endswith(ORDER):
        places = default(op, case)
        return [{name: 1} for name in sorted(places, key=lambda name: places[name])]
    found: list[Config] = []
    for config in (*_configs.shipped(op)[case], *_kernel(op).CANDIDATES[case]):
        for each in _either_way(_plain(config)):
            if each not in found:
                found.append(each)
    return found


def default(op: str, case: str) -> Config:
    """What configs/default.json has."""
    return _configs.shipped(op)[case][0]


def _either_way(config: Config) -> Iterable[Config]:
    yield config
    if "fused_norm" in config:
        yield {**config, "fused_norm": not config["fused_norm"]}


def representatives(op: str, case: str) -> list[tuple[Scenario, torch.dtype]]:
    """The scenarios that stand for a case: the largest of each width, those of a GPU if there are any.

    Raises:
        ValueError: there is none.
    """
    if op.endswith(ORDER):
        found = _order_scenarios(op).get(case, [])
    else:
        every = product(scenarios(op), DTYPES)
        found = [(scenario, dtype) for scenario, dtype in every if case_of(op, scenario, dtype) == case]
    if not found:
        raise ValueError(f"no scenario of {op} stands for its case {case!r}")
    found = [each for each in found if not each[0].cpu] or found
    found.sort(key=lambda each: each[0].count("BCTHW"))
    largest = {scenario.sizes["C"]: (scenario, dtype) for scenario, dtype in found}
    return list(largest.values())[-REPRESENTATIVES:]


def scenarios(op: str) -> list[Scenario]:
    """Those of the op's spec that are not too large, and parts of its largest frames, narrow ones, with few tiles too.

    The parts are of each width up to 256 channels, whose levels are too large as a whole, and of one tap and of more;
    of attention, of eight heads of each width, over two frames, whose scores the reference can keep.
    """
    known = _selfcheck.spec_of(getattr(ops, op)).scenarios
    if "D" in known[0].sizes:
        return [
            replace(
                each, name=f"{each.name}_d{D}_{H}", sizes={**each.sizes, "C": 8 * D, "T": 2, "H": H, "W": H, "D": D}
            )
            for each in known
            if each.name in ("base1", "base1_text")
            for D, H in product(HEADS, (16, 64))
        ]
    parts = [
        replace(each, name=f"{each.name}_k{k}_c{C}_{H}", sizes={**each.sizes, "C": C, "H": H, "W": H, "k": k})
        for each in known
        if each.name in ("ssr0", "ssr0_fused")
        for k, C, H in product((1, 3), (64, 128, 256), (40, 256))
    ]
    return [scenario for scenario in (*known, *parts) if scenario.count("BCTHW") <= LARGEST]


@functools.cache
def _order_scenarios(table: str) -> dict[str, list[tuple[Scenario, torch.dtype]]]:
    """By case, the scenarios of a GPU with heads of each width, with and without a mask, with and without a gradient.

    The case is that of a call that is never made: its tensors are fake.
    """
    op = dispatch.registered(table.removesuffix(ORDER))
    public = getattr(ops, op.name)
    known = [each for each in _selfcheck.spec_of(public).scenarios if not each.cpu]
    found: dict[str, list[tuple[Scenario, torch.dtype]]] = {}
    for each, D, masked, gradient, dtype in product(known, ORDER_HEADS, (False, True), (False, True), DTYPES):
        fits = each.count("C") % D == 0 and each.count("HW") <= MOST_KEYS and each.count("BCTHW") <= LARGEST
        if not fits or masked > each.options["text"]:
            continue
        name = f"{each.name}_d{D}{'_masked' * masked}{'_gradient' * gradient}"
        options = {**each.options, "masked": masked, "gradient": gradient}
        scenario = replace(each, name=name, sizes={**each.sizes, "D": D}, options=options)
        with FakeTensorMode():
            call = op.bind(**_order_inputs(public, scenario, "meta", dtype, torch.Generator()))
        assert op.case is not None
        found.setdefault(op.case(*call), []).append((scenario, dtype))
    return found


def _order_inputs(
    public: Any, scenario: Scenario, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Any]:
    inputs = _selfcheck.spec_of(public).make_inputs(scenario, device, dtype, generator)
    return _selfcheck._mapped(_selfcheck._leaf, inputs) if scenario.options["gradient"] else inputs


def case_of(op: str, scenario: Scenario, dtype: torch.dtype) -> str:
    """The case that a scenario is of; empty for one that no configuration is for."""
    if "D" in scenario.sizes:
        text, count = scenario.options["text"], scenario.count
        heads = count("C") // count("D")
        calls = (count("B") * heads, count("THW"), count("L")) if text else (count("BT") * heads, count("HW"), None)
        return _kernel(op).case_of(count("D"), *calls) if dtype.itemsize == 2 else ""
    C_out = scenario.sizes.get("N", scenario.sizes["C"])
    rows, normed = scenario.count("BTHW"), scenario.options["fused"]
    case: str = _kernel(op).case_of(dtype, C_out, scenario.sizes["k"], rows, normed)
    return case


def _kernel(op: str) -> Any:
    """The kernel's module: `CANDIDATES` by case, and `case_of`."""
    return importlib.import_module(f"lumiere_fast.kernels.{op}")


def _plain(config: Any) -> Config:
    return dict(config._asdict() if hasattr(config, "_asdict") else config)


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in _tensors(part)]


def render(rows: Sequence[Tuned]) -> str:
    """The table for people, and below it what is left and which candidates were left out."""
    head = ("op", "case", "status", "x default", "seconds", "right", "configuration")
    lines = timing.aligned([head, *(_cells(row) for row in rows)], numbers=range(3, 6))
    told: dict[str, list[str]] = {}
    for row in rows:
        for note in notes(row):
            told.setdefault(note, []).append(row.case)
    return "\n".join(lines + [f"{', '.join(cases)}: {note}" for note, cases in told.items()])


def notes(row: Tuned) -> list[str]:
    """Why a case has no winner, and which candidates were left out."""
    wrong = [f"left out: {shown(each.config)}: {each.why_not}" for each in row.candidates if each.why_not]
    return wrong if row.why is None else [row.why, *wrong]


def _cells(row: Tuned) -> tuple[str, ...]:
    right = sum(outcome.why_not is None for outcome in row.candidates)
    return (
        row.op,
        row.case,
        row.status,
        f"{row.times_as_fast:.2f}" if row.times_as_fast else "",
        f"{row.seconds:.0f}" if row.seconds else "",
        f"{right}/{len(row.candidates)}" if row.candidates else "",
        shown(row.config) if row.config else "",
    )


def shown(config: Config) -> str:
    """For people."""
    return ", ".join(f"{name} {value}" for name, value in config.items())
