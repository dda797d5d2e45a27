"""A generation run: what it asks for, and when it has enough."""

import asyncio
import math
import shutil
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from alpaca.common import ExitCode, ExpectedError
from alpaca.generation.decisions import Decisions
from alpaca.generation.dress import clean_text
from alpaca.generation.parsing import only_reasoning
from alpaca.generation.self_instruct import Collection, write_regen
from alpaca.teacher.asking import Asking
from alpaca.teacher.client import Stopped, Teacher
from alpaca.teacher.directory import say
from alpaca.teacher.request_log import Meter, budget_error

TYPICAL_KEPT = 12  # of an answer, until answers tell; for projections and for how many requests to start
MOST_WITHOUT_NEW = 100  # answers in a row with nothing new: the teacher or the settings are no good, stop paying
WRITE_SECONDS = 60  # between two writings of regen.json during a run


class Run(Asking):
    """Asks the teacher until the collection is full."""

    def __init__(
        self,
        teacher: Teacher,
        collection: Collection,
        decisions: Decisions,
        meter: Meter,
        output_dir: str,
        prompt_of: Callable[[int], tuple[list[str], str]],  # request number → ids of its seed tasks, prompt
        max_tokens: int,  # of an answer
    ):
        bar = tqdm(total=collection.target, initial=len(collection.entries), unit="task", disable=None)
        super().__init__(teacher, decisions.log, meter, bar)
        self.collection, self.decisions, self.output_dir, self._prompt_of = collection, decisions, output_dir, prompt_of
        # Three bytes a token: English has four, Chinese one character, which is three.
        prompt_tokens = max(len(prompt_of(number)[1].encode()) for number in range(20)) // 3
        largest = {"prompt_tokens": prompt_tokens, "completion_tokens": max_tokens}
        meter.largest = {name: max(meter.largest[name], most) for name, most in largest.items()}
        self.answered = {record["request"] for record in self.log.records if "answer" in record}
        self._first = 0  # all requests before this one are answered
        self.written = time.monotonic(), len(collection.entries)  # regen.json: when, and how many

    @property
    def finished(self) -> bool:
        return self.collection.full

    def progress(self) -> str:
        return f"{len(self.collection.entries)} of {self.collection.target} kept"

    def prompt_of(self, number: int) -> tuple[dict[str, Any], str]:
        seeds, prompt = self._prompt_of(number)
        return {"seeds": seeds}, prompt

    def use(self, record: dict[str, Any], place: tuple[int, str]) -> None:
        self.answered.add(record["request"])
        self.collection.waiting[record["request"]] = {**record, "place": place}

    def says_nothing(self, text: str, finish_reason: str | None) -> bool:
        return super().says_nothing(text, finish_reason) or only_reasoning(text, clean_text(text))

    def next_request(self) -> int | None:
        if self.requests_wanted(len(self.under_way)) <= 0:
            return None
        while self._first in self.answered:
            self._first += 1
        number = self._first
        while number in self.answered or number in self.under_way:
            number += 1
        return number

    def kept_per_answer(self) -> float:
        return (self.collection.kept + TYPICAL_KEPT) / (self.collection.answers + 1)

    def requests_wanted(self, under_way: int) -> int:
        """How many more requests the target is likely to need, beside those under way or answered out of turn."""
        collection = self.collection
        missing = collection.target - len(collection.entries)
        likely = math.ceil(missing / self.kept_per_answer()) - len(collection.waiting)
        # Answers that wait behind a request without one are of no use until it has: those come first in any case.
        gaps = max(collection.waiting, default=-1) + 1 - collection.answers - len(collection.waiting)
        return (max(likely, gaps) if missing > 0 else 0) - under_way

    async def advance(self) -> None:
        """Use the answers whose turn has come, show where the run is, and write regen.json now and then."""
        await asyncio.to_thread(self.decisions.advance, self.collection)
        collection, meter = self.collection, self.meter
        shown = {"kept/answer": f"{collection.kept / max(1, collection.answers):.1f}", "in_flight": meter.in_flight}
        shown |= {"tokens": meter.tokens} | ({"cost": f"{meter.cost:.2f}"} if any(meter.prices.values()) else {})
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(len(collection.entries) - self.bar.n)
        when, count = self.written
        if count < len(collection.entries) and time.monotonic() - when > WRITE_SECONDS:
            await asyncio.to_thread(write_regen, collection, self.output_dir)
            self.written = time.monotonic(), len(collection.entries)
        await super().advance()
        if min(collection.answers_without_new, self.new_answers) >= MOST_WITHOUT_NEW and not collection.full:
            raise ExpectedError(
                f"the last {collection.answers_without_new} answers gave nothing new; everything so far is saved: look "
                f"at them in {self.output_dir}/requests.jsonl, then change --model_name, --temperature or the limits",
                ExitCode.BUDGET,
            )

    async def ask_first(self, count: int) -> None:
        """Only the first requests, one after the other, as far as they have no answer."""
        try:
            for number in range(count):
                if number in self.answered:
                    continue
                if flag := self.meter.exhausted():
                    raise budget_error(flag)
                await self.ask(number)
        except Stopped:
            raise ExpectedError("interrupted; every answer is saved", self.interrupted)
        finally:
            await self.teacher.close()

    def say_what_to_expect(self) -> None:
        """Requests, tokens and cost of what is missing. Raises ExpectedError (DISK) where there is no room for it."""
        collection, meter = self.collection, self.meter
        if collection.full:
            return
        requests, largest = self.requests_wanted(0), meter.largest
        usual = {
            "prompt_tokens": largest["prompt_tokens"] * 3 // 4,
            "completion_tokens": min(largest["completion_tokens"], 1800),
        }
        cost = f", cost {requests * meter.price(usual):.2f}" if any(meter.prices.values()) else ""
        say(
            f"{len(collection.entries)} of {collection.target} kept; expecting about {requests} requests and "
            f"{requests * sum(usual.values()):,} tokens{cost} (at {self.kept_per_answer():.0f} kept an answer), "
            f"at most {requests * sum(largest.values()):,} tokens"
        )
        # Bytes: the log, the decisions, and regen.json twice.
        needed = requests * 5 * largest["completion_tokens"] + 4 * collection.target * 1500
        free = shutil.disk_usage(self.output_dir).free
        if free < needed:
            raise ExpectedError(
                f"{self.output_dir}: {free >> 20} MiB free, about {needed >> 20} needed; "
                "free some or choose another directory",
                ExitCode.DISK,
            )
