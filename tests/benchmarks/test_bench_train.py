"""The training benchmark on a small model: its three ways take the same steps, and its figures say what was done."""

import json
import math
from argparse import Namespace

import numpy as np
import pytest

from benchmarks import bench_train
from tests.conftest import ROOT, run

TINY = Namespace(model=str(ROOT / "configs" / "llama_tiny"), layers=1, steps=3, step_examples=16)


@pytest.fixture(scope="module")
def ways():
    flags = "--per_device_train_batch_size 4 --disable_tqdm True"
    return {way: bench_train.measure(way, flags, TINY) for way in ("then", "ours", "bare")}


def test_the_three_ways_take_the_same_steps(ways):
    assert all(len(way["losses"]) == len(way["seconds"]) == 3 for way in ways.values())
    assert ways["ours"]["losses"] == pytest.approx(ways["then"]["losses"], abs=1e-4)
    assert ways["bare"]["losses"] == pytest.approx(ways["ours"]["losses"], abs=1e-5)
    assert ways["then"]["losses"][0] == pytest.approx(math.log(4096), abs=0.5)  # of random weights


def test_padding_is_counted_where_there_is_some(ways):
    assert ways["ours"]["slots"] == ways["bare"]["slots"] == ways["ours"]["tokens"]
    assert 1.2 < ways["then"]["slots"] / ways["then"]["tokens"] < 1.8
    rounds = [{**ways["then"], "seconds": [9.0, 2.0, 4.0]}]
    summary = bench_train.summarize(rounds, peak=1e12)
    step = ways["then"]["tokens"] / 3
    assert summary["step_seconds"] == 3.0  # without the first
    assert summary["useful_tokens_per_second"] == round(step / 3)
    assert summary["mfu"] == round(6 * ways["then"]["parameters"] * step / 3 / 1e12, 3)


def test_examples_are_as_long_as_those_of_the_52k_set():
    data = bench_train.SyntheticDataset(6400, 4096)
    assert data.lengths.mean() == pytest.approx(125.7, rel=0.02)  # the set's own mean
    assert np.median(data.lengths) == pytest.approx(110, rel=0.02)
    row = data[7]
    assert len(row["input_ids"]) == data.lengths[7] and 0 < (row["labels"] == -100).sum() <= 60


def test_few_rows_have_the_whole_distribution_too():
    data = bench_train.SyntheticDataset(128, 4096)
    assert data.lengths.mean() == pytest.approx(125.7, rel=0.03) and data.lengths.max() > 360
    assert len(set(data.lengths)) > 64 and data.lengths.min() >= 42 and data.lengths.max() <= 512


def test_settings_as_a_command(tmp_path):
    """Of the table for one large GPU, through the whole of both scripts, on what is here."""
    out = tmp_path / "gpu.jsonl"
    options = ["--model", TINY.model, "--steps", 2, "--step_examples", 16, "--output", out]

    def bench(*more):
        return run(ROOT / "benchmarks" / "bench_gpu.py", *options, *more)

    for name in ("16, nothing recomputed", "flash"):
        result = bench("--only", name)
        assert result.returncode == 0 and result.stdout.count("\n| 16, ") == 1, result.stderr[-3000:]
    done, failed = map(json.loads, out.read_text().splitlines())
    assert done["setting"] == "16, nothing recomputed" and done["ours"]["useful_tokens_per_second"] > 0
    assert done["ours"]["padding_share"] == 0 and "16" in done["flags"]["ours"]
    assert "needs the package: pip install liger-kernel" in failed["failed"]
    before = out.read_text()
    assert bench("--only", "flash").stdout.count("\n| 16, ") == 0  # it has its line
    for seconds in (0, 0.5):
        result = bench("--only", "2023: padded", "--budget_s", seconds)
        assert "is used up" in result.stderr and "goes on there" in result.stderr and out.read_text() == before
