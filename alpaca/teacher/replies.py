"""What a server's reply means: an answer that can be used, or an error and what may be done about it."""

import contextlib
import datetime
import email.utils
import http.client
import json
import math
import re
from collections.abc import Mapping
from typing import Any


class BadAnswer(Exception):
    """A body with status 200 that holds no usable answer: `kind` for the count, `raw` for inspection, what it cost."""

    def __init__(self, kind: str, raw: str, usage: dict[str, int] | None = None):
        super().__init__(kind)
        self.kind, self.raw, self.usage = kind, raw, usage


def read_answer(text: str, body: dict[str, Any]) -> dict[str, Any]:
    """A reply to the request `body` → {"choices", "usage", "model"} (model None if not told). Raises BadAnswer.

    "finish_reason" is the server's word, except where the answer used all the tokens it was granted ("length", whatever
    the server calls it) and where the teacher declined in a field of its own ("refusal", with the text "").
    """
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        raise BadAnswer("HTML page" if text.lstrip()[:1] == "<" else "broken JSON", text)
    answer = answer if isinstance(answer, dict) else {}
    counts = answer.get("usage") if isinstance(answer.get("usage"), dict) else {}
    usage = {name: counts.get(name) for name in ("prompt_tokens", "completion_tokens")}
    counted = all(isinstance(count, int) and count >= 0 for count in usage.values())
    choices = []
    try:
        for index, choice in enumerate(answer.get("choices") or [None]):
            reason, logprobs = choice.get("finish_reason"), choice.get("logprobs")
            content = _message_text(choice["message"], reason) if "messages" in body else choice["text"]
            if isinstance(choice.get("message"), dict) and choice["message"].get("refusal") and not content:
                content, reason = "", "refusal"
            choices.append({"text": content, "index": index, "finish_reason": reason, "logprobs": logprobs})
    except (TypeError, KeyError, AttributeError):
        raise BadAnswer("no choices", text, usage if counted else None)
    if not all(isinstance(choice["text"], str) for choice in choices):
        raise BadAnswer("null content", text, usage if counted else None)
    granted = body.get("max_completion_tokens") or body.get("max_tokens")
    if counted and granted and len(choices) == 1 and usage["completion_tokens"] >= granted:
        if choices[0]["finish_reason"] not in ("content_filter", "refusal"):
            choices[0]["finish_reason"] = "length"
    if not counted:  # four characters a token where the server does not count
        lengths = len(str(body.get("prompt") or body.get("messages"))), sum(len(choice["text"]) for choice in choices)
        usage = {name: length // 4 for name, length in zip(usage, lengths, strict=True)}
    return {"choices": choices, "usage": usage, "model": answer.get("model")}


def _message_text(message: dict[str, Any], reason: str | None) -> str | None:
    """What a chat message says: its content, or the text parts of a content list, and never the reasoning beside it.

    None where there is none, for no reason that the server gives: then it may answer when it is asked again.
    """
    content = message.get("content")
    parts = [content] if isinstance(content, dict) else content
    if isinstance(parts, list):
        texts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
        return "".join(
            part["text"]["value"] if isinstance(part["text"], dict) else part["text"]
            for part in texts
            if part.get("type", "text") in ("text", "output_text") and part.get("text") and not part.get("thought")
        )
    if content is None and (
        reason not in (None, "stop") or message.get("reasoning_content") or message.get("reasoning")
    ):
        return ""  # a filter, or the tokens were used up ahead of the answer
    return content


def read_error(status: int, text: str) -> dict[str, Any]:
    """The error forms of many servers → {"status", "remedy" (see remedy_for), "message", "param"}."""
    try:
        payload = json.loads(text)
    except (ValueError, RecursionError):
        payload = {}
    error = payload.get("error", payload) if isinstance(payload, dict) else payload
    error = error if isinstance(error, dict) else {"message": error}
    message = str(error.get("message") or error.get("detail") or http.client.responses.get(status))
    message = " ".join(message.split())
    code = " ".join(str(error[name]) for name in ("code", "type") if error.get(name))
    remedy = remedy_for(status, code.lower(), message.lower())
    return {"status": status, "remedy": remedy, "message": message, "param": str(error.get("param"))}


def remedy_for(status: int, code: str, message: str) -> str:
    """What helps against an HTTP error: "retry", "shorten" (the answer), "skip" (the prompt, which is filtered), or
    what the user has to see to: "key", "quota", "model", "request".

    `code` is the error's code or type, `message` its text, both lower-case. Compatible servers agree on neither for a
    status 400, so the wording is what is left to go by.
    """
    if "model_not_found" in code or "model_deprecated" in code:
        return "model"
    if status in (401, 403):
        return "key"
    if status == 402 or "insufficient_quota" in code or "billing" in code or "exceeded your current quota" in message:
        return "quota"
    if status in (408, 409, 425, 429) or status >= 500:
        return "retry"
    if "context_length" in code or re.search(
        r"context (length|size|window)|maximum (context|model) length|reduce (the|your) (length|prompt|messages)"
        r"|(prompt|input) is too long|too many tokens",
        message,
    ):
        return "shorten"
    if "content_filter" in code or "content_policy" in code or "invalid_prompt" in code:
        return "skip"
    return "model" if status == 404 and "model" in message else "request"


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Retry-After in every legal form → seconds from now, None where there is none that can be read.

    `retry-after-ms: 1500` → 1.5 · `retry-after: 20` → 20.0 · `retry-after: Wed, 21 Oct 2026 07:28:00 GMT` → seconds
    until then by the server's own clock (its Date header), 0.0 when that has passed.
    """
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        with contextlib.suppress(ValueError):
            seconds = float(headers.get(name, "")) / unit
            if math.isfinite(seconds) and seconds >= 0:
                return seconds
    until, now = (_parse_date(headers.get(name, "")) for name in ("retry-after", "date"))
    if until is None:
        return None
    return max(0.0, (until - (now or datetime.datetime.now(datetime.timezone.utc))).total_seconds())


def _parse_date(value: str) -> datetime.datetime | None:
    try:
        date = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError, IndexError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=datetime.timezone.utc)  # HTTP dates are always GMT
