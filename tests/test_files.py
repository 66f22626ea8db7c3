from __future__ import annotations

import errno
import json
import os

import pytest

from meddiff.files import atomic_write, write_json


def test_atomic_write_replaces_at_the_end_and_only_then(tmp_path):
    path = tmp_path / "a.tar.gz"
    path.write_text("old")
    path.chmod(0o640)
    with atomic_write(path) as temporary:
        assert temporary.parent == tmp_path and temporary.name.endswith(".tar.gz")
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="was not written"), atomic_write(tmp_path / "none" / "a.txt"):
        pass
    with atomic_write(tmp_path / "plain") as temporary:
        pass
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "plain").stat().st_mode & 0o777 == 0o666 & ~mask


def test_atomic_write_allows_folders_that_cannot_be_synchronised(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor, code=errno.EINVAL):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "a.json", 1)
    assert json.loads((tmp_path / "a.json").read_text()) == 1
    monkeypatch.setattr(os, "fsync", lambda descriptor: fsync(descriptor, errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        write_json(tmp_path / "a.json", 2)


def test_write_json(tmp_path):
    path = tmp_path / "a.json"
    value = {"seconds": 1.5, "name": "Müller", "sizes": [1, 2]}
    write_json(path, value)
    assert json.loads(path.read_text(encoding="utf-8")) == value and path.read_text(encoding="utf-8").endswith("}\n")
    with pytest.raises(ValueError, match=r"write_json: .*a\.json"):
        write_json(path, float("nan"))
    with pytest.raises(TypeError, match=r"write_json: .*a\.json"):
        write_json(path, {"x": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == value and list(tmp_path.iterdir()) == [path]


def test_permissions_are_the_usual_ones_whoever_writes(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    with atomic_write(tmp_path / "written") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    assert (tmp_path / "written").stat().st_mode == plain.stat().st_mode
