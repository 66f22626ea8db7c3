"""A step of the denoising loop as one CUDA graph. No GPU has run this yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

WARM_UPS = 2  # launches before the capture: kernels are compiled, libraries choose algorithms and workspaces


class Graph(Protocol):
    """What a captured step is used through."""

    def replay(self) -> None: ...

    def pool(self) -> object: ...

    def reset(self) -> None: ...


def capture(step: Callable[[], None], device: torch.device, pool: object | None = None) -> Graph:
    """Capture `step`, which must read and write the same memory at every call and never wait for the device.

    Args:
        step: is called `WARM_UPS` times before, so that its buffers change. It launches on the current stream of
            `device`, and on side streams that join that one.
        device: a CUDA device.
        pool: `graph.pool()` of another graph, to share the memory of what `step` allocates: for graphs that are never
            replayed at the same time and whose results lie elsewhere.

    Raises:
        RuntimeError: what CUDA says of a step that cannot be captured.
    """
    with torch.cuda.device(device):
        aside, current = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                step()
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # other threads may decode, on this device or another, while this one captures
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()
    return graph
