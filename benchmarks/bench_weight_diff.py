"""Wall time and peak memory of weight diffs, beside the method of 2023 and `cp`, in one run.

    python benchmarks/bench_weight_diff.py              # 1.26 B parameters, bfloat16; 15 GB in a temporary directory
    python benchmarks/bench_weight_diff.py --layers 2 --rounds 1
    python benchmarks/bench_weight_diff.py --without_2023    # where less than 14 GiB of memory are free

The 2023 method: load both models as float32, subtract (or add) their state dicts, save. "safe_open": weight_diff with
safetensors' own sliced reading in place of its reader. Rounds are interleaved, so that a busy minute hits all methods
alike. Everything runs in a process of its own; weight_diff's times include bringing the files to the disk, the others'
do not. The last line is JSON.
"""

import argparse
import functools
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "weight_diff.py"


def build(directory: Path, layers: int) -> None:
    """Two LLaMAs in bfloat16, `raw` and `tuned`, which has one row more and values near raw's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, vocabulary in (("raw", 32000), ("tuned", 32001)):
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=layers,
            num_attention_heads=32,
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        # Random enough for a subtraction: 16 M values repeat.
        values = torch.randn(2**24, generator=generator).mul_(0.02)
        if name == "tuned":
            values += torch.randn(2**24, generator=generator).mul_(0.001)
        with torch.no_grad():
            for parameter in model.parameters():
                flat = parameter.view(-1)
                for start in range(0, flat.numel(), len(values)):
                    flat[start : start + len(values)] = values[: flat.numel() - start]
        model.save_pretrained(directory / name)


def method_of_2023(raw_path: Path, other_path: Path, output: Path, sign: int) -> None:
    """sign −1: make_diff (other is the tuned model); +1: recover (other is the diff)."""
    import torch
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(other_path, dtype=torch.float32)
    raw = AutoModelForCausalLM.from_pretrained(raw_path, dtype=torch.float32)
    with torch.inference_mode():
        state_raw, state = raw.state_dict(), other.state_dict()
        for name in state:
            base = state_raw[name]
            if len(base) < len(state[name]):
                base = torch.cat([base, base.mean(dim=0, keepdim=True)])
            state[name].add_(base, alpha=sign)
        if sign > 0:
            sum(state[name].sum() for name in state)  # the check of 2023
    other.save_pretrained(output)


def make_diff_reading_with_safe_open(raw_path: str, tuned_path: str, output: str) -> None:
    """numpy has no bfloat16, so the slices are torch's: rows around the piece that is wanted."""
    sys.path.insert(0, str(SCRIPT.parent))
    import torch
    from safetensors import safe_open

    import weight_diff
    from alpaca.weights.files import Checkpoint

    open_once = functools.cache(lambda file: safe_open(file, "pt"))

    def read(checkpoint, name, start, stop):
        tensor = checkpoint.tensors[name]
        row = math.prod(tensor.shape[1:])
        rows = open_once(tensor.file).get_slice(name)[start // row : -(-stop // row)]
        return rows.flatten().view(torch.int16).numpy().view("<u2")[start % row :][: stop - start]

    Checkpoint.read = read
    weight_diff.make_diff(raw_path, tuned_path, output, verify=False)


def timed(command: list[str]) -> tuple[float, float, float, str]:
    """Seconds, peak memory in MiB, seconds of processor time, standard error.

    This process stays small: its own peak would count.
    """
    os.sync()
    started = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit {process.returncode}\n{said}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22, help="of 51 M parameters each, beside 131 M (default 22)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--without_2023", action="store_true", help="leave out that method, which takes 12 GiB of memory"
    )
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)  # how this script starts itself
    options = parser.parse_args()
    if options.only:
        step, *paths = options.only
        if step == "build":
            return build(Path(paths[0]), int(paths[1]))
        if step == "safe_open":
            return make_diff_reading_with_safe_open(*paths)
        return method_of_2023(*map(Path, paths), sign={"make": -1, "recover": 1}[step])

    itself = [sys.executable, __file__, "--only"]
    ours = [sys.executable, str(SCRIPT)]
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        subprocess.run([*itself, "build", place, str(options.layers)], check=True, stderr=subprocess.DEVNULL)
        raw, tuned, diff, old_diff = (str(place / name) for name in ("raw", "tuned", "diff", "old_diff"))
        out = str(place / "out")
        no_test = ["--test_inference", "False"]
        timed([*ours, "make_diff", raw, tuned, diff])
        if not options.without_2023:
            timed([*itself, "make", raw, tuned, old_diff])
        steps = {
            "cp": ["cp", "-r", tuned, out],
            "cp, and to the disk": ["sh", "-c", f"cp -r {tuned} {out} && sync {out}/*"],
            "make_diff": [*ours, "make_diff", raw, tuned, out],
            "make_diff --verify False": [*ours, "make_diff", raw, tuned, out, "--verify", "False"],
            "make_diff --verify False, safe_open": [*itself, "safe_open", raw, tuned, out],
            "make_diff of 2023": [*itself, "make", raw, tuned, out],
            "recover": [*ours, "recover", raw, diff, out, *no_test],
            "recover --verify False": [*ours, "recover", raw, diff, out, *no_test, "--verify", "False"],
            "recover of 2023": [*itself, "recover", raw, old_diff, out],
        }
        if options.without_2023:
            steps = {step: command for step, command in steps.items() if "2023" not in step}
        seconds: dict[str, list[float]] = {step: [] for step in steps}
        peaks: dict[str, list[float]] = {step: [] for step in steps}
        processor: dict[str, list[float]] = {step: [] for step in steps}
        shares: dict[str, str] = {}
        for _ in range(options.rounds):
            for step, command in steps.items():
                elapsed, peak, busy, said = timed(command)
                processor[step].append(busy)
                seconds[step].append(elapsed)
                peaks[step].append(peak)
                if found := re.search(r"sha256 took (\d+)%", said):
                    shares[step] = f"{found[1]} %"
                shutil.rmtree(out)
        bytes_of = {
            name: sum(f.stat().st_size for f in (place / name).iterdir())
            for name in ("tuned", "diff", "old_diff")
            if (place / name).exists()
        }

    median = {step: statistics.median(values) for step, values in seconds.items()}
    print(f"{'':36} seconds (median; all rounds)          peak MiB  CPU s  × cp  × 2023  sha256 share of threads' time")
    for step in steps:
        old = (
            median[step] / median[f"{step.split()[0]} of 2023"]
            if step.startswith(("make", "recover")) and not options.without_2023
            else float("nan")
        )
        rounds = " ".join(f"{value:.1f}" for value in seconds[step])
        print(
            f"{step:36} {median[step]:6.1f}  ({rounds:24}) {max(peaks[step]):10.0f} "
            f"{statistics.median(processor[step]):6.1f} {median[step] / median['cp']:6.2f} "
            f"{old:6.2f}   {shares.get(step, '')}"
        )
    result = {
        "benchmark": "weight_diff",
        "parameters": bytes_of["tuned"] // 2,
        "bytes": bytes_of,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load_average": os.getloadavg()[0],
        "seconds": {step: round(value, 2) for step, value in median.items()},
        "processor_seconds": {step: round(statistics.median(values), 2) for step, values in processor.items()},
        "peak_mib": {step: round(max(values)) for step, values in peaks.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
