"""A judging run: asks the judge for every verdict that the log does not hold yet.

Every reply is logged before it is used, and all that is reported is a function of the log.
"""

import os
from typing import Any

from tqdm import tqdm

from alpaca.common import ExitCode, ExpectedError
from alpaca.evaluation.judge import Verdicts, encode_prompt, reasoning_taken_out, verdict_without_judge
from alpaca.teacher.asking import Asking
from alpaca.teacher.client import Teacher
from alpaca.teacher.directory import last_settings, say
from alpaca.teacher.request_log import Log, Meter

WRITTEN = ("report.json", "index.html")  # beside requests.jsonl, the log
MOST_UNREADABLE = 100  # replies in a row without a verdict: this judge gives none, stop paying
USUAL_REPLY = 250  # tokens of a verdict with a few sentences of reasoning, for the projection


class Judging(Asking):
    """Asks the judge until every comparison has its two verdicts."""

    def __init__(
        self,
        teacher: Teacher,
        log: Log,
        meter: Meter,
        template: str,
        comparisons: list[dict[str, str]],
        max_tokens: int,  # of a reply
        max_attempts: int,  # at a verdict that can be read
    ):
        self.template, self.comparisons, self.max_attempts = template, comparisons, max_attempts
        self.verdicts = Verdicts.of(log.records)
        wanted = [
            2 * index + order
            for index, comparison in enumerate(comparisons)
            if verdict_without_judge(comparison["answer"], comparison["opponent"]) is None
            for order in (0, 1)
        ]
        self.missing = dict.fromkeys(n for n in wanted if not self.verdicts.settled(n, max_attempts))  # in order
        prompts = [len(self.prompt_of(number)[1]) // 4 for number in self.missing]
        self.prompt_tokens = prompts  # four characters a token
        meter.largest = {"prompt_tokens": max(prompts, default=0) * 4 // 3, "completion_tokens": max_tokens}
        self.unreadable_in_a_row = 0  # of this process
        self.last_words = ""
        bar = tqdm(total=len(wanted), initial=len(wanted) - len(self.missing), unit="verdict", disable=None)
        super().__init__(teacher, log, meter, bar)

    @property
    def finished(self) -> bool:
        return not self.missing

    def progress(self) -> str:
        return f"{len(self.missing)} verdicts to ask for"

    def next_request(self) -> int | None:
        return next((number for number in self.missing if number not in self.under_way), None)

    def prompt_of(self, number: int) -> tuple[dict[str, Any], str]:
        return {}, encode_prompt(self.template, self.comparisons[number // 2], swapped=bool(number % 2))

    def says_nothing(self, text: str, finish_reason: str | None) -> bool:
        return super().says_nothing(text, finish_reason) or bool(text.strip() and not reasoning_taken_out(text))

    def use(self, record: dict[str, Any], place: tuple[int, str]) -> None:
        """Asked again where the reply holds no verdict."""
        number = record["request"]
        self.verdicts.add(record)
        self.unreadable_in_a_row = 0 if number in self.verdicts.given else self.unreadable_in_a_row + 1
        self.last_words = " ".join(record["answer"].split())[-60:]
        if self.verdicts.settled(number, self.max_attempts):
            del self.missing[number]
            self.bar.update()

    async def advance(self) -> None:
        await super().advance()
        if self.unreadable_in_a_row >= MOST_UNREADABLE:
            raise ExpectedError(
                f"the last {MOST_UNREADABLE} replies held no verdict that can be read, such as "
                f'"…{self.last_words}"; everything so far is saved: use a judge that follows judge_prompt.txt, or give '
                "it more --max_tokens",
                ExitCode.BUDGET,
            )

    def say_what_to_expect(self) -> None:
        """Requests, tokens and cost of what is missing."""
        if unknown := self.meter.unknown:
            say(f"{unknown} requests more were asked and not received, and count as the largest for the limits")
        meter, requests, largest = self.meter, len(self.missing), self.meter.largest
        if not requests:
            return
        usual = {
            "prompt_tokens": sum(self.prompt_tokens),
            "completion_tokens": requests * min(USUAL_REPLY, largest["completion_tokens"]),
        }
        most = {"prompt_tokens": usual["prompt_tokens"] * 4 // 3}
        most |= {"completion_tokens": requests * largest["completion_tokens"]}
        prices = any(meter.prices.values())
        say(
            f"{requests} verdicts to ask for; expecting about {usual['prompt_tokens']:,} prompt and "
            f"{usual['completion_tokens']:,} reply tokens"
            + (f", cost {meter.price(usual):.2f}" if prices else "")
            + f"; at most {sum(most.values()):,} tokens"
            + (f", cost {meter.price(most):.2f}" if prices else "")
            + ", repeated verdicts not counted"
        )


def begin_or_continue(log: Log, output_dir: str, header: dict[str, Any], settings: dict[str, Any]) -> None:
    """Begin the log with all that the verdicts depend on, or compare with what it begins with.

    Raises ExpectedError (USAGE) where the directory holds something else.
    """
    if not log.records:
        if any(os.path.exists(os.path.join(output_dir, name)) for name in WRITTEN):
            message = f"{output_dir} holds a report and no judging; choose another --output_dir"
            raise ExpectedError(message, ExitCode.USAGE)
        log.append({"run": header})
    known = log.records[0].get("run", {})
    differ = [name for name, value in header.items() if known.get(name) != value]
    if differ:
        raise ExpectedError(
            f"{output_dir} holds a run with other {', '.join(differ)}; give the same, or choose another --output_dir",
            ExitCode.USAGE,
        )
    if settings != last_settings(log.records):
        log.append({"settings": settings})


def read_judging(log: Log, output_dir: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """→ header and last settings of a judged directory's log. Raises ExpectedError (USAGE) where it is none."""
    header, settings = log.records[0].get("run", {}) if log.records else {}, last_settings(log.records)
    if settings is None or "pairs" not in header:
        message = f"{output_dir} holds no judging; give the --output_dir of eval.py judge"
        raise ExpectedError(message, ExitCode.USAGE)
    return header, settings
