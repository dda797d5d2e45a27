"""What a judged directory says: its figures, as report.json and on the terminal, and one page to read the verdicts on.

All of it is a function of the log, so that it comes out the same however often the judging was interrupted.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from alpaca.common import ExitCode, ExpectedError
from alpaca.data.files import read_records
from alpaca.evaluation.judge import Verdicts, canary_comparisons, verdict_without_judge
from alpaca.evaluation.pairs import key_of
from alpaca.evaluation.statistics import (
    agreement,
    half_width,
    length_controlled_interval,
    length_controlled_win_rate,
    win_rate,
    win_rate_interval,
)
from alpaca.teacher.request_log import Meter

MOST_MISSING = 2.0  # percent of the instructions; above it the judging has failed
CANARY_LIMIT = 10.0  # percent; a judge with whom a canary wins more is named


def judged_rows(comparisons: Sequence[dict[str, str]], verdicts: Verdicts, first: int = 0) -> list[dict[str, Any]]:
    """Each comparison with its scores in both orders, its preference (None: missing) and the judge's last words.

    `first` is the number of the first of them among all that the run asks about.
    """
    rows = []
    for index, comparison in enumerate(comparisons, first):
        scores = verdicts.scores(index, comparison)
        preference = None if None in scores else sum(scores) / 2
        outcome = "missing"
        if preference is not None:
            outcome = "win" if preference > 0.5 else "loss" if preference < 0.5 else "tie"
        replies = [verdicts.replies.get(2 * index + order) for order in (0, 1)]
        rows.append(
            comparison
            | {
                "scores": scores,
                "preference": preference,
                "outcome": outcome,
                "flip": sorted(scores, key=str) == [0.0, 1.0],  # each order another winner
                "asked": verdict_without_judge(comparison["answer"], comparison["opponent"]) is None,
                "words": [found[-1]["answer"] if found else "" for found in replies],
                "given": [verdicts.given.get(2 * index + order) for order in (0, 1)],
            }
        )
    return rows


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of some comparisons: rates and shares in percent (None where nothing counts), lengths in characters.

    An instruction counts where both orders have a verdict. The bounds take every missing one for lost, and for won.
    """
    complete = [row for row in rows if row["preference"] is not None]
    preferences = [row["preference"] for row in complete]
    lengths = [(len(row["answer"]), len(row["opponent"])) for row in complete]
    given = [verdict for row in rows if row["asked"] for verdict in row["given"] if verdict in ("A", "B")]
    decided = [
        (row["preference"] > 0.5) == (own > other)
        for row, (own, other) in zip(complete, lengths, strict=True)
        if row["asked"] and row["preference"] != 0.5 and own != other
    ]
    outcomes = [row["outcome"] for row in rows]
    flips = sum(row["flip"] for row in rows)
    columns = (preferences, [own for own, _ in lengths], [other for _, other in lengths])
    filled = [[missing if s is None else s for row in rows for s in row["scores"]] for missing in (0.0, 1.0)]
    return {
        "instructions": len(rows),
        "win_rate": win_rate(preferences) if complete else None,
        "win_rate_interval": win_rate_interval(preferences) if complete else None,
        "length_controlled_win_rate": length_controlled_win_rate(*columns) if complete else None,
        "length_controlled_interval": length_controlled_interval(*columns) if complete else None,
        "wins": outcomes.count("win"),
        "ties": outcomes.count("tie"),
        "losses": outcomes.count("loss"),
        "flips": flips,
        "flips_share": _share(flips, len(complete)),
        "first_position_wins": _share(given.count("A"), len(given)),
        "longer_wins": _share(sum(decided), len(decided)),
        "missing": outcomes.count("missing"),
        "win_rate_bounds": [win_rate(scores) for scores in filled],
        "mean_length": sum(columns[1]) / len(complete) if complete else None,
        "mean_opponent_length": sum(columns[2]) / len(complete) if complete else None,
        "half_width": half_width(len(rows)),
    }


def _share(count: int, of: int) -> float | None:
    return 100 * count / of if of else None


def build(header: dict, settings: dict, records: Sequence[dict], human: str | None) -> tuple[dict, list[dict]]:
    """A log → the figures of report.json, and the rows of the page."""
    pairs, verdicts = header["pairs"], Verdicts.of(records)
    rows = judged_rows(pairs, verdicts)
    report = summarize(rows)
    categories = sorted({row["category"] for row in rows} - {""})
    if 0 < len(categories) <= len(rows) / 2:  # names of single tasks are none
        of_category = {name: [row for row in rows if row["category"] == name] for name in categories}
        report["categories"] = {name: summarize(chosen) for name, chosen in of_category.items()}
    if settings["canary"]:
        report["canary"] = {}
        canaries = judged_rows(canary_comparisons(pairs), verdicts, first=len(pairs))
        for name in dict.fromkeys(row["canary"] for row in canaries):
            judged = [row["preference"] for row in canaries if row["canary"] == name and row["preference"] is not None]
            won = 100 - win_rate(judged) if judged else None
            report["canary"][name] = {"win_rate": won, "instructions": len(judged)}
    if human:
        report["human"] = compare_with_human(rows, human, header["names"])
    meter = Meter(price_in=settings["price_in"], price_out=settings["price_out"])
    names = ("prompt_tokens", "completion_tokens")
    # Whole numbers, so that the sum does not depend on the order in which the replies came; None: nobody knows.
    live, batch = (
        {name: sum(r["usage"][name] for r in records if r.get("usage") and r["batch"] == by_batch) for name in names}
        for by_batch in (False, True)
    )
    tokens = {name: live[name] + batch[name] for name in names}
    unpriced = None in (settings["price_in"], settings["price_out"])
    money = None if unpriced else meter.price(live) + meter.price(batch, batch=True)
    answered = sorted({record["model"] for record in records if "answer" in record})
    provenance = {
        "answers": header["names"][0],
        "opponent": header["names"][1],
        "judge": header["model_name"],
        "judge_answered_as": answered,
        "prompt_sha256": hashlib.sha256(header["prompt"].encode()).hexdigest(),
        "cost": {**tokens, "money": money},
    }
    return report | provenance, rows


def compare_with_human(rows: Sequence[dict], path: str, names: Sequence[str]) -> dict[str, Any]:
    """Judge and person on the instructions that the person judged. Raises ExpectedError (DATA).

    The file is a list of {"instruction", "input" (if it has one), "winner"}: the winner is "answers", "opponent" or
    "tie", or the name of either side.
    """
    outcomes = {"answers": "win", "opponent": "loss", "tie": "tie"}
    outcomes |= {names[0]: "win", names[1]: "loss"} if names[0] != names[1] else {}
    of_judge = {key_of(row): row["outcome"] for row in rows}
    pairs, faults = [], []
    for number, record in enumerate(read_records(path, "--human")):
        try:
            key = key_of({"instruction": record["instruction"], "input": record.get("input") or ""})
            pairs.append((of_judge[key], outcomes[record["winner"]]))
        except (KeyError, TypeError, AttributeError) as error:
            faults.append(f"record {number} ({error!r})")
    if faults or not pairs:
        raise ExpectedError(
            f"--human {path}: {', '.join(faults[:5]) or 'no records'}: each needs an instruction (and input) that was "
            f"judged, and as winner one of {', '.join(outcomes)}",
            ExitCode.DATA,
        )
    judged = [(judge, person) for judge, person in pairs if judge != "missing"]
    share, kappa = agreement(*zip(*judged, strict=True)) if judged else (None, None)
    return {"instructions": len(judged), "agreement": share, "kappa": None if kappa != kappa else kappa}


# -------------------------------------------------------------------------------------------------- terminal and page


def table(report: dict[str, Any]) -> str:
    """The figures as lines for the terminal."""

    def rate(value: float | None, interval: Sequence[float] | None = None) -> str:
        if value is None:
            return "–"
        return f"{value:.1f} %" + (f"  [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")

    count, cost = report["instructions"], report["cost"]
    lines = [
        ("instructions", f"{count}; so many allow ±{report['half_width']:.1f} points at a win rate of 50 %"),
        ("win rate", rate(report["win_rate"], report["win_rate_interval"])),
        (
            "length-controlled win rate",
            rate(report["length_controlled_win_rate"], report["length_controlled_interval"]),
        ),
        ("wins, ties, losses", f"{report['wins']}, {report['ties']}, {report['losses']}"),
        ("flips with the order", f"{report['flips']} ({rate(report['flips_share'])})"),
        ("the first answer wins", rate(report["first_position_wins"])),
        ("the longer answer wins", rate(report["longer_wins"])),
    ]
    if report["missing"]:
        bounds = f"the win rate is between {report['win_rate_bounds'][0]:.1f} and {report['win_rate_bounds'][1]:.1f} %"
        lines.append(("missing", f"{report['missing']}; {bounds}"))
    if report["mean_length"] is not None:
        lines.append(
            ("mean characters", f"{report['mean_length']:.0f}, of the opponent {report['mean_opponent_length']:.0f}")
        )
    if found := report.get("human"):
        kappa = "–" if found["kappa"] is None else f"{found['kappa']:.2f}"
        agreed = f"{rate(found['agreement'])} of {found['instructions']}, κ {kappa}"
        lines.append(("agreement with a person", agreed))
    for name, canary in report.get("canary", {}).items():
        lines.append((f"canary: {name}", f"wins {rate(canary['win_rate'])} of {canary['instructions']}"))
    money = "" if cost["money"] is None else f", {cost['money']:.4f}"
    lines.append(("cost", f"{cost['prompt_tokens']:,} prompt and {cost['completion_tokens']:,} reply tokens{money}"))
    lines.append(("judge", f"{report['judge']}, prompt {report['prompt_sha256'][:12]}"))
    for name, found in report.get("categories", {}).items():
        lines.append((f"  {name}", f"{found['instructions']}: {rate(found['win_rate'], found['win_rate_interval'])}"))
    title = f"{report['answers']} against {report['opponent']}"
    return "\n".join([title, *(f"  {label:<30}{text}" for label, text in lines)])


def page(report: dict[str, Any], rows: Sequence[dict[str, Any]], prompt: str) -> str:
    """The page: one file that loads nothing and runs nothing."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.render(report=report, rows=rows, prompt=prompt)


def failures(report: dict[str, Any]) -> tuple[list[str], str | None]:
    """→ what should be known about the judge, and in a sentence why the judging has failed, or None."""
    known = [
        f"the judge {report['judge']} lets a {name} win {canary['win_rate']:.0f} % against {report['answers']}: "
        "its verdicts on these answers say little"
        for name, canary in report.get("canary", {}).items()
        if canary["win_rate"] is not None and canary["win_rate"] > CANARY_LIMIT
    ]
    share = 100 * report["missing"] / report["instructions"]
    if share <= MOST_MISSING:
        return known, None
    low, high = report["win_rate_bounds"]
    return known, (
        f"{report['missing']} of {report['instructions']} instructions ({share:.1f} %) lack a verdict that can be read "
        f"in both orders, so the win rate is only known to be between {low:.1f} and {high:.1f} %; read the judge's "
        "words on the page, then raise --max_attempts or --max_tokens and go on, or choose another judge"
    )
