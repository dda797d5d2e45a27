"""Answers of an OpenAI-compatible teacher: chat completions and legacy completions.

Retries are bounded and made here; the openai client's own are off, so that every request is counted.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import random
import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from alpaca.common import ExitCode, ExpectedError
from alpaca.teacher.replies import BadAnswer, read_answer, read_error, retry_after_seconds

DEFAULT_MODEL = "gpt-5.4-mini"  # what replaced the retired completion models in the price range; change it here only
SMALLEST_MAX_TOKENS = 64  # below this a request that does not fit the context is given up
MOST_AMENDMENTS = 30  # of one request's fields, before it is refused for good
LARGEST_ANSWER = 64 * 2**20  # bytes; a body that does not end is cut here


@dataclasses.dataclass
class OpenAIDecodingArguments:
    """How the teacher decodes; names and defaults of 2023. `stream` has no effect: answers are collected whole."""

    max_tokens: int = 1800
    temperature: float = 0.2
    top_p: float = 1.0
    n: int = 1
    stream: bool = False
    stop: Sequence[str] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    suffix: str | None = None  # legacy completions only, like echo
    logprobs: int | None = None
    echo: bool = False


class Filtered(Exception):
    """The server's content filter declines this prompt: an empty answer, and no reason to stop the others."""


class Stopped(Exception):
    """The run is ending; this request was waiting for its next attempt and is given up."""


class Teacher:
    """An OpenAI-compatible server and model with decoding arguments. One object serves all requests of a run.

    Raises ExpectedError with exit code API where asking again cannot help, BUDGET when `max_attempts` are used up.
    """

    def __init__(
        self,
        model_name: str | None = None,
        decoding: OpenAIDecodingArguments | None = None,
        api: str = "chat",
        base_url: str | None = None,
        max_attempts: int = 10,
        sleep_time: float = 2.0,
        timeout: float = 600.0,
        notify: Callable[[str], None] = lambda message: None,
        **decoding_kwargs,
    ):
        import openai

        if api not in ("chat", "completions"):
            raise ExpectedError(f"--api {api}: choose chat or completions", ExitCode.USAGE)
        base_url = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        if urlsplit(base_url).scheme not in ("http", "https") or not urlsplit(base_url).hostname:
            raise ExpectedError("--base_url is no URL; write it like http://127.0.0.1:8000/v1", ExitCode.USAGE)
        self.host = urlsplit(base_url).netloc.rpartition("@")[2]  # for messages: without user and password
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not self._key and self.host == "api.openai.com":
            raise ExpectedError(
                "no API key: set the environment variable OPENAI_API_KEY, or --base_url for a server of your own",
                ExitCode.API,
            )
        self._openai = openai
        # Servers of one's own mostly want no key, but the client wants a value.
        self.client = openai.AsyncOpenAI(api_key=self._key or "none", base_url=base_url, max_retries=0, timeout=timeout)
        self.model_name, self.api = model_name or DEFAULT_MODEL, api
        self.max_attempts, self.sleep_time, self.timeout = max_attempts, sleep_time, timeout
        self._parameters = self._decoding_parameters(decoding or OpenAIDecodingArguments(), decoding_kwargs)
        self._refused_fields: set[str] = set()  # fields that the server does not take
        self._notify = notify
        self.stopping = asyncio.Event()

    def _decoding_parameters(self, decoding: OpenAIDecodingArguments, extra: dict[str, Any]) -> dict[str, Any]:
        """Decoding arguments → body fields. Beside the sampling ones only what differs from the API's defaults is sent:
        many servers refuse fields that they do not know. `stream` is never sent: answers are collected whole."""
        chat = self.api == "chat"
        # OpenAI's reasoning models only take the new name, most other servers only the old one.
        limit = "max_completion_tokens" if chat and self.host == "api.openai.com" else "max_tokens"
        fields = {limit: decoding.max_tokens, "temperature": decoding.temperature, "top_p": decoding.top_p}
        optional = {"n": 1, "stop": None, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        optional |= {"suffix": None, "logprobs": None, "echo": False}
        for name, default in optional.items():
            if (value := getattr(decoding, name)) != default:
                fields[name] = list(value) if isinstance(value, tuple) else value
        fields |= extra
        if chat:
            for name in {"suffix", "echo", "best_of"} & fields.keys():
                raise ExpectedError(f"{name} exists in the legacy API only: use api=completions", ExitCode.USAGE)
            if isinstance(count := fields.get("logprobs"), int) and not isinstance(count, bool):
                fields |= {"logprobs": True, "top_logprobs": count}
        return fields

    def body(self, prompt: str | dict[str, str]) -> dict[str, Any]:
        """A prompt (or one chat message) → the request's JSON."""
        if self.api == "completions":
            if isinstance(prompt, dict):
                raise ExpectedError("a chat message needs api=chat", ExitCode.USAGE)
            return {"model": self.model_name, "prompt": prompt, **self._parameters}
        message = prompt if isinstance(prompt, dict) else {"role": "user", "content": prompt}
        return {"model": self.model_name, "messages": [message], **self._parameters}

    def redact(self, text: str) -> str:
        """Servers quote keys in their error texts; no log or message of ours may."""
        return text.replace(self._key, "[key]") if self._key else text

    async def ask(
        self,
        prompt: str | dict[str, str],
        before: Callable[[], None] = lambda: None,
        on_fault: Callable[..., None] = lambda kind, raw="", usage=None: None,
    ) -> dict[str, Any]:
        """→ {"choices": [{"text", "finish_reason", "index", "logprobs"}, …], "usage": …, "model": …}.

        `before` is called ahead of each HTTP request (and may raise), `on_fault(kind, raw, usage)` after each failed
        one: raw may be "", and usage None.
        """
        max_tokens = None  # shortened for this request only: what others ask must not depend on it

        async def attempt():
            before()
            body = self.body(prompt)
            for name in ("max_tokens", "max_completion_tokens"):
                if name in body and max_tokens is not None:
                    body[name] = max_tokens
            return self.read_answer(await self._fetch(body), body)

        def amend(error: dict[str, Any]) -> bool:
            nonlocal max_tokens
            if error["remedy"] != "shorten":
                return self.drop_refused_fields(error)
            fields = self._parameters
            max_tokens = int(0.8 * (max_tokens or fields.get("max_tokens") or fields.get("max_completion_tokens")))
            if max_tokens < SMALLEST_MAX_TOKENS:
                raise ExpectedError(
                    f"the prompt does not fit the context of {self.model_name}; "
                    "use a model with a longer one or a smaller --num_prompt_instructions",
                    ExitCode.API,
                )
            return True

        try:
            return await self.with_retries(attempt, on_fault, amend)
        except Filtered:
            return self.filtered_answer()

    def filtered_answer(self) -> dict[str, Any]:
        choice = {"text": "", "finish_reason": "content_filter", "index": 0, "logprobs": None}
        usage = {"prompt_tokens": 0, "completion_tokens": 0}
        return {"choices": [choice], "usage": usage, "model": self.model_name}

    async def with_retries(
        self,
        attempt: Callable[[], Awaitable],
        on_fault: Callable[..., None] = lambda kind, raw="", usage=None: None,
        amend: Callable[[dict[str, Any]], bool] = lambda error: False,
    ) -> Any:
        """Await `attempt()` until it gives a result: exponential backoff with jitter, Retry-After obeyed, bounded."""
        failed = amended = 0
        while True:
            server_wait = None
            try:
                return await asyncio.wait_for(attempt(), self.timeout)
            except self._openai.APIStatusError as failure:
                error = self.read_error(failure.status_code, failure.response.text)
                if error["remedy"] == "skip":
                    raise Filtered
                kind = "context too long" if error["remedy"] == "shorten" else f"HTTP {failure.status_code}"
                on_fault(kind, error["message"])
                if error["remedy"] in ("shorten", "request") and amended < MOST_AMENDMENTS and amend(error):
                    amended += 1
                    continue
                if error["remedy"] != "retry":
                    raise await self.refusal(error)
                server_wait = retry_after_seconds(failure.response.headers)
            except BadAnswer as failure:
                kind = failure.kind
                on_fault(kind, self.redact(failure.raw), failure.usage)
            except (asyncio.TimeoutError, self._openai.APITimeoutError):
                kind = "timeout"
                on_fault(kind)
            except self._openai.APIConnectionError as failure:
                kind = "no connection"
                on_fault(kind, self.redact(str(failure.__cause__ or failure)))
            failed += 1
            if failed >= self.max_attempts:
                raise ExpectedError(
                    f"{failed} attempts at one request to {self.host} failed, the last with: {kind}; "
                    "everything so far is saved: look at the server, then run the same command again",
                    ExitCode.BUDGET,
                )
            wait = min(60.0, self.sleep_time * 2 ** (failed - 1)) * random.uniform(0.5, 1.0)
            if server_wait is not None:
                wait = server_wait * random.uniform(1.0, 1.05)  # never sooner than asked, and not all at once
                if wait > 60:
                    self._notify(f"{self.host} asks to wait {wait:.0f} s before the next attempt")
            await self.sleep(wait)

    async def sleep(self, seconds: float) -> None:
        """Sleep, but raise Stopped at once when the run is ending."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)
            raise Stopped

    async def _fetch(self, body: dict[str, Any]) -> str:
        """One HTTP request → the body's text as it came, streamed so that a cut one is not lost to inspection."""
        if self.api == "chat":
            resource, required = self.client.chat.completions, {"model": body["model"], "messages": body["messages"]}
        else:
            resource, required = self.client.completions, {"model": body["model"], "prompt": body["prompt"]}
        data = bytearray()
        async with resource.with_streaming_response.create(**required, extra_body=body) as response:
            try:
                async for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) > LARGEST_ANSWER:
                        raise BadAnswer("body without end", data.decode(errors="replace"))
            except BadAnswer:
                raise
            except Exception:  # the transport's own exceptions come through here, whatever its library
                raise BadAnswer("connection cut", data.decode(errors="replace"))
        return data.decode(errors="replace")

    def read_answer(self, text: str, body: dict[str, Any]) -> dict[str, Any]:
        """A reply to the request `body` → the answer as `ask` gives it, without the key. Raises BadAnswer."""
        answer = read_answer(text, body)
        for choice in answer["choices"]:
            choice["text"] = self.redact(choice["text"])
        model = answer["model"] if isinstance(answer["model"], str) else self.model_name
        return {**answer, "model": self.redact(model)}

    def read_error(self, status: int, text: str) -> dict[str, Any]:
        """An HTTP error's body → {"status", "remedy", "message", "param"}, without the key."""
        error = read_error(status, text)
        return {**error, "message": self.redact(error["message"])[:500]}

    def drop_refused_fields(self, error: dict[str, Any]) -> bool:
        """Drop (or rename) the fields that the server says it does not take; False where it names none of ours."""
        if not re.search(
            r"(?i)unsupported|not supported|unrecogni[sz]ed|unexpected|unknown|permitted", error["message"]
        ):
            return False
        ours = self._parameters.keys() | self._refused_fields
        named = {error["param"]} & ours or set(re.findall(r"\w+", error["message"])) & ours
        for name in named - self._refused_fields:
            value = self._parameters.pop(name)
            self._refused_fields.add(name)
            other = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}.get(name)
            if other and other not in self._refused_fields:
                self._parameters[other] = value
            self._notify(f"{self.host} does not take {name}: {f'sent as {other}' if other else 'left out'}")
        return bool(named)  # also where another request in flight has learnt it before

    async def refusal(self, error: dict[str, Any]) -> ExpectedError:
        """→ the error that ends the run, with the remedy."""
        what, remedy = {
            "key": ("the key is refused", "set OPENAI_API_KEY to a key that this server accepts"),
            "quota": ("no quota left", "add credit or raise the account's limit, then run the same command again"),
            "model": (f"unknown model {self.model_name}", f"use --model_name {DEFAULT_MODEL}"),
        }.get(
            error["remedy"],
            ("the request is refused", "check --base_url (mostly ends in /v1), --api and the decoding arguments"),
        )
        if error["remedy"] == "model" and (usable := await self._models()):
            remedy += f", or one that this key can use: {usable}"
        return ExpectedError(
            f"{what} ({self.host}, HTTP {error['status']}: {error['message']}); {remedy}", ExitCode.API
        )

    async def _models(self) -> str:
        """The names of (up to 20) models that the key can use; "" where the server does not tell within a second."""
        with contextlib.suppress(Exception):
            page = await asyncio.wait_for(self.client.models.list(), 1.0)
            names = sorted(model.id for model in page.data)
            return self.redact(", ".join(names[:20]) + (", …" if len(names) > 20 else ""))
        return ""

    async def close(self) -> None:
        await self.client.close()


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
    with concurrent.futures.ThreadPoolExecutor(1) as executor:  # in a notebook this thread has an event loop already
        work = _complete_prompts(prompts, batch_size, decoding_args.n, **arguments)
        answers = executor.submit(asyncio.run, work).result()
    results = [[choice["text"] if return_text else Completion(choice) for choice in choices] for choices in answers]
    if decoding_args.n == 1:
        results = [choices[0] for choices in results]
    return results[0] if single else results
