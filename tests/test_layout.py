"""The house: one op, one name, everywhere; arrows point one way; importing needs nothing that is optional."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumiere_fast import dispatch, ops
from lumiere_fast.kernels import PENDING_KERNELS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lumiere_fast"

OPS = (
    "group_norm",
    "temporal_conv",
    "temporal_attention",
    "spatial_attention",
    "blend_windows",
    "denoise_step",
    "space_time_downsample",
    "space_time_upsample",
)

# Lowest first. A module may import from its own entry and from any line below it, not from its neighbours on a line.
LAYERS = (
    ("kernels",),
    ("native", "timing", "_malloc"),
    ("evidence",),
    ("dispatch",),
    ("ops",),
    ("models", "diffusion", "text", "data", "video"),
    ("pipelines",),
    ("selftest",),
    ("benchmark", "tune"),
    ("training", "integrations", "info"),
    ("cli",),
    ("__init__", "__main__"),
)


def kernel_files(op: str) -> list[Path]:
    candidates = [ROOT / "kernels" / f"{op}.py", *(ROOT / "csrc" / f"{op}{end}" for end in (".h", ".cu", ".cpp"))]
    return [path for path in candidates if path.exists()]


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_found_everywhere_by_its_name(op: str) -> None:
    assert (PACKAGE / "ops" / f"{op}.py").is_file()
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").is_file()
    assert (ROOT / "benchmarks" / f"bench_{op}.py").is_file()
    module = importlib.import_module(f"lumiere_fast.ops.{op}")
    assert getattr(ops, op) is getattr(module, op)
    assert callable(getattr(module, f"{op}_reference"))
    assert module.SPEC.name == op and any(scenario.cpu for scenario in module.SPEC.scenarios)
    assert op in dispatch.registered_ops()
    assert kernel_files(op) or op in PENDING_KERNELS, f"{op} has no kernel and is not in PENDING_KERNELS"


@pytest.mark.parametrize("op", OPS)
def test_tests_and_benchmarks_import_the_one_reference(op: str) -> None:
    """Nobody writes a second definition: a file that needs the reference takes it from the op's module."""
    for path in (ROOT / "tests").rglob("*.py"), (ROOT / "benchmarks").rglob("*.py"):
        for file in path:
            defined = {node.name for node in ast.walk(parse(file)) if isinstance(node, ast.FunctionDef)}
            assert f"{op}_reference" not in defined, file


def test_pending_kernels_are_not_written() -> None:
    print(f"\n{len(PENDING_KERNELS)} kernels pending: {', '.join(PENDING_KERNELS)}")
    assert len(set(PENDING_KERNELS)) == len(PENDING_KERNELS)
    assert set(PENDING_KERNELS) <= {*OPS, "group_norm_stats"}
    written = {op: kernel_files(op) for op in PENDING_KERNELS if kernel_files(op)}
    assert not written, f"take these off PENDING_KERNELS: {written}"


def test_no_file_of_an_op_has_another_name() -> None:
    """What is in the ops' folders is an op, or is private."""
    allowed = {*OPS, "__init__"}
    assert {p.stem for p in (PACKAGE / "ops").glob("[!_]*.py")} <= allowed
    assert {p.stem.removesuffix("_backward") for p in (ROOT / "kernels").glob("[!_]*.py")} <= allowed


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_by(path: Path, package: tuple[str, ...]) -> Iterator[str]:
    """Absolute names of what a file imports, wherever in the file; `from a import b` is a.b."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            prefix = ".".join(part for part in (base, node.module) if part)
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def entry_of(path: Path) -> str:
    """The entry of LAYERS that a source file belongs to."""
    if path.is_relative_to(ROOT / "kernels"):
        return "kernels"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def imports_of_the_package() -> Iterator[tuple[Path, str, str]]:
    """(file, its entry, the entry it imports) for each import inside the package."""
    for path in sources():
        entry = entry_of(path)
        folder = ("lumiere_fast", *(["kernels"] if entry == "kernels" else path.relative_to(PACKAGE).parts[:-1]))
        for name in imported_by(path, folder):
            parts = name.split(".")
            if parts[0] in ("kernels", "csrc", "benchmarks", "tests"):
                yield path, entry, f"top-level {parts[0]}"
            elif parts[0] == "lumiere_fast" and len(parts) > 1:
                yield path, entry, parts[1]


def test_every_source_file_has_its_layer() -> None:
    known = {entry for layer in LAYERS for entry in layer}
    assert {entry_of(path) for path in sources()} <= known


def test_arrows_point_one_way() -> None:
    height = {entry: i for i, layer in enumerate(LAYERS) for entry in layer}
    found = list(imports_of_the_package())
    assert {("dispatch", "kernels"), ("ops", "dispatch"), ("models", "ops")} <= {(a, b) for _, a, b in found}
    wrong = [
        f"{path.relative_to(ROOT)} imports {target}"
        for path, entry, target in found
        if target != entry
        and (target in height or target.startswith("top-level"))
        and height.get(target, len(LAYERS)) >= height[entry]
    ]
    assert not wrong, wrong


def test_dispatch_knows_no_op() -> None:
    text = (PACKAGE / "dispatch.py").read_text()
    assert not [op for op in OPS if op in text]


BARE_IMPORT = """
import sys
sys.modules.update(dict.fromkeys(
    ["triton", "av", "typer", "tokenizers", "tqdm", "matplotlib", "transformers", "huggingface_hub"]
    + ["lumiere_fast._native"]
))
import torch
assert not torch.cuda.is_available()
import lumiere_fast
x = torch.zeros(1, 4, 2, 3, 3)
print(tuple(lumiere_fast.ops.group_norm(x, 2, None, None).shape), len(lumiere_fast.dispatch.registered_ops()))
"""


def test_importing_needs_no_gpu_no_triton_and_no_optional_package() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", BARE_IMPORT], capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT
    )
    assert (done.returncode, done.stdout.strip()) == (0, "(1, 4, 2, 3, 3) 9"), done.stderr


def test_importing_is_light() -> None:
    """What costs time or a dependency is imported where it is used; Dynamo alone takes longer than all the rest."""
    probe = "import sys, torch; before = set(sys.modules); import lumiere_fast; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, cwd=ROOT)
    loaded = set(done.stdout.split())
    assert "lumiere_fast.ops" in loaded
    assert not loaded & {
        *("av", "typer", "tokenizers", "triton", "tqdm", "matplotlib", "transformers", "huggingface_hub"),
        *("torch._dynamo", "lumiere_fast._native"),
    }
