"""The demonstrations: their form and mix, and the shares that `tags.jsonl` and measuring give."""

import json
import re
from collections import Counter
from itertools import groupby

import numpy as np
import pytest

from tests.data.shipped import EXAMPLES, INPUTS, INSTRUCTIONS, OUTPUTS, TAGS, first_word, read, tagged, words

CODE = "python sql javascript java c shell spreadsheet latex html regex".split()
QUOTAS = {"informal": 0.05, "unanswerable": 0.04, "unsafe": 0.03, "languages": 0.05}


def share(rows):
    return len(rows) / len(EXAMPLES)


def test_format_is_that_of_2023():
    assert read("alpaca_data.json") == json.dumps(EXAMPLES, indent=4)
    for example in EXAMPLES:
        assert list(example) == ["instruction", "input", "output"]
        assert all(isinstance(value, str) for value in example.values())
        assert example["instruction"] and example["output"]


def test_tags_are_known():
    assert len(TAGS) == len(EXAMPLES)
    for entry in TAGS:
        assert list(entry) == ["domain", "tags"] and entry["domain"]
        assert set(entry["tags"]) <= {*QUOTAS, *CODE, "reasoning", "yes_no"}, entry
        assert len(set(entry["tags"])) == len(entry["tags"])


def test_each_domain_is_one_run_of_rows():
    runs = [(domain, len(list(entries))) for domain, entries in groupby(TAGS, key=lambda entry: entry["domain"])]
    assert len({domain for domain, _ in runs}) == len(runs) >= 43
    assert all(size >= 10 for _, size in runs), runs


def test_counts_and_lengths():
    assert len(EXAMPLES) >= 1900
    assert 0.35 <= share(INPUTS) <= 0.5
    lengths = [words(output) for output in OUTPUTS]
    assert min(lengths) == 1 and max(lengths) > 500
    assert np.quantile(lengths, 0.1) <= 25 and np.median(lengths) >= 60
    assert len(set(INPUTS)) == len(INPUTS)


def test_long_outputs_and_long_inputs():
    assert share([output for output in OUTPUTS if words(output) >= 300]) >= 0.15
    assert share([text for text in INPUTS if 150 <= words(text) <= 400]) >= 0.10


@pytest.mark.parametrize("tag", QUOTAS)
def test_quotas(tag):
    assert share(tagged(tag)) >= QUOTAS[tag]


def test_informal_instructions_are_typed_carelessly():
    """No capital, no stop, or several questions at once."""
    instructions = [INSTRUCTIONS[row] for row in tagged("informal")]
    neat = [text for text in instructions if not text[0].islower() and text[-1] in ".?!" and text.count("?") < 2]
    assert len(neat) <= 0.1 * len(instructions), neat


@pytest.mark.parametrize("language", CODE)
def test_code_in_many_languages(language):
    assert len(tagged(language)) >= 5


def test_code_is_tagged_by_its_fences():
    fences = {**{name: name for name in CODE}, "bash": "shell", "excel": "spreadsheet"}
    for row, output in enumerate(OUTPUTS):
        languages = re.findall(r"^[ \t]*```([a-z+]+)$", output, flags=re.MULTILINE)
        assert {fences[name] for name in languages if name in fences} <= set(TAGS[row]["tags"]), row


def test_the_twenty_most_frequent_first_words_begin_half_of_the_instructions():
    """People say "Write" and "What is" again and again: neither a thesaurus of rare verbs nor three verbs for all."""
    counts = Counter(map(first_word, INSTRUCTIONS))
    assert 0.40 <= sum(count for _, count in counts.most_common(20)) / len(EXAMPLES) <= 0.60
    assert {"write", "what", "how", "explain", "give", "make", "create"} <= {word for word, _ in counts.most_common(20)}
    assert max(counts.values()) <= 0.12 * len(EXAMPLES)


def test_yes_and_no_are_balanced():
    """Of the answers that begin with one of them, and of the questions that are tagged so."""
    first = Counter(output.split()[0].strip(",.:;!") for output in OUTPUTS)
    assert 0.67 <= first["Yes"] / first["No"] <= 1.5, (first["Yes"], first["No"])
    answers = {EXAMPLES[row]["output"].split()[0].strip(",.:;!") for row in tagged("yes_no")}
    assert answers <= {"Yes", "No", "yes", "no", "YES", "NO"}, answers
