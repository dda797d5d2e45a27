"""Tokenizing and labelling a data set: one call an example, as in 2023, against `examples.tokenize`.

    python benchmarks/bench_tokenize.py [--rows 52000] [--rounds 5] [--model_name_or_path configs/llama_tiny]

Both run in turn in every round; the median rate of each and the median of the rounds' ratios are printed, JSON last.
The 2023 way is timed on at most 2,000 examples a round, since its rate does not depend on their number.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import transformers

from alpaca.data.examples import load_examples, tokenize
from alpaca.prompts import format_prompt
from alpaca.training.special_tokens import complete_tokenizer


def one_call_an_example(sources, targets, tokenizer):
    rows = []
    for source, target in zip(sources, targets, strict=True):
        options = {"return_tensors": "pt", "padding": "longest", "max_length": 512, "truncation": True}
        input_ids = tokenizer(source + target, **options).input_ids[0]
        labels = input_ids.clone()
        labels[: tokenizer(source, **options).input_ids[0].ne(tokenizer.pad_token_id).sum()] = -100
        rows.append((input_ids, labels))
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=52000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model_name_or_path", default=str(ROOT / "configs" / "llama_tiny"))
    args = parser.parse_args()

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model_name_or_path, model_max_length=512)
    complete_tokenizer(tokenizer)
    examples = load_examples(str(ROOT / "alpaca_data.json"))
    examples = (examples * (args.rows // len(examples) + 1))[: args.rows]
    sources = [format_prompt(example) for example in examples]
    targets = [example["output"] + tokenizer.eos_token for example in examples]

    rates = {"one_call_an_example": [], "ours": []}
    for _ in range(args.rounds):
        for name, method, rows in (
            ("one_call_an_example", one_call_an_example, min(args.rows, 2000)),
            ("ours", tokenize, args.rows),
        ):
            started = time.perf_counter()
            method(sources[:rows], targets[:rows], tokenizer)
            rates[name].append(rows / (time.perf_counter() - started))
    result = {name: round(statistics.median(values)) for name, values in rates.items()}
    result["ratio"] = round(statistics.median(b / a for a, b in zip(*rates.values(), strict=True)), 2)
    result |= {"rows": args.rows, "cores": os.cpu_count(), "python": platform.python_version()}
    for name in rates:
        print(f"{name}: {result[name]:,} examples/s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
