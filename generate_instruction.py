"""Self-instruct data generation (Wang et al. 2022, with Alpaca's changes): a teacher writes tasks after seed tasks.

python -m generate_instruction generate_instruction_following_data --output_dir ./ --num_instructions_to_generate 52000
python -m generate_instruction replay --output_dir ./            # regen.json again from the paid answers, for free
python -m generate_instruction export --output_dir ./ --path alpaca_data.json        # the file to train on

Every answer is kept in requests.jsonl before it is used, and regen.json is a function of that file alone. Run the same
command again after whatever happened: it goes on, and ends with the bytes of an uninterrupted run.
"""

import asyncio
import contextlib
import difflib
import hashlib
import inspect
import json
import os
import sys
from typing import Any

from alpaca.common import ExitCode, ExpectedError, jdump, jload, run_main
from alpaca.generation.run import (
    TASKS_PER_PROMPT,
    Run,
    last_settings,
    locked,
    open_log,
    project,
    remember_run,
    say,
    summary,
    take_in,
)
from alpaca.generation.self_instruct import (
    BLACKLIST,
    DEFAULT_LIMITS,
    Collection,
    Limits,
    encode_prompt,
    find_word_in_string,
    post_process_gpt3_response,
    prompt_text,
    read_seed_tasks,
    sample_seed_tasks,
    write_regen,
)
from alpaca.teacher.client import DEFAULT_MODEL, OpenAIDecodingArguments, Teacher
from alpaca.teacher.request_log import Meter

# What people import from here; it lives in self_instruct.
__all__ = ["encode_prompt", "find_word_in_string", "generate_instruction_following_data", "post_process_gpt3_response"]


# ------------------------------------------------------------------------------------------------------------ commands


def generate_instruction_following_data(
    output_dir: str = "./",
    seed_tasks_path: str = "./seed_tasks.jsonl",
    num_instructions_to_generate: int = 100,
    model_name: str = DEFAULT_MODEL,
    num_prompt_instructions: int = 3,
    request_batch_size: int = 5,
    temperature: float = 1.0,
    top_p: float = 1.0,
    num_cpus: int = 16,
    seed: int = 0,
    api: str = "chat",
    base_url: str | None = None,
    concurrency: int | None = None,
    max_tokens: int = 3072,
    max_attempts: int = 10,
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
    max_similarity: float = DEFAULT_LIMITS.max_similarity,
    min_words: int = DEFAULT_LIMITS.min_words,
    max_words: int = DEFAULT_LIMITS.max_words,
    blacklist: tuple[str, ...] = BLACKLIST,
) -> None:
    """Have a teacher write instructions after the seed tasks, until enough are kept in output_dir/regen.json.

    The key is read from the environment (OPENAI_API_KEY) and is written nowhere. Limits on requests, tokens and cost
    are for the whole output directory, earlier runs in it included.

    Args:
        output_dir: where requests.jsonl (every answer) and regen.json (what is kept) are; one process at a time.
        seed_tasks_path: the seed tasks, one JSON object a line.
        num_instructions_to_generate: how many to keep, seed tasks not counted; the last answer is taken whole.
        model_name: the teacher's name at the server.
        num_prompt_instructions: seed tasks in each prompt.
        request_batch_size: requests in flight at the same time, unless --concurrency is given.
        temperature: of the teacher's sampling.
        top_p: of the teacher's sampling.
        num_cpus: threads that compare instructions, at most as many as there are cores.
        seed: which seed tasks request i shows depends on this and on i only.
        api: "chat", or "completions" for base models on servers that have the legacy endpoint.
        base_url: the server, such as http://127.0.0.1:8000/v1; by default OPENAI_BASE_URL, or else OpenAI.
        concurrency: requests in flight at the same time; by default --request_batch_size.
        max_tokens: of an answer; less where the server says that the context is too small.
        max_attempts: at one request, before the run stops with exit code 5.
        sleep_time: seconds before the first retry; doubles with each further one, up to 60.
        timeout: seconds for one attempt.
        max_requests: stop with exit code 5 before more requests than this, failed ones included.
        max_tokens_total: stop with exit code 5 before more tokens than this, of prompts and answers together.
        price_in: money for a million prompt tokens, for the cost shown and for --max_cost.
        price_out: money for a million answer tokens.
        max_cost: stop with exit code 5 before more money than this; needs the prices.
        batch_api: True to go through the Batch API: half the price, answers within 24 hours.
        batch_requests: requests in one batch at most.
        poll_seconds: between two looks at a batch.
        max_similarity: drop an instruction whose ROUGE-L with a seed or a kept one is above this.
        min_words: drop shorter instructions.
        max_words: drop longer instructions.
        blacklist: drop instructions with any of these words; comma-separated, () for none.
    """
    arguments = dict(locals())
    output_dir = str(output_dir)
    _check(arguments)
    seed_tasks = read_seed_tasks(str(seed_tasks_path), at_least=num_prompt_instructions)
    decoding = OpenAIDecodingArguments(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    if api == "completions":
        # A base model would go on for ever. 2023's stops, "20." and the like, cut answers with such a number in them.
        decoding.stop = [f"\n{TASKS_PER_PROMPT + 1}. Instruction:"]
    teacher = Teacher(str(model_name), decoding, api, base_url, max_attempts, sleep_time, timeout, say)
    settings = {name: arguments[name] for name in ("num_instructions_to_generate", *Limits._fields)}
    settings |= {name: arguments[name] for name in ("model_name", "api", "temperature", "top_p", "max_tokens")}
    settings["blacklist"] = _words(blacklist)
    header = {
        "seed": seed,
        "num_prompt_instructions": num_prompt_instructions,
        "prompts": hashlib.sha256(json.dumps([prompt_text(), seed_tasks]).encode()).hexdigest(),
        "seed_instructions": [task["instruction"] for task in seed_tasks],
    }

    def prompts(number: int) -> tuple[list[str], str]:
        tasks = sample_seed_tasks(seed_tasks, number, seed, num_prompt_instructions)
        return [task["id"] for task in tasks], encode_prompt(tasks)

    with locked(output_dir), contextlib.closing(open_log(output_dir)) as log:
        header = remember_run(log, output_dir, header, settings)
        collection = Collection(header, settings, workers=min(num_cpus, os.cpu_count() or 1))
        take_in(collection, log.records)
        meter = Meter(max_requests, max_tokens_total, price_in, price_out, max_cost)
        for record in log.records:
            meter.read(record)
        log.records = [record for record in log.records if "batch_state" in record or "request" in record]
        run = Run(teacher, collection, log, meter, output_dir, prompts)

        def finish() -> None:
            write_regen(collection, output_dir)
            print(summary(collection, meter, output_dir))

        try:
            project(run, max_tokens, output_dir)
            batches = batch_requests if batch_api else 0
            asyncio.run(run.collect(concurrency or request_batch_size, batches, poll_seconds))
        except OSError:
            raise  # the disk is full: regen.json stays as it is
        except BaseException:
            finish()
            raise
        finish()


def _words(blacklist: Any) -> list[str]:
    """--blacklist as Fire gives it: a tuple or list, or one word or comma-separated words in a string."""
    words = blacklist.split(",") if isinstance(blacklist, str) else map(str, blacklist)
    return [word.strip() for word in words if word.strip()]


def _check(arguments: dict[str, Any]) -> None:
    """Raises ExpectedError (USAGE) for an argument that cannot be meant."""
    whole = ("num_instructions_to_generate", "num_prompt_instructions", "request_batch_size", "num_cpus", "concurrency")
    whole += ("max_tokens", "max_attempts", "max_requests", "max_tokens_total", "batch_requests")
    numbers = ("sleep_time", "timeout", "price_in", "price_out", "max_cost", "poll_seconds", "temperature", "top_p")
    numbers += ("max_similarity", "min_words", "max_words")
    for name in (*whole, *numbers):
        value = arguments[name]
        kind = int if name in whole else (int, float)
        good = isinstance(value, kind) and not isinstance(value, bool) and value >= (1 if name in whole else 0)
        if not good and not (value is None and name in _OPTIONAL):
            wanted = "a whole number from 1" if name in whole else "a number from 0"
            raise ExpectedError(f"--{name} {value}: give {wanted}", ExitCode.USAGE)
    if arguments["max_cost"] is not None and None in (arguments["price_in"], arguments["price_out"]):
        raise ExpectedError("--max_cost needs --price_in and --price_out: no price is built in", ExitCode.USAGE)


_OPTIONAL = ("concurrency", "max_requests", "max_tokens_total", "price_in", "price_out", "max_cost")


def replay(
    output_dir: str = "./",
    num_instructions_to_generate: int | None = None,
    max_similarity: float | None = None,
    min_words: int | None = None,
    max_words: int | None = None,
    blacklist: tuple[str, ...] | None = None,
    num_cpus: int = 16,
    skip_missing: bool = False,
) -> None:
    """Make regen.json again from requests.jsonl, without any request. What is not given is as in the last run.

    Args:
        output_dir: the run's directory.
        num_instructions_to_generate: how many to keep.
        max_similarity: drop an instruction whose ROUGE-L with a seed or a kept one is above this.
        min_words: drop shorter instructions.
        max_words: drop longer instructions.
        blacklist: drop instructions with any of these words; comma-separated, () for none.
        num_cpus: threads that compare instructions.
        skip_missing: True to use the answers behind a request that has none yet, where the run will not be resumed.
    """
    given = dict(locals())
    output_dir = str(output_dir)
    if not os.path.exists(os.path.join(output_dir, "requests.jsonl")):
        raise ExpectedError(f"{output_dir} has no requests.jsonl; give the --output_dir of a run", ExitCode.USAGE)
    with locked(output_dir), contextlib.closing(open_log(output_dir)) as log:
        settings = last_settings(log.records)
        if settings is None:
            raise ExpectedError(f"{output_dir}: nothing has been asked there yet", ExitCode.USAGE)
        settings |= {name: given[name] for name in settings.keys() & given.keys() if given[name] is not None}
        settings["blacklist"] = _words(settings["blacklist"])
        collection = Collection(log.records[0]["run"], settings, workers=min(num_cpus, os.cpu_count() or 1))
        take_in(collection, log.records, skip_missing)
        meter = Meter()
        for record in log.records:
            meter.read(record)
        write_regen(collection, output_dir)
        print(summary(collection, meter, output_dir))


def export(output_dir: str = "./", path: str = "alpaca_data.json") -> None:
    """Write the file to train on: regen.json without the similarity fields.

    Args:
        output_dir: the run's directory.
        path: the file to write, a JSON list of {"instruction", "input", "output"}.
    """
    source = os.path.join(str(output_dir), "regen.json")
    try:
        entries = jload(source)
        examples = [{part: entry[part] for part in ("instruction", "input", "output")} for entry in entries]
    except FileNotFoundError:
        raise ExpectedError(f"no {source}; give the --output_dir of a run", ExitCode.USAGE)
    except (ValueError, KeyError, TypeError) as error:
        raise ExpectedError(f"{source}: {error!r}; make it again with replay", ExitCode.DATA)
    jdump(examples, path)
    print(f"{len(examples)} examples in {path}")


COMMANDS = {
    "generate_instruction_following_data": generate_instruction_following_data,
    "replay": replay,
    "export": export,
}


def main() -> None:
    import fire

    # Fire calls the function first and finds fault with unknown flags afterwards: a paid run with a mistyped limit.
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        known = {*inspect.signature(COMMANDS[sys.argv[1]]).parameters, "help"}
        for argument in sys.argv[2:]:
            name = argument[2:].split("=")[0].replace("-", "_")
            if argument.startswith("--") and name and name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean --{close[0]}?" if close else "see --help"
                raise ExpectedError(f"unknown flag --{name}; {hint}", ExitCode.USAGE)
    fire.Fire(COMMANDS, name="generate_instruction")


if __name__ == "__main__":
    run_main(main)
