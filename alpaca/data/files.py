"""Files → lists of records, whatever the file is called: a JSON list, JSON lines, CSV or Parquet, gzipped or not.

What can be read in one way only is taken; of the rest the error says what to make of it.
"""

import contextlib
import csv
import gzip
import json
import os
import re
import tempfile
import zlib
from typing import Any

from alpaca.common import ExitCode, ExpectedError, notice

_SPACE = re.compile(r"\s*")
_TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_CHOICE = "give a .json, .jsonl, .csv or .parquet file, or a Hub data set such as tatsu-lab/alpaca"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILE_NAME = re.compile(r".*\.(json|jsonl|csv|tsv|parquet|gz)")


def bad_data(message: str) -> ExpectedError:
    return ExpectedError(message, ExitCode.DATA)


def read_records(data_path: str, flag: str = "") -> list[Any]:
    """The records of a file, or of the "train" split of a Hub data set, unchecked.

    Raises ExpectedError (exit 3), which begins with `flag`, where another than --data_path named the file.
    """
    try:
        return _read(data_path)
    except ExpectedError as error:
        if not flag:
            raise
        raise ExpectedError(f"{flag} {str(error).removeprefix('--data_path ')}", error.exit_code)


def _read(data_path: str) -> list[Any]:
    if os.path.isfile(data_path):
        with _readable(data_path), open(data_path, "rb") as file:
            start = file.read(4)
        name, _ = os.path.splitext(data_path) if data_path.endswith(".gz") else (data_path, "")
        kind = "parquet" if start == b"PAR1" else _TABLES.get(os.path.splitext(name)[1].lower())
        return _read_table(data_path, kind) if kind else _read_json(data_path)
    if _HUB_ID.fullmatch(data_path) and not _FILE_NAME.fullmatch(data_path) and not os.path.exists(data_path):
        return _read_hub(data_path)
    what = "is a directory" if os.path.isdir(data_path) else "does not exist"
    raise bad_data(f"--data_path {data_path} {what}; {_CHOICE}")


@contextlib.contextmanager
def _readable(path: str) -> Any:
    try:
        yield
    except UnicodeDecodeError as error:
        raise bad_data(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8, or unpack it; {_CHOICE}")
    except PermissionError:
        raise bad_data(f"{path} can't be read; check its permissions")
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise bad_data(f"{path} is a damaged gzip file; copy or download it again")


def _read_text(path: str) -> str:
    with _readable(path), open(path, "rb") as file:
        content = file.read()
        return (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8-sig")


def _read_json(path: str) -> list[Any]:
    """A list of records; or one record after the other, on a line each or not; or an object that holds a list."""
    text, values = _read_text(path), []
    decoder, position = json.JSONDecoder(), 0
    try:
        while (position := _SPACE.match(text, position).end()) < len(text):
            value, position = decoder.raw_decode(text, position)
            values.append(value)
    except json.JSONDecodeError as error:
        raise bad_data(f"{path} is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}; {_CHOICE}")
    except RecursionError:
        raise bad_data(f"{path} is nested too deeply to hold examples (after line {_line(text, position)})")
    except ValueError:  # thousands of digits
        raise bad_data(f"{path} holds a number too large to be data (after line {_line(text, position)})")
    if len(values) == 1 and isinstance(values[0], list):
        return values[0]
    return _records_of(path, values[0]) if len(values) == 1 and isinstance(values[0], dict) else values


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _records_of(path: str, value: dict[str, Any]) -> list[Any]:
    """A file that is one object: {"data": [records]}, columns {"instruction": [texts], …}, or one record."""
    if isinstance(value.get("instruction"), list | dict):
        columns = {name: column for name, column in value.items() if isinstance(column, list | dict)}
        index = {name: list(column) if isinstance(column, dict) else len(column) for name, column in columns.items()}
        if any(rows != index["instruction"] for rows in index.values()):
            raise bad_data(f"{path} holds columns of different lengths ({', '.join(columns)}); save a list of records")
        columns = [list(column.values()) if isinstance(column, dict) else column for column in columns.values()]
        return [dict(zip(index, row, strict=True)) for row in zip(*columns, strict=True)]
    lists = [name for name, records in value.items() if isinstance(records, list) and _have_instructions(records)]
    if len(lists) > 1:
        raise bad_data(f"{path} holds several lists of examples ({', '.join(lists)}); save the one you mean by itself")
    if lists:
        notice(f'{path}: the examples are the list "{lists[0]}" in it')
        return value[lists[0]]
    return [value]


def _have_instructions(records: list[Any]) -> bool:
    return any(isinstance(record, dict) and "instruction" in record for record in records)


def _read_table(path: str, kind: str) -> list[Any]:
    """CSV (its cells all texts, as they stand) or Parquet."""
    import datasets

    options = {}
    if kind == "csv":
        with _readable(path), (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
            heading = file.readline()
        separator = max(",;\t", key=heading.count)
        names = next(csv.reader([heading], delimiter=separator), [])
        if len(set(names)) < len(names) or not heading.strip():
            raise bad_data(f"{path} does not begin with a line of column names, each once: instruction,input,output")
        texts = datasets.Features({name: datasets.Value("string") for name in names})
        options = {"sep": separator, "features": texts, "keep_default_na": False, "encoding": "utf-8-sig"}
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as cache:
            table = datasets.load_dataset(
                kind, data_files=path, split="train", cache_dir=cache, keep_in_memory=True, **options
            )
            return table.to_list()
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise bad_data(f"{path} is no valid {kind} file: {reason}")
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _read_hub(name: str) -> list[Any]:
    import datasets

    try:
        return datasets.load_dataset(name, split="train").to_list()
    except (OSError, ValueError, RuntimeError) as error:  # offline, unknown, private, made by a script
        reason = " ".join(str(error).split())[:300]
        raise bad_data(
            f"the Hub data set {name} can't be loaded ({type(error).__name__}: {reason}). Check the name and the "
            "network (HF_HUB_OFFLINE, HF_TOKEN), or download its file and give --data_path that"
        )
