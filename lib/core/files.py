"""Files that are whole or not there, and locks."""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

_PART = ".part"  # ends the name of a file that is being written


class Lock:
    """A file that one process at a time holds; it stays behind. In a process all locks of a file are one."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = FileLock(path, timeout=0, is_singleton=True, thread_local=False, on_acquired=_sign)

    def take(self) -> str:
        """Hold the file until `release` or the end of the process; returns "", or who holds it."""
        try:
            if not self._lock.is_locked:
                self._lock.acquire()
        except Timeout:
            process = self.path.read_text()
            return f"process {process}" if process else "another process"
        return ""

    def release(self) -> None:
        """Let go of the file."""
        self._lock.release(force=True)


def _sign(handle: int) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, str(os.getpid()).encode(), 0)


def why_not_writable(folder: Path) -> str:
    """Make a folder, and try to write into it; returns "", or what is wrong."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{folder} can not be written to ({error.strerror or error})"


def write_whole(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Write a file in one step: whoever looks sees the old one, the new one, or none.

    Raises:
        FileExistsError: there is one, and `replace` is off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        if not replace:
            os.link(temporary, path)  # unlike a rename, fails when the name was taken meanwhile
        else:
            os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def remove_parts(folder: Path, age: float = 0) -> None:
    """Remove what killed processes left half written, at least `age` seconds ago."""
    for part in folder.glob(f".*{_PART}"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime >= age:
                part.unlink()


def npz_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
