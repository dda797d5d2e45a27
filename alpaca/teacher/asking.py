"""The loop that asks: so many requests at a time, each answer in the log before it is used, until there are enough."""

import asyncio
import collections
import functools
import os
from collections.abc import Coroutine
from typing import Any

from tqdm import tqdm

from alpaca.common import ExitCode, ExpectedError
from alpaca.teacher.batch import run_batch
from alpaca.teacher.client import NOTHING, Stopped, Teacher
from alpaca.teacher.directory import say
from alpaca.teacher.request_log import Log, Meter, UsedUp, budget_error

MOST_EMPTY = 3  # answers in a row that hold nothing but reasoning
CUT = ("length", "max_tokens", "model_length", "MAX_TOKENS")  # what servers call it
KEPT_OF_A_FAULT = 20_000  # characters of a broken answer, for inspection


class Asking:
    """A run that asks until it is finished, a limit is reached, or it is interrupted. What is asked is the subclass's:
    it says `finished`, `next_request`, `prompt_of`, `use`, `advance` and `progress`.
    """

    def __init__(self, teacher: Teacher, log: Log, meter: Meter, bar: tqdm):
        self.teacher, self.log, self.meter, self.bar = teacher, log, meter, bar
        self.under_way: set[int] = set()  # requests
        self.new_answers = 0  # of this process
        self.empty = 0  # new answers in a row that the teacher spent on thinking
        self.batch_failures: collections.Counter[int] = collections.Counter()  # by request, in this process
        self.interrupted: int | None = None  # exit code

    @property
    def finished(self) -> bool:
        """Whether nothing more is needed, not even of what is under way."""
        raise NotImplementedError

    def next_request(self) -> int | None:
        """The number of the next one to be asked, None where those under way are likely to be enough."""
        raise NotImplementedError

    def prompt_of(self, number: int) -> tuple[dict[str, Any], str]:
        """What the log is to say of this request, and its prompt."""
        raise NotImplementedError

    def use(self, record: dict[str, Any], place: tuple[int, str]) -> None:
        """An answer that has just come into the log."""
        raise NotImplementedError

    async def advance(self) -> None:
        """Called as answers come in. Raises ExpectedError where asking on is of no use."""
        if self.empty >= MOST_EMPTY:
            raise ExpectedError(
                f"{self.empty} answers in a row came to their end before the first word: the model spends its tokens "
                "on thinking; everything so far is saved: raise --max_tokens, or have it think less, with what its "
                """server knows: --extra_body '{"reasoning_effort": "low"}' or """
                """'{"chat_template_kwargs": {"enable_thinking": false}}'""",
                ExitCode.BUDGET,
            )

    def progress(self) -> str:
        """How far it is, in words: "interrupted with …"."""
        raise NotImplementedError

    def says_nothing(self, text: str, finish_reason: str | None) -> bool:
        """Whether an answer's tokens all went into thinking."""
        return not text.strip() and finish_reason in CUT

    # ------------------------------------------------------------------------------------------------------- the log

    async def keep_answer(self, number: int, answer: dict[str, Any], batch: bool = False) -> None:
        """Into the log first; then it may be used."""
        choice = answer["choices"][0]
        record = {
            "request": number,
            **self.prompt_of(number)[0],
            "answer": choice["text"],
            "finish_reason": choice["finish_reason"],
            "usage": answer["usage"],
            "model": answer["model"],
            "batch": batch,
        }
        place = await asyncio.to_thread(self.log.append, record)  # a slow disk holds up no request
        self.meter.count_usage(answer["usage"], batch)
        self.new_answers += 1
        if self.says_nothing(record["answer"], record["finish_reason"]):
            self.empty += 1
        elif record["answer"].strip():
            self.empty = 0
        self.use(record, place)

    def keep_fault(self, number: int, kind: str, raw: str = "", usage: dict | None = None, batch: bool = False) -> None:
        """`usage` None: nobody knows what it cost."""
        self.log.append(
            {"request": number, "fault": kind, "raw": raw[:KEPT_OF_A_FAULT], "usage": usage, "batch": batch}
        )
        self.meter.count_usage(usage, batch)
        if not self.meter.faults[kind]:
            say(f"request {number}: {kind}{': ' if raw else ''}{' '.join(raw.split())[:200]} (said once)")
        self.meter.faults[kind] += 1

    # ------------------------------------------------------------------------------------------------------ the loop

    def interrupt(self, exit_code: int) -> None:
        if self.interrupted:
            os._exit(exit_code)  # a second time: at once. The log is synced, and what is made of it is replaced whole.
        self.interrupted = exit_code
        self.teacher.stopping.set()

    async def collect(self, concurrency: int, batch_requests: int = 0, poll_seconds: float = 60.0) -> None:
        """Ask until it is finished. `batch_requests` 0: live. Raises ExpectedError where it ends before that."""
        failure = None
        try:
            await self.finish_batch(poll_seconds)
            while batch_requests and not self.finished:
                self.begin_batch(batch_requests)
                await self.finish_batch(poll_seconds)
            failure = await self.ask_live(concurrency)
        except Stopped:
            pass
        finally:
            self.bar.close()
            await self.teacher.close()
        if self.interrupted:
            raise ExpectedError(
                f"interrupted with {self.progress()}; everything so far is saved: run the same command again to go on",
                self.interrupted,
            )
        if failure:
            raise failure

    async def ask_live(self, concurrency: int) -> ExpectedError | None:
        """Keep `concurrency` requests in flight until it is finished or something ends it. → what that was, or None."""
        tasks: set[asyncio.Task] = set()
        stop = asyncio.create_task(self.teacher.stopping.wait())
        failure: ExpectedError | None = None
        used_up: UsedUp | None = None
        try:
            while True:
                try:
                    await self.advance()
                except ExpectedError as error:
                    failure = failure or error
                if self.finished or failure:
                    self.teacher.stopping.set()  # what waits for another attempt need not
                # The first goes alone: its key may be wrong. So do the next, while there is no word in the answers.
                limit = concurrency if self.new_answers > self.empty else 1
                while not self.teacher.stopping.is_set() and len(tasks) < limit and not self.meter.exhausted():
                    if (number := self.next_request()) is None:
                        break
                    tasks.add(asyncio.create_task(self.ask(number)))
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
        if self.finished or self.interrupted:
            return None
        return failure or used_up or budget_error(self.meter.exhausted())

    def ask(self, number: int) -> Coroutine[Any, Any, None]:
        """One request, with its retries, into the log; under way and counted at once."""
        self.meter.count_request()
        self.under_way.add(number)
        self.meter.in_flight += 1
        return self._ask(number)

    async def _ask(self, number: int) -> None:
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
            answer = await self.teacher.ask(self.prompt_of(number)[1], before, on_fault)
            await self.keep_answer(number, answer)
        finally:
            self.under_way.remove(number)
            self.meter.in_flight -= 1
            self.meter.requests -= not attempts  # it has not even been sent

    # ----------------------------------------------------------------------------------------------------- the batches

    def begin_batch(self, most: int) -> None:
        """Remember which requests the next batch is to hold, as many as needed and as the limits allow."""
        numbers: list[int] = []
        while len(numbers) < most and not self.meter.exhausted(len(numbers) + 1, batch=True):
            if (number := self.next_request()) is None:
                break
            numbers.append(number)
            self.under_way.add(number)
        self.under_way.clear()
        if not numbers:
            raise budget_error(self.meter.exhausted(1, batch=True))
        self.remember_batch({"requests": numbers})

    def remember_batch(self, batch: dict[str, Any]) -> None:
        self.log.append({"batch_state": dict(batch)})

    async def finish_batch(self, poll_seconds: float) -> None:
        """Bring home the batch that is under way, if there is one, perhaps from an earlier process."""
        states = [i for i, record in enumerate(self.log.records) if "batch_state" in record]
        if not states or self.log.records[states[-1]]["batch_state"].get("done"):
            return
        batch = self.log.records[states[-1]]["batch_state"]
        # An earlier process may have been killed while it put the results into the log.
        known = {record.get("request") for record in self.log.records[states[-1] :]}
        prompts = {number: self.prompt_of(number)[1] for number in batch["requests"]}
        say(f"batch of {len(prompts)} requests {batch.get('batch_id', '(new)')}: waiting for its results")
        results, failure = await run_batch(self.teacher, batch, prompts, self.remember_batch, poll_seconds)
        for number, result in sorted(results.items()):
            if number in known:
                continue
            self.meter.requests += 1
            if isinstance(result, str):
                self.keep_fault(number, result, usage=NOTHING, batch=True)
                self.batch_failures[number] += 1
            else:
                await self.keep_answer(number, result, batch=True)
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
