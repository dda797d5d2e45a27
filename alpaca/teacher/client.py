"""Answers of an OpenAI-compatible teacher: chat completions and legacy completions.

Retries are bounded and made here; the openai client's own are off, so that every request is counted. Rate limits are no
failures: they hold up all requests at the gate.
"""

import asyncio
import collections
import contextlib
import dataclasses
import random
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from alpaca.common import ExitCode, ExpectedError
from alpaca.teacher.connection import Connection
from alpaca.teacher.gate import Gate, Stopped
from alpaca.teacher.replies import BadAnswer, read_answer, read_error

DEFAULT_MODEL = "gpt-5.4-mini"  # what replaced the retired completion models in the price range; change it here only
SMALLEST_MAX_TOKENS = 64  # below this a request that does not fit the context is given up
MOST_AMENDMENTS = 30  # of one request's fields, before it is refused for good
FEWEST_LIMITS = 5  # rate limits in a row, with longer and longer waits, before the run is given up
NOTHING = {"prompt_tokens": 0, "completion_tokens": 0}  # the usage of a request that the server turned down
MAYBE_PAID = (408, 504, 522, 524)  # a gateway gave up waiting; the server behind it may have gone on
NEVER_ARRIVED = ("ConnectError", "ConnectTimeout", "ProxyError", "LocalProtocolError")  # httpx's, before sending
EVENT_STREAM = "event stream"
LARGEST_ANSWER = 64 * 2**20  # bytes; a body that does not end is cut here


@dataclasses.dataclass
class OpenAIDecodingArguments:
    """How the teacher decodes; names and defaults of 2023. `stream` has no effect: answers are collected whole."""

    max_tokens: int = 1800
    temperature: float | None = 0.2  # None: the server's own
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
        self._openai = openai
        self.connection = Connection(base_url, timeout)
        self.client, self.host, self.redact = self.connection.client, self.connection.host, self.connection.redact
        self.model_name, self.api = model_name or DEFAULT_MODEL, api
        self.max_attempts, self.sleep_time, self.timeout = max_attempts, sleep_time, timeout
        self._parameters = self._decoding_parameters(decoding or OpenAIDecodingArguments(), decoding_kwargs)
        self._refused_fields: set[str] = set()  # fields that the server does not take
        self._notify = notify
        self.gate = Gate(sleep_time)
        self.stopping = self.gate.stopping
        self.limited: collections.Counter[str] = collections.Counter()  # answers that only said "too many", by kind
        if self.connection.proxy and self.connection.is_loopback:
            notify(
                f"{self.host} is on this machine, and is{self.connection.way_around_proxy()}".replace("(", "", 1)[:-1]
            )

    def _decoding_parameters(self, decoding: OpenAIDecodingArguments, extra: dict[str, Any]) -> dict[str, Any]:
        """Decoding arguments → body fields. What is at the API's default is not sent: many servers refuse fields that
        they do not know, and some models take only one of temperature and top_p. `stream` is sent as False: some
        servers stream unless they are told not to, and answers are collected whole."""
        chat = self.api == "chat"
        # OpenAI's reasoning models only take the new name, most other servers only the old one.
        limit = "max_completion_tokens" if chat and self.host == "api.openai.com" else "max_tokens"
        fields = {limit: decoding.max_tokens, "stream": False}
        optional = {"temperature": None, "top_p": 1.0, "n": 1, "stop": None}
        optional |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "suffix": None, "logprobs": None, "echo": False}
        for name, default in optional.items():
            if (value := getattr(decoding, name)) != default and value is not None:
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

    async def ask(
        self,
        prompt: str | dict[str, str],
        before: Callable[[], None] = lambda: None,
        on_fault: Callable[..., None] = lambda kind, raw="", usage=None: None,
    ) -> dict[str, Any]:
        """→ {"choices": [{"text", "finish_reason", "index", "logprobs"}, …], "usage": …, "model": …}.

        `before` is called ahead of each attempt (and may raise), `on_fault(kind, raw, usage)` after each failed one:
        raw may be "", and usage None where the request may have been paid for and nobody knows how much. An attempt
        that meets a rate limit waits at the gate and goes on as the same attempt.
        """
        max_tokens = None  # shortened for this request only: what others ask must not depend on it

        async def attempt():
            body = self.body(prompt)
            for name in ("max_tokens", "max_completion_tokens"):
                if name in body and max_tokens is not None:
                    body[name] = max_tokens
            return self.read_answer(await self._fetch(body), body)

        def amend(error: dict[str, Any]) -> bool:
            nonlocal max_tokens
            if error["remedy"] not in ("shorten", "limit"):
                return self.drop_refused_fields(error)
            fields = self._parameters
            max_tokens = int(0.8 * (max_tokens or fields.get("max_tokens") or fields.get("max_completion_tokens")))
            if max_tokens < SMALLEST_MAX_TOKENS:
                raise ExpectedError(
                    f"the prompt does not fit the context of {self.model_name} ({self.host}: {error['message']}); "
                    "use a model with a longer one or a smaller --num_prompt_instructions",
                    ExitCode.API,
                )
            return True

        try:
            return await self.with_retries(attempt, on_fault, amend, before)
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
        before: Callable[[], None] = lambda: None,
    ) -> Any:
        """Await `attempt()` until it gives a result: exponential backoff with jitter, bounded; rate limits wait."""
        failed = amended = limited = 0
        begun = False  # an attempt that met a rate limit goes on without being counted again
        while True:
            error: dict[str, Any] = {}
            async with self.gate.place(again=begun) as place:
                if not begun:
                    before()
                    begun = True
                try:
                    answer = await asyncio.wait_for(attempt(), self.timeout)
                    place.succeeded()
                    return answer
                except self._openai.APIStatusError as failure:
                    error = self.read_error(failure.status_code, failure.response.text, failure.response.headers)
                    kind, raw = f"HTTP {failure.status_code}", error["message"]
                    usage = None if failure.status_code in MAYBE_PAID else NOTHING
                    if error["remedy"] == "limit":
                        place.limited(error["wait"])
                except BadAnswer as failure:
                    kind, raw, usage = failure.kind, self.redact(failure.raw), failure.usage
                except (asyncio.TimeoutError, self._openai.APITimeoutError):
                    kind, raw, usage = "timeout", "", None
                except self._openai.APIConnectionError as failure:
                    kind, raw = "no connection", self.redact(str(failure.__cause__ or failure))
                    usage = NOTHING if type(failure.__cause__).__name__ in NEVER_ARRIVED else None
            if error.get("remedy") == "limit":
                limited += 1
                self.count_limit(kind, error)
                if error["too_large"] and limited > 1 and amended < MOST_AMENDMENTS and amend(error):
                    amended += 1
                continue
            if error.get("remedy") == "skip":
                raise Filtered
            begun = False
            on_fault("context too long" if error.get("remedy") == "shorten" else kind, raw, usage)
            if error.get("remedy") in ("shorten", "request") and amended < MOST_AMENDMENTS and amend(error):
                amended += 1
                continue
            if kind == EVENT_STREAM:
                raise ExpectedError(
                    f'{self.host} streams its answers (server-sent events), although "stream": false was sent; '
                    "switch that off in the server or in the gateway before it",
                    ExitCode.API,
                )
            if error and error["remedy"] != "retry":
                raise await self.refusal(error)
            failed += 1
            if failed >= self.max_attempts:
                said = f" (which said: {raw[:200]})" if error else ""
                raise ExpectedError(
                    f"{failed} attempts at one request to {self.host} failed, the last with: {kind}; "
                    f"everything so far is saved: look at the server{said}{self.connection.way_around_proxy()}, "
                    "then run the same command again",
                    ExitCode.BUDGET,
                )
            await self.sleep(min(60.0, self.sleep_time * 2 ** (failed - 1)) * random.uniform(0.5, 1.0))

    def count_limit(self, kind: str, error: dict[str, Any]) -> None:
        """Raises ExpectedError (BUDGET) where there has been nothing but rate limits for long."""
        if not self.limited:
            self._notify(
                f"{self.host} limits the rate: {kind}: {error['message'][:200]} (said once; all requests wait)"
            )
        self.limited[kind] += 1
        if (error["wait"] or 0) > 60:
            self._notify(f"{self.host} asks to wait {error['wait']:.0f} s before the next attempt")
        if self.gate.limits_in_a_row >= max(self.max_attempts, FEWEST_LIMITS):
            raise ExpectedError(
                f"{self.host} has answered with nothing but its rate limit {self.gate.limits_in_a_row} times in a row, "
                f"the last: {kind}: {error['message']}; everything so far is saved: run the same command again later, "
                "or raise the account's limit",
                ExitCode.BUDGET,
            )

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
        async with resource.with_streaming_response.create(
            **required, extra_body=body, extra_headers=self.connection.headers
        ) as response:
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
        """A reply to the request `body` → the answer as `ask` gives it. Raises BadAnswer, also for one with the key."""
        if text.lstrip()[:6].startswith(("data:", "event:", ": ")):
            raise BadAnswer(EVENT_STREAM, text)
        answer = read_answer(text, body)
        if any(choice["text"] != self.redact(choice["text"]) for choice in answer["choices"]):
            raise BadAnswer("answer with the key in it", text, answer["usage"])
        model = answer["model"] if isinstance(answer["model"], str) else self.model_name
        return {**answer, "model": self.redact(model)}

    def read_error(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        """An HTTP error's body → what replies.read_error makes of it, without the key."""
        error = read_error(status, text, headers)
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
            "forbidden": (
                "the server lets us not in",
                "the key may not be allowed this model, or this machine's place or network may be barred",
            ),
            "size": (
                "the request is too large for the server or for what stands before it",
                "use a smaller --num_prompt_instructions or --max_tokens, or raise the limit there",
            ),
            "place": (
                "nothing answers at this address",
                "check --base_url (mostly ends in /v1) and --api",
            ),
        }.get(error["remedy"], ("the request is refused", "check --base_url, --api and the decoding arguments"))
        if re.search(r"temperature\W+and\W+`?top_p", error["message"]):
            remedy = "leave out --temperature or --top_p"
        remedy += self.connection.way_around_proxy()
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
