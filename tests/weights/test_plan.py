"""Which tensor belongs to which, and what does not fit."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import weight_diff
from alpaca.common import ExitCode, ExpectedError
from tests.weights.tiny_checkpoints import (
    DTYPES,
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

ROTARY = 1.0 / (10000 ** (torch.arange(0, 8, 2).float() / 8))  # heads of 8


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


def by_2023(base, diff):
    """recover of 2023, whose state dicts held rotary buffers, computed where a file lacks them."""
    sums = {}
    for name, tensor in diff.items():
        raw = base[name].float() if name in base else ROTARY
        if len(raw) < len(tensor):
            raw = torch.cat([raw, raw.mean(dim=0, keepdim=True).expand(len(tensor) - len(raw), -1)])
        sums[name] = tensor + raw
    return sums


@pytest.mark.parametrize("raw_has", [False, True])
@pytest.mark.parametrize("tuned_has", [False, True])
def test_the_arithmetic_of_2023_recovers_a_float32_diff(tmp_path, raw_has, tuned_has):
    """Tensor by tensor, rotary buffers included: stored as differences, zeros where one side lacks them."""
    raw = model(torch.float16)
    save(raw, tmp_path / "raw")
    save(tuned_from(raw, torch.float16, vocabulary=302), tmp_path / "tuned")
    buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": ROTARY.clone() for n in range(2)}
    plain = {name: load(tmp_path / name) for name in ("raw", "tuned")}
    for name, has in (("raw", raw_has), ("tuned", tuned_has)):
        if has:
            save_file({**plain[name], **buffers}, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff", encoding="float32")
    base, tuned, diff = (load(tmp_path / name) for name in ("raw", "tuned", "diff"))
    found = by_2023(base, diff)  # float32, and the tuned model's bits in its own type
    known = buffers if raw_has or tuned_has else {}
    assert_same_bits({n: t if n in buffers else t.half() for n, t in found.items()}, plain["tuned"] | known)
    assert all(tensor.dtype == torch.float32 for tensor in diff.values())
    for name in buffers if raw_has or tuned_has else ():
        assert torch.equal(diff[name], torch.zeros(4))
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out")
    assert_same_bits(load(tmp_path / "out"), tuned)
    weight_diff.verify(tmp_path / "diff")
    save_file(plain["raw"], tmp_path / "raw" / "model.safetensors", metadata={"format": "pt"})  # a newer copy
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out2")
    assert_same_bits(load(tmp_path / "out2"), tuned)
    (tmp_path / "diff" / "weight_diff.json").unlink()  # and our reading of a diff of 2023
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out3", dtype="float32")
    assert_same_bits(load(tmp_path / "out3"), found)


def test_rotary_buffers_that_differ_and_those_of_no_known_size(tmp_path, capsys):
    """A difference where both have one; whole where the base lacks it and the config does not give its size."""
    raw = model()
    save(raw, tmp_path / "raw")
    tuned = save(tuned_from(raw), tmp_path / "tuned")
    names = [f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in range(2)]
    mine, theirs = {names[0]: torch.rand(4), names[1]: torch.rand(6)}, {names[0]: torch.rand(4)}
    for place, buffers in ((tmp_path / "raw", theirs), (tuned, mine)):
        save_file(load(place) | buffers, place / "model.safetensors", metadata={"format": "pt"})
    make_diff(tmp_path / "raw", tuned, tmp_path / "diff", encoding="float32")
    assert f"lacks {names[1]}; stored whole" in capsys.readouterr().err
    diff = load(tmp_path / "diff")
    assert torch.equal(diff[names[0]], mine[names[0]] - theirs[names[0]]) and torch.equal(
        diff[names[1]], mine[names[1]]
    )
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out")
    after = load(tmp_path / "out")
    assert torch.equal(after[names[1]], mine[names[1]])
    assert (after[names[0]] - mine[names[0]]).abs().max() < 1e-6


def test_wrong_base(place):
    save(model(seed=5), place / "other")
    message = assert_refused(place, raw="other", codes=[ExitCode.INTEGRITY], names=["wrong or damaged base"])
    assert "in 21 of 21 tensors: lm_head.weight in" in message and message.endswith("; and 18 more")
    assert str(place / "other" / "model.safetensors") in message and len(message) < 500


def test_one_changed_bit_in_the_base_names_its_tensor(place):
    def change(state):
        state["model.layers.1.mlp.up_proj.weight"].view(torch.int16)[3, 4] ^= 1

    edit(place / "raw" / "model.safetensors", change)
    message = assert_refused(place, codes=[ExitCode.INTEGRITY], names=["model.layers.1.mlp.up_proj.weight"])
    assert "down_proj" not in message


@pytest.mark.parametrize("encoding", weight_diff.ENCODINGS)
@pytest.mark.parametrize(("published", "copy"), list(itertools.permutations(DTYPES, 2)))
def test_base_in_another_type(tmp_path, published, copy, encoding):
    """Accepted where the cast to the type that the diff was made from gives the same bits; else the type is named."""
    original = model(DTYPES[published])
    save(original, tmp_path / "raw")
    save(tuned_from(original, torch.float32, vocabulary=301), tmp_path / "tuned")
    make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff", encoding=encoding)
    make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "unsummed", encoding=encoding, verify=False)
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "expected")
    kind = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
    save(original.to(DTYPES[copy]), tmp_path / "copy")  # widened or rounded, as such copies are
    if copy == "fp32":
        recover(tmp_path / "copy", tmp_path / "diff", tmp_path / "out")
        assert_same_bits(load(tmp_path / "out"), load(tmp_path / "expected"))
        shutil.rmtree(tmp_path / "out")
    else:
        names = ["not in its own type", f"here {kind[copy]}", f"get the base in {kind[published]}", " tensors: "]
        assert_refused(tmp_path, raw="copy", codes=[ExitCode.INTEGRITY], names=names)
    for diff, options in (("diff", {"verify": False}), ("unsummed", {})):
        names = ["without sha256 sums", kind[copy], kind[published]]
        assert_refused(tmp_path, raw="copy", diff=diff, codes=[ExitCode.INTEGRITY], names=names, **options)


def test_base_in_the_type_that_it_was_published_in_and_trained_from(place):
    """A float32 model that rounds to the published bfloat16 one, and one that does not."""
    save(model(torch.float32), place / "wider")
    recover(place / "wider", place / "diff", place / "out")
    assert_same_bits(load(place / "out"), load(place / "tuned"))
    shutil.rmtree(place / "out")
    save(model(torch.float32, seed=5), place / "other")
    assert_refused(place, raw="other", codes=[ExitCode.INTEGRITY], names=["here F32", "get the base in BF16"])


@pytest.mark.parametrize("encoding", weight_diff.ENCODINGS)
def test_fewer_rows_than_the_base(tmp_path, encoding):
    """What the resize of 2023 leaves of a base whose embedding is larger than its tokenizer: 4,096 rows → 4,001."""
    raw = model(vocabulary=4096)
    tuned = model(torch.float32, vocabulary=4001, seed=1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            base = raw.state_dict()[name].float()
            parameter.copy_(base[: len(parameter)] + 0.001 * parameter)
    save(raw, tmp_path / "raw")
    save(tuned.to(torch.bfloat16), tmp_path / "tuned")
    make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff", encoding=encoding)
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out")
    before, base, diff = (load(tmp_path / name) for name in ("tuned", "raw", "diff"))
    assert before["lm_head.weight"].shape == (4001, 32)
    assert_same_bits(load(tmp_path / "out"), before)
    for name, tensor in before.items():
        if encoding == "float32":
            assert torch.equal(diff[name], tensor.float() - base[name][: len(tensor)].float())
    (tmp_path / "diff" / "weight_diff.json").unlink()
    if encoding == "float32":  # a diff of 2023 with fewer rows
        recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "bare", dtype="bfloat16")
        assert_same_bits(load(tmp_path / "bare"), before)
    state = load(tmp_path / "raw")  # rows that nobody needs, changed: the rest is recovered to the bit
    state["lm_head.weight"][4050] += 1
    make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "again", encoding=encoding)
    save_file(state, tmp_path / "raw" / "model.safetensors", metadata={"format": "pt"})
    recover(tmp_path / "raw", tmp_path / "again", tmp_path / "unneeded")
    assert_same_bits(load(tmp_path / "unneeded"), before)
    shutil.rmtree(tmp_path / "out")
    state["lm_head.weight"][4000] += 1
    save_file(state, tmp_path / "raw" / "model.safetensors", metadata={"format": "pt"})
    assert_refused(tmp_path, diff="again", codes=[ExitCode.INTEGRITY], names=["lm_head.weight"])


def test_rows_that_no_config_explains_are_refused(tmp_path):
    raw = model(vocabulary=400)
    save(raw, tmp_path / "raw")
    tuned = save(tuned_from(model(vocabulary=300)), tmp_path / "tuned")
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"vocab_size": 301}))
    with pytest.raises(ExpectedError, match=r"2 tensors do not; wrong base\? lm_head\.weight.*\[300, 32\]"):
        make_diff(tmp_path / "raw", tuned, tmp_path / "diff")


@pytest.mark.parametrize("added_rows", [None, "mean", "zero", "whole"])
def test_added_rows_of_a_diff_without_manifest(place, capsys, added_rows):
    """Rows that the base lacks: differences from its mean row (2023), or the rows themselves (Vicuna v0)."""
    before, diff = load(place / "tuned"), load(place / "old")
    if added_rows in ("zero", "whole"):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            diff[name] = torch.cat([diff[name][:300], before[name][300:].float()])
        assert not torch.equal(diff["lm_head.weight"], load(place / "old")["lm_head.weight"])
        for file in (place / "old").glob("*.bin*"):
            file.unlink()
        save_file(diff, place / "old" / "model.safetensors")
    recover(place / "raw", place / "old", place / "out", dtype="bfloat16", added_rows=added_rows)
    assert_same_bits(load(place / "out"), before)
    said = capsys.readouterr().err
    assert "1 in lm_head.weight" in said and "1 in model.embed_tokens.weight" in said
    assert ("from the base's mean row" in said) == (added_rows in (None, "mean"))
    assert ("--added_rows zero or whole" in said) == (added_rows is None)
    assert ("the rows themselves" in said) == (added_rows in ("zero", "whole"))


def test_added_rows_are_known_where_there_is_a_manifest(place, capsys):
    with pytest.raises(ExpectedError, match=r"weight_diff\.json knows") as caught:
        recover(place / "raw", place / "diff", place / "out", added_rows="zero")
    assert caught.value.exit_code == ExitCode.USAGE
    with pytest.raises(ExpectedError, match="--added_rows none: one of mean, zero, whole") as caught:
        recover(place / "raw", place / "old", place / "out", added_rows="none")
    assert caught.value.exit_code == ExitCode.USAGE
    recover(place / "raw", place / "diff", place / "out")
    assert "rows that the base lacks" not in capsys.readouterr().err


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
        place, raw="other", diff=diff, codes=[ExitCode.INTEGRITY], names=["21 tensors", f"[{hidden}]", "and 18 more"]
    )


@pytest.mark.parametrize("encoding", weight_diff.ENCODINGS)
def test_make_diff_counts_what_does_not_fit_and_names_three(place, encoding):
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
    for name in ("4 tensors", "0.mlp.up_proj", "1.input_layernorm", "1.mlp.up_proj", "I32", "; and 1 more"):
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
