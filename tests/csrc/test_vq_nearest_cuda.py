"""csrc/vq_nearest.cu without a GPU, on an emulated device."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from meddiff.kernels.vq_nearest import vq_nearest_ref

HERE = Path(__file__).parent
CXX = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def compile_emulation(folder: Path, *flags: str) -> Path:
    program = folder / "vq_nearest"
    command = [CXX, "-std=c++20", "-O1", "-ffp-contract=off", "-pthread", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", *flags, str(HERE / "vq_nearest_emulated.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def emulate(program: Path, z: Tensor, codes: Tensor) -> Tensor:
    """z must be a view that starts at the beginning of its storage."""
    memory = torch.empty(0).set_(z.untyped_storage())
    data = program.parent / "input"
    data.write_bytes(memory.numpy().tobytes() + codes.numpy().tobytes())
    numbers = [*z.shape, *z.stride(), memory.numel(), codes.shape[0]]
    done = subprocess.run([program, *map(str, numbers), data], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return torch.frombuffer(bytearray(done.stdout), dtype=torch.int64).view(z.shape[0], *z.shape[2:])


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if CXX is None:
        pytest.skip("no C++ compiler")
    return compile_emulation(tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize(
    ("channels", "n_codes"),
    [(1, 65), (3, 1), (4, 200), (8, 64), (8, 1000), (3, 5000), (2, 8300), (13, 130), (16, 63), (20, 150)],
)
def test_emulated_kernel(program: Path, channels: int, n_codes: int):
    torch.manual_seed(channels)
    codes = torch.randn(n_codes, channels)
    codes[n_codes // 2 :] = codes[: n_codes - n_codes // 2].clone()  # ties
    z = torch.randn(2, channels, 1, 9, 15)  # more tokens than one block holds
    z[0, :, 0, 0, 0], z[0, :, 0, 0, 1], z[0, :, 0, 0, 2] = torch.nan, torch.inf, 1e30
    assert torch.equal(emulate(program, z, codes), vq_nearest_ref(z, codes))


def test_grid_stride_and_strides(program: Path):
    torch.manual_seed(0)
    codes = torch.randn(70, 8)
    z = torch.randn(2, 7, 8, 6, 9).permute(0, 2, 1, 3, 4)[:, :, :, :, ::2].transpose(2, 4)
    assert torch.equal(emulate(program, z, codes), vq_nearest_ref(z, codes))
    z = torch.randn(1, 8, 10, 11, 12).contiguous(memory_format=torch.channels_last_3d)  # three rounds of two blocks
    assert torch.equal(emulate(program, z, codes), vq_nearest_ref(z, codes))


@pytest.mark.parametrize("case", ["near ties", "far from the origin", "1e30", "1e-30", "1e-42", "bad codes"])
def test_hard_values(program: Path, case: str):
    torch.manual_seed(1)
    z, codes = torch.randn(1, 8, 1, 7, 11), torch.randn(300, 8)
    if case == "near ties":
        codes = codes[:30].repeat_interleave(10, 0)
        codes *= 1 + torch.randint(-2, 3, codes.shape) * torch.finfo(torch.float32).eps
    elif case == "far from the origin":
        z, codes = 1000 + 0.01 * z, 1000 + 0.01 * codes
    elif case == "bad codes":
        codes[0], codes[100, 3], codes[200, 1] = torch.nan, torch.inf, torch.nan
    else:
        z, codes = float(case) * z, float(case) * codes
    assert torch.equal(emulate(program, z, codes), vq_nearest_ref(z, codes))


def test_no_data_races(tmp_path: Path):
    if CXX is None:
        pytest.skip("no C++ compiler")
    try:
        program = compile_emulation(tmp_path, "-fsanitize=thread")
    except subprocess.CalledProcessError:
        pytest.skip("the compiler has no thread sanitizer")
    torch.manual_seed(2)
    z, codes = torch.randn(1, 3, 1, 8, 75), torch.randn(130, 3)  # three tiles of codes, two rounds of tokens
    assert torch.equal(emulate(program, z, codes), vq_nearest_ref(z, codes))
