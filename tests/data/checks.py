"""What the checks of `alpaca_checks.jsonl` and `eval_tasks.jsonl` may call, and how one is decided.

A check is a Python expression over `output`, `instruction` and `input` that is true of a right answer. It is evaluated
as it stands, and the `run_…` functions start programs: so only for the two files of this project, never for a file from
somewhere else. Of a model's answers, which may hold anything, only checks that start none may be decided
(`starts_programs`).
"""

import collections
import csv
import datetime
import fractions
import io
import itertools
import json
import math
import os
import re
import sqlite3
import statistics
import string
import subprocess
import sys
import tempfile
from pathlib import Path

CODE_SECONDS = 60  # for one program, compiling included; most take a tenth of a second
UNCHECKED = "unchecked"


# ---------------------------------------------------------------------------------------------------------------- texts


def words(text):
    return text.split()


def lines(text):
    return [line for line in text.splitlines() if line.strip()]


def paragraphs(text):
    return [part for part in re.split(r"\n\s*\n", text) if part.strip()]


def sentences(text):
    """ "One. (Two!) Three" → ["One", "(Two!", "Three"]: enough to count them."""
    return [part for part in re.split(r"(?<=[.!?])[\"')]*\s+", text.strip()) if part.strip()]


def items(text):
    """The texts of the items of numbered and bulleted lists."""
    return re.findall(r"^[ \t]*(?:\d+[.)]|[-*•])[ \t]+(\S.*)$", text, flags=re.MULTILINE)


def numbers(text):
    """ "1,200 at 3.5" → [1200.0, 3.5]"""
    found = re.findall(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?", text)
    return [float(number.replace(",", "")) for number in found]


def code(text, language):
    """The first fenced block of a language; a ValueError where there is none."""
    found = re.search(rf"^```{re.escape(language)}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    if not found:
        raise ValueError(f"no block of {language}")
    return found[1]


def table(text):
    """The first Markdown table, a dict a row."""
    found = [line.strip().strip("|") for line in text.splitlines() if line.strip().startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in found]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


# ------------------------------------------------------------------------------------------------------------- programs


def sql(setup, query):
    """The rows of the last statement of `query`, in an SQLite database that `setup` has made in memory."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(setup)
        rows = []
        for statement in filter(str.strip, query.split(";")):
            rows = connection.execute(statement).fetchall()
        return rows
    finally:
        connection.close()


def run_python(source, stdin=""):
    return _run({"main.py": source}, [sys.executable, "-I", "main.py"], stdin=stdin)


def run_js(source):
    return _run({"main.js": source}, ["node", "main.js"])


def run_c(source, stdin=""):
    compile_it = ["gcc", "-std=c17", "-Wall", "-Werror", "-o", "main", "main.c", "-lm"]
    return _run({"main.c": source}, compile_it, ["./main"], stdin=stdin)


def run_java(source):
    """The main method of the file's first class is run."""
    return _run({"Main.java": source}, ["java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "Main.java"])


def run_shell(source, files=None, stdin=""):
    """With `files`, name → text, in the directory that it starts in."""
    return _run({**(files or {}), "main.sh": source}, ["bash", "main.sh"], stdin=stdin)


def _run(files, *commands, stdin=""):
    """What the last command prints, without the white space around it. RuntimeError where one fails."""
    with tempfile.TemporaryDirectory() as directory:
        for name, text in files.items():
            path = Path(directory) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        environment = {"PATH": os.environ["PATH"], "HOME": directory, "LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8"}
        for command in commands:
            done = subprocess.run(
                command,
                cwd=directory,
                input=stdin,
                capture_output=True,
                text=True,
                timeout=CODE_SECONDS,
                env=environment,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(f"{command[0]}: exit {done.returncode}: {done.stderr[-500:]}")
    return done.stdout.strip()


# --------------------------------------------------------------------------------------------------------------- checks

TOOLS = {"run_python": sys.executable, "run_js": "node", "run_c": "gcc", "run_java": "java", "run_shell": "bash"}
MODULES = (collections, csv, datetime, fractions, io, itertools, json, math, re, statistics, string)
FUNCTIONS = (words, lines, paragraphs, sentences, items, numbers, code, table, sql)
FUNCTIONS += (run_python, run_js, run_c, run_java, run_shell)
NAMES = {value.__name__: value for value in (*MODULES, *FUNCTIONS)}


def tools_of(check):
    """The programs that a check starts, as names in TOOLS."""
    return {name for name in TOOLS if re.search(rf"\b{name}\(", check)}


def starts_programs(check):
    return bool(tools_of(check)) or "sql(" in check


def holds(check, row):
    """Whether the check is true of {"instruction", "input", "output"}; raises what it raises. Unchecked is true."""
    texts = {name: row[name] for name in ("instruction", "input", "output")}
    return check == UNCHECKED or bool(eval(check, {**NAMES, **texts}))
