"""Self-instruct data generation (Wang et al. 2022, with Alpaca's changes): a teacher writes tasks after seed tasks.

python -m generate_instruction generate_instruction_following_data --output_dir ./ --num_instructions_to_generate 52000
python -m generate_instruction replay --output_dir ./            # regen.json again from the paid answers, for free
python -m generate_instruction export --output_dir ./ --path alpaca_data.json        # the file to train on

Every answer is kept in requests.jsonl before it is used, and regen.json is a function of that file alone. Run the same
command again after whatever happened: it goes on, and ends with the bytes of an uninterrupted run.
"""

import asyncio
import contextlib
import hashlib
import json
import math
import os
import typing
from collections.abc import Callable
from typing import Any

from alpaca.common import ExitCode, ExpectedError, jdump, jload, run_commands, run_main
from alpaca.data.words import TOKENIZATION
from alpaca.generation.parsing import (
    BLACKLIST,
    DEFAULT_LIMITS,
    PARSER,
    Limits,
    find_word_in_string,
    post_process_gpt3_response,
)
from alpaca.generation.run import (
    Run,
    begin_or_continue,
    last_settings,
    locked,
    open_log,
    say,
    use_logged_answers,
    write_and_summarize,
)
from alpaca.generation.self_instruct import (
    TASKS_PER_PROMPT,
    Collection,
    check_seed_tasks,
    encode_prompt,
    prompt_text,
    read_seed_tasks,
    sample_seed_tasks,
)
from alpaca.teacher.client import DEFAULT_MODEL, OpenAIDecodingArguments, Teacher
from alpaca.teacher.request_log import Meter

# What people import from here; it lives in self_instruct and parsing.
__all__ = ["encode_prompt", "find_word_in_string", "generate_instruction_following_data", "post_process_gpt3_response"]


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
    language: str = "English",
    seeds_anyway: bool = False,
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
        temperature: the teacher's sampling temperature.
        top_p: the teacher samples from the likeliest tokens that have this probability together.
        num_cpus: threads that compare instructions, at most as many as there are cores.
        seed: which seed tasks request i shows depends on this and on i only.
        api: "chat", or "completions" for base models on servers that have the legacy endpoint.
        base_url: the server, such as http://127.0.0.1:8000/v1; by default OPENAI_BASE_URL, or else OpenAI.
        concurrency: requests in flight at the same time; by default --request_batch_size.
        max_tokens: of an answer; 0.8 times as many, repeatedly, where the server says that the context is too small.
        max_attempts: at one request, before the run stops with exit code 5.
        sleep_time: seconds before the first retry; doubles with each further one, up to 60, less up to half at random;
            a server's Retry-After is obeyed.
        timeout: seconds for one attempt.
        max_requests: stop with exit code 5 before more requests than this, failed ones included.
        max_tokens_total: stop with exit code 5 before more tokens than this, of prompts and answers together.
        price_in: money for a million prompt tokens, for the cost shown and for --max_cost.
        price_out: money for a million answer tokens.
        max_cost: stop with exit code 5 before more money than this; needs the prices.
        batch_api: True to go through the Batch API: half the price, answers within 24 hours.
        batch_requests: requests in one batch at most.
        poll_seconds: seconds between two looks at a batch.
        max_similarity: drop an instruction whose ROUGE-L with a seed or a kept one is above this.
        min_words: drop shorter instructions.
        max_words: drop longer instructions.
        blacklist: drop instructions with any of these words; comma-separated, () for none.
        language: what the prompt asks for wherever prompt.txt says "in English"; give seed tasks in it as well.
        seeds_anyway: True to begin even where the filters would drop most of the seed tasks.
    """
    arguments = checked(generate_instruction_following_data, locals())
    seed_tasks = read_seed_tasks(str(seed_tasks_path), at_least=num_prompt_instructions)
    decoding = OpenAIDecodingArguments(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    if api == "completions":
        # A base model would go on for ever. 2023's stops, "20." and the like, cut answers with such a number in them.
        decoding.stop = [f"\n{TASKS_PER_PROMPT + 1}. Instruction:"]
    teacher = Teacher(str(model_name), decoding, api, base_url, max_attempts, sleep_time, timeout, say)
    header = {
        "seed": seed,
        "num_prompt_instructions": num_prompt_instructions,
        "prompts": hashlib.sha256(json.dumps([prompt_text(language), seed_tasks]).encode()).hexdigest(),
        "seed_instructions": [task["instruction"] for task in seed_tasks],
        "tokenization": TOKENIZATION,
        "parser": PARSER,
    }
    changeable = ("num_instructions_to_generate", "max_similarity", "min_words", "max_words", "blacklist")
    changeable += ("model_name", "api", "temperature", "top_p", "max_tokens")
    settings = {name: arguments[name] for name in changeable}

    def prompt_of(number: int) -> tuple[list[str], str]:
        tasks = sample_seed_tasks(seed_tasks, number, seed, num_prompt_instructions)
        return [task["id"] for task in tasks], encode_prompt(tasks, language)

    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(output_dir))
        log = stack.enter_context(contextlib.closing(open_log(output_dir)))
        header = begin_or_continue(log, output_dir, header, settings)
        collection = Collection(header, settings, num_cpus)
        decisions = stack.enter_context(contextlib.closing(Decisions(log, output_dir, limits_of(settings))))
        use_logged_answers(collection, log, decisions)
        meter = Meter(max_requests, max_tokens_total, price_in, price_out, max_cost)
        meter.count_logged(log.records)
        run = Run(teacher, collection, decisions, meter, output_dir, prompt_of, max_tokens)
        try:
            run.say_what_to_expect()
            batches = batch_requests if batch_api else 0
            asyncio.run(run.collect(concurrency or request_batch_size, batches, poll_seconds))
        except OSError:
            raise  # the disk is full: regen.json stays as it is
        except BaseException:
            write_and_summarize(collection, meter, output_dir)
            raise
        write_and_summarize(collection, meter, output_dir)


def checked(function: Callable, arguments: dict[str, Any]) -> dict[str, Any]:
    """→ the arguments, the blacklist as a list of words. Raises ExpectedError (USAGE) for one that cannot be meant."""
    for name, kind in typing.get_type_hints(function).items():
        value, kinds = arguments.get(name), {*typing.get_args(kind)} or {kind}
        least = {"seed": -math.inf, "min_words": 0}.get(name, 1)  # of whole numbers
        if value is None and type(None) in kinds:
            continue
        if bool in kinds and not isinstance(value, bool):
            raise ExpectedError(f"--{name} {value}: give True or False", ExitCode.USAGE)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if int in kinds and not (whole and value >= least):
            raise ExpectedError(
                f"--{name} {value}: give a whole number{f' from {least}' if whole else ''}", ExitCode.USAGE
            )
        if float in kinds and not ((whole or isinstance(value, float)) and 0 <= value < math.inf):
            raise ExpectedError(f"--{name} {value}: give a number from 0", ExitCode.USAGE)
    if arguments.get("max_cost") is not None and None in (arguments["price_in"], arguments["price_out"]):
        raise ExpectedError("--max_cost needs --price_in and --price_out: no price is built in", ExitCode.USAGE)
    words = arguments["blacklist"]
    if isinstance(words, str):  # of the command line: "draw,go to" or "()", also "('draw', 'go to')"
        words = [word.strip(" '\"") for word in words.strip("()[] ").split(",")]
    if words is not None:
        words = [str(word) for word in words if str(word).strip()]
    return {**arguments, "blacklist": words}


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
    given = checked(replay, locals())
    if not os.path.exists(os.path.join(output_dir, "requests.jsonl")):
        raise ExpectedError(f"{output_dir} has no requests.jsonl; give the --output_dir of a run", ExitCode.USAGE)
    with locked(output_dir), contextlib.closing(open_log(output_dir)) as log:
        settings = last_settings(log.records)
        if settings is None:
            raise ExpectedError(f"{output_dir}: nothing has been asked there yet", ExitCode.USAGE)
        settings |= {name: given[name] for name in settings.keys() & given.keys() if given[name] is not None}
        collection = Collection(log.records[0]["run"], settings, num_cpus, say)
        use_logged_answers(collection, log.records, skip_missing)
        meter = Meter()
        meter.count_logged(log.records)
        write_and_summarize(collection, meter, output_dir)


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


def main() -> None:
    commands = (generate_instruction_following_data, replay, export)
    run_commands({command.__name__: command for command in commands}, name="python -m generate_instruction")


if __name__ == "__main__":
    run_main(main)
