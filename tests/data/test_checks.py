"""Every check of the demonstrations and of the evaluation tasks is true of its answer, and would not be of any."""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.data.checks import TOOLS, UNCHECKED, holds, starts_programs, tools_of
from tests.data.shipped import CHECKS, EVAL_TASKS, EXAMPLES, read_lines

CHECKED = [
    (f"row {number}", row, check)
    for number, (row, check) in enumerate(zip(EXAMPLES, CHECKS, strict=True))
    if check != UNCHECKED
] + [(task["id"], task, task["check"]) for task in EVAL_TASKS if "check" in task]
ORDER = ["run_java", "run_c", "run_js", "run_shell", "run_python"]  # the dearest first


def kind_of(check):
    """The dearest program that a check starts, or "none"."""
    return next((tool for tool in ORDER if tool in tools_of(check)), "none")


def fault(name, row, check):
    """None where the check is true; else what to print of it."""
    try:
        return None if holds(check, row) else f"{name}: false: {check}"
    except Exception as error:
        return f"{name}: {type(error).__name__}: {error}: {check}"


@pytest.mark.parametrize("kind", ["none", *ORDER])
def test_every_check_is_true(kind):
    of_kind = [checked for checked in CHECKED if kind_of(checked[2]) == kind]
    missing = {tool for checked in of_kind for tool in tools_of(checked[2]) if not shutil.which(TOOLS[tool])}
    possible = [checked for checked in of_kind if not tools_of(checked[2]) & missing]
    with ThreadPoolExecutor(1 if kind == "none" else 2) as threads:  # the work is in the programs
        assert list(filter(None, threads.map(lambda checked: fault(*checked), possible))) == []
    if missing:
        names = ", ".join(TOOLS[tool] for tool in sorted(missing))
        pytest.skip(f"{len(of_kind) - len(possible)} of {len(of_kind)} checks not decided: no {names} here")
    assert len(possible) >= 5


def test_checks_fail_other_answers():
    """A check that any answer passes says nothing: it is to be false, or to raise, for the next row's answer."""
    texts = [checked for checked in CHECKED if not starts_programs(checked[2])]
    passed = []
    for (name, row, check), (_, other, _) in zip(texts, texts[1:] + texts[:1], strict=True):
        if not fault(name, {**row, "output": other["output"]}, check):
            passed.append(f"{name}: {check}")
    assert len(passed) <= 0.05 * len(texts), "\n".join(passed)


def test_checks_decide_other_answers_as_a_reader_does():
    """`decided.jsonl`: right and wrong answers to each checked evaluation task, most of them written before the writer
    had seen its check."""
    tasks = {task["id"]: task for task in EVAL_TASKS if "check" in task}
    decided = {entry["id"]: entry for entry in read_lines("tests/data/decided.jsonl")}
    assert decided.keys() == tasks.keys()
    missing = {tool for task in tasks.values() for tool in tools_of(task["check"]) if not shutil.which(TOOLS[tool])}
    wrong = []
    for name, task in tasks.items():
        if tools_of(task["check"]) & missing:
            continue
        assert len(decided[name]["right"]) >= 2 and decided[name]["wrong"], name
        answers = [(text, True) for text in decided[name]["right"]] + [(text, False) for text in decided[name]["wrong"]]
        for text, right in answers:
            if right == bool(fault(name, {**task, "output": text}, task["check"])):
                wrong.append(f"{name}: {'right' if right else 'wrong'}: {text}")
    assert wrong == []


def test_a_check_is_one_line_of_text():
    assert len(CHECKS) == len(EXAMPLES)
    assert all(isinstance(check, str) and check.strip() == check and check for check in CHECKS)
    for _, _, check in CHECKED:
        compile(check, "<check>", "eval")


def test_checks_see_nothing_but_their_row():
    row = {"instruction": "Say it twice.", "input": "ho", "output": "ho ho"}
    assert holds("output == ' '.join(2 * [input]) and words(instruction)[0] == 'Say'", row)
    assert not holds("len(items(output)) == 2", row)
    for check in ("CHECKED", "os.getcwd()", "subprocess", "code(output, 'python')"):
        with pytest.raises((NameError, ValueError)):
            holds(check, row)
    assert starts_programs("run_js(output) == '1'") and not starts_programs("len(output) == 1")
    with pytest.raises(RuntimeError, match="exit 3"):
        holds("run_shell('exit 3') == ''", row)


def test_checks_that_start_no_program_open_and_execute_nothing():
    """They may be decided of answers that a model has written."""
    forbidden = r"\b(eval|exec|open|compile|getattr|globals)\(|__[a-z]+__|\bimport\b"
    texts = [check for _, _, check in CHECKED if not starts_programs(check)]
    assert [check for check in texts if re.search(forbidden, check)] == []


def test_at_least_forty_percent_of_the_demonstrations_are_checked():
    assert sum(check != UNCHECKED for check in CHECKS) >= 0.4 * len(CHECKS)
