"""The package as it is built, installed and imported."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import meddiff

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path(meddiff.__path__[0]) / "_cpu.so"


def python(code: str, *options: str, cwd: Path = ROOT, **environment: str) -> str:
    """Standard output of a fresh interpreter; an error there is an error here."""
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def backend() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "csrc" / "build_backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_kernels_is_the_installed_package(tmp_path: Path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("from kernels.part import value\n")
    (package / "part.py").write_text("value = 'installed'\n")
    code = """
import sys, kernels, kernels.part
from kernels import value
assert kernels.value == value == kernels.part.value == "installed"
assert sys.modules["kernels"] is kernels and kernels.__spec__.origin == kernels.__file__
assert "torch" not in sys.modules
print(kernels.__file__)
"""
    assert python(code, PYTHONPATH=str(tmp_path)) == str(package / "__init__.py")


def test_plain_kernels_is_absent_where_none_is_installed():
    code = """
import sys
try:
    import kernels
except ImportError as error:
    assert "kernels" not in sys.modules and "torch" not in sys.modules
    print(type(error).__name__, error.name, error)
"""
    no_site_packages = "-S"
    assert python(code, no_site_packages) == "ModuleNotFoundError kernels No module named 'kernels'"


@pytest.mark.parametrize("cwd", [ROOT, Path("/")])
def test_both_kernels_side_by_side(tmp_path: Path, cwd: Path):
    (tmp_path / "kernels.py").write_text("value = 'installed'\n")
    code = """
import kernels, meddiff.kernels
from meddiff.kernels.vq_nearest import vq_nearest
print(kernels.value, meddiff.kernels.__name__, vq_nearest.__module__)
"""
    assert python(code, cwd=cwd, PYTHONPATH=str(tmp_path)) == "installed meddiff.kernels meddiff.kernels.vq_nearest"


def test_nothing_is_installed_under_the_top_level_name_kernels():
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    assert str(ROOT) not in python(code, cwd=Path("/"))


def test_import_is_quiet_and_light():
    code = """
import sys, torch
before = set(sys.modules)
import meddiff.kernels
added = {name.partition(".")[0] for name in set(sys.modules) - before}
assert added <= {"meddiff"}, added
assert not torch.cuda.is_initialized()
assert torch.ops.meddiff.vq_nearest.default
"""
    assert python(code) == ""


def test_missing_library_says_what_to_do(tmp_path: Path):
    (tmp_path / "meddiff").mkdir()
    (tmp_path / "meddiff" / "__init__.py").touch()
    shutil.copytree(ROOT / "kernels", tmp_path / "meddiff" / "kernels")
    code = """
try:
    import meddiff.kernels
except ImportError as error:
    print(error)
"""
    message = python(code, PYTHONPATH=str(tmp_path), cwd=tmp_path)
    assert f"{tmp_path / 'meddiff' / '_cpu.so'} (no such file)" in message and "pip install -e ." in message


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("readelf"), reason="needs readelf")
def test_library_depends_on_torch_but_not_on_python():
    dynamic = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if name.startswith(("libpython", "libtorch_python", "libc10"))]
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    symbols = subprocess.run(
        ["readelf", "--dyn-syms", "-W", LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    undefined = [line.split()[-1].partition("@")[0] for line in symbols.splitlines() if " UND " in line]
    assert "torch_library_impl" in undefined
    assert not [name for name in undefined if name.startswith(("Py", "_Py"))]
    unstable = [
        name for name in undefined if name.startswith(("_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch"))
    ]
    assert not unstable


@pytest.mark.parametrize("hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"])
def test_torch_is_a_build_requirement_only_where_there_is_none(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, hook: str
):
    monkeypatch.setattr(backend.build_meta, hook, lambda config_settings: ["setuptools-asks-for-this"])
    monkeypatch.setattr(backend, "find_torch", lambda: backend.Torch(Path("torch"), "2.11.0+cu128", "12.8"))
    assert getattr(backend, hook)() == ["setuptools-asks-for-this"]
    monkeypatch.setattr(backend, "find_torch", lambda: None)
    assert getattr(backend, hook)() == ["setuptools-asks-for-this", "torch>=2.11"]
    monkeypatch.setattr(backend, "find_torch", lambda: backend.Torch(Path("torch"), "2.9.1", None))
    with pytest.raises(RuntimeError, match="torch>=2.11 is needed and 2.9.1 is installed in torch; upgrade torch"):
        getattr(backend, hook)()


def test_torch_is_found_behind_build_isolation(backend: ModuleType, monkeypatch: pytest.MonkeyPatch):
    here = backend.Torch(Path(torch.__file__).parent, torch.__version__, torch.version.cuda)
    assert backend.find_torch() == here
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert backend.find_torch() == here


@pytest.mark.parametrize(
    ("text", "version", "cuda"),
    [
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n", "2.13.0+cpu", None),
        ("__version__ = '2.11.0+cu128'\ndebug = False\ncuda: Optional[str] = '12.8'\n", "2.11.0+cu128", "12.8"),
        ("__version__ = '2.14.0.dev20260901'\ncuda = '13.0'\n", "2.14.0.dev20260901", "13.0"),
        (
            "__version__ = '2.12.0+rocm7'\ncuda: Optional[str] = None\nhip: Optional[str] = '7.0'\n",
            "2.12.0+rocm7",
            None,
        ),
    ],
)
def test_torch_is_read_without_importing_it(
    backend: ModuleType, tmp_path: Path, text: str, version: str, cuda: str | None
):
    assert backend.read_torch(tmp_path) is None
    (tmp_path / "version.py").write_text("from typing import Optional\n\n__all__ = ['__version__', 'cuda']\n" + text)
    assert backend.read_torch(tmp_path) == backend.Torch(tmp_path, version, cuda)


@pytest.mark.parametrize(
    ("asked", "cuda", "nvcc", "wanted"),
    [
        ("", None, None, False),
        ("", None, "/bin/nvcc", False),
        ("", "13.0", "/bin/nvcc", True),
        ("", "13.0", None, False),
        ("0", "13.0", "/bin/nvcc", False),
        ("1", None, "/bin/nvcc", True),
    ],
)
def test_when_the_cuda_library_is_built(
    backend: ModuleType, capsys: pytest.CaptureFixture, asked: str, cuda: str | None, nvcc: str | None, wanted: bool
):
    assert backend.cuda_wanted(asked, backend.Torch(Path("torch"), "2.13.0", cuda), nvcc) is wanted
    note = capsys.readouterr().err
    assert ("nvcc was not found: building the CPU library only" in note) == (cuda is not None and nvcc is None)


def test_cuda_requests_that_cannot_be_met(backend: ModuleType):
    torch_folder = backend.Torch(Path("torch"), "2.13.0", "13.0")
    with pytest.raises(RuntimeError, match="MEDDIFF_CUDA=1 asks for the CUDA library, but nvcc was not found; install"):
        backend.cuda_wanted("1", torch_folder, None)
    with pytest.raises(RuntimeError, match="MEDDIFF_CUDA must be 0, 1 or unset, got 'yes'"):
        backend.cuda_wanted("yes", torch_folder, None)
    assert not backend.cuda_wanted("", None, "/bin/nvcc")
