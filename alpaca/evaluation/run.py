"""A judging run: asks the judge for every verdict that the log does not hold yet.

Every reply is logged before it is used, and all that is reported is a function of the log.
"""

import asyncio
import collections
import functools
import itertools
import os
import signal
from typing import Any

from tqdm import tqdm

from alpaca.common import ExitCode, ExpectedError
from alpaca.evaluation.judge import Verdicts, encode_prompt, verdict_without_judge
from alpaca.generation.directory import last_settings, say
from alpaca.teacher.client import Teacher
from alpaca.teacher.gate import Stopped
from alpaca.teacher.request_log import Log, Meter, UsedUp, budget_error

WRITTEN = ("report.json", "index.html")  # beside requests.jsonl, the log
MOST_UNREADABLE = 100  # replies in a row without a verdict: this judge gives none, stop paying
KEPT_OF_A_FAULT = 20_000  # characters of a broken reply, for inspection
USUAL_REPLY = 250  # tokens of a verdict with a few sentences of reasoning, for the projection


class Judging:
    """Asks the judge until every comparison has its two verdicts, a limit is reached, or it is interrupted."""

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
        self.teacher, self.log, self.meter = teacher, log, meter
        self.template, self.comparisons, self.max_attempts = template, comparisons, max_attempts
        self.verdicts = Verdicts.of(log.records)
        wanted = [
            2 * index + order
            for index, comparison in enumerate(comparisons)
            if verdict_without_judge(comparison["answer"], comparison["opponent"]) is None
            for order in (0, 1)
        ]
        self.queue = collections.deque(n for n in wanted if not self.verdicts.settled(n, max_attempts))
        self.prompt_tokens = [len(self.prompt_of(number)) // 4 for number in self.queue]  # four characters a token
        meter.largest = {
            "prompt_tokens": max(self.prompt_tokens, default=0) * 4 // 3,
            "completion_tokens": max_tokens,
        }
        self.new_replies = self.unreadable_in_a_row = 0  # of this process
        self.interrupted: int | None = None  # exit code
        self.bar = tqdm(total=len(wanted), initial=len(wanted) - len(self.queue), unit="verdict", disable=None)

    def prompt_of(self, number: int) -> str:
        return encode_prompt(self.template, self.comparisons[number // 2], swapped=bool(number % 2))

    def say_what_to_expect(self) -> None:
        """Requests, tokens and cost of what is missing."""
        meter, requests, largest = self.meter, len(self.queue), self.meter.largest
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

    def interrupt(self, exit_code: int) -> None:
        if self.interrupted:
            os._exit(exit_code)  # a second time: at once. The log is synced.
        self.interrupted = exit_code
        self.teacher.stopping.set()

    async def collect(self, concurrency: int) -> None:
        """Ask for all that is missing. Raises ExpectedError where something ends the run before that."""
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(signal_number, self.interrupt, 128 + signal_number)
        try:
            failure = await self.ask_all(concurrency)
        finally:
            self.bar.close()
            await self.teacher.close()
        if self.interrupted:
            raise ExpectedError(
                f"interrupted with {len(self.queue)} verdicts or more to ask for; everything so far is saved: "
                "run the same command again to go on",
                self.interrupted,
            )
        if failure:
            raise failure

    async def ask_all(self, concurrency: int) -> Exception | None:
        """Keep `concurrency` requests in flight while there is something to ask. → what ended it early, or None."""
        tasks: set[asyncio.Task] = set()
        stop = asyncio.create_task(self.teacher.stopping.wait())
        failure: Exception | None = None
        used_up: UsedUp | None = None
        try:
            while True:
                if failure:
                    self.teacher.stopping.set()  # what waits for another attempt need not
                limit = concurrency if self.new_replies else 1  # the first goes alone: its key may be wrong
                while self.queue and len(tasks) < limit and not self.teacher.stopping.is_set():
                    if self.meter.exhausted():
                        break
                    self.meter.count_request()
                    self.meter.in_flight += 1
                    tasks.add(asyncio.create_task(self.ask(self.queue.popleft())))
                if not tasks:
                    break
                awaited = tasks if self.teacher.stopping.is_set() else {*tasks, stop}
                done, _ = await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
                tasks -= done
                for error in [task.exception() for task in done - {stop}]:
                    if isinstance(error, UsedUp):
                        used_up = error  # for a further attempt; those that wait to be sent have been counted
                    elif isinstance(error, ExpectedError):
                        failure = failure or error
                    elif error and not isinstance(error, Stopped):
                        raise error  # the disk is full, or a bug
        finally:
            for task in {*tasks, stop}:
                task.cancel()
            await asyncio.gather(*tasks, stop, return_exceptions=True)
        at_its_limit = self.queue and not self.interrupted
        return failure or used_up or (budget_error(self.meter.exhausted()) if at_its_limit else None)

    async def ask(self, number: int) -> None:
        """One request, with its retries, into the log; back into the queue where the reply holds no verdict."""
        attempts = itertools.count(1)

        def before() -> None:
            if next(attempts) > 1:  # the caller has counted the first
                self.meter.count_request()

        try:
            reply = await self.teacher.ask(self.prompt_of(number), before, functools.partial(self.keep_fault, number))
            self.keep_reply(number, reply)
        finally:
            self.meter.in_flight -= 1
        if self.verdicts.settled(number, self.max_attempts):
            self.bar.update()
        else:
            self.queue.appendleft(number)
        self.unreadable_in_a_row = 0 if number in self.verdicts.given else self.unreadable_in_a_row + 1
        if self.unreadable_in_a_row >= MOST_UNREADABLE:
            raise ExpectedError(
                f"the last {MOST_UNREADABLE} replies held no verdict that can be read, such as "
                f'"…{" ".join(reply["choices"][0]["text"].split())[-60:]}"; everything so far is saved: use a judge '
                "that follows judge_prompt.txt, or give it more --max_tokens",
                ExitCode.BUDGET,
            )

    def keep_reply(self, number: int, reply: dict[str, Any]) -> None:
        """Into the log first; then it may be used."""
        choice = reply["choices"][0]
        record = {
            "request": number,
            "answer": choice["text"],
            "finish_reason": choice["finish_reason"],
            "usage": reply["usage"],
            "model": reply["model"],
            "batch": False,
        }
        self.log.append(record)
        self.log.records.append(record)
        self.meter.count_usage(reply["usage"])
        self.verdicts.add(record)
        self.new_replies += 1

    def keep_fault(self, number: int, kind: str, raw: str = "", usage: dict | None = None) -> None:
        record = {"request": number, "fault": kind, "raw": raw[:KEPT_OF_A_FAULT], "usage": usage, "batch": False}
        self.log.append(record)
        self.log.records.append(record)
        self.meter.count_usage(usage)
        if not self.meter.faults[kind]:
            say(f"request {number}: {kind}{': ' if raw else ''}{' '.join(raw.split())[:200]} (said once)")
        self.meter.faults[kind] += 1


def begin_or_continue(log: Log, output_dir: str, header: dict[str, Any], settings: dict[str, Any]) -> None:
    """Begin the log with all that the verdicts depend on, or compare with what it begins with.

    Raises ExpectedError (USAGE) where the directory holds something else.
    """
    if not log.records:
        if any(os.path.exists(os.path.join(output_dir, name)) for name in WRITTEN):
            message = f"{output_dir} holds a report and no judging; choose another --output_dir"
            raise ExpectedError(message, ExitCode.USAGE)
        log.append({"run": header})
        log.records.append({"run": header})
    known = log.records[0].get("run", {})
    differ = [name for name, value in header.items() if known.get(name) != value]
    if differ:
        raise ExpectedError(
            f"{output_dir} holds a run with other {', '.join(differ)}; give the same, or choose another --output_dir",
            ExitCode.USAGE,
        )
    if settings != last_settings(log.records):
        log.append({"settings": settings})
        log.records.append({"settings": settings})


def read_judging(log: Log, output_dir: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """→ header and last settings of a judged directory's log. Raises ExpectedError (USAGE) where it is none."""
    header, settings = log.records[0].get("run", {}) if log.records else {}, last_settings(log.records)
    if settings is None or "pairs" not in header:
        message = f"{output_dir} holds no judging; give the --output_dir of eval.py judge"
        raise ExpectedError(message, ExitCode.USAGE)
    return header, settings


def remove_leftovers(output_dir: str) -> None:
    """What a killed process may have left of writing the report; the directory is locked by the caller."""
    for name in os.listdir(output_dir):
        if name.endswith(".tmp") and name.startswith(tuple(f".{written}." for written in WRITTEN)):
            os.unlink(os.path.join(output_dir, name))
