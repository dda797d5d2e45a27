"""Self-instruct's pure part: seed tasks → prompts, answers → tasks, of which the new are kept (Wang et al. 2022, §2.2).

Alpaca's changes to the method are kept: one answer holds a whole set of tasks, without telling classification apart.
"""

import collections
import functools
import itertools
import json
import os
import random
import re
import string
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from alpaca.common import ROOT, ExitCode, ExpectedError, atomic_write
from alpaca.data.similarity import TokenEncoder, rouge_l

TASKS_PER_PROMPT = 20  # prompt.txt asks for a set of this many, the seed tasks included
# What a language model cannot do with text alone, by the words that teachers used for it.
BLACKLIST = (
    *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot"),
    *("go to", "video", "audio", "music", "flowchart", "diagram"),
)


class Limits(NamedTuple):
    """What a task must satisfy to be kept."""

    max_similarity: float = 0.7  # ROUGE-L with the most similar seed or kept instruction; above is dropped
    min_words: int = 4
    max_words: int = 150
    blacklist: tuple[str, ...] = BLACKLIST


DEFAULT_LIMITS = Limits()


# ------------------------------------------------------------------------------------------------------------- prompts


@functools.cache
def prompt_text() -> str:
    path = ROOT / "prompt.txt"
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ExpectedError(f"{path}: {error}; restore it", ExitCode.DATA)
    if not text.strip():
        raise ExpectedError(f"{path} is empty; restore it", ExitCode.DATA)
    return text


def encode_prompt(prompt_instructions: Iterable[dict[str, str]]) -> str:
    """Tasks {"instruction", "input", "output"} → prompt.txt, the tasks numbered from 1, and the next task's beginning.

    …\\n###\\n1. Instruction: Name a colour.\\n1. Input:\\n<noinput>\\n1. Output:\\nBlue\\n###\\n2. Instruction:
    """
    parts = [prompt_text()]
    number = 0
    for number, task in enumerate(prompt_instructions, 1):
        instruction = re.sub(r"\s+", " ", task["instruction"]).strip().rstrip(":")
        parts.append(
            f"###\n{number}. Instruction: {instruction}\n{number}. Input:\n{task['input'] or '<noinput>'}\n"
            f"{number}. Output:\n{task['output']}"
        )
    parts.append(f"###\n{number + 1}. Instruction:")
    return "\n".join(parts)


def sample_seed_tasks(seed_tasks: list[dict[str, str]], number: int, seed: int, count: int) -> list[dict[str, str]]:
    """Those that request `number` shows: by (seed, number) only, not by speed, concurrency or interruptions."""
    return random.Random(f"{seed} {number}").sample(seed_tasks, count)


def read_seed_tasks(path: str, at_least: int) -> list[dict[str, str]]:
    """seed_tasks.jsonl → [{"id", "instruction", "input", "output"}], of each task's first instance. Raises (DATA)."""
    tasks = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                task = json.loads(line)
                instance = task["instances"][0]
                parts = {"instruction": task["instruction"], "input": instance["input"], "output": instance["output"]}
                if not all(isinstance(part, str) for part in parts.values()) or not parts["instruction"].strip():
                    raise TypeError("instruction, input and output must be texts")
                tasks.append({"id": str(task.get("id", number)), **parts})
    except OSError as error:
        raise ExpectedError(f"{path}: {error.strerror}; give --seed_tasks_path", ExitCode.DATA)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ExpectedError(
            f"{path}, line {number}: {error!r}; each line is a task with instruction and instances [{{input, output}}]",
            ExitCode.DATA,
        )
    if len(tasks) < at_least:
        raise ExpectedError(f"{path} has {len(tasks)} seed tasks, a prompt needs {at_least}; add some", ExitCode.DATA)
    return tasks


# ------------------------------------------------------------------------------------------------------------- parsing

# "5. Input:" at the start of a line, however teachers dress it: "**5. Input:**", "### 5) Instruction: …"
_HEADER = re.compile(
    r"^(?P<dress>[#>*_ \t]*)(?P<number>\d{1,4})[.)][ \t]*[*_]*(?P<part>Instruction|Input|Output)[ \t]*[*_]*:[*_]*",
    re.MULTILINE | re.IGNORECASE,
)
_INLINE = re.compile(r"\b(?P<number>\d{1,4})[.)][ \t]*(?P<part>Input|Output)[ \t]*:", re.IGNORECASE)
_SEPARATOR = re.compile(r"[ \t]*(?:#{2,}|-{3,}|={3,}|\*{3,}|_{3,})[ \t]*")
_FENCE = re.compile(r"[ \t]*```[\w+-]*[ \t]*")
# A separator and at most the beginning of a header behind it: the task before is whole.
_BEGUN = re.compile(
    rf"\n{_SEPARATOR.pattern}\n?[#>*_ \t]*(?:\d{{1,4}}(?:[.)][ \t]*[*_]*I?n?s?t?r?u?c?t?i?o?n?[*_]*)?)?\Z",
    re.IGNORECASE,
)
_NO_INPUT = re.compile(r"<\s*no\s*-?\s*input\s*>\.?|noinput", re.IGNORECASE)


def split_tasks(text: str, first_number: int) -> list[tuple[int, str]]:
    """An answer → (number, the text after its "Instruction:") for each task in it.

    A task begins at a line "k. Instruction:" that follows a separator (###, ##, ---), or, where there is no separator,
    that follows a whole task and begins one. Both are looked for, so that a task which quotes "###" or "7. Output:"
    stays whole. The prompt ends with "4. Instruction:", so most answers begin behind it; others repeat it.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    headers = list(_HEADER.finditer(text))
    parts = [header["part"].lower() for header in headers]
    if "instruction" not in parts[:1] or _INLINE.search(text, 0, headers[0].start()):
        lines = text.strip().split("\n", 1)
        lines = lines[1:] if _FENCE.fullmatch(lines[0]) else lines
        text = f"{first_number}. Instruction: " + "\n".join(lines)
        headers = list(_HEADER.finditer(text))
        parts = [header["part"].lower() for header in headers]
    numbers = [int(header["number"]) for header in headers]
    starts: list[int] = []  # indices into headers
    whole = False  # whether the present task has had its output
    for index, part in enumerate(parts):
        if part == "output" and starts and numbers[index] == numbers[starts[-1]]:
            whole = True
        if part != "instruction":
            continue
        if starts and not _after_separator(text, headers[index]):
            following = [*itertools.takewhile(lambda i: parts[i] != "instruction", range(index + 1, len(parts)))]
            begins_one = any(parts[i] == "output" and numbers[i] == numbers[index] for i in following)
            is_last = index + len(following) + 1 == len(parts)
            if not whole or not (begins_one or (is_last and numbers[index] == numbers[starts[-1]] + 1)):
                continue
        starts.append(index)
        whole = False
    ends = [headers[index].start() for index in starts[1:]] + [len(text)]
    return [(numbers[i], text[headers[i].end() : end]) for i, end in zip(starts, ends, strict=True)]


def _after_separator(text: str, header: re.Match) -> bool:
    if "#" in header["dress"]:
        return True
    end = header.start()
    while end > 0:
        start = text.rfind("\n", 0, end - 1) + 1
        line = text[start : end - 1]
        if line.strip() and not _FENCE.fullmatch(line):
            return _SEPARATOR.fullmatch(line) is not None
        end = start
    return True


def _clean_end(text: str) -> str:
    """Without the separators, and the fence around the whole answer, that may follow a task."""
    lines = text.strip().split("\n")
    fences = sum(line.lstrip().startswith("```") for line in lines)
    while lines:
        if lines[-1].strip() == "```" and fences % 2:  # closes nothing that the task opened
            fences -= 1
        elif lines[-1].strip() and not _SEPARATOR.fullmatch(lines[-1]):
            break
        lines.pop()
    return "\n".join(lines).strip()


def _split_parts(number: int, body: str) -> tuple[str, str, str] | None:
    """A task's text → instruction, input, output; None where "number. Input:" or "number. Output:" is missing."""
    for pattern in (_HEADER, _INLINE):  # in lines of their own, or else anywhere
        marks = [(mark, mark["part"].lower()) for mark in pattern.finditer(body) if int(mark["number"]) == number]
        given = next((mark for mark, part in marks if part == "input"), None)
        output = next(
            (mark for mark, part in marks if given and part == "output" and mark.start() >= given.end()), None
        )
        if output:
            instruction, given_text = body[: given.start()].strip(), body[given.end() : output.start()].strip()
            return instruction, given_text, _clean_end(body[output.end() :])
    return None


@functools.lru_cache
def _word_pattern(words: tuple[str, ...]) -> re.Pattern:
    return re.compile(r"\b(?:" + "|".join(map(re.escape, words)) + r")\b", re.IGNORECASE)


def find_word_in_string(w: str, s: str) -> re.Match | None:
    """The first place where `w` stands in `s` as a whole word, whatever the case."""
    return _word_pattern((w,)).search(s)


def _reason_to_drop(instruction: str, output: str, limits: Limits) -> str | None:
    """Why a task is not kept, in 2023's order; None if it is good."""
    words = len(instruction.split())
    if words < limits.min_words:
        return "too short"
    if words > limits.max_words:
        return "too long"
    if limits.blacklist and _word_pattern(limits.blacklist).search(instruction):
        return "blacklisted word"
    # Teachers liked to add "Write a program" to existing tasks, which leaves open whether to write it or to run it.
    if instruction.startswith("Write a program"):
        return "write a program"
    if instruction[0] in string.punctuation:
        return "begins with punctuation"
    if not instruction[0].isascii():
        return "begins outside ASCII"
    return None if output else "empty output"


def parse_response(
    num_prompt_instructions: int, response: dict[str, Any], limits: Limits = DEFAULT_LIMITS
) -> tuple[list[dict[str, str]], collections.Counter]:
    """An answer {"text", "finish_reason"} → tasks {"instruction", "input", "output"}, and rejections by reason."""
    tasks, rejected = [], collections.Counter()
    found = split_tasks(response["text"], num_prompt_instructions + 1) if response["text"].strip() else []
    for index, (number, body) in enumerate(found):
        if response["finish_reason"] == "length" and index == len(found) - 1:
            rejected["cut off"] += 1  # decoding stopped for length inside the last task
            begun = _BEGUN.search(body, max(0, len(body) - 80))
            if not begun:
                continue
            body = body[: begun.start()]
        parts = _split_parts(number, body)
        if parts is None:
            rejected["malformed"] += 1
            continue
        instruction, given, output = parts
        if fault := _reason_to_drop(instruction, output, limits):
            rejected[fault] += 1
            continue
        tasks.append(
            {"instruction": instruction, "input": "" if _NO_INPUT.fullmatch(given) else given, "output": output}
        )
    return tasks, rejected


def post_process_gpt3_response(num_prompt_instructions: int, response: dict[str, Any] | None) -> list[dict[str, str]]:
    """An answer {"text", "finish_reason"} (or None) → the tasks in it that pass the filters."""
    return parse_response(num_prompt_instructions, response)[0] if response else []


# ---------------------------------------------------------------------------------------------------------- similarity


class Collection:
    """What is kept: answers go in, in the order of their requests, and those of their tasks that are new stay."""

    def __init__(self, header: dict[str, Any], settings: dict[str, Any], num_cpus: int):
        self.num_prompt_instructions = header["num_prompt_instructions"]
        self.target = settings["num_instructions_to_generate"]
        limits = {name: settings[name] for name in Limits._fields}
        self.limits = Limits(**{**limits, "blacklist": tuple(limits["blacklist"])})
        self.workers = min(num_cpus, os.cpu_count() or 1)  # threads
        self._encode = TokenEncoder()
        self.instructions = list(header["seed_instructions"])
        self.entries = [_entry_text(entry) for entry in header["already_kept"]]
        self.instructions += [entry["instruction"] for entry in header["already_kept"]]
        self._encoded = [self._encode(instruction) for instruction in self.instructions]
        self.rejected: collections.Counter[str] = collections.Counter()
        self.answers = 0  # used so far; the next to be used is that of the request of this number
        self.kept = 0  # tasks of these answers
        self.answers_without_new = 0  # the last in a row
        self.waiting: dict[int, dict[str, Any]] = {}  # request → answer that came before its turn

    @property
    def full(self) -> bool:
        return len(self.entries) >= self.target

    def advance(self) -> None:
        """Use the waiting answers in order, up to the target. An answer is used whole: it is paid for."""
        while not self.full and self.answers in self.waiting:
            self.add(self.waiting.pop(self.answers))

    def add(self, record: dict[str, Any]) -> None:
        response = {"text": record["answer"], "finish_reason": record["finish_reason"]}
        tasks, rejected = parse_response(self.num_prompt_instructions, response, self.limits)
        encoded = [self._encode(task["instruction"]) for task in tasks]
        pool = len(self._encoded)
        # One call for the whole answer, its tasks against each other included: of those columns only the kept count.
        all_scores = rouge_l(encoded, self._encoded + encoded, workers=self.workers)  # (tasks, pool + tasks)
        kept: list[int] = []
        for index, task in enumerate(tasks):
            scores = np.concatenate([all_scores[index, :pool], all_scores[index, [pool + other for other in kept]]])
            if scores.max(initial=0.0) > self.limits.max_similarity:
                rejected["too similar"] += 1
                continue
            task["most_similar_instructions"] = {self.instructions[i]: float(scores[i]) for i in largest(scores, 10)}
            task["avg_similarity_score"] = float(np.mean(scores)) if len(scores) else 0.0
            self.entries.append(_entry_text(task))
            self.instructions.append(task["instruction"])
            self._encoded.append(encoded[index])
            kept.append(index)
        self.rejected += rejected
        self.answers += 1
        self.kept += len(kept)
        self.answers_without_new = 0 if kept else self.answers_without_new + 1


def largest(scores: np.ndarray, count: int) -> list[int]:
    """Indices of the `count` largest scores, largest first, of equal ones the later first.

    The same as `np.argsort(scores, kind="stable")[-count:][::-1]` without sorting everything.
    """
    candidates = np.arange(len(scores))
    if len(scores) > count:
        candidates = np.flatnonzero(scores >= np.partition(scores, -count)[-count])
    return candidates[np.argsort(scores[candidates], kind="stable")][-count:][::-1].tolist()


def _entry_text(entry: dict[str, Any]) -> str:
    """An entry as it stands in regen.json: kept as text, which is small and need not be made again."""
    return json.dumps(entry, indent=4).replace("\n", "\n    ")


def write_regen(collection: Collection, output_dir: str) -> None:
    with atomic_write(os.path.join(output_dir, "regen.json")) as file:
        file.write("[" + ",".join("\n    " + entry for entry in collection.entries) + "\n]")
