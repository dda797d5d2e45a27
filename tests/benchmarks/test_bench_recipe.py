"""The study of the recipe: its rules on answers that pass and that do not, and a row of it on the embedded model."""

import json

from alpaca.training.data_module import hold_out
from benchmarks.bench_recipe import CHECKS, STUDY, is_json_with, items, sentences
from tests.conftest import ROOT, run

RIGHT = [
    "No.",
    "Paris.",
    "HARBOUR",
    "the train leaves at noon.",
    "1. Apple\n2. Pear\n3. Fig",
    "- cat\n- dog\n- cow\n- hen\n- pig",
    "The sea is wide.",
    "It is dark. Trees whisper.",
    "I like butter on bread.",
    "Will it rain?",
    "Good morning, Ann!",
    "red, blue, green, white",
    '{"name": "Anna", "age": 31}',
    "The kettle is on the stove.",
    "5",
    "apple, fig, pear",
    "Sport",
    "Tomorrow we leave.",
    "A cat. It sleeps. It eats.",
    "1932",
]
WRONG = ["The Moon is larger. It is not. No! Yes? 1, 2, 3, 4\n- and\n{'name'}", ""]


def test_the_rules_pass_what_is_right_and_nothing_else():
    assert len(RIGHT) == len(CHECKS) == 20
    for (instruction, _, check), answer in zip(CHECKS, RIGHT, strict=True):
        assert check(answer), instruction
        passed = [wrong for wrong in WRONG if check(wrong)]
        assert not passed or (passed == [""] and "fewer than" in instruction), instruction


def test_what_the_rules_count():
    assert sentences("One. Two! Three? 3.14 e.g.x") == 3 and sentences("") == 0
    assert items("1. a\n2) b\n- c\n * d\n-e\nf") == 4
    assert is_json_with('{"a": 1}', {"a"}) and not is_json_with("[1]", {"a"}) and not is_json_with("a", {"a"})


def test_a_row_is_trained_measured_and_not_done_again(llama, tmp_path):
    output = tmp_path / "rows.jsonl"
    flags = ["--base", llama, "--output", output, "--rows", "80 of at most 420, 0.0001"]
    for _ in range(2):
        result = run(ROOT / "benchmarks" / "bench_recipe.py", *flags)
        assert result.returncode == 0, result.stderr[-3000:]
        [row] = json.loads(result.stdout.splitlines()[-1])["rows"]
        assert row["examples"] == 80 and 7 < row["loss"] < 9 and row["bits_per_byte"] > 1
    assert len(output.read_text().splitlines()) == 1


def test_nothing_held_out_is_trained_on(llama):
    import transformers

    from alpaca.data.examples import SupervisedDataset

    tokenizer = transformers.AutoTokenizer.from_pretrained(llama, model_max_length=4096)
    rest, held_out = hold_out(SupervisedDataset(str(ROOT / "alpaca_data.json"), tokenizer), 64)
    assert len(held_out) == 64 and not set(rest.rows) & set(held_out.rows)
    assert len(rest) + 64 == len(json.loads((ROOT / "alpaca_data.json").read_text()))
    assert {"base", "all, 3 epochs"} <= set(STUDY)
