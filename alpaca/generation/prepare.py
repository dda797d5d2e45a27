"""From the flags of a run to the run, ready to ask."""

import argparse
import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from alpaca.data.words import TOKENIZATION
from alpaca.generation.decisions import Decisions
from alpaca.generation.directory import LARGE, WRITTEN, begin_or_continue, use_logged_answers
from alpaca.generation.parsing import PARSER, Limits
from alpaca.generation.run import Run
from alpaca.generation.self_instruct import (
    TASKS_PER_PROMPT,
    Collection,
    check_seed_tasks,
    encode_prompt,
    prompt_text,
    read_seed_tasks,
    sample_seed_tasks,
)
from alpaca.teacher.client import OpenAIDecodingArguments, Teacher
from alpaca.teacher.directory import locked, open_log, say
from alpaca.teacher.request_log import Meter


@contextlib.contextmanager
def prepared(arguments: dict[str, Any]) -> Iterator[tuple[Run, dict, dict]]:
    """The flags' values → the run in its output directory, with all that was asked there; its header and settings.

    All that can be checked is checked, and nothing is asked yet.
    """
    flags = argparse.Namespace(**arguments)
    seed_tasks = read_seed_tasks(str(flags.seed_tasks_path), at_least=flags.num_prompt_instructions)
    decoding = OpenAIDecodingArguments(max_tokens=flags.max_tokens, temperature=flags.temperature)
    fields = {} if flags.top_p is None else {"top_p": flags.top_p}
    if flags.api == "completions":
        # A base model would go on for ever. 2023's stops, "20." and the like, cut answers with such a number in them.
        decoding.stop = [f"\n{TASKS_PER_PROMPT + 1}. Instruction:"]
    patience = (flags.max_attempts, flags.sleep_time, flags.timeout)
    fields |= flags.extra_body or {}
    teacher = Teacher(str(flags.model_name), decoding, flags.api, flags.base_url, *patience, say, **fields)
    header = {
        "seed": flags.seed,
        "num_prompt_instructions": flags.num_prompt_instructions,
        "prompts": hashlib.sha256(json.dumps([prompt_text(flags.language), seed_tasks]).encode()).hexdigest(),
        "seed_instructions": [task["instruction"] for task in seed_tasks],
        "tokenization": TOKENIZATION,
        "parser": PARSER,
    }
    changeable = ("num_instructions_to_generate", "max_similarity", "min_words", "max_words", "blacklist")
    changeable += ("model_name", "api", "temperature", "top_p", "max_tokens", "extra_body")
    settings = {name: arguments[name] for name in changeable}

    def prompt_of(number: int) -> tuple[list[str], str]:
        tasks = sample_seed_tasks(seed_tasks, number, flags.seed, flags.num_prompt_instructions)
        return [task["id"] for task in tasks], encode_prompt(tasks, flags.language)

    with locked(flags.output_dir, WRITTEN), contextlib.closing(open_log(flags.output_dir, LARGE)) as log:
        if not log.records and not flags.seeds_anyway:
            check_seed_tasks(seed_tasks, limits_of(settings))
        header = begin_or_continue(log, flags.output_dir, header, settings)
        collection = Collection(header, settings, flags.num_cpus, say)
        with contextlib.closing(Decisions(log, flags.output_dir, limits_of(settings))) as decisions:
            use_logged_answers(collection, log, decisions)
            meter = Meter(flags.max_requests, flags.max_tokens_total, flags.price_in, flags.price_out, flags.max_cost)
            meter.count_logged(log.records)
            run = Run(teacher, collection, decisions, meter, flags.output_dir, prompt_of, flags.max_tokens)
            yield run, header, settings


def limits_of(settings: dict[str, Any]) -> Limits:
    return Limits(*(tuple(v) if isinstance(v := settings[name], list) else v for name in Limits._fields))
