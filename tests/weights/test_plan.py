"""Which tensor belongs to which, and what does not fit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import weight_diff
from alpaca.common import ExitCode, ExpectedError
from tests.weights.tiny_checkpoints import (
    assert_refused,
    assert_same_bits,
    bits,
    edit,
    load,
    make_diff,
    model,
    recover,
    save,
    save_bin,
    tuned_from,
)


@pytest.mark.parametrize("twice", ["raw", "tuned", "both", "neither"])
def test_tied_weights_are_kept_once(tmp_path, capsys, twice):
    raw = model(tied=True)
    tuned = tuned_from(raw)
    for name, built in (("raw", raw), ("tuned", tuned)):
        state = dict(built.state_dict())  # holds the head and the embedding
        if twice not in (name, "both"):
            del state["lm_head.weight"]
        save_bin(state, built.config, tmp_path / name)
    make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff")
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out")
    assert "lm_head.weight" not in load(tmp_path / "diff")
    expected = {name: tensor for name, tensor in tuned.state_dict().items() if name != "lm_head.weight"}
    assert_same_bits(load(tmp_path / "out"), expected)
    assert ("stored twice" in capsys.readouterr().err) == (twice in ("tuned", "both"))


@pytest.mark.parametrize("encoding", weight_diff.ENCODINGS)
def test_untied_head_on_a_tied_base(tmp_path, capsys, encoding):
    raw = model(tied=True)
    tuned = model(tied=False, seed=1)
    save(raw, tmp_path / "raw")
    save(tuned, tmp_path / "tuned")
    save_bin(raw.state_dict(), raw.config, tmp_path / "raw_twice")
    for base, name in ((tmp_path / "raw", "once"), (tmp_path / "raw_twice", "twice")):
        make_diff(base, tmp_path / "tuned", tmp_path / name, encoding=encoding)
    assert_same_bits(load(tmp_path / "once"), load(tmp_path / "twice"))
    for base in ("raw", "raw_twice"):
        recover(tmp_path / base, tmp_path / "once", tmp_path / f"out_{base}")
        assert_same_bits(load(tmp_path / f"out_{base}"), load(tmp_path / "tuned"))
    head = load(tmp_path / "once")["lm_head.weight"]
    if encoding == "exact":
        assert torch.equal(head, bits(tuned.lm_head.weight))
        assert "lacks lm_head.weight; stored whole" in capsys.readouterr().err
    else:  # 2023: the base's head is its embedding
        assert torch.equal(head, tuned.lm_head.weight.float() - raw.model.embed_tokens.weight.float())


def test_tensors_that_the_base_lacks_are_stored_whole(tmp_path, capsys):
    raw = model()
    save(raw, tmp_path / "raw")
    tuned = save(tuned_from(raw), tmp_path / "tuned")
    state = load(tuned)
    state["model.layers.0.mlp.up_proj.bias"] = torch.randn(64).to(torch.float16)
    state["steps"] = torch.tensor(7)  # int64, no dimensions
    state["mask"] = torch.tensor([True, False, True])
    state["empty"] = torch.empty(0, 4)
    save_file(state, tuned / "model.safetensors", metadata={"format": "pt"})
    for encoding in weight_diff.ENCODINGS:
        make_diff(tmp_path / "raw", tuned, tmp_path / encoding, encoding=encoding)
        recover(tmp_path / "raw", tmp_path / encoding, tmp_path / f"out_{encoding}")
        assert_same_bits(load(tmp_path / f"out_{encoding}"), state)
    assert "model.layers.0.mlp.up_proj.bias" in capsys.readouterr().err
    assert torch.equal(
        load(tmp_path / "exact")["model.layers.0.mlp.up_proj.bias"], bits(state["model.layers.0.mlp.up_proj.bias"])
    )


@pytest.mark.parametrize("bare", ["raw", "tuned"])
def test_model_prefix(tmp_path, capsys, bare):
    raw = model()
    tuned = tuned_from(raw)
    for name, built in (("raw", raw), ("tuned", tuned)):
        (built.model if name == bare else built).save_pretrained(tmp_path / name)
    if bare == "tuned":  # a bare tuned model has no head: the base's is needed for nothing
        state = {k: v for k, v in load(tmp_path / "raw").items() if k != "lm_head.weight"}
        save_file(state, tmp_path / "raw" / "model.safetensors", metadata={"format": "pt"})
    make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff")
    assert "prefix `model.`" in capsys.readouterr().err
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out")
    assert_same_bits(load(tmp_path / "out"), load(tmp_path / "tuned"))
    difference = load(tmp_path / "diff")
    assert len(torch.unique(difference[next(name for name in difference if "up_proj" in name)])) > 10


@pytest.mark.parametrize("raw_has", [False, True])
@pytest.mark.parametrize("tuned_has", [False, True])
def test_rotary_buffers_of_old_checkpoints(tmp_path, capsys, raw_has, tuned_has):
    raw = model()
    save(raw, tmp_path / "raw")
    tuned = save(tuned_from(raw), tmp_path / "tuned")
    plain = {name: load(tmp_path / name) for name in ("raw", "tuned")}
    buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.rand(4) for n in range(2)}
    for name, has in (("raw", raw_has), ("tuned", tuned_has)):
        if has:
            save_file({**plain[name], **buffers}, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    make_diff(tmp_path / "raw", tuned, tmp_path / "diff")
    assert ("inv_freq" in capsys.readouterr().err) == (raw_has or tuned_has)
    save_file(plain["raw"], tmp_path / "raw" / "model.safetensors", metadata={"format": "pt"})  # a newer copy
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out")
    assert_same_bits(load(tmp_path / "out"), load(tuned))


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
    make_diff(place / "raw", place / "tuned2", place / "diff2", encoding="float32")
    (place / "diff2" / "weight_diff.json").unlink()
    assert_refused(place, raw="diff2", diff="raw", codes=[ExitCode.INTEGRITY], names=["swapped"])
    recover(place / "raw", place / "diff2", place / "out", dtype="bfloat16")
    assert_same_bits(load(place / "out"), load(place / "tuned2"))


def test_a_recovered_model_as_diff_and_a_diff_as_model(place):
    recover(place / "raw", place / "diff", place / "again")
    assert_refused(place, diff="again", codes=[ExitCode.INTEGRITY], names=["swapped"])
    for pair in (("diff", "tuned"), ("raw", "diff")):
        with pytest.raises(ExpectedError, match="swapped") as caught:
            make_diff(*(place / name for name in pair), place / "out")
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
        make_diff(place / "raw", place / "one", place / "out", encoding=encoding)
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
        make_diff(place / "raw", place / "one", place / "out")


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
