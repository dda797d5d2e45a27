"""Alpaca examples → checked and tokenized. Training, inference and the data report read data through this file.

A data set is a JSON list (or JSON lines) of {"instruction": str, "input": str (may be missing or null), "output": str}.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from alpaca.common import ExitCode, ExpectedError
from alpaca.data.tokenizers import encode
from alpaca.prompts import format_prompt

IGNORE_INDEX = -100  # the label of a token that is not trained on; what torch's cross-entropy leaves out
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_TOKENIZER_BATCH = 2000  # examples; enough to keep all cores busy, few enough for the progress bar to move


def load_examples(data_path: str, need_output: bool = True) -> list[dict[str, str]]:
    """Read a .json or .jsonl file, or the "train" split of a Hub data set; returns checked examples.

    Every example returned has exactly the keys instruction, input and output, all strings ("" for a missing or null
    input, and without `need_output` for such an output). Raises ExpectedError (exit 3) with the first five faults and
    their number.
    """
    if os.path.isfile(data_path):
        records = _read_json_lines(data_path) if data_path.endswith(".jsonl") else _read_json(data_path)
    elif _HUB_ID.fullmatch(data_path) and not data_path.endswith((".json", ".jsonl")) and not os.path.exists(data_path):
        records = _read_hub(data_path)
    else:
        what = "is a directory" if os.path.isdir(data_path) else "does not exist"
        choice = "give a .json or .jsonl file, or a Hub data set such as tatsu-lab/alpaca"
        raise _bad_data(f"--data_path {data_path} {what}; {choice}")
    optional = ("input",) if need_output else ("input", "output")
    faults = [(index, fault) for index, record in enumerate(records) if (fault := _fault(record, optional))]
    if faults:
        shown = "; ".join(f"record {index}: {fault}" for index, fault in faults[:5])
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        what = f"{len(faults)} of {len(records)} records can't be used, counted from 0"
        raise _bad_data(f"{data_path}: {what}: {shown}{more}. Mend or remove them")
    if not records:
        raise _bad_data(f"{data_path} holds no examples; add some or choose another file")
    return [{key: r.get(key) or "" for key in ("instruction", "input", "output")} for r in records]


def _bad_data(message: str) -> ExpectedError:
    return ExpectedError(message, ExitCode.DATA)


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read().decode("utf-8-sig")  # in text mode large files would be copied twice more
    except UnicodeDecodeError as error:
        raise _bad_data(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8, or unpack it first")
    except PermissionError:
        raise _bad_data(f"{path} can't be read; check its permissions")


def _read_json(path: str) -> list[Any]:
    try:
        records = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        hint = ". One object a line is called .jsonl: rename the file" if error.msg == "Extra data" else ""
        raise _bad_data(f"{path} is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}{hint}")
    except RecursionError:
        raise _bad_data(f"{path} is nested too deeply to be a list of examples")
    if not isinstance(records, list):
        raise _bad_data(f"{path} holds {_json_type(records)} where a list of examples is expected; wrap them in [ ]")
    return records


def _read_json_lines(path: str) -> list[Any]:
    records = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise _bad_data(f"{path} is not valid JSON lines: {error.msg} at line {number} column {error.colno}")
    return records


def _read_hub(name: str) -> list[Any]:
    import datasets

    try:
        return datasets.load_dataset(name, split="train").to_list()
    except (OSError, ValueError, RuntimeError) as error:  # offline, unknown, private, made by a script
        reason = " ".join(str(error).split())[:300]
        raise _bad_data(
            f"the Hub data set {name} can't be loaded ({type(error).__name__}: {reason}). Check the name and the "
            "network (HF_HUB_OFFLINE, HF_TOKEN), or download its file and give --data_path that"
        )


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
            return f'no "{key}"'
        if not isinstance(value, str):
            return f'"{key}" is {_json_type(value)}, not a string'
        if not value.isascii() and _SURROGATE.search(value):
            return f'"{key}" holds half of a surrogate pair, which is not valid Unicode'
    return None


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
            raise _bad_data(f"{data_path}: no example has any of its response {limit}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**_row(self.texts, self.rows[index]), "record": int(self.rows[index])}

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int32 (N,)."""
        return self.texts.lengths[self.rows]

    def select(self, indices: Sequence[int]) -> "SupervisedDataset":
        """The examples at these indices, in this order, sharing the token ids."""
        selected = object.__new__(SupervisedDataset)
        selected.texts, selected.rows, selected.dropped = self.texts, self.rows[indices], self.dropped
        return selected
