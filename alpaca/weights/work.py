"""Tensors streamed in pieces by a few threads, with a progress bar in bytes; sha256 sums computed that way."""

import functools
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from alpaca.weights.casts import cast
from alpaca.weights.files import DTYPE_BYTES, Checkpoint, check_archive, first_three, mismatch

PIECE = 2**16  # elements a thread holds of each tensor; larger arrays cost twice the processor time in page faults
THREADS = min(8, (os.cpu_count() or 1) + 1)  # one more than cores: some thread always waits for the disk


def say(message: str) -> None:
    """Notes go to standard error: standard output is for results."""
    print(message, file=sys.stderr, flush=True)


def pieces_of(elements: int) -> Iterator[tuple[int, int]]:
    """(0, PIECE), (PIECE, 2 PIECE), … up to `elements`."""
    for start in range(0, elements, PIECE):
        yield start, min(start + PIECE, elements)


class Work:
    """Runs a job a tensor on a few threads (numpy, hashlib and file reads free Python's lock), with progress in bytes.

    Counts the seconds that go into sha256, over all threads.
    """

    def __init__(self):
        self._started = time.perf_counter()
        self._busy_seconds = self._hash_seconds = 0.0
        self._lock = threading.Lock()

    def run(self, title: str, jobs: list[Callable[[], None]], total_bytes: int, threads: int = THREADS) -> None:
        """The first exception of a job (in their order) ends them all and is raised."""
        from tqdm import tqdm

        pool = ThreadPoolExecutor(threads)
        self._stop = False
        self._bar = tqdm(total=total_bytes, desc=title, unit="B", unit_scale=True, disable=None)
        try:
            for future in [pool.submit(self._timed, job) for job in jobs]:
                future.result()
        except BaseException:
            self._stop = True  # jobs under way end at their next piece
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self._bar.close()

    def _timed(self, job: Callable[[], None]) -> None:
        started = time.perf_counter()
        job()
        with self._lock:
            self._busy_seconds += time.perf_counter() - started

    def advance(self, count: int) -> None:
        with self._lock:
            self._bar.update(count)

    def pieces(self, elements: int, word: int) -> Iterator[tuple[int, int]]:
        """`pieces_of` elements of `word` bytes; moves the progress bar."""
        for start, stop in pieces_of(elements):
            if self._stop:
                return
            yield start, stop
            self.advance((stop - start) * word)

    def hash(self, digest: Any, words: np.ndarray) -> None:
        started = time.perf_counter()
        digest.update(memoryview(words).cast("B"))
        with self._lock:
            self._hash_seconds += time.perf_counter() - started

    def summary(self, output_bytes: int) -> str:
        seconds = time.perf_counter() - self._started
        share = self._hash_seconds / max(self._busy_seconds, 1e-9)
        return f"{output_bytes / 1e9:.2f} GB in {seconds:.1f} s; sha256 took {share:.0%} of the threads' time"


def tensor_hashes(work: Work, title: str, wanted: list[tuple[Checkpoint, str, str | None]]) -> list[str]:
    """sha256 of each (checkpoint, tensor name, type to cast it to first or None)."""
    found: dict[int, str] = {}

    def job(number: int, checkpoint: Checkpoint, name: str, dtype: str | None) -> None:
        tensor, digest = checkpoint.tensors[name], hashlib.sha256()
        for start, stop in work.pieces(tensor.elements, DTYPE_BYTES[tensor.dtype]):
            work.hash(digest, cast(checkpoint.read(name, start, stop), tensor.dtype, dtype or tensor.dtype))
        found[number] = digest.hexdigest()

    jobs = [functools.partial(job, number, *entry) for number, entry in enumerate(wanted)]
    work.run(title, jobs, sum(checkpoint.tensors[name].bytes for checkpoint, name, _ in wanted))
    return [found[number] for number in range(len(wanted))]


class Sum(NamedTuple):
    """What a manifest promises of a tensor's contents, and what it means if they are others."""

    checkpoint: Checkpoint
    name: str
    sha256: str
    meaning: str
    dtype: str | None = None  # the promise is of the contents cast to this type


def check_hashes(work: Work, title: str, sums: list[Sum]) -> None:
    """Raises (integrity) with the number of tensors that differ and the first three."""
    hashes = tensor_hashes(work, title, [(entry.checkpoint, entry.name, entry.dtype) for entry in sums])
    wrong: dict[str, list[str]] = {}
    for entry, actual in zip(sums, hashes, strict=True):
        if actual != entry.sha256:
            tensor = entry.checkpoint.tensors[entry.name]
            wrong.setdefault(entry.meaning, []).append(f"{entry.name} in {tensor.file}")
    if wrong:
        count = {meaning: sum(entry.meaning == meaning for entry in sums) for meaning in wrong}
        lines = [
            f"{key}: other contents in {len(w)} of {count[key]} tensors: {first_three(w)}" for key, w in wrong.items()
        ]
        raise mismatch("; ".join(lines))


def check_archives(work: Work, checkpoints: list[Checkpoint]) -> None:
    """`.bin` files carry a CRC-32 for each record, so damage shows with or without a manifest."""
    paths = [path for checkpoint in checkpoints for path in checkpoint.archives]
    jobs = [functools.partial(check_archive, path, work.advance) for path in paths]
    if jobs:
        work.run("checksums of .bin files", jobs, sum(path.stat().st_size for path in paths))
