"""Checkpoints of FSDP2 on two processes, each of which writes and hashes its own part."""

import json
import random
import re
import resource
import shutil
import time

import pytest
import torch

from alpaca.common import ExpectedError
from alpaca.training import checkpoints
from alpaca.training.trainer import WHOLE
from tests.training import courses, forked
from tests.training.test_long_runs import assert_same_run, wait_for

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def run(base, data, tmp_path_factory):
    """Trains four steps on two sharded ranks, saving after each second one; returns output directory and exit codes."""
    directory = tmp_path_factory.mktemp("sharded")
    fixed = ["--model_name_or_path", base, "--data_path", data, "--max_steps", 4, "--save_steps", 2]
    fixed += ["--logging_steps", 1, "--learning_rate", "1e-3", "--fsdp", "full_shard auto_wrap"]
    fixed += ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]

    def run(name, *flags, meanwhile=None):
        out, report = directory / name, directory / f"{name}-gathered"
        log = directory / f"{name}.log"
        log.unlink(missing_ok=True)
        ranks = forked.start_ranks(2, forked.train_sharded, log, report, *fixed, "--output_dir", out, *flags)
        if meanwhile:
            meanwhile(ranks, out)
        for rank in ranks:
            rank.join(600)
        return out, [rank.exitcode for rank in ranks], log.read_text()

    return run


@pytest.fixture(scope="module")
def straight(run):
    out, codes, said = run("straight")
    assert codes == [0, 0], said
    return out


def test_every_rank_saves_its_own_part_and_only_the_end_gathers_a_model(straight):
    manifest = checkpoints.verify(straight / "checkpoint-4")
    parts = {f"{kind}_0/__{rank}_0.distcp" for kind in ("pytorch_model_fsdp", "optimizer") for rank in (0, 1)}
    assert parts | {"rng_state_1.pth", "optimizer_0/.metadata"} <= set(manifest["files"])
    assert not any(name.endswith((".safetensors", ".bin")) for name in manifest["files"])
    assert manifest["sharding"] == "fsdp" and manifest["processes"] == 2
    elements = sum(tensor.numel() for tensor in courses.weights(straight).values())
    for rank in (0, 1):
        lines = [json.loads(line) for line in (straight.parent / f"straight-gathered-{rank}").read_text().splitlines()]
        calls = [line["call"] for line in lines]
        assert calls == ["get_model_state_dict", "get_optimizer_state_dict"] * 2 + ["get_model_state_dict"]
        for line in lines[:-1]:
            states = 2 if line["call"] == "get_optimizer_state_dict" else 1
            assert line["options"]["full_state_dict"] is False and line["elements"] < 0.6 * states * elements
        final = lines[-1]
        assert final["options"] == {"full_state_dict": True, "cpu_offload": True} and final["on_cpu"]
        assert final["elements"] == (elements if rank == 0 else 0)


def test_ranks_share_the_hashing(straight, tmp_path):
    checkpoint = shutil.copytree(straight / "checkpoint-4", tmp_path / "checkpoint-4")
    shares = [checkpoints.describe_files(checkpoint, rank, 2) for rank in (0, 1)]
    assert set(shares[1]) == {"pytorch_model_fsdp_0/__1_0.distcp", "optimizer_0/__1_0.distcp", "rng_state_1.pth"}
    assert not set(shares[0]) & set(shares[1])
    assert shares[0] | shares[1] == checkpoints.read_manifest(checkpoint)["files"]
    (checkpoint / "zero_pp_rank_1_mp_rank_00_optim_states.pt").touch()  # DeepSpeed's
    (checkpoint / "rng_state_7.pth").touch()  # of a job with more ranks
    assert [len(checkpoints.describe_files(checkpoint, rank, 2)) for rank in (0, 1)] == [len(shares[0]) + 1, 4]


def test_a_run_goes_on_from_parts_and_from_the_whole_files_of_old(run, straight):
    out, codes, said = run("resumed", "--resume_from_checkpoint", straight / "checkpoint-2")
    assert codes == [0, 0], said
    assert_same_run(out, straight)
    whole = ["--fsdp_config", json.dumps({"state_dict_type": WHOLE})]
    old, codes, said = run("old", *whole)
    assert codes == [0, 0] and (old / "checkpoint-2" / "pytorch_model_fsdp.bin").exists(), said
    assert_same_run(old, straight)
    out, codes, said = run("from-old", "--resume_from_checkpoint", old / "checkpoint-2")
    assert codes == [0, 0] and (out / "checkpoint-4" / "pytorch_model_fsdp_0").is_dir(), said
    assert_same_run(out, straight)


def test_a_damaged_part_is_found(run, straight, tmp_path):
    checkpoint = shutil.copytree(straight / "checkpoint-2", tmp_path / "checkpoint-2")
    part = checkpoint / "pytorch_model_fsdp_0" / "__1_0.distcp"
    whole = bytearray(part.read_bytes())
    whole[len(whole) // 2] ^= 1
    part.write_bytes(whole)
    with pytest.raises(ExpectedError, match=r"__1_0\.distcp changed"):
        checkpoints.find_checkpoint(str(checkpoint), tmp_path, "fsdp")


def test_a_disk_that_is_full_for_one_rank_costs_one_save_and_one_line(run, straight):
    def fill(ranks, out):
        wait_for((out / "checkpoint-2" / checkpoints.MANIFEST).exists, ranks[0])
        resource.prlimit(ranks[1].pid, resource.RLIMIT_FSIZE, (100_000, 100_000))

    out, codes, said = run("full", "--max_steps", 400, "--save_steps", 2, meanwhile=fill)
    assert codes == [8, 8] and said.count("error: ") == 1 and "Traceback" not in said, said
    assert "What was saved before is whole: free some space" in said
    failed = int(re.search(r"checkpoint-(\d+)\. What was saved", said).group(1))
    assert [path.name for path in checkpoints.checkpoints_in(out)] == [f"checkpoint-{n}" for n in range(2, failed, 2)]
    checkpoints.verify(out / f"checkpoint-{failed - 2}")


def test_kills_during_a_save_in_parts(run, straight):
    """Both ranks at once, at a random moment after a save has begun."""

    def kill(ranks, out):
        if wait_for(lambda: len(checkpoints.checkpoints_in(out)) > 1, ranks[0]):
            time.sleep(random.uniform(0, 0.2))
        for rank in ranks:
            rank.kill()

    run("killed", "--save_steps", 1, meanwhile=kill)
    out, codes, said = run("killed", "--save_steps", 1, "--resume_from_checkpoint", "last")
    assert codes == [0, 0], said
    assert_same_run(out, straight)


def test_the_best_model_is_loaded_from_parts(run):
    flags = ["--val_size", 6, "--eval_strategy", "steps", "--eval_steps", 2, "--load_best_model_at_end", "True"]
    worst = ["--metric_for_best_model", "eval_loss", "--greater_is_better", "True"]  # which is the earlier one
    out, codes, said = run("best", *flags, *worst)
    assert codes == [0, 0], said
    state = json.loads((out / "trainer_state.json").read_text())
    best = state["best_model_checkpoint"]
    assert best.endswith("checkpoint-2")
    saved = {}
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    reader = FileSystemReader(f"{best}/pytorch_model_fsdp_0")
    _load_state_dict(saved, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    final = courses.weights(out)
    assert all(torch.equal(saved["model"][name], tensor) for name, tensor in final.items())


@pytest.mark.parametrize("flags", [[], ["--lora_r", 4]], ids=["all weights", "adapters"])
def test_weights_that_only_the_first_rank_reads_take_the_same_course(flags, run, straight):
    """As on GPUs, where this is on unless --fsdp_config says otherwise."""
    sent, codes, said = run("sent", *flags, "--fsdp_config", '{"cpu_ram_efficient_loading": true}')
    assert codes == [0, 0], said
    read, codes, said = run("read", *flags) if flags else (straight, [0, 0], "")
    assert codes == [0, 0], said
    name = "adapter_model.safetensors" if flags else "model.safetensors"
    ours, expected = courses.weights(sent, name), courses.weights(read, name)
    assert set(ours) == set(expected)
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
