"""Files that appear whole or not at all. Imports the standard library only.

A reader never meets half a file, and a failed write costs nothing: the bytes go to a temporary file beside the target,
are synchronised to the disk, and replace the target in one step.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; some network file systems cannot, and say so with the codes let through."""
    if os.name != "posix":
        return
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file all at once: `with atomic_write("a.nii.gz") as temporary: save(temporary)`.

    Yields the path of an empty temporary file in the target's folder, with the target's last two suffixes. When the
    block ends it is synchronised and replaces `path`, keeping the permissions of an existing file. When the block
    raises, the temporary file is removed and `path` stays as it was. A symbolic link is replaced, not followed.

    Raises: the OSError of the failed step with its errno (so FileNotFoundError for a missing folder), naming `path`;
    anything else that the block raises, unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}{''.join(path.suffixes[-2:])}")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        permissions = (path if path.is_file() else temporary).stat().st_mode & 0o777
        yield temporary
        temporary.chmod(permissions)  # whoever wrote may have put a file of its own in the place
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        code = error.errno or errno.EIO
        reason = error.strerror or str(error)
        raise OSError(
            code,
            f"atomic_write: {path} was not written ({reason}); nothing was lost, a file of that name is as it was. "
            "Check the folder, its permissions and the free space, then try again",
        ) from error
    _sync_folder(path.parent)


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` atomically as indented UTF-8 JSON with a final newline.

    Raises TypeError for what JSON cannot hold, ValueError for NaN, infinities and cycles, both naming `path`; OSError
    as `atomic_write` does.
    """
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"write_json: {path}: {error}") from error
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
