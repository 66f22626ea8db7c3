"""A training command in one of several processes, with FSDP 2 on CPUs: it stops after two steps, and goes on.

Accelerate shards over accelerators only; PyTorch's `fully_shard` does over CPUs and gloo, too, and all else is its own.
"""

from __future__ import annotations

import sys

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from meddiff.cli import main

_initialise = Accelerator.__init__


def _initialise_with_fsdp(self: Accelerator, *args, **kwargs) -> None:
    _initialise(self, *args, **kwargs)
    self.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    for state in (self.state, PartialState()):
        state.distributed_type = DistributedType.FSDP


if __name__ == "__main__":
    Accelerator.__init__ = _initialise_with_fsdp
    code = main([*sys.argv[1:], "--stop", "2"])
    AcceleratorState._reset_state(True)
    sys.exit(code or main(sys.argv[1:]))
