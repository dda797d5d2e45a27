"""Sharding inside each of two machines and replicas across them: four processes, two a machine."""

import json
import re

import pytest
import torch

import train
from alpaca.common import ExpectedError
from alpaca.training import checkpoints
from tests.training import courses, forked

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def run(base, data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("hybrid")
    fixed = ["--model_name_or_path", base, "--data_path", data, "--max_steps", 3, "--save_steps", 2]
    fixed += ["--logging_steps", 1, "--learning_rate", "1e-3", "--lr_scheduler_type", "constant"]
    fixed += ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2, "--seed", 3]

    def run(name, sharding, *flags, machines=2):
        out, log = directory / name, directory / f"{name}.log"
        arguments = [directory / f"{name}-gathered", *fixed, "--output_dir", out, "--fsdp", sharding, *flags]
        ranks = forked.start_ranks(4, forked.train_sharded, log, *arguments, machines=machines)
        for rank in ranks:
            rank.join(600)
        said = log.read_text()
        assert [rank.exitcode for rank in ranks] == [0] * 4, said
        return out, said

    return run


def losses(out):
    return [
        line["loss"] for line in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in line
    ]


def test_replicas_of_sharded_machines_take_full_shards_course_and_go_on(run):
    full, said_full = run("full", "full_shard auto_wrap")
    hybrid, said = run("hybrid", "hybrid_shard auto_wrap")
    held, whole = (int(number.replace(",", "")) for number in re.search(r"holds ([\d,]+) of ([\d,]+)", said).groups())
    quarter = int(re.search(r"holds ([\d,]+) of", said_full).group(1).replace(",", ""))
    assert held == pytest.approx(whole / 2, rel=0.01) and quarter == pytest.approx(whole / 4, rel=0.02)
    assert len(losses(full)) == 3 and losses(hybrid) == pytest.approx(losses(full), rel=1e-5)
    ours, expected = courses.weights(hybrid), courses.weights(full)
    assert all(torch.allclose(ours[name], tensor, atol=1e-4) for name, tensor in expected.items())
    checkpoints.verify(hybrid / "checkpoint-2")
    resumed, _ = run("resumed", "hybrid_shard auto_wrap", "--resume_from_checkpoint", hybrid / "checkpoint-2")
    again = courses.weights(resumed)
    assert all(torch.allclose(again[name], tensor, atol=1e-5) for name, tensor in ours.items())


def test_on_one_machine_it_is_full_shard(run):
    _, said = run("alone", "hybrid_shard auto_wrap", "--max_steps", 1, machines=1)
    assert said.count("hybrid_shard on one machine is full_shard") == 1
    held, whole = (int(number.replace(",", "")) for number in re.search(r"holds ([\d,]+) of ([\d,]+)", said).groups())
    assert held == pytest.approx(whole / 4, rel=0.02)


@pytest.mark.parametrize(("processes", "inside"), [(4, 1), (6, 4)])
def test_machines_that_cannot_shard_alike_are_said_in_a_line(processes, inside, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(inside))
    with pytest.raises(
        ExpectedError, match=f"equally many: {processes} in all, {inside} here; use full_shard"
    ) as error:
        train.TrainingArguments(output_dir="out", fsdp="hybrid_shard auto_wrap", use_cpu=True)
    assert error.value.exit_code == 2
