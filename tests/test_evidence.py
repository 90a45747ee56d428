"""What "auto" demands of a kernel on a GPU. There is no GPU here: torch is told that there is one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lumiere_fast import evidence, native
from lumiere_fast.evidence import Evidence, source_hash

GPU = torch.device("cuda", 0)
RECORD = Evidence(
    op="blend_windows",
    backend="triton",
    source="abc",
    gpu="NVIDIA H100 80GB HBM3",
    capability="9.0",
    commit="0123456789",
    date="2026-11-20",
    torch="2.11.0",
    triton="3.6.0",
    cuda="13.0",
)


class Checks:
    """A self-check that counts its runs."""

    def __init__(self, *failures: str) -> None:
        self.failures = list(failures)
        self.runs = 0

    def __call__(self, backend: str, device: torch.device) -> list[str]:
        self.runs += 1
        return self.failures


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("LUMIERE_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(evidence, "source_hash", lambda op, backend: "abc")
    monkeypatch.setattr(evidence, "records", lambda: ())
    new_process(monkeypatch)
    yield


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "_outcomes", {})


def ask(check: Checks) -> list[str]:
    return evidence.why_unproven("blend_windows", "triton", GPU, check)


def test_a_record_of_the_same_source_and_capability_is_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "records", lambda: (RECORD,))
    check = Checks("would fail")
    assert ask(check) == [] and check.runs == 0


@pytest.mark.parametrize(
    "change", [{"source": "older"}, {"capability": "8.0"}, {"op": "denoise_step"}, {"backend": "cuda"}]
)
def test_any_other_record_is_not(change: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "records", lambda: (replace(RECORD, **change),))
    check = Checks("off by 0.5")
    assert ask(check) == ["its self-check failed on cuda:0: off by 0.5"] and check.runs == 1


def test_the_self_check_runs_once_on_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    check = Checks()
    assert ask(check) == [] and ask(check) == [] and check.runs == 1
    new_process(monkeypatch)
    assert ask(check) == [] and check.runs == 1


@pytest.mark.parametrize("changed", ["source", "gpu", "torch"])
def test_and_again_when_source_gpu_or_versions_change(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check = Checks()
    ask(check)
    new_process(monkeypatch)
    if changed == "source":
        monkeypatch.setattr(evidence, "source_hash", lambda op, backend: "newer")
    elif changed == "gpu":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    else:
        monkeypatch.setattr(torch, "__version__", "9.9")
    ask(check)
    assert check.runs == 2


def test_a_failure_is_told_loudly_and_kept_for_the_process_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its cause may be gone tomorrow: no memory left, a core that was built for another GPU."""
    check = Checks("off by 0.5")
    assert ask(check) == ask(check) == ["its self-check failed on cuda:0: off by 0.5"] and check.runs == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "blend_windows on the backend triton is wrong on cuda:0" in caplog.text
    new_process(monkeypatch)
    check.failures = []
    assert ask(check) == [] and check.runs == 2
    new_process(monkeypatch)
    assert ask(check) == [] and check.runs == 2


def test_a_pass_is_withdrawn_by_a_later_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(Checks()) == []
    evidence.remember("blend_windows", "triton", GPU, ["off by 0.5"])
    new_process(monkeypatch)
    assert ask(Checks("off by 0.5")) != []


def test_a_native_core_built_otherwise_is_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    check = Checks()
    for archs in (["80"], ["90a"], ["90a"]):
        new_process(monkeypatch)
        monkeypatch.setattr(native, "build_info", lambda archs=archs: {"cuda_archs": archs, "sources": {}})
        evidence.why_unproven("blend_windows", "cuda", GPU, check)
    assert check.runs == 2


def while_capturing(monkeypatch: pytest.MonkeyPatch) -> contextlib.AbstractContextManager[Any]:
    context = monkeypatch.context()

    @contextlib.contextmanager
    def capturing() -> Iterator[None]:
        with context as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            yield

    return capturing()


@pytest.mark.parametrize("state", ["a CUDA graph is captured", "a dispatch mode is active", "a torch.func transform"])
def test_nothing_is_checked_while_something_would_see_or_spoil_it(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, answers = Checks(), []
    if state.startswith("a torch.func"):
        torch.func.vmap(lambda x: (answers.append(ask(check)), x)[1])(torch.ones(2))
    else:
        with while_capturing(monkeypatch) if "CUDA" in state else FakeTensorMode():
            answers.append(ask(check))
    assert state in answers[0][0] and check.runs == 0
    assert ask(check) == [] and check.runs == 1


def test_a_device_that_is_not_here_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check = Checks()
    assert "not here" in ask(check)[0] and check.runs == 0


def test_a_damaged_cache_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    path = evidence.cache_folder() / evidence.SELF_CHECKS
    path.parent.mkdir(parents=True)
    path.write_text('{"half a')
    check = Checks()
    assert ask(check) == []
    (key,) = json.loads(path.read_text())
    assert key.startswith("blend_windows | triton | abc | NVIDIA H100 80GB HBM3 | torch ")


def test_a_cache_that_cannot_be_written_is_no_hindrance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LUMIERE_FAST_CACHE", str(tmp_path / "file"))
    check = Checks()
    assert ask(check) == [] and ask(check) == [] and check.runs == 1


def test_the_newest_record_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = replace(RECORD, date="2026-11-21", capability="8.0")
    monkeypatch.setattr(evidence, "records", lambda: (newer, RECORD))
    assert evidence.recorded("blend_windows", "triton") == newer
    assert evidence.recorded("blend_windows", "triton", "9.0") == RECORD
    assert evidence.recorded("blend_windows", "cuda") is None


def test_the_records_of_the_package_can_be_read() -> None:
    rows = json.loads(evidence.RECORDS.read_text())["records"]
    assert [Evidence(**row) for row in rows] == sorted(
        (Evidence(**row) for row in rows), key=lambda each: (each.op, each.backend, each.capability)
    )


@pytest.mark.parametrize("backend", evidence.TORCHS)
def test_a_kernel_of_torch_s_is_checked_again_with_another_torch(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its source is not ours: what is checked is torch's release and how we call it."""
    before = source_hash("spatial_attention", backend)
    assert before == source_hash("spatial_attention", backend)
    with monkeypatch.context() as changed:
        changed.setattr(torch, "__version__", "9.9.9")
        assert source_hash("spatial_attention", backend) != before
    with monkeypatch.context() as changed:
        changed.setattr(torch.backends.cudnn, "version", lambda: 99999)
        assert source_hash("spatial_attention", backend) != before
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"another way to call it")
    assert source_hash("spatial_attention", backend) != before
