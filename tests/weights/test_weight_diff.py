"""weight_diff: round trips to the bit, key differences, the 2023 form and release, the command line."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import weight_diff
from alpaca.common import ExitCode, ExpectedError
from alpaca.weights import alpaca_7b, arithmetic
from alpaca.weights.files import Checkpoint
from tests.weights.tiny_checkpoints import (
    ROOT,
    SCRIPT,
    assert_same_bits,
    bits,
    load,
    model,
    run,
    save,
    save_bin,
    save_holes,
    save_tokenizer,
    tree,
    tuned_from,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def make_diff(raw, tuned, diff, **options):
    weight_diff.make_diff(str(raw), str(tuned), str(diff), **options)


def recover(raw, diff, out, **options):
    weight_diff.recover(str(raw), str(diff), str(out), **{"test_inference": False, **options})


def slow_exact_difference(raw, tuned):
    """Python integers, an element at a time: (tuned bits − bits of raw cast to tuned's type) mod 2^width."""
    width = 8 * tuned.element_size()
    base = bits(raw.to(tuned.dtype)).flatten().tolist()
    base += [0] * (tuned.numel() - len(base))
    words = [(t - r) % 2**width for t, r in zip(bits(tuned).flatten().tolist(), base, strict=True)]
    return np.array(words, dtype=f"uint{width}")


# ---------------------------------------------------------------------------------------------------------------------
# Round trips


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


@pytest.mark.parametrize(("raw_type", "tuned_type"), list(itertools.permutations(DTYPES, 2)))
def test_base_of_another_type_is_cast_first(tmp_path, raw_type, tuned_type):
    raw = model(DTYPES[raw_type])
    save(raw, tmp_path / "raw")
    save(tuned_from(raw, DTYPES[tuned_type]), tmp_path / "tuned")
    make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff")
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out")
    assert_same_bits(load(tmp_path / "out"), load(tmp_path / "tuned"))
    base, tuned, diff = (
        load(tmp_path / name)["model.layers.0.mlp.up_proj.weight"] for name in ("raw", "tuned", "diff")
    )
    slow = slow_exact_difference(base, tuned)
    assert np.array_equal(diff.numpy().view(slow.dtype).ravel(), slow)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_nans_and_signed_zeros_come_back(tmp_path, dtype):
    raw = model(DTYPES[dtype])
    tuned = tuned_from(raw)
    strange = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0, 0.0, 1e-40, 6e-8])
    with torch.no_grad():
        tuned.model.norm.weight[:7] = strange
        raw.model.norm.weight[3:10] = strange
        raw.model.layers[0].input_layernorm.weight[:7] = strange
    save(raw, tmp_path / "raw")
    save(tuned, tmp_path / "tuned")
    for encoding in weight_diff.ENCODINGS:
        make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / encoding, encoding=encoding)
        recover(tmp_path / "raw", tmp_path / encoding, tmp_path / f"out_{encoding}")
    assert_same_bits(load(tmp_path / "out_exact"), load(tmp_path / "tuned"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_casts_are_those_of_torch(dtype):
    values = torch.cat([torch.randn(20_000), torch.randn(20_000) * 1e-6, torch.randn(20_000) * 1e5])
    values = torch.cat([values, torch.randint(-(2**31), 2**31 - 1, (20_000,), dtype=torch.int32).view(torch.float32)])
    values = values[~values.isnan()]
    kind = weight_diff.DTYPES[{"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]]
    words = arithmetic.from_float32(values.numpy(), kind)
    cast = values.to(DTYPES[dtype])
    assert np.array_equal(words, bits(cast).numpy().view(words.dtype))
    assert np.array_equal(arithmetic.to_float32(words, kind), cast.float().numpy())


def test_output_depends_neither_on_shards_nor_on_format(tmp_path):
    raw = model()
    tuned = tuned_from(raw, vocabulary=301)
    raws = [save(raw, tmp_path / "r1"), save(raw, tmp_path / "r2", sharded=True)]
    raws += [save_bin(raw.state_dict(), raw.config, tmp_path / f"r{n}", shards=n) for n in (3, 1)[:1]]
    tuneds = [save(tuned, tmp_path / "t1"), save(tuned, tmp_path / "t2", sharded=True)]
    tuneds += [save_bin(tuned.state_dict(), tuned.config, tmp_path / f"t{n}", shards=n) for n in (3,)]
    for path in tuneds[2:]:
        tuned.generation_config.save_pretrained(path)
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


def test_small_chunks_give_the_same_bytes(tmp_path, monkeypatch):
    """Chunk borders fall inside rows, inside mean rows, and on them."""
    raw = model()
    save(raw, tmp_path / "raw")
    save(tuned_from(raw, vocabulary=303), tmp_path / "tuned")
    results = []
    for chunk in (2**20, 7, 32):
        monkeypatch.setattr("alpaca.weights.work.PIECE", chunk)
        for encoding in weight_diff.ENCODINGS:
            diff, out = tmp_path / f"{encoding}{chunk}", tmp_path / f"out_{encoding}{chunk}"
            make_diff(tmp_path / "raw", tmp_path / "tuned", diff, encoding=encoding)
            recover(tmp_path / "raw", diff, out)
            results.append({encoding: (tree(diff), tree(out))})
    assert results[0] == results[2] == results[4] and results[1] == results[3] == results[5]


# ---------------------------------------------------------------------------------------------------------------------
# What goes with the weights, and what the two sides may differ in


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


def test_manifest_describes_every_tensor(tmp_path):
    import hashlib

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


def test_float32_encoding_is_the_form_of_2023(tmp_path, capsys):
    """Differences in float32, new rows against the mean row; 16-bit models come back, float32 ones nearly."""
    for dtype, exact in ((torch.bfloat16, True), (torch.float16, True), (torch.float32, False)):
        place = tmp_path / str(dtype)
        raw = model(torch.float16)
        tuned = tuned_from(raw, dtype, vocabulary=302)
        save(raw, place / "raw")
        save(tuned, place / "tuned")
        make_diff(place / "raw", place / "tuned", place / "diff", encoding="float32")
        assert ("will not come back bit for bit" in capsys.readouterr().err) == (not exact)
        base, before, diff = (load(place / name) for name in ("raw", "tuned", "diff"))
        for name, tensor in before.items():
            values = base[name].float()
            if tensor.shape[0] == 302:
                values = torch.cat([values, values.mean(dim=0, keepdim=True).expand(2, -1)])
            assert torch.equal(diff[name], tensor.float() - values), name
        recover(place / "raw", place / "diff", place / "out")
        after = load(place / "out")
        if exact:
            assert_same_bits(after, before)
        else:
            assert all((after[name] - before[name]).abs().max() < 1e-7 for name in before)
            assert not all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(("rows", "row"), [(100, 64), (32_000, 64), (5000, 128), (17, 32), (257, 1024), (70_000, 32)])
def test_mean_row_has_the_bits_of_torch(tmp_path, rows, row):
    embedding = torch.randn(rows, row, generator=torch.Generator().manual_seed(rows)).to(torch.float16)
    save_file({"model.embed_tokens.weight": embedding}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint(tmp_path) as checkpoint:
        mean = arithmetic.mean_of_rows(checkpoint, "model.embed_tokens.weight")
    assert np.array_equal(mean, embedding.float().mean(dim=0).numpy())


# ---------------------------------------------------------------------------------------------------------------------
# The 2023 release, small: same names, three .bin shards, one row more than the base


ROTARY = 1.0 / (10000 ** (torch.arange(0, 16, 2).float() / 16))  # heads of 16


def release(tmp_path, raw_has, diff_has, raw_bin):
    """Base and diff on disk, and the state dict and sum that the 2023 method gets from them."""
    raw, tuned = model(torch.float16, hidden=64), None
    tuned = tuned_from(raw, torch.float32, vocabulary=301)
    base = {name: tensor.float() for name, tensor in raw.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        base[name] = torch.cat([base[name], base[name].mean(dim=0, keepdim=True)])
    diff = {name: tensor - base[name] for name, tensor in tuned.state_dict().items()}
    recovered = {name: tensor + base[name] for name, tensor in diff.items()}
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": ROTARY.clone() for layer in range(2)}
    if diff_has:
        diff |= {name: torch.zeros(8) for name in buffers}
        recovered |= buffers
    raw_state = raw.state_dict() | (buffers if raw_has else {})
    if raw_bin:
        save_bin(raw_state, raw.config, tmp_path / "raw", shards=2)
    else:
        save(raw, tmp_path / "raw")
        save_file({k: v.clone() for k, v in raw_state.items()}, tmp_path / "raw" / "model.safetensors")
    save_bin(diff, tuned.config, tmp_path / "diff", shards=3)
    order = ["model.embed_tokens.weight"]
    for layer in range(2):
        for part in (
            "self_attn.q_proj.weight",
            "self_attn.k_proj.weight",
            "self_attn.v_proj.weight",
            "self_attn.o_proj.weight",
            "self_attn.rotary_emb.inv_freq",
            "mlp.gate_proj.weight",
            "mlp.down_proj.weight",
            "mlp.up_proj.weight",
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
        ):
            order.append(f"model.layers.{layer}.{part}")
    state = recovered | buffers
    total = sum(state[name].sum() for name in [*order, "model.norm.weight", "lm_head.weight"])
    return recovered, float(total)


def pretend_release(monkeypatch, total):
    """The release's config and sum, at the size of these tests."""
    small = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 301}
    monkeypatch.setattr(alpaca_7b, "CONFIG", small)
    monkeypatch.setattr(alpaca_7b, "SUM", total)


@pytest.mark.parametrize("raw_bin", [False, True], ids=["raw_safetensors", "raw_bin"])
@pytest.mark.parametrize("diff_has", [False, True], ids=["diff_plain", "diff_rotary"])
@pytest.mark.parametrize("raw_has", [False, True], ids=["raw_plain", "raw_rotary"])
def test_release_of_2023(tmp_path, monkeypatch, capsys, raw_has, diff_has, raw_bin):
    recovered, total = release(tmp_path, raw_has, diff_has, raw_bin)
    pretend_release(monkeypatch, total)
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out")
    said = capsys.readouterr().err
    assert "sum up to Alpaca-7B's" in said and "does not see" in said
    assert_same_bits(load(tmp_path / "out"), recovered)
    assert "float32" in json.loads((tmp_path / "out" / "config.json").read_text()).values()
    weight_diff.verify(tmp_path / "out")

    # A wrong base: the sum tells, and nothing is left.
    state = load(tmp_path / "raw")
    state["model.norm.weight"] = state["model.norm.weight"] + 0.5
    for file in [*(tmp_path / "raw").glob("*.bin*"), *(tmp_path / "raw").glob("*.safetensors")]:
        file.unlink()
    save_file(state, tmp_path / "raw" / "model.safetensors")
    with pytest.raises(ExpectedError, match="sum up to") as caught:
        recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "wrong")
    assert caught.value.exit_code == ExitCode.INTEGRITY
    assert sorted(os.listdir(tmp_path)) == ["diff", "out", "raw"]
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "unchecked", check_integrity_naively=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_release_in_other_types(tmp_path, monkeypatch, dtype):
    recovered, total = release(tmp_path, raw_has=True, diff_has=True, raw_bin=True)
    pretend_release(monkeypatch, total)  # the sum is taken before rounding
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out", dtype=dtype)
    assert_same_bits(load(tmp_path / "out"), {k: v.to(getattr(torch, dtype)) for k, v in recovered.items()})
    from transformers import LlamaForCausalLM

    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)


def test_other_diffs_without_manifest_have_nothing_to_check_against(tmp_path, capsys):
    recovered, _ = release(tmp_path, raw_has=False, diff_has=False, raw_bin=False)
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out")
    said = capsys.readouterr().err
    assert "nothing to check" in said and "Alpaca" not in said
    assert_same_bits(load(tmp_path / "out"), recovered)


def test_diff_without_manifest_in_safetensors_needs_no_torch_and_gives_the_same(tmp_path):
    recovered, _ = release(tmp_path, raw_has=False, diff_has=True, raw_bin=False)
    state = load(tmp_path / "diff")
    for file in (tmp_path / "diff").glob("*.bin*"):
        file.unlink()
    save_file(state, tmp_path / "diff" / "model.safetensors")
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out")
    assert_same_bits(load(tmp_path / "out"), recovered)


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


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture
def pair(tmp_path):
    raw = model()
    save(raw, tmp_path / "raw")
    save_tokenizer(save(tuned_from(raw), tmp_path / "tuned"))
    return tmp_path


def test_command_line(pair):
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


def test_inference_that_cannot_run_does_not_fail_the_recovery(pair):
    run("make_diff", "raw", "tuned", "diff", cwd=pair)
    found = run("recover", "raw", "diff", "out", "--device", "nonsense", cwd=pair)
    assert found.returncode == 0 and "test inference could not run" in found.stderr and found.stdout == ""
    weight_diff.verify(pair / "out")


def test_help_and_safetensors_need_no_torch(pair):
    program = f"""
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "huggingface_hub", "openai"):
            raise SystemExit(f"imported {{name}}")
sys.meta_path.insert(0, Refuse())
sys.argv = ["weight_diff.py", *sys.argv[1:]]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
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
        done = subprocess.run(
            [sys.executable, "-c", program, *command],
            cwd=pair,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
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
        (["make_diff", "raw", "tuned", "raw"], "is or holds --path_raw"),
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


def test_memory_does_not_grow_with_the_model(tmp_path):
    """0.8 GB of inputs; the bound is the promised 400 MiB."""
    for name in ("raw", "tuned"):
        sizes = {f"model.layers.{n}.w": 2**24 for n in range(4)} | {"model.embed_tokens.weight": 2**27}
        save_holes(tmp_path / name, sizes)
    # getrusage would count the memory of the process that forked; VmHWM (KiB) is the program's own.
    program = f"""
import re, runpy, sys
sys.argv = ["weight_diff.py", *sys.argv[1:]]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""
    peaks = []
    for command in (
        ["make_diff", "raw", "tuned", "diff"],
        ["recover", "raw", "diff", "out", "--test_inference", "False"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) * 1024)
    assert max(peaks) < 400 * 2**20


def test_importing_does_nothing():
    heavy = {"torch", "transformers", "fire", "huggingface_hub"}
    program = f"import sys, weight_diff; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, timeout=60).returncode == 0
