"""train.py in processes that are forked from one that has done the imports: real processes, ready in a second."""

import multiprocessing
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = str(ROOT)  # the fork server's, which starts with the first process
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train", "transformers.models.llama.modeling_llama", "deepspeed"])


def _enter(function, log, arguments):
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    function(*arguments)


def start(function, log, *arguments):
    """Run `function(*arguments)` in a process of its own, its output going to the file `log`."""
    Path(log).touch()
    process = CONTEXT.Process(target=_enter, args=(function, str(log), arguments))
    process.start()
    return process


def train(*flags):
    import torch

    import train
    from utils import run_main

    torch.set_num_threads(1)
    sys.argv = ["train.py", *map(str, flags)]
    run_main(train.train)
