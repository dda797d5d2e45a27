"""The seed tasks: their form, their mix, and that they keep to the rules that the prompt gives the teacher."""

import re
from collections import Counter

import numpy as np

from alpaca.data.words import find_words
from alpaca.generation.parsing import BLACKLIST, post_process_gpt3_response
from alpaca.generation.self_instruct import encode_prompt
from tests.data.overlap import close_pairs, similarities, similarities_to_reference
from tests.data.shipped import SEEDS, first_word, read_lines, words

INSTRUCTIONS = [seed["instruction"] for seed in SEEDS]


def test_schema():
    seeds = read_lines("seed_tasks.jsonl")
    assert len(seeds) == 175
    for index, seed in enumerate(seeds):
        assert list(seed) == ["id", "name", "instruction", "instances", "is_classification"]
        assert seed["id"] == f"seed_task_{index}"
        assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", seed["name"])
        assert [list(instance) for instance in seed["instances"]] == [["input", "output"]]
        assert isinstance(seed["is_classification"], bool)
        assert seed["instruction"] and seed["instances"][0]["output"]
    assert len({seed["name"] for seed in seeds}) == 175


def test_mix():
    assert 0.25 <= sum(seed["is_classification"] for seed in SEEDS) / 175 <= 0.30
    assert 0.45 <= sum(bool(seed["input"]) for seed in SEEDS) / 175 <= 0.55
    assert 30 <= sum(text.endswith("?") for text in INSTRUCTIONS) <= 100  # questions as well as imperatives
    assert max(Counter(map(first_word, INSTRUCTIONS)).values()) <= 0.1 * 175


def test_they_keep_to_the_rules_of_the_prompt():
    """A seed that the generator's own filters would drop, or that breaks the prompt's rules, is a bad example."""
    for seed in SEEDS:
        instruction = seed["instruction"]
        assert 4 <= words(instruction) <= 60 and not find_words(BLACKLIST, instruction), instruction
        assert instruction[0].isascii() and instruction[0].isalpha() and "\n" not in instruction
        assert not instruction.startswith("Write a program")
        assert words(seed["input"]) <= 150 and words(seed["output"]) <= 250
        assert "###" not in seed["input"] + seed["output"]
        code = re.match(r"(def |SELECT |function |assert |\.\w+ \{|grep )", seed["output"])
        assert not code, f"no fence: {seed['output']}"


def test_they_survive_the_generators_own_parser_and_filters():
    """Shown as a teacher's answer that continues a prompt, every seed comes back as it was."""
    tasks = [{part: seed[part] for part in ("instruction", "input", "output")} for seed in SEEDS]
    for first in range(0, len(tasks), 25):
        shown, answered = tasks[first : first + 3], tasks[first + 3 : first + 25] + tasks[first : first + 3]
        # Without the words before the list, which say how many are shown.
        asked, whole = (encode_prompt(some).partition("List of ")[2] for some in (shown, shown + answered))
        assert whole.startswith(asked)
        answer = whole[len(asked) :].rpartition("\n###\n")[0]
        assert post_process_gpt3_response(len(shown), {"text": answer, "finish_reason": "stop"}) == answered


def test_they_are_unlike_each_other_and_the_known_sets():
    among = similarities(INSTRUCTIONS, INSTRUCTIONS)
    np.fill_diagonal(among, 0)
    assert close_pairs(among, 0.5, INSTRUCTIONS) == []
    for name in ("self_instruct_seeds", "evaluation_suite"):
        assert close_pairs(similarities_to_reference(INSTRUCTIONS, name), 0.5, INSTRUCTIONS) == []
