"""Statistics against slow, obvious code, and against rates that were planted."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from alpaca.evaluation import statistics
from alpaca.evaluation.statistics import (
    agreement,
    bootstrap_interval,
    half_width,
    length_controlled_interval,
    length_controlled_win_rate,
    length_controlled_win_rates,
    ratio,
    win_rate,
    win_rate_interval,
)

RNG = np.random.default_rng(7)


def suite(count, rng=RNG):
    """Preferences with ties, and lengths of both answers."""
    return rng.choice([0, 0.25, 0.5, 1], count), rng.gamma(2, 300, count), rng.gamma(2, 250, count)


def obvious_length_controlled_win_rate(preferences, lengths, opponent_lengths):
    """The definition, a number at a time, minimised without any derivative."""
    n = len(preferences)
    differences = [opponent - own for own, opponent in zip(lengths, opponent_lengths, strict=True)]
    mean = sum(differences) / n
    deviation = math.sqrt(sum((difference - mean) ** 2 for difference in differences) / n)

    def loss(parameters):
        intercept, coefficient = parameters
        total = 10 * n / 805 / 2 * coefficient**2
        for preference, difference in zip(preferences, differences, strict=True):
            p = 1 / (1 + math.exp(-intercept - coefficient * math.tanh(difference / deviation)))
            total -= preference * math.log(p) + (1 - preference) * math.log(1 - p)
        return total

    found = minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000})
    return 100 / (1 + math.exp(-found.x[0]))


@pytest.mark.parametrize("count", [5, 40, 252])
def test_length_control_is_its_definition(count):
    preferences, lengths, opponent_lengths = suite(count)
    expected = obvious_length_controlled_win_rate(preferences, lengths, opponent_lengths)
    assert length_controlled_win_rate(preferences, lengths, opponent_lengths) == pytest.approx(expected, abs=1e-4)


def test_many_fits_at_once_are_those_one_after_the_other():
    columns = [np.array(rows) for rows in zip(*(suite(60) for _ in range(40)), strict=True)]  # three of (40, 60)
    columns[0][0], columns[0][1], columns[0][2] = 0, 1, 0.5
    columns[0][3] = 0
    columns[0][3, 7] = 1  # a single win
    columns[0][4] = columns[1][4] > columns[2][4]  # perfectly told apart by length
    columns[1][5] = columns[2][5] + 100  # always longer by as much: length says nothing
    slow = [length_controlled_win_rate(*rows) for rows in zip(*columns, strict=True)]
    assert length_controlled_win_rates(*columns) == pytest.approx(slow, abs=1e-4)
    assert slow[:3] == [0, 100, pytest.approx(50)] and slow[5] == pytest.approx(win_rate(columns[0][5]))


def test_a_bootstrap_is_drawing_with_replacement(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 300)
    columns = suite(30)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(300):
        rows = rng.integers(30, size=30)
        drawn.append(length_controlled_win_rate(*(column[rows] for column in columns)))
    low, high = length_controlled_interval(*columns)
    # Student's t for 29 degrees of freedom at 2.5 %, times sqrt(30 / 29), as a tail of the normal distribution
    tail = 0.5 * math.erfc(2.045229642 * math.sqrt(30 / 29) / math.sqrt(2))
    assert [low, high] == pytest.approx(np.quantile(drawn, [tail, 1 - tail]), abs=1e-3)


def test_intervals_of_means_are_near_those_of_the_textbook():
    preferences, _, _ = suite(805)
    low, high = win_rate_interval(preferences)
    error = 196 * preferences.std() / math.sqrt(805)
    assert [low, high] == pytest.approx([win_rate(preferences) - error, win_rate(preferences) + error], abs=0.15)
    assert win_rate_interval(preferences) == [low, high]  # the same each time
    assert half_width(252) == pytest.approx(6.2, abs=0.05) and half_width(805) == pytest.approx(3.5, abs=0.05)
    assert win_rate_interval([1.0]) == [100, 100] and win_rate_interval([0.0] * 9) == [0, 0]


# What AlpacaEval's leaderboard of 2023 (judge: GPT-4) publishes of these models' annotations on its 805 instructions, a
# few of which are missing: win rate and its standard error in percent, and how many were won, lost and drawn.
PUBLISHED = {
    "gpt4": (95.27950311, 0.71628144, 761, 32, 12),
    "chatgpt": (89.36567164, 1.078948702, 716, 83, 5),
    "claude": (88.38509317, 1.11448754, 707, 89, 9),
    "gpt35_turbo_instruct": (81.71036205, 1.330613333, 642, 134, 25),
    "vicuna-7b": (64.40993789, 1.685110726, 517, 285, 3),
    "oasst-sft-llama-33b": (54.9689441, 1.740266793, 436, 356, 13),
    "text_davinci_003": (50.0, 0.0, 0, 0, 805),
    "guanaco-7b": (46.58385093, 1.757046491, 374, 429, 2),
    "alpaca-7b": (26.45962733, 1.53571147, 205, 584, 16),
    "text_davinci_001": (15.17412935, 1.235107892, 112, 672, 20),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_annotations_give_the_published_win_rate_and_error(model):
    rate, error, wins, losses, draws = PUBLISHED[model]
    preferences = np.repeat([1.0, 0.0, 0.5], [wins, losses, draws])
    assert win_rate(preferences) == pytest.approx(rate, abs=1e-6)
    assert preferences.std(ddof=1) * 100 / math.sqrt(len(preferences)) == pytest.approx(error, abs=1e-6)
    low, high = win_rate_interval(preferences)
    assert high - low == pytest.approx(2 * 1.96 * error, abs=0.25)
    assert low <= rate <= high


def test_a_ratio_is_drawn_by_row():
    """Of rows with 1 and 100 tokens the mean per token is not the mean of the rows' means."""
    losses, tokens = np.array([3.0, 100.0] * 50), np.array([1.0, 100.0] * 50)
    assert ratio(losses, tokens) == pytest.approx(103 / 101)
    low, high = bootstrap_interval(ratio, losses, tokens)
    assert 1 < low < 103 / 101 < high < 1.05


@pytest.mark.parametrize("rate", [0, 10, 50, 90, 100])
@pytest.mark.parametrize("count", [100, 252])
def test_a_planted_win_rate_is_inside_the_interval(rate, count):
    inside = 0
    for number in range(100):
        rng = np.random.default_rng([number, count])
        orders = rng.random((count, 2)) < rate / 100  # each order decided by itself
        low, high = win_rate_interval(orders.mean(axis=1))
        inside += low <= rate <= high
    assert inside >= 93


@pytest.mark.parametrize("longer_by", [0.25, 0.5, 0.75, 1.0])  # in the mean, in standard deviations of the difference
def test_of_a_judge_of_length_alone_more_than_half_is_taken_back(longer_by):
    ways_back = []
    for number in range(20):
        difference = np.random.default_rng(number).normal(longer_by, 1, 805) * 300
        preferences, opponent = (difference > 0).astype(float), np.full(805, 1500.0)
        raw = win_rate(preferences)
        controlled = length_controlled_win_rate(preferences, opponent + difference, opponent)
        assert controlled < raw
        ways_back.append((raw - controlled) / (raw - 50))
    assert 0.5 < np.mean(ways_back) < 0.75  # more than half of the way, and not all of it


def test_a_judge_of_quality_is_left_alone():
    """Where length plays no part, control moves the rate by little."""
    for number in range(10):
        rng = np.random.default_rng(number)
        preferences = (rng.random(805) < 0.7).astype(float)
        lengths, opponent_lengths = rng.gamma(4, 300, 805), rng.gamma(4, 200, 805)
        controlled = length_controlled_win_rate(preferences, lengths, opponent_lengths)
        assert abs(controlled - win_rate(preferences)) < 2.5


def test_agreement_is_counted_and_corrected_for_chance():
    # The textbook's table: 20 both yes, 15 both no, 5 and 10 apart: 70 % and κ = 0.4.
    one = ["yes"] * 25 + ["no"] * 25
    other = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert agreement(one, other) == pytest.approx((70, 0.4))
    assert agreement(["a", "b"], ["a", "b"]) == (100, 1) and math.isnan(agreement(["a"], ["a"])[1])
