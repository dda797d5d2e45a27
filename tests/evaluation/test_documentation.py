"""What docs/evaluation.md says of the commands is what they are."""

import re
import shlex

import pytest

import eval as script
from alpaca.common import arguments_of, read_docstring
from alpaca.evaluation.pairs import read_answers
from tests.conftest import ROOT

COMMANDS = {f.__name__: f for f in (script.judge, script.report, script.measure, script.compare)}


@pytest.mark.parametrize("function", COMMANDS.values())
def test_the_tables_of_the_documentation_are_the_docstrings(function):
    rows = ["| flag | default | meaning |", "| --- | --- | --- |"]
    for flag, (description, default) in read_docstring(function)[1].items():
        rows.append(f"| `--{flag}` | {default or 'none'} | {description} |")
    table = "\n".join(["", f"### {function.__name__}", "", *rows, ""])
    assert table in (ROOT / "docs" / "evaluation.md").read_text(), f"put this into docs/evaluation.md:\n{table}"


def test_every_documented_command_is_understood():
    found = 0
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"]:
        for line in re.sub("<[^>]*>", "1", path.read_text().replace("\\\n", " ")).splitlines():
            if line.startswith("python eval.py "):
                command, *words = shlex.split(line, comments=True)[2:]
                assert command == "--help" or arguments_of(COMMANDS[command], words, COMMANDS)
                found += 1
    assert found >= 6


def test_the_conversion_of_the_self_instruct_suite_works(tmp_path, monkeypatch):
    """The documented lines, on tasks in that suite's form."""
    text = (ROOT / "docs" / "evaluation.md").read_text()
    code = re.search(r"```python\n(import json\n.*?)```", text, re.DOTALL).group(1)
    task = (
        '{"id": "t", "motivation_app": "Gmail", "instruction": "Say it.", "instances": [{"input": "x", "output": "y"}]}'
    )
    (tmp_path / "user_oriented_instructions.jsonl").write_text(task + "\n")
    answer = '{"prompt": "p", "instruction": "Say it.", "input": "x", "response": " z", "target": "y"}'
    (tmp_path / "text-davinci-003_predictions.jsonl").write_text(answer + "\n")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    kept = {"instruction": "Say it.", "input": "x", "generator": ""}
    assert read_answers("suite252.json", "--data_path") == [{**kept, "output": "y", "category": "Gmail"}]
    assert read_answers("davinci.json", "--opponent") == [
        {**kept, "output": "z", "generator": "text-davinci-003", "category": ""}
    ]
    assert len(read_answers(str(ROOT / "eval_tasks.jsonl"), "--data_path")) >= 6
