"""The page of the operators: all of them are on it, what it says of their schemas is true, and its examples run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import meddiff

TEXT = (Path(meddiff.__path__[0]) / "ops.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
SCHEMAS = re.findall(r"Schema: `(meddiff::(\w+).*)`", TEXT)


def test_the_page_has_every_operator():
    assert SECTIONS.keys() == set(meddiff.ops.__all__)
    named = re.findall(r"Schema: `meddiff::(\w+)", TEXT)
    assert set(named) == {name for name in meddiff.ops.__all__ if hasattr(torch.ops.meddiff, name)}


@pytest.mark.parametrize("schema, name", SCHEMAS, ids=[name for _, name in SCHEMAS])
def test_schemas(schema, name):
    assert str(getattr(torch.ops.meddiff, name).default._schema) == schema


@pytest.mark.parametrize("name", SECTIONS)
def test_examples(name):
    (example,) = re.findall(r"```python\n(.*?)```", SECTIONS[name], re.DOTALL)
    assert len(example.splitlines()) <= 5 and f"meddiff.ops.{name}(" in example
    torch.manual_seed(0)
    exec(compile(example, f"ops.md: {name}", "exec"), {"torch": torch, "meddiff": meddiff})
    for line in ("CPU", "ifferentiable|No gradient"):
        assert re.search(line, SECTIONS[name])
