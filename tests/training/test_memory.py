"""The memory estimate against measured steps on the CPU, against the naive count, and on the command line."""

import contextlib
import json
import re
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

import train
from alpaca.training import loss, memory
from alpaca.training.attention import BY_EXAMPLE
from alpaca.training.batches import DataCollatorForSupervisedDataset, DataCollatorWithoutPadding
from alpaca.training.memory import GIB, Plan, describe, estimate, remedies
from alpaca.training.simulation import Layout, _step, simulate


def small(kind, layers=3, **sizes):
    return transformers.AutoConfig.for_model(
        kind, vocab_size=2000, hidden_size=128, num_hidden_layers=layers, num_attention_heads=4, **sizes
    )


MODELS = {
    "llama": small("llama", intermediate_size=344),
    "gqa": small("llama", intermediate_size=344, num_key_value_heads=2),
    "opt": small("opt", ffn_dim=512, word_embed_proj_dim=128, dropout=0.0),
}
LLAMA_7B = transformers.LlamaConfig()  # the library's defaults are its sizes


def measured_peak(config, layout):
    """Bytes in use at the fullest moment of a forward and backward pass, beyond weights and optimizer states."""
    transformers.set_seed(0)
    dtype = getattr(torch, layout.dtype)
    attention = layout.attention or "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    loss.use_lean_loss(model)
    if layout.lora_r:
        model = train.add_adapters(model, train.ModelArguments(lora_r=layout.lora_r, lora_dropout=0.0), seed=0)
    if layout.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    tokens = torch.randint(3, 2000, (layout.batch_size, layout.length))
    rows = [{"input_ids": row, "labels": row.clone()} for row in tokens]
    if layout.packed:
        batch = DataCollatorWithoutPadding(responses_only=True, with_lengths=layout.attention is not None)(rows)
    else:
        batch = DataCollatorForSupervisedDataset(type("Tokenizer", (), {"pad_token_id": 0}))(rows)
    batch["use_cache"] = False

    def step():
        autocast = layout.compute_dtype == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            value = model(**batch).loss
        value.backward()
        model.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    used = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    return peak


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"compute_dtype": "bfloat16"}),
        ("llama", {"compute_dtype": "bfloat16", "dtype": "bfloat16"}),
        ("llama", {"packed": False}),
        ("llama", {"attention": BY_EXAMPLE}),
        ("llama", {"chunk": 2000 * 64}),
        ("llama", {"chunk": 2000 * 64, "compute_dtype": "bfloat16"}),
        ("llama", {"packed": False, "attention": "eager"}),
        ("llama", {"checkpointing": True}),
        ("llama", {"lora_r": 8}),
        ("gqa", {}),
        ("opt", {"packed": False}),
    ],
    ids=str,
)
def test_the_simulated_peak_is_that_of_a_measured_step(kind, changes, monkeypatch):
    if chunk := changes.get("chunk"):  # in place of one that holds all logits of so small a model
        monkeypatch.setattr(loss, "CHUNK", chunk)
    sizes = {name: value for name, value in changes.items() if name != "chunk"}
    layout = Layout(batch_size=3, length=96, **sizes)
    phases = simulate(MODELS[kind], layout)
    beside = ("weights", "optimizer states")
    expected = max(
        sum(size for part, size in kinds.items() if part not in beside)
        for phase, kinds in phases.items()
        if phase != "optimizer"
    )
    peak = measured_peak(MODELS[kind], layout)
    print(f"{kind} {changes}: simulated {expected / 2**20:.2f} MiB, measured {peak / 2**20:.2f} MiB")
    assert expected == pytest.approx(peak, rel=0.05)


def total(kinds):
    return sum(kinds.values())


@pytest.mark.parametrize(
    "layout",
    [
        Layout(attention=BY_EXAMPLE, batch_size=2, length=64),
        Layout(gpus=4, fsdp=True, compute_dtype="bfloat16", batch_size=2, length=64, accumulation=2),
        Layout(gpus=4, fsdp=True, compute_dtype="bfloat16", batch_size=2, length=64, checkpointing=True),
    ],
    ids=["one GPU", "FSDP", "FSDP, checkpointing"],
)
def test_the_line_through_two_depths_meets_the_full_depth(layout):
    config = small("llama", layers=10, intermediate_size=344)
    line, full = simulate(config, layout), _step(config, layout, 3)
    peaks = [max(map(total, phases.values())) for phases in (line, full)]
    assert peaks[0] == pytest.approx(peaks[1], rel=1e-6)


def test_layers_of_several_kinds_are_cut_in_whole_periods():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    config = transformers.Gemma2Config(vocab_size=500, num_hidden_layers=12, sliding_window=16, **sizes)
    assert config.layer_types[:3] == ["sliding_attention", "full_attention", "sliding_attention"]
    layout = Layout(batch_size=2, length=32, packed=False)
    peaks = [max(map(total, phases.values())) for phases in (simulate(config, layout), _step(config, layout, 3))]
    assert peaks[0] == pytest.approx(peaks[1], rel=1e-6)


def test_sharding_and_accumulation_come_out():
    config = MODELS["llama"]
    parameters = memory.count_parameters(config, Layout())[0]
    for gpus in (2, 8):
        parts = estimate(config, Plan(Layout(gpus=gpus, fsdp=True, batch_size=1, length=16)))
        assert parts["weights"] == pytest.approx(4 * parameters / gpus / GIB, rel=0.02)
        assert parts["optimizer states"] == pytest.approx(8 * parameters / gpus / GIB, rel=0.02)
    many = {"gpus": 8, "fsdp": True, "batch_size": 1, "length": 16, "accumulation": 4}
    whole, scattered = (
        estimate(config, Plan(Layout(**many, sync_each_batch=sync)))["gathered"] for sync in (False, True)
    )
    assert whole - scattered > 0.5 * 4 * parameters / GIB  # each GPU adds up whole gradients between micro-batches


def test_the_naive_count_of_a_7b_comes_out():
    parameters = memory.count_parameters(LLAMA_7B, Layout())
    assert parameters == (6_738_415_616, 6_738_415_616)
    adapted = memory.count_parameters(LLAMA_7B, Layout(lora_r=8, lora_targets="q_proj,v_proj"))[1]
    assert adapted == 8 * 32 * 2 * (4096 + 4096)


def test_deepspeed_and_offload():
    config = MODELS["llama"]
    parameters = memory.count_parameters(config, Layout())[0]
    layout = Layout(gpus=4, compute_dtype="bfloat16", batch_size=1, length=16)
    parts = estimate(config, Plan(layout, zero_stage=3))
    states = parts["weights"] + parts["gradients"] + parts["optimizer states"]
    assert states == pytest.approx((2 + 2 + 12) * parameters / 4 / GIB)  # as the ZeRO paper counts
    offloaded = estimate(config, Plan(replace(layout, fsdp=True, offload=True)))
    assert offloaded["weights"] == offloaded["gradients"] == offloaded["optimizer states"] == 0
    assert offloaded["host"] == pytest.approx(16 * parameters / 4 / GIB)


def test_each_remedy_is_tried_and_those_that_fit_come_first():
    plan = Plan(Layout(gpus=2, compute_dtype="bfloat16", batch_size=4, length=64))
    needed = estimate(MODELS["llama"], plan)["total"]
    said = describe(MODELS["llama"], plan, 0.9 * needed)
    shown = [line for line in said.splitlines() if "->" in line]
    assert len(shown) == len(remedies(plan)) >= 6
    fits = ["which fits" in line for line in shown]
    assert fits == sorted(fits, reverse=True) and fits[0]
    assert "Fits in" in describe(MODELS["llama"], plan, 2 * needed)


def test_the_command_needs_a_config_and_nothing_else(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_7B.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    flags = ["--model_name_or_path", str(tmp_path), "--bf16", "True", "--estimate_memory", "True"]
    flags += ["--estimate_gpus", "4", "--estimate_gib", "80", "--per_device_train_batch_size", "4"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--fsdp", "full_shard auto_wrap"])
    train.train()
    said = capsys.readouterr()
    assert "7 x 4 x 4 = 112 GB" in said.out and "107.8 GB = 100.4 GiB" in said.out
    assert "Fits in 80.0 GiB" in said.out and not said.err
    assert 30 < float(re.search(r"total +([\d.]+)", said.out).group(1)) < 34
