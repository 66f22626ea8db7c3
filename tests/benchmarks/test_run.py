"""The sets of benchmarks: complete, with commands that their scripts understand, ended in time."""

from __future__ import annotations

import runpy
import shlex
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_every_benchmark_is_in_a_set(script):
    listed = {shlex.split(command)[0] for commands in script("run").SETS.values() for command in commands}
    assert {path.name for path in BENCHMARKS.glob("bench_*.py")} < listed


def test_the_scripts_know_the_options(script, monkeypatch, capsys):
    for command in sorted({command for commands in script("run").SETS.values() for command in commands}):
        name, *options = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [name, *options, "--help"])  # wrong ones are found before it
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        assert end.value.code == 0, f"{command}: {capsys.readouterr().err}"


def test_limits_and_summary(script, monkeypatch, tmp_path: Path):
    run = script("run")
    folder, summary = tmp_path / "benchmarks", tmp_path / "summary.txt"
    folder.mkdir()
    (folder / "good.py").write_text("")
    (folder / "bad.py").write_text("raise SystemExit(3)")
    slow = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    (folder / "slow.py").write_text(slow)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "SETS", {"gpu": ("slow.py", "good.py", "bad.py")})
    monkeypatch.setattr(sys, "argv", ["run.py", "gpu", "--limit", "6", "--summary", str(summary)])
    begin = time.monotonic()
    assert run.main() == 1 and time.monotonic() - begin < 50
    results = [line.rsplit(",", 1)[0] for line in summary.read_text().splitlines()]
    assert results == ["slow.py: failed: longer than 6 s", "good.py: passed", "bad.py: failed: exit code 3"]
    monkeypatch.setattr(sys, "argv", ["run.py", "gpu", "--within", "4"])
    assert run.main() == 1
