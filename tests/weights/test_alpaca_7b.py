"""The 2023 release, small: same names, three .bin shards, one row more than the base."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

import weight_diff
from alpaca.common import ExitCode, ExpectedError
from alpaca.weights import alpaca_7b
from tests.weights.tiny_checkpoints import assert_same_bits, load, model, recover, save, save_bin, tuned_from

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
