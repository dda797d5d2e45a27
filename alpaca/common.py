"""What every room needs: errors and exit codes, command lines, and files that appear whole or not at all."""

import argparse
import contextlib
import difflib
import enum
import errno
import functools
import inspect
import io
import json
import math
import os
import re
import sys
import tempfile
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent  # the scripts, and the files that lie beside them


class ExitCode(enum.IntEnum):
    BUG = 1  # a bug of ours: Python's own traceback and exit code
    USAGE = 2  # wrong usage or configuration
    DATA = 3  # bad data
    API = 4  # the API refuses: key, quota, unknown model
    BUDGET = 5  # retries or budget used up, progress saved
    LOCKED = 6  # output directory in use
    INTEGRITY = 7  # integrity check failed
    DISK = 8  # disk full or unwritable
    PREEMPTED = 75  # checkpoint saved
    INTERRUPTED = 130


class ExpectedError(Exception):
    """A failure that is not a bug. The message says what is wrong, where, and what to do next."""

    def __init__(self, message: str, exit_code: ExitCode):
        super().__init__(message, exit_code)  # both, so that the error can be pickled and sent to other ranks
        self.exit_code = exit_code

    def __str__(self) -> str:
        return self.args[0]


def notice(message: str) -> None:
    """Say on standard error, once for all processes of a job, what the user should know but need not act on."""
    if os.environ.get("RANK", "0") == "0":
        print(f"notice: {message}", file=sys.stderr, flush=True)


def disk_problem(error: BaseException | None) -> str | None:
    """What the system said when a disk was full or unwritable; None for every other error.

    Libraries written in Rust, and torch's sharded saves, hand the system's error number on as text. torch.save hands
    nothing on: whatever the reason, it ends in this one message.
    """
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if found := re.search(r"(?:\(os error |\[Errno )(\d+)", str(error)):
            number = int(found.group(1))
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            return os.strerror(number)
        if "iostream error" in str(error):
            return "a file can't be written in full"
        error = error.__context__
    return None


def run_main(main: Callable[[], Any]) -> None:
    """Run a script's `main`; an expected failure ends in one `error: …` line on standard error and its exit code.

    Under torchrun only local rank 0 prints, so that one mistake is one line.
    """
    try:
        main()
        return
    except ExpectedError as error:
        message, exit_code = str(error), error.exit_code
    except KeyboardInterrupt:
        message, exit_code = "interrupted", ExitCode.INTERRUPTED
    except OSError as error:
        if not (problem := disk_problem(error)):
            raise
        message = f"{problem}: {error.filename or 'output'}; free some space or choose another directory"
        exit_code = ExitCode.DISK
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(exit_code)


def run_commands(commands: dict[str, Callable[..., Any]], name: str) -> None:
    """Call the one of `commands` that the command line names, with the rest of it as the function's parameters.

    `--flag value`, `--flag=value`, a bare `--flag` or `--noflag` for True or False, and values without flags in the
    parameters' order. A value has the type of the parameter's annotation (bool, int or float; else it stays a text),
    and the help is the docstring. Raises ExpectedError (USAGE) for anything unknown or missing, before the call.
    """
    wanted, *words = sys.argv[1:] or ["--help"]
    if wanted in ("-h", "--help"):
        module = inspect.getmodule(next(iter(commands.values())))
        print(f"{module.__doc__}\nThe flags of a command: {name} COMMAND --help\n")
        for command, function in commands.items():
            print(f"  {command:<37}{inspect.getdoc(function).splitlines()[0]}")
        return
    function = commands.get(wanted.replace("-", "_"))
    if not function:
        raise ExpectedError(f"unknown command {wanted}; {_nearest(wanted, commands)}", ExitCode.USAGE)
    parser = _parser_of(function, f"{name} {function.__name__}")
    if {"-h", "--help"} & {*words}:
        parser.print_help()
        return
    parameters, types = inspect.signature(function).parameters, typing.get_type_hints(function)
    for index, word in enumerate(words):
        if re.match("--?[A-Za-z]", word):  # -output-dir=x is --output_dir=x, as it was in 2023
            flag, equals, value = word.lstrip("-").partition("=")
            flag = flag.replace("-", "_")
            negated = re.sub("^no_?", "", flag)
            if flag not in parameters and types.get(negated) is bool and not equals:
                flag, equals, value = negated, "=", "False"
            if flag not in parameters:
                raise ExpectedError(f"unknown flag --{flag}; {_nearest(flag, parameters, '--')}", ExitCode.USAGE)
            words[index] = f"--{flag}{equals}{value}"
    given, others = parser.parse_known_args(words)
    arguments = vars(given)
    free = [parameter for parameter in parameters if parameter not in arguments]
    stray = [text for text in others if text in commands] + others[len(free) :]
    if stray:
        raise ExpectedError(f"unexpected argument {stray[0]}; one command at a time, see --help", ExitCode.USAGE)
    arguments |= {flag: _value(flag, types[flag], text) for flag, text in zip(free, others, strict=False)}
    needed = [flag for flag, p in parameters.items() if p.default is p.empty and flag not in arguments]
    if needed:
        raise ExpectedError(f"{function.__name__} needs --{' and --'.join(needed)}; see --help", ExitCode.USAGE)
    function(**arguments)


def _parser_of(function: Callable[..., Any], name: str) -> argparse.ArgumentParser:
    """A parser for the function's parameters, all optional, that gives what was given and nothing else."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> typing.NoReturn:
            raise ExpectedError(f"{message.removeprefix('argument ')}; see --help", ExitCode.USAGE)

    class Layout(argparse.RawDescriptionHelpFormatter):
        def _format_action_invocation(self, action: argparse.Action) -> str:
            return action.option_strings[0]  # without "[VALUE]", which says nothing

    layout = functools.partial(Layout, max_help_position=36, width=120)
    summary, descriptions = read_docstring(function)
    usage = f"{name} [--flag value …]".replace("%", "%%")
    parser = Parser(usage=usage, description=summary, formatter_class=layout, add_help=False, allow_abbrev=False)
    types = typing.get_type_hints(function)
    for flag, parameter in inspect.signature(function).parameters.items():
        text = descriptions[flag].replace("%", "%%")
        if parameter.default not in (parameter.empty, None):
            text += f" [{parameter.default}]"
        kind = types[flag]
        parser.add_argument(
            f"--{flag}",
            help=text,
            metavar="",
            default=argparse.SUPPRESS,
            type=lambda value, flag=flag, kind=kind: _value(flag, kind, value),
            **({"nargs": "?", "const": True} if kind is bool else {}),
        )
    return parser


def read_docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """→ the docstring without its "Args:", and of those parameter → description in one line."""
    summary, _, described = inspect.getdoc(function).partition("\nArgs:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", described, re.MULTILINE)
    return summary.strip(), {name: " ".join(text.split()) for name, text in found}


def _value(flag: str, kind: Any, text: str) -> Any:
    """A flag's text → its value. Raises ExpectedError (USAGE) where it is none of that kind."""
    kinds = {*typing.get_args(kind)} or {kind}
    if text == "None" and type(None) in kinds:
        return None
    try:
        if bool in kinds:  # the words that train.py's flags take
            number = ("false", "no", "f", "n", "0", "true", "yes", "t", "y", "1").index(text.lower())
            return number >= 5
        if int in kinds:
            return int(text)
        if float in kinds and not math.isfinite(float(text)):
            raise ValueError
        return float(text) if float in kinds else text
    except ValueError:
        wanted = "True or False" if bool in kinds else "a whole number" if int in kinds else "a number"
        raise ExpectedError(f"--{flag} {text}: give {wanted}", ExitCode.USAGE)


def _nearest(wrong: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(wrong, known, 1)
    return f"did you mean {prefix}{close[0]}?" if close else "see --help"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[io.IOBase]:
    """Open a file that replaces `path` only when the block ends without an exception: whole or not at all.

    Written beside `path` (same file system), synced, renamed, and the rename synced.
    """
    path = os.path.realpath(path)
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{os.path.basename(path)}.", suffix=".tmp")
    try:
        with open(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            # mkstemp makes files private; a new file gets the usual mode, a replaced one keeps its own.
            os.fchmod(handle, os.stat(path).st_mode & 0o777 if os.path.exists(path) else 0o666 & ~_umask())
            yield file
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_directory(directory)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_directory(directory: str | os.PathLike) -> None:
    """Make renames and new names in a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def jdump(obj: Any, f: Any, mode: str = "w", indent: int | None = 4, default: Callable = str) -> None:
    """Write `obj` as JSON (a str as it is) to a path, whole or not at all, or to an open file."""
    text = obj if isinstance(obj, str) else json.dumps(obj, indent=indent, default=default)
    if hasattr(f, "write"):
        f.write(text)
    elif mode == "w":
        with atomic_write(f) as file:
            file.write(text)
    else:
        with open(f, mode, encoding="utf-8") as file:
            file.write(text)


def jload(f: Any, mode: str = "r") -> Any:
    """Read JSON from a path or an open file."""
    if hasattr(f, "read"):
        return json.load(f)
    with open(f, mode, encoding=None if "b" in mode else "utf-8") as file:
        return json.load(file)
