"""How good is a tuned model: judged pairwise against an opponent, or measured without a judge; with intervals.

python eval.py judge --answers answers.json --opponent others.json --model_name gpt-5.4-mini --output_dir judged
python eval.py report --output_dir judged                         # again from the paid verdicts, for free
python eval.py measure --model_name_or_path out --data_path eval_tasks.jsonl --output_dir measured     # no judge
python eval.py compare measured_a measured_b            # or two judged directories against the same opponent

Every verdict is kept in requests.jsonl before it is used, and the report is a function of that file alone. Run the same
command again after whatever happened: it goes on, and ends with the bytes of an uninterrupted run.
"""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterable
from typing import Any

from alpaca.common import (
    ROOT,
    ExitCode,
    ExpectedError,
    atomic_write,
    jdump,
    keep_inputs,
    notice,
    run_commands,
    run_main,
)
from alpaca.evaluation.judge import VERDICT_SCHEMA, Verdicts, canary_comparisons, prompt_text
from alpaca.evaluation.pairs import name_of, pair_up, read_answers
from alpaca.teacher.arguments import check_values, fields_of
from alpaca.teacher.client import DEFAULT_MODEL, OpenAIDecodingArguments, Teacher
from alpaca.teacher.directory import locked, open_log, say
from alpaca.teacher.loops import run_anywhere
from alpaca.teacher.request_log import Meter


def judge(
    answers: str,
    opponent: str,
    output_dir: str,
    model_name: str = DEFAULT_MODEL,
    data_path: str | None = None,
    canary: bool = False,
    human: str | None = None,
    api: str = "chat",
    base_url: str | None = None,
    concurrency: int = 8,
    schema: bool = True,
    temperature: float = 0.0,
    max_tokens: int = 2048,
    extra_body: str | None = None,
    max_attempts: int = 5,
    sleep_time: float = 2.0,
    timeout: float = 600.0,
    max_requests: int | None = None,
    max_tokens_total: int | None = None,
    price_in: float | None = None,
    price_out: float | None = None,
    max_cost: float | None = None,
    batch_api: bool = False,
    batch_requests: int = 1000,
    poll_seconds: float = 60.0,
) -> None:
    """Have a judge compare answers with an opponent's, each pair in both orders, and report how often they win.

    The key is read from the environment (OPENAI_API_KEY) and is written nowhere. Limits on requests, tokens and cost
    are for the whole output directory, earlier runs in it included. Writes report.json and index.html.

    Args:
        answers: a file of answers: inference.py's answers.json, AlpacaEval's output form, or Alpaca's format.
        opponent: the file of the opponent's answers to the same instructions, in any of these forms.
        output_dir: where requests.jsonl (every reply), report.json and index.html go; one process at a time.
        model_name: the judge's name at the server.
        data_path: a file with the instructions' categories, if the answers have none; by default eval_tasks.jsonl.
        canary: True to let a constant answer and a copy of the question compete too, on up to 50 instructions each.
        human: a file of {"instruction", "input", "winner"}, to see how far judge and person agree.
        api: "chat", or "completions" on servers that have the legacy endpoint alone.
        base_url: the server, such as http://127.0.0.1:8000/v1; by default OPENAI_BASE_URL, or else OpenAI.
        concurrency: requests in flight at the same time.
        schema: False to send no JSON schema of the verdict; left out by itself where the server says it takes none.
        temperature: the judge's sampling temperature.
        max_tokens: of a reply, reasoning included.
        extra_body: more fields of each request, as JSON, such as '{"reasoning_effort": "low"}'.
        max_attempts: at one request, before the run stops with exit code 5, and at a verdict that can be read.
        sleep_time: seconds before the first retry; doubles with each further one, up to 60.
        timeout: seconds for one attempt.
        max_requests: stop with exit code 5 before more requests than this, failed ones included.
        max_tokens_total: stop with exit code 5 before more tokens than this, of prompts and replies together.
        price_in: money for a million prompt tokens, for the cost shown and for --max_cost.
        price_out: money for a million reply tokens.
        max_cost: stop with exit code 5 before more money than this; needs the prices.
        batch_api: True to go through the Batch API: half the price, replies within 24 hours.
        batch_requests: requests in one batch at most.
        poll_seconds: seconds between two looks at a batch.
    """
    check(judge, locals())
    from alpaca.evaluation.report import compare_with_human, judged_rows
    from alpaca.evaluation.run import WRITTEN, Judging, begin_or_continue

    keep_from_written(output_dir, WRITTEN, answers=answers, opponent=opponent, data_path=data_path, human=human)
    ours, theirs = read_answers(answers, "--answers"), read_answers(opponent, "--opponent")
    suite = data_path or str(ROOT / "eval_tasks.jsonl")
    pairs = pair_up(ours, theirs, read_answers(suite, "--data_path"))
    names = [name_of(ours, os.path.basename(answers)), name_of(theirs, os.path.basename(opponent))]
    if human:  # its faults are to be known before anything is paid
        compare_with_human(judged_rows(pairs, Verdicts()), human, names)
    header = {"pairs": pairs, "names": names, "prompt": prompt_text(), "model_name": model_name}
    header |= {"temperature": temperature}
    fields = fields_of(extra_body) if extra_body else {}
    settings = {"canary": canary, "price_in": price_in, "price_out": price_out, "max_tokens": max_tokens}
    settings |= {"extra_body": fields}
    extra = ({"response_format": VERDICT_SCHEMA} if schema and api == "chat" else {}) | fields
    decoding = OpenAIDecodingArguments(max_tokens=max_tokens, temperature=temperature)
    teacher = Teacher(model_name, decoding, api, base_url, max_attempts, sleep_time, timeout, say, **extra)
    with locked(output_dir, WRITTEN), contextlib.closing(open_log(output_dir)) as log:
        begin_or_continue(log, output_dir, header, settings)
        meter = Meter(max_requests, max_tokens_total, price_in, price_out, max_cost)
        meter.count_logged(log.records)
        comparisons = pairs + (canary_comparisons(pairs) if canary else [])
        run = Judging(teacher, log, meter, header["prompt"], comparisons, max_tokens, max_attempts)
        run.say_what_to_expect()
        try:
            asking = run.collect(concurrency, batch_requests if batch_api else 0, poll_seconds)
            run_anywhere(asking, run.interrupt)
        except OSError:
            raise  # the disk is full: the report stays as it is
        except BaseException:
            write_report(log.records, header, settings, output_dir, human)
            raise
        problem = write_report(log.records, header, settings, output_dir, human)
    if problem:
        raise ExpectedError(problem, ExitCode.BUDGET)


def write_report(records: list[dict], header: dict, settings: dict, output_dir: str, human: str | None) -> str | None:
    """Write report.json and index.html, print the table; → why the judging has failed, or None."""
    from alpaca.evaluation import report

    figures, rows = report.build(header, settings, records, human)
    with atomic_write(os.path.join(output_dir, "index.html")) as file:
        file.write(report.page(figures, rows, header["prompt"]))
    jdump(figures, os.path.join(output_dir, "report.json"))
    print(report.table(figures))
    known, problem = report.failures(figures)
    for message in known:
        notice(message)
    return problem


def report(output_dir: str, human: str | None = None) -> None:
    """Make report.json, index.html and the table again from the log, without any request.

    Args:
        output_dir: the directory of eval.py judge.
        human: a file of {"instruction", "input", "winner"}, to see how far judge and person agree.
    """
    from alpaca.evaluation.run import WRITTEN, read_judging

    if not os.path.exists(os.path.join(output_dir, "requests.jsonl")):
        raise ExpectedError(
            f"{output_dir} has no requests.jsonl; give the --output_dir of eval.py judge", ExitCode.USAGE
        )
    keep_from_written(output_dir, WRITTEN, human=human)
    with locked(output_dir, WRITTEN), contextlib.closing(open_log(output_dir)) as log:
        header, settings = read_judging(log, output_dir)
        problem = write_report(log.records, header, settings, output_dir, human)
    if problem:
        raise ExpectedError(problem, ExitCode.BUDGET)


def measure(
    model_name_or_path: str,
    data_path: str,
    output_dir: str,
    ifeval: bool = False,
    ifeval_path: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 42,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str = "auto",
) -> None:
    """Measure a model on held-out examples without a judge: loss, and its own answers beside the references.

    Run it again after an interruption: it goes on. Writes report.json, and rows.json and answers.json to read.

    Args:
        model_name_or_path: model or LoRA adapter: a directory or a Hub id.
        data_path: .json or .jsonl file of examples that the model was not trained on, or a Hub data set.
        output_dir: where report.json and what it is made of go; one measurement each.
        ifeval: True to answer and verify the prompts of IFEval too; needs if-verifiable.
        ifeval_path: IFEval's own file (JSON lines); by default google/IFEval of the Hub.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 takes the likeliest token; 1 samples as the model says.
        top_p: sample of the likeliest tokens of this total probability.
        seed: of the sampling.
        batch_size: examples at once.
        dtype: auto (as saved), float32, bfloat16 or float16.
        device: auto (a GPU if there is one), cpu or cuda.
    """
    check(measure, arguments := locals())
    for name, choices in (("dtype", "auto float32 bfloat16 float16"), ("device", "auto cpu cuda")):
        if arguments[name] not in choices.split():
            raise ExpectedError(f"--{name} {arguments[name]}: choose one of {choices}", ExitCode.USAGE)
    if not 0 < top_p <= 1:
        raise ExpectedError(f"--top_p {top_p:g} is not above 0 and at most 1", ExitCode.USAGE)
    inputs = {"model_name_or_path": model_name_or_path, "data_path": data_path, "ifeval_path": ifeval_path}
    keep_inputs({"output_dir": output_dir}, inputs)
    import torch

    from alpaca.answering.model import Sampling
    from alpaca.evaluation.figures import measured_table
    from alpaca.evaluation.measure import WRITTEN, measure_model

    if device == "cuda" and not torch.cuda.is_available():
        raise ExpectedError("--device cuda: PyTorch sees no GPU here", ExitCode.USAGE)
    if device == "auto":
        arguments["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    args = argparse.Namespace(**arguments, merge_input=False)
    with locked(output_dir, WRITTEN):
        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        print(measured_table(measure_model(args, sampling, ifeval_path, ifeval)))


def compare(a: str, b: str) -> None:
    """Paired differences a − b of two measured directories, or of two judged ones against the same opponent.

    Args:
        a: an output directory of eval.py measure or judge.
        b: another one of the same kind, on the same questions.
    """
    from alpaca.evaluation.compare import compare_directories
    from alpaca.evaluation.figures import differences_table

    print(differences_table((a, b), compare_directories(a, b)))


def keep_from_written(output_dir: str, written: Iterable[str], **inputs: str | None) -> None:
    """Raises ExpectedError (USAGE) where something read would be replaced."""
    for name in (*written, "requests.jsonl"):
        keep_inputs({"output_dir": os.path.join(output_dir, name)}, inputs)


def check(function: Callable, arguments: dict[str, Any]) -> None:
    """Raises ExpectedError (USAGE) for an argument that cannot be meant."""
    check_values(function, arguments, {"seed": 0})
    for name, value in arguments.items():
        if value == "":
            raise ExpectedError(f"--{name} is empty; see --help", ExitCode.USAGE)


def main() -> None:
    run_commands({command.__name__: command for command in (judge, report, measure, compare)}, name="python eval.py")


if __name__ == "__main__":
    run_main(main)
