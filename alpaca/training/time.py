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

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import transformers

from alpaca.common import ExitCode, ExpectedError
from alpaca.training.batches import BalancedBatchSampler
from alpaca.training.callbacks import peak_flops
from alpaca.training.memory import Plan, count_parameters
from alpaca.training.simulation import Layout, Operation, count_work

# From the vendor's data sheets, SXM modules. Memory in bytes/s; NVLink in bytes/s in each direction (the sheets give
# both directions together: 600 GB/s for the A100, 900 for the H100 and the H200); FLOP/s of float32 with and without
# tf32 (dense). The bf16 peak is `callbacks.peak_flops`. GiB as CUDA reports them.
GPUS = {
    "A100": {"memory": 2.039e12, "nvlink": 300e9, "tf32": 156e12, "float32": 19.5e12, "gib": 79.2},
    "H100": {"memory": 3.35e12, "nvlink": 450e9, "tf32": 494e12, "float32": 67e12, "gib": 79.2},
    "H200": {"memory": 4.8e12, "nvlink": 450e9, "tf32": 494e12, "float32": 67e12, "gib": 139.8},
}
GPUS_PER_NODE = 8
# The most of its bf16 peak that any matrix product reached: 267.9 of 312 TFLOP/s on A100, 794.5 of 989 on H100 and H200
# (Bekman, ml-engineering, "Maximum Achievable Matmul FLOPS").
MATMUL = {"A100": 0.859, "H100": 0.803, "H200": 0.803}
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

    def transfer(self, kind: str, size: float, layout: Layout) -> float:
        """Seconds of a collective in a ring over its GPUs; `size` is that of the whole tensor.

        In a ring over several nodes, what enters a node enters it once and goes on over NVLink.
        """
        shards = layout.gpus // layout.replicas
        across = kind == "reduce" and layout.replicas > 1  # a ring for each place in a node, which share its network
        members = layout.replicas if across else shards if kind != "reduce" else layout.gpus
        nodes = members if across else -(-members // GPUS_PER_NODE)
        speed = self.nvlink if nodes == 1 else min(self.nvlink, self.network / (GPUS_PER_NODE if across else 1))
        rounds = 2 if kind == "reduce" else 1
        hops = (nodes - 1) * NODE_HOP + (members - nodes) * HOP
        return rounds * (size * (members - 1) / members / speed + hops)


def machine(gpu: str, precision: str, network: float, efficiency: float | None = None) -> Machine:
    """`gpu`: one of `GPUS`; `precision`: bfloat16, tf32 or float32; `network`: Gb/s of a node.

    `efficiency` is the share of the peak that matrix products reach, by default the published one.
    """
    sheet = GPUS[gpu]
    peak = peak_flops(gpu) if precision == "bfloat16" else sheet[precision]
    reached = (efficiency or MATMUL[gpu]) * peak
    return Machine(gpu, reached, MEMORY * sheet["memory"], LINK * sheet["nvlink"], LINK * network / 8 * 1e9, sheet["gib"])


def step_seconds(work: dict[Operation, float], layout: Layout, on: Machine, gradient_bytes: float = 0) -> dict[str, float]:
    """Seconds of an optimizer step and of its parts, and the bytes that one GPU receives in it.

    `gradient_bytes` is what DistributedDataParallel sums over the GPUs, where nothing is sharded. "kernels" is what
    forward and backward passes would take alone, "transfers" what the links would, "waiting" what they take together
    beyond the kernels; "launching" is the host's time for them.
    """
    total = dict.fromkeys(("step", "kernels", "transfers", "waiting", "optimizer", "launching", "bytes", "flops"), 0.0)
    for phase in sorted({operation.phase for operation in work}):
        times = 1 if phase.startswith("last") or phase == "optimizer" else layout.accumulation - 1
        kernels = transfers = launching = received = flops = 0.0
        exposed: dict[str, list[float]] = {"gather": [], "scatter": []}
        for (where, kind, count_flops, size), number in work.items():
            if where != phase:
                continue
            if kind in ("kernel", "copy"):
                one = max(count_flops / on.flops, size / on.memory)
                launching += number * LAUNCH
                flops += number * count_flops
            else:
                one = on.transfer(kind, size, layout)
                received += number * size * (2 if kind == "reduce" else 1)
                exposed.setdefault(kind, []).extend([number * one, number])
            if kind == "kernel":
                kernels += number * one
            else:
                transfers += number * one
        if phase == "last backward" and gradient_bytes:
            transfers += on.transfer("reduce", gradient_bytes, layout)
            received += 2 * gradient_bytes
        if phase == "optimizer":
            total["optimizer"] += kernels
            total["step"] += max(kernels, launching)
            continue
        first_or_last = exposed["gather" if phase.endswith("forward") else "scatter"]
        unhidden = sum(first_or_last[::2]) / sum(first_or_last[1::2]) if sum(first_or_last[1::2]) else 0.0
        seconds = max(kernels, transfers, launching) + unhidden
        parts = {"step": seconds, "kernels": kernels, "transfers": transfers, "waiting": seconds - kernels}
        parts |= {"launching": launching, "bytes": received, "flops": flops}
        for name, value in parts.items():
            total[name] += times * value
    return total


def predict(config: transformers.PretrainedConfig, layout: Layout, on: Machine) -> dict[str, float]:
    """`step_seconds` of the simulated step."""
    gradient_bytes = 0
    if layout.gpus > 1 and not layout.fsdp:
        gradient_bytes = (4 if layout.dtype == "float32" else 2) * count_parameters(config, layout)[1]
    return step_seconds(count_work(config, replace(layout, gpus=layout.gpus if layout.fsdp else 1)), layout, on, gradient_bytes)


def fullest_micro_batches(
    lengths: np.ndarray, batch_size: int, gpus: int, accumulation: int, padded: bool, balanced: bool, seed: int
) -> tuple[float, float]:
    """Tokens, padding included, that the fullest GPU computes in a micro-batch, in the mean and at most.

    GPUs wait for the fullest one of each round. One epoch in the order of `seed`, in micro-batches as a run makes them.
    """
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    if balanced:
        batches = list(BalancedBatchSampler(order, lengths, batch_size, gpus, accumulation, padded=padded))
    else:
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    tokens = [
        len(batch) * max(lengths[batch]) if padded else sum(lengths[batch]) if batch else 0 for batch in batches
    ]
    rounds = [max(tokens[i : i + gpus]) for i in range(0, len(tokens), gpus)]
    whole = rounds[:-1] or rounds  # the epoch's last one may be smaller
    return float(np.mean(whole)), float(max(whole))


def read_machine(args: Any, present: str | None) -> Machine:
    """The machine that the flags name; `present` is the name of the GPU that is here."""
    gpu = args.estimate_gpu or next((name for name in GPUS if name in (present or "")), None)
    if gpu not in GPUS:
        said = f"--estimate_gpu {gpu}: not in the table" if gpu else "--estimate_time needs a GPU to predict for"
        raise ExpectedError(f"{said}; give --estimate_gpu {', '.join(GPUS)}", ExitCode.USAGE)
    precision = "bfloat16" if args.half_precision else "tf32" if args.tf32 else "float32"
    return machine(gpu, precision, args.estimate_network, args.estimate_efficiency)


def check_plan(plan: Plan) -> None:
    """Raises ExpectedError (exit 2) for what can't be predicted."""
    if plan.zero_stage is not None or plan.layout.offload:
        what = "DeepSpeed" if plan.zero_stage is not None else "offload"
        raise ExpectedError(
            f"--estimate_time does not know what {what} takes: it predicts runs with --fsdp and without it, all on the "
            "GPUs; --estimate_memory True knows more",
            ExitCode.USAGE,
        )
