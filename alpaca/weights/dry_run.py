"""What make_diff would write, and how long it would take, without writing: for models larger than one tries twice."""

import functools
import os
import shutil
import time
from pathlib import Path

import numpy as np

from alpaca.weights.arithmetic import Plan, diff_tensor
from alpaca.weights.files import Checkpoint, carried_files
from alpaca.weights.output import SMALL_FILES_BYTES, ShardWriter
from alpaca.weights.work import THREADS, Work

SECONDS = 1.0  # of the job itself, to measure its speed


class TimeIsUp(Exception):
    pass


class Speedometer:
    """Takes the pieces that a ShardWriter would write, counts their bytes, and ends the job when the time is up."""

    def __init__(self):
        self.bytes, self.started = 0, time.perf_counter()

    def write(self, name: str, start: int, words: np.ndarray) -> None:
        self.bytes += words.nbytes
        if time.perf_counter() - self.started > SECONDS:
            raise TimeIsUp


def measured_speed(plans: dict[str, Plan], tuned: Checkpoint, verify: bool) -> float:
    """Bytes of the diff a second: both models read, subtracted, and sha256 taken if `verify`; nothing written."""
    meter = Speedometer()
    largest = sorted(plans, key=lambda name: -plans[name].bytes)
    work = Work()
    jobs = [functools.partial(diff_tensor, work, plans[name], name, tuned, meter, verify) for name in largest]
    try:
        work.run("measuring", jobs, sum(plan.bytes for plan in plans.values()))
    except TimeIsUp:
        pass
    return meter.bytes / max(time.perf_counter() - meter.started, 1e-9)


def in_words(seconds: float) -> str:
    """4000 → "67 min"."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def report(writer: ShardWriter, plans: dict[str, Plan], tuned: Checkpoint, directory: Path, verify: bool) -> None:
    """Print files, sizes, the disk needed and free, and the time expected."""
    index = ["model.safetensors.index.json"] if len(writer.file_sizes) > 1 else []
    for file, size in writer.file_sizes.items():
        print(f"{file:40} {size / 1e9:9.2f} GB")
    small = [*(path.name for path in carried_files(tuned.directory)), *index, "weight_diff.json"]
    print(f"{', '.join(small)}: small")
    whole = sum(plan.raw_name is None for plan in plans.values())
    print(f"{len(plans)} tensors in {len(writer.file_sizes)} files, {whole} of them stored whole")
    place = next(path for path in [directory, *directory.parents] if path.exists())
    needed, free = writer.total_bytes + SMALL_FILES_BYTES, shutil.disk_usage(place).free
    fits = "" if needed <= free else ": it does not fit"
    print(f"disk: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free in {place}{fits}")
    speed = measured_speed(plans, tuned, verify)
    what = "read, subtracted and hashed" if verify else "read and subtracted"
    load = f"{THREADS} threads, load average {os.getloadavg()[0]:.0f}"
    print(
        f"time: about {in_words(writer.total_bytes / speed)}: {speed / 1e6:.0f} MB a second {what}, measured for "
        f"{SECONDS:.0f} s with {load}; longer if the disk reads or writes more slowly than that, as nothing was written"
    )
