"""`weight_diff.json`: what a diff or a recovered model consists of.

The manifest is written last. It names every file with its size, and every tensor with type, shape and sha256; in a
diff also the base's and the tuned tensor's. It finds damage and mistakes; it is no signature of who made it.
"""

import contextlib
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from alpaca.common import atomic_write
from alpaca.weights.arithmetic import Plan
from alpaca.weights.files import (
    Checkpoint,
    bad_data,
    changed_line_ends,
    file_inside,
    first_three,
    mismatch,
    read_json,
    sha256_of_file,
)
from alpaca.weights.output import ShardWriter

MANIFEST = "weight_diff.json"
FORMAT_VERSION = 1
LINE_ENDS = "its line ends were changed, as git does on Windows; `git config core.autocrlf false`, then clone it again"


def _render(body: dict[str, Any]) -> str:
    """Canonical text that carries its own sha256: a flip of any bit of the file shows."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "manifest_sha256": digest}, indent=1, sort_keys=True) + "\n"


def describe_file(path: Path, header: bytes | None) -> dict[str, Any]:
    """Size and sha256; of a shard (`header` given) that of the header: its tensors have sums of their own."""
    if header is None:
        return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    return {"bytes": path.stat().st_size, "header_sha256": hashlib.sha256(header).hexdigest()}


def diff_entry(plan: Plan, sums: dict[str, str | None]) -> dict[str, Any]:
    """What the manifest of a diff says of a tensor; `sums` as `diff_tensor` returns them.

    "raw" is null where the base lacks the tensor; then "computed" says whether the config gives it. "tuned" is null for
    a rotary buffer that the tuned model lacks, and the recovered one with it.
    """
    base = plan.raw.tensors.get(plan.raw_name)
    raw = base and {"name": plan.raw_name, "dtype": base.dtype, "shape": base.shape, "sha256": sums["raw"]}
    tuned = {"dtype": plan.dtype, "sha256": sums["tuned"], "recovered_sha256": sums["recovered"]}
    if plan.zeros and base:
        tuned = None
    stored = {"dtype": plan.diff_dtype, "shape": plan.shape, "sha256": sums["diff"], "mean_rows": plan.mean_rows}
    computed = {"computed": True} if plan.computed is not None else {}
    return {**stored, **computed, "raw": raw, "tuned": tuned}


def write_manifest(directory: Path, kind: str, encoding: str, tensors: dict[str, Any], writer: ShardWriter) -> None:
    """Describe all files of `directory`, and `tensors`. `kind`: "diff" or "model"."""
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    if "torch" in sys.modules:
        versions["torch"] = sys.modules["torch"].__version__
    body = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "encoding": encoding,
        "written_by": {"tool": "weight_diff.py", **versions},
        "tensors": tensors,
        "files": {name: describe_file(directory / name, writer.headers.get(name)) for name in os.listdir(directory)},
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
    rendered, found = _render(body).encode(), path.read_bytes()
    if rendered == found.replace(b"\r\n", b"\n") != found:
        raise mismatch(f"{path}: {LINE_ENDS}")
    if rendered != found:
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
    for name, described in manifest["files"].items():
        path = file_inside(directory, name)
        if describe_file(path, checkpoint.headers.get(name)) != described:
            if name not in checkpoint.headers and changed_line_ends(path, described["sha256"]):
                raise mismatch(f"{path}: {LINE_ENDS}")
            raise mismatch(f"{path}: changed or damaged since {MANIFEST} was written; get a clean copy")
    found = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in checkpoint.tensors.items()}
    expected = {name: (entry["dtype"], entry["shape"]) for name, entry in manifest["tensors"].items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        problem = f"{len(wrong)} tensors are not as {MANIFEST} describes them: {first_three(wrong)}"
        raise mismatch(f"{directory}: {problem}; get a clean copy")
