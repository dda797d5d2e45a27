"""Common mishaps, and the remedy that the one line names; files that are carried over and files that are not."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
import transformers

import weight_diff
from alpaca.common import ExitCode, ExpectedError
from alpaca.weights.files import CARRIED_FILES
from tests.weights.tiny_checkpoints import (
    assert_refused,
    assert_same_bits,
    load,
    make_diff,
    model,
    recover,
    save,
    save_tokenizer,
    tuned_from,
)

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize("files", [["params.json"], ["consolidated.00.pth", "consolidated.01.pth", "params.json"]])
def test_metas_own_files(place, files):
    (place / "llama").mkdir()
    for file in files:
        (place / "llama" / file).write_text("{}")
    parts = max(1, len(files) - 1)
    names = ["Meta's own files", "convert_llama_weights_to_hf", f"--num_shards {parts} ", f"--input_dir {place}"]
    assert_refused(place, raw="llama", codes=[ExitCode.DATA], names=[*names, "--llama_version 2, 3, 3.1 or 3.2"])
    (place / "llama" / "consolidated.safetensors").touch()
    assert_refused(place, raw="llama", codes=[ExitCode.DATA], names=["Mistral's own files; fetch config.json, model*"])


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_weights_that_are_lfs_pointers(place, file):
    (place / "clone").mkdir()
    (place / "clone" / "config.json").write_text("{}")
    (place / "clone" / file).write_text(POINTER)
    assert_refused(place, raw="clone", codes=[ExitCode.DATA], names=[file, "Git LFS pointer", "git lfs pull"])


def test_a_tokenizer_that_is_an_lfs_pointer_is_not_published(place):
    (place / "tuned" / "tokenizer.model").write_text(POINTER)
    with pytest.raises(ExpectedError, match=r"tokenizer\.model: a Git LFS pointer.*git lfs pull"):
        make_diff(place / "raw", place / "tuned", place / "out")
    assert not (place / "out").exists()


@pytest.mark.parametrize("file", ["weight_diff.json", "config.json"])
def test_line_ends_changed_by_git(place, file):
    path = place / "diff" / file
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    names = [file, "line ends were changed", "core.autocrlf false"]
    assert_refused(place, codes=[ExitCode.INTEGRITY], names=names)
    with pytest.raises(ExpectedError, match="line ends were changed"):
        weight_diff.verify(place / "diff")


def test_line_ends_that_git_took_away(pair):
    template = pair / "tuned" / "chat_template.jinja"
    template.write_bytes(b"one\r\ntwo\r\n")
    make_diff(pair / "raw", pair / "tuned", pair / "diff")
    (pair / "diff" / template.name).write_bytes(b"one\ntwo\n")
    assert_refused(pair, codes=[ExitCode.INTEGRITY], names=["chat_template.jinja", "core.autocrlf"])
    (pair / "diff" / template.name).write_bytes(b"one\nthree\n")
    assert "autocrlf" not in assert_refused(pair, codes=[ExitCode.INTEGRITY], names=["changed or damaged"])


def test_a_torch_file_of_before_1_6_and_the_command_that_saves_it_again(place):
    state = load(place / "raw_bin")
    for file in (place / "raw_bin").glob("*.bin*"):
        file.unlink()
    path = place / "raw_bin" / "pytorch_model.bin"
    torch.save(dict(state), path, _use_new_zipfile_serialization=False)
    message = assert_refused(place, raw="raw_bin", codes=[ExitCode.DATA], names=["torch before 1.6"])
    command = shlex.split(re.search(r'python -c ".*"', message)[0])
    assert subprocess.run([sys.executable, *command[1:]], check=False, timeout=60).returncode == 0
    recover(place / "raw_bin", place / "diff", place / "out")
    assert_same_bits(load(place / "out"), load(place / "tuned"))


def test_a_mismatch_of_everything_is_one_short_line(tmp_path):
    """The 291 tensors of a 7B LLaMA: counts, three names, and not a screen full."""
    for name, hidden in (("raw", 16), ("tuned", 32)):
        save(model(hidden=hidden, layers=32), tmp_path / name)
    with pytest.raises(ExpectedError) as caught:
        make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "out")
    assert "291 tensors do not" in str(caught.value) and "; and 288 more" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_what_is_not_carried_over_is_listed_by_name_in_one_line(pair, capsys):
    unknown = ["README.md", "custom.py", "my_notes.txt", "optimizer.pt", "tf_model.h5"]
    for file in unknown:
        (pair / "tuned" / file).write_text("x")
    (pair / "tuned" / "checkpoint-7").mkdir()
    make_diff(pair / "raw", pair / "tuned", pair / "diff")
    lines = [line for line in capsys.readouterr().err.splitlines() if "not carried over" in line]
    listed = ["README.md", "checkpoint-7/", *unknown[1:]]
    assert lines == [f"note: not carried over from {pair / 'tuned'}: {', '.join(listed)}"]
    (pair / "diff" / "README.md").write_text("a model card")
    recover(pair / "raw", pair / "diff", pair / "out")
    assert f"not carried over from {pair / 'diff'}: README.md\n" in capsys.readouterr().err


@pytest.mark.parametrize("sharded", [False, True])
def test_nothing_is_listed_where_all_is_carried(tmp_path, capsys, sharded):
    raw = model()
    save(raw, tmp_path / "raw")
    save_tokenizer(save(tuned_from(raw), tmp_path / "tuned", sharded))
    make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff", max_shard_size="20KB" if sharded else "5GB")
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out")
    assert "not carried" not in capsys.readouterr().err


PROCESSORS = """config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json
added_tokens.json chat_template.jinja chat_template.json preprocessor_config.json video_preprocessor_config.json
processor_config.json audio_tokenizer_config.json tekken.json tokenizer.model qwen.tiktoken""".split()


def test_all_that_a_tokenizer_or_processor_needs_is_carried(pair):
    """Those names, and every file name that a tokenizer of the installed transformers gives as its vocabulary's."""
    names = set(PROCESSORS)
    folder = os.path.dirname(transformers.__file__)
    for path, _, files in os.walk(os.path.join(folder, "models")):
        for file in files:
            if file.startswith("tokenization_") and file.endswith(".py"):
                with open(os.path.join(path, file), encoding="utf-8") as source:
                    for block in re.findall(r"VOCAB_FILES_NAMES\b[^{}\n]*=\s*\{(.*?)\}", source.read(), re.DOTALL):
                        names |= set(re.findall(r':\s*"([^"]+\.[^"]+)"', block))
    assert len(names) > 30
    assert not [name for name in names if not CARRIED_FILES.fullmatch(name)]
    assert not [
        name for name in ("modeling.py", "pickle.pkl", "model.bin", "run.json") if CARRIED_FILES.fullmatch(name)
    ]
    for name in names - {"config.json", "tokenizer.json", "tokenizer_config.json"}:
        (pair / "tuned" / name).write_text(json.dumps({"name": name}))
    make_diff(pair / "raw", pair / "tuned", pair / "diff")
    recover(pair / "raw", pair / "diff", pair / "out")
    for name in names:
        assert (pair / "out" / name).read_bytes() == (pair / "tuned" / name).read_bytes()
