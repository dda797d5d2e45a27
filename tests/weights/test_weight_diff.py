"""weight_diff: round trips to the bit, and the command line."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import weight_diff
from alpaca.common import ExitCode, ExpectedError
from tests.weights.tiny_checkpoints import (
    DTYPES,
    ROOT,
    assert_same_bits,
    load,
    make_diff,
    model,
    recover,
    run,
    run_between,
    save,
    save_bin,
    save_tokenizer,
    slow_exact_difference,
    tree,
    tuned_from,
)


@pytest.mark.parametrize("grown", [False, True], ids=["equal", "grown"])
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_bitwise(tmp_path, dtype, tied, sharded, grown):
    raw = model(DTYPES[dtype], tied=tied)
    tuned = tuned_from(raw, vocabulary=301 if grown else None)
    save(raw, tmp_path / "raw", sharded)
    save(tuned, tmp_path / "tuned", sharded)
    make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff", max_shard_size="25KB" if sharded else "5GB")
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out", max_shard_size="30KB" if sharded else "5GB")

    before, base, diff = load(tmp_path / "tuned"), load(tmp_path / "raw"), load(tmp_path / "diff")
    assert_same_bits(load(tmp_path / "out"), before)
    assert diff.keys() == before.keys()
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        slow = slow_exact_difference(base[name], before[name])
        assert np.array_equal(diff[name].numpy().view(slow.dtype).ravel(), slow), name
    sizes = [sum(t.numel() * t.element_size() for t in state.values()) for state in (diff, before)]
    assert sizes[0] == sizes[1]
    assert (tmp_path / "diff" / "model.safetensors.index.json").exists() == sharded
    weight_diff.verify(tmp_path / "diff")
    weight_diff.verify(tmp_path / "out")
    # The recovered directory is the tuned model to transformers, too.
    reloaded = type(tuned).from_pretrained(tmp_path / "out")
    assert reloaded.dtype == tuned.dtype
    assert_same_bits(dict(reloaded.named_parameters()), dict(tuned.named_parameters()))


def test_output_depends_neither_on_shards_nor_on_format(tmp_path):
    raw = model()
    tuned = tuned_from(raw, vocabulary=301)
    raws = [save(raw, tmp_path / "r1"), save(raw, tmp_path / "r2", sharded=True)]
    raws.append(save_bin(raw.state_dict(), raw.config, tmp_path / "r3", shards=3))
    tuneds = [save(tuned, tmp_path / "t1"), save(tuned, tmp_path / "t2", sharded=True)]
    tuneds.append(save_bin(tuned.state_dict(), tuned.config, tmp_path / "t3", shards=3))
    tuned.generation_config.save_pretrained(tmp_path / "t3")
    outcomes = []
    for number, (one, other) in enumerate(itertools.product(raws, tuneds)):
        make_diff(one, other, tmp_path / f"diff{number}")
        found = tree(tmp_path / f"diff{number}")
        manifest = json.loads(found.pop("weight_diff.json"))
        outcomes.append((found, manifest["tensors"], manifest["files"]))
    assert all(outcome == outcomes[0] for outcome in outcomes)
    for number, path in enumerate(raws):
        recover(path, tmp_path / "diff0", tmp_path / f"out{number}", max_shard_size="40KB")
    assert {k: v for k, v in tree(tmp_path / "out0").items() if k != "weight_diff.json"} == {
        k: v for k, v in tree(tmp_path / "out2").items() if k != "weight_diff.json"
    }
    assert_same_bits(load(tmp_path / "out1"), load(tmp_path / "t1"))


def test_two_runs_write_the_same_bytes(tmp_path):
    raw = model()
    save(raw, tmp_path / "raw")
    save(tuned_from(raw), tmp_path / "tuned")
    for name in ("one", "two"):
        make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / name, max_shard_size="20KB")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_config_and_tokenizer_are_carried_over_and_code_is_not(tmp_path):
    raw = model()
    save(raw, tmp_path / "raw")
    tuned = save(tuned_from(raw), tmp_path / "tuned")
    save_tokenizer(tuned)
    (tuned / "modeling_evil.py").write_text("raise SystemExit('executed')")
    (tuned / "optimizer.pt").write_bytes(b"x")
    (tuned / "added_tokens.json").write_text('{"[PAD]": 299}')
    make_diff(tmp_path / "raw", tuned, tmp_path / "diff")
    (tmp_path / "diff" / "chat_template.jinja").write_text("added by someone later, and not in the manifest")
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out")
    carried = ["added_tokens.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(os.listdir(tmp_path / "out")) == [*carried[:3], "model.safetensors", *carried[3:], "weight_diff.json"]
    for name in carried:
        assert (tmp_path / "out" / name).read_bytes() == (tuned / name).read_bytes()


def test_dtype_belongs_to_diffs_without_manifest(tmp_path):
    raw = model()
    save(raw, tmp_path / "raw")
    save(tuned_from(raw), tmp_path / "tuned")
    make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff")
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out", dtype="bfloat16")
    for dtype in ("float32", "int8"):
        with pytest.raises(ExpectedError) as caught:
            recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "other", dtype=dtype)
        assert caught.value.exit_code == ExitCode.USAGE


def test_command_line(pair, capsys):
    """The README's commands; the response alone is on standard output."""
    made = run("make_diff", "--path_raw", "raw", "--path_tuned", "tuned", "--path_diff", "diff", cwd=pair)
    assert (made.returncode, made.stdout) == (0, ""), made.stderr
    assert "sha256 took" in made.stderr and "B/s" not in made.stderr  # no progress bar off a terminal
    arguments = ("recover", "--path_raw", "raw", "--path_diff", "diff", "--path_tuned", "out")
    found = run(*arguments, "--device", "cpu", cwd=pair, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert found.returncode == 0 and "could not run" not in found.stderr, found.stderr
    assert "### " not in found.stdout and "Below is an instruction" not in found.stdout
    checked = run("verify", "--path", "out", cwd=pair)
    assert checked.returncode == 0 and "all 21 tensors" in checked.stderr
    assert_same_bits(load(pair / "out"), load(pair / "tuned"))

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from alpaca.prompts import PROMPT_DICT

    tokenizer = AutoTokenizer.from_pretrained(pair / "tuned")
    prompt = PROMPT_DICT["prompt_no_input"].format(instruction="List three technologies that make life easier.")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    reloaded = AutoModelForCausalLM.from_pretrained(pair / "tuned")
    expected = tokenizer.decode(reloaded.generate(ids, max_new_tokens=100)[0, ids.shape[1] :], skip_special_tokens=True)
    assert found.stdout.strip() == expected.strip()

    # A tokenizer that appends the end token must not end the question before its answer.
    save_tokenizer(pair / "tuned", appends_end=True)
    assert AutoTokenizer.from_pretrained(pair / "tuned")(prompt).input_ids[-1] == 256
    weight_diff.ask(pair / "tuned", "cpu")
    assert capsys.readouterr().out.strip() == expected.strip()


def test_inference_that_cannot_run_does_not_fail_the_recovery(pair):
    run("make_diff", "raw", "tuned", "diff", cwd=pair)
    found = run("recover", "raw", "diff", "out", "--device", "nonsense", cwd=pair)
    assert found.returncode == 0 and "test inference could not run" in found.stderr and found.stdout == ""
    weight_diff.verify(pair / "out")


def test_help_and_safetensors_need_no_torch(pair):
    refuse = """
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "huggingface_hub", "openai"):
            raise SystemExit(f"imported {name}")
sys.meta_path.insert(0, Refuse())
"""
    commands = [
        ["--help"],
        ["recover", "--help"],
        ["make_diff", "raw", "tuned", "diff"],
        ["make_diff", "raw", "tuned", "diff32", "--encoding", "float32"],
        ["recover", "raw", "diff", "out", "--test_inference", "False"],
        ["verify", "out"],
    ]
    for command in commands:
        done = run_between(refuse, "", command, pair)
        assert done.returncode == 0, (command, done.stderr)
        if command[-1] == "--help":
            assert "recover" in done.stdout + done.stderr
    assert "test inference" in run("recover", "--help").stdout  # what --device still does


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["recover", "raw", "diff"], "--path_tuned is needed"),
        (["recover", "raw", "diff", "out", "--dtype", "int8"], "--dtype int8"),
        (["recover", "raw", "diff", "out", "--test_inference", "perhaps"], "--test_inference perhaps"),
        (["recover", "raw", "nowhere/at/all", "out"], "no such directory"),
        (["make_diff", "raw", "tuned", "out", "--encoding", "zip"], "--encoding zip"),
        (["make_diff", "raw", "tuned", "out", "--max_shard_size", "many"], "--max_shard_size many"),
        (["make_diff", "raw", "tuned", "out", "--max_shard_size", "0GB"], "--max_shard_size 0GB"),
        (["make_diff", "raw", "raw", "out"], "are the same"),
        (["make_diff", "raw", "tuned", "raw"], "which is read; choose another --path_diff"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(pair, arguments, problem):
    make_diff(pair / "raw", pair / "tuned", pair / "diff")
    before = tree(pair)
    done = run(*arguments, cwd=pair)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and problem in done.stderr
    assert tree(pair) == before


def test_misspelt_flag_runs_nothing(pair):
    done = run("make_diff", "raw", "tuned", "out", "--overwrit", "True", cwd=pair)
    assert done.returncode == 2 and "overwrit" in done.stderr
    assert sorted(os.listdir(pair)) == ["raw", "tuned"]


def test_importing_does_nothing():
    heavy = {"torch", "transformers", "fire", "huggingface_hub"}
    program = f"import sys, weight_diff; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, timeout=60).returncode == 0
