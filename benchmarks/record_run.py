"""What benchmarks/on_gpu.sh leaves: the results of this device, old and new, and a line on the run itself, in one file.

    python benchmarks/record_run.py FOLDER

The line has the outcome of each part and benchmark, pytest's and compute-sanitizer's own last words, the failed tests
and what `meddiff doctor` says of the machine. It is appended to benchmarks/results/<device>.jsonl, which is copied to
FOLDER: that copy is what can be committed.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import torch
from common import append_result

from meddiff.resources import default_device

_LAST_WORDS = re.compile(r"^=* ?\d+ (?:passed|failed|skipped|deselected|error).*|^=+ ?(?:ERROR|RACECHECK) SUMMARY: .*")


def of_log(path: Path) -> dict:
    """What a log ends with, and the tests that it calls failed."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    words = [line.strip("= ") for line in lines if _LAST_WORDS.match(line)]
    return {"last_words": words[-2:], "failed": [line for line in lines if line.startswith(("FAILED ", "ERROR "))][:50]}


def record(folder: Path, device: torch.device) -> Path:
    """Append the line and copy its file into the folder; the copy's path."""
    summary = (folder / "summary.txt").read_text().splitlines()
    doctor = folder / "doctor.log"
    line = {
        "benchmark": "on_gpu",
        "case": "build, tests, sanitizer, benchmarks",
        "dtype": "",
        "machine": summary[0],
        "parts": [part.strip() for part in summary[1:]],
        "doctor": doctor.read_text(errors="replace").splitlines()[1:] if doctor.exists() else [],
    }
    line |= {name: of_log(folder / f"{name}.log") for name in ("tests", "memcheck", "racecheck")}
    path = append_result(line, device)
    return Path(shutil.copy(path, folder))


if __name__ == "__main__":
    print(f"to be committed to benchmarks/results: {record(Path(sys.argv[1]), default_device())}")
