"""What ten times the data costs: checking, tokenizing, batching and resuming at 52,000 and at 520,000 examples.

    python benchmarks/bench_growth.py [--rows 52000 520000] [--model_name_or_path configs/llama_tiny]

The examples are drawn from the shipped data and numbered, so that no two are the same. Each stage runs in a process of
its own: wall and CPU seconds (of all threads), and how far its memory peaks above what it starts with: the imports, and
what the stage before has made. The last column is the CPU time of one example in the largest set over that in the
smallest: 1 is linear. The last line is JSON.
"""

import argparse
import json
import multiprocessing
import os
import pickle
import platform
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import accelerate
import transformers

from alpaca.data.examples import SupervisedDataset, load_examples
from alpaca.training.arguments import TrainingArguments
from alpaca.training.batches import BalancedBatchSampler, DataCollatorWithoutPadding
from alpaca.training.special_tokens import complete_tokenizer
from alpaca.training.trainer import AlpacaTrainer

STEP = 128  # examples
STAGES = {
    "check": "read and check",
    "tokenize": "read, check and tokenize",
    "batch 1": "an epoch's micro-batches, 1 process",
    "batch 8": "an epoch's micro-batches, 8 processes",
    "resume": "from 9/10 of an epoch to the next batch",
}


def write_examples(path: Path, rows: int) -> None:
    shipped = json.loads((ROOT / "alpaca_data.json").read_text())
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            example = rng.choice(shipped)
            numbered = {**example, "instruction": f"{example['instruction']} ({number})"}
            file.write(("[" if number == 0 else ",\n") + json.dumps(numbered, ensure_ascii=False))
        file.write("]")


def batch(dataset: SupervisedDataset, processes: int) -> None:
    """Micro-batches of 4, 128 examples a step."""
    order = random.Random(0).sample(range(len(dataset)), len(dataset))
    accumulation = STEP // (4 * processes)
    for _ in BalancedBatchSampler(order, dataset.lengths, 4, processes, accumulation, padded=False):
        pass


def resume(dataset: SupervisedDataset) -> None:
    """What the Trainer does with its data when it goes on in the middle of an epoch."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": STEP // 4, "use_cpu": True}
    with tempfile.TemporaryDirectory() as output:
        trainer = AlpacaTrainer(
            model=transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, **sizes)),
            args=TrainingArguments(output_dir=output, **options),
            train_dataset=dataset,
            data_collator=DataCollatorWithoutPadding(),
            balance_tokens=True,
        )
        loader = trainer.get_train_dataloader()
        next(iter(accelerate.skip_first_batches(loader, len(loader) * 9 // 10)))


def run_stage(stage: str, directory: Path, model_name_or_path: str) -> dict[str, float]:
    data, tokenized = directory / "data.json", directory / "tokenized.pickle"
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_name_or_path, model_max_length=512)
    complete_tokenizer(tokenizer)
    dataset = None
    if tokenized.exists():
        with open(tokenized, "rb") as file:
            dataset = pickle.load(file)
    before, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    if stage == "check":
        load_examples(str(data))
    elif stage == "tokenize":
        dataset = SupervisedDataset(str(data), tokenizer)
    elif stage == "resume":
        resume(dataset)
    else:
        batch(dataset, processes=int(stage.removeprefix("batch ")))
    wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_SELF)
    with open(tokenized, "wb") as file:
        pickle.dump(dataset, file, protocol=5)  # arrays are then read without a second copy, which would count
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, "mib": (after.ru_maxrss - before.ru_maxrss) / 1024}


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Forked, so that it starts with the imports and with nothing that another stage has allocated."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*arguments)))
    process.start()
    sender.close()  # here; a process that fails then ends the wait too
    answer = receiver.recv()
    process.join()
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--rows", type=int, nargs="+", default=[52_000, 520_000])
    parser.add_argument("--model_name_or_path", default=str(ROOT / "configs" / "llama_tiny"))
    args = parser.parse_args()
    results: dict[str, dict[int, dict[str, float]]] = {stage: {} for stage in STAGES}
    with tempfile.TemporaryDirectory() as directory:
        for rows in args.rows:
            Path(directory, str(rows)).mkdir()
            write_examples(Path(directory, str(rows), "data.json"), rows)
        for stage in STAGES:
            for rows in args.rows:  # one after the other, so that other work on the machine weighs on both
                where = Path(directory, str(rows))
                results[stage][rows] = in_a_process(run_stage, stage, where, args.model_name_or_path)

    sizes = [f"{rows:,}: wall s | CPU s | MiB" for rows in args.rows]
    print("| stage | " + " | ".join(sizes) + " | CPU an example, × |\n|" + " --- |" * (2 + 3 * len(sizes)))
    for stage, name in STAGES.items():
        figures = [f"{r['wall_s']:.2f} | {r['cpu_s']:.2f} | {r['mib']:.0f}" for r in results[stage].values()]
        each = [results[stage][rows]["cpu_s"] / rows for rows in (min(args.rows), max(args.rows))]
        print(f"| {name} | " + " | ".join(figures) + f" | {each[1] / each[0]:.2f} |")
    print(json.dumps({"stages": results, "cores": os.cpu_count(), "python": platform.python_version()}))


if __name__ == "__main__":
    main()
