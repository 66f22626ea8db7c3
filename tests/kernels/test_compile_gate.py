"""Every GPU kernel compiled ahead of time, with no GPU: nothing spills, tensor cores are used where they are meant, and
compile_table.tsv says what the compilers give."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("compile_table", HERE / "compile_table.py")
compile_table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(compile_table)

LARGEST_BLOCK = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}  # bytes of shared memory


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    """compile_table.py without Triton's interpreter, which this folder's conftest.py chooses."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, HERE / "compile_table.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], list[dict]]:
    """Versions and lines of a table that is made now."""
    table = tmp_path_factory.mktemp("compiled") / "compile_table.tsv"
    done = run("--out", table)
    assert done.returncode == 0, done.stderr
    return compile_table.read(table)


@pytest.fixture(scope="module")
def committed() -> tuple[dict[str, str], list[dict]]:
    return compile_table.read(compile_table.TABLE)


def by_name(rows: Iterable[dict]) -> dict[tuple[str, str], dict]:
    return {(row["kernel"], row["target"]): row for row in rows}


def test_nothing_spills(new):
    assert [f"{r['kernel']} on {r['target']}: {r['spilled']} bytes" for r in new[1] if r["spilled"] != "0"] == []


def test_tensor_cores_are_used_where_they_are_meant(new):
    meant = [row for row in new[1] if row["tensor_core_meant"] == "yes"]
    assert meant
    assert [f"{row['kernel']} on {row['target']}" for row in meant if row["tensor_core"] == "0"] == []


def test_shared_memory_fits(new):
    assert [
        f"{row['kernel']} on {row['target']}: {row['shared']} bytes"
        for row in new[1]
        if row["target"] in LARGEST_BLOCK and int(row["shared"]) > LARGEST_BLOCK[row["target"]]
    ] == []


def check(new, committed, compiler: str, of_library: bool) -> None:
    """The same kernels on the same targets, and the same figures if the compiler is the same."""
    (versions, rows), (old_versions, old_rows) = new, committed
    ours, theirs = (
        by_name(row for row in rows if compile_table.is_of_library(row) == of_library) for rows in (rows, old_rows)
    )
    rewrite = "to rewrite the table: python tests/kernels/compile_table.py"
    assert ours.keys() == theirs.keys(), rewrite
    if versions[compiler] == old_versions[compiler]:
        assert ours == theirs, rewrite


def test_table_of_triton_kernels(new, committed):
    check(new, committed, "triton", of_library=False)


@pytest.mark.skipif(not compile_table.LIBRARY.exists(), reason="meddiff/_cuda.so is not built: MEDDIFF_CUDA=1 and nvcc")
def test_table_of_cuda_kernels(new, committed):
    check(new, committed, "nvcc", of_library=True)


SPILLING = """
import triton
import triton.language as tl


@triton.jit
def _sum(x, N: tl.constexpr):
    i = tl.arange(0, N)
    total = tl.zeros([N, N], tl.float32)
    for first in range(0, 1000):
        a = tl.load(x + first * N + i)
        total += a[:, None] * a[None, :]
    tl.store(x + i[:, None] * N + i[None, :], total)


CASES = [
    {
        "name": f"{n}² sums",
        "kernel": _sum,
        "signature": {"x": "*fp32", "N": "constexpr"},
        "constexprs": {"N": n},
        "num_warps": 1,
        "tensor_core": False,
    }
    for n in (32, 128)
]
"""


def test_a_spill_is_seen(tmp_path: Path):
    (tmp_path / "aot_spilling.py").write_text(SPILLING)
    done = run("--cases", tmp_path, "--out", tmp_path / "table.tsv")
    assert done.returncode == 0, done.stderr
    rows = [row for row in compile_table.read(tmp_path / "table.tsv")[1] if not compile_table.is_of_library(row)]
    assert {(row["kernel"], row["spilled"] != "0") for row in rows} == {("32² sums", False), ("128² sums", True)}
    assert {row["tensor_core"] for row in rows} == {"0"}


def test_a_kernel_that_does_not_compile_is_named(tmp_path: Path):
    (tmp_path / "aot_broken.py").write_text(
        SPILLING.replace("tl.zeros([N, N], tl.float32)", "tl.zeros([N, 3], tl.float32)")
    )
    done = run("--cases", tmp_path, "--out", tmp_path / "table.tsv")
    assert done.returncode != 0 and "32² sums: does not compile for sm_80" in done.stderr
