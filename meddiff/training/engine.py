"""What the training loops share: the accelerator, whole checkpoints, statistics, previews.

A run's folder holds checkpoints/step-…/ (all state; the last few are kept), stats.jsonl (one line per logged step),
previews/, cache/ and the trained component.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from meddiff.files import atomic_write
from meddiff.progress import progress
from meddiff.training.data import Draws, draw_seed
from meddiff.training.options import RunOptions

_log = logging.getLogger(__name__)

# Engines with weights of their own, which the moving average would not see.
_NOT_SERVED = {DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA}


class TrainingRun:
    """The state around a training loop.

    accelerator: Hugging Face accelerate's: one process, DDP or FSDP 2, as `accelerate launch` set it up
    folder: of the run
    end: step after which it stops
    complete: whether that is its last

    Args:
        options: of the trainer.
        shardable: whether FSDP can serve it: the optimiser alone changes the network's weights.

    Raises ValueError where accelerate is configured for what would train or write wrong weights.
    """

    def __init__(self, options: RunOptions, shardable: bool = True) -> None:
        self.options = options
        # The codebook's statistics are summed over the processes by itself; nothing else is to be broadcast.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
        self.accelerator = Accelerator(mixed_precision=options.mixed_precision, kwargs_handlers=[ddp])
        require_served(self.accelerator, shardable)
        self.folder = Path(options.out)
        self.end = min(options.stop or options.steps, options.steps)
        self.complete = self.end == options.steps
        self._checkpoints = self.folder / "checkpoints"
        self._stats = self.folder / "stats.jsonl"
        self._board = None
        if self.accelerator.is_main_process:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            for remains in self._checkpoints.glob(".step-*"):
                shutil.rmtree(remains)
        self.accelerator.wait_for_everyone()

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """A network and its optimiser, as accelerate wraps or shards them."""
        if self.accelerator.distributed_type == DistributedType.FSDP:  # takes no weights in channels_last_3d
            network.to(memory_format=torch.contiguous_format)
        return self.accelerator.prepare(network, optimizer)

    def resume(self) -> int:
        """Load the last checkpoint, if there is one, into what `prepare` made; returns the next step.

        Statistics of later steps, of a run that was killed after it, are removed.

        Raises ValueError for a checkpoint of shards in a run without FSDP, and the other way round.
        """
        step = 0
        found = self._found()
        if found:
            sharded = any(found[-1].glob("pytorch_model_fsdp*"))
            if sharded != (self.accelerator.distributed_type == DistributedType.FSDP):
                raise ValueError(
                    f"training: {found[-1]} was written {'with' if sharded else 'without'} FSDP; go on in the same "
                    "way, or give another out"
                )
            self.accelerator.load_state(str(found[-1]))
            step = int(found[-1].name.removeprefix("step-"))
            _log.info("going on from %s", found[-1])
        if self.accelerator.is_main_process and self._stats.exists():
            lines = [line for line in self._stats.read_text().splitlines() if _step_of(line) < step]
            with atomic_write(self._stats) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines))
        return step

    def batches(self, data: Dataset, buckets: Sequence[Hashable], start: int) -> Iterator[Any]:
        """This process's batches of the steps from `start`, each of one bucket; see `Draws`."""
        o, a = self.options, self.accelerator
        draws = Draws(buckets, o.batch_size, o.seed, start, a.process_index, a.num_processes)
        return iter(DataLoader(data, batch_sampler=draws, num_workers=o.workers))

    def steps(self, start: int, *optimizers: torch.optim.Optimizer) -> Iterator[int]:
        """The steps from `start`, each with its own seed for all that is random, and with its learning rate, which is
        multiplied by a parameter group's `rate`.

        Saves after those that ask for it.
        """
        a = self.accelerator
        todo = range(start, self.end)
        for step in progress("training")(todo) if a.is_main_process else todo:
            set_seed(draw_seed(self.options.seed, step, a.process_index))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group.get("rate", 1.0) * self.options.learning_rate_at(step)
            yield step
            if (step + 1) % self.options.save_every == 0 or step + 1 == self.end:
                self.save(step + 1)

    def descend(self, loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """A step of the optimiser down `loss`, its gradient clipped where the options ask for it."""
        self.accelerator.backward(loss)
        if self.options.gradient_clip:
            self.accelerator.clip_grad_norm_(model.parameters(), self.options.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()

    def save(self, step: int) -> None:
        """Write the checkpoint from which `step` is the next step, whole or not at all, and remove the oldest."""
        target = self._checkpoints / f"step-{step:08d}"
        staging = target.with_name(f".{target.name}")
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(staging))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for path in staging.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            if target.exists():
                shutil.rmtree(target)
            staging.rename(target)
            for old in self._found()[: -self.options.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def log(self, step: int, **values: Tensor | float) -> None:
        """Append to stats.jsonl and to TensorBoard, where that is installed; raises FloatingPointError for NaN."""
        numbers = {name: value.item() if isinstance(value, Tensor) else value for name, value in values.items()}
        bad = [name for name, number in numbers.items() if not -float("inf") < number < float("inf")]
        if bad:
            raise FloatingPointError(
                f"training: {', '.join(bad)} not finite at step {step}; the last checkpoint is in {self._checkpoints}. "
                "Lower the learning rate, set gradient_clip, or train in float32"
            )
        if step % self.options.log_every or not self.accelerator.is_main_process:
            return
        with self._stats.open("a") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        if self._board is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self._board = False
            else:
                self._board = SummaryWriter(str(self.folder / "tensorboard"))
        if self._board:
            for name, number in numbers.items():
                self._board.add_scalar(name, number, step)

    def preview(self, step: int) -> Path | None:
        """The PNG to write after this step, if one is due and this process is to write it."""
        every = self.options.preview_every
        if not every or (step + 1) % every or not self.accelerator.is_main_process:
            return None
        folder = self.folder / "previews"
        folder.mkdir(exist_ok=True)
        return folder / f"step-{step + 1:08d}.png"

    def _found(self) -> list[Path]:
        return sorted(path for path in self._checkpoints.glob("step-*") if path.is_dir())


def require_served(accelerator: Accelerator, shardable: bool) -> None:
    """The check of `TrainingRun`."""
    kind, wanted = accelerator.distributed_type, "FSDP with fsdp_version 2, DDP, or one process"
    plugin = accelerator.state.fsdp_plugin if kind == DistributedType.FSDP else None
    if kind in _NOT_SERVED:
        problem = f"{kind.value} is not served"
    elif plugin is None:
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
            return
        problem = "accelerate has no FSDP for CPUs or for one process, and would train without it"
    elif getattr(plugin, "fsdp_version", 1) != 2:
        problem = "FSDP 1 is not served"
    elif not shardable:
        problem, wanted = "an autoencoder changes its weights while it computes, which FSDP loses", "DDP or one process"
    else:
        # Every process builds the same network, and autocast lowers the precision, as with DDP: what FSDP has for
        # either leaves out the networks' buffers.
        plugin.cpu_ram_efficient_loading, plugin.mixed_precision_policy = False, None
        return
    raise ValueError(f"training: {problem}; configure accelerate for {wanted} (`accelerate config`)")


def _step_of(line: str) -> int | float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # half a line, of a run that was killed
        return float("inf")
