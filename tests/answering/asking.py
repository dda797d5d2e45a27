"""Questions for small models, and inference.py run in this process or in one of its own."""

import sys

import pytest

import inference
from alpaca.common import run_main
from tests.conftest import run

COLOUR = {"instruction": "Name a colour.", "input": ""}
PASSIVE = {"instruction": "Turn it into the passive voice.", "input": "The gardener waters the roses."}
PRICE = {"instruction": "Write what a coffee costs, and smile.", "input": ""}
COUNT = {"instruction": "Count to twenty.", "input": ""}
LESSONS = [  # what the model `taught` knows by heart
    (COLOUR, "Blue."),
    (PASSIVE, "The roses are watered by the gardener."),
    (PRICE, "Ein Kaffee kostet 3 €.\n\nGrüße 🙂 und 再见!"),  # characters of several tokens each
    (COUNT, " ".join(map(str, range(1, 21)))),
]
# Prompts of very different lengths.
MIXED = [
    *(example for example, _ in LESSONS),
    {"instruction": "Summarize.", "input": "The gardener waters the roses every morning. " * 12},
    {"instruction": "Why?", "input": ""},
]
GREEDY = inference.Sampling(max_new_tokens=24, temperature=0, top_p=1, seed=0)


def load(directory, *flags):
    """Model and reader, in this process."""
    argv = ["inference.py", "--model_name_or_path", str(directory), "--instruction", "-", "--device", "cpu", *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        args = inference.parse_arguments()
    reader = inference.load_reader(args.model_name_or_path)
    return inference.load_model(args, reader.tokenizer), reader


def main(capsys, directory, *flags):
    """What `inference.py` prints, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["inference.py", "--model_name_or_path", str(directory), *map(str, flags)])
        inference.main()
    return capsys.readouterr().out


def mistake(monkeypatch, capsys, *flags):
    """Exit code and the one line on standard error of `inference.py FLAGS`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["inference.py", *map(str, flags)])
    with pytest.raises(SystemExit) as caught:
        run_main(inference.main)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    return caught.value.code, printed.err


def ask(directory, *flags, **options):
    return run("inference.py", "--model_name_or_path", directory, "--device", "cpu", *flags, **options)
