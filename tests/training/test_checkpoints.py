"""Manifests, the choice of a checkpoint, and the replacing of a model, over real files."""

import json
import random
import shutil

import pytest

from alpaca.common import ExitCode, ExpectedError
from alpaca.training import checkpoints

FACTS = {"sharding": "none", "processes": 1, "has_optimizer": True}


def make_checkpoint(directory, step, limit=None, **facts):
    path = directory / f"checkpoint-{step}"
    (path / "global_step").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(random.Random(step).randbytes(5000))
    (path / "global_step" / "states.pt").write_bytes(random.Random(-step).randbytes(700))
    checkpoints.finish_checkpoint(path, limit, None, **{**FACTS, **facts})
    return path


def find(directory, resume="last", sharding="none"):
    return checkpoints.find_checkpoint(resume, directory, sharding)


def test_every_changed_missing_or_shortened_file_is_found(tmp_path):
    path = make_checkpoint(tmp_path, 1)
    assert set(checkpoints.verify(path)["files"]) == {"model.safetensors", "global_step/states.pt"}
    rng = random.Random(0)
    for name in ("model.safetensors", "global_step/states.pt", "manifest.json"):
        whole = (path / name).read_bytes()
        for _ in range(60):
            place = rng.randrange(len(whole))
            flipped = whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :]
            (path / name).write_bytes(flipped)
            if name == "manifest.json" and json_or_none(flipped) == json.loads(whole):
                continue  # a space became a tab or the like: the same manifest
            with pytest.raises(ExpectedError, match=name.split("/")[-1]) as raised:
                checkpoints.verify(path)
            assert raised.value.exit_code == ExitCode.INTEGRITY
        for length in (0, len(whole) // 2, len(whole) - 1):
            (path / name).write_bytes(whole[:length])
            with pytest.raises(ExpectedError, match=name.split("/")[-1]):
                checkpoints.verify(path)
        (path / name).unlink()
        with pytest.raises(ExpectedError, match=name.split("/")[-1]):
            checkpoints.verify(path)
        (path / name).write_bytes(whole)
    checkpoints.verify(path)


def json_or_none(data):
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_the_newest_whole_checkpoint_is_chosen_and_the_others_named(tmp_path, capsys):
    assert find(tmp_path) is None
    assert "has no whole checkpoint to go on from; starting from the beginning" in capsys.readouterr().err
    paths = {step: make_checkpoint(tmp_path, step) for step in (40, 2, 4, 6, 8)}  # 40: of an earlier, longer run
    (paths[6] / "model.safetensors").write_bytes(b"short")
    (paths[8] / "manifest.json").unlink()
    assert find(tmp_path) == find(tmp_path, True) == find(tmp_path, "True") == str(paths[4])
    said = capsys.readouterr().err
    assert "checkpoint-6 is damaged: model.safetensors has 5 bytes and not 5,000; skipped" in said
    assert "checkpoint-8 is incomplete: it has no manifest.json; skipped" in said
    assert find(tmp_path, str(paths[2])) == str(paths[2])
    with pytest.raises(ExpectedError, match="checkpoint-6 is damaged") as raised:
        find(tmp_path, str(paths[6]))
    assert raised.value.exit_code == ExitCode.INTEGRITY
    assert find(tmp_path, None) is find(tmp_path, "False") is None
    assert "--resume_from_checkpoint last would go on" in capsys.readouterr().err


def test_what_this_run_cannot_go_on_from_is_refused(tmp_path, capsys):
    for resume, message in ((True, "has no whole checkpoint"), (str(tmp_path / "none"), "is no directory")):
        with pytest.raises(ExpectedError, match=message) as raised:
            find(tmp_path, resume)
        assert raised.value.exit_code == ExitCode.USAGE
    make_checkpoint(tmp_path, 1, processes=4)
    with pytest.raises(ExpectedError, match="saved with neither --fsdp nor --deepspeed and this run has --fsdp"):
        find(tmp_path, sharding="fsdp")
    assert (
        find(tmp_path).endswith("checkpoint-1") and "saved by 4 processes and goes on with 1" in capsys.readouterr().err
    )
    make_checkpoint(tmp_path, 2, processes=4, sharding="deepspeed")
    with pytest.raises(ExpectedError, match=r"by 4 processes, and DeepSpeed goes on .* as many only, not with 1"):
        find(tmp_path, sharding="deepspeed")
    make_checkpoint(tmp_path, 3, sharding="fsdp")
    with pytest.raises(ExpectedError, match=r"this run has neither .*only loads with the same, started by torchrun"):
        find(tmp_path)
    make_checkpoint(tmp_path, 4, has_optimizer=False)
    with pytest.raises(ExpectedError, match="--save_only_model"):
        find(tmp_path)


def test_old_checkpoints_go_only_after_the_new_one_is_whole(tmp_path):
    first = make_checkpoint(tmp_path, 1)
    (tmp_path / "checkpoint-2").mkdir()  # what a kill left
    (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(b"half")
    make_checkpoint(tmp_path, 3, limit=2)
    assert [path.name for path in checkpoints.checkpoints_in(tmp_path)] == ["checkpoint-1", "checkpoint-3"]
    best = checkpoints.checkpoints_in(tmp_path)[0]
    newest = tmp_path / "checkpoint-4"
    newest.mkdir()
    checkpoints.finish_checkpoint(newest, 1, str(best), **FACTS)
    assert checkpoints.checkpoints_in(tmp_path) == [first, newest]


def test_a_new_model_leaves_nothing_of_an_old_one(tmp_path):
    old = ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    for name in (*old, "merges.txt", "adapter_config.json", "weight_diff.json"):
        (tmp_path / name).write_text("old")
    (tmp_path / "notes.txt").write_text("the user's own")
    make_checkpoint(tmp_path, 1)
    for generation in ("a", "b"):
        staged = checkpoints.stage_model(tmp_path)
        for name in ("config.json", "model.safetensors", f"extra-{generation}.json"):
            (tmp_path / staged / name).write_text(generation)
        checkpoints.publish_model(tmp_path)
        present = {path.name for path in tmp_path.iterdir()}
        expected = {"config.json", "model.safetensors", f"extra-{generation}.json", "manifest.json"}
        assert present == expected | {"notes.txt", "checkpoint-1"}
        assert (tmp_path / "model.safetensors").read_text() == generation
        checkpoints.verify(tmp_path)
    checkpoints.verify(tmp_path / "checkpoint-1")


def test_the_disk_must_hold_one_checkpoint_more_than_are_kept(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    checkpoints.check_space(tmp_path, checkpoint=300, model=100, to_come=50, limit=2)  # 3 × 300 + 100
    checkpoints.check_space(tmp_path, checkpoint=300, model=100, to_come=3, limit=None)
    assert not capsys.readouterr().err
    for over in ({"model": 101}, {"checkpoint": 301}, {"limit": 3}, {"limit": None}):  # may not fit: said
        checkpoints.check_space(tmp_path, **{"checkpoint": 300, "model": 100, "to_come": 50, "limit": 2, **over})
        assert "--save_total_limit" in capsys.readouterr().err
    for over in ({"model": 701}, {"checkpoint": 901}, {"model": 1001, "to_come": 0}):  # the first does not: refused
        with pytest.raises(ExpectedError, match="--save_total_limit") as raised:
            checkpoints.check_space(tmp_path, **{"checkpoint": 300, "model": 100, "to_come": 50, "limit": 2, **over})
        assert raised.value.exit_code == ExitCode.DISK
    make_checkpoint(tmp_path, 1)
    make_checkpoint(tmp_path, 2)
    checkpoints.check_space(tmp_path, checkpoint=900, model=100, to_come=50, limit=2)  # two have their place already


def test_a_run_never_replaces_a_model_that_is_not_its_own(tmp_path):
    checkpoints.check_own(tmp_path / "new")
    for directory in (tmp_path / "a", tmp_path / "b" / "merged"):
        directory.mkdir(parents=True)
        (directory / "model.safetensors").write_text("the user's own")
    for name in "ab":
        with pytest.raises(ExpectedError, match=r"holds model\.safetensors, which no run of train\.py saved") as raised:
            checkpoints.check_own(tmp_path / name)
        assert raised.value.exit_code == ExitCode.USAGE
        (tmp_path / name / "run.json").write_text("{}")  # an earlier run's, perhaps killed while it saved
        checkpoints.check_own(tmp_path / name)


def test_of_a_merged_model_only_its_own_files_are_removed(tmp_path):
    staged = checkpoints.stage_model(tmp_path / "merged")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / staged / name).write_text("merged")
    checkpoints.publish_model(tmp_path / "merged")
    (tmp_path / "merged" / "model.gguf").write_text("the user's own")
    checkpoints.remove_merged(tmp_path)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["model.gguf"]
    (tmp_path / "merged" / "model.safetensors").write_text("the user's own")
    checkpoints.remove_merged(tmp_path)
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    identity = {"lora": [8, 16, "all-linear"], "base": "b1", "examples": "e1"}
    directory = make_checkpoint(tmp_path, 1, identity=identity)
    find = checkpoints.find_checkpoint
    for same in (identity, {**identity, "base": None}):  # of a Hub id nothing is known
        assert find("last", tmp_path, "none", same) == str(directory)
    for change, said in (
        ({"lora": [4, 16, "all-linear"]}, r"LoRA rank.*\(\[8, 16, 'all-linear'\], now \[4, 16, 'all-linear'\]\)"),
        ({"lora": None}, "now no LoRA"),
        ({"base": "b2"}, "other base model"),
        ({"examples": "e2"}, "other examples"),
    ):
        for resume in ("last", str(directory)):
            with pytest.raises(ExpectedError, match=said) as raised:
                find(resume, tmp_path, "none", {**identity, **change})
            assert raised.value.exit_code == ExitCode.USAGE
    assert find(str(make_checkpoint(tmp_path, 2)), tmp_path, "none", identity)  # saved before this was recorded
