"""The data that ships, as the tests read it: seeds, prompt, demonstrations, their checks and tags, evaluation tasks.

`tags.jsonl` has one line a demonstration: the domain it was written for, and what the quotas count (`informal`,
`reasoning`, `unanswerable`, `unsafe`, `languages`, `yes_no`, languages of code). It stands beside the data, whose
format is that of 2023.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def read_lines(name):
    return [json.loads(line) for line in read(name).splitlines()]


PROMPT = read("prompt.txt")
SEEDS = [{**seed, **seed["instances"][0]} for seed in read_lines("seed_tasks.jsonl")]
EXAMPLES = json.loads(read("alpaca_data.json"))
CHECKS = read_lines("alpaca_checks.jsonl")
TAGS = read_lines("tests/data/tags.jsonl")
EVAL_TASKS = read_lines("eval_tasks.jsonl")

INSTRUCTIONS = [example["instruction"] for example in EXAMPLES]
INPUTS = [example["input"] for example in EXAMPLES if example["input"]]
OUTPUTS = [example["output"] for example in EXAMPLES]
# Everything that must be well asked and well answered, by name.
ROWS = {f"row {number}": example for number, example in enumerate(EXAMPLES)}
ROWS |= {task["id"]: task for task in [*SEEDS, *EVAL_TASKS]}


def words(text):
    return len(text.split())


def first_word(instruction):
    """ "What's up?" → "what's" """
    return re.findall(r"[\w']+", instruction)[0].lower()


def tagged(*tags):
    """The rows, counted from 0, that have any of the tags."""
    return [row for row, entry in enumerate(TAGS) if set(tags) & set(entry["tags"])]


def code_blocks(language, texts):
    pattern = re.compile(rf"^```{language}\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
    return [block for text in texts for block in pattern.findall(text)]
