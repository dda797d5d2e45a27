"""Whether two training runs took the same course, told from rounding.

What a run's later steps are depends in the last digits on the processor: Adam turns a gradient that is nothing but
rounding into a step of full size. The first step is before that, and is compared closely; from then on what is compared
is far coarser than rounding and far finer than another choice of examples (which changes a step's loss by some 0.1).
"""

import json

import pytest
import safetensors.torch


def losses(directory):
    return [e["loss"] for e in json.loads((directory / "trainer_state.json").read_text())["log_history"] if "loss" in e]


def weights(directory, name="model.safetensors"):
    return safetensors.torch.load_file(directory / name)


def assert_same_course(steps, expected):
    """`steps`: a number, losses for instance, for each step."""
    assert len(steps) == len(expected) > 0
    assert steps[0] == pytest.approx(expected[0], rel=2e-5)
    assert steps == pytest.approx(expected, rel=3e-3)


def assert_same_changes(tuned, expected, base):
    """Weights by name, those of the other run, and what both started from: changed alike, as a whole."""
    assert set(tuned) == set(expected)
    apart, way = 0.0, 0.0
    for name in base:
        start = base[name].double()
        there = expected[name].double()[: len(start)]  # without the rows of new tokens
        apart += (tuned[name].double()[: len(start)] - there).square().sum()
        way += (there - start).square().sum()
    assert way > 0 and (apart / way).sqrt() < 0.05
