"""Share a fine-tuned model as its difference from the base, and recover it: exact, streamed, verified.

    python weight_diff.py make_diff --path_raw BASE --path_tuned TUNED --path_diff DIFF
    python weight_diff.py recover --path_raw BASE --path_diff DIFF --path_tuned TUNED
    python weight_diff.py verify --path DIFF
    python weight_diff.py model_card --path_tuned TUNED

BASE, TUNED and DIFF are directories (inputs may be Hub ids). Tensors flow from disk to disk in small pieces, so memory
does not grow with the model; no model is built. By default the difference is taken between the bits, as integers that
wrap around, so the tuned model comes back bit for bit. `weight_diff.json`, written last, holds a sha256 for each tensor
of base, diff and tuned model. A diff without it (the 2023 release) is read as float32 tuned − raw.
"""

import argparse
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np

from alpaca.common import ExitCode, ExpectedError, jdump, run_commands, run_main
from alpaca.weights import alpaca_7b, dry_run, output
from alpaca.weights.arithmetic import Plan, diff_tensor, recover_tensor
from alpaca.weights.casts import FLOATS
from alpaca.weights.files import (
    Checkpoint,
    bad_data,
    carried_files,
    copy_file,
    files_left_behind,
    local_directory,
    mismatch,
)
from alpaca.weights.manifest import (
    MANIFEST,
    check_against_manifest,
    diff_entry,
    read_manifest,
    well_formed,
    write_manifest,
)
from alpaca.weights.model_card import model_card
from alpaca.weights.plan import (
    ADDED_ROWS,
    ENCODINGS,
    plan_from_bare_diff,
    plan_from_manifest,
    plan_from_models,
    refuse_diff,
)
from alpaca.weights.work import THREADS, Sum, Work, check_archives, check_hashes, say

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # what --dtype takes


def make_diff(
    path_raw: str,
    path_tuned: str,
    path_diff: str,
    device: str = "cpu",
    encoding: str = "exact",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    verify: bool = True,
    plan: bool = False,
) -> None:
    """Write the difference between a tuned model and its base: safetensors shards and weight_diff.json.

    Args:
        path_raw: the base model, a directory or a Hub id.
        path_tuned: the tuned model, a directory or a Hub id.
        path_diff: directory to write; appears when it is complete.
        device: accepted as in 2023, without effect: disks bound the speed.
        encoding: "exact" (comes back bit for bit) or "float32" (the form of 2023: float32 tuned − raw).
        max_shard_size: largest file, as 5GB or 500MiB (a tensor that is larger gets a file of its own).
        overwrite: replace a directory that is not empty.
        verify: False leaves the sha256 sums out: faster, and recover then has nothing to check against.
        plan: print files, sizes, disk needed and time expected, from a second of measured speed, and write nothing.
    """
    if encoding not in ENCODINGS:
        raise ExpectedError(f"--encoding {encoding}: one of {', '.join(ENCODINGS)} expected", ExitCode.USAGE)
    shard_bytes = output.shard_bytes(max_shard_size)
    inputs = {
        "path_raw": local_directory(path_raw, "path_raw"),
        "path_tuned": local_directory(path_tuned, "path_tuned"),
    }
    if inputs["path_raw"].samefile(inputs["path_tuned"]):
        raise ExpectedError(f"--path_raw and --path_tuned are the same: {inputs['path_raw']}", ExitCode.USAGE)
    directory = output.check_output(path_diff, "path_diff", inputs, overwrite)
    work, entries = Work(), {}
    with Checkpoint(inputs["path_raw"]) as raw, Checkpoint(inputs["path_tuned"]) as tuned:
        refuse_diff(raw, "path_raw")
        refuse_diff(tuned, "path_tuned")
        if verify and not plan:
            check_archives(work, [raw, tuned])
        plans = plan_from_models(work, raw, tuned, encoding)

        writer = output.ShardWriter({name: (p.diff_dtype, p.shape) for name, p in plans.items()}, shard_bytes)
        say_what_is_left(tuned)
        if plan:
            return dry_run.report(writer, plans, tuned, directory, verify)

        def subtract(name: str) -> None:
            sums = diff_tensor(work, plans[name], name, tuned, writer, verify)
            entries[name] = diff_entry(plans[name], sums)

        with output.new_directory(directory, writer.total_bytes) as staging:
            for path in carried_files(tuned.directory):
                copy_file(path, staging)
            jobs = [functools.partial(subtract, name) for name in largest_first(plans)]
            with writer.open(staging):
                work.run("difference", jobs, sum(p.bytes for p in plans.values()))
            write_manifest(staging, "diff", encoding, entries, writer)
    if rounded := [p.rounded for p in plans.values() if p.rounded]:
        total = sum(p.elements for p in plans.values())
        say(
            f"note: {sum(rounded):,} of {total:,} elements, in {len(rounded)} of {len(plans)} tensors, "
            "will not come back bit for bit; --encoding exact does that"
        )
    say(f"wrote {directory}: {work.summary(writer.total_bytes)}")


def recover(
    path_raw: str,
    path_diff: str,
    path_tuned: str | None = None,
    device: str = "cpu",
    test_inference: bool = True,
    check_integrity_naively: bool = True,
    dtype: str | None = None,
    added_rows: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    verify: bool = True,
) -> None:
    """Recover a tuned model from its base and a weight diff.

    1. Pair the tensors of base and diff; stop at whatever does not fit.
    2. Add, a tensor at a time, into a hidden directory beside path_tuned.
    3. Compare the sha256 of what is written with the tuned model's in weight_diff.json, where the diff has it. At the
       first tensor that differs, stop, and find out whether base or diff is at fault.
    4. Rename the directory when all tensors are right.

    Args:
        path_raw: the base model, a directory or a Hub id.
        path_diff: the weight diff, a directory or a Hub id.
        path_tuned: directory to write; appears when it is complete and checked.
        device: where the test inference runs ("cpu", "cuda"); the recovery itself needs none.
        test_inference: ask the recovered model one question and print its response (loads the model).
        check_integrity_naively: compare the sum of all weights, as in 2023, if this is that release of Alpaca-7B.
        dtype: float32 (default), bfloat16 or float16, for diffs without weight_diff.json; others give theirs back.
        added_rows: of diffs without weight_diff.json, what the rows are that the base lacks: "mean" (differences from
            its mean row, as in 2023, and the default), "zero" (from rows of zeros: Vicuna v0) or "whole" (no
            differences: the same as zero).
        max_shard_size: largest file, as 5GB or 500MiB (a tensor that is larger gets a file of its own).
        overwrite: replace a directory that is not empty.
        verify: False skips the sha256 sums of step 3.
    """
    if path_tuned is None:
        raise ExpectedError("--path_tuned is needed: the directory for the recovered model", ExitCode.USAGE)
    if dtype is not None and dtype not in DTYPES:
        raise ExpectedError(f"--dtype {dtype}: one of {', '.join(DTYPES)} expected", ExitCode.USAGE)
    if added_rows is not None and added_rows not in ADDED_ROWS:
        raise ExpectedError(f"--added_rows {added_rows}: one of {', '.join(ADDED_ROWS)} expected", ExitCode.USAGE)
    shard_bytes = output.shard_bytes(max_shard_size)
    inputs = {"path_raw": local_directory(path_raw, "path_raw"), "path_diff": local_directory(path_diff, "path_diff")}
    directory = output.check_output(path_tuned, "path_tuned", inputs, overwrite)
    work = Work()
    with Checkpoint(inputs["path_raw"]) as raw, Checkpoint(inputs["path_diff"]) as diff:
        refuse_diff(raw, "path_raw")
        manifest = read_manifest(diff.directory)
        if manifest:
            with well_formed(diff.directory):
                plans, sums = plan_from_manifest(raw, diff, manifest, verify)
                promised = {name: manifest["tensors"][name]["tuned"]["recovered_sha256"] for name in plans}
            if dtype and {DTYPES[dtype]} != {plan.dtype for plan in plans.values()} & FLOATS:
                raise ExpectedError(f"--dtype {dtype}: {MANIFEST} knows the type; leave --dtype out", ExitCode.USAGE)
            if added_rows:
                raise ExpectedError(f"--added_rows: {MANIFEST} knows what they are; leave it out", ExitCode.USAGE)
        else:
            plans = plan_from_bare_diff(work, raw, diff, DTYPES[dtype or "float32"], added_rows)
            sums, promised = [], {}
        release = not manifest and alpaca_7b.is_alpaca_7b(diff, plans)
        if not sums and not release:
            say(f"warning: {diff.directory} has no sha256 sums: there is nothing to check the weights against")
        say_what_is_left(diff)
        check_sum, float32_sums, written = release and check_integrity_naively, {}, {}

        def add(name: str) -> None:
            plan = plans[name]
            unrounded = np.empty(plan.elements, np.float32) if check_sum else None
            written[name] = recover_tensor(work, plan, name, diff, writer, verify, unrounded)
            if verify and promised.get(name) not in (None, written[name]):
                raise mismatch(f"{name}: recovered, but not to the tuned model's bits; nothing is kept, run again")
            if check_sum:
                float32_sums[name] = alpaca_7b.float32_sum(unrounded, plan.shape)

        writer = output.ShardWriter({name: (plan.dtype, plan.shape) for name, plan in plans.items()}, shard_bytes)
        with output.new_directory(directory, writer.total_bytes) as staging:
            if verify and not sums:
                check_archives(work, [raw, diff])
            for path in carried_files(diff.directory):
                if not manifest and path.name == "config.json":
                    write_config(diff.config, dtype or "float32", staging)
                elif not manifest or path.name in manifest["files"]:
                    copy_file(path, staging)
            jobs = [functools.partial(add, name) for name in largest_first(plans)]
            try:
                with writer.open(staging):  # torch's sum wants whole tensors: one at a time
                    work.run("recover", jobs, writer.total_bytes, threads=1 if check_sum else THREADS)
            except ExpectedError as error:
                if error.exit_code == ExitCode.INTEGRITY:
                    find_the_fault(work, raw, diff, sums)
                raise
            if check_sum:
                alpaca_7b.check_sum(raw, diff, float32_sums)
            entries = {n: {"dtype": p.dtype, "shape": p.shape, "sha256": written[n]} for n, p in plans.items()}
            write_manifest(staging, "model", manifest["encoding"] if manifest else "float32", entries, writer)
    say(f"wrote {directory}: {work.summary(writer.total_bytes)}")
    if test_inference:
        ask(directory, device)


def find_the_fault(work: Work, raw: Checkpoint, diff: Checkpoint, sums: list[Sum]) -> None:
    """Raises where base or diff are not what the manifest says: what was recovered from them is not the tuned model."""
    check_hashes(work, "looking for the fault", sums)
    check_archives(work, [raw, diff])


def largest_first(plans: dict[str, Plan]) -> list[str]:
    """Names in the order that leaves no thread alone with a large tensor at the end."""
    return sorted(plans, key=lambda name: -plans[name].bytes)


def say_what_is_left(checkpoint: Checkpoint) -> None:
    if left := files_left_behind(checkpoint):
        say(f"note: not carried over from {checkpoint.directory}: {', '.join(left)}")


def write_config(config: dict[str, Any], dtype: str, directory: Path) -> None:
    """The diff's config with the type of the recovered weights: transformers loads in the type that it names."""
    jdump({**config, "dtype" if "dtype" in config else "torch_dtype": dtype}, directory / "config.json", indent=2)


def ask(directory: Path, device: str) -> None:
    """Print the model's response to one question. If that cannot run (no memory, no such device), it is a note."""
    try:
        size, free = sum(path.stat().st_size for path in directory.glob("*.safetensors")), available_memory()
        if device == "cpu" and size > free:
            raise MemoryError(f"the model has {size / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free")
        from alpaca.answering.model import Sampling, answer, load_model, load_reader  # with torch

        sampling = Sampling(max_new_tokens=100, temperature=0.0, top_p=1.0, seed=0)
        reader = load_reader(str(directory))
        prompt = reader.encode({"instruction": "List three technologies that make life easier."}, 100)
        model = load_model(
            argparse.Namespace(model_name_or_path=str(directory), dtype="auto", device=device), reader.tokenizer
        )
        print(answer(model, reader, [prompt], sampling)[0].strip(), flush=True)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        say(f"note: the model is recovered; the test inference could not run: {reason}")


def available_memory() -> float:
    """Bytes that can be had without swapping, where the system says so."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return math.inf


def verify(path: str) -> None:
    """Compare every file and tensor of a diff, or of a recovered model, with its weight_diff.json.

    Args:
        path: a directory that make_diff or recover wrote, or a Hub id.
    """
    with Checkpoint(local_directory(path, "path")) as checkpoint, well_formed(checkpoint.directory):
        manifest = read_manifest(checkpoint.directory)
        if manifest is None:
            raise bad_data(f"{checkpoint.directory}: no {MANIFEST}, so there is nothing to check against")
        check_against_manifest(checkpoint, manifest)
        sums = {name: entry["sha256"] for name, entry in manifest["tensors"].items()}
        if None in sums.values():
            raise bad_data(f"{checkpoint.directory}: written with --verify False, without sha256 sums to check")
        check_hashes(Work(), "verify", [Sum(checkpoint, name, digest, "damaged") for name, digest in sums.items()])
    say(f"{path}: all {len(sums)} tensors are as they were written")


def main() -> None:
    commands = (make_diff, recover, verify, model_card)
    run_commands({command.__name__: command for command in commands}, name="python weight_diff.py")


if __name__ == "__main__":
    run_main(main)
