from __future__ import annotations

import meddiff.progress
from meddiff.progress import counted, progress


def test_quiet_when_not_a_terminal(capfd):
    assert list(progress("walking")(range(3))) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_what_is_counted(monkeypatch):
    bars = []

    def record(*arguments, **options):
        bars.append(meddiff.progress.tqdm(*arguments, **options | {"disable": False, "file": open("/dev/null", "w")}))
        return bars[-1]

    monkeypatch.setattr(meddiff.progress, "_bar", record)
    with counted(10.0, "decoding") as advance:
        for part in (2.5, 7.5):
            advance(part)
    assert bars[-1].n == bars[-1].total == 10
