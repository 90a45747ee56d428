"""What the lab does in a process of its own, which a broken kernel may take down: `python -m benchmarks.worker`.

Units of work come as JSON on stdin. For each, one line of JSON goes to stdout: the rows that came of it. The lab sees
which unit a crash or a hang belongs to, and starts another process for the rest.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import provenance
from benchmarks.harness import Case, Row, benchmark_of, ceilings, default_dtype, draw_inputs, prepare
from benchmarks.processes import BROKEN_DEVICE
from benchmarks.record import FAILED, MET, SKIPPED
from benchmarks.reporting import lacking_module_of
from lumiere_fast import dispatch, ops, selftest, timing, tune
from lumiere_fast.kernels import _configs
from lumiere_fast.ops import _selfcheck

Unit = dict[str, Any]

MODELS = ("stunet", "super_resolution", "pipeline")
BACKENDS = {"cpu": ("cpu", "flash", "reference"), "cuda": (*dispatch.GPU_BACKENDS, "reference")}
BUSY = 0.1  # of the machine's processors: a time is then not to be trusted
THREADS = {"cpu": (1, 2), "cuda": (1,)}


def describe(device: str) -> dict[str, Any]:
    """The machine, and everything that there is to check and to time on it."""
    machine = provenance.environment(device)
    return {
        "machine": machine,
        "ops": list(dispatch.registered_ops()),
        "tuning": list(_cases()) if device == "cuda" else [],
        "configs": _configs.file_name(machine["gpu"]) if device == "cuda" else None,
        "benchmarks": list(_benchmarks(device)),
    }


def benchmarked_ops() -> list[str]:
    """Those with a module and a spec of their own."""
    return [op for op in dispatch.registered_ops() if _selfcheck.spec_of(getattr(ops, op)).name == op]


def _cases() -> Iterator[Unit]:
    """What there is to tune: configurations of Triton kernels, and the order of an op's backends, which is auto's."""
    for table in tune.tunable():
        op = table.removesuffix(tune.ORDER)
        backend = "triton" if op == table else "auto"
        made_of = ["triton"] if op == table else dispatch.registered(op).backends
        source = "+".join(str(provenance.source_of(op, name)) for name in made_of)
        for number, case in enumerate(tune.cases_of(table)):
            about = {"op": op, "backend": backend, "scenario": case, "dtype": None, "threads": None}
            yield {"stage": "tuning", "table": table, **about, "source": source, "traffic": number}


def _benchmarks(device: str) -> Iterator[Unit]:
    source = functools.cache(provenance.source_of)
    dtype = default_dtype(device)
    cores = os.cpu_count() or 1
    for op in (*benchmarked_ops(), *MODELS):
        spec, _ = benchmark_of(op)
        for scenario in spec.scenarios:
            for backend in ("auto",) if op in MODELS else _backends(op, device):
                for threads in THREADS[device]:
                    if threads <= cores and (scenario.cpu or device == "cuda"):
                        yield {
                            "stage": "benchmarks",
                            "op": op,
                            "backend": backend,
                            "scenario": scenario.name,
                            "dtype": str(dtype).removeprefix("torch."),
                            "threads": threads,
                            "source": source(op, backend),
                            "traffic": spec.bytes(scenario, dtype) or sys.maxsize,  # models last
                        }


def _backends(op: str, device: str) -> list[str]:
    """Torch's own kernels where the op takes them, and there what "auto" makes of them all."""
    told = [name for name in BACKENDS[device] if name == "reference" or name in dispatch.kernels(op)]
    return told if dispatch.registered(op).case is None else [*told, "auto"]


def perform(unit: Unit, device: str) -> list[dict[str, Any]]:
    """The rows of a unit, without what the lab adds to each."""
    if unit["stage"] == "smoke":
        return smoke(unit["op"], device)
    return [tune_case(unit, device) if unit["stage"] == "tuning" else benchmark(unit, device)]


def smoke(op: str, device: str) -> list[dict[str, Any]]:
    """One row for each kernel of the op, held against its reference."""
    try:
        checks = list(selftest.checks(device, [op]))
    except Exception as error:  # whatever a kernel raises is what this stage is there to find
        return [{"op": op, "backend": None, "verdict": FAILED, "why": _told(error)}]
    verdicts = {"passed": MET, "failed": FAILED, "unavailable": SKIPPED}
    return [
        {
            "op": op,
            "backend": check.backend,
            "verdict": verdicts[check.status],
            "why": check.detail,
            "measured": f"agrees with the reference in {check.seconds:.1f} s" if check.status == "passed" else None,
            "source": None if check.status == "unavailable" else provenance.source_of(op, check.backend),
        }
        for check in checks
    ]


def tune_case(unit: Unit, device: str) -> dict[str, Any]:
    """The fastest configuration of a case, and what each other candidate came to."""
    try:
        tuner = tune.Tuner(torch.device(device), time.monotonic() + unit["budget"])
        found = tuner.tune(unit["table"], unit["scenario"])
    except dispatch.BackendUnavailable as error:
        return {"verdict": SKIPPED, "why": _told(error)}
    numbers = {**asdict(found), "default": tune.default(found.op, found.case)} if found.config else None
    ratio = f"{found.times_as_fast:.2f}x the default, " if found.times_as_fast else ""
    return {
        "verdict": {"tuned": MET, "left": SKIPPED}.get(found.status, FAILED),
        "left": found.status == "left",
        "why": "; ".join(tune.notes(found)) or None,
        "measured": f"{ratio}{tune.shown(found.config)}" if found.config else None,
        "numbers": numbers,
    }


@contextmanager
def tuned(configs: str | None) -> Iterator[None]:
    """Within the block kernels run with the configurations of a table, where there is one."""
    with ExitStack() as stack:
        if configs is not None:
            for op, cases in tune.read(Path(configs), torch.cuda.get_device_name()).items():
                for case, config in cases.items():
                    stack.enter_context(_configs.override(op, case, config))
        yield


def benchmark(unit: Unit, device: str) -> dict[str, Any]:
    with tuned(unit.get("configs")):
        return _benchmark(unit, device)


def _benchmark(unit: Unit, device: str) -> dict[str, Any]:
    _, test = benchmark_of(unit["op"])
    rows: list[Row] = []
    try:
        case = _case(unit, device, rows)
        reasons = _reasons_against(case)
        if reasons:
            return {"verdict": SKIPPED, "why": "; ".join(reasons)}
        test(case)
    except torch.OutOfMemoryError as error:
        return {"verdict": SKIPPED, "why": f"out of memory: {_told(error)}"}
    except Exception as error:  # the row tells it, and the next unit goes on
        lacking = lacking_module_of(error)
        return {"verdict": FAILED if lacking is None else SKIPPED, "why": lacking or _told(error)}
    return _reported(rows[0], device)


def _case(unit: Unit, device: str, rows: list[Row]) -> Case:
    spec, _ = benchmark_of(unit["op"])
    scenario = next(scenario for scenario in spec.scenarios if scenario.name == unit["scenario"])
    if device == "cpu":
        torch.set_num_threads(unit["threads"])
    inputs = _inputs(unit["op"], unit["scenario"], unit["dtype"], device)
    dtype = getattr(torch, unit["dtype"])
    finish, compiles = rows.append, unit["compile"]
    return Case(
        spec, scenario, unit["backend"], device, dtype, unit["threads"], inputs, finish, unit["budget"], compiles
    )


_held: dict[tuple[str, str, str], dict[str, Any]] = {}


def _inputs(op: str, scenario: str, dtype: str, device: str) -> dict[str, Any]:
    """Units of one scenario follow one another, and share what was drawn for it."""
    key = op, scenario, dtype
    if key not in _held:
        _held.clear()
        gc.collect()
        spec, _ = benchmark_of(op)
        found = next(each for each in spec.scenarios if each.name == scenario)
        _held[key] = draw_inputs(spec, found, device, getattr(torch, dtype))
    return _held[key]


def _reasons_against(case: Case) -> list[str]:
    if case.spec.name in MODELS:
        return []
    with torch.no_grad():
        return [] if case.backend == "auto" else dispatch.why_not(case.spec.name, case.backend, **case.inputs)


def _reported(row: Row, device: str) -> dict[str, Any]:
    rates = [f"{row.nbytes / row.median / 1e9:.1f} GB/s"] if row.nbytes else []
    rates += [f"{row.flops / row.median / 1e9:.1f} GFLOP/s"] if row.flops else []
    rates += [f"{row.peak / 2**30:.1f} GiB at the peak"] if row.op in MODELS and row.peak else []
    return {
        "verdict": row.verdict,
        "why": _against_baselines(row),
        "measured": ", ".join([timing.seconds(row.median), *rates]),
        "goal": "; ".join(verdict.goal for verdict in row.verdicts) or None,
        "ratio": min((_ratio(verdict) for verdict in row.verdicts), default=None),
        "numbers": {**row.numbers(), "ceilings": ceilings()._asdict() if device == "cuda" else None},
    }


def _ratio(verdict: Any) -> float:
    """What was reached over what was wanted, or where less is better the other way round: 1 or more is met."""
    if verdict.goal.startswith("<="):
        return float(verdict.bound / max(verdict.reached, 1e-9))
    return float(verdict.reached / verdict.bound)


def _against_baselines(row: Row) -> str:
    told = [f"{ratio:.2f}x {name}{'*' if name == row.strongest else ''}" for name, ratio in row.ratios.items()]
    told += [f"{name} cannot run" for name in row.broken]
    told += [f"others used {row.others:.0%} of the machine meanwhile"] if (row.others or 0) > BUSY else []
    return ", ".join(told)


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _device_works(device: str) -> bool:
    """After an illegal address, say, every further call of the process fails."""
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main() -> int:
    device, *options = sys.argv[1:]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what anybody prints goes to the log
    if "--describe" in options:
        print(json.dumps(describe(device)), file=out, flush=True)
        return 0
    prepare()
    for unit in json.load(sys.stdin):
        started = time.monotonic()
        rows = perform(unit, device)
        seconds = time.monotonic() - started
        print(json.dumps([{"seconds": seconds, **row} for row in rows]), file=out, flush=True)
        if not _device_works(device):
            return BROKEN_DEVICE
    return 0


if __name__ == "__main__":
    sys.exit(main())
