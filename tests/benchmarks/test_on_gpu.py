"""benchmarks/on_gpu.sh without a GPU: what it refuses, and how it goes through its parts, with stand-ins for python and
compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

PYTHON = """#!/bin/sh
case "$*" in
  -c*) echo "a card, torch 2" ;;
  *--collect-only*) for i in 1 2 3 4 5; do echo "tests/kernels/test_a.py::test_cuda[$i]"; done ;;
  *bench_vq_nearest.py) echo "different results"; exit 3 ;;
  *"-m pytest -m gpu"*) echo "interpret: ${TRITON_INTERPRET-unset}" ;;
  *) echo "ran: $*, MEDDIFF_CUDA=$MEDDIFF_CUDA" ;;
esac
"""


def run(out: Path, programs: Path, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"} | environment
    return subprocess.run([BENCHMARKS / "on_gpu.sh", out], env=environment, capture_output=True, text=True)


def install(folder: Path, **programs: str) -> None:
    for name, text in programs.items():
        path = folder / name.replace("_", "-")
        path.write_text(text)
        path.chmod(0o755)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_built(tmp_path: Path):
    install(tmp_path, python=f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    done = run(tmp_path / "out", tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert "no CUDA device, nothing was built or run: torch " in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path):
    install(tmp_path, python=PYTHON, compute_sanitizer='#!/bin/sh\necho "sanitizer: $*"\n')
    out = tmp_path / "out"
    done = run(out, tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 1, done.stderr
    benchmarks = sorted(path.stem for path in BENCHMARKS.glob("bench_*.py"))
    parts = ["build", "doctor", "tests", "memcheck", "racecheck", *benchmarks]
    head, *lines = (out / "summary.txt").read_text().splitlines()
    assert head == "a card, torch 2"
    results = {line.split(":")[0]: line.split(": ")[1].split(",")[0] for line in lines}
    assert results == {part: "failed" if part == "bench_vq_nearest" else "passed" for part in parts}
    assert "bench_vq_nearest: failed: exit code 3" in (out / "summary.txt").read_text()
    assert {path.stem for path in out.glob("*.log")} == set(parts)
    assert "different results" in (out / "bench_vq_nearest.log").read_text()
    assert "install --no-deps --no-build-isolation -e ., MEDDIFF_CUDA=1" in (out / "build.log").read_text()
    assert "interpret: unset" in (out / "tests.log").read_text()
    checked = (out / "racecheck.log").read_text().splitlines()[-1]
    assert "--tool racecheck" in checked and "test_cuda[3]" in checked and "test_cuda[4]" not in checked


def test_no_sanitizer_is_no_failure(tmp_path: Path):
    if shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin"):
        pytest.skip("there is a compute-sanitizer")
    install(tmp_path, python=PYTHON.replace("exit 3", "exit 0"))
    done = run(tmp_path / "out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "memcheck, racecheck: skipped, compute-sanitizer was not found" in (tmp_path / "out/summary.txt").read_text()
