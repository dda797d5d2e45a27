"""The data that ships, held to what its datasheet says of it: seeds, prompt, demonstrations and their documents.

`reference_hashes.json` stands for two public sets of tasks whose text is not part of this project: the 175 seeds of
Self-Instruct and the 252 tasks of its evaluation suite. Each of their instructions is stored as one `hash_words` line,
each input of the suite as one `hash_text`. Equal words have equal hashes, so that ROUGE-L against them is exact.
"""

import csv
import datetime
import hashlib
import io
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from alpaca.data.similarity import TokenEncoder, rouge_l
from alpaca.generation.parsing import post_process_gpt3_response
from alpaca.generation.self_instruct import encode_prompt

ROOT = Path(__file__).resolve().parents[2]
PROMPT = (ROOT / "prompt.txt").read_text(encoding="utf-8")
SEEDS = [json.loads(line) for line in (ROOT / "seed_tasks.jsonl").read_text(encoding="utf-8").splitlines()]
EXAMPLES = json.loads((ROOT / "alpaca_data.json").read_text(encoding="utf-8"))
REFERENCE = json.loads((ROOT / "tests" / "data" / "reference_hashes.json").read_text(encoding="utf-8"))
DATASHEET = (ROOT / "docs" / "datasheet.md").read_text(encoding="utf-8")

SEED_INSTRUCTIONS = [seed["instruction"] for seed in SEEDS]
INSTRUCTIONS = [example["instruction"] for example in EXAMPLES]
SEED_INPUTS = [seed["instances"][0]["input"] for seed in SEEDS]
SEED_OUTPUTS = [seed["instances"][0]["output"] for seed in SEEDS]
INPUTS = [example["input"] for example in EXAMPLES if example["input"]]
OUTPUTS = [example["output"] for example in EXAMPLES]
ALL_TEXTS = [PROMPT, *SEED_INSTRUCTIONS, *SEED_INPUTS, *SEED_OUTPUTS, *INSTRUCTIONS, *INPUTS, *OUTPUTS]


def hash_words(text: str) -> str:
    """ "Two words" → "8-hex-digits 8-hex-digits": a text that tokenizes as many words as before, equal where equal."""
    words = re.sub(r"[^a-z0-9]+", " ", text.lower()).split()
    return " ".join(hashlib.blake2b(word.encode(), digest_size=4).hexdigest() for word in words)


def hash_text(text: str) -> str:
    """One hash of a whole text, blind to case and white space."""
    return hashlib.blake2b(" ".join(text.split()).lower().encode(), digest_size=8).hexdigest()


def similarities(candidates: list[str], pool: list[str]) -> np.ndarray:
    """ROUGE-L F of texts against texts: (M, N). In ASCII words, which the reference has hashes of."""
    encode = TokenEncoder("ascii")
    return rouge_l([encode(text) for text in candidates], [encode(text) for text in pool])


def similarities_to_reference(texts: list[str], name: str) -> np.ndarray:
    return similarities([hash_words(text) for text in texts], REFERENCE[name])


def words(text: str) -> int:
    return len(text.split())


def close_pairs(scores: np.ndarray, limit: float, texts: list[str]) -> list[str]:
    """What a failing similarity test shows: the candidates over the limit."""
    return [f"{scores[row].max():.2f} {texts[row]}" for row in np.flatnonzero((scores > limit).any(axis=1))]


# --- prompt.txt -----------------------------------------------------------------------------------------------------


def test_prompt_numbers_its_requirements_once_each():
    assert re.findall(r"^(\d+)\. ", PROMPT, flags=re.MULTILINE) == [str(number) for number in range(1, 10)]


DEMANDS = "20 varied tasks|same verb|questions|imperatives|classification|editing|reads and writes text|English"
DEMANDS += "|one or two sentences|realistic|placeholder|at most about 100 words|<noinput>|shorter than about 100 words"


@pytest.mark.parametrize("phrase", DEMANDS.split("|"))
def test_prompt_makes_every_demand(phrase):
    assert phrase in PROMPT


def test_prompt_speaks_to_any_text_model():
    assert "GPT" not in PROMPT and PROMPT.isascii()


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
    assert lines[-1] == "List of 20 tasks:" and PROMPT.endswith(":\n")


# --- seed_tasks.jsonl -----------------------------------------------------------------------------------------------


def test_seed_schema():
    assert len(SEEDS) == 175
    for index, seed in enumerate(SEEDS):
        assert list(seed) == ["id", "name", "instruction", "instances", "is_classification"]
        assert seed["id"] == f"seed_task_{index}"
        assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", seed["name"])
        assert [list(instance) for instance in seed["instances"]] == [["input", "output"]]
        assert isinstance(seed["is_classification"], bool)
        assert seed["instruction"] and seed["instances"][0]["output"]
    assert len({seed["name"] for seed in SEEDS}) == 175


def test_seed_mix():
    assert 0.25 <= sum(seed["is_classification"] for seed in SEEDS) / 175 <= 0.30
    assert 0.45 <= sum(bool(text) for text in SEED_INPUTS) / 175 <= 0.55
    assert 30 <= sum(text.endswith("?") for text in SEED_INSTRUCTIONS) <= 100  # questions as well as imperatives
    assert max(Counter(text.split()[0] for text in SEED_INSTRUCTIONS).values()) <= 5


def test_seeds_keep_to_the_rules_of_the_prompt():
    """A seed that the generator's own filters would drop, or that breaks the prompt's rules, is a bad example."""
    unsuitable = r"(?i)\b(images?|graphs?|pictures?|files?|maps?|draw|plot|go to|video|audio|music|flowchart|diagram)\b"
    for instruction, given, output in zip(SEED_INSTRUCTIONS, SEED_INPUTS, SEED_OUTPUTS, strict=True):
        assert 4 <= words(instruction) <= 60 and not re.search(unsuitable, instruction)
        assert instruction[0].isascii() and instruction[0].isalpha() and "\n" not in instruction
        assert not instruction.startswith("Write a program")
        assert words(given) <= 100 and words(output) <= 100


def test_seeds_survive_the_generators_own_parser_and_filters():
    """Shown as a teacher's answer that continues a prompt, every seed comes back as it was."""
    tasks = [{"instruction": seed["instruction"], **seed["instances"][0]} for seed in SEEDS]
    for first in range(0, len(tasks), 25):
        shown, answered = tasks[first : first + 3], tasks[first + 3 : first + 25] + tasks[first : first + 3]
        prompt, whole = encode_prompt(shown), encode_prompt(shown + answered)
        assert prompt.startswith(PROMPT.strip()) and whole.startswith(prompt)
        answer = whole[len(prompt) :].rpartition("\n###\n")[0]
        assert post_process_gpt3_response(len(shown), {"text": answer, "finish_reason": "stop"}) == answered


def test_seeds_are_unlike_each_other_and_the_known_sets():
    among = similarities(SEED_INSTRUCTIONS, SEED_INSTRUCTIONS)
    np.fill_diagonal(among, 0)
    assert close_pairs(among, 0.5, SEED_INSTRUCTIONS) == []
    for name in ("self_instruct_seeds", "evaluation_suite"):
        assert close_pairs(similarities_to_reference(SEED_INSTRUCTIONS, name), 0.5, SEED_INSTRUCTIONS) == []


# --- alpaca_data.json -----------------------------------------------------------------------------------------------

# First words of an instruction that are neither a verb nor part of a question: they set a scene or name a thing first.
OTHER_OPENERS = set(
    "a about after an another as at before below both during extractive for four from given headline here hugo i "
    "i'd i'm i've if in it items just lately my nine non-technical of on once our over p revenue role roughly "
    "someone survey the there these this three tldr to tone two under we when with without yes yesterday you "
    "your".split()
)
QUESTION_WORDS = set("what what's when which who who's whose whom where where's why how".split())
AUXILIARIES = set(
    "am are aren't can can't could did didn't do does doesn't don't has have is isn't may might must should shouldn't "
    "was were will won't would".split()
)


def leading_form(instruction: str) -> str | None:
    """The verb or question form that an instruction opens with, or None where it opens with neither.

    "Name two rivers." → "name";  "How many legs has a spider?" → "how many";  "Which is larger?" → "which is";
    "Which planet is larger?" → "which";  "Is it late?" → "is";  "My dog barks. Why?" → None
    """
    first, second = ([re.sub(r"[^a-z'-]", "", word) for word in instruction.lower().split()] + [""])[:2]
    if first in QUESTION_WORDS and (second in AUXILIARIES or first == "how"):
        return f"{first} {second}"
    return None if first in OTHER_OPENERS else first


def domain_table() -> list[dict[str, str]]:
    """The rows of the datasheet's table `| domain | rows | examples | with input | mean words of output |`."""
    table = re.search(r"^\| domain \|.*\n\|[ :|-]+\|\n((?:\|.*\n)+)", DATASHEET, flags=re.MULTILINE)[1]
    names = ["domain", "rows", "examples", "with input", "mean words"]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [dict(zip(names, cells, strict=True)) for cells in lines]


def test_format_is_that_of_2023():
    text = (ROOT / "alpaca_data.json").read_text(encoding="utf-8")
    assert text == json.dumps(EXAMPLES, indent=4)
    for example in EXAMPLES:
        assert list(example) == ["instruction", "input", "output"]
        assert all(isinstance(value, str) for value in example.values())
        assert example["instruction"] and example["output"]


def test_counts_and_lengths():
    assert len(EXAMPLES) >= 1040
    assert 0.35 <= len(INPUTS) / len(EXAMPLES) <= 0.45
    lengths = [words(output) for output in OUTPUTS]
    assert 60 <= np.mean(lengths) <= 120
    assert min(lengths) == 1 and max(lengths) > 200
    assert np.quantile(lengths, 0.15) <= 25 and np.quantile(lengths, 0.85) >= 120
    assert len(set(INPUTS)) == len(INPUTS) and len(set(OUTPUTS)) == len(OUTPUTS)


def test_domains():
    table = domain_table()
    assert len(table) >= 30 and len({row["domain"] for row in table}) == len(table)
    following = 0
    for row in table:
        first, last = map(int, row["rows"].split("-"))
        examples = EXAMPLES[first : last + 1]
        assert first == following and len(examples) == int(row["examples"]) >= 15, row
        assert int(row["with input"]) == sum(bool(example["input"]) for example in examples), row
        assert int(row["mean words"]) == round(np.mean([words(example["output"]) for example in examples])), row
        following = last + 1
    assert following == len(EXAMPLES)


def test_leading_verbs():
    forms = Counter(filter(None, map(leading_form, INSTRUCTIONS)))
    assert len(forms) >= 250
    assert max(forms.values()) <= 0.04 * len(EXAMPLES)
    first_words = Counter(instruction.split()[0].lower() for instruction in INSTRUCTIONS)
    assert max(first_words.values()) <= 0.04 * len(EXAMPLES)


def test_instructions_are_unlike_each_other_and_the_seeds():
    among = similarities(INSTRUCTIONS, INSTRUCTIONS)
    np.fill_diagonal(among, 0)
    assert close_pairs(among, 0.7, INSTRUCTIONS) == []
    assert close_pairs(similarities(INSTRUCTIONS, SEED_INSTRUCTIONS), 0.7, INSTRUCTIONS) == []
    assert close_pairs(similarities_to_reference(INSTRUCTIONS, "self_instruct_seeds"), 0.7, INSTRUCTIONS) == []


def test_no_overlap_with_the_evaluation_suite():
    assert len(REFERENCE["evaluation_suite"]) == 252 and len(REFERENCE["self_instruct_seeds"]) == 175
    assert close_pairs(similarities_to_reference(INSTRUCTIONS, "evaluation_suite"), 0.5, INSTRUCTIONS) == []
    assert not {hash_text(text) for text in [*INPUTS, *filter(None, SEED_INPUTS)]} & set(REFERENCE["evaluation_inputs"])


def test_hashed_words_give_the_same_similarities():
    sample, pool = INSTRUCTIONS[::40], INSTRUCTIONS[::7]
    hashed = similarities([hash_words(text) for text in sample], [hash_words(text) for text in pool])
    np.testing.assert_array_equal(hashed, similarities(sample, pool))


FILLER = r"(Sure|Certainly|Of course|Absolutely|(Great|Good) question|Here (is|are)|Here's|I hope|As requested)\b"
REFUSAL = r"(?i)\bas an? (ai|artificial intelligence|(large )?language model)\b|\bI (cannot|can't) (help|assist|fulfil)"
CLOSING_OFFER = r"(?i)let me know if|feel free to (ask|reach)|hope this helps|have any (other|more|further) question"


def test_no_filler_no_refusals_no_closing_offers():
    for output in [*OUTPUTS, *SEED_OUTPUTS]:
        assert not re.match(FILLER, output), output[:80]
        assert not re.search(REFUSAL, output), output[:80]
        # An e-mail in the data may close with an offer; an answer may not.
        assert not re.search(CLOSING_OFFER, output.splitlines()[-1]), output[-80:]


PLACEHOLDER = r"\[(Your|Name|Date|Company|Recipient|Address|[Ii]nsert)\b[A-Za-z' ]*\]"


def test_no_placeholders():
    for instruction, output in zip(INSTRUCTIONS + SEED_INSTRUCTIONS, OUTPUTS + SEED_OUTPUTS, strict=True):
        assert "template" in instruction.lower() or not re.search(PLACEHOLDER, output), output
        assert not re.search(r"(?i)lorem ipsum|<noinput>|\bN/A\b", output + instruction), instruction
    assert not [text for text in INPUTS if re.fullmatch(r"(?i)\W*(n/?a|none|noinput|no input)\W*", text)]


def test_typography():
    for text in ALL_TEXTS:
        assert not re.search(r"[‘’“”…\u00a0\u00ad\u200b\ufeff\ufffd\r\x00-\x08]", text), text
        assert not re.search(r"[ \t]+$", text, flags=re.MULTILINE), f"trailing space: {text}"
        assert text is PROMPT or (text == text.rstrip() and not text.startswith("\n")), text
    for text in [*OUTPUTS, *SEED_OUTPUTS, *INSTRUCTIONS]:  # an input may show mojibake that the task is to repair
        assert not re.search(r"[ÃÂâ][\u0080-\u00bf€™]", text), f"mojibake: {text}"


# --- answers that can be checked by running or parsing them ---------------------------------------------------------


def code_blocks(language: str, texts: list[str]) -> list[str]:
    pattern = re.compile(rf"^```{language}\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
    return [block for text in texts for block in pattern.findall(text)]


HARMLESS_MODULES = set(
    "abc argparse bisect collections contextlib copy csv dataclasses datetime decimal enum fractions functools heapq "
    "io itertools json math operator random re secrets statistics string sys textwrap threading time typing".split()
)


def is_harmless(code: str) -> bool:
    """Code that touches neither files nor the network nor the keyboard, and so may run in a test."""
    modules = re.findall(r"^\s*(?:import|from) (\w+)", code, flags=re.MULTILINE)
    return set(modules) <= HARMLESS_MODULES and not re.search(r"\b(open|input|exec|eval|__import__)\(", code)


def test_python_code_compiles_and_runs():
    blocks = code_blocks("python", [*OUTPUTS, *SEED_OUTPUTS])
    for block in blocks:
        compile(block, "<block>", "exec")
    harmless = [block for block in blocks if is_harmless(block)]
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
    whole = [text for text in [*OUTPUTS, *SEED_OUTPUTS] if re.match(r'\{\s*"|\[\s*[{"]', text)]
    blocks = [*whole, *code_blocks("json", OUTPUTS)]
    assert len(blocks) >= 10
    for block in blocks:
        json.loads(block)


def test_tables_are_rectangular():
    tables = 0
    for output in [*OUTPUTS, *SEED_OUTPUTS]:
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
            left = re.search(rf"(?<![\w.,/^)*²³√%°(!#-])(?<![-+*/x^±√\d(] )({EXPRESSION}) ?$", before)
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
    checked = [equation for output in [*OUTPUTS, *SEED_OUTPUTS] for equation in equations(output)]
    assert len(checked) >= 200
    assert [text for text, left, right, tolerance in checked if abs(left - right) > tolerance] == []


WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()


def test_weekdays_fit_dates():
    """ "Friday, 14 March 2025" names a day that was one."""
    pattern = rf"\b({'|'.join(WEEKDAYS)}),? (\d{{1,2}}) ({'|'.join(MONTHS)}) (\d{{4}})"
    for text in [*OUTPUTS, *INPUTS]:
        for weekday, day, month, year in re.findall(pattern, text):
            date = datetime.date(int(year), MONTHS.index(month) + 1, int(day))
            assert WEEKDAYS[date.weekday()] == weekday, text


# --- documents ------------------------------------------------------------------------------------------------------


DATASHEET_SECTIONS = "Motivation|Composition|Collection process|Preprocessing, cleaning and labelling|Uses|Distribution"
DATASHEET_SECTIONS += "|Maintenance|How the released 52K differs"
MODEL_CARD_SECTIONS = "Model details|Intended use|Factors|Metrics|Evaluation data|Training data|Quantitative analyses"
MODEL_CARD_SECTIONS += "|Ethical considerations|Caveats and recommendations"


@pytest.mark.parametrize(
    ("name", "sections"), [("docs/datasheet.md", DATASHEET_SECTIONS), ("docs/model_card.md", MODEL_CARD_SECTIONS)]
)
def test_documents_have_their_sections(name, sections):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == sections.split("|")


def test_datasheet_states_the_counts():
    lengths = [words(output) for output in OUTPUTS]
    text = " ".join(DATASHEET.split())
    assert f"{len(EXAMPLES):,} demonstrations in {len(domain_table())} domains" in text
    assert f"{len(INPUTS)} of them ({len(INPUTS) / len(EXAMPLES):.0%}) have an input" in text
    assert f"{np.mean(lengths):.0f} words on average (median {np.median(lengths):.0f}, longest {max(lengths)})" in text


def test_licences_carry_their_full_text():
    apache = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in apache and "END OF TERMS AND CONDITIONS" in apache
    data = (ROOT / "DATA_LICENSE").read_text(encoding="utf-8")
    legal_text = " ".join(data[data.index("Attribution 4.0 International\n") :].split())
    assert all(f"Section {number} --" in legal_text for number in range(1, 9))
    assert hashlib.sha256(legal_text.encode()).hexdigest().startswith("25a40a30d753162c4026b87a389b9534")
