"""Runs that are killed, preempted, poisoned and resumed: real processes, real signals, real files."""

import hashlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import safetensors.torch
import torch
import transformers

from alpaca.common import ExpectedError
from alpaca.data.examples import SupervisedDataset
from alpaca.training import checkpoints
from alpaca.training import checkpoints as module
from alpaca.training.arguments import TrainingArguments
from alpaca.training.batches import DataCollatorForSupervisedDataset
from alpaca.training.callbacks import SpaceCheck, saves_to_come
from alpaca.training.special_tokens import complete_tokenizer
from tests.conftest import ROOT
from tests.training import forked

STEPS = 14  # of 4 examples; 34 examples make 8.5 steps an epoch
FLAGS = [
    *("--max_steps", STEPS, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2),
    *("--learning_rate", "1e-3", "--lr_scheduler_type", "cosine", "--warmup_ratio", "0.1", "--logging_steps", 1),
    *("--save_strategy", "steps", "--save_steps", 1, "--save_total_limit", 1, "--resume_from_checkpoint", "last"),
]


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

    assert losses(out) == losses(uninterrupted) and len(losses(out)) == losses(out)[-1][0]


def wait_for(condition, process, seconds=600, pause=0.002):
    """Wait until condition() holds (True) or the process ends (False)."""
    deadline = time.monotonic() + seconds
    while not condition():
        if not process.is_alive():
            return False
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(pause)
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
    """Every kill leaves something to go on from, the next start names what it skips, bitwise the same at the end."""
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
    show_kills(check_kills(3, command, uninterrupted, tmp_path, seed=time.time_ns()))


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
        (out / "run.json").write_text("{}")  # an earlier run saved this model
        process = forked.start(forked.train, directory / "log", *command, "--output_dir", out)
        staged = out / checkpoints.STAGED
        # Every third kill falls into the writing of the new model, the others into its taking the old one's place.
        sign, longest = (staged, 0.2) if kills % 3 == 0 else (staged / checkpoints.MANIFEST, 0.008)
        if not wait_for(sign.exists, process, pause=0.0002):
            assert process.exitcode == 0, (directory / "log").read_text()
            continue  # too quick to be seen
        time.sleep(rng.uniform(0, longest))
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
    show_kills(check_kills(50, command, uninterrupted, tmp_path, seed=0))
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


def test_sigterm_to_one_process_ends_all_of_them_in_good_order(command, tmp_path):
    """A single process is told; all agree on the step, save it, and go on from it bitwise as without."""
    flags = [*command, "--gradient_accumulation_steps", 1, "--max_steps", 8]

    def run_ranks(name, out):
        return forked.start_ranks(2, forked.train, tmp_path / name, *flags, "--output_dir", tmp_path / out)

    straight = run_ranks("log-0", "straight")
    ranks = run_ranks("log-1", "out")
    wait_for(lambda: (tmp_path / "log-1").read_text().count("'loss'") >= 3, ranks[0])
    ranks[1].terminate()
    for rank in ranks:
        rank.join(600)
    said = (tmp_path / "log-1").read_text()
    assert [rank.exitcode for rank in ranks] == [75, 75] and said.count("error: stopped by SIGTERM") == 1, said
    assert not (tmp_path / "out" / "config.json").exists()
    again = run_ranks("log-2", "out")
    for rank in [*straight, *again]:
        rank.join(600)
    said = (tmp_path / "log-2").read_text()
    assert [rank.exitcode for rank in again] == [0, 0] and "going on from" in said, said
    assert_same_run(tmp_path / "out", tmp_path / "straight")


def trainer_for(base, data, out, *flags):
    """The Trainer that train.py makes, in this process, over padded batches of two."""
    from transformers import HfArgumentParser

    from alpaca.training.trainer import AlpacaTrainer

    flags = ["--output_dir", out, "--max_steps", 4, "--per_device_train_batch_size", 2, "--use_cpu", "True", *flags]
    args = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(list(map(str, flags)))[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, model_max_length=512, padding_side="right")
    complete_tokenizer(tokenizer, "<unk>")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    collate = DataCollatorForSupervisedDataset(tokenizer)
    dataset = SupervisedDataset(str(data), tokenizer)
    return AlpacaTrainer(model=model, args=args, train_dataset=dataset, data_collator=collate, balance_tokens=False)


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_bad_gradient_stops_before_the_weights_change(base, data, tmp_path):
    trainer = trainer_for(base, data, tmp_path, "--gradient_accumulation_steps", "2", "--logging_steps", "1")
    weights = []

    def spoil(gradient):
        weights.append(copy_of(trainer.model))  # as they are when the backward pass gets here
        return gradient * float("inf") if len(weights) == 6 else gradient  # the last micro-batch of step 3

    trainer.model.lm_head.weight.register_hook(spoil)
    with pytest.raises(ExpectedError, match=r"step 3: the gradient norm is (nan|inf) over records") as raised:
        trainer.train()
    assert raised.value.exit_code == 7
    assert all(torch.equal(tensor, weights[-1][name]) for name, tensor in trainer.model.state_dict().items())
    assert len(re.findall(r"\d+", str(raised.value).split("over records")[1].split("(")[0])) == 4
    assert len(trainer.state.log_history) == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_loss_stops_the_job_and_names_its_examples(processes, base, data, tmp_path):
    """A token whose embedding is NaN, in one record alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, model_max_length=512)
    complete_tokenizer(tokenizer, "<unk>")
    dataset = SupervisedDataset(str(data), tokenizer)
    texts = [set(dataset[index]["input_ids"].tolist()) for index in range(len(dataset))]
    bad = 20
    token = min(texts[bad] - set().union(*texts[:bad], *texts[bad + 1 :]))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.get_input_embeddings().weight.data[token] = float("nan")
    model.save_pretrained(tmp_path / "poisoned")
    tokenizer.save_pretrained(tmp_path / "poisoned")
    flags = ["--model_name_or_path", tmp_path / "poisoned", "--data_path", data, "--output_dir", tmp_path / "out"]
    flags += ["--pad_token", "<unk>", "--max_steps", 20, "--save_steps", 1, "--logging_steps", 1]
    flags += ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4 // processes]
    if processes == 1:
        ranks = [forked.start(forked.train, tmp_path / "log", *flags)]
    else:
        ranks = forked.start_ranks(2, forked.train, tmp_path / "log", *flags)
    for rank in ranks:
        rank.join(600)
    said = (tmp_path / "log").read_text()
    assert {rank.exitcode for rank in ranks} == {7}, said
    assert said.count("error: ") == 1 and "Traceback" not in said
    step = int(
        re.search(r"error: step (\d+): the loss is not finite in the micro-batches of records 20 \(", said).group(1)
    )
    newest = checkpoints.checkpoints_in(tmp_path / "out")
    assert [path.name for path in newest] == [f"checkpoint-{done}" for done in range(1, step)]
    assert not (tmp_path / "out" / "config.json").exists()
    if newest:
        saved = safetensors.torch.load_file(newest[-1] / "model.safetensors")
        assert sum(not tensor.isfinite().all() for tensor in saved.values()) == 1  # the token's row


def test_a_killed_process_ends_the_job(base, data, tmp_path):
    """torchrun's processes are found by their parent; one of them is killed in the middle of training."""
    flags = ["--model_name_or_path", base, "--data_path", data, "--output_dir", tmp_path / "out", "--logging_steps", 1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(
            [*launch, *map(str, flags), "--max_steps", "100000", "--save_strategy", "no"],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    try:
        while "'loss'" not in (tmp_path / "log").read_text():
            assert job.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        ranks = psutil.Process(job.pid).children()
        assert len(ranks) == 2
        ranks[1].kill()
        killed = time.monotonic()
        assert job.wait(timeout=60) != 0
        seconds = time.monotonic() - killed
        print(f"a killed rank ended the job after {seconds:.1f} s")
        assert seconds < 30
        assert not any(rank.is_running() for rank in ranks)
    finally:
        for process in [*psutil.Process(job.pid).children(), job] if job.poll() is None else []:
            process.kill()


def wait_in_a_collective(peer):
    """As a process that waits on a GPU for a dead one: in C, where no Python code of the main thread runs."""
    import ctypes

    from alpaca.training.callbacks import Preemption

    preemption = Preemption()
    preemption.start([peer])
    print("waiting", flush=True)
    mutex = ctypes.create_string_buffer(128)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


def test_sigterm_ends_a_process_that_waits_for_a_dead_one(tmp_path):
    peer = forked.start(time.sleep, tmp_path / "peer", 1000)
    waiting = forked.start(wait_in_a_collective, tmp_path / "log", peer.pid)
    wait_for(lambda: "waiting" in (tmp_path / "log").read_text(), waiting)
    waiting.terminate()  # as before a preemption: it stays
    waiting.join(1.5)
    assert waiting.exitcode is None
    peer.kill()
    waiting.join(10)
    assert waiting.exitcode == 1 and "a process of this job was killed" in (tmp_path / "log").read_text()


def test_too_little_space_is_said_before_the_first_step(command, tmp_path):
    flags = [*command, "--output_dir", tmp_path / "out"]
    process = forked.start(forked.train_on_a_small_disk, tmp_path / "log", 10**6, *flags)
    process.join()
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 8 and "0.0 GiB free, and this run will need about" in said and "'loss'" not in said
    assert not checkpoints.checkpoints_in(tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "states", "checkpoints"),
    [
        (["--optim", "adamw_torch"], 2, 14),
        (["--optim", "adafactor"], 0, 14),
        (["--save_only_model", "True"], 0, 14),
        (["--save_strategy", "no"], 2, 0),
        (["--save_steps", "5"], 2, 3),
    ],
)
def test_no_more_space_is_asked_for_than_is_surely_needed(flags, states, checkpoints, base, data, tmp_path):
    sizes = []
    trainer = trainer_for(base, data, tmp_path, "--save_steps", 1, "--max_steps", 14, *flags)
    [check] = [c for c in trainer.callback_handler.callbacks if isinstance(c, SpaceCheck)]
    trainer.state.compute_steps(trainer.args, 14)
    trainer.state.max_steps, trainer.state.num_train_epochs = 14, 1
    plain, module.check_space = module.check_space, lambda *arguments: sizes.extend(arguments)
    try:
        check.on_train_begin(trainer.args, trainer.state, None, model=trainer.model)
    finally:
        module.check_space = plain
    weights = 4 * trainer.model.num_parameters()
    assert sizes == [str(tmp_path), weights * (1 + states), weights, checkpoints, None]
    trainer.args.save_strategy = "best"  # of which one is certain
    assert saves_to_come(trainer.args, trainer.state) == 1


def test_a_full_disk_ends_in_one_line_and_costs_one_save(command, uninterrupted, opt, tmp_path):
    """A limit on file size stands for the disk: the write that crosses it fails half done."""
    out = tmp_path / "out"

    def run_until_full(log, process):
        process.join()
        said = log.read_text()
        assert process.exitcode == 8 and said.count("error: ") == 1 and "Traceback" not in said, said
        assert "What was saved before is whole: free some space" in said
        return said

    # Model and optimizer states of a checkpoint are files of 1.1 and 2.2 MB.
    for step, limit in ((1, 500_000), (2, 1_500_000)):
        log = tmp_path / f"log-{step}"
        process = forked.start(forked.train_until_full, log, limit, *command, "--output_dir", out)
        assert f"{out}/checkpoint-{step + 1}." in run_until_full(log, process)
        assert [path.name for path in checkpoints.checkpoints_in(out)] == [f"checkpoint-{step}"]
        checkpoints.verify(out / f"checkpoint-{step}")

    process = forked.start(forked.train, tmp_path / "log", *command, "--output_dir", out)
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert_same_run(out, uninterrupted)

    for path in out.iterdir():
        path.unlink() if path.is_file() and path.name != "run.json" else None
    shutil.copytree(opt, out, dirs_exist_ok=True)
    process = forked.start(forked.train, tmp_path / "final", *command, "--output_dir", out)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (500_000, 500_000))
    assert f"{out}/{checkpoints.STAGED}." in run_until_full(tmp_path / "final", process)
    assert not (out / checkpoints.STAGED).exists()
    assert all((out / path.name).read_bytes() == path.read_bytes() for path in opt.iterdir())
    checkpoints.verify(out / f"checkpoint-{STEPS}")


def test_every_log_line_tensorboard_and_the_progress_bar_carry_the_figures(base, data, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    figures = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "padding_share"}
    flags = ("--report_to", "tensorboard", "--logging_steps", 2, "--disable_tqdm", "False")
    trainer = trainer_for(base, data, tmp_path, *flags, "--gradient_accumulation_steps", 2)
    batches = [batch for _, batch in zip(range(8), trainer.get_train_dataloader(), strict=False)]
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [set(line) for line in lines] == [figures | {"epoch", "step"}] * 2
    assert lines == [entry for entry in log_history(tmp_path / "checkpoint-4") if "loss" in entry]
    tokens = [int(batch["attention_mask"].sum()) for batch in batches]
    slots = [batch["input_ids"].numel() for batch in batches]
    assert [line["padding_share"] for line in lines] == [
        pytest.approx(1 - sum(tokens[:4]) / sum(slots[:4])),
        pytest.approx(1 - sum(tokens[4:]) / sum(slots[4:])),
    ]
    took = sum(tokens[:4]) / lines[0]["tokens_per_second"] + sum(tokens[4:]) / lines[1]["tokens_per_second"]
    assert 0 < took < seconds  # the rest is preparation, and how long that takes depends on the machine
    [folder] = (tmp_path / "runs").iterdir() if (tmp_path / "runs").exists() else tmp_path.glob("**/*tfevents*")
    events = EventAccumulator(str(folder))
    events.Reload()
    for name in figures:
        points = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert points == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    shown = capsys.readouterr()
    for name in figures:
        assert f"'{name}': '{lines[1][name]:.4g}'" in shown.out
        assert f"{name}={lines[1][name]:.3g}" in shown.err
    watch = trainer.watch  # as on four A100s with a 7B model: 6 × 7e9 × 20,000 tokens/s over 4 × 312e12
    watch.tokens, watch.slots, watch.seconds = 200_000, 250_000, 10.0
    watch.flops_per_token, watch.peak = 6 * 7e9, 4 * 312e12
    assert watch.figures() == {
        "tokens_per_second": 20_000,
        "padding_share": pytest.approx(0.2),
        "mfu": pytest.approx(0.673, abs=1e-3),
    }


def test_the_run_record(uninterrupted, base, data):
    record = json.loads((uninterrupted / "run.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, model_max_length=512)
    complete_tokenizer(tokenizer)
    rows = list(SupervisedDataset(str(data), tokenizer))
    assert record["data"] == {
        "path": str(data),
        "sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
        "records": 34,
        "left_out": 0,
        "examples": 34,
        "tokens": sum(len(row["labels"]) for row in rows),
        "label_tokens": sum(int((row["labels"] != -100).sum()) for row in rows),
    }
    assert record["arguments"]["learning_rate"] == 1e-3 and record["arguments"]["warmup_steps"] == 0.1
    assert record["versions"]["transformers"] == transformers.__version__
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert record["git"]["commit"] == head.strip() if head else record["git"] is None
    assert record["resumed_from"] is None and record["processes"] == 1
