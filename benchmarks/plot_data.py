"""How the shipped instructions begin and how long the texts are, beside other sets: the figure of docs/data.md.

    python benchmarks/plot_data.py                             # assets/shipped_data.png, and the table of docs/data.md
    python benchmarks/plot_data.py --measure FILE [FILE ...]   # the numbers of other sets, as in MEASURED below

The other sets are not part of this repository; MEASURED holds what `--measure` prints of them. Ends in a line of JSON.
"""

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alpaca.data.files import read_records

RANKS = (1, 2, 3, 5, 10, 15, 20, 30, 40)
QUANTILES = (10, 25, 50, 75, 90)
PARTS = ("instruction", "input", "output")
MEASURED = {
    "alpaca_en_demo of LLaMA-Factory": {
        "rows": 999,
        "with_input": 41.2,
        "begun_by_most_frequent": [9.0, 16.6, 23.8, 34.6, 51.3, 61.1, 67.7, 76.7, 82.5],
        "first_words": ["generate", "describe", "create", "write", "what", "given", "explain", "identify"],
        "instruction": [6.0, 8.0, 9.0, 12.0, 14.0],
        "input": [2.0, 4.0, 7.0, 11.0, 21.0],
        "output": [8.0, 19.0, 81.0, 199.0, 279.0],
    },
    "Self-Instruct's evaluation suite": {
        "rows": 252,
        "with_input": 82.5,
        "begun_by_most_frequent": [10.3, 17.1, 21.8, 30.2, 45.2, 54.0, 61.5, 73.4, 79.8],
        "first_words": ["you", "write", "give", "make", "provide", "create", "the", "design"],
        "instruction": [8.0, 10.0, 14.0, 21.0, 31.9],
        "input": [2.0, 4.0, 9.0, 28.0, 81.7],
        "output": [2.0, 8.0, 26.0, 60.5, 133.4],
    },
    "Self-Instruct's seeds": {
        "rows": 175,
        "with_input": 71.4,
        "begun_by_most_frequent": [10.9, 18.9, 24.0, 32.6, 46.9, 56.0, 63.4, 74.9, 84.0],
        "first_words": ["write", "given", "give", "generate", "tell", "explain", "make", "create"],
        "instruction": [7.0, 8.0, 11.0, 15.0, 21.6],
        "input": [2.0, 6.0, 13.0, 35.0, 74.0],
        "output": [1.0, 5.5, 20.0, 55.0, 92.6],
    },
}


def measure(path: str) -> dict:
    """A file in Alpaca's format or that of seed tasks → how its instructions begin, in percent; lengths in words."""
    rows = [{**record, **record.get("instances", [{}])[0]} for record in read_records(path, "--measure")]
    first = Counter(re.findall(r"[\w']+", row["instruction"])[0].lower() for row in rows)
    begun = [number for _, number in first.most_common()]
    lengths = {part: [len(row[part].split()) for row in rows if row[part]] for part in PARTS}
    return {
        "rows": len(rows),
        "with_input": round(100 * len(lengths["input"]) / len(rows), 1),
        "begun_by_most_frequent": [round(100 * sum(begun[:rank]) / len(rows), 1) for rank in RANKS],
        "first_words": [word for word, _ in first.most_common(8)],
        **{part: [round(float(q), 1) for q in np.percentile(values, QUANTILES)] for part, values in lengths.items()},
    }


def plot(sets: dict[str, dict], path: Path) -> None:
    """Left how much of each set the most frequent first words begin, right the lengths of inputs and outputs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, *right) = pyplot.subplots(1, 3, figsize=(12, 3.6), width_ratios=[1.25, 1, 1], layout="constrained")
    colours = ["#1f6f8b", "#c96f32", "#7a8f3c", "#8d6cab"]
    for colour, (name, figures) in zip(colours, sets.items(), strict=True):
        left.plot(
            RANKS, figures["begun_by_most_frequent"], color=colour, marker=".", label=f"{name} ({figures['rows']:,})"
        )
    left.axvline(20, color="0.8", linewidth=1, zorder=0)
    left.set(xlabel="most frequent first words", ylabel="instructions begun, %", ylim=(0, 100), xlim=(0, 41))
    left.legend(frameon=False, fontsize=8, loc="upper left")
    for axes, part in zip(right, ("input", "output"), strict=True):
        for place, (colour, figures) in enumerate(zip(colours, sets.values(), strict=True)):
            low, lower, middle, upper, high = figures[part]
            axes.plot([low, high], [place, place], color=colour, linewidth=1)
            axes.plot([lower, upper], [place, place], color=colour, linewidth=7, solid_capstyle="butt")
            axes.plot([middle], [place], color="white", marker="|", markersize=8)
        axes.set(
            xscale="log", xlabel=f"words of an {part}: 10, 25, 50, 75, 90 %", yticks=[], ylim=(len(sets) - 0.5, -0.5)
        )
        axes.set_xticks([1, 3, 10, 30, 100, 300], ["1", "3", "10", "30", "100", "300"])
        axes.minorticks_off()
    for axes in (left, *right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def table(sets: dict[str, dict]) -> list[str]:
    lines = ["| | rows | with input | begun by the 20 most frequent | the most frequent first words | median words* |"]
    lines += ["| --- | ---: | ---: | ---: | --- | ---: |"]
    for name, figures in sets.items():
        medians = ", ".join(f"{figures[part][2]:.0f}" for part in PARTS)
        begun = figures["begun_by_most_frequent"][RANKS.index(20)]
        words = ", ".join(figures["first_words"][:6])
        lines.append(f"| {name} | {figures['rows']:,} | {figures['with_input']}% | {begun}% | {words} | {medians} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--measure", nargs="+", metavar="FILE", help="files of other sets, of which the numbers are printed"
    )
    parser.add_argument("--png", default=str(ROOT / "assets" / "shipped_data.png"), help="where the figure goes")
    args = parser.parse_args()
    if args.measure:
        found = {Path(path).name: measure(path) for path in args.measure}
    else:
        found = {"shipped": measure(str(ROOT / "alpaca_data.json")), **MEASURED}
        plot(found, Path(args.png))
        print("\n".join(table(found)))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
