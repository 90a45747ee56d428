"""`log.csv` of a run: the mean loss since the row before, and the learning rate, every so many steps."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, fields
from pathlib import Path

LOG_NAME = "log.csv"


@dataclass(frozen=True)
class LogRow:
    """One row: `loss` is the mean since the row before; `learning_rate` that of the last step, None in older logs."""

    step: int
    loss: float
    learning_rate: float | None
    seconds_per_step: float


HEADER = tuple(field.name for field in fields(LogRow))


def append_row(path: Path, row: LogRow) -> None:
    """Add a row, and the header to a new file."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        file.write(_line(row, header=new))


def keep_rows_until(path: Path, step: int) -> None:
    """Drop the rows after `step`, and a row whose writing was cut off: what a run did after its last checkpoint."""
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        lines = file.readlines()
    kept = [line for line in lines[1:] if line.endswith("\n") and int(line.split(",")[0]) <= step]
    if not kept:
        path.unlink()
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join([lines[0], *kept]), encoding="utf-8", newline="")
    partial.replace(path)


def read_log(path: Path) -> list[LogRow]:
    """The rows of a log.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no log of a run; names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a run's folder holds it from the first row on")
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for values in reader:
            try:
                rate = values.get("learning_rate")
                rows.append(
                    LogRow(
                        int(values["step"]),
                        float(values["loss"]),
                        float(rate) if rate else None,
                        float(values["seconds_per_step"]),
                    )
                )
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: not a row of a run's log") from error
    return rows


def _line(row: LogRow, *, header: bool) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    if header:
        writer.writerow(HEADER)
    writer.writerow([row.step, f"{row.loss:.5f}", f"{row.learning_rate:.4e}", f"{row.seconds_per_step:.4f}"])
    return text.getvalue()
