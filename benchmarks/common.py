"""What every benchmark records: the machine, the versions, the commit and the command beside the figures."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from meddiff.resources import StageMeter, available_bytes, give_back_freed_memory
from meddiff.sampling.graph import capture

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does; the peers gain as well

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_SHARE_OF_FREE = 0.9  # of the free memory; others need some too
_SHORT_MS = 5.0  # of a GPU's time, below which launches weigh in
_REPLAYS = 50


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return f"{found[1] if found else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict:
    """Device, versions, commit and command of this run."""
    script = Path(sys.argv[0])
    script = script.resolve().relative_to(ROOT) if script.resolve().is_relative_to(ROOT) else script.name
    commit, changes = _git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in ("meddiff", "torch", "triton")},
        "commit": commit and commit + ("+changes" if changes else ""),
        "command": shlex.join(["python", str(script), *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def limit_memory(device: torch.device) -> None:
    """On the CPU a process that asks for more than is free now gets an error, instead of all of them being killed."""
    free = available_bytes(device) if device.type == "cpu" else None
    if free is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(_SHARE_OF_FREE * free), resource.RLIM_INFINITY))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how PyTorch says that memory does not suffice: on a GPU, or by the allocator of the CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def measure(work: Callable[[], object], device: torch.device, repeats: int, warm_up: bool = True) -> dict:
    """Run `work` once to warm up, then `repeats` times: milliseconds p50, p20, p80 and peak memory of those.

    peak_above_model_bytes is the peak above what was there before: the weights, and results kept for comparison.
    peak_above_warm_bytes leaves out what stays after the warm-up as well: code, and kernels that oneDNN made.

    On a GPU short work is timed as replays of a CUDA graph, as the sampler runs it; `timed` says "graph" then. What
    cannot be captured is timed by the host's clock, its launches included, as long work is.
    """
    give_back_freed_memory()
    meter = StageMeter(device)
    with meter.stage("before"):
        pass
    if warm_up:
        work()
        give_back_freed_memory()
    with meter.stage("warm"):
        pass
    for _ in range(repeats):
        with meter.stage("run"):
            work()
    before, warm, *runs = meter.stages
    times = [1e3 * stage.seconds for stage in runs]
    replays = replay_ms(work, device) if device.type == "cuda" and min(times) < _SHORT_MS else None
    p20, p50, p80 = np.percentile(replays or times, (20, 50, 80))
    peak = max((stage.peak_bytes or 0) for stage in runs) or None
    figures = {"ms_p50": p50, "ms_p20": p20, "ms_p80": p80, "peak_bytes": peak}
    for name, then in {"model": before, "warm": warm}.items():
        figures[f"peak_above_{name}_bytes"] = None if peak is None else peak - (then.peak_bytes or 0)
    return figures | ({"timed": "graph"} if replays else {})


def replay_ms(work: Callable[[], object], device: torch.device) -> list[float] | None:
    """Milliseconds of replays of `work` as a CUDA graph, its data not in the L2 cache; None where it has none."""
    try:
        graph = capture(work, device)
    except RuntimeError:  # it waits for the device, or its backward pass belongs to another stream
        torch.cuda.synchronize(device)
        return None
    cold = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_REPLAYS)]
    for begin, end in events:
        cold.zero_()
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in events]


def slug(name: str) -> str:
    """A device's name as that of a file."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def append_result(line: dict, device: torch.device) -> Path:
    """Append one JSON line to results/<device>.jsonl, with `environment` in it, and return that file.

    Every line has `benchmark`, `case`, `dtype`, `ms_p50` and `peak_bytes`. Peers with the same result are in
    `x_<peer>`, their time over ours, and in `peers`: {peer: {ms_p50, peak_bytes}}, or {peer: {not_run: why}}.
    """
    path = RESULTS / f"{slug(device_name(device))}.jsonl"
    RESULTS.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line | environment(device), ensure_ascii=False) + "\n")
    return path


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Columns aligned, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * w for w in widths], *rows]:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))))
