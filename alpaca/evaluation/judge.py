"""Pairwise judging: what the judge is asked, and how its verdicts are read.

Each comparison is asked twice, so that either answer is once the first: request 2i shows comparison i's answer as A,
request 2i + 1 shows it as B.
"""

import collections
import functools
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from alpaca.common import ROOT

CANARIES = 50  # instructions, at most, that the canaries answer
CONSTANT_ANSWER = "Thank you for this question. I have thought about it carefully, and this is my best possible answer."

VERDICT_SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "verdict",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"reasoning": {"type": "string"}, "verdict": {"type": "string", "enum": ["A", "B", "tie"]}},
            "required": ["reasoning", "verdict"],
            "additionalProperties": False,
        },
    },
}

# --------------------------------------------------------------------------------------------------- prompt and verdict


@functools.cache
def prompt_text() -> str:
    with open(ROOT / "judge_prompt.txt", encoding="utf-8") as file:
        return file.read().rstrip("\n")


def encode_prompt(template: str, comparison: dict[str, str], swapped: bool) -> str:
    """The judge's prompt; `swapped` shows the opponent as A.

    Each text stands between tags that bear a mark made of all the texts, so that no answer can hold its own end.
    """
    texts = [comparison[part] for part in ("instruction", "input", "answer", "opponent")]
    mark = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]

    def tagged(name: str, text: str) -> str:
        return f"<{name} {mark}>\n{text.strip()}\n</{name} {mark}>"

    instruction, text_input, first, second = texts
    first, second = (second, first) if swapped else (first, second)
    task = tagged("task", instruction) + (f"\n\n{tagged('input', text_input)}" if text_input.strip() else "")
    parts = {"mark": mark, "task": task, "answer_a": tagged("answer A", first), "answer_b": tagged("answer B", second)}
    return re.sub("{(mark|task|answer_a|answer_b)}", lambda found: parts[found.group(1)], template)  # in one pass


_VERDICTS = {"a": "A", "b": "B", "tie": "tie"}
_MARKUP = r"[\s*_#>`'\"\[\]().!\-\u200b]*"
_LAST_LINE = re.compile(
    f"{_MARKUP}(?:final )?verdict{_MARKUP}[:：]{_MARKUP}(?:answer )?(a|b|tie){_MARKUP}", re.IGNORECASE
)
_LAST_TOKENS = re.compile(r"(?:\s*(?:<\|\w+\|>|</s>|<end_of_turn>|<｜[^｜>]*｜>))+\s*\Z")  # of chat templates
_FENCED = re.compile(r"```\w*\n(.*)\n```", re.DOTALL)


def read_verdict(reply: str, finish_reason: str | None = None) -> str | None:
    """A judge's reply → "A", "B", "tie", or None where it can't be read.

    Only what the reply ends with counts, the JSON object {"verdict": …} or a last line `Verdict: …`: what it quotes of
    the answers before that does not. A reply cut off for length ends in the middle, unless it is whole JSON.
    """
    text = _LAST_TOKENS.sub("", reasoning_taken_out(reply))
    fenced = _FENCED.fullmatch(text[text.find("```") :]) if text.endswith("```") else None
    for candidate in (text, fenced and fenced.group(1), text[text.rfind("\n{") + 1 :]):
        if candidate and (verdict := _json_verdict(candidate)):
            return verdict
    lines = [line for line in text.split("\n") if not re.fullmatch(_MARKUP, line)]
    last = _LAST_LINE.fullmatch(lines[-1]) if lines else None
    return _VERDICTS[last.group(1).lower()] if last and finish_reason != "length" else None


def reasoning_taken_out(reply: str) -> str:
    """A reply without what a reasoning model thinks before it; "" where it never comes to an answer."""
    reply = reply.rpartition("</think>")[2].strip()
    return "" if reply.startswith("<think>") else reply


def _json_verdict(text: str) -> str | None:
    def once(members: list[tuple[str, Any]]) -> dict[str, Any]:
        if [name for name, _ in members].count("verdict") > 1:
            raise ValueError("two verdicts")
        return dict(members)

    try:
        value = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError):
        return None
    verdict = value.get("verdict") if isinstance(value, dict) else None
    return _VERDICTS.get(verdict.strip().lower().removeprefix("answer ")) if isinstance(verdict, str) else None


def verdict_without_judge(answer: str, opponent: str) -> float | None:
    """The preference where nobody need be asked: identical answers are a tie, an empty one loses. None elsewhere."""
    answer, opponent = answer.strip(), opponent.strip()
    if answer == opponent:
        return 0.5
    return None if answer and opponent else float(bool(answer))


def canary_comparisons(pairs: list[dict[str, str]]) -> list[dict[str, str]]:
    """The answers against two opponents that no good judge lets win: a constant answer, and a copy of the question."""
    chosen = pairs[:: -(-len(pairs) // CANARIES)]
    of_question = [pair | {"opponent": f"{pair['instruction']}\n\n{pair['input']}".strip()} for pair in chosen]
    of_constant = [pair | {"opponent": CONSTANT_ANSWER} for pair in chosen]
    return [
        comparison | {"canary": name}
        for name, comparisons in (("constant answer", of_constant), ("copy of the question", of_question))
        for comparison in comparisons
    ]


# ------------------------------------------------------------------------------------------------------------- verdicts


@dataclass
class Verdicts:
    """What the log holds for each request number."""

    replies: dict[int, list[dict[str, Any]]] = field(default_factory=lambda: collections.defaultdict(list))
    given: dict[int, str] = field(default_factory=dict)  # the first that could be read

    @classmethod
    def of(cls, records: Iterable[dict[str, Any]]) -> "Verdicts":
        verdicts = cls()
        for record in records:
            if "answer" in record:
                verdicts.add(record)
        return verdicts

    def add(self, record: dict[str, Any]) -> None:
        number = record["request"]
        self.replies[number].append(record)
        verdict = read_verdict(record["answer"], record["finish_reason"])
        if verdict and number not in self.given:
            self.given[number] = verdict

    def settled(self, number: int, max_attempts: int) -> bool:
        """Whether asking again is of no use: a verdict is there, too many replies had none, or a filter declines."""
        replies = self.replies.get(number, ())
        filtered = any(reply["finish_reason"] == "content_filter" for reply in replies)
        return number in self.given or len(replies) >= max_attempts or filtered

    def scores(self, index: int, comparison: dict[str, str]) -> list[float | None]:
        """What the answer of comparison `index` scores in each order: 1, 0.5, 0, or None where no verdict is there."""
        without = verdict_without_judge(comparison["answer"], comparison["opponent"])
        if without is not None:
            return [without, without]
        values = {None: (None, None), "A": (1.0, 0.0), "B": (0.0, 1.0), "tie": (0.5, 0.5)}
        return [values[self.given.get(2 * index + order)][order] for order in (0, 1)]
