"""What the GPU kernels compile to, with no GPU: writes tests/kernels/compile_table.tsv.

python tests/kernels/compile_table.py

Every case of aot_*.py is compiled by Triton for sm_80, sm_90 and sm_100 (all pointers 16-byte aligned, as PyTorch
allocates), and the kernels of csrc/*.cu are read from meddiff/_cuda.so; where that is not built, their lines stay as
they are. A line holds registers per thread, bytes of shared memory per block, bytes spilled per thread and instructions
for tensor cores. test_compile_gate.py compares the committed table with a new one.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import multiprocessing
import os
import pkgutil
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import meddiff.kernels

HERE = Path(__file__).parent
TABLE = HERE / "compile_table.tsv"
LIBRARY = Path(meddiff.__path__[0]) / "_cuda.so"
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
COLUMNS = ("kernel", "target", "registers", "shared", "spilled", "tensor_core", "tensor_core_meant")
_CAPABILITIES = (80, 90, 100)
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_ON_TENSOR_CORES = ("march_kernel", "wgmma_kernel", "project_kernel")  # of csrc/*.cu
_TENSOR_CORE = re.compile(r"\b(?:[HIDQO]G?MMA|UTC\w*MMA)\b")


def collect(folder: Path) -> list[dict]:
    """The CASES of every aot_*.py in the folder."""
    cases = []
    for path in sorted(folder.glob("aot_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        cases += module.CASES
    names = [case["name"] for case in cases]
    if len(set(names)) < len(names):
        raise ValueError(f"aot_*.py: names must differ, got twice {sorted({n for n in names if names.count(n) > 1})}")
    return cases


def without_case(cases: list[dict]) -> list[str]:
    """Kernels of meddiff.kernels (Triton functions called *_kernel) that no case compiles."""
    modules = [
        importlib.import_module(m.name) for m in pkgutil.iter_modules(meddiff.kernels.__path__, "meddiff.kernels.")
    ]
    kernels = {
        value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }
    missing = kernels - {case["kernel"] for case in cases}
    return sorted(f"{kernel.__module__}.{kernel.__name__}" for kernel in missing)


def dump(*arguments: str | Path) -> str:
    return subprocess.run([CUOBJDUMP, *arguments], capture_output=True, text=True, check=True).stdout


def compile_case(case: dict, capability: int) -> dict:
    kernel = case["kernel"]
    aligned = [i for i, name in enumerate(kernel.arg_names) if case["signature"][name].startswith("*")]
    source = ASTSource(
        kernel, case["signature"], case["constexprs"], {(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    try:
        compiled = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": case["num_warps"]})
    except Exception as error:
        raise RuntimeError(f"{case['name']}: does not compile for sm_{capability}: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        report = dump("-res-usage", "-sass", cubin)
    _, registers, stack, _, local = _USAGE.search(report).groups()
    figures = (registers, compiled.metadata.shared, int(stack) + int(local), len(_TENSOR_CORE.findall(report)))
    meant = "yes" if case["tensor_core"] else "no"
    return dict(zip(COLUMNS, map(str, (case["name"], f"sm_{capability}", *figures, meant))))


_cases: list[dict] = []  # of a worker: Triton functions cannot be sent to it


def _load(folder: Path) -> None:
    _cases.extend(collect(folder))


def _compile(job: tuple[int, int]) -> dict:
    return compile_case(_cases[job[0]], job[1])


def triton_rows(folder: Path, cases: int) -> list[dict]:
    jobs = [(i, capability) for i in range(cases) for capability in _CAPABILITIES]
    processes = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(processes, _load, (folder,)) as pool:
        return list(pool.imap(_compile, jobs))  # in order, so that the first case that fails is the one named


def library_rows(library: Path) -> list[dict]:
    """The kernels of csrc/*.cu for every architecture that they were built for; shared memory is what is static."""
    tensor_core = {}
    for part in dump("-sass", library).split("arch = ")[1:]:
        for function in part.split("Function : ")[1:]:
            tensor_core[part.split()[0], function.split()[0]] = len(_TENSOR_CORE.findall(function))
    rows = []
    for part in dump("-res-usage", library).split("arch = ")[1:]:
        target = part.split()[0]
        for mangled, registers, stack, shared, local in _USAGE.findall(part):
            name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
            name = re.search(r"(\w+(?:<[^()]*>)?)\(", name.replace("(anonymous namespace)", ""))[1]
            name = name.replace("meddiff::device::", "")
            file = re.search(r"_\d+_([a-z]\w*)_cu_", mangled)[1]
            figures = (registers, shared, int(stack) + int(local), tensor_core[target, mangled])
            meant = "yes" if name.startswith(_ON_TENSOR_CORES) else "no"
            rows.append(dict(zip(COLUMNS, map(str, (f"{file}.cu {name}", target, *figures, meant)))))
    return rows


def nvcc_version(library: Path) -> str:
    """Of the compiler that made the library."""
    return re.search(r"Tool Version: .* V([\d.]+)", dump("-elf", library))[1]


def read(table: Path) -> tuple[dict[str, str], list[dict]]:
    """The compilers' versions and the lines of a table."""
    head, lines = [], []
    for line in table.read_text().splitlines():
        (head if line.startswith("#") else lines).append(line)
    versions = dict(line.split()[1:3] for line in head[1:])
    return versions, list(csv.DictReader(lines, delimiter="\t"))


def is_of_library(row: dict) -> bool:
    return ".cu " in row["kernel"]


def write(table: Path, versions: dict[str, str], rows: list[dict]) -> None:
    with table.open("w", newline="") as file:
        file.write("# written by: python tests/kernels/compile_table.py\n")
        file.writelines(f"# {name} {version}\n" for name, version in versions.items())
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=Path, default=HERE, help="folder with aot_*.py")
    parser.add_argument("--out", type=Path, default=TABLE)
    arguments = parser.parse_args()
    cases = collect(arguments.cases)
    if arguments.cases == HERE and (missing := without_case(cases)):
        raise SystemExit(f"no case in tests/kernels/aot_*.py compiles {', '.join(missing)}")
    versions, rows = {"triton": triton.__version__}, triton_rows(arguments.cases, len(cases))
    if LIBRARY.exists():
        versions["nvcc"] = nvcc_version(LIBRARY)
        rows += library_rows(LIBRARY)
    elif arguments.out.exists():
        known, old = read(arguments.out)
        versions = known | versions
        rows += filter(is_of_library, old)
    write(arguments.out, versions, rows)


if __name__ == "__main__":
    main()
