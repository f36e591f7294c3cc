"""Output files: names of partial and numbered ones, locks, and checks before a run."""

import errno
import io
import os
import warnings
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Errors of file systems without locks, such as some network shares and those of clusters.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
MOST_FOLDERS = 200  # in an output path
INSTEAD = "give another --out, or wait"  # advice while another run writes


def partial_path(path: Path) -> Path:
    """Return the name of a file until it is finished."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


def unused_path(folder: Path, name: str, suffix: str, counter: int = 1) -> Path:
    """Return the first free NAME_00001_.mp4, counting from `counter`.

    A name is free where neither a finished nor a partial file uses it.
    """
    while True:
        path = folder / f"{name}_{counter:05}_{suffix}"
        if not is_taken(path) and not is_taken(partial_path(path)):
            return path
        counter += 1


def is_taken(path: Path) -> bool:
    """Whether a file, a folder or a link, even a dangling one, has this name.

    Raises OSError for a name that the system does not allow.
    """
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def renames_open_files() -> bool:
    """Whether the system can rename and delete open files; Windows cannot."""
    return fcntl is not None


def lock(file: io.FileIO, path: Path, instead: str) -> None:
    """Lock an open file for this run.

    Raises ValueError, which says what to do `instead`, when another run holds the lock. Warns of a
    file system without locks and goes on. OSError names the path.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is writing {path}: {instead}") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise OSError(error.errno, f"{path} cannot be locked ({error.strerror})") from error
        warnings.warn(
            f"{path.parent} has no file locks: let no other run write {path.name} now", stacklevel=3
        )


def open_locked(path: Path, instead: str) -> io.FileIO:
    """Open a file for writing, locked and not truncated; ValueError while another run writes it."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        try:
            lock(file, path, instead)
            if is_open(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # the run that held the lock has renamed the file in the meantime


def is_open(file: io.FileIO, path: Path) -> bool:
    """Whether an open file is still the file at a path."""
    if not renames_open_files():
        return True
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def open_exclusive(path: Path, instead: str = INSTEAD) -> io.FileIO:
    """Open a file for writing, locked and emptied; ValueError while another run writes it."""
    file = open_locked(path, instead)
    file.truncate(0)
    return file


def check_output(path: Path) -> None:
    """Create the folder of `path`; ValueError unless a file can be written there."""
    if len(path.parts) > MOST_FOLDERS:
        raise ValueError(
            f"output of {len(path.parts)} folders: give a name in at most {MOST_FOLDERS}"
        )
    if path.is_dir():
        raise ValueError(f"output {path} is a folder: give the name of a file")
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output {path} cannot be written ({error.strerror}): give another folder"
        ) from error
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(
            f"output {path} cannot be written (no permission): give another name or folder"
        )
