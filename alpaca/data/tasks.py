"""Evaluation tasks and seed tasks, in whatever form their file has."""

from alpaca.common import ExitCode, ExpectedError
from alpaca.data.files import read_records


def load_tasks(path: str, flag: str) -> list[dict[str, str]]:
    """Tasks as [{"instruction", "input"}]: from examples, or from the form of seed_tasks.jsonl, an entry an instance.

    Raises ExpectedError (exit 3) with the first record that is neither.
    """
    tasks = []
    for number, record in enumerate(read_records(path, flag)):
        instances = record.get("instances", [record]) if isinstance(record, dict) else None
        inputs = [i.get("input") or "" for i in instances or [] if isinstance(i, dict)] if instances else []
        if not inputs or not all(isinstance(text, str) for text in [record.get("instruction"), *inputs]):
            raise ExpectedError(
                f'{flag} {path}: record {number}, counted from 0, has no "instruction" with an "input" or "instances"; '
                "mend or remove it",
                ExitCode.DATA,
            )
        tasks += [{"instruction": record["instruction"], "input": text} for text in inputs]
    if not tasks:
        raise ExpectedError(f"{flag} {path} holds no tasks; choose another file", ExitCode.DATA)
    return tasks
