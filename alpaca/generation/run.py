"""A generation run: the loop that asks until enough is kept."""

import asyncio
import collections
import functools
import itertools
import math
import os
import shutil
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from alpaca.common import ExitCode, ExpectedError
from alpaca.generation.decisions import Decisions
from alpaca.generation.directory import say
from alpaca.generation.self_instruct import Collection, write_regen
from alpaca.teacher.batch import run_batch
from alpaca.teacher.client import NOTHING, Stopped, Teacher
from alpaca.teacher.request_log import Meter, UsedUp, budget_error

TYPICAL_KEPT = 12  # of an answer, until answers tell; for projections and for how many requests to start
MOST_WITHOUT_NEW = 100  # answers in a row with nothing new: the teacher or the settings are no good, stop paying
MOST_EMPTY = 3  # answers in a row that came to the token limit before their first word
CUT = ("length", "max_tokens", "model_length", "MAX_TOKENS")  # what servers call it
KEPT_OF_A_FAULT = 20_000  # characters of a broken answer, for inspection
WRITE_SECONDS = 60  # between two writings of regen.json during a run


class Run:
    """A generation run: asks the teacher until the collection is full, a limit is reached, or it is interrupted."""

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
        self.teacher, self.collection, self.meter = teacher, collection, meter
        self.decisions, self.log = decisions, decisions.log
        self.output_dir, self.prompt_of = output_dir, prompt_of
        # Three bytes a token: English has four, Chinese one character, which is three.
        prompt_tokens = max(len(prompt_of(number)[1].encode()) for number in range(20)) // 3
        largest = {"prompt_tokens": prompt_tokens, "completion_tokens": max_tokens}
        meter.largest = {name: max(meter.largest[name], most) for name, most in largest.items()}
        self.answered = {record["request"] for record in self.log.records if "answer" in record}
        self.new_answers = 0  # of this process
        self.empty = 0  # new answers in a row that the teacher spent on thinking
        self.batch_failures: collections.Counter[int] = collections.Counter()  # by request, in this process
        self.interrupted: int | None = None  # exit code
        self.written = time.monotonic(), len(collection.entries)  # regen.json: when, and how many
        self.bar = tqdm(total=collection.target, initial=len(collection.entries), unit="task", disable=None)

    def keep_answer(self, number: int, answer: dict[str, Any], batch: bool = False) -> None:
        """Into the log first; then it may be used."""
        choice = answer["choices"][0]
        record = {
            "request": number,
            "seeds": self.prompt_of(number)[0],
            "answer": choice["text"],
            "finish_reason": choice["finish_reason"],
            "usage": answer["usage"],
            "model": answer["model"],
            "batch": batch,
        }
        place = self.log.append(record)
        self.meter.count_usage(answer["usage"], batch)
        self.answered.add(number)
        self.new_answers += 1
        if record["answer"].strip():
            self.empty = 0
        elif record["finish_reason"] in CUT:
            self.empty += 1
        self.collection.waiting[number] = {**record, "place": place}

    def keep_fault(self, number: int, kind: str, raw: str = "", usage: dict | None = None, batch: bool = False) -> None:
        """`usage` None: nobody knows what it cost."""
        self.log.append(
            {"request": number, "fault": kind, "raw": raw[:KEPT_OF_A_FAULT], "usage": usage, "batch": batch}
        )
        self.meter.count_usage(usage, batch)
        if not self.meter.faults[kind]:
            say(f"request {number}: {kind}{': ' if raw else ''}{' '.join(raw.split())[:200]} (said once)")
        self.meter.faults[kind] += 1

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
        if self.empty >= MOST_EMPTY:
            raise ExpectedError(
                f"{self.empty} answers in a row came to their token limit before the first word: the teacher spends it "
                "on thinking; everything so far is saved: raise --max_tokens, or have it think less, with what its "
                """server knows: --extra_body '{"reasoning_effort": "low"}' or """
                """'{"chat_template_kwargs": {"enable_thinking": false}}'""",
                ExitCode.BUDGET,
            )
        if min(collection.answers_without_new, self.new_answers) >= MOST_WITHOUT_NEW and not collection.full:
            raise ExpectedError(
                f"the last {collection.answers_without_new} answers gave nothing new; everything so far is saved: look "
                f"at them in {self.output_dir}/requests.jsonl, then change --model_name, --temperature or the limits",
                ExitCode.BUDGET,
            )

    def interrupt(self, exit_code: int) -> None:
        if self.interrupted:
            os._exit(exit_code)  # a second time: at once. The log is synced and regen.json is replaced whole.
        self.interrupted = exit_code
        self.teacher.stopping.set()

    async def collect(self, concurrency: int, batch_requests: int, poll_seconds: float) -> None:
        """Ask until the target is reached. `batch_requests` 0: live. Raises ExpectedError where it is not reached."""
        try:
            await self.finish_batch(poll_seconds)
            while batch_requests and not self.collection.full:
                self.begin_batch(batch_requests)
                await self.finish_batch(poll_seconds)
            await self.ask_live(concurrency)
        except Stopped:
            pass
        finally:
            self.bar.close()
            await self.teacher.close()
        if self.interrupted:
            raise ExpectedError(
                f"interrupted with {len(self.collection.entries)} of {self.collection.target} kept; "
                "everything so far is saved: run the same command again to go on",
                self.interrupted,
            )

    async def ask_live(self, concurrency: int) -> None:
        """Keep `concurrency` requests in flight until the target is reached or something ends the run."""
        numbers = (number for number in itertools.count() if number not in self.answered)
        tasks: set[asyncio.Task] = set()
        stop = asyncio.create_task(self.teacher.stopping.wait())
        failure: Exception | None = None
        used_up: UsedUp | None = None
        try:
            while True:
                try:
                    await self.advance()
                except ExpectedError as error:
                    failure = failure or error
                if self.collection.full or failure:
                    self.teacher.stopping.set()  # what waits for another attempt need not
                # The first goes alone: its key may be wrong. So do the next, while there is no word in the answers.
                limit = concurrency if self.new_answers > self.empty else 1
                while not self.teacher.stopping.is_set() and len(tasks) < limit:
                    if self.meter.exhausted() or self.requests_wanted(len(tasks)) <= 0:
                        break
                    self.meter.count_request()
                    self.meter.in_flight += 1
                    tasks.add(asyncio.create_task(self.ask(next(numbers))))
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
        if not self.collection.full and not self.interrupted:
            raise failure or used_up or budget_error(self.meter.exhausted())

    async def ask_first(self, count: int) -> None:
        """Only the first requests, one after the other, as far as they have no answer."""
        try:
            for number in range(count):
                if number in self.answered:
                    continue
                if flag := self.meter.exhausted():
                    raise budget_error(flag)
                self.meter.count_request()
                self.meter.in_flight += 1
                await self.ask(number)
        except Stopped:
            raise ExpectedError("interrupted; every answer is saved", self.interrupted)
        finally:
            await self.teacher.close()

    async def ask(self, number: int) -> None:
        """One request, with its retries, into the log. The caller has counted the first attempt."""
        attempts = 0

        def before() -> None:
            nonlocal attempts
            if attempts:
                if flag := self.meter.exhausted(0):
                    raise budget_error(flag)
                self.meter.count_request()
            attempts += 1
            self.log.append({"asked": number}, sync=False)  # so that it counts even if this process is killed

        try:
            on_fault = functools.partial(self.keep_fault, number)
            self.keep_answer(number, await self.teacher.ask(self.prompt_of(number)[1], before, on_fault))
        finally:
            self.meter.in_flight -= 1
            self.meter.requests -= not attempts  # it has not even been sent

    def begin_batch(self, most: int) -> None:
        """Remember which requests the next batch is to hold, as many as needed and as the limits allow."""
        wanted = min(most, max(1, self.requests_wanted(0)))
        count = next((count for count in range(wanted, 0, -1) if not self.meter.exhausted(count, batch=True)), 0)
        if not count:
            raise budget_error(self.meter.exhausted(1, batch=True))
        numbers = itertools.islice((number for number in itertools.count() if number not in self.answered), count)
        self.remember_batch({"requests": list(numbers)})

    def remember_batch(self, batch: dict[str, Any]) -> None:
        record = {"batch_state": dict(batch)}
        self.log.append(record)
        self.log.records.append(record)

    async def finish_batch(self, poll_seconds: float) -> None:
        """Bring home the batch that is under way, if there is one, perhaps from an earlier process."""
        states = [i for i, record in enumerate(self.log.records) if "batch_state" in record]
        if not states or self.log.records[states[-1]]["batch_state"].get("done"):
            return
        batch = self.log.records[states[-1]]["batch_state"]
        # An earlier process may have been killed while it put the results into the log.
        faulted = {record["request"] for record in self.log.records[states[-1] :] if "fault" in record}
        prompts = {number: self.prompt_of(number)[1] for number in batch["requests"]}
        say(f"batch of {len(prompts)} requests {batch.get('batch_id', '(new)')}: waiting for its results")
        results, failure = await run_batch(self.teacher, batch, prompts, self.remember_batch, poll_seconds)
        for number, result in sorted(results.items()):
            if number in self.answered or number in faulted:
                continue
            self.meter.requests += 1
            if isinstance(result, str):
                self.keep_fault(number, result, usage=NOTHING, batch=True)
                self.batch_failures[number] += 1
            else:
                self.keep_answer(number, result, batch=True)
        self.remember_batch({**batch, "done": True})
        await self.advance()
        if failure:
            raise failure
        if self.batch_failures and max(self.batch_failures.values()) >= self.teacher.max_attempts:
            raise ExpectedError(
                f"requests failed {self.teacher.max_attempts} times in batches, faults: {dict(self.meter.faults)}; "
                "everything so far is saved: run the same command again to go on",
                ExitCode.BUDGET,
            )

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
