"""Answers of teachers → tasks: what counts as a task in an answer, what belongs to its fields, and what is not kept.

PARSER is the version of these rules. A run records it, so that older runs are read as they were: parser 1 knew the
layout of the prompt alone, and took what else chat teachers, reasoning models and servers write for part of the tasks.
"""

import collections
import itertools
import re
import string
from typing import Any, NamedTuple

from alpaca.data.words import TOKENIZATION, begins_with_letter_or_digit, count_words, find_words
from alpaca.generation.dress import (
    FENCE,
    MARKS,
    PART,
    SEPARATOR,
    clean_field,
    clean_text,
    cut_at_token,
    has_no_input,
    has_no_output,
    number_headers,
    tasks_in_json,
)

PARSER = 2
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

# "5. Input:" at the start of a line, however teachers dress it: "**5. Input:**", "### 5) Instruction: …"
_HEADER_1 = re.compile(
    rf"^(?P<dress>[#>*_ \t]*)(?P<number>\d{{1,4}})[.)][ \t]*[*_]*{PART}[ \t]*[*_]*:[*_]*", re.MULTILINE | re.IGNORECASE
)
# And "- 5. Input:", "(5) Input:", "5．Input：", "Task 5 / Input:", "**5.** **Input**:"
_HEADER = re.compile(
    rf"^(?P<dress>[{MARKS}]*)(?:Task[ \t]*#?)?[(\[（【]?(?P<number>\d{{1,4}})\\?[.):\]：、．）】/|\-–—*_ \t]*"
    rf"{PART}[*_ \t]*[:：][*_]*",
    re.MULTILINE | re.IGNORECASE,
)
_INLINE = re.compile(r"\b(?P<number>\d{1,4})[.)][ \t]*(?P<part>Input|Output)[ \t]*[:：]", re.IGNORECASE)
# A separator and at most the beginning of a header behind it: the task before is whole.
_BEGUN = re.compile(
    rf"\n{SEPARATOR.pattern}\n?[#>*_ \t]*(?:\d{{1,4}}(?:[.)][ \t]*[*_]*I?n?s?t?r?u?c?t?i?o?n?[*_]*)?)?\Z",
    re.IGNORECASE,
)
_NO_INPUT_1 = re.compile(r"<\s*no\s*-?\s*input\s*>\.?|noinput", re.IGNORECASE)
# How servers say that an answer came to its end; every other word (length, max_tokens, content_filter …) is for a cut.
_WHOLE = re.compile(
    r"(?:\w+\.)?(?:stop|eos|end|finish|complete|done|success|tool|function|none|null|\Z)", re.IGNORECASE
)
# What chat teachers say behind a list, or between its parts.
_CLOSING = re.compile(
    r"[(\[*_ \t]*(?:that(?:'s|’s| is| completes| concludes| makes| was)|these (?:are|were|complete|\d|twenty|tasks)"
    r"|this (?:completes|concludes|is the end|list|set)|let me know|please let|feel free|i hope|hope (?:this|these)"
    r"|i(?:'ve|’ve| have) |would you like|if you(?:'d|’d| would| need| want)|end of|end\b|done\b|all (?:20|tasks)"
    r"|continu|(?:and )?here (?:are|is)|the (?:list|set|remaining|rest)\b|list of|total|note\b|sure\b|great\b)",
    re.IGNORECASE,
)


def split_tasks(text: str, first_number: int, header: re.Pattern = _HEADER) -> list[tuple[int, str]]:
    """An answer → (number, the text after its "Instruction:") for each task in it.

    A task begins at a line "k. Instruction:" that follows a separator (###, ##, ---), or, where there is no separator,
    that follows a whole task and begins one. Both are looked for, so that a task which quotes "###" or "7. Output:"
    stays whole. The prompt ends with "4. Instruction:", so most answers begin behind it; others repeat it.
    """
    headers = list(header.finditer(text))
    parts = [found["part"].lower() for found in headers]
    if "instruction" not in parts[:1] or _INLINE.search(text, 0, headers[0].start()):
        lines = text.strip().split("\n", 1)
        lines = lines[1:] if FENCE.fullmatch(lines[0]) else lines
        text = f"{first_number}. Instruction: " + "\n".join(lines)
        headers = list(header.finditer(text))
        parts = [found["part"].lower() for found in headers]
    numbers = [int(found["number"]) for found in headers]
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
        if line.strip() and not FENCE.fullmatch(line):
            return SEPARATOR.fullmatch(line) is not None
        end = start
    return True


def _clean_end(text: str) -> str:
    """Without the separators, and the fence around the whole answer, that may follow a task."""
    lines = text.strip().split("\n")
    fences = sum(line.lstrip().startswith("```") for line in lines)
    while lines:
        if lines[-1].strip() == "```" and fences % 2:  # closes nothing that the task opened
            fences -= 1
        elif lines[-1].strip() and not SEPARATOR.fullmatch(lines[-1]):
            break
        lines.pop()
    return "\n".join(lines).strip()


def _without_closing_words(text: str, kinds: set[str], fenced: bool) -> str:
    """An output without what a chat teacher says behind the separator that ends the task.

    `kinds`: the answer's separators, by their first character, behind which nothing but a task belongs; none for a task
    that others follow, where words must be known as closing ones. `fenced`: a fence was opened ahead of the task.
    """
    if not fenced and not any(mark in text for mark in ("##", "--", "==", "**", "__")):  # most outputs
        return text
    lines = text.strip().split("\n")
    fences = [number for number, line in enumerate(lines) if line.lstrip().startswith("```")]
    if fenced and len(fences) % 2:
        lines = lines[: fences[-1]]
    inside, separators = False, []  # line numbers of separators outside fences
    for number, line in enumerate(lines):
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside and (SEPARATOR.fullmatch(line) or (line.startswith("##") and _CLOSING.match(line, 2))):
            separators.append(number)
    end = len(lines)
    for number in reversed(separators):
        line = lines[number]
        if SEPARATOR.fullmatch(line):
            behind = next((line for line in itertools.islice(lines, number + 1, end) if line.strip()), None)
            if behind and not (line.strip()[0] in kinds or _CLOSING.match(behind)):
                break
        end, kinds = number, set()  # only behind the last one is every text too much
    return "\n".join(lines[:end])


def _split_parts(number: int, body: str, header: re.Pattern) -> tuple[str, str, str] | None:
    """A task's text → instruction, input, output; None where "number. Input:" or "number. Output:" is missing."""
    for pattern in (header, _INLINE):  # in lines of their own, or else anywhere
        marks = [(mark, mark["part"].lower()) for mark in pattern.finditer(body) if int(mark["number"]) == number]
        given = next((mark for mark, part in marks if part == "input"), None)
        output = next(
            (mark for mark, part in marks if given and part == "output" and mark.start() >= given.end()), None
        )
        if output:
            return body[: given.start()].strip(), body[given.end() : output.start()].strip(), body[output.end() :]
    return None


def read_tasks_1(text: str, first_number: int, cut: bool) -> list[tuple[str, str, str] | str]:
    """An answer as parser 1 reads it → for each task instruction, input and output, or in words why there is none."""
    return _read_layout(text, first_number, cut, _HEADER_1)


def read_tasks(text: str, first_number: int, cut: bool) -> list[tuple[str, str, str] | str]:
    """An answer → for each task instruction, input and output, without what is not theirs; or why there is none.

    `cut`: decoding did not come to its end, so that the last task is not whole.
    """
    if only_reasoning(text, cleaned := clean_text(text)):
        return ["reasoning without an answer"]
    text = cleaned
    if not any(header["part"].lower() == "output" for header in _HEADER.finditer(text)) and not _INLINE.search(text):
        if in_json := tasks_in_json(text):
            return [task or "malformed" for task in in_json] + ["cut off"] * cut
        text = number_headers(text, first_number)
    read = _read_layout(text, first_number, cut, _HEADER, clean=True)
    return ["unreadable answer"] if read and all(task == "malformed" for task in read) else read


def only_reasoning(text: str, cleaned: str) -> bool:
    """Whether clean_text left nothing of an answer."""
    return cleaned != text and not _HEADER.sub("", cleaned, count=1).strip()


def _read_layout(text: str, first_number: int, cut: bool, header: re.Pattern, clean: bool = False) -> list:
    found = split_tasks(text, first_number, header)
    # What stands between the tasks of this answer; and whether a fence around all of them is open at the last.
    kinds = {"#"} | {body.rstrip("` \t\n")[-1:] for _, body in found[:-1] if SEPARATOR.fullmatch(_last_line(body))}
    fenced = (_fences(text) - _fences(found[-1][1])) % 2 == 1 if found else False
    read = []
    for index, (number, body) in enumerate(found):
        last = index == len(found) - 1
        if cut and last:
            read.append("cut off")  # decoding stopped inside the last task
            begun = _BEGUN.search(body, max(0, len(body) - 80))
            if not begun:
                continue
            body = body[: begun.start()]
        parts = _split_parts(number, body, header)
        if parts and clean:
            *others, output = parts
            output = _without_closing_words(cut_at_token(output), kinds if last else set(), fenced and last)
            parts = (*others, output)
        read.append((*parts[:2], _clean_end(parts[2])) if parts else "malformed")
    return read


def _last_line(body: str) -> str:
    return body.rstrip("` \t\n").rpartition("\n")[2]


def _fences(text: str) -> int:
    return sum(line.lstrip().startswith("```") for line in text.split("\n"))


def find_word_in_string(w: str, s: str) -> re.Match | None:
    """The first place where `w` stands in `s` as a whole word, whatever the case."""
    return find_words((w,), s)


def reason_to_drop(instruction: str, output: str, limits: Limits, tokenization: str = TOKENIZATION) -> str | None:
    """Why a task is not kept, in 2023's order; None if it is good."""
    words = count_words(instruction, tokenization)
    if words < limits.min_words:
        return "too short"
    if words > limits.max_words:
        return "too long"
    if limits.blacklist and find_words(limits.blacklist, instruction, tokenization):
        return "blacklisted word"
    # Teachers liked to add "Write a program" to existing tasks, which leaves open whether to write it or to run it.
    if instruction.startswith("Write a program"):
        return "write a program"
    if instruction[:1] in string.punctuation:  # also where there is none
        return "begins with punctuation"
    if tokenization == "ascii" and not instruction[0].isascii():
        return "begins outside ASCII"
    if not instruction[0].isascii() and not begins_with_letter_or_digit(instruction):
        return "begins with no letter or digit"
    return None if output else "empty output"


def judge_tasks(
    num_prompt_instructions: int,
    response: dict[str, Any],
    limits: Limits = DEFAULT_LIMITS,
    tokenization: str = TOKENIZATION,
    parser: int = PARSER,
) -> list[tuple[dict[str, str], str | None]]:
    """An answer {"text", "finish_reason"} → for each task {"instruction", "input", "output"} ({} where nothing could be
    read), and why it is not kept (None: it passes the filters)."""
    reason = response["finish_reason"]
    text = response["text"].replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        return [({}, {"content_filter": "filtered answer", "refusal": "refused answer"}.get(reason, "empty answer"))]
    cut = reason == "length" if parser == 1 else not _WHOLE.match(str(reason or ""))
    judged: list[tuple[dict[str, str], str | None]] = []
    for task in (read_tasks_1 if parser == 1 else read_tasks)(text, num_prompt_instructions + 1, cut):
        if isinstance(task, str):
            judged.append(({}, task))
            continue
        instruction, given, output = task
        if parser == 1:
            given = "" if _NO_INPUT_1.fullmatch(given) else given
        else:
            instruction, given, output = map(clean_field, task)
            given, output = "" if has_no_input(given) else given, "" if has_no_output(output) else output
        fault = reason_to_drop(instruction, output, limits, tokenization)
        judged.append(({"instruction": instruction, "input": given, "output": output}, fault))
    return judged


def parse_response(*arguments: Any, **rules: Any) -> tuple[list[dict[str, str]], collections.Counter]:
    """What judge_tasks makes of an answer → the tasks that pass the filters, and the rejections by reason."""
    judged = judge_tasks(*arguments, **rules)
    return [task for task, fault in judged if not fault], collections.Counter(fault for _, fault in judged if fault)


def post_process_gpt3_response(num_prompt_instructions: int, response: dict[str, Any] | None) -> list[dict[str, str]]:
    """An answer {"text", "finish_reason"} (or None) → the tasks in it that pass the filters."""
    return parse_response(num_prompt_instructions, response)[0] if response else []
