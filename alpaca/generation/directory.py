"""The output directory of a generation run: how its log begins, what was decided, and what is written at the end."""

import collections
import json
import os
from typing import Any

from tqdm import tqdm

from alpaca.common import ExitCode, ExpectedError, jload
from alpaca.generation.decisions import Decisions
from alpaca.generation.self_instruct import Collection, write_regen
from alpaca.teacher.directory import last_settings, say
from alpaca.teacher.request_log import Log, Meter

LARGE = ("answer", "raw")  # fields of the log that do not stay in memory
WRITTEN = ("regen.json",)


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
        log.append({"run": header})
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


def use_logged_answers(collection: Collection, log: Log, decisions: Decisions, skip_missing: bool = False) -> None:
    """The log's answers, in order of their requests; behind a gap (a request to be made again) they wait."""
    answers = [
        {**record, "place": place} for record, place in zip(log.records, log.places, strict=True) if "answer" in record
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
