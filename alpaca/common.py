"""What every room needs: errors and exit codes, and files that appear whole or not at all."""

import contextlib
import enum
import errno
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent  # the scripts, and the files that lie beside them


class ExitCode(enum.IntEnum):
    BUG = 1  # a bug of ours: Python's own traceback and exit code
    USAGE = 2  # wrong usage or configuration
    DATA = 3  # bad data
    API = 4  # the API refuses: key, quota, unknown model
    BUDGET = 5  # retries or budget used up, progress saved
    LOCKED = 6  # output directory in use
    INTEGRITY = 7  # integrity check failed
    DISK = 8  # disk full or unwritable
    PREEMPTED = 75  # checkpoint saved
    INTERRUPTED = 130


class ExpectedError(Exception):
    """A failure that is not a bug. The message says what is wrong, where, and what to do next."""

    def __init__(self, message: str, exit_code: ExitCode):
        super().__init__(message, exit_code)  # both, so that the error can be pickled and sent to other ranks
        self.exit_code = exit_code

    def __str__(self) -> str:
        return self.args[0]


def notice(message: str) -> None:
    """Say on standard error, once for all processes of a job, what the user should know but need not act on."""
    if os.environ.get("RANK", "0") == "0":
        print(f"notice: {message}", file=sys.stderr, flush=True)


def disk_problem(error: BaseException | None) -> str | None:
    """What the system said when a disk was full or unwritable; None for every other error.

    Libraries written in Rust, and torch's sharded saves, hand the system's error number on as text. torch.save hands
    nothing on: whatever the reason, it ends in this one message.
    """
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if found := re.search(r"(?:\(os error |\[Errno )(\d+)", str(error)):
            number = int(found.group(1))
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            return os.strerror(number)
        if "iostream error" in str(error):
            return "a file can't be written in full"
        error = error.__context__
    return None


def run_main(main: Callable[[], Any]) -> None:
    """Run a script's `main`; an expected failure ends in one `error: …` line on standard error and its exit code.

    Under torchrun only local rank 0 prints, so that one mistake is one line.
    """
    try:
        main()
        return
    except ExpectedError as error:
        message, exit_code = str(error), error.exit_code
    except KeyboardInterrupt:
        message, exit_code = "interrupted", ExitCode.INTERRUPTED
    except OSError as error:
        if not (problem := disk_problem(error)):
            raise
        message = f"{problem}: {error.filename or 'output'}; free some space or choose another directory"
        exit_code = ExitCode.DISK
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(exit_code)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[io.IOBase]:
    """Open a file that replaces `path` only when the block ends without an exception: whole or not at all.

    Written beside `path` (same file system), synced, renamed, and the rename synced.
    """
    path = os.path.realpath(path)
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{os.path.basename(path)}.", suffix=".tmp")
    try:
        with open(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            # mkstemp makes files private; a new file gets the usual mode, a replaced one keeps its own.
            os.fchmod(handle, os.stat(path).st_mode & 0o777 if os.path.exists(path) else 0o666 & ~_umask())
            yield file
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_directory(directory)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_directory(directory: str | os.PathLike) -> None:
    """Make renames and new names in a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def jdump(obj: Any, f: Any, mode: str = "w", indent: int | None = 4, default: Callable = str) -> None:
    """Write `obj` as JSON (a str as it is) to a path, whole or not at all, or to an open file."""
    text = obj if isinstance(obj, str) else json.dumps(obj, indent=indent, default=default)
    if hasattr(f, "write"):
        f.write(text)
    elif mode == "w":
        with atomic_write(f) as file:
            file.write(text)
    else:
        with open(f, mode, encoding="utf-8") as file:
            file.write(text)


def jload(f: Any, mode: str = "r") -> Any:
    """Read JSON from a path or an open file."""
    if hasattr(f, "read"):
        return json.load(f)
    with open(f, mode, encoding=None if "b" in mode else "utf-8") as file:
        return json.load(file)
