"""Command lines: what reaches the function, and that nothing runs before everything is known."""

import os
import subprocess
import sys

import pytest

from alpaca.common import ExitCode, ExpectedError, keep_inputs, read_docstring, run_commands
from tests.conftest import ROOT

CALLS = []


def build(
    source: str,
    target: str | None = None,
    rounds: int = 3,
    limit: int | None = None,
    rate: float = 0.5,
    fast: bool = False,
    check: bool = True,
    words: tuple[str, ...] = ("draw", "go to"),
) -> None:
    """Build a target.

    Reads the source first.

    Args:
        source: what to read, 100 % of it.
        target: what to write; a description that is too long for
            one line.
        rounds: how often.
        limit: at most.
        rate: per second.
        fast: True to hurry.
        check: False not to.
        words: which.
    """
    CALLS.append({name: value for name, value in locals().items()})


def clean() -> None:
    """Remove what was built."""
    CALLS.append("clean")


DEFAULTS = {"source": "s", "target": None, "rounds": 3, "limit": None, "rate": 0.5, "fast": False, "check": True}
DEFAULTS |= {"words": ("draw", "go to")}


def command(monkeypatch, *words):
    CALLS.clear()
    monkeypatch.setattr(sys, "argv", ["script", *words])
    run_commands({"build": build, "clean": clean}, name="script")
    return CALLS


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("s", {}),
        ("--source s", {}),
        ("-source=s", {}),
        ("s t", {"target": "t"}),
        ("--target t s 5", {"target": "t", "rounds": 5}),  # without flags: in order, into what is left
        ("s --rounds 4 --rate=2", {"rounds": 4, "rate": 2.0}),
        ("s --rounds -4 --rate -.5", {"rounds": -4, "rate": -0.5}),
        ("s --limit None --target None", {}),
        ("s --limit 7 --rate 1e-3", {"limit": 7, "rate": 0.001}),
        ("s --target=", {"target": ""}),
        ("s --target a=b", {"target": "a=b"}),
        ("s --words a,b", {"words": "a,b"}),
        ("s --words ()", {"words": "()"}),
    ],
)
def test_values_reach_the_function(monkeypatch, words, given):
    assert command(monkeypatch, "build", *words.split()) == [DEFAULTS | given]


@pytest.mark.parametrize(
    "text", ["4", "2023", "007", "1e3", "1_000", "1.10", "True", "None", "[1]", "'x'", "a b", "-4"]
)
def test_texts_stay_texts_whatever_they_look_like(monkeypatch, text):
    assert command(monkeypatch, "build", "--source", text)[0]["source"] == text
    assert command(monkeypatch, "build", f"--source={text}")[0]["source"] == text
    assert command(monkeypatch, "build", text)[0]["source"] == text


@pytest.mark.parametrize("form", ["--fast={}", "--fast {}", "-fast={}", "--fast {} --rounds 3"])
@pytest.mark.parametrize("text", ["True", "true", "TRUE", "yes", "1", "False", "false", "FALSE", "no", "0"])
def test_booleans_are_booleans(monkeypatch, form, text):
    (call,) = command(monkeypatch, "build", "s", *form.format(text).split())
    assert call == DEFAULTS | {"fast": text.lower() in ("true", "yes", "1")}


def test_booleans_without_a_value(monkeypatch):
    assert command(monkeypatch, "build", "s", "--fast") == [DEFAULTS | {"fast": True}]
    assert command(monkeypatch, "build", "--fast", "--source", "s") == [DEFAULTS | {"fast": True}]
    for flag in ("--nocheck", "--no_check", "--no-check", "-nocheck"):
        assert command(monkeypatch, "build", "s", flag) == [DEFAULTS | {"check": False}]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("biuld s", "unknown command biuld; did you mean build?"),
        ("zzz", "unknown command zzz; see --help"),
        ("build s --ruonds 3", "unknown flag --ruonds; did you mean --rounds?"),
        ("build s -ruonds=3", "unknown flag --ruonds; did you mean --rounds?"),
        ("build s --round-s=3", "unknown flag --round_s; did you mean --rounds?"),
        ("build s --nochekc", "unknown flag --nochekc; did you mean --check?"),
        ("build s --norounds", "unknown flag --norounds; did you mean --rounds?"),
        ("build s --nocheck=True", "unknown flag --nocheck; did you mean --check?"),
        ("build s --zzz", "unknown flag --zzz; see --help"),
        ("build s -r 3", "unknown flag --r; see --help"),
        ("build s --", "unknown flag --; see --help"),
        ("build s -", "unknown flag --; see --help"),
        ("build --fast", "build needs --source; see --help"),
        ("build s t 1 2 3 yes no w x", "unexpected argument x; one command at a time, see --help"),
        ("build s clean", "unexpected argument clean; one command at a time, see --help"),
        ("clean clean", "unexpected argument clean; one command at a time, see --help"),
        ("clean - build s", "unknown flag --; see --help"),
        ("build s --rounds", "--rounds needs a value; see --help"),
        ("build s --target --fast", "--target needs a value; see --help"),
        ("build s --rounds 3.5", "--rounds 3.5: give a whole number"),
        ("build s --rounds None", "--rounds None: give a whole number"),
        ("build s --limit many", "--limit many: give a whole number"),
        ("build s --rate nan", "--rate nan: give a number"),
        ("build s --rate inf", "--rate inf: give a number"),
        ("build s --fast perhaps", "--fast perhaps: give True or False"),
        ("build s --fast 2", "--fast 2: give True or False"),
        ("build s --fast=", "--fast : give True or False"),
        ("build s --fast None", "--fast None: give True or False"),
    ],
)
def test_nothing_runs_before_everything_is_known(monkeypatch, words, problem):
    with pytest.raises(ExpectedError) as error:
        command(monkeypatch, *words.split())
    assert str(error.value) == problem and error.value.exit_code == ExitCode.USAGE and not CALLS


def test_a_misspelt_flag_whose_value_has_a_space_is_no_value(monkeypatch):
    with pytest.raises(ExpectedError, match="unknown flag --wrods; did you mean --words"):
        command(monkeypatch, "build", "s", "--wrods=go to")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_of_the_script(monkeypatch, capsys, words):
    assert command(monkeypatch, *words) == []
    out = capsys.readouterr().out
    assert out.startswith(__doc__) and "build\n      Build a target.\n" in out and "clean" in out


@pytest.mark.parametrize("words", [["--help"], ["s", "--help"], ["--", "--help"], ["--zzz", "-h"]])
def test_help_of_a_command(monkeypatch, capsys, words):
    assert command(monkeypatch, "build", *words) == []
    out = capsys.readouterr().out.splitlines()
    assert out[:5] == ["usage: script build [--flag value …]", "", "Build a target.", "", "Reads the source first."]
    assert out[6:9] == [
        "  --source  what to read, 100 % of it.",
        "  --target  what to write; a description that is too long for one line.",
        "  --rounds  how often. [3]",
    ]
    assert out[-1] == "  --words   which. [draw, go to]" and len(out) == 6 + 8


def test_help_of_a_command_without_flags(monkeypatch, capsys):
    assert command(monkeypatch, "clean", "--help") == []
    assert "Remove what was built." in capsys.readouterr().out


def test_every_parameter_must_be_described():
    def undescribed(a: int = 1) -> None:
        """Do it.

        Args:
            b: another.
        """

    with pytest.raises(KeyError):
        read_docstring(undescribed)


@pytest.mark.parametrize(
    ("output", "how"),
    [
        ("base", "is"),
        ("base/", "is"),
        ("x/../base", "is"),
        ("link", "is"),
        ("base/out", "lies in"),
        ("link/new/out", "lies in"),
        (".", "holds"),
        ("data.json", "is"),
        ("hard.json", "is"),
        ("out", None),
        ("base2", None),
        (None, None),
    ],
)
def test_no_output_touches_an_input(output, how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for directory in ("base", "x"):
        os.mkdir(directory)
    (tmp_path / "link").symlink_to("base")
    (tmp_path / "data.json").write_text("[]")
    os.link("data.json", "hard.json")
    inputs = {"model": "base", "data_path": "data.json", "compare": None, "hub": "owner/name"}
    if how is None:
        return keep_inputs({"output_dir": output}, inputs)
    with pytest.raises(ExpectedError, match=rf"^--output_dir {output} {how} --\w+ .*, which is read; choose") as raised:
        keep_inputs({"output_dir": output}, inputs)
    assert raised.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("script", ["train", "generate_instruction", "weight_diff", "inference", "eval", "data_report"])
def test_a_reader_that_has_seen_enough_is_no_error(script):
    """`python train.py --help | head -1`"""
    with subprocess.Popen(
        [sys.executable, f"{script}.py", "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode in (0, 141)  # argparse takes no notice; 141 is how a shell reports SIGPIPE
