"""A plan on paper: what FSDP moves in a step on several GPUs, where compute hides it, which micro-batch to take.

    python benchmarks/plan_sharding.py                                # LLaMA-7B, one to four nodes of eight GPUs
    python benchmarks/plan_sharding.py --model_name_or_path <dir> --mfu 0.45 --nodes 1 2 --node_links 25

Nothing is measured here. Memory is that of `train.py --estimate_memory`, simulated; the rest is this arithmetic:

- A micro-batch gathers the bf16 weights in its forward pass and, with full_shard, again in its backward pass;
  shard_grad_op keeps them in between. The last of a step scatters the gradients, with sync_each_batch every one does.
  A GPU receives (N - 1) / N of what is gathered or scattered, in a ring over all N GPUs.
- In a ring over several nodes, what enters a node enters once, spread over its GPUs' network cards, and goes on over
  NVLink. So the ring runs at the speed of NVLink or of all the node's cards together, whichever is less.
- A token costs 2 FLOPs a parameter forward and 4 backward, 6 with checkpointing. The next layer's weights travel while
  one computes: the longer of the two counts, forward and backward apart.

Left out: the first layer's weights and the last gradients, which nothing hides; the optimizer's own milliseconds; that
small matrices multiply slower than --mfu says. Sharding inside each node and replicas across them (hybrid) is left out
too: train.py does not offer it. The last line is JSON, with all rows; the table has, of several nodes, only the best.
"""

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import transformers

from alpaca.training import memory
from alpaca.training.attention import BY_EXAMPLE
from alpaca.training.callbacks import peak_flops
from alpaca.training.simulation import Layout

# Name → memory in GiB as CUDA reports it, NVLink in GB/s in each direction (the vendor's data sheets give both
# directions together: 600 for the A100, 900 for the H100 and the H200).
GPUS = {"A100": (79.2, 300), "H100": (79.2, 450), "H200": (139.8, 450)}
GPUS_PER_NODE = 8
LONGEST = 512  # tokens of an example, the recipe's model_max_length
COMPUTE_BYTES = 2  # bf16 compute, gathers and scatters; the weights are float32


@dataclass(frozen=True)
class Cluster:
    gpus: int  # of all nodes
    flops: float  # FLOP/s that one GPU reaches
    link: float  # bytes/s that one GPU receives in a ring over all of them
    gib: float  # of one GPU


@dataclass(frozen=True)
class Setting:
    """How train.py is started."""

    micro_batch: int  # examples
    accumulation: int
    reshard: bool = True  # full_shard; False: shard_grad_op
    sync_each_batch: bool = False
    checkpointing: bool = False

    def __str__(self) -> str:
        words = ["full_shard" if self.reshard else "shard_grad_op"]
        words += ["sync_each_batch"] * self.sync_each_batch + ["checkpointing"] * self.checkpointing
        return ", ".join(words)


def ring_speed(nvlink: float, node_link: float, nodes: int) -> float:
    """Bytes/s that each GPU receives; `node_link` is the network card of one GPU."""
    return nvlink if nodes == 1 else min(nvlink, GPUS_PER_NODE * node_link)


def seconds_and_bytes(parameters: int, tokens: float, cluster: Cluster, setting: Setting) -> dict[str, float]:
    """One optimizer step whose micro-batches have `tokens` tokens each. Bytes are what one GPU receives."""
    whole = COMPUTE_BYTES * parameters * (cluster.gpus - 1) / cluster.gpus
    syncs = setting.accumulation if setting.sync_each_batch else 1
    forward = 2 * parameters * tokens / cluster.flops  # seconds of compute
    backward = forward * (3 if setting.checkpointing else 2)
    gather = whole / cluster.link  # seconds
    gather_again = gather if setting.reshard else 0.0
    without_sync = max(forward, gather) + max(backward, gather_again)
    with_sync = max(forward, gather) + max(backward, gather_again + gather)
    moved = whole * (setting.accumulation * (2 if setting.reshard else 1) + syncs)
    compute = setting.accumulation * (forward + backward)
    step = syncs * with_sync + (setting.accumulation - syncs) * without_sync
    return {"bytes": moved, "communication_s": moved / cluster.link, "compute_s": compute, "step_s": step}


def memory_gib(simulated: Callable[..., float], tokens: float, cluster: Cluster, setting: Setting) -> float:
    """Of the fullest micro-batch: balanced ones are within a tenth of the mean, or hold one longest example.

    Memory grows in proportion to the tokens, so two sizes are simulated for each setting (`simulated_gib`).
    """
    flags = (
        cluster.gpus,
        setting.reshard,
        min(setting.accumulation, 2),
        setting.sync_each_batch,
        setting.checkpointing,
    )
    few, many = (simulated(length, *flags) for length in (LONGEST, 4 * LONGEST))
    length = max(LONGEST, 1.1 * tokens)
    return few + (many - few) * (length - LONGEST) / (3 * LONGEST)


def simulated_gib(
    config: transformers.PretrainedConfig, length: int, gpus: int, reshard: bool, accumulation: int, *flags: bool
) -> float:
    sync_each_batch, checkpointing = flags
    layout = Layout(
        gpus=gpus,
        fsdp=True,
        reshard=reshard,
        compute_dtype="bfloat16",
        batch_size=length // LONGEST,
        length=LONGEST,
        accumulation=accumulation,
        sync_each_batch=sync_each_batch,
        attention=BY_EXAMPLE,
        checkpointing=checkpointing,
    )
    return memory.estimate(config, memory.Plan(layout))["total"]


def options(
    parameters: int,
    simulated: Callable[..., float],
    cluster: Cluster,
    examples_per_step: int,
    tokens_per_example: float,
) -> list[dict]:
    """For each size of micro-batch the fastest setting that fits (of equally fast ones the first), and which to take.

    Recommended is the smallest micro-batch whose step is within 2 % of the fastest: where communication can be hidden,
    the smallest that hides it.
    """
    rows = []
    share = examples_per_step // cluster.gpus  # examples of one GPU in a step
    for micro_batch in (size for size in range(1, share + 1) if share % size == 0):
        tokens = micro_batch * tokens_per_example
        fitting = []
        for flags in itertools.product((True, False), (False, True), (False, True)):  # the plainest first
            setting = Setting(micro_batch, share // micro_batch, *flags)
            gib = memory_gib(simulated, tokens, cluster, setting)
            if gib <= (1 - memory.ALLOWANCE) * cluster.gib:
                times = seconds_and_bytes(parameters, tokens, cluster, setting)
                row = {"micro_batch": micro_batch, "tokens": tokens, "flags": str(setting), "gib": gib, **times}
                fitting.append(row | {"hidden": times["step_s"] < 1.0001 * times["compute_s"]})
        if fitting:
            rows.append(min(fitting, key=lambda row: round(row["step_s"], 4)))
    if rows:
        fastest = min(row["step_s"] for row in rows)
        next(row for row in rows if row["step_s"] <= 1.02 * fastest)["recommended"] = True
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model_name_or_path", help="a config other than LLaMA-7B's")
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=["A100", "H200"])
    parser.add_argument("--nodes", nargs="+", type=int, default=[1, 2, 4], help="of eight GPUs each")
    parser.add_argument(
        "--node_links",
        nargs="+",
        type=float,
        default=[1.5625, 12.5, 25, 50],
        help="GB/s of one GPU's network card; 12.5 is 100 Gb/s, and 1.5625 that of one such card for eight GPUs",
    )
    parser.add_argument(
        "--mfu", type=float, default=0.5, help="share of the dense bf16 peak that compute alone reaches"
    )
    parser.add_argument("--link_efficiency", type=float, default=0.8, help="share of the nominal link speed in a ring")
    parser.add_argument("--examples_per_step", type=int, default=128)
    parser.add_argument(
        "--tokens_per_example",
        type=float,
        default=125.7,
        help="mean over the 52,002 examples of 2023, LLaMA's tokenizer, cut at 512 (read off plots, 2 %% accurate)",
    )
    args = parser.parse_args()

    config = transformers.LlamaConfig()  # the library's defaults are LLaMA-7B's sizes
    if args.model_name_or_path:
        config = transformers.AutoConfig.from_pretrained(args.model_name_or_path)
    parameters = memory.count_parameters(config, Layout())[0]
    simulated = functools.cache(functools.partial(simulated_gib, config))
    columns = "GPUs", "ring, GB/s", "micro-batch, examples (mean tokens)", "flags", "GB a step to one GPU"
    columns += "through one card", "communication s", "compute s", "hidden", "memory, GiB", "step s", ""
    print(f"{parameters / 1e9:.2f}e9 parameters, {args.examples_per_step} examples a step\n")
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    result = []
    for nodes, name in itertools.product(args.nodes, args.gpu):
        gib, nvlink = GPUS[name]
        for node_link in args.node_links if nodes > 1 else [0.0]:
            link = args.link_efficiency * ring_speed(nvlink, node_link, nodes)
            cluster = Cluster(nodes * GPUS_PER_NODE, args.mfu * peak_flops(name), 1e9 * link, gib)
            where = f"{nodes} × 8 {name}" + (f", {node_link:g} GB/s a card" if nodes > 1 else "")
            for row in options(parameters, simulated, cluster, args.examples_per_step, args.tokens_per_example):
                result.append({"where": where, "ring_gb_s": link, **row})
                if nodes > 1 and not row.get("recommended"):
                    continue
                through_card = f"{row['bytes'] / GPUS_PER_NODE / 1e9:.1f}" if nodes > 1 else ""
                print(
                    f"| {where} | {link:.4g} | {row['micro_batch']} ({row['tokens']:.0f}) | {row['flags']} | "
                    f"{row['bytes'] / 1e9:.1f} | {through_card} | "
                    f"{row['communication_s']:.3f} | {row['compute_s']:.3f} | "
                    f"{'yes' if row['hidden'] else 'no'} | {row['gib']:.1f} | {row['step_s']:.3f} | "
                    f"{'recommended' if row.get('recommended') else ''} |"
                )
    print(json.dumps({"parameters": parameters, "mfu": args.mfu, "rows": result}))


if __name__ == "__main__":
    main()
