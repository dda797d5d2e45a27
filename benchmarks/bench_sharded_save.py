"""A checkpoint under FSDP on two processes: written in parts by each, and whole by the first, as before.

    python benchmarks/bench_sharded_save.py                 # two gloo processes on the CPU, a LLaMA of 98 M parameters

Each layout is a run of train.py of two steps, each saved. For both ranks: seconds of the second save (manifest and
hashes included), MiB that it wrote, and how far memory rose above what was there before the first one. JSON last.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LAYOUTS = {"whole": "FULL_STATE_DICT", "in parts": "SHARDED_STATE_DICT"}


def memory(name: str) -> int:
    """Bytes: VmRSS is what this process has, VmHWM the most since the mark was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure(report: str, flags: list[str]) -> None:
    """train.py on one of the ranks; each save of a checkpoint is a line of `report`-RANK."""
    from alpaca.training.trainer import AlpacaTrainer

    save = AlpacaTrainer._save_checkpoint

    def measured(self, model, trial):
        self.accelerator.wait_for_everyone()
        Path("/proc/self/clear_refs").write_text("5")  # resets the mark
        before, started = memory("VmRSS"), time.perf_counter()
        written = Path("/proc/self/io").read_text()
        save(self, model, trial)
        seconds, rise = time.perf_counter() - started, memory("VmHWM") - before
        words = [text.split() for text in (written, Path("/proc/self/io").read_text())]
        first, last = (int(text[text.index("wchar:") + 1]) for text in words)
        with open(f"{report}-{os.environ['RANK']}", "a") as file:
            file.write(
                json.dumps({"seconds": seconds, "mib": rise / 2**20, "written_mib": (last - first) / 2**20}) + "\n"
            )

    AlpacaTrainer._save_checkpoint = measured
    sys.argv = ["train.py", *flags]
    runpy.run_path(str(ROOT / "tests" / "training" / "fsdp_on_cpu.py"), run_name="__main__")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--measure", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # report, flags of train.py
    bench = parser.parse_args()
    if bench.measure:
        return measure(bench.measure[0], bench.measure[1:])

    import transformers

    with tempfile.TemporaryDirectory() as directory:
        tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "configs" / "llama_tiny")
        size = {"hidden_size": bench.hidden_size, "intermediate_size": 3 * bench.hidden_size, "num_attention_heads": 12}
        config = transformers.LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=bench.layers, **size)
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(f"{directory}/base")
        tokenizer.save_pretrained(f"{directory}/base")
        records = json.loads((ROOT / "alpaca_data.json").read_text())
        Path(directory, "few.json").write_text(json.dumps(sorted(records, key=lambda record: len(str(record)))[:8]))
        summary = {"parameters": model.num_parameters(), "processes": 2}
        del model
        for layout, name in LAYOUTS.items():
            flags = ["--model_name_or_path", f"{directory}/base", "--data_path", f"{directory}/few.json"]
            flags += ["--output_dir", f"{directory}/out", "--max_steps", "2", "--save_steps", "1"]
            flags += ["--save_total_limit", "1", "--per_device_train_batch_size", "1"]
            flags += ["--fsdp", "full_shard auto_wrap", "--fsdp_config", json.dumps({"state_dict_type": name})]
            report = f"{directory}/{name}"
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
            command = [*launch, "--measure", report, *flags]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"error: {layout} failed:\n{done.stderr[-3000:]}")
            saves = [list(map(json.loads, Path(f"{report}-{rank}").read_text().splitlines())) for rank in (0, 1)]
            # What the first save frees, the process keeps, so that later ones do not rise above it.
            figures = {"seconds": -1, "written_mib": -1, "mib": 0}
            summary[layout] = {name: [round(rank[save][name], 1) for rank in saves] for name, save in figures.items()}
            print(layout, summary[layout], flush=True)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
