"""Similarity of new instructions with a pool: 2023's method and ours, in one run. The last line is JSON.

python benchmarks/bench_dedup.py                    # pools of 1K, 10K and 52K: about a minute
python benchmarks/bench_dedup.py --whole_run True   # and all the similarity work of a run that keeps 52,000
"""

import argparse
import functools
import json
import multiprocessing
import os
import random
import resource
import sys
import time
from pathlib import Path

import numpy as np
from rouge_score import rouge_scorer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from alpaca.data.words import TOKENIZATION
from alpaca.generation.parsing import BLACKLIST, PARSER
from alpaca.generation.self_instruct import Collection

TASKS_PER_ANSWER = 16  # numbers 4 to 19 of a prompt with three seed tasks


def instructions(count: int) -> list[str]:
    """Made of the shipped data's words, each as frequent as there, in sentences as long as there."""
    rng = random.Random(0)
    real = [example["instruction"].split() for example in json.loads((ROOT / "alpaca_data.json").read_text())]
    words = [word for sentence in real for word in sentence if word.isalpha() and word not in BLACKLIST]
    lengths = [len(sentence) for sentence in real]
    return [" ".join(["Write", *rng.choices(words, k=max(3, rng.choice(lengths) - 1))]) for _ in range(count)]


def answer(sentences: list[str]) -> dict[str, str]:
    """A log record with these instructions."""
    parts = (f"{n}. Instruction: {s}\n{n}. Input:\n<noinput>\n{n}. Output:\nx" for n, s in enumerate(sentences, 4))
    return {"answer": "\n###\n".join(parts), "finish_reason": "stop"}


def collection(pool: list[str]) -> Collection:
    settings = {"num_instructions_to_generate": 10**9, "max_similarity": 0.7, "min_words": 4, "max_words": 150}
    header = {"num_prompt_instructions": 3, "seed_instructions": pool, "already_kept": []}
    header |= {"tokenization": TOKENIZATION, "parser": PARSER}
    return Collection(header, settings | {"blacklist": []}, num_cpus=os.cpu_count() or 1)


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def method_of_2023(candidate: str, pool_tokens: list[list[str]], scorer: rouge_scorer.RougeScorer) -> None:
    """A pool of processes made anew for each candidate, Python LCS in each, a full sort."""
    with multiprocessing.Pool(os.cpu_count()) as processes:
        tokens = scorer._tokenizer.tokenize(candidate)
        scores = processes.map(functools.partial(rouge_scorer._score_lcs, tokens), pool_tokens)
    scores = [score.fmeasure for score in scores]
    np.argsort(scores)[-10:][::-1]
    np.mean(scores)


def timed(function) -> tuple[float, float]:
    """→ wall and CPU seconds."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    function()
    return time.perf_counter() - wall, cpu_seconds() - cpu


def main(pools: list[int], whole_run: bool) -> None:
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    results: dict = {"cores": os.cpu_count(), "pools": {}}
    print(f"a candidate, {os.cpu_count()} cores; wall and CPU milliseconds (the CPU's of all processes and threads)")
    print(f"{'pool':>8}{'2023 wall':>12}{'CPU':>10}{'ours wall':>12}{'CPU':>10}{'ratio wall':>12}{'CPU':>8}")
    for size in pools:
        texts = instructions(size + 10 * TASKS_PER_ANSWER)
        pool, candidates = texts[:size], texts[size:]
        tokens = [scorer._tokenizer.tokenize(text) for text in pool]
        old = np.min([timed(lambda c=c, t=tokens: method_of_2023(c, t, scorer)) for c in candidates[:3]], axis=0) * 1e3
        kept = collection(pool)
        answers = [answer(candidates[i : i + TASKS_PER_ANSWER]) for i in range(0, len(candidates), TASKS_PER_ANSWER)]
        new = np.min([timed(lambda a=a, k=kept: k.add(a)) for a in answers], axis=0) * 1e3 / TASKS_PER_ANSWER
        row = {"wall_ms_2023": old[0], "cpu_ms_2023": old[1], "wall_ms": new[0], "cpu_ms": new[1]}
        results["pools"][size] = row | {"ratio_wall": old[0] / new[0], "ratio_cpu": old[1] / new[1]}
        print(f"{size:>8}{old[0]:>12.1f}{old[1]:>10.1f}{new[0]:>12.3f}{new[1]:>10.3f}{old[0] / new[0]:>12.0f}", end="")
        print(f"{old[1] / new[1]:>8.0f}")
    first, last = results["pools"][pools[0]], results["pools"][pools[-1]]
    results["growth_cpu_2023"], results["growth_cpu"] = (last[name] / first[name] for name in ("cpu_ms_2023", "cpu_ms"))
    print(f"growth of the CPU time from {pools[0]:,} to {pools[-1]:,}: ", end="")
    print(f"2023 {results['growth_cpu_2023']:.1f} times, ours {results['growth_cpu']:.1f} times")
    if whole_run:
        kept = collection(instructions(175))
        texts = instructions(60_000)[175:]

        def run() -> None:
            for begin in range(0, len(texts), TASKS_PER_ANSWER):
                kept.add(answer(texts[begin : begin + TASKS_PER_ANSWER]))
                if len(kept.entries) >= 52_000:
                    return

        wall, cpu = timed(run)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        results["whole_run"] = {"kept": len(kept.entries), "cpu_s": cpu, "wall_s": wall, "peak_mib": peak}
        print(f"whole run: {len(kept.entries)} kept, {cpu:.0f} CPU-seconds, {wall:.0f} s, peak {peak:.0f} MiB")
    print(json.dumps(results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pools", default="1000,10000,52000", help="sizes, comma-separated")
    parser.add_argument("--whole_run", choices=["True", "False"], default="False", help="also a run that keeps 52,000")
    arguments = parser.parse_args()
    main([int(size) for size in arguments.pools.split(",")], arguments.whole_run == "True")
