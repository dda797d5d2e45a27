"""The output directory of a run: who works in it, its log, what was decided, and what is written at the end."""

import collections
import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from alpaca.common import ExitCode, ExpectedError, jload
from alpaca.generation.decisions import Decisions
from alpaca.generation.self_instruct import Collection, write_regen
from alpaca.teacher.request_log import Log, Meter

LARGE = ("answer", "raw")  # fields of the log that do not stay in memory


@contextlib.contextmanager
def locked(output_dir: str) -> Iterator[None]:
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


def open_log(output_dir: str, left_on_disk: Iterable[str] = ()) -> Log:
    try:
        log = Log(os.path.join(output_dir, "requests.jsonl"), left_on_disk)
    except OSError as error:
        raise ExpectedError(f"{error.filename}: {error.strerror}; choose a writable --output_dir", ExitCode.DISK)
    if log.cut_off:
        say(f"requests.jsonl: cut off {log.cut_off} bytes of a last line that was not finished")
    return log


def say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


def entries_without_log(output_dir: str) -> list[dict[str, Any]]:
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
    say(f"{path}: {len(entries)} instructions of an earlier run count as kept")
    return entries


def begin_or_continue(log: Log, output_dir: str, header: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Begin the log with all that regen.json depends on, or compare with what it begins with. → the log's header."""
    if not log.records:
        header |= {"already_kept": entries_without_log(output_dir)}
        log.places.append(log.append({"run": header}))
    else:
        for name, value in header.items():
            # A run that is older than a rule goes on without it.
            if (known := log.records[0]["run"].get(name, value)) != value:
                change = f"{name} {known} → {value}" if isinstance(value, int) else name
                raise ExpectedError(
                    f"{output_dir} holds a run of another kind ({change}); restore that or choose another --output_dir",
                    ExitCode.USAGE,
                )
        header = log.records[0]["run"]
    if settings != last_settings(log.records):
        log.append({"settings": settings})
    return header


def last_settings(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((record["settings"] for record in reversed(records) if "settings" in record), None)


def use_logged_answers(collection: Collection, log: Log, decisions: Decisions, skip_missing: bool = False) -> None:
    """The log's answers, in order of their requests; behind a gap (a request to be made again) they wait."""
    answers = [
        {**record, "place": place} for record, place in zip(log.records, log.places, strict=False) if "answer" in record
    ]
    for record in tqdm(
        sorted(answers, key=lambda record: record["request"]), "using answers", disable=None, leave=False
    ):
        if skip_missing:
            collection.answers = max(collection.answers, record["request"])
        collection.waiting.setdefault(record["request"], record)
        decisions.advance(collection)


def answers_of(output_dir: str, count: int) -> list[tuple[int, dict[str, Any]]]:
    """The first requests' numbers and records, of those that have an answer in the log."""
    with open(os.path.join(output_dir, "requests.jsonl"), encoding="utf-8") as file:
        records = (json.loads(line) for line in file)
        return sorted((r["request"], r) for r in records if "answer" in r and r["request"] < count)


def write_and_summarize(
    collection: Collection, meter: Meter, output_dir: str, limited: collections.Counter | None = None
) -> None:
    """Write regen.json, and print the run in a few lines."""
    write_regen(collection, output_dir)

    def counts(counter: collections.Counter) -> str:
        return ", ".join(f"{reason} {count}" for reason, count in counter.most_common()) or "none"

    waiting, kept = len(collection.waiting), collection.kept
    print(
        f"{len(collection.entries)} of {collection.target} instructions in {os.path.join(output_dir, 'regen.json')}\n"
        f"  {kept} kept from {collection.answers} answers"
        + (f"; {waiting} more in the log, not needed or not yet in turn" if waiting else "")
        + f"\n  rejected: {counts(collection.rejected)}\n"
        f"  {meter.requests} requests, of them faults: {counts(meter.faults)}"
        + (f"; answered with a rate limit and asked again: {counts(limited)}" if limited else "")
        + "\n"
        f"  {meter.tokens} tokens"
        + (f", {meter.tokens / kept:.0f} a kept example" if kept else "")
        + (f", cost {meter.cost:.4f}" if any(meter.prices.values()) else "")
        + (
            f"; {meter.unknown} requests more were asked and not received, and count as the largest for the limits"
            if meter.unknown
            else ""
        )
    )
