"""How the CUDA convolutions share their work (csrc/conv3d_plan.h): shared memory and blocks of every width."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
CXX = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_120": 99 << 10}  # bytes of shared memory of a block


class Plan(NamedTuple):
    fits: int
    slots: int  # stages of weights in shared memory; 0: all of them
    chunk: int
    threads: int
    rows: int
    shared: int
    planes: int
    blocks: int


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if CXX is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("plan") / "plan"
    subprocess.run([CXX, "-std=c++17", "-O1", "-Wall", "-Wextra", HERE / "conv3d_plan.cpp", "-o", program], check=True)
    return program


def plan(
    program: Path, target: str, c: int, o: int, kernel: int = 3, residual: int = 0, size=(128,) * 3, wgmma: int = 0
) -> Plan:
    numbers = [LIMITS[target], c, o, kernel, residual, *size, wgmma]
    return Plan(*map(int, subprocess.run([program, *map(str, numbers)], capture_output=True, text=True).stdout.split()))


@pytest.mark.parametrize("target", LIMITS)
def test_every_width_fits(program: Path, target: str):
    for c in [8, 16, 24, 40, 48, 64, 72, 96, 128, 144, 192, 256, 288, 384, 576]:
        for o, kernel, residual in [
            (8, 3, 0),
            (48, 3, 96),
            (64, 3, 0),
            (96, 1, 0),
            (c, 3, 2 * c),
            (c, 4, 0),
            (48, 4, 0),
        ]:
            p = plan(program, target, c, o, kernel, residual)
            assert p.fits and p.shared <= LIMITS[target] and p.threads <= 256, (c, o, kernel, residual, p)


def test_every_width_fits_for_wgmma(program: Path):
    """In chunks that the kernel is compiled for, with rows for whole warpgroups."""
    for c in [8, 16, 24, 40, 48, 64, 72, 96, 128, 144, 192, 256, 288, 384, 576]:
        for o, residual in [(8, 0), (48, 96), (64, 0), (96, 64), (c, 2 * c)]:
            for height in (3, 128):
                p = plan(program, "sm_90", c, o, 3, residual, (128, height, 128), wgmma=1)
                assert p.fits and p.shared <= LIMITS["sm_90"] and p.chunk in (3, 4), (c, o, residual, p)
                assert (p.threads, p.rows) == ((128, 8) if height == 3 else (256, 16))


def test_weights_are_resident_where_they_fit(program: Path):
    assert [plan(program, target, 48, 48).slots for target in LIMITS] == [3, 0, 3]
    assert [plan(program, target, 96, 48, kernel=4).slots for target in LIMITS] == [3, 0, 3]
    assert plan(program, "sm_90", 96, 96).slots == 3
    # for wgmma the widths of full resolution
    shapes = [(48, 48, 0), (48, 48, 96), (64, 64, 0), (96, 48, 0)]
    assert [plan(program, "sm_90", c, o, 3, r, wgmma=1).slots for c, o, r in shapes] == [0, 0, 0, 4]


@pytest.mark.parametrize("target", LIMITS)
def test_projection_to_one_channel_fits(program: Path, target: str):
    for c in [8, 48, 64, 192]:
        assert plan(program, target, c, 1).fits


def test_blocks(program: Path):
    """Tiles of 16 x 16 voxels for 48 channels; small volumes are marched in short segments, large ones in long ones."""
    p = plan(program, "sm_90", 48, 48, size=(64, 100, 50))
    assert (p.rows, p.planes, p.blocks) == (16, 4, 7 * 4 * 16)
    assert plan(program, "sm_90", 48, 48, size=(512, 512, 512)).planes == 32
    p = plan(program, "sm_90", 192, 192, size=(2, 3, 40))
    assert (p.rows, p.planes, p.blocks) == (4, 4, 3 * 2)
