"""Answers that can be checked by running or parsing them, checked or not: code, JSON, tables, equations, dates."""

import csv
import datetime
import io
import json
import re
import subprocess
import sys
import textwrap

import pytest

from tests.data.shipped import ROWS, code_blocks

OUTPUTS = [row["output"] for row in ROWS.values()]
INPUTS = [row["input"] for row in ROWS.values()]

HARMLESS_MODULES = set(
    "abc argparse bisect collections contextlib copy csv dataclasses datetime decimal enum fractions functools heapq "
    "io itertools json math operator random re secrets statistics string sys textwrap threading time typing".split()
)


def is_harmless(code: str) -> bool:
    """Code that touches neither files nor the network nor the keyboard, and so may run in a test."""
    modules = re.findall(r"^\s*(?:import|from) (\w+)", code, flags=re.MULTILINE)
    return set(modules) <= HARMLESS_MODULES and not re.search(r"\b(open|input|exec|eval|__import__)\(", code)


def test_python_code_compiles_and_runs():
    blocks = code_blocks("python", OUTPUTS)
    for block in blocks:
        compile(textwrap.dedent(block), "<block>", "exec")
    harmless = [textwrap.dedent(block) for block in blocks if is_harmless(block)]
    assert len(harmless) >= 30
    # Some answers are pieces of the asker's program and use its names: only that NameError is forgiven.
    runner = (
        "import contextlib, io, json, sys\n"
        "fragments = 0\n"
        "for block in json.load(sys.stdin):\n"
        "    try:\n"
        "        with contextlib.redirect_stdout(io.StringIO()): exec(block, {'__name__': 'block'})\n"
        "    except NameError: fragments += 1\n"
        "print(fragments)"
    )
    command = [sys.executable, "-I", "-c", runner]
    run = subprocess.run(command, input=json.dumps(harmless), text=True, capture_output=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= 0.2 * len(harmless)


def test_json_answers_parse():
    whole = [text for text in OUTPUTS if re.match(r'\{\s*"|\[\s*[{"]', text)]
    blocks = [*whole, *code_blocks("json", OUTPUTS)]
    assert len(blocks) >= 10
    for block in blocks:
        json.loads(block)


def test_tables_are_rectangular():
    tables = 0
    for output in OUTPUTS:
        for table in re.findall(r"(?:^\|.*\|\n?){2,}", output, flags=re.MULTILINE):
            rows = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in table.splitlines()]
            assert len({len(row) for row in rows}) == 1, table
            assert all(re.fullmatch(r" *:?-+:? *", cell) for cell in rows[1]), table
            tables += 1
    assert tables >= 50
    for block in code_blocks("csv", OUTPUTS):
        assert len({len(row) for row in csv.reader(io.StringIO(block))}) == 1, block


NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?: ?%| (?!x |is )[a-zA-Z/]+\b|°)?"
EXPRESSION = rf"[-(]*{NUMBER}\)*(?: ?[-+*/x^] ?[-(]*{NUMBER}\)*)*"


def evaluate(expression: str) -> float:
    """ "1,200 x 3 km" → 3600"""
    expression = re.sub(r"(?<=[\d) %])x(?=[ \d(-])", "*", expression.replace(",", "")).replace("^", "**")
    expression = re.sub(r"[a-zA-Z°]+(?:/[a-zA-Z]+)?", "", expression).replace("%", "/100")
    return eval(re.sub(r"(?<![\d.])0+(?=\d)", "", expression), {"__builtins__": {}})  # digits and operators only


def equations(text: str) -> list[tuple[str, float, float, float]]:
    """Every "expression = expression" over plain numbers: (as written, left value, right value, tolerance).

    The tolerance is half a unit in the last place that the right side shows; for "≈" at least 2 % of the value.
    """
    text = text.translate(str.maketrans("×÷−·", "*/-*"))
    text = re.sub(r"[$€£](?=\d)", "", re.sub(r"(?<=[\d)])²", "^2", re.sub(r"(?<=[\d)])³", "^3", text)))
    found = []
    for line in text.splitlines():
        sides = re.split(r" ?(=|≈) ?", line)
        for before, sign, after in zip(sides[::2], sides[1::2], sides[2::2], strict=False):
            left = re.search(rf"(?<![\w.,/^)*²³√%°(!#-])(?<![-+*/x^±√\d(] )(?<! h )({EXPRESSION}) ?$", before)
            right = re.match(rf"({EXPRESSION})(?!\w|[.,]\d|[/^(!:√]| ?[-+*/x^] ?[\d(√a-z]| \d)", after)
            if not left or not right or not re.search(r"\d.*[-+*/x^]", left[1]):
                continue
            try:
                values = evaluate(left[1]), evaluate(right[1])
            except (SyntaxError, TypeError, ZeroDivisionError):
                continue  # brackets cut in half, or no plain expression
            places = max(len(decimals) for decimals in re.findall(r"\d+(?:\.(\d+))?", right[1])) + 2 * ("%" in right[1])
            tolerance = max(0.5001 * 10**-places, 0.02 * abs(values[0]) * (sign == "≈"))
            found.append((f"{left[1]} {sign} {right[1]}", *values, tolerance))
    return found


def test_equations_hold():
    assert equations("so 3 × €1.50 = €4.50, or 12 x 4 = 49 in all") == [
        ("3 * 1.50 = 4.50", 4.5, 4.5, pytest.approx(0.005, rel=1e-3)),
        ("12 x 4 = 49 in", 48, 49, pytest.approx(0.5, rel=1e-3)),
    ]
    checked = [equation for output in OUTPUTS for equation in equations(output)]
    assert len(checked) >= 200
    assert [text for text, left, right, tolerance in checked if abs(left - right) > tolerance] == []


WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()


def test_weekdays_fit_dates():
    """ "Friday, 14 March 2025" names a day that was one. Dates before the new calendar are left out."""
    pattern = rf"\b({'|'.join(WEEKDAYS)}),? (\d{{1,2}}) ({'|'.join(MONTHS)}) (\d{{4}})"
    for text in [*OUTPUTS, *INPUTS]:
        for weekday, day, month, year in re.findall(pattern, text):
            date = datetime.date(int(year), MONTHS.index(month) + 1, int(day))
            assert date < datetime.date(1583, 1, 1) or WEEKDAYS[date.weekday()] == weekday, text
