"""The commands of generate_instruction.py: help, wrong usage, replay and export."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from alpaca.common import ExitCode, arguments_of, read_docstring
from alpaca.generation.arguments import checked
from generate_instruction import export, generate_instruction_following_data, preview, replay
from tests.conftest import ROOT
from tests.generation.runs import answers, fails, finish, generate, start
from tests.teacher.teacher_server import TeacherServer


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
    export(str(tmp_path))
    examples = json.loads((tmp_path / "alpaca_data.json").read_text())
    kept = json.loads(undisturbed)
    assert examples == [{part: entry[part] for part in ("instruction", "input", "output")} for entry in kept]
    with fails(ExitCode.USAGE, "no requests.jsonl"):
        replay(str(tmp_path / "nowhere"))
    with fails(ExitCode.USAGE, r"no .*regen.json"):
        export(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--concurency", "3"], "unknown flag --concurency; did you mean --concurrency?"),
        (["-max_reqests=1"], "unknown flag --max_reqests; did you mean --max_requests?"),
        (["--max_reqests=a b"], "unknown flag --max_reqests; did you mean --max_requests?"),
        (["--no-batch-ap"], "unknown flag --no_batch_ap; did you mean --batch_api?"),
        (["--batch_api", "perhaps"], "--batch_api perhaps: give True or False"),
        (["--max_requests", "1", "replay"], "unexpected argument replay"),
        (["-", "replay"], "unknown flag --; see --help"),
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


def test_help_imports_neither_torch_nor_openai():
    for arguments in (["--help"], ["generate_instruction_following_data", "--help"], ["preview", "--help"]):
        command = [sys.executable, "-X", "importtime", "-m", "generate_instruction", *arguments]
        result = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0 and "output_dir" in result.stdout + result.stderr
        imported = {
            line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")
        }
        assert "generate_instruction" not in imported  # it runs as __main__
        assert "alpaca.generation.self_instruct" in imported and not {"torch", "openai", "transformers"} & imported


@pytest.mark.parametrize("flag", ["--batch_api false", "--batch_api=0", "--nobatch_api"])
def test_no_batch_is_submitted_unless_asked_for(tmp_path, flag):
    with TeacherServer() as server:
        assert finish(start(server, tmp_path, *flag.split(), target=1))[0] == 0
        assert len(server.bodies) == 1 and not server.batches
        assert finish(start(server, tmp_path / "batch", "--batch_api", target=1))[0] == 0
        assert len(server.bodies) == 1 and len(server.batches) == 1


def test_names_that_look_like_numbers_stay_names(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-m", "generate_instruction", "generate_instruction_following_data"]
    with TeacherServer() as server:
        flags = ["--output_dir", "1e3", "--model_name", "4", "--seed_tasks_path", str(ROOT / "seed_tasks.jsonl")]
        flags += ["--base_url", server.url, "--num_instructions_to_generate", "1", "--blacklist", "()"]
        subprocess.run([*command, *flags], cwd=tmp_path, check=True, timeout=60)
    assert server.bodies[0]["model"] == "4" and (tmp_path / "1e3" / "regen.json").exists()


def test_arguments_of_a_python_caller_are_checked_too(tmp_path):
    with TeacherServer() as server:
        for wrong in ({"batch_api": "false"}, {"batch_api": 1}, {"max_requests": 0}, {"top_p": True}, {"seed": "x"}):
            with fails(ExitCode.USAGE, f"--{next(iter(wrong))} "):
                generate(server, tmp_path, **wrong)
        assert not server.bodies and not list(tmp_path.iterdir())


def test_forms_of_the_blacklist():
    def words(blacklist):
        return checked(replay, {"num_cpus": 1, "skip_missing": False, "blacklist": blacklist})["blacklist"]

    for given in (["draw", "go to"], ("draw", "go to"), "draw,go to", "draw, go to,", "('draw', 'go to')"):
        assert words(given) == ["draw", "go to"]
    assert [words(given) for given in ("()", "", (), None)] == [[], [], [], None]


@pytest.mark.parametrize("function", [generate_instruction_following_data, replay, export])
def test_the_tables_of_the_documentation_are_the_docstrings(function):
    rows = ["| flag | default | meaning |", "| --- | --- | --- |"]
    for flag, (description, default) in read_docstring(function)[1].items():
        rows.append(f"| `--{flag}` | {default or 'none'} | {description} |")
    table = "\n".join(["", f"### {function.__name__}", "", *rows, ""])
    assert table in (ROOT / "docs" / "generation.md").read_text(), f"put this into docs/generation.md:\n{table}"


def test_every_documented_command_is_understood():
    functions = (preview, generate_instruction_following_data, replay, export)
    commands, found = {f.__name__: f for f in functions}, 0
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for line in re.sub("<[^>]*>", "1", path.read_text().replace("\\\n", " ")).splitlines():
            if line.startswith("python -m generate_instruction "):
                command, *words = shlex.split(line, comments=True)[3:]
                assert command == "--help" or arguments_of(commands[command], words, commands)
                found += 1
    assert found >= 4
