from __future__ import annotations

import subprocess
import sys

import pytest

import meddiff


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_prints_nothing_and_starts_nothing():
    code = (
        "import sys, meddiff; heavy = {'torch', 'triton', 'nibabel', 'numpy'}; print(sorted(heavy & set(sys.modules)))"
    )
    assert run(code) == "[]\n"


def test_the_model_is_there_without_touching_a_gpu():
    assert run("import torch, meddiff; meddiff.MedDiffusion; print(torch.cuda.is_initialized())") == "False\n"


def test_generating_imports_no_compiler():
    """torch._dynamo and sympy take a second, which is more than a small volume takes."""
    generate = "meddiff.from_pretrained('demo', device='cpu').generate('mr_t1_brain', size=(64, 64, 64), steps=1)"
    code = f"import sys, meddiff; {generate}; print(sorted({{'torch._dynamo', 'sympy'}} & set(sys.modules)))"
    assert run(code) == "[]\n"


def test_names_are_found_on_first_use():
    assert set(meddiff.__all__) <= set(dir(meddiff))
    for name in meddiff.__all__:
        assert getattr(meddiff, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = meddiff.nothing
