"""Whole runs against a scripted server on loopback: retries, limits, interruptions, and that nothing is lost."""

import collections
import contextlib
import email.utils
import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alpaca.common import ExitCode, ExpectedError
from alpaca.generation.self_instruct import encode_prompt, read_seed_tasks, sample_seed_tasks
from alpaca.teacher.replies import remedy_for as judge, retry_after_seconds
from generate_instruction import export, generate_instruction_following_data, replay
from tests.teacher.teacher_server import TeacherServer, answer_text, error, tasks_for

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-planted-0123456789abcdef"
FAULTS = ["broken JSON", "HTML page", "no choices", "null content", "connection cut", "no connection", 429, 500, 503]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def generate(server, path, **arguments):
    """A run in this process, with short waits."""
    arguments = {"num_instructions_to_generate": 60, "sleep_time": 0.01, "num_cpus": 2, **arguments}
    generate_instruction_following_data(
        output_dir=str(path), seed_tasks_path=str(ROOT / "seed_tasks.jsonl"), base_url=server.url, **arguments
    )


def command(server, path, *flags, target=60):
    return [
        *(sys.executable, "-m", "generate_instruction", "generate_instruction_following_data"),
        *("--output_dir", str(path), "--base_url", server.url, "--num_instructions_to_generate", str(target)),
        *("--sleep_time", "0.01", "--num_cpus", "2", *flags),
    ]


def start(server, path, *flags, **options):
    return subprocess.Popen(
        command(server, path, *flags, **options), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process, timeout=120):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def records(path):
    return [json.loads(line) for line in (path / "requests.jsonl").read_text().splitlines()]


def answers(path):
    return [record for record in records(path) if "answer" in record]


def fails(exit_code, match=None):
    @contextlib.contextmanager
    def context():
        with pytest.raises(ExpectedError, match=match) as info:
            yield info
        assert info.value.exit_code == exit_code
        assert "\n" not in str(info.value) and KEY not in str(info.value)

    return context()


def random_faults(share, seed=0):
    """Each attempt of each prompt fails with probability `share`, in a way that depends on prompt and attempt only."""

    def fault(server, body, attempt):
        rng = random.Random(f"{seed} {attempt} {body['messages'][0]['content'][-300:]}")
        if attempt > 8 or rng.random() >= share:
            return None
        way = rng.choice(FAULTS)
        return error(way, "try again", Retry_After="0.01") if isinstance(way, int) else way

    return fault


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """regen.json of a run with one request at a time and no fault."""
    os.environ["OPENAI_API_KEY"] = KEY
    path = tmp_path_factory.mktemp("undisturbed")
    with TeacherServer() as server:
        generate(server, path, concurrency=1)
    return (path / "regen.json").read_bytes()


def test_output_is_what_the_teacher_wrote(tmp_path):
    with TeacherServer() as server:
        generate(server, tmp_path, model_name="some-model")
    entries = json.loads((tmp_path / "regen.json").read_text())
    assert 60 <= len(entries) < 66  # the last answer is taken whole
    written = [task for body in server.bodies for task in tasks_for(body["messages"][0]["content"])]
    for entry in entries:
        assert {part: entry[part] for part in ("instruction", "input", "output")} in written
        assert len(entry["most_similar_instructions"]) == 10 and 0 <= entry["avg_similarity_score"] < 0.7
    assert (tmp_path / "regen.json").read_text() == json.dumps(entries, indent=4)  # as 2023's jdump lays it out
    assert server.bodies[0] == {
        **{"model": "some-model", "messages": server.bodies[0]["messages"]},
        **{"max_tokens": 3072, "temperature": 1.0, "top_p": 1.0},
    }  # no n, no logit_bias, no stop
    seeds = {task["id"] for task in read_seed_tasks(str(ROOT / "seed_tasks.jsonl"), 3)}
    for record in answers(tmp_path):
        assert len(record["seeds"]) == 3 and seeds.issuperset(record["seeds"])
        assert record["usage"] == {"prompt_tokens": 1000, "completion_tokens": 500} and record["model"] == "some-model"
        assert record["finish_reason"] == "stop" and len(record["checksum"]) == 16


@pytest.mark.parametrize("concurrency", [1, 4, 32])
def test_same_bytes_whatever_the_concurrency_and_the_faults(tmp_path, undisturbed, concurrency):
    delays = random.Random(concurrency)
    with TeacherServer(fault=random_faults(0.3), delay=lambda: delays.uniform(0, 0.03)) as server:
        generate(server, tmp_path, concurrency=concurrency)
    assert (tmp_path / "regen.json").read_bytes() == undisturbed
    assert server.most_in_flight <= concurrency
    assert max(server.answered.values()) == 1
    assert len(server.bodies) == len(answers(tmp_path)) + sum("fault" in record for record in records(tmp_path))


def test_stops_asking_once_enough_are_on_the_way(tmp_path):
    with TeacherServer(delay=0.05, count=16) as server:
        generate(server, tmp_path, num_instructions_to_generate=100, concurrency=32)
    assert len(server.bodies) <= 100 / 12 + 3
    (tmp_path / "one").mkdir()
    with TeacherServer(count=16) as server:
        generate(server, tmp_path / "one", num_instructions_to_generate=1, concurrency=32)
    assert len(server.bodies) == 1


def test_request_batch_size_is_the_number_in_flight(tmp_path):
    with TeacherServer(delay=0.05) as server:
        generate(server, tmp_path, request_batch_size=3)
    assert server.most_in_flight == 3


def test_a_larger_target_goes_on_and_a_smaller_one_asks_nothing(tmp_path):
    with TeacherServer() as server:
        generate(server, tmp_path, num_instructions_to_generate=30)
        generate(server, tmp_path, num_instructions_to_generate=90, concurrency=7)
        asked = len(server.bodies)
        generate(server, tmp_path / "direct", num_instructions_to_generate=90, concurrency=1)
        assert (tmp_path / "regen.json").read_bytes() == (tmp_path / "direct" / "regen.json").read_bytes()
        asked = len(server.bodies)
        generate(server, tmp_path, num_instructions_to_generate=30)
        assert len(server.bodies) == asked and max(server.answered.values()) == 2  # once in each directory
    assert len(json.loads((tmp_path / "regen.json").read_text())) < 36


# ------------------------------------------------------------------------------------------------------ retries, errors


@pytest.mark.parametrize("fault", FAULTS)
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
        (error(403, "Country not supported"), "key is refused"),
    ],
)
def test_what_asking_again_cannot_help_ends_after_one_request(tmp_path, response, match):
    with TeacherServer(fault=lambda *_: error_copy(response)) as server:
        with fails(ExitCode.API, match):
            generate(server, tmp_path, concurrency=32, model_name="text-davinci-003")
        assert time.monotonic() - server.times[0] < 2
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
        generate(server, tmp_path, concurrency=8)
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


def test_judgements():
    assert judge(404, "", "the model `x` does not exist.") == "model"
    assert judge(404, "", "not found") == "request"
    assert judge(403, "model_not_found", "project has no access to model x") == "model"
    assert (
        judge(429, "rate_limit_exceeded", "rate limit reached") == judge(529, "", "") == judge(408, "", "") == "retry"
    )
    assert judge(400, "exceed_context_size_error", "the request exceeds the available context size") == "shorten"
    assert judge(413, "", "input is too long") == "shorten"


def test_hanging_server_runs_into_the_timeout(tmp_path):
    with TeacherServer(delay=lambda: 30 if not len(server.bodies) > 1 else 0) as server:
        generate(server, tmp_path, num_instructions_to_generate=1, timeout=0.3)
    assert [record["fault"] for record in records(tmp_path) if "fault" in record] == ["timeout"]


def test_a_teacher_that_gives_nothing_new_is_not_paid_for_ever(tmp_path):
    with TeacherServer(answer=lambda prompt: answer_text(tasks_for("always the same"))) as server:
        with fails(ExitCode.BUDGET, "gave nothing new"):
            generate(server, tmp_path, concurrency=4)
        assert 100 < len(server.bodies) < 110


# --------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("limit", "most"),
    [
        ({"max_requests": 7}, 7),
        ({"max_tokens_total": 20_000}, 20_000 / 1500),
        # 1000 prompt and 500 answer tokens: 0.002 a request
        ({"max_cost": 0.021, "price_in": 1.0, "price_out": 2.0}, 10.5),
    ],
)
def test_limits_are_never_exceeded_and_the_run_goes_on_when_raised(tmp_path, undisturbed, limit, most):
    with TeacherServer(delay=0.01, fault=random_faults(0.2)) as server:
        with fails(ExitCode.BUDGET, f"--{next(iter(limit))} is used up; everything so far is saved"):
            generate(server, tmp_path, concurrency=8, **limit)
        paid = len(server.bodies) if "max_requests" in limit else server.answered.total()
        assert most * 0.6 < paid <= most
        assert len(answers(tmp_path)) == server.answered.total()
        before = len(server.bodies)
        with fails(ExitCode.BUDGET, "is used up"):  # limits are for the directory, not for each start
            generate(server, tmp_path, concurrency=8, **limit)
        assert len(server.bodies) <= before + 2
        generate(server, tmp_path, concurrency=8)
        assert max(server.answered.values()) == 1
    assert (tmp_path / "regen.json").read_bytes() == undisturbed


def test_summary_counts_right(tmp_path, capsys):
    with TeacherServer(fault=random_faults(0.3)) as server:
        generate(server, tmp_path, concurrency=4, price_in=1.0, price_out=2.0)
    out = capsys.readouterr().out
    assert f"{len(server.bodies)} requests" in out
    for kind, count in server.faults.items():
        assert f"{kind} {count}" in out
    used = answers(tmp_path)
    paid_for_nothing = server.faults["null content"] * 1000
    assert f"{len(used) * 1500 + paid_for_nothing} tokens" in out
    assert f"cost {len(used) * 0.002 + paid_for_nothing * 1e-6:.4f}" in out
    rejected = collections.Counter()
    kept = {entry["instruction"] for entry in json.loads((tmp_path / "regen.json").read_text())}
    for record in sorted(used, key=lambda record: record["request"]):
        prompt = next(p for p in server.answered if answer_text(tasks_for(p)) == record["answer"])
        for task in tasks_for(prompt):
            if "diagram" in task["instruction"]:
                rejected["blacklisted word"] += 1
    assert f"blacklisted word {rejected['blacklisted word']}" in out and f"{len(kept)} of 60 instructions" in out


# -------------------------------------------------------------------------------------------------------- nothing lost


def test_files_are_private_and_the_key_is_nowhere(tmp_path, capfd):
    def leaky(server, body, attempt):
        if attempt == 1:
            return error(500, f"cannot forward with Authorization: Bearer {KEY}")
        return "broken JSON" if attempt == 2 else None

    with TeacherServer(fault=leaky, answer=lambda prompt: answer_text(tasks_for(prompt)) + f" {KEY}") as server:
        generate(server, tmp_path, max_attempts=3)
        with fails(ExitCode.BUDGET):
            server.fault = lambda *_: error(500, KEY)
            generate(server, tmp_path, num_instructions_to_generate=100, max_attempts=1)
    assert stat.S_IMODE((tmp_path / "requests.jsonl").stat().st_mode) == 0o600
    replay(str(tmp_path))
    export(str(tmp_path), str(tmp_path / "alpaca_data.json"))
    for file in tmp_path.iterdir():
        assert KEY.encode() not in file.read_bytes(), file
    assert KEY not in "".join(capfd.readouterr())


def test_replay_and_export(tmp_path, undisturbed, capsys):
    with TeacherServer(delay=0.005) as server:
        generate(server, tmp_path, concurrency=8)
        asked = len(server.bodies)
        (tmp_path / "regen.json").unlink()
        replay(str(tmp_path))
        assert (tmp_path / "regen.json").read_bytes() == undisturbed
        replay(str(tmp_path), max_similarity=1.0, blacklist=(), num_instructions_to_generate=10_000)
        relaxed = json.loads((tmp_path / "regen.json").read_text())
        assert len(relaxed) == 6 * len(answers(tmp_path))  # everything that the teacher wrote
        replay(str(tmp_path), max_similarity=0.05, blacklist="to,ba1", min_words=8)
        strict = json.loads((tmp_path / "regen.json").read_text())
        assert 0 < len(strict) < 40 and all(len(entry["instruction"].split()) >= 8 for entry in strict)
        replay(str(tmp_path))
        assert len(server.bodies) == asked
    export(str(tmp_path), path=str(tmp_path / "alpaca_data.json"))
    examples = json.loads((tmp_path / "alpaca_data.json").read_text())
    kept = json.loads(undisturbed)
    assert examples == [{part: entry[part] for part in ("instruction", "input", "output")} for entry in kept]
    with fails(ExitCode.USAGE, "no requests.jsonl"):
        replay(str(tmp_path / "nowhere"))
    with fails(ExitCode.USAGE, r"no .*regen.json"):
        export(str(tmp_path / "nowhere"))


def test_answers_behind_a_gap_wait_or_are_used_if_asked(tmp_path):
    def third_fails(server, body, attempt):
        return error(500, "no") if list(server.attempts).index(body["messages"][0]["content"]) == 2 else None

    with TeacherServer(fault=third_fails, delay=0.01) as server:
        with fails(ExitCode.BUDGET):
            generate(server, tmp_path, concurrency=6, max_attempts=4, sleep_time=0.1)
    missing = {record["request"] for record in records(tmp_path) if "fault" in record}
    assert len(missing) == 1 and len(answers(tmp_path)) > min(missing)
    before = len(json.loads((tmp_path / "regen.json").read_text()))
    replay(str(tmp_path), skip_missing=True)
    assert len(json.loads((tmp_path / "regen.json").read_text())) > before
    with (
        TeacherServer() as server
    ):  # a target that the waiting answers alone could meet: the gap is filled all the same
        generate(server, tmp_path, num_instructions_to_generate=before + 1)
        assert len(server.bodies) == 1
        generate(server, tmp_path / "direct", num_instructions_to_generate=before + 1, concurrency=1)
    assert (tmp_path / "regen.json").read_bytes() == (tmp_path / "direct" / "regen.json").read_bytes()


def test_a_failure_after_the_target_is_reached_is_none(tmp_path, undisturbed):
    """The last requests may be more than needed; whether they succeed does not matter then."""
    with TeacherServer(delay=lambda: 0.02 * len(server.bodies)) as server:
        server.fault = lambda server, body, attempt: error(500, "late") if len(server.bodies) > 14 else None
        generate(server, tmp_path, concurrency=32, max_attempts=1)
    assert (tmp_path / "regen.json").read_bytes() == undisturbed


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".regen.json.abc.tmp").write_text("[")
    with TeacherServer() as server:
        generate(server, tmp_path, num_instructions_to_generate=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "regen.json", "requests.jsonl"]


def test_regen_of_the_2023_script_counts_as_kept(tmp_path, undisturbed):
    old = json.loads(undisturbed)[:20]
    for entry in old:
        entry["avg_similarity_score"] = 0.123
    (tmp_path / "regen.json").write_text(json.dumps(old))
    with TeacherServer() as server:
        generate(server, tmp_path)
        entries = json.loads((tmp_path / "regen.json").read_text())
        assert entries[:20] == old and 60 <= len(entries) < 66
        assert len({entry["instruction"] for entry in entries}) == len(entries)
        (tmp_path / "regen.json").unlink()  # it is in the log now
        replay(str(tmp_path))
        assert json.loads((tmp_path / "regen.json").read_text()) == entries
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "regen.json").write_text('[{"instruction": "x"}]')
        with fails(ExitCode.DATA, "regen.json"):
            generate(server, tmp_path / "broken")
        assert (tmp_path / "broken" / "regen.json").read_text() == '[{"instruction": "x"}]'


def test_another_seed_or_other_seed_tasks_need_another_directory(tmp_path):
    with TeacherServer() as server:
        generate(server, tmp_path, num_instructions_to_generate=5)
        asked = len(server.bodies)
        with fails(ExitCode.USAGE, "seed 0 → 1"):
            generate(server, tmp_path, seed=1)
        with fails(ExitCode.USAGE, "num_prompt_instructions 3 → 4"):
            generate(server, tmp_path, num_prompt_instructions=4)
        assert len(server.bodies) == asked


@pytest.mark.parametrize("tail", [b'{"request": 3, "answ', b"\0" * 100, b"x"])
def test_a_torn_last_line_is_cut_off_and_reported(tmp_path, undisturbed, capsys, tail):
    with TeacherServer() as server:
        with fails(ExitCode.BUDGET):
            generate(server, tmp_path, max_requests=4)
        with open(tmp_path / "requests.jsonl", "ab") as file:
            file.write(tail)
        generate(server, tmp_path)
        assert f"cut off {len(tail)} bytes" in capsys.readouterr().err
        assert max(server.answered.values()) == 1
    assert (tmp_path / "regen.json").read_bytes() == undisturbed


def test_every_torn_length_of_the_last_record_is_survived(tmp_path, undisturbed):
    with TeacherServer() as server:
        with fails(ExitCode.BUDGET):
            generate(server, tmp_path, max_requests=2)
    whole = (tmp_path / "requests.jsonl").read_bytes()
    for length in range(len(whole) - 40, len(whole)):
        (tmp_path / "requests.jsonl").write_bytes(whole[:length])
        replay(str(tmp_path))
        assert (tmp_path / "requests.jsonl").read_bytes() == whole[: whole.rindex(b"\n", 0, -1) + 1]


def test_damage_in_the_middle_is_told_with_its_position(tmp_path):
    with TeacherServer() as server:
        generate(server, tmp_path)
    log, regen = (tmp_path / "requests.jsonl").read_bytes(), (tmp_path / "regen.json").read_bytes()
    lines = log.splitlines(keepends=True)
    rng = random.Random(0)
    for _ in range(40):
        number = rng.randrange(2, len(lines) - 1)
        begin = sum(map(len, lines[:number]))
        position = begin + rng.randrange(len(lines[number]) - 1)
        damaged = bytearray(log)
        damaged[position] ^= 1 << rng.randrange(3)
        (tmp_path / "requests.jsonl").write_bytes(damaged)
        with fails(ExitCode.INTEGRITY, rf"line {number + 1} \(at byte {begin}\) is damaged"):
            replay(str(tmp_path))
    assert (tmp_path / "regen.json").read_bytes() == regen


def test_a_full_disk_leaves_everything_earlier_intact(tmp_path, undisturbed):
    """A limit on file size stands for the disk: the write that crosses it fails half done."""
    with TeacherServer() as server:
        process = start(server, tmp_path, "--concurrency", "4")
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30_000, 30_000))
        code, _, err = finish(process)
        assert code == 8 and err.strip().splitlines()[-1].startswith("error: File too large: "), err
        assert "requests.jsonl; free some space" in err
        assert "Traceback" not in err
        assert (tmp_path / "requests.jsonl").read_bytes().endswith(b"}\n") and len(answers(tmp_path)) > 2
        paid = {record["request"] for record in answers(tmp_path)}
        generate(server, tmp_path, concurrency=4)
        assert paid <= {record["request"] for record in answers(tmp_path)}
    assert (tmp_path / "regen.json").read_bytes() == undisturbed


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with TeacherServer() as server:
        with fails(ExitCode.DISK, "writable --output_dir"):
            generate(server, tmp_path / "file" / "out")
        assert not server.bodies


def test_a_second_process_is_told_who_works_there(tmp_path):
    with TeacherServer(delay=0.2) as server:
        first = start(server, tmp_path, "--concurrency", "1", target=30)
        wait_for(lambda: server.bodies)
        with fails(ExitCode.LOCKED, f"in use by process {first.pid} "):
            generate(server, tmp_path)
        with fails(ExitCode.LOCKED):
            replay(str(tmp_path))
        assert finish(first)[0] == 0


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_drains_what_is_in_flight(tmp_path, undisturbed, number, code):
    with TeacherServer(delay=0.3) as server:
        process = start(server, tmp_path, "--concurrency", "4")
        wait_for(lambda: server.in_flight == 4)
        process.send_signal(number)
        returned, _, err = finish(process)
        assert returned == code and "run the same command again" in err.splitlines()[-1] and "Traceback" not in err
        assert len(answers(tmp_path)) == server.answered.total() >= 5  # all that was in flight
        generate(server, tmp_path, concurrency=4)
        assert max(server.answered.values()) == 1
    assert (tmp_path / "regen.json").read_bytes() == undisturbed


def test_a_second_interruption_leaves_at_once(tmp_path):
    with TeacherServer(delay=lambda: 30 if len(server.bodies) > 2 else 0) as server:
        process = start(server, tmp_path, "--concurrency", "4")
        wait_for(lambda: server.in_flight == 4)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None  # it drains
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert finish(process)[0] == 130 and time.monotonic() - began < 5
        assert len(answers(tmp_path)) == server.answered.total()


@pytest.mark.soak
def test_a_drain_ends_after_ten_seconds(tmp_path):
    with TeacherServer(delay=lambda: 60 if len(server.bodies) > 2 else 0) as server:
        process = start(server, tmp_path, "--concurrency", "4")
        wait_for(lambda: server.in_flight == 4)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert finish(process)[0] == 130 and 9 < time.monotonic() - began < 20


def kill_and_resume(tmp_path, kills, expected, target):
    """kill -9 at random moments, then let it finish. → how many requests were answered but never logged."""
    rng = random.Random(kills)
    with TeacherServer(delay=lambda: rng.uniform(0, 0.06), fault=random_faults(0.1)) as server:
        done = 0
        logged: dict[int, str] = {}
        while done < kills:
            process = start(server, tmp_path, "--concurrency", "4", target=target)
            if rng.random() < 0.25:  # while the interpreter starts, or the log is read
                time.sleep(rng.uniform(0, 1.5))
            else:  # with requests in flight, answers being written, regen.json being written
                asked = len(server.bodies) + rng.randint(1, 8)
                wait_for(lambda n=asked, p=process: len(server.bodies) >= n or p.poll() is not None)
                time.sleep(rng.uniform(0, 0.08))
            if process.poll() is not None:
                assert process.returncode == 0, process.communicate()
                (tmp_path / "requests.jsonl").unlink()  # done before it could be killed: again from the start
                (tmp_path / "regen.json").unlink()
                server.answered.clear()
                logged.clear()
                continue
            process.kill()
            process.communicate()
            done += 1
            if not (tmp_path / "requests.jsonl").exists():
                continue
            whole = (tmp_path / "requests.jsonl").read_bytes()
            now = [json.loads(line) for line in whole[: whole.rfind(b"\n") + 1].splitlines()]
            now = [(record["request"], record["answer"]) for record in now if "answer" in record]
            assert len(dict(now)) == len(now)  # none twice
            assert logged.items() <= dict(now).items()  # none lost
            logged = dict(now)
            if (tmp_path / "regen.json").exists():
                entries = json.loads((tmp_path / "regen.json").read_text())  # never half written
                assert entries == json.loads(expected)[: len(entries)]
        code, _, err = finish(start(server, tmp_path, "--concurrency", "4", target=target))
        assert code == 0, err
        final = answers(tmp_path)
        assert len({record["request"] for record in final}) == len(final)
        assert logged.items() <= {record["request"]: record["answer"] for record in final}.items()
        assert (tmp_path / "regen.json").read_bytes() == expected
        return server.answered.total() - len(final)


def large_expected(path, target):
    with TeacherServer() as server:
        generate(server, path, concurrency=1, num_instructions_to_generate=target)
    return (path / "regen.json").read_bytes()


def test_kill_9_at_random_moments_loses_nothing(tmp_path):
    lost = kill_and_resume(tmp_path / "killed", 10, large_expected(tmp_path / "whole", 400), 400)
    assert lost <= 10 * 4  # at most what was on the wire at each kill


@pytest.mark.soak
def test_kill_9_a_hundred_times(tmp_path):
    lost = kill_and_resume(tmp_path / "killed", 100, large_expected(tmp_path / "whole", 2500), 2500)
    print(f"answers on the wire when the process was killed: {lost}")
    assert lost <= 100 * 4


def one_task(prompt):
    """Mostly one that is too short: the requests are tested here, not the similarity with thousands of tasks."""
    task = tasks_for(prompt, 1)[0]
    if random.Random(prompt).random() > 0.1:
        task["instruction"] = "Too short"
    return answer_text([task])


def faulty_run(tmp_path, requests):
    with TeacherServer(fault=random_faults(0.3), answer=one_task) as server:
        with fails(ExitCode.BUDGET, "max_requests is used up"):
            generate(server, tmp_path, num_instructions_to_generate=10**6, max_requests=requests, concurrency=32)
    assert len(server.bodies) == requests
    kept = answers(tmp_path)
    assert len(kept) == server.answered.total() == len({record["request"] for record in kept})
    # In thousands of draws of three seed tasks some come twice, so prompts are counted, not only compared.
    seeds = read_seed_tasks(str(ROOT / "seed_tasks.jsonl"), 3)
    prompts = {r["request"]: encode_prompt(sample_seed_tasks(seeds, r["request"], 0, 3)) for r in kept}
    same = collections.Counter(prompts.values()) == server.answered
    assert same  # a name of its own: pytest would explain thousands of prompts
    assert all(record["answer"] == one_task(prompts[record["request"]]) for record in kept)
    faults = collections.Counter(record["fault"] for record in records(tmp_path) if "fault" in record)
    assert faults == server.faults and faults.total() > requests / 5
    assert len(kept) + faults.total() == requests


def test_a_thousand_requests_with_thirty_percent_faults(tmp_path):
    faulty_run(tmp_path, 1000)


@pytest.mark.soak
def test_ten_thousand_requests_with_thirty_percent_faults(tmp_path):
    faulty_run(tmp_path, 10_000)


# --------------------------------------------------------------------------------------------------------- wrong usage


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--concurency", "3"], "unknown flag --concurency; did you mean --concurrency"),
        (["--concurrency", "0"], "--concurrency 0: give a whole number from 1"),
        (["--max_cost", "3"], "needs --price_in and --price_out"),
        (["--temperature", "hot"], "--temperature hot: give a number"),
        (["--api", "chats"], "choose chat or completions"),
        (["--base_url", "localhost"], "--base_url"),
        (["--seed_tasks_path", "/nonexistent/seeds.jsonl"], "seed_tasks_path"),
    ],
)
def test_wrong_usage_is_one_line_before_any_request(tmp_path, flags, match):
    with TeacherServer() as server:
        code, _, err = finish(start(server, tmp_path, *flags))
    assert code == (3 if "seed_tasks_path" in match else 2)
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: ") and match in err
    assert not server.bodies
