"""`utils.openai_completion`: 2023's signature and return shapes on the current client, over real sockets."""

import asyncio
import inspect

import pytest

from alpaca.common import ExitCode, ExpectedError
from tests.teacher.teacher_server import TeacherServer, error
from utils import OpenAIDecodingArguments, openai_completion

GREEDY = OpenAIDecodingArguments(max_tokens=50)


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
    assert server.bodies[-1].keys() == {"model", "messages", "max_tokens", "temperature", "top_p"}
    arguments = OpenAIDecodingArguments(stop=("x",), echo=True, logprobs=2, suffix="end", stream=True)
    openai_completion("a", arguments, api="completions", logit_bias={"50256": -100})
    extra = {"stop": ["x"], "echo": True, "logprobs": 2, "suffix": "end", "logit_bias": {"50256": -100}}
    assert extra.items() <= server.bodies[-1].items() and "stream" not in server.bodies[-1]
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
