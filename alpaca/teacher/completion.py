"""`openai_completion`: prompts answered in one call, as 2023's function of this name did it, in notebooks too."""

import asyncio
import functools
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from alpaca.teacher.client import OpenAIDecodingArguments, Teacher
from alpaca.teacher.loops import run_anywhere


async def _complete_prompts(prompts: list, batch_size: int, n: int, **teacher_arguments) -> list[list[dict]]:
    """→ for each prompt its n choices, each with the `total_tokens` of its request. Progress on a terminal."""
    teacher = Teacher(**teacher_arguments, notify=functools.partial(tqdm.write, file=sys.stderr))
    places = asyncio.Semaphore(batch_size)
    bar = tqdm(total=len(prompts), desc="prompts", disable=None)

    async def complete(prompt) -> list[dict[str, Any]]:
        choices = []
        async with places:
            while len(choices) < n:  # some servers give one choice whatever n is
                answer = await teacher.ask(prompt)
                tokens = sum(answer["usage"].values())
                choices += [{**choice, "total_tokens": tokens} for choice in answer["choices"]]
        bar.update()
        return [{**choice, "index": index} for index, choice in enumerate(choices[:n])]

    try:
        return await asyncio.gather(*map(complete, prompts))
    finally:
        bar.close()
        await teacher.close()


class Completion(dict):
    """A choice: `text`, `finish_reason`, `total_tokens`, `index` and `logprobs`, readable as attributes and as keys."""

    __getattr__ = dict.__getitem__


def openai_completion(
    prompts: str | Sequence[str] | Sequence[dict[str, str]] | dict[str, str],
    decoding_args: OpenAIDecodingArguments,
    model_name: str | None = None,
    sleep_time: float = 2,
    batch_size: int = 1,
    max_instances: int = sys.maxsize,
    max_batches: int = sys.maxsize,
    return_text: bool = False,
    api: str = "chat",
    base_url: str | None = None,
    max_attempts: int = 10,
    **decoding_kwargs: Any,
) -> Any:
    """Ask an OpenAI-compatible server to answer prompts, as the function of this name did in 2023.

    Args:
        prompts: one prompt or a list; a prompt is a text, or with api="chat" a message {"role", "content"}.
        decoding_args: see OpenAIDecodingArguments.
        model_name: None for a current default.
        sleep_time: seconds before the first retry; doubles with each further one, up to 60.
        batch_size: prompts asked at the same time (each in a request of its own: many servers take no lists).
        max_instances, max_batches: only the first max_instances, or max_batches * batch_size, prompts are answered.
        return_text: texts in place of Completions.
        api: "chat" or "completions" (legacy, for base models).
        base_url: the server; None for OPENAI_BASE_URL, or OpenAI.
        max_attempts: attempts at one request.
        decoding_kwargs: more body fields, such as logit_bias; left out where the server says it does not take them.

    Returns:
        A list with one Completion for each prompt, or for n > 1 a list of n Completions for each; for a single prompt
        its item alone.

    Raises ExpectedError where asking again cannot help, or after max_attempts.
    """
    single = isinstance(prompts, (str, dict))
    prompts = [prompts] if single else list(prompts)
    prompts = prompts[: min(max_instances, max_batches * batch_size)]
    client = {"api": api, "base_url": base_url, "max_attempts": max_attempts, "sleep_time": sleep_time}
    arguments = {"model_name": model_name, "decoding": decoding_args, **client, **decoding_kwargs}
    answers = run_anywhere(_complete_prompts(prompts, batch_size, decoding_args.n, **arguments))
    results = [[choice["text"] if return_text else Completion(choice) for choice in choices] for choices in answers]
    if decoding_args.n == 1:
        results = [choices[0] for choices in results]
    return results[0] if single else results
