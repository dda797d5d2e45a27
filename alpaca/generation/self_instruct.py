"""Self-instruct's pure part: seed tasks → prompts, and of the answers' tasks the new ones (Wang et al. 2022, §2.2).

Alpaca's changes to the method are kept: one answer holds a whole set of tasks, without telling classification apart.
"""

import collections
import functools
import json
import os
import random
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from alpaca.common import ROOT, ExitCode, ExpectedError, atomic_write
from alpaca.data.similarity import TokenEncoder, rouge_l
from alpaca.generation.parsing import Limits, parse_response, reason_to_drop

SHOWN_OF_AN_ANSWER = 300  # characters of one that can't be read
TASKS_PER_PROMPT = 20  # the {last} of prompt.txt: a set of this many is asked for, the seed tasks included


# ------------------------------------------------------------------------------------------------------------- prompts


@functools.cache
def prompt_text(language: str = "English") -> str:
    """prompt.txt, with another language wherever it says "in English", and the number of tasks for its {last}."""
    path = ROOT / "prompt.txt"
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ExpectedError(f"{path}: {error}; restore it", ExitCode.DATA)
    if not text.strip():
        raise ExpectedError(f"{path} is empty; restore it", ExitCode.DATA)
    if language != "English" and "in English" not in text:
        raise ExpectedError(
            f'--language {language}: {path} does not say "in English" anywhere, which this would replace; write the '
            "language into the file instead",
            ExitCode.USAGE,
        )
    return text.replace("in English", f"in {language}").replace("{last}", str(TASKS_PER_PROMPT))


def encode_prompt(prompt_instructions: Iterable[dict[str, str]], language: str = "English") -> str:
    """Tasks {"instruction", "input", "output"} → prompt.txt, the tasks numbered from 1, and the next task's beginning.

    The number of that next task takes the place of prompt.txt's {first}.

    …\\n###\\n1. Instruction: Name a colour.\\n1. Input:\\n<noinput>\\n1. Output:\\nBlue\\n###\\n2. Instruction:
    """
    parts = []
    number = 0
    for number, task in enumerate(prompt_instructions, 1):
        instruction = re.sub(r"\s+", " ", task["instruction"]).strip().rstrip(":")
        parts.append(
            f"###\n{number}. Instruction: {instruction}\n{number}. Input:\n{task['input'] or '<noinput>'}\n"
            f"{number}. Output:\n{task['output']}"
        )
    parts.append(f"###\n{number + 1}. Instruction:")
    return "\n".join([prompt_text(language).replace("{first}", str(number + 1)), *parts])


def sample_seed_tasks(seed_tasks: list[dict[str, str]], number: int, seed: int, count: int) -> list[dict[str, str]]:
    """Those that request `number` shows: by (seed, number) only, not by speed, concurrency or interruptions."""
    return random.Random(f"{seed} {number}").sample(seed_tasks, count)


def read_seed_tasks(path: str, at_least: int) -> list[dict[str, str]]:
    """seed_tasks.jsonl → [{"id", "instruction", "input", "output"}], of each task's first instance. Raises (DATA)."""
    tasks = []
    try:
        with open(path, encoding="utf-8-sig") as file:
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


def check_seed_tasks(seed_tasks: list[dict[str, str]], limits: Limits) -> None:
    """Raises ExpectedError (USAGE) where the filters would drop most seed tasks, and so most answers."""
    reasons = collections.Counter(
        reason
        for task in seed_tasks
        if (reason := reason_to_drop(task["instruction"].strip(), task["output"].strip(), limits))
    )
    if 2 * reasons.total() > len(seed_tasks):
        counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        raise ExpectedError(
            f"the filters would drop {reasons.total()} of the {len(seed_tasks)} seed tasks ({counts}), and so most "
            "of what is written after them; change --min_words, --max_words or --blacklist, or the seeds, or give "
            "--seeds_anyway True to go on",
            ExitCode.USAGE,
        )


# ---------------------------------------------------------------------------------------------------------- similarity


class Collection:
    """What is kept: answers go in, in the order of their requests, and those of their tasks that are new stay.

    The run's header says by which rules: one without "tokenization" and "parser" is older than these, and is read as it
    was. `say` is told of the first answer of which nothing could be read.
    """

    def __init__(
        self,
        header: dict[str, Any],
        settings: dict[str, Any],
        num_cpus: int,
        say: Callable[[str], None] = lambda message: None,
    ):
        self.num_prompt_instructions = header["num_prompt_instructions"]
        self.target = settings["num_instructions_to_generate"]
        limits = {name: settings[name] for name in Limits._fields}
        self.limits = Limits(**{**limits, "blacklist": tuple(limits["blacklist"])})
        self.workers = min(num_cpus, os.cpu_count() or 1)  # threads
        self.rules = {"tokenization": header.get("tokenization", "ascii"), "parser": header.get("parser", 1)}
        self.encode = TokenEncoder(self.rules["tokenization"])
        self._say = say
        self.instructions = list(header["seed_instructions"])
        self.entries = [_entry_text(entry) for entry in header["already_kept"]]
        self.instructions += [entry["instruction"] for entry in header["already_kept"]]
        self.encoded = [self.encode(instruction) for instruction in self.instructions]
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
        tasks, rejected = parse_response(self.num_prompt_instructions, response, self.limits, **self.rules)
        if rejected["unreadable answer"] and not self.rejected["unreadable answer"]:
            begins = " ".join(record["answer"].split())[:SHOWN_OF_AN_ANSWER]
            self._say(
                f"request {self.answers}: nothing could be read in its answer, which begins: {begins} (said once)"
            )
        encoded = [self.encode(task["instruction"]) for task in tasks]
        pool = len(self.encoded)
        # One call for the whole answer, its tasks against each other included: of those columns only the kept count.
        all_scores = rouge_l(encoded, self.encoded + encoded, workers=self.workers)  # (tasks, pool + tasks)
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
            self.encoded.append(encoded[index])
            kept.append(index)
        self.rejected += rejected
        self.answers += 1
        self.kept += len(kept)
        self.answers_without_new = 0 if kept else self.answers_without_new + 1

    def new_instructions(self, before: int) -> list[str]:
        """The instructions of the entries from number `before` on."""
        return self.instructions[len(self.instructions) - len(self.entries) + before :]

    def restore(self, kept: list[tuple[str, str]], rejected: dict[str, int]) -> None:
        """An answer of which it is known what is kept: instructions, and entries as they stand in regen.json."""
        for instruction, entry in kept:
            self.entries.append(entry)
            self.instructions.append(instruction)
            self.encoded.append(self.encode(instruction))
        self.rejected += collections.Counter(rejected)
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
        for number, entry in enumerate(collection.entries):
            file.write((",\n    " if number else "[\n    ") + entry)
        file.write("\n]" if collection.entries else "[\n]")
