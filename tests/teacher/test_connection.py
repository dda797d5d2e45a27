"""How a server is reached: keys, Azure's addresses, proxies, and from where one may call."""

import asyncio
import json
import socket
import sys
import threading

import pytest
from aiohttp import web

from alpaca.common import ExitCode
from alpaca.teacher.client import Teacher
from alpaca.teacher.connection import Connection
from tests.generation.runs import KEY, answers, fails, finish, generate, start
from tests.teacher.teacher_server import TeacherServer, answer_text, error, tasks_for


def azure(server, version="2024-10-21"):
    """The scripted server at the address of an Azure deployment, where the key is in a header of its own."""
    plain, seen = server.completions, []

    async def completions(request):
        seen.append(request)
        if request.query.get("api-version") != version or request.headers.get("api-key") != KEY:
            return error(401, "Access denied due to invalid subscription key or wrong API endpoint.", "401")
        if "Authorization" in request.headers:
            return error(401, "IDX10720: no bearer token here")
        return await plain(request)

    server.extra_routes = [("/openai/deployments/my-deployment/chat/completions", completions)]
    return seen


@pytest.mark.parametrize("tail", ["", "/", "/chat/completions"])
def test_an_azure_deployment(tmp_path, undisturbed, tail):
    server = TeacherServer()
    azure(server)
    with server:
        base = server.url.removesuffix("/v1") + "/openai/deployments/my-deployment"
        generate(server, tmp_path, base_url=f"{base}{tail}?api-version=2024-10-21", concurrency=4)
    assert (tmp_path / "regen.json").read_bytes() == undisturbed


def test_an_azure_deployment_without_its_version(tmp_path, monkeypatch):
    server = TeacherServer()
    azure(server, "2025-01-01")
    with server:
        base = server.url.removesuffix("/v1") + "/openai/deployments/my-deployment"
        with fails(ExitCode.USAGE, "add .api-version=.*openai/v1"):
            generate(server, tmp_path, base_url=base)
        monkeypatch.setenv("OPENAI_API_VERSION", "2025-01-01")
        generate(server, tmp_path, base_url=base, num_instructions_to_generate=1)


@pytest.mark.parametrize("key", ["test", "EMPTY", "none", "ollama", "token-abc123"])
def test_keys_that_are_no_secrets_stay_in_the_answers(tmp_path, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with TeacherServer(answer=lambda prompt: answer_text(tasks_for(prompt)) + f" {key}") as server:
        generate(server, tmp_path, num_instructions_to_generate=12)
    assert all(record["answer"].endswith(f" {key}") for record in answers(tmp_path))
    assert "[key]" not in (tmp_path / "regen.json").read_text()


@pytest.mark.parametrize(
    ("key", "named"), [("sk—proj-abcdefghijkl", r"— \(U\+2014\) at place 3"), ("sk-a\u200bb", r"U\+200B at place 5")]
)
def test_a_key_with_a_character_that_no_key_has(monkeypatch, key, named):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with fails(ExitCode.API, f"OPENAI_API_KEY has the character {named}"):
        Teacher(base_url="http://127.0.0.1:1/v1")


@pytest.mark.parametrize("proxy", ["socks5://user:pass@127.0.0.1:7890", "socks://127.0.0.1:7890", "gopher://x:1"])
def test_a_proxy_that_can_t_be_used(monkeypatch, proxy):
    if proxy.startswith("socks5:"):
        monkeypatch.setitem(sys.modules, "socksio", None)  # as where it is not installed
    monkeypatch.setenv("ALL_PROXY", proxy)
    with fails(ExitCode.USAGE, "proxy.*ALL_PROXY=.*socksio.*NO_PROXY=127.0.0.1") as info:
        Teacher(base_url="http://127.0.0.1:1/v1")
    assert "pass" not in str(info.value)


def test_a_proxy_in_the_way_of_a_server_on_this_machine_is_named(tmp_path, monkeypatch, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        proxy = f"http://user:secret@127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with TeacherServer() as server:
        with fails(ExitCode.BUDGET, "asked through the proxy http://127.0.0.1:.*NO_PROXY=127.0.0.1"):
            generate(server, tmp_path, max_attempts=2)
        assert not server.bodies
        assert "on this machine, and is asked through the proxy http://127.0.0.1" in capsys.readouterr().err
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        generate(server, tmp_path, num_instructions_to_generate=1)
    assert Connection("http://127.0.0.1:1/v1", 1.0).way_around_proxy() == ""


def test_a_server_that_streams_all_the_same_is_named(tmp_path):
    text = 'data: {"choices":[{"delta":{"content":"x"}}]}\n\ndata: [DONE]\n\n'

    def fault(server, body, attempt):
        assert body["stream"] is False
        return web.Response(text=text, content_type="text/event-stream")

    with TeacherServer(fault=fault) as server:
        with fails(ExitCode.API, "streams its answers.*server-sent events"):
            generate(server, tmp_path)
        assert len(server.bodies) == 1


def test_temperature_and_top_p_are_sent_only_where_asked_for(tmp_path):
    def only_one(server, body, attempt):
        if {"temperature", "top_p"} <= body.keys():
            return error(400, "`temperature` and `top_p` cannot both be specified for this model.", "400")

    with TeacherServer(fault=only_one) as server:
        generate(server, tmp_path / "none", num_instructions_to_generate=1)
        generate(server, tmp_path / "one", num_instructions_to_generate=1, temperature=1.0)
        generate(server, tmp_path / "other", num_instructions_to_generate=1, top_p=1.0)
        assert [{"temperature", "top_p"} & body.keys() for body in server.bodies] == [set(), {"temperature"}, {"top_p"}]
        with fails(ExitCode.API, "leave out --temperature or --top_p"):
            generate(server, tmp_path / "both", temperature=0.7, top_p=0.9)


def test_extra_body_reaches_the_server(tmp_path):
    with TeacherServer() as server:
        process = start(server, tmp_path, "--extra_body", '{"reasoning_effort": "low", "top_k": 5}', target=1)
        assert finish(process)[0] == 0
        assert server.bodies[0]["reasoning_effort"] == "low" and server.bodies[0]["top_k"] == 5
        for wrong, match in (("{", "give JSON"), ("[1]", "JSON object"), ('{"max_tokens": 1}', "use --max_tokens")):
            with fails(ExitCode.USAGE, match):
                generate(server, tmp_path, extra_body=wrong)
        assert json.loads((tmp_path / "requests.jsonl").read_text().splitlines()[1])["settings"]["extra_body"]


def test_from_a_notebook_and_from_a_thread(tmp_path, undisturbed):
    with TeacherServer() as server:

        async def notebook():
            generate(server, tmp_path / "notebook", concurrency=4)

        asyncio.run(notebook())
        thread = threading.Thread(target=generate, args=(server, tmp_path / "thread"))
        thread.start()
        thread.join(60)
    for name in ("notebook", "thread"):
        assert (tmp_path / name / "regen.json").read_bytes() == undisturbed
