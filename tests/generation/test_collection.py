"""What is kept, against 2023's method written out: rouge_score a pair at a time, in order."""

import json
import random
from pathlib import Path

import numpy as np
from rouge_score import rouge_scorer

from alpaca.data.similarity import TokenEncoder, rouge_l
from alpaca.generation.self_instruct import BLACKLIST, Collection, largest, parse_response, read_seed_tasks
from tests.teacher.teacher_server import answer_text

ROOT = Path(__file__).resolve().parents[2]
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
    collection = Collection(header, SETTINGS, workers=2)
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
    answers[3].append({"instruction": "Ça ira très bien mon ami", "input": "", "output": "x"})
    answers[4].append({"instruction": "a 写一首 关于春天 的诗 吧", "input": "", "output": "x"})
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
        "春天 的诗",
    ]
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    tokens = [scorer._tokenizer.tokenize(text) for text in texts]
    slow = np.array([[rouge_scorer._score_lcs(a, b).fmeasure for b in tokens] for a in tokens], dtype=np.float64)
    encode = TokenEncoder()
    encoded = [encode(text) for text in texts]
    assert rouge_l(encoded, encoded).tobytes() == slow.tobytes()  # 31,684 pairs, not a bit differs
