"""ROUGE-L between instructions, bit for bit as `rouge_score` computes it, in batches.

R = lcs / len(reference), P = lcs / len(candidate), F = 2PR / (P + R), all float64 (Lin 2004, equations 2–4 with β = 1).
The order of operations matters: at exactly 0.7 another order falls on the other side. The longest common
subsequences are integers, so a fast library can count them: rapidfuzz, on strings whose characters stand for tokens.
"""

from collections.abc import Sequence

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from alpaca.data.words import TOKENIZATION, split_tokens

_FIRST_CODE_POINT = 0x10000  # above the surrogates, which are no characters; leaves room for 1,048,576 tokens


class TokenEncoder:
    """Texts → strings with one character a token. One encoder serves all texts that are compared with each other."""

    def __init__(self, tokenization: str = TOKENIZATION):
        self._ids: dict[str, int] = {}
        self._tokenization = tokenization  # see words.split_tokens

    def __call__(self, text: str) -> str:
        """ "Name two colours." → three characters."""
        ids = self._ids
        tokens = split_tokens(text, self._tokenization)
        return "".join([chr(_FIRST_CODE_POINT + ids.setdefault(token, len(ids))) for token in tokens])


def rouge_l(candidates: Sequence[str], pool: Sequence[str], workers: int = 1) -> np.ndarray:
    """ROUGE-L F-measures of encoded candidates (M) against an encoded pool (N), as float64 (M, N).

    A text without tokens (punctuation only) scores 0 against everything. `workers=-1` uses all cores.
    """
    lcs = process.cdist(candidates, pool, scorer=LCSseq.similarity, dtype=np.int32, workers=workers)  # (M, N)
    candidate_lengths = np.array([len(text) for text in candidates], dtype=np.float64).reshape(-1, 1)
    pool_lengths = np.array([len(text) for text in pool], dtype=np.float64).reshape(1, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = lcs / pool_lengths
        recall = lcs / candidate_lengths
        total = precision + recall
        score = precision  # in place: fresh (M, N) arrays cost more than the arithmetic
        score *= 2
        score *= recall
        score /= total
    score[lcs == 0] = 0.0
    return score
