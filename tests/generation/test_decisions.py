"""What was decided is kept beside the log, is used when a run goes on, and is never believed against the log."""

import json
import random

import pytest

from alpaca.generation import decisions as decisions_file
from alpaca.generation.self_instruct import Collection
from generate_instruction import replay
from tests.generation.runs import answers, generate
from tests.teacher.teacher_server import TeacherServer


@pytest.fixture
def finished(tmp_path):
    with TeacherServer() as server:
        generate(server, tmp_path, concurrency=1)  # else an answer may come that is no longer needed, and not decided
    return tmp_path


@pytest.fixture
def decided(monkeypatch):
    """The requests whose answers are compared anew."""
    numbers, add = [], Collection.add

    def counted(collection, record):
        numbers.append(record["request"])
        add(collection, record)

    monkeypatch.setattr(Collection, "add", counted)
    return numbers


def test_nothing_is_decided_twice(finished, decided, undisturbed):
    (finished / "regen.json").unlink()
    replay(str(finished))
    assert (finished / "regen.json").read_bytes() == undisturbed and not decided
    with TeacherServer() as server:
        generate(server, finished, num_instructions_to_generate=90, concurrency=1)
        assert len(decided) == len(server.bodies)  # the new answers
        generate(server, finished / "direct", num_instructions_to_generate=90, concurrency=1)
    assert (finished / "regen.json").read_bytes() == (finished / "direct" / "regen.json").read_bytes()


def test_without_the_file_everything_is_decided_again(finished, decided, undisturbed):
    (finished / "decisions.jsonl").unlink()
    replay(str(finished))
    assert (finished / "regen.json").read_bytes() == undisturbed
    assert decided == sorted(record["request"] for record in answers(finished))  # whatever order they came in
    replay(str(finished))
    assert len(decided) == len(answers(finished))


def test_other_limits_are_decided_anew_and_leave_the_file_alone(finished, decided, undisturbed):
    before = (finished / "decisions.jsonl").read_bytes()
    replay(str(finished), max_similarity=0.05)
    assert decided and (finished / "regen.json").read_bytes() != undisturbed
    assert (finished / "decisions.jsonl").read_bytes() == before
    del decided[:]
    replay(str(finished))
    assert (finished / "regen.json").read_bytes() == undisturbed and not decided


def test_a_run_that_goes_on_with_other_limits_decides_anew(finished, decided):
    with TeacherServer() as server:
        generate(server, finished, max_similarity=0.3)
        used = len(decided)
        generate(server, finished, max_similarity=0.3)
        assert len(decided) == used > len(server.bodies)


def test_damage_of_any_kind_costs_time_only(finished, undisturbed):
    whole, rng = (finished / "decisions.jsonl").read_bytes(), random.Random(0)
    for _ in range(30):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        length = rng.randrange(len(whole)) if rng.random() < 0.5 else len(whole)
        (finished / "decisions.jsonl").write_bytes(damaged[:length])
        replay(str(finished))
        assert (finished / "regen.json").read_bytes() == undisturbed
        assert (finished / "decisions.jsonl").read_bytes() == whole


def test_decisions_of_another_log_are_not_used(finished, undisturbed, tmp_path_factory):
    """The last answers are asked for again, with other words: what was decided of the old ones does not hold."""
    lines = (finished / "requests.jsonl").read_bytes().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if json.loads(line).get("request") == 6)
    (finished / "requests.jsonl").write_bytes(b"".join(lines[:cut]))
    with TeacherServer(count=9) as server:
        generate(server, finished, concurrency=1)
    known = (finished / "regen.json").read_bytes()
    assert known != undisturbed
    (finished / "decisions.jsonl").unlink()
    replay(str(finished))
    assert (finished / "regen.json").read_bytes() == known


def test_other_code_decides_anew(finished, decided, monkeypatch):
    monkeypatch.setattr(decisions_file, "_rules", lambda: "another version")
    replay(str(finished))
    assert len(decided) == len(answers(finished))


def test_a_copied_directory_keeps_what_was_decided(finished, decided, tmp_path_factory, undisturbed):
    other = tmp_path_factory.mktemp("copy")
    for name in ("requests.jsonl", "decisions.jsonl"):
        (other / name).write_bytes((finished / name).read_bytes())
    replay(str(other))
    assert (other / "regen.json").read_bytes() == undisturbed and not decided
