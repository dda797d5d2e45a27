"""Prompts and what is kept: 2023's layout and similarity, and other languages."""

import json
import random

import numpy as np
import pytest
from rouge_score import rouge_scorer

from alpaca.common import ExitCode, ExpectedError
from alpaca.data.similarity import TokenEncoder, rouge_l
from alpaca.data.words import TOKENIZATION
from alpaca.generation.parsing import BLACKLIST, PARSER, Limits, parse_response
from alpaca.generation.self_instruct import (
    Collection,
    check_seed_tasks,
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


def test_prompt_layout():
    prompt = encode_prompt([{**TASKS[1], "instruction": " Sort these\n words: "}, TASKS[0]])
    asked = (ROOT / "prompt.txt").read_text().replace("{first}", "3").replace("{last}", "20")
    assert asked.startswith("Write tasks 3 to 20 ") and prompt.startswith(asked)
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
    header |= {"tokenization": TOKENIZATION, "parser": PARSER}
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


# ------------------------------------------------------------------------------------------------------ other languages

LANGUAGES = {  # a task, the same with a word more, another task
    "Chinese": ("说明如何保存新鲜蔬菜", "请说明如何保存新鲜蔬菜", "写一首关于雨的短诗"),
    "Japanese": ("新鮮な野菜の保存方法を説明する", "新鮮なお野菜の保存方法を説明する", "雨についての短い詩を書く"),
    "Thai": ("อธิบายวิธีเก็บรักษาผักสด", "อธิบายวิธีการเก็บรักษาผักสด", "เขียนบทกวีสั้น ๆ เกี่ยวกับฝน"),
    "Arabic": ("اشرح كيفية حفظ الخضروات الطازجة", "اشرح كيفية حفظ الخضروات الطازجة جيدا", "اكتب قصيدة قصيرة عن المطر"),
    "Hindi": ("ताज़ी सब्ज़ियाँ रखने का तरीका बताओ", "ताज़ी सब्ज़ियाँ रखने का सही तरीका बताओ", "बारिश पर एक छोटी कविता लिखो"),
    "Greek": (
        "Εξήγησε πώς διατηρούνται τα λαχανικά",
        "Εξήγησε μας πώς διατηρούνται τα λαχανικά",
        "Γράψε ένα ποίημα για τη βροχή",
    ),
    "Hungarian": (
        "Írd le, hogyan őrizhető a zöldség",
        "Írd le, hogyan őrizhető meg a zöldség",
        "Írj egy verset az esőről",
    ),
    "German": (
        "Erkläre, wie Gemüse frisch bleibt",
        "Erkläre uns, wie Gemüse frisch bleibt",
        "Schreibe ein Gedicht über Regen",
    ),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_new_is_told_in_any_language(language):
    seed, near, other = LANGUAGES[language]
    answers = [[{"instruction": text, "input": "", "output": text} for text in (near, other, seed, other)]]
    found, collection = fast_collection([seed], answers)
    assert [entry["instruction"] for entry in found] == [other] and collection.rejected == {"too similar": 3}
    assert found[0]["most_similar_instructions"].keys() == {seed}


def test_a_run_without_a_tokenization_goes_on_with_that_of_2023():
    texts = ["Name a café in Paris", "Name a cafë in Paris", "Erkläre mir den Wald", "写 一 首 诗"]
    answers = [[{"instruction": text, "input": "", "output": "x"} for text in texts]]
    header = {"num_prompt_instructions": 3, "seed_instructions": [], "already_kept": []}
    collection = Collection(header, SETTINGS, num_cpus=1)
    collection.add({"answer": answer_text(answers[0]), "finish_reason": "stop"})
    entries = [json.loads(entry) for entry in collection.entries]
    assert entries == slow_collection([], [[{**task} for task in answers[0] if task["instruction"][0].isascii()]])
    assert len(entries) == 2 and collection.rejected == {"too similar": 1, "begins outside ASCII": 1}
    assert [entry["instruction"] for entry in fast_collection([], answers)[0]] == [texts[0], *texts[2:]]


def test_the_first_answer_that_cannot_be_read_is_shown():
    said = []
    header = {"num_prompt_instructions": 3, "seed_instructions": [], "already_kept": [], "parser": 2}
    collection = Collection(header, SETTINGS, 1, said.append)
    for text in ("", "I'm sorry,\nI can't do that.", "Nor that."):
        collection.add({"answer": text, "finish_reason": "stop"})
    assert len(said) == 1 and "request 1" in said[0] and "I'm sorry, I can't do that." in said[0]
    assert collection.rejected == {"empty answer": 1, "unreadable answer": 2}


def test_the_prompt_asks_for_another_language():
    english, hindi = encode_prompt(TASKS), encode_prompt(TASKS, "Hindi")
    assert english != hindi and hindi == english.replace("in English", "in Hindi")


def test_seeds_that_the_filters_would_drop_are_reported():
    tasks = [{"instruction": f"Say {n} words about it", "output": "x"} for n in range(4)]
    check_seed_tasks(tasks, Limits())
    check_seed_tasks(read_seed_tasks(str(ROOT / "seed_tasks.jsonl"), 3), Limits())
    check_seed_tasks([{"instruction": text, "output": "x"} for texts in LANGUAGES.values() for text in texts], Limits())
    tasks += [{"instruction": "Sing it", "output": "x"} for _ in range(4)]
    check_seed_tasks(tasks, Limits())  # half of them: not most
    with pytest.raises(ExpectedError, match=r"5 of the 9 seed tasks \(too short 4, empty output 1\)") as error:
        check_seed_tasks([*tasks, {"instruction": "Say nothing at all here", "output": ""}], Limits())
    assert error.value.exit_code == ExitCode.USAGE and "--seeds_anyway True" in str(error.value)
