"""How close texts are: instructions by ROUGE-L, as the generator measures it, and whole examples by their rare words.

ROUGE-L of instructions does not see a task whose content is in its input. So whole examples (instruction, input and
output as one text) are compared too: the cosine of their bags of words, each word weighted by its rarity (TF-IDF, with
the logarithm of its count). Two tasks of one idea share its rare words, however they are asked.

`reference_hashes.json` stands for two public sets whose text is no part of this project: the 175 seeds of
Self-Instruct and the 252 tasks of its evaluation suite. Each instruction is one `hash_words` line, each whole task of
the suite one line of `hash_bag`, and each of its inputs one `hash_text`. Equal words have equal hashes, so that both
measures against them are exact.
"""

import hashlib
import json
import re
from collections import Counter
from functools import cache

import numpy as np

from alpaca.data.similarity import TokenEncoder, rouge_l
from tests.data.shipped import EVAL_TASKS, EXAMPLES, SEEDS, read

REFERENCE = json.loads(read("tests/data/reference_hashes.json"))


def words_of(text: str) -> list[str]:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).split()


def hash_word(word: str) -> str:
    return hashlib.blake2b(word.encode(), digest_size=4).hexdigest()


def hash_words(text: str) -> str:
    """ "Two words" → "8-hex-digits 8-hex-digits": a text that tokenizes as many words as before, equal where equal."""
    return " ".join(map(hash_word, words_of(text)))


def hash_bag(text: str) -> str:
    """The hashes of a text's words, of any script, in the order of the hashes, each as often as the word: no text."""
    return " ".join(sorted(map(hash_word, re.findall(r"[^\W_]+", text.lower()))))


def hash_text(text: str) -> str:
    """One hash of a whole text, blind to case and white space."""
    return hashlib.blake2b(" ".join(text.split()).lower().encode(), digest_size=8).hexdigest()


def similarities(candidates: list[str], pool: list[str]) -> np.ndarray:
    """ROUGE-L F of texts against texts: (M, N). In ASCII words, which the reference has hashes of."""
    encode = TokenEncoder("ascii")
    return rouge_l([encode(text) for text in candidates], [encode(text) for text in pool])


def similarities_to_reference(texts: list[str], name: str) -> np.ndarray:
    return similarities([hash_words(text) for text in texts], REFERENCE[name])


def close_pairs(scores: np.ndarray, limit: float, texts: list[str]) -> list[str]:
    """What a failing similarity test shows: the candidates over the limit."""
    return [f"{scores[row].max():.2f} {texts[row]}" for row in np.flatnonzero((scores > limit).any(axis=1))]


def whole(example: dict[str, str]) -> str:
    return "\n".join(example[part] for part in ("instruction", "input", "output"))


def rare_word_cosines(bags: list[str]) -> np.ndarray:
    """Texts of N examples, or their hashed bags → (N, N), 1 for equal bags of words, 0 without a common one."""
    counts = [Counter(bag.split()) for bag in bags]
    found_in = Counter(word for count in counts for word in count)
    shared = {word: column for column, word in enumerate(w for w, n in found_in.items() if n > 1)}
    vectors = np.zeros((len(bags), len(shared)), dtype=np.float32)  # words of one example alone count in the norm only
    for row, count in enumerate(counts):
        weights = {word: (1 + np.log(n)) * np.log(len(bags) / found_in[word]) for word, n in count.items()}
        norm = np.sqrt(sum(weight * weight for weight in weights.values())) or 1.0
        for word in weights.keys() & shared.keys():
            vectors[row, shared[word]] = weights[word] / norm
    return vectors @ vectors.T


@cache
def whole_example_cosines() -> tuple[list[str], np.ndarray]:
    """(names of all N examples, their cosines (N, N)): "row 12", "seed_task_3", "eval_task_4", "suite 5"."""
    names = [f"row {number}" for number in range(len(EXAMPLES))]
    names += [task["id"] for task in [*SEEDS, *EVAL_TASKS]]
    names += [f"suite {number}" for number in range(len(REFERENCE["evaluation_suite_bags"]))]
    bags = [hash_bag(whole(example)) for example in [*EXAMPLES, *SEEDS, *EVAL_TASKS]]
    return names, rare_word_cosines([*bags, *REFERENCE["evaluation_suite_bags"]])
