"""What replies of many servers are taken for."""

import json

import pytest

from alpaca.teacher.replies import BadAnswer, read_answer, read_error, remedy_for, retry_after_seconds


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "20"}, 20.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30.0),
        ({"retry-after": "Wednesday, 21-Oct-26 07:28:30 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30.0),
        ({"retry-after": "Wed Oct 21 07:28:30 2026", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None),
        ({}, None),
    ],
)
def test_retry_after_in_every_form(headers, seconds):
    assert retry_after_seconds(headers) == seconds


def test_remedies():
    assert remedy_for(404, "", "the model `x` does not exist.") == "model"
    assert remedy_for(404, "", "not found") == remedy_for(405, "", "method not allowed") == "place"
    assert remedy_for(403, "model_not_found", "project has no access to model x") == "model"
    assert remedy_for(529, "", "") == remedy_for(408, "", "") == remedy_for(503, "", "overloaded") == "retry"
    assert remedy_for(503, "", "overloaded", told_to_wait=True) == "limit"
    assert remedy_for(400, "exceed_context_size_error", "the request exceeds the available context size") == "shorten"
    assert remedy_for(413, "", "input is too long") == "shorten"
    assert remedy_for(413, "", "request entity too large") == "size"


def gemini(period):
    """The form of Google's errors: a list, the word "quota" for everything, and the time to wait in the details."""
    message = f"You exceeded your current quota, please check your plan and billing details. Limit: 10 {period}."
    details = [{"violations": [{"quotaId": f"GenerateRequests{period}PerProject"}]}, {"retryDelay": "1.5s"}]
    return [{"error": {"code": 429, "message": message, "status": "RESOURCE_EXHAUSTED", "details": details}}]


TPM = "Request too large for model `x` on tokens per minute (TPM): Limit 6000, Requested %d, please reduce it."


@pytest.mark.parametrize(
    ("status", "body", "headers", "wait", "too_large"),
    [
        (429, {"error": {"message": "Rate limit reached", "code": "rate_limit_exceeded"}}, {}, None, False),
        (429, {"error": {"message": "slow down"}}, {"retry-after": "2"}, 2.0, False),
        (
            429,
            {"error": {"message": "tokens per min (TPM). Please try again in 1m2.5s. See /billing"}},
            {},
            62.5,
            False,
        ),
        (429, {"error": {"message": "Please try again in 120ms."}}, {}, 0.12, False),
        (429, {"error": {"message": "exceeded the token rate limit. Please retry after 26 seconds."}}, {}, 26.0, False),
        (429, {"error": {"message": "You exceeded your current quota of 3 requests per minute"}}, {}, None, False),
        (429, gemini("PerMinute"), {}, 1.5, False),
        (413, {"error": {"message": TPM % 5000, "type": "tokens", "code": "rate_limit_exceeded"}}, {}, None, False),
        (413, {"error": {"message": TPM % 7000, "type": "tokens", "code": "rate_limit_exceeded"}}, {}, None, True),
        (503, {"error": {"message": "busy"}}, {"retry-after": "1"}, 1.0, False),
    ],
)
def test_rate_limits(status, body, headers, wait, too_large):
    error = read_error(status, json.dumps(body), headers)
    assert (error["remedy"], error["wait"], error["too_large"]) == ("limit", wait, too_large)


@pytest.mark.parametrize(
    ("status", "message", "code"),
    [
        (429, "You exceeded your current quota, please check your plan and billing details.", "insufficient_quota"),
        (429, "Insufficient balance, please recharge", "1113"),
        (402, "Payment required", ""),
        (400, "Your credit balance is too low to access the API", "invalid_request_error"),
        (403, "Your team has used all available credits", ""),
    ],
)
def test_credit_is_no_rate_limit(status, message, code):
    assert read_error(status, json.dumps({"error": {"message": message, "code": code}}))["remedy"] == "quota"


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, {"code": "data_inspection_failed", "message": "Input text data may contain inappropriate content."}),
        (400, {"code": "content_filter", "message": "triggering the content management policy"}),
        (400, {"code": 400, "message": "x", "innererror": {"code": "ResponsibleAIPolicyViolation"}}),
        (403, {"code": 403, "message": "Your chosen model requires moderation and your input was flagged"}),
        (403, {"code": 403, "message": "refused", "metadata": {"reasons": ["x"], "flagged_input": "y"}}),
        (400, {"message": "Content Exists Risk"}),
    ],
)
def test_filtered_prompts(status, error):
    assert read_error(status, json.dumps({"error": error}))["remedy"] == "skip"


@pytest.mark.parametrize(
    ("status", "message", "remedy"),
    [
        (400, "litellm.BadRequestError: Invalid model name passed in model=x. Call `/v1/models` for your key", "model"),
        (400, "Authentication Error, No connected db.", "key"),
        (400, "API key not valid. Please pass a valid API key.", "key"),
        (404, "The API deployment for this resource does not exist.", "model"),
        (403, "Project `x` does not have access to model `y`", "model"),
        (403, "Country, region, or territory not supported", "forbidden"),
        (403, None, "forbidden"),
        (404, 'model "x" not found, try pulling it first', "model"),
    ],
)
def test_verdicts_go_by_what_the_server_says(status, message, remedy):
    assert read_error(status, json.dumps({"error": {"message": message}}))["remedy"] == remedy


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("<html>", "HTML page"),
        ("{", "broken JSON"),
        ("[" * 100_000, "broken JSON"),
        ("[]", "no choices"),
        ("null", "no choices"),
        ("{}", "no choices"),
        *(
            (json.dumps({"choices": choices}), "no choices")
            for choices in ([], {}, {"a": 1}, "text", 5, [None], [{}], [[]])
        ),
        ('{"choices": [{"text": null}]}', "null content"),
        ('{"choices": [{"text": "x"}, {"text": 5}]}', "null content"),
    ],
)
def test_an_answer_that_cannot_be_used_is_named_and_kept(text, kind):
    with pytest.raises(BadAnswer) as bad:
        read_answer(text, {"prompt": "x"})
    assert (bad.value.kind, bad.value.raw, bad.value.usage) == (kind, text, None)


def test_what_a_bad_answer_cost_is_known_where_the_server_says_so():
    usage = {"prompt_tokens": 3, "completion_tokens": 0}
    with pytest.raises(BadAnswer) as bad:
        read_answer(json.dumps({"choices": [], "usage": usage}), {"prompt": "x"})
    assert bad.value.usage == usage


def test_tokens_are_estimated_where_the_server_does_not_count():
    answer = read_answer('{"choices": [{"text": "12345678"}]}', {"prompt": "1234"})
    assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": 2} and answer["model"] is None


def chat_answer(message, reason="stop", completion_tokens=10, **body):
    choice = {"message": message, "finish_reason": reason}
    usage = {"prompt_tokens": 1, "completion_tokens": completion_tokens}
    answer = read_answer(json.dumps({"choices": [choice], "usage": usage}), {"messages": [], **body})["choices"][0]
    return answer["text"], answer["finish_reason"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "yes"}], "yes"),
        (
            [{"type": "reasoning", "text": "hm"}, {"type": "output_text", "text": "y"}, {"type": "text", "text": "es"}],
            "yes",
        ),
        ([{"text": "hm", "thought": True}, {"text": "yes"}], "yes"),
        ([{"type": "text", "text": {"value": "yes", "annotations": []}}], "yes"),
        (["y", "es"], "yes"),
        ({"type": "text", "text": "yes"}, "yes"),
        ([{"type": "thinking", "thinking": "hm"}], ""),
        ([], ""),
        ("yes", "yes"),
        ("", ""),
    ],
)
def test_the_text_parts_are_the_answer(content, text):
    for field in ("reasoning_content", "reasoning"):
        assert chat_answer({"content": content, field: "No. 4. Instruction: a draft"}) == (text, "stop")


@pytest.mark.parametrize(
    ("message", "reason", "expected"),
    [
        ({}, "content_filter", ("", "content_filter")),
        ({"content": None, "refusal": "no"}, "stop", ("", "refusal")),
        ({"content": "", "refusal": "no"}, "stop", ("", "refusal")),
        ({"content": None}, "length", ("", "length")),
        ({"content": None, "reasoning_content": "hm"}, "stop", ("", "stop")),
        ({"content": None, "reasoning": "hm"}, None, ("", None)),
        ({"content": "yes", "refusal": None}, "stop", ("yes", "stop")),
    ],
)
def test_an_answer_without_text_is_empty_where_asking_again_is_no_use(message, reason, expected):
    assert chat_answer(message, reason) == expected


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("reason", ["stop", None, "max_tokens", "length"])
def test_an_answer_of_all_tokens_granted_is_cut(reason, limit):
    assert chat_answer({"content": "x"}, reason, 50, **{limit: 50}) == ("x", "length")
    assert chat_answer({"content": "x"}, reason, 49, **{limit: 50}) == ("x", reason)
    assert chat_answer({"content": "x"}, reason, 50) == ("x", reason)


def test_a_filtered_answer_keeps_its_name_at_the_limit():
    assert chat_answer({"content": "x"}, "content_filter", 50, max_tokens=50) == ("x", "content_filter")


@pytest.mark.parametrize(
    "text", ['{"error": {"message": "no  such\\nthing"}}', '{"error": "no such thing"}', '{"detail": "no such thing"}']
)
def test_error_forms(text):
    assert read_error(400, text)["message"] == "no such thing"
    assert read_error(400, "<html>")["message"] == "Bad Request"
