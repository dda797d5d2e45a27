"""Two models on the same questions: paired differences of what was measured, or of how they fared with the judge."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

from alpaca.common import ExitCode, ExpectedError, jload
from alpaca.evaluation.figures import IFEVAL, JUDGED, MEASURED, Figures, differences_of
from alpaca.evaluation.judge import Verdicts
from alpaca.evaluation.report import judged_rows
from alpaca.evaluation.run import read_judging
from alpaca.teacher.directory import locked, open_log


def compare_directories(a: str, b: str) -> dict[str, dict[str, Any]]:
    """→ the differences a − b of every figure that both have. Raises ExpectedError where they can't be compared."""
    judged = [os.path.exists(os.path.join(directory, "requests.jsonl")) for directory in (a, b)]
    if judged[0] != judged[1]:
        raise ExpectedError(f"{a} and {b}: one is judged, the other measured; give two of a kind", ExitCode.USAGE)
    if judged[0]:
        return compare_judged(a, b)
    one, other = read_measured(a), read_measured(b)
    found = compare_rows(one["rows"], other["rows"], MEASURED, (a, b), ("instruction", "input", "reference"))
    if "ifeval" in one and "ifeval" in other:
        found |= compare_rows(one["ifeval"], other["ifeval"], IFEVAL, (a, b), ("prompt",))
    return found


def compare_judged(a: str, b: str) -> dict[str, dict[str, Any]]:
    sides, judges = [], []
    for directory in (a, b):
        with locked(directory), contextlib.closing(open_log(directory)) as log:
            header, _ = read_judging(log, directory)
            rows = judged_rows(header["pairs"], Verdicts.of(log.records))
        judges.append([header["model_name"], header["prompt"]])
        sides.append([row | {"length": len(row["answer"]), "opponent_length": len(row["opponent"])} for row in rows])
    if judges[0] != judges[1]:
        message = f"{a} and {b} were judged by different judges or prompts; judge one of them again"
        raise ExpectedError(message, ExitCode.USAGE)
    return compare_rows(*sides, JUDGED, (a, b), ("instruction", "input", "opponent"))


def read_measured(directory: str) -> dict[str, list[dict[str, Any]]]:
    path = os.path.join(directory, "rows.json")
    if not os.path.exists(path):
        message = f"{directory} holds nothing to compare; give finished --output_dirs of eval.py judge or measure"
        raise ExpectedError(message, ExitCode.USAGE)
    return jload(path)


def compare_rows(
    one: Sequence[dict], other: Sequence[dict], figures: Figures, names: tuple[str, str], same: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """Pair the rows by question; what both must have alike, the reference or opponent included, is `same`."""

    def keyed(rows: Sequence[dict]) -> dict[tuple, dict]:
        return {tuple(row[part].strip() for part in same): row for row in rows}

    ones, others = keyed(one), keyed(other)
    if ones.keys() != others.keys():
        apart = [*(ones.keys() - others.keys()), *(others.keys() - ones.keys())]
        raise ExpectedError(
            f"{names[0]} and {names[1]} do not hold the same {', '.join(same)}s: {len(apart)} rows are in one alone, "
            f'such as "{min(apart)[0][:60]}"; measure or judge both on one file',
            ExitCode.DATA,
        )
    return differences_of([ones[key] for key in ones], [others[key] for key in ones], figures)
