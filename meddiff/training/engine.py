"""What the training loops share: the accelerator, whole checkpoints, statistics, previews.

A run's folder holds checkpoints/step-…/ (all state; the last few are kept), stats.jsonl (one line per logged step),
previews/, cache/ and the trained component.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed

from meddiff.files import atomic_write
from meddiff.progress import progress
from meddiff.training.data import draw_seed
from meddiff.training.options import RunOptions

_log = logging.getLogger(__name__)


class TrainingRun:
    """The state around a training loop.

    accelerator: Hugging Face accelerate's: one process, DDP or FSDP, as `accelerate launch` set it up
    folder: of the run
    end: step after which it stops
    complete: whether that is its last
    """

    def __init__(self, options: RunOptions) -> None:
        self.options = options
        # The codebook's statistics are summed over the processes by itself; nothing else is to be broadcast.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
        self.accelerator = Accelerator(mixed_precision=options.mixed_precision, kwargs_handlers=[ddp])
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

    def resume(self) -> int:
        """Load the last checkpoint, if there is one, into what `accelerator.prepare` made; returns the next step.

        Statistics of later steps, of a run that was killed after it, are removed.
        """
        step = 0
        found = self._found()
        if found:
            self.accelerator.load_state(str(found[-1]))
            step = int(found[-1].name.removeprefix("step-"))
            _log.info("going on from %s", found[-1])
        if self.accelerator.is_main_process and self._stats.exists():
            lines = [line for line in self._stats.read_text().splitlines() if _step_of(line) < step]
            with atomic_write(self._stats) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines))
        return step

    def steps(self, start: int, *optimizers: torch.optim.Optimizer) -> Iterator[int]:
        """The steps from `start`, each with its learning rate and its own seed for all that is random.

        Saves after those that ask for it.
        """
        a = self.accelerator
        todo = range(start, self.end)
        for step in progress("training")(todo) if a.is_main_process else todo:
            set_seed(draw_seed(self.options.seed, step, a.process_index))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.options.learning_rate_at(step)
            yield step
            if (step + 1) % self.options.save_every == 0 or step + 1 == self.end:
                self.save(step + 1)

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

    def log(self, step: int, **values: torch.Tensor | float) -> None:
        """Append to stats.jsonl and to TensorBoard, where that is installed; raises FloatingPointError for NaN."""
        numbers = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in values.items()}
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


def _step_of(line: str) -> int | float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # half a line, of a run that was killed
        return float("inf")
