"""Look at a data set before training on it: one web page with figures, and the same figures as JSON.

    python data_report.py --data_path alpaca_data.json --output_dir report
    python data_report.py --data_path mine.json --compare alpaca_data.json --against eval_tasks.jsonl \\
        --tokenizer huggyllama/llama-7b --output_dir report

writes report/index.html (nothing else is needed to read it), report/report.json and report/verb_noun.png. Row numbers
count from 0. Charts need matplotlib (pip install -r requirements-dev.txt).
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alpaca.common import ExitCode, ExpectedError, atomic_write, jdump, run_main
from alpaca.data.examples import load_examples
from alpaca.report import verb_noun
from alpaca.report.measures import (
    contamination,
    find_duplicates,
    histogram,
    inspect_outputs,
    measure_lengths,
    near_duplicates,
    shared_bins,
    similarity_to_seeds,
    token_figures,
)
from alpaca.training.models import from_pretrained
from alpaca.training.special_tokens import complete_tokenizer

ROOT = Path(__file__).resolve().parent


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data_path", required=True, help=".json or .jsonl file of examples, or a Hub data set")
    add("--output_dir", required=True, help="directory for index.html, report.json and verb_noun.png")
    add("--compare", metavar="DATA_PATH", help="a second data set, shown beside the first (default: none)")
    add(
        "--against",
        metavar="FILE",
        help="evaluation tasks that must not be in the data: examples, or tasks in the form of seed_tasks.jsonl "
        "(default: none)",
    )
    add("--seed_tasks_path", default=str(ROOT / "seed_tasks.jsonl"), help="seed tasks to measure similarity to")
    add("--tokenizer", metavar="DIR_OR_ID", help="count tokens with this tokenizer as well (default: words only)")
    add("--model_max_length", type=int, default=512, help="tokens after which training cuts an example (default: 512)")
    add(
        "--parser",
        help=f"spaCy model (name or directory) that finds verbs and objects, or '{verb_noun.RULE}' (default: "
        f"{verb_noun.DEFAULT_MODEL} where it is installed, the rule elsewhere)",
    )
    add("--verb_noun_png", metavar="FILE", help="where the sunburst goes (default: OUTPUT_DIR/verb_noun.png)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.model_max_length < 1:
        raise ExpectedError(
            f"--model_max_length {args.model_max_length} is no length; give 1 token or more", ExitCode.USAGE
        )
    page = import_page()
    prepare_directory(args.output_dir)
    sets = [(args.data_path, load_examples(args.data_path))]
    if args.compare:
        with naming("--compare"):
            sets.append((args.compare, load_examples(args.compare)))
    seeds = load_tasks(args.seed_tasks_path, "--seed_tasks_path")
    tasks = load_tasks(args.against, "--against") if args.against else None
    parser = verb_noun.load_parser(args.parser)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None

    lengths = [measure_lengths(examples, tokenizer) for _, examples in sets]
    bins = {field: shared_bins([measured[field] for measured in lengths]) for field in lengths[0]}
    reports = []
    names = short_names([path for path, _ in sets])
    for name, (path, examples), measured in zip(names, sets, lengths, strict=True):
        pairs, found_by = verb_noun.root_verbs([example["instruction"] for example in examples], parser)
        report = {
            "name": name,
            "data_path": path,
            "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest() if os.path.isfile(path) else None,
            "rows": len(examples),
            "rows_with_input": sum(bool(example["input"]) for example in examples),
            "lengths": {field: histogram(values, bins[field]) for field, values in measured.items()},
            "outputs": inspect_outputs([example["output"] for example in examples]),
            "duplicates": find_duplicates(examples),
            "near_duplicates": near_duplicates([example["instruction"] for example in examples]),
            "seeds": similarity_to_seeds(examples, seeds),
            "root_verbs": {
                "parser": found_by,
                "rows_with_verb": sum(bool(verb) for verb, _ in pairs),
                "rows_with_object": sum(all(pair) for pair in pairs),
                "top": verb_noun.sunburst_counts(pairs),
            },
        }
        if tokenizer:
            report["tokens"] = token_figures(measured, args.model_max_length)
        if tasks:
            report["contamination"] = contamination(examples, tasks)
        reports.append(report)

    settings = {key: value for key, value in vars(args).items() if key not in ("output_dir", "verb_noun_png")}
    jdump({"settings": settings, "data_sets": reports}, os.path.join(args.output_dir, "report.json"))
    html = page.build(reports, [examples for _, examples in sets], settings)
    with atomic_write(os.path.join(args.output_dir, "index.html")) as file:
        file.write(html)
    png = args.verb_noun_png or os.path.join(args.output_dir, "verb_noun.png")
    with atomic_write(png, "wb") as file:
        page.sunburst_png(reports[0], file)
    print(f"wrote {os.path.join(args.output_dir, 'index.html')}, report.json and {png}")


def import_page() -> Any:
    """The module that draws; it needs matplotlib, which nothing else in this project does."""
    try:
        from alpaca.report import page as report_page
    except ImportError as error:
        raise ExpectedError(
            f"charts need matplotlib ({error}); pip install matplotlib, or pip install -r requirements-dev.txt",
            ExitCode.USAGE,
        )
    return report_page


def prepare_directory(directory: str) -> None:
    try:
        os.makedirs(directory, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ExpectedError(f"--output_dir {directory} can't be made ({error.strerror}); choose another", ExitCode.DISK)
    if not os.access(directory, os.W_OK):
        raise ExpectedError(f"--output_dir {directory} is not writable; choose another", ExitCode.DISK)


@contextlib.contextmanager
def naming(flag: str) -> Iterator[None]:
    """Errors of shared functions name the flag that training uses; here they name the flag of this script."""
    try:
        yield
    except ExpectedError as error:
        raise ExpectedError(re.sub("--(data_path|model_name_or_path)", flag, str(error)), error.exit_code)


def load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    with naming("--tokenizer"):
        tokenizer = from_pretrained(AutoTokenizer, name)
    complete_tokenizer(tokenizer)
    tokenizer.model_max_length = 1 << 30  # true lengths: the report says what a limit would cut
    return tokenizer


def load_tasks(path: str, flag: str) -> list[dict[str, str]]:
    """Tasks as [{"instruction", "input"}]: from examples, or from the form of seed_tasks.jsonl, an entry an instance.

    Raises ExpectedError (exit 3) with the first record that is neither.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        lines = [line for line in text.split("\n") if line.strip()]
        records = [json.loads(line) for line in lines] if path.endswith(".jsonl") else json.loads(text)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ExpectedError(f"{flag} {path} can't be read: {reason}; give a .json or .jsonl file", ExitCode.DATA)
    tasks = []
    for number, record in enumerate(records if isinstance(records, list) else [records]):
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


def short_names(paths: Sequence[str]) -> list[str]:
    """File names without directories where they tell the sets apart."""
    names = [os.path.basename(path.rstrip("/")) for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


if __name__ == "__main__":
    run_main(main)
