"""A small set of volumes, a run that is killed, and two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from meddiff.training.engine import TrainingRun


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """With gradients, which inference tests turn off, and without the accelerator of another test."""
    AcceleratorState._reset_state(True)
    with torch.enable_grad():
        yield
    AcceleratorState._reset_state(True)


class Killed(BaseException):
    """As SIGKILL ends a process: nothing that the trainer does can catch it."""


@pytest.fixture
def killed_at(monkeypatch):
    """Runs a trainer with these options until it has logged a step; another can run afterwards."""

    def run(step: int, train: Callable[[Any], Path], options: Any) -> None:
        log = TrainingRun.log

        def die(run: TrainingRun, at: int, **values) -> None:
            log(run, at, **values)
            if at == step:
                raise Killed

        AcceleratorState._reset_state(True)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(TrainingRun, "log", die)
            train(options)
        AcceleratorState._reset_state(True)

    return run


@pytest.fixture(scope="session")
def volumes(tmp_path_factory) -> Path:
    """Four smooth volumes of 24×20×28 voxels, 1 mm, on a dark background."""
    folder, random = tmp_path_factory.mktemp("volumes"), np.random.default_rng(0)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (24, 20, 28)), indexing="ij")
    for i in range(4):
        a, b, c = random.uniform(0.4, 0.9, 3)
        inside = (x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2 < 1
        data = np.where(inside, 400 + 300 * np.sin(4 * x + i) * np.cos(3 * y), 0).astype(np.float32)
        nib.save(nib.Nifti1Image(data, np.eye(4)), folder / f"{i}.nii.gz")
    return folder


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
LAUNCHERS = {
    "torchrun": (*TORCHRUN, "-m", "meddiff.cli"),
    # its --cpu starts several processes with MPI only; for --multi_gpu it does what torchrun does
    "accelerate": (
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"),
        *("-m", "meddiff.cli"),
    ),
    "fsdp": (*TORCHRUN, str(Path(__file__).with_name("fsdp_on_cpu.py"))),
}


@pytest.fixture(scope="session")
def two_processes():
    """Runs `meddiff` with these arguments in two processes that talk through gloo."""

    def run(*arguments: str, launcher: str = "torchrun") -> None:
        done = subprocess.run(
            [sys.executable, "-m", *LAUNCHERS[launcher], *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return run
