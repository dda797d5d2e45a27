"""Reading checkpoints: damaged, hostile and foreign files are refused; the Hub's cache."""

import json
import os
import shutil
import struct
import time

import pytest
import torch

from alpaca.common import ExitCode, ExpectedError
from alpaca.weights.files import Checkpoint
from tests.weights.tiny_checkpoints import assert_refused, assert_same_bits, load, make_diff, recover, run


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
        Checkpoint(tmp_path)
    assert caught.value.exit_code == ExitCode.DATA and "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 1000, 2**31, 2**63, 2**64 - 1])
def test_hostile_header_lengths(tmp_path, length):
    (tmp_path / "config.json").write_text("{}")
    with_header(tmp_path / "model.safetensors", {"a": entry()}, length=length)
    with pytest.raises(ExpectedError, match=r"model\.safetensors"):
        Checkpoint(tmp_path)


def test_a_hundred_megabytes_of_json_are_not_parsed(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with open(tmp_path / "model.safetensors", "wb") as file:  # the header is a hole: no disk, no time
        file.write(struct.pack("<Q", 100_000_000) + b"{")
        file.truncate(100_000_100)
    started = time.perf_counter()
    with pytest.raises(ExpectedError, match="header of 100000000 bytes"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.safetensors.index.json")
    with pytest.raises(ExpectedError, match="bytes of JSON"):
        Checkpoint(tmp_path)
    assert time.perf_counter() - started < 1


def test_sound_headers_are_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    header = {"b": entry(0, 32, (2, 4)), "c": entry(32, 32, (0, 3)), "a": entry(32, 64, (16,), "BF16")}
    for metadata in ({}, {"__metadata__": {"format": "pt", "by": "someone"}}):
        with_header(tmp_path / "model.safetensors", json.dumps(metadata | header).encode() + b"     ")
        with Checkpoint(tmp_path) as checkpoint:
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


def test_carried_files_that_lead_outside_are_refused(place):
    (place / "secret").write_text("secret")
    (place / "tuned" / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(ExpectedError, match="outside the directory") as caught:
        make_diff(place / "raw", place / "tuned", place / "out")
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


def test_make_diff_refuses_damaged_bin_files(place):
    """Before there are sums: torch's own CRC-32 of the weights."""
    file = place / "raw_bin" / "pytorch_model-00002-of-00002.bin"
    content = bytearray(file.read_bytes())
    payload = bytes(load(place / "raw")["lm_head.weight"].view(torch.uint8).flatten().tolist())
    content[bytes(content).index(payload) + 1000] ^= 4
    file.write_bytes(content)
    with pytest.raises(ExpectedError, match="damaged") as caught:
        make_diff(place / "raw_bin", place / "tuned", place / "out")
    assert caught.value.exit_code == ExitCode.DATA and file.name in str(caught.value) and not (place / "out").exists()


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


def test_hub_ids(pair):
    """From the Hub client's cache (links into blobs) when offline; a clear message for what is not there."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(pair / "home")}
    cache = pair / "home" / "hub" / "models--someone--base"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    for number, file in enumerate(sorted((pair / "raw").iterdir())):
        (cache / "blobs" / f"{number}").write_bytes(file.read_bytes())
        (cache / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{number}")
    done = run("make_diff", "someone/base", "tuned", "diff", cwd=pair, env=environment)
    assert done.returncode == 0, done.stderr
    done = run("recover", "someone/base", "diff", "out", "--test_inference", "False", cwd=pair, env=environment)
    assert done.returncode == 0, done.stderr
    assert_same_bits(load(pair / "out"), load(pair / "tuned"))
    done = run("recover", "someone/else", "diff", "out2", cwd=pair, env=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "someone/else" in done.stderr and "cannot be reached" in done.stderr and "hf download" in done.stderr
