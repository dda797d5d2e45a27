"""The training benchmark on a small model: its three ways take the same steps, and its figures say what was done."""

import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch

from benchmarks import bench_train
from tests.conftest import ROOT, run

TINY = Namespace(model=str(ROOT / "configs" / "llama_tiny"), layers=1, steps=3, step_examples=16)


@pytest.fixture(scope="module")
def ways():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    flags = "--per_device_train_batch_size 4 --disable_tqdm True"
    yield {way: bench_train.measure(way, flags, TINY) for way in ("then", "ours", "bare")}
    torch.set_num_threads(threads)


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


def test_one_setting_as_a_command(tmp_path):
    """Of the table for one large GPU, through the whole of both scripts, on what is here."""
    out = tmp_path / "gpu.jsonl"
    options = ["--model", TINY.model, "--steps", 2, "--step_examples", 16, "--output", out]
    for name in ("bare", "flash"):
        result = run(ROOT / "benchmarks" / "bench_gpu.py", *options, "--only", name)
        assert result.returncode == 0, result.stderr[-3000:]
    done, failed = map(json.loads, out.read_text().splitlines())
    assert done["setting"] == "ours, 16, bare loop" and done["bare"]["useful_tokens_per_second"] > 0
    assert done["bare"]["padding_share"] == 0 and "16" in done["flags"]["bare"]
    assert "FlashAttention2" in failed["failed"]
