"""The command: what it writes, and what it says of mistakes."""

import json
import re
import shlex
import sys

import pytest

import data_report
from alpaca.common import ExitCode, ExpectedError, make_output_directory
from tests.conftest import ROOT, error_line, run
from tests.report.conftest import EXAMPLES, SPACY_MODEL, rows, save


def test_the_json_holds_what_the_page_shows(report):
    first, second = json.loads((report / "out" / "report" / "report.json").read_text())["data_sets"]
    assert (first["name"], first["rows"]) == ("part.json", 120)
    assert first["rows_with_input"] == sum(bool(example["input"]) for example in EXAMPLES[:120])
    assert first["lengths"]["output_words"]["bin_starts"] == second["lengths"]["output_words"]["bin_starts"]
    assert first["tokens"]["model_max_length"] == 200
    assert second["outputs"]["empty"] == {"count": 1, "rows": [4]}
    assert second["outputs"]["non_ascii"]["rows"][-1] == 5
    assert second["duplicates"]["whole_rows"] == {"count": 1, "rows": [[3, 0]]}
    assert second["near_duplicates"]["most_similar"][0] == [1.0, 0, 3]
    assert first["root_verbs"]["parser"] == f"spaCy with {SPACY_MODEL} 3.8.0"
    assert first["contamination"]["tasks"] >= 175
    text = (report / "out" / "report" / "index.html").read_text(encoding="utf-8")
    for shown in (first["tokens"]["total"], first["outputs"]["non_ascii"]["count"], first["seeds"]["seed_tasks"]):
        assert f"{shown:,}" in text


def test_mistakes_end_in_one_line(tmp_path):
    good = save(tmp_path / "good.json", rows("Write a poem."))
    output = tmp_path / "out"
    absent = ["--compare", tmp_path / "absent.json"]
    result = run(ROOT / "data_report.py", "--data_path", good, "--output_dir", output, *absent)
    assert result.returncode == 3
    assert re.search("--compare .*absent.json does not exist", error_line(result))
    without = "import sys; sys.modules['matplotlib'] = None; sys.argv[0] = 'data_report.py'; import data_report as d; "
    result = run("-c", without + "d.run_main(d.main)", "--data_path", good, "--output_dir", output)
    assert result.returncode == 2
    assert "pip install matplotlib" in error_line(result)
    assert not list(output.glob("*"))


def test_documented_commands_parse(monkeypatch):
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8") + data_report.__doc__
    commands = re.findall(r"^ *python (data_report\.py(?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        monkeypatch.setattr("sys.argv", shlex.split(command.replace("\\\n", " ")))
        assert data_report.parse_arguments().output_dir == "report"


def test_help_fits_a_screen_and_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'matplotlib', 'spacy'} & set(sys.modules)"
    script = f"import atexit, sys, data_report; atexit.register(lambda: print({heavy})); data_report.parse_arguments()"
    result = run("-c", script, "--help", env={"COLUMNS": "100"})
    *lines, imported = result.stdout.splitlines()
    assert result.returncode == 0 and "--compare" in result.stdout
    assert len(lines) <= 50 and imported == "set()"


def test_a_figure_that_was_asked_for_needs_spacy(tmp_path, monkeypatch):
    arguments = ["--data_path", save(tmp_path / "good.json", rows("Write a poem.")), "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(
        "sys.argv", ["data_report.py", *map(str, arguments), "--verb_noun_png", str(tmp_path / "v.png")]
    )
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ExpectedError, match="--verb_noun_png needs spaCy") as caught:
        data_report.main()
    assert caught.value.exit_code == ExitCode.USAGE


def test_no_input_is_written_over(tmp_path, monkeypatch):
    path = save(tmp_path / "report.json", rows("Write a poem."))
    before = path.read_bytes()
    monkeypatch.setattr("sys.argv", ["data_report.py", "--data_path", str(path), "--output_dir", str(tmp_path)])
    with pytest.raises(
        ExpectedError, match=r"report\.json is --data_path .*, which is read; choose another --output_dir"
    ) as caught:
        data_report.main()
    assert caught.value.exit_code == ExitCode.USAGE
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[", "is not valid JSON: Expecting value"),
        ("[]", "holds no tasks"),
        ('[{"instruction": 1}]', "record 0"),
        ('[{"instruction": "A"}, {"instruction": "B", "instances": []}]', "record 1"),
        ("3", "record 0"),
    ],
)
def test_a_wrong_file_of_tasks_is_named(tmp_path, text, fault):
    path = tmp_path / "tasks.json"
    path.write_text(text)
    with pytest.raises(ExpectedError, match=f"--against .*tasks.json.*{fault}") as caught:
        data_report.load_tasks(str(path), "--against")
    assert caught.value.exit_code == ExitCode.DATA


def test_tasks_are_read_in_both_forms(tmp_path):
    seeds = [{"instruction": "A", "instances": [{"input": "1", "output": "x"}, {"input": "", "output": "y"}]}]
    (tmp_path / "seeds.jsonl").write_text("\n".join(map(json.dumps, seeds)) + "\n\n")
    assert data_report.load_tasks(str(tmp_path / "seeds.jsonl"), "--against") == [
        {"instruction": "A", "input": "1"},
        {"instruction": "A", "input": ""},
    ]
    path = save(tmp_path / "plain.json", [{"instruction": "B", "input": None, "output": "y"}])
    assert data_report.load_tasks(str(path), "--against") == [{"instruction": "B", "input": ""}]


def test_a_wrong_tokenizer_is_named_by_its_flag(tmp_path):
    with pytest.raises(ExpectedError, match=r"--tokenizer .* can't be loaded") as caught:
        data_report.load_tokenizer(str(tmp_path))
    assert caught.value.exit_code == ExitCode.USAGE


def test_an_unwritable_directory_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExpectedError, match="--output_dir") as caught:
        make_output_directory(tmp_path / "file", "output_dir")
    assert caught.value.exit_code == ExitCode.DISK
