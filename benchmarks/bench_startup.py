"""Seconds until the commands answer, beside the imports that train.py can't do without. The last line is JSON.

    python benchmarks/bench_startup.py [--rounds 5]

Each round runs every command once; medians of wall and of CPU seconds. "One step" is a whole run of train.py for one
step of the embedded LLaMA on the shipped data; its wall seconds end at the line with the first loss.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LLAMA = """import sys, transformers
config = transformers.AutoConfig.from_pretrained("configs/llama_tiny")
transformers.AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[1])
transformers.AutoTokenizer.from_pretrained("configs/llama_tiny").save_pretrained(sys.argv[1])"""


def seconds(*command: str) -> tuple[float, float]:
    started, loss = time.perf_counter(), None
    cpu = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, text=True, **streams) as process:
        for line in process.stdout:
            if "'loss':" in line:
                loss = time.perf_counter() - started
    if process.returncode != 0:
        raise SystemExit(f"error: {' '.join(command)} ended with exit code {process.returncode}")
    wall = loss or time.perf_counter() - started
    return wall, sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - cpu


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        seconds("-c", LLAMA, out)
        step = ["--model_name_or_path", out, "--data_path", "alpaca_data.json", "--output_dir", f"{out}/tuned"]
        commands = {
            "import torch": ["-c", "import torch"],
            "import torch and the Trainer": ["-c", "import torch, transformers.trainer"],
            "train.py --help": ["train.py", "--help"],
            "train.py, one step": ["train.py", *step, "--max_steps", "1", "--logging_steps", "1"],
            "generate_instruction --help": ["-m", "generate_instruction", "--help"],
            "weight_diff.py --help": ["weight_diff.py", "--help"],
        }
        rounds = [{name: seconds(*command) for name, command in commands.items()} for _ in range(args.rounds)]
    medians = {name: [statistics.median(r[name][i] for r in rounds) for i in (0, 1)] for name in commands}
    for name, (wall, cpu) in medians.items():
        print(f"{name}: {wall:.2f} s, CPU {cpu:.2f} s")
    print(json.dumps(medians | {"rounds": args.rounds, "cores": os.cpu_count()}))


if __name__ == "__main__":
    main()
