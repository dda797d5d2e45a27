"""Answer a file of instructions with a tuned model: in batches, resumable, the same bytes however often stopped."""

import argparse
import hashlib
import json
import os
from dataclasses import asdict
from typing import Any, BinaryIO

from tqdm import tqdm

from alpaca.answering.model import Reader, Sampling, answer_ids, load_model, load_reader
from alpaca.common import ExitCode, ExpectedError, atomic_write, keep_inputs, lock_file, notice
from alpaca.data.examples import load_examples


def answer_file(args: argparse.Namespace, sampling: Sampling, with_ends: bool = False) -> None:
    """Answer every example of --data_path into --output_path; run again after an interruption, go on where it stopped.

    `with_ends` adds to each answer whether it ended by itself, that is with the end token.

    Answers are appended to OUTPUT.partial.jsonl and synced, a batch at a time. Batches are the same in every run, and
    each starts from the seed, so that an interrupted run ends with the same bytes as an uninterrupted one.
    """
    inputs = {"data_path": args.data_path, "model_name_or_path": args.model_name_or_path}
    keep_inputs({"output_path": args.output_path}, inputs)
    examples = load_examples(args.data_path, need_output=False)
    if os.path.exists(args.output_path) and not os.path.exists(partial_path(args)):
        raise ExpectedError(
            f"--output_path {args.output_path} exists; remove it or choose another name", ExitCode.USAGE
        )
    reader = load_reader(args.model_name_or_path)
    prompts = encode_all(reader, examples, args)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))  # longest first: little padding
    batches = [order[start : start + args.batch_size] for start in range(0, len(order), args.batch_size)]

    with open_partial(args) as partial:
        answers = read_partial(partial, settings_of(args, sampling, examples), args)
        to_do = [batch for batch in batches if not answers.keys() >= set(batch)]
        if to_do:
            model = load_model(args, reader.tokenizer)
        with tqdm(total=len(examples), initial=len(answers), unit="answer", disable=None) as bar:
            for batch in to_do:
                ids = answer_ids(model, reader, [prompts[index] for index in batch], sampling)
                made = [(reader.decode(row), reader.tokenizer.eos_token_id in row) for row in ids]
                lines = [json.dumps([index, *answer]) for index, answer in zip(batch, made, strict=True)]
                partial.write("".join(line + "\n" for line in lines).encode())
                partial.flush()
                os.fsync(partial.fileno())
                bar.update(len(set(batch) - answers.keys()))
                answers.update(zip(batch, made, strict=True))

        path = args.model_name_or_path
        generator = os.path.basename(os.path.abspath(path)) if os.path.isdir(path) else path
        rows = []
        for index, example in enumerate(examples):
            text, ended = answers[index]
            question = {"instruction": example["instruction"], "input": example["input"]}
            if args.merge_input:
                question = {"instruction": f"{example['instruction']}\n\n{example['input']}".rstrip()}
            row = question | {"output": text, "generator": generator}
            rows.append(row | {"ended": ended} if with_ends else row)
        with atomic_write(args.output_path) as file:
            json.dump(rows, file, indent=2, ensure_ascii=False)
        os.unlink(partial_path(args))


def encode_all(reader: Reader, examples: list[dict[str, str]], args: argparse.Namespace) -> list[list[int]]:
    """The prompt of every example; raises ExpectedError naming the first five that the model can't read."""
    prompts, faults = [], []
    for index, example in enumerate(tqdm(examples, desc="reading", unit="prompt", leave=False, disable=None)):
        try:
            prompts.append(reader.encode(example, args.max_new_tokens))
        except ExpectedError as error:
            faults.append(f"record {index}: {error}")
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ExpectedError(f"{args.data_path}: {'; '.join(faults[:5])}{more}", ExitCode.DATA)
    return prompts


def partial_path(args: argparse.Namespace) -> str:
    return f"{args.output_path}.partial.jsonl"


def open_partial(args: argparse.Namespace) -> BinaryIO:
    """Open the side file, made if need be, locked against a second run."""
    path = partial_path(args)
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        partial = open(path, "a+b")
    except OSError as error:
        raise ExpectedError(
            f"--output_path {args.output_path} can't be written: {error.strerror}; choose another place", ExitCode.DISK
        )
    try:
        lock_file(partial)
    except BlockingIOError:
        partial.close()
        raise ExpectedError(f"another run is writing {path}; wait for it or choose another name", ExitCode.LOCKED)
    return partial


def settings_of(args: argparse.Namespace, sampling: Sampling, examples: list[dict[str, str]]) -> dict[str, Any]:
    """What answers depend on: a run may only go on with a side file that has the same."""
    path = args.model_name_or_path
    changed = max(entry.stat().st_mtime_ns for entry in os.scandir(path)) if os.path.isdir(path) else None
    questions = json.dumps([[example["instruction"], example["input"]] for example in examples])
    return {
        "model_name_or_path": path,
        "model_changed": changed,
        "questions_sha256": hashlib.sha256(questions.encode()).hexdigest(),
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "device": args.device,
        **asdict(sampling),
    }


def read_partial(partial: BinaryIO, settings: dict[str, Any], args: argparse.Namespace) -> dict[int, tuple]:
    """Answers of an earlier run, by example, and whether each ended by itself. A line torn by a crash is cut off, and a
    file without any answer gets its heading.
    """
    partial.seek(0)
    whole = partial.read().rpartition(b"\n")[0]
    try:
        begun_with, *lines = [json.loads(line) for line in whole.splitlines()] or [settings]
        if not all(isinstance(text, str) for _, text, _ in lines):
            raise TypeError
        answers = {index: (text, ended) for index, text, ended in lines}
        differ = [name for name in settings if begun_with.get(name) != settings[name]]
    except (ValueError, TypeError, AttributeError):
        raise ExpectedError(f"{partial_path(args)} is damaged; remove it to start again", ExitCode.DATA)
    if not answers:
        partial.truncate(0)
        partial.write(json.dumps(settings).encode() + b"\n")
        return {}
    if differ:
        raise ExpectedError(
            f"{partial_path(args)} was begun with other settings ({', '.join(differ)}); give the same ones to go on, "
            "or remove it to start again",
            ExitCode.USAGE,
        )
    partial.truncate(len(whole) + 1)
    notice(f"{len(answers)} answers are there already, from {partial_path(args)}")
    return answers
