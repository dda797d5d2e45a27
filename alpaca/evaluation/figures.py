"""What is reported of a model: each figure as a statistic of the rows that have it, with its interval; and differences.

A figure is a function of columns, (B, N) each along the last axis, so that the bootstrap can draw the rows.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from alpaca.evaluation.statistics import bootstrap_interval, length_controlled_win_rates, ratio


def mean(values: np.ndarray) -> np.ndarray:
    return values.mean(axis=-1)


def percent(values: np.ndarray) -> np.ndarray:
    return 100 * values.mean(axis=-1)


def percent_of(counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    return 100 * ratio(counts, totals)


def perplexity(loss: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return np.exp(ratio(loss, tokens))


def bits_per_byte(loss: np.ndarray, size: np.ndarray) -> np.ndarray:
    return ratio(loss, size) / math.log(2)


Figures = dict[str, tuple[Callable[..., np.ndarray], tuple[str, ...]]]  # name → statistic, columns of the rows

MEASURED: Figures = {
    "loss": (ratio, ("loss", "tokens")),  # nats a response token, the end token included
    "perplexity": (perplexity, ("loss", "tokens")),
    "bits_per_byte": (bits_per_byte, ("loss", "bytes")),
    "rouge_l": (mean, ("rouge_l",)),  # F, from 0 to 1
    "exact_match": (percent, ("exact_match",)),
    "ends_by_itself": (percent, ("ended",)),
    "repeats_prompt": (percent, ("repeats_prompt",)),
    "empty": (percent, ("empty",)),
    "answer_characters": (mean, ("answer_characters",)),
    "reference_characters": (mean, ("reference_characters",)),
}
IFEVAL: Figures = {
    "ifeval_prompt_strict": (percent, ("all_strict",)),
    "ifeval_prompt_loose": (percent, ("all_loose",)),
    "ifeval_instruction_strict": (percent_of, ("strict", "instructions")),
    "ifeval_instruction_loose": (percent_of, ("loose", "instructions")),
}
JUDGED: Figures = {
    "win_rate": (percent, ("preference",)),
    "length_controlled_win_rate": (length_controlled_win_rates, ("preference", "length", "opponent_length")),
}


def figures_of(rows: Sequence[dict[str, Any]], figures: Figures) -> dict[str, dict[str, Any]]:
    """→ for each figure {"value", "interval", "rows"}, of the rows whose columns are not None."""
    found = {}
    for name, (statistic, columns) in figures.items():
        values = _columns([row for row in rows if None not in map(row.get, columns)], columns)
        count = len(values[0])
        value = float(statistic(*(column[None] for column in values))[0]) if count else None
        interval = bootstrap_interval(statistic, *values) if count else None
        found[name] = {"value": value, "interval": interval, "rows": count}
    return found


def differences_of(one: Sequence[dict], other: Sequence[dict], figures: Figures) -> dict[str, dict[str, Any]]:
    """Paired: row i of both is the same question. → for each figure both values, difference, interval and rows.

    Only rows count that both have; a figure that no such row has is left out.
    """
    found = {}
    for name, (statistic, columns) in figures.items():
        both = [
            (a, b)
            for a, b in zip(one, other, strict=True)
            if None not in [row.get(c) for row in (a, b) for c in columns]
        ]
        if not both:
            continue
        values = _columns([a for a, _ in both], columns) + _columns([b for _, b in both], columns)

        def difference(*drawn: np.ndarray, statistic: Callable = statistic) -> np.ndarray:
            half = len(drawn) // 2
            return statistic(*drawn[:half]) - statistic(*drawn[half:])

        whole = [column[None] for column in values]
        found[name] = {
            "values": [float(statistic(*half)[0]) for half in (whole[: len(columns)], whole[len(columns) :])],
            "difference": float(difference(*whole)[0]),
            "interval": bootstrap_interval(difference, *values),
            "rows": len(both),
        }
    return found


def _columns(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[np.ndarray]:
    return [np.array([row[name] for row in rows], dtype=np.float64) for name in names]


def measured_table(figures: dict[str, dict[str, Any]]) -> str:
    """The figures as lines for the terminal."""
    lines = [f"{'':<28}{'value':>10}   {'95 % interval':<22}{'rows':>8}"]
    for name, figure in figures.items():
        if figure["value"] is not None:
            interval = "{:.4g} to {:.4g}".format(*figure["interval"])
            lines.append(f"{name:<28}{figure['value']:>10.4g}   {interval:<22}{figure['rows']:>8}")
    return "\n".join(lines)


def differences_table(names: Sequence[str], found: dict[str, dict[str, Any]]) -> str:
    """The differences as lines for the terminal, and whether each is one."""
    lines = [
        f"a: {names[0]}\nb: {names[1]}",
        f"{'':<28}{'a':>10}{'b':>10}{'a − b':>10}   {'95 % interval':<22}{'rows':>8}",
    ]
    for name, figure in found.items():
        low, high = figure["interval"]
        said = "no difference shown" if low <= 0 <= high else ("a is higher" if low > 0 else "b is higher")
        values = "".join(f"{value:>10.4g}" for value in (*figure["values"], figure["difference"]))
        lines.append(f"{name:<28}{values}   {f'{low:.4g} to {high:.4g}':<22}{figure['rows']:>8}   {said}")
    return "\n".join(lines)
