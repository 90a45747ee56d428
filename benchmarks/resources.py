"""What every kernel that ships takes of a GPU, read from its machine code: no GPU is needed.

    python -m benchmarks.resources [--op NAME] [--json]

Every configuration of every Triton kernel (the `VARIANTS` of kernels/<op>.py) and every kernel of csrc/<op>.cu and
csrc/common/*.cu is compiled for sm_80 and sm_90 as it would be for a launch. Registers, stack and shared memory come
from cuobjdump, spilled bytes from ptxas, instructions from the disassembly. The table is held against `RULES`; a broken
rule is named, and the exit status is 1. It is 3 where nothing could be compiled, and 4 where the check itself fails.
Rows are kept in the user's cache folder by source, compiler and architecture.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

from lumiere_fast import evidence, kernels

ROOT = Path(__file__).resolve().parents[1]
KERNELS = Path(kernels.__file__).parent
CSRC = ROOT / "csrc"
ARCHITECTURES = (80, 90)
WORKER_TIMEOUT = 500
KEPT, BROKEN, NOTHING_COMPILED, ERROR = 0, 1, 3, 4  # exit statuses; 2 is argparse's


@dataclass(frozen=True)
class Row:
    """One kernel in one configuration, compiled for one architecture.

    Args:
        threads: of a block, at most (CUDA: by its launch bounds).
        spills: bytes, stores and loads together.
        shared: bytes of static and dynamic shared memory.
        wgmma, mma: warpgroup and warp matrix instructions.
        register_moves: kinds of instructions by which warpgroups take registers or give them up (CUDA).
        loads, stores: global instructions by bytes a thread, smallest first.
        wide_loads, wide_stores: how many 16-byte loads and stores the configuration promises at least.
        promises_wgmma: whether its products must be warpgroup instructions where there are such.
        promises_mma: whether they must be warp matrix instructions.
        narrow_offsets: pointer offsets computed in less than 64 bits, and products that are widened to 64 bits only
            after they may have wrapped; None where that is not known (CUDA).
        missing: why there are no figures.
    """

    op: str
    backend: str
    kernel: str
    variant: str
    arch: int
    threads: int = 0
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    wgmma: int = 0
    mma: int = 0
    register_moves: int = 0
    loads: tuple[tuple[int, int], ...] = ()
    stores: tuple[tuple[int, int], ...] = ()
    wide_loads: int = 0
    wide_stores: int = 0
    promises_wgmma: bool = False
    promises_mma: bool = False
    narrow_offsets: int | None = None
    missing: str | None = None

    @property
    def name(self) -> str:
        return f"{self.op} {self.backend} {self.kernel} ({self.variant}) sm_{self.arch}"

    @property
    def resident(self) -> int | None:
        """How many blocks a multiprocessor holds at once; None where a launch decides on threads or memory (CUDA)."""
        if self.backend == "cuda" or not self.threads or not self.registers:
            return None
        registers = -(-self.registers // UNIT) * UNIT * self.threads
        shared = self.shared + 1024  # the system keeps a kilobyte of each block
        return min(MOST_BLOCKS, MOST_THREADS // self.threads, REGISTERS // registers, SHARED[self.arch] // shared)


class Rule(NamedTuple):
    """What must hold for the rows it binds.

    Args:
        binds: of all rows with figures, those it is about.
        broken: what is wrong with a row; None if nothing is.
    """

    name: str
    binds: Callable[[Row], bool]
    broken: Callable[[Row], str | None]


REGISTERS, MOST_THREADS, MOST_BLOCKS = 65536, 2048, 32  # of a multiprocessor
UNIT = 8  # that a thread's registers are handed out in
UNBOUNDED = 1024  # threads a block may have where nothing bounds them
SHARED = {80: 164 * 1024, 90: 228 * 1024}  # its bytes
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes one block may have
WIDE = 16
FIXED_TAPS = r"gather_copy_kernel<.*>|gather_\w+_kernel<.*, Together<\w+>.*>"
# Of .cu files by their stems: the kernels that promise loads and stores of 16 bytes, the files all of whose kernels
# promise warp matrix products, the kernels that promise warpgroup products and stores of 16 bytes, in files for
# sm_90 alone, and, of files in csrc/common/, the op that their rows are listed with.
CUDA_WIDE = {
    "blend_windows": r"blend_kernel<.*, 1>>",
    "space_time_downsample": FIXED_TAPS,
    "space_time_upsample": FIXED_TAPS,
    "temporal_resize_mma": r"gather_kernel<.*, true>|walk_kernel<.*>",
}
CUDA_MMA = {"temporal_resize_mma"}
CUDA_WGMMA = {"temporal_resize_wgmma": r"(gather|share)_kernel<.*>"}
COMMON_CUDA = {"temporal_resize_mma": "space_time_upsample", "temporal_resize_wgmma": "space_time_upsample"}


def _at_most(field: str, limit: Callable[[Row], int]) -> Callable[[Row], str | None]:
    def broken(row: Row) -> str | None:
        value = getattr(row, field)
        return f"{field} is {value}, at most {limit(row)} is allowed" if value > limit(row) else None

    return broken


def _at_least(value: Callable[[Row], int], least: Callable[[Row], int], what: str) -> Callable[[Row], str | None]:
    return lambda row: f"{what}: {value(row)}, at least {least(row)} must be" if value(row) < least(row) else None


RULES = (
    Rule("nothing spills", lambda row: True, _at_most("spills", lambda row: 0)),
    Rule("no stack", lambda row: True, _at_most("stack", lambda row: 0)),
    Rule(
        "registers of a block fit",
        lambda row: row.threads > 0,
        _at_most("registers", lambda row: REGISTERS // row.threads // UNIT * UNIT),
    ),
    Rule(
        "registers change hands on sm_90",
        lambda row: row.backend == "cuda" and row.arch == 90 and row.promises_wgmma,
        _at_least(lambda row: row.register_moves, lambda row: 2, "kinds of register moves"),
    ),
    Rule("shared memory fits", lambda row: True, _at_most("shared", lambda row: SHARED_LIMIT[row.arch])),
    Rule(
        "wgmma on sm_90",
        lambda row: row.arch == 90 and row.promises_wgmma,
        _at_least(lambda row: row.wgmma, lambda row: 1, "wgmma instructions"),
    ),
    Rule(
        "warp matrix instructions",
        lambda row: row.promises_mma,
        _at_least(lambda row: row.mma, lambda row: 1, "warp matrix instructions"),
    ),
    Rule(
        "16-byte global loads",
        lambda row: row.wide_loads > 0,
        _at_least(lambda row: dict(row.loads).get(WIDE, 0), lambda row: row.wide_loads, "16-byte global loads"),
    ),
    Rule(
        "16-byte global stores",
        lambda row: row.wide_stores > 0,
        _at_least(lambda row: dict(row.stores).get(WIDE, 0), lambda row: row.wide_stores, "16-byte global stores"),
    ),
    Rule("64-bit offsets", lambda row: row.narrow_offsets is not None, _at_most("narrow_offsets", lambda row: 0)),
)


def violations(rows: Iterable[Row]) -> list[str]:
    """One line for each row that breaks a rule."""
    return [
        f"{rule.name}: {row.name}: {wrong}"
        for row in rows
        for rule in RULES
        if row.missing is None and rule.binds(row) and (wrong := rule.broken(row)) is not None
    ]


def measure(op: str | None = None) -> list[Row]:
    """The rows of one op or of all, from the cache where nothing changed."""
    jobs = [job for job in _jobs() if op in (None, job.op)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for rows in pool.map(_cached, jobs) for row in rows]


class Job(NamedTuple):
    """The kernels of one source for one architecture: what is compiled at once, and cached as one.

    Args:
        source: its file under kernels/ or csrc/, without its ending.
    """

    op: str
    source: str
    backend: str
    arch: int


def _jobs() -> list[Job]:
    triton = [(path.stem.removesuffix("_backward"), path.stem, "triton") for path in KERNELS.glob("[!_]*.py")]
    cuda = [(path.stem, path.stem, "cuda") for path in CSRC.glob("*.cu")]
    cuda += [(COMMON_CUDA[path.stem], f"common/{path.stem}", "cuda") for path in CSRC.glob("common/*.cu")]
    return [
        Job(*file, arch)
        for file in sorted(triton + cuda)
        for arch in ARCHITECTURES
        if arch == 90 or Path(file[1]).name not in CUDA_WGMMA
    ]


def _cached(job: Job) -> list[Row]:
    missing = _missing(job.backend)
    if missing is not None:
        return [Row(job.op, job.backend, "-", "-", job.arch, missing=missing)]
    compiler = _triton_version() if job.backend == "triton" else _nvcc_version()
    source = kernels.source_hash(job.op) if job.backend == "triton" else _csrc_hash(job.op)
    tables = [path.read_text("utf-8") for path in sorted(KERNELS.glob("configs/*.json"))]
    parts = (source, str(compiler), Path(__file__).read_text("utf-8"), *tables)
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    name = f"{Path(job.source).name}-{job.backend}-sm_{job.arch}-{key}.json"
    path = evidence.cache_folder() / "resources" / name
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return _rows(path.read_text("utf-8"))
    if job.backend == "triton":
        rows = triton_rows(job.op, f"{kernels.__name__}.{job.source}", job.arch)
    else:
        rows = cuda_rows(job.op, CSRC / f"{job.source}.cu", job.arch)
    evidence.write_cache(path, _json(rows))
    return rows


def _missing(backend: str) -> str | None:
    """What stands against compiling this backend's kernels here, and what to install."""
    if backend == "triton" and _triton_version() is None:
        return "Triton is not installed: pip install triton"
    if backend == "cuda" and _nvcc_version() is None:
        return "nvcc was not found: install the CUDA toolkit"
    for tool in ("cuobjdump", *(["ptxas"] if backend == "triton" else [])):
        if _found(tool) is None:
            return f"{tool} was found neither in the search path nor inside Triton: install the CUDA toolkit"
    return None


def _json(rows: Iterable[Row]) -> str:
    return json.dumps([asdict(row) for row in rows])


def _rows(text: str) -> list[Row]:
    def pairs(value: Any) -> Any:
        return tuple(tuple(pair) for pair in value) if isinstance(value, list) else value

    return [Row(**{name: pairs(value) for name, value in row.items()}) for row in json.loads(text)]


def triton_rows(op: str, module: str, arch: int, path: Path | None = None) -> list[Row]:
    """The rows of a module's `VARIANTS`, compiled in a process without Triton's interpreter.

    Args:
        path: a folder to import the module from.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folders = [str(ROOT), *([str(path)] if path else []), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    with tempfile.TemporaryDirectory() as cache:  # ptxas speaks only where it is run
        environment |= {"TRITON_CACHE_DIR": cache, "TRITON_DUMP_PTXAS_LOG": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.resources", "--worker", op, module, str(arch)],
            capture_output=True,
            text=True,
            env=environment,
            cwd=ROOT,
            timeout=WORKER_TIMEOUT,
        )
    if done.returncode != 0:
        raise RuntimeError(f"{module} does not compile for sm_{arch}:\n{done.stderr}")
    return _rows(done.stdout)


def _compile_variants(op: str, name: str, arch: int) -> Iterator[Row]:
    module = importlib.import_module(name)
    for variant in module.VARIANTS:
        if arch < variant.least_arch:
            continue
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            compiled = _compile(getattr(module, variant.kernel), variant, arch)
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            spills = _spills(log.getvalue() or _ptxas_log(compiled.asm["ptx"], arch, Path(folder)))
            (usage,) = _usage(cubin).values()
        usage["shared"] = max(usage["shared"], compiled.metadata.shared)  # what a launch asks for is not in the cubin
        yield Row(
            op,
            "triton",
            variant.kernel,
            variant.name,
            arch,
            variant.num_warps * 32,
            **usage,
            **instructions(compiled.asm["ptx"], PTX),
            spills=sum(spills.values()),
            wide_loads=variant.wide_loads,
            promises_wgmma=variant.wgmma,
            narrow_offsets=narrow_offsets(compiled.asm["ttir"]),
        )


def _compile(kernel: Any, variant: Any, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, dict(variant.signature), dict(variant.constexprs))
    options = {name: getattr(variant, name) for name in ("num_warps", "num_stages", "maxnreg")}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={**options, "enable_fp_fusion": True})


def narrow_offsets(ttir: str) -> int:
    """How many pointers move by offsets of fewer than 64 bits, other than the lane in a tile and constants."""
    harmless = set(re.findall(r"(%\S+) = (?:tt\.make_range|arith\.constant) ", ttir))
    moves = re.findall(r"= tt\.addptr %\S+, (%\S+) : [^,\n]+, (?:tensor<[^>]*x)?(i\d+)", ttir)
    return sum(int(kind[1:]) < 64 and offset not in harmless for offset, kind in moves) + late_widenings(ttir)


# Integer operations that are looked through: of what they give, their operands decide.
PASSING = re.compile(
    r"arith\.(addi|subi|muli|shli|shrsi|shrui|divsi|divui|ceildivsi|floordivsi|remsi|remui|andi|ori|xori|extsi|extui"
    r"|trunci|select|maxsi|maxui|minsi|minui)|tt\.(splat|broadcast|expand_dims|reshape|trans|bitcast)"
)
DEFINITION = re.compile(r"\s*(?P<name>%[\w.$-]+) = (?P<operation>[\w.]+) (?P<operands>.*) : (?P<kind>[^:]+)$")


def late_widenings(ttir: str) -> int:
    """How many integers are widened to 64 bits after a product that may have left the narrower range.

    Of a product of constants and lanes the compiler knows the size; with a factor that comes from the program's index,
    an argument, a loop or memory it is as large as a launch makes it. What control flow hands on is not followed.
    """
    found = 0
    fixed: set[str] = set()  # values made of constants and lanes alone
    products: set[str] = set()  # narrow values with a product in them that is not fixed
    for line in ttir.splitlines():
        line = line.partition(" loc(")[0]
        here = DEFINITION.match(line)
        names = {here["name"]} if here else set(re.findall(r"(%[\w.$-]+)(?=(?::\d+)? =|: )", line))
        is_fixed, is_product = here is not None and here["operation"] in ("tt.make_range", "arith.constant"), False
        if here is not None and PASSING.fullmatch(here["operation"]):
            operands = set(re.findall(r"%[\w.$#-]+", here["operands"]))
            is_fixed = operands <= fixed
            multiplies = here["operation"] in ("arith.muli", "arith.shli")
            is_product = (multiplies and not is_fixed) or bool(operands & products)
            found += is_product and here["operation"] in ("arith.extsi", "arith.extui") and "i64" in here["kind"]
            is_product &= "i64" not in here["kind"] and here["operation"] != "arith.trunci"
        # Blocks side by side use the same names, so what a name stood for before is dropped.
        fixed = fixed | names if is_fixed else fixed - names
        products = products | names if is_product else products - names
    return found


def cuda_rows(op: str, source: Path, arch: int) -> list[Row]:
    """The rows of the kernels in a .cu file, compiled with the build's flags.

    Raises:
        RuntimeError: it does not compile, or not as it was meant.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        arch_flag = f"-arch=sm_{_cuda_target(arch)}"
        log = _run("nvcc", *_nvcc_flags(), "-cubin", arch_flag, "-Xptxas=-v", str(source), "-o", str(cubin))
        _refuse_setbacks(log)
        usage, sass = _usage(cubin), _run("cuobjdump", "--dump-sass", str(cubin))
        threads = _most_threads(_run("cuobjdump", "--dump-elf", str(cubin)))
    parts = re.split(r"^\s*Function : (\S+)$", sass, flags=re.MULTILINE)[1:]
    code = dict(zip(parts[::2], parts[1::2], strict=True))
    spills, names = _spills(log), _demangled(list(usage))
    rows = []
    for mangled, figures in usage.items():
        kernel, variant = names[mangled]
        figures |= instructions(code[mangled], SASS)
        figures |= {"threads": threads.get(mangled, UNBOUNDED)}
        figures |= {"register_moves": len(set(re.findall(r"USETMAXREG[.\w]*", code[mangled])))}
        wide, wgmma = (
            re.fullmatch(promised.get(source.stem, ""), f"{kernel}<{variant}>") is not None
            for promised in (CUDA_WIDE, CUDA_WGMMA)
        )
        promises = {"wide_loads": int(wide), "wide_stores": int(wide or wgmma)}
        promises |= {"promises_mma": source.stem in CUDA_MMA, "promises_wgmma": wgmma}
        rows.append(Row(op, "cuda", kernel, variant, arch, **figures, spills=spills[mangled], **promises))
    return rows


def _cmake(pattern: str) -> list[str]:
    """What CMakeLists.txt says, so that it is said once."""
    found = re.search(pattern, (ROOT / "CMakeLists.txt").read_text("utf-8"))
    if found is None:
        raise RuntimeError(
            f"CMakeLists.txt has nothing that matches {pattern}, from which the build's own compiler flags and targets "
            "are read; adapt the pattern in benchmarks/resources.py"
        )
    return found.group(1).split(";")


def _nvcc_flags() -> list[str]:
    own = _cmake(r"set\(lf_cuda_rounding ([^)]*)\)")
    own += ["-DLF_WITH_SM90A"]  # as the build has it where 90a is among its targets
    return ["-std=c++17", "-O3", "-DNDEBUG", "-DLF_BUILDING", f"-I{CSRC}", f"-I{CSRC / 'include'}", *own]


def _cuda_target(arch: int) -> str:
    """The build's own target of this generation: 90a, say."""
    targets = _cmake(r'LF_CUDA_ARCHS "([^"]*)"')
    return next((target for target in targets if target.rstrip("af") == str(arch)), str(arch))


def _csrc_hash(op: str) -> str:
    files = sorted([*CSRC.glob(f"{op}*"), *(CSRC / "common").glob("*"), *(CSRC / "include").glob("*")])
    digest = hashlib.sha256(repr((_nvcc_flags(), [_cuda_target(arch) for arch in ARCHITECTURES])).encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _demangled(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The kernel and its template arguments, by mangled name."""
    filters = [tool for tool in ("cu++filt", "c++filt") if shutil.which(tool)]
    plain = _run(filters[0], *names).splitlines() if filters and names else list(names)
    found = {}
    for name, text in zip(names, plain, strict=True):
        text = re.sub(r"lf::|\(anonymous namespace\)::|_INTERNAL_\w+::|^void ", "", text).rsplit("(", 1)[0]
        kernel, _, arguments = text.replace("> >", ">>").partition("<")
        found[name] = (kernel, arguments.removesuffix(">"))
    return found


def _spills(log: str) -> dict[str, int]:
    """Bytes by kernel, from what `ptxas -v` says."""
    found = re.findall(
        r"Function properties for (\S+)\s+\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    if not found:
        raise RuntimeError(f"ptxas said nothing of spills:\n{log}")
    return {name: int(stores) + int(loads) for name, stores, loads in found}


def _refuse_setbacks(log: str) -> None:
    """That ptxas moves registers between warps (else C7508) and overlaps warpgroup products (else C7510) as told.

    Raises:
        RuntimeError: it compiled on with a note or a warning of that kind.
    """
    if found := re.findall(r".*\bC75\d\d\b.*", log):
        raise RuntimeError("ptxas did not keep to the code:\n" + "\n".join(found))


def _most_threads(elf: str) -> dict[str, int]:
    """Threads of a block by mangled name, of kernels that bound them."""
    parts = re.split(r"^\.nv\.info\.(\S+)$", elf, flags=re.MULTILINE)[1:]
    found = {}
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        bounds = re.search(r"EIATTR_MAX_THREADS\s+Format:\s*\S+\s+Value:((?:\s+0x[0-9a-f]+){3})", text)
        if bounds is not None:
            found[name] = math.prod(int(size, 16) for size in bounds.group(1).split())
    return found


def _ptxas_log(ptx: str, arch: int, folder: Path) -> str:
    """For a Triton that keeps ptxas's words to itself: what it says to the same code."""
    source = folder / "kernel.ptx"
    source.write_text(ptx, "utf-8")
    return _run("ptxas", "-v", f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}", str(source), "-o", os.devnull)


def _usage(cubin: Path) -> dict[str, dict[str, Any]]:
    """Registers, stack and static shared memory of the kernels in a cubin, by mangled name."""
    text = _run("cuobjdump", "--dump-resource-usage", str(cubin))
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    return {
        name: dict(zip(("registers", "stack", "shared"), map(int, numbers), strict=True)) for name, *numbers in found
    }


# What is counted in PTX (Triton's) and in SASS (nvcc's): bulk and asynchronous copies are loads, and
# atomic operations stores.
PTX = {
    "instruction": r"^\s*(?:@!?%p\d+\s+)?([a-z]+[A-Za-z0-9_.:]*)\s",
    "wgmma": r"wgmma\.mma_async",
    "mma": r"w?mma\.(sync|m\d)",
    "loads": r"ld\.(volatile\.|relaxed\.\w+\.|acquire\.\w+\.)?global|cp\.async\.(c[ag]\.|bulk\.)",
    "stores": r"st\.(volatile\.|relaxed\.\w+\.|release\.\w+\.)?global|(atom|red)\.([a-z_]+\.)*global",
}
SASS = {
    "instruction": r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)",
    "wgmma": r"[A-Z]GMMA",
    "mma": r"[HIDQB]MMA",
    "loads": r"LDG(STS)?\b|UTMALDG|UBLKCP",
    "stores": r"STG\b|REDG?\b|ATOMG\b",
}


def instructions(code: str, language: Mapping[str, str]) -> dict[str, Any]:
    """Matrix instructions, and global loads and stores by bytes a thread."""
    names = Counter(re.findall(language["instruction"], code, re.MULTILINE))

    def of(kind: str) -> dict[str, int]:
        return {name: number for name, number in names.items() if re.match(language[kind], name)}

    def widths(kind: str) -> tuple[tuple[int, int], ...]:
        found: Counter[int] = Counter()
        for name, number in of(kind).items():
            found[_width(name)] += number
        return tuple(sorted(found.items()))

    matrix = {kind: sum(of(kind).values()) for kind in ("wgmma", "mma")}
    return {**matrix, "loads": widths("loads"), "stores": widths("stores")}


def _width(instruction: str) -> int:
    """Bytes a thread; copies by the tensor memory unit, and those that bypass L1, count as the widest."""
    if re.match(r"UTMALDG|UBLKCP|cp\.async\.(cg|bulk)", instruction):
        return WIDE
    vector = re.search(r"\.v(\d)\b", instruction)
    bits = re.search(r"\.[USbusf]?(8|16|32|64|128|256)\b", instruction)
    return (int(vector.group(1)) if vector else 1) * (int(bits.group(1)) // 8 if bits else 4)


@functools.cache
def _found(name: str) -> str | None:
    """A tool from the CUDA toolkit, or as it ships inside Triton."""
    spec = util.find_spec("triton")
    shipped = Path(spec.origin).parent / "backends/nvidia/bin" / name if spec and spec.origin else None
    if shipped is not None and shipped.exists():
        return str(shipped)
    return shutil.which(name)


def _run(tool: str, *arguments: str) -> str:
    path = _found(tool)
    if path is None:
        raise RuntimeError(f"{tool} was found neither in the search path nor inside Triton; install the CUDA toolkit")
    done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=WORKER_TIMEOUT)
    if done.returncode != 0:
        raise RuntimeError(f"{tool} failed:\n{done.stderr}")
    return done.stdout + done.stderr


def _triton_version() -> str | None:
    return evidence.package_version("triton") if util.find_spec("triton") else None


@functools.cache
def _nvcc_version() -> str | None:
    return _run("nvcc", "--version") if shutil.which("nvcc") else None


FIGURES = ("regs", "stack", "spills", "shared", "blocks an SM", "wgmma", "mma")
COLUMNS = ("op", "backend", "kernel", "variant", "arch", *FIGURES)
ACCESSES = ("loads", "stores")


def table(rows: Sequence[Row]) -> str:
    """A line for each row; loads and stores as bytes x instructions."""
    lines = [[*COLUMNS, *ACCESSES]]
    for row in rows:
        named = [row.op, row.backend, row.kernel, row.variant, f"sm_{row.arch}"]
        if row.missing is not None:
            lines.append([*named, f"not compiled: {row.missing}"])
            continue
        resident = "?" if row.resident is None else row.resident
        figures = (row.registers, row.stack, row.spills, row.shared, resident, row.wgmma, row.mma)
        accesses = (" ".join(f"{width}x{number}" for width, number in pairs) for pairs in (row.loads, row.stores))
        lines.append([*named, *map(str, figures), *accesses])
    widths = [max(len(line[i]) for line in lines if len(line) > len(COLUMNS)) for i in range(len(lines[0]))]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=False)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__.partition("\n")[0])
    parser.add_argument("--op", choices=sorted({job.op for job in _jobs()}), help="only the kernels of this op")
    parser.add_argument("--json", action="store_true", help="print the rows and what they break as JSON")
    parser.add_argument("--worker", nargs=3, metavar=("OP", "MODULE", "ARCH"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        op, module, arch = options.worker
        print(_json(_compile_variants(op, module, int(arch))))
        return KEPT
    try:
        rows = measure(options.op)
    except RuntimeError as error:
        print(f"python -m benchmarks.resources: {error}", file=sys.stderr)
        return ERROR
    return report(rows, options.json)


def report(rows: Sequence[Row], as_json: bool) -> int:
    """Print the rows, what they break and what could not be compiled; the exit status."""
    broken, compiled = violations(rows), [row for row in rows if row.missing is None]
    lacking = dict.fromkeys(f"{row.backend} kernels were not compiled: {row.missing}" for row in rows if row.missing)
    if as_json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "broken": broken}, indent=1))
    elif compiled:
        print(table(rows))
        print("\n".join(["", *(broken or [f"{len(compiled)} compiled rows keep all of {len(RULES)} rules"])]))
    if lacking:
        told = "; ".join(lacking)
        print(told if compiled else f"nothing was checked: {told}", file=sys.stderr)
    return BROKEN if broken else KEPT if compiled else NOTHING_COMPILED


if __name__ == "__main__":
    sys.exit(main())
