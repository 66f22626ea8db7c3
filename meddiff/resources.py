"""Memory and time: what a device has, what a stage of the work used."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CGROUP = Path("/sys/fs/cgroup")


def default_device() -> torch.device:
    """The current CUDA device where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if native else torch.float32


def bytes_of(text: str) -> int:
    """8GB, 900MB, 7.5GiB or a plain number of bytes; ValueError for anything else, and for nothing at all."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ValueError(f"expected a positive amount of memory such as 8GB, 900MB or 7.5GiB, got {text!r}")
    power = " KMGT".index(found[2].upper()) if found[2] else 0
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated: free device memory, or on the CPU what system and control group leave.

    None where the platform does not say.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if not Path("/proc/meminfo").exists():
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    limits = [int(found[1]) * 1024] if found else []
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        limits.append(limit - int((_CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # no control group, or the word "max"
        pass
    return min(limits, default=None)


def on_device(device: torch.device) -> AbstractContextManager:
    """`with on_device(device): ...` makes a CUDA device the current one, on whose streams Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _resident_peak() -> int | None:
    if _STATUS.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
        return int(found[1]) * 1024 if found else None
    if os.name != "posix":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset_resident_peak() -> None:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:  # then the peak is that of the process so far
        pass


@dataclass
class Stage:
    name: str
    seconds: float
    peak_bytes: int | None  # CUDA: most bytes allocated during the stage; CPU: largest resident size of the process


@dataclass
class StageMeter:
    """Times stages and reads their peak memory: `with meter.stage("decode"): ...`."""

    device: torch.device
    stages: list[Stage] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _reset_resident_peak()
        start = time.perf_counter()
        yield
        if on_gpu:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else _resident_peak()
        self.stages.append(Stage(name, seconds, peak))

    def to_dicts(self) -> list[dict]:
        return [asdict(stage) for stage in self.stages]


def give_back_freed_memory() -> None:
    """Return freed memory to the system: what the C library keeps of it counts as resident."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
