"""The page that `inference.py --serve` opens. It needs gradio, which nothing else in this project does."""

import asyncio
import contextlib
import dataclasses
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import gradio

from alpaca.common import ExitCode, ExpectedError, notice

NOTICE = """# Alpaca

**A research artifact.** This model makes mistakes and states them with confidence; it can repeat stereotypes and write
harmful text. Nothing it says is advice. Everything stays on this machine."""
EXAMPLES = [
    ("Explain in two sentences why the sky is blue.", ""),
    ("Write a haiku about rain on a tin roof.", ""),
    ("Turn the sentence into the passive voice.", "The gardener waters the roses every morning."),
]
WAITING, ANSWERING, DONE, STOPPED = "Waiting for the model …", "Answering …", "Done.", "Stopped."


# (example, sampling, stopped) → the answer so far, again after each token; setting `stopped` ends it
Ask = Callable[[dict[str, str], Any, threading.Event], Iterator[str]]


def check_port(port: int) -> None:
    """Raises ExpectedError where the port can't be had: better before a model is loaded than after."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    except OSError as error:
        raise ExpectedError(f"--port {port}: {error.strerror}; choose another port", ExitCode.USAGE)


@dataclasses.dataclass
class Question:
    """What a page asked last, and how far its answer is."""

    status: str = WAITING
    text: str = ""
    stopped: threading.Event = dataclasses.field(default_factory=threading.Event)

    def follow(self, ask: Ask, example: dict[str, str], sampling: Any) -> None:
        """Wait for the whole answer, in a thread of its own."""
        try:
            for text in ask(example, sampling, self.stopped):
                if self.stopped.is_set():
                    return
                self.text, self.status = text, ANSWERING
            self.status = DONE
        except ExpectedError as error:
            self.status = f"Not answered: {error}."
        except BaseException as error:
            self.status = f"Not answered: {type(error).__name__}; the terminal says more."
            raise


def build(ask: Ask, sampling: Any, limit: int) -> gradio.Blocks:
    """The page. `sampling` is where its controls start, `limit` the longest answer in tokens.

    All that a page shows comes through one stream, which is open as long as the page is. With a stream for each
    question, cancelled on Stop, Gradio loses questions: it drops one asked before the server has ended the last, and
    closes the stream of one asked at the moment of that end.
    """
    asked: dict[str, Question] = {}  # by page

    def start(instruction, text_input, max_new_tokens, temperature, top_p, seed, request: gradio.Request):
        stop(request)
        example = {"instruction": (instruction or "").strip(), "input": (text_input or "").strip()}
        wanted = dataclasses.replace(
            sampling, max_new_tokens=int(max_new_tokens), temperature=temperature, top_p=top_p, seed=int(seed or 0)
        )
        asked[request.session_hash] = question = Question()
        threading.Thread(target=question.follow, args=(ask, example, wanted), daemon=True).start()

    def stop(request: gradio.Request):
        question = asked.get(request.session_hash)
        if question and question.status in (WAITING, ANSWERING):
            question.stopped.set()

    async def show(request: gradio.Request):
        shown = None
        while True:
            if question := asked.get(request.session_hash):
                now = question.text, STOPPED if question.stopped.is_set() else question.status
                if now != shown:
                    shown = now
                    yield now
            await asyncio.sleep(0.05)

    def leave(request: gradio.Request):
        stop(request)
        asked.pop(request.session_hash, None)

    with gradio.Blocks(title="Alpaca", analytics_enabled=False) as page:
        gradio.Markdown(NOTICE)
        instruction = gradio.Textbox(
            label="Instruction (Enter to answer)", lines=1, max_lines=8, autofocus=True, elem_id="instruction"
        )
        text_input = gradio.Textbox(
            label="Input: the text it is about (may stay empty)", lines=2, max_lines=12, elem_id="input"
        )
        with gradio.Row():
            ask_button = gradio.Button("Answer", variant="primary", elem_id="answer")
            stop_button = gradio.Button("Stop", elem_id="stop")
        status = gradio.Markdown("", elem_id="status")
        response = gradio.Textbox(
            label="Response", lines=6, max_lines=30, interactive=False, buttons=["copy"], elem_id="response"
        )
        with gradio.Accordion("Sampling", open=False, elem_id="sampling"):
            length = min(sampling.max_new_tokens, limit)
            controls = [
                gradio.Slider(1, limit, length, step=1, label="Longest answer (tokens)", elem_id="max_new_tokens"),
                gradio.Slider(
                    0,
                    max(2, sampling.temperature),
                    sampling.temperature,
                    step=0.05,
                    label="Temperature (0: always the likeliest token)",
                    elem_id="temperature",
                ),
                gradio.Slider(min(0.05, sampling.top_p), 1, sampling.top_p, step=0.05, label="Top p"),
                gradio.Number(sampling.seed, precision=0, minimum=0, maximum=2**53 - 1, label="Seed"),
            ]
        gradio.Markdown("Examples")
        with gradio.Row():
            for number, values in enumerate(EXAMPLES):
                example = gradio.Button(values[0], size="sm", elem_id=f"example-{number}")
                example.click(lambda values=values: values, None, [instruction, text_input], api_visibility="private")
        at_once = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        asking = [ask_button.click, instruction.submit]
        gradio.on(asking, None, None, [response, status], js=f"() => ['', '{WAITING}']", api_visibility="private")
        gradio.on(asking, start, [instruction, text_input, *controls], **at_once)
        stop_button.click(stop, **at_once)
        page.load(show, None, [response, status], show_progress="hidden", api_visibility="private")
        page.unload(leave)
    return page.queue(default_concurrency_limit=None)


def serve(ask: Ask, sampling: Any, limit: int, port: int) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C, which ends the process."""
    page = build(ask, sampling, limit)
    page.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )
    notice(f"the page is at {page.local_url}; Ctrl-C ends it")
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    # An orderly shutdown waits for open pages, and Python's aborts when a server thread is in native code then.
    os._exit(0)
