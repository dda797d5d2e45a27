"""Prompts, parsing and what is kept: 2023's layout, filters and similarity, and what teachers really write."""

import json
import random
import re
import string
import time

import numpy as np
import pytest
from rouge_score import rouge_scorer

from alpaca.common import ExitCode, ExpectedError
from alpaca.data.similarity import TokenEncoder, rouge_l
from alpaca.generation.parsing import (
    BLACKLIST,
    DEFAULT_LIMITS,
    find_word_in_string,
    parse_response,
    post_process_gpt3_response,
)
from alpaca.generation.self_instruct import (
    Collection,
    encode_prompt,
    largest,
    read_seed_tasks,
    sample_seed_tasks,
)
from tests.conftest import ROOT
from tests.teacher.teacher_server import answer_text

TASKS = [
    {"instruction": "Name three rivers in Europe.", "input": "", "output": "Rhine, Danube, Elbe"},
    {"instruction": "Sort these words by length.", "input": "pear fig banana", "output": "fig, pear, banana"},
    {
        "instruction": "Explain why the sky is blue.",
        "input": "",
        "output": "Air scatters blue light more.\n\nThat is all.",
    },
]


def written(tasks, first=4, separator="###\n", head=True, header="{n}. {part}:"):
    """Tasks in the layout that the prompt asks for, with variations."""
    parts = []
    for n, task in enumerate(tasks, first):
        lines = [header.format(n=n, part="Instruction") + " " + task["instruction"]]
        lines += [header.format(n=n, part="Input"), task["input"] or "<noinput>"]
        lines += [header.format(n=n, part="Output"), task["output"]]
        parts.append("\n".join(lines) + "\n")
    text = separator.join(parts)
    return text if head else text.removeprefix(header.format(n=first, part="Instruction"))


def parsed(text, finish_reason="stop"):
    return post_process_gpt3_response(3, {"text": text, "finish_reason": finish_reason})


def test_prompt_layout():
    prompt = encode_prompt([{**TASKS[1], "instruction": " Sort these\n words: "}, TASKS[0]])
    assert prompt.startswith((ROOT / "prompt.txt").read_text())
    assert prompt.endswith(
        "\n###\n1. Instruction: Sort these words\n1. Input:\npear fig banana\n1. Output:\nfig, pear, banana\n"
        "###\n2. Instruction: Name three rivers in Europe.\n2. Input:\n<noinput>\n2. Output:\nRhine, Danube, Elbe\n"
        "###\n3. Instruction:"
    )


def test_prompt_depends_on_seed_and_number_only():
    tasks = read_seed_tasks(str(ROOT / "seed_tasks.jsonl"), at_least=3)
    forward = [sample_seed_tasks(tasks, number, 0, 3) for number in range(50)]
    backward = [sample_seed_tasks(tasks, number, 0, 3) for number in reversed(range(50))]
    assert forward == backward[::-1]
    assert [sample_seed_tasks(tasks, number, 1, 3) for number in range(50)] != forward
    assert len({tuple(task["id"] for task in sample) for sample in forward}) > 45
    assert all(len({task["id"] for task in sample}) == 3 for sample in forward)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(written(TASKS, head=False), id="behind the prompt's last line"),
        pytest.param(written(TASKS), id="prompt's last line repeated"),
        pytest.param("###\n" + written(TASKS) + "###\n", id="separators all around"),
        pytest.param(written(TASKS, separator="##\n"), id="two hashes"),
        pytest.param(written(TASKS, separator="\n---\n\n"), id="rules"),
        pytest.param(written(TASKS, separator=""), id="no separators"),
        pytest.param(written(TASKS, separator="\n\n"), id="blank lines"),
        pytest.param("```\n" + written(TASKS) + "```", id="fenced"),
        pytest.param("Here are the tasks:\n\n```text\n" + written(TASKS) + "```\n", id="preamble and fence"),
        pytest.param("Sure! Here is the list.\n" + written(TASKS), id="preamble"),
        pytest.param(written(TASKS).replace("\n", "\r\n"), id="CRLF"),
        pytest.param(written(TASKS, head=False).replace("\n", "\r\n"), id="CRLF behind the prompt"),
        pytest.param(written(TASKS, header="**{n}. {part}:**"), id="bold"),
        pytest.param(written(TASKS, header="{n}. **{part}:**"), id="bold name"),
        pytest.param(written(TASKS, header="### {n}. {part}:", separator=""), id="headings"),
        pytest.param(written(TASKS, header="{n}) {part}:"), id="parenthesis"),
        pytest.param(written(TASKS, first=1), id="numbered from 1"),
        pytest.param(written(TASKS[:2], first=4) + "###\n" + written(TASKS[2:], first=1), id="restart"),
        pytest.param(written(TASKS[:2], first=4) + written(TASKS[2:], first=1), id="restart without separator"),
        pytest.param(written(TASKS[:2]) + "###\n" + written(TASKS[2:], first=4), id="number repeated"),
        pytest.param(written(TASKS, first=18), id="numbers with two digits"),
        pytest.param(written(TASKS, head=False).replace("<noinput>", "<NoInput>"), id="noinput in other case"),
        pytest.param(re.sub(r"\n(\d\. (Input|Output):)\n", r" \1 ", written(TASKS)), id="all in one line"),
    ],
)
def test_what_teachers_write(text):
    assert parsed(text) == TASKS


@pytest.mark.parametrize(
    "task",
    [
        {"instruction": "Explain Markdown headings to me.", "input": "", "output": "Write\n###\nbefore a heading."},
        {
            "instruction": "Continue this list of parts.",
            "input": "5. Output:\n6. Input:",
            "output": "7. Output:\n5. Output: x",
        },
        {"instruction": "Continue this list of parts.", "input": "x", "output": "4. Output: again\n4. Input: again"},
        {
            "instruction": "What does this line ask for?",
            "input": "5. Instruction: Name a colour",
            "output": "A colour.",
        },
        {"instruction": "Write code that prints a rule.", "input": "", "output": "```python\nprint('---')\n```"},
        {
            "instruction": "How many days are in a leap year?",
            "input": "",
            "output": "366\n\n20. is not the answer. 20.",
        },
    ],
)
@pytest.mark.parametrize("separator", ["###\n", "\n##\n\n", ""])
@pytest.mark.parametrize("fence", ["", "```\n"])
def test_quotations_stay_in_their_task(task, separator, fence):
    text = fence + written([task, *TASKS], separator=separator) + fence
    assert parsed(text) == [task, *TASKS]


def test_decoding_stopped_for_length_drops_the_last_task():
    text = written(TASKS, head=False)
    assert parsed(text, "length") == TASKS[:2]
    for cut in range(len(text)):
        complete = text[:cut].count("###")
        begun = text[:cut].endswith("##") and not text[:cut].endswith("###")
        assert parsed(text[:cut], "length") == TASKS[: complete + begun]
    for cut in range(len(text)):  # and without separators nothing of a begun task flows into the one before
        for task in parsed(written(TASKS, separator="")[:cut], "length"):
            assert task in TASKS


def test_empty_answers():
    assert post_process_gpt3_response(3, None) == []
    for text in ("", " \n", "###", "```\n```", "4. Instruction:", "I cannot help with that."):
        assert parsed(text) == []


def slow_reason(instruction, output):
    """The 2023 filters, written out; an empty output is dropped in addition."""
    if not 3 < len(instruction.split()) <= 150:
        return "length"
    words = (
        "image images graph graphs picture pictures file files map maps draw plot video audio music flowchart diagram"
    )
    if any(re.search(rf"\b{word}\b", instruction, re.IGNORECASE) for word in [*words.split(), "go to"]):
        return "word"
    if instruction.startswith("Write a program"):
        return "program"
    if instruction[0] in string.punctuation or not instruction[0].isascii():
        return "first"
    return None if output else "output"


def test_filters_equal_the_2023_ones():
    rng = random.Random(0)
    vocabulary = [
        *BLACKLIST,
        *"Draw MAPS profile roadmap drawing write a the story Write program ¿Qué 写 (a) -x".split(),
    ]
    vocabulary += ["tell", "me", "about", "your", "holiday"] * 12
    seen = set()
    for _ in range(4000):
        instruction = " ".join(rng.choices(vocabulary, k=rng.choice([1, 2, 3, 4, 5, 6, 8, 149, 150, 151])))
        instruction = rng.choice(["", "", "", "Write a program that "]) + instruction
        output = rng.choice(["fine", "fine", "fine", ""])
        tasks, rejected = parse_response(
            3,
            {"text": written([{"instruction": instruction, "input": "", "output": output}]), "finish_reason": "stop"},
            tokenization="ascii",
        )
        expected = slow_reason(instruction, output)
        assert bool(tasks) == (expected is None), instruction
        assert sum(rejected.values()) == (expected is not None)
        seen |= {expected, *rejected}
    assert {"length", "word", "program", "first", "output", None} <= seen
    assert {"too short", "too long", "begins with punctuation", "begins outside ASCII", "empty output"} <= seen


def test_find_word_in_string():
    assert find_word_in_string("map", "Draw a Map.") and find_word_in_string("go to", "Please GO TO the shop")
    assert not find_word_in_string("map", "a roadmap") and not find_word_in_string("file", "my profile")


def test_rejections_are_counted_by_reason():
    tasks = [
        *TASKS,
        {"instruction": "Too short", "input": "", "output": "x"},
        {"instruction": "Draw a house with a garden.", "input": "", "output": "x"},
        {"instruction": "Say nothing at all here.", "input": "", "output": ""},
    ]
    text = written(tasks) + "###\n10. Instruction: no parts here at all\n###\n11. Instruction: cut"
    kept, rejected = parse_response(3, {"text": text, "finish_reason": "length"}, DEFAULT_LIMITS)
    assert kept == TASKS
    assert rejected == {"too short": 1, "blacklisted word": 1, "empty output": 1, "malformed": 1, "cut off": 1}


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_a_megabyte_of_garbage_is_parsed_within_a_second(finish_reason):
    rng = random.Random(0)
    pieces = [
        "4. Instruction:",
        "5. Output:\n",
        "\n",
        "###",
        "\n6. Input:",
        " ",
        "#",
        "```\n",
        "*",
        "1.",
        "a b c d ",
        "\r\n",
    ]
    garbage = ["".join(rng.choices(pieces, k=250_000)), "".join(map(chr, rng.choices(range(1, 0xD7FF), k=10**6)))]
    units = (
        " ",
        "\n",
        "#",
        "*",
        "#\n",
        "1. ",
        "9" * 9,
        "4. Instruction: ",
        "4. Instruction:\n",
        "4. Output:\n",
        "`",
        "```\n",
    )
    garbage += [(unit * (10**6 // len(unit) + 1))[: 10**6] for unit in units]
    garbage += ["4. Instruction:" + "\n" * 10**6, "4. Input:" * 100_000 + "4. Output:" * 10_000, "###\n\n" * 200_000]
    garbage += ["\n".join(f"{n % 9999}. Instruction: a\n{n % 9999}. Output:" for n in range(30_000))]
    for text in garbage:
        start = time.process_time()
        parse_response(3, {"text": text, "finish_reason": finish_reason})
        # A tenth of a second on an idle machine; parsing in quadratic time would take minutes.
        assert time.process_time() - start < 10.0, text[:40]


def test_seed_tasks_are_checked(tmp_path):
    good = '{"id": "a", "instruction": "Say hello.", "instances": [{"input": "", "output": "Hello"}]}\n'
    cases = [
        good + "{broken",
        good + '{"instruction": "x"}',
        good.replace('"Hello"', "5"),
        good.replace("Say hello.", " "),
    ]
    for text in cases:
        (tmp_path / "seeds.jsonl").write_text(text)
        with pytest.raises(ExpectedError, match="line ") as error:
            read_seed_tasks(str(tmp_path / "seeds.jsonl"), at_least=1)
        assert error.value.exit_code == ExitCode.DATA
    (tmp_path / "seeds.jsonl").write_text(good + "\n" + good)
    with pytest.raises(ExpectedError, match="2 seed tasks, a prompt needs 3"):
        read_seed_tasks(str(tmp_path / "seeds.jsonl"), at_least=3)
    with pytest.raises(ExpectedError, match="seed_tasks_path"):
        read_seed_tasks(str(tmp_path / "none.jsonl"), at_least=3)


# --------------------------- what is kept, against 2023's method written out: rouge_score a pair at a time, in order

SETTINGS = {"num_instructions_to_generate": 10**9, "max_similarity": 0.7, "min_words": 4, "max_words": 150}
SETTINGS |= {"blacklist": list(BLACKLIST)}


def slow_collection(seeds, answers):
    """2023's loop: each candidate against seeds and everything kept."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    texts, tokens, kept = list(seeds), [scorer._tokenizer.tokenize(text) for text in seeds], []
    for task in [task for answer in answers for task in answer]:
        candidate = scorer._tokenizer.tokenize(task["instruction"])
        scores = [rouge_scorer._score_lcs(candidate, other).fmeasure for other in tokens]
        if max(scores, default=0.0) > 0.7:
            continue
        order = np.argsort(scores, kind="stable")[-10:][::-1]  # stable: equal scores in an order one can state
        similar = {texts[i]: float(scores[i]) for i in order}
        average = float(np.mean(scores)) if scores else 0.0
        kept.append({**task, "most_similar_instructions": similar, "avg_similarity_score": average})
        texts.append(task["instruction"])
        tokens.append(candidate)
    return kept


def fast_collection(seeds, answers, already_kept=()):
    header = {"num_prompt_instructions": 3, "seed_instructions": seeds, "already_kept": list(already_kept)}
    collection = Collection(header, SETTINGS, num_cpus=2)
    for number, answer in reversed([*enumerate(answers)]):  # the order of arrival is no matter
        collection.waiting[number] = {"answer": answer_text(answer), "finish_reason": "stop"}
    collection.advance()
    return [json.loads(entry) for entry in collection.entries], collection


def test_equals_the_2023_loop_on_real_instructions():
    seeds = [task["instruction"] for task in read_seed_tasks(str(ROOT / "seed_tasks.jsonl"), 3)]
    rng = random.Random(0)
    answers = []
    for _ in range(25):
        answer = []
        for _ in range(8):
            words = rng.choice(seeds).split()
            for _ in range(rng.randint(0, 6)):  # real sentences, more or less changed
                words[rng.randrange(len(words))] = rng.choice(rng.choice(seeds).split())
            if len(words) > 3 and words[0][0].isalpha():
                answer.append({"instruction": " ".join(words).rstrip(":"), "input": "", "output": "x"})
        answers.append(answer)
    answers[3].append({"instruction": "Ask the “old man” how it’s going", "input": "", "output": "x"})
    found, collection = fast_collection(seeds, answers)
    candidates = sum(map(len, answers)) - sum(n for reason, n in collection.rejected.items() if reason != "too similar")
    assert 30 < len(found) < candidates - 30  # both ways are taken
    passing = [parse_response(3, {"text": answer_text(answer), "finish_reason": "stop"})[0] for answer in answers]
    assert found == slow_collection(seeds, passing)  # floats and all, and the order


def test_ties_at_exactly_seven_tenths():
    """lcs 7 of 10 and 10 words gives the float 0.7, or a neighbour of it: whichever, as rouge_score has it."""
    base = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
    answers = [[{"instruction": " ".join(base), "input": "", "output": "x"}]]
    for same in range(3, 10):
        for other in range(0, 12):
            words = base[:same] + [f"w{same}x{other}y{i}" for i in range(other)]
            if len(words) > 3:
                answers.append([{"instruction": " ".join(words), "input": "", "output": "x"}])
    assert fast_collection([], answers)[0] == slow_collection([], answers)


def test_tasks_of_one_answer_are_compared_with_each_other():
    task = {"instruction": "Tell me about whales and dolphins", "input": "", "output": "x"}
    found, collection = fast_collection(["Name a colour you like"], [[task, task, {**task, "output": "y"}]])
    assert len(found) == 1 and collection.rejected == {"too similar": 2}


def test_entries_of_an_earlier_run_stay_as_they_are_and_count():
    old = {"instruction": "Tell me about whales and dolphins", "input": "", "output": "é", "avg_similarity_score": 0.25}
    found, _ = fast_collection([], [[{"instruction": old["instruction"] + " now", "input": "", "output": "x"}]], [old])
    assert found == [old]


def test_largest_equals_a_stable_sort():
    rng = np.random.default_rng(0)
    for size in [0, 1, 2, 9, 10, 11, 50, 1000]:
        for values in (2, 5, 10**9):
            scores = rng.integers(0, values, size) / values
            assert largest(scores, 10) == np.argsort(scores, kind="stable")[-10:][::-1].tolist()


def test_scores_equal_rouge_score_over_thousands_of_real_pairs():
    texts = [task["instruction"] for task in read_seed_tasks(str(ROOT / "seed_tasks.jsonl"), 3)] + [
        "",
        "?!",
        "Ask the “old man” how it’s going — again…",
    ]
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    tokens = [scorer._tokenizer.tokenize(text) for text in texts]
    slow = np.array([[rouge_scorer._score_lcs(a, b).fmeasure for b in tokens] for a in tokens], dtype=np.float64)
    encode = TokenEncoder()
    encoded = [encode(text) for text in texts]
    assert rouge_l(encoded, encoded).tobytes() == slow.tobytes()  # 31,684 pairs, not a bit differs
