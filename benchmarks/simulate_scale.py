"""From one GPU to 1,024: memory, traffic and time of a step, simulated, and the micro-batch that hides the traffic.

    python benchmarks/simulate_scale.py                                 # 7B, 13B, and 70B with LoRA; some ten minutes
    python benchmarks/simulate_scale.py --models 7B --gpus 8 64 --gpu H100 --networks 400

Nothing is measured: memory is that of `train.py --estimate_memory`, time that of `--estimate_time`, with the same data
sheets and efficiencies. A step is the recipe's 128 examples of 125.7 tokens, without padding; on more than 128 GPUs it
is an example a GPU. Gradients are scattered after each micro-batch (sync_each_batch), so that no GPU holds them whole.

Simulated is, for each model, a step on 16 GPUs in two replicas with micro-batches of 1, 4 and 16 examples; sizes in
between lie on the line between their neighbours. Other numbers of GPUs differ in what a collective takes and in the
optimizer's share, which is in proportion. Memory, for each phase of a step, is a line in 1/GPUs and in tokens.
hybrid_shard shards inside a node and sums gradients over nodes. The last line is JSON, with all rows; the table has of
each cluster the fastest setting that fits, and the tokens of a micro-batch from which on its traffic is hidden.
"""

import argparse
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import transformers

from alpaca.training import memory, time
from alpaca.training.attention import BY_EXAMPLE
from alpaca.training.simulation import Layout, count_work, simulate

MODELS = {  # the published configs
    "7B": ({}, {}),
    "13B": ({"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}, {}),
    "70B LoRA": (
        {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
        | {"num_key_value_heads": 8},
        {"lora_r": 16, "dtype": "bfloat16", "checkpointing": True},
    ),
}
EXAMPLES, TOKENS = 128, 126  # of a step; of an example, rounded
LONGEST = 512  # tokens
SIZES = (1, 4, 16)  # examples in the micro-batches that are simulated
NODE = time.GPUS_PER_NODE


class Simulated:
    """The simulated steps of one model, sharded or on one GPU."""

    def __init__(self, config: transformers.PretrainedConfig, sharded: bool, **changes: Any):
        base = Layout(fsdp=sharded, compute_dtype="bfloat16", attention=BY_EXAMPLE, optimizer="adamw_torch_fused")
        base = replace(base, **changes)
        step = replace(base, gpus=2 * NODE, replicas=2) if sharded else base
        self.work = {size: count_work(config, replace(step, batch_size=size, length=TOKENS)) for size in SIZES}
        shapes = [(NODE, 1), (1024, 1), (NODE, 4)] if sharded else [(1, 1), (1, 1), (1, 4)]
        self.shards = NODE if sharded else 1  # of the optimizer's work, and of the first peak
        self.peaks = [
            simulate(config, replace(base, gpus=gpus, batch_size=size, length=LONGEST)) for gpus, size in shapes
        ]

    def gib(self, shards: int, tokens: float) -> float:
        """GiB on each GPU at the fullest moment."""
        few, many, long = ({phase: sum(kinds.values()) for phase, kinds in peak.items()} for peak in self.peaks)
        return (
            max(
                few[phase]
                + (few[phase] - many[phase]) * (1 / shards - 1 / self.shards) / (1 / self.shards - 1 / 1024)
                + (long[phase] - few[phase]) * (tokens - LONGEST) / (3 * LONGEST)
                for phase in few
            )
            / memory.GIB
        )

    def phases(self, size: int, layout: Layout, on: time.Machine) -> dict[str, dict[str, float]]:
        """Of a micro-batch of `size` examples, and of the optimizer."""
        low, high = next((pair for pair in itertools.pairwise(SIZES) if size <= pair[1]), SIZES[-2:])
        shards = layout.gpus // layout.replicas
        pair = []
        for work in (self.work[low], self.work[high]):
            if layout.replicas == 1:
                work = {operation: number for operation, number in work.items() if operation.kind != "reduce"}
            pair.append(time.phase_seconds(work, layout, on))
            pair[-1]["optimizer"]["kernels"] *= self.shards / shards
        share = (size - low) / (high - low)
        return {
            phase: {name: value + share * (pair[1][phase][name] - value) for name, value in sums.items()}
            for phase, sums in pair[0].items()
        }

    def hiding_tokens(self, layout: Layout, on: time.Machine) -> float:
        """Tokens in a micro-batch from which on kernels take longer than transfers, forward and backward."""
        few, many = (self.phases(size, layout, on) for size in SIZES[-2:])
        passes = [phase for phase in few if phase != "optimizer"]
        slopes = {phase: (many[phase]["kernels"] - few[phase]["kernels"]) / (SIZES[-1] - SIZES[-2]) for phase in passes}
        size = max(SIZES[-2] + (few[p]["transfers"] - few[p]["kernels"]) / slopes[p] for p in passes)
        return TOKENS * max(size, 0)


def rows(model: Simulated, gpus: int, gpu: str, network: float) -> list[dict[str, Any]]:
    """Each setting of a cluster that fits: sharding and micro-batch, with what they give."""
    on = time.machine(gpu, "bfloat16", network)
    found = []
    share = max(1, EXAMPLES // gpus)  # examples of a GPU in a step
    for replicas in (1, gpus // NODE) if gpus > NODE else (1,):
        layout = Layout(gpus=gpus, fsdp=gpus > 1, replicas=replicas)
        hides = model.hiding_tokens(layout, on) if gpus > 1 else 0.0
        for size in (size for size in range(1, share + 1) if share % size == 0):
            gib = model.gib(gpus // replicas, max(LONGEST, 1.1 * size * TOKENS))
            if gib > (1 - memory.ALLOWANCE) * on.gib:
                continue
            step = time.step_seconds(model.phases(size, layout, on), 1)
            optimizer, accumulation = step["optimizer"], share // size
            found.append(
                {
                    "gpus": gpus,
                    "gpu": gpu,
                    "network": network if gpus > NODE else None,
                    "sharding": "full_shard" if replicas == 1 else "hybrid_shard",
                    "micro_batch": size,
                    "gib": gib,
                    "gigabytes": accumulation * step["bytes"] / 1e9 if gpus > 1 else 0.0,
                    "step_s": accumulation * (step["step"] - optimizer) + optimizer,
                    "kernels_s": accumulation * step["kernels"] + optimizer,
                    "examples_per_s": gpus * share / (accumulation * (step["step"] - optimizer) + optimizer),
                    "hiding_tokens": hides,
                }
            )
    return found


def table(found: list[dict[str, Any]], gpus_named: list[str]) -> list[str]:
    """Of each cluster and sharding the fastest setting that fits, the kinds of GPU beside each other; in brackets a
    micro-batch that is another than the row's, whose memory is smaller in proportion to its tokens."""
    best: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in sorted(found, key=lambda row: row["step_s"]):
        best.setdefault((row["gpus"], row["network"], row["sharding"]), {}).setdefault(row["gpu"], row)
    columns = ["GPUs", "between nodes", "sharding", "micro-batch", "GiB a GPU", "GB to a GPU"]
    columns += [column for name in gpus_named for column in (f"{name}: step s", "hidden from")]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * 3 + " ---: |" * (len(columns) - 3)]
    for (gpus, network, sharding), by_gpu in sorted(
        best.items(), key=lambda one: (one[0][0], -(one[0][1] or 0), one[0][2])
    ):
        one = next(iter(by_gpu.values()))
        cells = [str(gpus), f"{network:g} Gb/s" if network else "–", sharding if gpus > 1 else "–"]
        cells += [str(one["micro_batch"]), f"{one['gib']:.1f}", f"{one['gigabytes']:.1f}"]
        for name in gpus_named:
            row = by_gpu.get(name)
            if row is None:
                cells += ["does not fit", ""]
                continue
            other = f" ({row['micro_batch']})" if row["micro_batch"] != one["micro_batch"] else ""
            cells += [f"{row['step_s']:.3f}{other}", f"{row['hiding_tokens']:,.0f}" if gpus > 1 else "–"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 4, 8, 64, 256, 1024])
    parser.add_argument("--gpu", nargs="+", choices=time.GPUS, default=list(time.GPUS))
    parser.add_argument("--networks", nargs="+", type=float, default=[400, 100], help="Gb/s of a node of eight GPUs")
    parser.add_argument("--config", help="a directory with the config of a model to take in place of those")
    args = parser.parse_args()

    result = []
    for name in args.models if args.config is None else [args.config]:
        sizes, changes = MODELS.get(name, ({}, {}))
        config = transformers.LlamaConfig(**sizes)
        if args.config:
            config = transformers.AutoConfig.from_pretrained(args.config)
        models = {sharded: Simulated(config, sharded, **changes) for sharded in {gpus > 1 for gpus in args.gpus}}
        found = []
        for gpus, gpu in itertools.product(args.gpus, args.gpu):
            for network in args.networks if gpus > NODE else args.networks[:1]:
                found += rows(models[gpus > 1], gpus, gpu, network)
        print(f"\n{name}\n", *table(found, args.gpu), sep="\n", flush=True)
        result += [{"model": name, **row} for row in found]
    print(json.dumps({"examples": EXAMPLES, "tokens": TOKENS, "rows": result}))


if __name__ == "__main__":
    main()
