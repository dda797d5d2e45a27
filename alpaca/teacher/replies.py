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


def read_error(status: int, text: str, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The error forms of many servers → {"status", "remedy" (see remedy_for), "message", "param", "wait"}.

    "wait" is for how many seconds nobody should ask, None where the server does not say. "too_large": waiting is of no
    use, since the request alone takes more than a whole minute grants.
    """
    try:
        payload = json.loads(text)
    except (ValueError, RecursionError):
        payload = {}
    payload = payload[0] if isinstance(payload, list) and payload else payload
    error = payload.get("error", payload) if isinstance(payload, dict) else payload
    error = error if isinstance(error, dict) else {"message": error}
    message = str(error.get("message") or error.get("detail") or http.client.responses.get(status) or "no reason given")
    message = " ".join(message.split())
    codes = [error.get(name) for name in ("code", "type", "status")]
    inner = error.get("innererror")  # Azure's
    codes += [inner.get("code")] if isinstance(inner, dict) else []
    code = " ".join(str(part) for part in codes if part).lower()
    wait = retry_after_seconds(headers or {})
    wait = _wait_in_words(text if payload else "") if wait is None else wait
    remedy = remedy_for(status, code, f"{message} {_details(error)}".lower(), told_to_wait=wait is not None)
    limit, requested = (re.search(rf"(?i)\b{name} (\d+)", message) for name in ("limit", "requested"))
    return {
        **{"status": status, "remedy": remedy, "message": message, "param": str(error.get("param")), "wait": wait},
        "too_large": bool(limit and requested and int(requested[1]) > int(limit[1])),
    }


def _details(error: dict[str, Any]) -> str:
    """What Google's and OpenRouter's errors say beside their message."""
    return " ".join(json.dumps(error[name]) for name in ("details", "metadata") if error.get(name))


# How servers name things, all lower-case, code and message together. They agree on neither for a status, so the wording
# is what is left to go by.
_FILTERED = re.compile(
    r"content_filter|content_policy|content.management.policy|responsible_?ai|data_?inspection_?failed|inappropriate"
    r"|invalid_prompt|usage polic|moderation|flagged|prohibited_content|safety (system|filter|setting|polic)|sensitive"
    r"|content (policy|exists risk)|risk control|blocked by .{0,40}(filter|safety|guardrail)|guardrail"
)
_RATE = re.compile(
    r"per[ _-]?(minute|second|min\b|sec\b|hour|day)|/ ?min\b|\b[rt]p[mds]\b|rate.?limit|too many requests|throttl"
    r"|(retry|try again) (in|after) [\d.]+|retrydelay"
)
_CREDIT = re.compile(
    r"insufficient.{0,12}(quota|balance|credit|fund)|current.{0,10}quota|billing|credit|balance|payment|prepaid|spend"
    r"|arrear|recharge"
)
_KEY = re.compile(
    r"api.?key|invalid.?(key|token)|access.?(key|token)|authenticat|credential|unauthori[sz]ed|no connected db"
    r"|no_db_connection|permission_denied"
)
_MODEL = re.compile(
    r"model_?not_?found|model_deprecated|deployment_?not_?found|invalid model|unknown model|no such model|not_exist"
    r"|(model|deployment)\b.{0,90}(not found|not exist|not have access|no access|deprecated|unavailable|not available"
    r"|decommissioned|not supported for|not a valid)|not a valid model|(not have|no|denied) access to.{0,20} model"
    r"|no endpoints found"
)
_TOO_LONG = re.compile(
    r"context_length|context (length|size|window)|maximum (context|model) length|max_model_len|too many tokens"
    r"|(prompt|input|messages?) (is|are) too long|reduce (the|your) (length|prompt|messages|input)|string_above_max"
)


def remedy_for(status: int, code: str, message: str, told_to_wait: bool = False) -> str:
    """What helps against an HTTP error: "limit" (all of us wait), "retry", "shorten" (the answer), "skip" (a filtered
    prompt), or what the user has to see to: "key", "quota", "model", "place", "size", "forbidden", "request".

    `code` is the error's code or type, `message` its text, both lower-case; `told_to_wait`: the server says how long.
    """
    words = f"{code} {message}"
    if status in (400, 403, 406, 422, 451) and _FILTERED.search(words) and not re.search(r"rate.?limit", words):
        return "skip"
    if status == 402:
        return "quota"
    if status == 429 or (status in (400, 403, 413) and _RATE.search(words) and not _MODEL.search(words)):
        return "quota" if _CREDIT.search(words) and not _RATE.search(words.replace("rate_limit", "")) else "limit"
    if status in (502, 503, 529) and told_to_wait:
        return "limit"
    if status in (408, 409, 425) or status >= 500:
        return "retry"
    if _TOO_LONG.search(words):
        return "shorten"
    if status == 413:
        return "size"
    if _MODEL.search(words) and status != 401:
        return "model"
    if status == 401 or _KEY.search(words):
        return "key"
    if status in (400, 403) and _CREDIT.search(words):
        return "quota"
    if status == 403:
        return "forbidden"
    if status in (404, 405):
        return "model" if status == 404 and "model" in message else "place"
    return "request"


def _wait_in_words(text: str) -> float | None:
    """The seconds that an error names: `"retryDelay": "1.5s"`, "try again in 1m2.5s", "retry after 26 seconds"."""
    span = r"\d+(?:\.\d+)? ?(?:ms|[hms])"
    found = re.search(rf'(?i)"retryDelay": ?"([^"]+)"|(?:retry|again) (?:in|after) ((?:{span}[a-z]* ?)+)', text)
    parts = re.findall(r"(\d+(?:\.\d+)?) ?(ms|[hms])", (found[1] or found[2]).lower()) if found else []
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    return sum(float(number) * units[unit] for number, unit in parts) if parts else None


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
