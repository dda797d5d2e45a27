"""The instruction to the teacher: what it demands, and that the code and the filters agree with it."""

import re

import pytest

from alpaca.generation.parsing import BLACKLIST, DEFAULT_LIMITS
from alpaca.generation.self_instruct import TASKS_PER_PROMPT, encode_prompt
from tests.data.shipped import PROMPT, SEEDS


def test_requirements_are_numbered():
    assert re.findall(r"^(\d+)\. ", PROMPT, flags=re.MULTILINE) == [str(number) for number in range(1, 14)]


DEMANDS = """as a real person would type it|Do not hunt for rare verbs|hasty typing|Vary the kind of task|classification
Do not repeat or rephrase|reads and writes text|in English, apart from the words or texts of another language
one or two sentences|an imperative or a question|begins with a letter|"Write a program"|four tasks in ten
never a mere placeholder|<noinput>|a third are hard|can't be answered from what is given|as long as the task needs
the steps before the result|Recompute every sum|Invent nothing about the user|[Name]|what changes with time
no greeting|between lines of three backticks|No line of a task begins with ###"""


@pytest.mark.parametrize("phrase", re.split(r"[|\n]", DEMANDS))
def test_the_prompt_makes_every_demand(phrase):
    assert phrase in PROMPT


def test_nothing_asks_for_different_verbs_or_short_answers_alone():
    assert not re.search(r"same verb|different verb|English only|Everything is in English|than about 100 words", PROMPT)


def test_the_filters_words_and_limits_are_those_of_the_prompt():
    listed = re.search(r"one of these words, whatever it means there: (.*)\.\n", PROMPT)[1].split(", ")
    assert listed == [word for word in BLACKLIST if word not in ("images", "graphs", "pictures", "files", "maps")]
    assert DEFAULT_LIMITS.min_words == 4  # "at least four words"


def test_it_speaks_to_any_text_model():
    assert "GPT" not in PROMPT and PROMPT.isascii()


@pytest.mark.parametrize("shown", [0, 3, 7])
def test_the_number_of_tasks_is_left_to_the_code(shown):
    assert not re.search(r"\b(20|twenty|4 to)\b", PROMPT)
    prompt = encode_prompt(SEEDS[:shown])
    assert prompt.startswith(f"Write tasks {shown + 1} to {TASKS_PER_PROMPT} of a set of {TASKS_PER_PROMPT} ")
    assert f"numbered from 1 to {TASKS_PER_PROMPT}." in prompt and f"\nList of {TASKS_PER_PROMPT} tasks:\n" in prompt
    assert prompt.endswith(f"\n###\n{shown + 1}. Instruction:") and "{first}" not in prompt and "{last}" not in prompt


def test_numbered_examples_continue_the_prompt():
    lines = PROMPT.splitlines()
    layout = lines.index("###")
    assert lines[layout : layout + 6] == [
        "###",
        "<number>. Instruction: <the instruction, on this line>",
        "<number>. Input:",
        "<the input, or <noinput>>",
        "<number>. Output:",
        "<the output>",
    ]
    assert lines[-1] == "List of {last} tasks:" and PROMPT.endswith(":\n")
