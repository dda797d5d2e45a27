"""Training as in 2023 against train.py as it is, on examples as long as those of the 52K set, in one run.

    python benchmarks/bench_train.py                              # a LLaMA of 3.3 M parameters on the CPU
    python benchmarks/bench_train.py --model llama-7b \\
        --then "--bf16 True --gradient_checkpointing True" \\
        --ours "--bf16 True --gradient_checkpointing True --optim adamw_torch_fused --per_device_train_batch_size 16"

Three ways take the same steps from the same random weights, in turn in every round, each in a process of its own:

    then   the library's Trainer, padded random micro-batches in a fixed layout, float32 logits of all tokens
    ours   train.py's Trainer
    bare   a plain loop over the micro-batches of `ours`: what it leaves out is what the Trainer costs

`--then` and `--ours` take flags of train.py (`bare` has those of `ours`); whatever the micro-batch, a step has
`--step_examples`. The first step warms up and is not timed. Printed are medians over steps and rounds, JSON last.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers import HfArgumentParser, Trainer, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_pt_utils import get_model_param_count

from alpaca.data.examples import SupervisedDataset, TokenizedTexts
from alpaca.training import memory
from alpaca.training.arguments import TrainingArguments, correct_layer_names
from alpaca.training.attention import choose_collator
from alpaca.training.batches import DataCollatorForSupervisedDataset
from alpaca.training.callbacks import peak_flops
from alpaca.training.flags import DataArguments, ModelArguments
from alpaca.training.lora import add_adapters
from alpaca.training.trainer import AlpacaTrainer

# Tokens of the 52,002 examples, prompt and response, in the LLaMA tokenizer, cut at 512: the least, the middle of each
# 64th of them, and the tail. In between their distribution is taken as linear; its mean is then 125.9, theirs 125.7.
LENGTHS = [
    *(42, 49, 55, 58, 60, 63, 65, 67, 69, 70, 72, 74, 75, 77, 78, 80, 81, 82, 84, 85, 87, 88, 89, 91, 93, 94, 96, 98),
    *(100, 102, 104, 106, 109, 111, 113, 116, 119, 121, 124, 127, 129, 132, 135, 138, 140, 144, 147, 150, 153, 156),
    *(160, 164, 167, 171, 176, 181, 186, 193, 200, 209, 220, 233, 256, 293, 364, 392, 447, 512),
]
SHARES = [0, *((number + 0.5) / 64 for number in range(64)), 0.995, 0.998, 1]  # of the examples that are no longer
EXAMPLES, TOKENS, EPOCHS = 52002, 52002 * 125.7, 3  # of the 2023 run
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_7B |= {"vocab_size": 32001, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}


class SyntheticDataset(SupervisedDataset):
    """Random tokens in the true lengths. The prompt has 60 tokens (its template alone 40), or two thirds if less."""

    def __init__(self, rows: int, vocabulary: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        # One from each of as many equal parts of the distribution as there are rows: few rows have its mean too.
        shares = rng.permutation((np.arange(rows) + rng.random(rows)) / rows)
        lengths = np.interp(shares, SHARES, LENGTHS).round().astype(np.int32)
        ids = rng.integers(3, vocabulary, lengths.sum(), dtype=np.int32)
        prompts = np.minimum(60, lengths * 2 // 3).astype(np.int32)
        self.texts = TokenizedTexts(ids, np.cumsum(lengths) - lengths, lengths, prompts)
        self.rows, self.dropped = np.arange(rows), []


class Clock(TrainerCallback):
    """Seconds of each optimizer step, with the device's queue empty at both ends."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize(args.device)
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(args.device)
        self.seconds.append(time.perf_counter() - self.started)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def build_model(config: Any, model_args: ModelArguments, args: TrainingArguments) -> Any:
    transformers.set_seed(0)
    # What is sharded or offloaded must not lie on the GPU as a whole first; ZeRO-3 shards each tensor as it is made.
    devices = {"none": args.device, "fsdp": torch.device("cpu"), "deepspeed": contextlib.nullcontext()}
    with devices[args.sharding]:
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, model_args.dtype), attn_implementation=model_args.attn_implementation
        )
    return add_adapters(model, model_args, seed=0) if model_args.lora_r else model


def measure(way: str, flags: str, bench: argparse.Namespace) -> dict[str, Any]:
    """Take the steps one way, in this process."""
    with tempfile.TemporaryDirectory() as out:
        fixed = ["--output_dir", out, "--max_steps", str(bench.steps), "--logging_steps", "1", "--save_strategy", "no"]
        recipe = ["--learning_rate", "2e-5", "--lr_scheduler_type", "cosine", "--warmup_ratio", "0.03"]
        parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
        model_args, data_args, args = parser.parse_args_into_dataclasses([*recipe, *shlex.split(flags), *fixed])
        args.gradient_accumulation_steps = bench.step_examples // args.per_device_train_batch_size
        config = transformers.LlamaConfig(**LLAMA_7B)
        if bench.model != "llama-7b":
            config = transformers.AutoConfig.from_pretrained(bench.model)
        config.num_hidden_layers = bench.layers or config.num_hidden_layers
        tokenizer = type("Tokenizer", (), {"pad_token_id": 0})
        padded = DataCollatorForSupervisedDataset(tokenizer)
        collator = padded if way == "then" else choose_collator(config, tokenizer, model_args, data_args, args)
        correct_layer_names(args, config)
        model = build_model(config, model_args, args)
        data = SyntheticDataset(bench.steps * bench.step_examples, config.vocab_size)
        clock, common = Clock(), {"model": model, "args": args, "train_dataset": data}
        if way == "then":
            trainer = Trainer(**common, data_collator=padded, callbacks=[clock])
        else:
            balance = data_args.balance_tokens
            trainer = AlpacaTrainer(**common, data_collator=collator, balance_tokens=balance, callbacks=[clock])
        slots = [0]  # tokens and padding that the model was given
        trainer.model.register_forward_pre_hook(
            lambda module, inputs, named: slots.append(named["input_ids"].numel()), with_kwargs=True
        )
        if way == "bare":
            losses = train_bare(trainer, clock)
        else:
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        parameters = get_model_param_count(model)  # those that ZeRO-3 sharded, too
        unset_hf_deepspeed_config()  # or the model that the estimate makes would be sharded by ZeRO-3 too
        cuda = args.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # The estimate for the fullest micro-batch that there was, laid end to end or padded to one width.
        rows = args.per_device_train_batch_size if collator is padded else 1
        plan = memory.read_plan(model_args, args, packed=collator is not padded)
        layout = dataclasses.replace(plan.layout, batch_size=rows, length=max(slots) // rows)
        if dist.is_initialized():
            dist.destroy_process_group()  # the simulation makes one of its own
        return {
            "seconds": clock.seconds,
            "losses": losses,
            "slots": sum(slots),
            "tokens": int(data.lengths.sum()),
            "parameters": parameters,
            "peak_gib": peak / 2**30,
            "estimated_gib": memory.estimate(config, dataclasses.replace(plan, layout=layout))["total"],
            "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        }


def train_bare(trainer: AlpacaTrainer, clock: Clock) -> list[float]:
    """Forward, backward, clipping, AdamW: nothing else. Returns each step's loss."""
    args, accelerator, state = trainer.args, trainer.accelerator, trainer.state
    trainer.create_optimizer_and_scheduler(args.max_steps)
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    model = accelerator.prepare(trainer.model).train()
    if args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    micro_batches = list(trainer.get_train_dataloader())
    for batch in micro_batches:
        del batch["records"]  # which no model takes
    losses = []
    for first in range(0, len(micro_batches), args.gradient_accumulation_steps):
        clock.on_step_begin(args, state, None)
        batches = micro_batches[first : first + args.gradient_accumulation_steps]
        labels = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        total = 0
        for batch in batches:
            loss = model(**batch, num_items_in_batch=labels).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        clock.on_step_end(args, state, None)
        losses.append(total.item())
    return losses


def matmul_flops() -> float:
    """float32 FLOP/s of a large matrix product on this machine's CPU, the best of some tries."""
    a = torch.randn(1024, 1024)
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - started)
    return 2 * 1024**3 / min(seconds)


def summarize(rounds: list[dict[str, Any]], peak: float | None) -> dict[str, Any]:
    seconds = statistics.median(s for one in rounds for s in one["seconds"][1:])
    tokens = rounds[0]["tokens"] / len(rounds[0]["seconds"])  # of one step
    flops = 6 * rounds[0]["parameters"] * tokens / seconds
    return {
        "step_seconds": round(seconds, 4),
        "useful_tokens_per_second": round(tokens / seconds),
        "padding_share": round(1 - rounds[0]["tokens"] / rounds[0]["slots"], 3),
        "peak_gib": round(max(one["peak_gib"] for one in rounds), 2),  # on the CPU of the process, Python and all
        "estimated_gib": round(rounds[0]["estimated_gib"], 2),
        "mfu": round(flops / peak, 3) if peak else None,
        "minutes_for_52k_x_3": round(TOKENS * EPOCHS / (tokens / seconds) / 60, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model", default=str(ROOT / "configs" / "llama_tiny"), help="a config's directory, or llama-7b"
    )
    parser.add_argument("--layers", type=int, help="this many layers instead of the config's")
    parser.add_argument("--then", default="", help="flags of train.py for the way of 2023")
    parser.add_argument("--ours", default="", help="flags of train.py for ours")
    parser.add_argument("--ways", default="then,ours,bare")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps a round")
    parser.add_argument("--step_examples", type=int, default=128)
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one way, in this process
    bench = parser.parse_args()
    flags = {"then": f"--per_device_train_batch_size 4 {bench.then}"}
    flags["ours"] = flags["bare"] = f"--per_device_train_batch_size 4 {bench.ours}"
    if bench.measure:
        return print(json.dumps(measure(bench.measure, flags[bench.measure], bench)))

    ways = bench.ways.split(",")
    results = {way: [] for way in ways}
    for _ in tqdm(range(bench.rounds), desc="rounds", disable=None):
        for way in ways:
            sharded = "--fsdp" in flags[way] or "--deepspeed" in flags[way]  # neither starts without a launcher
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"] if sharded else []
            command = [sys.executable, *launcher, __file__, *sys.argv[1:], "--measure", way]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"error: {way} failed:\n{done.stderr[-3000:]}")
            results[way].append(json.loads(done.stdout.splitlines()[-1]))

    device = results[ways[0]][0]["device"]
    peak = peak_flops(device) or (matmul_flops() if device.startswith("CPU") else None)
    summary = {way: summarize(rounds, peak) for way, rounds in results.items()}
    for way, figures in summary.items():
        print(way, " ".join(f"{name} {value}" for name, value in figures.items()))
    if "then" in ways and "ours" in ways:
        pairs = zip(results["then"], results["ours"], strict=True)
        ratios = [statistics.median(a["seconds"][1:]) / statistics.median(b["seconds"][1:]) for a, b in pairs]
        summary["ratio"] = round(statistics.median(ratios), 2)
        differences = zip(results["then"][0]["losses"], results["ours"][0]["losses"], strict=True)
        summary["largest_loss_difference"] = max(abs(a - b) for a, b in differences)
    if "bare" in ways and "ours" in ways:
        pairs = zip(results["ours"], results["bare"], strict=True)
        shares = [1 - statistics.median(b["seconds"][1:]) / statistics.median(a["seconds"][1:]) for a, b in pairs]
        summary["trainer_share"] = round(statistics.median(shares), 4)
    summary |= {
        "device": device,
        "peak_tflops": peak and round(peak / 1e12, 3),
        "parameters": results[ways[0]][0]["parameters"],
    }
    summary |= {"flags": flags, "torch": torch.__version__, "transformers": transformers.__version__}
    summary |= {"python": platform.python_version(), "cores": os.cpu_count(), "commit": commit()}
    print(json.dumps(summary))


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
