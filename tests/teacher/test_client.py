"""The teacher over real sockets: `openai_completion` with 2023's signature and shapes, and retries in whole runs."""

import asyncio
import collections
import email.utils
import inspect
import json
import time

import pytest

from alpaca.common import ExitCode, ExpectedError
from generate_instruction import generate_instruction_following_data
from tests.conftest import ROOT
from tests.generation.runs import FAULTS, KEY, answers, fails, finish, generate, records, start
from tests.teacher.teacher_server import TeacherServer, error
from utils import OpenAIDecodingArguments, openai_completion

GREEDY = OpenAIDecodingArguments(max_tokens=600)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")
    with TeacherServer(answer=lambda prompt: f"<{prompt}>") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        yield server


def test_signature_and_defaults_of_2023():
    names = list(inspect.signature(openai_completion).parameters)
    assert names[:8] == [
        *("prompts", "decoding_args", "model_name", "sleep_time"),
        *("batch_size", "max_instances", "max_batches", "return_text"),
    ]
    assert vars(OpenAIDecodingArguments()) == {
        **{"max_tokens": 1800, "temperature": 0.2, "top_p": 1.0, "n": 1, "stream": False, "stop": None},
        **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "suffix": None, "logprobs": None, "echo": False},
    }


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_shapes(server, api):
    one = openai_completion("a", GREEDY, api=api)
    assert one.text == one["text"] == "<a>"
    assert one.finish_reason == one["finish_reason"] == "stop" and one.total_tokens == one["total_tokens"] == 1500
    many = openai_completion(["a", "b", "c"], GREEDY, api=api, batch_size=2)
    assert [choice.text for choice in many] == ["<a>", "<b>", "<c>"]
    assert openai_completion(["a"], GREEDY, api=api, return_text=True) == ["<a>"]
    assert openai_completion("a", GREEDY, api=api, return_text=True) == "<a>"
    assert openai_completion([], GREEDY, api=api) == []
    three = OpenAIDecodingArguments(n=3)
    nested = openai_completion(["a", "b"], three, api=api, return_text=True)
    assert nested == [["<a>"] * 3, ["<b>"] * 3]
    assert [choice.index for choice in openai_completion("a", three, api=api)] == [0, 1, 2]
    with pytest.raises(KeyError):
        _ = one.no_such_field


def test_chat_messages(server):
    message = {"role": "user", "content": "hello"}
    assert openai_completion(message, GREEDY).text == "<hello>"
    assert openai_completion([message, message], GREEDY, return_text=True) == ["<hello>"] * 2
    assert server.bodies[0]["messages"] == [message]
    with pytest.raises(ExpectedError, match="api=chat"):
        openai_completion(message, GREEDY, api="completions")


def test_a_server_that_ignores_n_is_asked_again(server):
    server.payload = lambda body, chat, payload=server.payload: payload({**body, "n": 1}, chat)
    assert openai_completion("a", OpenAIDecodingArguments(n=3), return_text=True) == ["<a>"] * 3
    assert len(server.bodies) == 3


def test_only_what_differs_from_the_api_s_defaults_is_sent(server):
    openai_completion("a", GREEDY)
    assert server.bodies[-1].keys() == {"model", "messages", "max_tokens", "temperature", "stream"}
    arguments = OpenAIDecodingArguments(stop=("x",), echo=True, logprobs=2, suffix="end", stream=True)
    openai_completion("a", arguments, api="completions", logit_bias={"50256": -100})
    extra = {"stop": ["x"], "echo": True, "logprobs": 2, "suffix": "end", "logit_bias": {"50256": -100}}
    assert extra.items() <= server.bodies[-1].items() and server.bodies[-1]["stream"] is False
    with pytest.raises(ExpectedError, match="legacy API only"):
        openai_completion("a", OpenAIDecodingArguments(suffix="end"))
    openai_completion("a", OpenAIDecodingArguments(logprobs=2))
    assert server.bodies[-1]["logprobs"] is True and server.bodies[-1]["top_logprobs"] == 2


def test_a_field_that_the_server_does_not_take_is_left_out(server):
    def fault(server, body, attempt):
        return error(400, "Unrecognized request argument supplied: logit_bias") if "logit_bias" in body else None

    server.fault = fault
    assert openai_completion("a", GREEDY, logit_bias={"1": 5}).text == "<a>"
    assert len(server.bodies) == 2


def test_limits_on_instances_and_batches(server):
    prompts = list("abcdefgh")
    assert len(openai_completion(prompts, GREEDY, max_instances=3)) == 3
    assert len(openai_completion(prompts, GREEDY, batch_size=2, max_batches=2)) == 4
    assert len(server.bodies) == 7


def test_batch_size_prompts_at_a_time_in_order(server):
    server.delay = 0.05
    prompts = [str(i) for i in range(12)]
    assert openai_completion(prompts, GREEDY, batch_size=4, return_text=True) == [f"<{prompt}>" for prompt in prompts]
    assert server.most_in_flight == 4


def test_retries_and_refusals(server):
    server.fault = lambda server, body, attempt: error(503, "busy") if attempt < 3 else None
    assert openai_completion("a", GREEDY, sleep_time=0.01).text == "<a>"
    assert len(server.bodies) == 3
    server.fault = lambda *_: error(401, "bad key", "invalid_api_key")
    with pytest.raises(ExpectedError) as refused:  # 2023 tried for ever
        openai_completion("b", GREEDY)
    assert refused.value.exit_code == ExitCode.API and len(server.bodies) == 4
    server.fault = lambda *_: error(500, "down")
    with pytest.raises(ExpectedError) as failed:
        openai_completion("c", GREEDY, sleep_time=0.01, max_attempts=2)
    assert failed.value.exit_code == ExitCode.BUDGET and len(server.bodies) == 6


def test_inside_a_running_event_loop(server):
    async def notebook():
        return openai_completion("a", GREEDY, return_text=True)

    assert asyncio.run(notebook()) == "<a>"


# ------------------------------------------------------------------------------------------------ retries in whole runs


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != 429])
def test_each_fault_is_retried_counted_and_kept_for_inspection(tmp_path, undisturbed, fault):
    def once(server, body, attempt):
        if attempt > 1:
            return None
        return error(fault, "busy") if isinstance(fault, int) else fault

    with TeacherServer(fault=once) as server:
        generate(server, tmp_path, concurrency=8)
    assert (tmp_path / "regen.json").read_bytes() == undisturbed
    faults = [record for record in records(tmp_path) if "fault" in record]
    kind = f"HTTP {fault}" if isinstance(fault, int) else fault
    assert collections.Counter(record["fault"] for record in faults) == {kind: server.faults[kind]}
    assert len(faults) == len(answers(tmp_path)) or server.attempts.total() - len(faults) == len(answers(tmp_path))
    if fault in ("broken JSON", "connection cut", "HTML page"):
        assert all(len(record["raw"]) > 20 for record in faults)
        assert all(record["raw"].startswith("<html>" if fault == "HTML page" else '{"id": "c"') for record in faults)


@pytest.mark.parametrize("form", ["seconds", "milliseconds", "date"])
def test_retry_after_is_obeyed(tmp_path, form):
    def busy(server, body, attempt):
        if attempt > 1:
            return None
        date = email.utils.formatdate(time.time() + 2, usegmt=True)
        headers = {
            "seconds": {"Retry_After": "1"},
            "milliseconds": {"Retry_After_Ms": "900"},
            "date": {"Retry_After": date},
        }
        return error(429, "slow down", "rate_limit_exceeded", **headers[form])

    with TeacherServer(fault=busy) as server:
        generate(server, tmp_path, num_instructions_to_generate=1)
    assert len(server.times) == 2
    assert 0.85 <= server.times[1] - server.times[0] < 10


def test_attempts_are_bounded_and_the_next_run_goes_on(tmp_path, undisturbed):
    number = collections.Counter()

    def down_after_three(server, body, attempt):
        number["asked"] += 1
        return error(503, "overloaded") if number["asked"] > 3 else None

    with TeacherServer(fault=down_after_three) as server:
        with fails(ExitCode.BUDGET, "4 attempts at one request .* failed, the last with: HTTP 503; .* saved"):
            generate(server, tmp_path, concurrency=1, max_attempts=4)
        assert len(server.bodies) == 7 and len(answers(tmp_path)) == 3
        assert len(json.loads((tmp_path / "regen.json").read_text())) > 10
        server.fault = lambda *_: None
        generate(server, tmp_path, concurrency=4)
        assert max(server.answered.values()) == 1
    assert (tmp_path / "regen.json").read_bytes() == undisturbed


def test_backoff_grows_and_varies(tmp_path):
    with TeacherServer(fault=lambda server, body, attempt: error(500, "oops") if attempt < 6 else None) as server:
        generate(server, tmp_path, num_instructions_to_generate=1, sleep_time=0.1)
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    for retry, gap in enumerate(gaps):
        assert 0.05 * 2**retry <= gap < 0.1 * 2**retry + 2
    assert len({round(gap / 2**retry, 3) for retry, gap in enumerate(gaps)}) > 1


@pytest.mark.parametrize(
    ("response", "match"),
    [
        (error(401, f"Incorrect API key provided: {KEY}", "invalid_api_key"), "key is refused.*OPENAI_API_KEY"),
        (error(429, "You exceeded your current quota", "insufficient_quota"), "no quota left.*add credit"),
        (error(402, "Payment required"), "no quota left"),
        (
            error(404, "The model `text-davinci-003` has been deprecated", "model_not_found"),
            r"unknown model text-davinci-003 .*--model_name gpt-5.4-mini, or one .* this key can use: model-a, model-b",
        ),
        (error(400, "stop is malformed"), "request is refused.*stop is malformed.*--base_url"),
        (error(403, "Country not supported"), "lets us not in .*Country not supported.*place or network"),
        (error(403, "Your key has no permission"), "lets us not in"),
        (error(403, "Invalid API key"), "key is refused"),
        (error(400, "Authentication Error, No connected db.", "400"), "key is refused"),
        (error(400, "Invalid model name passed in model=x. Call `/v1/models` for your key."), "unknown model"),
        (error(413, "Request Entity Too Large"), "too large for the server.*--num_prompt_instructions"),
        (error(404, "Resource not found"), "nothing answers at this address.*--base_url"),
        (error(400, "`temperature` and `top_p` cannot both be specified"), "leave out --temperature or --top_p"),
    ],
)
def test_what_asking_again_cannot_help_ends_after_one_request(tmp_path, response, match):
    with TeacherServer(fault=lambda *_: error_copy(response)) as server:
        with fails(ExitCode.API, match):
            generate(server, tmp_path, concurrency=32, model_name="text-davinci-003")
        assert len(server.bodies) == 1


def error_copy(response):
    return type(response)(body=response.body, status=response.status, content_type="application/json")


def test_wrong_key_on_the_command_line(tmp_path):
    with TeacherServer(expected_key="another") as server:
        code, out, err = finish(start(server, tmp_path, "--concurrency", "16"))
    assert code == 4 and len(server.bodies) == 1
    assert err.strip().splitlines()[-1].startswith("error: the key is refused") and "Traceback" not in err
    assert KEY not in out + err


def test_no_key_for_openai(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with fails(ExitCode.API, "OPENAI_API_KEY"):
        generate_instruction_following_data(str(tmp_path), str(ROOT / "seed_tasks.jsonl"))
    with TeacherServer() as server:  # one's own server needs none
        generate(server, tmp_path, num_instructions_to_generate=1)


def test_context_too_long_shortens_the_answer(tmp_path):
    def fault(server, body, attempt):
        message = "This model's maximum context length is 2048 tokens. However, you requested 4000 tokens."
        return error(400, message, "context_length_exceeded") if body["max_tokens"] > 1000 else None

    with TeacherServer(fault=fault) as server:
        generate(server, tmp_path, num_instructions_to_generate=1)
    assert [body["max_tokens"] for body in server.bodies] == [3072, 2457, 1965, 1572, 1257, 1005, 804]
    assert {record["fault"] for record in records(tmp_path) if "fault" in record} == {"context too long"}
    with TeacherServer(fault=lambda *_: error(400, "maximum context length", "context_length_exceeded")) as server:
        with fails(ExitCode.API, "does not fit the context"):
            generate(server, tmp_path / "never")
        assert len(server.bodies) < 25


def test_fields_that_the_server_does_not_take_are_left_out(tmp_path, capsys):
    def fault(server, body, attempt):
        if "max_tokens" in body:
            message = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
            return error(400, message, "unsupported_parameter", "max_tokens")
        if "top_p" in body:
            return error(422, "Unexpected fields in the request: {'top_p'}")

    with TeacherServer(fault=fault) as server:
        generate(server, tmp_path, concurrency=8, temperature=1.0, top_p=1.0)
    assert len(server.bodies) - len(answers(tmp_path)) == 2  # learnt once for the run
    assert {"max_completion_tokens", "temperature"} <= server.bodies[-1].keys()
    err = capsys.readouterr().err
    assert "does not take max_tokens: sent as max_completion_tokens" in err and "does not take top_p: left out" in err


def test_a_filtered_prompt_is_an_empty_answer(tmp_path):
    def fault(server, body, attempt):
        return error(400, "The prompt was filtered", "content_filter") if len(server.bodies) == 2 else None

    with TeacherServer(fault=fault) as server:
        generate(server, tmp_path, concurrency=1)
    assert [record["finish_reason"] for record in answers(tmp_path)].count("content_filter") == 1


def test_hanging_server_runs_into_the_timeout(tmp_path):
    with TeacherServer(delay=lambda: 30 if not len(server.bodies) > 1 else 0) as server:
        generate(server, tmp_path, num_instructions_to_generate=1, timeout=0.3)
    assert [record["fault"] for record in records(tmp_path) if "fault" in record] == ["timeout"]
