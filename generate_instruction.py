"""Self-instruct data generation (Wang et al. 2022, with Alpaca's changes): a teacher writes tasks after seed tasks.

python -m generate_instruction preview --output_dir generated/                   # three requests, to look at
python -m generate_instruction generate_instruction_following_data --output_dir generated/ \\
    --num_instructions_to_generate 52000
python -m generate_instruction replay --output_dir generated/     # regen.json again from the paid answers, for free
python -m generate_instruction export --output_dir generated/     # the file to train on, generated/alpaca_data.json

Every answer is kept in requests.jsonl before it is used, and regen.json is a function of that file alone. Run the same
command again after whatever happened: it goes on, and ends with the bytes of an uninterrupted run.
"""

import contextlib
import inspect
import os
import sys
from typing import Any

from alpaca.common import ExitCode, ExpectedError, run_commands, run_main
from alpaca.generation.arguments import checked
from alpaca.generation.decisions import Decisions
from alpaca.generation.directory import LARGE, WRITTEN, answers_of, use_logged_answers, write_and_summarize
from alpaca.generation.export import write_examples
from alpaca.generation.parsing import BLACKLIST, DEFAULT_LIMITS, find_word_in_string, post_process_gpt3_response
from alpaca.generation.prepare import limits_of, prepared
from alpaca.generation.preview import describe
from alpaca.generation.self_instruct import Collection, encode_prompt
from alpaca.teacher.client import DEFAULT_MODEL
from alpaca.teacher.directory import last_settings, locked, open_log, say
from alpaca.teacher.loops import run_anywhere
from alpaca.teacher.request_log import Meter

# What people import from here; it lives in self_instruct and parsing.
__all__ = ["encode_prompt", "find_word_in_string", "generate_instruction_following_data", "post_process_gpt3_response"]

PREVIEWED = 3  # requests


def generate_instruction_following_data(
    output_dir: str = "./",
    seed_tasks_path: str = "./seed_tasks.jsonl",
    num_instructions_to_generate: int = 100,
    model_name: str = DEFAULT_MODEL,
    num_prompt_instructions: int = 3,
    request_batch_size: int = 5,
    temperature: float | None = None,
    top_p: float | None = None,
    num_cpus: int = 16,
    seed: int = 0,
    api: str = "chat",
    base_url: str | None = None,
    concurrency: int | None = None,
    max_tokens: int = 3072,
    extra_body: str | None = None,
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
        temperature: the teacher's sampling temperature; by default its server's own, which mostly is 1.
        top_p: the teacher samples from the likeliest tokens that have this probability together; likewise.
        num_cpus: threads that compare instructions, at most as many as there are cores.
        seed: which seed tasks request i shows depends on this and on i only.
        api: "chat", or "completions" for base models on servers that have the legacy endpoint.
        base_url: the server, such as http://127.0.0.1:8000/v1; by default OPENAI_BASE_URL, or else OpenAI.
        concurrency: requests in flight at the same time; by default --request_batch_size.
        max_tokens: of an answer; 0.8 times as many, repeatedly, where the server says that the context is too small.
        extra_body: more fields of each request, as JSON, such as '{"reasoning_effort": "low"}'.
        max_attempts: at one request, before the run stops with exit code 5.
        sleep_time: seconds before the first retry; doubles with each further one, up to 60, less up to half at random.
            Rate limits are no failures: all requests wait as long as the server says, and go on more slowly.
        timeout: seconds for one attempt.
        max_requests: stop with exit code 5 before more requests than this, failed ones included, rate limits not.
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
    with prepared(arguments) as (run, _, _):
        try:
            run.say_what_to_expect()
            asking = run.collect(concurrency or request_batch_size, batch_requests if batch_api else 0, poll_seconds)
            run_anywhere(asking, run.interrupt)
        except OSError:
            raise  # the disk is full: regen.json stays as it is
        except BaseException:
            write_and_summarize(run.collection, run.meter, output_dir, run.teacher.limited)
            raise
        write_and_summarize(run.collection, run.meter, output_dir, run.teacher.limited)


def preview(**arguments: Any) -> None:
    """Ask three requests, print their prompts and answers, what would be kept and why the rest not, and stop.

    The flags are those of generate_instruction_following_data, whose run in the same directory uses these answers.
    """
    bound = inspect.signature(generate_instruction_following_data).bind(**arguments)
    bound.apply_defaults()
    with prepared(checked(generate_instruction_following_data, bound.arguments)) as (run, header, settings):
        run_anywhere(run.ask_first(PREVIEWED), run.interrupt)
        fresh = Collection(header, {**settings, "num_instructions_to_generate": sys.maxsize}, 1)
        for number, answer in answers_of(run.output_dir, PREVIEWED):
            print(describe(fresh, number, run.prompt_of(number)[1], answer))


# Its flags are the other's, for the command line and for --help.
preview.__signature__ = inspect.signature(generate_instruction_following_data)
preview.__annotations__ = generate_instruction_following_data.__annotations__
preview.__doc__ += "\n    Args:\n" + generate_instruction_following_data.__doc__.partition("    Args:\n")[2]


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
    with locked(output_dir, WRITTEN), contextlib.closing(open_log(output_dir, LARGE)) as log:
        settings = last_settings(log.records)
        if settings is None:
            raise ExpectedError(f"{output_dir}: nothing has been asked there yet", ExitCode.USAGE)
        limits = limits_of(settings)  # of the run; what was decided with them is known
        settings |= {name: given[name] for name in settings.keys() & given.keys() if given[name] is not None}
        collection = Collection(log.records[0]["run"], settings, num_cpus, say)
        known = output_dir if limits_of(settings) == limits and not skip_missing else None
        with contextlib.closing(Decisions(log, known, limits)) as decisions:
            use_logged_answers(collection, log, decisions, skip_missing)
        meter = Meter()
        meter.count_logged(log.records)
        write_and_summarize(collection, meter, output_dir)


def export(
    output_dir: str = "./",
    path: str | None = None,
    format: str = "json",
    against: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the file to train on: regen.json without the similarity fields.

    Args:
        output_dir: the run's directory.
        path: the file to write; by default alpaca_data.json (or .jsonl, or messages.jsonl) in the run's directory.
        format: "json", a list of {"instruction", "input", "output"}; "jsonl", one a line; "messages", a chat a line.
        against: a .json or .jsonl file of evaluation tasks; rows that repeat one (ROUGE-L above 0.7) are left out.
        overwrite: True to replace a file that exists.
    """
    checked(export, locals())
    write_examples(str(output_dir), path and str(path), format, against and str(against), overwrite)


def main() -> None:
    commands = (preview, generate_instruction_following_data, replay, export)
    run_commands({command.__name__: command for command in commands}, name="python -m generate_instruction")


if __name__ == "__main__":
    run_main(main)
