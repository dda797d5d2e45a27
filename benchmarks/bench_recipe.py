"""What the recipe does to a real model: held-out loss, answers and rule-based checks, before and after fine-tuning.

    python -m alpaca.demo.base fetch --output_dir demo/base
    python benchmarks/bench_recipe.py --output recipe.jsonl                  # the study of docs/recipe.md, row by row
    python benchmarks/bench_recipe.py --output sweep.jsonl --rows sweep      # the demo's hyperparameters, losses only

Each row trains with train.py in one process and is appended to --output when it is done; rows that are there already
are not done again. The last line is JSON. All rows are measured on the same examples, those that
`train.py --data_path alpaca_data.json --val_size 64` holds out, and none is trained on them.
"""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import transformers

from alpaca.common import jdump
from alpaca.data.examples import IGNORE_INDEX, SupervisedDataset, load_examples
from alpaca.data.similarity import TokenEncoder, rouge_l
from alpaca.demo.compare import answer_all, load
from alpaca.demo.instructions import choose_demonstrations
from alpaca.demo.run import has_bf16
from alpaca.training.data_module import hold_out
from alpaca.weights.files import sha256_of_file

HELD_OUT = 64  # examples
LONGEST = 256  # tokens of an answer

SHORT = {"examples": 160, "characters": 420, "learning_rate": 1e-4, "epochs": 1, "batch": 8, "warmup_steps": 2}
ALL = {"examples": None, "characters": None, "learning_rate": 5e-5, "epochs": 1, "batch": 32, "warmup_steps": 0.03}
STUDY = {
    "base": None,
    "160 short, seed 0": {**SHORT, "seed": 0},
    "160 short, LoRA, seed 0": {**SHORT, "seed": 0, "lora_r": 16, "learning_rate": 1e-3},
    "160 short, seed 1": {**SHORT, "seed": 1},
    "160 short, seed 2": {**SHORT, "seed": 2},
    "all, 1 epoch": {**ALL, "seed": 0},
    "all, 3 epochs": {**ALL, "seed": 0, "epochs": 3},
}
SWEEP = {
    f"{examples} of at most {characters}, {rate:g}": {
        **SHORT, "seed": 0, "examples": examples, "characters": characters, "learning_rate": rate,
    }
    for examples, characters, rate in (
        *((160, 420, rate) for rate in (1e-4, 3e-4, 3e-5, 1e-3)),
        *((examples, 420, 1e-4) for examples in (80, 320)),
        *((160, characters, 1e-4) for characters in (300, 1000)),
    )
}  # fmt: skip


def sentences(text):
    return len(re.findall(r"[.!?](?=\s|$)", text))


def items(text):
    return len(re.findall(r"^\s*(?:\d+[.)]|[-*•])\s+\S", text, re.MULTILINE))


# (instruction, input, what a right answer must satisfy); what is checked is the form that was asked for
CHECKS = [
    (
        "Is the Moon larger than the Earth? Answer with yes or no and nothing else.",
        "",
        lambda a: re.fullmatch(r"(?i)no\W*", a),
    ),
    ("Name the capital of France in one word.", "", lambda a: re.fullmatch(r"(?i)paris\W*", a)),
    ("Write the word in capital letters.", "harbour", lambda a: re.fullmatch(r"\W*HARBOUR\W*", a)),
    ("Write the sentence in lower case.", "The Train Leaves At Noon.", lambda a: a == "the train leaves at noon."),
    ("List exactly three fruits as a numbered list.", "", lambda a: items(a) == 3),
    ("List exactly five animals, each on a line that starts with a hyphen.", "", lambda a: items(a) == 5),
    ("Describe the sea in exactly one sentence.", "", lambda a: sentences(a) == 1),
    ("Describe a forest in exactly two sentences.", "", lambda a: sentences(a) == 2),
    (
        "Write a sentence about bread that contains the word butter.",
        "",
        lambda a: "butter" in a.lower() and sentences(a) == 1,
    ),
    ("Write a question about the weather. End it with a question mark.", "", lambda a: a.endswith("?")),
    ("Greet a neighbour in fewer than eight words.", "", lambda a: len(a.split()) < 8),
    ("Name four colours, separated by commas, on one line.", "", lambda a: a.count(",") == 3 and "\n" not in a),
    (
        "Answer with a JSON object that has the keys name and age.",
        "Anna is 31 years old.",
        lambda a: is_json_with(a, {"name", "age"}),
    ),
    (
        "Repeat the sentence word for word.",
        "The kettle is on the stove.",
        lambda a: a.strip('"') == "The kettle is on the stove.",
    ),
    ("Give the sum as a number only.", "2 + 3", lambda a: re.fullmatch(r"5\.?", a)),
    (
        "Sort the words alphabetically, separated by commas.",
        "pear, apple, fig",
        lambda a: re.fullmatch(r"(?i)apple, ?fig, ?pear\.?", a),
    ),
    (
        "Is the text about food or about sport? Answer with one word.",
        "The goalkeeper saved the penalty.",
        lambda a: re.fullmatch(r"(?i)sports?\W*", a),
    ),
    ("Write one line that begins with the word Tomorrow.", "", lambda a: a.startswith("Tomorrow") and "\n" not in a),
    ("Write about a cat in exactly three sentences.", "", lambda a: sentences(a) == 3),
    (
        "Copy only the year from the text.",
        "The bridge was opened in 1932 by the mayor.",
        lambda a: re.fullmatch(r"1932\.?", a),
    ),
]


def is_json_with(text, keys):
    try:
        return set(json.loads(text)) == keys
    except (ValueError, TypeError):
        return False


def train(base, setting, examples, out):
    """One process; bfloat16 where the CPU has it."""
    chosen = examples
    if setting["characters"]:
        chosen = choose_demonstrations(examples, setting["examples"], setting["characters"])
        if len(chosen) < setting["examples"]:
            raise SystemExit(f"error: only {len(chosen)} examples have at most {setting['characters']} characters")
    jdump(chosen, out / "examples.json")
    flags = {
        **{"model_name_or_path": base, "data_path": out / "examples.json", "output_dir": out / "tuned"},
        **{"num_train_epochs": setting["epochs"], "seed": setting["seed"], "bf16": has_bf16(), "use_cpu": True},
        **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": setting["batch"] // 4},
        **{"learning_rate": setting["learning_rate"], "lr_scheduler_type": "cosine", "logging_steps": 1},
        **{"warmup_steps": setting["warmup_steps"], "save_strategy": "no"},
        **{"model_max_length": setting.get("model_max_length", 512)},
    }
    if "lora_r" in setting:
        flags |= {"lora_r": setting["lora_r"], "lora_alpha": 2 * setting["lora_r"]}  # on all linear layers
    command = [
        sys.executable,
        "train.py",
        *(str(word) for name, value in flags.items() for word in (f"--{name}", value)),
    ]
    used = children_cpu()
    with open(out / "log", "w") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=False).returncode
    if code:
        raise SystemExit(f"error: training failed: {(out / 'log').read_text()[-2000:]}")
    return {"examples": len(chosen), "train_cpu_s": round(children_cpu() - used)}


def children_cpu():
    times = os.times()
    return times.children_user + times.children_system


def measure_loss(model, held_out):
    """Over all response tokens, end-of-sequence included; bits per byte of the responses' UTF-8."""
    total = tokens = 0
    with torch.inference_mode():
        for row in (held_out[index] for index in range(len(held_out))):
            labels = row["labels"].unsqueeze(0)  # (1, T)
            count = int((labels != IGNORE_INDEX).sum())
            total += float(model(input_ids=row["input_ids"].unsqueeze(0), labels=labels, use_cache=False).loss) * count
            tokens += count
    return total, tokens


def measure(path, held_out, references, with_answers):
    started = time.process_time()
    model, reader = load(str(path))
    total, tokens = measure_loss(model, held_out)
    size = sum(len(example["output"].encode()) for example in references)
    row = {"loss": total / tokens, "bits_per_byte": total / math.log(2) / size}
    if with_answers:
        answers = answer_all(model, reader, references, LONGEST, batch_size=32)
        encode = TokenEncoder()
        pairs = [(encode(a.text), encode(e["output"])) for a, e in zip(answers, references, strict=True)]
        asked = [{"instruction": instruction, "input": text} for instruction, text, _ in CHECKS]
        checked = answer_all(model, reader, asked, 128, batch_size=len(asked))
        passed = [bool(check(a.text.strip())) and a.ended for a, (_, _, check) in zip(checked, CHECKS, strict=True)]
        row |= {
            "ended": statistics.mean(answer.ended for answer in answers),
            "median_tokens": statistics.median(answer.tokens for answer in answers),
            "rouge_l": statistics.mean(float(rouge_l([a], [b])[0, 0]) for a, b in pairs),
            "checks_passed": sum(passed),
            "checks": len(CHECKS),
            "answers": [answer.text for answer in [*answers, *checked]],
        }
    return row | {"measure_cpu_s": round(time.process_time() - started)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="demo/base")
    parser.add_argument("--output", default="recipe.jsonl", help="rows are appended here")
    parser.add_argument("--rows", default="study", help="study, sweep, or names of their rows, separated by semicolons")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

    settings = {"study": STUDY, "sweep": SWEEP}.get(args.rows) or {
        name: {**STUDY, **SWEEP}[name] for name in args.rows.split(";")
    }
    data = ROOT / "alpaca_data.json"
    examples = load_examples(str(data))
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.base, model_max_length=4096)
    to_train, held_out = hold_out(SupervisedDataset(str(data), tokenizer), HELD_OUT)
    references = [examples[index] for index in held_out.rows]
    to_train = [examples[index] for index in to_train.rows]
    output = Path(args.output)
    done = {r["row"]: r for r in map(json.loads, output.read_text().splitlines())} if output.exists() else {}
    for name, setting in settings.items():
        if name in done:
            continue
        out = Path(tempfile.mkdtemp(prefix="recipe-"))
        try:
            row = {"row": name, "data_sha256": sha256_of_file(data)[:12], "setting": setting}
            row |= train(args.base, setting, to_train, out) if setting else {"examples": 0}
            row |= measure(out / "tuned" if setting else args.base, held_out, references, name in STUDY)
        finally:
            shutil.rmtree(out)
        done[name] = row
        with open(output, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print({k: v for k, v in row.items() if k not in ("answers", "setting")}, flush=True)
    rows = [{k: v for k, v in done[name].items() if k != "answers"} for name in settings]
    print(json.dumps({"bf16": has_bf16(), "held_out": HELD_OUT, "rows": rows}))


if __name__ == "__main__":
    main()
