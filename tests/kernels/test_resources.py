"""The static gate: what ships keeps the rules, and the gate notices what does not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gate, resources
from benchmarks.resources import RULES, Row, Rule, violations

pytest.importorskip("triton", reason="Triton compiles the kernels, and brings the tools that read them")

KERNELS = """
import triton
import triton.language as tl
from lumiere_fast.kernels._launch import Variant

@triton.jit
def copy(source, target, stride, TILE: tl.constexpr):
    lane = tl.arange(0, TILE)
    tl.store(target + lane, tl.load(tl.multiple_of(source + 0, 16) + lane * stride))

@triton.jit
def hoard(source, target, TILE: tl.constexpr):
    lane = tl.arange(0, TILE)
    held = tl.load(source + lane)
    tl.store(target + lane, held * tl.sum(held))

@triton.jit
def multiply(source, target, TILE: tl.constexpr):
    lane = tl.arange(0, TILE)
    square = lane[:, None] * TILE + lane[None, :]
    a = tl.load(source + square)
    tl.store(target + square, tl.dot(a, a))

@triton.jit
def late(source, target, stride, TILE: tl.constexpr):
    lane = tl.arange(0, TILE)
    row = (tl.program_id(0) * stride).to(tl.int64)
    tl.store(target + row + lane, tl.load(source + row + lane))

@triton.jit
def early(source, target, stride, TILE: tl.constexpr):
    lane = (tl.arange(0, TILE) * 4).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * stride
    tl.store(target + row + lane, tl.load(source + row + lane))

@triton.jit
def tiled(source, target, count, TILE: tl.constexpr):
    lane = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    tl.store(target + lane, tl.load(source + lane, mask=lane < count), mask=lane < count)

def variant(name, kernel, dtype, tile, warps, wide=0, wgmma=False, **scalars):
    signature = {"source": f"*{dtype}", "target": "*fp32", **scalars, "TILE": "constexpr"}
    return Variant(name, kernel, signature, {"TILE": tile}, warps, 1, wide, wgmma)

VARIANTS = (
    variant("narrow", "copy", "fp32", 512, 4, wide=1, stride="i32"),
    variant("spilling", "hoard", "fp32", 16384, 1),
    variant("tensor cores", "multiply", "bf16", 64, 4, wgmma=True),
    variant("late", "late", "fp32", 128, 4, stride="i32"),
    variant("early", "early", "fp32", 128, 4, stride="i32"),
    variant("tiled", "tiled", "fp32", 128, 4, count="i32"),
)
"""


def row(**figures: object) -> Row:
    return replace(Row("temporal_conv", "triton", "kernel", "bf16", 90, wgmma=4, mma=0, promises_wgmma=True), **figures)  # type: ignore[arg-type]


pytestmark = pytest.mark.timeout(900)  # every form of every kernel is compiled, where nothing is cached


def broken_rules(*rows: Row) -> set[str]:
    return {line.partition(":")[0] for line in violations(rows)}


def test_every_shipped_configuration_keeps_the_rules() -> None:
    rows = resources.measure()
    print("\n" + resources.table(rows))
    assert not violations(rows)
    measured = {(row.op, row.backend, row.arch) for row in rows if row.missing is None}
    for path in resources.KERNELS.glob("[!_]*.py"):
        assert {(path.stem.removesuffix("_backward"), "triton", arch) for arch in (80, 90)} <= measured
    if shutil.which("nvcc"):
        for path in resources.CSRC.glob("*.cu"):
            assert {(path.stem, "cuda", arch) for arch in (80, 90)} <= measured
        cuda = [row for row in rows if row.backend == "cuda"]
        for source in resources.CUDA_WIDE:
            op = resources.COMMON_CUDA.get(source, source)
            assert any(row.op == op and row.wide_loads and row.wide_stores for row in cuda)
        for source in resources.CUDA_MMA:
            op = resources.COMMON_CUDA.get(source, source)
            assert any(row.op == op and row.promises_mma for row in cuda)
        for source in resources.CUDA_WGMMA:
            op = resources.COMMON_CUDA.get(source, source)
            assert any(row.op == op and row.promises_wgmma and row.wide_stores for row in cuda)
    assert all(row.threads and row.registers and row.loads and row.stores for row in rows if row.missing is None)


@pytest.mark.parametrize("arch", [80, 90])
def test_the_gate_sees_what_is_compiled(arch: int, tmp_path: Path) -> None:
    """A kernel that spills, one whose loads are narrow where wide ones are promised, one on the tensor cores."""
    (tmp_path / "gate_subjects.py").write_text(KERNELS)
    narrow, spilling, cores, late, early, tiled = resources.triton_rows("subject", "gate_subjects", arch, tmp_path)
    assert spilling.spills > 0 and spilling.stack > 0
    assert {"nothing spills", "no stack"} <= broken_rules(spilling)
    assert dict(narrow.loads) == {4: 4} and narrow.narrow_offsets == 1
    assert {"16-byte global loads", "64-bit offsets"} == broken_rules(narrow)
    assert (cores.wgmma > 0, cores.mma > 0) == ((True, False) if arch == 90 else (False, True))
    assert cores.shared >= 64 * 64 * 2
    for wrapping in (late, tiled):  # the offset has 64 bits, and the product in it wraps in 32 before
        assert wrapping.narrow_offsets == 1 and broken_rules(wrapping) == {"64-bit offsets"}
    assert early.narrow_offsets == 0 and not broken_rules(early)


# What stands against kernels whose scalars are 1, all or any one; nearly always the front end says it, which is quick.
ONES = """
import importlib, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

class Made(Exception):
    pass

class FrontEnd(ASTSource):
    def make_ir(self, *arguments, **options):
        super().make_ir(*arguments, **options)
        raise Made

def compiled(source, variant, kernel, ones):
    signature = dict(variant.signature) | dict.fromkeys(ones, "constexpr")
    source = source(kernel, signature, dict(variant.constexprs) | dict.fromkeys(ones, 1))
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    except Made:
        pass
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        print(f"{variant.kernel}, {variant.name}, {', '.join(ones)}: {error}")

module = importlib.import_module(sys.argv[1])
for name in sorted({variant.kernel for variant in module.VARIANTS}):
    kernel = getattr(module, name)
    first, *_, last = [variant for variant in module.VARIANTS if variant.kernel == name] * 2
    scalars = [name for name, kind in first.signature.items() if kind == "i32"]
    compiled(ASTSource, first, kernel, scalars)
    for ones in [scalars, *([scalar] for scalar in scalars)]:
        compiled(FrontEnd, last, kernel, ones)
"""


def wrong_with_ones(module: str, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": f"{folder}{os.pathsep}{resources.ROOT}"}
    command = [sys.executable, "-c", ONES, module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", sorted(path.stem for path in resources.KERNELS.glob("[!_]*.py")))
def test_kernels_compile_where_scalars_are_ones(module: str, tmp_path: Path) -> None:
    """torch.compile emits kernels again, with every integer that is 1 compiled in: then it is no tensor any more."""
    assert wrong_with_ones(f"lumiere_fast.kernels.{module}", tmp_path) == ""


def test_a_method_of_a_scalar_that_is_one_is_seen(tmp_path: Path) -> None:
    wrong = KERNELS.replace("* stride).to(tl.int64)", "* stride.to(tl.int64))") + "\nVARIANTS = VARIANTS[3:4]\n"
    (tmp_path / "subject.py").write_text(wrong)
    found = wrong_with_ones("subject", tmp_path)
    assert found.count("late, late, stride: ") == 3 and "'int' object has no attribute 'to'" in found


@pytest.mark.parametrize(
    ("rule", "figures"),
    [
        ("nothing spills", {"spills": 4}),
        ("no stack", {"stack": 8}),
        ("registers of a block fit", {"registers": 169, "threads": 384}),
        ("registers of a block fit", {"registers": 65, "threads": 1024}),
        ("shared memory fits", {"shared": 227 * 1024 + 1}),
        ("shared memory fits", {"shared": 163 * 1024 + 1, "arch": 80}),
        ("wgmma on sm_90", {"wgmma": 0, "mma": 64}),
        ("warp matrix instructions", {"promises_mma": True}),
        ("16-byte global loads", {"wide_loads": 3, "loads": ((4, 8), (16, 2))}),
        ("16-byte global stores", {"wide_stores": 1, "stores": ((8, 4),)}),
        ("64-bit offsets", {"narrow_offsets": 1}),
    ],
)
def test_each_rule_can_be_broken(rule: str, figures: dict[str, object]) -> None:
    assert not violations([row()])
    (line,) = violations([row(**figures)])
    assert line.startswith(f"{rule}: temporal_conv triton kernel (bf16) sm_")


def test_kernels_that_promise_warpgroup_products_move_registers() -> None:
    moving = row(backend="cuda", register_moves=2)
    assert not violations([moving, replace(moving, arch=80, register_moves=0), row(register_moves=0)])
    assert broken_rules(replace(moving, register_moves=1)) == {"registers change hands on sm_90"}


SUBJECT = """
extern "C" __global__ void BOUNDS hoard(const float* from, float* to, int count) {
  float held[96] = {};
  for (int n = 0; n < count; ++n) {
#pragma unroll
    for (int i = 0; i < 96; ++i) held[i] = from[n * 96 + i] * held[95 - i] + from[n];
  }
#pragma unroll
  for (int i = 0; i < 96; ++i) to[i * 32 + threadIdx.x] = held[i];
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")
@pytest.mark.parametrize(("bounds", "threads"), [("", 1024), ("__launch_bounds__(96, 1)", 96)])
def test_blocks_without_bounds_may_have_more_threads_than_registers(bounds: str, threads: int, tmp_path: Path) -> None:
    source = tmp_path / "subject.cu"
    source.write_text(SUBJECT.replace("BOUNDS", bounds))
    (hoard,) = resources.cuda_rows("subject", source, 90)
    assert hoard.threads == threads and 64 < hoard.registers <= 255 and hoard.register_moves == 0
    assert broken_rules(hoard) == ({"registers of a block fit"} if threads == 1024 else set())


def test_bounds_of_blocks_are_read_kernel_by_kernel() -> None:
    elf = """
.nv.info.first
	Attribute:	EIATTR_REGCOUNT
	Format:	EIFMT_SVAL
	Value:	0x20
.nv.info.second
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x180 0x2 0x1
"""
    assert resources._most_threads(elf) == {"second": 768}


def test_what_the_assembler_did_not_do_as_told_is_an_error() -> None:
    resources._refuse_setbacks("ptxas info    : Used 168 registers, used 1 barriers")
    note = "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; no register count at entry"
    with pytest.raises(RuntimeError, match=r"C7508.*setmaxnreg"):
        resources._refuse_setbacks(f"ptxas info    : 0 bytes gmem\n{note}\n")


def test_rules_bind_what_they_are_about() -> None:
    assert not violations([row(registers=168, threads=384), row(registers=64, threads=1024)])
    assert not violations([row(wgmma=0, arch=80), row(wgmma=0, promises_wgmma=False)])
    assert not violations([row(shared=227 * 1024), row(shared=163 * 1024, arch=80)])
    assert not violations([row(stack=8, missing="nvcc was not found")])
    assert len({rule.name for rule in RULES}) == len(RULES) and all(isinstance(rule, Rule) for rule in RULES)


@pytest.mark.parametrize(
    ("figures", "blocks"),
    [
        ({"registers": 32}, 8),  # by threads
        ({"registers": 121}, 2),  # by registers
        ({"registers": 32, "shared": 75 * 1024}, 3),  # by shared memory
        ({"registers": 32, "shared": 75 * 1024, "arch": 80}, 2),
        ({"registers": 16, "threads": 32}, 32),
        ({"registers": 32, "threads": 0}, None),
    ],
)
def test_blocks_that_a_multiprocessor_holds(figures: dict[str, object], blocks: int | None) -> None:
    measured = row(**{"threads": 256, **figures})
    assert measured.resident == blocks
    header, line = resources.table([measured]).splitlines()
    at = header.index("blocks an SM")
    assert line[at:].split()[0] == ("?" if blocks is None else str(blocks))


SASS = """
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR6][R2.64] ;  /* 0x0000 */
                                                                              /* 0x0001 */
        /*0020*/              @!P0 LDG.E.U16 R8, desc[UR6][R2.64+0x10] ;
        /*0030*/             @!UP1 LDGSTS.E.BYPASS.128 [R4], desc[UR6][R2.64] ;
        /*0040*/                   LDG.E R9, desc[UR6][R2.64+0x10] ;
        /*0050*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0060*/               @P6 STG.E.64 desc[UR6][R2.64], R4 ;
        /*0060*/                   REDG.E.ADD.STRONG.GPU desc[UR6][R2.64], R4 ;
        /*0060*/                   ATOMS.ADD R5, [R2], R4 ;
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0080*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0090*/                   LDS.128 R4, [R2] ;
        /*00a0*/                   FMUL R4, R4, R5 ;
"""
PTX = """
	@%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	@!%p2 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
	ld.global.nc.v2.f64 {%fd1, %fd2}, [%rd2];
	cp.async.cg.shared.global [ %r5 + 0 ], [ %rd3 + 0 ], 0x10, %r6;
	cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r7], [%rd4, {%r8, %r9}], [%r10];
	st.global.v2.b32 [ %rd5 + 0 ], { %r1, %r2 };
	@%p3 red.global.gpu.relaxed.add.u32 [ %rd5 + 0 ], %r1;
	@%p3 atom.global.gpu.acq_rel.add.u32 %r2, [ %rd5 + 0 ], %r1;
	@%p3 atom.shared.gpu.acq_rel.add.u32 %r2, [ %rd5 + 0 ], %r1;
	st.shared.v4.b32 [%r5], {%r1, %r2, %r3, %r4};
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd6, %rd7, p, 1, 1, 0, 0;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %f1 }, { %r1 }, { %r2 }, { %f1 };
"""


def test_instructions_are_told_apart() -> None:
    matrix = {"wgmma": 1, "mma": 1}
    assert resources.instructions(SASS, resources.SASS) == {
        **matrix,
        "loads": ((2, 1), (4, 1), (16, 3)),
        "stores": ((4, 1), (8, 1)),
    }
    stores = ((4, 2), (8, 1))
    assert resources.instructions(PTX, resources.PTX) == {**matrix, "loads": ((2, 1), (16, 4)), "stores": stores}


def test_offsets_narrower_than_64_bits_are_counted() -> None:
    ttir = """
    %lane = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32>
    %c = arith.constant 64 : i32
    %a = tt.addptr %base, %at : !tt.ptr<bf16>, i64 loc(#loc1)
    %b = tt.addptr %a, %c : !tt.ptr<bf16>, i32 loc(#loc1)
    %d = tt.addptr %s, %lane : tensor<64x!tt.ptr<bf16>>, tensor<64xi32> loc(#loc1)
    %e = tt.addptr %s, %far : tensor<64x!tt.ptr<bf16>>, tensor<64xi32> loc(#loc1)
    %f = tt.addptr %s, %row : tensor<8x64x!tt.ptr<bf16>>, tensor<8x64xi64> loc(#loc1)
    %g = tt.addptr %base, %t : !tt.ptr<bf16>, i32 loc(#loc1)
    """
    assert resources.narrow_offsets(ttir) == 2


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ("%a = arith.muli %pid, %stride : i32\n%b = arith.extsi %a : i32 to i64", 1),
        ("%a = arith.muli %n, %lane : i32\n%s = arith.addi %a, %c : i32\n%b = arith.extui %s : i32 to i64", 1),
        ("%a = arith.shli %pid, %c : i32\n%s = tt.splat %a : i32 -> tensor<8xi32>\n"
         "%b = arith.extsi %s : tensor<8xi32> to tensor<8xi64>", 1),
        ("%a = arith.muli %lane, %c : i32\n%b = arith.extsi %a : i32 to i64", 0),
        ("%a = arith.extsi %pid : i32 to i64\n%b = arith.muli %a, %stride : i64", 0),
        ("%a = arith.muli %pid, %stride : i32\n%b = arith.extsi %pid : i32 to i64", 0),
        ("scf.for %lane = %c to %n step %c : i32 {\n%a = arith.muli %lane, %c : i32\n"
         "%b = arith.extsi %a : i32 to i64", 1),
        ("%c:2 = scf.if %p -> (i32, i32) {\n%a = arith.muli %c#1, %lane : i32\n%b = arith.extsi %a : i32 to i64", 1),
        ("%a = arith.muli %pid, %c : i32\n%a = arith.addi %pid, %c : i32\n%b = arith.extsi %a : i32 to i64", 0),
    ],
)  # fmt: skip
def test_products_that_wrap_before_they_are_widened_are_counted(lines: str, found: int) -> None:
    """With a range and a constant that are fixed, and a program's index and a stride that are not."""
    head = """
    %pid = tt.get_program_id x : i32 loc(#loc3)
    %lane = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32> loc(#loc1)
    %c = arith.constant 64 : i32 loc(#loc2)
    """
    assert resources.late_widenings(head + "\n".join(f"{line} loc(#loc4)" for line in lines.split("\n"))) == found


def test_rows_are_kept_by_source_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_(op: str, module: str, arch: int) -> list[Row]:
        compiled.append((op, module, arch))
        return [row(op=op, arch=arch, loads=((4, 2), (16, 8)), narrow_offsets=0)]

    monkeypatch.setenv("LUMIERE_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(resources, "triton_rows", compile_)
    job = resources.Job("blend_windows", "blend_windows", "triton", 90)
    first = resources._cached(job)
    assert resources._cached(job) == first and len(compiled) == 1
    (kept,) = (tmp_path / "resources").iterdir()
    kept.write_text("damaged")
    assert resources._cached(job) == first and len(compiled) == 2
    monkeypatch.setattr(resources.kernels, "source_hash", lambda op: "another")
    resources._cached(job)
    assert len(compiled) == 3


def test_without_nvcc_the_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_nvcc_version", lambda: None)
    rows = resources._cached(resources.Job("blend_windows", "blend_windows", "cuda", 90))
    (missing,) = (row.missing for row in rows)
    assert missing == "nvcc was not found: install the CUDA toolkit"
    assert re.search(r"blend_windows +cuda .*sm_90 +not compiled: nvcc was not found", resources.table([row(), *rows]))


def test_with_one_compiler_its_rows_are_checked_and_the_other_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resources, "_nvcc_version", lambda: None)
    assert resources.main(["--op", "blend_windows"]) == 0
    printed = capsys.readouterr()
    compiled = len([line for line in printed.out.splitlines() if " triton " in line])
    assert f"\n{compiled} compiled rows keep all of {len(RULES)} rules" in printed.out
    assert printed.err == "cuda kernels were not compiled: nvcc was not found: install the CUDA toolkit\n"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_without_a_compiler_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    monkeypatch.setattr(resources.util, "find_spec", lambda name: None)
    monkeypatch.setattr(resources.shutil, "which", lambda name: None)
    resources._nvcc_version.cache_clear()
    resources._found.cache_clear()
    assert resources.main(options) == resources.NOTHING_COMPILED == gate.NOTHING_COMPILED
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "rules" not in printed.out + printed.err
    for word in ("nothing was checked", "pip install triton", "nvcc was not found: install the CUDA toolkit"):
        assert word in printed.err
    assert (printed.out == "") == (not options)
    resources._nvcc_version.cache_clear()
    resources._found.cache_clear()


def test_without_the_tools_that_read_machine_code_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_nvcc_version", lambda: "12.8")
    monkeypatch.setattr(resources, "_found", lambda tool: None if tool == "cuobjdump" else tool)
    for backend in ("triton", "cuda"):
        (found,) = resources._cached(resources.Job("blend_windows", "blend_windows", backend, 90))
        assert found.missing and "cuobjdump was found neither" in found.missing and "install" in found.missing


def test_build_flags_that_are_not_found_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "-fmad=false" in resources._nvcc_flags() and resources._cuda_target(90) == "90a"
    (tmp_path / "CMakeLists.txt").write_text("set(LF_CUDA_ARCHS 80 90a)\n")
    monkeypatch.setattr(resources, "ROOT", tmp_path)
    for read in (resources._nvcc_flags, lambda: resources._cuda_target(90)):
        with pytest.raises(RuntimeError, match=r"CMakeLists\.txt has nothing that matches .*adapt the pattern"):
            read()
    monkeypatch.setattr(resources, "measure", lambda op: resources._cuda_target(90))
    assert resources.main([]) == resources.ERROR and "CMakeLists.txt" in capsys.readouterr().err


def test_the_command_tells_what_broke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(), row(spills=12, variant="fp32")]
    monkeypatch.setattr(resources, "measure", lambda op: rows)
    assert resources.main(["--op", "blend_windows"]) == 1
    assert "nothing spills: temporal_conv triton kernel (fp32) sm_90: spills is 12" in capsys.readouterr().out
    assert resources.main(["--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["rows"]) == 2 and len(printed["broken"]) == 1
    monkeypatch.setattr(resources, "measure", lambda op: rows[:1])
    assert resources.main([]) == 0
