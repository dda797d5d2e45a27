"""What tests of whole runs share: generation against the scripted server, in this process and in one of its own."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time

import pytest

from alpaca.common import ExpectedError
from generate_instruction import generate_instruction_following_data
from tests.conftest import ROOT
from tests.teacher.teacher_server import TeacherServer, error

KEY = "sk-planted-0123456789abcdef"
FAULTS = ["broken JSON", "HTML page", "no choices", "null content", "connection cut", "no connection", 429, 500, 503]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """regen.json of a run with one request at a time and no fault."""
    os.environ["OPENAI_API_KEY"] = KEY
    path = tmp_path_factory.mktemp("undisturbed")
    with TeacherServer() as server:
        generate(server, path, concurrency=1)
    return (path / "regen.json").read_bytes()


def generate(server, path, **arguments):
    """A run in this process, with short waits."""
    defaults = {"num_instructions_to_generate": 60, "sleep_time": 0.01, "num_cpus": 2, "base_url": server.url}
    defaults |= {"output_dir": str(path), "seed_tasks_path": str(ROOT / "seed_tasks.jsonl")}
    generate_instruction_following_data(**defaults | arguments)


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


def rate_limits(server):
    """How many answers of the server only said that it has had enough; its 503s come with a Retry-After."""
    return server.faults["HTTP 429"] + server.faults["HTTP 503"]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
