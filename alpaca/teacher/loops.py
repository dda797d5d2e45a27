"""Running a coroutine wherever the caller is: in a script, in a thread, or in a notebook, which has a loop already."""

import asyncio
import concurrent.futures
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import Any


def run_anywhere(work: Coroutine, interrupt: Callable[[int], None] | None = None) -> Any:
    """Run `work` to its end and → its result. `interrupt(exit code)` is called for Ctrl-C and SIGTERM, in the loop of
    `work`, so that it can end in an orderly way; in a thread it is not: signals are the main thread's.
    """
    loops: list[asyncio.AbstractEventLoop] = []

    async def supervised() -> Any:
        loop = asyncio.get_running_loop()
        loops.append(loop)
        if interrupt and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, interrupt, 128 + number)
        return await work

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(supervised())
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        future = executor.submit(asyncio.run, supervised())
        while True:
            try:
                return future.result()
            except KeyboardInterrupt:  # a notebook's "interrupt"
                if not interrupt or not loops:
                    raise
                loops[0].call_soon_threadsafe(interrupt, 128 + signal.SIGINT)
