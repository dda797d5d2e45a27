"""The answers of two models to the six instructions, side by side in 80 columns.

python -m alpaca.demo.compare --base demo/base --tuned demo/tuned
"""

import argparse
import itertools
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from alpaca.answering.model import Sampling, load_model, load_reader
from alpaca.common import run_commands, run_main
from alpaca.demo.instructions import INSTRUCTIONS, Example

WIDTH, COLUMN = 80, 38  # characters; two columns and a gap


class Answer(NamedTuple):
    text: str
    tokens: int  # without the end-of-sequence token
    ended: bool  # by itself, and not at the limit


def load(path: str, dtype: str = "float32") -> tuple[Any, Any]:
    """Model and reader of a directory or Hub id, on the CPU."""
    reader = load_reader(path)
    return load_model(argparse.Namespace(model_name_or_path=path, dtype=dtype, device="cpu"), reader.tokenizer), reader


def answer_all(
    model: Any, reader: Any, examples: Sequence[Example], max_new_tokens: int, batch_size: int = 8
) -> list[Answer]:
    """Greedy answers, `batch_size` prompts at once."""
    sampling = Sampling(max_new_tokens, temperature=0, top_p=1, seed=0)
    prompts = [reader.encode(example, max_new_tokens) for example in examples]
    answers = []
    for first in range(0, len(prompts), batch_size):
        batch = reader.tokenizer.pad({"input_ids": prompts[first : first + batch_size]}, return_tensors="pt")  # (B, T)
        with torch.inference_mode():
            ids = model.generate(**batch, **sampling.options())  # (B, T + new)
        for row in ids[:, batch["input_ids"].shape[1] :].tolist():
            ended = reader.tokenizer.eos_token_id in row
            tokens = row.index(reader.tokenizer.eos_token_id) if ended else len(row)
            answers.append(Answer(reader.decode(row), tokens, ended))
    return answers


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters; the text's own line breaks stay, empty lines do not."""
    lines = (textwrap.wrap(line, width, break_on_hyphens=False) for line in text.splitlines())
    return list(itertools.chain(*lines)) or ["(nothing)"]


def side_by_side(example: Example, base: Answer, tuned: Answer) -> str:
    """An instruction above two columns: what the base answers and what the tuned model answers."""
    columns = [wrap(a.text + ("" if a.ended else " [cut off]"), COLUMN) for a in (base, tuned)]
    head = [line for text in (example["instruction"], example["input"]) if text for line in wrap(text, WIDTH - 2)]
    rows = itertools.zip_longest(["BASE", *columns[0]], ["TUNED", *columns[1]], fillvalue="")
    table = [f"{left:<{WIDTH - COLUMN}}{right}".rstrip() for left, right in rows]
    return "\n".join(["-" * WIDTH, *(f"> {line}" for line in head), "", *table])


def compare(base: str, tuned: str, max_new_tokens: int = 80) -> None:
    """Print the six instructions with the greedy answers of two models.

    Args:
        base: the model before fine-tuning: a directory or Hub id
        tuned: the model after it
        max_new_tokens: longest answer, in tokens
    """
    answers = [answer_all(*load(path), INSTRUCTIONS, max_new_tokens) for path in (base, tuned)]
    for row in zip(INSTRUCTIONS, *answers, strict=True):
        print(side_by_side(*row), flush=True)
    print("-" * WIDTH)


if __name__ == "__main__":
    run_main(lambda: run_commands({"compare": compare}, "python -m alpaca.demo.compare"))
