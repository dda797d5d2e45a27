"""Answers read from files, and two files of them joined into pairs: nothing is left out or joined silently."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from alpaca.common import ExitCode, ExpectedError
from alpaca.data.files import read_records

SHOWN = 5  # faults that a message names


def read_answers(path: str, flag: str) -> list[dict[str, str]]:
    """Answers as {"instruction", "input", "output", "generator", "category"}, all texts ("" where there is none).

    From inference.py's answers.json, AlpacaEval's output files, files in Alpaca's format, and the form of
    seed_tasks.jsonl (an entry an instance). Raises ExpectedError (DATA) with the first faults and their number.
    """
    answers, faults = [], []
    for number, record in enumerate(read_records(path, flag)):
        try:
            answers += list(_answers_of(record))
        except (KeyError, TypeError, AttributeError, ValueError):
            faults.append(f"record {number}")
    if faults:
        raise ExpectedError(
            f'{flag} {path}: {_some(faults)}, counted from 0, can\'t be used: each needs the texts "instruction" and '
            '"output", and "input" if it has one. Mend or remove them',
            ExitCode.DATA,
        )
    if not answers:
        raise ExpectedError(f"{flag} {path} holds no answers; choose another file", ExitCode.DATA)
    repeated = [question for question, count in Counter(map(key_of, answers)).items() if count > 1]
    if repeated:
        raise ExpectedError(
            f"{flag} {path} holds instructions more than once: {_some(map(_excerpt, repeated))}; keep one of each",
            ExitCode.DATA,
        )
    return answers


def _answers_of(record: dict[str, Any]) -> Iterable[dict[str, str]]:
    for instance in record.get("instances", [record]):
        texts = record["instruction"], instance.get("input") or "", instance["output"]
        labels = record.get("generator") or "", record.get("category") or record.get("name") or ""
        if not all(isinstance(text, str) for text in (*texts, *labels)):
            raise TypeError
        "".join(texts).encode()  # half of a surrogate pair is a ValueError
        yield dict(zip(("instruction", "input", "output", "generator", "category"), (*texts, *labels), strict=True))


def key_of(answer: dict[str, str]) -> tuple[str, str]:
    """What makes two answers answers to the same question; white space around it does not count."""
    return answer["instruction"].strip(), answer["input"].strip()


def pair_up(answers: list[dict[str, str]], opponents: list[dict[str, str]], suite: list[dict[str, str]]) -> list[dict]:
    """→ {"instruction", "input", "answer", "opponent", "category"} in the order of `answers`.

    The category is that of the answers, of the opponents or, failing these, of the suite. Raises ExpectedError (DATA)
    where the two do not hold the same questions.
    """
    of_opponent = {key_of(opponent): opponent for opponent in opponents}
    ours = {key_of(answer) for answer in answers}
    only_ours = [key for key in map(key_of, answers) if key not in of_opponent]
    only_theirs = [key for key in of_opponent if key not in ours]
    if only_ours or only_theirs:
        sides = ((only_ours, "--answers", "--opponent"), (only_theirs, "--opponent", "--answers"))
        said = [
            f"{_some(map(_excerpt, keys))} {'is' if len(keys) == 1 else 'are'} in {here} and not in {there}"
            for keys, here, there in sides
            if keys
        ]
        hint = ""
        if {f"{instruction}\n\n{text}".strip() for instruction, text in only_ours} & {key[0] for key in only_theirs}:
            hint = "; one side has the input merged into the instruction: inference.py --merge_input True does that"
        raise ExpectedError(
            f"the two files must hold the same instructions (and inputs): {'; '.join(said)}{hint}", ExitCode.DATA
        )
    categories = {key_of(task): task["category"] for task in suite}
    pairs = []
    for answer in answers:
        opponent = of_opponent[key_of(answer)]
        category = answer["category"] or opponent["category"] or categories.get(key_of(answer), "")
        pair = {"instruction": answer["instruction"], "input": answer["input"], "answer": answer["output"]}
        pairs.append(pair | {"opponent": opponent["output"], "category": category})
    return pairs


def name_of(answers: list[dict[str, str]], otherwise: str) -> str:
    """Who wrote these answers, where they all say the same."""
    names = {answer["generator"] for answer in answers}
    return names.pop() or otherwise if len(names) == 1 else otherwise


def _excerpt(key: tuple[str, str]) -> str:
    instruction, text = (" ".join(part.split()) for part in key)
    shown = instruction if len(instruction) <= 60 else instruction[:59] + "…"
    return f'"{shown}"' + (f" with input “{text[:30]}{'…' if len(text) > 30 else ''}”" if text else "")


def _some(items: Iterable[str]) -> str:
    items = list(items)
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more
