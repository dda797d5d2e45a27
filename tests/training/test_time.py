"""The predicted time: its arithmetic by hand, its work against PyTorch's own counter, published runs, the command."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

import train
from alpaca.common import ExpectedError
from alpaca.training.attention import BY_EXAMPLE
from alpaca.training.simulation import Layout, Operation, _build, _work, count_work
from alpaca.training.time import (
    HOP,
    LAUNCH,
    NODE_HOP,
    Machine,
    fullest_micro_batches,
    machine,
    phase_seconds,
    predict,
    step_seconds,
)

LLAMA_7B = transformers.LlamaConfig()  # the library's defaults are its sizes
SMALL = transformers.LlamaConfig(
    vocab_size=500, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4
)
SHARDED = Layout(gpus=4, fsdp=True, compute_dtype="bfloat16", batch_size=2, length=32, attention=BY_EXAMPLE)
ON = Machine("A100", flops=1000.0, memory=100.0, nvlink=10.0, network=4.0, gib=80)


def test_a_step_is_the_one_worked_out_by_hand():
    """Two micro-batches: 4 s and 6 s of kernels each against gathers of 3 s, and one scatter."""
    layout = Layout(gpus=4, fsdp=True, accumulation=2)
    hops = 3 * HOP
    work = {}
    for prefix in ("", "last "):
        work |= {Operation(f"{prefix}forward", "kernel", 1000, 50): 3}  # bound by FLOPs: 1 s each
        work |= {Operation(f"{prefix}forward", "kernel", 10, 100): 1}  # by memory: 1 s
        work |= {Operation(f"{prefix}forward", "gather", 0, 20): 2}  # 20 × 3/4 / 10 = 1.5 s each
        work |= {Operation(f"{prefix}backward", "kernel", 6000, 0): 1}
        work |= {Operation(f"{prefix}backward", "gather", 0, 20): 2}
    work |= {Operation("last backward", "scatter", 0, 40): 2}  # 3 s each
    work |= {Operation("last backward", "copy", 0, 100): 1}  # beside the transfers: 1 s
    work |= {Operation("optimizer", "kernel", 0, 200): 1}
    phases = phase_seconds(work, layout, ON)
    figures = step_seconds(phases, layout.accumulation)
    forward, backward, last = 4 + 1.5 + hops, 6, 2 * (1.5 + hops) + 2 * (3 + hops) + 1 + (3 + hops)
    assert figures["step"] == pytest.approx(2 * forward + backward + last + 2)
    assert figures["kernels"] == 20 and figures["optimizer"] == 2
    assert figures["waiting"] == pytest.approx(figures["step"] - 22)
    assert figures["bytes"] == pytest.approx(8 * 15 + 2 * 30)
    assert phases["last backward"]["launching"] == pytest.approx(2 * LAUNCH)
    assert phases["forward"]["flops"] == 3010


def test_many_small_kernels_take_what_the_host_takes_to_launch_them():
    figures = step_seconds(phase_seconds({Operation("last forward", "kernel", 0, 0): 1e6}, Layout(), ON), 1)
    assert figures["step"] == pytest.approx(1e6 * LAUNCH) and figures["kernels"] == 0


def test_a_ring_is_as_fast_as_its_slowest_part():
    def transfer(kind, layout, on=ON):
        return on.transfer(kind, 80, layout)

    one_node, four_nodes = Layout(gpus=8, fsdp=True), Layout(gpus=32, fsdp=True)
    assert transfer("gather", one_node) == (pytest.approx(70 / 10 + 7 * HOP), 70)
    assert transfer("scatter", four_nodes) == (pytest.approx(77.5 / 4 + 3 * NODE_HOP + 28 * HOP), 77.5)
    assert transfer("gather", four_nodes, replace(ON, network=50.0))[0] == pytest.approx(77.5 / 10, rel=0.01)
    hybrid = replace(four_nodes, replicas=4)
    assert transfer("gather", hybrid) == transfer("gather", one_node)
    seconds, received = transfer("reduce", hybrid)  # the eight rings of a node share its network
    assert received == 2 * 80 * 3 / 4 and seconds == pytest.approx(received / (4 / 8) + 2 * 3 * NODE_HOP)


def test_flops_are_those_of_pytorchs_counter():
    """Of a real step, with memory."""
    aten = torch.ops.aten
    ours = {
        aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop.__wrapped__,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop.__wrapped__,
    }
    layout = Layout(batch_size=2, length=32, attention=BY_EXAMPLE)
    model, batch = _build(SMALL, layout)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(SMALL)
    with FlopCounterMode(display=False, custom_mapping=ours) as counter:
        model(**batch).loss.backward()
    counted = sum(operation.flops * number for operation, number in count_work(SMALL, layout).items())
    assert (
        counted == counter.get_total_flops() > 6 * 64 * 3 * sum(p.numel() for p in model.model.layers[0].parameters())
    )


def sums(work):
    """By phase and kind: operations, FLOPs, bytes."""
    found = {}
    for (phase, kind, flops, size), number in work.items():
        one = np.array([number, number * flops, number * size])
        found[phase, kind] = found.get((phase, kind), 0) + one
    return found


@pytest.mark.parametrize("changes", [{"accumulation": 2}, {"checkpointing": True}], ids=str)
def test_the_line_through_two_depths_meets_the_full_depth(changes):
    config = transformers.LlamaConfig(**{**SMALL.to_dict(), "num_hidden_layers": 10})
    layout = replace(SHARDED, **changes)
    line, full = sums(count_work(config, layout)), sums(_work(config, layout))
    assert line.keys() == full.keys()
    for key, values in full.items():
        assert line[key] == pytest.approx(values, rel=1e-6), key


def test_what_is_sent_is_the_model():
    """Forward and backward gather each weight in bf16, the last micro-batch scatters each gradient; the optimizer of
    each GPU touches its part. With replicas, the parts of a node are summed over the nodes."""
    parameters = sum(p.numel() for p in transformers.LlamaForCausalLM(SMALL).parameters())
    found = sums(count_work(SMALL, SHARDED))
    root = SMALL.vocab_size * 64 + 64  # head and last norm, which stay gathered
    padding = 1.01
    assert 2 * parameters <= found["last forward", "gather"][2] <= padding * 2 * parameters
    assert 2 * (parameters - root) <= found["last backward", "gather"][2] <= padding * 2 * parameters
    assert 2 * parameters <= found["last backward", "scatter"][2] <= padding * 2 * parameters
    optimizer = found["optimizer", "kernel"][2]
    alone = sums(count_work(SMALL, replace(SHARDED, gpus=1, fsdp=False)))["optimizer", "kernel"][2]
    assert optimizer == pytest.approx(alone / 4, rel=0.02)
    hybrid = sums(count_work(SMALL, replace(SHARDED, gpus=16, replicas=4)))
    assert hybrid["last backward", "reduce"][2] == pytest.approx(found["last backward", "scatter"][2] / 4)
    assert hybrid["last forward", "gather"][2] == found["last forward", "gather"][2]


def test_the_fullest_micro_batch_of_each_round_counts():
    lengths = np.random.default_rng(1).integers(40, 400, 500)
    order = np.random.default_rng(7).permutation(500)
    sizes = {"batch_size": 4, "gpus": 2, "accumulation": 2, "seed": 7}
    plain = fullest_micro_batches(lengths, **sizes, padded=True, balanced=False)
    rounds = [max(4 * max(lengths[order[i : i + 4]]), 4 * max(lengths[order[i + 4 : i + 8]])) for i in range(0, 496, 8)]
    assert plain == pytest.approx(np.mean(rounds))
    packed = fullest_micro_batches(lengths, **sizes, padded=False, balanced=True)
    assert 4 * lengths.mean() < packed < 1.1 * 4 * lengths.mean() < plain


# Measured runs that others published: tokens/s a GPU. The first two set the default efficiency. Models have no gated
# MLP and a fused norm (MPT), or recompute some operations (torchtitan); the last one's H100s have 500 W instead of 700.
PUBLISHED = {
    "llm-foundry 7B, 8 A100": ("A100", 8, 6, 2048, False, LLAMA_7B, 4641, 0.02),
    "llm-foundry 7B, 8 H100": ("H100", 8, 6, 2048, False, LLAMA_7B, 10643, 0.02),
    "llm-foundry 7B, 8 A100, recomputing": ("A100", 8, 64, 1024, True, LLAMA_7B, 4357, 0.15),
    "torchtitan 8B, 64 A100": ("A100", 64, 1, 8192, False, "8B", 2973, 0.25),
    "torchtitan 8B, 8 H100 of 500 W": ("H100", 8, 2, 8192, False, "8B", 5762, 0.50),
}


@pytest.mark.soak
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs(name):
    gpu, gpus, batch_size, length, checkpointing, config, published, within = PUBLISHED[name]
    if config == "8B":
        config = transformers.LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8)
    layout = replace(
        SHARDED, gpus=gpus, batch_size=batch_size, length=length, checkpointing=checkpointing, accumulation=2
    )
    seconds = predict(config, layout, machine(gpu, "bfloat16", 1600))["step"]
    predicted = 2 * batch_size * length / seconds
    print(f"{name}: {predicted:.0f} tokens/s a GPU predicted, {published} published")
    assert predicted == pytest.approx(published, rel=within)


@pytest.fixture
def command(base, data, monkeypatch, capsys):
    def run(*flags):
        fixed = ["--model_name_or_path", base, "--estimate_time", "True", "--estimate_gpu", "A100"]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*fixed, *flags])])
        train.train()
        return capsys.readouterr().out

    return run


def test_the_command_predicts_hours_and_money(command, data):
    flags = ["--estimate_gpus", 4, "--fsdp", "full_shard auto_wrap", "--bf16", "True", "--num_train_epochs", 3]
    said = command(*flags, "--data_path", data, "--per_device_train_batch_size", 2, "--price_per_gpu_hour", 2)
    assert said.startswith("A prediction") and "4 x A100" in said and "It hangs on these" in said
    hours, gpu_hours, money = map(float, re.search(r"([\d.]+) hours, ([\d.]+) GPU hours, ([\d.]+) at 2", said).groups())
    assert re.search(r"^  15 steps", said, re.M)  # 34 examples, 8 a step, three times
    assert hours <= gpu_hours <= money < 0.1
    assert "give --data_path or --max_steps" in command()
    both = command("--estimate_memory", "True", "--max_steps", 7, "--estimate_gib", 80)
    assert "GiB per GPU at the fullest moment" in both and "7 steps" in both
    assert "micro-batches of at most 8 x 512" in both
    longest = command("--estimate_memory", "True", "--data_path", data, "--estimate_gib", 80)
    assert int(re.search(r"at most 8 x (\d+) tokens", longest).group(1)) < 512


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--estimate_gpu", "A1000"], "A1000: not in the table; give --estimate_gpu with A100, H100, H200"),
        (["--fsdp", "full_shard auto_wrap offload"], "does not know what offload takes"),
        (["--estimate_efficiency", "1.5"], "give a share above 0, at most 1"),
        (["--price_per_gpu_hour", "-1"], "give 0 or more"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_cannot_be_predicted_is_said_in_a_line(command, flags, said):
    with pytest.raises(ExpectedError, match=re.escape(said)) as error:
        command(*flags)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_deepspeed_is_not_predicted(command, tmp_path):
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(ExpectedError, match="does not know what DeepSpeed takes"):
        command("--deepspeed", tmp_path / "zero.json")
