"""Demonstrations, seeds, evaluation tasks and the 252 tasks of Self-Instruct's evaluation suite keep their distance.

By ROUGE-L of instructions, as the generator measures it, and by the rare words of whole examples, which also find one
task in two wordings. Pairs that share many rare words were read. Those that are two tasks all the same, mostly of one
subject, are in `cleared_pairs.jsonl`, each with a hash of both texts: where one of them changes, it is to be read anew.
"""

import hashlib

import numpy as np
import pytest

from tests.data import overlap
from tests.data.overlap import REFERENCE, close_pairs, hash_text, hash_words, similarities, similarities_to_reference
from tests.data.shipped import EVAL_TASKS, EXAMPLES, INPUTS, INSTRUCTIONS, ROWS, SEEDS, read_lines

SEED_INSTRUCTIONS = [seed["instruction"] for seed in SEEDS]
EVAL_INSTRUCTIONS = [task["instruction"] for task in EVAL_TASKS]
LIMITS = {  # cosine of the rare words of whole examples: pairs above it are read
    ("row", "suite"): 0.25,
    ("seed", "suite"): 0.25,
    ("eval", "suite"): 0.25,
    ("row", "eval"): 0.25,
    ("seed", "eval"): 0.25,
    ("row", "seed"): 0.3,
    ("row", "row"): 0.35,
    ("seed", "seed"): 0.3,
    ("eval", "eval"): 0.3,
}


def kind(name):
    return name.split()[0].partition("_")[0]  # "eval_task_4" → "eval"


def pairs_to_read():
    """{"row 12, suite 5": cosine} of the pairs above their limit, in the order of the files."""
    names, cosines = overlap.whole_example_cosines()
    lowest = min(LIMITS.values())
    found = {}
    for first, second in zip(*np.nonzero(np.triu(cosines > lowest, k=1)), strict=True):
        kinds = kind(names[first]), kind(names[second])
        limit = LIMITS.get(kinds) or LIMITS.get(kinds[::-1], 2)  # the suite's own pairs are no matter
        if cosines[first, second] > limit:
            found[f"{names[first]}, {names[second]}"] = float(cosines[first, second])
    return found


def content_of(pair):
    """A hash of both texts of a pair."""
    texts = []
    for name in pair.split(", "):
        bag = REFERENCE["evaluation_suite_bags"][int(name.split()[1])] if kind(name) == "suite" else None
        texts.append(bag or overlap.whole(ROWS[name]))
    return hashlib.blake2b("\n\n".join(texts).encode(), digest_size=6).hexdigest()


def test_every_pair_of_near_examples_was_read():
    cleared = {entry["pair"]: entry for entry in read_lines("tests/data/cleared_pairs.jsonl")}
    found = pairs_to_read()
    unread = [f"{pair} {found[pair]:.2f}" for pair in found if pair not in cleared]
    changed = [pair for pair in found if pair in cleared and cleared[pair]["content"] != content_of(pair)]
    assert (unread, changed) == ([], [])
    assert [pair for pair in cleared if pair not in found] == []  # no pair stays in the list for nothing
    assert all(entry["why"] for entry in cleared.values())


def test_no_whole_example_is_a_twin():
    """However a pair was judged: none is nearer than this."""
    assert {pair: cosine for pair, cosine in pairs_to_read().items() if cosine > 0.55} == {}


def test_the_measure_finds_one_task_in_two_wordings():
    """And ROUGE-L of the instructions does not: the content is in the input."""
    first = {**EXAMPLES[0], "instruction": "What is this about?", "input": INPUTS[7], "output": INPUTS[8]}
    second = {"instruction": "Sum it up for my boss, please.", "input": "", "output": f"{INPUTS[7]}\n{INPUTS[9]}"}
    bags = [overlap.hash_bag(overlap.whole(example)) for example in [first, second, *EXAMPLES[:100]]]
    cosines = overlap.rare_word_cosines(bags)
    assert similarities([first["instruction"]], [second["instruction"]]).max() < 0.3
    assert cosines[0, 1] > 0.35


def test_rare_word_cosines_equal_their_definition():
    """Every pair by itself, in Python's floats."""
    examples = [*EXAMPLES[:40], *SEEDS[:10]]
    bags = [overlap.hash_bag(overlap.whole(example)).split() for example in examples]
    found_in = {word: sum(word in bag for bag in bags) for bag in bags for word in bag}

    def vector(bag):
        return {w: (1 + np.log(bag.count(w))) * np.log(len(bags) / found_in[w]) for w in set(bag)}

    def cosine(a, b):
        dot = sum(weight * b.get(word, 0) for word, weight in a.items())
        return dot / np.sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))

    vectors = [vector(bag) for bag in bags]
    slow = np.array([[cosine(a, b) for b in vectors] for a in vectors])
    fast = overlap.rare_word_cosines([" ".join(bag) for bag in bags])
    np.fill_diagonal(slow, 0)
    np.fill_diagonal(fast, 0)  # words of one example alone are in the norm, not in the product
    np.testing.assert_allclose(fast, slow, atol=1e-5)


def test_instructions_are_unlike_each_other_and_the_seeds():
    among = similarities(INSTRUCTIONS, INSTRUCTIONS)
    np.fill_diagonal(among, 0)
    assert close_pairs(among, 0.7, INSTRUCTIONS) == []
    assert close_pairs(similarities(INSTRUCTIONS, SEED_INSTRUCTIONS), 0.7, INSTRUCTIONS) == []
    assert close_pairs(similarities_to_reference(INSTRUCTIONS, "self_instruct_seeds"), 0.7, INSTRUCTIONS) == []


@pytest.mark.parametrize("texts", [INSTRUCTIONS, EVAL_INSTRUCTIONS], ids=["demonstrations", "evaluation tasks"])
def test_no_instruction_is_like_one_of_the_evaluation_suite(texts):
    assert len(REFERENCE["evaluation_suite"]) == len(REFERENCE["evaluation_suite_bags"]) == 252
    assert close_pairs(similarities_to_reference(texts, "evaluation_suite"), 0.5, texts) == []


def test_evaluation_tasks_are_unlike_what_is_trained_on():
    among = similarities(EVAL_INSTRUCTIONS, EVAL_INSTRUCTIONS)
    np.fill_diagonal(among, 0)
    assert close_pairs(among, 0.6, EVAL_INSTRUCTIONS) == []
    for texts in (INSTRUCTIONS, SEED_INSTRUCTIONS):
        assert close_pairs(similarities(EVAL_INSTRUCTIONS, texts), 0.6, EVAL_INSTRUCTIONS) == []
    assert (
        close_pairs(similarities_to_reference(EVAL_INSTRUCTIONS, "self_instruct_seeds"), 0.6, EVAL_INSTRUCTIONS) == []
    )


def test_no_input_is_shared():
    inputs = [row["input"] for row in ROWS.values() if row["input"]]
    assert not {hash_text(text) for text in inputs} & set(REFERENCE["evaluation_inputs"])
    assert len({hash_text(text) for text in inputs}) == len(inputs)


def test_hashed_words_give_the_same_similarities():
    assert len(REFERENCE["self_instruct_seeds"]) == 175
    sample, pool = INSTRUCTIONS[::40], INSTRUCTIONS[::7]
    hashed = similarities([hash_words(text) for text in sample], [hash_words(text) for text in pool])
    np.testing.assert_array_equal(hashed, similarities(sample, pool))
