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
    assert remedy_for(404, "", "not found") == "request"
    assert remedy_for(403, "model_not_found", "project has no access to model x") == "model"
    assert (
        remedy_for(429, "rate_limit_exceeded", "rate limit reached")
        == remedy_for(529, "", "")
        == remedy_for(408, "", "")
        == "retry"
    )
    assert remedy_for(400, "exceed_context_size_error", "the request exceeds the available context size") == "shorten"
    assert remedy_for(413, "", "input is too long") == "shorten"


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
