"""train.py in processes that are forked from one that has done the imports: real processes, ready in a second."""

import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.environ["PYTHONPATH"] = str(ROOT)  # the fork server's, which starts with the first process
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train", "transformers.models.llama.modeling_llama", "deepspeed"])


def _enter(function, log, arguments, environment):
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(ROOT)
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", **environment)
    function(*arguments)


def start(function, log, *arguments, **environment):
    """Run `function(*arguments)` in a process of its own, its output going to the file `log`."""
    Path(log).touch()
    process = CONTEXT.Process(target=_enter, args=(function, str(log), arguments, environment))
    process.start()
    return process


def start_ranks(count, function, log, *arguments, machines=1):
    """The same in `count` processes of one job, as torchrun would set them up on `machines`; they share the log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    inside = count // machines
    job = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": inside, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(
            function,
            log,
            *arguments,
            **{k: str(v) for k, v in {**job, "RANK": rank, "LOCAL_RANK": rank % inside}.items()},
        )
        for rank in range(count)
    ]


def run_train(out, *flags, processes=1, sharded=False):
    """Run train.py to its end, with FSDP2 where `sharded`; returns what its processes said."""
    log = Path(f"{out}.log")
    function, arguments = (train_sharded, [f"{out}-gathered"]) if sharded else (train, [])
    arguments += [*flags, "--output_dir", out]
    ranks = start_ranks(processes, function, log, *arguments) if processes > 1 else [start(function, log, *arguments)]
    for rank in ranks:
        rank.join(600)
    assert {rank.exitcode for rank in ranks} == {0}, log.read_text()
    return log.read_text()


def train(*flags):
    import torch

    import train
    from alpaca.common import run_main

    torch.set_num_threads(1)
    sys.argv = ["train.py", *map(str, flags)]
    run_main(train.main)


def train_until_full(limit, *flags):
    """train.py on a disk that takes one more checkpoint, and from then on no file above `limit` bytes."""
    import resource

    from alpaca.training import trainer as script

    def finish_and_fill(*arguments, **named):
        finish_checkpoint(*arguments, **named)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    finish_checkpoint, script.finish_checkpoint = script.finish_checkpoint, finish_and_fill
    train(*flags)


def train_sharded(report, *flags):
    """train.py under FSDP2; what each rank gathers for a save is written to `report`-RANK, a JSON line a call."""
    import json
    import runpy

    import torch
    from torch.distributed.checkpoint import state_dict
    from torch.distributed.tensor import DTensor

    def watch(name):
        plain = getattr(state_dict, name)

        def watched(*arguments, options=None, **named):
            gathered = plain(*arguments, options=options, **named)
            states = gathered.get("state", {}).values() if "optimizer" in name else [gathered]
            tensors = [tensor for state in states for tensor in state.values() if torch.is_tensor(tensor)]
            line = {
                "call": name,
                "options": {option: getattr(options, option) for option in ("full_state_dict", "cpu_offload")},
                "elements": sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in tensors),
                "on_cpu": all(tensor.device.type == "cpu" and not isinstance(tensor, DTensor) for tensor in tensors),
            }
            with open(f"{report}-{os.environ['RANK']}", "a") as file:
                file.write(json.dumps(line) + "\n")
            return gathered

        setattr(state_dict, name, watched)

    watch("get_model_state_dict")
    watch("get_optimizer_state_dict")
    torch.set_num_threads(1)
    sys.argv = ["fsdp_on_cpu.py", *map(str, flags)]
    runpy.run_path(str(ROOT / "tests" / "training" / "fsdp_on_cpu.py"), run_name="__main__")


def train_and_be_stopped(step, *flags):
    """train.py that gets SIGTERM while it computes the step after `step` - 1."""
    import signal

    from alpaca.training.callbacks import StepWatch

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            while not self.preemption.asked:
                time.sleep(0.01)

    StepWatch.on_step_begin = on_step_begin
    train(*flags)


def train_at_home(home, *flags):
    """train.py in a working directory of each rank's own, as on machines that share no disk."""
    directory = Path(home, os.environ["RANK"])
    directory.mkdir()
    os.chdir(directory)
    train(*flags)


def train_with_little_memory(*flags):
    """train.py on a machine without the memory for what its first step asks for."""
    import resource

    import torch

    from alpaca.training.callbacks import StepWatch

    def on_step_begin(self, args, state, control, **kwargs):
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**28
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.empty(2**29)

    StepWatch.on_step_begin = on_step_begin
    train(*flags)


def train_without_unix(*flags):
    """train.py on a system without fcntl, fchmod, directories that can be synced, and wake-up pipes."""
    sys.modules["fcntl"] = None
    del os.fchmod, os.pwrite
    from alpaca import common
    from alpaca.training import callbacks, checkpoints

    callbacks.WINDOWS = common.WINDOWS = True
    checkpoints.sync_directory = common.sync_directory
    train(*flags)


def train_on_a_small_disk(free, *flags):
    """train.py on a disk that says it has `free` bytes left."""
    import shutil

    usage = shutil.disk_usage("/")._replace(free=free)
    shutil.disk_usage = lambda path: usage
    train(*flags)
