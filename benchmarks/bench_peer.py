"""train.py beside TRL's SFTTrainer: the same model, examples and steps, in CPU-seconds a step, with the losses.

    python benchmarks/bench_peer.py --model_name_or_path demo/base      # some ten minutes in one thread

Both train all weights in bf16 mixed precision (float32 weights), with fused AdamW and one thread, on the first of the
shipped examples that have at most 420 characters, --step_examples a step. TRL gets the token ids and labels that
train.py makes, so that both learn the same tokens; its own settings stay as they are, except that it need not
recompute activations. It is installed for this alone, into a directory that is removed again. Each way is a process of
its own, in turn in every round. Processor time, which other work disturbs less than the clock; the first step warms up
and is not counted. JSON last.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TRL = "trl==1.16.0"


def clock():
    """A callback that notes the process's CPU-seconds at both ends of every step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds = []

        def on_step_begin(self, args, state, control, **kwargs):
            self.started = time.process_time()

        def on_step_end(self, args, state, control, **kwargs):
            self.seconds.append(time.process_time() - self.started)

    return Clock()


def flags_for_both(bench: argparse.Namespace, out: str) -> dict:
    """Arguments of the library's Trainer, under which both are subclasses of it."""
    return {
        **{"output_dir": out, "use_cpu": True, "bf16": bench.bf16, "optim": "adamw_torch_fused", "weight_decay": 0.0},
        **{"per_device_train_batch_size": bench.micro_batch, "max_steps": bench.steps, "learning_rate": 1e-4},
        **{"gradient_accumulation_steps": bench.step_examples // bench.micro_batch, "lr_scheduler_type": "cosine"},
        **{"warmup_steps": 2, "logging_steps": 1, "save_strategy": "no", "train_sampling_strategy": "sequential"},
    }


def run_ours(bench: argparse.Namespace, data: Path, out: str) -> dict:
    """train.py itself, with a clock in its Trainer."""
    import train

    watch = clock()
    train.AlpacaTrainer = functools.partial(train.AlpacaTrainer, callbacks=[watch])
    flags = {"model_name_or_path": bench.model_name_or_path, "data_path": data, **flags_for_both(bench, out)}
    sys.argv = ["train.py", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
    train.main()
    history = json.loads(Path(out, "trainer_state.json").read_text())["log_history"]
    return {"seconds": watch.seconds, "losses": [entry["loss"] for entry in history if "loss" in entry]}


def run_trl(bench: argparse.Namespace, data: Path, out: str) -> dict:
    import datasets
    import torch
    import transformers
    import trl

    from alpaca.data.examples import SupervisedDataset

    tokenizer = transformers.AutoTokenizer.from_pretrained(bench.model_name_or_path, model_max_length=512)
    model = transformers.AutoModelForCausalLM.from_pretrained(bench.model_name_or_path, dtype=torch.float32)
    rows = [
        {name: example[name].tolist() for name in ("input_ids", "labels")}
        for example in SupervisedDataset(str(data), tokenizer)
    ]
    config = trl.SFTConfig(**flags_for_both(bench, out), gradient_checkpointing=False, max_length=512, report_to="none")
    watch = clock()
    trainer = trl.SFTTrainer(
        model, config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, callbacks=[watch]
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": watch.seconds, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model_name_or_path", required=True, help="the demo's base, or another model's directory")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--step_examples", type=int, default=16)
    parser.add_argument("--micro_batch", type=int, default=16, help="examples computed at a time")
    parser.add_argument("--bf16", type=lambda word: word == "True", default=True, help="False: float32")
    parser.add_argument("--ways", default="ours,trl")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # way, data, output, in this process
    bench = parser.parse_args()
    if bench.measure:
        way, data, out = bench.measure
        return print(json.dumps({"ours": run_ours, "trl": run_trl}[way](bench, Path(data), out)))

    with tempfile.TemporaryDirectory() as directory:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{directory}/trl", TRL]
        subprocess.run(install, check=True)
        records = json.loads((ROOT / "alpaca_data.json").read_text())
        short = [record for record in records if len("".join(map(str, record.values()))) <= 420]
        data = Path(directory, "data.json")
        data.write_text(json.dumps(short[: bench.steps * bench.step_examples]))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join([f"{directory}/trl", environment.get("PYTHONPATH", "")])
        results = {way: [] for way in bench.ways.split(",")}
        for number in range(bench.rounds):
            for way in results:
                out = f"{directory}/{way}-{number}"
                command = [sys.executable, __file__, *sys.argv[1:], "--measure", way, str(data), out]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"error: {way} failed ({done.returncode}):\n{done.stderr[-3000:]}")
                results[way].append(json.loads(done.stdout.splitlines()[-1]))

    summary = {}
    for way, rounds in results.items():
        seconds = [second for one in rounds for second in one["seconds"][1:]]
        summary[way] = {
            "cpu_seconds_a_step": round(statistics.median(seconds), 2),
            "from_to": [round(min(seconds), 2), round(max(seconds), 2)],
            "losses": [round(loss, 4) for loss in rounds[0]["losses"]],
        }
        print(way, summary[way])
    if len(results) == 2:
        ours, trl = (summary[way] for way in ("ours", "trl"))
        summary["ratio"] = round(trl["cpu_seconds_a_step"] / ours["cpu_seconds_a_step"], 2)
        summary["largest_loss_difference"] = max(abs(a - b) for a, b in zip(ours["losses"], trl["losses"], strict=True))
    import torch
    import transformers

    summary |= {"trl": TRL, "torch": torch.__version__, "transformers": transformers.__version__}
    summary |= {"python": platform.python_version(), "arguments": vars(bench)}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
