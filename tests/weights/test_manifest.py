"""weight_diff.json: what it describes, and what happens when it is edited, hostile or has no sums."""

import hashlib
import json

import numpy as np
import pytest
import torch

import weight_diff
from alpaca.common import ExitCode, ExpectedError
from alpaca.weights.manifest import _render
from tests.weights.tiny_checkpoints import (
    assert_refused,
    assert_same_bits,
    bits,
    load,
    make_diff,
    model,
    recover,
    save,
    tuned_from,
)


def test_manifest_describes_every_tensor(tmp_path):

    raw = model(torch.float16)
    save(raw, tmp_path / "raw")
    save(tuned_from(raw, torch.bfloat16, vocabulary=301), tmp_path / "tuned")
    make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff")
    manifest = json.loads((tmp_path / "diff" / "weight_diff.json").read_text())
    assert manifest["format_version"] == 1 and manifest["encoding"] == "exact" and manifest["kind"] == "diff"
    assert manifest["written_by"]["numpy"] == np.__version__
    base, tuned, diff = (load(tmp_path / name) for name in ("raw", "tuned", "diff"))
    assert manifest["tensors"].keys() == tuned.keys()
    for name, entry in manifest["tensors"].items():
        assert entry["shape"] == list(tuned[name].shape) and entry["dtype"] == "I16"
        assert entry["raw"]["dtype"] == "F16" and entry["tuned"]["dtype"] == "BF16"
        for state, digest in (
            (base, entry["raw"]["sha256"]),
            (tuned, entry["tuned"]["sha256"]),
            (diff, entry["sha256"]),
        ):
            assert hashlib.sha256(bits(state[name]).numpy().tobytes()).hexdigest() == digest
    for name, entry in manifest["files"].items():
        assert entry["bytes"] == (tmp_path / "diff" / name).stat().st_size


def manifest_with(place, change, keep_digest=False):
    path = place / "diff" / "weight_diff.json"
    body = json.loads(path.read_text())
    change(body)
    if not keep_digest:
        body.pop("manifest_sha256")
        path.write_text(_render(body))
    else:
        path.write_text(json.dumps(body))


def first_tensor(body):
    return body["tensors"]["model.norm.weight"]


HOSTILE_MANIFESTS = {
    "no tensors": lambda body: body.pop("tensors"),
    "tensors as a list": lambda body: body.update(tensors=[]),
    "fewer tensors": lambda body: body["tensors"].pop("model.norm.weight"),
    "no files": lambda body: body.pop("files"),
    "files lead out": lambda body: body["files"].update({"../raw/config.json": {"bytes": 1, "sha256": "0"}}),
    "file entry is a number": lambda body: body["files"].update({"config.json": 5}),
    "another encoding": lambda body: body.update(encoding="zip"),
    "the other encoding": lambda body: body.update(encoding="float32"),
    "another version": lambda body: body.update(format_version=2),
    "no version": lambda body: body.pop("format_version"),
    "unknown type": lambda body: first_tensor(body)["tuned"].update(dtype="X9"),
    "wider type": lambda body: first_tensor(body)["tuned"].update(dtype="F32"),
    "no base": lambda body: first_tensor(body).pop("raw"),
    "base is a number": lambda body: first_tensor(body).update(raw=5),
    "base is another tensor": lambda body: first_tensor(body)["raw"].update(name="lm_head.weight"),
    "base of another shape": lambda body: first_tensor(body)["raw"].update(shape=[64]),
    "no mean rows": lambda body: first_tensor(body).pop("mean_rows"),
    "mean rows without a base": lambda body: first_tensor(body).update(raw=None, mean_rows=True),
    "mean of no rows": lambda body: first_tensor(body).update(
        mean_rows=True, raw={**first_tensor(body)["raw"], "shape": [0]}
    ),
    "shape is text": lambda body: first_tensor(body).update(shape="32"),
    "other sum of tuned": lambda body: first_tensor(body)["tuned"].update(recovered_sha256="0" * 64),
}


@pytest.mark.parametrize("problem", HOSTILE_MANIFESTS)
def test_hostile_manifests(place, problem):
    """Even with a self-consistent checksum, a manifest that does not fit is refused, without a traceback."""
    manifest_with(place, HOSTILE_MANIFESTS[problem])
    assert_refused(place)


def test_what_counts_is_the_sum_of_the_result(place):
    """A wrong sum of the diff alone: the model is recovered to the bit, and `verify` tells about the diff."""
    manifest_with(place, lambda body: first_tensor(body).update(sha256="0" * 64))
    recover(place / "raw", place / "diff", place / "out")
    assert_same_bits(load(place / "out"), load(place / "tuned"))
    with pytest.raises(ExpectedError, match=r"damaged: other contents in 1 of 21 tensors: model\.norm\.weight"):
        weight_diff.verify(place / "diff")


def test_edited_manifest_is_refused(place):
    manifest_with(place, lambda body: body["written_by"].update(tool="me"), keep_digest=True)
    assert_refused(place, codes=[ExitCode.INTEGRITY], names=["weight_diff.json", "changed or damaged"])
    with pytest.raises(ExpectedError):
        weight_diff.verify(place / "diff")
    (place / "diff" / "weight_diff.json").write_text("{" + '"a": 1, "a": 2}')
    assert_refused(place, codes=[ExitCode.DATA], names=["weight_diff.json"])


def test_without_sums_there_is_nothing_to_check_and_it_says_so(place, capsys):
    make_diff(place / "raw", place / "tuned", place / "unsummed", verify=False)
    recover(place / "raw", place / "unsummed", place / "out")
    assert "nothing to check the weights against" in capsys.readouterr().err
    assert_same_bits(load(place / "out"), load(place / "tuned"))
    weight_diff.verify(place / "out")
    recover(place / "raw", place / "diff", place / "out2", verify=False)
    for name in ("unsummed", "out2"):
        with pytest.raises(ExpectedError, match="without sha256 sums"):
            weight_diff.verify(place / name)
    with pytest.raises(ExpectedError, match="nothing to check against"):
        weight_diff.verify(place / "raw")
