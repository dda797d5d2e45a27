"""What the processes of one job do together."""

import atexit
import contextlib
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import psutil
import torch.distributed as dist

from alpaca.common import ExitCode, ExpectedError, run_main


def once_for_all_ranks(build: Callable[[], Any]) -> Any:
    """Call `build` on rank 0 alone and give every rank its result, or the ExpectedError that it raised."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return build()
    outcome = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [build()]
        except ExpectedError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], ExpectedError):
        raise outcome[0]
    return outcome[0]


def gather_from_all_ranks(value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run_rank(main: Callable[[], Any]) -> None:
    """`run_main`, and in a process of a distributed job the end without the interpreter's own tidying up.

    A thread of gloo frees the tensors of a collective some time after it is done, and needs Python's lock for it. A
    thread that asks for that lock while the interpreter ends is made to leave (pthread_exit), in C++ that allows no
    such thing: "terminate called without an active exception", SIGABRT, and the exit code is lost. The process group is
    not closed before, either: that joins these threads where nothing else holds the group, and holds the lock
    meanwhile, so that both wait for ever (torch 2.13).
    """
    if "WORLD_SIZE" not in os.environ:
        return run_main(main)
    exit_code = ExitCode.BUG
    try:
        run_main(main)
        exit_code = 0
    except SystemExit as leaving:
        exit_code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or a reader that is gone
            stream.flush()
    os._exit(exit_code)


def check_shared(directory: str) -> None:
    """Raise ExpectedError (exit 2) on all ranks when some do not see what rank 0 writes: a directory of one machine's
    own, whose checkpoints would be in parts on several."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    sign = once_for_all_ranks(lambda: tempfile.mkstemp(dir=directory, prefix=".shared-")[1])
    sign = os.path.join(directory, os.path.basename(sign))
    deadline = time.monotonic() + 5  # a network's file system may take its time
    while not (seen := os.path.exists(sign)) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = [rank for rank, sees in enumerate(gather_from_all_ranks(seen)) if not sees]
    if dist.get_rank() == 0:
        os.unlink(sign)
    if blind:
        raise ExpectedError(
            f"--output_dir {directory} is not one directory for all processes: what rank 0 writes there, rank "
            f"{', '.join(map(str, blind))} can't see; give one that all machines share",
            ExitCode.USAGE,
        )


def processes_beside_this() -> list[int]:
    """The process ids of the job's other ranks on this machine."""
    here, this = socket.gethostname(), os.getpid()
    return [pid for host, pid in gather_from_all_ranks((here, this)) if host == here and pid != this]


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
