"""The log of what was paid for, and the limits on it, in whole runs."""

import contextlib
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from alpaca.common import ExitCode
from alpaca.teacher.request_log import Log
from generate_instruction import replay
from tests.generation.runs import answers, fails, generate, random_faults, rate_limits
from tests.teacher.teacher_server import TeacherServer


@pytest.mark.parametrize("faults", [0, 0.2])
@pytest.mark.parametrize(
    ("limit", "most"),
    [
        ({"max_requests": 7}, 7),
        ({"max_tokens_total": 20_000}, 20_000 / 1500),
        # 1000 prompt and 500 answer tokens: 0.002 a request
        ({"max_cost": 0.021, "price_in": 1.0, "price_out": 2.0}, 10.5),
    ],
)
def test_limits_are_never_exceeded_and_the_run_goes_on_when_raised(tmp_path, undisturbed, limit, most, faults):
    with TeacherServer(delay=0.01, fault=random_faults(faults)) as server:
        with fails(ExitCode.BUDGET, f"--{next(iter(limit))} is used up; everything so far is saved"):
            generate(server, tmp_path, concurrency=8, **limit)
        paid = len(server.bodies) - rate_limits(server) if "max_requests" in limit else server.answered.total()
        assert paid <= most
        if not faults:  # else a request whose cost nobody knows, its connection cut, counts as the largest
            assert paid > 0.5 * most
        assert len(answers(tmp_path)) == server.answered.total()
        before = len(server.bodies)
        with fails(ExitCode.BUDGET, "is used up"):  # limits are for the directory, not for each start
            generate(server, tmp_path, concurrency=8, **limit)
        assert len(server.bodies) <= before + 2
        generate(server, tmp_path, concurrency=8)
        assert max(server.answered.values()) == 1
    assert (tmp_path / "regen.json").read_bytes() == undisturbed


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


def test_threads_append_whole_records_and_know_their_places(tmp_path):
    with contextlib.closing(Log(str(tmp_path / "log"), left_on_disk=("text",))) as log:
        records = [{"number": number, "text": "x" * (number * 37 % 5000)} for number in range(200)]
        with ThreadPoolExecutor(16) as threads:
            places = list(threads.map(log.append, records))
        assert [log.read(byte) for byte, _ in places] == records
        assert sorted(log.places) == sorted(places) and all(record["text"] is None for record in log.records)
    with contextlib.closing(Log(str(tmp_path / "log"), left_on_disk=("text",))) as again:
        assert again.places == log.places and again.records == log.records
