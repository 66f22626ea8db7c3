"""benchmarks/on_gpu.sh without a GPU: what it refuses, and how it goes through its parts, with stand-ins for python and
compute-sanitizer."""

from __future__ import annotations

import json
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
  *"run.py gpu"*) echo "different results"; for last; do :; done
    echo "bench_a.py: failed: exit code 3, 1 s" > "$last"; exit 1 ;;
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
    parts = ["build", "doctor", "tests", "memcheck", "racecheck", "benchmarks"]
    head, *lines, inner = (out / "summary.txt").read_text().splitlines()
    assert head == "a card, torch 2"
    results = {line.split(":")[0]: line.split(": ")[1].split(",")[0] for line in lines}
    assert results == {part: "failed" if part == "benchmarks" else "passed" for part in parts}
    assert inner == "  bench_a.py: failed: exit code 3, 1 s"
    assert {path.stem for path in out.glob("*.log")} == set(parts)
    assert "different results" in (out / "benchmarks.log").read_text()
    assert "install --no-deps --no-build-isolation -e ., MEDDIFF_CUDA=1" in (out / "build.log").read_text()
    assert "interpret: unset" in (out / "tests.log").read_text()
    checked = (out / "racecheck.log").read_text().splitlines()[-1]
    assert "--tool racecheck" in checked and "test_cuda[3]" in checked and "test_cuda[4]" not in checked


def test_one_file_tells_of_the_run(script, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "summary.txt").write_text("a card, torch 2\nbuild: passed, 9 s\ntests: failed: exit code 1, 3 s\n")
    (out / "tests.log").write_text("+ pytest\nFAILED tests/test_a.py::test_b - no\n== 1 failed, 7 passed in 3.1s ==\n")
    (out / "memcheck.log").write_text("+ sanitizer\n7 passed in 2s\n========= ERROR SUMMARY: 0 errors\n")
    path = script("record_run").record(out, torch.device("cpu"))
    assert path.parent == out and path.read_text() == (tmp_path / "results" / path.name).read_text()
    line = json.loads(path.read_text())
    assert line["parts"] == ["build: passed, 9 s", "tests: failed: exit code 1, 3 s"] and line["commit"]
    assert line["tests"]["last_words"] == ["1 failed, 7 passed in 3.1s"]
    assert line["tests"]["failed"] == ["FAILED tests/test_a.py::test_b - no"]
    assert line["memcheck"]["last_words"] == ["7 passed in 2s", "ERROR SUMMARY: 0 errors"]
    assert line["racecheck"] == {"last_words": [], "failed": []}


def test_no_sanitizer_is_no_failure(tmp_path: Path):
    if shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin"):
        pytest.skip("there is a compute-sanitizer")
    install(tmp_path, python=PYTHON.replace("exit 1 ;;", "exit 0 ;;"))
    done = run(tmp_path / "out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "memcheck, racecheck: skipped, compute-sanitizer was not found" in (tmp_path / "out/summary.txt").read_text()
