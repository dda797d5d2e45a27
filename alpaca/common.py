"""What every room needs: errors and exit codes, command lines, and files that appear whole or not at all."""

import contextlib
import difflib
import enum
import errno
import inspect
import io
import json
import math
import os
import re
import sys
import tempfile
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent  # the scripts, and the files that lie beside them
WINDOWS = os.name == "nt"


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
    nothing on: whatever the reason, it ends in one of these two messages.
    """
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if found := re.search(r"(?:\(os error |\[Errno )(\d+)", str(error)):
            number = int(found.group(1))
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            return os.strerror(number)
        if "iostream error" in str(error) or "fail at inline_container" in str(error):
            return "a file can't be written in full"
        error = error.__context__
    return None


def memory_problem(error: BaseException) -> str | None:
    """Which memory was full, and what was asked of it; None for every other error."""
    text = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError" or "CUDA out of memory" in text:
        return "the GPU's memory is full: " + text.partition("See documentation")[0][:200].strip(" .")
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return "the machine's memory is full" + (f": {text[-120:]}" if text else "")
    return None


def run_main(main: Callable[[], Any]) -> None:
    """Run a script's `main`; an expected failure ends in one `error: …` line on standard error and its exit code.

    Under torchrun only local rank 0 prints, so that one mistake is one line. Where the reader of standard output has
    seen enough (`--help | head`), the script ends without a word, as SIGPIPE would end it.
    """
    try:
        try:
            main()
        except SystemExit:  # after argparse's help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again as it ends
        sys.exit(128 + 13)
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


# ------------------------------------------------------------------------------------------------------- command lines

_FLAG = re.compile(r"-(?![\d.])")  # what begins with "-" and is no number
_BOOLEANS = {"true": True, "yes": True, "t": True, "y": True, "1": True}  # the words that train.py's flags take
_BOOLEANS |= {"false": False, "no": False, "f": False, "n": False, "0": False}


def run_commands(commands: dict[str, Callable[..., Any]], name: str) -> None:
    """Call the one of `commands` that the command line names, with the rest of it as the function's parameters.

    `--flag value`, `--flag=value`, a bare `--flag` or `--noflag` for True or False, and values without flags in the
    parameters' order. A value has the type of the parameter's annotation (bool, int or float; else it stays a text),
    and the help is the docstring. Raises ExpectedError (USAGE) for anything unknown or missing, before the call.
    """
    wanted, *words = sys.argv[1:] or ["--help"]
    if wanted in ("-h", "--help"):
        print(f"{inspect.getmodule(next(iter(commands.values()))).__doc__}\nCommands ({name} COMMAND --help):\n")
        for command, function in commands.items():
            print(f"  {command}\n      {inspect.getdoc(function).splitlines()[0]}")
        return
    function = commands.get(wanted.replace("-", "_"))
    if not function:
        raise ExpectedError(f"unknown command {wanted}; {_nearest(wanted, commands)}", ExitCode.USAGE)
    if {"-h", "--help"} & {*words}:
        print(_help(function, name))
        return
    function(**arguments_of(function, words, commands))


def arguments_of(function: Callable[..., Any], words: list[str], commands: Iterable[str]) -> dict[str, Any]:
    """The words of a command line → the function's arguments. Raises ExpectedError (USAGE)."""
    parameters, types = inspect.signature(function).parameters, typing.get_type_hints(function)
    words, texts, unnamed = [*words], {}, []
    while words:
        word = words.pop(0)
        if not _FLAG.match(word):
            unnamed.append(word)
            continue
        flag, equals, text = word.lstrip("-").partition("=")
        flag = flag.replace("-", "_")  # --output-dir is --output_dir, as it was in 2023
        positive = re.sub("^no_?", "", flag)
        if flag not in parameters and types.get(positive) is bool and not equals:
            flag, equals, text = positive, "=", "False"
        if flag not in parameters:
            raise ExpectedError(f"unknown flag --{flag}; {_nearest(flag, parameters, '--')}", ExitCode.USAGE)
        if not equals:
            if words and not _FLAG.match(words[0]):
                text = words.pop(0)
            elif types[flag] is bool:
                text = "True"
            else:
                raise ExpectedError(f"--{flag} needs a value; see --help", ExitCode.USAGE)
        texts[flag] = text
    free = [flag for flag in parameters if flag not in texts]
    stray = [word for word in unnamed if word in commands] + unnamed[len(free) :]
    if stray:
        raise ExpectedError(f"unexpected argument {stray[0]}; one command at a time, see --help", ExitCode.USAGE)
    texts |= zip(free, unnamed, strict=False)
    missing = [flag for flag, p in parameters.items() if p.default is p.empty and flag not in texts]
    if missing:
        raise ExpectedError(f"{function.__name__} needs --{' and --'.join(missing)}; see --help", ExitCode.USAGE)
    return {flag: _value(flag, types[flag], text) for flag, text in texts.items()}


def _value(flag: str, kind: Any, text: str) -> Any:
    """A flag's text → its value. Raises ExpectedError (USAGE) where it is none of that kind."""
    kinds = typing.get_args(kind) or (kind,)
    if text == "None" and type(None) in kinds:
        return None
    try:
        if bool in kinds:
            return _BOOLEANS[text.lower()]
        if int in kinds:
            return int(text)
        if float in kinds and not math.isfinite(float(text)):
            raise ValueError
        return float(text) if float in kinds else text
    except (KeyError, ValueError):
        wanted = "True or False" if bool in kinds else "a whole number" if int in kinds else "a number"
        raise ExpectedError(f"--{flag} {text}: give {wanted}", ExitCode.USAGE)


def _nearest(wrong: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(wrong, known, 1)
    return f"did you mean {prefix}{close[0]}?" if close else "see --help"


def _help(function: Callable[..., Any], name: str) -> str:
    summary, descriptions = read_docstring(function)
    lines = [f"usage: {name} {function.__name__} [--flag value …]", "", summary, ""]
    margin = max(map(len, descriptions), default=0) + 6
    for flag, (description, default) in descriptions.items():
        text = f"{description} [{default}]" if default else description
        lines += textwrap.wrap(text, 120, initial_indent=f"  --{flag}".ljust(margin), subsequent_indent=" " * margin)
    return "\n".join(lines)


def read_docstring(function: Callable[..., Any]) -> tuple[str, dict[str, tuple[str, str]]]:
    """→ the docstring up to its "Args:", and parameter → its description and its default ("" where there is none)."""
    summary, _, described = inspect.getdoc(function).partition("\nArgs:\n")
    found = dict(re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", described, re.MULTILINE))
    parameters = {}
    for flag, parameter in inspect.signature(function).parameters.items():
        default = "" if parameter.default in (parameter.empty, None) else parameter.default
        default = ", ".join(default) if isinstance(default, tuple) else str(default)
        parameters[flag] = " ".join(found[flag].split()), default
    return summary.strip(), parameters


# --------------------------------------------------------------------------------------------------------------- files


def keep_inputs(outputs: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Raise ExpectedError (exit 2) where a path to be written is, holds or lies in one that is read, links followed.

    Both are flag → path. None, and what does not exist (a Hub id), is no input.
    """

    def same(one: Path, other: Path) -> bool:
        return one == other or (one.exists() and one.samefile(other))

    for flag, output in outputs.items():
        for name, given in inputs.items():
            if not (output and given and os.path.exists(given)):
                continue
            written, read = Path(str(output)).resolve(), Path(str(given)).resolve()
            if same(written, read):
                how = "is"
            elif any(same(parent, read) for parent in written.parents):
                how = "lies in"
            elif any(same(parent, written) for parent in read.parents if written.exists()):
                how = "holds"
            else:
                continue
            message = f"--{flag} {output} {how} --{name} {given}, which is read; choose another --{flag}"
            raise ExpectedError(message, ExitCode.USAGE)


def make_output_directory(path: Any, flag: str) -> None:
    """Raises ExpectedError (exit 8) when it can't be made or written to."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise ExpectedError(f"--{flag} {path} can't be made ({error.strerror}); choose another", ExitCode.DISK)
    if not os.access(path, os.W_OK):
        raise ExpectedError(f"--{flag} {path} is not writable; choose another", ExitCode.DISK)


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
            os.chmod(temporary, os.stat(path).st_mode & 0o777 if os.path.exists(path) else 0o666 & ~_umask())
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


def lock_file(file: Any) -> None:
    """Lock an open file against other processes until it is closed. Raises BlockingIOError where one has it."""
    if WINDOWS:
        import msvcrt

        try:
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            raise BlockingIOError
        return
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sync_directory(directory: str | os.PathLike) -> None:
    """Make renames and new names in a directory survive a power cut."""
    if WINDOWS:  # where a directory can't be opened
        return
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
    with open(f, mode, encoding=None if "b" in mode else "utf-8-sig") as file:  # editors may leave a byte order mark
        return json.load(file)
