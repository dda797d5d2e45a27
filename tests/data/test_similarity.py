"""`similarity.rouge_l` against the library whose numbers it must reproduce to the last bit."""

import random

import numpy as np
from rouge_score import rouge_scorer

from alpaca.data.similarity import TokenEncoder, rouge_l


def slow_rouge_l(candidates, pool):
    """The 2023 method: rouge_score's own tokenizer and scoring, a pair at a time."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    candidates, pool = ([scorer._tokenizer.tokenize(text) for text in texts] for texts in (candidates, pool))
    return np.array([[rouge_scorer._score_lcs(c, p).fmeasure for p in pool] for c in candidates])


def assert_same_bits(candidates, pool, tokenization="unicode"):
    encode = TokenEncoder(tokenization)
    fast = rouge_l([encode(text) for text in candidates], [encode(text) for text in pool])
    assert fast.dtype == np.float64
    assert fast.tobytes() == slow_rouge_l(candidates, pool).astype(np.float64).tobytes()


def test_same_bits_as_rouge_score_on_random_word_lists():
    random.seed(0)
    words = "write a poem about the sea list three ways to save water explain how rain forms".split()
    texts = [" ".join(random.choices(words, k=random.randint(1, 30))) for _ in range(120)]
    assert_same_bits(texts, texts)


def test_same_bits_at_exact_ties():
    """lcs 7 of 10 and 10 words: P = R = 0.7, F = 0.7 or the float next to it, whichever rouge_score says."""
    base = "a b c d e f g h i j".split()
    texts = [" ".join(base[:k] + [f"x{i}" for i in range(n)]) for k in range(11) for n in range(12)]
    assert_same_bits(texts, [" ".join(base), " ".join(base[:7]), " ".join(base * 2)])


def test_texts_without_tokens_score_zero():
    assert_same_bits(["", "???", "write"], ["", "???", "“ … ” — write"])
    assert rouge_l([], ["a"]).shape == (0, 1)


def test_older_runs_compare_by_ascii_words():
    texts = ["写一首诗", "Напиши стихи", "write", "Write a poem", "naïve café"]
    assert_same_bits(texts, texts, "ascii")
