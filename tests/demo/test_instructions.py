"""The demo's six instructions, and what it trains on."""

import pytest

from alpaca.data.examples import load_examples
from alpaca.demo.instructions import INSTRUCTIONS, choose_demonstrations
from alpaca.demo.run import EXAMPLES, MAX_CHARACTERS
from tests.conftest import ROOT

SHIPPED = load_examples(str(ROOT / "alpaca_data.json"))


def example(instruction, output="Yes."):
    return {"instruction": instruction, "input": "", "output": output}


def test_the_first_three_are_those_of_the_web_page():
    web_page = pytest.importorskip("alpaca.web_page")
    assert [(e["instruction"], e["input"]) for e in INSTRUCTIONS[:3]] == web_page.EXAMPLES
    assert len(INSTRUCTIONS) == 6


def test_there_are_enough_short_demonstrations_and_none_is_one_of_the_six():
    chosen = choose_demonstrations(SHIPPED, EXAMPLES, MAX_CHARACTERS)
    assert len(chosen) == EXAMPLES
    assert max(sum(map(len, row.values())) for row in chosen) <= MAX_CHARACTERS
    assert not {row["instruction"] for row in chosen} & {row["instruction"] for row in INSTRUCTIONS}
    places = [SHIPPED.index(row) for row in chosen]
    assert places == sorted(places)  # the first ones, in the file's order


def test_long_ones_and_those_close_to_the_six_are_left_out():
    close = "Explain in two sentences why the evening sky is red."
    rows = [
        example("Name a river."),
        example(close),
        example(INSTRUCTIONS[0]["instruction"]),
        example("Sing!", "la" * 50),
    ]
    assert choose_demonstrations(rows, 10, 80) == rows[:1]
    assert choose_demonstrations(rows, 10, 200) == [rows[0], rows[3]]
    assert choose_demonstrations(rows, 1, 200) == rows[:1]
