"""What a server that grants so many requests a second gets asked by --concurrency 64, against what it grants.

    python benchmarks/bench_rate_gate.py [--rate 4] [--requests 200] [--concurrency 64] [--seconds 0.5] [--says exactly]

The server is real and on loopback; it counts in different ways, and says in different ways how long to wait. Requests a
second are from the first request's arrival to the last answer. The last line is JSON.
"""

import argparse
import collections
import contextlib
import io
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alpaca.common import ExpectedError
from generate_instruction import generate_instruction_following_data
from tests.teacher.teacher_server import TeacherServer, answer_text, error, tasks_for


def bucket(rate: float, burst: float) -> Callable[[float], float]:
    """Tokens that refill steadily: now → 0 where granted, else the seconds until it would be."""
    state = {"tokens": burst, "at": 0.0}

    def ask(now: float) -> float:
        state["tokens"] = min(burst, state["tokens"] + (now - state["at"]) * rate)
        state["at"] = now
        if state["tokens"] >= 1:
            state["tokens"] -= 1
            return 0.0
        return (1 - state["tokens"]) / rate

    return ask


def window(rate: float, seconds: float) -> Callable[[float], float]:
    """So many in each stretch of time, as a limit for a minute is."""
    granted: collections.Counter[int] = collections.Counter()

    def ask(now: float) -> float:
        number = int(now // seconds)
        granted[number] += 1
        return 0.0 if granted[number] <= rate * seconds else (number + 1) * seconds - now

    return ask


SERVERS = {
    "one at a time": lambda rate: bucket(rate, 1),
    "up to a second's worth at once": lambda rate: bucket(rate, rate),
    "per second": lambda rate: window(rate, 1),
    "per ten seconds": lambda rate: window(rate, 10),
}
HEADERS = {
    "whole seconds": lambda wait: {"Retry_After": str(max(1, math.ceil(wait)))},
    "exactly": lambda wait: {"Retry_After_Ms": f"{1000 * wait:.0f}"},
    "not": lambda wait: {},
}


def measure(ask: Callable[[float], float], header: Callable[[float], dict], args: argparse.Namespace) -> dict:
    limited = 0
    begun = time.monotonic()

    def fault(server: TeacherServer, body: dict, attempt: int):
        nonlocal limited
        if not (wait := ask(time.monotonic() - begun)):
            server.granted.append(time.monotonic())
            return None
        limited += 1
        return error(429, "Rate limit reached", "rate_limit_exceeded", **header(wait))

    with TeacherServer(fault=fault, answer=lambda prompt: answer_text(tasks_for(prompt, 1))) as server:
        server.granted = []
        server.answer_after = args.seconds
        with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
            with contextlib.redirect_stderr(io.StringIO()):
                try:
                    generate_instruction_following_data(
                        directory,
                        str(ROOT / "seed_tasks.jsonl"),
                        num_instructions_to_generate=10**6,
                        concurrency=args.concurrency,
                        max_requests=args.requests,
                        base_url=server.url,
                    )
                except ExpectedError as end:
                    if "max_requests" not in str(end):
                        raise
        rate = (len(server.granted) - 1) / (server.granted[-1] - server.times[0])
        return {"granted": len(server.granted), "limited": limited, "per_s": rate, "share": rate / args.rate}


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--rate", type=float, default=4.0)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.5, help="that an answer takes")
    parser.add_argument("--says", nargs="+", choices=list(HEADERS), default=list(HEADERS), help="how long to wait")
    args = parser.parse_args()
    os.environ["OPENAI_API_KEY"] = "none"
    results = {}
    print(f"| the server counts | says how long | requests/s of {args.rate:g} | answers 429 |")
    print("| --- | --- | ---: | ---: |")
    for counts, make in SERVERS.items():
        for says in args.says:
            result = results[f"{counts}, {says}"] = measure(make(args.rate), HEADERS[says], args)
            print(f"| {counts} | {says} | {result['per_s']:.2f} | {result['limited']} |", flush=True)
    print(json.dumps({**vars(args), "results": results, "cores": os.cpu_count(), "python": platform.python_version()}))


if __name__ == "__main__":
    main()
