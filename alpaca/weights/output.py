"""Checkpoint directories written: safetensors shards filled from many threads, in a directory that appears whole."""

import contextlib
import errno
import fcntl
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from alpaca.common import ExitCode, ExpectedError, jdump, keep_inputs, sync_directory
from alpaca.weights.files import CARRIED_FILES, DTYPE_BYTES, WEIGHT_FILES

SMALL_FILES_BYTES = 16 * 2**20  # config, tokenizer, manifest
STRETCH = 16 * 2**20  # bytes of a file that are sent to the disk together


def shard_bytes(text: Any) -> int:
    """ "5GB" → 5,000,000,000; "200MiB" → 209,715,200."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)(i?)B?", str(text), re.IGNORECASE)
    if not match or int(match[1]) == 0:
        raise ExpectedError(f"--max_shard_size {text}: a size such as 5GB or 500MiB expected", ExitCode.USAGE)
    return int(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")


def natural_order(name: str) -> tuple[str, str]:
    """Sorts layers.2 before layers.10."""
    return re.sub(r"\d+", lambda number: number[0].zfill(8), name), name


class ShardWriter:
    """Safetensors shards whose layout depends on names, types and shapes only, filled from many threads.

    Wide types come first, so that every tensor is aligned; within a type, layers are in natural order.
    """

    def __init__(self, tensors: dict[str, tuple[str, tuple[int, ...]]], max_shard_bytes: int):
        """tensors: name → (dtype, shape)."""
        sizes = {name: DTYPE_BYTES[dtype] * math.prod(shape) for name, (dtype, shape) in tensors.items()}
        shards: list[list[str]] = [[]]
        filled = 0  # bytes of the last shard
        for name in sorted(tensors, key=lambda name: (-DTYPE_BYTES[tensors[name][0]], natural_order(name))):
            if shards[-1] and filled + sizes[name] > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += sizes[name]
        self.headers: dict[str, bytes] = {}
        self.file_sizes: dict[str, int] = {}
        self._places: dict[str, tuple[str, int]] = {}  # tensor → file, offset in it
        for number, names in enumerate(shards, 1):
            single = len(shards) == 1
            file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            ends = list(itertools.accumulate(map(sizes.get, names), initial=0))
            entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            for name, begin, end in zip(names, ends, ends[1:], strict=False):
                entries[name] = {"dtype": tensors[name][0], "shape": tensors[name][1], "data_offsets": [begin, end]}
            text = json.dumps(entries, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            self.headers[file] = len(text).to_bytes(8, "little") + text
            self.file_sizes[file] = len(self.headers[file]) + ends[-1]
            for name, begin in zip(names, ends, strict=False):
                self._places[name] = file, len(self.headers[file]) + begin
        self.index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: self._places[name][0] for name in sorted(tensors, key=natural_order)},
        }
        self._handles: dict[str, int] = {}

    @contextlib.contextmanager
    def open(self, directory: Path) -> Iterator[None]:
        """Create the files at full length (sparse) with their headers; when the block ends, they are on the disk."""
        try:
            for file, header in self.headers.items():
                self._handles[file] = os.open(directory / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                os.ftruncate(self._handles[file], self.file_sizes[file])
                self._write(file, memoryview(header), 0)
            if len(self.headers) > 1:
                jdump(self.index, directory / "model.safetensors.index.json", indent=1)
            yield
            for handle in self._handles.values():
                os.fsync(handle)
        finally:
            while self._handles:
                os.close(self._handles.popitem()[1])

    def write(self, name: str, start: int, words: np.ndarray) -> None:
        """Put words at element `start` of a tensor; may be called from many threads."""
        file, offset = self._places[name]
        begin = offset + start * words.itemsize
        self._write(file, memoryview(words).cast("B"), begin)
        block = (begin + words.nbytes) // STRETCH
        if begin // STRETCH < block and hasattr(os, "posix_fadvise"):
            # The disk starts on what is there, and little is left to wait for at the end.
            os.posix_fadvise(self._handles[file], (block - 1) * STRETCH, STRETCH, os.POSIX_FADV_DONTNEED)

    def _write(self, file: str, data: memoryview, offset: int) -> None:
        while data:
            count = os.pwrite(self._handles[file], data, offset)
            data, offset = data[count:], offset + count

    @property
    def total_bytes(self) -> int:
        return sum(self.file_sizes.values())


def check_output(path: Any, flag: str, inputs: dict[str, Path], overwrite: bool) -> Path:
    """The real path of a directory that may be written: not an input, and empty unless `overwrite`."""
    keep_inputs({flag: path}, inputs)
    output = Path(str(path)).resolve()
    if not output.exists():
        return output
    if not output.is_dir():
        raise ExpectedError(f"--{flag} {path}: exists and is no directory; choose another path", ExitCode.USAGE)
    found = sorted(os.listdir(output))
    if found and not overwrite:
        problem = "not empty; choose another directory or add --overwrite True"
        raise ExpectedError(f"--{flag} {path}: {problem}", ExitCode.USAGE)
    for name in found:  # the whole directory is replaced: never delete what is not a checkpoint's
        known = CARRIED_FILES.fullmatch(name) or WEIGHT_FILES.fullmatch(name) or name == "weight_diff.json"
        if not known or (output / name).is_dir():
            problem = f"--overwrite True would delete {name}, which is no checkpoint file; move it away"
            raise ExpectedError(f"--{flag} {path}: {problem}", ExitCode.USAGE)
    return output


def undo_replacement(replaced: Path, output: Path) -> None:
    """Killed or failed between two renames: the old directory goes back to its place."""
    if replaced.exists() and not output.exists():
        replaced.rename(output)


@contextlib.contextmanager
def new_directory(output: Path, needed: int) -> Iterator[Path]:
    """A hidden directory beside `output` that becomes `output` when the block ends without an exception.

    Raises (disk), before the block runs, if `needed` bytes and some small files do not fit.

    Killed at any moment, `output` is as before or whole; what is left beside it is removed by the next run.
    One run at a time: a lock that dies with its process (exit 6 for the second).
    """
    staging = output.parent / f".{output.name}.unfinished"
    replaced = output.parent / f".{output.name}.replaced"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir(exist_ok=True)
        lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        problem = f"cannot be written ({error.strerror}); choose another place"
        raise ExpectedError(f"{output.parent}: {problem}", ExitCode.DISK)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(lock), os.stat(staging)):
                raise BlockingIOError  # another run finished between open and lock
        except (BlockingIOError, FileNotFoundError):
            raise ExpectedError(f"{output}: another run is writing it; wait for that run", ExitCode.LOCKED)
        undo_replacement(replaced, output)
        shutil.rmtree(replaced, ignore_errors=True)
        for entry in staging.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        try:
            free = shutil.disk_usage(staging).free
            if needed + SMALL_FILES_BYTES > free:
                problem = f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
                raise ExpectedError(f"{output}: {problem}; free some space or choose another place", ExitCode.DISK)
            yield staging
            sync_directory(staging)
            if output.exists() and os.listdir(output):
                output.rename(replaced)
            staging.rename(output)
            sync_directory(output.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        except BaseException:
            undo_replacement(replaced, output)
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise ExpectedError(f"{output}: {error.strerror}; free some space or choose another place", ExitCode.DISK)
    finally:
        os.close(lock)
