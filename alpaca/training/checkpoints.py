"""What train.py leaves in its output directory, and how that stays whole whenever the run is killed.

    out/checkpoint-500/…     all that resuming needs, and manifest.json; under FSDP each rank's part in files of its own
    out/config.json, model*.safetensors, tokenizer*, …, manifest.json     the final model
    out/run.json             what the run was (run_record.py)

A manifest names every file of its directory with size and hash. It is written last, when the files are on the disk, so
a directory without one, or one whose files differ from it, is not used. The hashes (xxh3-128, about 10 GB/s a core)
find damage; they are no signature.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm

from alpaca.common import ExitCode, ExpectedError, disk_problem, jdump, notice, sync_directory
from alpaca.training.run_record import RUN, check_identity
from alpaca.weights.files import CARRIED_FILES, WEIGHT_FILES

MANIFEST = "manifest.json"
MERGED = "merged"
STAGED = ".model-being-saved"  # lies in the output directory, so that renaming moves files out of it
OTHER_MODEL_FILES = re.compile(r"training_args\.bin|adapter_.*|weight_diff\.json")
_CONFIGS = ("config.json", "adapter_config.json")  # without which a model, or an adapter, does not load
GIB = 2**30
# The rank in the names of torch's distributed checkpoints, of random states, and of DeepSpeed's shards.
_RANK = re.compile(r"__(\d+)_\d+\.distcp|rng_state_(\d+)\.pth|zero_pp_rank_(\d+)_")
_PIECE = 2**24  # bytes hashed at a time


@contextlib.contextmanager
def writing(directory: str | os.PathLike) -> Iterator[None]:
    """Save into `directory`; when the disk refuses, remove what is there of it and raise ExpectedError (exit 8)."""
    try:
        yield
    except BaseException as error:  # safetensors, tokenizers and torch raise errors of their own, one no Exception
        if not (problem := disk_problem(error)):
            raise
        shutil.rmtree(directory, ignore_errors=True)
        full = ExpectedError(
            f"{problem}: {directory}. What was saved before is whole: free some space, and "
            "--resume_from_checkpoint last goes on from there",
            ExitCode.DISK,
        )
        # The process that speaks for the others need not know of it, unless torch has told them all.
        if os.environ.get("LOCAL_RANK", "0") != "0" and isinstance(error, Exception):
            print(f"error: {full}", file=sys.stderr, flush=True)
        raise full


def write_manifest(directory: str | os.PathLike, files: dict[str, Any] | None = None, **facts: Any) -> None:
    """Declare a directory complete: every file in it is synced, hashed, and named beside `facts` in its manifest.

    `files` are those of `describe_files`, where the ranks have done so already.
    """
    directory = Path(directory)
    files = describe_files(directory) if files is None else files
    for folder in {(directory / name).parent for name in files} | {directory.parent}:
        sync_directory(folder)
    body = {**facts, "saved_at_ns": time.time_ns(), "files": files}
    jdump({**body, "manifest_xxh3_128": _hash_of(body)}, directory / MANIFEST, indent=1)


def describe_files(directory: Path, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Sync and hash the files of a directory that are this rank's, by name: those whose name has its number, and what
    has no rank's is the first one's."""

    def is_own(path: Path) -> bool:
        number = _RANK.search(path.name)
        owner = int(number.group(number.lastindex)) if number else 0
        return path.is_file() and path != directory / MANIFEST and (owner if owner < ranks else 0) == rank

    paths = sorted(path for path in directory.rglob("*") if is_own(path))
    digests = _hash_all(paths, f"manifest of {directory.name}", sync=True)
    return {
        str(path.relative_to(directory)): {"size": path.stat().st_size, "xxh3_128": digest}
        for path, digest in zip(paths, digests, strict=True)
    }


def _hash_all(paths: list[Path], title: str, sync: bool = False) -> list[str]:
    def job(path: Path) -> str:
        digest = xxhash.xxh3_128()
        with open(path, "rb") as file:
            if sync:
                os.fsync(file.fileno())
            while piece := file.read(_PIECE):
                digest.update(piece)
                progress.update(len(piece))
        return digest.hexdigest()

    total = sum(path.stat().st_size for path in paths)
    with (
        tqdm(total=total, desc=title, unit="B", unit_scale=True, leave=False, disable=total < GIB or None) as progress,
        ThreadPoolExecutor(4) as pool,  # reading and hashing free Python's lock
    ):
        return list(pool.map(job, paths))


def _hash_of(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: str | os.PathLike) -> dict[str, Any]:
    """A directory's manifest. Raises ExpectedError (exit 7) when it is missing or not as it was written."""
    try:
        body = json.loads((Path(directory) / MANIFEST).read_bytes())
        if body.pop("manifest_xxh3_128") == _hash_of(body):
            return body
    except FileNotFoundError:
        raise ExpectedError(f"{directory} is incomplete: it has no {MANIFEST}", ExitCode.INTEGRITY)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ExpectedError(f"{directory} is damaged: {MANIFEST} is not as it was written", ExitCode.INTEGRITY)


def verify(directory: str | os.PathLike) -> dict[str, Any]:
    """Read every file of a directory and return its manifest. Raises ExpectedError (exit 7) that names what differs."""
    manifest = read_manifest(directory)
    files = {Path(directory, name): entry for name, entry in manifest["files"].items()}

    def faults() -> Iterator[str]:
        for path, entry in files.items():
            if not path.is_file():
                yield f"{path.name} is missing"
            elif (size := path.stat().st_size) != entry["size"]:
                yield f"{path.name} has {size:,} bytes and not {entry['size']:,}"
        digests = _hash_all(list(files), f"check {Path(directory).name}")
        for (path, entry), digest in zip(files.items(), digests, strict=True):
            if digest != entry["xxh3_128"]:
                yield f"the contents of {path.name} changed"

    if fault := next(faults(), None):  # before anything is hashed, if a size says enough
        raise ExpectedError(f"{directory} is damaged: {fault}", ExitCode.INTEGRITY)
    return manifest


def checkpoints_in(output_dir: str | os.PathLike) -> list[Path]:
    """Every checkpoint-N directory, whole or not, by step."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def remove_checkpoint(directory: Path) -> None:
    """The manifest goes first, so that what a kill leaves of the rest is not taken for a checkpoint."""
    (directory / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def finish_checkpoint(
    directory: Path, limit: int | None, best: str | None, files: dict[str, Any] | None = None, **facts: Any
) -> None:
    """Declare a checkpoint complete, and only then remove what `limit` (--save_total_limit) leaves no room for.

    It and the `best` one stay. Of the others those without a manifest go first, then the oldest.
    """
    write_manifest(directory, files, **facts)
    if not limit or limit < 0:
        return
    keep = {directory} | ({Path(best)} if best else set())
    others = [path for path in checkpoints_in(directory.parent) if path not in keep]
    others.sort(key=lambda path: (path / MANIFEST).stat().st_mtime_ns if (path / MANIFEST).exists() else 0)
    for path in others[: max(0, len(others) + len(keep) - limit)]:
        remove_checkpoint(path)


def find_checkpoint(
    resume: str | bool | None, output_dir: str | os.PathLike, sharding: str, identity: dict[str, Any] | None = None
) -> str | None:
    """The directory that --resume_from_checkpoint means: None for a start from the beginning.

    `resume` is a path, True (the newest one), or "last" (the newest one if there is any). Those that are incomplete or
    damaged are named and skipped. `sharding` is how this run shards ("none", "fsdp", "deepspeed"), which says how a
    checkpoint's optimizer state is laid out, and `identity` what this run trains on what (`identity_of`). Raises
    ExpectedError: exit 7 for a damaged path, 2 for one that this run can't use.
    """
    if resume in (None, False, "False", "false"):
        if present := checkpoints_in(output_dir):
            notice(
                f"starting from the beginning; {output_dir} holds {', '.join(path.name for path in present)}, and "
                "--resume_from_checkpoint last would go on from there"
            )
        return None
    if resume not in (True, "True", "true", "last"):
        if not os.path.isdir(resume):
            raise _wrong_usage(f"--resume_from_checkpoint {resume} is no directory; give a checkpoint, or last")
        try:
            manifest = verify(resume)
        except ExpectedError as error:
            hint = "--resume_from_checkpoint last takes the newest whole one"
            raise ExpectedError(f"{error}; {hint}", ExitCode.INTEGRITY)
        return _usable(Path(resume), manifest, sharding, identity)
    manifests = {}
    for path in checkpoints_in(output_dir):
        try:
            manifests[path] = read_manifest(path)
        except ExpectedError as error:
            notice(f"{error}; skipped")
    for path in sorted(manifests, key=lambda path: manifests[path]["saved_at_ns"], reverse=True):
        try:
            manifest = verify(path)
        except ExpectedError as error:
            notice(f"{error}; skipped")
        else:
            return _usable(path, manifest, sharding, identity)
    if resume != "last":
        what = f"--resume_from_checkpoint {resume}: {output_dir} has no whole checkpoint"
        raise _wrong_usage(f"{what}; last would start from the beginning")
    notice(f"{output_dir} has no whole checkpoint to go on from; starting from the beginning")
    return None


def _wrong_usage(message: str) -> ExpectedError:
    return ExpectedError(message, ExitCode.USAGE)


def _usable(directory: Path, manifest: dict[str, Any], sharding: str, identity: dict[str, Any] | None) -> str:
    flags = {"none": "neither --fsdp nor --deepspeed", "fsdp": "--fsdp", "deepspeed": "--deepspeed"}
    if (saved := manifest.get("sharding")) not in flags:
        raise _wrong_usage(f"{directory} holds a model and no training state; give a checkpoint-N")
    if not manifest["has_optimizer"]:
        why = "and going on without it would be another run"
        raise _wrong_usage(f"{directory} holds no optimizer state (--save_only_model), {why}")
    if saved != sharding:
        what = f"{directory} was saved with {flags[saved]} and this run has {flags[sharding]}"
        launcher = ", started by torchrun also for one process" if "WORLD_SIZE" not in os.environ else ""
        raise _wrong_usage(f"{what}; its optimizer state only loads with the same{launcher if saved != 'none' else ''}")
    if identity:
        check_identity(directory, manifest.get("identity", {}), identity)
    if (before := manifest["processes"]) != (now := int(os.environ.get("WORLD_SIZE", "1"))):
        what = f"{directory} was saved by {before} process{'es' * (before != 1)}"
        if saved == "deepspeed":
            raise _wrong_usage(f"{what}, and DeepSpeed goes on from its shards with as many only, not with {now}")
        notice(
            f"{what} and goes on with {now}: the examples of a step change with nproc_per_node × batch × accumulation, "
            "and random numbers start anew"
        )
    notice(f"going on from {directory}")
    return str(directory)


def stage_model(output_dir: str | os.PathLike) -> str:
    """An empty directory to save a model into, for `publish_model` to put in place."""
    staged = Path(output_dir) / STAGED
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    return str(staged)


def check_own(output_dir: str | os.PathLike) -> None:
    """Raise ExpectedError (exit 2) when the model to be saved would take the place of one of the user's own."""
    output_dir = Path(output_dir)
    if (output_dir / RUN).exists() or (output_dir / MANIFEST).exists():
        return
    for directory in (output_dir, output_dir / MERGED):
        if foreign := sorted(_model_files(directory)):
            raise _wrong_usage(
                f"--output_dir {output_dir}: {directory} holds {', '.join(foreign[:3])}, which no run of train.py "
                "saved there and which this one would replace; choose another directory, or move them away"
            )


def _model_files(directory: Path) -> set[str]:
    names = os.listdir(directory) if directory.is_dir() else ()
    return {name for name in names for kind in (CARRIED_FILES, WEIGHT_FILES, OTHER_MODEL_FILES) if kind.fullmatch(name)}


def remove_model(directory: Path, new: Iterable[str] = ()) -> None:
    """Remove a model, so that nothing loads while a part of it is there, and what is in the way of the `new` names."""
    old = _model_files(directory)
    try:
        old |= {Path(name).parts[0] for name in read_manifest(directory)["files"]}
    except ExpectedError:
        pass  # the old model, if any, was not saved by this script
    for name in sorted({MANIFEST}.union(old, new), key=lambda name: (name != MANIFEST, name not in _CONFIGS, name)):
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def remove_merged(output_dir: str | os.PathLike) -> None:
    """Remove the merged model of an earlier run's adapters, and nothing that others put beside it."""
    merged = Path(output_dir, MERGED)
    if (merged / MANIFEST).exists():
        remove_model(merged)
        with contextlib.suppress(OSError):  # something else is in there
            merged.rmdir()


def publish_model(output_dir: str | os.PathLike) -> None:
    """Put the staged model in the place of the one in the output directory.

    All of the old model is removed before any of the new comes, and config.json (an adapter's adapter_config.json),
    without which nothing loads, leaves first and comes last but for the manifest. A kill leaves the old, the new, or
    something that does not load, with the new one whole in the staging directory.
    """
    output_dir = Path(output_dir)
    staged = output_dir / STAGED
    with writing(staged):
        write_manifest(staged)
    new = {path.name for path in staged.iterdir()}
    remove_model(output_dir, new)
    sync_directory(output_dir)
    for name in sorted(new, key=lambda name: (name == MANIFEST, name in _CONFIGS, name)):
        if name == MANIFEST:
            sync_directory(output_dir)
        os.rename(staged / name, output_dir / name)
    staged.rmdir()
    sync_directory(output_dir)


def check_space(output_dir: str | os.PathLike, checkpoint: int, model: int, to_come: int, limit: int | None) -> None:
    """Raise ExpectedError (exit 8) when the disk can't take a first checkpoint and the model; say it when it may not
    take all that a run will save. Sizes in bytes.

    A new checkpoint is complete before an old one goes, so `limit` of them need room for one more. Those that are
    there already have theirs.
    """
    there = len(checkpoints_in(output_dir))
    at_once = min(to_come, max(1, limit + 1 - there)) if limit else to_come
    free = shutil.disk_usage(output_dir).free
    for number in sorted({min(1, at_once), at_once}):
        needed = number * checkpoint + model
        if needed <= free:
            continue
        what = (
            f"{output_dir} has {free / GIB:.1f} GiB free, and this run will need about {needed / GIB:.1f}: "
            f"{number} checkpoint{'s' * (number != 1)} of {checkpoint / GIB:.2f} GiB and a model of {model / GIB:.2f}. "
            "Free some space, save less often (--save_steps), keep fewer (--save_total_limit), or choose another "
            "directory"
        )
        if number <= 1:
            raise ExpectedError(what, ExitCode.DISK)
        notice(what)
