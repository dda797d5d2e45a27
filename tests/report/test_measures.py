"""What the report counts, against slow and obvious versions of the same."""

import itertools
import random
import re

import numpy as np
import pytest
from rouge_score import rouge_scorer
from transformers import AutoTokenizer

from alpaca.data.similarity import TokenEncoder, rouge_l
from alpaca.prompts import format_prompt
from alpaca.report import measures
from data_report import load_tokenizer
from tests.report.conftest import EXAMPLES, TOKENIZER, rows


def random_texts(seed, count=400, words=30):
    """Texts of 0 to 40 words, every third one a light edit of an earlier one."""
    chance = random.Random(seed)
    texts = []
    for number in range(count):
        if number % 3 == 2:
            text = list(chance.choice(texts))
            for _ in range(chance.randrange(6)):
                text[chance.randrange(len(text) + 1) :][:1] = []
                text.insert(chance.randrange(len(text) + 1), chance.randrange(words))
        else:
            text = [chance.randrange(words) for _ in range(chance.randrange(41))]
        texts.append(text)
    return [" ".join(f"w{word}" for word in text) for text in texts]


def test_pruned_pairs_are_all_pairs(monkeypatch):
    monkeypatch.setattr(measures, "BLOCK", 37)
    ties = ["a b c d e f g", "a b c d e f g h i j k l m"]  # 2·7 / (7 + 13) = 0.7 exactly: where the bound lies
    for texts in (random_texts(0), [e["instruction"] for e in EXAMPLES[:500]], ties, ["", "?", "one"], ["a", "a b c"]):
        encode = TokenEncoder()
        encoded = [encode(text) for text in texts]
        scores = rouge_l(encoded, encoded)
        expected = {(i, j): scores[i, j] for i, j in zip(*np.nonzero(scores > 0.7), strict=True) if i < j}
        found = {}
        for block_scores, left, right in measures.similar_pairs(encoded):
            for score, i, j in zip(block_scores.tolist(), left.tolist(), right.tolist(), strict=True):
                assert (min(i, j), max(i, j)) not in found
                found[min(i, j), max(i, j)] = score
        assert found == expected


def test_near_duplicates_count_rows_as_often_as_they_occur():
    texts = [*random_texts(1, 60, words=12), "Say it.", "say IT", "Say it!", "...", "...", ""]
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    scored = [(scorer.score(texts[i], texts[j])["rougeL"].fmeasure, i, j) for i, j in pairs_of(len(texts))]
    expected = [pair for pair in scored if pair[0] > 0.7]
    report = measures.near_duplicates(texts)
    assert report["pairs"] == len(expected) == sum(report["scores"]["counts"])
    assert report["rows_in_a_pair"] == len({row for _, *pair in expected for row in pair})
    assert report["pairs_with_the_same_words"] == sum(
        re.findall("[a-z0-9]+", texts[i].lower()) == re.findall("[a-z0-9]+", texts[j].lower()) != []
        for i, j in pairs_of(len(texts))
    )
    rounded = {(round(score, 4), i, j) for score, i, j in expected}
    assert rounded >= {tuple(pair) for pair in report["most_similar"]}
    assert sorted((pair[0] for pair in report["most_similar"]), reverse=True) == [p[0] for p in report["most_similar"]]


def pairs_of(count):
    return itertools.combinations(range(count), 2)


def test_nearest_seeds_and_tasks_are_found():
    seeds = [{"instruction": "Name the capital of France.", "input": ""}, {"instruction": "Add it up.", "input": ""}]
    report = measures.similarity_to_seeds(rows("Add it up", "Name the capital of Spain.", "Sing!"), seeds)
    assert report["over_threshold"] == {"count": 2, "rows": [[0, 1, 1.0], [1, 0, 0.8]]}
    assert report["scores"]["rows"] == sum(report["scores"]["counts"]) == 3

    tasks = [{"instruction": "Fix the grammar.", "input": "he go home"}, {"instruction": "Count.", "input": "a b c d"}]
    examples = [
        {"instruction": "Fix the grammar.", "input": "we was late for the train", "output": ""},
        {"instruction": "Count these letters up.", "input": "a b c d", "output": ""},
    ]
    report = measures.contamination(examples, tasks)
    assert report["tasks"] == 2
    assert report["instruction"]["rows_over_threshold"]["rows"] == [[0, 0, 1.0]]
    both = report["instruction_and_input"]
    assert both["rows_over_threshold"]["rows"] == [[1, 1, 0.7692]]  # 2·5 / (5 + 8)
    assert both["tasks_over_threshold"] == report["instruction"]["tasks_over_threshold"] == 1


def test_duplicates_are_listed_with_the_first_of_their_kind():
    examples = [*rows("A", "B", "A"), *rows("A", output="No.")]
    report = measures.find_duplicates(examples)
    assert report["whole_rows"] == {"count": 1, "rows": [[2, 0]]}
    assert report["prompts"] == {"count": 2, "rows": [[2, 0], [3, 0]]}


def test_token_figures_are_those_of_training():
    examples = [e for e in EXAMPLES if e["input"]][:20] + [e for e in EXAMPLES if not e["input"]][:23]
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    lengths = measures.measure_lengths(examples, load_tokenizer(str(TOKENIZER)))
    whole = [len(tokenizer(format_prompt(e) + e["output"] + tokenizer.eos_token)["input_ids"]) for e in examples]
    prompts = [len(tokenizer(format_prompt(e))["input_ids"]) for e in examples]
    assert lengths["example_tokens"].tolist() == whole
    assert lengths["prompt_tokens"].tolist() == prompts
    assert len(lengths["input_tokens"]) == len(lengths["input_words"]) == 20
    plain = [len(tokenizer(e["output"], add_special_tokens=False)["input_ids"]) for e in examples]
    assert lengths["output_tokens"].tolist() == plain

    limit = int(np.median(prompts))
    figures = measures.token_figures(lengths, limit)
    assert figures["rows_cut"] == sum(length > limit for length in whole)
    assert figures["rows_without_any_response"] == sum(length >= limit for length in prompts) > 0
    assert figures["tokens_cut"] == sum(max(length - limit, 0) for length in whole)
    assert list(figures["padding_share"]) == ["2", "4", "8", "16", "32"]


def test_padding_share_is_counted_batch_by_batch():
    assert measures.padding_share(np.array([2, 4]), 2) == 0.25
    lengths = np.random.default_rng(3).integers(1, 500, 1003)
    order = np.random.default_rng(measures.SEED).permutation(1003)
    positions = padding = 0
    for first in range(0, 1000, 8):
        batch = [lengths[i] for i in order[first : first + 8]]
        positions += 8 * max(batch)
        padding += sum(max(batch) - length for length in batch)
    assert measures.padding_share(lengths, 8) == round(padding / positions, 4)


def test_histograms_count_every_value_once_on_shared_bins():
    first, second = np.arange(100), np.array([0, 0, 1000])
    bins = measures.shared_bins([first, second])
    assert set(np.diff(bins)) == {bins[1]}
    for values in (first, second, np.zeros(0, dtype=int)):
        counts = measures.histogram(values, bins)["counts"]
        ends = [*bins[1:], np.inf]
        assert counts == [sum(a <= v < b for v in values) for a, b in zip(bins, ends, strict=True)]


@pytest.mark.parametrize(
    ("output", "cut"),
    [
        ("", False),
        ("42", False),
        ("It begins with the", False),  # four words: a phrase may end so
        ("The first thing to do is to open the", True),
        ("We need flour, sugar, eggs and butter,", True),
        ("Here is the code:\n```python\nprint(1)", True),
        ("Here is the code:\n```python\nprint(1)\n```", False),
        ("She walked along the shore until the sun had gone down and her feet were", True),
        ("She walked along the shore until the sun had gone down and her feet were cold.", False),
        ("- a tent that two people can put up in the dark within five minutes or so", False),
        ("Roses are red,\nviolets are blue", False),
    ],
)
def test_outputs_that_look_cut_off(output, cut):
    assert measures.looks_truncated(output) == cut


def test_outputs_are_listed_by_row():
    report = measures.inspect_outputs(["fine", " \n", "café, thé", "It ends in the middle of a", ""])
    assert report["empty"] == {"count": 2, "rows": [1, 4]}
    assert report["truncated_looking"] == {"count": 1, "rows": [3]}
    assert report["non_ascii"] == {"count": 1, "rows": [2], "rows_by_character": {"é": 1}}


SENTENCES = {
    "Chinese": ("说明如何保存新鲜蔬菜", "请说明如何保存新鲜的蔬菜", "写一首关于雨的短诗"),
    "Japanese": (
        "新鮮な野菜の保存方法を説明してください",
        "新鮮な野菜の保存法を説明して下さい",
        "雨についての短い詩を書く",
    ),
    "Thai": ("อธิบายวิธีเก็บรักษาผักสด", "อธิบายวิธีการเก็บรักษาผักสด", "เขียนบทกวีสั้น ๆ เกี่ยวกับฝน"),
    "Arabic": ("اشرح كيفية حفظ الخضروات الطازجة", "اشرح كيفية حفظ الخضروات الطازجة جيدا", "اكتب قصيدة قصيرة عن المطر"),
    "Hindi": ("ताज़ी सब्ज़ियाँ रखने का तरीका बताओ", "ताज़ी सब्ज़ियाँ रखने का सही तरीका बताओ", "बारिश पर एक छोटी कविता लिखो"),
    "Greek": (
        "Εξήγησε πώς διατηρούνται τα λαχανικά",
        "ΕΞΉΓΗΣΕ ΠΏΣ ΔΙΑΤΗΡΟΎΝΤΑΙ ΤΑ ΛΑΧΑΝΙΚΆ!",
        "Γράψε ένα ποίημα για τη βροχή",
    ),
    "Hungarian": (
        "Írd le, hogyan őrizhető a friss zöldség",
        "Írd le, hogyan őrizhető meg a friss zöldség",
        "Írj az esőről",
    ),
    "German": (
        "Erkläre, wie Gemüse frisch bleibt",
        "ERKLÄRE, WIE GEMÜSE FRISCH BLEIBT",
        "Schreibe ein Gedicht über Regen",
    ),
}


@pytest.mark.parametrize("language", SENTENCES)
def test_repetitions_are_found_in_any_language(language):
    text, near, other = SENTENCES[language]
    report = measures.near_duplicates([text, near, other, text, "🎉 ?!"])
    assert report["pairs"] == 3 and report["rows_in_a_pair"] == 3
    assert report["not_compared"] == {"count": 1, "rows": [4]}

    tasks = [{"instruction": text, "input": ""}, {"instruction": "…", "input": ""}]
    report = measures.contamination(rows(near, other, "🎉"), tasks)["instruction"]
    assert report["tasks_over_threshold"] == 1
    assert [row for row, task, _ in report["rows_over_threshold"]["rows"]] == [0]
    assert report["rows_not_compared"] == {"count": 1, "rows": [2]}
    assert report["tasks_not_compared"] == {"count": 1, "rows": [1]}
    seeds = measures.similarity_to_seeds(rows(near, other), tasks)
    assert seeds["over_threshold"]["count"] == 1 and seeds["not_compared"]["count"] == 0


def test_lengths_count_characters_where_words_are_not_divided():
    lengths = measures.measure_lengths(rows("说明如何保存新鲜蔬菜。", "Say it - now."), None)
    assert lengths["instruction_words"].tolist() == [10, 4]
