"""Self-instruct data generation (Wang et al. 2022, with Alpaca's changes): a teacher writes tasks after seed tasks.

python -m generate_instruction generate_instruction_following_data --output_dir ./ --num_instructions_to_generate 52000
python -m generate_instruction replay --output_dir ./            # regen.json again from the paid answers, for free
python -m generate_instruction export --output_dir ./ --path alpaca_data.json        # the file to train on

Every answer is kept in requests.jsonl before it is used, and regen.json is a function of that file alone. Run the same
command again after whatever happened: it goes on, and ends with the bytes of an uninterrupted run.
"""

import asyncio
import collections
import contextlib
import difflib
import fcntl
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from completions import DEFAULT_MODEL, Stopped, Teacher
from request_log import Log, Meter, budget_error
from self_instruct import (
    BLACKLIST,
    DEFAULT_LIMITS,
    Collection,
    Limits,
    encode_prompt,
    find_word_in_string,
    post_process_gpt3_response,
    prompt_text,
    read_seed_tasks,
    sample_seed_tasks,
    write_regen,
)
from utils import ExitCode, ExpectedError, OpenAIDecodingArguments, jdump, jload, run_main

# What people import from here; it lives in self_instruct.
__all__ = ["encode_prompt", "find_word_in_string", "generate_instruction_following_data", "post_process_gpt3_response"]

TASKS_PER_PROMPT = 20  # prompt.txt asks for a set of this many, the seed tasks included
TYPICAL_KEPT = 12  # of an answer, until answers tell; for projections and for how many requests to start
BARREN_ANSWERS = 100  # in a row with nothing kept: the teacher or the settings are no good, stop paying
DRAIN_SECONDS = 10  # what is in flight may take this long after an interruption
WRITE_SECONDS = 60  # between two writings of regen.json during a run

# ----------------------------------------------------------------------------------------------------- the run's state


@contextlib.contextmanager
def _locked(output_dir: str) -> Iterator[None]:
    """Only one process works in an output directory; the lock goes with the process, however that ends."""
    try:
        os.makedirs(output_dir, exist_ok=True)
        file = open(os.path.join(output_dir, ".lock"), "a+")
    except OSError as error:
        raise ExpectedError(f"{output_dir}: {error.strerror}; choose a writable --output_dir", ExitCode.DISK)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ExpectedError(
                f"{output_dir} is in use by {file.read().strip() or 'another process'}; wait for it or choose another",
                ExitCode.LOCKED,
            )
        for name in os.listdir(output_dir):  # what a killed process may have left of writing regen.json
            if name.startswith(".regen.json.") and name.endswith(".tmp"):
                os.unlink(os.path.join(output_dir, name))
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}, since {time.ctime()}\n")
        file.flush()
        yield


def _open_log(output_dir: str) -> Log:
    try:
        log = Log(os.path.join(output_dir, "requests.jsonl"))
    except OSError as error:
        raise ExpectedError(f"{error.filename}: {error.strerror}; choose a writable --output_dir", ExitCode.DISK)
    if log.cut_off:
        _say(f"requests.jsonl: cut off {log.cut_off} bytes of a last line that was not finished")
    return log


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


def _adopt(output_dir: str) -> list[dict[str, Any]]:
    """The entries of a regen.json that has no log, such as the 2023 script's. Raises ExpectedError (DATA)."""
    path = os.path.join(output_dir, "regen.json")
    if not os.path.exists(path):
        return []
    try:
        entries = jload(path)
        if not all(isinstance(entry[part], str) for entry in entries for part in ("instruction", "input", "output")):
            raise TypeError("instruction, input and output must be texts")
    except (ValueError, KeyError, TypeError) as error:
        raise ExpectedError(f"{path}: {error!r}; repair it or move it away", ExitCode.DATA)
    _say(f"{path}: {len(entries)} instructions of an earlier run count as kept")
    return entries


def _remember_run(log: Log, output_dir: str, header: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Begin the log with all that regen.json depends on, or compare with what it begins with. → the log's header."""
    if not log.records:
        header |= {"already_kept": _adopt(output_dir)}
        log.append({"run": header})
    else:
        for name, value in header.items():
            if (known := log.records[0]["run"][name]) != value:
                change = f"{name} {known} → {value}" if isinstance(value, int) else name
                raise ExpectedError(
                    f"{output_dir} holds a run of another kind ({change}); restore that or choose another --output_dir",
                    ExitCode.USAGE,
                )
        header = log.records[0]["run"]
    if settings != _last_settings(log.records):
        log.append({"settings": settings})
    return header


def _last_settings(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((record["settings"] for record in reversed(records) if "settings" in record), None)


def _take_in(collection: Collection, records: list[dict[str, Any]], skip_missing: bool = False) -> None:
    """The log's answers, in order of their requests; behind a gap (a request to be made again) they wait."""
    answers = sorted((record for record in records if "answer" in record), key=lambda record: record["request"])
    for record in tqdm(answers, desc="reading requests.jsonl", disable=None, leave=False):
        if skip_missing:
            collection.answers = max(collection.answers, record["request"])
        collection.waiting.setdefault(record["request"], record)
        collection.advance()


def _summary(collection: Collection, meter: Meter, output_dir: str) -> str:
    """The run in a few lines."""

    def counts(counter: collections.Counter) -> str:
        return ", ".join(f"{reason} {count}" for reason, count in counter.most_common()) or "none"

    per_kept = f", {meter.tokens / collection.kept:.0f} a kept example" if collection.kept else ""
    cost = f", cost {meter.cost:.4f}" if any(meter.prices.values()) else ""
    waiting = (
        f"; {len(collection.waiting)} more in the log, not needed or not yet in turn" if collection.waiting else ""
    )
    return (
        f"{len(collection.entries)} of {collection.target} instructions in {os.path.join(output_dir, 'regen.json')}\n"
        f"  {collection.kept} kept from {collection.answers} answers{waiting}\n"
        f"  rejected: {counts(collection.rejected)}\n"
        f"  {meter.requests} requests, of them faults: {counts(meter.faults)}\n"
        f"  {meter.tokens} tokens{per_kept}{cost}"
    )


# ------------------------------------------------------------------------------------------------------------ requests


class Run:
    """A generation run: asks the teacher until the collection is full, a limit is reached, or it is interrupted."""

    def __init__(self, teacher: Teacher, collection: Collection, log: Log, meter: Meter, output_dir: str, prompts):
        self.teacher, self.collection, self.log, self.meter = teacher, collection, log, meter
        self.output_dir = output_dir
        self.prompts = prompts  # request number → (seed ids, prompt)
        self.answered = {record["request"] for record in log.records if "answer" in record}
        self.new_answers = 0  # of this process
        self.failed: collections.Counter[int] = collections.Counter()  # batch requests, in this process
        self.interrupted: int | None = None  # exit code
        self.written = time.monotonic(), len(collection.entries)
        self.bar = tqdm(total=collection.target, initial=len(collection.entries), unit="task", disable=None)

    def keep_answer(self, number: int, answer: dict[str, Any], batch: bool = False) -> None:
        """Into the log first; then it may be used."""
        choice = answer["choices"][0]
        record = {
            "request": number,
            "seeds": self.prompts(number)[0],
            "answer": choice["text"],
            "finish_reason": choice["finish_reason"],
            "usage": answer["usage"],
            "model": answer["model"],
            "batch": batch,
        }
        self.log.append(record)
        self.meter.used(answer["usage"], batch)
        self.answered.add(number)
        self.new_answers += 1
        self.collection.waiting[number] = record

    def keep_fault(self, number: int, kind: str, raw: str = "", usage: dict | None = None, batch: bool = False) -> None:
        usage = usage or {"prompt_tokens": 0, "completion_tokens": 0}
        self.log.append({"request": number, "fault": kind, "raw": raw[:20_000], "usage": usage, "batch": batch})
        self.meter.used(usage, batch)
        if not self.meter.faults[kind]:
            _say(f"request {number}: {kind}{': ' if raw else ''}{' '.join(raw.split())[:200]} (said once)")
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
        await asyncio.to_thread(self.collection.advance)
        collection, meter = self.collection, self.meter
        shown = {"kept/answer": f"{collection.kept / max(1, collection.answers):.1f}", "in_flight": meter.in_flight}
        shown |= {"tokens": meter.tokens} | ({"cost": f"{meter.cost:.2f}"} if any(meter.prices.values()) else {})
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(len(collection.entries) - self.bar.n)
        when, count = self.written
        if count < len(collection.entries) and time.monotonic() - when > WRITE_SECONDS:
            await asyncio.to_thread(write_regen, collection, self.output_dir)
            self.written = time.monotonic(), len(collection.entries)
        if min(collection.barren, self.new_answers) >= BARREN_ANSWERS and not collection.full:
            raise ExpectedError(
                f"the last {collection.barren} answers gave nothing new; everything so far is saved: look at the "
                f"answers in {self.output_dir}/requests.jsonl, then change --model_name, --temperature or the limits",
                ExitCode.BUDGET,
            )

    def interrupt(self, exit_code: int) -> None:
        if self.interrupted:
            os._exit(exit_code)  # a second time: at once. The log is synced and regen.json is replaced whole.
        self.interrupted = exit_code
        self.teacher.stopping.set()

    async def collect(self, concurrency: int, batch_requests: int, poll_seconds: float) -> None:
        """Ask until the target is reached. `batch_requests` 0: live. Raises ExpectedError where it is not reached."""
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            exit_code = 128 + signal_number
            asyncio.get_running_loop().add_signal_handler(signal_number, self.interrupt, exit_code)
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
        deadline = None
        try:
            while True:
                try:
                    await self.advance()
                except ExpectedError as error:
                    failure = failure or error
                if self.collection.full or failure:
                    self.teacher.stopping.set()  # what waits for another attempt need not
                limit = concurrency if self.new_answers else 1  # the first goes alone: its key may be wrong
                while not self.teacher.stopping.is_set() and len(tasks) < limit:
                    if self.meter.exhausted() or self.requests_wanted(len(tasks)) <= 0:
                        break
                    self.meter.count_request()
                    self.meter.in_flight += 1
                    tasks.add(asyncio.create_task(self.ask(next(numbers))))
                if not tasks:
                    break
                if self.interrupted and deadline is None:
                    deadline = time.monotonic() + DRAIN_SECONDS
                patience = None if deadline is None else max(0.0, deadline - time.monotonic())
                awaited = tasks if self.teacher.stopping.is_set() else {*tasks, stop}
                done, _ = await asyncio.wait(awaited, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                if patience == 0.0 and not done:
                    break
                tasks -= done
                for error in [task.exception() for task in done - {stop}]:
                    if isinstance(error, ExpectedError):
                        failure = failure or error
                    elif error and not isinstance(error, Stopped):
                        raise error  # the disk is full, or a bug
        finally:
            for task in {*tasks, stop}:
                task.cancel()
            await asyncio.gather(*tasks, stop, return_exceptions=True)
        if not self.collection.full and not self.interrupted:
            raise failure or budget_error(self.meter.exhausted())

    async def ask(self, number: int) -> None:
        """One request, with its retries, into the log. The caller has counted the first attempt."""
        first = True

        def before() -> None:
            nonlocal first
            if not first:
                self.meter.count_request()
            first = False

        try:
            on_fault = functools.partial(self.keep_fault, number)
            self.keep_answer(number, await self.teacher.ask(self.prompts(number)[1], before, on_fault))
        finally:
            self.meter.in_flight -= 1

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
        prompts = {number: self.prompts(number)[1] for number in batch["requests"]}
        _say(f"batch of {len(prompts)} requests {batch.get('batch_id', '(new)')}: waiting for its results")
        results, failure = await self.teacher.run_batch(batch, prompts, self.remember_batch, poll_seconds)
        for number, result in sorted(results.items()):
            if number in self.answered or number in faulted:
                continue
            self.meter.requests += 1
            if isinstance(result, str):
                self.keep_fault(number, result, batch=True)
                self.failed[number] += 1
            else:
                self.keep_answer(number, result, batch=True)
        self.remember_batch({**batch, "done": True})
        await self.advance()
        if failure:
            raise failure
        if self.failed and max(self.failed.values()) >= self.teacher.max_attempts:
            raise ExpectedError(
                f"requests failed {self.teacher.max_attempts} times in batches, faults: {dict(self.meter.faults)}; "
                "everything so far is saved: run the same command again to go on",
                ExitCode.BUDGET,
            )


# ------------------------------------------------------------------------------------------------------------ commands


def generate_instruction_following_data(
    output_dir: str = "./",
    seed_tasks_path: str = "./seed_tasks.jsonl",
    num_instructions_to_generate: int = 100,
    model_name: str = DEFAULT_MODEL,
    num_prompt_instructions: int = 3,
    request_batch_size: int = 5,
    temperature: float = 1.0,
    top_p: float = 1.0,
    num_cpus: int = 16,
    seed: int = 0,
    api: str = "chat",
    base_url: str | None = None,
    concurrency: int | None = None,
    max_tokens: int = 3072,
    max_attempts: int = 10,
    sleep_time: float = 2.0,
    timeout: float = 600.0,
    max_requests: int | None = None,
    max_tokens_total: int | None = None,
    price_in: float | None = None,
    price_out: float | None = None,
    max_cost: float | None = None,
    batch_api: bool = False,
    batch_requests: int = 1000,
    poll_seconds: float = 60.0,
    max_similarity: float = DEFAULT_LIMITS.max_similarity,
    min_words: int = DEFAULT_LIMITS.min_words,
    max_words: int = DEFAULT_LIMITS.max_words,
    blacklist: tuple[str, ...] = BLACKLIST,
) -> None:
    """Have a teacher write instructions after the seed tasks, until enough are kept in output_dir/regen.json.

    The key is read from the environment (OPENAI_API_KEY) and is written nowhere. Limits on requests, tokens and cost
    are for the whole output directory, earlier runs in it included.

    Args:
        output_dir: where requests.jsonl (every answer) and regen.json (what is kept) are; one process at a time.
        seed_tasks_path: the seed tasks, one JSON object a line.
        num_instructions_to_generate: how many to keep, seed tasks not counted; the last answer is taken whole.
        model_name: the teacher's name at the server.
        num_prompt_instructions: seed tasks in each prompt.
        request_batch_size: requests in flight at the same time, unless --concurrency is given.
        temperature: of the teacher's sampling.
        top_p: of the teacher's sampling.
        num_cpus: threads that compare instructions, at most as many as there are cores.
        seed: which seed tasks request i shows depends on this and on i only.
        api: "chat", or "completions" for base models on servers that have the legacy endpoint.
        base_url: the server, such as http://127.0.0.1:8000/v1; by default OPENAI_BASE_URL, or else OpenAI.
        concurrency: requests in flight at the same time; by default --request_batch_size.
        max_tokens: of an answer; less where the server says that the context is too small.
        max_attempts: at one request, before the run stops with exit code 5.
        sleep_time: seconds before the first retry; doubles with each further one, up to 60.
        timeout: seconds for one attempt.
        max_requests: stop with exit code 5 before more requests than this, failed ones included.
        max_tokens_total: stop with exit code 5 before more tokens than this, of prompts and answers together.
        price_in: money for a million prompt tokens, for the cost shown and for --max_cost.
        price_out: money for a million answer tokens.
        max_cost: stop with exit code 5 before more money than this; needs the prices.
        batch_api: True to go through the Batch API: half the price, answers within 24 hours.
        batch_requests: requests in one batch at most.
        poll_seconds: between two looks at a batch.
        max_similarity: drop an instruction whose ROUGE-L with a seed or a kept one is above this.
        min_words: drop shorter instructions.
        max_words: drop longer instructions.
        blacklist: drop instructions with any of these words; comma-separated, () for none.
    """
    arguments = dict(locals())
    output_dir = str(output_dir)
    _check(arguments)
    seed_tasks = read_seed_tasks(str(seed_tasks_path), at_least=num_prompt_instructions)
    decoding = OpenAIDecodingArguments(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    if api == "completions":
        # A base model would go on for ever. 2023's stops, "20." and the like, cut answers with such a number in them.
        decoding.stop = [f"\n{TASKS_PER_PROMPT + 1}. Instruction:"]
    teacher = Teacher(str(model_name), decoding, api, base_url, max_attempts, sleep_time, timeout, _say)
    settings = {name: arguments[name] for name in ("num_instructions_to_generate", *Limits._fields)}
    settings |= {name: arguments[name] for name in ("model_name", "api", "temperature", "top_p", "max_tokens")}
    settings["blacklist"] = _words(blacklist)
    header = {
        "seed": seed,
        "num_prompt_instructions": num_prompt_instructions,
        "prompts": hashlib.sha256(json.dumps([prompt_text(), seed_tasks]).encode()).hexdigest(),
        "seed_instructions": [task["instruction"] for task in seed_tasks],
    }

    def prompts(number: int) -> tuple[list[str], str]:
        tasks = sample_seed_tasks(seed_tasks, number, seed, num_prompt_instructions)
        return [task["id"] for task in tasks], encode_prompt(tasks)

    with _locked(output_dir), contextlib.closing(_open_log(output_dir)) as log:
        header = _remember_run(log, output_dir, header, settings)
        collection = Collection(header, settings, workers=min(num_cpus, os.cpu_count() or 1))
        _take_in(collection, log.records)
        meter = Meter(max_requests, max_tokens_total, price_in, price_out, max_cost)
        for record in log.records:
            meter.read(record)
        log.records = [record for record in log.records if "batch_state" in record or "request" in record]
        run = Run(teacher, collection, log, meter, output_dir, prompts)

        def finish() -> None:
            write_regen(collection, output_dir)
            print(_summary(collection, meter, output_dir))

        try:
            _project(run, max_tokens, output_dir)
            batches = batch_requests if batch_api else 0
            asyncio.run(run.collect(concurrency or request_batch_size, batches, poll_seconds))
        except OSError:
            raise  # the disk is full: regen.json stays as it is
        except BaseException:
            finish()
            raise
        finish()


def _words(blacklist: Any) -> list[str]:
    """--blacklist as Fire gives it: a tuple or list, or one word or comma-separated words in a string."""
    words = blacklist.split(",") if isinstance(blacklist, str) else map(str, blacklist)
    return [word.strip() for word in words if word.strip()]


def _check(arguments: dict[str, Any]) -> None:
    """Raises ExpectedError (USAGE) for an argument that cannot be meant."""
    whole = ("num_instructions_to_generate", "num_prompt_instructions", "request_batch_size", "num_cpus", "concurrency")
    whole += ("max_tokens", "max_attempts", "max_requests", "max_tokens_total", "batch_requests")
    numbers = ("sleep_time", "timeout", "price_in", "price_out", "max_cost", "poll_seconds", "temperature", "top_p")
    numbers += ("max_similarity", "min_words", "max_words")
    for name in (*whole, *numbers):
        value = arguments[name]
        kind = int if name in whole else (int, float)
        good = isinstance(value, kind) and not isinstance(value, bool) and value >= (1 if name in whole else 0)
        if not good and not (value is None and name in _OPTIONAL):
            wanted = "a whole number from 1" if name in whole else "a number from 0"
            raise ExpectedError(f"--{name} {value}: give {wanted}", ExitCode.USAGE)
    if arguments["max_cost"] is not None and None in (arguments["price_in"], arguments["price_out"]):
        raise ExpectedError("--max_cost needs --price_in and --price_out: no price is built in", ExitCode.USAGE)


_OPTIONAL = ("concurrency", "max_requests", "max_tokens_total", "price_in", "price_out", "max_cost")


def _project(run: Run, max_tokens: int, output_dir: str) -> None:
    """Say what the run is going to take, and see that there is room for it. Raises ExpectedError (DISK)."""
    prompt_tokens = max(len(run.prompts(number)[1]) for number in range(20)) // 3  # four characters a token, and some
    run.meter.largest = {"prompt_tokens": prompt_tokens, "completion_tokens": max_tokens}
    requests = max(0, run.requests_wanted(0))
    if run.collection.full:
        return
    usual = {"prompt_tokens": prompt_tokens * 3 // 4, "completion_tokens": min(max_tokens, 1800)}
    cost = f", cost {requests * run.meter.price(usual):.2f}" if any(run.meter.prices.values()) else ""
    _say(
        f"{len(run.collection.entries)} of {run.collection.target} kept; expecting about {requests} requests and "
        f"{requests * sum(usual.values()):,} tokens{cost} (at {run.kept_per_answer():.0f} kept an answer), "
        f"at most {requests * (prompt_tokens + max_tokens):,} tokens"
    )
    needed = requests * 5 * max_tokens + 3 * run.collection.target * 1500  # bytes: the log, and regen.json twice
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise ExpectedError(
            f"{output_dir}: {free >> 20} MiB free, about {needed >> 20} needed; free some or choose another directory",
            ExitCode.DISK,
        )


def replay(
    output_dir: str = "./",
    num_instructions_to_generate: int | None = None,
    max_similarity: float | None = None,
    min_words: int | None = None,
    max_words: int | None = None,
    blacklist: tuple[str, ...] | None = None,
    num_cpus: int = 16,
    skip_missing: bool = False,
) -> None:
    """Make regen.json again from requests.jsonl, without any request. What is not given is as in the last run.

    Args:
        output_dir: the run's directory.
        num_instructions_to_generate: how many to keep.
        max_similarity: drop an instruction whose ROUGE-L with a seed or a kept one is above this.
        min_words: drop shorter instructions.
        max_words: drop longer instructions.
        blacklist: drop instructions with any of these words; comma-separated, () for none.
        num_cpus: threads that compare instructions.
        skip_missing: True to use the answers behind a request that has none yet, where the run will not be resumed.
    """
    given = dict(locals())
    output_dir = str(output_dir)
    if not os.path.exists(os.path.join(output_dir, "requests.jsonl")):
        raise ExpectedError(f"{output_dir} has no requests.jsonl; give the --output_dir of a run", ExitCode.USAGE)
    with _locked(output_dir), contextlib.closing(_open_log(output_dir)) as log:
        settings = _last_settings(log.records)
        if settings is None:
            raise ExpectedError(f"{output_dir}: nothing has been asked there yet", ExitCode.USAGE)
        settings |= {name: given[name] for name in settings.keys() & given.keys() if given[name] is not None}
        settings["blacklist"] = _words(settings["blacklist"])
        collection = Collection(log.records[0]["run"], settings, workers=min(num_cpus, os.cpu_count() or 1))
        _take_in(collection, log.records, skip_missing)
        meter = Meter()
        for record in log.records:
            meter.read(record)
        write_regen(collection, output_dir)
        print(_summary(collection, meter, output_dir))


def export(output_dir: str = "./", path: str = "alpaca_data.json") -> None:
    """Write the file to train on: regen.json without the similarity fields.

    Args:
        output_dir: the run's directory.
        path: the file to write, a JSON list of {"instruction", "input", "output"}.
    """
    source = os.path.join(str(output_dir), "regen.json")
    try:
        entries = jload(source)
        examples = [{part: entry[part] for part in ("instruction", "input", "output")} for entry in entries]
    except FileNotFoundError:
        raise ExpectedError(f"no {source}; give the --output_dir of a run", ExitCode.USAGE)
    except (ValueError, KeyError, TypeError) as error:
        raise ExpectedError(f"{source}: {error!r}; make it again with replay", ExitCode.DATA)
    jdump(examples, path)
    print(f"{len(examples)} examples in {path}")


COMMANDS = {
    "generate_instruction_following_data": generate_instruction_following_data,
    "replay": replay,
    "export": export,
}


def main() -> None:
    import fire

    # Fire calls the function first and finds fault with unknown flags afterwards: a paid run with a mistyped limit.
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        known = {*inspect.signature(COMMANDS[sys.argv[1]]).parameters, "help"}
        for argument in sys.argv[2:]:
            name = argument[2:].split("=")[0].replace("-", "_")
            if argument.startswith("--") and name and name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean --{close[0]}?" if close else "see --help"
                raise ExpectedError(f"unknown flag --{name}; {hint}", ExitCode.USAGE)
    fire.Fire(COMMANDS, name="generate_instruction")


if __name__ == "__main__":
    run_main(main)
