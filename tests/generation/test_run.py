"""Whole runs against a scripted server on loopback: limits, interruptions, and that nothing is lost."""

import collections
import json
import random
import resource
import signal
import stat
import time

import pytest
from aiohttp import web

from alpaca.common import ExitCode
from alpaca.generation.self_instruct import encode_prompt, read_seed_tasks, sample_seed_tasks
from generate_instruction import export, replay
from tests.conftest import ROOT
from tests.generation.runs import (
    KEY,
    answers,
    fails,
    finish,
    generate,
    random_faults,
    rate_limits,
    records,
    start,
    wait_for,
)
from tests.teacher.teacher_server import TeacherServer, answer_text, error, tasks_for


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
        **{"max_tokens": 3072, "stream": False},
    }  # no n, no logit_bias, no stop, and nothing that was not asked for
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
    assert len(server.bodies) - rate_limits(server) == len(answers(tmp_path)) + sum(
        "fault" in r for r in records(tmp_path)
    )


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


def test_a_teacher_that_gives_nothing_new_is_not_paid_for_ever(tmp_path):
    with TeacherServer(answer=lambda prompt: answer_text(tasks_for("always the same"))) as server:
        with fails(ExitCode.BUDGET, "gave nothing new"):
            generate(server, tmp_path, concurrency=4)
        assert 100 < len(server.bodies) < 110


def test_summary_counts_right(tmp_path, capsys):
    with TeacherServer(fault=random_faults(0.3)) as server:
        generate(server, tmp_path, concurrency=4, price_in=1.0, price_out=2.0)
    out = capsys.readouterr().out
    assert f"{len(server.bodies) - rate_limits(server)} requests" in out
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


def test_files_are_private_and_the_key_is_nowhere(tmp_path, capfd):
    def leaky(server, body, attempt):
        if attempt == 1:
            return error(500, f"cannot forward with Authorization: Bearer {KEY}")
        return "broken JSON" if attempt == 2 else None

    def quotes_the_key_once(prompt):
        return answer_text(tasks_for(prompt)) + (f" {KEY}" if server.attempts[prompt] == 3 else "")

    with TeacherServer(fault=leaky, answer=quotes_the_key_once) as server:
        generate(server, tmp_path, max_attempts=4, concurrency=1)
        faults = collections.Counter(record["fault"] for record in records(tmp_path) if "fault" in record)
        assert faults["answer with the key in it"] == len(answers(tmp_path)) > 5
        with fails(ExitCode.BUDGET):
            server.fault = lambda *_: error(500, KEY)
            generate(server, tmp_path, num_instructions_to_generate=100, max_attempts=1)
    assert stat.S_IMODE((tmp_path / "requests.jsonl").stat().st_mode) == 0o600
    replay(str(tmp_path))
    export(str(tmp_path), str(tmp_path / "alpaca_data.json"))
    for file in tmp_path.iterdir():
        assert KEY.encode() not in file.read_bytes(), file
    assert KEY not in "".join(capfd.readouterr())


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
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(".lock", "decisions.jsonl", "regen.json", "requests.jsonl")
    ]


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


def thought_away(server, body, attempt):
    """A chat answer whose tokens all went into thinking."""
    message = {"role": "assistant", "content": server.thought}
    choice = {"index": 0, "finish_reason": "length", "message": message}
    return web.json_response(
        {"model": "m", "choices": [choice], "usage": {"prompt_tokens": 1100, "completion_tokens": 3072}}
    )


@pytest.mark.parametrize("thought", ["", None, "<think>First I need 17 tasks. The", "<think>20 tasks.</think>\n"])
def test_a_teacher_that_spends_its_tokens_on_thinking_is_stopped_soon(tmp_path, thought):
    with TeacherServer(fault=thought_away) as server:
        server.thought = thought
        with fails(ExitCode.BUDGET, "3 answers in a row .*thinking.*--max_tokens.*reasoning_effort"):
            generate(server, tmp_path, concurrency=32)
        assert len(server.bodies) == 3


def empty_answer(reason, message):
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", **message}}
    return {"choices": [choice], "usage": {"prompt_tokens": 1100, "completion_tokens": 10}}


@pytest.mark.parametrize(
    ("response", "named"),
    [
        (lambda: web.json_response(empty_answer("content_filter", {})), "filtered answer"),
        (lambda: web.json_response(empty_answer("stop", {"content": None, "refusal": "no"})), "refused answer"),
        (lambda: error(400, "may contain inappropriate content", "data_inspection_failed"), "filtered answer"),
        (lambda: error(403, "requires moderation and your input was flagged", "403"), "filtered answer"),
    ],
)
def test_what_asking_again_cannot_change_is_an_empty_answer_also_after_a_restart(tmp_path, capsys, response, named):
    def fault(server, body, attempt):
        return response() if list(server.attempts).index(body["messages"][0]["content"]) % 4 == 1 else None

    with TeacherServer(fault=fault) as server:
        generate(server, tmp_path, num_instructions_to_generate=20, concurrency=1)
        generate(server, tmp_path, concurrency=1)
        assert max(server.attempts.values()) == 1
    empty = [record for record in answers(tmp_path) if not record["answer"]]
    assert f"{named} {len(empty)}" in capsys.readouterr().out and len(empty) > 2
    assert not [record for record in records(tmp_path) if "fault" in record]


def test_a_request_that_timed_out_counts_as_the_largest(tmp_path, capsys):
    largest = 6000  # more than any prompt here and its answer
    with TeacherServer(delay=lambda: 30 if len(server.bodies) in (2, 3) else 0) as server:
        with fails(ExitCode.BUDGET, "max_tokens_total"):
            generate(server, tmp_path, concurrency=1, timeout=0.5, max_tokens_total=20_000)
    assert server.answered.total() * 1500 + 2 * largest <= 20_000 + 2 * 1500
    assert "2 requests more were asked and not received" in capsys.readouterr().out


def test_what_a_killed_process_asked_counts(tmp_path):
    with TeacherServer(delay=lambda: 30 if len(server.bodies) > 2 else 0) as server:
        process = start(server, tmp_path, "--concurrency", "4")
        wait_for(lambda: server.in_flight == 4)
        process.kill()
        process.communicate()
        with fails(ExitCode.BUDGET, "max_requests"):
            server.delay = 0
            generate(server, tmp_path, max_requests=8)
        assert len(server.bodies) == 8


def test_files_with_a_byte_order_mark_and_instructions_without_words(tmp_path, undisturbed):
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_bytes(b"\xef\xbb\xbf" + (ROOT / "seed_tasks.jsonl").read_bytes())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "regen.json").write_bytes(b"\xef\xbb\xbf" + undisturbed)
    with TeacherServer(answer=lambda prompt: " \n4. Input:\n<noinput>\n4. Output:\nYes") as server:
        limits = {"min_words": 0, "seed_tasks_path": str(seeds), "max_requests": 3, "concurrency": 1}
        for _ in range(2):
            with fails(ExitCode.BUDGET):
                generate(server, tmp_path / "run", num_instructions_to_generate=100, **limits)
    assert (tmp_path / "run" / "regen.json").read_bytes() == undisturbed


def test_a_second_process_is_told_who_works_there(tmp_path):
    with TeacherServer(delay=0.2) as server:
        first = start(server, tmp_path, "--concurrency", "1", target=30)
        wait_for(lambda: server.bodies)
        with fails(ExitCode.LOCKED, f"in use by process {first.pid} "):
            generate(server, tmp_path)
        with fails(ExitCode.LOCKED):
            replay(str(tmp_path))
        assert finish(first)[0] == 0


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
    asked = [record["asked"] for record in records(tmp_path) if "asked" in record]
    assert (
        len(asked) == len(server.bodies) == len(answers(tmp_path)) + 4
    )  # what was not received is in the log as asked
    with TeacherServer() as server, fails(ExitCode.BUDGET, "max_requests is used up"):
        generate(server, tmp_path, max_requests=len(asked))
    assert not server.bodies


@pytest.mark.soak
def test_an_interruption_waits_for_what_is_in_flight_as_long_as_it_takes(tmp_path):
    with TeacherServer(delay=lambda: 12 if len(server.bodies) > 2 else 0) as server:
        process = start(server, tmp_path, "--concurrency", "4")
        wait_for(lambda: server.in_flight == 4)
        process.send_signal(signal.SIGINT)
        assert finish(process)[0] == 130
        assert len(answers(tmp_path)) == server.answered.total() == 6


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
    lost = kill_and_resume(tmp_path / "killed", 6, large_expected(tmp_path / "whole", 300), 300)
    assert lost <= 6 * 4  # at most what was on the wire at each kill


@pytest.mark.soak
def test_kill_9_thirty_times(tmp_path):
    lost = kill_and_resume(tmp_path / "killed", 30, large_expected(tmp_path / "whole", 900), 900)
    print(f"answers on the wire when the process was killed: {lost}")
    assert lost <= 30 * 4


def one_task(prompt):
    """Mostly one that is too short: the requests are tested here, not the similarity with thousands of tasks."""
    task = tasks_for(prompt, 1)[0]
    if random.Random(prompt).random() > 0.1:
        task["instruction"] = "Too short"
    return answer_text([task])


def dirty(server, body, attempt):
    """Three answers of ten are one of the ways in which teachers and servers of many kinds spoil a set of tasks."""
    prompt = body["messages"][0]["content"]
    rng = random.Random(f"{attempt} {prompt[-300:]}")
    if attempt > 8 or rng.random() >= 0.3:
        return None
    text = one_task(prompt)
    draft = text.replace("Output:\n", "Output:\nDRAFT ").strip()
    cut = answer_text([{"instruction": "CUT off in the middle of it", "input": "", "output": "CUT"}], 5)[1:]
    message, reason, used = {
        "filtered": ({}, "content_filter", 0),
        "refused": ({"content": None, "refusal": "DIRT"}, "stop", 10),
        "thinking": ({"content": f"<think>\n4. Instruction: {draft}\n</think>\n\n4. Instruction:{text}"}, "stop", 500),
        "no opening tag": ({"content": f"DIRT {draft}\n</think>\n\n4. Instruction:{text}"}, "stop", 500),
        "beside": ({"content": text, "reasoning_content": draft}, "stop", 500),
        "parts": ({"content": [{"type": "thinking", "thinking": draft}, {"type": "text", "text": text}]}, "stop", 500),
        "closing": ({"content": f"{text}\n###\n\nThat completes the list of 20 tasks. DIRT"}, "stop", 500),
        "token": ({"content": f"{text}<|im_end|>"}, "stop", 500),
        "cut": ({"content": f"{text}\n###\n5. Instruction: {cut}"}, "stop", 3072),
        "no input": ({"content": text.replace("<noinput>", "N/A")}, "stop", 500),
    }.get(way := rng.choice(DIRT), (None, None, None))
    server.ways[way] += 1
    if way in (429, 503, 413):
        return error(way, "tokens per minute (TPM): Limit 9, Used 8, Requested 2", "rate_limit", Retry_After_Ms="5")
    if way == 400:
        return error(400, "Input text data may contain inappropriate content.", "data_inspection_failed")
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", **message}}
    usage = {"prompt_tokens": 1000, "completion_tokens": used}
    return web.json_response({"model": "m", "choices": [choice], "usage": usage})


DIRT = ["filtered", "refused", "thinking", "no opening tag", "beside", "parts", "closing", "token", "cut", "no input"]
DIRT += [429, 503, 413, 400]
TWICE = (429, 503, 413)  # asked again


def dirty_run(tmp_path, requests):
    with TeacherServer(fault=dirty, answer=one_task) as server:
        server.ways = collections.Counter()
        with fails(ExitCode.BUDGET, "max_requests is used up"):
            generate(server, tmp_path, num_instructions_to_generate=10**6, max_requests=requests, concurrency=32)
    limited = sum(server.ways[way] for way in TWICE)
    assert sum(server.ways.values()) > requests / 5 and len(server.bodies) == requests + limited
    kept = answers(tmp_path)
    assert len(kept) == requests == len({record["request"] for record in kept})  # nothing lost, nothing twice
    # Nothing dirty: each row is a task that the teacher wrote, whole; and all that it wrote well is there.
    seeds = read_seed_tasks(str(ROOT / "seed_tasks.jsonl"), 3)
    prompts = {r["request"]: encode_prompt(sample_seed_tasks(seeds, r["request"], 0, 3)) for r in kept}
    wrote = {tuple(task.values()) for prompt in prompts.values() for task in tasks_for(prompt, 1)}
    rows = json.loads((tmp_path / "regen.json").read_text())
    unknown = [row for row in rows if (row["instruction"], row["input"], row["output"]) not in wrote]
    assert not unknown and len(rows) > requests / 20
    replay(str(tmp_path))
    assert json.loads((tmp_path / "regen.json").read_text()) == rows


def faulty_run(tmp_path, requests):
    with TeacherServer(fault=random_faults(0.3), answer=one_task) as server:
        with fails(ExitCode.BUDGET, "max_requests is used up"):
            generate(server, tmp_path, num_instructions_to_generate=10**6, max_requests=requests, concurrency=32)
    assert len(server.bodies) - rate_limits(server) == requests
    kept = answers(tmp_path)
    assert len(kept) == server.answered.total() == len({record["request"] for record in kept})
    # In thousands of draws of three seed tasks some come twice, so prompts are counted, not only compared.
    seeds = read_seed_tasks(str(ROOT / "seed_tasks.jsonl"), 3)
    prompts = {r["request"]: encode_prompt(sample_seed_tasks(seeds, r["request"], 0, 3)) for r in kept}
    same = collections.Counter(prompts.values()) == server.answered
    assert same  # a name of its own: pytest would explain thousands of prompts
    assert all(record["answer"] == one_task(prompts[record["request"]]) for record in kept)
    faults = collections.Counter(record["fault"] for record in records(tmp_path) if "fault" in record)
    assert (
        faults == server.faults - collections.Counter({"HTTP 429": 10**9, "HTTP 503": 10**9})
        and faults.total() > requests / 5
    )
    assert len(kept) + faults.total() == requests


def test_hundreds_of_requests_with_thirty_percent_faults(tmp_path):
    faulty_run(tmp_path, 400)


@pytest.mark.soak
def test_ten_thousand_requests_with_thirty_percent_faults(tmp_path):
    faulty_run(tmp_path, 10_000)


def test_hundreds_of_requests_with_thirty_percent_dirt(tmp_path):
    dirty_run(tmp_path, 400)


@pytest.mark.soak
def test_ten_thousand_requests_with_thirty_percent_dirt(tmp_path):
    dirty_run(tmp_path, 10_000)
