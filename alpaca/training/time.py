"""How long a training run takes, predicted from what its step computes, reads, writes and sends.

    python train.py --model_name_or_path <llama-7b> --data_path alpaca_data.json --bf16 True \
        --fsdp "full_shard auto_wrap" --per_device_train_batch_size 4 --gradient_accumulation_steps 4 \
        --estimate_time True --estimate_gpus 8 --estimate_gpu A100

The work is that of the real step on fake tensors (`simulation.count_work`). Each kernel takes the longer of its FLOPs
at the matrix units' speed and its bytes at the memory's (the roofline of Williams et al., 2009); the host launches one
after the other. Transfers run beside the kernels, as FSDP2 has them: the next layer's weights are gathered while one
computes, and gradients are scattered while the layer before it computes. What nothing hides is the first gather of a
pass and its last scatter.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import transformers

from alpaca.common import ExitCode, ExpectedError
from alpaca.training.batches import BalancedBatchSampler
from alpaca.training.callbacks import peak_flops
from alpaca.training.memory import GPUS_PER_NODE, Plan, count_parameters
from alpaca.training.simulation import Layout, Operation, count_work

# From the vendor's data sheets, SXM modules. Memory in bytes/s; NVLink in bytes/s in each direction (the sheets give
# both directions together: 600 GB/s for the A100, 900 for the H100 and the H200); FLOP/s of float32 with and without
# tf32 (dense). The bf16 peak is `callbacks.peak_flops`. GiB as CUDA reports them.
GPUS = {
    "A100": {"memory": 2.039e12, "nvlink": 300e9, "tf32": 156e12, "float32": 19.5e12, "gib": 79.2},
    "H100": {"memory": 3.35e12, "nvlink": 450e9, "tf32": 494e12, "float32": 67e12, "gib": 79.2},
    "H200": {"memory": 4.8e12, "nvlink": 450e9, "tf32": 494e12, "float32": 67e12, "gib": 139.8},
}
# Share of the bf16 peak that matrix products reach, fitted to published runs: with it `predict` gives the tokens/s of
# llm-foundry (7B, 6 x 2,048 tokens a micro-batch, 8 GPUs: 4,641 a GPU on A100, 10,643 on H100; scripts/train/
# benchmarking). Alone they reach at most 0.859 and 0.803 (Bekman, ml-engineering: 267.9 and 794.5 TFLOP/s).
MATMUL = {"A100": 0.82, "H100": 0.67, "H200": 0.67}
MEMORY = 0.85  # of the sheet's bandwidth; assumed
# NCCL's protocol takes about 20 % of a link (its maintainer in NVIDIA/nccl-tests issue 212: 370 of 450 GB/s); 232.5 of
# 300 GB/s were measured on 8 A100 (issue 175), and 86 of 100 GB/s between two nodes.
LINK = 0.8
# Seconds that a step of a ring takes inside a node and between two: NCCL's own model (src/graph/tuning.cc, "Simple").
HOP, NODE_HOP = 3.4e-6, 14e-6
# Seconds of the host for a kernel: forward and backward of a LLaMA with 32 layers of width 32 take 5.7 microseconds of
# processor time an operation in PyTorch 2.13 on one core of an Intel Xeon.
LAUNCH = 6e-6


@dataclass(frozen=True)
class Machine:
    """What a step runs on; speeds are those reached, not those of the data sheet."""

    gpu: str
    flops: float  # FLOP/s of matrix products
    memory: float  # bytes/s
    nvlink: float  # bytes/s that a GPU receives from its neighbour in the node
    network: float  # bytes/s that a node receives
    gib: float

    def transfer(self, kind: str, size: float, layout: Layout) -> tuple[float, float]:
        """Seconds of a collective in a ring, and the bytes that a GPU receives; `size` is that of the whole tensor.

        In a ring over several nodes, what enters a node enters it once and goes on over NVLink.
        """
        across = kind == "reduce" and layout.replicas > 1  # a ring for each place in a node, which share its network
        members = layout.replicas if across else layout.gpus // layout.replicas
        nodes = members if across else -(-members // GPUS_PER_NODE)
        speed = self.nvlink if nodes == 1 else min(self.nvlink, self.network / (GPUS_PER_NODE if across else 1))
        rounds = 2 if kind == "reduce" else 1
        received = rounds * size * (members - 1) / members
        return received / speed + rounds * ((nodes - 1) * NODE_HOP + (members - nodes) * HOP), received


def machine(gpu: str, precision: str, network: float, efficiency: float | None = None) -> Machine:
    """`gpu`: one of `GPUS`; `precision`: bfloat16, tf32 or float32; `network`: Gb/s of a node.

    `efficiency` is the share of the peak that matrix products reach, by default the published one.
    """
    sheet = GPUS[gpu]
    peak = peak_flops(gpu) if precision == "bfloat16" else sheet[precision]
    reached = (efficiency or MATMUL[gpu]) * peak
    return Machine(
        gpu, reached, MEMORY * sheet["memory"], LINK * sheet["nvlink"], LINK * network / 8 * 1e9, sheet["gib"]
    )


def phase_seconds(
    work: dict[Operation, float], layout: Layout, on: Machine, gradient_bytes: float = 0
) -> dict[str, dict[str, float]]:
    """For each phase of a step the seconds that its kernels, its transfers and their launching would take alone, the
    transfer that nothing hides ("exposed"), and the bytes that one GPU receives.

    `gradient_bytes` is what DistributedDataParallel sums over the GPUs, where nothing is sharded.
    """
    phases = {}
    for phase in dict.fromkeys(operation.phase for operation in work):
        sums = dict.fromkeys(("kernels", "transfers", "launching", "exposed", "bytes", "flops"), 0.0)
        ends = "gather" if phase.endswith("forward") else "scatter"  # one of these is not hidden
        ending = 0.0
        for (where, kind, flops, size), number in work.items():
            if where != phase:
                continue
            if kind in ("kernel", "copy"):
                seconds = max(flops / on.flops, size / on.memory)
                sums["launching"] += number * LAUNCH
                sums["flops"] += number * flops
            else:
                seconds, received = on.transfer(kind, size, layout)
                sums["bytes"] += number * received
            if kind == ends:
                sums["exposed"] += number * seconds
                ending += number
            sums["kernels" if kind == "kernel" else "transfers"] += number * seconds
        sums["exposed"] /= ending or 1
        if phase == "last backward" and gradient_bytes:
            seconds, received = on.transfer("reduce", gradient_bytes, layout)
            sums["transfers"] += seconds
            sums["bytes"] += received
        phases[phase] = sums
    return phases


def together(sums: dict[str, float]) -> float:
    """Seconds of a phase whose kernels, transfers and launches run beside each other."""
    return max(sums["kernels"], sums["transfers"], sums["launching"]) + sums["exposed"]


def step_seconds(phases: dict[str, dict[str, float]], accumulation: int) -> dict[str, float]:
    """Seconds of an optimizer step, and of its parts: "kernels" of its passes alone, their "transfers" alone, "waiting"
    of the passes beyond their kernels, the "optimizer"; and the "bytes" that one GPU receives."""
    total = dict.fromkeys(("step", "kernels", "transfers", "waiting", "optimizer", "bytes"), 0.0)
    for phase, sums in phases.items():
        times = 1 if phase.startswith("last") or phase == "optimizer" else accumulation - 1
        seconds = times * together(sums)
        total["step"] += seconds
        if phase == "optimizer":
            total["optimizer"] += seconds
            continue
        total["waiting"] += seconds - times * sums["kernels"]
        for name in ("kernels", "transfers", "bytes"):
            total[name] += times * sums[name]
    return total


def predict(config: transformers.PretrainedConfig, layout: Layout, on: Machine) -> dict[str, float]:
    """`step_seconds` of the simulated step."""
    gradient_bytes = 0
    if layout.gpus > 1 and not layout.fsdp:
        width = 4 if layout.dtype == "float32" or layout.lora_r else 2
        gradient_bytes = width * count_parameters(config, layout)[1]
    work = count_work(config, layout if layout.fsdp else replace(layout, gpus=1))
    return step_seconds(phase_seconds(work, layout, on, gradient_bytes), layout.accumulation)


def fullest_micro_batches(
    lengths: np.ndarray, batch_size: int, gpus: int, accumulation: int, padded: bool, balanced: bool, seed: int
) -> float:
    """Tokens, padding included, that the fullest GPU computes in a micro-batch, in the mean over an epoch.

    GPUs wait for the fullest one of each round. Examples are in an order of `seed`, in micro-batches as a run makes
    them.
    """
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    if balanced:
        batches = list(BalancedBatchSampler(order, lengths, batch_size, gpus, accumulation, padded=padded))
    else:
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    tokens = [len(batch) * max(lengths[batch]) if padded else sum(lengths[batch]) if batch else 0 for batch in batches]
    rounds = [max(tokens[i : i + gpus]) for i in range(0, len(tokens), gpus)]
    return float(np.mean(rounds[:-1] or rounds))  # the epoch's last one may be smaller


@dataclass(frozen=True)
class Run:
    """What is known of a run beside its step: how often it is done, and the data's tokens."""

    steps: int | None  # None where neither data nor --max_steps say it
    tokens: float | None  # of an example, padding left out, in the mean; None without data
    price: float | None  # of a GPU for an hour


def read_machine(plan: Plan, args: Any, present: str | None) -> Machine:
    """What train.py's flags name; `present` is the name of the GPU that is here.

    Raises ExpectedError (exit 2) for what can't be predicted.
    """
    if plan.zero_stage is not None or plan.layout.offload:
        what = "DeepSpeed" if plan.zero_stage is not None else "offload"
        raise ExpectedError(
            f"--estimate_time does not know what {what} takes: it predicts runs whose model is on the GPUs, with "
            "--fsdp or without it; leave the flag out, or ask for --estimate_memory True alone",
            ExitCode.USAGE,
        )
    gpu = args.estimate_gpu or next((name for name in GPUS if name in (present or "")), None)
    if gpu not in GPUS:
        said = f"--estimate_gpu {gpu}: not in the table" if gpu else "--estimate_time needs a GPU to predict for"
        raise ExpectedError(f"{said}; give --estimate_gpu with {', '.join(GPUS)}", ExitCode.USAGE)
    precision = "bfloat16" if plan.layout.compute_dtype == "bfloat16" else "tf32" if args.in_tf32 else "float32"
    return machine(gpu, precision, args.estimate_network, args.estimate_efficiency)


def read_run(layout: Layout, args: Any, data_args: Any, lengths: np.ndarray | None) -> tuple[Layout, Run]:
    """The layout of the mean micro-batch, and the run, of train.py's flags and the examples' lengths."""
    steps = args.max_steps if args.max_steps > 0 else None
    if lengths is None:
        return layout, Run(steps, None, args.price_per_gpu_hour)
    sizes = layout.batch_size, layout.gpus, layout.accumulation
    fullest = fullest_micro_batches(lengths, *sizes, not layout.packed, data_args.balance_tokens, args.seed)
    if steps is None:
        steps = math.ceil(args.num_train_epochs * math.ceil(len(lengths) / math.prod(sizes)))
    layout = replace(layout, length=math.ceil(fullest / layout.batch_size))
    return layout, Run(steps, float(np.mean(lengths)), args.price_per_gpu_hour)


def describe(config: transformers.PretrainedConfig, layout: Layout, on: Machine, run: Run) -> str:
    """The report that --estimate_time prints; the layout is that of the mean micro-batch."""
    figures, parameters = predict(config, layout, on), count_parameters(config, replace(layout, lora_r=0))[0]
    examples = layout.gpus * layout.batch_size * layout.accumulation
    tokens = examples * (run.tokens or layout.length)
    work = 6 * parameters if not layout.lora_r else 4 * parameters + 2 * count_parameters(config, layout)[1]
    used = work * tokens / figures["step"] / layout.gpus / (peak_flops(on.gpu) or 1)
    links = f"{on.nvlink / LINK / 1e9:.0f} GB/s NVLink"
    if layout.gpus > GPUS_PER_NODE:
        links += f", {8 * on.network / LINK / 1e9:.0f} Gb/s between nodes of {GPUS_PER_NODE}"
    rows = {
        "kernels of forward and backward": figures["kernels"],
        "waiting for transfers or launches": figures["waiting"],
        "the optimizer": figures["optimizer"],
        "one step": figures["step"],
    }
    lines = [
        f"A prediction from data sheets, nothing is measured: {layout.gpus} x {on.gpu}, {links}; {examples} examples a "
        f"step, {layout.batch_size * layout.length} tokens in a micro-batch of the fullest GPU",
        "",
        "seconds of a step",
        *(f"  {name:<35}{value:9.3f}" for name, value in rows.items()),
        f"  that is {tokens / figures['step']:,.0f} tokens/s without padding, {used:.0%} of the GPUs' bf16 peak (6 N)",
        f"  a GPU receives {figures['bytes'] / 1e9:.1f} GB a step: {figures['transfers']:.3f} s of transfers, beside "
        "the kernels",
    ]
    if run.steps is None:
        lines.append("  how many steps: give --data_path or --max_steps")
    else:
        hours = run.steps * figures["step"] / 3600
        money = "" if run.price is None else f", {hours * layout.gpus * run.price:,.2f} at {run.price:g} a GPU hour"
        lines.append(f"  {run.steps:,} steps: {hours:.2f} hours, {hours * layout.gpus:.2f} GPU hours{money}")
    return "\n".join(
        [
            *lines,
            "",
            f"It hangs on these: matrix products reach {on.flops / 1e12:.0f} TFLOP/s (--estimate_efficiency), memory "
            f"{on.memory / 1e12:.2f} TB/s, NVLink {on.nvlink / 1e9:.0f} GB/s. Loading, saving and evaluation come on "
            "top.",
        ]
    )
