"""`weight_diff.json`: what a diff or a recovered model consists of, and the checks against it, a few threads at a time.

The manifest is written last. It names every file with its size, and every tensor with type, shape and sha256; in a
diff also the base's and the tuned tensor's. It finds damage and mistakes; it is no signature of who made it.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from alpaca.common import ExitCode, ExpectedError, atomic_write
from alpaca.weights.files import (
    DTYPE_BYTES,
    Checkpoint,
    ShardWriter,
    bad_data,
    check_archive,
    file_inside,
    read_json,
    sha256_of_file,
)

MANIFEST = "weight_diff.json"
FORMAT_VERSION = 1
CHUNK = 2**17  # elements a thread holds of each tensor; larger arrays cost twice the processor time in page faults
THREADS = min(8, (os.cpu_count() or 1) + 1)  # one more than cores: some thread always waits for the disk


def mismatch(message: str) -> ExpectedError:
    return ExpectedError(message, ExitCode.INTEGRITY)


def say(message: str) -> None:
    """Notes go to standard error: standard output is for results."""
    print(message, file=sys.stderr, flush=True)


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
        """(0, CHUNK), (CHUNK, 2 CHUNK), … up to `elements` of `word` bytes; moves the progress bar."""
        for start in range(0, elements, CHUNK):
            if self._stop:
                return
            stop = min(start + CHUNK, elements)
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


def tensor_hashes(work: Work, title: str, wanted: list[tuple[Checkpoint, str]]) -> list[str]:
    """sha256 of each (checkpoint, tensor name)."""
    found: dict[int, str] = {}

    def job(number: int, checkpoint: Checkpoint, name: str) -> None:
        tensor, digest = checkpoint.tensors[name], hashlib.sha256()
        for start, stop in work.pieces(tensor.elements, DTYPE_BYTES[tensor.dtype]):
            work.hash(digest, checkpoint.read(name, start, stop))
        found[number] = digest.hexdigest()

    jobs = [functools.partial(job, number, *pair) for number, pair in enumerate(wanted)]
    work.run(title, jobs, sum(checkpoint.tensors[name].bytes for checkpoint, name in wanted))
    return [found[number] for number in range(len(wanted))]


def check_hashes(work: Work, title: str, wanted: list[tuple[Checkpoint, str, str, str]]) -> None:
    """wanted: (checkpoint, tensor name, sha256, what a difference means). Raises (integrity), naming all."""
    hashes = tensor_hashes(work, title, [entry[:2] for entry in wanted])
    wrong: dict[str, list[str]] = {}
    for (checkpoint, name, expected, meaning), actual in zip(wanted, hashes, strict=True):
        if actual != expected:
            wrong.setdefault(f"{meaning}: {checkpoint.tensors[name].file} has other contents in", []).append(name)
    if wrong:
        raise mismatch("; ".join(f"{place} {', '.join(names)}" for place, names in wrong.items()))


def check_archives(work: Work, checkpoints: list[Checkpoint]) -> None:
    """`.bin` files carry a CRC-32 for each record, so damage shows with or without a manifest."""
    paths = [path for checkpoint in checkpoints for path in checkpoint.archives]
    jobs = [functools.partial(check_archive, path, work.advance) for path in paths]
    if jobs:
        work.run("checksums of .bin files", jobs, sum(path.stat().st_size for path in paths))


def _render(body: dict[str, Any]) -> str:
    """Canonical text that carries its own sha256: a flip of any bit of the file shows."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "manifest_sha256": digest}, indent=1, sort_keys=True) + "\n"


def write_manifest(directory: Path, kind: str, encoding: str, tensors: dict[str, Any], writer: ShardWriter) -> None:
    """Describe all files of `directory`, and `tensors`. `kind`: "diff" or "model"."""
    described: dict[str, Any] = {}
    for name in sorted(os.listdir(directory)):
        described[name] = {"bytes": (directory / name).stat().st_size}
        if name in writer.headers:  # the rest of a shard is covered by the sums of its tensors
            described[name]["header_sha256"] = hashlib.sha256(writer.headers[name]).hexdigest()
        else:
            described[name]["sha256"] = sha256_of_file(directory / name)
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    if "torch" in sys.modules:
        versions["torch"] = sys.modules["torch"].__version__
    body = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "encoding": encoding,
        "written_by": {"tool": "weight_diff.py", **versions},
        "tensors": tensors,
        "files": described,
    }
    with atomic_write(directory / MANIFEST) as file:
        file.write(_render(body))


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a directory, unchanged since it was written; None where there is none."""
    path = directory / MANIFEST
    if not os.path.lexists(path):
        return None
    body = read_json(directory, MANIFEST)
    version = body.get("format_version")
    if version != FORMAT_VERSION:
        raise bad_data(f"{path}: format version {version!r}, {FORMAT_VERSION} expected; damaged, or use a newer script")
    body.pop("manifest_sha256", None)
    if _render(body).encode() != path.read_bytes():
        raise mismatch(f"{path}: changed or damaged since it was written; get a clean copy")
    return body


@contextlib.contextmanager
def well_formed(directory: Path) -> Iterator[None]:
    """What goes wrong while a manifest's fields are used is the manifest's fault: exit 3, not a traceback."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise bad_data(f"{directory / MANIFEST}: not of the form this script writes ({error!r}); get a clean copy")


def check_against_manifest(checkpoint: Checkpoint, manifest: dict[str, Any]) -> None:
    """Everything but the contents of tensors: files, sizes, headers, names, types and shapes."""
    directory = checkpoint.directory
    for name, entry in manifest["files"].items():
        path = file_inside(directory, name)
        if path.stat().st_size != entry["bytes"]:
            raise mismatch(f"{path}: {path.stat().st_size} bytes, {entry['bytes']} by {MANIFEST}; get a clean copy")
        if name in checkpoint.headers:
            sound = hashlib.sha256(checkpoint.headers[name]).hexdigest() == entry["header_sha256"]
        else:
            sound = sha256_of_file(path) == entry["sha256"]
        if not sound:
            raise mismatch(f"{path}: changed or damaged since {MANIFEST} was written; get a clean copy")
    found = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in checkpoint.tensors.items()}
    expected = {name: (entry["dtype"], entry["shape"]) for name, entry in manifest["tensors"].items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise mismatch(f"{directory}: not the tensors that {MANIFEST} describes: {'; '.join(wrong)}; get a clean copy")
