"""`log.csv` of a run: the mean loss since the row before, and the learning rate, every so many steps."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

LOG_NAME = "log.csv"
REPAIR = "repair it, or move it away, and the run goes on with a new log"


@dataclass(frozen=True)
class LogRow:
    """One row: `loss` is the mean since the row before; `learning_rate` that of the last step, None in older logs."""

    step: int
    loss: float
    learning_rate: float | None
    seconds_per_step: float


HEADER = tuple(field.name for field in fields(LogRow))


def append_row(path: Path, row: LogRow) -> None:
    """Add a row, and the header to a new file; an OSError names the file."""
    new = not path.exists()
    with naming(path), path.open("a", newline="", encoding="utf-8") as file:
        file.write(_line(row, header=new))


def keep_rows_until(path: Path, step: int) -> None:
    """Drop the rows after `step`, and a row whose writing was cut off: what a run did after its last checkpoint.

    Raises:
        ValueError: a row is damaged; names the line.
    """
    if not path.exists():
        return
    lines = _whole_lines(path)
    kept = [line for line, row in _rows(path, lines) if row.step <= step]
    if not kept:
        path.unlink()
        return
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(partial):
            partial.write_text("".join([lines[0], *kept]), encoding="utf-8", newline="")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_log(path: Path) -> list[LogRow]:
    """The rows of a log, but for one whose writing was cut off.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no log of a run; names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a run's folder holds it from the first row on")
    return [row for _, row in _rows(path, _whole_lines(path))]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within the block an OSError that names no file, as that of a full disk, names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _whole_lines(path: Path) -> list[str]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = file.readlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text, so no log of a run ({error}): {REPAIR}") from error
    return [line for line in lines if line.endswith("\n")]


def _rows(path: Path, lines: list[str]) -> Iterator[tuple[str, LogRow]]:
    """Each line after the first, which names the columns, with what it says; empty ones are passed over."""
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        try:
            (values,) = csv.DictReader([lines[0], line])
            row = _row(values)
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise ValueError(f"{path}, line {number}: not a row of a run's log, {line.strip()!r}: {REPAIR}") from error
        yield line, row


def _row(values: dict[str, str]) -> LogRow:
    rate = values.get("learning_rate")
    return LogRow(
        int(values["step"]), float(values["loss"]), float(rate) if rate else None, float(values["seconds_per_step"])
    )


def _line(row: LogRow, *, header: bool) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    if header:
        writer.writerow(HEADER)
    writer.writerow([row.step, f"{row.loss:.5f}", f"{row.learning_rate:.4e}", f"{row.seconds_per_step:.4f}"])
    return text.getvalue()
