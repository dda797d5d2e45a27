"""Runs that go on with another number of processes, from whole checkpoints and from parts."""

import json
import re
import shutil

import pytest

from alpaca.training.trainer import WHOLE
from tests.training import courses, forked

STEPS = 6
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def still(base, tmp_path_factory):
    """Without dropout: another number of processes has other random numbers."""
    directory = shutil.copytree(base, tmp_path_factory.mktemp("still") / "base")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.0}))
    return directory


@pytest.fixture(scope="module")
def run(still, data, tmp_path_factory):
    """Trains on so many processes, 4 examples a step; returns output directory, exit codes and what was said."""
    directory = tmp_path_factory.mktemp("numbers")
    fixed = ["--model_name_or_path", still, "--data_path", data, "--max_steps", STEPS, "--save_steps", 3]
    fixed += ["--logging_steps", 1, "--learning_rate", "1e-3", "--per_device_train_batch_size", 2]

    def run(name, processes, *flags):
        log, out = directory / f"{name}.log", directory / name
        function, first = (forked.train_sharded, [f"{out}-gathered"]) if "--fsdp" in flags else (forked.train, [])
        accumulation = ["--gradient_accumulation_steps", 2 // processes]
        arguments = [*first, *fixed, *accumulation, "--output_dir", out, *flags]
        ranks = forked.start_ranks(processes, function, log, *arguments)
        for rank in ranks:
            rank.join(250)
        return out, [rank.exitcode for rank in ranks], log.read_text()

    return run


SHARDED = ["--fsdp", "full_shard auto_wrap"]
KINDS = {
    "whole": [],
    "parts": SHARDED,
    "sharded, whole": [*SHARDED, "--fsdp_config", json.dumps({"state_dict_type": WHOLE})],
    "adapters": [*SHARDED, "--lora_r", 4],
}


@pytest.mark.parametrize(
    "kind", ["whole", "parts", *(pytest.param(k, marks=pytest.mark.soak) for k in list(KINDS)[2:])]
)
def test_a_run_goes_on_with_another_number_of_processes(kind, run):
    outs = {}
    for processes in (1, 2):
        outs[processes], codes, said = run(f"{kind} {processes}", processes, *KINDS[kind])
        assert set(codes) == {0}, said
    for before, now in ((1, 2), (2, 1)):
        checkpoint = outs[before] / "checkpoint-3"
        out, codes, said = run(f"{kind} {before}-{now}", now, *KINDS[kind], "--resume_from_checkpoint", checkpoint)
        assert set(codes) == {0} and len(codes) == now and "Traceback" not in said, said
        assert re.search(rf"{checkpoint} was saved by {before} process(es)? and goes on with {now}:", said), said
        assert len(courses.losses(out)) == STEPS
        courses.assert_same_course(courses.losses(out), courses.losses(outs[before]))
