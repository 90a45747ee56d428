from __future__ import annotations

from pathlib import Path

import pytest

from lumiere_fast.training.log import LogRow, append_row, keep_rows_until, read_log

ROWS = [LogRow(10 * i, 1 / i, 1e-3 / i, 0.25) for i in range(1, 5)]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.csv"
    for row in ROWS:
        append_row(path, row)
    return path


def test_rows_are_read_as_written(log: Path) -> None:
    assert log.read_text().splitlines()[:2] == [
        "step,loss,learning_rate,seconds_per_step",
        "10,1.00000,1.0000e-03,0.2500",
    ]
    for row, wanted in zip(read_log(log), ROWS, strict=True):
        assert row.step == wanted.step
        assert row.loss == pytest.approx(wanted.loss, abs=1e-5)
        assert row.learning_rate == pytest.approx(wanted.learning_rate, rel=1e-4)


@pytest.mark.parametrize(("step", "kept"), [(40, 4), (39, 3), (20, 2), (9, 0)])
def test_rows_after_a_step_are_dropped(log: Path, step: int, kept: int) -> None:
    before = log.read_bytes().splitlines(keepends=True)
    keep_rows_until(log, step)
    assert log.exists() == (kept > 0)
    if kept:
        assert log.read_bytes() == b"".join(before[: kept + 1])
    append_row(log, ROWS[0])
    assert len(read_log(log)) == kept + 1


@pytest.mark.parametrize("cut", [1, 3, 12, 20])
def test_a_row_that_was_cut_off_is_dropped(log: Path, cut: int) -> None:
    content = log.read_bytes()
    log.write_bytes(content[:-cut])
    keep_rows_until(log, 100)
    assert log.read_bytes() == content[: content.rindex(b"40,")]


def test_no_log_is_left_alone(tmp_path: Path) -> None:
    keep_rows_until(tmp_path / "log.csv", 3)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match=r"log\.csv is missing"):
        read_log(tmp_path / "log.csv")


def test_an_older_log_has_no_rate(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,loss,seconds_per_step\n50,0.5,0.1\n")
    assert read_log(tmp_path / "log.csv") == [LogRow(50, 0.5, None, 0.1)]


HEADER = b"step,loss,learning_rate,seconds_per_step\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            HEADER + b"1,0.5,0,0\n2,half,0,0\n",
            r"log\.csv, line 3: not a row of a run's log, '2,half,0,0': repair it, or",
        ),
        (HEADER + b"\n1.5,0.5,0,0\n", r"log\.csv, line 3: not a row"),
        (HEADER + b"1,0.5\n", r"log\.csv, line 2: not a row"),
        (HEADER + b"1,0.5,0,0\n\x00\n", r"log\.csv, line 3: not a row"),
        (HEADER + b"1,0.5,0,\xff\n", r"log\.csv is not UTF-8 text, so no log of a run .*: repair it, or move it away"),
        (b"1,0.5,0,0\n2,0.5,0,0\n", r"log\.csv, line 2: not a row"),
    ],
)
def test_a_damaged_log_is_named_and_kept(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(content)
    for read in (read_log, lambda path: keep_rows_until(path, 100)):
        with pytest.raises(ValueError, match=message):
            read(path)
    assert path.read_bytes() == content


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "log.csv").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*log\.csv'"):
        append_row(tmp_path / "log.csv", ROWS[0])


@pytest.mark.parametrize("content", ["step,loss\n1,2\n", "step,loss,learning_rate,seconds_per_step\n1,two,0,0\n"])
def test_another_table_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(content)
    with pytest.raises(ValueError, match=r"log\.csv, line 2: not a row of a run's log"):
        read_log(tmp_path / "log.csv")
