"""The file to train on, made of regen.json: its form, and what it must not repeat."""

import json
import os

import numpy as np

from alpaca.common import ExitCode, ExpectedError, atomic_write, jload
from alpaca.data.similarity import TokenEncoder, rouge_l
from alpaca.data.tasks import load_tasks

FILES = {
    "json": "alpaca_data.json",
    "jsonl": "alpaca_data.jsonl",
    "messages": "messages.jsonl",
}  # format → default name
THRESHOLD = 0.7  # ROUGE-L with an evaluation task; above, a row repeats it
BLOCK = 1000  # rows compared at once
SHOWN = 20  # of the rows left out


def read_regen(output_dir: str) -> list[dict[str, str]]:
    """The entries of a run's regen.json, without the similarity fields. Raises ExpectedError (USAGE, DATA)."""
    source = os.path.join(output_dir, "regen.json")
    try:
        return [{part: entry[part] for part in ("instruction", "input", "output")} for entry in jload(source)]
    except FileNotFoundError:
        raise ExpectedError(f"no {source}; give the --output_dir of a run", ExitCode.USAGE)
    except (ValueError, KeyError, TypeError) as error:
        raise ExpectedError(f"{source}: {error!r}; make it again with replay", ExitCode.DATA)


def write_examples(output_dir: str, path: str | None, form: str, against: str | None, overwrite: bool) -> None:
    """Write regen.json's examples, and print how many there are and the rows left out.

    Raises ExpectedError, USAGE for a file that exists, before anything is read or compared.
    """
    if form not in FILES:
        raise ExpectedError(f"--format {form}: choose {', '.join(FILES)}", ExitCode.USAGE)
    path = path or os.path.join(output_dir, FILES[form])
    own = [os.path.join(output_dir, name) for name in (".lock", "regen.json", "requests.jsonl", "decisions.jsonl")]
    if os.path.realpath(path) in map(os.path.realpath, [*own, *([against] if against else [])]):
        raise ExpectedError(f"--path {path} is a file that this reads; choose another", ExitCode.USAGE)
    if os.path.isdir(path):
        raise ExpectedError(f"--path {path} is a directory; add a file name", ExitCode.USAGE)
    if os.path.exists(path) and not overwrite:
        raise ExpectedError(f"{path} exists; choose another --path, or give --overwrite True", ExitCode.USAGE)
    examples = read_regen(output_dir)
    left_out = repeated(examples, load_tasks(against, "--against")) if against else {}
    kept = [example for row, example in enumerate(examples) if row not in left_out]
    with atomic_write(path) as file:
        if form == "json":
            json.dump(kept, file, indent=4)
        for example in kept if form != "json" else []:
            file.write(json.dumps(as_messages(example) if form == "messages" else example) + "\n")
    print(
        f"{len(kept)} examples in {path}" + (f"; {len(left_out)} left out, which repeat {against}" if against else "")
    )
    for row, (task, score) in list(left_out.items())[:SHOWN]:
        print(f"  row {row} repeats task {task} ({score:.2f}): {' '.join(examples[row]['instruction'].split())[:80]}")
    if len(left_out) > SHOWN:
        print(f"  and {len(left_out) - SHOWN} more")


def as_messages(example: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """An example in the form of chat fine-tuning: the input follows the instruction in the user's message."""
    asked = "\n\n".join(filter(None, (example["instruction"], example["input"])))
    return {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": example["output"]}],
    }


def repeated(examples: list[dict[str, str]], tasks: list[dict[str, str]]) -> dict[int, tuple[int, float]]:
    """Rows that repeat a task → (task, score), both counted from 0.

    Many tasks share an instruction such as "Correct the grammar" and differ in their input, so that instruction and
    input are compared as one text; and the instruction alone with tasks that have no input.
    """
    encode = TokenEncoder()
    whole = [encode(f"{task['instruction']}\n{task['input']}") for task in tasks]
    alone = [encode(task["instruction"]) if not task["input"].strip() else "" for task in tasks]
    found = {}
    for start in range(0, len(examples), BLOCK):
        block = examples[start : start + BLOCK]
        scores = np.maximum(
            rouge_l([encode(f"{row['instruction']}\n{row['input']}") for row in block], whole, workers=-1),
            rouge_l([encode(row["instruction"]) for row in block], alone, workers=-1),
        )
        for index in np.flatnonzero(scores.max(axis=1) > THRESHOLD).tolist():
            found[start + index] = int(scores[index].argmax()), float(scores[index].max())
    return found
