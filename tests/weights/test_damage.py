"""weight_diff against damage, hostile files, kills and full disks: refused, and nothing half-written."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

import weight_diff
from alpaca.common import ExitCode, ExpectedError
from alpaca.weights import files as checkpoint_files
from tests.weights.tiny_checkpoints import (
    SCRIPT,
    assert_same_bits,
    load,
    model,
    run,
    save,
    save_bin,
    save_holes,
    tree,
    tuned_from,
)

REFUSED = (ExitCode.DATA, ExitCode.INTEGRITY)


def recover(raw, diff, out, **options):
    weight_diff.recover(str(raw), str(diff), str(out), **{"test_inference": False, **options})


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """raw, tuned, diff (exact), old (a diff without manifest, three .bin shards), raw_bin, raw_sharded."""
    place = tmp_path_factory.mktemp("made")
    raw = model()
    tuned = tuned_from(raw, vocabulary=301)
    save(raw, place / "raw")
    save(raw, place / "raw_sharded", sharded=True)
    save_bin(raw.state_dict(), raw.config, place / "raw_bin", shards=2)
    save(tuned, place / "tuned", sharded=True)
    weight_diff.make_diff(str(place / "raw"), str(place / "tuned"), str(place / "diff"), max_shard_size="30KB")
    weight_diff.make_diff(str(place / "raw"), str(place / "tuned"), str(place / "float32"), encoding="float32")
    save_bin(load(place / "float32"), tuned.config, place / "old", shards=3)
    return place


@pytest.fixture
def place(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def assert_refused(place, raw="raw", diff="diff", codes=REFUSED, names=(), **options):
    """recover refuses with one of the codes, names what is wrong, and leaves no trace."""
    before = sorted(os.listdir(place))
    with pytest.raises(ExpectedError) as caught:
        recover(place / raw, place / diff, place / "out", **options)
    assert caught.value.exit_code in codes, caught.value
    assert "\n" not in str(caught.value)
    for name in names:
        assert name in str(caught.value), caught.value
    assert sorted(os.listdir(place)) == before
    return str(caught.value)


def edit(path, change):
    """Load the tensors of one safetensors file, change them, and save them."""
    from safetensors.torch import load_file

    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


# ---------------------------------------------------------------------------------------------------------------------
# Wrong inputs


def test_wrong_base(place):
    save(model(seed=5), place / "other")
    message = assert_refused(place, raw="other", codes=[ExitCode.INTEGRITY], names=["wrong or damaged base"])
    assert "model.layers.1.mlp.up_proj.weight" in message and str(place / "other" / "model.safetensors") in message


def test_one_changed_bit_in_the_base_names_its_tensor(place):
    def change(state):
        state["model.layers.1.mlp.up_proj.weight"].view(torch.int16)[3, 4] ^= 1

    edit(place / "raw" / "model.safetensors", change)
    message = assert_refused(place, codes=[ExitCode.INTEGRITY], names=["model.layers.1.mlp.up_proj.weight"])
    assert "down_proj" not in message


def test_base_in_another_type_is_not_the_base(place):
    save(model(torch.float32), place / "other")
    assert_refused(place, raw="other", codes=[ExitCode.INTEGRITY], names=["F32", "BF16", "model.norm.weight"])


@pytest.mark.parametrize("diff", ["diff", "float32", "old"])
def test_raw_and_diff_swapped(place, diff):
    assert_refused(place, raw=diff, diff="raw", codes=[ExitCode.INTEGRITY])


def test_raw_and_diff_swapped_without_manifest_and_with_equal_vocabulary(place):
    """Nothing but the size of the numbers tells the two apart."""
    raw = model()
    tuned = tuned_from(raw)
    save(tuned, place / "tuned2")
    weight_diff.make_diff(str(place / "raw"), str(place / "tuned2"), str(place / "diff2"), encoding="float32")
    (place / "diff2" / "weight_diff.json").unlink()
    assert_refused(place, raw="diff2", diff="raw", codes=[ExitCode.INTEGRITY], names=["swapped"])
    recover(place / "raw", place / "diff2", place / "out", dtype="bfloat16")
    assert_same_bits(load(place / "out"), load(place / "tuned2"))


def test_a_recovered_model_as_diff_and_a_diff_as_model(place):
    recover(place / "raw", place / "diff", place / "again")
    assert_refused(place, diff="again", codes=[ExitCode.INTEGRITY], names=["swapped"])
    for pair in (("diff", "tuned"), ("raw", "diff")):
        with pytest.raises(ExpectedError, match="swapped") as caught:
            weight_diff.make_diff(*(str(place / name) for name in pair), str(place / "out"))
        assert caught.value.exit_code == ExitCode.INTEGRITY


def test_another_family(place):
    config = json.loads((place / "raw" / "config.json").read_text())
    (place / "raw" / "config.json").write_text(json.dumps(config | {"model_type": "opt"}))
    assert_refused(place, codes=[ExitCode.INTEGRITY], names=["opt", "llama"])


@pytest.mark.parametrize("diff", ["diff", "old"])
@pytest.mark.parametrize("hidden", [16, 64])
def test_another_size_of_the_same_family(place, hidden, diff):
    save(model(hidden=hidden), place / "other")
    assert_refused(
        place, raw="other", diff=diff, codes=[ExitCode.INTEGRITY], names=["model.norm.weight", f"[{hidden}]"]
    )


@pytest.mark.parametrize("encoding", weight_diff.ENCODINGS)
def test_make_diff_lists_all_that_does_not_fit(place, encoding):
    def change(state):
        del state["model.layers.0.mlp.up_proj.weight"], state["model.layers.1.input_layernorm.weight"]
        state["model.norm.weight"] = torch.ones(33)
        state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(64, 32, dtype=torch.int32)

    save(tuned_from(model()), place / "one")
    edit(place / "one" / "model.safetensors", change)
    with pytest.raises(ExpectedError) as caught:
        weight_diff.make_diff(str(place / "raw"), str(place / "one"), str(place / "out"), encoding=encoding)
    assert caught.value.exit_code == ExitCode.INTEGRITY
    message = str(caught.value)
    for name in (
        "0.mlp.up_proj",
        "1.input_layernorm",
        "model.norm",
        "1.mlp.up_proj",
        "[33]",
        "I32",
        "model.safetensors",
    ):
        assert name in message
    assert not (place / "out").exists()


def test_only_the_vocabulary_may_grow(place):
    def change(state):
        state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(65, 32, dtype=torch.bfloat16)

    save(tuned_from(model()), place / "one")
    edit(place / "one" / "model.safetensors", change)
    with pytest.raises(ExpectedError, match=r"up_proj.*\[65, 32\]"):
        weight_diff.make_diff(str(place / "raw"), str(place / "one"), str(place / "out"))


def test_diff_without_manifest_that_has_other_tensors(place):
    for name, change in (
        ("missing", lambda state: state.pop("model.layers.1.mlp.up_proj.weight")),
        ("extra", lambda state: state.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(64, 32)})),
        ("integer", lambda state: state.update({"model.norm.weight": torch.zeros(32, dtype=torch.int64)})),
    ):
        state = load(place / "old")
        change(state)
        shutil.copytree(place / "float32", place / name)
        (place / name / "weight_diff.json").unlink()
        save_file(state, place / name / "model.safetensors")
        expected = "norm" if name == "integer" else "up_proj"
        assert_refused(place, diff=name, codes=[ExitCode.INTEGRITY], names=[expected])


def test_rotary_buffers_that_the_config_does_not_explain(place):
    state = load(place / "old") | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(5)}
    for file in (place / "old").glob("*.bin*"):
        file.unlink()
    save_file(state, place / "old" / "model.safetensors")
    assert_refused(place, diff="old", codes=[ExitCode.INTEGRITY], names=["inv_freq", "[5]"])
    (place / "old" / "config.json").write_text('{"num_attention_heads": 0, "hidden_size": 32, "vocab_size": 301}')
    assert_refused(place, diff="old", codes=[ExitCode.DATA], names=["config.json"])


# ---------------------------------------------------------------------------------------------------------------------
# Damaged and hostile files


@pytest.mark.parametrize("side", ["raw_sharded", "diff", "raw_bin", "old"])
def test_missing_shard_and_truncated_shard(place, side):
    sides = {"diff" if side in ("diff", "old") else "raw": side}
    shard = sorted(file for file in (place / side).iterdir() if "-00002-" in file.name)[0]
    whole = shard.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        shard.write_bytes(whole[:size])
        assert_refused(place, **sides, names=[shard.name])
    shard.write_bytes(whole + b"\0")
    if shard.suffix == ".safetensors":
        assert_refused(place, **sides, names=[shard.name])
    shard.unlink()
    assert_refused(place, **sides, names=[shard.name])


def with_header(path, header, data=b"\0" * 64, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(begin=0, end=64, shape=(16,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HEADERS = {
    "overlap": {"a": entry(0, 64), "b": entry(32, 64, (8,))},
    "hole": {"a": entry(0, 32, (8,)), "b": entry(36, 64, (7,))},
    "beyond the end": {"a": entry(0, 128, (32,))},
    "before the start": {"a": entry(-64, 0)},
    "shape overflows": {"a": entry(0, 64, (2**62, 4, 16))},
    "shape is negative": {"a": entry(0, 64, (-4, -4))},
    "shape is not whole": {"a": entry(0, 64, (16.0,))},
    "shape is a truth value": {"a": entry(0, 4, (True,))},
    "end before begin": {"a": entry(64, 0)},
    "unknown type": {"a": entry(dtype="F33")},
    "type is a list": {"a": entry(dtype=["F32"])},
    "wrong size": {"a": entry(0, 64, (15,))},
    "no offsets": {"a": {"dtype": "F32", "shape": [16]}},
    "not an object": {"a": [1, 2]},
    "a line break in a name": {"a\nb": entry()},
    "foreign metadata": {"__metadata__": {"format": "pu"}, "a": entry()},
    "no tensors": {},
    "twice": b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}",
    "a list": b"[1,2,3]",
    "not JSON": b"{{{{",
    "not UTF-8": b'{"\xff\xfe": 1}',
    "deep": b'{"a":' * 100_000,
    "deep list": b'{"a":' + b"[" * 100_000,
    "many digits": b'{"a":' + b"9" * 6000 + b"}",
    "spaces and then more": json.dumps({"a": entry()}).encode() + b"   x",
}


@pytest.mark.parametrize("problem", HEADERS)
def test_hostile_headers(tmp_path, problem):
    (tmp_path / "config.json").write_text("{}")
    with_header(tmp_path / "model.safetensors", HEADERS[problem])
    with pytest.raises(ExpectedError) as caught:
        checkpoint_files.Checkpoint(tmp_path)
    assert caught.value.exit_code == ExitCode.DATA and "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 1000, 2**31, 2**63, 2**64 - 1])
def test_hostile_header_lengths(tmp_path, length):
    (tmp_path / "config.json").write_text("{}")
    with_header(tmp_path / "model.safetensors", {"a": entry()}, length=length)
    with pytest.raises(ExpectedError, match=r"model\.safetensors"):
        checkpoint_files.Checkpoint(tmp_path)


def test_a_hundred_megabytes_of_json_are_not_parsed(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with open(tmp_path / "model.safetensors", "wb") as file:  # the header is a hole: no disk, no time
        file.write(struct.pack("<Q", 100_000_000) + b"{")
        file.truncate(100_000_100)
    started = time.perf_counter()
    with pytest.raises(ExpectedError, match="header of 100000000 bytes"):
        checkpoint_files.Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.safetensors.index.json")
    with pytest.raises(ExpectedError, match="bytes of JSON"):
        checkpoint_files.Checkpoint(tmp_path)
    assert time.perf_counter() - started < 1


def test_sound_headers_are_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    header = {"b": entry(0, 32, (2, 4)), "c": entry(32, 32, (0, 3)), "a": entry(32, 64, (16,), "BF16")}
    for metadata in ({}, {"__metadata__": {"format": "pt", "by": "someone"}}):
        with_header(tmp_path / "model.safetensors", json.dumps(metadata | header).encode() + b"     ")
        with checkpoint_files.Checkpoint(tmp_path) as checkpoint:
            assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == {
                "a": (16,),
                "b": (2, 4),
                "c": (0, 3),
            }


def test_git_lfs_pointer_says_what_it_is(place):
    (place / "raw" / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    assert_refused(place, names=["git lfs pull"])


@pytest.mark.parametrize("side", ["raw_sharded", "raw_bin", "diff"])
@pytest.mark.parametrize("target", ["../outside", "absolute", "link", "sub/dir", "..", "", "back\\slash", 7])
def test_nothing_outside_the_directory_is_read(place, side, target):
    directory = place / side
    index = next(directory.glob("*.index.json"))
    content = json.loads(index.read_text())
    name, file = next(iter(content["weight_map"].items()))
    shutil.copy(directory / file, place / f"outside{(directory / file).suffix}")
    (directory / "sub").mkdir()
    if target == "../outside":
        target += (directory / file).suffix
    elif target == "absolute":
        target = str(directory / file)
    elif target == "link":
        target = file
        (directory / file).unlink()
        (directory / file).symlink_to(f"../outside{(place / side / file).suffix}")
    if target != file:
        content["weight_map"][name] = target
        index.write_text(json.dumps(content))
    sides = {"diff" if side == "diff" else "raw": side}
    assert_refused(place, **sides)
    if target == "link":
        shutil.copy(place / side / file, place / "kept")


def test_carried_files_that_lead_outside_are_refused(place):
    (place / "secret").write_text("secret")
    (place / "tuned" / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(ExpectedError, match="outside the directory") as caught:
        weight_diff.make_diff(str(place / "raw"), str(place / "tuned"), str(place / "out"))
    assert caught.value.exit_code == ExitCode.DATA and not (place / "out").exists()


def test_bin_files_run_no_code(place):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {place / 'executed'}",)

    torch.save({"model.norm.weight": Evil()}, place / "raw_bin" / "pytorch_model-00001-of-00002.bin")
    assert_refused(place, raw="raw_bin", names=["pytorch_model-00001-of-00002.bin"])
    torch.save([torch.ones(3)], place / "raw_bin" / "pytorch_model-00001-of-00002.bin")
    assert_refused(place, raw="raw_bin", names=["a dict of tensors expected"])
    torch.save(
        {"a": torch.ones(3)},
        place / "raw_bin" / "pytorch_model-00001-of-00002.bin",
        _use_new_zipfile_serialization=False,
    )
    assert_refused(place, raw="raw_bin", names=["torch before 1.6"])
    assert not (place / "executed").exists()


def test_bin_with_a_view_of_claimed_size(place):
    """Stride 0 makes a petabyte of four bytes; unfolding it would end the machine."""
    state = dict(load(place / "raw_bin"))
    state["model.norm.weight"] = torch.zeros(1, dtype=torch.bfloat16).expand(2**49)
    for file in (place / "raw_bin").glob("*.bin*"):
        file.unlink()
    torch.save(state, place / "raw_bin" / "pytorch_model.bin")
    assert_refused(place, raw="raw_bin", codes=[ExitCode.DATA], names=["model.norm.weight", "larger than the file"])


def test_bin_with_views_and_transposed_tensors(place):
    state = {name: tensor.clone() for name, tensor in load(place / "raw_bin").items()}
    big = torch.zeros(100, 64, dtype=torch.bfloat16)
    big[3:67, 5:37] = state["model.layers.0.mlp.up_proj.weight"]
    state["model.layers.0.mlp.up_proj.weight"] = big[3:67, 5:37]
    state["model.layers.0.self_attn.q_proj.weight"] = (
        state["model.layers.0.self_attn.q_proj.weight"].t().contiguous().t()
    )
    for file in (place / "raw_bin").glob("*.bin*"):
        file.unlink()
    torch.save(state, place / "raw_bin" / "pytorch_model.bin")
    recover(place / "raw_bin", place / "diff", place / "out")
    assert_same_bits(load(place / "out"), load(place / "tuned"))


def test_directories_that_hold_no_single_model(place):
    shutil.copy(place / "raw" / "model.safetensors", place / "raw_sharded" / "model.safetensors")
    assert_refused(place, raw="raw_sharded", names=["holds both"])
    (place / "empty").mkdir()
    assert_refused(place, raw="empty", names=["config.json", "missing"])
    (place / "empty" / "config.json").write_text("{}")
    assert_refused(place, raw="empty", names=["no weights here"])
    (place / "empty" / "adapter_config.json").write_text("{}")
    assert_refused(place, raw="empty", names=["merge the adapter"])
    os.mkfifo(place / "empty" / "model.safetensors")
    assert_refused(place, raw="empty", names=["not a regular file"])


def manifest_with(place, change, keep_digest=False):
    path = place / "diff" / "weight_diff.json"
    body = json.loads(path.read_text())
    change(body)
    if not keep_digest:
        from alpaca.weights.manifest import _render

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
    "other sum": lambda body: first_tensor(body).update(sha256="0" * 64),
    "other sum of tuned": lambda body: first_tensor(body)["tuned"].update(recovered_sha256="0" * 64),
}


@pytest.mark.parametrize("problem", HOSTILE_MANIFESTS)
def test_hostile_manifests(place, problem):
    """Even with a self-consistent checksum, a manifest that does not fit is refused, without a traceback."""
    manifest_with(place, HOSTILE_MANIFESTS[problem])
    assert_refused(place)


def test_edited_manifest_is_refused(place):
    manifest_with(place, lambda body: body["written_by"].update(tool="me"), keep_digest=True)
    assert_refused(place, codes=[ExitCode.INTEGRITY], names=["weight_diff.json", "changed or damaged"])
    with pytest.raises(ExpectedError):
        weight_diff.verify(place / "diff")
    (place / "diff" / "weight_diff.json").write_text("{" + '"a": 1, "a": 2}')
    assert_refused(place, codes=[ExitCode.DATA], names=["weight_diff.json"])


def test_without_sums_there_is_nothing_to_check_and_it_says_so(place, capsys):
    weight_diff.make_diff(str(place / "raw"), str(place / "tuned"), str(place / "unsummed"), verify=False)
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


# ---------------------------------------------------------------------------------------------------------------------
# Flipped bits


def flip_bits(place, files, count, seed, raw, diff, must_refuse):
    """Flip one random bit at a time. Refused with nothing left, or (`must_refuse` False) the right weights.

    Returns how many flips were refused.
    """
    generator = random.Random(seed)
    expected = load(place / "tuned")
    before = sorted(os.listdir(place))
    refused = 0
    for _ in range(count):
        file = generator.choice(files)
        position = generator.randrange(8 * file.stat().st_size)
        with open(file, "r+b") as handle:
            handle.seek(position // 8)
            byte = handle.read(1)[0]
            handle.seek(position // 8)
            handle.write(bytes([byte ^ (1 << position % 8)]))
        try:
            recover(place / raw, place / diff, place / "out", dtype="bfloat16" if diff == "old" else None)
        except ExpectedError as error:
            assert error.exit_code in REFUSED, (file, position, error)
            assert sorted(os.listdir(place)) == before
            refused += 1
        else:
            assert not must_refuse, f"bit {position} of {file} was not seen"
            assert_same_bits(load(place / "out"), expected)
            shutil.rmtree(place / "out")
        with open(file, "r+b") as handle:
            handle.seek(position // 8)
            handle.write(bytes([byte]))
    recover(place / raw, place / diff, place / "out", dtype="bfloat16" if diff == "old" else None)  # all flipped back
    shutil.rmtree(place / "out")
    return refused


def check_flips(place, count, seed):
    every_diff_file = sorted((place / "diff").iterdir())
    shards = sorted((place / "raw_sharded").glob("*.safetensors"))
    flip_bits(place, every_diff_file + shards, count, seed, "raw_sharded", "diff", must_refuse=True)


def test_flipped_bits_are_refused(place):
    check_flips(place, 40, 0)


def test_flipped_bits_in_old_formats_and_in_indexes_never_give_wrong_weights(place):
    """A zip archive's dates and an index's total are bits that nothing depends on; all others are refused."""
    archives = sorted((place / "raw_bin").glob("*.bin"))
    assert flip_bits(place, archives, 20, 1, "raw_bin", "diff", must_refuse=False) > 5
    shards = sorted((place / "old").glob("*.bin"))
    assert flip_bits(place, shards, 20, 2, "raw", "old", must_refuse=False) > 5
    small = [place / "raw_sharded" / name for name in ("model.safetensors.index.json", "config.json")]
    flip_bits(place, small, 20, 3, "raw_sharded", "diff", must_refuse=False)


def test_make_diff_refuses_damaged_bin_files(place):
    """Before there are sums: torch's own CRC-32 of the weights."""
    file = place / "raw_bin" / "pytorch_model-00002-of-00002.bin"
    content = bytearray(file.read_bytes())
    payload = bytes(load(place / "raw")["lm_head.weight"].view(torch.uint8).flatten().tolist())
    content[bytes(content).index(payload) + 1000] ^= 4
    file.write_bytes(content)
    with pytest.raises(ExpectedError, match="damaged") as caught:
        weight_diff.make_diff(str(place / "raw_bin"), str(place / "tuned"), str(place / "out"))
    assert caught.value.exit_code == ExitCode.DATA and file.name in str(caught.value) and not (place / "out").exists()


def test_verify_sees_any_flipped_bit_of_what_was_written(place):
    recover(place / "raw", place / "diff", place / "out", max_shard_size="40KB")
    generator = random.Random(4)
    for _ in range(40):
        file = generator.choice(sorted((place / "out").iterdir()) + sorted((place / "diff").iterdir()))
        whole = file.read_bytes()
        position = generator.randrange(8 * len(whole))
        changed = bytearray(whole)
        changed[position // 8] ^= 1 << position % 8
        file.write_bytes(changed)
        with pytest.raises(ExpectedError) as caught:
            weight_diff.verify(file.parent)
        assert caught.value.exit_code in REFUSED, (file, position)
        file.write_bytes(whole)
    weight_diff.verify(place / "out")
    (place / "out" / "config.json").unlink()
    with pytest.raises(ExpectedError, match=r"config\.json.*missing"):
        weight_diff.verify(place / "out")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10, 15))
def test_a_thousand_flipped_bits(place, seed):
    check_flips(place, 200, seed)


@pytest.mark.soak
def test_hundreds_of_flipped_bits_in_old_formats(place):
    flip_bits(place, sorted((place / "old").glob("*.bin")), 150, 20, "raw", "old", must_refuse=False)
    flip_bits(place, sorted((place / "raw_bin").glob("*")), 150, 21, "raw_bin", "diff", must_refuse=False)


# ---------------------------------------------------------------------------------------------------------------------
# Output: where it may go, and that it is whole or not there


@pytest.mark.parametrize("output", ["raw", "raw/", "./diff", "link_to_raw", "link_to_parent/diff", "."])
@pytest.mark.parametrize("overwrite", [False, True])
def test_output_is_never_an_input(place, monkeypatch, output, overwrite):
    (place / "link_to_raw").symlink_to("raw")
    (place / "link_to_parent").symlink_to(".")
    before = tree(place)
    monkeypatch.chdir(place)
    with pytest.raises(ExpectedError, match="is or holds") as caught:
        recover("raw", "diff", output, overwrite=overwrite)
    assert caught.value.exit_code == ExitCode.USAGE and tree(place) == before


def test_output_that_exists(place):
    (place / "out").mkdir()
    recover(place / "raw", place / "diff", place / "out")  # an empty directory is free
    whole = tree(place / "out")
    with pytest.raises(ExpectedError, match=r"not empty.*--overwrite True") as caught:
        recover(place / "raw", place / "diff", place / "out")
    assert caught.value.exit_code == ExitCode.USAGE
    (place / "out" / "model.safetensors").write_bytes(b"old")
    recover(place / "raw", place / "diff", place / "out", overwrite=True)
    assert tree(place / "out") == whole
    (place / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ExpectedError, match=r"would delete thesis\.tex") as caught:
        recover(place / "raw", place / "diff", place / "out", overwrite=True)
    assert caught.value.exit_code == ExitCode.USAGE and (place / "out" / "thesis.tex").exists()
    with pytest.raises(ExpectedError, match="is no directory"):
        recover(place / "raw", place / "diff", place / "raw" / "config.json", overwrite=True)
    (place / "link").symlink_to("elsewhere")
    recover(place / "raw", place / "diff", place / "link")
    assert (place / "elsewhere" / "weight_diff.json").exists()


def test_failed_overwrite_leaves_the_old_directory(place):
    recover(place / "raw", place / "diff", place / "out")
    before = tree(place / "out")
    save(model(seed=5), place / "other")
    with pytest.raises(ExpectedError):
        recover(place / "other", place / "diff", place / "out", overwrite=True)
    assert tree(place / "out") == before
    assert not [name for name in os.listdir(place) if name.startswith(".")]


def test_free_space_is_checked_first(tmp_path):
    """A base and a tuned model of 8 TB, made of a hole: no machine has room for the difference."""
    for name in ("raw", "tuned"):
        save_holes(tmp_path / name, {"model.norm.weight": 2**42})
    done = run("make_diff", "raw", "tuned", "diff", cwd=tmp_path)
    assert done.returncode == 8 and "8796.09 GB needed" in done.stderr and done.stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["raw", "tuned"]


@pytest.mark.parametrize("limit", [0, 1000, 20_000, 60_000])
def test_file_that_cannot_grow_is_exit_8_and_leaves_nothing(place, limit):
    """The system refuses to write beyond `limit` bytes a file, as it does when a disk or quota is full."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    before = sorted(os.listdir(place))
    for command in (
        ["make_diff", "raw", "tuned", "new"],
        ["recover", "raw", "diff", "new", "--test_inference", "False"],
    ):
        done = run(*command, cwd=place, preexec_fn=limited)
        assert done.returncode == 8, (command, done.stderr)
        assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
        assert sorted(os.listdir(place)) == before


def test_full_disk(place):
    """A file system of a few files' room, where mounting is permitted; elsewhere the limits above are the test."""
    disk = place / "disk"
    disk.mkdir()
    for options in ("size=16m", "size=64m,nr_inodes=4"):
        mount = f"mount -t tmpfs -o {options} none disk && exec {sys.executable} {SCRIPT} make_diff raw tuned disk/new"
        script = f"({mount}); code=$?; ls -A disk; exit $code"
        if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
            return
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", f"{script}"],
            cwd=place,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        if "mount:" in done.stderr:
            return
        assert (done.returncode, done.stdout) == (8, ""), done.stderr
        assert done.stderr.count("\n") == 1
        assert os.strerror(errno.ENOSPC) in done.stderr or "needed" in done.stderr


def test_unwritable_place(place):
    (place / "file").write_text("")
    done = run("recover", "raw", "diff", "file/out", cwd=place)
    assert done.returncode in (2, 8) and done.stderr.count("\n") == 1
    done = run("recover", "raw", "diff", "/proc/out", cwd=place)
    assert done.returncode == 8 and done.stderr.count("\n") == 1, done.stderr


def test_second_run_at_the_same_time_is_refused(place):
    staging = place / ".out.unfinished"
    staging.mkdir()
    import fcntl

    lock = os.open(staging, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    done = run("recover", "raw", "diff", "out", cwd=place)
    os.close(lock)
    assert done.returncode == 6 and done.stderr.count("\n") == 1
    assert staging.exists()


def test_threads_stop_when_one_fails(place):
    """A job that fails ends the others, and their threads."""
    before = threading.active_count()
    save(model(seed=5), place / "other")
    assert_refused(place, raw="other")
    assert threading.active_count() == before


@pytest.fixture(scope="session")
def larger(tmp_path_factory):
    """20 MB a side: time enough to be killed while reading, writing, checking and renaming."""
    place = tmp_path_factory.mktemp("larger")
    raw = model(hidden=512, layers=3)
    save(raw, place / "raw")
    save(tuned_from(raw, vocabulary=301), place / "tuned")
    weight_diff.make_diff(str(place / "raw"), str(place / "tuned"), str(place / "diff"))
    return place


def kill_at_any_moment(place, command, output, count, seed, old=None):
    """Kill -9 after a random time. `output` is absent, whole, or (with `old`) the old one; a rerun cleans up."""
    generator = random.Random(seed)
    arguments = [sys.executable, str(SCRIPT), *command]
    started = time.perf_counter()
    assert subprocess.run(arguments, cwd=place, capture_output=True, check=False).returncode == 0
    duration = time.perf_counter() - started
    whole = tree(place / output)
    states = {"absent": 0, "whole": 0}
    for _ in range(count):
        shutil.rmtree(place / output, ignore_errors=True)
        if old:
            shutil.copytree(place / old, place / output)
        with subprocess.Popen(arguments, cwd=place, stderr=subprocess.DEVNULL) as process:
            time.sleep(generator.uniform(0.25, 1.1) * duration)
            process.send_signal(signal.SIGKILL)
        if not (place / output).exists():
            states["absent"] += 1
        else:
            found = tree(place / output)
            assert found == whole or (old and found == tree(place / old))
            states["whole"] += 1
    shutil.rmtree(place / output, ignore_errors=True)
    assert subprocess.run(arguments, cwd=place, capture_output=True, check=False).returncode == 0
    assert tree(place / output) == whole
    assert not [name for name in os.listdir(place) if name.startswith(".")]
    shutil.rmtree(place / output)
    return states


RECOVER = ["recover", "raw", "diff", "killed", "--test_inference", "False", "--overwrite", "True"]


def test_killed_at_any_moment(larger):
    assert sum(kill_at_any_moment(larger, RECOVER, "killed", 10, 0).values()) == 10
    kill_at_any_moment(larger, ["make_diff", "raw", "tuned", "killed"], "killed", 10, 1)


@pytest.mark.soak
def test_killed_at_any_moment_many_times(larger):
    kill_at_any_moment(larger, RECOVER, "killed", 60, 2)
    kill_at_any_moment(larger, RECOVER, "killed", 60, 3, old="tuned")
    kill_at_any_moment(larger, ["make_diff", "raw", "tuned", "killed"], "killed", 60, 4)


def test_killed_between_the_renames_the_old_directory_comes_back(place):
    """The one moment of an overwrite at which neither stands in its place."""
    recover(place / "raw", place / "diff", place / "out")
    before = tree(place / "out")
    (place / "out").rename(place / ".out.replaced")
    save(model(seed=5), place / "other")
    with pytest.raises(ExpectedError):
        recover(place / "other", place / "diff", place / "out")
    assert tree(place / "out") == before and not (place / ".out.replaced").exists()


def test_interrupt_cleans_up(tmp_path):
    for name in ("raw", "tuned"):
        save_holes(tmp_path / name, {"model.norm.weight": 2**31})  # seconds of work
    arguments = [sys.executable, str(SCRIPT), "make_diff", "raw", "tuned", "diff"]
    process = subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (tmp_path / ".diff.unfinished" / "model.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "error: interrupted\n")
    assert sorted(os.listdir(tmp_path)) == ["raw", "tuned"]
