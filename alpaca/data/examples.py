"""Alpaca examples → checked and tokenized. Training, inference and the data report read data through this file.

A data set is a list of {"instruction": str, "input": str (may be missing or null), "output": str}, in any form that
`files.read_records` reads.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from alpaca.common import notice
from alpaca.data.files import bad_data, read_records
from alpaca.data.tokenizers import encode
from alpaca.prompts import format_prompt

IGNORE_INDEX = -100  # the label of a token that is not trained on; what torch's cross-entropy leaves out
FIELDS = ("instruction", "input", "output")
# Other names that published data sets have for these, and for what belongs to them.
_QUESTIONS = ("question", "query", "prompt", "task", "instructions")
_ANSWERS = ("response", "answer", "completion", "target", "outputs", "chosen", "rejected")
_TURNS = ("messages", "conversations", "conversation", "dialogue", "history")
_CONTENT = {*_QUESTIONS, *_ANSWERS, *_TURNS, "system", "system_prompt", "context", "knowledge", "reasoning"}
_BOOKKEEPING = ("most_similar_instructions", "avg_similarity_score")  # what generate_instruction.py adds
_SURROGATE = re.compile("[\ud800-\udfff]")
_TOKENIZER_BATCH = 2000  # examples; enough to keep all cores busy, few enough for the progress bar to move


def load_examples(data_path: str, need_output: bool = True) -> list[dict[str, str]]:
    """Read what `files.read_records` reads; returns checked examples, and says which fields they leave out.

    Every example returned has exactly the keys instruction, input and output, all strings ("" for a missing or null
    input, and without `need_output` for such an output). Raises ExpectedError (exit 3) with the first five faults and
    their number.
    """
    records = read_records(data_path)
    optional = ("input",) if need_output else ("input", "output")
    faults = [(index, fault) for index, record in enumerate(records) if (fault := _fault(record, optional))]
    if faults:
        shown = "; ".join(f"record {index}: {fault}" for index, fault in faults[:5])
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        what = f"{len(faults)} of {len(records)} records can't be used, counted from 0"
        raise bad_data(f"{data_path}: {what}: {shown}{more}. Mend or remove them")
    if not records:
        raise bad_data(f"{data_path} holds no examples; add some or choose another file")
    if left_out := _left_out(records, need_output):
        fields = ", ".join(f"{key} (of {count})" for key, count in sorted(left_out.items()))
        notice(
            f"{data_path}: of its {len(records)} records only instruction, input and output are read. Left out is what "
            f"these fields hold: {fields}. Write what belongs to the question into instruction or input (a context is "
            "an input), what belongs to the answer into output, or remove them"
        )
    return [{key: r.get(key) or "" for key in FIELDS} for r in records]


def _left_out(records: list[dict[str, Any]], need_output: bool) -> Counter[str]:
    """Fields with content that no example will have, and in how many records each has some.

    Content is what is called like it, and texts or lists of texts of some length, unless they repeat what the example
    has (as the field "text" of the released 52K data does).
    """
    counts = Counter()
    ignored = {*FIELDS, *_BOOKKEEPING, *([] if need_output else _ANSWERS)}
    for record in records:
        for key in record.keys() - ignored:
            if value := record[key]:
                counts[key] += (key.lower() in _CONTENT or _is_text(value)) and not _repeats(value, record)
    return +counts


def _is_text(value: Any) -> bool:
    if isinstance(value, str):
        return len(value.split(None, 3)) > 3  # words
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(isinstance(part, list | dict) or _is_text(part) for part in parts)


def _repeats(value: Any, record: dict[str, Any]) -> bool:
    if not isinstance(value, str):
        return False
    instruction, text_input, output = texts = [record.get(field) or "" for field in FIELDS]
    return value.strip() in (instruction, text_input, output) or all(text in value for text in texts)


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _fault(record: Any, optional: Sequence[str]) -> str | None:
    """What makes a record unusable, in words, or None. The `optional` keys may be missing or null."""
    if not isinstance(record, dict):
        return f"{_json_type(record)}, not an object"
    for key in ("instruction", "output", "input"):
        value = record.get(key)
        if key in optional and value is None:
            continue
        if key not in record:
            return f'no "{key}"{_hint(key, record)}'
        if not isinstance(value, str):
            return f'"{key}" is {_json_type(value)}, not a string'
        if not value.isascii() and _SURROGATE.search(value):
            return f'"{key}" holds half of a surrogate pair, which is not valid Unicode'
    return None


def _hint(missing: str, record: dict[str, Any]) -> str:
    """What a record has instead of a field, and what to make of it."""
    alike = {"instruction": _QUESTIONS, "output": _ANSWERS}[missing]
    for key in record:
        if key.strip().lower() == missing or key.lower() in alike:
            return f' but "{key}": rename it'
    turns = next((key for key in record if key.lower() in _TURNS), None)
    return f' but "{turns}": make each question and answer a record of its own' if turns else ""


@dataclass
class TokenizedTexts:
    """Token ids of many texts, end to end, and where each lies. Flat arrays, so that 520,000 examples stay small."""

    ids: np.ndarray  # int32 (sum of lengths,)
    starts: np.ndarray  # int64 (N,)
    lengths: np.ndarray  # int32 (N,), in tokens
    prompt_lengths: np.ndarray  # int32 (N,): how many leading tokens of each are the prompt's


def tokenize(sources: Sequence[str], targets: Sequence[str], tokenizer: Any) -> TokenizedTexts:
    """Tokenize source + target as one string, and the source alone to learn how many leading tokens are masked.

    The two parts are never tokenized apart and joined: merges cross the boundary. Both texts are cut at the
    tokenizer's `model_max_length`, which is what makes a prompt longer than the limit mask everything.
    """
    ids, lengths, prompt_lengths = [], [], []
    with tqdm(total=len(sources), desc="tokenize", unit=" examples", disable=None, leave=False) as progress:
        for first in range(0, len(sources), _TOKENIZER_BATCH):
            source = list(sources[first : first + _TOKENIZER_BATCH])
            target = targets[first : first + _TOKENIZER_BATCH]
            whole = encode([s + t for s, t in zip(source, target, strict=True)], tokenizer)
            lengths.extend(map(len, whole))
            prompt_lengths.extend(map(len, encode(source, tokenizer)))
            ids.extend(np.array(tokens, dtype=np.int32) for tokens in whole)
            progress.update(len(source))
    lengths = np.array(lengths, dtype=np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)[:-1]]) if len(lengths) else np.zeros(0, np.int64)
    flat = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    return TokenizedTexts(flat, starts, lengths, np.minimum(np.array(prompt_lengths, dtype=np.int32), lengths))


def preprocess(sources: Sequence[str], targets: Sequence[str], tokenizer: Any) -> dict[str, list[torch.Tensor]]:
    """Prompts and responses → {"input_ids": N tensors (T_i,), "labels": N tensors (T_i,)}, prompts masked.

    With a prompt of 3 tokens: input_ids [1, 7, 8, 9, 2] → labels [-100, -100, -100, 9, 2].
    """
    texts = tokenize(sources, targets, tokenizer)
    rows = [_row(texts, index) for index in range(len(sources))]
    return {"input_ids": [row["input_ids"] for row in rows], "labels": [row["labels"] for row in rows]}


def _row(texts: TokenizedTexts, index: int) -> dict[str, torch.Tensor]:
    start = texts.starts[index]
    input_ids = torch.from_numpy(texts.ids[start : start + texts.lengths[index]].astype(np.int64))  # (T,)
    labels = input_ids.clone()
    labels[: texts.prompt_lengths[index]] = IGNORE_INDEX
    return {"input_ids": input_ids, "labels": labels}


class SupervisedDataset(Dataset):
    """Examples for supervised fine-tuning: `dataset[i]` is {"input_ids": (T_i,), "labels": (T_i,)}, both int64, and
    "record", its number in the data (from 0).

    Examples whose response is wholly cut away by the length limit would teach nothing; they are left out, and their
    record numbers kept in `dropped`. Raises ExpectedError (exit 3) on bad data or when no example is left.
    """

    def __init__(self, data_path: str, tokenizer: Any):
        examples = load_examples(data_path)
        sources = [format_prompt(example) for example in examples]
        targets = [example["output"] + tokenizer.eos_token for example in examples]
        del examples  # their texts are in the two lists now, and ten times 52,000 of them are half a GB
        self.texts = tokenize(sources, targets, tokenizer)
        has_response = self.texts.lengths > self.texts.prompt_lengths
        self.rows = np.flatnonzero(has_response)  # record numbers of the examples kept
        self.dropped = np.flatnonzero(~has_response).tolist()
        if not len(self.rows):
            limit = f"within {tokenizer.model_max_length} tokens; raise --model_max_length"
            raise bad_data(f"{data_path}: no example has any of its response {limit}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**_row(self.texts, self.rows[index]), "record": int(self.rows[index])}

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int32 (N,)."""
        return self.texts.lengths[self.rows]

    @property
    def last_tokens(self) -> np.ndarray:
        """int32 (N,): end-of-sequence, or what stood at the length limit."""
        return self.texts.ids[self.texts.starts[self.rows] + self.lengths - 1]

    def select(self, indices: Sequence[int]) -> "SupervisedDataset":
        """The examples at these indices, in this order, sharing the token ids."""
        selected = object.__new__(SupervisedDataset)
        selected.texts, selected.rows, selected.dropped = self.texts, self.rows[indices], self.dropped
        return selected
