"""LLaMA-7B on one large GPU: the settings worth comparing, each through bench_train.py, as one table.

    python benchmarks/bench_gpu.py --output gpu.jsonl                  # all of it: some 25 minutes on an H200
    python benchmarks/bench_gpu.py --budget_s 560 --output gpu.jsonl   # what fits, the rows that matter first
    python benchmarks/bench_gpu.py --only "80 GB" --output gpu.jsonl   # the settings whose name has this in it

Real sizes, random weights, 128 examples a step in the lengths of the 52K set. A setting that runs out of memory or
lacks a package is part of the result. What departs from the recipe (float32 weights, AdamW) is named. Every finished
setting is a row and a line of JSON in --output as soon as it is measured; settings with such a line are not run again.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

BENCH = Path(__file__).resolve().parent / "bench_train.py"
WHOLE = "--bf16 True --tf32 True --optim adamw_torch_fused"
LIGER = f"{WHOLE} --use_liger_kernel True"
SAVING = "--bf16 True --tf32 True --gradient_checkpointing True"
BF16 = "--bf16 True --dtype bfloat16 --optim adamw_torch_fused --use_liger_kernel True"
ZERO = f"--deepspeed '{BENCH.parents[1]}/configs/default_offload_opt_param.json'"
BATCH = "--per_device_train_batch_size"
# Name, departure from the recipe, which way of bench_train.py, its flags. Attention is one kernel in all of "ours", if
# not said otherwise. The likeliest to win and what they are compared with come first.
SETTINGS = [
    ("16, Liger, nothing recomputed", "", "ours", f"{LIGER} {BATCH} 16"),
    ("2023: padded, 4", "", "then", SAVING),
    ("32, Liger, nothing recomputed", "", "ours", f"{LIGER} {BATCH} 32"),
    ("16, Liger, recomputed", "", "ours", f"{LIGER} {BATCH} 16 --gradient_checkpointing True"),
    ("16, Liger, nothing recomputed, torch.compile", "", "ours", f"{LIGER} {BATCH} 16 --torch_compile True"),
    ("16, nothing recomputed", "", "ours", f"{WHOLE} {BATCH} 16"),
    ("80 GB: bf16 weights, 16, Liger", "weights rounded to bf16", "ours", f"{BF16} {BATCH} 16"),
    ("80 GB: LoRA 16, 16, Liger", "adapters only", "ours", f"{BF16} --lora_r 16 {BATCH} 16"),
    ("32, Liger, recomputed", "", "ours", f"{LIGER} {BATCH} 32 --gradient_checkpointing True"),
    ("8, Liger, nothing recomputed", "", "ours", f"{LIGER} {BATCH} 8"),
    ("16, Liger, bare loop", "", "bare", f"{LIGER} {BATCH} 16"),
    ("16, Liger, the library's masked attention", "", "ours", f"{LIGER} {BATCH} 16 --attn_implementation sdpa"),
    ("16, Liger, flash attention 2", "", "ours", f"{LIGER} {BATCH} 16 --attn_implementation flash_attention_2"),
    ("80 GB: bf16 weights, 32, Liger", "weights rounded to bf16", "ours", f"{BF16} {BATCH} 32"),
    (
        "80 GB: LoRA 16, 32, Liger, torch.compile",
        "adapters only",
        "ours",
        f"{BF16} --lora_r 16 {BATCH} 32 --torch_compile True",
    ),
    ("80 GB: 8-bit AdamW, 16", "optimizer states in 8 bits", "ours", f"--bf16 True --optim adamw_bnb_8bit {BATCH} 16"),
    ("80 GB: FSDP with CPU offload, 16", "", "ours", f"{SAVING} {BATCH} 16 --fsdp 'full_shard auto_wrap offload'"),
    ("80 GB: ZeRO-3 with CPU offload, 16", "", "ours", f"{SAVING} {BATCH} 16 {ZERO}"),
    ("2023, eager attention", "", "then", f"{SAVING} --attn_implementation eager"),
]
COLUMNS = ("useful_tokens_per_second", "mfu", "padding_share", "minutes_for_52k_x_3", "peak_gib", "estimated_gib")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="llama-7b", help="a config's directory, or llama-7b")
    parser.add_argument("--only", default="", help="settings whose name has this in it")
    parser.add_argument("--budget_s", type=float, default=float("inf"), help="end after so many seconds")
    parser.add_argument("--steps", default="4", help="optimizer steps; the first is not timed")
    parser.add_argument("--step_examples", default="128")
    parser.add_argument("--output", default="gpu.jsonl", help="lines of JSON are appended here")
    args = parser.parse_args()

    started, output = time.monotonic(), Path(args.output)
    done = {json.loads(line)["setting"] for line in output.read_text().splitlines()} if output.exists() else set()
    print("| setting | departure |", " | ".join(COLUMNS), "|")
    print("| --- " * (len(COLUMNS) + 2) + "|", flush=True)
    chosen = [setting for setting in SETTINGS if args.only in setting[0] and setting[0] not in done]
    for name, departure, way, flags in tqdm(chosen, desc="settings", disable=None):
        left = args.budget_s - (time.monotonic() - started)
        if left <= 0:
            sys.exit(f"--budget_s {args.budget_s:g} is used up before {name}; the same command goes on there")
        options = ["--model", args.model, "--rounds", "1", "--steps", args.steps, "--step_examples", args.step_examples]
        command = [sys.executable, str(BENCH), *options, "--ways", way, "--then" if way == "then" else "--ours", flags]
        code, stdout, stderr = run_for(left, command)
        if code is None:
            sys.exit(f"--budget_s {args.budget_s:g} is used up inside {name}; the same command goes on there")
        if code:
            lines = stderr.strip().splitlines() or ["nothing said"]
            reason = next(
                (line for line in reversed(lines) if "rror" in line and "ChildFailed" not in line), lines[-1]
            )[:200]
            result, cells = {"failed": reason}, [f"failed: {reason}", *[""] * (len(COLUMNS) - 1)]
        else:
            result = json.loads(stdout.splitlines()[-1])
            cells = [str(result[way][column]) for column in COLUMNS]
        with open(output, "a") as file:
            file.write(json.dumps({"setting": name, "departure": departure, **result}) + "\n")
        print("|", " | ".join([name, departure, *cells]), "|", flush=True)


def run_for(seconds: float, command: list[str]) -> tuple[int | None, str, str]:
    """Exit code, output and errors of a command with all the processes that it starts; None when its time ran out."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        stdout, stderr = process.communicate(timeout=None if seconds == float("inf") else seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None, "", ""
    return process.returncode, stdout, stderr


if __name__ == "__main__":
    main()
