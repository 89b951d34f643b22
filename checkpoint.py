"""Files in, files out: atomic writes, checkpoints that are data and never code, models rebuilt from what a file says."""
import contextlib
import os
from pathlib import Path

import torch


@contextlib.contextmanager
def atomic_write(path):
    """Context that yields a binary file to write; `path` changes only once all of it is on the disk.

    The bytes go to a temporary file in the same folder (made if need be), which is flushed to the disk and renamed
    over `path` when the block ends well. A crash, a full disk or an exception leaves the old `path` as it was.

    Raises:
        OSError: the folder or the file cannot be written.
        ValueError: `path` is there and is no regular file (renaming over a device or a pipe would replace it).
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is there and is not a regular file; choose another place to write to")
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed while it wrote
        if not _is_running(stale.name.split(".")[-2]):
            stale.unlink(missing_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_running(pid):
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
