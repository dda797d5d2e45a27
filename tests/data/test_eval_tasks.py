"""The evaluation tasks: their form, their proportions, and that eval.py reads them."""

import re
from collections import Counter

import pytest

from alpaca.data.examples import load_examples
from alpaca.evaluation.pairs import read_answers
from tests.data.checks import starts_programs
from tests.data.shipped import EVAL_TASKS, ROOT, read, read_lines, words

CANARY = "alpaca-eval-tasks-canary:7c1f0b52-9d0e-4b3c-8a57-6f2e41d9b8c3"
PROPORTIONS = [  # of what people ask, in percent
    ({"writing"}, 20),
    ({"rewriting"}, 8),
    ({"closed_question"}, 12),
    ({"open_question"}, 15),
    ({"extraction", "classification"}, 12),
    ({"summarising"}, 6),
    ({"brainstorming"}, 8),
    ({"code"}, 6),
    ({"reasoning"}, 8),
    ({"unanswerable", "unsafe"}, 5),
]


def test_form():
    for number, task in enumerate(read_lines("eval_tasks.jsonl")):
        assert list(task)[:6] == ["id", "category", "level", "instruction", "input", "output"]
        assert list(task)[6:] in ([], ["check"])
        assert task.pop("level") in (1, 2, 3) and all(isinstance(value, str) for value in task.values())
        assert task["id"] == f"eval_task_{number}"
        assert task["instruction"] and task["output"]
    assert len({(task["instruction"], task["input"]) for task in EVAL_TASKS}) == len(EVAL_TASKS) == 200


def test_proportions():
    counts = Counter(task["category"] for task in EVAL_TASKS)
    assert set(counts) == {name for names, _ in PROPORTIONS for name in names}
    assert sum(percent for _, percent in PROPORTIONS) == 100
    found = [100 * sum(counts[name] for name in names) / len(EVAL_TASKS) for names, _ in PROPORTIONS]
    assert found == pytest.approx([percent for _, percent in PROPORTIONS], abs=1)


def test_three_levels_of_difficulty():
    counts = Counter(task["level"] for task in EVAL_TASKS)
    assert set(counts) == {1, 2, 3} and min(counts.values()) >= 0.2 * len(EVAL_TASKS)


def test_closed_questions_have_their_text():
    """What is asked about, rewritten, summarised or extracted from is there; most of it is no single line."""
    for task in EVAL_TASKS:
        if task["category"] in ("closed_question", "summarising", "extraction", "classification"):
            assert words(task["input"]) >= 10 or words(task["instruction"]) >= 30, task["id"]
    long = [task for task in EVAL_TASKS if words(task["input"]) >= 100]
    assert len(long) >= 15


def test_a_third_has_a_check_and_most_of_these_start_no_program():
    """These can be decided of a model's answers without running anything that the model wrote."""
    checks = [task["check"] for task in EVAL_TASKS if "check" in task]
    assert len(checks) >= len(EVAL_TASKS) / 3
    assert sum(not starts_programs(check) for check in checks) >= 0.8 * len(checks)


def test_the_commands_read_them():
    path = str(ROOT / "eval_tasks.jsonl")
    answers = read_answers(path, "--data_path")
    assert [answer["category"] for answer in answers] == [task["category"] for task in EVAL_TASKS]
    examples = load_examples(path, need_output=False)
    assert [example["output"] for example in examples] == [task["output"] for task in EVAL_TASKS]


@pytest.mark.parametrize("name", ["docs/datasheet.md", "docs/evaluation.md"])
def test_documents_forbid_to_train_on_them_and_name_the_canary(name):
    text = " ".join(read(name).split())
    assert CANARY in text and re.search(r"(?i)never (to be )?train(ed)? on", text)


def test_no_training_file_has_the_canary():
    for name in ("alpaca_data.json", "seed_tasks.jsonl", "prompt.txt", "eval_tasks.jsonl"):
        assert CANARY not in read(name)
