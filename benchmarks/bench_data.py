"""What different training sets make of a real model: the same base, as many tokens of each set, the same measures.

    python -m alpaca.demo.base fetch --output_dir demo/base
    python benchmarks/bench_data.py --output data.jsonl --sets ours=alpaca_data.json other=<file>

Of each set, rows are drawn at random (three seeds) until their responses have --tokens tokens; one epoch of them with
train.py in one process, the demo's batch and learning rate. Measured on `eval_tasks.jsonl`: mean loss a token of its
reference answers, and the share of its checks that greedy answers pass (those that start no program). Intervals: 95 %,
bootstrap over tasks, of each set's mean over its seeds and of its difference to the first set. Runs are appended to
--output and not done twice; the last line is JSON.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import bench_recipe
import numpy as np
import torch
import transformers

from alpaca.data.examples import IGNORE_INDEX, SupervisedDataset, load_examples
from alpaca.data.files import read_records
from alpaca.demo.compare import answer_all, load
from alpaca.evaluation.statistics import bootstrap_interval
from alpaca.weights.files import sha256_of_file
from tests.data.checks import holds, starts_programs

EVAL_TASKS = ROOT / "eval_tasks.jsonl"
SEEDS = (0, 1, 2)
LONGEST = 256  # tokens of an answer
SETTING = {**bench_recipe.SHORT, "characters": None, "model_max_length": 1024}


def draw(path, tokenizer, tokens, seed):
    """Random rows of a set whose responses have `tokens` tokens together, the last row over the limit left out."""
    dataset, examples = SupervisedDataset(path, tokenizer), load_examples(path)
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    chosen, total = [], 0
    for index in order:
        row = dataset[index]
        total += int((row["labels"] != IGNORE_INDEX).sum())
        if total > tokens:
            return chosen
        chosen.append(examples[row["record"]])
    raise SystemExit(f"error: {path} has only {total} tokens of responses; lower --tokens")


def measure(path, tokenizer):
    """Per task: the summed loss and the number of tokens of its reference; per checked task: whether it passed."""
    model, reader = load(str(path), "bfloat16" if bench_recipe.has_bf16() else "float32")
    references = SupervisedDataset(str(EVAL_TASKS), tokenizer)
    losses = [bench_recipe.measure_loss(model, [references[index]]) for index in range(len(references))]
    tasks = [task for task in read_records(str(EVAL_TASKS)) if "check" in task and not starts_programs(task["check"])]
    answers = answer_all(model, reader, tasks, LONGEST, batch_size=32)
    return {
        "losses": [loss for loss, _ in losses],
        "tokens": [tokens for _, tokens in losses],
        "passed": [passes(task, answer.text) for task, answer in zip(tasks, answers, strict=True)],
        "ended": float(np.mean([answer.ended for answer in answers])),
    }


def passes(task, text):
    try:
        return holds(task["check"], {**task, "output": text.strip()})
    except Exception:  # no JSON, no list, no number: not what was asked for
        return False


def summary(runs, first):
    """Loss and share of passed checks of one set, each with its interval, and the paired differences to another's."""

    def per_token(losses, tokens):
        return losses.sum(axis=-1) / tokens.sum(axis=-1)

    def gap(losses, others, tokens):
        return per_token(losses, tokens) - per_token(others, tokens)

    def mean(values, *_):
        return values.mean(axis=-1)

    losses, others = (np.mean([run["losses"] for run in each], axis=0) for each in (runs, first))  # (tasks,)
    passed, passed_by_others = (100 * np.mean([run["passed"] for run in each], axis=0) for each in (runs, first))
    tokens = np.array(runs[0]["tokens"], dtype=float)
    return {
        "examples": [run["examples"] for run in runs],
        "loss": per_token(losses, tokens),
        "loss_interval": bootstrap_interval(per_token, losses, tokens),
        "loss_of_seeds": [sum(run["losses"]) / sum(run["tokens"]) for run in runs],
        "loss_difference": [gap(losses, others, tokens), *bootstrap_interval(gap, losses, others, tokens)],
        "passed": passed.mean(),
        "passed_interval": bootstrap_interval(mean, passed),
        "passed_difference": [(passed - passed_by_others).mean(), *bootstrap_interval(mean, passed - passed_by_others)],
        "ended": float(np.mean([run["ended"] for run in runs])),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="demo/base")
    parser.add_argument("--output", default="data.jsonl", help="runs are appended here")
    parser.add_argument("--tokens", type=int, default=40_000, help="of responses, a run")
    parser.add_argument("--sets", nargs="+", default=["ours=alpaca_data.json"], metavar="NAME=FILE")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.base, model_max_length=4096)
    sets = dict(pair.split("=", 1) for pair in args.sets)
    output = Path(args.output)
    runs = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    if missing := [path for path in sets.values() if not Path(path).is_file()]:
        parser.error(f"no such file: {', '.join(missing)}")
    hashes = {"eval_tasks": sha256_of_file(EVAL_TASKS), "base": None}
    hashes |= {name: sha256_of_file(Path(path)) for name, path in sets.items()}
    for name, seed in [("base", 0), *((name, seed) for seed in args.seeds for name in sets)]:
        known = {"set": name, "seed": seed, "tokens_a_run": args.tokens, "sha256": [hashes["eval_tasks"], hashes[name]]}
        if any(known.items() <= run.items() for run in runs):
            continue
        out = Path(tempfile.mkdtemp(prefix="data-"))
        try:
            run = {"examples": 0}
            if name != "base":
                run = bench_recipe.train(
                    args.base, {**SETTING, "seed": seed}, draw(sets[name], tokenizer, args.tokens, seed), out
                )
            run = known | run | measure(out / "tuned" if name != "base" else args.base, tokenizer)
        finally:
            shutil.rmtree(out)
        runs.append(run)
        with open(output, "a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        print({k: v for k, v in run.items() if k in ("set", "seed", "examples", "train_cpu_s")}, flush=True)
    mine = {
        name: [run for run in runs if run["set"] == name and run["sha256"] == [hashes["eval_tasks"], hashes[name]]]
        for name in ("base", *sets)
    }
    first = mine[next(iter(sets))]
    print(json.dumps({"tokens": args.tokens, **{name: summary(each, first) for name, each in mine.items()}}))


if __name__ == "__main__":
    main()
