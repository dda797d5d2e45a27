"""The memory estimate against measured runs on the CPU, against the naive count, and on the command line."""

import contextlib
import json
import re
import sys

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

import train
from alpaca.training import loss, memory
from alpaca.training.batches import DataCollatorForSupervisedDataset, DataCollatorWithoutPadding
from alpaca.training.memory import GIB, Plan, describe, estimate, read_shape, remedies
from tests.conftest import run


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads that wait for each other on busy cores take many times as long as one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


LLAMA_7B = transformers.LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
)


def small(kind, **sizes):
    return transformers.AutoConfig.for_model(
        kind, vocab_size=2000, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, **sizes
    )


MODELS = {
    "llama": small("llama", intermediate_size=344),
    "gqa": small("llama", intermediate_size=344, num_key_value_heads=2),
    "opt": small("opt", ffn_dim=512, word_embed_proj_dim=128, dropout=0.0),
}


def measured_peak(config, plan):
    """Bytes in use at the fullest moment of a forward and backward pass, beyond weights and gradients."""
    transformers.set_seed(0)
    dtype = torch.float32 if plan.weight_bytes == 4 else torch.bfloat16
    attention = "eager" if plan.eager else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if plan.lora_r:
        arguments = train.ModelArguments(lora_r=plan.lora_r)
        model = train.add_adapters(model, arguments, seed=0)
    if plan.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss.use_lean_loss(model.get_base_model() if plan.lora_r else model)
    model.train()
    tokens = torch.randint(3, 2000, (plan.batch_size, plan.length))
    rows = [{"input_ids": row, "labels": row.clone()} for row in tokens]
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0})
    batch = (
        DataCollatorWithoutPadding()(rows) if plan.padding_free else DataCollatorForSupervisedDataset(tokenizer)(rows)
    )
    batch["use_cache"] = False
    autocast = plan.compute_bytes < plan.weight_bytes or (plan.lora_r and plan.compute_bytes == 2)

    def step():
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            value = model(**batch).loss
        value.backward()

    step()  # gradients are there from now on
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
        ("llama", {"compute_bytes": 2}),
        ("llama", {"compute_bytes": 2, "weight_bytes": 2}),
        ("llama", {"padding_free": False}),
        ("llama", {"chunk": 2000 * 64}),
        ("llama", {"chunk": 2000 * 64, "compute_bytes": 2, "weight_bytes": 2}),
        ("llama", {"eager": True}),
        ("llama", {"checkpointing": True}),
        ("llama", {"checkpointing": True, "compute_bytes": 2, "batch_size": 1}),
        ("llama", {"lora_r": 8}),
        ("llama", {"lora_r": 8, "compute_bytes": 2, "weight_bytes": 2}),
        ("gqa", {}),
        ("opt", {"padding_free": False}),
    ],
    ids=str,
)
def test_activations_are_those_of_a_measured_step(kind, changes, monkeypatch):
    if chunk := changes.get("chunk"):  # in place of one that holds all logits of so small a model
        monkeypatch.setattr(loss, "CHUNK", chunk)
        monkeypatch.setattr(memory, "CHUNK", chunk)
    sizes = {name: value for name, value in changes.items() if name != "chunk"}
    plan = Plan(**{"batch_size": 3, "length": 96, **sizes})
    shape = read_shape(MODELS[kind], "all-linear")
    parts = estimate(shape, plan)
    expected, peak = (parts["activations"] + parts["buffers"]) * GIB, measured_peak(MODELS[kind], plan)
    if plan.lora_r:  # the CPU keeps dropout masks in float32, a GPU in bytes
        expected += 3 * (6 * shape.hidden + shape.intermediate) * plan.batch_size * plan.length * shape.layers
    print(f"{kind} {changes}: estimated {expected / 2**20:.1f} MiB, measured {peak / 2**20:.1f} MiB")
    assert 0.9 < expected / peak < 1.15


def test_the_naive_count_of_a_7b_comes_out():
    shape = read_shape(LLAMA_7B, "all-linear")
    assert shape.parameters == 6_738_415_616 and shape.layers == 32
    assert "7 x 4 x 4 = 112 GB" in describe(shape, Plan(), 80) and "107.8 GB = 100.4 GiB" in describe(shape, Plan(), 80)
    parts = estimate(shape, Plan())
    naive = parts["weights"] + parts["gradients"] + parts["optimizer states"]
    assert naive == pytest.approx(16 * shape.parameters / GIB)
    for sharded in ("gradients", "weights"):
        for gpus in (2, 8):
            spread = estimate(shape, Plan(engine="fsdp", gpus=gpus, sharded=sharded))
            assert spread["optimizer states"] == pytest.approx(parts["optimizer states"] / gpus)
            assert spread["weights"] == pytest.approx(parts["weights"] / gpus)
            gathered = 4 * shape.parameters if sharded == "gradients" else 0  # those of shard_grad_op
            assert gathered / GIB < spread["buffers"] < gathered / GIB + 6


def test_deepspeed_and_offload_and_lora():
    shape = read_shape(LLAMA_7B, "q_proj,v_proj")
    assert shape.adapted == 32 * 2 * (4096 + 4096)
    lora = estimate(shape, Plan(lora_r=8))
    assert lora["optimizer states"] == pytest.approx(2 * 4 * 8 * shape.adapted / GIB)
    zero = Plan(engine="deepspeed", sharded="weights", gpus=4, compute_bytes=2)
    parts = estimate(shape, zero)
    total = parts["weights"] + parts["gradients"] + parts["optimizer states"]
    assert total == pytest.approx((2 + 2 + 12) * shape.parameters / 4 / GIB)  # as the ZeRO paper counts
    offloaded = estimate(
        shape, Plan(engine="fsdp", sharded="weights", gpus=4, offload_weights=True, offload_optimizer=True)
    )
    assert offloaded["weights"] == offloaded["gradients"] == offloaded["optimizer states"] == 0
    assert offloaded["host"] == pytest.approx(16 * shape.parameters / 4 / GIB)


def test_every_remedy_helps_until_the_run_fits():
    shape = read_shape(LLAMA_7B, "all-linear")
    for plan in (
        Plan(compute_bytes=2, accumulation=4),
        Plan(gpus=4, accumulation=4),
        Plan(gpus=2, engine="deepspeed", sharded="optimizer"),
    ):
        totals = [
            estimate(shape, plan)["total"],
            *(estimate(shape, changed)["total"] for _, changed in remedies(shape, plan)),
        ]
        assert totals == sorted(totals, reverse=True)
    said = describe(shape, Plan(compute_bytes=2), 24)
    assert "Does not fit" in said and said.endswith("which fits")
    assert "Fits in 80.0 GiB" in describe(shape, Plan(engine="fsdp", sharded="weights", gpus=8, compute_bytes=2), 80)


def test_the_command_needs_a_config_and_nothing_else(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_7B.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    flags = [
        "--model_name_or_path",
        str(tmp_path),
        "--bf16",
        "True",
        "--estimate_memory",
        "True",
        "--estimate_gpus",
        "4",
    ]
    result = run("train.py", *flags, "--deepspeed", "configs/default_offload_opt_param.json")
    assert result.returncode == 0 and "--estimate_gib 80 compares" in result.stdout, result.stderr
    assert "notice" not in result.stderr

    fsdp = [*flags, "--estimate_gib", "80", "--gradient_accumulation_steps", "4", "--fsdp"]
    totals = []
    for more in (["full_shard auto_wrap"], ["full_shard auto_wrap offload", "--gradient_checkpointing", "True"]):
        monkeypatch.setattr(sys, "argv", ["train.py", *fsdp, *more])
        train.train()
        said = capsys.readouterr()
        assert "Fits in 80.0 GiB" in said.out and not said.err
        totals.append(float(re.search(r"total +([\d.]+)", said.out).group(1)))
    assert totals[0] - totals[1] == pytest.approx(16 * 6.738 / 4 / 1.0737 + 24, abs=4)  # states, and activations
