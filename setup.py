"""Compiles csrc with ninja into meddiff/_cpu.so and, where CUDA is wanted, meddiff/_cuda.so.

MEDDIFF_CUDA=1 asks for the latter, 0 forbids it; otherwise it is built if torch is a CUDA build and nvcc is found. CXX
names the C++ compiler, CUDA_HOME the CUDA toolkit."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from ninja.ninja_syntax import Writer
from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, "csrc")
from build_backend import OLDEST_TORCH, cuda_wanted, find_torch  # noqa: E402

TORCH = find_torch()
NVCC = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '')}/bin:{os.environ['PATH']}:/usr/local/cuda/bin")
# PTX (compute_…) is for the GPUs between and after these
GPUS = {"80": "sm_80,compute_80", "90a": "sm_90a", "100a": "sm_100a", "120": "sm_120,compute_120"}
GENCODE = {f"sm{gpu}": f"-gencode 'arch=compute_{gpu},code=[{code}]'" for gpu, code in GPUS.items()}
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512"
ISA_FLAGS = {  # of csrc/*_<isa>.cpp
    "avx2": "-mavx2 -mfma",
    "avx512": AVX512,
    "amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
}
FILE_FLAGS = ISA_FLAGS | GENCODE  # csrc/*_<gpu>.cu is compiled for that alone
CPU_SOURCES = sorted(set(glob("csrc/*.cpp")) - set(glob("csrc/*_cuda.cpp")))
if os.uname().machine != "x86_64":
    CPU_SOURCES = [source for source in CPU_SOURCES if Path(source).stem.rpartition("_")[2] not in ISA_FLAGS]
DEPENDS = ["csrc/build_backend.py", *sorted(glob("csrc/*.h"))]
BUILD = Path("build", "ninja")


def toolchain(library: str) -> tuple[str, str, str, str]:
    """Compiler, flags for compiling, those that FILE_FLAGS replace, and flags for linking of _cpu or _cuda."""
    # float64 distances must not depend on whether the processor has fused operations: no contraction
    if library == "_cpu":
        link_flags = "-Wl,--no-as-needed -ltorch_cpu" if sys.platform == "linux" else "-ltorch_cpu"
        return os.environ.get("CXX", "c++"), "-fPIC -fvisibility=hidden -ffp-contract=off", "", link_flags
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    flags = "--threads 4 -fmad=false -DUSE_CUDA -Xcompiler -fPIC,-fvisibility=hidden"
    gencode = " ".join(GENCODE[f"sm{gpu}"] for gpu in GPUS if f"sm_{gpu.rstrip('a')}" in known)
    # libtorch leads to libtorch_cuda where torch is a CUDA build
    return shlex.quote(NVCC), flags, gencode, "-Xlinker --no-as-needed -ltorch_cpu -ltorch"


def write_ninja(libraries: dict[str, list[str]]) -> None:
    """Writes BUILD/build.ninja; `libraries` maps each shared library to its sources."""
    include, lib = (shlex.quote(str(TORCH.folder / name)) for name in ("include", "lib"))
    target = f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"
    common = f"-O3 -std=c++17 {target} -isystem {include} -MD -MF $out.d -c $in -o $out"
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "build.ninja").open("w") as file:
        ninja = Writer(file, width=1000)
        ninja.variable("builddir", str(BUILD))
        for library, sources in libraries.items():
            compiler, compile_flags, file_flags, link_flags = toolchain(library)
            ninja.rule(library, f"{compiler} {compile_flags} $flags {common}", "$in", "$out.d", deps="gcc")
            ninja.rule(f"{library}_link", f"{compiler} -shared $in -o $out -L{lib} {link_flags}", "$out")
            objects = {f"{BUILD}/{library}/{Path(source).name}.o": source for source in sources}
            for output, source in objects.items():
                flags = FILE_FLAGS.get(Path(source).stem.rpartition("_")[2], file_flags)
                ninja.build(output, library, source, variables={"flags": flags})
            ninja.build(f"{BUILD}/{library}.so", f"{library}_link", list(objects))


class NinjaBuild(build_ext):
    def build_extensions(self) -> None:
        write_ninja({ext.name.partition(".")[2]: ext.sources for ext in self.extensions})
        subprocess.run([sys.executable, "-m", "ninja", "-f", str(BUILD / "build.ninja")], check=True)
        if self.editable_mode:
            Path("meddiff/_cuda.so").unlink(missing_ok=True)  # stale if this build has none
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(BUILD / target.name, target)

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # the libraries know nothing of Python


libraries = [Extension("meddiff._cpu", CPU_SOURCES, depends=DEPENDS)]
if cuda_wanted(os.environ.get("MEDDIFF_CUDA", ""), TORCH, NVCC):
    libraries.append(Extension("meddiff._cuda", sorted(glob("csrc/*_cuda.cpp") + glob("csrc/*.cu")), depends=DEPENDS))
setup(
    packages=[*find_packages(include=["meddiff", "meddiff.*"]), "meddiff.kernels"],
    package_dir={"meddiff.kernels": "kernels"},
    ext_modules=libraries,
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": PlatformWheel},
)
