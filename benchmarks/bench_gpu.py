"""LLaMA-7B on one large GPU: the settings worth comparing, each through bench_train.py, as one table.

    python benchmarks/bench_gpu.py --output gpu.jsonl    # some 20 minutes on an H200; --only LoRA for one setting

Real sizes, random weights, 128 examples a step in the lengths of the 52K set. A setting that runs out of memory or
lacks a package is part of the result. What departs from the recipe (float32 weights, AdamW) is named. Every finished
setting is a line of JSON in --output.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

BENCH = Path(__file__).resolve().parent / "bench_train.py"
SAVING = "--bf16 True --tf32 True --gradient_checkpointing True"
FUSED = f"{SAVING} --optim adamw_torch_fused"
WHOLE = "--bf16 True --tf32 True --optim adamw_torch_fused"
BF16 = "--bf16 True --dtype bfloat16 --optim adamw_torch_fused"
# Name, departure from the recipe, which way of bench_train.py, its flags.
SETTINGS = [
    ("2023: padded, 4 a micro-batch", "", "then", SAVING),
    ("2023, eager attention", "", "then", f"{SAVING} --attn_implementation eager"),
    ("ours, 4", "", "ours", f"{FUSED} --per_device_train_batch_size 4"),
    ("ours, 16", "", "ours", f"{FUSED} --per_device_train_batch_size 16"),
    ("ours, 32", "", "ours", f"{FUSED} --per_device_train_batch_size 32"),
    ("ours, 16, bare loop", "", "bare", f"{FUSED} --per_device_train_batch_size 16"),
    ("ours, 16, Liger", "", "ours", f"{FUSED} --per_device_train_batch_size 16 --use_liger_kernel True"),
    (
        "ours, 16, flash attention 2",
        "",
        "ours",
        f"{FUSED} --per_device_train_batch_size 16 --attn_implementation flash_attention_2",
    ),
    ("ours, 16, torch.compile", "", "ours", f"{FUSED} --per_device_train_batch_size 16 --torch_compile True"),
    ("ours, 4, nothing recomputed", "", "ours", f"{WHOLE} --per_device_train_batch_size 4"),
    ("ours, 8, nothing recomputed", "", "ours", f"{WHOLE} --per_device_train_batch_size 8"),
    ("ours, 16, nothing recomputed", "", "ours", f"{WHOLE} --per_device_train_batch_size 16"),
    (
        "bf16 weights, 8, nothing recomputed",
        "weights rounded to bf16",
        "ours",
        f"{BF16} --per_device_train_batch_size 8",
    ),
    (
        "8-bit AdamW, 8, nothing recomputed",
        "optimizer states in 8 bits",
        "ours",
        "--bf16 True --optim adamw_bnb_8bit --per_device_train_batch_size 8",
    ),
    (
        "FSDP with CPU offload, 16",
        "",
        "ours",
        f"{SAVING} --per_device_train_batch_size 16 --fsdp 'full_shard auto_wrap offload'",
    ),
    ("LoRA 16, 8", "adapters only", "ours", f"{BF16} --lora_r 16 --per_device_train_batch_size 8"),
]
COLUMNS = ("useful_tokens_per_second", "mfu", "padding_share", "minutes_for_52k_x_3", "peak_gib", "estimated_gib")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="llama-7b", help="a config's directory, or llama-7b")
    parser.add_argument("--only", default="", help="settings whose name has this in it")
    parser.add_argument("--steps", default="4", help="optimizer steps; the first is not timed")
    parser.add_argument("--step_examples", default="128")
    parser.add_argument("--output", default="gpu.jsonl", help="lines of JSON are appended here")
    args = parser.parse_args()

    print("| setting | departure |", " | ".join(COLUMNS), "|")
    print("| --- " * (len(COLUMNS) + 2) + "|", flush=True)
    chosen = [setting for setting in SETTINGS if args.only in setting[0]]
    for name, departure, way, flags in tqdm(chosen, desc="settings", disable=None):
        options = ["--model", args.model, "--rounds", "1", "--steps", args.steps, "--step_examples", args.step_examples]
        command = [sys.executable, str(BENCH), *options, "--ways", way, "--then" if way == "then" else "--ours", flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            reason = next(
                (line for line in reversed(lines) if "rror" in line and "ChildFailed" not in line), lines[-1]
            )[:200]
            result, cells = {"failed": reason}, [f"failed: {reason}", *[""] * (len(COLUMNS) - 1)]
        else:
            result = json.loads(done.stdout.splitlines()[-1])
            cells = [str(result[way][column]) for column in COLUMNS]
        with open(args.output, "a") as file:
            file.write(json.dumps({"setting": name, "departure": departure, **result}) + "\n")
        print("|", " | ".join([name, departure, *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
