"""The output directory of a run that pays for answers: who works in it, and its log."""

import contextlib
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from alpaca.common import ExitCode, ExpectedError, lock_file
from alpaca.teacher.request_log import Log


@contextlib.contextmanager
def locked(output_dir: str, written: Iterable[str] = ()) -> Iterator[None]:
    """Only one process works in an output directory; the lock goes with the process, however that ends.

    What a killed process may have left of writing the files `written` is removed.
    """
    try:
        os.makedirs(output_dir, exist_ok=True)
        file = open(os.path.join(output_dir, ".lock"), "a+")
    except OSError as error:
        raise ExpectedError(f"{output_dir}: {error.strerror}; choose a writable --output_dir", ExitCode.DISK)
    with file:
        try:
            lock_file(file)
        except BlockingIOError:
            file.seek(0)
            raise ExpectedError(
                f"{output_dir} is in use by {file.read().strip() or 'another process'}; wait for it or choose another",
                ExitCode.LOCKED,
            )
        begun = tuple(f".{name}." for name in written)
        for name in os.listdir(output_dir):
            if name.startswith(begun) and name.endswith(".tmp"):
                os.unlink(os.path.join(output_dir, name))
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}, since {time.ctime()}\n")
        file.flush()
        yield


def open_log(output_dir: str, left_on_disk: Iterable[str] = ()) -> Log:
    try:
        log = Log(os.path.join(output_dir, "requests.jsonl"), left_on_disk)
    except OSError as error:
        raise ExpectedError(f"{error.filename}: {error.strerror}; choose a writable --output_dir", ExitCode.DISK)
    if log.cut_off:
        say(f"requests.jsonl: cut off {log.cut_off} bytes of a last line that was not finished")
    return log


def last_settings(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((record["settings"] for record in reversed(records) if "settings" in record), None)


def say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)
