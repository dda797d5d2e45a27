"""Raw, unpenalised and our length-controlled win rates against AlpacaEval's published ones. The last line is JSON.

python benchmarks/bench_length_control.py alpaca_eval_preferences.csv alpaca_eval_published.csv

The first file has the columns model, instruction, preference (0 to 1), length_baseline and length_model (characters),
the second model, win_rate and length_controlled_win_rate (percent). docs/evaluation.md says where to get such figures.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from alpaca.evaluation import statistics


def read(path: str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main(preferences: str, published: str) -> None:
    expected = {row["model"]: row for row in read(published)}
    models: dict[str, list[tuple[float, float, float]]] = {}
    for row in read(preferences):
        judged = float(row["preference"]), float(row["length_model"]), float(row["length_baseline"])
        models.setdefault(row["model"], []).append(judged)
    ways = {"raw": [], "unpenalised": [], "ours": []}
    for judged in models.values():
        columns = np.array(judged).T
        ways["raw"].append(statistics.win_rate(columns[0]))
        ways["ours"].append(statistics.length_controlled_win_rate(*columns))
        ways["unpenalised"].append(statistics.length_controlled_win_rate(*columns, ridge=0.0))
    controlled = np.array([float(expected[model]["length_controlled_win_rate"]) for model in models])
    raw = np.array([float(expected[model]["win_rate"]) for model in models])

    print(f"{'model':<40}{'published':>10}" + "".join(f"{way:>13}" for way in ways))
    for number, model in enumerate(models):
        print(f"{model:<40}{controlled[number]:>10.2f}" + "".join(f"{rates[number]:>13.2f}" for rates in ways.values()))
    result: dict = {"models": len(models), "raw_largest_error": float(np.abs(np.array(ways["raw"]) - raw).max())}
    for way, rates in ways.items():
        errors = np.abs(np.array(rates) - controlled)
        order = float(spearmanr(rates, controlled).statistic)
        result[way] = {"mean_error": float(errors.mean()), "largest_error": float(errors.max()), "spearman": order}
        print(f"{way}: mean error {errors.mean():.2f} points, largest {errors.max():.2f}, Spearman {order:.3f}")
    print(f"raw win rates differ from the published ones by at most {result['raw_largest_error']:.5f} points")
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preferences", help="CSV of judged pairs")
    parser.add_argument("published", help="CSV of published win rates")
    arguments = parser.parse_args()
    main(arguments.preferences, arguments.published)
