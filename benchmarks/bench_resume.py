"""What it takes to go on with a generation run: with decisions.jsonl, without it, and how that grows.

    python benchmarks/bench_resume.py [--kept 1000 10000 52000]

A run's log is written as a teacher would have it, twelve new tasks an answer, and resumed (replayed with the run's own
limits) in a process of its own, once without and once with what was decided: wall and CPU seconds of all threads, and
how far the memory peaks above that of a process that has only imported. The last line is JSON.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alpaca.data.words import TOKENIZATION
from alpaca.generation.parsing import DEFAULT_LIMITS, PARSER
from alpaca.generation.self_instruct import read_seed_tasks
from alpaca.teacher.request_log import Log
from generate_instruction import replay

TASKS = 12  # new ones in each answer


def write_log(directory: Path, kept: int) -> None:
    """Answers whose instructions are of random words, so that nearly all are kept."""
    rng = random.Random(0)
    words = sorted({word for line in (ROOT / "seed_tasks.jsonl").read_text().split() for word in [line.strip('",.:')]})
    seeds = [task["instruction"] for task in read_seed_tasks(str(ROOT / "seed_tasks.jsonl"), 3)]
    log = Log(str(directory / "requests.jsonl"))
    run = {"seed": 0, "num_prompt_instructions": 3, "prompts": "", "seed_instructions": seeds, "already_kept": []}
    log.append({"run": {**run, "tokenization": TOKENIZATION, "parser": PARSER}}, sync=False)
    log.append({"settings": {"num_instructions_to_generate": kept, **DEFAULT_LIMITS._asdict()}}, sync=False)
    for number in range(kept // TASKS + kept // 500 + 2):
        tasks = [
            f"{4 + index}. Instruction: Tell {' '.join(rng.choices(words, k=12))}\n{4 + index}. Input:\n<noinput>\n"
            f"{4 + index}. Output:\nThe {' '.join(rng.choices(words, k=50))}."
            for index in range(TASKS)
        ]
        usage = {"prompt_tokens": 1000, "completion_tokens": 1500}
        answer = {"request": number, "seeds": ["a", "b", "c"], "answer": "\n###\n".join(tasks), "finish_reason": "stop"}
        log.append({**answer, "usage": usage, "model": "m", "batch": False}, sync=False)
    log.close()


def resume(directory: Path) -> dict[str, float]:
    peak = peak_mib()
    before, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    sys.stdout = open(os.devnull, "w")
    replay(str(directory), num_cpus=1)
    wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, "mib": peak_mib() - peak}


def peak_mib() -> float:
    """Of this process; getrusage's figure would include its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def in_a_process(directory: Path) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(resume, (directory,))


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--kept", type=int, nargs="+", default=[1_000, 10_000, 52_000])
    args = parser.parse_args()
    results = {}
    print("| kept | without: wall s | CPU s | MiB | with: wall s | CPU s | MiB |\n|" + " ---: |" * 7)
    for kept in args.kept:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            write_log(directory, kept)
            without = in_a_process(directory)
            first = (directory / "regen.json").read_bytes()
            known = in_a_process(directory)
            assert (directory / "regen.json").read_bytes() == first
        results[kept] = {"without": without, "with": known}
        row = [f"{r['wall_s']:.1f} | {r['cpu_s']:.1f} | {r['mib']:.0f}" for r in (without, known)]
        print(f"| {kept:,} | {' | '.join(row)} |", flush=True)
    print(json.dumps({"results": results, "cores": os.cpu_count(), "python": platform.python_version()}))


if __name__ == "__main__":
    main()
