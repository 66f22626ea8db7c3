"""A small set of volumes, and two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest


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


@pytest.fixture(scope="session")
def two_processes():
    """Runs `meddiff` with these arguments in two processes that talk through gloo."""

    def run(*arguments: str) -> None:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "meddiff.cli"]
        done = subprocess.run(
            [sys.executable, *launch, *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return run
