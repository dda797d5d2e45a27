"""The file to train on: its forms, where it goes, what it never replaces; and the preview."""

import json

import pytest

from alpaca.common import ExitCode
from generate_instruction import export, preview
from tests.conftest import ROOT
from tests.generation.runs import answers, fails, generate
from tests.teacher.teacher_server import TeacherServer, answer_text, tasks_for

ENTRIES = [
    {"instruction": "Name three rivers of the plain", "input": "", "output": "A, B, C"},
    {"instruction": "Correct the grammar", "input": "He go home each day.", "output": "He goes home."},
    {"instruction": "Tell what a kite is for", "input": "", "output": "For \u00e9lan."},
]


@pytest.fixture
def finished(tmp_path):
    (tmp_path / "regen.json").write_text(json.dumps([{**e, "avg_similarity_score": 0.1} for e in ENTRIES]))
    return tmp_path


def test_forms(finished):
    for form in ("json", "jsonl", "messages"):
        export(str(finished), format=form)
    assert json.loads((finished / "alpaca_data.json").read_text()) == ENTRIES
    assert [json.loads(line) for line in (finished / "alpaca_data.jsonl").read_text().splitlines()] == ENTRIES
    chats = [json.loads(line)["messages"] for line in (finished / "messages.jsonl").read_text().splitlines()]
    assert chats[1] == [
        {"role": "user", "content": "Correct the grammar\n\nHe go home each day."},
        {"role": "assistant", "content": "He goes home."},
    ]
    assert chats[0][0]["content"] == ENTRIES[0]["instruction"]
    with fails(ExitCode.USAGE, "choose json, jsonl, messages"):
        export(str(finished), format="csv")


def test_no_file_is_replaced_unless_asked_for(finished, monkeypatch):
    monkeypatch.chdir(finished)
    (finished / "mine.json").write_text("mine")
    for path in ("mine.json", str(finished / "mine.json")):
        with fails(ExitCode.USAGE, "mine.json exists.*--overwrite True"):
            export(str(finished), path=path)
    assert (finished / "mine.json").read_text() == "mine"
    export(str(finished), path="mine.json", overwrite=True)
    assert len(json.loads((finished / "mine.json").read_text())) == 3
    for own in ("regen.json", "requests.jsonl"):
        with fails(ExitCode.USAGE, "a file that this reads"):
            export(str(finished), path=str(finished / own), overwrite=True)
    with fails(ExitCode.USAGE, "is a directory"):
        export(str(finished), path=str(finished))


def test_the_shipped_data_is_safe(finished, monkeypatch):
    shipped = (ROOT / "alpaca_data.json").read_bytes()
    monkeypatch.chdir(ROOT)
    export(str(finished))
    assert (finished / "alpaca_data.json").exists() and (ROOT / "alpaca_data.json").read_bytes() == shipped


def test_rows_that_repeat_evaluation_tasks_are_left_out_and_listed(finished, capsys):
    tasks = [
        {"instruction": "Correct the grammar", "instances": [{"input": "We was at the lake yesterday evening."}]},
        {"instruction": "Name three rivers of the plain!", "instances": [{"input": ""}]},
    ]
    (finished / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    export(str(finished), against=str(finished / "tasks.jsonl"))
    assert json.loads((finished / "alpaca_data.json").read_text()) == ENTRIES[1:]  # the same words, on another text
    out = capsys.readouterr().out
    assert "2 examples in" in out and "1 left out, which repeat" in out
    assert "row 0 repeats task 1 (1.00): Name three rivers" in out
    with fails(ExitCode.USAGE, "a file that this reads"):
        export(str(finished), path=str(finished / "tasks.jsonl"), against=str(finished / "tasks.jsonl"), overwrite=True)


def test_preview_asks_three_and_says_what_would_be_kept_and_why(tmp_path, undisturbed, capsys):
    arguments = {"sleep_time": 0.01, "seed_tasks_path": str(ROOT / "seed_tasks.jsonl"), "output_dir": str(tmp_path)}
    with TeacherServer() as server:
        preview(base_url=server.url, **arguments)
        shown = capsys.readouterr().out
        assert len(server.bodies) == 3
        for body in server.bodies:
            prompt = body["messages"][0]["content"]
            assert prompt in shown and answer_text(tasks_for(prompt)) in shown
        assert shown.count("kept: ") + shown.count("dropped, ") == 18
        assert "dropped, too similar: 1.00 with '" in shown or "dropped, blacklisted word: " in shown
        preview(base_url=server.url, **arguments)
        assert len(server.bodies) == 3 and capsys.readouterr().out == shown  # paid for once
        generate(server, tmp_path, concurrency=1)
        assert max(server.answered.values()) == 1 and len(answers(tmp_path)) == len(server.bodies)
    assert (tmp_path / "regen.json").read_bytes() == undisturbed
