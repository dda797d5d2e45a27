"""Runs that are killed, preempted, poisoned and resumed: real processes, real signals, real files."""

import json
import random
import re
import shutil
import time

import pytest
import transformers

import checkpoints
from utils import ExpectedError

from . import forked
from .conftest import ROOT

STEPS = 14  # of 4 examples; 36 examples make 9 steps an epoch, so that runs end and resume within epochs
FLAGS = [
    *("--max_steps", STEPS, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2),
    *("--learning_rate", "1e-3", "--lr_scheduler_type", "cosine", "--warmup_ratio", "0.1", "--logging_steps", 1),
    *("--save_strategy", "steps", "--save_steps", 1, "--save_total_limit", 1, "--resume_from_checkpoint", "last"),
]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A LLaMA of one layer: saving it takes as long as a step."""
    directory = tmp_path_factory.mktemp("base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "configs" / "llama_tiny")
    tokenizer.save_pretrained(directory)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.set_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **shape, attention_dropout=0.1)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "few.json"
    records = json.loads((ROOT / "alpaca_data.json").read_text())
    path.write_text(json.dumps(sorted(records, key=lambda record: len(str(record)))[:36]))
    return path


@pytest.fixture(scope="session")
def command(base, data):
    return ["--model_name_or_path", base, "--data_path", data, *FLAGS]


@pytest.fixture(scope="session")
def uninterrupted(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    process = forked.start(forked.train, out / "log", *command, "--output_dir", out)
    process.join()
    assert process.exitcode == 0, (out / "log").read_text()
    return out


def log_history(directory):
    return json.loads((directory / "trainer_state.json").read_text())["log_history"]


def model_bytes(directory):
    """The final model, file by file, after checking it against its manifest."""
    names = checkpoints.verify(directory)["files"]
    return {name: (directory / name).read_bytes() for name in names if name != "training_args.bin"}


def assert_same_run(out, uninterrupted):
    """Bitwise the same weights, and the same loss at every step."""
    assert model_bytes(out) == model_bytes(uninterrupted)

    def losses(directory):
        return [(e["step"], e["loss"], e["grad_norm"]) for e in log_history(directory) if "loss" in e]

    assert losses(out) == losses(uninterrupted) and len(losses(out)) == STEPS


def wait_for(condition, process, seconds=120):
    """Wait until condition() holds (True) or the process ends (False)."""
    deadline = time.monotonic() + seconds
    while not condition():
        if not process.is_alive():
            return False
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.001)
    return True


def kill_while_saving(kills, command, directory, rng):
    """Start the same command again and again, and kill -9 it at a random moment once it has begun to save.

    Yields for each kill {"out", "whole", "broken", "said", …} of the checkpoints that it left, and of what the next
    start said. Runs that reach their end give way to new ones.
    """
    chain, out = 0, directory / "0"
    while kills:
        log = directory / f"log-{kills}"
        before = {path.name for path in checkpoints.checkpoints_in(out)}
        process = forked.start(forked.train, log, *command, "--output_dir", out)

        def saving(before=before, out=out):
            return not before >= {path.name for path in checkpoints.checkpoints_in(out)}

        if not wait_for(saving, process):
            assert process.exitcode == 0, log.read_text()
            chain, out = chain + 1, directory / str(chain + 1)
            continue
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
        kills -= 1
        whole, broken = [], []
        for path in checkpoints.checkpoints_in(out):
            try:
                checkpoints.verify(path)
                whole.append(path)
            except ExpectedError:
                broken.append(path)
        yield {"out": out, "log": log, "whole": whole, "broken": broken, "finished": process.exitcode == 0}


def check_kills(kills, command, uninterrupted, directory, seed):
    """Every kill leaves something to go on from, the next start names what it skips, and the end is bitwise as without."""
    rng, report, previous = random.Random(seed), [], None
    for killed in kill_while_saving(kills, command, directory, rng):
        if previous and previous["out"] == killed["out"]:
            said = killed["log"].read_text()
            chosen = re.search(r"going on from .*checkpoint-(\d+)", said)
            newest = max((int(path.name[11:]) for path in previous["whole"]), default=None)
            assert (chosen and int(chosen.group(1))) == newest, said
            for path in previous["broken"]:
                assert re.search(rf"{path} is (incomplete|damaged).*skipped", said), said
            report.append((newest, [path.name for path in previous["broken"]]))
        steps = [int(path.name[11:]) for path in killed["whole"] + killed["broken"]]
        assert killed["whole"] or steps in ([], [1]), "only the first save of all leaves nothing before it"
        previous = killed
    process = forked.start(forked.train, directory / "log-last", *command, "--output_dir", previous["out"])
    process.join()
    assert process.exitcode == 0, (directory / "log-last").read_text()
    for out in directory.glob("[0-9]*"):
        assert_same_run(out, uninterrupted)
    return report


def show_kills(report):
    for newest, broken in report:
        print(f"kill -9: went on from checkpoint-{newest}" + (f", skipped {', '.join(broken)}" if broken else ""))


def test_kills_during_saves(command, uninterrupted, tmp_path):
    show_kills(check_kills(5, command, uninterrupted, tmp_path, seed=time.time_ns()))


def check_export_kills(kills, command, uninterrupted, opt, directory, rng):
    """Kill the final save over another model's directory; returns how often old, new and neither were left."""
    states = {"old": 0, "new": 0, "neither": 0}
    old = {path.name: path.read_bytes() for path in opt.iterdir()}
    new = model_bytes(uninterrupted)
    assert not any(old[name] == new[name] for name in set(old) & set(new))
    out = directory / "out"
    while kills:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(uninterrupted / f"checkpoint-{STEPS}", out / f"checkpoint-{STEPS}")
        shutil.copytree(opt, out, dirs_exist_ok=True)
        process = forked.start(forked.train, directory / "log", *command, "--output_dir", out)
        if not wait_for((out / checkpoints.STAGED).exists, process):
            raise AssertionError((directory / "log").read_text())
        time.sleep(rng.uniform(0, 0.08))
        process.kill()
        process.join()
        kills -= 1
        present = {path.name: path.read_bytes() for path in out.iterdir() if path.name in set(old) | set(new)}
        of_old = {name for name in present if present[name] == old.get(name)}
        of_new = {name for name in present if present[name] == new.get(name)}
        assert of_old | of_new == set(present) and not (of_old and of_new), (of_old, of_new)
        whole = "old" if of_old == set(old) else "new" if of_new == set(new) else "neither"
        states[whole] += 1
        if whole == "neither":
            assert "config.json" not in present, "half a model must not load"
    process = forked.start(forked.train, directory / "log", *command, "--output_dir", out)
    process.join()
    assert process.exitcode == 0 and model_bytes(out) == new, (directory / "log").read_text()
    return states


def test_kills_during_the_final_save(command, uninterrupted, opt, tmp_path):
    print(check_export_kills(2, command, uninterrupted, opt, tmp_path, random.Random(time.time_ns())))


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_many_kills(command, uninterrupted, opt, tmp_path):
    show_kills(check_kills(50, command, uninterrupted, tmp_path / "saves", seed=0))
    print(check_export_kills(25, command, uninterrupted, opt, tmp_path, random.Random(0)))


def test_sigterm_saves_exits_75_and_the_same_command_goes_on(command, uninterrupted, tmp_path):
    out = tmp_path / "out"
    for attempt in (1, 2):
        log = tmp_path / f"log-{attempt}"
        process = forked.start(
            forked.train, log, *command, "--save_steps", 1000, "--output_dir", out, "--save_total_limit", 2
        )
        wait_for(lambda log=log: log.read_text().count("'loss'") >= 3, process)
        process.terminate()
        process.join()
        said = log.read_text()
        assert process.exitcode == 75, said
        saved = re.search(r"error: stopped by SIGTERM after saving .*/(checkpoint-\d+);", said).group(1)
        checkpoints.verify(out / saved)
        assert not (out / "config.json").exists() and "Traceback" not in said
    assert len(checkpoints.checkpoints_in(out)) == 2
    process = forked.start(forked.train, tmp_path / "log", *command, "--output_dir", out)
    process.join()
    assert process.exitcode == 0 and f"going on from {out / saved}" in (tmp_path / "log").read_text()
    assert_same_run(out, uninterrupted)
