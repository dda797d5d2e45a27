"""The Batch API: the same bytes at half the price, and nothing submitted twice."""

import json
import signal
import time

import pytest
from aiohttp import web

from alpaca.common import ExitCode
from tests.generation.runs import KEY, answers, fails, finish, generate, records, start, wait_for
from tests.teacher.teacher_server import TeacherServer, error


def batched(server, path, **arguments):
    generate(server, path, batch_api=True, poll_seconds=0.01, **arguments)


def submitted(server):
    """How often each request was put into a batch."""
    files = [server.files[batch["input_file_id"]] for batch in server.batches.values()]
    numbers = [json.loads(line)["custom_id"] for file in files for line in file.splitlines()]
    return {number: numbers.count(number) for number in numbers}


@pytest.mark.parametrize("batch_requests", [1000, 3])
def test_same_bytes_as_a_live_run_at_half_the_price(tmp_path, undisturbed, capsys, batch_requests):
    with TeacherServer() as server:
        server.batch_status = lambda batch, polls: "completed" if polls > 2 else "in_progress"
        batched(server, tmp_path, batch_requests=batch_requests, price_in=1.0, price_out=2.0)
        assert not server.bodies and set(submitted(server).values()) == {1}
    assert (tmp_path / "regen.json").read_bytes() == undisturbed
    assert f"cost {len(answers(tmp_path)) * 0.001:.4f}" in capsys.readouterr().out
    line = json.loads(server.files["file-0"].splitlines()[0])
    assert line["custom_id"] == "request-0" and line["method"] == "POST" and line["url"] == "/v1/chat/completions"
    assert line["body"].keys() == {"model", "messages", "max_tokens"}


def test_partial_results_and_expiry_are_asked_for_again(tmp_path, undisturbed):
    with TeacherServer() as server:
        first = {"response": None, "error": {"code": "batch_expired", "message": "expired"}}

        def line(number, body):
            if len(server.batches) > 1:
                return None
            return {1: first, 2: {"response": {"status_code": 500, "body": {"error": {"message": "x"}}}}, 3: {}}.get(
                number
            )

        server.batch_line = line
        server.batch_status = lambda batch, polls: "expired" if batch["id"] == "batch-0" else "completed"
        batched(server, tmp_path)
        assert submitted(server)["request-0"] == 1
        assert [submitted(server)[f"request-{n}"] for n in (1, 2, 3)] == [2, 2, 2]
    assert (tmp_path / "regen.json").read_bytes() == undisturbed
    assert sorted(r["fault"] for r in records(tmp_path) if "fault" in r) == [
        "HTTP 500",
        "batch expired",
        "batch_expired",
    ]


def test_a_request_that_never_succeeds_is_given_up(tmp_path):
    with TeacherServer() as server:
        failing = {"response": {"status_code": 500, "body": {}}}
        server.batch_line = lambda number, body: failing if number == 1 else None
        with fails(ExitCode.BUDGET, "failed 3 times"):
            batched(server, tmp_path, max_attempts=3)
        assert submitted(server)["request-1"] == 3


@pytest.mark.parametrize(
    ("status", "line", "match"),
    [
        ("failed", None, "batch batch-0 failed: queue is full; .*--batch_requests"),
        (
            "completed",
            {"response": {"status_code": 404, "body": {"error": {"code": "model_not_found"}}}},
            "unknown model",
        ),
        ("completed", {"response": {"status_code": 401, "body": {"error": {"message": KEY}}}}, "the key is refused"),
    ],
)
def test_refusals(tmp_path, status, line, match):
    with TeacherServer() as server:
        server.batch_status = lambda batch, polls: (
            batch.update(errors={"data": [{"message": "queue is full"}]}) or status
        )
        server.batch_line = lambda number, body: line
        with fails(ExitCode.API, match):
            batched(server, tmp_path, max_requests=50)
        assert len(server.batches) == 1
        if status == "failed":  # its file was not even accepted: nothing was asked, and nothing counts
            assert not [record for record in records(tmp_path) if "fault" in record]
            server.batch_status, server.batch_line = lambda batch, polls: "completed", lambda number, body: None
            batched(server, tmp_path, max_requests=50)
            assert len(json.loads((tmp_path / "regen.json").read_text())) >= 60


def test_a_field_that_the_model_does_not_take_is_renamed_in_the_next_batch(tmp_path, undisturbed):
    refusal = {"message": "Unsupported parameter: 'max_tokens'", "param": "max_tokens", "code": "unsupported_parameter"}

    def line(number, body):
        return {"response": {"status_code": 400, "body": {"error": refusal}}} if "max_tokens" in body else None

    with TeacherServer() as server:
        server.batch_line = line
        batched(server, tmp_path)
    assert (tmp_path / "regen.json").read_bytes() == undisturbed


def test_limits_hold_in_batches(tmp_path):
    with TeacherServer() as server:
        with fails(ExitCode.BUDGET, "max_requests is used up"):
            batched(server, tmp_path, max_requests=4)
        assert sum(submitted(server).values()) == 4 and len(answers(tmp_path)) == 4


def test_interrupted_while_waiting_and_resumed(tmp_path, undisturbed):
    with TeacherServer() as server:
        server.batch_status = lambda batch, polls: "in_progress"
        process = start(server, tmp_path, "--batch_api", "True", "--poll_seconds", "30")
        wait_for(lambda: server.polls)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert finish(process)[0] == 130 and time.monotonic() - began < 15
        server.batch_status = lambda batch, polls: "completed"
        generate(server, tmp_path)  # the batch is brought home by a live run as well
        assert submitted(server)["request-0"] == 1 and len(server.batches) == 1
    assert (tmp_path / "regen.json").read_bytes() == undisturbed
    live = {record["request"] for record in answers(tmp_path) if not record["batch"]}
    assert not live & {int(name.split("-")[1]) for name in submitted(server)}


def test_killed_between_creating_a_batch_and_remembering_it(tmp_path):
    """The log is cut back to every record in turn, as if the process had been killed there."""
    with TeacherServer(count=16) as server:  # one batch is enough
        batched(server, tmp_path)
        expected = (tmp_path / "regen.json").read_bytes()
        whole = (tmp_path / "requests.jsonl").read_bytes().splitlines(keepends=True)
        batches, uploads = len(server.batches), len(server.files)
        begun = next(i for i, line in enumerate(whole) if b'"batch_id"' in line)  # created and remembered here
        for count in range(begun, len(whole)):
            (tmp_path / "requests.jsonl").write_bytes(b"".join(whole[:count]))
            (tmp_path / "regen.json").unlink()
            batched(server, tmp_path)
            assert (tmp_path / "regen.json").read_bytes() == expected
            assert len({record["request"] for record in answers(tmp_path)}) == len(answers(tmp_path))
        assert len(server.batches) == batches == 1 and len(server.files) == uploads  # none submitted twice


def test_kill_9_during_a_batch(tmp_path, undisturbed):
    with TeacherServer() as server:
        server.batch_status = lambda batch, polls: "completed" if polls > 20 else "in_progress"
        for wait in (0.6, 0.9, 1.2):
            process = start(server, tmp_path, "--batch_api", "True", "--poll_seconds", "0.05")
            time.sleep(wait)
            process.kill()
            process.communicate()
        assert finish(start(server, tmp_path, "--batch_api", "True", "--poll_seconds", "0.05"))[0] == 0
        assert set(submitted(server).values()) == {1}
    assert (tmp_path / "regen.json").read_bytes() == undisturbed


def test_broken_answers_of_the_batch_endpoints_are_asked_for_again(tmp_path, undisturbed):
    server = TeacherServer()
    names = ("upload", "create_batch", "get_batch")
    for name in names:
        good, faults = getattr(server, name), iter(["<html>busy</html>", '{"id": "x', 503])

        async def handle(request, good=good, faults=faults):
            fault = next(faults, None)
            if isinstance(fault, str):
                return web.Response(text=fault, content_type="text/html" if fault[0] == "<" else "application/json")
            return web.Response(status=fault) if fault else await good(request)

        setattr(server, name, handle)
    with server:
        batched(server, tmp_path)
        assert set(submitted(server).values()) == {1}
    assert (tmp_path / "regen.json").read_bytes() == undisturbed


def test_wrong_key(tmp_path):
    asked = []

    async def refuse(request):
        asked.append(request)
        return error(401, f"Incorrect API key provided: {KEY}", "invalid_api_key")

    server = TeacherServer()
    server.upload = refuse
    with server, fails(ExitCode.API, "the key is refused"):
        batched(server, tmp_path)
    assert len(asked) == 1
