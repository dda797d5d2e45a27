"""Verbs and objects, as spaCy's English model finds them."""

import pytest

from alpaca.common import ExitCode, ExpectedError
from alpaca.report import verb_noun
from tests.conftest import ROOT
from tests.report.conftest import SPACY_MODEL


@pytest.fixture(scope="module")
def parser():
    return verb_noun.load_parser(SPACY_MODEL)


def test_the_first_verb_and_its_object_are_found(parser):
    expected = {
        "Write me a short poem about rain.": ("write", "poem"),
        "Describe the cities of France.": ("describe", "city"),
        "This is a note. Write a poem about it.": ("write", "poem"),
        "Draft an e-mail.": ("draft", "mail"),
        "Reply politely.": ("reply", ""),
        "?": ("", ""),
    }
    assert dict(zip(expected, verb_noun.root_verbs(list(expected), parser), strict=True)) == expected


def test_pairs_are_mostly_those_that_a_person_finds(parser):
    lines = (ROOT / "tests" / "report" / "verb_noun_labels.tsv").read_text(encoding="utf-8").splitlines()[1:]
    verbs, objects, instructions = zip(*(line.split("\t") for line in lines), strict=True)
    labels = [(verb.strip("-"), noun.strip("-")) for verb, noun in zip(verbs, objects, strict=True)]
    found = verb_noun.root_verbs(instructions, parser)
    right = [pair == label for pair, label in zip(found, labels, strict=True)]
    right_in_the_figure = [good for good, pair in zip(right, found, strict=True) if all(pair)]
    assert len(right) >= 200 and len(right_in_the_figure) >= 100
    assert sum(right) / len(right) >= 0.6  # docs/data.md has the measured shares
    assert sum(right_in_the_figure) / len(right_in_the_figure) >= 0.7


def test_the_most_frequent_pairs_come_first_and_ties_in_alphabetical_order():
    pairs = [("write", "poem")] * 3 + [("write", noun) for noun in ("ode", "tale", "song", "essay", "essay")]
    pairs += [("name", ""), ("", ""), ("sum", "list"), ("add", "sum"), ("add", "sum"), ("sum", "list")]
    assert verb_noun.most_frequent(pairs, verbs=1) == [
        {"verb": "write", "rows": 8, "objects": [["poem", 3], ["essay", 2], ["ode", 1], ["song", 1]]}
    ]
    assert [entry["verb"] for entry in verb_noun.most_frequent(pairs)] == ["write", "add", "sum"]


def test_a_model_that_was_asked_for_must_be_there(tmp_path):
    with pytest.raises(ExpectedError, match=r"--parser .*no_model.* can't be loaded .*pip install spacy") as caught:
        verb_noun.load_parser(str(tmp_path / "no_model"))
    assert caught.value.exit_code == ExitCode.USAGE
