"""What verdicts and measurements say, and how surely: win rates, intervals, length control, agreement.

Pure functions of arrays. The unit is the instruction (or row): it is what the bootstrap draws, so that both orders of a
comparison stay together. Preferences are 1 where the model wins, 0 where the opponent does, 0.5 for a tie.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy import optimize, special

RESAMPLES = 10_000
SEED = 0
LEVEL = 0.95
_ELEMENTS = 2**20  # of the resampled arrays at a time; 8 MiB each
_LARGEST_STEP = 2.0  # of a Newton step, in logits
_NEWTON_STEPS = 100
# λ of the ridge penalty λ/2 · coefficient² on the length term, for 805 instructions and in proportion to their number.
# benchmarks/bench_length_control.py compares it with AlpacaEval's published figures.
RIDGE, RIDGE_INSTRUCTIONS = 10.0, 805


def win_rate(preferences: Sequence[float]) -> float:
    """(N,) preferences → percent."""
    return float(_win_rates(np.asarray(preferences, dtype=np.float64)))


def win_rate_interval(preferences: Sequence[float]) -> list[float]:
    """(N,) preferences → [low, high] in percent."""
    return bootstrap_interval(_win_rates, preferences)


def _win_rates(preferences: np.ndarray) -> np.ndarray:
    return 100 * preferences.mean(axis=-1)


def half_width(instructions: int) -> float:
    """Half of the 95 % interval that so many instructions allow at a win rate of 50 %, in points, without ties."""
    return float(100 * special.ndtri((1 + LEVEL) / 2) * 0.5 / np.sqrt(instructions))


# ------------------------------------------------------------------------------------------------------------ bootstrap


def bootstrap_interval(statistic: Callable[..., np.ndarray], *columns: Sequence[float]) -> list[float]:
    """95 % interval of `statistic` by drawing rows of the columns (N,) with replacement; the same rows of each.

    `statistic` takes the columns as (B, N) and gives (B,). Percentiles, widened for few rows as Student's t is
    (Hesterberg 2015, "expanded percentile"): at 20 rows the plain ones would cover 92 %.
    """
    columns = [np.asarray(column, dtype=np.float64) for column in columns]
    count = len(columns[0])
    if count == 1:
        return [float(statistic(*(column[None] for column in columns))[0])] * 2
    drawn = np.concatenate([statistic(*(column[rows] for column in columns)) for rows in resamples(count)])
    tail = float(special.ndtr(np.sqrt(count / (count - 1)) * special.stdtrit(count - 1, (1 - LEVEL) / 2)))
    return [float(bound) for bound in np.quantile(drawn, [tail, 1 - tail])]


def resamples(count: int) -> Iterator[np.ndarray]:
    """RESAMPLES draws of `count` row numbers, a part at a time: (B, count). The same at each call."""
    generator = np.random.default_rng(SEED)
    part = max(1, _ELEMENTS // count)
    for begin in range(0, RESAMPLES, part):
        yield generator.integers(count, size=(min(part, RESAMPLES - begin), count))


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """Sum over sum, along the rows: a mean per token of rows that have different numbers of them."""
    with np.errstate(invalid="ignore"):
        return numerators.sum(axis=-1) / denominators.sum(axis=-1)


# ------------------------------------------------------------------------------------------------------ length control


def length_controlled_win_rate(
    preferences: Sequence[float], lengths: Sequence[float], opponent_lengths: Sequence[float], ridge: float = RIDGE
) -> float:
    """The win rate as it would be if both answers were of one length: (N,), (N,) and (N,) characters → percent.

    A logistic regression of the preference on an intercept and on tanh(d / sd), d = opponent's length − the model's,
    with a ridge penalty on the length coefficient alone, read at a length term of 0 (Dubois et al. 2024, without
    the difficulty of each instruction, which they fit over many models).
    """
    preferences = np.asarray(preferences, dtype=np.float64)
    if _all_alike(preferences):
        return win_rate(preferences)  # the intercept would be infinite
    terms = _length_terms(np.asarray(lengths, dtype=np.float64), np.asarray(opponent_lengths, dtype=np.float64))
    intercept, _ = _fit(preferences, terms, ridge * len(preferences) / RIDGE_INSTRUCTIONS)
    return float(100 * special.expit(intercept))


def length_controlled_interval(
    preferences: Sequence[float], lengths: Sequence[float], opponent_lengths: Sequence[float]
) -> list[float]:
    """[low, high] of `length_controlled_win_rate` in percent, fitted anew to each resample."""
    return bootstrap_interval(length_controlled_win_rates, preferences, lengths, opponent_lengths)


def length_controlled_win_rates(
    preferences: np.ndarray, lengths: np.ndarray, opponent_lengths: np.ndarray
) -> np.ndarray:
    """`length_controlled_win_rate` of many data sets at once: three of (B, N) → (B,).

    Newton's method on all of them together, a hundred times as fast as one fit after the other.
    """
    terms = _length_terms(lengths, opponent_lengths)  # (B, N)
    ridge = RIDGE * preferences.shape[-1] / RIDGE_INSTRUCTIONS
    rates = 100 * preferences.mean(axis=-1)  # right where all are alike
    todo = np.flatnonzero(~_all_alike(preferences))
    x, y = terms[todo], preferences[todo]
    mean = y.mean(axis=-1)
    fitted = np.stack([special.logit(mean), np.zeros_like(mean)])  # (2, B): intercept, length coefficient
    for _ in range(_NEWTON_STEPS):
        p = special.expit(fitted[0][:, None] + fitted[1][:, None] * x)
        residual, weight = p - y, p * (1 - p)
        gradient = np.stack([residual.sum(-1), (residual * x).sum(-1) + ridge * fitted[1]])
        if np.abs(gradient).max(initial=0) < 1e-9 * preferences.shape[-1]:
            break
        a, b, c = weight.sum(-1), (weight * x).sum(-1), (weight * x * x).sum(-1) + ridge  # [[a, b], [b, c]]
        step = np.stack([c * gradient[0] - b * gradient[1], a * gradient[1] - b * gradient[0]]) / (a * c - b * b)
        fitted -= np.clip(step, -_LARGEST_STEP, _LARGEST_STEP)
    rates[todo] = 100 * special.expit(fitted[0])
    return rates


def _all_alike(preferences: np.ndarray) -> np.ndarray:
    """Whether all of them are wins, or all losses."""
    mean = preferences.mean(axis=-1)
    return (mean <= 0) | (mean >= 1)


def _length_terms(lengths: np.ndarray, opponent_lengths: np.ndarray) -> np.ndarray:
    """tanh(d / sd) along the rows; 0 where all differences are the same, as they say nothing of length then."""
    difference = opponent_lengths - lengths
    deviation = difference.std(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(deviation > 0, np.tanh(difference / deviation), 0.0)


def _fit(preferences: np.ndarray, terms: np.ndarray, ridge: float) -> np.ndarray:
    """→ intercept and length coefficient that minimise the log loss + ridge/2 · coefficient²."""
    design = np.stack([np.ones_like(terms), terms])  # (2, N)
    penalty = np.array([0.0, ridge])

    def loss(fitted: np.ndarray) -> tuple[float, np.ndarray]:
        logits = fitted @ design
        value = np.logaddexp(0, logits).sum() - preferences @ logits + penalty @ fitted**2 / 2
        return value, design @ (special.expit(logits) - preferences) + penalty * fitted

    def curvature(fitted: np.ndarray) -> np.ndarray:
        p = special.expit(fitted @ design)
        return (design * p * (1 - p)) @ design.T + np.diag(penalty)

    start = np.array([special.logit(preferences.mean()), 0.0])
    return optimize.minimize(loss, start, jac=True, hess=curvature, method="trust-exact", tol=1e-10).x


# ------------------------------------------------------------------------------------------------------------ agreement


def agreement(one: Sequence[str], other: Sequence[str]) -> tuple[float, float]:
    """How often two judges say the same, in percent, and Cohen's κ (1960): what of it chance does not explain.

    κ is 1 for full agreement and 0 for as much as their frequencies give by chance; nan where both say one thing only.
    """
    labels = sorted({*one, *other})
    first, second = np.array([labels.index(label) for label in one]), np.array([labels.index(label) for label in other])
    observed = float((first == second).mean())
    frequencies = [np.bincount(judge, minlength=len(labels)) / len(judge) for judge in (first, second)]
    by_chance = float(frequencies[0] @ frequencies[1])
    return 100 * observed, (observed - by_chance) / (1 - by_chance) if by_chance < 1 else float("nan")
