"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to; it takes the place of `path` only when all went well.

    On an error (a full disk, an interrupt) the file that was there stays as it was. A link stays a
    link, and a file keeps the mode it had. What writes that were killed have left behind is
    removed.
    """
    target = _target(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f"{_prefix(target)}{os.getpid()}.")
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        draft.chmod(_mode(target))
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises OSError if no file could be written there; to be called before long work."""
    target = _target(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise type(error)(f"cannot write '{path}' ({error.strerror or error})") from None


def _target(path: str | os.PathLike[str]) -> Path:
    """What is replaced: the file behind a link. Raises OSError for a folder or a device."""
    target = Path(os.path.realpath(path)) if Path(path).is_symlink() else Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"'{path}' is a folder; name a file in it")
    if target.exists() and not target.is_file():
        raise OSError(f"'{path}' is no regular file")
    return target


def _mode(target: Path) -> int:
    """That of the file which is replaced; of a new one, what the umask leaves."""
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _prefix(target: Path) -> str:
    return f".{target.name}.{socket.gethostname()[:16]}-"


def _remove_leftovers(target: Path) -> None:
    """Drafts of the same file whose processes, on this machine, are gone."""
    if os.name != "posix":
        return
    prefix = _prefix(target)
    for draft in target.parent.iterdir():
        pid = draft.name.removeprefix(prefix).partition(".")[0]
        if draft.name.startswith(prefix) and pid.isdigit() and not _runs(int(pid)):
            draft.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True
