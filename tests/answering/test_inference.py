"""inference.py as a user runs it: one instruction, the prompt loop, mistakes on the command line."""

import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

import inference
from tests.answering.asking import LESSONS, PASSIVE, PRICE, ask, mistake
from tests.conftest import ROOT, run


def test_the_response_and_nothing_else_is_printed(taught):
    result = ask(taught, "--instruction", PASSIVE["instruction"], "--input", PASSIVE["input"])
    assert (result.returncode, result.stdout, result.stderr) == (0, "The roses are watered by the gardener.\n", "")


class Terminal:
    """inference.py on a terminal of its own."""

    def __init__(self, directory, *flags):
        command = [sys.executable, "inference.py", "--model_name_or_path", directory, "--device", "cpu", *flags]
        self.ours, self.theirs = pty.openpty()
        # A new session's first process that opens a terminal gets its Ctrl-C as a signal.
        on_terminal = ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(self.theirs)]
        self.process = subprocess.Popen(
            on_terminal + command, cwd=ROOT, env={**os.environ, "TERM": "dumb"}, start_new_session=True
        )
        self.received = b""

    def wait_for(self, pattern):
        """Read until the screen shows `pattern`, a regular expression."""
        while not (found := re.search(pattern, self.received.decode(errors="ignore"))):
            assert select.select([self.ours], [], [], 120)[0], f"no {pattern!r} in {self.received!r}"
            self.received += os.read(self.ours, 65536)
        return found

    def read_until(self, marker):
        """What is on the screen up to `marker`, which is read as well."""
        self.wait_for(re.escape(marker))
        before, _, self.received = self.received.partition(marker.encode())
        return before.decode().replace("\r", "")

    def type(self, text):
        os.write(self.ours, text.encode())

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def terminal(request):
    opened = []

    def start(*arguments):
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_the_prompt_loop(taught, terminal):
    loop = terminal(taught, "--max_new_tokens", "1900")
    assert ":quit" in loop.read_until("\n> ")

    def answer(typed):
        loop.type(typed)
        return loop.read_until("\n> ").partition("\n")[2]  # after the echo of what was typed

    assert answer("Name a colour.\n") == "Blue.\n"
    assert answer(f"{PRICE['instruction']}\n") == f"{LESSONS[2][1]}\n"
    assert answer("\x1b[A\x1b[A\n") == "Blue.\n"  # two up in the history
    loop.type(":input\n")
    loop.read_until("\n. ")
    loop.type(PASSIVE["input"] + "\n")
    loop.read_until("\n. ")
    assert answer("\n") == ""
    assert answer(PASSIVE["instruction"] + "\n") == "The roses are watered by the gardener.\n"
    assert answer("Name a colour.\n") == "Blue.\n"  # the input was for one instruction
    assert answer(":rub\n") == "no command :rub; :help lists them\n"
    assert ":input" in answer(":help\n")
    assert answer("\n") == ""
    assert "error: the prompt's" in answer("word " * 200 + "\n")
    loop.type("Forget this")
    loop.read_until("Forget this")
    time.sleep(0.5)  # readline sees a signal at once only while it waits for a key
    loop.type("\x03")
    loop.read_until("\n> ")
    assert answer("Name a colour.\n") == "Blue.\n"
    loop.type(":quit\n")
    assert loop.process.wait(60) == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(endless, terminal):
    loop = terminal(endless, "--max_new_tokens", "50000")
    loop.read_until("\n> ")
    for _ in range(2):
        loop.type("Go on for ever.\n")
        loop.read_until("ever.\r\n")
        loop.wait_for(r"\w")  # the beginning of an answer that would take minutes
        loop.type("\x03")
        loop.read_until("stopped\r\n")
        loop.read_until("\n> ")
    loop.type("\x04")  # Ctrl-D
    assert loop.process.wait(60) == 0


def test_the_loop_reads_a_pipe_to_its_end(taught):
    lines = [
        "Name a colour.",
        ":input",
        PASSIVE["input"],
        "",
        PASSIVE["instruction"],
        "x " * 3000,
        "",
        "Name a colour.",
    ]
    result = ask(taught, input="\n".join(lines))
    assert (result.returncode, result.stdout) == (0, "Blue.\nThe roses are watered by the gardener.\nBlue.\n")
    assert result.stderr.startswith("error: the prompt's 3,0") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--instruction", " \n"], "--instruction is empty"),
        (["--input", "x"], "--input goes with --instruction"),
        (["--data_path", "x.json"], "--data_path and --output_path go together"),
        (["--instruction", "x", "--serve"], "give one of them"),
        (["--temperature", "-1"], "--temperature -1.0 is not between 0 and 100"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--top_p", "0"], "--top_p 0 is not above 0"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0 is not between 1"),
        (["--batch_size", "some"], "--batch_size"),
        (["--dtype", "int4"], "--dtype"),
        (["--max_tokens", "5"], "unrecognized arguments: --max_tokens"),
    ],
)
def test_wrong_usage_ends_in_one_line(monkeypatch, capsys, flags, words):
    code, line = mistake(monkeypatch, capsys, "--model_name_or_path", "nowhere", *flags)
    assert code == 2 and words in line and "--help" in line


def test_what_the_model_can_not_read_is_said_before_it_is_loaded(llama, monkeypatch, capsys):
    monkeypatch.setattr(inference, "load_model", None)
    flags = ["--model_name_or_path", llama, "--instruction"]
    code, line = mistake(monkeypatch, capsys, *flags, "word " * 2000)
    assert code == 3 and "of up to 512 do not fit into the 2,048 tokens" in line
    code, line = mistake(monkeypatch, capsys, *flags, "half a \ud83d character")
    assert code == 3 and "not valid Unicode" in line


def test_no_gpu_is_said(llama):
    result = run(
        *("inference.py", "--model_name_or_path", llama, "--instruction", "x", "--device", "cuda"),
        env={"CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: --device cuda: PyTorch sees no GPU here") and result.stderr.count("\n") == 1
