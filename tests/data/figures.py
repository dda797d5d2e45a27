"""The figures of docs/datasheet.md, measured: `python -m tests.data.figures` prints them as they stand there."""

from collections import Counter
from itertools import groupby

import numpy as np

from tests.data.checks import UNCHECKED, tools_of
from tests.data.shipped import (
    CHECKS,
    EVAL_TASKS,
    EXAMPLES,
    INPUTS,
    INSTRUCTIONS,
    OUTPUTS,
    SEEDS,
    TAGS,
    first_word,
    read_lines,
    words,
)

COUNTED = {  # tag → what the datasheet calls it
    "informal": "typed carelessly: typos, no capitals or full stops, two questions at once",
    "reasoning": "steps before the result",
    "unanswerable": "not to be answered from what is given, or built on a false premise",
    "unsafe": "unsafe or borderline, with a graded answer",
    "languages": "in or about another language",
    "yes_no": "a yes-or-no question answered with Yes or No first",
}
LANGUAGES = "python sql javascript shell spreadsheet html java c latex regex".split()
STARTED = {"run_python": "Python", "run_js": "JavaScript", "run_c": "C", "run_java": "Java", "run_shell": "shell"}


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%"


def rows_of_domains() -> list[tuple[str, int, int]]:
    """(domain, its first row, its last row), in the order of the file."""
    found, first = [], 0
    for domain, entries in groupby(TAGS, key=lambda entry: entry["domain"]):
        count = len(list(entries))
        found.append((domain, first, first + count - 1))
        first += count
    return found


def domains() -> list[str]:
    lines = ["| domain | rows | examples | with input | checked | mean words of output |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for domain, first, last in rows_of_domains():
        rows = range(first, last + 1)
        with_input = sum(bool(EXAMPLES[row]["input"]) for row in rows)
        checked = sum(CHECKS[row] != UNCHECKED for row in rows)
        mean = np.mean([words(OUTPUTS[row]) for row in rows])
        lines.append(f"| {domain} | {first}-{last} | {len(rows)} | {with_input} | {checked} | {mean:.0f} |")
    return lines


def shares() -> list[str]:
    count = len(EXAMPLES)
    lengths = [words(output) for output in OUTPUTS]
    counted = {
        "demonstrations": count,
        "with an input": len(INPUTS),
        "input of 150 to 400 words": sum(150 <= words(text) <= 400 for text in INPUTS),
        "output of 300 words and more": sum(length >= 300 for length in lengths),
        "output of one to three words": sum(length <= 3 for length in lengths),
        **{name: sum(tag in entry["tags"] for entry in TAGS) for tag, name in COUNTED.items()},
        "code: " + ", ".join(f"{name} {sum(name in entry['tags'] for entry in TAGS)}" for name in LANGUAGES): sum(
            bool(set(LANGUAGES) & set(entry["tags"])) for entry in TAGS
        ),
        "machine-checked": sum(check != UNCHECKED for check in CHECKS),
    }
    lines = ["| | rows | share |", "| --- | ---: | ---: |"]
    return lines + [f"| {name} | {number:,} | {percent(number, count)} |" for name, number in counted.items()]


def sentences() -> list[str]:
    lengths = [words(output) for output in OUTPUTS]
    first = Counter(map(first_word, INSTRUCTIONS))
    common = first.most_common(20)
    begin = Counter(output.split()[0].strip(",.:;!") for output in OUTPUTS)
    checks = [check for check in CHECKS if check != UNCHECKED]
    started = ", ".join(f"{name} {sum(tool in tools_of(c) for c in checks)}" for tool, name in STARTED.items())
    database = sum("sql(" in check for check in checks)
    cleared = read_lines("tests/data/cleared_pairs.jsonl")
    kinds = Counter(task["category"].replace("_", " ") for task in EVAL_TASKS)
    levels = Counter(task["level"] for task in EVAL_TASKS)
    return [
        f"- Outputs have {np.mean(lengths):.0f} words on average (median {np.median(lengths):.0f}, longest "
        f"{max(lengths)}); instructions {np.mean([words(text) for text in INSTRUCTIONS]):.0f}, inputs, where there is "
        f"one, {np.mean([words(text) for text in INPUTS]):.0f}.",
        f"- Instructions begin with {len(first)} different words. The 20 most frequent begin "
        f"{percent(sum(number for _, number in common), len(EXAMPLES))} of them: "
        f"{', '.join(f'{word} {number}' for word, number in common)}.",
        f"- Of the outputs, {begin['Yes']} begin with Yes and {begin['No']} with No.",
        f"- Checks that start a program: {started}; that query a database: {database}. The other "
        f"{sum(not tools_of(check) and 'sql(' not in check for check in checks)} compute on the text.",
        f"- {len(cleared)} pairs of near examples were read and found to be two tasks.",
        f"- Of the {len(SEEDS)} seeds, {sum(seed['is_classification'] for seed in SEEDS)} are classification tasks and "
        f"{sum(bool(seed['input']) for seed in SEEDS)} have an input.",
        f"- Of the {len(EVAL_TASKS)} evaluation tasks, {sum(bool(task['input']) for task in EVAL_TASKS)} have an input "
        f"and {sum('check' in task for task in EVAL_TASKS)} a check; levels 1, 2 and 3 have "
        f"{', '.join(str(levels[level]) for level in (1, 2, 3))}; "
        f"{', '.join(f'{name} {number}' for name, number in kinds.most_common())}.",
    ]


if __name__ == "__main__":
    print("\n\n".join("\n".join(part()) for part in (shares, sentences, domains)))
